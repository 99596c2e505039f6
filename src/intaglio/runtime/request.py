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
    """Raised for sampling parameters that are not allowed: of a wrong type, out of range, or excluding each other."""


class RequestError(ValueError):
    """Raised for a request that can never be served, such as an empty or too long prompt, or an id that is in use."""


class Refused(RuntimeError):
    """Raised for a request that cannot be served now, or not within its timeout.

    reason: full (too many sequences wait), late (it would miss its timeout), draining or failed. retry_after: seconds
    after which to retry; None: this engine will not admit it later either.
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
        kind: the language of `source`.
        source: the schema, expression or grammar.
        before: a Lark grammar of the whole output, in which `@answer` stands for the constraint; for instance,
            reasoning and then an answer. "": the constraint is the whole output.

    Raises ParamsError for an unknown kind or a source of a wrong type.
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
        """The grammar's source as text; a JSON schema given as a dict is serialised, its keys in their order."""
        return self.source if isinstance(self.source, str) else json.dumps(self.source)


class Matcher(Protocol):
    """Interface of a grammar's state for one output. The state advances by token ids."""

    def mask(self) -> np.ndarray:
        """Bit mask of the token ids allowed next: uint32 [(vocabulary + 31) // 32], lowest bit first."""

    def advance(self, token: int) -> bool:
        """Append a token. Returns True; False, changing nothing, if the grammar does not allow it."""

    def rollback(self, n: int) -> None:
        """Undo the last `n` calls of advance()."""


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of a request. Raises ParamsError, naming the field and what is allowed.

    The output ends before the first of the `stop` strings, at a token of `stop_token_ids`, at an end-of-sequence token
    (unless `ignore_eos`), or after `max_tokens` tokens.

    The logit l of a token id is changed in this order. Log-probabilities are always those of the unchanged logits.

    1. repetition_penalty r, if the id is in the prompt or the output: l / r if l > 0, else l * r.
    2. l + logit_bias[id] - presence_penalty * (count > 0) - frequency_penalty * count. count: how often the id is in
       the output.
    3. The masks of `grammar`, `min_tokens`, `allowed_token_ids` and `bad_words`.

    Attributes:
        temperature: 0 is greedy.
        top_k, top_p, min_p: sampling filters; 0, 1 and 0 switch them off.
        seed: the same seed gives the same tokens whatever else runs at the time; None: a random seed. Choice i of `n`
            uses seed + i.
        n: number of outputs (choices) for the prompt.
        min_tokens: no end of sequence, no token of `stop_token_ids` and no stop string before that many tokens.
        allowed_token_ids: draw from these ids alone; None: all.
        bad_words: texts that must not be generated; the last token of each is not drawn after the others.
        logprobs: how many of the likeliest tokens to return with each sampled token.
        logprob_token_ids: return the log-probabilities of these ids instead of the likeliest.
        prompt_logprobs: how many of the likeliest tokens to return with each prompt token; None: no prompt scores.
        include_stop_str_in_output: True if the text ends after the stop string; False: before it.
        skip_special_tokens: True to leave special tokens out of the text.
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
        """True if logits are changed before sampling, by a penalty or a logit bias."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1 or self.logit_bias)


def _whole(name: str, value: object, low: int, high: int | None) -> None:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or int(value) < low or (high is not None and int(value) > high):  # type: ignore[call-overload]
        upper = "or more" if high is None else f"to {high}"
        raise ParamsError(f"{name} is {value!r}; allowed: a whole number, {low} {upper}")


def _ids(name: str, value: object) -> tuple[int, ...]:
    """`value` as a tuple of token ids without duplicates, in the given order; sets are sorted.

    name: the parameter's name, for the ParamsError if the value is not a list of token ids.
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
    """A prompt to continue `params.n` times. The engine never changes it.

    Attributes:
        id: unique among live requests.
        prompt: token ids.
        params: sampling parameters.
        eos_ids: token ids that end a sequence.
        stop_checker: stop_checker(index) makes the stop checker of a choice, which is called with each new token and
            returns True when a stop string is complete.
        scored: True to generate nothing, and collect the logits of all prompt positions in the sequence's `logits`, f32
            [tokens, vocabulary].
        matcher: matcher(index) makes the Matcher of a choice; needed if `params.grammar` is given.
        priority: a request with a lower number is scheduled earlier and preempted later.
        queue_timeout: seconds from arrival to the first step; None: no limit.
        timeout: seconds from arrival to the end; None: no limit.
        salt: K/V is shared only between requests of the same salt.
        bad_words: sequences of token ids; the last id of each is not drawn after the others.
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
        kind: "request": the sequence's own logits, grammar or stop checker failed. "step": a step with only this
            sequence failed twice. "worker": steps with only this sequence lost the device, or a lost device could not
            be replaced.
        message: the error's text.
    """

    kind: Literal["request", "step", "worker"]
    message: str


@dataclass(frozen=True)
class Scored:
    """A token with its log-probability, and the log-probabilities of other tokens at its position.

    All are natural logarithms under the softmax of the unchanged logits.

    Attributes:
        token: id of the token.
        logprob: its log-probability.
        top: (id, log-probability) of the likeliest tokens, or of the ids in `logprob_token_ids`.
        rank: 1 if the token is the likeliest, 2 for the next, and so on; None if the rank was not computed.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int | None = None


@dataclass(frozen=True)
class Usage:
    """Token counts and times of one choice. Times are seconds by the engine's clock; None: not reached.

    Attributes:
        prompt_tokens, output_tokens: numbers of tokens.
        cached_tokens: prompt tokens found in the prefix cache at its first step.
        preemptions: times the choice was preempted.
        arrived, started, first_token, ended: times of arrival, first step, first token and end.
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
    """What happened to a choice of a request: a new token, the choice's end, both, or the scores of the prompt.

    An event with a finish_reason is the last of its choice.

    Attributes:
        request: id of the request.
        index: number of the choice.
        scored: the new token as a Scored (its id, with log-probabilities if asked for), or None.
        finish_reason: stop, length, abort, deadline, or error with a `fault`.
        fault: why the choice ended in error; else None.
        usage: token counts and times, in the last event of a choice; else None.
        prompt: scores of the prompt tokens from the second on, once, in an event before the first token, if
            prompt_logprobs was set.
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
        """Id of the new token; None if the event has none."""
        return self.scored.token if self.scored else None
