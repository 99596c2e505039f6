"""A request: what is wanted (SamplingParams), and how far it has come (Request). Knows token ids, not text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from intaglio.batch import Sampling


class ParamsError(ValueError):
    """A sampling parameter outside its range."""


class RequestError(ValueError):
    """A request that can not be served: empty, too long, or with ids that are not tokens."""


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 switch a filter off.

    The same seed gives the same tokens whatever else runs at the time; None draws a fresh one. Output ends before the
    first of the `stop` strings, at an end-of-sequence token (unless `ignore_eos`), or after `max_tokens`.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    ignore_eos: bool = False

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


def _whole(name: str, value: object, low: int, high: int | None) -> None:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or int(value) < low or (high is not None and int(value) > high):  # type: ignore[call-overload]
        upper = "or more" if high is None else f"to {high}"
        raise ParamsError(f"{name} is {value!r}; allowed: a whole number, {low} {upper}")


def _real(name: str, value: object, low: float, high: float, allowed: str) -> None:
    real = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not real or not low <= float(value) <= high or math.isinf(float(value)):  # type: ignore[arg-type]
        raise ParamsError(f"{name} is {value!r}; allowed: {allowed}")


@dataclass(eq=False)
class Request:
    """One sequence from arrival to end. The engine owns all that follows `scored`.

    `stopped` is told each new token and answers whether the text now holds a stop string (the runtime has no
    tokenizer). With `scored` nothing is generated: `logits` fills with float32 [tokens, vocabulary], a piece a step.
    """

    id: str
    prompt: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    eos_ids: frozenset[int] = frozenset()
    stopped: Callable[[int], bool] | None = None
    scored: bool = False

    arrival: int = -1  # order of arrival: FCFS, and the youngest is preempted first
    state: str = "new"  # new, waiting, running, ended
    sampling: Sampling = field(default_factory=Sampling)
    output: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    computed: int = 0  # tokens whose K/V is in the blocks
    preemptions: int = 0
    finish_reason: str | None = None  # stop, length, error, abort
    error: str | None = None
    times: dict[str, float] = field(default_factory=dict)  # arrived, first_token, ended: the engine's clock

    @property
    def length(self) -> int:
        """Tokens so far, prompt and output."""
        return len(self.prompt) + len(self.output)

    @property
    def remaining(self) -> int:
        """Tokens whose K/V is still to be computed before the next one can be drawn."""
        return self.length - self.computed

    def longest(self, context: int) -> int:
        """K/V slots it may come to need: the last token of an output is never fed back."""
        return min(context, len(self.prompt) + (0 if self.scored else self.params.max_tokens - 1))

    def tokens(self, start: int, n: int) -> list[int]:
        """`n` of its tokens from position `start`."""
        split = len(self.prompt)
        return [*self.prompt[start : start + n], *self.output[max(0, start - split) : max(0, start + n - split)]]
