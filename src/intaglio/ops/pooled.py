"""Ops of compressed attention (DeepSeek-V4): pool_keys pools runs of tokens into entries, which attend_pooled reads.

An entry is a key that is its own value, pooled from a run of `every` tokens. Its cache [P, B/every, 1, head_dim] has
pages for the same blocks as other K/V caches, with fewer rows: entry w is in the block of the last token of its run,
position (w + 1) * every - 1, in row (position in the block) // every. The rows from which entries are pooled are
cached too, but a query reads only the last run or two of them. So a sequence has no state beside its K/V blocks, and an
entry of a rejected draft is written again when the right token comes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from intaglio.batch import Batch
from intaglio.formats import Quantised
from intaglio.ops.attention import check_chosen, gather_cache, token_bytes
from intaglio.ops.op import Op, Results, Tensors, Value, Work, array, operand, result

POOLED_FORMATS = ("f32", "bf16")


def pooled_head(op: Op, t: Tensors, name: str, every: int, heads: int = 1) -> int:
    """Returns head_dim of a cache of shape [P, B/every, heads, head_dim], with P pages of B/every rows.

    A row belongs to a run of `every` tokens, or to one token if `every` is 1. Raises OpError for another shape or
    format.

    Args:
        op: the op that uses the cache, for the error.
        t: the Program's tensors by name.
        name: name of the cache.
        every: tokens in a run.
        heads: number of heads that the cache must have.
    """
    s, dim = t[name], "B" if every == 1 else f"B/{every}"
    fixed = len(s.shape) == 4 and all(isinstance(d, int) for d in s.shape[2:])
    fits = fixed and s.shape[:2] == ("P", dim) and s.shape[2] == heads and s.format in POOLED_FORMATS
    op.check(fits, f"{name} is {s.type}; wanted [P, {dim}, {heads}, head_dim] in {' or '.join(POOLED_FORMATS)}")
    return int(s.shape[3])


def gather_entries(cache: Value, blocks: np.ndarray, block_size: int, every: int, count: int) -> np.ndarray:
    """Returns the first `count` entries of a sequence in order, as float64 [count, head_dim].

    An entry is a key that was pooled from a run of `every` consecutive tokens.

    Args:
        cache: the cache of entries, [P, entries in a page, 1, head_dim].
        blocks: the sequence's block table: the numbers of its pages in the cache.
        block_size: tokens in a block.
        every: tokens in a run.
        count: number of entries.
    """
    rows = cache.rows(blocks) if isinstance(cache, Quantised) else cache[blocks]
    last = (np.arange(count) + 1) * every - 1
    return rows[last // block_size, last % block_size // every, 0].astype(np.float64)


def pool(value: np.ndarray, gate: np.ndarray) -> np.ndarray:
    """Returns the sum of the rows of `value`, weighted by the softmax of `gate` over the rows: an array [n].

    value, gate: arrays [rows, n]. Each column has weights of its own.
    """
    p = np.exp(gate - gate.max(axis=0))
    return np.asarray((p / p.sum(axis=0) * value).sum(axis=0))


@dataclass(frozen=True, kw_only=True)
class PoolKeys(Op, kind="pool_keys"):
    """Op that pools each complete run of `every` tokens into one cache entry.

    The entry is written to the cache `entries`. A token of the step completes a run if its position p satisfies (p + 1)
    % every == 0. For each such token and each column, the entry is computed in three steps (DeepSeek-V4, 2026, section
    2.3):

    1. entry = the sum over the run's tokens j of value[j] times the softmax over j of (gate[j] + bias[j]);
    2. entry = entry / sqrt(mean(entry^2) + eps) * weight;
    3. rope of style interleaved rotates the last columns by the position of the run's first token.

    value_cache and gate_cache are [P, B, s, head_dim], P pages of B tokens, as kv_write stores them; s is 1, or 2 with
    `overlap`. entries is [P, B/every, 1, head_dim]; bias [every, s * head_dim]; weight [head_dim]; frequencies [rotated
    columns / 2], a const.

    Attributes:
        every: tokens in a run.
        overlap: True if the previous run is pooled together with the run. Tokens of the previous run use the first head
            of values and gates and the first half of the biases; tokens of the run itself use the second head and half.
            A sequence's first run has no previous run.
        eps: added to the mean of squares.
        factor: scales cos and sin of rope.
    """

    two_tables: ClassVar[bool] = True
    value_cache: str = operand("pages")
    gate_cache: str = operand("pages")
    bias: str = operand("vector")
    weight: str = operand("vector")
    frequencies: str = operand("vector")
    entries: str = operand("pages", access="write")
    every: int
    overlap: bool = False
    eps: float = 1e-6
    factor: float = 1.0

    def shapes(self, t: Tensors) -> Results:
        self.check(self.every >= 2, f"every={self.every}; wanted 2 or more tokens in a run")
        head_dim = pooled_head(self, t, self.value_cache, 1, 1 + self.overlap)
        values, gates = t[self.value_cache], t[self.gate_cache]
        self.check(gates.type == values.type, f"{self.gate_cache} is {gates.type} but {self.value_cache} {values.type}")
        width = pooled_head(self, t, self.entries, self.every)
        self.check(width == head_dim, f"{self.entries} has heads of {width} but {self.value_cache} of {head_dim}")
        wanted = (self.every, (1 + self.overlap) * head_dim)
        self.check(t[self.bias].shape == wanted, f"{self.bias} is {t[self.bias].type}; wanted {list(wanted)}")
        self.vector(t, self.weight, head_dim)
        pairs = t[self.frequencies].shape[0]
        fits = isinstance(pairs, int) and 2 * pairs <= head_dim
        self.check(fits, f"{self.frequencies} has {pairs} frequencies; heads of {head_dim} have room for half as many")
        return {}

    def reference(self, v: Mapping[str, Value], batch: Batch) -> dict[str, np.ndarray]:
        entries, table = v[self.entries], batch.of_windows.block_table
        assert isinstance(entries, np.ndarray), "a cache of entries is a plain array"
        n, size = 1 + self.overlap, batch.block_size
        bias = array(v, self.bias).astype(np.float64).reshape(self.every, n, -1)
        weight, frequencies = array(v, self.weight).astype(np.float64), array(v, self.frequencies)
        for s, t in closers(batch, self.every):
            at = int(batch.positions[t])
            taken = np.arange(max(0, at + 1 - n * self.every), at + 1)
            half = np.where(taken > at - self.every, n - 1, 0)
            where = table[s, taken // size], taken % size, half
            value = np.asarray(v[self.value_cache])[where].astype(np.float64)
            gate = np.asarray(v[self.gate_cache])[where].astype(np.float64)
            gate += bias[taken % self.every, half]
            y = pool(value, gate)
            y = y / np.sqrt(np.square(y).mean() + self.eps) * weight
            angle = (np.float32(at + 1 - self.every) * frequencies).astype(np.float64)
            cos, sin = np.cos(angle) * self.factor, np.sin(angle) * self.factor
            turned = y[len(y) - 2 * len(angle) :]
            a, b = turned[0::2].copy(), turned[1::2].copy()
            turned[0::2], turned[1::2] = a * cos - b * sin, b * cos + a * sin
            entries[batch.slots[t] // size, at % size // self.every, 0] = y.astype(entries.dtype)
        return {}

    def work(self, t: Tensors, batch: Batch) -> Work:
        runs = len(closers(batch, self.every))
        tokens, head_dim = (1 + self.overlap) * self.every * runs, int(t[self.entries].shape[3])
        moved = self.moved(t, batch, (6 * tokens + 7 * runs) * head_dim)
        return moved + Work(state_bytes=(2 * tokens + runs) * token_bytes(t[self.entries]))  # values, gates; entries

    def reach(self, cache: str) -> int:
        return (1 + self.overlap) * self.every if cache in (self.value_cache, self.gate_cache) else 0


def closers(batch: Batch, every: int) -> list[tuple[int, int]]:
    """Returns a list with a pair (sequence, row) for each token that ends a run of `every` tokens.

    The pairs are in the order of the tokens.

    sequence: index of the token's sequence in the batch. row: index of the token in the step.
    """
    rows = np.flatnonzero((batch.positions + 1) % every == 0)
    sequences = np.searchsorted(batch.first_row, rows, side="right") - 1
    return list(zip(sequences.tolist(), rows.tolist(), strict=True))


@dataclass(frozen=True, kw_only=True)
class AttendPooled(Op, kind="attend_pooled"):
    """Op for attention over a window of keys and over pooled entries at once. The keys are the values, too.

    For each head of a token at position p: out = softmax(q k^T * scale) k. The rows of k are the keys at positions
    max(0, p - window + 1) .. p and the entries 0 .. (p + 1) // every - 1. An entry is pooled from a run of `every`
    tokens, and these entries are those whose run ends at p or before. This is the attention of DeepSeek-V4 (2026,
    section 2.3).

    For T tokens, q and out are f32 [T, heads * head_dim]. cache is [P, B, 1, head_dim], P pages of B tokens. entries is
    [P, B/every, 1, head_dim], as the op pool_keys writes it. Scores and sums are in float32 or wider.

    Attributes:
        sinks: [heads], scores of an extra key that every query sees and whose value is zero.
        chosen: i32 [T, n], the entries that each token attends to, as the op choose_keys writes them: ascending, with
            -1 in front to fill a row. None: all.
    """

    two_tables: ClassVar[bool] = True
    q: str = operand()
    cache: str = operand("pages")
    entries: str = operand("pages")
    sinks: str | None = operand("vector", optional=True)
    chosen: str | None = operand("index", optional=True)
    out: str = result()
    heads: int
    scale: float
    window: int
    every: int

    def shapes(self, t: Tensors) -> Results:
        width = self.token_columns(t, self.q)
        self.check(self.window >= 1, f"window={self.window}; wanted 1 or more")
        self.check(self.every >= 2, f"every={self.every}; wanted 2 or more tokens in a run")
        head_dim = pooled_head(self, t, self.cache, 1)
        other = pooled_head(self, t, self.entries, self.every)
        self.check(other == head_dim, f"{self.entries} has heads of {other} but {self.cache} of {head_dim}")
        same = t[self.entries].format == t[self.cache].format
        self.check(same, f"{self.entries} is {t[self.entries].format} but {self.cache} is {t[self.cache].format}")
        fits = width == self.heads * head_dim
        self.check(fits, f"{self.q} is {t[self.q].type}; wanted {self.heads} heads of {head_dim}")
        self.vector(t, self.sinks, self.heads)
        check_chosen(self, t, self.chosen, "entries")
        return {self.out: (("T", width), "f32")}

    def reference(self, v: Mapping[str, Value], batch: Batch) -> dict[str, np.ndarray]:
        q = array(v, self.q)
        out = np.zeros(q.shape, np.float32)
        near = batch.of_windows.block_table
        sinks = array(v, self.sinks).astype(np.float64)[:, None] if self.sinks is not None else None
        for s, (first, n) in enumerate(zip(batch.first_row.tolist(), batch.q_len.tolist(), strict=True)):
            context = int(batch.context_len[s])
            blocks = -(-context // batch.block_size)
            keys = gather_cache(v, self.cache, None, near[s, :blocks], context)[:, 0]
            far = gather_entries(
                v[self.entries], batch.block_table[s, :blocks], batch.block_size, self.every, context // self.every
            )
            for t in range(first, first + n):
                at = context - n + t - first
                seen = far[: (at + 1) // self.every]
                if self.chosen is not None:
                    listed = array(v, self.chosen)[t].astype(np.int64)
                    seen = far[listed[listed >= 0]]
                k = np.concatenate([keys[max(0, at - self.window + 1) : at + 1], seen])
                score = q[t].reshape(self.heads, -1).astype(np.float64) @ k.T * self.scale
                top = score.max(axis=1, keepdims=True)
                top = top if sinks is None else np.maximum(top, sinks)
                p = np.exp(score - top)
                total = p.sum(axis=1, keepdims=True) + (0 if sinks is None else np.exp(sinks - top))
                out[t] = (p / total @ k).reshape(-1)
        return {self.out: out}

    def work(self, t: Tensors, batch: Batch) -> Work:
        head_dim, most = int(t[self.cache].shape[3]), int(t[self.chosen].shape[1]) if self.chosen is not None else None
        seen = reach = 0
        for c, m in zip(batch.context_len.tolist(), batch.q_len.tolist(), strict=True):
            at = np.arange(c - m, c)
            near, far = np.minimum(at + 1, self.window), (at + 1) // self.every
            far = far if most is None else np.minimum(far, most)
            seen += int((near + far).sum())
            reach += min(c, m - 1 + self.window) + min(c // self.every, int(far.sum()))
        temp = sum(t[n].nbytes(batch.sizes) for n in (self.q, self.out, self.chosen) if n is not None)
        return Work(4 * self.heads * head_dim * seen, 0, reach * token_bytes(t[self.cache]), temp)

    def reach(self, cache: str) -> int:
        return self.window if cache == self.cache else 0
