"""Several residual streams (AltUp): their start from the embeddings, prediction, correction, and end before the head.

A layer computes one stream, the active one. All streams are predicted before the layer, and corrected by what it
computed (Baykal et al. 2023, "Alternating Updates for Efficient Transformers"; here in the form of Gemma 3n).
"""

from __future__ import annotations

from intaglio.models.decoder.description import AltUp
from intaglio.models.decoder.writer import Writer
from intaglio.ops import Linear, Map, Moment, Norm, Select

LEAST_RMS = 1e-5**0.5  # of a projected stream, by which it is divided; transformers has the same bound


def start_streams(w: Writer, altup: AltUp, x: str) -> list[str]:
    """Add the ops that make the residual streams of AltUp from the embeddings `x`.

    Returns the names of the streams' tensors as a list, each tensor [tokens, hidden]. The first stream is `x` itself.
    Each other stream is a projection of `x`, scaled so that its rows have the same root mean square as those of `x`.

    Args:
        w: the Writer that adds the ops.
        altup: sizes of AltUp.
        x: name of the tensor of embeddings.
    """
    rest = [x] * (altup.streams - 1)
    return [x, *_projected(w, "altup.start", x, rest, "altup_projections")]


def end_streams(w: Writer, streams: list[str]) -> str:
    """Add the ops that average the residual streams before the head. Returns the name of the mean, [R, hidden].

    The result is the mean of the streams, for the R tokens whose logits are wanted. Before the mean, every stream but
    the first is projected and scaled so that its rows have the same root mean square as those of the first stream.

    Args:
        w: the Writer that adds the ops.
        streams: names of the streams' tensors.
    """
    b = w.b
    first, *rest = [b.op(Select, f"select{k}", x, "rows") for k, x in enumerate(streams)]
    total = first
    for k, x in enumerate(_projected(w, "altup.end", first, rest, "altup_unembed_projections"), 1):
        total = b.op(Map, f"altup.end{k}.add", total, b=x, expr="a + b")
    return w.scaled("altup.mean", total, 1 / len(streams))


def predict(w: Writer, altup: AltUp, i: int, streams: list[str]) -> list[str]:
    """Add the ops that predict, before layer `i` runs, the residual streams after the layer (AltUp).

    Returns the names of the predictions as a list, one tensor [tokens, hidden] per stream: prediction[m] = streams[m] +
    sum over n of c[m, n] * streams[n]. Small learned layers compute the coefficients c of a token from its row of the
    active stream.

    Args:
        w: the Writer that adds the ops.
        altup: sizes of AltUp.
        i: number of the layer.
        streams: names of the streams' tensors before the layer.
    """
    n, at = altup.streams, f"layers.{i}.altup.predict"
    c = _coefficients(w, altup, i, at, streams[altup.active], "prediction_coefs", n * n)
    out = list(streams)
    for m in range(n):
        for k, x in enumerate(streams):
            column = w.b.view(f"{at}.c{m}_{k}", c, m * n + k, m * n + k + 1)
            out[m] = w.b.op(Map, f"{at}.stream{m}_{k}", out[m], b=x, c=column, expr="a + b * c")
    return out


def correct(w: Writer, altup: AltUp, i: int, predicted: list[str], x: str) -> list[str]:
    """Add the ops that correct the predicted residual streams after layer `i` has run (AltUp).

    Returns the names of the corrected streams as a list, one tensor [tokens, hidden] per stream: corrected[m] =
    predicted[m] + (1 + c[m]) * (x - predicted[active]). Small learned layers compute the coefficients c of a token from
    its row of `x`.

    Args:
        w: the Writer that adds the ops.
        altup: sizes of AltUp.
        i: number of the layer.
        predicted: names of the tensors that predict() returned.
        x: name of the layer's result for the active stream.
    """
    b, at = w.b, f"layers.{i}.altup.correct"
    c = _coefficients(w, altup, i, at, x, "correction_coefs", altup.streams)
    new = b.op(Map, at + ".innovation", x, b=predicted[altup.active], expr="a - b")
    return [
        b.op(Map, f"{at}.stream{m}", y, b=new, c=b.view(f"{at}.c{m}", c, m, m + 1), expr="a + b * (c + 1.0)")
        for m, y in enumerate(predicted)
    ]


def scaled_active(w: Writer, altup: AltUp, i: int, streams: list[str]) -> str:
    """Add the op that multiplies the active stream by the layer's learned factors, one factor per column (AltUp).

    Returns the name of the product's tensor, [tokens, hidden]. If the model has no such factors, no op is added and the
    result is the name of the active stream's tensor.

    Args:
        w: the Writer that adds the op.
        altup: sizes of AltUp.
        i: number of the layer.
        streams: names of the streams' tensors after the layer.
    """
    x, at = streams[altup.active], f"layers.{i}.altup.scale"
    if not altup.scaled:
        return x
    scale = w.tensor(f"{at}.weight", (w.d.hidden,), f"{w.d.prefix}layers.{i}.altup.correct_output_scale")
    return w.b.op(Norm, at, x, weight=scale, norm="none")


def _coefficients(w: Writer, altup: AltUp, i: int, at: str, x: str, name: str, count: int) -> str:
    """Add the ops that compute `count` coefficients per row of `x`. Returns the name of their tensor, [tokens, count].

    The coefficients are linear(tanh(router(norm(x) / hidden))). All calls for one layer use the same norm and router.

    Args:
        w: the Writer that adds the ops.
        altup: sizes of AltUp.
        i: number of the layer.
        at: prefix of the ops' names.
        x: name of the input tensor.
        name: name of the module of the outer `linear` in layer `i` of the checkpoint.
        count: number of coefficients.
    """
    d, b, source = w.d, w.b, f"{w.d.prefix}layers.{i}.altup."
    norm = w.weight(f"layers.{i}.altup.norm", "weight", (d.hidden,), source + "router_norm")
    router = w.weight(f"layers.{i}.altup.router", "weight", (altup.streams, d.hidden), source + "modality_router")
    y = b.op(Norm, at + ".norm", x, weight=norm, eps=d.eps)
    y = b.op(Map, at + ".scale", y, expr=f"a * {1 / d.hidden!r}")
    y = w.in_order(at + ".router", y, d.hidden, source + "modality_router.weight")
    y = b.op(Linear, at + ".router", y, router, x_format=w.x_format(router))
    y = b.op(Map, at + ".tanh", y, expr="tanh(a)")
    coefficients = w.weight(at + ".coefs", "weight", (count, altup.streams), source + name)
    return b.op(Linear, at + ".coefs", y, coefficients, x_format=w.x_format(coefficients))


def _projected(w: Writer, at: str, like: str, streams: list[str], source: str) -> list[str]:
    """Add the ops that project each stream and scale the projection. Returns the names of the scaled tensors as a list.

    Each row of a projection is scaled to the root mean square of the same row of `like`.

    Args:
        w: the Writer that adds the ops.
        at: prefix of the ops' names.
        like: name of the tensor whose root mean square the projections get.
        streams: names of the tensors that are projected.
        source: name of the list of projections in the checkpoint.
    """
    b, d, out = w.b, w.d, list[str]()
    for k, x in enumerate(streams):
        site = f"{at}{k + 1}"
        y = w.linear(f"{site}.proj", x, d.hidden, d.hidden, f"{d.prefix}{source}.{k}")
        wanted = b.op(Moment, f"{site}.wanted", like, of="rms")
        rms = b.op(Moment, f"{site}.rms", y, of="rms")
        factor = b.op(Map, f"{site}.factor", wanted, b=rms, expr=f"a / (relu(b - {LEAST_RMS!r}) + {LEAST_RMS!r})")
        out.append(b.op(Map, f"{site}.scaled", y, b=factor, expr="a * b"))
    return out
