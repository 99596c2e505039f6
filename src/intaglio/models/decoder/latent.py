"""The latent attention block (DeepSeek-V2, 2024, section 2.1): one narrow latent per token is cached for all heads.

Written in the absorbed form: queries are projected into the latent space and results out of it, head by head, so that
the cache is read once for all heads, and keys and values are never materialised. Some models have an indexer beside
it, which chooses the positions whose latents are read.
"""

from __future__ import annotations

from intaglio.models.decoder.attention import gated
from intaglio.models.decoder.description import Indexer, Latent, Layer
from intaglio.models.decoder.writer import Writer
from intaglio.ops import Attend, ChooseKeys, HeadLinear, KvWrite, Norm


def write_latent(w: Writer, m: Latent, i: int, layer: Layer, x: str) -> str:
    """Add the ops of multi-head latent attention (DeepSeek-V2), from the projections to o_proj.

    Returns the name of the result's tensor, [tokens, hidden].

    Args:
        w: the Writer that adds the ops.
        m: sizes of the attention.
        i: number of the layer.
        layer: description of the layer.
        x: name of the input tensor.
    """
    d, b, at, source = w.d, w.b, f"layers.{i}.attn.", f"{w.d.prefix}layers.{i}.self_attn."
    narrow = _compressed_queries(w, m, at, source, x) if m.q_rank else ""
    q = _queries(w, m, at, source, x, narrow)
    q = w.rope(at + "q_rope", q, layer.rope, m.nope + m.rope, trailing=True)
    both = w.linear(at + "kv_a_proj", x, m.rank + m.rope, d.hidden, source + "kv_a_proj_with_mqa", d.o_bias)
    c = b.view(at + "latent", both, 0, m.rank)
    c = _norm(w, m, at + "kv_norm", c, m.rank, source + "kv_a_layernorm")
    k = b.view(at + "k_pe", both, m.rank, m.rank + m.rope)
    k = w.rope(at + "k_rope", k, layer.rope, m.rope)
    latents, ropes = b.cache(at + "latent_cache", 1, m.rank, w.cache), b.cache(at + "rope_cache", 1, m.rope, w.cache)
    scales = dict.fromkeys(names := w.cache_scales(i, at, 1), names.get("k_scale", ""))  # one cache, of keys and values
    b.op(KvWrite, at + "kv_write", c, k, latents, ropes, **scales)
    each = m.nope + m.value  # rows of a head in the up-projection: keys, then values
    up = source + "kv_b_proj.weight"
    keys = w.tensor(at + "k_up", (d.heads, m.rank, m.nope), f"{up}|h{d.heads}|r0:{m.nope}/{each}|T", plain=True)
    values = w.tensor(at + "v_up", (d.heads, m.value, m.rank), f"{up}|h{d.heads}|r{m.nope}:{each}/{each}", plain=True)
    q = b.op(HeadLinear, at + "absorb", q, keys)
    if m.indexer:
        scales["chosen"] = _shared_index(w, i) if layer.shares_index else _indexer(w, m, m.indexer, i, layer, x, narrow)
    a = b.op(Attend, at + "attend", q, latents, latents, rope_cache=ropes, heads=d.heads, scale=d.scale, **scales)
    a = b.op(HeadLinear, at + "v_proj", a, values)
    a = gated(w, at, source, x, a, m.value)
    return w.linear(at + "o_proj", a, d.hidden, d.heads * m.value, source + "o_proj", d.o_bias)


def _compressed_queries(w: Writer, m: Latent, at: str, source: str, x: str) -> str:
    """Add the ops that project the input to compressed queries and norm them.

    Returns the name of the result's tensor, [tokens, q_rank].

    Args:
        w: the Writer that adds the ops.
        m: sizes of the attention.
        at: prefix of the ops' names in the Program.
        source: prefix of the modules' names in the checkpoint.
        x: name of the input tensor.
    """
    x = w.linear(at + "q_a_proj", x, m.q_rank, w.d.hidden, source + "q_a_proj", w.d.o_bias)
    return _norm(w, m, at + "q_norm", x, m.q_rank, source + "q_a_layernorm")


def _queries(w: Writer, m: Latent, at: str, source: str, x: str, narrow: str) -> str:
    """Add the op that computes the queries. Returns the name of their tensor, [tokens, heads * (nope + rope)].

    Each head has m.nope columns that rope does not rotate, then m.rope columns that rope rotates.

    Args:
        w: the Writer that adds the ops.
        m: sizes of the attention.
        at: prefix of the ops' names in the Program.
        source: prefix of the modules' names in the checkpoint.
        x: name of the input tensor, from which queries are computed if they are not compressed.
        narrow: name of the tensor of compressed queries, from which queries are computed otherwise; "" if they are not
            compressed.
    """
    width = w.d.heads * (m.nope + m.rope)
    if not narrow:
        return w.linear(at + "q_proj", x, width, w.d.hidden, source + "q_proj")
    return w.linear(at + "q_b_proj", narrow, width, m.q_rank, source + "q_b_proj")


def _indexer(w: Writer, m: Latent, index: Indexer, i: int, layer: Layer, x: str, narrow: str) -> str:
    """Add the ops of a layer's indexer (DeepSeek-V3.2). Returns the name of the tensor of chosen positions.

    The indexer chooses the positions that each query attends to. It keeps its keys in a cache of its own.

    Args:
        w: the Writer that adds the ops.
        m: sizes of the attention.
        index: sizes of the indexer.
        i: number of the layer.
        layer: description of the layer.
        x: name of the input tensor, from which the indexer's keys and the weights of its heads are projected.
        narrow: name of the tensor of compressed queries, from which the indexer's queries are projected.
    """
    b, at, n = w.b, f"layers.{i}.attn.indexer.", index.head_dim
    source = f"{w.d.prefix}layers.{i}.self_attn.indexer."
    q = w.linear(at + "q_proj", narrow, index.heads * n, m.q_rank, source + "wq_b")
    q = w.rope(at + "q_rope", q, layer.rope, n, index.style)
    k = w.linear(at + "k_proj", x, n, w.d.hidden, source + "wk")
    weight, bias = (w.weight(at + "k_norm", what, (n,), source + "k_norm") for what in ("weight", "bias"))
    k = b.op(Norm, at + "k_norm", k, weight=weight, bias=bias, norm="layer", eps=1e-6)
    k = w.rope(at + "k_rope", k, layer.rope, n, index.style)
    cache = b.cache(at + "cache", 1, n, w.cache)
    b.op(KvWrite, at + "kv_write", k, k, cache, cache)
    weights = w.linear(at + "weights", x, index.heads, w.d.hidden, source + "weights_proj")
    scale = (n * index.heads) ** -0.5  # 1 / sqrt(n) of the products, and 1 / sqrt(heads) of the weights
    return b.op(ChooseKeys, at + "choose", q, weights, cache, heads=index.heads, top=index.top, scale=scale)


def _shared_index(w: Writer, i: int) -> str:
    """The name of the tensor of positions that layer `i` attends to, if the layer has no indexer (Layer.shares_index).

    The positions are chosen by the nearest earlier layer that has an indexer. Raises ValueError if there is none.
    """
    last = max(j for j, layer in enumerate(w.d.layers[:i]) if not layer.shares_index)
    return f"layers.{last}.attn.indexer.choose"


def _norm(w: Writer, m: Latent, site: str, x: str, width: int, source: str) -> str:
    """Add the RMS norm of a latent. Returns the name of the result's tensor, [tokens, width].

    Args:
        w: the Writer that adds the op.
        m: sizes of the attention; the epsilon of the norm is read.
        site: name of the op in the Program.
        x: name of the latent's tensor.
        width: columns of the latent.
        source: name of the norm's module in the checkpoint.
    """
    return w.b.op(Norm, site, x, weight=w.weight(site, "weight", (width,), source), eps=m.eps)
