"""Writes the ops of differential attention (DiffLlama): the difference of two softmaxes, times the values."""

from __future__ import annotations

import math

from intaglio.models.decoder.description import Layer
from intaglio.models.decoder.writer import Writer
from intaglio.ops import Attend, KvWrite, Linear, Map, Norm
from intaglio.program.source import parts_of


def write_differential(w: Writer, i: int, layer: Layer, x: str) -> str:
    """Add the ops of differential attention (https://arxiv.org/abs/2410.05258), from the projections to o_proj.

    Returns the name of the result's tensor, [tokens, hidden].

    The heads of queries and keys form two halves. Head h of both halves has the same values: those of K/V heads h and h
    + kv_heads / 2 side by side, 2 * head_dim columns. The attention of the first half, minus lambda times the attention
    of the second half, is normed per head and projected.

    Args:
        w: the Writer that adds the ops.
        i: number of the layer. The constant part of lambda depends on it.
        layer: description of the layer; only its rope is read.
        x: name of the input tensor.
    """
    d, b, at, source = w.d, w.b, f"layers.{i}.attn.", f"{w.d.prefix}layers.{i}.self_attn."
    heads, kv, wide = d.heads // 2, d.kv_heads // 2, 2 * d.head_dim
    queries = [_rows(w, i, x, "q", n, layer.rope, heads) for n in range(2)]
    keys = [_rows(w, i, x, "k", n, layer.rope, kv) for n in range(2)]
    order = [n for head in range(kv) for n in (head, head + kv)]
    values = _projection(w, at + "v_proj", x, source + "v_proj", d.kv_heads, order)
    caches = [b.cache(f"{at}k{n}_cache", kv, d.head_dim, w.cache) for n in (1, 2)]
    held = b.cache(at + "v_cache", kv, wide, w.cache)
    b.op(KvWrite, at + "kv_write", keys[0], values, caches[0], held)
    b.op(KvWrite, at + "k2_write", keys[1], keys[1], caches[1], caches[1])
    first, second = (
        b.op(Attend, f"{at}attend{n}", q, k, held, heads=heads, scale=d.scale)
        for n, q, k in zip((1, 2), queries, caches, strict=True)
    )
    initial = 0.8 - 0.6 * math.exp(-0.3 * i)
    products = [_product(w, f"{at}lambda{n}", x, f"{source}lambda_q{n}", f"{source}lambda_k{n}") for n in (1, 2)]
    factor = b.op(Map, at + "lambda", products[0], b=products[1], expr=f"exp(a) - exp(b) + {initial!r}")
    a = b.op(Map, at + "difference", first, b=second, c=factor, expr="a - b * c")
    a = b.op(Norm, at + "inner_norm", a, eps=d.eps, group=wide)
    a = w.scaled(at + "inner_scale", a, 1 - initial)
    return w.linear(at + "o_proj", a, d.hidden, heads * wide, source + "o_proj", d.o_bias)


def _rows(w: Writer, i: int, x: str, which: str, half: int, rope: str, heads: int) -> str:
    """Add the ops that project one half of the heads of queries or keys and apply rope.

    Returns the name of the result's tensor, [tokens, heads * head_dim].

    Args:
        w: the Writer that adds the ops.
        i: number of the layer.
        x: name of the input tensor.
        which: "q" for queries, "k" for keys.
        half: 0 for the first half of the heads, 1 for the second.
        rope: name of the rope table.
        heads: number of heads in a half.
    """
    at, source = f"layers.{i}.attn.{which}{half + 1}_", f"{w.d.prefix}layers.{i}.self_attn.{which}_proj"
    y = _projection(w, at + "proj", x, source, 2 * heads, range(half * heads, (half + 1) * heads))
    return w.rope(at + "rope", y, rope, w.d.head_dim)


def _projection(w: Writer, site: str, x: str, source: str, heads: int, order: list[int] | range) -> str:
    """Add a linear layer that computes some heads of a projection, in a given order.

    Returns the name of the result's tensor, [tokens, len(order) * head_dim].

    Args:
        w: the Writer that adds the op.
        site: name of the op.
        x: name of the input tensor, [tokens, hidden].
        source: name of the projection's module in the checkpoint.
        heads: number of heads of the module.
        order: numbers of the heads that are computed, in the order of the result.
    """
    d, rows = w.d, [w.d.head_dim] * heads
    cuts, width = parts_of(f"{source}.weight", rows), len(order) * d.head_dim
    weight, bias = w.tensor(f"{site}.weight", (width, d.hidden), [cuts[n] for n in order]), None
    if d.qkv_bias:
        cuts = parts_of(f"{source}.bias", rows, "c")
        bias = w.tensor(f"{site}.bias", (width,), [cuts[n] for n in order], plain=True)
    return w.b.op(Linear, site, x, weight, bias=bias, x_format=w.x_format(weight))


def _product(w: Writer, site: str, x: str, first: str, second: str) -> str:
    """Add the ops that compute the inner product of two vectors of the checkpoint, each of head_dim values.

    Returns the name of the result's tensor, [tokens, 1]; every row has the same value.

    Args:
        w: the Writer that adds the ops.
        site: prefix of the ops' names.
        x: name of a tensor [tokens, hidden]; only its number of rows is used.
        first: name of the first vector in the checkpoint.
        second: name of the second vector.
    """
    b, n = w.b, w.d.head_dim
    zeros = b.op(Map, f"{site}.zeros", b.view(f"{site}.columns", x, 0, n), expr="a * 0.0")
    rows = b.op(Norm, f"{site}.rows", zeros, bias=w.tensor(f"{site}.first", (n,), first), norm="none")
    return b.op(Linear, site, rows, w.tensor(f"{site}.second", (1, n), second + "|h1"), x_format="f32")
