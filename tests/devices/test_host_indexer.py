"""The indexer of sparse attention on the host: against its reference, in random chunks, on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
from support.host_bench import EPS, ISAS, PAGE, Bench, finish

from intaglio.batch import Batch, Chunk, bind
from intaglio.devices import ArrayWeights, Device, StateSpec, StepRequest
from intaglio.devices.host import HostDevice
from intaglio.devices.reference import ReferenceDevice
from intaglio.ops import Attend, ChooseKeys, KvWrite

ROWS = 48


def program(seed: int, format: str) -> Bench:
    """An indexer with a cache in `format` that chooses some positions, and attention over them."""
    rng = np.random.default_rng(seed)
    heads, dim, groups, width = 4, int(rng.integers(1, 40)), 2, int(rng.integers(1, 24))
    top = int(rng.integers(1, 30))
    bench = Bench(rng, ROWS, heads * dim)
    b = bench.b
    cache = b.cache("index_cache", 1, dim, format)
    key = bench.matrix("key", ROWS, dim)
    b.op(KvWrite, "index_write", key, key, cache, cache)
    weights = bench.matrix("weights", ROWS, heads)
    chosen = b.op(ChooseKeys, "choose", bench.x, weights, cache, heads=heads, top=top, scale=0.3)
    caches = [b.cache(name, groups, width, "f32") for name in ("k_cache", "v_cache")]
    b.op(KvWrite, "kv_write", bench.matrix("k", ROWS, groups * width), bench.matrix("v", ROWS, groups * width), *caches)
    q = bench.matrix("q", ROWS, 2 * groups * width)
    bench.x = b.op(Attend, "attend", q, *caches, chosen=chosen, heads=2 * groups, scale=width**-0.5)
    return bench


def cuts(rng: np.random.Generator, whole: bool) -> list[Batch]:
    """One sequence of ROWS tokens, at once or in random chunks."""
    tokens, batches, at = list(range(ROWS)), [], 0
    while at < ROWS:
        n = ROWS if whole else min(int(rng.integers(1, 12)), ROWS - at)
        batches.append(bind([Chunk(tokens[at : at + n], at, [2, 0, 3], range(n))], PAGE))
        at += n
    return batches


def run(bench: Bench, device: Device, batches: list[Batch], site: str = "attend") -> np.ndarray:
    """The result at `site` of all tokens. The host returns no taps of integers, so `choose` is for the reference."""
    ex = device.load(finish(bench), ArrayWeights(bench.arrays), StateSpec(82, PAGE))
    return np.concatenate([ex.step(StepRequest(batch, taps=[site])).taps[site] for batch in batches])


@pytest.mark.parametrize("format", ["f32", "bf16", "int8row", "e4m3"])
def test_choose_keys(format: str) -> None:
    """Attention over the positions chosen. Cut at random and with 2 threads: the same bits."""
    for seed in range(2):
        rng = np.random.default_rng(seed)
        batches = cuts(rng, whole=True)
        want = run(program(seed, format), ReferenceDevice(), batches)
        for isa in ISAS:
            got = run(program(seed, format), HostDevice(1, isa), batches)
            other = run(program(seed, format), HostDevice(2, isa), cuts(rng, whole=False))
            np.testing.assert_array_equal(got, other, err_msg=f"{isa}: other bits when cut")
            # a rounding error may swap two positions whose scores are nearly equal, which changes that row: rarely
            off = np.abs(got - want).max(axis=1)
            assert (off <= 64 * 24 * EPS * max(1.0, np.abs(want).max())).mean() > 0.9, f"{isa}: {np.flatnonzero(off)}"


def test_choose_keys_beyond_a_split() -> None:
    """Contexts beyond a split of 512 positions, of which whole splits may have no position that was chosen."""

    def long() -> Bench:
        bench = Bench(np.random.default_rng(5), 1300, 16)
        b = bench.b
        caches = [b.cache(name, 1, 16, "f32") for name in ("k_cache", "v_cache")]
        b.op(KvWrite, "kv_write", bench.matrix("k", 1300, 16), bench.matrix("v", 1300, 16), *caches)
        weights = bench.matrix("weights", 1300, 2)
        chosen = b.op(ChooseKeys, "choose", bench.matrix("i", 1300, 32), weights, caches[0], heads=2, top=3, scale=1.0)
        bench.x = b.op(Attend, "attend", bench.x, *caches, chosen=chosen, heads=1, scale=0.25)
        return bench

    batches = [bind([Chunk(range(n, m), n, range(82), [0])], PAGE) for n, m in ((0, 1290), (1290, 1299), (1299, 1300))]
    chosen = run(long(), ReferenceDevice(), batches, "choose")
    splits = {tuple((row // 512).tolist()) for row in chosen[1024:]}
    assert len(splits) > 3  # chosen positions lie in other splits from row to row
    want = run(long(), ReferenceDevice(), batches)
    for isa in ISAS:
        off = np.abs(run(long(), HostDevice(2, isa), batches) - want).max(axis=1)
        assert (off <= 1e-5).mean() > 0.99, isa
