"""Finds out from a Trace what a model computes around its blocks: embedding, residuals, norms of layers, and head."""

from __future__ import annotations

from typing import Any

import numpy as np

from intaglio.debugging.automatic.attention import attention_facts
from intaglio.debugging.automatic.mlp import dense_facts, experts_call, mixture_facts
from intaglio.debugging.automatic.modules import Norm, linears, norms, one_family
from intaglio.debugging.automatic.trace import Call, Trace, Unmatched, factors, same

Facts = dict[str, Any]


def model_facts(t: Trace) -> Facts:
    """The properties of a traced transformers model, as a dict from which flatten() makes the fields of Decoder.

    The keys are list (name of the list of layers), embedding (name of the embedding's module), hidden (width of the
    residual), head (name of the output head's module), norm (see Norm.family), layers (a list with a dict for each
    layer, see _layer()), and the keys of the dicts from _embedding() and _head(). Raises Unmatched if the model
    computes something that no field of Decoder can express.
    """
    name = _layer_list(t)
    calls = [_called(t, f"{name}.{i}") for i in range(t.lists[name])]
    f: Facts = {"list": name, "embedding": t.embedding, "layers": [], "hidden": calls[0].x.shape[-1], "head": t.head}
    start, kinds = _embedding(t, calls[0].x, name)
    f |= start
    for i, call in enumerate(calls):
        if i and not same(call.x, calls[i - 1].y):
            raise Unmatched(call.name, "an input that is not the result of the layer before", "the residual")
        layer, found = _layer(t, call)
        f["layers"].append(layer)
        kinds += found
    head, found = _head(t, calls[-1].y, name)
    f |= head
    f["norm"] = one_family([*kinds, *found]).family if kinds or found else ("rms", 1e-6, 0.0, False, False)
    return f


def _layer_list(t: Trace) -> str:
    """The name of the model's list of decoder layers: the longest list of modules that contains attention.

    Raises Unmatched if no call of attention was traced, or if all calls are outside lists.
    """
    attended = {a.name for a in t.attention}
    lists = [n for n in t.lists if any(a.startswith(f"{n}.0.") or f"{n}.1." in a for a in attended)]
    if not t.attention:
        raise Unmatched("the model", "no call of an attention function that could be observed", "attend")
    if not lists:
        raise Unmatched(t.attention[0].name, "attention outside a list of layers", "Decoder.layers")
    return max(lists, key=lambda n: t.lists[n])


def _called(t: Trace, name: str) -> Call:
    """The traced Call of the module `name`. Raises Unmatched if the module was not called exactly once."""
    found = [c for c in t.calls if c.name == name]
    if len(found) != 1:
        raise Unmatched(name, f"a layer that is called {len(found)} times", "Decoder.layers, each called once")
    return found[0]


def _embedding(t: Trace, x: np.ndarray, layers: str) -> tuple[Facts, list[Norm]]:
    """Find what the model does to token embeddings before its first layer. Returns (properties, norms).

    The properties are a dict with the keys vocabulary (number of tokens in it), embed_scale (a factor), positions (the
    table of learned positions, see _summed()), embed_norm (name of a norm's module; "" without a norm) and
    embed_norm_first (True if positions are added after the norm). `norms` is a list with this Norm, or [].

    Args:
        t: the trace.
        x: the first layer's input.
        layers: name of the list of layers.

    Raises Unmatched if `x` is not the embeddings with at most a scale, learned positions and a norm.
    """
    table = t.weight(t.embedding)
    assert table is not None
    rows = table[np.asarray(t.tokens)]
    f: Facts = {"vocabulary": len(table), "embed_norm": "", "embed_norm_first": False}
    if rows.shape[1] != x.shape[-1]:
        raise Unmatched(t.embedding, "an embedding narrower than the residual", "embed_width")
    if (found := _summed(t, x, rows)) is not None:
        return f | found, []
    for n in norms(t, "", layers):
        if n.x.shape == x.shape and same(n.y, x) and (found := _summed(t, n.x, rows)) is not None:
            return f | found | {"embed_norm": n.name}, [n]
        if n.x.shape == x.shape and (found := _summed(t, x, n.y)) and found["embed_scale"] == 1 and same(n.x, rows):
            return f | found | {"embed_norm": n.name, "embed_norm_first": bool(found["positions"])}, [n]
    what = "something else than a scale, learned positions and a norm done to the embeddings"
    raise Unmatched(t.embedding, what, "embed, positions and embed_norm")


def _summed(t: Trace, x: np.ndarray, rows: np.ndarray) -> Facts | None:
    """Find the scale and the table of learned positions with which a model computes `x` from token embeddings.

    Returns a dict with two keys, or None if no scale and no table of the model give `x`.

    - embed_scale: factor by which the embeddings are multiplied.
    - positions: the table whose rows are added, as a dict with name, first (its row for position 0) and rows (its
      number of rows). None if no table is added.

    Args:
        t: the trace.
        x: the array that a norm or the first layer reads.
        rows: the embeddings of the tokens.
    """
    if (found := factors(x, rows)) is not None:
        return {"embed_scale": found[0], "positions": None}
    for name, p in t.parameters.items():
        if p.ndim == 2 and p.shape[1] == x.shape[-1] and name != f"{t.embedding}.weight":
            for first in range(0, min(3, len(p) - len(x) + 1)):
                if (found := factors(x, rows, p[first : first + len(x)])) is not None and found[1] == 1:
                    at = {"name": name.removesuffix(".weight"), "first": first, "rows": len(p)}
                    return {"embed_scale": found[0], "positions": at}
    return None


def _layer(t: Trace, call: Call) -> tuple[Facts, list[Norm]]:
    """Find what one layer of a traced model computes. Returns (properties, norms).

    The properties are a dict with these keys; `norms` is a list of the Norms in the layer.

    - attention: name of the attention module in the layer.
    - attn: properties of attention, see attention_facts().
    - mlp: {"dense": see dense_facts()} or {"mixture": see mixture_facts()}.
    - block: name of the MLP's module in the layer.
    - norms: {Intaglio's name of a norm, such as attn.norm: name of its module in the layer}.
    - parallel: True if the MLP reads the layer's input instead of its sum with attention's result.
    - residual_scale: factor by which results are multiplied before they are added to the residual.

    t: the trace. call: the call of the layer. Raises Unmatched for what the fields of Decoder cannot express.
    """
    here = [a for a in t.attention if a.name.startswith(f"{call.name}.")]
    if len(here) != 1:
        what = "no attention" if not here else f"{len(here)} calls of attention"
        raise Unmatched(call.name, f"{what} (recurrent blocks and others)", "Layer.mixer")
    block = _called(t, here[0].name)
    x, a = _hidden(block, call.x), block.y
    own = [n for n in norms(t, call.name) if not n.name.startswith(f"{block.name}.") and n.x.shape == call.x.shape]
    f: Facts = {"attention": block.name.removeprefix(f"{call.name}.")}
    f["attn"], inner = attention_facts(t, here[0], x, a)
    mlp, place, read, m = _mlp(t, call, block.name)
    f |= {"mlp": mlp, "block": place}
    n: dict[str, Norm] = {}
    _before(n, "attn.norm", own, x, call)
    if (post := next((z for z in own if same(z.x, a)), None)) is not None:
        n["attn.post_norm"] = post
    if (post := next((z for z in own if same(z.x, m) and z.name != n.get("attn.post_norm", z).name), None)) is not None:
        n["mlp.post_norm"] = post
    branch = n["attn.post_norm"].y if "attn.post_norm" in n else a
    end = n["mlp.post_norm"].y if "mlp.post_norm" in n else m
    f |= _residuals(call, n, own, read, branch, end)
    f["norms"] = {site: z.name.removeprefix(f"{call.name}.") for site, z in n.items()}
    extra = [z for z in norms(t, call.name) if z.name == _full(call, f["attn"]["inner_norm"], block.name)]
    return f, [*n.values(), *[z for z in inner if z.weight], *extra]


def _full(call: Call, name: str, under: str) -> str:
    return f"{under}.{name}" if name else ""


def _hidden(block: Call, like: np.ndarray) -> np.ndarray:
    """The input array of the call `block`: its first floating-point argument with the shape of `like`.

    like: the residual. Raises Unmatched if there is no such argument.
    """
    found = [x for x in block.inputs if x.shape == like.shape and x.dtype.kind == "f"]
    if not found:
        raise Unmatched(block.name, "no argument of the residual's shape", "attention of hidden_size columns")
    return found[0]


def _before(n: dict[str, Norm], site: str, own: list[Norm], x: np.ndarray, call: Call) -> None:
    """Find the norm before attention and add it to `n` under the name `site`. Returns nothing.

    If attention reads the residual without a norm, nothing is added.

    Args:
        n: {name: norm of the layer}; changed in place.
        site: the name, such as attn.norm.
        own: norms called in the layer.
        x: the input of attention.
        call: the call of the layer.

    Raises Unmatched if `x` is neither the residual nor a norm of it.
    """
    if same(x, call.x):
        return
    found = next((z for z in own if same(z.y, x)), None)
    if found is None or not same(found.x, call.x):
        raise Unmatched(call.name, "an input of attention that is neither the residual nor a norm of it", "attn.norm")
    n[site] = found


def _mlp(t: Trace, call: Call, attention: str) -> tuple[Facts, str, np.ndarray, np.ndarray]:
    """Find what a layer's MLP or mixture of experts computes. Returns (properties, name, argument, result).

    - properties: {"dense": see dense_facts()} or {"mixture": see mixture_facts()}.
    - name: name of its module in the layer; "" if its linears are directly in the layer.
    - argument: the array that the MLP reads.
    - result: the array that the MLP computes.

    Args:
        t: the trace.
        call: the call of the layer.
        attention: name of the attention module, whose linears are left out.

    Raises Unmatched for what the fields of Decoder cannot express.
    """
    inside = f"{attention}."
    own = [z for z in linears(t, call.name) if not z.name.startswith(inside)]
    experts = experts_call(t, call.name)
    if experts is not None:
        place = experts.name.rpartition(".")[0]
        if place == call.name:
            raise Unmatched(experts.name, "experts directly in a layer", "Mixture.block")
        block = _called(t, place)
        read = _hidden(block, call.x)
        return {"mixture": mixture_facts(t, place, read, block.y)}, place.removeprefix(f"{call.name}."), read, block.y
    wide = [z for z in own if z.x.shape[1] == call.x.shape[-1]]
    if not wide:
        raise Unmatched(call.name, "no MLP of linears, nor experts in stacks", "mlp")
    place = wide[0].name.rpartition(".")[0]
    read = wide[0].x
    f, y = dense_facts(t, [z for z in own if z.name.rpartition(".")[0] == place], read, place)
    if place != call.name and not same(_called(t, place).y, y):
        raise Unmatched(place, "a result that is not that of down_proj", "mlp")
    return {"dense": f}, place.removeprefix(call.name).lstrip("."), read, y


def _residuals(
    call: Call, n: dict[str, Norm], own: list[Norm], read: np.ndarray, branch: np.ndarray, end: np.ndarray
) -> Facts:
    """Find how the results of attention and MLP are added to the residual. Returns a dict with two keys.

    parallel is True if the MLP reads the layer's input instead of its sum with attention's result. residual_scale is
    the factor by which both results are multiplied. Norms before the MLP and norms after an addition are added to `n`.

    Args:
        call: the call of the layer.
        n: {name such as attn.norm: norm of the layer}; changed in place.
        own: all norms called in the layer.
        read: the input of the MLP.
        branch: the result of attention, after its norm if it has one.
        end: the result of the MLP, after its norm if it has one.

    Raises Unmatched if the results are added in any other way.
    """
    before = next((z for z in own if same(z.y, read)), None)
    source = before.x if before is not None else read
    start = n.get("attn.norm")
    if before is not None and before is start:  # attention and MLP share their norm
        source = call.x
    if same(source, call.x) or (start is None and before is None and same(read, call.x)):
        if before is not None and before is not start:
            n["mlp.norm"] = before
        return _added(call, call.x, (branch, end), parallel=True)
    found = factors(source, call.x, branch)
    if found is not None and (before is None or factors(call.y, source, end) is not None):
        if before is not None:
            n["mlp.norm"] = before
        f = _added(call, source, (end,), parallel=False)
        if found[0] != 1 or abs(found[1] - f["residual_scale"]) > 1e-5:
            raise Unmatched(call.name, f"a residual added as {found[0]:g} a + {found[1]:g} b", "residual_scale")
        return f
    for add in own:
        if same(add.y, read) and factors(add.x, call.x, branch) == (1.0, 1.0):
            n["attn.add_norm"] = add
            last = next((z for z in own if same(z.y, call.y) and factors(z.x, read, end) == (1.0, 1.0)), None)
            if last is not None:
                n["mlp.add_norm"] = last
                return {"parallel": False, "residual_scale": 1.0}
    raise Unmatched(
        call.name, "an MLP input that is no sum of the residual and attention's result", "residual additions"
    )


def _added(call: Call, x: np.ndarray, branches: tuple[np.ndarray, ...], parallel: bool) -> Facts:
    """Check that a layer's result is x + s * (sum of branches). Returns {"parallel": parallel, "residual_scale": s}.

    Args:
        call: the call of the layer.
        x: the residual.
        branches: the arrays that are added to the residual.
        parallel: the value of the key parallel in the result.

    Raises Unmatched if the layer's result is anything else.
    """
    found = factors(call.y, x, *branches)
    if found is None or found[0] != 1 or max(found[1:]) - min(found[1:]) > 1e-5:
        raise Unmatched(call.name, "a result that is not the residual plus its branches", "residual additions")
    return {"parallel": parallel, "residual_scale": found[1]}


def _head(t: Trace, x: np.ndarray, layers: str) -> tuple[Facts, list[Norm]]:
    """Find how the logits are computed from the last layer's result. Returns (properties, norms).

    The properties are a dict with the keys final_norm (name of the norm's module; "" without), head_bias (True if the
    output head has a bias), tied (True if its weight is the embedding), logit_scale (a factor) and final_softcap (0:
    none). `norms` is a list with the final Norm, or [].

    Args:
        t: the trace.
        x: the last layer's result.
        layers: name of the list of layers. The final norm is not in this list.

    Raises Unmatched if the logits are computed in any other way.
    """
    outside = [n for n in norms(t, "", layers) if n.x.shape == x.shape]
    final = next((n for n in outside if same(n.x, x)), None)
    y = final.y if final is not None else x
    w, b = t.weight(t.head), t.weight(t.head, "bias")
    if w is None or w.shape[1] != y.shape[-1]:
        raise Unmatched(t.head or "the head", "an output head that is no linear of the final norm's result", "lm_head")
    embed = t.weight(t.embedding)
    f: Facts = {"final_norm": final.name if final is not None else "", "head_bias": b is not None}
    f |= {"tied": embed is not None and w.shape == embed.shape and same(w, embed), "final_softcap": 0.0}
    logits = y @ w.T
    raw = logits + (0 if b is None else b)
    if (found := factors(t.logits, raw)) is not None and (b is None or found[0] == 1):
        return f | {"logit_scale": found[0]}, [final] if final is not None else []
    for key, cap in t.config.items():
        if "cap" in key and isinstance(cap, int | float) and cap:
            for scale in (1.0, *[s for k, s in t.config.items() if "scal" in k and isinstance(s, float) and s]):
                if same(np.tanh(raw * scale / cap) * cap, t.logits, 1e-4):
                    return f | {"logit_scale": scale, "final_softcap": float(cap)}, [final] if final is not None else []
    raise Unmatched(t.head, "logits that are not those of the head, scaled or softcapped", "lm_head")
