"""What is asked of the runtime (Request, SamplingParams) and what it answers (Event). Knows token ids, not text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

MOST_CHOICES = 128  # n: more is a batch of requests
MOST_LOGPROBS = 20  # OpenAI's bound; the runtime looks at whole rows of logits to find them
MOST_PENALTY = 2.0  # OpenAI's bound on presence and frequency penalties
MOST_BIAS = 100.0  # OpenAI's bound on a logit bias

FinishReason = Literal["stop", "length", "abort", "deadline", "error"]


class ParamsError(ValueError):
    """A sampling parameter outside its range."""


class RequestError(ValueError):
    """A request that can never be served: empty, too long, an id in use, or token ids that are no tokens."""


class Refused(RuntimeError):
    """A request that can not be served now, or not in time. reason: full, late, draining or failed; `retry_after`
    seconds, None: not here."""

    def __init__(
        self, reason: Literal["full", "late", "draining", "failed"], message: str, retry_after: float | None
    ) -> None:
        super().__init__(message)
        self.reason, self.retry_after = reason, retry_after


@dataclass(frozen=True)
class Grammar:
    """What an output must be: text matching a JSON schema, a regular expression, or a grammar in Lark's notation."""

    kind: Literal["json_schema", "regex", "lark"]
    source: str | Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.kind not in ("json_schema", "regex", "lark"):
            raise ParamsError(f"grammar kind is {self.kind!r}; allowed: json_schema, regex, lark")
        if not isinstance(self.source, str) and (self.kind != "json_schema" or not isinstance(self.source, Mapping)):
            raise ParamsError(f"the source of a {self.kind} grammar is {type(self.source).__name__}; allowed: text")

    @property
    def text(self) -> str:
        """The source as text; a schema given as an object is written as JSON."""
        return self.source if isinstance(self.source, str) else json.dumps(self.source, sort_keys=True)


class Matcher(Protocol):
    """Where an output stands in its grammar. The runtime asks, and tells it each token; it never sees the text."""

    def mask(self) -> np.ndarray:
        """The ids allowed next: uint32 [(vocabulary + 31) // 32], the lowest bit first."""

    def advance(self, token: int) -> bool:
        """Take one more token; False, changing nothing, if the grammar does not allow it."""

    def rollback(self, n: int) -> None:
        """Forget the last `n` tokens."""


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 switch a filter off.

    The same seed gives the same tokens whatever else runs at the time; None draws a fresh one. Choice i of `n` uses
    seed + i. Output ends before the first of the `stop` strings, at a token of `stop_token_ids`, at an end-of-sequence
    token (unless `ignore_eos`), or after `max_tokens`.

    What changes logits, in this order: repetition_penalty r (ids in prompt or output: l / r if l > 0, else l * r), then
    l + logit_bias[id] - presence_penalty * (count > 0) - frequency_penalty * count, with counts over the output; then
    the grammar. Log-probabilities are always those of the unchanged logits: `logprobs` of the likeliest tokens beside
    each token drawn, `prompt_logprobs` of them (None: not at all) beside each of the prompt.
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

    def __post_init__(self) -> None:
        stops = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stops, list | tuple) or not all(isinstance(s, str) and s for s in stops):
            raise ParamsError(f"stop is {stops!r}; allowed: a string of at least one character, or a list of them")
        object.__setattr__(self, "stop", tuple(stops))
        _whole("max_tokens", self.max_tokens, 1, None)
        _real("temperature", self.temperature, 0, math.inf, "0 (greedy) or more, finite")
        _whole("top_k", self.top_k, 0, None)
        _real("top_p", self.top_p, math.ulp(0.0), 1, "above 0, up to 1")
        _real("min_p", self.min_p, 0, 1, "0 to 1")
        if self.seed is not None:
            _whole("seed", self.seed, 0, 2**63 - 1)
        _whole("n", self.n, 1, MOST_CHOICES)
        for name in ("presence_penalty", "frequency_penalty"):
            _real(name, getattr(self, name), -MOST_PENALTY, MOST_PENALTY, "-2 to 2")
        _real("repetition_penalty", self.repetition_penalty, math.ulp(0.0), math.inf, "above 0, finite; 1 is none")
        _whole("logprobs", self.logprobs, 0, MOST_LOGPROBS)
        if self.prompt_logprobs is not None:
            _whole("prompt_logprobs", self.prompt_logprobs, 0, MOST_LOGPROBS)
        self._check_ids()

    def _check_ids(self) -> None:
        if not isinstance(self.stop_token_ids, list | tuple | frozenset | set):
            raise ParamsError(f"stop_token_ids is {self.stop_token_ids!r}; allowed: a list of token ids")
        for id in self.stop_token_ids:
            _whole("stop_token_ids", id, 0, None)
        object.__setattr__(self, "stop_token_ids", tuple(sorted(self.stop_token_ids)))
        if not isinstance(self.logit_bias, Mapping):
            raise ParamsError(f"logit_bias is {self.logit_bias!r}; allowed: token ids and what to add to their logits")
        for id, bias in self.logit_bias.items():
            _whole("logit_bias key", id, 0, None)
            _real("logit_bias", bias, -MOST_BIAS, MOST_BIAS, "-100 to 100")
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise ParamsError(f"grammar is {self.grammar!r}; allowed: a Grammar, or None")
        if self.grammar is not None and self.ignore_eos:
            raise ParamsError("ignore_eos is True with a grammar; allowed: False, for its end is an end of sequence")

    @property
    def edits_logits(self) -> bool:
        """Whether anything but the grammar changes logits before the draw."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1 or self.logit_bias)


def _whole(name: str, value: object, low: int, high: int | None) -> None:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or int(value) < low or (high is not None and int(value) > high):  # type: ignore[call-overload]
        upper = "or more" if high is None else f"to {high}"
        raise ParamsError(f"{name} is {value!r}; allowed: a whole number, {low} {upper}")


def _real(name: str, value: object, low: float, high: float, allowed: str) -> None:
    real = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not real or not low <= float(value) <= high or math.isinf(float(value)):  # type: ignore[arg-type]
        raise ParamsError(f"{name} is {value!r}; allowed: {allowed}")


@dataclass(frozen=True)
class Request:
    """A prompt to continue `params.n` times. The engine never changes it.

    priority: lower goes first and is preempted last. queue_timeout: seconds until its first step; timeout: seconds in
    all; None waits for ever. salt: K/V is shared with requests of the same salt only. `stopped(index)` makes what is
    told each new token of choice `index` and answers whether its text now holds a stop string; `matcher(index)` makes
    that choice's Matcher, and must be given if `params.grammar` is. With `scored` nothing is generated: the sequence's
    `logits` fill with float32 [tokens, vocabulary].
    """

    id: str
    prompt: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    eos_ids: frozenset[int] = frozenset()
    stopped: Callable[[int], Callable[[int], bool]] | None = None
    scored: bool = False
    matcher: Callable[[int], Matcher] | None = None
    priority: int = 0
    queue_timeout: float | None = None
    timeout: float | None = None
    salt: str | None = None


@dataclass(frozen=True)
class Fault:
    """Why a request ended in error. kind: request (its own doing), step (its share of a step failed twice, alone) or
    worker (the device was lost and could not be had again)."""

    kind: Literal["request", "step", "worker"]
    message: str


@dataclass(frozen=True)
class Scored:
    """A token beside what the unchanged logits said of it: its log-probability, and the likeliest (id, logprob)."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    """One choice from arrival to end: tokens, and times by the engine's clock (None: it never came to that)."""

    prompt_tokens: int
    cached_tokens: int  # of the prompt, found computed at its first step
    output_tokens: int
    preemptions: int
    arrived: float
    started: float | None
    first_token: float | None
    ended: float


@dataclass(frozen=True)
class Event:
    """One token of choice `index` of a request, or its end, or both; after a finish_reason nothing follows for it.

    `prompt` comes once, in an event of its own before the first token, if prompt_logprobs were asked for: one a token
    from the second on. finish_reason: stop, length, abort, deadline, or error, with its `fault`.
    """

    request: str
    index: int = 0
    scored: Scored | None = None
    finish_reason: FinishReason | None = None
    fault: Fault | None = None
    usage: Usage | None = None  # with the end
    prompt: tuple[Scored, ...] | None = None

    @property
    def token(self) -> int | None:
        return self.scored.token if self.scored else None
