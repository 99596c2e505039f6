"""How long steps take of late, and so how long a request would: by this an engine refuses what would be late.

Learned from what happens; it reads no clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

KEPT = 0.98  # of a step's weight after each later one: the last fifty or so count
NINE_IN_TEN = 0.9  # of the requests that end take no longer than `promise` says
STRIDE = 0.02  # how far one request moves that quantile, as a logarithm
LENGTHS = 0.05  # and that of lengths
LONG = 4.0  # times the usual length: longer than that an answer is not thought to be
LEAST, MOST = 1 / 8, 8.0  # bounds on what is learned of requests


@dataclass
class Pace:
    """A step takes `base + each * tokens` seconds: the weighted least squares of the steps so far, neither below 0.

    As long as all steps were alike nothing is known of `each`, and 0 is assumed: who is wrongly admitted teaches it,
    who is wrongly refused would not. Two quantiles are followed by steps up and down (Robbins and Monro, 1951): of
    what answers come to, `length`, for most end before the most that was asked for; and of real over raw time, `slip`,
    which is what bursts and preemption add, slowly, for a request tells of the load it met only when it ends.
    """

    slip: float = 1.0
    length: float = math.inf
    weight: float = 0.0
    tokens: float = 0.0  # weighted means, and sums of products about them
    drawn: float = 0.0
    seconds: float = 0.0
    squares: float = 0.0
    products: float = 0.0

    def step(self, tokens: int, drawn: int, seconds: float) -> None:
        """A step of so many token rows took so many seconds, and so many tokens were drawn from it."""
        self.weight = KEPT * self.weight + 1
        ahead, more = tokens - self.tokens, seconds - self.seconds
        share = 1 / self.weight
        self.tokens += share * ahead
        self.seconds += share * more
        self.drawn += share * (drawn - self.drawn)
        self.squares = KEPT * self.squares + (1 - share) * ahead * ahead
        self.products = KEPT * self.products + (1 - share) * ahead * more

    @property
    def each(self) -> float:
        """Seconds a token more in a step."""
        if self.squares <= 0 or self.products <= 0:
            return 0.0
        return min(self.products / self.squares, self.seconds / self.tokens)

    @property
    def base(self) -> float:
        """Seconds a step, whatever is in it."""
        return self.seconds - self.each * self.tokens

    def raw(self, prompts: int, outputs: float, sequences: int) -> float:
        """Seconds until `outputs` tokens are there, if `prompts` tokens are computed before the first, and each step
        draws one for each of `sequences`, beside as many rows of prompts as of late."""
        rows = sequences * self.tokens / self.drawn if self.drawn else 0
        return self.each * prompts + outputs * (self.base + self.each * rows)

    def outputs(self, most: int) -> float:
        """Tokens to reckon with for an answer of at most so many: all of them, unless answers are far shorter."""
        return min(most, LONG * self.length)

    def answered(self, outputs: int) -> None:
        """An answer came to so many tokens."""
        self.length = _moved(self.length, LENGTHS, outputs > self.length) if self.length < math.inf else outputs

    def promise(self, raw: float) -> float:
        """Seconds within which nine in ten of such requests end."""
        return self.slip * raw

    def ended(self, raw: float, seconds: float) -> None:
        """A request of which `raw` was said took so many seconds, or would have."""
        if raw > 0:
            self.slip = min(max(_moved(self.slip, STRIDE, seconds > self.promise(raw)), LEAST), MOST)


def _moved(quantile: float, stride: float, above: bool) -> float:
    """A quantile after one more value, which was above it or not."""
    return quantile * math.exp(stride * (NINE_IN_TEN if above else NINE_IN_TEN - 1))
