"""Physics of modelled steps on random chips, models, layouts and loads; scripts/physics.py runs more of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from intaglio.codesign.physics import all_cards, draw, over_peak, sizes, timelines, violations


@pytest.mark.parametrize("number", range(4))
def test_rates_resources_chips_and_loads(number: int) -> None:
    """No rate above its peak, no resource that slows a step, no gain above linear, no larger load that is faster."""
    d = draw(np.random.default_rng())
    assert violations(d) == [], d


def test_a_violation_is_named() -> None:
    """A timeline that is a thousand times too fast breaks the bounds of its busiest resources."""
    d = draw(np.random.default_rng())
    (line, *_) = timelines(d.programs, d.on, sizes(4, 100, 64))
    fast = replace(line, ops=tuple(replace(e, start=e.start / 1e6, end=e.end / 1e6) for e in line.ops))
    assert over_peak(d.on, line) == []
    assert any(why.startswith("HBM: a step of") for why in over_peak(d.on, fast))
    assert len(all_cards()) > 10
