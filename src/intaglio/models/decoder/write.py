"""Writes the Program of a Decoder: embedding, layers, output head."""

from __future__ import annotations

from typing import Any

import numpy as np

from intaglio import formats
from intaglio.models.decoder.altup import correct, end_streams, predict, scaled_active, start_streams
from intaglio.models.decoder.attention import write_attention
from intaglio.models.decoder.compressed import write_compressed
from intaglio.models.decoder.description import AltUp, Hyper, Layer
from intaglio.models.decoder.differential import write_differential
from intaglio.models.decoder.hyper import collapse, enter, leave, spread
from intaglio.models.decoder.latent import write_latent
from intaglio.models.decoder.mlp import write_beside, write_dense, write_mixture
from intaglio.models.decoder.recurrent import write_mixer
from intaglio.models.decoder.shared import write_shared
from intaglio.models.decoder.writer import Writer
from intaglio.ops import Embed, Linear, Map, Norm, Sample, Select, Sinusoid
from intaglio.program import Program


def write(w: Writer) -> Program:
    """Writes the ops of the Decoder `w.d` (model description) and returns the Program.

    Raises PortError for a weight with act-order (reordered columns) where only plain columns are supported, and for a
    wrong number of scales of the K/V cache.
    """
    d, b = w.d, w.b
    for name in sorted({x.rope for x in d.layers if x.attention and (x.beside or not x.mixer or x.shared)} - {""}):
        b.const(f"{name}.frequencies", d.ropes[name].frequencies)
    x = embedded = _embedding(w)
    inputs = _per_layer(w, x) if d.per_layer else ""
    if d.hyper:
        _head(w, _hyper_streams(w, d.hyper, x))
        return b.done()
    if d.altup:
        _head(w, _streams(w, d.altup, inputs, x))
        return b.done()
    for i, layer in enumerate(d.layers):
        x = _layer(w, i, layer, x, embedded)
        if inputs:
            x = b.op(Map, f"layers.{i}.per_layer.add", x, b=_per_layer_branch(w, i, inputs, x), expr="a + b")
        if d.layer_scalar:
            scalar = w.tensor(f"layers.{i}.scalar", (1,), f"{d.prefix}layers.{i}.layer_scalar")
            x = b.op(Norm, f"layers.{i}.scaled", x, weight=scalar, norm="none", group=1)
    _head(w, b.op(Select, "select", x, "rows"))
    return b.done()


def _streams(w: Writer, altup: AltUp, inputs: str, x: str) -> str:
    """Add the ops of all layers of a model with AltUp's residual streams (Gemma 3n).

    Returns the name of the tensor that the head reads, [R, hidden], for the R tokens whose logits are wanted.

    Args:
        w: the Writer that adds the ops.
        altup: sizes of AltUp.
        inputs: name of the tensor of per-layer inputs. In each layer, the per-layer branch reads this tensor, and its
            result is added to all streams but the first.
        x: name of the tensor of embeddings.
    """
    streams = start_streams(w, altup, x)
    for i, layer in enumerate(w.d.layers):
        predicted = predict(w, altup, i, streams)
        streams = correct(w, altup, i, predicted, _layer(w, i, layer, predicted[altup.active]))
        y = _per_layer_branch(w, i, inputs, scaled_active(w, altup, i, streams))
        add = f"layers.{i}.per_layer.add"
        streams = [streams[0], *(w.b.op(Map, f"{add}{k}", s, b=y, expr="a + b") for k, s in enumerate(streams[1:], 1))]
    return end_streams(w, streams)


def _hyper_streams(w: Writer, h: Hyper, x: str) -> str:
    """Add the ops of all layers of a model whose residual streams are mixed by hyper-connections (DeepSeek-V4).

    Returns the name of the tensor that the head reads, [R, hidden], for the R tokens whose logits are wanted. h: sizes
    of the hyper-connections. x: name of the tensor of embeddings.
    """
    streams = spread(w, h, x)
    for i, layer in enumerate(w.d.layers):
        entry = enter(w, h, i, "attn", "hc_attn", streams)
        y = _attention(w, i, layer, w.layer_norm(i, "attn.norm", entry.x))
        streams = leave(w, h, f"layers.{i}.attn.add", streams, entry, y)
        entry = enter(w, h, i, "mlp", "hc_ffn", streams)
        y = _mlp(w, i, layer, w.layer_norm(i, "mlp.norm", entry.x), entry.x)
        streams = leave(w, h, f"layers.{i}.mlp.add", streams, entry, y)
    return collapse(w, h, streams)


def _per_layer(w: Writer, x: str) -> str:
    """Add the ops that compute the per-layer inputs of Gemma 3n and 4.

    Returns the name of their tensor, [tokens, layers * per_layer]. It is (a + b) / sqrt(2): a is the tokens' rows of a
    second embedding table, and b a normed projection of the embeddings `x`. Tokens beyond the end of the second table
    get its first row.

    Args:
        w: the Writer that adds the ops.
        x: name of the tensor of embeddings.
    """
    d, b, width = w.d, w.b, len(w.d.layers) * w.d.per_layer
    source, missing = d.source(d.prefix + "embed_tokens_per_layer.weight"), max(0, d.vocabulary - d.per_layer_rows)
    sources = [source, *[f"{source}|r0:1/{d.per_layer_rows}"] * missing]
    table = b.weight("per_layer.embed.weight", (d.per_layer_rows + missing, width), sources, w.format(source))
    tokens = b.op(Embed, "per_layer.embed", "tokens", table, scale=_root(w, d.per_layer, table))
    y = w.linear("per_layer.proj", x, width, d.hidden, d.prefix + "per_layer_model_projection")
    y = b.op(Map, "per_layer.scale", y, expr=f"a * {d.hidden**-0.5!r}")
    y = w.norm("per_layer.norm", y, d.per_layer, d.prefix + "per_layer_projection_norm", d.per_layer)
    return b.op(Map, "per_layer.inputs", y, b=tokens, expr=f"(a + b) * {2**-0.5!r}")


def _per_layer_branch(w: Writer, i: int, inputs: str, x: str) -> str:
    """Add the ops of the branch in layer `i` that reads per-layer inputs (Gemma 3n and 4).

    Returns the name of the branch's result, [tokens, hidden]: norm(proj(activation(gate(x)) * p)), where p is the
    layer's columns of `inputs`. The caller adds the result to the residual.

    Args:
        w: the Writer that adds the ops.
        i: number of the layer.
        inputs: name of the tensor of per-layer inputs.
        x: name of the tensor that the gate reads.
    """
    d, b, at, source, n = w.d, w.b, f"layers.{i}.per_layer.", f"{w.d.prefix}layers.{i}.", w.d.per_layer
    mine = b.view(at + "input", inputs, i * n, (i + 1) * n)
    gate = w.linear(at + "gate", x, n, d.hidden, source + "per_layer_input_gate")
    y = b.op(Map, at + "gated", gate, b=mine, expr=f"{d.activation}(a) * b")
    y = w.linear(at + "proj", y, d.hidden, n, source + "per_layer_projection")
    return w.norm(at + "norm", y, d.hidden, source + "post_per_layer_input_norm")


def _embedding(w: Writer) -> str:
    """Add the ops that embed the tokens. Returns the name of the result's tensor, [tokens, hidden].

    If the model has them, position and token-type embeddings, a norm, and a projection to `hidden` columns are added
    too.
    """
    d, b, width = w.d, w.b, w.d.embed_width or w.d.hidden
    table = w.weight("embed", "weight", (d.vocabulary, width), d.table or d.prefix + "embed_tokens")
    scale = _root(w, d.hidden, table) if d.root_scaled else d.embed_scale
    x = b.op(Embed, "embed", "tokens", table, scale=scale)
    if d.embed_norm and d.embed_norm_first:
        x = w.norm("embed.norm", x, width, d.prefix + d.embed_norm)
    if d.positions:
        rows = w.weight("embed.positions", "weight", (d.positions, width), d.prefix + "embed_positions")
        x = b.op(Map, "embed.add", x, b=b.op(Embed, "embed.positions", "positions", rows), expr="a + b")
    if d.sinusoid:
        frequencies = b.const("embed.frequencies", d.sinusoid)
        waves = b.op(Sinusoid, "embed.positions", "positions", frequencies, first=d.sinusoid_first)
        x = b.op(Map, "embed.add", x, b=waves, expr="a + b")
    if d.token_types:
        row = w.tensor("embed.type", (width,), f"{d.prefix}embed_types.weight|r0:1/{d.token_types}|v")
        x = b.op(Norm, "embed.typed", x, bias=row, norm="none")
    if d.embed_norm and not d.embed_norm_first:
        x = w.norm("embed.norm", x, width, d.prefix + d.embed_norm)
    if d.embed_width:
        x = w.linear("embed.proj", x, d.hidden, width, d.prefix + "embed_proj", d.embed_bias)
    return x


def _root(w: Writer, width: int, table: str) -> float:
    """The factor sqrt(width) by which token embeddings are multiplied.

    It is rounded to the number format of the embedding's weight, called `table`, or to float32 if that format has
    scales.
    """
    root, format = np.array(width**0.5, np.float32), w.b.tensors[table].format
    return float(root if formats.get(format).grouped else formats.round_to(root, format))


def _layer(w: Writer, i: int, layer: Layer, x: str, embedded: str = "") -> str:
    """Add the ops of one layer: attention or recurrent block, then the MLP, with norms and residual additions.

    Returns the name of the layer's result, [tokens, hidden]. Parts that the layer does not have are left out.

    Args:
        w: the Writer that adds the ops.
        i: number of the layer.
        layer: description of the layer.
        x: name of the layer's input.
        embedded: name of the tensor of token embeddings. Only layers with a shared block (Zamba) read it.
    """
    start = read = x
    if layer.attention:
        read = write_shared(w, w.d.shared, i, layer, x, embedded) if w.d.shared and layer.shared else x
        read = w.layer_norm(i, "attn.norm", read)
        y = w.layer_norm(i, "attn.post_norm", _attention(w, i, layer, read))
        x = w.add(f"layers.{i}.attn.add", read if w.d.normed_residual else x, y, layer.mix)
        if w.d.laurel:
            x = w.b.op(Map, f"layers.{i}.laurel.add", x, b=_laurel(w, i, read), expr=f"(a + b) * {2**-0.5!r}")
        x = w.layer_norm(i, "attn.add_norm", x)
    if not layer.mlp:
        return x
    if not w.d.parallel:
        read = w.layer_norm(i, "mlp.norm", x)
        x = read if w.d.normed_residual else x
    elif "mlp.norm" in w.d.norms:
        read = w.layer_norm(i, "mlp.norm", start)
    y = w.layer_norm(i, "mlp.post_norm", _mlp(w, i, layer, read, x))
    return w.layer_norm(i, "mlp.add_norm", w.add(f"layers.{i}.mlp.add", x, y, w.d.mlp_mix))


def _laurel(w: Writer, i: int, x: str) -> str:
    """Add the ops of a low-rank shortcut beside attention. Returns the name of the result's tensor.

    The result is x + norm(right(left(x))). Source: Menghani et al. 2024, "LAuReL: Learned Augmented Residual Layer".

    Args:
        w: the Writer that adds the ops.
        i: number of the layer.
        x: name of the input tensor, which attention reads too.
    """
    at, source, d = f"layers.{i}.laurel.", f"{w.d.prefix}layers.{i}.laurel.", w.d
    y = w.linear(at + "left", x, d.laurel, d.hidden, source + "linear_left")
    y = w.linear(at + "right", y, d.hidden, d.laurel, source + "linear_right")
    y = w.norm(at + "norm", y, d.hidden, source + "post_laurel_norm")
    return w.b.op(Map, at + "sum", x, b=y, expr="a + b")


def _attention(w: Writer, i: int, layer: Layer, x: str) -> str:
    """Add the ops of a layer's attention or recurrent block. Returns the name of the result's tensor, [tokens, hidden].

    If layer.beside is True, the layer has both, and the result is their weighted sum.

    Args:
        w: the Writer that adds the ops.
        i: number of the layer.
        layer: description of the layer.
        x: name of the input tensor, which is already normed.
    """
    if layer.mixer:
        y = write_mixer(w, layer.mixer, i, x)
        if not layer.beside:
            return y
        expr = f"a * {w.d.mixer_scale!r} + b * {w.d.attn_scale!r}"
        return w.b.op(Map, f"layers.{i}.attn.join", y, b=write_attention(w, i, layer, x), expr=expr)
    if w.d.compressed:
        return write_compressed(w, w.d.compressed, i, layer, x)
    if w.d.differential:
        return write_differential(w, i, layer, x)
    return write_latent(w, w.d.latent, i, layer, x) if w.d.latent else write_attention(w, i, layer, x)


def _mlp(w: Writer, i: int, layer: Layer, x: str, residual: str) -> str:
    """Add the ops of a layer's MLP. Returns the name of the result's tensor, [tokens, hidden].

    A sparse layer has a mixture of experts instead of the dense MLP. If Mixture.beside is True, the layer has both, and
    the result is the sum of both.

    Args:
        w: the Writer that adds the ops.
        i: number of the layer.
        layer: description of the layer.
        x: name of the input tensor, which is already normed.
        residual: name of the tensor to which the caller adds the result. Experts beside the dense MLP read this tensor.
    """
    d, m = w.d, w.d.mixture if layer.sparse else None
    if m and not m.beside:
        return write_mixture(w, m, i, x)
    at, source, width = f"layers.{i}.mlp.", f"{d.prefix}layers.{i}.{d.block}.", layer.width or d.intermediate
    y = write_dense(w, at, source, x, width, d.mlp_bias, sparsity=layer.sparsity)
    return write_beside(w, m, i, residual, y) if m else y


def _head(w: Writer, x: str) -> None:
    """Add the ops after the last layer: final norm, output head, softcap and sampling.

    A dense layer before the head is added too if the model has one. The outputs of the Program are named logits,
    next_tokens and logprobs.

    Args:
        w: the Writer that adds the ops.
        x: name of the last layer's result for the R tokens whose logits are wanted, [R, hidden].
    """
    d, b, width = w.d, w.b, w.d.head_dense or w.d.hidden
    if d.final_norm:
        x = w.norm("norm", x, d.hidden, d.prefix + d.final_norm)
    if d.head_dense:
        x = w.linear("head.dense", x, width, d.hidden, "head_dense", d.head_dense_bias)
        x = b.op(Map, "head.act", x, expr=f"{d.head_activation or d.activation}(a)")
        x = w.norm("head.norm", x, width, "head_norm")
    shape, source = (d.vocabulary, width), d.head_source
    matrix = "embed.weight" if d.tied else w.weight("lm_head", "weight", shape, source)
    x = x if d.tied else w.in_order("lm_head", x, width, source + ".weight")
    last: dict[str, Any] = {"out": "logits", "role": "output"}
    bias = w.weight("lm_head", "bias", (d.vocabulary,), source) if d.head_bias else None
    how: dict[str, Any] = {"bias": bias, "scale": d.logit_scale, "x_format": w.x_format(matrix)}
    y = b.op(Linear, "lm_head", x, matrix, **how, **({} if d.final_softcap else last))
    if d.final_softcap:
        b.op(Map, "softcap", y, expr=f"tanh(a / {d.final_softcap!r}) * {d.final_softcap!r}", **last)
    b.op(Sample, "sample", "logits", tokens="next_tokens", logprobs="logprobs", role="output")
