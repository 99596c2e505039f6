"""Writes the ops of a layer's MLP block: a dense MLP, a mixture of experts with a shared expert, or both."""

from __future__ import annotations

from statistics import NormalDist

from intaglio.models.decoder.description import Mixture
from intaglio.models.decoder.writer import Writer
from intaglio.ops import Experts, Map, Moment, Norm, Route


def write_dense(
    w: Writer,
    at: str,
    source: str,
    x: str,
    width: int,
    bias: bool,
    fused: str = "gate_up_proj",
    sparsity: float = 0.0,
) -> str:
    """Add the ops of a dense MLP. Returns the name of the result's tensor, [tokens, hidden].

    With a gate the MLP is down_proj(activation(gate_proj(x)) * up_proj(x)), without it
    down_proj(activation(up_proj(x))).

    Args:
        w: the Writer that adds the ops; its Decoder says whether there is a gate, and which activation.
        at: prefix of the ops' names in the Program.
        source: prefix of the modules' names in the checkpoint.
        x: name of the input tensor.
        width: inner width of the MLP.
        bias: True if the linear layers have biases.
        fused: name of the module that holds gate and up, for a checkpoint that stores the two as one (Decoder.fused).
        sparsity: fraction of the gate's values that are set to 0, see Layer.sparsity; not used without a gate.
    """
    d = w.d
    if d.gated:
        gate, up = w.parts(at, source, x, {"gate_proj": width, "up_proj": width}, fused, bias)
        inner = "a" if d.gate_scale == 1 else f"a * {d.gate_scale!r}"
        if d.glu_limit:  # a value within the limit is not rounded
            limit, low = repr(d.glu_limit), repr(-d.glu_limit)
            capped = f"{d.activation}(a - relu(a - {limit})) * (b - relu(b - {limit}) + relu({low} - b))"
            y = w.b.op(Map, at + "glu", gate, b=up, expr=capped)
        elif sparsity:
            c = _cut(w, at, gate, sparsity)
            y = w.b.op(Map, at + "glu", gate, b=up, c=c, expr=f"{d.activation}(relu({inner} - c)) * b")
        else:
            y = w.b.op(Map, at + "glu", gate, b=up, expr=f"{d.activation}({inner}) * b")
    else:
        up = w.linear(at + "up_proj", x, width, d.hidden, source + "up_proj", bias)
        xielu = d.activation == "xielu"
        y = _xielu(w, at, source, x, up) if xielu else w.b.op(Map, at + "act", up, expr=f"{d.activation}(a)")
    if "mlp.inner_norm" in d.norms:
        y = w.norm(at + "inner_norm", y, width, source + d.norms["mlp.inner_norm"])
    y = w.linear(at + "down_proj", y, d.hidden, width, source + "down_proj", bias)
    return w.scaled(at + "scale", y, d.mlp_scale)


def _cut(w: Writer, at: str, gate: str, sparsity: float) -> str:
    """Add the ops that compute a limit for each row of `gate`. Values below the limit are to be set to 0.

    Returns the name of the limits' tensor, [rows, 1]. The limit is mean + n * (standard deviation of the row), where n
    is the standard normal quantile of `sparsity` (Gaussian top-k, Gemma 3n).

    Args:
        w: the Writer that adds the ops.
        at: prefix of the ops' names in the Program.
        gate: name of the gate's tensor.
        sparsity: fraction of the values that are to be set to 0.
    """
    mean = w.b.op(Moment, at + "gate.mean", gate, of="mean")
    std = w.b.op(Moment, at + "gate.std", gate, of="std")
    return w.b.op(Map, at + "gate.cut", mean, b=std, expr=f"a + b * {NormalDist().inv_cdf(sparsity)!r}")


def _xielu(w: Writer, at: str, source: str, x: str, up: str) -> str:
    """Add the ops of the activation xIELU (Huang & Schlag 2024). Returns the name of the result's tensor.

    For u above 0 the result is p u^2 + u / 2, for u below 0 it is n (e^u - 1 - u) + u / 2. Here p = softplus(alpha_p)
    and n = 1/2 + softplus(alpha_n), where alpha_p and alpha_n are learned numbers of the layer.

    Args:
        w: the Writer that adds the ops.
        at: prefix of the ops' names in the Program.
        source: prefix of the modules' names in the checkpoint.
        x: name of a tensor with as many rows as `up`. Only its number of rows is used, to repeat alpha_p and alpha_n.
        up: name of the tensor of values u.
    """
    b, act = w.b, source + "act_fn."
    p = b.op(Map, at + "act.p", w.scalar(at + "act.alpha_p", x, act + "alpha_p"), expr="softplus(a)")
    n = b.op(Map, at + "act.n", w.scalar(at + "act.alpha_n", x, act + "alpha_n"), expr="softplus(a) + 0.5")
    above = b.op(Map, at + "act.above", up, b=p, expr="relu2(a) * b + 0.5 * a")
    below = "a + b * (exp(0.0 - relu(0.0 - c)) - 1.0 + relu(0.0 - c))"
    return b.op(Map, at + "act", above, b=n, c=up, expr=below)


def write_mixture(w: Writer, m: Mixture, i: int, x: str, routed: str = "") -> str:
    """Add the ops of a mixture of experts: router, experts and shared expert.

    Returns the name of the result's tensor, [tokens, hidden].

    Args:
        w: the Writer that adds the ops.
        m: description of the mixture.
        i: number of the layer.
        x: name of the input tensor.
        routed: name of the tensor that the router reads; "": `x`.
    """
    b, at, source = w.b, f"layers.{i}.mlp.", f"{w.d.prefix}layers.{i}.{m.block}."
    logits = w.linear(at + "router", routed or x, m.count, w.d.hidden, source + m.router, m.router_bias)
    bias = table = None
    if w.d.layers[i].hashed:
        table = b.weight(at + "route.table", (w.d.vocabulary, m.top), w.d.source(source + m.table), "i32")
    elif m.correction:
        bias = w.tensor(at + "router.correction", (m.count,), source + m.correction)
    factors = w.tensor(at + "router.factors", (m.count,), source + m.factors) if m.factors else None
    ids = at + "route.ids"
    how = {"bias": bias, "factors": factors, "table": table, "ids": ids, "top": m.top, **m.route}
    weights = b.op(Route, at + "route", logits, **how)
    width = m.latent or w.d.hidden
    inner, outer = (m.count, m.width, width), (m.count, width, m.width)
    named = [
        (n, shape, m.source(s))
        for n, shape, s in zip(("gate", "up", "down"), (inner, inner, outer), m.sources, strict=True)
        if s
    ]
    stacks = {n: w.stack(f"{at}experts.{n}", shape, source + s) for n, shape, s in named}
    *sides, down = (source + s for _, _, s in named)
    orders = {
        "order": w.orders(f"{at}experts.order", inner[::2], *sides),
        "down_order": w.orders(f"{at}experts.down_order", outer[::2], down),
    }
    biases = {
        f"{n}_bias": w.tensor(f"{at}experts.{n}_bias", shape, source + m.source(s))
        for n, shape, s in zip(("gate", "up", "down"), (inner[:2], inner[:2], outer[:2]), m.biases or (), strict=False)
    }
    how = {"activation": w.d.activation, "x_format": w.x_format(stacks["up"]), **m.glu, **biases, **orders}
    read = x
    if m.latent:
        read = w.linear(at + "latent_in", x, m.latent, w.d.hidden, source + "fc1_latent_proj", m.latent_bias)
    up, down = stacks.pop("up"), stacks.pop("down")
    y = b.op(Experts, at + "experts", read, weights, ids, up, down, **stacks, **how)
    if m.latent:
        y = w.linear(at + "latent_out", y, w.d.hidden, m.latent, source + "fc2_latent_proj", m.latent_bias)
    return _shared(w, m, i, x, y) if m.shared else y


def write_beside(w: Writer, m: Mixture, i: int, residual: str, dense: str) -> str:
    """Add the ops of a mixture of experts in a layer that also has a dense MLP (Gemma 4).

    Returns the name of the tensor with the sum of both results, [tokens, hidden]. Each result is normed before the sum.

    Args:
        w: the Writer that adds the ops.
        m: description of the mixture.
        i: number of the layer.
        residual: name of the residual, which experts and router read, each through a norm.
        dense: name of the dense MLP's result.
    """
    b, at, source = w.b, f"layers.{i}.mlp.", f"{w.d.prefix}layers.{i}.{m.block}."
    weight = w.tensor(at + "router.scale", (w.d.hidden,), source + m.router_scale)
    routed = b.op(Norm, at + "router.norm", residual, weight=weight, eps=w.d.eps)
    routed = w.scaled(at + "router.input", routed, w.d.hidden**-0.5)
    y = write_mixture(w, m, i, w.layer_norm(i, "mlp.experts_norm", residual), routed)
    y = w.layer_norm(i, "mlp.experts_post_norm", y)
    return b.op(Map, at + "join", w.layer_norm(i, "mlp.dense_post_norm", dense), b=y, expr="a + b")


def _shared(w: Writer, m: Mixture, i: int, x: str, y: str) -> str:
    """Add the ops of the shared expert, and the op that joins its result with `y`, the result of the routed experts.

    Returns the name of the joined tensor, [tokens, hidden]. It is y + shared * sigmoid(gate) if the mixture has a gate
    for the shared expert, else the expression `m.join` (usually the sum).

    Args:
        w: the Writer that adds the ops.
        m: description of the mixture.
        i: number of the layer.
        x: name of the input tensor.
        y: name of the tensor with the routed experts' result.
    """
    at, source = f"layers.{i}.mlp.shared.", f"{w.d.prefix}layers.{i}.{m.block}.{m.shared_source}."
    shared = write_dense(w, at, source, x, m.shared, bias=m.shared_bias, fused="")
    if not m.shared_gate:
        return w.b.op(Map, f"layers.{i}.mlp.join", y, b=shared, expr=m.join)
    gate = w.linear(
        f"layers.{i}.mlp.shared_gate", x, 1, w.d.hidden, f"{w.d.prefix}layers.{i}.{m.block}.{m.shared_gate}"
    )
    return w.b.op(Map, f"layers.{i}.mlp.join", y, b=shared, c=gate, expr="a + b * sigmoid(c)")
