"""The op choose_keys: the indexer of sparse attention, which chooses the positions that a query attends to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from intaglio.batch import Batch
from intaglio.ops.attention import cache_heads, gather_cache, token_bytes
from intaglio.ops.op import Op, Results, Tensors, Value, Work, array, operand, result
from intaglio.ops.pooled import gather_entries, pooled_head


@dataclass(frozen=True, kw_only=True)
class ChooseKeys(Op, kind="choose_keys"):
    """Op that chooses, for each of T tokens, the `top` positions with the highest scores.

    Only positions up to the token's own are considered. With `every` above 1 it chooses among entries, each pooled from
    a run of `every` tokens, instead of positions.

    score(position) = the sum over heads h of weights[h] * relu(scale * (q[h] . k[position])), in float32, as in the
    lightning indexer of DeepSeek-V3.2 (2025). A score that is not a number counts as -inf. Ties go to the lower
    position. A token with at most `top` positions chooses all of them.

    q is f32 [T, heads * head_dim] and weights is f32 [T, heads]. cache is [P, B, 1, head_dim], P pages of B tokens: the
    keys, which kv_write stores and all heads share. chosen is i32 [T, top], ascending; if there are fewer positions, -1
    in front fills the row.

    Attributes:
        heads: heads of q.
        top: number of positions to choose.
        scale: factor on the products of q and k, above 0.
        every: above 1, entries are chosen, not positions. The cache is [P, B/every, 1, head_dim]; the op pool_keys
            writes one entry to it for each run of `every` tokens. A token at position p chooses among the entries 0 ..
            (p + 1) // every - 1, whose runs end at p or before.
    """

    q: str = operand()
    weights: str = operand(exact=True)
    cache: str = operand("pages", keys=True)
    chosen: str = result()
    heads: int
    top: int
    scale: float = 1.0
    every: int = 1

    def shapes(self, t: Tensors) -> Results:
        width = self.token_columns(t, self.q)
        self.check(self.every >= 1, f"every={self.every}; wanted 1 or more tokens in a run")
        if self.every == 1:
            kv_heads, head_dim = cache_heads(self, t, self.cache)
            self.check(kv_heads == 1, f"{self.cache} has {kv_heads} heads; wanted 1, whose keys all heads of q read")
        else:
            head_dim = pooled_head(self, t, self.cache, self.every)
        fits = width == self.heads * head_dim
        self.check(fits, f"{self.q} is {t[self.q].type}; wanted {self.heads} heads of {head_dim}")
        columns = self.token_columns(t, self.weights)
        self.check(columns == self.heads, f"{self.weights} is {t[self.weights].type}; wanted {self.heads} columns")
        self.check(self.top >= 1 and self.scale > 0, f"top={self.top}, scale={self.scale}; wanted 1 or more, above 0")
        return {self.chosen: (("T", self.top), "i32")}

    def reference(self, v: Mapping[str, Value], batch: Batch) -> dict[str, np.ndarray]:
        q, weights = array(v, self.q).astype(np.float64), array(v, self.weights).astype(np.float64)
        q = q.reshape(len(q), self.heads, -1)
        out = np.full((len(q), self.top), -1, np.int32)
        for s in range(len(batch.first_row)):
            first, n, context = int(batch.first_row[s]), int(batch.q_len[s]), int(batch.context_len[s])
            blocks = batch.block_table[s, : -(-context // batch.block_size)]
            if self.every == 1:
                keys = gather_cache(v, self.cache, None, blocks, context)[:, 0]
            else:
                count = context // self.every
                keys = gather_entries(v[self.cache], blocks, batch.block_size, self.every, count)
            for t in range(first, first + n):
                seen = (context - n + t - first + 1) // self.every
                score = weights[t] @ np.maximum(self.scale * (q[t] @ keys[:seen].T), 0)
                score = np.where(np.isnan(score), -np.inf, score.astype(np.float32))
                best = np.sort(np.argsort(-score, kind="stable")[: self.top])
                out[t, self.top - len(best) :] = best
        return {self.chosen: out}

    def work(self, t: Tensors, batch: Batch) -> Work:
        head_dim = int(t[self.cache].shape[3])
        seen = reach = 0
        for c, m in zip(batch.context_len, batch.q_len, strict=True):
            at = (np.arange(int(c) - int(m), int(c)) + 1) // self.every
            seen += int(at[at > self.top].sum())  # a token that chooses all positions scores none
            reach += int(at[-1]) if int(at[-1]) > self.top else 0
        flops = seen * self.heads * (2 * head_dim + 3)
        return self.moved(t, batch, flops) + Work(state_bytes=reach * token_bytes(t[self.cache]))
