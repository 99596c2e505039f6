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
    """Bytes of one chip's HBM that a serving load needs, and the chip's capacity.

    Attributes:
        weights: weights of this chip's share of the model.
        kv: keys, values and recurrent state of all requests in flight.
        activations: buffers of the temps of one step, and its outputs: logits of all rows.
        hbm: capacity of the chip.
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


def memory_use(program: Program, step: BatchSizes, micro_batches: int, hbm: int, window: int = 0) -> MemoryUse:
    """The MemoryUse of a chip that runs `program`, the Program of one rank of a pipeline stage.

    Args:
        program: the Program whose weights, state and temps are counted.
        step: the sequences and rows of one step. Each sequence holds its keys in blocks of BLOCK tokens, and two slots
            of recurrent state.
        micro_batches: number of such steps in flight in the pipeline, each with its own sequences.
        hbm: bytes of the chip's HBM.
        window: the longest sliding window of the whole model's layers in tokens, see longest_window(). The caches in
            `program.windows` hold only the blocks that a step's queries can see through it. 0: no such layers.
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
    """Bytes of a K/V block of BLOCK tokens: (in all layers without a sliding window, in all layers with one), two ints.

    The latter are the caches in `program.windows`.
    """
    full = windowed = 0
    for t in program.of_role("state"):
        if t.shape[0] == "P":
            size = t.nbytes({"P": 1, "B": BLOCK})
            full, windowed = (full, windowed + size) if t.name in program.windows else (full + size, windowed)
    return full, windowed


def slot_bytes(program: Program) -> int:
    """Bytes of a slot of recurrent state in all layers; 0 for a Program without recurrent state."""
    return sum(t.nbytes({"N": 1, "B": BLOCK}) for t in program.of_role("state") if t.shape[0] == "N")


def free_bytes(program: Program, use: MemoryUse, slots: int) -> int:
    """Bytes of HBM left for K/V beside weights, activations and `slots` slots of recurrent state; may be negative.

    use: the MemoryUse of this Program with an empty K/V cache.
    """
    return use.hbm - use.weights - use.activations - slots * slot_bytes(program)


@dataclass(frozen=True)
class KvLimit:
    """A limit in bytes on the K/V of all sequences of a server: (tokens * full + kept * windowed) / BLOCK <= room.

    `tokens` is the number of tokens of all sequences, `kept` the number of those that layers with a sliding window
    keep.

    Attributes:
        room: bytes of K/V blocks that fit.
        full: bytes of a block of BLOCK tokens in the layers that keep all tokens.
        windowed: bytes of a block in the layers with a window.
    """

    room: int
    full: int
    windowed: int = 0


@dataclass(frozen=True)
class KvRoom:
    """How many tokens of K/V the sequences of one server can have at a time.

    Attributes:
        limits: all must hold, such as one for the chips of each pipeline stage.
        window: the most tokens of a sequence that layers with a sliding window keep; 0 if no layer gives K/V back.
    """

    limits: tuple[KvLimit, ...]
    window: int = 0

    @classmethod
    def of_tokens(cls, tokens: int) -> KvRoom:
        """The KvRoom for `tokens` tokens in layers that keep all of them."""
        return cls((KvLimit(tokens, BLOCK),))

    @classmethod
    def of_state(cls, state: StateSpec, context: int, max_batch_tokens: int, depth: int) -> KvRoom:
        """The KvRoom of an engine whose K/V cache has the sizes in `state`.

        Blocks that no sequence reserves, for the rows of the steps under way, are left out. context: context length in
        tokens. max_batch_tokens: maximum number of token rows in a step. depth: number of steps under way at once.
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
        """Tokens that a layer with a window keeps of a sequence of `length` tokens: at most `window`."""
        return min(length, self.window) if self.window else length

    def fits(self, tokens: float, kept: float) -> bool:
        """True if there is room for sequences that have `tokens` tokens in total.

        kept: how many of these tokens the layers with a window keep.
        """
        return all(tokens * one.full + kept * one.windowed <= one.room * BLOCK for one in self.limits)

    def used(self, tokens: float, kept: float) -> float:
        """Fraction of the room that is filled by sequences with `tokens` tokens in total.

        kept: how many of these tokens the layers with a window keep.
        """
        return max((tokens * one.full + kept * one.windowed) / (one.room * BLOCK) for one in self.limits)

    def tokens(self, length: float = 1) -> int:
        """Number of tokens that fit, if each sequence has `length` tokens; the last sequence may fit in part only."""
        kept = self.kept(length)
        sizes = [(one.room * BLOCK, length * one.full + kept * one.windowed) for one in self.limits]
        return min(int(room * length // size) for room, size in sizes if size)

    def sequences(self, length: float) -> int:
        """Number of sequences of `length` tokens that fit."""
        return int(self.tokens(length) // length)
