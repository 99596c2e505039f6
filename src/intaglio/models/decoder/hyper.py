"""Residual streams mixed by hyper-connections: their start from the embeddings, each block's entry and exit, their end.

The streams lie side by side in one tensor [tokens, streams * hidden]. Before a block (attention or an MLP) a weighted
sum of the streams is its input; after it the streams are mixed by a doubly stochastic matrix, and each adds the block's
result times a factor (Xie et al. 2026, "mHC: Manifold-Constrained Hyper-Connections"; here in the form of DeepSeek-V4).
All weights of a token are computed from its own streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from intaglio.models.decoder.description import Hyper
from intaglio.models.decoder.writer import Writer
from intaglio.ops import Concat, Linear, Map, MixStreams, Norm, Select, Sinkhorn


class Entry(NamedTuple):
    """Names of the tensors that enter() adds before a block (the attention or the MLP of a layer).

    Attributes:
        x: the input of the block, [tokens, hidden].
        gains: for each stream, the factor by which the block's result is multiplied before it is added, [tokens,
            streams].
        mixing: the matrix that mixes the streams, [tokens, streams * streams].
    """

    x: str
    gains: str
    mixing: str


def spread(w: Writer, h: Hyper, x: str) -> str:
    """Add the ops that make the residual streams: each starts as a copy of the embeddings `x`.

    Returns the name of the tensor of all streams, [tokens, streams * hidden]. h: sizes of the hyper-connections.
    """
    streams = x
    for k in range(1, h.streams):
        streams = w.b.op(Concat, f"hyper.start{k}", streams, x)
    return streams


def enter(w: Writer, h: Hyper, i: int, part: str, source: str, streams: str) -> Entry:
    """Add the ops that mix the residual streams into the input of a block. Returns an Entry.

    A block is the attention or the MLP of a layer. The ops also compute the factors and the matrix with which leave()
    adds the block's result to the streams. The Entry has the names of the input, the factors and the matrix.

    Args:
        w: the Writer that adds the ops.
        h: sizes of the hyper-connections.
        i: number of the layer.
        part: "attn" or "mlp".
        source: beginning of the names of the three tensors of weights in the layer of the checkpoint.
        streams: name of the tensor of all streams, [tokens, streams * hidden].
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
    """Add the op after a block (the attention or the MLP of a layer). Returns the name of the new residual streams.

    The op mixes the residual streams and adds the block's result `y` to each of them. The new streams are one tensor,
    [tokens, streams * hidden].

    site: name of the op. streams: name of the tensor of streams that enter() read. entry: the Entry that enter()
    returned. y: name of the block's result, [tokens, hidden].
    """
    return w.b.op(MixStreams, site, streams, entry.mixing, branch=y, gains=entry.gains, streams=h.streams)


def collapse(w: Writer, h: Hyper, streams: str) -> str:
    """Add the ops that sum the weighted residual streams before the head. Returns the name of the sum, [R, hidden].

    Only the R tokens whose logits are wanted are computed. streams: name of the tensor of all streams.
    """
    b, n = w.b, h.streams
    names = [f"{w.d.prefix}{h.head}_{what}" for what in ("fn", "scale", "base")]
    streams = b.op(Select, "select", streams, "rows")
    y = _weights(w, "hyper.end.", streams, n, (n,), names)
    weights = b.op(Map, "hyper.end.weights", y, expr=f"sigmoid(a) + {h.eps!r}")
    return b.op(MixStreams, "hyper.end", streams, weights, streams=n)


def _weights(w: Writer, at: str, streams: str, n: int, widths: Sequence[int], names: Sequence[str]) -> str:
    """Add the ops that compute the mixing logits of each token. Returns the name of their tensor.

    The logits are linear(norm(streams)) * scale + base, [tokens, sum(widths)].

    Args:
        w: the Writer that adds the ops.
        at: prefix of the ops' names.
        streams: name of the tensor of all streams.
        n: number of streams.
        widths: sizes of the groups of logits, in order. The logits of a group share one scale.
        names: checkpoint's names of the weight of `linear`, of the scales (one per group) and of the base.
    """
    b, total, (fn, scale, base) = w.b, sum(widths), names
    y = b.op(Norm, at + "norm", streams, eps=w.d.eps)
    matrix = w.tensor(at + "linear.weight", (total, n * w.d.hidden), fn)
    y = b.op(Linear, at + "linear", y, matrix, x_format=w.x_format(matrix))
    each = [f"{scale}|c{k}:{k + 1}/{len(widths)}" for k, width in enumerate(widths) for _ in range(width)]
    factors = w.tensor(at + "scale.weight", (total,), each)
    bias = w.tensor(at + "scale.bias", (total,), base)
    return b.op(Norm, at + "scale", y, weight=factors, bias=bias, norm="none")
