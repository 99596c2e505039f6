"""Properties of a traced model as values of Decoder's fields, and the places of its weights in the checkpoint.

A value may be a Code: text of an expression in the port file, because it depends on sizes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from intaglio.debugging.automatic.rotation import Rotation
from intaglio.debugging.automatic.trace import Unmatched

Facts = dict[str, Any]
SPLIT = 'split((("q_proj", heads // kv_heads * head_dim), ("k_proj", head_dim), ("v_proj", head_dim)), "{source}")'


class Code(str):
    """Source text of an expression, which text() writes into the port file as it is, without quotes."""

    def __repr__(self) -> str:
        return str(self)


def text(x: Any) -> str:
    """The value `x` as Python source text for a port file, with double quotes around strings."""
    if isinstance(x, Code):
        return str(x)
    if isinstance(x, str):
        return '"' + x.replace('"', "'") + '"'
    if isinstance(x, dict):
        return "{" + ", ".join(f"{text(k)}: {text(v)}" for k, v in x.items()) + "}"
    if isinstance(x, tuple):
        return "(" + ", ".join(text(v) for v in x) + ("," if len(x) == 1 else "") + ")"
    return repr(float(x)) if isinstance(x, float) else repr(x)


def flatten(f: Facts) -> Facts:
    """The values of Decoder's fields for a traced model, as a dict {field: value}.

    The values of window, chunk, rope and sparse are lists with one item per layer. f: properties of the model, see
    model_facts(). Raises Unmatched if layers differ in anything else, or if the fields of Decoder cannot express the
    model.
    """
    layers = f["layers"]
    first = _agree([{k: v for k, v in z["attn"].items() if k not in PER_LAYER} for z in layers], f["list"])
    around = _agree(
        [{k: z[k] for k in ("attention", "norms", "parallel", "residual_scale")} for z in layers], f["list"]
    )
    dense = [z["mlp"]["dense"] for z in layers if "dense" in z["mlp"]]
    mixed = [z["mlp"]["mixture"] for z in layers if "mixture" in z["mlp"]]
    mlp = _agree(dense, f["list"]) if dense else {}
    moe = _agree(_routed(mixed, f["list"]), f["list"]) if mixed else {}
    norm, eps, offset, weight, bias = f["norm"]
    if len(set(first["biases"])) > 1:
        raise Unmatched(f["list"], "a bias on some of q, k and v only", "qkv_bias")
    prefix = f["list"].rpartition(".")[0]
    prefix = f"{prefix}." if prefix else ""
    out: Facts = {
        "vocabulary": f["vocabulary"], "hidden": f["hidden"], "heads": first["heads"], "kv_heads": first["kv_heads"],
        "head_dim": first["head_dim"], "eps": eps, "tied": f["tied"], "norm": norm, "norm_offset": offset,
        "norm_weight": weight, "norm_bias": bias, "qk_norm": first["qk_norm"], "qkv_bias": first["biases"][0],
        "o_bias": first["o_bias"], "sinks": first["sinks"], "attn_softcap": first["softcap"],
        "final_softcap": f["final_softcap"], "embed_scale": f["embed_scale"], "logit_scale": f["logit_scale"],
        "residual_scale": around["residual_scale"], "parallel": around["parallel"], "head_bias": f["head_bias"],
        "attn_gate": first["gate"], "activation": (mlp or moe)["activation"], "prefix": prefix,
        "head": f["head"],
        "value_dim": 0 if first["value_dim"] == first["head_dim"] else first["value_dim"],
        "window": [z["attn"]["window"] for z in layers], "chunk": [z["attn"]["chunk"] for z in layers],
        "rope": [z["attn"]["rope"] for z in layers], "sparse": ["mixture" in z["mlp"] for z in layers],
    }  # fmt: skip
    out["scale"] = _one_scale([z["attn"]["scale"] for z in layers], f["list"])
    norms = dict(around["norms"])
    if first["inner_norm"]:
        norms["attn.inner_norm"] = first["inner_norm"]
    if mlp.get("inner_norm"):
        norms["mlp.inner_norm"] = mlp["inner_norm"]
    out["norms"] = norms
    if f["embed_norm"]:
        out |= {"embed_norm": f["embed_norm"].removeprefix(prefix), "embed_norm_first": f["embed_norm_first"]}
    if f["positions"]:
        out["positions"] = f["positions"]["rows"] - f["positions"]["first"]
    if mlp:
        out |= {"intermediate": mlp["width"], "gated": mlp["gated"], "mlp_bias": mlp["bias"]}
    blocks = {z["block"] for z in layers if "dense" in z["mlp"]} or {z["block"] for z in layers}
    if len(blocks) > 1:
        raise Unmatched(f["list"], f"MLPs called {', '.join(sorted(blocks))}", "Decoder.block")
    block = blocks.pop()
    if block not in ("mlp", ""):
        out["block"] = block
    fused, sources = _sources(f, first, mlp, around["attention"], block, prefix)
    out |= {"fused": fused, "sources": sources}
    if f["final_norm"] != f"{prefix}norm":
        if f["final_norm"] and not f["final_norm"].startswith(prefix):
            raise Unmatched(f["final_norm"], "a final norm outside the model of the layers", "final_norm")
        out["final_norm"] = f["final_norm"].removeprefix(prefix)
    return out | ({"mixture": _mixture(moe, next(z["block"] for z in layers if "mixture" in z["mlp"]))} if moe else {})


def _routed(mixed: list[Facts], name: str) -> list[Facts]:
    """Choose a routing that fits all layers with experts. Returns the properties of each layer, with this routing.

    The result is a list of dicts. The few traced tokens of a layer may fit several routings, which the layer has as a
    list under the key `routing`. The first routing that fits all layers is chosen, and its keys replace the key
    `routing`.

    mixed: properties of each layer's mixture, see mixture_facts(). name: name of the list of layers, for the error.
    Raises Unmatched if no routing fits all layers.
    """
    ways = [w for w in mixed[0]["routing"] if all(any(_same_way(w, x) for x in m["routing"]) for m in mixed)]
    if not ways:
        raise Unmatched(name, "experts chosen by other rules in other layers", "Mixture.route")
    return [{k: v for k, v in m.items() if k != "routing"} | ways[0] for m in mixed]


def _same_way(a: Facts, b: Facts) -> bool:
    return all(_equal(a[k], b[k]) for k in a)


PER_LAYER = ("window", "chunk", "rope", "scale")


def _agree(tables: list[Facts], name: str) -> Facts:
    """Check that all layers have equal properties. Returns the properties of the first layer.

    tables: the properties of each layer. name: name of the list of layers, for the error. Raises Unmatched, naming the
    property, if layers differ.
    """
    for i, table in enumerate(tables):
        for k, v in table.items():
            if not _equal(v, tables[0].get(k)):
                raise Unmatched(
                    f"{name}.{i}", f"{k}={v!r} where layers before have {tables[0].get(k)!r}", "the fields of Layer"
                )
    return tables[0]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return bool(np.isclose(a, b, rtol=1e-4))
    return bool(a == b)


def _one_scale(scales: list[float], name: str) -> float:
    if not np.allclose(scales, scales[0], rtol=1e-5):
        raise Unmatched(name, f"attention scales {', '.join(f'{s:.4g}' for s in scales)} by layer", "Layer.scale")
    return scales[0]


def _linear(usual: str, own: str, transposed: bool) -> dict[str, str]:
    """Entries of Decoder.sources for one linear: a dict {name that Decoder uses: name in the checkpoint}.

    The dict is {} if both names are equal and the checkpoint's weight is not transposed. For a transposed weight there
    are two entries: the weight, marked with |T, and the bias.

    usual: the linear's name in Decoder. own: its name in the checkpoint. transposed: True if the checkpoint stores the
    weight transposed.
    """
    if transposed:
        return {f"{usual}.weight": f"{own}.weight|T", f"{usual}.bias": f"{own}.bias"}
    return {usual: own} if usual != own else {}


def _sources(
    f: Facts, attn: Facts, mlp: Facts, attention: str, block: str, prefix: str
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The values of Decoder's fields `fused` and `sources` for a traced model, as (tuple of names, dict).

    `fused` names the modules that hold several projections, such as qkv_proj. `sources` is {name in Llama: name in the
    checkpoint}, for names that differ. If a tensor must be made from others, for example as a part of one, the value is
    source text for the port file.

    Args:
        f: properties of the model.
        attn: properties of its attention.
        mlp: properties of its dense MLP; {} without one.
        attention: name of the attention module in a layer.
        block: name of the MLP's module in a layer.
        prefix: part of a weight's name before the list of layers.

    Raises Unmatched for projections whose form `sources` cannot express.
    """
    fused, out = [], dict[str, Any]()
    layers, embed = f["list"].removeprefix(prefix), f["embedding"].removeprefix(prefix)
    out |= {"embed_tokens": embed} if embed != "embed_tokens" else {}
    out |= {"layers": layers} if layers != "layers" else {}
    if f["positions"]:
        own, first = f["positions"]["name"].removeprefix(prefix), f["positions"]["first"]
        if first:
            parts = f'parts_of("{own}.weight", ({first}, positions))[1]'
            out["embed_positions.weight"] = Code(parts)
        elif own != "embed_positions":
            out["embed_positions"] = own
    names = attn["names"]
    if attn["layout"] == "rows":
        fused.append("qkv_proj")
        out |= _linear("self_attn.qkv_proj", f"{attention}.{names[0]}", attn["transposed"])
    elif attn["layout"] == "groups":
        if attn["transposed"]:
            raise Unmatched(attention, "q, k and v of each head in one transposed matrix", "split()")
        out["**qkv"] = Code(SPLIT.format(source=f"{attention}.{names[0]}"))
    else:
        for usual, own in zip(("q_proj", "k_proj", "v_proj"), names, strict=True):
            out |= _linear(f"self_attn.{usual}", f"{attention}.{own}", attn["transposed"])
    out |= _linear("self_attn.o_proj", f"{attention}.{attn['o_name']}", attn["o_transposed"])
    for usual, own in zip(("q_norm", "k_norm"), attn["qk_names"], strict=False):
        if attn["qk_norm"] != "unit" and own != usual:
            out[f"self_attn.{usual}"] = f"{attention}.{own}"
    if attention != "self_attn":
        out["self_attn"] = attention
    if mlp:
        at, usual = (f"{block}." if block else ""), block or "mlp"
        if mlp["fused"] and mlp["swapped"]:
            own = f"{at}{mlp['names'][0]}.weight"
            up, gate = (f'parts_of("{own}", (intermediate, intermediate))[{i}]' for i in (0, 1))
            out |= {f"{usual}.gate_proj.weight": Code(gate), f"{usual}.up_proj.weight": Code(up)}
        elif mlp["fused"]:
            fused.append("gate_up_proj")
            out |= _linear(f"{usual}.gate_up_proj", at + mlp["names"][0], mlp["transposed"])
        else:
            for part, own in zip(("gate_proj", "up_proj") if mlp["gated"] else ("up_proj",), mlp["names"], strict=True):
                out |= _linear(f"{usual}.{part}", at + own, mlp["transposed"])
        out |= _linear(f"{usual}.down_proj", at + mlp["down"], mlp["transposed"])
    return tuple(fused), {k: v for k, v in out.items() if k != v}


def _mixture(m: Facts, block: str) -> Facts:
    """The values of Mixture's fields for a traced mixture of experts, as a dict {field: value}.

    The dict has four more keys:

    - route_scale: factor on the routing weights.
    - turned: True if the experts' matrices are stored transposed.
    - inside: True if the routing weight multiplies an expert's input, not its result.
    - experts: name of the experts' module within the mixture's module.

    m: traced properties of the mixture. block: name of the mixture's module in a layer. Raises Unmatched for a shared
    expert whose linears do not have the usual names.
    """
    shared = m["shared"]
    out: Facts = {
        "count": m["count"], "top": m["top"], "width": m["width"], "block": block, "router": m["router"],
        "router_bias": m["router_bias"], "correction": m["correction"], "route": dict(m["route"]),
        "route_scale": m["route_scale"], "inside": m["inside"], "turned": m["turned"], "experts": m["experts"],
        "shared": 0, "shared_source": "shared_experts", "shared_gate": m["shared_gate"], "activation": m["activation"],
    }  # fmt: skip
    if shared:
        usual = ("gate_proj", "up_proj") if shared["gated"] else ("up_proj",)
        if shared["names"] != usual or shared["down"] != "down_proj" or shared["transposed"]:
            raise Unmatched(
                f"{block}.{shared['place']}", f"a shared expert of {', '.join(shared['names'])}", "gate_proj, up_proj"
            )
        out |= {"shared": shared["width"], "shared_source": shared["place"], "shared_bias": shared["bias"]}
    return out


def rope_kinds(ropes: list[Rotation]) -> list[int]:
    """The index of each layer's rope table, as a list of ints from 0; -1 for a layer without rope.

    Layers have the same table if they rotate equally many columns by the same angles. ropes: the rotation that was
    traced in each layer.
    """
    seen: list[Rotation] = []
    out = []
    for r in ropes:
        if not r.dim:
            out.append(-1)
            continue
        at = next(
            (i for i, s in enumerate(seen) if s.dim == r.dim and np.allclose(s.angles, r.angles, rtol=1e-3)), None
        )
        if at is None:
            at = len(seen)
            seen.append(r)
        out.append(at)
    return out
