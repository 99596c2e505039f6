"""Memory of a serving load in the HBM of one chip: weights, K/V cache and activations."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from intaglio.compiler.buffers import buffers
from intaglio.program import Program
from intaglio.silicon.sizes import BLOCK, BatchSizes

GB = 10**9


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of one chip's HBM that a serving load needs, and the chip's capacity.

    Attributes:
        weights: weights of this chip's share of the model.
        kv: keys, values and recurrent state of all requests in flight.
        activations: buffers of the temps of one step.
        hbm: capacity of the chip.
    """

    weights: int
    kv: int  # keys and values of all requests in flight
    activations: int  # buffers of the temps of one step
    hbm: int  # capacity of the chip

    @property
    def total(self) -> int:
        """Bytes needed in total: weights, K/V and activations."""
        return self.weights + self.kv + self.activations

    @property
    def fits(self) -> bool:
        """True if the total does not exceed the chip's HBM."""
        return self.total <= self.hbm

    def as_dict(self) -> dict[str, Any]:
        """A dict for JSON: each field as `FIELD_bytes`, and `total_bytes`."""
        return {**{f"{name}_bytes": n for name, n in asdict(self).items()}, "total_bytes": self.total}

    def __str__(self) -> str:
        parts = (
            f"weights {self.weights / GB:,.1f} GB, K/V {self.kv / GB:,.1f}, activations {self.activations / GB:,.2f}"
        )
        return f"{parts}; {self.total / GB:,.1f} of {self.hbm / GB:,.0f} GB of HBM"


def memory_use(program: Program, step: BatchSizes, micro_batches: int, hbm: int) -> MemoryUse:
    """The MemoryUse of a chip that runs `program`, the Program of one rank of a pipeline stage.

    Args:
        program: the Program whose weights, state and temps are counted.
        step: the sequences and rows of one step. Each sequence holds its keys in blocks of BLOCK tokens, and two slots
            of recurrent state.
        micro_batches: number of such steps in flight in the pipeline, each with its own sequences.
        hbm: bytes of the chip's HBM.
    """
    blocks = sum(-(-keys // BLOCK) * n for _, keys, n in step.sequences)
    sequences = sum(n for *_, n in step.sequences)
    pages = {"P": blocks * micro_batches, "B": BLOCK, "N": 2 * sequences * micro_batches}
    return MemoryUse(
        weights=sum(w.nbytes({}) for w in program.of_role("weight")),
        kv=sum(t.nbytes(pages) for t in program.of_role("state")),
        activations=sum(step.rows_of(b.rows) * b.row_bytes for b in buffers(program).values()),
        hbm=hbm,
    )


def pages_that_fit(program: Program, use: MemoryUse, slots: int) -> int:
    """Number of K/V blocks of BLOCK tokens that fit into the HBM that is left over.

    Weights, activations and `slots` slots of recurrent state are subtracted first. The result is negative if these
    alone need more than the HBM, and 0 if less than a block is left. For a Program without K/V cache it is the number
    of bytes left.

    use: the MemoryUse of this Program with an empty K/V cache.
    """
    state = program.of_role("state")
    held = sum(t.nbytes({"N": slots, "B": BLOCK, "P": 0}) for t in state)
    page = sum(t.nbytes({"P": 1, "B": BLOCK, "N": 0}) for t in state)
    free = use.hbm - use.weights - use.activations - held
    return free // max(1, page)
