"""The attention block: projections, norms of queries and keys, rope, K/V cache, grouped-query attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from intaglio.models.decoder.description import Layer
from intaglio.models.decoder.writer import Writer
from intaglio.ops import Attend, KvWrite, Map, Norm


def write_attention(w: Writer, i: int, layer: Layer, x: str) -> str:
    """Add the ops of grouped-query attention, from the projections to o_proj.

    Returns the name of the result's tensor, [tokens, hidden].

    Args:
        w: the Writer that adds the ops.
        i: number of the layer.
        layer: description of the layer: its window, rope and heads, and the layer whose K/V cache it reads.
        x: name of the input tensor.
    """
    d, b, at, source = w.d, w.b, f"layers.{i}.attn.", f"{w.d.prefix}layers.{i}.self_attn."
    kv_heads, head_dim = layer.kv_heads or d.kv_heads, layer.head_dim or d.head_dim
    value_dim = d.value_dim or head_dim
    widths = {"q_proj": d.heads * head_dim, "k_proj": kv_heads * head_dim, "v_proj": kv_heads * value_dim}
    if layer.cache_of is not None:
        widths = {"q_proj": widths["q_proj"]}
    elif layer.values_are_keys:
        del widths["v_proj"]
    parts = w.parts(at, source, x, widths, "qkv_proj", d.qkv_bias)
    v = parts[-1]  # not of this layer, if it reads another one's cache
    if d.clip_qkv:
        v = b.op(Map, at + "v_clip", v, expr=clip(d.clip_qkv)) if layer.cache_of is None else v
        parts = [b.op(Map, f"{at}{n}_clip", y, expr=clip(d.clip_qkv)) for n, y in zip("qk", parts, strict=False)]
    qk = dict(zip("qk", parts, strict=False))
    if d.qk_norm in ("head", "flat"):
        qk = _qk_norms(w, at, source, qk, head_dim)
    qk = {n: w.rope(f"{at}{n}_rope", y, layer.rope, head_dim) for n, y in qk.items()}
    if d.qk_norm == "late" or (d.qk_norm == "unit" and layer.rope):
        qk = _qk_norms(w, at, source, qk, head_dim)
    owner = i if layer.cache_of is None else layer.cache_of
    holder = f"layers.{owner}.attn."
    k_cache = b.cache(holder + "k_cache", kv_heads, head_dim, w.cache)
    v_cache = b.cache(holder + "v_cache", kv_heads, value_dim, w.cache)
    scales = w.cache_scales(owner, holder, kv_heads)
    if owner == i:
        if d.value_norm:
            v = b.op(Norm, at + "v_norm", v, eps=d.eps, group=value_dim)
        v = w.scaled(at + "v_scale", v, d.value_scale)
        b.op(KvWrite, at + "kv_write", qk["k"], v, k_cache, v_cache, **scales)
    how: dict[str, Any] = {
        "heads": d.heads, "scale": d.scale * layer.scale, "window": layer.window, "chunk": layer.chunk,
        "softcap": d.attn_softcap,
    }  # fmt: skip
    if d.alibi:
        how["slopes"] = w.constant("alibi.slopes", d.alibi)
    if d.sinks and layer.sinks:
        how["sinks"] = w.tensor(at + "sinks", (d.heads,), source + "sinks")
    if d.temper and (d.temper_all or not layer.rope):
        how |= {"temper": d.temper, "temper_every": d.temper_every, "temper_from": d.temper_from}
    a = b.op(Attend, at + "attend", qk["q"], k_cache, v_cache, **how, **scales)
    a = gated(w, at, source, x, a, value_dim)
    if "attn.inner_norm" in d.norms:
        a = w.norm(at + "inner_norm", a, d.heads * value_dim, source + d.norms["attn.inner_norm"])
    return w.linear(at + "o_proj", a, d.hidden, d.heads * value_dim, source + "o_proj", d.o_bias or layer.o_bias)


def gated(w: Writer, at: str, source: str, x: str, a: str, value_dim: int) -> str:
    """Add the ops that multiply attention's result by a sigmoid gate. Returns the name of the gated tensor.

    If the model has no such gate, no op is added and the result is `a`.

    Args:
        w: the Writer that adds the ops; its Decoder names the gate's linear layer (attn_gate).
        at: prefix of the ops' names in the Program.
        source: prefix of the modules' names in the checkpoint.
        x: name of the tensor from which the gate is computed.
        a: name of attention's result, [tokens, heads * value_dim].
        value_dim: columns of a head's values.
    """
    d = w.d
    if not d.attn_gate:
        return a
    width = d.heads if d.attn_gate_by_head else d.heads * value_dim
    gate = w.linear(at + "gate", x, width, d.hidden, source + d.attn_gate)
    return w.b.op(Map, at + "gated", a, b=gate, expr="a * sigmoid(b)")


def clip(limit: float) -> str:
    """An expression that clips `a` to the range -limit to limit, as text for the op Map."""
    return f"relu(a + {limit!r}) - relu(a - {limit!r}) - {limit!r}"


def _qk_norms(w: Writer, at: str, source: str, qk: Mapping[str, str], head_dim: int) -> dict[str, str]:
    """Add the norms of queries and keys. Returns {"q": name of the normed queries, "k": name of the normed keys}.

    Args:
        w: the Writer that adds the ops; its Decoder says which norms they are (qk_norm).
        at: prefix of the ops' names in the Program.
        source: prefix of the modules' names in the checkpoint.
        qk: {"q": name of the queries, "k": name of the keys}, without "k" in a layer that reads another layer's K/V
            cache. The result then has no "k" either.
        head_dim: columns of a head.
    """
    d = w.d
    if d.qk_norm == "unit":
        how: dict[str, Any] = {"eps": d.eps, "group": head_dim}
        return {n: w.b.op(Norm, f"{at}{n}_norm", y, **how) for n, y in qk.items()}
    group = 0 if d.qk_norm == "flat" else head_dim
    flat = {"q": d.heads * d.head_dim, "k": d.kv_heads * d.head_dim}
    return {n: w.norm(f"{at}{n}_norm", y, group or flat[n], f"{source}{n}_norm", group) for n, y in qk.items()}
