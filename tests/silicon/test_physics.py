"""Properties of modelled steps, on random chips, models, layouts and loads: no rate above its peak, monotonic times.

scripts/physics.py runs more of them.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.chips import Target, target
from intaglio.codesign.physics import all_cards, draw, over_peak, sizes, timelines, violations
from intaglio.codesign.simulate import ported, stages
from intaglio.silicon.kernels.product import linear_timing


@pytest.mark.parametrize("number", range(4))
def test_rates_resources_chips_and_loads(number: int) -> None:
    """No rate above its peak, no resource that slows a step, no gain above linear, no larger load that is faster."""
    seed = int(np.random.default_rng().integers(10**9))
    d = draw(np.random.default_rng(seed))
    assert violations(d) == [], f"python scripts/physics.py --seed {seed} --count 1: {d}"


def test_a_draw_names_what_it_changes() -> None:
    """The fields of the chip that differ from the preset are in the text, with their values."""
    changed = [d for d in (draw(np.random.default_rng()) for _ in range(8)) if d.changes]
    for d in changed:
        assert all(f"{name}={d.on.get(name):.6g}" in str(d) for name, _ in d.changes)


def test_prefetched_weights_share_hbm_with_the_rows_of_their_op() -> None:
    """Without an L2, products also read and write rows in HBM; no more moves than its rate allows."""
    on = target("tpu_v5e").with_chip(hbm_bytes_per_s=1.5e11)
    assert on.library.prefetches_weights and not on.chip.l2_bytes
    for line in timelines(stages(ported("llama-3-8b", None), "tp1", "auto", "auto", "auto"), on, sizes(27, 716, 1009)):
        assert over_peak(on, line) == []


@settings(max_examples=60, deadline=None)
@given(
    chip=st.sampled_from(["sohu", "tpu_v5e", "tpu_v6e", "tpu_v7"]), m=st.integers(1, 4096), n=st.integers(1, 512),
    k=st.integers(1, 128), rate=st.floats(0.3, 3),
)  # fmt: skip
def test_seconds_and_bytes_of_a_prefetched_product_are_of_one_choice(
    chip: str, m: int, n: int, k: int, rate: float
) -> None:
    """Neither twice the HBM rate nor one row less makes a product slower.

    Seconds of one choice of tiles with the bytes of another did, by some percent.
    """
    on = target(chip).with_chip(hbm_bytes_per_s=target(chip).chip.hbm_bytes_per_s * rate)
    faster = on.with_chip(hbm_bytes_per_s=on.chip.hbm_bytes_per_s * 2)

    def seconds(on: Target, m: int) -> float:
        t = linear_timing(on, m, 32 * n, 64 * k, prefetched=True)
        return max(t.seconds, t.hbm_bytes / on.chip.hbm_rate)

    took = seconds(on, m)
    assert seconds(faster, m) <= took * (1 + 1e-9) and took <= seconds(on, m + 1) * (1 + 1e-9)


def test_a_violation_is_named() -> None:
    """A timeline that is a thousand times too fast breaks the bounds of its busiest resources."""
    d = draw(np.random.default_rng())
    (line, *_) = timelines(d.programs, d.on, sizes(4, 100, 64))
    fast = replace(line, ops=tuple(replace(e, start=e.start / 1e6, end=e.end / 1e6) for e in line.ops))
    assert over_peak(d.on, line) == []
    assert any(why.startswith("HBM: a step of") for why in over_peak(d.on, fast))
    assert len(all_cards()) > 10
