"""Properties of modelled steps, on random chips, models, layouts and loads: no rate above its peak, monotonic times.

scripts/physics.py runs more of them.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from intaglio.chips import CHIPS, Target, target
from intaglio.codesign.physics import ROUNDING, all_cards, draw, over_peak, sizes, timelines, violations
from intaglio.codesign.simulate import ported, stages
from intaglio.silicon.kernels.attend import attend_timing
from intaglio.silicon.kernels.kv_write import Heads
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


@settings(max_examples=60, deadline=None)
@given(
    chip=st.sampled_from(sorted(CHIPS)), kv=st.sampled_from([1, 2, 8, 32]), group=st.sampled_from([1, 4, 8]),
    bits=st.sampled_from([8, 16]), window=st.sampled_from([0, 0, 100, 1000]), decoding=st.integers(0, 300),
    keys=st.integers(1, 9000), others=st.integers(0, 3), other_keys=st.integers(1, 9000), prompt=st.integers(2, 5000),
    before=st.integers(0, 5000), prompts=st.integers(0, 3),
)  # fmt: skip
@example("mi300x", 16, 4, 8, 0, 1, 52, 1, 1, 2, 0, 0)  # a short sequence lowered the mean of all tiles: 0.65 % faster
@example("a100_sxm", 1, 1, 16, 0, 34, 1, 1, 643, 25, 678, 1)  # one key more filled the tile: waits of another formula
@example("mi355x", 2, 1, 16, 0, 98, 1, 0, 447, 7058, 0, 1)  # jobs dealt by length may end earlier with a longer job
@example("sohu", 2, 1, 16, 1807, 130, 1577, 2, 14468, 424, 0, 1)  # a window may touch one tile less
@example("sohu", 8, 1, 16, 0, 154, 4, 2, 344, 78, 3656, 1)  # mean loads of all jobs, in the longest job
def test_more_attention_never_takes_less_time(
    chip: str, kv: int, group: int, bits: int, window: int, decoding: int, keys: int, others: int, other_keys: int,
    prompt: int, before: int, prompts: int,
) -> None:  # fmt: skip
    """One sequence, prompt, query or key more, or twice as many: of decoding sequences of two lengths, and prompts."""
    h = Heads(kv * group, kv, 128, 128, window, bits)

    def seconds(*n: int) -> float:
        decoding, keys, others, other_keys, prompt, before, prompts = n
        chunks = ((1, keys, decoding), (1, other_keys, others), (prompt, before + prompt, prompts))
        return attend_timing(target(chip), h, tuple(c for c in chunks if c[2])).seconds

    load = (decoding, keys, others, other_keys, prompt, before, prompts)
    if not decoding + others + prompts:
        return
    base = seconds(*load)
    for i, n in enumerate(load):
        for more in (n + 1, 2 * n + 1):
            assert seconds(*load[:i], more, *load[i + 1 :]) >= base * (1 - ROUNDING), (i, more)


def test_a_violation_is_named() -> None:
    """A timeline that is a thousand times too fast breaks the bounds of its busiest resources."""
    d = draw(np.random.default_rng())
    (line, *_) = timelines(d.programs, d.on, sizes(4, 100, 64))
    fast = replace(line, ops=tuple(replace(e, start=e.start / 1e6, end=e.end / 1e6) for e in line.ops))
    assert over_peak(d.on, line) == []
    assert any(why.startswith("HBM: a step of") for why in over_peak(d.on, fast))
    assert len(all_cards()) > 10
