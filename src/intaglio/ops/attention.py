"""Attention over a paged K/V cache: kv_write stores this step's keys and values, attend reads all of a sequence's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from intaglio import formats
from intaglio.batch import Batch
from intaglio.formats import Quantised
from intaglio.ops.op import Op, Results, Tensor, Tensors, Value, Work, array, operand, result

CACHE_FORMATS = ("f32", "bf16", "int8row", "e4m3")


def cache_heads(op: Op, t: Tensors, name: str) -> tuple[int, int]:
    """Returns (number of heads, head_dim) of the K or V cache `name`, whose shape is [pages, tokens, heads, head_dim].

    Raises OpError, which names the op, if the tensor has another shape or a format that caches cannot have.

    op: the op that uses the cache. t: the Program's tensors by name.
    """
    s = t[name]
    fixed = all(isinstance(d, int) for d in s.shape[2:])
    ok = len(s.shape) == 4 and s.shape[:2] == ("P", "B") and fixed and s.format in CACHE_FORMATS
    op.check(ok, f"{name} is {s.type}; a cache is [P, B, heads, head_dim] in {' or '.join(CACHE_FORMATS)}")
    return int(s.shape[2]), int(s.shape[3])


def token_bytes(cache: Tensor) -> int:
    """Returns the number of bytes that one token takes in a K or V cache, all heads together."""
    return formats.get(cache.format).nbytes(int(cache.shape[2]), int(cache.shape[3]))


def gather_cache(v: Mapping[str, Value], name: str, scale: str | None, blocks: np.ndarray, context: int) -> np.ndarray:
    """Returns a sequence's keys or values in order of position, dequantised: float64 [context, kv heads, head_dim].

    Args:
        v: operand values by name.
        name: name of the K or V cache.
        scale: name of the operand with the scales of an e4m3 cache, or None.
        blocks: the sequence's block table: the numbers of its pages in the cache.
        context: number of positions.
    """
    cache = v[name]
    pages = cache.rows(blocks) if isinstance(cache, Quantised) else cache[blocks]
    out = pages.reshape(-1, *pages.shape[2:])[:context].astype(np.float64)
    if pages.dtype == formats.E4M3 and scale is not None:
        out *= array(v, scale).astype(np.float64)[:, None]
    return out


def check_chosen(op: Op, t: Tensors, name: str | None, what: str) -> None:
    """Raise OpError if the tensor `name` is not i32 [T, n]. Returns nothing.

    The tensor lists in row t the positions or entries that token t attends to. None is also allowed.

    Args:
        op: the op that has the operand.
        t: the Program's tensors by name.
        name: name of the operand's tensor, or None.
        what: "positions" or "entries" (compressed runs of positions), for the message.
    """
    if name is not None:
        ok = t[name].format == "i32" and len(t[name].shape) == 2 and t[name].shape[0] == "T"
        op.check(ok, f"{name} is {t[name].type}; wanted i32[T, {what}]")


def _listed(chosen: np.ndarray, context: int) -> np.ndarray:
    """Turn lists of positions into a boolean mask [queries, context], True at the listed positions.

    chosen: [queries, n], a list of positions for each query; an entry of -1 lists nothing. context: number of
    positions.
    """
    mask = np.zeros((len(chosen), context + 1), bool)
    np.put_along_axis(mask, chosen.astype(np.int64), True, axis=1)  # -1 marks the column that is cut off
    return mask[:, :context]


@dataclass(frozen=True, kw_only=True)
class KvWrite(Op, kind="kv_write"):
    """Op that stores the keys and values of the step's T tokens in the K/V cache.

    Keys k and values v are f32 [T, kv heads * head_dim]. Token t is stored in the cache slot that the batch assigns to
    the token, rounded to the cache's format. An int8row cache has one scale per token and head. In an e4m3 cache, each
    value is divided by the scale of its head and clipped to -448..448; a value that is not finite becomes NaN. To store
    only keys (for the indexer's op choose_keys), let k_cache and v_cache be the same cache, and v be k.

    Attributes:
        k_scale: [heads of k_cache], the scales of an e4m3 cache for keys; other formats do not use them. None means 1.
        v_scale: [heads of v_cache], the scales of an e4m3 cache for values. None means 1.
    """

    k: str = operand()
    v: str = operand()
    k_cache: str = operand("pages", access="write")
    v_cache: str = operand("pages", access="write")
    k_scale: str | None = operand("vector", optional=True)
    v_scale: str | None = operand("vector", optional=True)

    def shapes(self, t: Tensors) -> Results:
        same = self.k_cache != self.v_cache or (self.k, self.k_scale) == (self.v, self.v_scale)
        self.check(
            same, f"{self.k_cache} is both caches; k and v must then be the same tensor, and so must their scales"
        )
        for x, cache, scale in self._writes():
            heads, head_dim = cache_heads(self, t, cache)
            self.vector(t, scale, heads)
            width = self.token_columns(t, x)
            self.check(width == heads * head_dim, f"{x} is {t[x].type} but {cache} holds {heads} heads of {head_dim}")
        return {}

    def reference(self, v: Mapping[str, Value], batch: Batch) -> dict[str, np.ndarray]:
        for x, name, scale in self._writes():
            cache = v[name]
            held = cache.codes if isinstance(cache, Quantised) else cache
            page, at = batch.slots // held.shape[1], batch.slots % held.shape[1]
            new = array(v, x).reshape(len(batch.slots), *held.shape[2:])
            if isinstance(cache, Quantised):
                q = formats.quantise(new.reshape(-1, held.shape[3]), "int8row")
                cache.scales[page, at] = q.scales.reshape(*new.shape[:2], 1)
                new = q.codes.reshape(new.shape)
            elif held.dtype == formats.E4M3:
                new = formats.to_e4m3(new, 1 if scale is None else array(v, scale).astype(np.float32)[:, None])
            held[page, at] = new.astype(held.dtype)
        return {}

    def _writes(self) -> tuple[tuple[str, str, str | None], ...]:
        """Returns one tuple of tensor names for the keys and one for the values: (tensor, cache, scale).

        The op writes the tensor to the cache. The name of the scale may be None. If `v` equals `k` and `v_cache` equals
        `k_cache`, the result has only the first item.
        """
        keys, values = (self.k, self.k_cache, self.k_scale), (self.v, self.v_cache, self.v_scale)
        return (keys,) if keys[:2] == values[:2] else (keys, values)

    def work(self, t: Tensors, batch: Batch) -> Work:
        read = sum(t[x].nbytes(batch.sizes) for x, _, _ in self._writes())
        written = len(batch.tokens) * sum(token_bytes(t[cache]) for _, cache, _ in self._writes())
        return Work(0, 0, written, read)


@dataclass(frozen=True, kw_only=True)
class Attend(Op, kind="attend"):
    """Op for causal attention of the step's T tokens over the K/V cache of their sequences.

    For each head: out = softmax(softcap(q k^T * scale) + mask) v. q is f32 [T, heads * head_dim], out is f32 [T, heads
    * v head_dim]. The K and V caches are [P, B, kv heads, head_dim], P pages of B tokens. Query head h reads kv head h
    // (heads / kv heads). Scores and sums are in float32 or wider.

    Attributes:
        window: a query at position i sees positions max(0, i - window + 1) .. i; 0: it sees all positions up to i.
        chunk: a query at position i sees only its own chunk, from i // chunk * chunk on (Llama 4); 0: no chunks.
        softcap: c > 0 replaces a score s by c * tanh(s / c) (Gemma 2); 0: no softcap.
        rope_cache: [P, B, kv heads, r], more columns of the keys, multiplied with the last r columns of each query
            head. With k_cache = v_cache this is latent attention (DeepSeek-V2).
        sinks: [heads], scores of an extra key that every query sees and whose value is zero (gpt-oss).
        slopes: [heads], linear biases by distance (ALiBi, Press et al. 2021): slope * (key position - query position)
            is added to a score after softcap and temper.
        k_scale: [kv heads], multiplied with the codes of k_cache and rope_cache if they are e4m3; None: 1.
        v_scale: [kv heads], multiplied with the codes of v_cache if it is e4m3; None: 1.
        chosen: i32 [T, n], the positions that each token attends to, as the op choose_keys writes them: ascending, with
            -1 in front to fill a row. None: all positions that window and chunk let the token see.
        temper: scores of a query at position i are multiplied by 1 + temper * ln(1 + floor((i + temper_from) /
            temper_every)); temper_from is 1 in Llama 4 and 0 in Ministral 3.
    """

    q: str = operand()
    k_cache: str = operand("pages", keys=True)
    v_cache: str = operand("pages")
    rope_cache: str | None = operand("pages", keys=True, optional=True)
    sinks: str | None = operand("vector", optional=True)
    slopes: str | None = operand("vector", optional=True)
    k_scale: str | None = operand("vector", optional=True)
    v_scale: str | None = operand("vector", optional=True)
    chosen: str | None = operand("index", optional=True)
    out: str = result()
    heads: int
    scale: float
    window: int = 0
    chunk: int = 0
    softcap: float = 0.0
    temper: float = 0.0
    temper_every: int = 1
    temper_from: int = 1

    def shapes(self, t: Tensors) -> Results:
        width = self.token_columns(t, self.q)
        kv_heads, head_dim = cache_heads(self, t, self.k_cache)
        v_heads, v_dim = cache_heads(self, t, self.v_cache)
        if self.rope_cache is not None:
            r_heads, r_dim = cache_heads(self, t, self.rope_cache)
            self.check(r_heads == kv_heads, f"{self.rope_cache} has {r_heads} heads but {self.k_cache} has {kv_heads}")
            head_dim += r_dim
        fits = width == self.heads * head_dim
        self.check(fits, f"{self.q} is {t[self.q].type}; wanted {self.heads} heads of {head_dim}")
        self.check(v_heads == kv_heads, f"{self.v_cache} has {v_heads} heads but {self.k_cache} has {kv_heads}")
        self.check(self.heads % kv_heads == 0, f"heads={self.heads} is not a multiple of the {kv_heads} kv heads")
        self.check(self.window >= 0 and self.softcap >= 0, f"window={self.window}, softcap={self.softcap}; not below 0")
        one = self.chunk >= 0 and not (self.chunk and self.window)
        self.check(one, f"window={self.window}, chunk={self.chunk}; give one of them, not below 0")
        self.check(self.temper_every >= 1, f"temper_every={self.temper_every}; wanted 1 or more")
        self.check(self.temper_from in (0, 1), f"temper_from={self.temper_from}; wanted 0 or 1")
        check_chosen(self, t, self.chosen, "positions")
        self.vector(t, self.sinks, self.heads)
        self.vector(t, self.slopes, self.heads)
        self.vector(t, self.k_scale, kv_heads)
        self.vector(t, self.v_scale, kv_heads)
        return {self.out: (("T", self.heads * v_dim), "f32")}

    def reference(self, v: Mapping[str, Value], batch: Batch) -> dict[str, np.ndarray]:
        q = array(v, self.q)
        q = q.reshape(len(q), self.heads, -1).astype(np.float64)
        out = []
        for s in range(len(batch.first_row)):
            n, context = int(batch.q_len[s]), int(batch.context_len[s])
            blocks = batch.block_table[s, : -(-context // batch.block_size)]
            k = gather_cache(v, self.k_cache, self.k_scale, blocks, context)
            val = gather_cache(v, self.v_cache, self.v_scale, blocks, context)
            if self.rope_cache is not None:
                k = np.concatenate([k, gather_cache(v, self.rope_cache, self.k_scale, blocks, context)], axis=-1)
            k[: self.first_seen(np.array([context - n]))[0]] = 0  # hidden from all queries; blocks may be given back
            val[: self.first_seen(np.array([context - n]))[0]] = 0
            repeat = self.heads // k.shape[1]
            k, val = np.repeat(k, repeat, axis=1), np.repeat(val, repeat, axis=1)
            first, at = int(batch.first_row[s]), np.arange(context - n, context)
            score = np.einsum("qhd,khd->hqk", q[first : first + n], k) * self.scale
            if self.softcap:
                score = self.softcap * np.tanh(score / self.softcap)
            if self.temper:
                score = score * (1 + self.temper * np.log1p((at + self.temper_from) // self.temper_every))[:, None]
            if self.slopes is not None:
                slopes = array(v, self.slopes).astype(np.float64)[:, None, None]
                score = score + slopes * (np.arange(context)[None, :] - at[:, None])
            hidden = self._hidden(at, context)
            if self.chosen is not None:
                hidden |= ~_listed(array(v, self.chosen)[first : first + n], context)
            p = self._weights(np.where(hidden, -np.inf, score), v)
            out.append(np.einsum("hqk,khd->qhd", p, val).reshape(n, -1))
        return {self.out: np.concatenate(out).astype(np.float32)}

    def reach(self, cache: str) -> int:
        return self.window or self.chunk

    def first_seen(self, at: np.ndarray) -> np.ndarray:
        """Returns for each query the first position that it attends to, as an array.

        at: the position of each query. The result has the shape of `at`.
        """
        if self.chunk:
            return at // self.chunk * self.chunk
        return np.maximum(0, at - self.window + 1) if self.window else np.zeros_like(at)

    def _hidden(self, at: np.ndarray, context: int) -> np.ndarray:
        """Returns a boolean mask [queries, context]: True at positions that a query must not attend to.

        at: the position of each query. context: number of positions.
        """
        keys = np.arange(context)[None, :]
        return (keys > at[:, None]) | (keys < self.first_seen(at)[:, None])

    def _weights(self, score: np.ndarray, v: Mapping[str, Value]) -> np.ndarray:
        """Returns attention weights: the softmax of `score` over the keys, both [heads, queries, keys].

        If the op has attention sinks, exp(sink) of each head is added to the denominator.

        score: attention scores; -inf where a query must not attend. v: values of the op's operands by name.
        """
        top = score.max(axis=-1, keepdims=True)
        if self.sinks is None:
            p = np.exp(score - top)
            return p / p.sum(axis=-1, keepdims=True)
        sink = array(v, self.sinks).astype(np.float64)[:, None, None]
        top = np.maximum(top, sink)
        p = np.exp(score - top)
        return p / (p.sum(axis=-1, keepdims=True) + np.exp(sink - top))

    def work(self, t: Tensors, batch: Batch) -> Work:
        caches = {n for n in (self.k_cache, self.v_cache, self.rope_cache) if n is not None}  # latents are read once
        row = sum(token_bytes(t[n]) for n in caches)
        width = sum(int(t[n].shape[3]) for n in (self.k_cache, self.v_cache, self.rope_cache) if n is not None)
        seen = reach = 0
        for c, m in zip(batch.context_len, batch.q_len, strict=True):
            at = np.arange(int(c) - int(m), int(c))
            first = self.first_seen(at)
            each = at + 1 - first
            if self.chosen is not None:
                each = np.minimum(each, int(t[self.chosen].shape[1]))
            seen += int(each.sum())
            reach += min(int(c) - int(first[0]), int(each.sum()))  # keys that any query of the chunk sees, at most
        temp = sum(t[n].nbytes(batch.sizes) for n in (self.q, self.out, self.chosen) if n is not None)
        return Work(2 * self.heads * width * seen, 0, row * reach, temp)
