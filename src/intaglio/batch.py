"""Batch: the arrays of one step, for any mix of prefill chunks and decodes. bind() makes it from a Chunk per sequence.

Also the sampling parameters and logit edits of its rows. Independent of Programs and requests.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np


class BatchError(ValueError):
    """Raised for chunks that cannot form a batch: an empty chunk, for example, or two tokens with the same K/V slot."""


@dataclass(frozen=True, eq=False)
class Edits:
    """Changes to a row's logits before sampling: penalties and logit bias, for k token ids.

    The logit l of an edited id becomes (l / scale if l > 0 else l * scale) + add, in float32.

    Attributes:
        ids: token ids, all different, int32 [k].
        scale: one for each of `ids`, float32 [k].
        add: one for each of `ids`, float32 [k].
    """

    ids: np.ndarray
    scale: np.ndarray
    add: np.ndarray


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of one row.

    Attributes:
        temperature: the logits are divided by it; 0: the likeliest token is taken.
        top_k: only this many of the likeliest tokens can be drawn; 0: no limit.
        top_p: only the likeliest tokens that together have this probability can be drawn; 1: no limit.
        min_p: tokens with less than this fraction of the likeliest token's probability cannot be drawn; 0: no limit.
        seed: seed of the random numbers. They depend on the seed and the token's position only.
        edits: changes to the logits, made before `mask` is applied; None: no changes.
        mask: uint32 [(vocabulary + 31) // 32], one bit for each token id, the lowest bit first. An id whose bit is 0
            cannot be drawn. None: every id can.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    edits: Edits | None = field(default=None, compare=False)
    mask: np.ndarray | None = field(default=None, compare=False)


GREEDY = Sampling()
NO_STATE = (-1, -1)  # of a sequence without recurrent state
PER_TOKEN, PER_SEQUENCE = 3, 5  # arrays of `Batch.numbers` with an item per token and per sequence
SHARE = re.compile(r"T:(\d+)/(\d+)")  # one rank's run of the token rows: rank and number of ranks


def shared_rows(rows: int, share: int, shares: int) -> range:
    """The range of token rows that rank number `share` holds if `rows` token rows are divided among `shares` ranks.

    The ranges of all ranks are consecutive. Their lengths differ by at most one row, and rank 0's is the longest. A
    range is empty if there are fewer rows than ranks and the rank gets none.
    """
    return range(-(-rows * share // shares), -(-rows * (share + 1) // shares))


class Sizes(dict[str, int]):
    """A dict {name of a symbolic dimension, such as "T": size}, which also computes the sizes of parts of T.

    sizes["T:1/4"] is the number of token rows that rank number 1 of 4 holds (see shared_rows()). Any other missing name
    raises KeyError.
    """

    def __missing__(self, dim: str) -> int:
        match = SHARE.fullmatch(dim)
        if not match:
            raise KeyError(dim)
        return len(shared_rows(self["T"], int(match[1]), int(match[2])))


@dataclass(frozen=True)
class Chunk:
    """The tokens of one sequence that a step computes, at positions start, start + 1, ...; input of bind().

    Attributes:
        tokens: token ids to compute.
        start: position of the first of `tokens`.
        blocks: numbers of all K/V blocks of the sequence, in order, also of blocks that earlier steps filled.
        rows: offsets into `tokens` of the rows whose logits are wanted.
        sampling: parameters for all these rows, or one per row.
        state: (slot that is read, slot that is written) of recurrent state. The first holds the state before these
            tokens; -1 at start 0, where there is none. The second gets the state after them. (-1, -1) for a model
            without such state.
        window_blocks: the sequence's blocks in the caches of layers with a window, in order, up to the last token
            computed; -1 for a block that was given back, whose positions no query sees any more. () if these caches use
            `blocks` too.
    """

    tokens: Sequence[int]
    start: int
    blocks: Sequence[int]
    rows: Sequence[int] = ()
    sampling: Sampling | Sequence[Sampling] = GREEDY
    state: tuple[int, int] = NO_STATE
    window_blocks: Sequence[int] = ()


def numbers_size(t: int, s: int, r: int, columns: int, windows: int) -> int:
    """Length of `Batch.numbers` for t token rows, s sequences, r sampled rows and `columns` columns of block_table.

    windows: 1 if there are window_slots and a window_table, else 0.
    """
    return PER_TOKEN * t + PER_SEQUENCE * s + r + s * columns + windows * (t + s * columns)


@dataclass(frozen=True, eq=False)
class Batch:
    """The arrays of one step: T token rows, S sequences, R rows to sample. bind() makes it.

    Attributes:
        numbers: one int32 array of which the other arrays are views, in this order: tokens, positions, slots,
            first_row, q_len, context_len, state_from, state_to, rows, block_table, and window_slots and window_table if
            the caches of layers with a window have blocks of their own.
        counts: (T, S, R, number of columns of block_table, 1 if there is a window_table, else 0).
        block_size: tokens in a K/V block.
        sampling: R Samplings, one per row to sample.
    """

    numbers: np.ndarray
    counts: tuple[int, int, int, int, int]  # T, S, R, the columns of block_table, 1 if there is a window_table
    block_size: int
    sampling: tuple[Sampling, ...] = ()  # one per row to sample

    @cached_property
    def tokens(self) -> np.ndarray:
        """Token ids, int32 [T]."""
        return self._per_token(0)

    @cached_property
    def positions(self) -> np.ndarray:
        """Position of each token in its sequence, int32 [T]."""
        return self._per_token(1)

    @cached_property
    def slots(self) -> np.ndarray:
        """K/V slot of each token, block * block_size + offset, int32 [T]."""
        return self._per_token(2)

    @cached_property
    def first_row(self) -> np.ndarray:
        """Index, among the T token rows, of each sequence's first token row, int32 [S]."""
        return self._per_sequence(0)

    @cached_property
    def q_len(self) -> np.ndarray:
        """Number of token rows that each sequence has in this step, int32 [S]."""
        return self._per_sequence(1)

    @cached_property
    def context_len(self) -> np.ndarray:
        """Number of each sequence's tokens from its start to the end of this step, int32 [S]."""
        return self._per_sequence(2)

    @cached_property
    def state_from(self) -> np.ndarray:
        """Slot of each sequence's recurrent state before this step, int32 [S]; -1: none, the state is zero."""
        return self._per_sequence(3)

    @cached_property
    def state_to(self) -> np.ndarray:
        """Slot to which each sequence's recurrent state after this step is written, int32 [S]; -1: none is written."""
        return self._per_sequence(4)

    @cached_property
    def rows(self) -> np.ndarray:
        """Indices of the token rows whose logits are wanted, int32 [R]."""
        start = self._rows_start
        return self.numbers[start : start + self.counts[2]]

    @cached_property
    def block_table(self) -> np.ndarray:
        """Numbers of each sequence's K/V blocks in order, padded with -1, int32 [S, columns]."""
        _, s, r, columns, _ = self.counts
        start = self._rows_start + r
        return self.numbers[start : start + s * columns].reshape(s, columns)

    @cached_property
    def window_slots(self) -> np.ndarray:
        """K/V slot of each token in the caches of layers with a window, int32 [T]; empty if they use `slots`."""
        t, s, _, columns, windows = self.counts
        return self.numbers[len(self.numbers) - s * columns - t :][:t] if windows else self.numbers[:0]

    @cached_property
    def window_table(self) -> np.ndarray:
        """Numbers of each sequence's K/V blocks in the caches of layers with a window, int32 [S, columns].

        -1 means a block that was given back, and fills up short rows. The shape is [0, 0] if these layers use
        `block_table`.
        """
        _, s, _, columns, windows = self.counts
        if not windows:
            return self.numbers[:0].reshape(0, 0)
        return self.numbers[len(self.numbers) - s * columns :].reshape(s, columns)

    @cached_property
    def of_windows(self) -> Batch:
        """A Batch for the ops of layers with a window: its slots and block_table are window_slots and window_table.

        The Batch itself if these layers have no blocks of their own.
        """
        t, s, r, columns, windows = self.counts
        if not windows:
            return self
        numbers = self.numbers[: numbers_size(t, s, r, columns, 0)].copy()
        numbers[2 * t : 3 * t] = self.window_slots
        numbers[len(numbers) - s * columns :] = self.window_table.reshape(-1)
        return Batch(numbers, (t, s, r, columns, 0), self.block_size, self.sampling)

    @property
    def sizes(self) -> Sizes:
        """A dict of the sizes of symbolic dimensions: "T" (tokens), "S" (sequences), "R" (rows with wanted logits).

        It also answers keys such as "T:1/4": the number of token rows that rank 1 of 4 holds.
        """
        t, s, r, _, _ = self.counts
        return Sizes(T=t, S=s, R=r)

    def _per_token(self, i: int) -> np.ndarray:
        t = self.counts[0]
        return self.numbers[i * t : (i + 1) * t]

    def _per_sequence(self, i: int) -> np.ndarray:
        t, s, _, _, _ = self.counts
        return self.numbers[PER_TOKEN * t + i * s : PER_TOKEN * t + (i + 1) * s]

    @property
    def _rows_start(self) -> int:
        return PER_TOKEN * self.counts[0] + PER_SEQUENCE * self.counts[1]


def bind(chunks: Sequence[Chunk], block_size: int) -> Batch:
    """Combine chunks, one per sequence, into one Batch and return it. block_size: tokens in a K/V block.

    Raises BatchError if

    - there are no chunks,
    - a chunk has no tokens, too few blocks or window blocks, a row outside its tokens, or another number of Samplings
      than rows,
    - a chunk has a recurrent state to read at start 0, or none at a later start,
    - two tokens have the same K/V slot,
    - a slot of recurrent state is written twice, or both read and written.
    """
    if not chunks:
        raise BatchError("a batch needs at least one chunk")
    tokens, positions, slots, rows = list[int](), list[int](), list[int](), list[int]()
    first_row, q_len, context_len, table = list[int](), list[int](), list[int](), list[int]()
    window_slots, window_table = list[int](), list[int]()
    windows = any(len(c.window_blocks) for c in chunks)
    sampling = list[Sampling]()
    width = max(len(c.blocks) for c in chunks)
    for i, c in enumerate(chunks):
        _check(i, c, block_size)
        if windows:
            _check_window(i, c, block_size)
            held, stop = c.window_blocks, c.start + len(c.tokens)
            window_slots += [held[p // block_size] * block_size + p % block_size for p in range(c.start, stop)]
            window_table += [*held, *[-1] * (width - len(held))]
        n, first, blocks = len(c.tokens), len(tokens), c.blocks
        at = range(c.start, c.start + n)
        tokens += c.tokens
        positions += at
        slots += [blocks[p // block_size] * block_size + p % block_size for p in at]
        rows += [first + row for row in c.rows]
        first_row.append(first)
        q_len.append(n)
        context_len.append(c.start + n)
        table += blocks
        table += [-1] * (width - len(blocks))
        sampling += [c.sampling] * len(c.rows) if isinstance(c.sampling, Sampling) else c.sampling
    for used in (slots, window_slots):
        if len(set(used)) < len(used):
            raise BatchError(_same_slot(used, first_row, block_size))
    state_from, state_to = (list(slots) for slots in zip(*(c.state for c in chunks), strict=True))
    _check_states(state_from, state_to)
    per_sequence = [*first_row, *q_len, *context_len, *state_from, *state_to]
    numbers = [*tokens, *positions, *slots, *per_sequence, *rows, *table, *window_slots, *window_table]
    counts = len(tokens), len(chunks), len(rows), width, int(windows)
    return Batch(np.array(numbers, np.int32), counts, block_size, tuple(sampling))


def _same_slot(slots: list[int], first_row: list[int], block_size: int) -> str:
    """The error message for the first two tokens that have the same K/V slot, naming their chunks.

    Call it only if there are two such tokens. slots: K/V slot of each token. first_row: index of each chunk's first
    token.
    """
    seen: dict[int, int] = {}
    for at, slot in enumerate(slots):
        if slot in seen:
            a, b = (bisect_right(first_row, row) - 1 for row in (seen[slot], at))
            return (
                f"chunks {a} and {b} both write slot {slot % block_size} of block {slot // block_size}; "
                "give each sequence blocks of its own for the tokens it computes"
            )
        seen[slot] = at
    raise AssertionError("every slot is used once")


def _check_states(before: list[int], after: list[int]) -> None:
    """Raise BatchError if two sequences write one slot of recurrent state in a step, or if a slot is read and written.

    A sequence must not write the slot that it reads itself, either, so that a failed step can run again.

    before, after: number of the slot that each sequence reads, and of the one that it writes; -1: none.
    """
    written = [slot for slot in after if slot >= 0]
    if not written:
        return
    if len(set(written)) < len(written):
        twice = next(slot for slot in written if written.count(slot) > 1)
        raise BatchError(f"two chunks write their state to slot {twice}; give each sequence slots of its own")
    if both := set(written).intersection(before):
        raise BatchError(
            f"state slot {min(both)} is read and written in one step; a step reads one slot and writes another, so "
            "that it can be run again if it fails"
        )


def _check_window(i: int, c: Chunk, block_size: int) -> None:
    """Raise BatchError if the window blocks (K/V of layers with a sliding window) of chunk number `i` are invalid.

    c.window_blocks must have a block for each token that the chunk computes, and be no longer than c.blocks.
    """
    held = c.window_blocks
    first, last = c.start // block_size, (c.start + len(c.tokens) - 1) // block_size
    if not last < len(held) <= len(c.blocks) or min(held[first : last + 1]) < 0:
        raise BatchError(
            f"chunk {i} computes tokens of blocks {first}..{last} of {len(c.blocks)}, and its window_blocks are "
            f"{list(held)}; give one for each block, or -1 for those before block {first} that were given back"
        )


def _check(i: int, c: Chunk, block_size: int) -> None:
    """Raise BatchError if a chunk cannot be run. `i` is the chunk's number, for the message.

    A chunk cannot be run if it has no tokens, positions outside its blocks, or rows outside its tokens; if it has a
    list of Samplings that is not as long as its rows; or if its recurrent state does not fit: a state is read at start
    0, none is read at a later start, or one is read and none is written.
    """
    n = len(c.tokens)
    if n == 0:
        raise BatchError(f"chunk {i} has no tokens")
    if c.start < 0 or (c.start + n) > len(c.blocks) * block_size:
        raise BatchError(
            f"chunk {i}: positions {c.start}..{c.start + n - 1} do not fit its {len(c.blocks)} blocks of {block_size}"
        )
    before, after = c.state
    if (after < 0 and before >= 0) or (after >= 0 and (before < 0) != (c.start == 0)):
        raise BatchError(
            f"chunk {i} starts at position {c.start} with state={c.state}; wanted (slot before, slot after) of the "
            "recurrent state, with -1 before at position 0 only"
        )
    for row in c.rows:
        if not 0 <= row < n:
            raise BatchError(f"chunk {i}: wanted row {row} is outside its {n} tokens")
    if not isinstance(c.sampling, Sampling) and len(c.sampling) != len(c.rows):
        raise BatchError(f"chunk {i}: {len(c.sampling)} Samplings for {len(c.rows)} rows")
