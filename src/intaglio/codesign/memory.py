"""HBM use of a serving load on one chip (MemoryUse), and how many tokens of K/V cache a server has room for (KvRoom).

Layers with a sliding window hold the K/V blocks that the engine keeps for them (runtime/windows.py).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from intaglio.compiler.buffers import buffers
from intaglio.devices import StateSpec
from intaglio.program import Program
from intaglio.runtime.windows import blocks_of_step, reservations
from intaglio.silicon.sizes import BLOCK, BatchSizes

GB = 10**9


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of one chip's HBM that a serving load needs, and the chip's capacity in bytes.

    Attributes:
        weights: bytes of the weights that the chip holds.
        kv: bytes of keys, values and recurrent state of all requests in flight.
        activations: bytes of the intermediate tensors and outputs (logits) of one step.
        hbm: capacity of the chip's HBM in bytes.
    """

    weights: int
    kv: int  # keys and values of all requests in flight
    activations: int  # buffers of the temps of one step, and logits
    hbm: int  # capacity of the chip

    @property
    def total(self) -> int:
        """Bytes needed in total: weights, K/V and activations."""
        return self.weights + self.kv + self.activations

    @property
    def fits(self) -> bool:
        """True if the bytes needed in total are not more than the chip's HBM has."""
        return self.total <= self.hbm

    def as_dict(self) -> dict[str, Any]:
        """A dict for JSON. Its keys are the fields' names with `_bytes` added, and `total_bytes`."""
        return {**{f"{name}_bytes": n for name, n in asdict(self).items()}, "total_bytes": self.total}

    def __str__(self) -> str:
        parts = (
            f"weights {self.weights / GB:,.1f} GB, K/V {self.kv / GB:,.1f}, activations {self.activations / GB:,.2f}"
        )
        return f"{parts}; {self.total / GB:,.1f} of {self.hbm / GB:,.0f} GB of HBM"


def memory_use(program: Program, step: BatchSizes, micro_batches: int, hbm: int, window: int = 0) -> MemoryUse:
    """The bytes of HBM that one chip needs to serve a load, as a MemoryUse.

    Args:
        program: the Program that the chip runs, for one rank. Counted are its weights, K/V cache, recurrent state and
            intermediate tensors.
        step: the sequences and rows of one step. Each sequence takes K/V blocks of BLOCK tokens for its keys, and two
            slots of recurrent state.
        micro_batches: number of steps in flight in the pipeline at a time. Each has as many sequences as `step`.
        hbm: bytes of the chip's HBM.
        window: the longest sliding window of the whole model's layers in tokens, see longest_window(); 0: no layer has
            one. The caches in `program.windows` hold only the blocks that are within this window of a step's queries.
    """
    sequences = sum(n for *_, n in step.sequences)
    blocks = sum(-(-keys // BLOCK) * n for _, keys, n in step.sequences)
    seen = sum(blocks_of_step(q, keys, window, BLOCK) * n for q, keys, n in step.sequences) if window else blocks
    full, windowed = page_bytes(program)
    return MemoryUse(
        weights=sum(w.nbytes({}) for w in program.of_role("weight")),
        kv=(full * blocks + windowed * seen) * micro_batches + slot_bytes(program) * 2 * sequences * micro_batches,
        activations=sum(step.rows_of(b.rows) * b.row_bytes for b in buffers(program).values())
        + sum(t.nbytes(step.sizes) for t in program.of_role("output")),
        hbm=hbm,
    )


def page_bytes(program: Program) -> tuple[int, int]:
    """Returns the bytes of one K/V block of BLOCK tokens in the layers of one chip, as (full, windowed).

    `full` is the sum over all layers without a sliding window. `windowed` is the sum over all layers with one, whose
    caches are in `program.windows`.
    """
    full = windowed = 0
    for t in program.of_role("state"):
        if t.shape[0] == "P":
            size = t.nbytes({"P": 1, "B": BLOCK})
            full, windowed = (full, windowed + size) if t.name in program.windows else (full + size, windowed)
    return full, windowed


def slot_bytes(program: Program) -> int:
    """Bytes of one slot of recurrent state, summed over all layers; 0 for a Program without recurrent state.

    A slot holds one copy of the state of one sequence.
    """
    return sum(t.nbytes({"N": 1, "B": BLOCK}) for t in program.of_role("state") if t.shape[0] == "N")


def free_bytes(program: Program, use: MemoryUse, slots: int) -> int:
    """Bytes of HBM that are left for the K/V cache beside weights, activations and recurrent state.

    The result is negative if these alone do not fit. use: the MemoryUse of this Program with an empty K/V cache. slots:
    number of slots of recurrent state; a slot holds one copy of the state of one sequence.
    """
    return use.hbm - use.weights - use.activations - slots * slot_bytes(program)


@dataclass(frozen=True)
class KvLimit:
    """A limit on the number of tokens whose K/V a server can hold.

    The limit is (tokens * full + kept * windowed) / BLOCK <= room. `tokens` is the number of tokens of all sequences.
    `kept` is the number of tokens that layers with a sliding window keep of these sequences.

    Attributes:
        room: bytes of all K/V blocks that fit.
        full: bytes of one block of BLOCK tokens in all layers that keep every token.
        windowed: bytes of one block of BLOCK tokens in all layers with a sliding window.
    """

    room: int
    full: int
    windowed: int = 0


@dataclass(frozen=True)
class KvRoom:
    """The K/V capacity of one server: how many tokens its sequences can have at a time.

    Attributes:
        limits: the limits that must all hold, for example one for the chips of each pipeline stage.
        window: the largest number of tokens of one sequence that layers with a sliding window keep; 0 if all layers
            keep every token.
    """

    limits: tuple[KvLimit, ...]
    window: int = 0

    @classmethod
    def of_tokens(cls, tokens: int) -> KvRoom:
        """The KvRoom of a server that can hold the K/V of `tokens` tokens. All its layers keep every token."""
        return cls((KvLimit(tokens, BLOCK),))

    @classmethod
    def of_state(cls, state: StateSpec, context: int, max_batch_tokens: int, depth: int) -> KvRoom:
        """The KvRoom (K/V capacity in tokens) of an engine whose K/V cache has the sizes in `state`.

        If layers with a sliding window have blocks of their own, the blocks that the engine reserves for the tokens of
        running steps are not counted.

        Args:
            state: number and size of the K/V blocks.
            context: context length in tokens.
            max_batch_tokens: maximum number of tokens in a step.
            depth: number of steps that run at once.
        """
        limits = (KvLimit(state.pages * BLOCK, BLOCK),)
        if not state.window_pages:
            return cls(limits)
        most, steps = reservations(
            state.window, state.page_tokens, context=context, max_batch_tokens=max_batch_tokens, depth=depth
        )
        reserved = (state.window_pages - 1 - steps) * BLOCK
        return cls((*limits, KvLimit(reserved, 0, BLOCK)), most * BLOCK)

    def kept(self, length: float) -> float:
        """Number of tokens that a sliding-window layer keeps of a sequence of `length` tokens.

        It is the smaller of `length` and `window`; if `window` is 0, it is `length`.
        """
        return min(length, self.window) if self.window else length

    def fits(self, tokens: float, kept: float) -> bool:
        """True if the server can hold the K/V of `tokens` tokens.

        `tokens` is the total over all sequences. kept: how many of these tokens the layers with a sliding window keep.
        """
        return all(tokens * one.full + kept * one.windowed <= one.room * BLOCK for one in self.limits)

    def used(self, tokens: float, kept: float) -> float:
        """Fraction of the K/V capacity that `tokens` tokens fill; above 1 if they do not fit.

        `tokens` is the total over all sequences. kept: how many of these tokens the layers with a window keep.
        """
        return max((tokens * one.full + kept * one.windowed) / (one.room * BLOCK) for one in self.limits)

    def tokens(self, length: float = 1) -> int:
        """Number of tokens whose K/V the server can hold at a time if every sequence has `length` tokens.

        If only a part of one more sequence fits, the tokens of this part are counted, too.
        """
        kept = self.kept(length)
        sizes = [(one.room * BLOCK, length * one.full + kept * one.windowed) for one in self.limits]
        return min(int(room * length // size) for room, size in sizes if size)

    def sequences(self, length: float) -> int:
        """Number of sequences of `length` tokens whose K/V the server can hold at a time."""
        return int(self.tokens(length) // length)
