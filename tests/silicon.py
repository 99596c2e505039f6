"""What tests of silicon share: small chips, a stream by hand, and an op run by its kernel beside its reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from intaglio.batch import Batch, Chunk, bind
from intaglio.chips import ChipSpec, chip, replace
from intaglio.ops import Op, Tensor, Value
from intaglio.silicon.kernels import Board, execute

SMALL = replace(  # two cores that tile even small products
    chip("a100_sxm"), name="small", cores=2, tiles=((16, 32), (32, 16)), sram_bytes=96 * 1024, acc_bytes=64 * 1024
)
FUSED = replace(SMALL, name="fused", att_lanes=64, flash=3)
STEPPED = replace(SMALL, name="stepped", extra=("SoftmaxStep",))
CHIPS = {"small": SMALL, "stepped": STEPPED, "fused": FUSED, "sohu": chip("sohu"), "h100": chip("h100_sxm")}


def batch_of(rng: np.random.Generator, chunks: list[tuple[int, int]], page: int = 4) -> Batch:
    """A batch of (tokens, tokens before them), pages shuffled."""
    free = rng.permutation(64).tolist()
    made = []
    for n, before in chunks:
        blocks = [free.pop() for _ in range(-(-(n + before) // page))]
        made.append(Chunk(rng.integers(0, 50, n).tolist(), before, blocks, rows=(n - 1,)))
    return bind(made, page)


def run_kernel(
    spec: ChipSpec, op: Op, tensors: Mapping[str, Tensor], values: Mapping[str, Value], batch: Batch
) -> tuple[dict[str, np.ndarray], Board]:
    """The op's results as its kernel computes them on `spec`, and the board with its state."""
    board = Board(spec)
    for name, value in values.items():
        bits = 4 if tensors[name].format.startswith("int4") else 8
        board.put(name, value, bits)
    return execute(board, op, tensors, batch), board


def compare(
    chip: str, op: Any, tensors: list[Tensor], values: dict[str, Value], batch: Batch, tolerance: float, tip: float = 0
) -> None:
    """Run both faces; results must agree within `tolerance` times the largest value, and `tip` as it is."""
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
