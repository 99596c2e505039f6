"""Writes the ops of compressed attention (DeepSeek-V4, 2026, section 2.3): to a window of keys and to pooled entries.

All query heads share one K/V head, whose keys are also the values. A layer attends to the keys of a window, and to
entries that are pooled from runs of tokens: to all entries, or to those that an indexer chooses by small entries of its
own. Rope has rotated the keys and so the values too, so the result is rotated back. Before the output projection, each
group of heads is projected to a few columns.
"""

from __future__ import annotations

from typing import Any

from intaglio.models.decoder.description import Compressed, Indexer, Layer
from intaglio.models.decoder.writer import Writer
from intaglio.ops import Attend, AttendPooled, ChooseKeys, HeadLinear, KvWrite, Norm, PoolKeys, Rope


def write_compressed(w: Writer, m: Compressed, i: int, layer: Layer, x: str) -> str:
    """Add the ops of DeepSeek-V4's compressed attention, from the projections to o_proj.

    Returns the name of the result's tensor, [tokens, hidden].

    Args:
        w: the Writer that adds the ops.
        m: sizes of the attention.
        i: number of the layer.
        layer: description of the layer.
        x: name of the input tensor.
    """
    d, b, at, source = w.d, w.b, f"layers.{i}.attn.", f"{w.d.prefix}layers.{i}.attn."
    n = d.head_dim
    narrow = w.linear(at + "q_a_proj", x, m.q_rank, d.hidden, source + "wq_a")
    narrow = w.norm(at + "q_a_norm", narrow, m.q_rank, source + "q_norm")
    q = w.linear(at + "q_b_proj", narrow, d.heads * n, m.q_rank, source + "wq_b")
    q = b.op(Norm, at + "q_norm", q, eps=d.eps, group=n)
    q = w.rope(at + "q_rope", q, layer.rope, n, trailing=True)
    k = w.linear(at + "kv_proj", x, n, d.hidden, source + "wkv")
    k = w.norm(at + "kv_norm", k, n, source + "norm")
    k = w.rope(at + "kv_rope", k, layer.rope, n, trailing=True)
    cache = b.cache(at + "cache", 1, n, w.cache)
    b.op(KvWrite, at + "kv_write", k, k, cache, cache)
    sinks = w.tensor(at + "sinks", (d.heads,), source + "attn_sink")
    if layer.pooled:
        entries = _pool(w, at + "compressor.", source + "compressor.", x, n, layer)
        chosen = _choose(w, m.indexer, i, layer, x, narrow, m.q_rank) if layer.indexed and m.indexer else None
        a = b.op(
            AttendPooled, at + "attend", q, cache, entries, sinks=sinks, chosen=chosen, heads=d.heads, scale=d.scale,
            window=layer.window, every=layer.pooled,
        )  # fmt: skip
    else:
        a = b.op(Attend, at + "attend", q, cache, cache, sinks=sinks, heads=d.heads, scale=d.scale, window=layer.window)
    turn = d.ropes[layer.rope]
    back = w.constant(f"{layer.rope}.backward", [-f for f in turn.frequencies])
    how: dict[str, Any] = {"head_dim": n, "style": turn.style, "factor": turn.factor, "trailing": True}
    a = b.op(Rope, at + "unrope", a, "positions", back, **how)
    groups = (m.groups, m.rank, d.heads * n // m.groups)
    a = b.op(
        HeadLinear, at + "o_a_proj", a, w.tensor(at + "o_a", groups, f"{source}wo_a.weight|h{m.groups}", plain=True)
    )
    return w.linear(at + "o_b_proj", a, d.hidden, m.groups * m.rank, source + "wo_b")


def _pool(w: Writer, at: str, source: str, x: str, head_dim: int, layer: Layer) -> str:
    """Add the ops that pool each run of consecutive tokens into one key, called an entry.

    Returns the name of the cache that holds the entries.

    Args:
        w: the Writer that adds the ops.
        at: prefix of the ops' names in the Program.
        source: prefix of the modules' names in the checkpoint.
        x: name of the input tensor.
        head_dim: columns of an entry.
        layer: description of the layer: tokens per run, whether runs overlap, and the rope table.
    """
    d, b, halves = w.d, w.b, 2 if layer.indexed else 1
    value, gate = (w.linear(at + s, x, halves * head_dim, d.hidden, source + s) for s in ("wkv", "wgate"))
    values, gates = (b.cache(at + s, halves, head_dim, w.cache) for s in ("values", "gates"))
    b.op(KvWrite, at + "kv_write", value, gate, values, gates)
    entries = b.cache(at + "entries", 1, head_dim, w.cache, layer.pooled)
    bias = w.tensor(at + "bias", (layer.pooled, halves * head_dim), source + "ape")
    weight = w.weight(at + "norm", "weight", (head_dim,), source + "norm")
    b.op(
        PoolKeys, at + "pool", values, gates, bias, weight, f"{layer.rope}.frequencies", entries, every=layer.pooled,
        overlap=layer.indexed, eps=d.eps, factor=d.ropes[layer.rope].factor,
    )  # fmt: skip
    return entries


def _choose(w: Writer, index: Indexer, i: int, layer: Layer, x: str, narrow: str, q_rank: int) -> str:
    """Add the ops of a layer's indexer, which chooses the entries that each query attends to.

    Returns the name of the tensor with the chosen entries' numbers. An entry is one key into which a run of consecutive
    tokens is pooled. To choose, the indexer pools the same runs a second time, into smaller keys, with weights of its
    own.

    Args:
        w: the Writer that adds the ops.
        index: sizes of the indexer.
        i: number of the layer.
        layer: description of the layer.
        x: name of the input tensor, from which the indexer's keys and the weights of its heads are projected.
        narrow: name of the tensor of compressed queries, from which the indexer's queries are projected.
        q_rank: columns of `narrow`.
    """
    b, at, n = w.b, f"layers.{i}.attn.indexer.", index.head_dim
    source = f"{w.d.prefix}layers.{i}.attn.indexer."
    q = w.linear(at + "q_proj", narrow, index.heads * n, q_rank, source + "wq_b")
    q = w.rope(at + "q_rope", q, layer.rope, n, trailing=True)
    entries = _pool(w, at + "compressor.", source + "compressor.", x, n, layer)
    weights = w.linear(at + "weights", x, index.heads, w.d.hidden, source + "weights_proj")
    scale = (n * index.heads) ** -0.5  # 1 / sqrt(n) of the products, and 1 / sqrt(heads) of the weights
    how = {"heads": index.heads, "top": index.top, "scale": scale, "every": layer.pooled}
    return b.op(ChooseKeys, at + "choose", q, weights, entries, **how)
