"""Compressed attention on the host: against its reference, in random chunks, on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
from support.host_bench import EPS, ISAS, PAGE, Bench, finish

from intaglio.batch import Batch, Chunk, bind
from intaglio.devices import ArrayWeights, Device, StateSpec, StepRequest
from intaglio.devices.host import HostDevice
from intaglio.devices.reference import ReferenceDevice
from intaglio.ops import AttendPooled, ChooseKeys, KvWrite, PoolKeys

ROWS, WINDOW_PAGES = 75, 9


def pooled(bench: Bench, name: str, width: int, every: int, overlap: bool, format: str) -> str:
    """Ops that pool random values and gates; returns the cache of entries."""
    b, wide = bench.b, (1 + overlap) * width
    values, gates = (b.cache(f"{name}.{what}", 1 + overlap, width, format) for what in ("values", "gates"))
    rows = [bench.matrix(f"{name}.{what}.rows", ROWS, wide) for what in ("values", "gates")]
    b.op(KvWrite, f"{name}.write", *rows, values, gates)
    bias = bench.weight(f"{name}.bias", bench.rng.normal(size=(every, wide)))
    norm = bench.weight(f"{name}.norm", bench.rng.normal(size=width))
    turns = b.const(f"{name}.turns", [0.9**i for i in range(width // 4)])
    entries = b.cache(f"{name}.entries", 1, width, format, every)
    b.op(PoolKeys, f"{name}.pool", values, gates, bias, norm, turns, entries, every=every, overlap=overlap, factor=1.1)
    return entries


def program(seed: int, format: str, top: int) -> Bench:
    """Attention to a window and to entries: all of them if `top` is 0, else the `top` that an indexer chooses."""
    rng = np.random.default_rng(seed)
    heads, width, every = int(rng.integers(1, 20)), int(rng.integers(4, 40)), int(rng.integers(2, 20))
    overlap = bool(rng.integers(2))
    bench = Bench(rng, ROWS, heads * width)
    b = bench.b
    entries = pooled(bench, "entry", width, every, overlap, format)
    cache = b.cache("cache", 1, width, format)
    key = bench.matrix("key", ROWS, width)
    b.op(KvWrite, "write", key, key, cache, cache)
    chosen = None
    if top:
        small = pooled(bench, "index", int(rng.integers(4, 24)), every, overlap, format)
        q = bench.matrix("index.q", ROWS, 3 * int(b.tensors[small].shape[3]))
        scores = bench.matrix("index.weights", ROWS, 3)
        chosen = b.op(ChooseKeys, "choose", q, scores, small, heads=3, top=top, scale=0.3, every=every)
    how = {"window": int(rng.integers(1, 30)), "every": every, "heads": heads, "scale": width**-0.5}
    sinks = bench.weight("sinks", rng.normal(size=heads)) if rng.integers(2) else None
    bench.x = b.op(AttendPooled, "attend", bench.x, cache, entries, sinks=sinks, chosen=chosen, **how)
    return bench


def cuts(rng: np.random.Generator, whole: bool, windows: bool) -> list[Batch]:
    """One sequence of ROWS tokens, at once or in random chunks; with blocks of their own for the window's caches."""
    tokens, batches, at = list(range(ROWS)), [], 0
    blocks, near = [2, 0, 3, 9, 5], [1, 8, 0, 7, 4]
    while at < ROWS:
        n = ROWS if whole else min(int(rng.integers(1, 12)), ROWS - at)
        held = near[: -(-(at + n) // PAGE)] if windows else ()
        batches.append(bind([Chunk(tokens[at : at + n], at, blocks, range(n), window_blocks=held)], PAGE))
        at += n
    return batches


def run(bench: Bench, device: Device, batches: list[Batch], windows: bool = False) -> np.ndarray:
    state = StateSpec(20, PAGE, 0, WINDOW_PAGES, 64) if windows else StateSpec(20, PAGE)
    ex = device.load(finish(bench), ArrayWeights(bench.arrays), state)
    return np.concatenate([ex.step(StepRequest(batch, taps=["attend"])).taps["attend"] for batch in batches])


def close(got: np.ndarray, want: np.ndarray, format: str) -> np.ndarray:
    """True for each row within a bound: sums of at most 64 x 40 products, of values below 8. A bf16 cache adds the
    rounding of an entry that lies between two bf16 values, to either."""
    step = 2.0**-8 if format == "bf16" else 0.0
    return np.abs(got - want).max(axis=1) <= (64 * 40 * EPS + 4 * step) * max(1.0, np.abs(want).max())


@pytest.mark.parametrize("format", ["f32", "bf16"])
@pytest.mark.parametrize("seed", range(4))
def test_pool_keys_and_attend_pooled(seed: int, format: str) -> None:
    """Steps cut at random, run by 2 threads, or with window blocks in pages of their own give the same bits."""
    rng = np.random.default_rng(seed)
    want = run(program(seed, format, 0), ReferenceDevice(), cuts(rng, True, False))
    other = run(program(seed, format, 0), ReferenceDevice(), cuts(rng, False, True), True)
    np.testing.assert_array_equal(want, other)
    for isa in ISAS:
        got = run(program(seed, format, 0), HostDevice(1, isa), cuts(rng, True, False))
        other = run(program(seed, format, 0), HostDevice(2, isa), cuts(rng, False, True), True)
        np.testing.assert_array_equal(got, other, err_msg=f"{isa}: other bits when cut")
        assert close(got, want, format).all(), isa


@pytest.mark.parametrize("format", ["f32", "bf16"])
@pytest.mark.parametrize("seed", range(4))
def test_attend_pooled_to_chosen_entries(seed: int, format: str) -> None:
    """A rounding error may swap two entries whose scores are nearly equal, which changes that row: rarely."""
    rng = np.random.default_rng(seed)
    want = run(program(seed, format, 3), ReferenceDevice(), cuts(rng, True, False))
    for isa in ISAS:
        got = run(program(seed, format, 3), HostDevice(1, isa), cuts(rng, True, False))
        other = run(program(seed, format, 3), HostDevice(2, isa), cuts(rng, False, True), True)
        np.testing.assert_array_equal(got, other, err_msg=f"{isa}: other bits when cut")
        assert close(got, want, format).mean() > 0.9, isa


def test_pool_keys_and_attend_pooled_of_any_seed() -> None:
    """The bits of one instruction set do not depend on cuts, threads or window blocks: any seed, drawn anew."""
    seed = int(np.random.default_rng().integers(2**31))
    rng = np.random.default_rng(seed)
    for top in (0, 2):
        got = run(program(seed, "f32", top), HostDevice(1), cuts(rng, True, False))
        other = run(program(seed, "f32", top), HostDevice(2), cuts(rng, False, True), True)
        np.testing.assert_array_equal(got, other, err_msg=f"seed {seed}")
