"""Response bodies: log-probabilities that are NaN, or below MIN_LOGPROB, become MIN_LOGPROB, which JSON can hold."""

from __future__ import annotations

import math

import pytest

from intaglio.server.answer import MIN_LOGPROB, finite


@pytest.mark.parametrize("logprob", [math.nan, -math.inf, 2 * MIN_LOGPROB])
def test_what_json_cannot_carry_becomes_the_least_logprob(logprob: float) -> None:
    assert finite(logprob) == MIN_LOGPROB


def test_other_logprobs_stay() -> None:
    assert finite(-1.5) == -1.5 and finite(0.0) == 0.0
