"""Caches of layers with a sliding window, in pages of their own: the same bits; blocks given back are never read."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from support.host_bench import ISAS, PAGE, Bench, finish

from intaglio.batch import Batch, BatchError, Chunk, bind
from intaglio.devices import ArrayWeights, DeviceError, StateSpec, StepRequest
from intaglio.devices.host import HostDevice
from intaglio.devices.reference import ReferenceDevice
from intaglio.ops import Attend, KvWrite

ROWS, POISON = 200, 199  # the last token's keys and values are NaN
PAGES = 30


def program(seed: int, format: str, reach: dict[str, int]) -> Bench:
    """A layer with a window (or chunk), then one that sees all, each with K/V caches in `format`."""
    rng = np.random.default_rng(seed)
    bench = Bench(rng, ROWS, 4 * 12)
    b = bench.b
    for layer, fields in enumerate((reach, {})):
        caches = [b.cache(f"{name}{layer}", 2, 12, format) for name in ("k_cache", "v_cache")]
        k, v = (bench.matrix(f"{name}{layer}", ROWS, 24) for name in "kv")
        for name in (k, v):
            bench.arrays[f"{name}.table"][POISON] = np.nan  # type: ignore[index]
        b.op(KvWrite, f"write{layer}", k, v, *caches)
        bench.x = b.op(Attend, f"attend{layer}", bench.x, *caches, heads=4, scale=0.3, **fields)
    return bench


def steps(rng: random.Random, window: int, windowed: bool) -> list[Batch]:
    """One sequence cut at random. Beside it, tokens with NaN are written to the window blocks that it gave back."""
    batches, at, held, free = list[Batch](), 0, list[int](), list(range(PAGES - 1))
    while at < 180:
        n = min(rng.choice((1, 2, 9, 30)), 180 - at)
        needed = (at + n - 1) // PAGE + 1
        while len(held) < needed:
            held.append(free.pop(rng.randrange(len(free))))
        state = {"window_blocks": held.copy()} if windowed else {}
        own = Chunk([t % POISON for t in range(at, at + n)], at, list(range(needed)), range(n), **state)  # type: ignore[arg-type]
        chunks, spoilt = [own], rng.sample(free, min(3, len(free)))
        if spoilt:
            state = {"window_blocks": spoilt} if windowed else {}
            others = list(range(20, 20 + len(spoilt)))
            chunks.append(Chunk([POISON] * PAGE * len(spoilt), 0, others, **state))  # type: ignore[arg-type]
        batches.append(bind(chunks, PAGE))
        at += n
        for i in range(max(0, at - window + 1) // PAGE):
            if held[i] >= 0:
                free.append(held[i])
                held[i] = -1
    return batches


@pytest.mark.parametrize("format", ["f32", "bf16", "int8row", "e4m3"])
@pytest.mark.parametrize("reach", [{"window": 1}, {"window": 37}, {"chunk": 24}])
def test_blocks_given_back_are_never_read(format: str, reach: dict[str, int]) -> None:
    seed = random.randrange(2**32)
    bench, window = program(seed, format, reach), max(reach.values())
    made, weights = finish(bench), ArrayWeights(bench.arrays)
    assert made.windows == {"k_cache0": window, "v_cache0": window}
    plain, windowed = StateSpec(PAGES, PAGE), StateSpec(PAGES, PAGE, 0, PAGES - 1, window)
    for device in (ReferenceDevice(), *(HostDevice(2, isa) for isa in ISAS)):
        results = []
        for state in (plain, windowed):
            ex, rows = device.load(made, weights, state), []
            for batch in steps(random.Random(seed), window, state is windowed):
                taps = ex.step(StepRequest(batch, taps=["attend0", "attend1"])).taps
                rows.append([taps[site][: batch.q_len[0]] for site in ("attend0", "attend1")])
            results.append([np.concatenate(x) for x in zip(*rows, strict=True)])
        for one, other in zip(*results, strict=True):
            assert np.isfinite(one).all(), seed
            np.testing.assert_array_equal(one, other, err_msg=f"{device.name}, seed {seed}")


def test_a_cache_that_a_whole_layer_reads_too_has_no_window() -> None:
    bench = program(0, "f32", {"window": 5})
    bench.x = bench.b.op(Attend, "late", bench.x, "k_cache0", "v_cache0", heads=4, scale=1.0)
    assert finish(bench).windows == {}


def test_refusals() -> None:
    bench = program(0, "f32", {"window": 37})
    made, weights = finish(bench), ArrayWeights(bench.arrays)
    for device in (ReferenceDevice(), HostDevice(1)):
        with pytest.raises(DeviceError, match="k_cache0 has a window of 37 tokens; the StateSpec keeps blocks for 36"):
            device.load(made, weights, StateSpec(9, PAGE, 0, 4, 36))
        ex = device.load(made, weights, StateSpec(9, PAGE, 0, 4, 37))
        assert ex.block_bytes == 0
        for state, words in (({}, "no window table"), ({"window_blocks": [4]}, r"window slot 64 is outside 0\.\.63")):
            with pytest.raises(DeviceError, match=words):
                ex.step(StepRequest(bind([Chunk([1], 0, [0], **state)], PAGE)))  # type: ignore[arg-type]
        plain: Any = device.load(made, weights, StateSpec(9, PAGE))
        with pytest.raises(DeviceError, match="0 window pages and the batch has a window table"):
            plain.step(StepRequest(bind([Chunk([1], 0, [0], window_blocks=[0])], PAGE)))
    for blocks in ([-1], [0, 1], []):
        with pytest.raises(BatchError, match="chunk 1 computes tokens of blocks 0..0 of 1, and its window_blocks are"):
            bind([Chunk([1], 0, [1], window_blocks=[3]), Chunk([1], 0, [0], window_blocks=blocks)], PAGE)
