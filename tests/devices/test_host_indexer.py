"""The indexer of sparse attention on the host: against its reference, in random chunks, on every instruction set."""

from __future__ import annotations

import random

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


@pytest.mark.parametrize("format", ["f32", "bf16", "int8row", "e4m3"])
@pytest.mark.parametrize("latent", [False, True])
def test_few_chosen_positions_give_the_bits_of_a_mask(format: str, latent: bool) -> None:
    """Where few positions of a split are chosen, only these are read. Linear biases of 0 make the host read all."""
    seed = random.randrange(2**40)
    rng = np.random.default_rng(seed)
    rows, heads, dim = 700, int(rng.choice([2, 5, 40])), int(rng.integers(1, 50))
    bench = Bench(rng, rows, heads * dim)
    b, groups = bench.b, 1 if latent else int(rng.choice([1, heads]))
    index = b.cache("index", 1, 3, "f32")
    key = bench.matrix("key", rows, 3)
    b.op(KvWrite, "index_write", key, key, index, index)
    weights, asked = bench.matrix("weights", rows, 2), bench.matrix("asked", rows, 6)
    chosen = b.op(ChooseKeys, "choose", asked, weights, index, heads=2, top=int(rng.integers(1, 60)))
    q, fields = bench.x, {"chosen": chosen, "heads": heads, "scale": dim**-0.5, "softcap": float(rng.choice([0, 3]))}
    if latent:
        width = int(rng.integers(1, dim + 1))
        k = v = b.cache("latents", 1, width, format)
        latents = bench.matrix("k", rows, width)
        b.op(KvWrite, "write", latents, latents, k, v)
        if width < dim:
            fields["rope_cache"] = rope = b.cache("rope", 1, dim - width, format)
            roped = bench.matrix("r", rows, dim - width)
            b.op(KvWrite, "rope_write", roped, roped, rope, rope)
    else:
        k, v = (b.cache(name, groups, dim, format) for name in ("k_cache", "v_cache"))
        b.op(KvWrite, "write", *(bench.matrix(name, rows, groups * dim) for name in "kv"), k, v)
    none = bench.weight("slopes", np.zeros(heads))
    b.op(Attend, "masked", q, k, v, slopes=none, **fields)
    bench.x = b.op(Attend, "attend", q, k, v, **fields)
    program, table = finish(bench), rng.permutation(82)[:44].tolist()
    batches = [bind([Chunk(range(n, m), n, table, [0])], PAGE) for n, m in ((0, 640), (640, 699), (699, 700))]
    for isa in ISAS:
        ex = HostDevice(2, isa).load(program, ArrayWeights(bench.arrays), StateSpec(82, PAGE))
        for batch in batches:
            taps = ex.step(StepRequest(batch, taps=["masked", "attend"])).taps
            np.testing.assert_array_equal(taps["attend"], taps["masked"], err_msg=f"{isa}, seed {seed}")
