"""Synthetic workloads: request lengths as in public traces, arrivals as a renewal process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SHARES = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.8, 0.9, 0.95, 0.99, 0.999, 1)


@dataclass(frozen=True)
class Trace:
    """The distribution of prompt and output lengths in a public trace of requests.

    Prompt and output lengths are drawn independently, because in these traces they are hardly correlated.

    Attributes:
        source: name of the trace.
        prompt: prompt lengths in tokens at the quantiles SHARES; between two quantiles, lengths are interpolated
            linearly.
        output: output lengths in tokens, in the same form.
    """

    source: str
    prompt: tuple[int, ...]
    output: tuple[int, ...]

    @property
    def most(self) -> int:
        """The number of tokens, prompt and output together, that about 99 of 100 requests do not exceed."""
        return self.prompt[10] + self.output[10]


TRACES = {
    "code": Trace(
        "Azure LLM inference trace 2023, code (CC-BY-4.0)",
        (3, 17, 75, 147, 578, 1469, 2744, 3192, 5188, 7303, 7436, 7437, 7437),
        (6, 6, 6, 7, 9, 13, 24, 29, 55, 90, 251, 825, 1899),
    ),
    "conversation": Trace(
        "Azure LLM inference trace 2023, conversation (CC-BY-4.0)",
        (2, 29, 181, 207, 396, 1020, 1189, 1315, 2734, 4083, 4142, 6179, 14050),
        (7, 16, 41, 54, 85, 129, 395, 400, 424, 451, 601, 954, 1000),
    ),
    "document": Trace(
        "arXiv summaries, as simulators of serving use them",
        (1, 73, 749, 1242, 1986, 2730, 3370, 3490, 3702, 3813, 3933, 4012, 4054),
        (5, 36, 60, 78, 115, 167, 242, 268, 372, 736, 3271, 3844, 4056),
    ),
}


@dataclass(frozen=True)
class LoadRequest:
    """A planned request of a load test.

    Attributes:
        at: planned arrival, in seconds after the beginning of the load.
        prompt: number of prompt tokens.
        output: number of output tokens.
    """

    at: float
    prompt: int
    output: int


def trace(name: str) -> Trace:
    """The Trace called `name`, such as "conversation": prompt and output lengths of a public trace of requests.

    Raises ValueError, with the known names, if there is no such trace.
    """
    if name not in TRACES:
        raise ValueError(f"no workload called {name!r}; there are {', '.join(TRACES)}")
    return TRACES[name]


def fitting(t: Trace, context: int | None) -> float:
    """The factor by which the lengths of trace `t` must be multiplied to fit a context.

    With this factor about 99 of 100 requests fit. context: length of the context in tokens. The factor is 1 if the
    lengths fit unchanged, or if `context` is None or 0. It is never above 1.
    """
    return min(1.0, context / t.most) if context else 1.0


def arrivals(n: int, rate: float, cv: float, rng: np.random.Generator) -> np.ndarray:
    """Random arrival times of `n` requests, in seconds, ascending: float [n].

    The gaps between arrivals are gamma distributed with mean 1 / `rate` and coefficient of variation `cv`. With cv = 1
    the arrivals are a Poisson process; with a larger `cv` they come in bursts. If `rate` is infinite, all requests
    arrive at 0. Raises ValueError unless `rate` and `cv` are above 0.
    """
    if not rate > 0 or not cv > 0:
        raise ValueError(f"rate is {rate} and cv is {cv}; allowed: above 0")
    if math.isinf(rate):
        return np.zeros(n)
    return np.cumsum(rng.gamma(1 / cv**2, cv**2 / rate, n))


def draw(
    t: Trace, n: int, rate: float, cv: float = 1.0, scale: float = 1.0, context: int | None = None, seed: int = 0
) -> list[LoadRequest]:
    """Draw `n` random requests from the trace `t`. Returns LoadRequests in order of arrival.

    Args:
        t: the trace from which prompt and output lengths are drawn.
        n: number of requests.
        rate: mean arrivals per second; inf: all requests arrive at once.
        cv: coefficient of variation of the gaps between arrivals.
        scale: factor by which all lengths are multiplied.
        context: length of the model's context in tokens. Outputs are cut to half of it, then prompts to what the output
            leaves. None: no length is cut.
        seed: random seed.

    Raises ValueError unless `rate` and `cv` are above 0.
    """
    rng = np.random.default_rng(seed)
    at = arrivals(n, rate, cv, rng)
    prompt, output = (_lengths(knots, n, scale, rng) for knots in (t.prompt, t.output))
    if context is not None:
        output = np.minimum(output, max(1, context // 2))
        prompt = np.minimum(prompt, context - output)
    return [LoadRequest(float(a), int(p), int(o)) for a, p, o in zip(at, prompt, output, strict=True)]


def _lengths(knots: Sequence[int], n: int, scale: float, rng: np.random.Generator) -> np.ndarray:
    """Draw `n` random lengths in tokens. Returns an int array [n]; each length is at least 1.

    knots: lengths at the quantiles SHARES; between two quantiles, lengths are interpolated linearly. scale: factor by
    which each length is multiplied before it is rounded to a whole number.
    """
    return np.maximum(1, np.rint(scale * np.interp(rng.random(n), SHARES, knots))).astype(int)
