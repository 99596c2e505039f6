"""Kernels of the matrix unit of Intel CPUs (AMX): bf16 products have the bits of the unit's documented arithmetic,
integer products those of AVX-512, and attention has the same bits for any number of query rows."""

from __future__ import annotations

import numpy as np
import pytest
from support.coded import random_codes
from support.host_bench import EPS, ISAS, PAGE, Bench, finish

from intaglio import formats
from intaglio.batch import Chunk, bind
from intaglio.devices import ArrayWeights, StateSpec, StepRequest
from intaglio.devices.host import HostDevice
from intaglio.devices.reference import ReferenceDevice
from intaglio.ops import Attend, KvWrite, Linear, x_format
from intaglio.program import Program

pytestmark = pytest.mark.skipif("amx" not in ISAS, reason="this CPU, its operating system or this build has no AMX")

STEP = 32  # values of K that an instruction multiplies
SMALLEST = np.float32(2.0**-126)  # normal float32
Rng = np.random.Generator


def flush(x: np.ndarray) -> np.ndarray:
    """Float32 values with denormals replaced by zero."""
    return np.where(np.abs(x) < SMALLEST, np.float32(0), x).astype(np.float32)


def tdpbf16ps(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The product x @ w.T, float32 [rows, n], of bf16 values by the instruction TDPBF16PS.

    Each step of 32 values of K has a sum of the even and one of the odd products, which float32 holds exactly, rounded
    after each addition. They are added, then their sum is added to the result. Denormal values count as zero.
    Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2.
    """
    x, w = flush(x.astype(np.float32)), flush(w.astype(np.float32))
    total = np.zeros((len(x), len(w)), np.float32)
    for first in range(0, x.shape[1], STEP):
        sums = np.zeros((2, *total.shape), np.float32)
        for k in range(first, min(first + STEP, x.shape[1])):
            sums[k % 2] = flush(sums[k % 2] + x[:, k, None] * w[:, k])
        total = flush(total + flush(sums[0] + sums[1]))
    return total


def run(program: Program, bench: Bench, rows: list[int], threads: int, isa: str = "amx") -> np.ndarray:
    """The result of op `y` in a step whose batch has these rows of the bench's matrix, each a sequence of its own."""
    batch = bind([Chunk([row], 0, [i], [0]) for i, row in enumerate(rows)], PAGE)
    ex = HostDevice(threads, isa).load(program, ArrayWeights(bench.arrays), StateSpec(len(rows), PAGE))
    return ex.step(StepRequest(batch, taps=["y"])).taps["y"]


@pytest.mark.parametrize("trial", range(4))
def test_bf16_products_have_the_bits_of_the_instruction(trial: int, rng: Rng) -> None:
    """Numbers of rows around those of a matrix register and a pass; K with and without a rest, over several blocks."""
    rows = int(rng.choice([1, 2, 15, 16, 17, 31, 32, 33, 100]))
    k, n = int(rng.integers(1, (70, 700, 1300, 2200)[trial])), int(rng.integers(1, 100))
    bench = Bench(rng, rows, k)
    w = (rng.normal(size=(n, k)) / np.sqrt(k)).astype(formats.BF16)
    x = bench.arrays["x.table"]
    x[rng.random(x.shape) < 0.1] = 1e-39  # a denormal float32 and bf16
    bench.b.op(Linear, "y", bench.x, bench.weight("w", w, "bf16"), x_format="bf16")
    got = run(finish(bench), bench, list(range(rows)), 2)
    rounded = x.astype(formats.BF16)
    np.testing.assert_array_equal(got, tdpbf16ps(rounded, w))
    # A result is a sum of k products of rounded values, each rounded at most k + 2 times with them.
    sizes = np.abs(rounded.astype(np.float64)) @ np.abs(w.astype(np.float64)).T
    off = np.abs(got - rounded.astype(np.float64) @ w.astype(np.float64).T)
    assert (off <= (k + 2) * EPS * sizes + k * float(SMALLEST)).all()


def test_bits_do_not_depend_on_the_number_of_rows(rng: Rng) -> None:
    k, n, most = int(rng.integers(1, 1500)), int(rng.integers(1, 700)), 600
    bench = Bench(rng, most, k)
    w = bench.weight("w", rng.normal(size=(n, k)), "bf16")
    bench.b.op(Linear, "y", bench.x, w, x_format="bf16")
    program = finish(bench)
    whole = run(program, bench, list(range(most)), 2)
    for count in (1, 2, 16, 17, 40, 513):
        rows = rng.permutation(most)[:count].tolist()
        np.testing.assert_array_equal(run(program, bench, rows, 1), whole[rows], err_msg=f"{count} rows")


INTEGERS = ["int8g32f16", "int8g96", "int8g128", "int8row", "uint8g128", "uint8g32f16", "affine8g64f16", "int4g32"]
INTEGERS += ["int4g1024f32", "uint4g64f16", "affine4g128", "affine4row", "mxfp4"]


@pytest.mark.parametrize("format", INTEGERS)
def test_integer_products_have_the_bits_of_avx512(format: str, rng: Rng) -> None:
    k, n, most = int(rng.integers(1, 2500)), 2 * int(rng.integers(1, 200)), 80
    bench = Bench(rng, most, k)
    glu = bool(rng.integers(2))
    w = bench.weight("w", random_codes(rng, format, n, k))
    bench.b.op(Linear, "y", bench.x, w, x_format=x_format(format), glu=glu, activation="silu" if glu else "")
    program = finish(bench)
    for count in (1, 8, 17, 32, 45, most):
        rows = rng.permutation(most)[:count].tolist()
        amx, avx512 = (run(program, bench, rows, 2, isa) for isa in ("amx", "avx512"))
        np.testing.assert_array_equal(amx, avx512, err_msg=f"{count} rows")


@pytest.mark.parametrize("page", [32, 48, 64, 96])
@pytest.mark.parametrize("trial", range(3))
def test_attention_by_pages(page: int, trial: int, rng: Rng) -> None:
    """Pages of blocks of 32 positions, which the unit reads, and others; one query row, prompts in chunks, windows.

    Pages that held infinities and NaN before do not change a bit, nor does the number of query rows in a step.
    """
    kv_heads, share, width = int(rng.integers(1, 4)), int(rng.integers(1, 12)), int(rng.choice([32, 48, 64, 80, 128]))
    length, window = int(rng.integers(1, 700)), int(rng.choice([0, 0, 37, 200]))
    bench = Bench(rng, length + 1, kv_heads * width)
    v, q = (bench.matrix(n, length + 1, kv_heads * width * times) for n, times in (("v", 1), ("q", share)))
    for table in ("x.table", "v.table"):
        bench.arrays[table][length] = rng.choice([np.nan, np.inf])
    caches = [bench.b.cache(n, kv_heads, width, "bf16") for n in ("k_cache", "v_cache")]
    bench.b.op(KvWrite, "kv_write", bench.x, v, *caches)
    bench.b.op(Attend, "y", q, *caches, heads=kv_heads * share, scale=width**-0.5, window=window)
    program, weights = finish(bench), ArrayWeights(bench.arrays)
    count = -(-length // page)
    pages = [int(p) for p in rng.permutation(count + 3)[:count]]
    state = StateSpec(count + 3, page)

    def rows(device: HostDevice | ReferenceDevice, first: int, *, spoilt: bool = False) -> np.ndarray:
        """Results from position `first` on, of a step after that of the positions before it."""
        ex = device.load(program, weights, state)
        steps = [([length] * (count * page), 0)] if spoilt else []
        steps += [(range(first), 0)] if first else []
        for tokens, at in steps:
            ex.step(StepRequest(bind([Chunk(tokens, at, pages, [0])], page)))
        return ex.step(StepRequest(bind([Chunk(range(first, length), first, pages, [0])], page), taps=["y"])).taps["y"]

    whole = rows(HostDevice(2, "amx"), 0)
    # A score's error, as in tests/devices/test_host.py, with sums of two parts of each query, each of 16 to 17 bits.
    score = (2 * width + 64) * EPS * 6 * np.sqrt(width)
    bound = (2 * score + (2 * length + 128) * EPS) * 5
    np.testing.assert_allclose(whole, rows(ReferenceDevice(), 0), rtol=0, atol=bound)
    for first in {length - 1, max(0, length - 9), int(rng.integers(length))}:
        got = rows(HostDevice(1, "amx"), first, spoilt=True)
        np.testing.assert_array_equal(
            got, whole[first:], err_msg=f"{length} positions, the last {length - first} alone"
        )
