"""Choosing the format each weight is stored in. This is quantisation from outside: no port and no op knows of it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from math import gcd

from intaglio import formats
from intaglio.ops import Embed, Experts, KvWrite, Linear, Op, Route, Tensor
from intaglio.ops.op import Tensors
from intaglio.program import Program

SHORT = {"int8": "int8g128", "int4": "int4g32", "fp8": "fp8g128"}
PLAIN = ("f32", "bf16", "f16")
KV_FORMATS = {"f32": "f32", "bf16": "bf16", "int8": "int8row"}
HEAD = "int8g128"  # as far as a head is quantised: its error goes straight into the logits


def set_weight_formats(p: Program, weights: str = "auto", kv_format: str = "auto") -> Program:
    """The weights of every linear and expert in the format asked for, x rounded to match it, and the KV cache likewise,
    or to go with it.

    auto leaves weights as stored. Short names stand for SHORT's, in groups that fit the weight; where its blocks do not
    fit, q4_k is int4g32, of as many bits. A weight that yields logits (tied to the embedding or not) stays at HEAD when
    4 bits are asked for. Tables read by embed alone are copied rows, not products: they follow f32 and bf16 only.
    Routers stay as stored and read x unrounded: near a tie, rounding would choose other experts. Vectors (norm weights,
    biases) and matrices by head stay as stored too. Raises FormatError for a name that is not one of these.
    """
    name = _named(weights)
    fits = weights in SHORT or name == "q4_k"  # whether it is fitted to each weight
    routed = {p.base(op.logits) for op in p.ops if isinstance(op, Route)}
    routers = {op.w for op in p.ops if isinstance(op, Linear) and op.out in routed}
    linears = [op for op in p.ops if isinstance(op, Linear) and op.w not in routers]
    tables = {op.w for op in p.ops if isinstance(op, Embed)}
    heads = tables | {op.w for op in linears if p.tensors[op.x].shape[0] == "R"}
    chosen: dict[str, str] = {}
    if name != "auto":
        four_bits = formats.get(name).bits == 4
        if name in ("f32", "bf16"):
            chosen |= dict.fromkeys(tables, name)
        for op in linears:
            head = four_bits and op.w in heads
            chosen[op.w] = fitted(HEAD if head else name, p.tensors[op.w]) if fits or head else name
        for own in ((op.gate, op.up, op.down) for op in p.ops if isinstance(op, Experts)):
            chosen |= dict.fromkeys(own, fitted(name, *(p.tensors[w] for w in own)) if fits else name)
    kv = KV_FORMATS.get(kv_format, "" if kv_format == "auto" else "?")
    if kv == "?":
        raise formats.FormatError(f"kv_format={kv_format!r}: use auto, {', '.join(KV_FORMATS)}")
    if kv or name not in ("auto", "f16"):
        caches = {c for op in p.ops if isinstance(op, KvWrite) for c in (op.k_cache, op.v_cache)}
        chosen |= dict.fromkeys(caches, kv or ("f32" if name == "f32" else "bf16"))
    tensors = {n: replace(t, format=chosen.get(n, t.format)) for n, t in p.tensors.items()}
    return p.with_ops((_rounding(op, tensors, routers) for op in p.ops), tensors)


def _rounding(op: Op, tensors: Tensors, routers: Collection[str]) -> Op:
    """The op with what its x is rounded to, to meet its weight."""
    if isinstance(op, Linear) and op.w not in routers:
        return replace(op, x_format=_x_format(tensors[op.w].format))
    if isinstance(op, Experts):
        return replace(op, x_format=_x_format(tensors[op.gate].format))
    return op


def fitted(name: str, *weights: Tensor) -> str:
    """`name`, if its groups of 128 fill the rows of the weights; else the same in the largest smaller groups that do,
    if any: what is padded is read and multiplied too. q4_k, if its blocks fill them; else int4."""
    fmt, k = formats.get(name), gcd(*(int(w.shape[-1]) for w in weights))
    if name == "q4_k" and k % formats.BLOCK:
        return SHORT["int4"]
    whole = [g for g in (128, 96, 64, 32) if k % g == 0]
    return f"{fmt.family}g{whole[0]}" if fmt.group == 128 and whole else name


def _named(weights: str) -> str:
    """The full name of the format asked for, or auto."""
    name = SHORT.get(weights, weights)
    try:
        if name == "auto" or name in PLAIN or formats.get(name).grouped:
            return name
    except formats.FormatError:
        pass
    raise formats.FormatError(f"weights={weights!r}: use auto, {', '.join((*PLAIN, *SHORT))}, or {formats.CHOSEN}")


def _x_format(weight: str) -> str:
    """What x is rounded to before it meets a weight of this format."""
    fmt = formats.get(weight)
    if fmt.integer:
        return "int8"
    return "bf16" if weight == "bf16" or fmt.grouped else "f32"
