"""Helpers of the silicon tests: small chips, random batches, and a comparison of a chip kernel with its reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from intaglio.batch import Batch, Chunk, bind
from intaglio.chips import Target, library, target
from intaglio.ops import Op, Tensor, Value
from intaglio.silicon.kernels import ChipMemory, run_op

SMALL = target("a100_sxm").changed(  # two cores with small tiles, so that small products have several
    {
        "chip.name": "small", "chip.cores": 2, "chip.sram_bytes": 96 * 1024, "chip.acc_bytes": 64 * 1024,
        "library.tiles": ((16, 32), (32, 16)), "library.split_k": (1,), "library.decode_jobs": 1,
    }
)  # fmt: skip
FLASH_3 = {
    name: getattr(library("hopper"), name)
    for name in ("key_tile", "softmax_overlap", "pack_gqa", "split_mha", "merge_launch")
}
FUSED = SMALL.with_chip(name="fused", att_lanes=64).with_library(**FLASH_3)
STEPPED = SMALL.with_chip(name="stepped", extra_instructions=("SoftmaxStep",)).with_library(prefill_window_keys=7)
CHIPS = {"small": SMALL, "stepped": STEPPED, "fused": FUSED, "sohu": target("sohu"), "h100": target("h100_sxm")}


def batch_of(rng: np.random.Generator, chunks: list[tuple[int, int]], page: int = 4) -> Batch:
    """A batch of chunks (new tokens, context before them) with pages in random order."""
    free = rng.permutation(64).tolist()
    made = []
    for n, before in chunks:
        blocks = [free.pop() for _ in range(-(-(n + before) // page))]
        made.append(Chunk(rng.integers(0, 50, n).tolist(), before, blocks, rows=(n - 1,)))
    return bind(made, page)


def run_kernel(
    on: Target, op: Op, tensors: Mapping[str, Tensor], values: Mapping[str, Value], batch: Batch
) -> tuple[dict[str, np.ndarray], ChipMemory]:
    """Execute an op by its chip kernel; returns the results by name and the chip's memory."""
    memory = ChipMemory(on)
    for name, value in values.items():
        bits = 4 if tensors[name].format.startswith("int4") else 8
        memory.put(name, value, bits)
    return run_op(memory, op, tensors, batch), memory


def compare(
    chip: str, op: Any, tensors: list[Tensor], values: dict[str, Value], batch: Batch, tolerance: float, tip: float = 0
) -> None:
    """Assert that chip kernel and reference() agree within `tolerance` times the largest value, plus `tip`."""
    table = {t.name: t for t in tensors}
    table |= {n: Tensor(n, shape, fmt, "temp") for n, (shape, fmt) in op.shapes(table).items()}
    got, _ = run_kernel(CHIPS[chip], op, table, values, batch)
    want = op.reference(values, batch)
    for name, expected in want.items():
        assert got[name].shape == expected.shape
        np.testing.assert_allclose(
            got[name], expected, rtol=tolerance, atol=tip + tolerance * np.nanmax(np.abs(expected), initial=1)
        )


def some_batch(rng: np.random.Generator) -> Batch:
    return batch_of(rng, [(int(rng.integers(1, 7)), int(rng.integers(0, 9))) for _ in range(rng.integers(1, 4))])


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)
