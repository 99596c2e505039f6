"""Writes the ops of a transformer block whose weights several layers share (Zamba, Zamba2)."""

from __future__ import annotations

from intaglio.models.decoder.description import Layer, Shared
from intaglio.models.decoder.writer import Writer
from intaglio.ops import Attend, Concat, KvWrite, Map


def write_shared(w: Writer, s: Shared, i: int, layer: Layer, x: str, embedded: str) -> str:
    """Add the ops of the shared block (attention and MLP) that runs before the mixer of layer `i`.

    Returns the name of the tensor with the sum of `x` and the block's result, [tokens, hidden].

    Args:
        w: the Writer that adds the ops.
        s: description of the block.
        i: number of the layer.
        layer: description of the layer. Its attribute `shared` must be set.
        x: name of the layer's input.
        embedded: name of the tensor of token embeddings, [tokens, hidden].
    """
    assert layer.shared
    d, b, at, (owner, use) = w.d, w.b, f"layers.{i}.shared.", layer.shared
    source, held = f"{d.prefix}layers.{owner}.{s.block}.", f"layers.{owner}.shared."
    y = b.op(Concat, at + "input", x, embedded)
    y = w.norm(at + "norm", y, 2 * d.hidden, source + "input_layernorm", shared=held + "norm")
    y = _attention(w, s, i, layer, y)
    y = w.norm(at + "mlp_norm", y, d.hidden, source + "pre_ff_layernorm", shared=held + "mlp_norm")
    n, mlp = d.intermediate, source + "feed_forward."
    if s.fused:
        joint = w.linear(at + "gate_up_proj", y, 2 * n, d.hidden, mlp + "gate_up_proj", s.bias, held + "gate_up_proj")
        joint = adapted(w, at + "gate_up", joint, y, 2 * n, d.hidden, s.rank, f"{mlp}gate_up_proj_adapter_list.{use}")
        gate, up = w.views(joint, {at + "gate": n, at + "up": n})
    else:
        names = ("gate_proj", "up_proj")
        gate, up = (w.linear(at + name, y, n, d.hidden, mlp + name, s.bias, held + name) for name in names)
    y = b.op(Map, at + "glu", gate, b=up, expr=f"{d.activation}(a) * b")
    y = w.linear(at + "down_proj", y, d.hidden, n, mlp + "down_proj", s.bias, held + "down_proj")
    y = w.linear(at + "linear", y, d.hidden, d.hidden, f"{d.prefix}layers.{i}.linear")
    return b.op(Map, at + "add", x, b=y, expr="a + b")


def _attention(w: Writer, s: Shared, i: int, layer: Layer, x: str) -> str:
    """Add the ops of a shared block's attention. Returns the name of the result's tensor, [tokens, hidden].

    Args:
        w: the Writer that adds the ops.
        s: description of the block.
        i: number of the layer.
        layer: description of the layer.
        x: name of the normed input tensor, [tokens, 2 * hidden].
    """
    assert layer.shared
    d, b, at, (owner, use) = w.d, w.b, f"layers.{i}.shared.", layer.shared
    source, held = f"{d.prefix}layers.{owner}.{s.block}.self_attn.", f"layers.{owner}.shared."
    qkv: dict[str, str] = {}
    for n, heads in {"q": d.heads, "k": d.kv_heads, "v": d.kv_heads}.items():
        width = heads * d.head_dim
        y = w.linear(f"{at}{n}_proj", x, width, 2 * d.hidden, f"{source}{n}_proj", shared=f"{held}{n}_proj")
        adapters = f"{source}linear_{n}_adapter_list.{use}"
        qkv[n] = adapted(w, f"{at}{n}", y, x, width, 2 * d.hidden, s.qkv_rank, adapters)
    qkv |= {n: w.rope(f"{at}{n}_rope", qkv[n], layer.rope, d.head_dim) for n in "qk"}
    caches = [b.cache(f"{at}{n}_cache", d.kv_heads, d.head_dim, w.cache) for n in "kv"]
    scales = w.cache_scales(i, at, d.kv_heads)
    b.op(KvWrite, at + "kv_write", qkv["k"], qkv["v"], *caches, **scales)
    a = b.op(Attend, at + "attend", qkv["q"], *caches, heads=d.heads, scale=d.scale, **scales)
    return w.linear(at + "o_proj", a, d.hidden, d.heads * d.head_dim, source + "o_proj", shared=held + "o_proj")


def adapted(w: Writer, site: str, y: str, x: str, rows: int, cols: int, rank: int, source: str) -> str:
    """Add a low-rank adapter (LoRA) to the result `y` of a projection.

    Returns the name of the new tensor, [tokens, rows], which is y + x A^T B^T. If `rank` is 0, no op is added and the
    result is `y`.

    Args:
        w: the Writer that adds the ops.
        site: prefix of the ops' names in the Program.
        y: name of the projection's result, [tokens, rows].
        x: name of the projection's input, [tokens, cols].
        rows: columns of `y`; B is [rows, rank].
        cols: columns of `x`; A is [rank, cols].
        rank: rank of the adapter.
        source: name of the module that holds A and B in the checkpoint, as 0 and 1.
    """
    if not rank:
        return y
    a = w.linear(site + "_adapter_a", x, rank, cols, source + ".0")
    a = w.linear(site + "_adapter_b", a, rows, rank, source + ".1")
    return w.b.op(Map, site + "_adapted", y, b=a, expr="a + b")
