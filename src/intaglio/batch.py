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
    """Changes to one row of logits before sampling: penalties and logit bias, for k token ids.

    The logit l of an edited id becomes (l / scale if l > 0 else l * scale) + add, in float32.

    Attributes:
        ids: ids of the tokens whose logits change, all different, int32 [k].
        scale: the value `scale` of the formula for each of `ids`, float32 [k].
        add: the value `add` of the formula for each of `ids`, float32 [k].
    """

    ids: np.ndarray
    scale: np.ndarray
    add: np.ndarray


@dataclass(frozen=True)
class Sampling:
    """Parameters for drawing one token from one row of logits.

    Attributes:
        temperature: the logits are divided by it; 0: the likeliest token is taken.
        top_k: only this many of the likeliest tokens can be drawn; 0: no limit.
        top_p: only the likeliest tokens that together have this probability can be drawn; 1: no limit.
        min_p: tokens with less than this fraction of the likeliest token's probability cannot be drawn; 0: no limit.
        seed: seed of the random numbers. They depend on the seed and the token's position only.
        edits: changes to the logits, made before `mask` is applied; None: no changes.
        mask: uint32 [(vocabulary + 31) // 32], one bit for each token id, the lowest bit first. An id whose bit is 0
            cannot be drawn. None: every id can be drawn.
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
    """Returns the indices of the token rows that rank number `share` holds, as a Python range.

    `rows` token rows are divided among `shares` ranks in consecutive parts, whose lengths differ by at most one. No
    part is longer than the part of rank 0. A part is empty if there are fewer rows than ranks and no row is left for
    the rank.
    """
    return range(-(-rows * share // shares), -(-rows * (share + 1) // shares))


class Sizes(dict[str, int]):
    """A dict {name of a symbolic dimension, such as "T": its size}. Keys such as "T:1/4" are computed when asked for.

    The T token rows of a batch can be divided among ranks, numbered from 0. sizes["T:1/4"] is the number of token rows
    that rank 1 of 4 ranks holds. Any other missing name raises KeyError.
    """

    def __missing__(self, dim: str) -> int:
        match = SHARE.fullmatch(dim)
        if not match:
            raise KeyError(dim)
        return len(shared_rows(self["T"], int(match[1]), int(match[2])))


@dataclass(frozen=True)
class Chunk:
    """Tokens of one sequence that one step computes. bind() combines several chunks into a Batch.

    Attributes:
        tokens: ids of the tokens to compute. Their positions in the sequence are start, start + 1, ...
        start: position of the first of `tokens`.
        blocks: numbers of all K/V blocks of the sequence, in order, including the blocks that earlier steps filled.
        rows: indices into `tokens` of the tokens whose logits are wanted.
        sampling: one Sampling for all `rows`, or a sequence with one Sampling for each of `rows`.
        state: (slot that the step reads, slot that the step writes), two numbers of slots of recurrent state. The first
            slot holds the state before `tokens`; it is -1 if `start` is 0, because there is no earlier state. The
            second slot gets the state after `tokens`. (-1, -1) for a model without recurrent state.
        window_blocks: numbers of the sequence's K/V blocks in the caches of sliding-window layers, in order. The list
            must reach at least to the block of the last of `tokens`. -1 stands for a block that was given back because
            all its positions have left the window. (): these caches use `blocks`.
    """

    tokens: Sequence[int]
    start: int
    blocks: Sequence[int]
    rows: Sequence[int] = ()
    sampling: Sampling | Sequence[Sampling] = GREEDY
    state: tuple[int, int] = NO_STATE
    window_blocks: Sequence[int] = ()


def numbers_size(t: int, s: int, r: int, columns: int, windows: int) -> int:
    """Returns the length of `Batch.numbers`, the one array that holds all arrays of a batch.

    Args:
        t: number of token rows.
        s: number of sequences.
        r: number of rows to sample.
        columns: number of columns of the block table.
        windows: 1 if sliding-window layers have K/V blocks of their own, else 0.
    """
    return PER_TOKEN * t + PER_SEQUENCE * s + r + s * columns + windows * (t + s * columns)


@dataclass(frozen=True, eq=False)
class Batch:
    """The input arrays of one step. bind() makes a Batch.

    The step computes T token rows, which belong to S sequences, and samples one token for each of R of these rows.

    Attributes:
        numbers: one int32 array that holds all other arrays one after another: tokens, positions, slots, first_row,
            q_len, context_len, state_from, state_to, rows and block_table. If sliding-window layers have K/V blocks of
            their own, window_slots and window_table follow.
        counts: (T, S, R, columns, windows). `columns` is the number of columns of block_table. `windows` is 1 if
            `numbers` has a window_table, else 0.
        block_size: tokens in a K/V block.
        sampling: R Samplings, one for each row to sample.
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
        """K/V slot of each token, int32 [T]: number of the token's block * block_size + offset in the block."""
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
        """For each sequence, the slot that holds its recurrent state before this step, int32 [S].

        -1: the sequence has no earlier state, so it starts from zeros.
        """
        return self._per_sequence(3)

    @cached_property
    def state_to(self) -> np.ndarray:
        """For each sequence, the slot that gets its recurrent state after this step, int32 [S].

        -1: no state is written for the sequence.
        """
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
        """K/V slot of each token in the caches of sliding-window layers, int32 [T].

        Empty, int32 [0], if sliding-window layers have no K/V blocks of their own but use `slots`.
        """
        t, s, _, columns, windows = self.counts
        return self.numbers[len(self.numbers) - s * columns - t :][:t] if windows else self.numbers[:0]

    @cached_property
    def window_table(self) -> np.ndarray:
        """Numbers of each sequence's K/V blocks in the caches of sliding-window layers, int32 [S, columns].

        An entry is -1 if its block was given back, or if the sequence has fewer blocks than the table has columns. The
        shape is [0, 0] if sliding-window layers have no K/V blocks of their own but use `block_table`.
        """
        _, s, _, columns, windows = self.counts
        if not windows:
            return self.numbers[:0].reshape(0, 0)
        return self.numbers[len(self.numbers) - s * columns :].reshape(s, columns)

    @cached_property
    def of_windows(self) -> Batch:
        """A Batch like this one, for sliding-window layers.

        Its `slots` are this Batch's window_slots, and its `block_table` is this Batch's window_table. If sliding-window
        layers have no K/V blocks of their own, the result is this Batch itself.
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
        """Sizes of this step's symbolic dimensions, as a dict {name of a dimension: size}.

        - "T": number of token rows.
        - "S": number of sequences.
        - "R": number of rows whose logits are wanted.
        - "T:1/4" and keys like it: number of token rows that rank 1 of 4 ranks holds; ranks are numbered from 0.
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
    """Combine chunks into one Batch, and return the Batch.

    chunks: one Chunk for each sequence. block_size: tokens in a K/V block. Raises BatchError in these cases:

    - There are no chunks.
    - A chunk has no tokens, or too few K/V blocks or window blocks for its tokens.
    - One of a chunk's `rows` is not an index into its tokens.
    - A chunk has a list of Samplings that is not as long as its list of rows.
    - A chunk's `state` is wrong. Without recurrent state it must be (-1, -1). With recurrent state it must be (-1,
      slot) if the chunk starts at position 0, and (slot, other slot) if it starts later.
    - Two tokens have the same K/V slot.
    - Two chunks write the same slot of recurrent state, or a slot is both read and written.
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
    """Returns the error message for the first two tokens that have the same K/V slot.

    The message names the chunks of the two tokens. Call this function only if there are two such tokens.

    slots: K/V slot of each token. first_row: index in `slots` of each chunk's first token. block_size: tokens in a K/V
    block.
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
    """Raise BatchError if two sequences write the same slot of recurrent state, or if a slot is both read and written.

    A sequence must not write the slot that it reads itself, either, so that a failed step can run again.

    Args:
        before: number of the slot that each sequence reads; -1: it reads none.
        after: number of the slot that each sequence writes; -1: it writes none.
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
    """Raise BatchError if the window blocks of a chunk are invalid.

    Window blocks hold the K/V of layers with a sliding window. c.window_blocks must have a block for each token that
    the chunk computes, and be no longer than c.blocks.

    i: number of the chunk, for the error. c: the chunk. block_size: tokens in a K/V block.
    """
    held = c.window_blocks
    first, last = c.start // block_size, (c.start + len(c.tokens) - 1) // block_size
    if not last < len(held) <= len(c.blocks) or min(held[first : last + 1]) < 0:
        raise BatchError(
            f"chunk {i} computes tokens of blocks {first}..{last} of {len(c.blocks)}, and its window_blocks are "
            f"{list(held)}; give one for each block, or -1 for those before block {first} that were given back"
        )


def _check(i: int, c: Chunk, block_size: int) -> None:
    """Raise BatchError if chunk number `i` cannot be run.

    A chunk cannot be run in these cases:

    - It has no tokens, or its positions are outside its blocks.
    - One of its `rows` is not an index into its tokens.
    - It has a list of Samplings that is not as long as its list of rows.
    - Its `state` is wrong. Without recurrent state it must be (-1, -1). With recurrent state it must be (-1, slot) if
      the chunk starts at position 0, and (slot, slot) if it starts later. Whether the two slots differ is not checked
      here.
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
