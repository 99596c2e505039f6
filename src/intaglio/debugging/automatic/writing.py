"""Writes the port file of a derived model: imports, DEFAULTS, the describing function and its row."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from intaglio.debugging.automatic.expressions import MISSING, Variant, equal, solve
from intaglio.debugging.automatic.flatten import Code, rope_kinds, text
from intaglio.debugging.automatic.rotation import Rotation
from intaglio.models.config import Config, PortError
from intaglio.models.decoder import NAMED, NUMBERED, STACKED, TRANSPOSED, window
from intaglio.models.decoder.rope import Table, parameters, table

LOCAL = ("hidden", "heads", "kv_heads", "head_dim", "intermediate", "positions")
USUAL: dict[str, Any] = {  # fields that are left out when they have this value
    "eps": MISSING, "activation": MISSING, "tied": MISSING, "scale": MISSING, "norms": MISSING, "norm": "rms",
    "norm_offset": 0.0, "norm_weight": True, "norm_bias": False, "parallel": False, "qk_norm": "", "qkv_bias": False,
    "o_bias": False, "mlp_bias": False, "gated": True, "fused": (), "head_bias": False, "sinks": False, "block": "mlp",
    "attn_softcap": 0.0, "final_softcap": 0.0, "embed_scale": 1.0, "attn_gate": "", "residual_scale": 1.0,
    "logit_scale": 1.0, "value_dim": 0, "embed_norm": "", "embed_norm_first": False, "final_norm": "norm",
}  # fmt: skip
STORED = {"NAMED": NAMED, "NUMBERED": NUMBERED, "STACKED": STACKED, "TRANSPOSED": TRANSPOSED}
SPARSE = (
    "False", "True", 'i >= c.whole("first_k_dense_replace")', 'i >= int(c.get("first_k_dense_replace", 0))',
    'c.get("mlp_layer_types")[i] == "sparse"',
    'i not in c.get("mlp_only_layers", []) and (i + 1) % c.whole("decoder_sparse_step") == 0',
    'i in c.get("moe_layers", [])',
    'c.get("moe_layer_start_index", 0) <= i <= c.get("moe_layer_end_index", -1) % c.whole("num_hidden_layers")',
    'c.get("moe_layer_start_index", 0) <= i <= c.get("moe_layer_end_index", -1) % c.whole("num_hidden_layers") '
    'and (i + 1) % c.whole("moe_layer_interval") == 0',
    'i >= int(c.get("num_dense_layers", 0))',
)  # fmt: skip
TURNED = (
    "True", 'kind == "sliding_attention"', 'bool(c.get("no_rope_layers")[i])', 'kind == "full_attention"',
)  # fmt: skip


class Unsolved(ValueError):
    """Raised when no expression over the keys of config.json gives a field's value in all variants.

    A Variant is one configuration of a tiny model, with the values that were traced when the model ran.

    Attributes:
        variant: if a change of one config key causes the failure, the variant with this changed key; otherwise None. A
            port can still be written without this variant, but the port must then refuse the key's changed value.
    """

    def __init__(self, what: str, variant: Variant | None) -> None:
        super().__init__(what)
        self.variant = variant


@dataclass
class Text:
    """The parts of a port file, as source text. The functions of this module fill in the parts one after the other.

    Attributes:
        body: lines of the function that describes the model, without its return statement.
        fields: {argument of Decoder: source text of its value}.
        sources: entries of Decoder.sources.
        imports: names that the port file imports.
    """

    body: list[str] = field(default_factory=list)
    fields: dict[str, str] = field(default_factory=dict)
    sources: dict[str, Any] = field(default_factory=dict)
    imports: set[str] = field(default_factory=set)


def solved(name: str, variants: Sequence[Variant], usual: Any = MISSING) -> str:
    """Return the source text of an expression that gives a field's value in all variants.

    The result is "" if the value is `usual` in every variant. Raises Unsolved if no expression gives the value.

    Args:
        name: the field: a key of Variant.facts, or several keys joined by dots, such as mixture.width.
        variants: the traced configurations of the tiny model.
        usual: the default value of the field, which need not be written.
    """
    found = solve(name, variants, usual)
    if found is None:
        raise Unsolved(f"no expression over config.json gives {name}", differing(name, variants))
    return found


def differing(name: str, variants: Sequence[Variant]) -> Variant | None:
    """Return the first Variant whose only changed config key changes the value `name`; None if there is none.

    This variant has exactly one changed config key, and its value of `name` differs from the value in variants[0].

    Args:
        name: a key of Variant.facts, or several keys joined by dots, such as mixture.width.
        variants: the variants; variants[0] has no changed keys.
    """

    def get(v: Variant) -> Any:
        x: Any = v.facts
        for part in name.split("."):
            x = x.get(part) if isinstance(x, dict) else None
        return x

    usual = get(variants[0])
    return next((v for v in variants[1:] if len(v.changes) == 1 and not equal(get(v), usual)), None)


def write_port(
    architecture: str,
    kind: str,
    variants: Sequence[Variant],
    refusals: Sequence[str],
    stored: str,
    about: dict[str, Any],
) -> str:
    """Return the source text of a port file: a Python module that describes one model architecture.

    Args:
        architecture: the architecture's name in config.json.
        kind: model_type in config.json.
        variants: traced configurations of the tiny model; the first one has the usual sizes.
        refusals: Python statements that raise an error for settings that cannot be ported.
        stored: name of the layout in which the checkpoint stores experts; "" without experts.
        about: a dict with the keys version, defaults, aliases, title, head and vocabulary, from _about() in derive.py.

    Raises Unsolved if no expression over config.json gives some field's value in all variants. The message names the
    field.
    """
    t, first = Text(), variants[0].facts
    function = re.sub(r"\W", "_", kind)
    t.body += refusals
    for name in LOCAL:
        if any(name in v.facts for v in variants):
            with_it = [v for v in variants if name in v.facts]
            t.body.append(f"{name} = {solved(name, with_it)}")
    if not any("intermediate" in v.facts for v in variants):
        t.body.append('intermediate = c.whole("intermediate_size", hidden)')
    for name, usual in USUAL.items():
        has = [v for v in variants if name in v.facts]
        if has and (expression := solved(name, has, usual)):
            t.fields[name] = expression
    if re.fullmatch(r"hidden\*\*0\.5", t.fields.get("embed_scale", "")):
        t.fields["root_scaled"] = "True"
        del t.fields["embed_scale"]
    _layers(t, variants)
    sources = [v.facts["sources"] for v in variants]
    merged: dict[str, Any] = {}
    for table_ in sources:
        whole = {k for k in table_ if k.startswith("**")} == {k for k in sources[0] if k.startswith("**")}
        if not whole or any(k in merged and merged[k] != v for k, v in table_.items()):
            raise Unsolved("the names of the checkpoint's tensors differ", differing("sources", variants))
        merged |= table_
    t.sources = merged
    if any(v.facts.get("mixture") for v in variants):
        _mixture(t, [v for v in variants if v.facts.get("mixture")], stored)
    return _file(t, architecture, kind, function, first, about)


def _by_layer(candidates: Sequence[str], wanted: list[list[Any]], variants: Sequence[Variant]) -> str | None:
    """Return the first expression in `candidates` that fits all layers of all variants; None if none does.

    An expression fits a layer if it gives the layer's value in `wanted`.

    Args:
        candidates: source texts of expressions over `c` (the configuration), `i` (the layer's number) and `kind` (the
            layer's type).
        wanted: for each variant, the list of its layers' values.
        variants: the traced configurations.
    """
    for expression in candidates:
        if all(_each(expression, v, w) for v, w in zip(variants, wanted, strict=True)):
            return expression
    return None


def _kinds(c: Config) -> list[str]:
    n = c.whole("num_hidden_layers")
    return list(c.get("layer_types") or ["full_attention"] * n)


def _each(expression: str, v: Variant, wanted: list[Any]) -> bool:
    c = Config(v.config, {})
    try:
        kinds = _kinds(c)
        made = [
            eval(expression, {"c": c, "i": i, "kind": kinds[i], "window": window})  # text of this module
            for i in range(len(wanted))
        ]
    except (PortError, KeyError, TypeError, ValueError, IndexError):
        return False
    return all(equal(a, b) for a, b in zip(made, wanted, strict=True))


def _layers(t: Text, variants: Sequence[Variant]) -> None:
    """Append the source text that defines the rope tables and the list of layers to `t.body`. Returns None.

    Raises Unsolved if no expression over config.json gives each layer's value.

    Args:
        t: parts of the port file's text.
        variants: traced configurations of the tiny model.
    """
    numbers = [k for k, x in variants[0].config.items() if "window" in k or "local_attention" in k]
    own = [f'int(c.get("{k}", 0))' for k in numbers]
    own += [f'c.whole("{k}") if kind == "sliding_attention" else 0' for k in numbers]
    lists = {n: [v.facts[n] for v in variants] for n in ("window", "chunk", "sparse")}
    parts: dict[str, str | None] = {
        "window": _by_layer(("0", "window(c, kind)", *own), lists["window"], variants),
        "chunk": _by_layer(
            ("0", 'c.whole("attention_chunk_size") if kind == "chunked_attention" else 0'), lists["chunk"], variants
        ),
        "sparse": _by_layer(SPARSE, lists["sparse"], variants),
    }
    for name, expression in parts.items():
        if expression is None:
            raise Unsolved(f"no expression over config.json gives each layer's {name}", differing(name, variants))
    turns = [rope_kinds(v.facts["rope"]) for v in variants]
    rope = _rope(t, variants, turns)
    given = [rope] if rope else []
    given += [f"{n}={e}" for n, e in parts.items() if e not in ("0", "False")]
    line = f"Layer({', '.join(given)})"
    by_kind, by_number = re.search(r"\bkind\b", line), re.search(r"\bi\b", line)
    if by_kind:
        known = ', known=("full_attention", "sliding_attention", "chunked_attention")' if "chunked" in line else ""
        listed = f"c.layer_types({known.removeprefix(', ')})"
        t.body.insert(0, REQUIRED)
        t.imports.add("PortError")
        over = f"for i, kind in enumerate({listed})" if by_number else f"for kind in {listed}"
    elif by_number:
        over = 'for i in range(c.whole("num_hidden_layers"))'
    else:
        t.body.append(f'layers = ({line},) * c.whole("num_hidden_layers")')
        return
    t.body.append(f"layers = tuple({line} {over})")


REQUIRED = (
    'if c.get("layer_types") is None:\n'
    '        raise PortError("config.json lacks layer_types; save the config with transformers 5, which writes it")'
)


def _rope(t: Text, variants: Sequence[Variant], turns: list[list[int]]) -> str:
    """Append the source text of the rope tables to `t.body`. Returns the source text of the argument `rope` of Layer.

    The returned text is an expression that the port file evaluates for each layer. It is "" if all layers use one
    table.

    Args:
        t: parts of the port file's text.
        variants: traced configurations of the tiny model.
        turns: for each variant, a list with the number of each layer's rope table; -1 for a layer without rope.

    Raises Unsolved if no expression gives the traced angles.
    """
    if all(max(x) < 0 for x in turns):
        t.body.append("ropes: dict[str, Table] = {}")
        t.imports.add("Table")
        return '""'
    shown = next(r for v in variants for r in v.facts["rope"] if r.dim)
    partial = any(r.dim and r.dim < v.facts["head_dim"] for v in variants for r in v.facts["rope"])
    options = ', style="interleaved"' if shown.style == "interleaved" else ""
    options += ", partial=True" if partial else ""
    if max(max(x) for x in turns) > 0:
        call = f"table(c, parameters(c, kind), head_dim, context{options})"
        if not all(_tables(call, v) for v in variants):
            raise Unsolved("the rope tables of the layers are not those of rope_parameters by layer type", None)
        t.body.append(f"ropes = {{kind: {call} for kind in set(c.layer_types())}}")
        if any(-1 in x for x in turns):
            raise Unsolved("layers with several rope tables and layers without", None)
        return "kind"
    for settings in ("parameters(c)", 'turned(parameters(c), c.whole("rotary_dim") / head_dim)'):
        call = f"table(c, {settings}, head_dim, context{options})"
        failing = next((v for v in variants if not _tables(call, v)), None)
        if failing is None:
            break
    else:
        raise Unsolved(
            "the angles of rope are not those of rope_parameters",
            failing if failing and len(failing.changes) == 1 else None,
        )
    t.body.append(f'ropes = {{"rope": {call}}}')
    present = [[x >= 0 for x in turn] for turn in turns]
    expression = _by_layer(TURNED, present, variants)
    if expression is None:
        raise Unsolved("no expression over config.json says which layers have rope", _other(present, variants))
    if expression == "True":
        return ""
    return f'"rope" if {expression} else ""'


def _other(lists: list[list[Any]], variants: Sequence[Variant]) -> Variant | None:
    return next((v for x, v in zip(lists, variants, strict=True) if x != lists[0] and len(v.changes) == 1), None)


def turned(settings: Any, share: float) -> Any:
    """Set partial_rotary_factor in the dict `settings` so that rope rotates the fraction `share` of a head's columns.

    Changes `settings` in place and returns it.
    """
    settings["partial_rotary_factor"] = share + 1e-4
    return settings


def _tables(call: str, v: Variant) -> bool:
    """True if the source text `call` makes the right rope table for every layer of a traced variant.

    A table is right if its angles are those observed in the trace. Layers without rope are not compared. Returns False
    if evaluating `call` raises an error.

    Args:
        call: the text of a call of table(), for the port file.
        v: the variant, which holds the traced angles.
    """
    c = Config(v.config, {})
    try:
        kinds = _kinds(c)
        for i, r in enumerate(v.facts["rope"]):
            if not r.dim:
                continue
            known = {
                "c": c,
                "kind": kinds[i],
                "table": table,
                "parameters": parameters,
                "turned": turned,
                "context": 64,
            }
            made = eval(call, known | {"head_dim": v.facts["head_dim"]})  # text of this module
            if not alike(made, r):
                return False
    except (PortError, KeyError, TypeError, ValueError, IndexError):
        return False
    return True


def alike(made: Table, seen: Rotation) -> bool:
    """True if the rope table `made` has the style of the traced rotation `seen`, and nearly its angles and factor."""
    a, b = np.array(made.frequencies), np.array(seen.angles)
    near = len(a) == len(b) and bool(np.allclose(a, b, rtol=2e-3, atol=1e-6))
    return near and made.style == seen.style and abs(made.factor - seen.factor) < 1e-4


def _mixture(t: Text, variants: Sequence[Variant], stored: str) -> None:
    """Write the source text that describes the mixture of experts into `t`. Returns None.

    Raises Unsolved if no expression over config.json gives the value of a field of Mixture in all variants.

    Args:
        t: parts of the port file's text.
        variants: the traced configurations that have experts.
        stored: name of the layout in which the checkpoint stores the experts, such as STACKED.
    """
    m = variants[0].facts["mixture"]
    if stored == "NUMBERED":  # saved under a name of its own
        for v in variants:
            v.facts["mixture"]["block"] = m["saved_block"]
    if "saved_correction" in m:
        for v in variants:
            v.facts["mixture"]["correction"] = m["saved_correction"]
    lines = {n: solved(f"mixture.{n}", variants) for n in ("count", "top", "width")}
    lines["sources"] = stored
    t.imports |= {stored, "Mixture"}
    for name, usual in (
        ("block", "mlp"), ("router", "gate"), ("router_bias", False), ("correction", ""), ("shared", 0),
        ("shared_source", "shared_experts"), ("shared_gate", ""), ("shared_bias", False),
    ):  # fmt: skip
        if name in m and (expression := solved(f"mixture.{name}", variants, usual)):
            lines[name] = expression
    route = {n: solved(f"mixture.route.{n}", variants, u) for n, u in (("score", "softmax"), ("normalise", False))}
    route["scale"] = solved("mixture.route_scale", variants, 1.0)
    given = [f'"{n}": {e}' for n, e in route.items() if e]
    grouped = next((v.facts["mixture"]["route"] for v in variants if "groups" in v.facts["mixture"]["route"]), None)
    if grouped:
        t.body.append('groups = {"groups": c.whole("n_group"), "kept_groups": c.whole("topk_group"), "group_best": '
                      f'{grouped["group_best"]}}}')  # fmt: skip
        given.append('**(groups if c.get("n_group", 1) > 1 else {})')
    if given:
        lines["route"] = f"{{{', '.join(given)}}}"
    glu = []
    if m["inside"]:
        glu.append('"scale_input": True')
    if glu:
        lines["glu"] = f"{{{', '.join(glu)}}}"
    inner = "".join(f"\n        {n}={e}," for n, e in lines.items())
    t.body.append(f"m = Mixture({inner}\n    )")
    t.fields["mixture"] = "m"


def _sources(t: Text) -> Iterator[str]:
    for key, x in t.sources.items():
        if isinstance(x, Code) and str(x).startswith("split("):
            t.imports.add("split")
            yield f"**{x},"
            continue
        if isinstance(x, Code):
            t.imports.add("parts_of")
        yield f"{text(key)}: {text(x)},"


def _file(t: Text, architecture: str, kind: str, function: str, first: dict[str, Any], about: dict[str, Any]) -> str:
    """Return the source text of the whole port file, put together from the parts in `t`.

    Args:
        t: parts of the text.
        architecture: the architecture's name in config.json.
        kind: model_type in config.json.
        function: name of the function in the port file that returns the Decoder.
        first: values of Decoder's fields in the first variant, the tiny model with no setting changed.
        about: further texts and dicts for the file, with the keys version, defaults, aliases, title, head and
            vocabulary.
    """
    sources = list(_sources(t))
    if sources:
        t.body.append("sources = {\n        " + "\n        ".join(sources) + "\n    }")
        t.fields["sources"] = "sources"
    whole = {"vocabulary": about["vocabulary"], **{n: n for n in LOCAL if _assigned(t, n)}}
    whole |= {"context": 'c.whole("max_position_embeddings")', "layers": "layers", "ropes": "ropes", **t.fields}
    if about["head"]:
        whole["head"] = text(about["head"])
    body = "\n    ".join(t.body)
    arguments = "".join(f"\n        {n}={e}," for n, e in whole.items())
    used = body + arguments
    decoder = [n for n in (*STORED, "Mixture") if n in t.imports]
    decoder += ["Layer"] + (["window"] if "window(c, kind)" in used else [])
    names = ", ".join(sorted({"Decoder", *decoder}, key=lambda n: (not n.isupper(), n.lower())))
    rope = [n for n in ("Table", "parameters", "table") if re.search(rf"\b{n}\b", used)]
    errors = ", PortError" if "PortError" in used else ""
    lines = [
        f'"""{about["title"]}, as in transformers {about["version"]}; by `intaglio port {kind} --auto`."""',
        "", "from __future__ import annotations", "",
        f"from intaglio.models.config import Config{errors}", f"from intaglio.models.decoder import {names}",
        f"from intaglio.models.decoder.rope import {', '.join(rope)}" if rope else "",
        "from intaglio.models.ports.family import Family",
        "from intaglio.models.ports.gpt import split" if "split(" in used else "",
        "from intaglio.program.source import parts_of" if "parts_of(" in used else "",
    ]  # fmt: skip
    head = "\n".join([lines[0], "", lines[2], "", *[x for x in lines[4:] if x]])
    defaults = "".join(
        f"\n    {text(k)}: {text(v)},"
        for k, v in about["defaults"].items()
        if re.search(rf'"{k}"', used) or k in ALWAYS
    )
    row = [text(architecture), text(about["title"]), "DEFAULTS", function, f"model_types={text((kind,))}"]
    prefix = first["prefix"]
    row += [] if prefix == "model." else [f"prefixes={text((prefix,))}"]
    embed = first["sources"].get("embed_tokens")
    row += [f"tops={text((embed,))}"] if embed else []
    row += [f"ignored={text(first['ignored'])}"] if first["ignored"] else []
    row += [f"aliases={text(about['aliases'])}"] if about["aliases"] else []
    inner = "".join(f"\n        {x}," for x in row)
    describe = (
        f"def {function}(c: Config, context: int) -> Decoder:\n"
        f'    """Describe {about["title"]} as a Decoder, from config.json, for up to `context` positions."""\n'
        f"    {body}\n    return Decoder({arguments}\n    )"
    )
    return f"{head}\n\nDEFAULTS = {{{defaults}\n}}\n\n\n{describe}\n\n\nFAMILIES = (\n    Family({inner}\n    ),\n)\n"


ALWAYS = ("max_position_embeddings", "rope_theta", "num_hidden_layers", "partial_rotary_factor")


def _assigned(t: Text, name: str) -> bool:
    return any(line.startswith(f"{name} = ") for line in t.body)
