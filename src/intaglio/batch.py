"""The Batch: what the runtime binds at each step, any mix of prefill chunks and decodes.

Built from Chunks, one a sequence. Knows nothing of programs or requests.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np


class BatchError(ValueError):
    """A batch that contradicts itself."""


@dataclass(frozen=True, eq=False)
class Edits:
    """What becomes of a row's logits before the draw: at each of `ids`, l turns into
    (l / scale if l > 0 else l * scale) + add, in float32. ids int32 [k], each once; scale, add f32 [k]."""

    ids: np.ndarray
    scale: np.ndarray
    add: np.ndarray


@dataclass(frozen=True)
class Sampling:
    """How one row's next token is drawn. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 switch a filter off.

    `edits` come first, then `mask`, uint32 [(vocabulary + 31) // 32]: ids whose bit (lowest first) is 0 are out.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    edits: Edits | None = field(default=None, compare=False)
    mask: np.ndarray | None = field(default=None, compare=False)


GREEDY = Sampling()
SHARE = re.compile(r"T:(\d+)/(\d+)")  # one rank's run of the token rows: its number, and how many there are


def shared(rows: int, share: int, shares: int) -> range:
    """The share-th of near-equal runs of rows, none longer than the first: a rank's own of rows split along tokens."""
    return range(-(-rows * share // shares), -(-rows * (share + 1) // shares))


class Sizes(dict[str, int]):
    """Symbolic dims by name, and the rows of a share such as T:1/4."""

    def __missing__(self, dim: str) -> int:
        match = SHARE.fullmatch(dim)
        if not match:
            raise KeyError(dim)
        return len(shared(self["T"], int(match[1]), int(match[2])))


@dataclass(frozen=True)
class Chunk:
    """One sequence's share of a step: `tokens` at positions start, start + 1, ..., its K/V in `blocks` (all of them, in
    order, those of earlier steps included). `rows` are the offsets into `tokens` whose logits are wanted, `sampling`
    how each of them is drawn: one for all, or one a row."""

    tokens: Sequence[int]
    start: int
    blocks: Sequence[int]
    rows: Sequence[int] = ()
    sampling: Sampling | Sequence[Sampling] = GREEDY


@dataclass(frozen=True, eq=False)
class Batch:
    """Arrays of one step: T token rows, S sequences, R rows to sample. They are parts of one, `numbers`, int32: tokens,
    positions, slots, first_row, q_len, context_len, rows, block_table. A device may take it whole."""

    numbers: np.ndarray
    counts: tuple[int, int, int, int]  # T, S, R and the columns of block_table
    block_size: int
    sampling: tuple[Sampling, ...] = ()  # one a row

    @cached_property
    def tokens(self) -> np.ndarray:
        """int32 [T]."""
        return self._per_token(0)

    @cached_property
    def positions(self) -> np.ndarray:
        """int32 [T]."""
        return self._per_token(1)

    @cached_property
    def slots(self) -> np.ndarray:
        """int32 [T]: block * block_size + offset, where the token's K/V goes."""
        return self._per_token(2)

    @cached_property
    def first_row(self) -> np.ndarray:
        """int32 [S]: the sequence's first token row."""
        return self._per_sequence(0)

    @cached_property
    def q_len(self) -> np.ndarray:
        """int32 [S]: its token rows in this step."""
        return self._per_sequence(1)

    @cached_property
    def context_len(self) -> np.ndarray:
        """int32 [S]: its tokens up to and including this step."""
        return self._per_sequence(2)

    @cached_property
    def rows(self) -> np.ndarray:
        """int32 [R]: token rows whose logits are wanted."""
        t, s, r, _ = self.counts
        return self.numbers[3 * (t + s) : 3 * (t + s) + r]

    @cached_property
    def block_table(self) -> np.ndarray:
        """int32 [S, columns]: -1 beyond a sequence's blocks."""
        t, s, r, columns = self.counts
        return self.numbers[3 * (t + s) + r :].reshape(s, columns)

    @property
    def sizes(self) -> Sizes:
        """The symbolic dims bound by this batch."""
        t, s, r, _ = self.counts
        return Sizes(T=t, S=s, R=r)

    def _per_token(self, i: int) -> np.ndarray:
        t = self.counts[0]
        return self.numbers[i * t : (i + 1) * t]

    def _per_sequence(self, i: int) -> np.ndarray:
        t, s, _, _ = self.counts
        return self.numbers[3 * t + i * s : 3 * t + (i + 1) * s]


def bind(chunks: Sequence[Chunk], block_size: int) -> Batch:
    """Lay the chunks out as one Batch. Raises BatchError for an empty chunk, too few blocks, a row out of range, or two
    tokens whose K/V would go to one slot."""
    if not chunks:
        raise BatchError("a batch needs at least one chunk")
    tokens, positions, slots, rows = list[int](), list[int](), list[int](), list[int]()
    first_row, q_len, context_len, table = list[int](), list[int](), list[int](), list[int]()
    sampling = list[Sampling]()
    width = max(len(c.blocks) for c in chunks)
    for i, c in enumerate(chunks):
        _check(i, c, block_size)
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
    if len(set(slots)) < len(slots):
        raise BatchError(_twice(slots, first_row, block_size))
    numbers = [*tokens, *positions, *slots, *first_row, *q_len, *context_len, *rows, *table]
    counts = len(tokens), len(chunks), len(rows), width
    return Batch(np.array(numbers, np.int32), counts, block_size, tuple(sampling))


def _twice(slots: list[int], first_row: list[int], block_size: int) -> str:
    """Which slot two tokens share, in words."""
    seen: dict[int, int] = {}
    for at, slot in enumerate(slots):
        if slot in seen:
            a, b = (bisect_right(first_row, row) - 1 for row in (seen[slot], at))
            return (
                f"chunks {a} and {b} both write slot {slot % block_size} of block {slot // block_size}; "
                "give each sequence blocks of its own for the tokens it computes"
            )
        seen[slot] = at
    raise AssertionError("no slot is there twice")


def _check(i: int, c: Chunk, block_size: int) -> None:
    n = len(c.tokens)
    if n == 0:
        raise BatchError(f"chunk {i} has no tokens")
    if c.start < 0 or (c.start + n) > len(c.blocks) * block_size:
        raise BatchError(
            f"chunk {i}: positions {c.start}..{c.start + n - 1} do not fit its {len(c.blocks)} blocks of {block_size}"
        )
    for row in c.rows:
        if not 0 <= row < n:
            raise BatchError(f"chunk {i}: wanted row {row} is outside its {n} tokens")
    if not isinstance(c.sampling, Sampling) and len(c.sampling) != len(c.rows):
        raise BatchError(f"chunk {i}: {len(c.sampling)} ways to draw {len(c.rows)} rows")
