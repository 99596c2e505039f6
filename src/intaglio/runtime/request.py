"""Request types of the runtime (Request, SamplingParams) and the events it returns. Token ids only, no text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

MAX_N = 128  # choices of a request
MAX_LOGPROBS = 20  # OpenAI's bound
MAX_LOGPROB_TOKEN_IDS = 128
MAX_PENALTY = 2.0  # OpenAI's bound on presence and frequency penalties
MAX_LOGIT_BIAS = 100.0  # OpenAI's bound

TokenIds = Sequence[int]

FinishReason = Literal["stop", "length", "abort", "deadline", "error"]


class ParamsError(ValueError):
    """Raised for invalid sampling parameters: a wrong type, a value out of range, or a contradiction between two."""


class RequestError(ValueError):
    """Raised for a request that can never be served.

    For example, its prompt is too long or its id is in use.
    """


class Refused(RuntimeError):
    """Raised for a request that the engine cannot serve now, or not within the request's timeout.

    reason: "full" (too many sequences wait), "late" (the request would miss its timeout), "draining" or "failed".
    retry_after: number of seconds after which to try again; None if this engine will not accept the request later,
    either.
    """

    def __init__(
        self, reason: Literal["full", "late", "draining", "failed"], message: str, retry_after: float | None
    ) -> None:
        super().__init__(message)
        self.reason, self.retry_after = reason, retry_after


@dataclass(frozen=True)
class Grammar:
    """Constraint on an output: a JSON schema, a regular expression, or a grammar in Lark syntax.

    Attributes:
        kind: language of `source`: "json_schema", "regex" or "lark".
        source: the schema, expression or grammar.
        before: "" if the whole output must match `source`. Else a Lark grammar of the whole output, in which `@answer`
            stands for the part that must match `source`, for example after some reasoning.

    Raises ParamsError for an unknown kind, or a source of a wrong type.
    """

    kind: Literal["json_schema", "regex", "lark"]
    source: str | Mapping[str, Any]
    before: str = ""

    def __post_init__(self) -> None:
        if self.kind not in ("json_schema", "regex", "lark"):
            raise ParamsError(f"grammar kind is {self.kind!r}; allowed: json_schema, regex, lark")
        if not isinstance(self.source, str) and (self.kind != "json_schema" or not isinstance(self.source, Mapping)):
            raise ParamsError(f"the source of a {self.kind} grammar is {type(self.source).__name__}; allowed: text")

    @property
    def text(self) -> str:
        """Returns the grammar's source as text.

        A JSON schema given as a dict is written as JSON, with its keys in their order.
        """
        return self.source if isinstance(self.source, str) else json.dumps(self.source)


class Matcher(Protocol):
    """Interface of an object that knows which tokens a grammar allows next in one output.

    advance() tells the object each token of the output. mask() returns the allowed tokens.
    """

    def mask(self) -> np.ndarray:
        """Returns the bit mask of the token ids that the grammar allows next.

        It is uint32 [(vocabulary + 31) // 32], lowest bit first; a bit of 1 means allowed.
        """

    def advance(self, token: int) -> bool:
        """Append a token to the output.

        Returns True, or False if the grammar does not allow the token; then nothing changes.
        """

    def rollback(self, n: int) -> None:
        """Undo the last `n` calls of advance()."""


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of a request. Raises ParamsError for an invalid value; the error says what is allowed.

    The output ends before the first of the `stop` strings, at a token of `stop_token_ids`, at an end-of-sequence token
    (unless `ignore_eos` is True), or after `max_tokens` tokens.

    The logit of each token id is changed in this order before sampling. `count` is how often the id is in the output.

    1. If the id is in the prompt or the output, a positive logit is divided by repetition_penalty, a negative one is
       multiplied by it.
    2. logit_bias[id] - presence_penalty * (count > 0) - frequency_penalty * count is added.
    3. Ids that `grammar`, `min_tokens`, `allowed_token_ids` or `bad_words` forbid are excluded.

    Log-probabilities are always those of the unchanged logits.

    Attributes:
        temperature: 0 for greedy sampling.
        top_k: number of likeliest tokens from which to sample; 0 for all.
        top_p: only the likeliest tokens that together have this probability can be sampled; 1 for all.
        min_p: tokens with less than this fraction of the likeliest token's probability cannot be sampled; 0 for all.
        seed: the same seed gives the same tokens, whatever other requests run; None for a random seed. Choice i has the
            seed `seed` + i.
        n: number of choices (outputs) to generate for the prompt.
        min_tokens: minimum number of tokens of the output. None of the first `min_tokens` tokens is an end-of-sequence
            token or in `stop_token_ids`, and a stop string that is complete within them does not end the output.
        allowed_token_ids: only these ids may be sampled; None for all.
        bad_words: texts that must not be generated. The last token of a text is not sampled after the text's other
            tokens.
        logprobs: number of likeliest tokens whose log-probabilities to return with each sampled token.
        logprob_token_ids: ids whose log-probabilities to return instead of the likeliest.
        prompt_logprobs: number of likeliest tokens whose log-probabilities to return with each prompt token; None for
            no log-probabilities of the prompt.
        include_stop_str_in_output: True if the output text includes the stop string.
        skip_special_tokens: True to leave special tokens out of the output text.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    ignore_eos: bool = False
    n: int = 1
    stop_token_ids: Sequence[int] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int = 0
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    min_tokens: int = 0
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()
    logprob_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        stops = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stops, list | tuple) or not all(isinstance(s, str) and s for s in stops):
            raise ParamsError(f"stop is {stops!r}; allowed: a string of at least one character, or a list of them")
        object.__setattr__(self, "stop", tuple(stops))
        _whole("max_tokens", self.max_tokens, 1, None)
        _whole("min_tokens", self.min_tokens, 0, self.max_tokens)
        _real("temperature", self.temperature, 0, math.inf, "0 (greedy) or more, finite")
        _whole("top_k", self.top_k, 0, None)
        _real("top_p", self.top_p, math.ulp(0.0), 1, "above 0, up to 1")
        _real("min_p", self.min_p, 0, 1, "0 to 1")
        if self.seed is not None:
            _whole("seed", self.seed, 0, 2**63 - 1)
        _whole("n", self.n, 1, MAX_N)
        for name in ("presence_penalty", "frequency_penalty"):
            _real(name, getattr(self, name), -MAX_PENALTY, MAX_PENALTY, "-2 to 2")
        _real("repetition_penalty", self.repetition_penalty, math.ulp(0.0), math.inf, "above 0, finite; 1 is none")
        _whole("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            _whole("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        self._check_ids()

    def _check_ids(self) -> None:
        object.__setattr__(self, "stop_token_ids", tuple(sorted(_ids("stop_token_ids", self.stop_token_ids))))
        object.__setattr__(self, "logprob_token_ids", _ids("logprob_token_ids", self.logprob_token_ids))
        if len(self.logprob_token_ids) > MAX_LOGPROB_TOKEN_IDS:
            got = len(self.logprob_token_ids)
            raise ParamsError(f"logprob_token_ids has {got} ids; allowed: up to {MAX_LOGPROB_TOKEN_IDS}")
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", _ids("allowed_token_ids", self.allowed_token_ids))
            if not self.allowed_token_ids:
                raise ParamsError("allowed_token_ids is empty; allowed: at least one token id, or None")
        words = self.bad_words
        if not isinstance(words, list | tuple) or not all(isinstance(w, str) and w for w in words):
            raise ParamsError(f"bad_words is {words!r}; allowed: a list of texts of at least one character")
        object.__setattr__(self, "bad_words", tuple(words))
        if not isinstance(self.logit_bias, Mapping):
            raise ParamsError(f"logit_bias is {self.logit_bias!r}; allowed: token ids and what to add to their logits")
        for id, bias in self.logit_bias.items():
            _whole("logit_bias key", id, 0, None)
            _real("logit_bias", bias, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS, "-100 to 100")
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise ParamsError(f"grammar is {self.grammar!r}; allowed: a Grammar, or None")
        if self.grammar is not None and self.ignore_eos:
            raise ParamsError("ignore_eos is True; allowed: False with a grammar, because end-of-sequence ends it")

    @property
    def edits_logits(self) -> bool:
        """True if the logits are changed before sampling, because a penalty or a logit bias is set."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1 or self.logit_bias)


def _whole(name: str, value: object, low: int, high: int | None) -> None:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or int(value) < low or (high is not None and int(value) > high):  # type: ignore[call-overload]
        upper = "or more" if high is None else f"to {high}"
        raise ParamsError(f"{name} is {value!r}; allowed: a whole number, {low} {upper}")


def _ids(name: str, value: object) -> tuple[int, ...]:
    """Returns the token ids in `value` as a tuple without duplicates, in the given order. The ids of a set are sorted.

    name: the parameter's name, for the error. Raises ParamsError if `value` is not a list or set of token ids.
    """
    if not isinstance(value, list | tuple | frozenset | set):
        raise ParamsError(f"{name} is {value!r}; allowed: a list of token ids")
    for id in value:
        _whole(name, id, 0, None)
    return tuple(dict.fromkeys(sorted(value) if isinstance(value, frozenset | set) else value))


def _real(name: str, value: object, low: float, high: float, allowed: str) -> None:
    real = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not real or not low <= float(value) <= high or math.isinf(float(value)):  # type: ignore[arg-type]
        raise ParamsError(f"{name} is {value!r}; allowed: {allowed}")


@dataclass(frozen=True)
class Request:
    """A prompt for which to generate `params.n` choices (outputs). The engine never changes a Request.

    Attributes:
        id: text that is unique among live requests.
        prompt: token ids of the prompt.
        params: sampling parameters.
        eos_ids: token ids that end a sequence.
        stop_checker: function from the number of a choice to a new stop checker. A stop checker is a function that is
            called with each new token id, and returns True when a stop string is complete. None if there is none.
        scored: True to generate nothing, but collect the logits of all prompt positions in the sequence's `logits`, f32
            [tokens, vocabulary].
        matcher: function from the number of a choice to a new Matcher; required if `params.grammar` is given.
        priority: requests with a lower number are scheduled earlier and preempted later.
        queue_timeout: maximum seconds from arrival to the first step; None: no limit.
        timeout: maximum seconds from arrival to the end; None: no limit.
        salt: the request shares K/V only with requests that have the same salt.
        bad_words: sequences of token ids that must not be generated. The last id of a sequence is not sampled after the
            sequence's other ids.
    """

    id: str
    prompt: TokenIds
    params: SamplingParams = field(default_factory=SamplingParams)
    eos_ids: frozenset[int] = frozenset()
    stop_checker: Callable[[int], Callable[[int], bool]] | None = None
    scored: bool = False
    matcher: Callable[[int], Matcher] | None = None
    priority: int = 0
    queue_timeout: float | None = None
    timeout: float | None = None
    salt: str | None = None
    bad_words: Sequence[Sequence[int]] = ()


@dataclass(frozen=True)
class Fault:
    """The error that ended a sequence.

    Attributes:
        kind: "request": the sequence's own logits, grammar or stop checker failed. "step": a step that contained only
            this sequence failed twice. "worker": the device was lost in steps that contained only this sequence, or a
            lost device could not be replaced.
        message: text of the error.
    """

    kind: Literal["request", "step", "worker"]
    message: str


@dataclass(frozen=True)
class Scored:
    """A token with its log-probability, and log-probabilities of other tokens at the same position.

    All log-probabilities are natural logarithms of the softmax of the unchanged logits.

    Attributes:
        token: id of the token.
        logprob: log-probability of the token.
        top: pairs (token id, log-probability) for the likeliest tokens, or for the ids in `logprob_token_ids`.
        rank: 1 if the token is the likeliest, 2 for the next, and so on; None if the rank was not computed.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int | None = None


@dataclass(frozen=True)
class Usage:
    """Token counts and times of one choice (output). Times are in seconds by the engine's clock.

    Attributes:
        prompt_tokens: number of tokens of the prompt.
        cached_tokens: number of prompt tokens found in the prefix cache at the first step.
        output_tokens: number of generated tokens.
        preemptions: number of times that the choice was preempted.
        arrived: time of arrival.
        started: start of the first step; None if the choice ended before.
        first_token: time of the first token; None if the choice ended before.
        ended: time of the end.
    """

    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    preemptions: int
    arrived: float
    started: float | None
    first_token: float | None
    ended: float


@dataclass(frozen=True)
class Event:
    """A report of the engine about one choice, that is, about one output of a request.

    It reports a new token, the end of the choice, both, or log-probabilities of the prompt. An event with a
    finish_reason is the last event of its choice.

    Attributes:
        request: id of the request.
        index: number of the choice.
        scored: the new token with its log-probability; None if there is no new token.
        finish_reason: "stop", "length", "abort", "deadline" or "error"; None if the choice has not ended.
        fault: the error, if finish_reason is "error"; else None.
        usage: token counts and times of the choice, in its last event; else None.
        prompt: if prompt_logprobs was set, log-probabilities of the prompt tokens from the second on. They come once,
            in an event before the first token; else None.
    """

    request: str
    index: int = 0
    scored: Scored | None = None
    finish_reason: FinishReason | None = None
    fault: Fault | None = None
    usage: Usage | None = None
    prompt: tuple[Scored, ...] | None = None

    @property
    def token(self) -> int | None:
        """Returns the id of the new token; None if the event has no token."""
        return self.scored.token if self.scored else None
