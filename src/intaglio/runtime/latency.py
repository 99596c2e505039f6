"""Latency estimator for admission control: predicts the duration of a request from recent steps and requests.

StepFit is the model of step times, which a router pools over replicas. Callers pass measured seconds in; nothing here
reads a clock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

STEP_DECAY = 0.98  # each step multiplies the weights of earlier ones by this: a window of about 50 steps
QUANTILE = 0.9  # both quantiles below are 90th percentiles
SLOWDOWN_STRIDE = 0.02  # step size of the slowdown, in its logarithm
LENGTH_STRIDE = 0.05  # step size of the output length, in its logarithm
LENGTH_MARGIN = 4.0  # the expected output length is at most this many times `output_length`
SLOWDOWN_MIN, SLOWDOWN_MAX = 1 / 8, 8.0


@dataclass(frozen=True)
class StepFit:
    """Model of step times, fitted to measured steps: seconds = seconds_per_step + seconds_per_token * tokens.

    The fit is a weighted least-squares fit. No coefficient is negative. If all steps had the same number of tokens,
    `seconds_per_token` cannot be fitted and is 0. The attributes are the sums that the fit needs:

    Attributes:
        weight: sum of the weights of all steps; 0 before the first step.
        mean_tokens: weighted mean of the number of token rows of a step.
        mean_seconds: weighted mean of the seconds of a step.
        tokens_squared: weighted sum of (tokens - mean_tokens)^2.
        tokens_by_seconds: weighted sum of (tokens - mean_tokens) * (seconds - mean_seconds).
    """

    weight: float = 0.0
    mean_tokens: float = 0.0
    mean_seconds: float = 0.0
    tokens_squared: float = 0.0
    tokens_by_seconds: float = 0.0

    @classmethod
    def pooled(cls, fits: Sequence[StepFit]) -> StepFit:
        """Returns one StepFit for the steps of all `fits`. Each step keeps its weight.

        Returns an empty StepFit for no fits. The sums are moved to the common means by the parallel axis theorem.
        """
        weight = sum(f.weight for f in fits)
        if not weight:
            return cls()
        tokens = sum(f.weight * f.mean_tokens for f in fits) / weight
        seconds = sum(f.weight * f.mean_seconds for f in fits) / weight
        return cls(
            weight, tokens, seconds, sum(f.tokens_squared + f.weight * (f.mean_tokens - tokens) ** 2 for f in fits),
            sum(f.tokens_by_seconds + f.weight * (f.mean_tokens - tokens) * (f.mean_seconds - seconds) for f in fits),
        )  # fmt: skip

    def with_step(self, tokens: int, seconds: float) -> StepFit:
        """Returns the StepFit after one more step, which had `tokens` token rows and took `seconds` seconds.

        The new step has weight 1. The weights of all earlier steps are multiplied by STEP_DECAY.
        """
        weight = STEP_DECAY * self.weight + 1
        ahead, more, share = tokens - self.mean_tokens, seconds - self.mean_seconds, 1 / weight
        return StepFit(
            weight, self.mean_tokens + share * ahead, self.mean_seconds + share * more,
            STEP_DECAY * self.tokens_squared + (1 - share) * ahead * ahead,
            STEP_DECAY * self.tokens_by_seconds + (1 - share) * ahead * more,
        )  # fmt: skip

    @property
    def seconds_per_token(self) -> float:
        """Returns the number of seconds that each token row adds to a step; 0 if it cannot be fitted.

        It is the slope of the fit.
        """
        if self.tokens_squared <= 0 or self.tokens_by_seconds <= 0:
            return 0.0
        return min(self.tokens_by_seconds / self.tokens_squared, self.mean_seconds / self.mean_tokens)

    @property
    def seconds_per_step(self) -> float:
        """Returns the part of a step's seconds that does not depend on its number of tokens.

        It is the intercept of the fit.
        """
        return max(0.0, self.mean_seconds - self.seconds_per_token * self.mean_tokens)


@dataclass
class LatencyEstimator:
    """Predicts how long steps and whole requests take, from the times of recent steps and requests.

    `steps` is the StepFit of recent steps. While the time per token cannot be fitted, estimates are rather too low than
    too high. So requests are admitted, and the estimator learns from their steps.

    Two 90th percentiles are tracked by stochastic approximation (Robbins and Monro, 1951):

    - `output_length`: number of output tokens of a request, since most outputs end well before max_tokens.
    - `slowdown`: measured time / estimated time of a request, which covers bursts and preemption. It changes slowly,
      because a request is observed only at its end.
    """

    slowdown: float = 1.0
    output_length: float = math.inf  # until the first request has ended
    steps: StepFit = StepFit()
    mean_sampled: float = 0.0  # weighted mean over steps of the number of tokens sampled

    def observe_step(self, tokens: int, sampled: int, seconds: float) -> None:
        """Update the estimates after a step. Returns nothing.

        tokens: token rows of the step. sampled: number of tokens that it sampled. seconds: time that it took.
        """
        self.steps = self.steps.with_step(tokens, seconds)
        self.mean_sampled += (sampled - self.mean_sampled) / self.steps.weight

    def forget_steps(self) -> None:
        """Forget all steps observed so far. `output_length` and `slowdown` are kept. Returns nothing."""
        self.steps, self.mean_sampled = StepFit(), 0.0

    def estimate(self, prefill_tokens: int, output_tokens: float, sequences: int) -> float:
        """Returns the estimated seconds of a prefill plus the decode steps after it. Waiting is not included.

        It is assumed that each decode step samples one token per sequence. Decode steps also contain prefill rows of
        other requests. So a step is assumed to have as many token rows per sampled token as recent steps had on
        average.

        Args:
            prefill_tokens: number of tokens to prefill, of all sequences together.
            output_tokens: number of tokens to sample for each sequence.
            sequences: number of sequences that sample at the same time.
        """
        steps = self.steps
        rows = sequences * steps.mean_tokens / self.mean_sampled if self.mean_sampled else 0
        return steps.seconds_per_token * prefill_tokens + output_tokens * (
            steps.seconds_per_step + steps.seconds_per_token * rows
        )

    def output_tokens(self, max_tokens: int) -> float:
        """Returns the expected output length of a request in tokens, at most its limit `max_tokens`.

        It is LENGTH_MARGIN times the 90th percentile of earlier outputs. Before any request has ended, it is
        `max_tokens`.
        """
        return min(max_tokens, LENGTH_MARGIN * self.output_length)

    def observe_output(self, tokens: int) -> None:
        """Update the 90th percentile of output lengths after an output of `tokens` tokens. Returns nothing."""
        if self.output_length < math.inf:
            self.output_length = _moved(self.output_length, LENGTH_STRIDE, tokens > self.output_length)
        else:
            self.output_length = tokens

    def percentile_90(self, estimate: float) -> float:
        """Returns the seconds within which 9 of 10 requests end, if their estimated time is `estimate` seconds.

        It is `slowdown` * `estimate`; before any request has ended, it is `estimate`.
        """
        return self.slowdown * estimate

    def observe_request(self, estimate: float, seconds: float) -> None:
        """Update `slowdown` after a request has ended. Returns nothing.

        `slowdown` is the 90th percentile of measured time / estimated time, limited to SLOWDOWN_MIN to SLOWDOWN_MAX. A
        request with an estimate of 0 is ignored.

        estimate: seconds that the request was estimated to take. seconds: seconds that it took.
        """
        if estimate > 0:
            moved = _moved(self.slowdown, SLOWDOWN_STRIDE, seconds > self.percentile_90(estimate))
            self.slowdown = min(max(moved, SLOWDOWN_MIN), SLOWDOWN_MAX)


def _moved(quantile: float, stride: float, above: bool) -> float:
    """Returns a tracked 90th percentile after one more observation: higher if the observation was above it, else lower.

    Args:
        quantile: the percentile before the observation.
        stride: step size, in the logarithm of the value.
        above: True if the observation was above `quantile`.
    """
    return quantile * math.exp(stride * (QUANTILE if above else QUANTILE - 1))
