"""Products by the matrix unit of Intel CPUs (AMX): bf16 products have the bits of the unit's documented arithmetic, and
integer products those of AVX-512."""

from __future__ import annotations

import numpy as np
import pytest
from support.coded import random_codes
from support.host_bench import EPS, ISAS, PAGE, Bench, finish

from intaglio import formats
from intaglio.batch import Chunk, bind
from intaglio.devices import ArrayWeights, StateSpec, StepRequest
from intaglio.devices.host import HostDevice
from intaglio.ops import Linear, x_format
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
