"""What an MLP block computes, found from a Trace: a dense MLP, or experts with routing and a shared expert."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np

from intaglio.batch import Chunk, bind
from intaglio.debugging.automatic.modules import Linear, linears, norms
from intaglio.debugging.automatic.trace import Call, Trace, Unmatched, factors, same
from intaglio.ops import Route
from intaglio.ops.elementwise import FUNCTIONS, sigmoid

Facts = dict[str, Any]
ROWS = 8  # tokens by which experts are recognised
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


def dense_facts(t: Trace, own: list[Linear], x: np.ndarray, under: str) -> tuple[Facts, np.ndarray]:
    """Find what a dense MLP of a traced model computes. Returns (properties, result).

    The result is the traced output of the down projection. The properties are a dict:

    - gated: True if the MLP computes down(activation(gate(x)) * up(x)), False for down(activation(up(x))).
    - activation: name of the activation function.
    - fused: True if one linear computes gate and up.
    - swapped: True if up comes before gate in this linear; the key exists only if `fused` is True.
    - names: names of the linears that read `x`.
    - down: name of the down projection.
    - transposed: True if the weights are stored transposed.
    - bias: True if the linears have biases.
    - width: number of intermediate columns.
    - inner_norm: name of a norm before the down projection; "" without one.

    Args:
        t: the trace.
        own: linears that may belong to the MLP.
        x: the MLP's input.
        under: name of the MLP's module.

    Raises Unmatched if no linears in `own` form an MLP that the fields of Decoder can express.
    """
    readers = [n for n in own if same(n.x, x)]
    downs = [n for n in own if n.y.size == x.size and not any(n is r for r in readers)]
    if not readers or not downs:
        raise Unmatched(under, "no pair of linears that widen and narrow the residual", "up_proj and down_proj")
    for down in downs:
        normed = next((n for n in norms(t, under) if same(n.y, down.x)), None)
        inner = normed.x if normed is not None else down.x
        for f in _forms(readers, inner):
            names = tuple(_short(n, under) for n in f.pop("linears"))
            f |= {"names": names, "down": _short(down.name, under), "transposed": down.transposed}
            f |= {"bias": down.bias, "width": inner.reshape(len(x), -1).shape[1]}
            if f.pop("up_bias") != down.bias:
                raise Unmatched(down.name, "a bias on one of an MLP's linears only", "mlp_bias")
            f["inner_norm"] = _short(normed.name, under) if normed is not None else ""
            return f, down.y
    raise Unmatched(
        under, f"an activation that is none of {', '.join(ACTIVATIONS)}, with a gate or without",
        "the op map, activation(a) * b",
    )  # fmt: skip


def _short(name: str, under: str) -> str:
    return name.removeprefix(f"{under}.")


def _forms(readers: list[Linear], inner: np.ndarray) -> Iterator[Facts]:
    """Yield a dict for each way in which traced linears may compute `inner`.

    `inner` is the input of an MLP's down projection, or of the norm before it. The dict's keys are:

    - gated: True if the MLP has a gate.
    - activation: name of the activation function.
    - linears: names of the one or two linears.
    - fused: True if one linear computes gate and up.
    - swapped: True if up comes before gate in this linear; the key exists only if `fused` is True.
    - up_bias: True if the linear has a bias.

    readers: traced linears that read the MLP's input.
    """
    y = inner.reshape(len(readers[0].y), -1)
    for act in ACTIVATIONS:
        fn = FUNCTIONS[act]
        for a in readers:
            if a.y.shape == y.shape and same(fn(a.y), y, 1e-4):
                yield {"gated": False, "activation": act, "linears": (a.name,), "fused": False, "up_bias": a.bias}
            for b in readers:
                if a is not b and a.y.shape == b.y.shape == y.shape and same(fn(a.y) * b.y, y, 1e-4):
                    names = (a.name, b.name)
                    yield {"gated": True, "activation": act, "linears": names, "fused": False, "up_bias": a.bias}
            if a.y.shape[1] == 2 * y.shape[1]:
                halves = np.split(a.y, 2, axis=1)
                for swapped, (g, u) in ((False, halves), (True, halves[::-1])):
                    if same(fn(g) * u, y, 1e-4):
                        form = {"gated": True, "activation": act, "linears": (a.name,), "fused": True}
                        yield form | {"swapped": swapped, "up_bias": a.bias}


def experts_call(t: Trace, under: str) -> Call | None:
    """The traced Call of the module of experts inside the module `under`; None if there is no such module.

    A module of experts has stacks of matrices as parameters, and numbers of chosen experts among its arguments.
    """
    for call in t.below(under):
        stacks = [v for n, v in t.parameters.items() if n.rpartition(".")[0] == call.name and v.ndim == 3]
        if len(stacks) >= 2 and any(x.dtype.kind == "i" for x in call.inputs):
            return call
    return None


def mixture_facts(t: Trace, under: str, x: np.ndarray, result: np.ndarray) -> Facts:
    """Find what a mixture of experts of a traced model computes. Returns its properties as a dict.

    - experts: name of the experts' module within the mixture's module.
    - count, width, top, turned, activation, inside: properties of the routed experts, see _expert().
    - routing: list of the routings that fit the trace, one dict each, see _routing().
    - shared: dict with the properties of the shared expert; None if there is no shared expert.
    - shared_gate: name of the linear whose sigmoid multiplies the shared expert's result; "" if there is none.

    Args:
        t: the trace.
        under: name of the mixture's module.
        x: the module's input.
        result: the module's result.

    Raises Unmatched if the fields of Mixture cannot express the module.
    """
    call = experts_call(t, under)
    assert call is not None
    ids = next(a for a in call.inputs if a.dtype.kind == "i")
    weights = next((a for a in call.inputs[1:] if a.dtype.kind == "f"), None)
    if weights is None or not same(call.x, x):
        raise Unmatched(call.name, "experts that do not read the block's input with a weight each", "experts")
    f: Facts = {"experts": _short(call.name, under)} | _expert(t, call, ids, weights)
    f |= _routing(t, under, x, ids, weights, f["count"])
    return f | _shared(t, under, call, x, result)


def _expert(t: Trace, call: Call, ids: np.ndarray, weights: np.ndarray) -> Facts:
    """Find what the routed experts of a traced model compute. Returns their properties as a dict.

    - count: number of experts.
    - width: number of intermediate columns of an expert.
    - top: number of experts per token.
    - turned: True if the experts' matrices are stored transposed.
    - activation: name of the activation function of the gate.
    - inside: True if the routing weight multiplies an expert's input, False if it multiplies the result.

    Args:
        t: the trace.
        call: the call of the experts' module.
        ids: numbers of the experts chosen for each token, [tokens, top].
        weights: routing weights of these experts, [tokens, top].

    Raises Unmatched if no activation and layout of the matrices give the call's result.
    """
    own = {n.rpartition(".")[2]: v for n, v in t.parameters.items() if n.rpartition(".")[0] == call.name}
    joined, down = own.get("gate_up_proj"), own.get("down_proj")
    if joined is None or down is None:
        raise Unmatched(
            call.name, f"experts with parameters {', '.join(own)}", "experts, of gate_up_proj and down_proj"
        )
    if set(own) - {"gate_up_proj", "down_proj"}:
        raise Unmatched(call.name, f"experts with {', '.join(sorted(set(own)))}", "experts with Mixture.biases and glu")
    hidden = call.x.shape[-1]
    for turned in (False, True):
        gu, d = (joined.swapaxes(1, 2), down.swapaxes(1, 2)) if turned else (joined, down)
        if gu.shape[2] != hidden or d.shape[1] != hidden or gu.shape[1] != 2 * d.shape[2]:
            continue
        x = call.x.reshape(-1, hidden)[:ROWS].astype(np.float64)
        for act, inside in product(ACTIVATIONS, (False, True)):
            made = np.zeros(x.shape)
            for row in range(len(x)):
                for e, w in zip(ids[row], weights[row], strict=True):
                    g, u = np.split(gu[e] @ (x[row] * (w if inside else 1)), 2)
                    made[row] += d[e] @ (FUNCTIONS[act](g) * u) * (1 if inside else w)
            if same(made, call.y.reshape(-1, hidden)[:ROWS], 1e-4):
                return {
                    "count": len(gu), "width": d.shape[2], "turned": turned, "activation": act, "inside": inside,
                    "top": ids.shape[1],
                }  # fmt: skip
    raise Unmatched(call.name, "experts that are not down(activation(gate(x)) * up(x))", "experts")


def _routing(t: Trace, under: str, x: np.ndarray, ids: np.ndarray, weights: np.ndarray, count: int) -> Facts:
    """Find the routings that choose the traced experts with the traced weights. Returns {"routing": list of dicts}.

    Each dict is one routing. Its keys are router (name of the router's module), router_bias (True or False), route
    (attributes of the op Route of Intaglio), correction (name of the correction bias; "" without) and route_scale
    (factor on the weights).

    Args:
        t: the trace.
        under: name of the mixture's module.
        x: the input of the mixture.
        ids: numbers of the experts chosen for each token, [tokens, top].
        weights: routing weights of these experts, [tokens, top].
        count: number of experts.

    Raises Unmatched if no routing fits.
    """
    routers, found = {}, list[Facts]()
    for name, w in t.parameters.items():
        module, _, what = name.rpartition(".")
        if module.startswith(f"{under}.") and what == "weight" and w.shape == (count, x.shape[-1]):
            routers[module] = w
    vectors = {
        n: v for n, v in t.parameters.items()
        if n.startswith(f"{under}.") and v.size == count and v.dtype.kind == "f" and not n.endswith("weight")
    }  # fmt: skip
    for module, w in routers.items():
        bias = t.weight(module, "bias")
        for logit_bias, correction in ((None, ""), ("bias", ""), *((None, n) for n in vectors)):
            if logit_bias and bias is None:
                continue
            logits = x @ w.T + (bias if logit_bias and bias is not None else 0)
            for how in _ways(t, bool(correction)):
                if (scale := _route(logits, vectors.get(correction), how, ids, weights)) is not None:
                    found.append({
                        "router": _short(module, under), "router_bias": bool(logit_bias), "route": how,
                        "correction": _short(correction, under), "route_scale": scale,
                    })  # fmt: skip
    if found:
        return {"routing": found}
    raise Unmatched(
        under, "a choice of experts that is no top-k of softmax or sigmoid scores, with a correction bias or groups",
        "route",
    )  # fmt: skip


def _ways(t: Trace, corrected: bool) -> Iterator[Facts]:
    """Yield sets of attributes of Intaglio's op Route, as dicts, to be tried on a traced model.

    The keys are score ("softmax", "sigmoid" or "chosen") and normalise (True or False). For experts in groups the keys
    groups, kept_groups and group_best are added.

    t: the trace, whose configuration has the numbers of groups. corrected: True for routings with a correction bias.
    """
    groups, kept = int(t.config.get("n_group") or 0), int(t.config.get("topk_group") or 0)
    for grouped in (False, *([True] if groups > 1 else [])):
        for score in ("softmax", "sigmoid", *(() if corrected or grouped else ("chosen",))):
            for normalise in (False, *((True,) if score != "chosen" else ())):
                how: Facts = {"score": score, "normalise": normalise}
                if not grouped:
                    yield how
                    continue
                for best in (2, 1):
                    yield how | {"groups": groups, "kept_groups": kept, "group_best": best}


def _route(
    logits: np.ndarray, bias: np.ndarray | None, how: Facts, ids: np.ndarray, weights: np.ndarray
) -> float | None:
    """Returns the factor, a float, between the routing weights of Intaglio's op Route and the traced weights.

    The traced weights are the op's weights multiplied by this factor. Returns None if the op chooses other experts than
    the traced ones, or if no one factor holds for all weights.

    Args:
        logits: the router's logits, [tokens, experts].
        bias: the correction bias, or None.
        how: attributes of the op.
        ids: traced numbers of the chosen experts, [tokens, top].
        weights: traced routing weights of the chosen experts, [tokens, top].
    """
    op = Route(
        site="route", logits="logits", bias="bias" if bias is not None else None, weights="weights", ids="ids",
        top=ids.shape[1], **how,
    )  # fmt: skip
    values = {"logits": logits.astype(np.float32), "bias": bias.reshape(-1) if bias is not None else None}
    made = op.reference({k: v for k, v in values.items() if v is not None}, bind([Chunk([0], 0, [0], [0])], 16))
    order, mine = (np.argsort(x, axis=1) for x in (ids, made["ids"]))
    if not np.array_equal(np.take_along_axis(ids, order, 1), np.take_along_axis(made["ids"], mine, 1)):
        return None
    found = factors(np.take_along_axis(weights, order, 1), np.take_along_axis(made["weights"], mine, 1))
    return found[0] if found else None


def _shared(t: Trace, under: str, call: Call, x: np.ndarray, result: np.ndarray) -> Facts:
    """Find what the shared expert of a mixture computes. Returns a dict with two keys.

    - shared: properties of the shared expert, see dense_facts(), with the name of its module under the key "place".
      None if there is no shared expert.
    - shared_gate: name of the linear whose sigmoid multiplies the shared expert's result; "" if there is none.

    Args:
        t: the trace.
        under: name of the mixture's module.
        call: the call of the routed experts.
        x: the input of the mixture.
        result: the result of the mixture.

    Raises Unmatched if anything else is added to the result of the routed experts.
    """
    none: Facts = {"shared": None, "shared_gate": ""}
    if same(call.y, result):
        return none
    own = [n for n in linears(t, under) if not n.name.startswith(f"{call.name}.")]
    places = {n.name.rpartition(".")[0] for n in own if same(n.x, x) and n.name.rpartition(".")[0] != under}
    for place in places:
        try:
            f, y = dense_facts(t, [n for n in own if n.name.startswith(f"{place}.")], x, place)
        except Unmatched:
            continue  # a router
        f["place"] = _short(place, under)
        if same(call.y + y.reshape(call.y.shape), result.reshape(call.y.shape), 1e-4):
            return {"shared": f, "shared_gate": ""}
        for gate in (n for n in own if n.y.shape[1] == 1 and same(n.x, x)):
            if same(call.y + (y * sigmoid(gate.y)).reshape(call.y.shape), result.reshape(call.y.shape), 1e-4):
                return {"shared": f, "shared_gate": _short(gate.name, under)}
    raise Unmatched(under, "something beside the experts that is no shared expert added to them", "Mixture.shared")
