"""Ops with recurrent state on the host: each against its reference, in steps, on every instruction set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from support.host_bench import EPS, ISAS, PAGE, Bench, finish

from intaglio.batch import Batch, Chunk, bind
from intaglio.devices import ArrayWeights, Device, DeviceError, Executable, StateSpec, StepRequest
from intaglio.devices.host import HostDevice
from intaglio.devices.reference import ReferenceDevice
from intaglio.ops import Decay, LinearAttention, Map, Norm, RgLru, SelectiveScan, ShortConv

STATE = StateSpec(64, PAGE, 6)
SEQUENCES = 3


def steps(rng: np.random.Generator, rows: int) -> list[Batch]:
    """Random chunks of sequences, each in slots of its own, sometimes together in a step."""
    at, count = [0] * SEQUENCES, [0] * SEQUENCES
    batches = []
    for _ in range(7):
        chunks = []
        for s in rng.permutation(SEQUENCES)[: rng.integers(1, SEQUENCES + 1)].tolist():
            n = int(rng.integers(1, 9))
            ids = rng.integers(0, rows, n).tolist()
            chunks.append(Chunk(ids, at[s], range(8 * s, 8 * s + 8), range(n), state=STATE.pair(s, count[s])))
            at[s], count[s] = at[s] + n, count[s] + 1
        batches.append(bind(chunks, PAGE))
    return batches


def run(bench: Bench, batches: Sequence[Batch], sites: Sequence[str]) -> dict[str, list[Mapping[str, np.ndarray]]]:
    """The results at `sites` of each step, by device. Checks that 1 and 2 threads give the same bits."""
    program, weights = finish(bench), ArrayWeights(bench.arrays)

    def taps(device: Device) -> list[Mapping[str, np.ndarray]]:
        ex = device.load(program, weights, STATE)
        return [ex.step(StepRequest(batch, taps=sites)).taps for batch in batches]

    out = {"reference": taps(ReferenceDevice())}
    for isa in ISAS:
        out[isa], two = taps(HostDevice(1, isa)), taps(HostDevice(2, isa))
        for a, b in zip(out[isa], two, strict=True):
            for site in sites:
                np.testing.assert_array_equal(a[site], b[site], err_msg=f"{isa}: 2 threads give other bits than 1")
    return out


def hold(out: dict[str, list[Mapping[str, np.ndarray]]], bound: float) -> None:
    """Assert that every result is within `bound`, relative to the largest value of the reference, at least 1."""
    for isa in ISAS:
        for got, want in zip(out[isa], out["reference"], strict=True):
            for site, x in want.items():
                off = float(np.abs(got[site] - x).max() / max(1.0, np.abs(x).max()))
                assert off <= bound, f"{isa}, {site}: off by {off:.3g}, allowed {bound:.3g}"


@pytest.mark.parametrize("seed", range(4))
def test_short_conv(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, taps = 40, int(rng.integers(2, 6))
    width = int(rng.integers(1, 70) if seed % 2 else rng.integers(1000, 1100))  # around the 1,024 channels of a task
    bench = Bench(rng, rows, width)
    w = bench.weight("w", rng.normal(size=(width, taps)))
    more = {"bias": bench.weight("bias", rng.normal(size=width))} if rng.random() < 0.5 else {}
    bench.x = bench.b.op(ShortConv, "conv", bench.x, w, bench.b.state("state", taps - 1, width), **more)
    # a chain of taps + 1 sums of products of unit normals, of which none exceeds 30
    hold(run(bench, steps(rng, rows), ["conv"]), (taps + 2) * taps * 30 * EPS)


@pytest.mark.parametrize("seed", range(3))
def test_decay(seed: int) -> None:
    rng = np.random.default_rng(seed)
    heads, span = int(rng.integers(1, 9)), int(rng.integers(1, 5))
    bench = Bench(rng, 40, heads * span, 3.0)
    rate, bias = bench.weight("rate", rng.normal(size=heads)), bench.weight("bias", rng.normal(size=heads * span))
    low, high = ((0.0, 0.0), (0.2, 1.5))[seed % 2]
    bench.b.op(Decay, "decay", bench.x, rate, bias=bias, low=low, high=high)
    # an exponential, a logarithm, an exponential of the rate and a product, a few roundings each
    hold(run(bench, steps(rng, 40), ["decay"]), 16 * EPS)
    bench = Bench(rng, 40, heads * span, 3.0)
    rate, bias = bench.weight("rate", rng.normal(size=heads)), bench.weight("bias", rng.normal(size=heads * span))
    bench.b.op(Decay, "decay", bench.x, rate, bias=bias, floor=-5.0)
    bench.b.op(Map, "log_decay", "decay.decay", expr="a * 2.0")
    hold(run(bench, steps(rng, 40), ["log_decay"]), 64 * EPS)


@pytest.mark.parametrize("seed", range(6))
def test_linear_attention(seed: int) -> None:
    """All forms: with and without the delta rule, decays by head, by key column and constant, groups of keys."""
    rng = np.random.default_rng(seed)
    groups, share, keys, values = (int(rng.integers(1, most)) for most in (4, 4, 40, 80))  # blocks of 32 values
    heads, delta, form = groups * share, bool(seed % 2), seed % 3
    bench = Bench(rng, 40, groups * keys)
    k = bench.b.op(Norm, "k", bench.matrix("k_in", 40, groups * keys), norm="l2", group=keys)
    v, state = bench.matrix("v", 40, heads * values), bench.b.state("state", heads, keys, values)
    more: dict[str, Any] = {"heads": heads, "delta": delta, "scale": 0.5}
    if form == 2:
        more["rates"] = bench.weight("rates", -rng.random(heads))
    else:
        width = heads * keys if form else heads
        bench.b.op(Decay, "step", bench.matrix("dt", 40, width), bench.weight("rate", rng.normal(size=heads)))
        more["decay"] = "step.decay"
    if rng.random() < 0.5:
        more["skip"] = bench.weight("skip", rng.normal(size=heads))
    if delta:  # the rule needs steps of at most 1 to be stable
        more["beta"] = bench.b.op(Map, "beta", bench.matrix("b_in", 40, heads), expr="sigmoid(a)")
    bench.b.op(LinearAttention, "scan", bench.x, k, v, state, **more)
    # at most 7 * 8 tokens, each of which adds `keys` products to a value and rounds it a few times
    hold(run(bench, steps(rng, 40), ["scan"]), 56 * (keys + 8) * EPS)


@pytest.mark.parametrize("seed", range(3))
def test_selective_scan(seed: int) -> None:
    rng = np.random.default_rng(seed)
    width, n = int(rng.integers(1, 150)), int(rng.integers(1, 18))
    bench = Bench(rng, 40, width)
    step, b, c = bench.matrix("step", 40, width), bench.matrix("b", 40, n), bench.matrix("c", 40, n)
    rate, skip = bench.weight("rate", rng.normal(size=(width, n))), bench.weight("skip", rng.normal(size=width))
    bench.b.op(SelectiveScan, "scan", bench.x, step, b, c, rate, skip, bench.b.state("state", width, n))
    hold(run(bench, steps(rng, 40), ["scan"]), 56 * (n + 8) * EPS)


@pytest.mark.parametrize("seed", range(3))
def test_rg_lru(seed: int) -> None:
    rng = np.random.default_rng(seed)
    width = int(rng.integers(1, 150))
    bench = Bench(rng, 40, width)
    gates = bench.matrix("i", 40, width), bench.matrix("r", 40, width)
    vectors = [bench.weight(name, rng.normal(size=width)) for name in ("rate", "ib", "rb")]
    bench.b.op(RgLru, "lru", bench.x, *gates, *vectors, bench.b.state("state", width))
    # the root of 1 - a^2 loses digits where a is near 1: a relative error of e in ln a is one of e / 2 in it
    hold(run(bench, steps(rng, 40), ["lru"]), 56 * 16 * EPS)


@pytest.mark.parametrize("isa", ISAS)
def test_bits_depend_neither_on_cuts_nor_on_company(isa: str) -> None:
    """Every op with state: a sequence at once and alone, and cut at random beside others, with 1 and 2 threads."""
    seed = int(np.random.default_rng().integers(2**32))
    rng = np.random.default_rng(seed)
    rows, keys, values, heads = 30, int(rng.integers(1, 40)), int(rng.integers(1, 80)), 2
    bench = Bench(rng, rows, heads * values)
    b, x, width = bench.b, bench.x, heads * values
    w = bench.weight("w", rng.normal(size=(width, 4)))
    b.op(ShortConv, "conv", x, w, b.state("conv_state", 3, width))
    k = b.op(Norm, "k", bench.matrix("k_in", rows, keys), norm="l2")
    q = bench.matrix("q", rows, keys)
    for site, columns, delta in (("by_head", heads, True), ("by_key", heads * keys, True), ("plain", heads, False)):
        rate = bench.weight(f"{site}.rate", rng.normal(size=heads))
        b.op(Decay, f"{site}.step", bench.matrix(f"{site}.dt", rows, columns), rate)
        how: dict[str, Any] = {"decay": f"{site}.step.decay", "delta": delta, "heads": heads}
        b.op(LinearAttention, site, q, k, x, b.state(f"{site}.state", heads, keys, values), **how)
    step, narrow = bench.matrix("step", rows, width), [bench.matrix(n, rows, 5) for n in "bc"]
    vectors = bench.weight("rate", rng.normal(size=(width, 5))), bench.weight("skip", rng.normal(size=width))
    b.op(SelectiveScan, "scan", x, step, *narrow, *vectors, b.state("scan_state", width, 5))
    gates = [bench.weight(n, rng.normal(size=width)) for n in ("lru_rate", "lru_i", "lru_r")]
    b.op(RgLru, "lru", x, step, step, *gates, b.state("lru_state", width))
    sites = ["conv", "by_head", "by_key", "plain", "scan", "lru"]
    program, weights = finish(bench), ArrayWeights(bench.arrays)
    whole = HostDevice(1, isa).load(program, weights, STATE)
    chunk = Chunk(range(rows), 0, range(8), [0], state=STATE.pair(0, 0))
    want = whole.step(StepRequest(bind([chunk], PAGE), taps=sites)).taps
    for threads in (1, 2):
        ex = HostDevice(threads, isa).load(program, weights, STATE)
        at = [0, 0]
        got: dict[str, list[np.ndarray]] = {site: [] for site in sites}
        for count in range(rows):
            ends = [min(rows, start + int(rng.integers(1, 9))) for start in at]
            chunks = [
                Chunk(range(start, end), start, range(8 * s, 8 * s + 8), [0], state=STATE.pair(s, count))
                for s, (start, end) in enumerate(zip(at, ends, strict=True))
                if end > start
            ]
            if not chunks:
                break
            taps = ex.step(StepRequest(bind(chunks, PAGE), taps=sites)).taps
            for site in sites:
                got[site].append(taps[site][: ends[0] - at[0]])
            at = ends
        for site in sites:
            np.testing.assert_array_equal(np.concatenate(got[site]), want[site], err_msg=f"seed {seed}, {site}")


def test_norm_by_group_with_a_weight_per_column() -> None:
    rng = np.random.default_rng(1)
    bench = Bench(rng, 40, 24)
    weight, bias = (bench.weight(n, rng.normal(size=24)) for n in ("weight", "bias"))
    bench.b.op(Norm, "norm", bench.x, weight=weight, bias=bias, residual=bench.matrix("r", 40, 24), group=8)
    hold(run(bench, steps(rng, 40), ["norm"]), 32 * EPS)


def loaded(state: StateSpec) -> Executable:
    rng = np.random.default_rng(0)
    bench = Bench(rng, 8, 4)
    w = bench.weight("w", rng.normal(size=(4, 3)))
    bench.x = bench.b.op(ShortConv, "conv", bench.x, w, bench.b.state("state", 2, 4))
    return HostDevice(1).load(finish(bench), ArrayWeights(bench.arrays), state)


def test_state_without_slots_is_refused() -> None:
    with pytest.raises(DeviceError, match=r"state is recurrent state, f32\[N, 2, 4\], and the StateSpec has 0 slots"):
        loaded(StateSpec(4, PAGE))
    ex = loaded(StateSpec(4, PAGE, 2))
    with pytest.raises(DeviceError, match="give each Chunk state="):
        ex.step(StepRequest(bind([Chunk([1], 0, [0])], PAGE)))
    with pytest.raises(DeviceError, match=r"state slot 2 is outside 0\.\.1"):
        ex.step(StepRequest(bind([Chunk([1], 0, [0], state=(-1, 2))], PAGE)))
