"""The Batch: what the runtime binds at each step, any mix of prefill chunks and decodes.

Built from Chunks, one a sequence. Knows nothing of programs or requests.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

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


@dataclass(frozen=True)
class Batch:
    """Arrays of one step: T token rows, S sequences, R rows to sample."""

    tokens: np.ndarray  # int32 [T]
    positions: np.ndarray  # int32 [T]
    slots: np.ndarray  # int32 [T]: block * block_size + offset, where the token's K/V goes
    first_row: np.ndarray  # int32 [S]: the sequence's first token row
    q_len: np.ndarray  # int32 [S]: its token rows in this step
    context_len: np.ndarray  # int32 [S]: its tokens up to and including this step
    block_table: np.ndarray  # int32 [S, max blocks], -1 beyond a sequence's blocks
    rows: np.ndarray  # int32 [R]: token rows whose logits are wanted
    block_size: int
    sampling: tuple[Sampling, ...] = field(default=())  # one a row

    @property
    def sizes(self) -> Sizes:
        """The symbolic dims bound by this batch."""
        return Sizes(T=len(self.tokens), S=len(self.first_row), R=len(self.rows))


def bind(chunks: Sequence[Chunk], block_size: int) -> Batch:
    """Lay the chunks out as one Batch. Raises BatchError for an empty chunk, too few blocks or a row out of range."""
    if not chunks:
        raise BatchError("a batch needs at least one chunk")
    for i, c in enumerate(chunks):
        _check(i, c, block_size)
    table = np.full((len(chunks), max(len(c.blocks) for c in chunks)), -1, np.int32)
    for i, c in enumerate(chunks):
        table[i, : len(c.blocks)] = c.blocks
    q_len = np.array([len(c.tokens) for c in chunks], np.int32)
    starts = np.array([c.start for c in chunks], np.int32)
    first_row = np.cumsum(q_len, dtype=np.int32) - q_len
    positions = np.arange(q_len.sum(), dtype=np.int32) - np.repeat(first_row - starts, q_len)
    owner = np.repeat(np.arange(len(chunks)), q_len)
    return Batch(
        tokens=np.array(list(chain.from_iterable(c.tokens for c in chunks)), np.int32),
        positions=positions,
        slots=table[owner, positions // block_size] * np.int32(block_size) + positions % block_size,
        first_row=first_row,
        q_len=q_len,
        context_len=starts + q_len,
        block_table=table,
        rows=np.array(
            [first + r for c, first in zip(chunks, first_row.tolist(), strict=True) for r in c.rows], np.int32
        ),
        block_size=block_size,
        sampling=tuple(chain.from_iterable(map(_draws, chunks))),
    )


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


def _draws(c: Chunk) -> Sequence[Sampling]:
    return [c.sampling] * len(c.rows) if isinstance(c.sampling, Sampling) else c.sampling
