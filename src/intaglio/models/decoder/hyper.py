"""Residual streams mixed by hyper-connections: their start from the embeddings, each block's entry and exit, their end.

The streams lie side by side in one tensor [T, streams * hidden]. Before a block (attention or an MLP) a weighted sum of
the streams is its input; after it the streams are mixed by a doubly stochastic matrix, and each adds the block's result
times a factor (Xie et al. 2026, "mHC: Manifold-Constrained Hyper-Connections"; here in the form of DeepSeek-V4). All
weights of a token are computed from its own streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from intaglio.models.decoder.description import Hyper
from intaglio.models.decoder.writer import Writer
from intaglio.ops import Concat, Linear, Map, MixStreams, Norm, Select, Sinkhorn


class Entry(NamedTuple):
    """Names of the tensors that enter() adds to a Program, where a block of layers reads the residual streams.

    Attributes:
        x: the block's input [T, hidden].
        gains: the factor of the block's result in each stream, [T, streams].
        mixing: the matrix that mixes the streams, [T, streams * streams].
    """

    x: str
    gains: str
    mixing: str


def spread(w: Writer, h: Hyper, x: str) -> str:
    """Add the ops that start each residual stream as a copy of the embeddings `x`. Returns the streams' tensor name."""
    streams = x
    for k in range(1, h.streams):
        streams = w.b.op(Concat, f"hyper.start{k}", streams, x)
    return streams


def enter(w: Writer, h: Hyper, i: int, part: str, source: str, streams: str) -> Entry:
    """Add the ops that mix the residual streams into the input of a block (the attention or the MLP of a layer).

    They also compute the factors with which leave() adds the block's result to the streams. Returns an Entry with the
    names of these tensors.

    Args:
        w: writes the ops.
        h: sizes of the hyper-connections.
        i: number of the layer.
        part: "attn" or "mlp".
        source: beginning of the names of the three tensors of weights in the layer of the checkpoint.
        streams: name of the streams' tensor.
    """
    b, n, at = w.b, h.streams, f"layers.{i}.{part}.hyper."
    names = [f"{w.d.prefix}layers.{i}.{source}_{what}" for what in ("fn", "scale", "base")]
    y = _weights(w, at, streams, n, (n, n, n * n), names)
    pre = b.op(Map, at + "pre", b.view(at + "pre_logits", y, 0, n), expr=f"sigmoid(a) + {h.eps!r}")
    post = b.op(Map, at + "post", b.view(at + "post_logits", y, n, 2 * n), expr="2.0 * sigmoid(a)")
    logits = b.view(at + "mixing_logits", y, 2 * n, 2 * n + n * n)
    mixing = b.op(Sinkhorn, at + "mixing", logits, iterations=h.iterations, eps=h.eps)
    return Entry(b.op(MixStreams, at + "input", streams, pre, streams=n), post, mixing)


def leave(w: Writer, h: Hyper, site: str, streams: str, entry: Entry, y: str) -> str:
    """Add the op that mixes the streams and adds a block's result `y` to each. Returns the streams' tensor name.

    site: name of the op. streams: name of the tensor that enter() read. entry: what it returned.
    """
    return w.b.op(MixStreams, site, streams, entry.mixing, branch=y, gains=entry.gains, streams=h.streams)


def collapse(w: Writer, h: Hyper, streams: str) -> str:
    """Add the ops that join the residual streams to one before the head, for the rows whose logits are wanted.

    Returns the name of the result, a tensor [R, hidden].
    """
    b, n = w.b, h.streams
    names = [f"{w.d.prefix}{h.head}_{what}" for what in ("fn", "scale", "base")]
    streams = b.op(Select, "select", streams, "rows")
    y = _weights(w, "hyper.end.", streams, n, (n,), names)
    weights = b.op(Map, "hyper.end.weights", y, expr=f"sigmoid(a) + {h.eps!r}")
    return b.op(MixStreams, "hyper.end", streams, weights, streams=n)


def _weights(w: Writer, at: str, streams: str, n: int, widths: Sequence[int], names: Sequence[str]) -> str:
    """Add the ops that compute a row of mixing logits: linear(norm(streams)) * scale + base. Returns its tensor's name.

    Args:
        w: writes the ops.
        at: prefix of the ops' names.
        streams: name of the streams' tensor.
        n: number of streams.
        widths: numbers of logits that share a scale, in order.
        names: names of the linear's weight, the scales (one for each of `widths`) and the base in the checkpoint.
    """
    b, total, (fn, scale, base) = w.b, sum(widths), names
    y = b.op(Norm, at + "norm", streams, eps=w.d.eps)
    matrix = w.tensor(at + "linear.weight", (total, n * w.d.hidden), fn)
    y = b.op(Linear, at + "linear", y, matrix, x_format=w.x_format(matrix))
    each = [f"{scale}|c{k}:{k + 1}/{len(widths)}" for k, width in enumerate(widths) for _ in range(width)]
    factors = w.tensor(at + "scale.weight", (total,), each)
    bias = w.tensor(at + "scale.bias", (total,), base)
    return b.op(Norm, at + "scale", y, weight=factors, bias=bias, norm="none")
