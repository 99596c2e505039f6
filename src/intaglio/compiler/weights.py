"""Passes that set number formats: of weights, of K/V caches, and of the inputs of linears with FP8 weights.

Ports and ops do not depend on these passes.
"""

from __future__ import annotations

from dataclasses import replace
from math import gcd

from intaglio import formats
from intaglio.ops import Attend, KvWrite, Linear, Op, Tensor, x_format
from intaglio.program import Program

SHORT = {"int8": "int8g128", "int4": "int4g32", "fp8": "fp8g128"}
PLAIN = ("f32", "bf16", "f16")
MATRICES = ("matrix", "stack")  # uses of weights that are multiplied, in any format
KV_FORMATS = {"f32": "f32", "bf16": "bf16", "int8": "int8row", "fp8": "e4m3"}
HEAD = "int8g128"  # the narrowest format of the output head, whose error goes straight into the logits


def set_weight_formats(p: Program, weights: str = "auto", kv_format: str = "auto") -> Program:
    """A copy of the Program with new number formats for weight matrices and K/V caches.

    The formats are `weights` and `kv_format`.

    - weights="auto": weights keep the format in which they are stored.
    - kv_format="auto": the format of a K/V cache follows from `weights`. With "f32" it becomes f32. With "auto" or
      "f16" it does not change. With other weights it becomes bf16, except that an e4m3 cache, which a checkpoint asked
      for, stays.
    - Activations are rounded to the format that fits the weight's new format (the op's attribute x_format).
    - An op that reads or writes a K/V cache has scales (k_scale, v_scale) only if the cache is e4m3; other scales are
      removed.
    - A short name (int8, int4, fp8) leaves the size of groups (values that share a scale) open: each weight gets a
      size that divides its columns. A q4_k weight whose rows are not whole blocks of 256 becomes int4g32, which has as
      many bits.
    - If `weights` is a 4-bit format, the weight of the output head (tied to the embedding or not) gets int8g128
      instead, or int8 in smaller groups that fit it.
    - A table that only `embed` ops read changes only for weights="f32" and "bf16": `embed` copies single rows, so a
      narrower table would not make a step faster.
    - The weight of a product whose exact result another op needs (router logits) stays as stored, and its input is not
      rounded: near a tie, rounding would choose other experts.
    - Vectors and per-head matrices stay as stored.

    Raises FormatError for an unknown format.
    """
    name = _full_name(weights)
    fitting = weights in SHORT or name == "q4_k"  # each weight gets the groups that fit it
    exact = {p.base(x) for op in p.ops for x in op.operands(exact=True)}
    kept = {w for op in p.ops if not exact.isdisjoint(op.outputs) for w in op.operands(*MATRICES)}
    products = [op for op in p.ops if op.rounds_x and kept.isdisjoint(op.operands(*MATRICES))]
    chosen: dict[str, str] = {}
    if name != "auto":
        chosen |= _table_formats(p, name)
        outputs = _output_heads(p, products)
        for op in products:
            own = op.operands(*MATRICES)
            head = formats.get(name).bits == 4 and not outputs.isdisjoint(own)
            fit = fitted(HEAD if head else name, *(p.tensors[w] for w in own)) if fitting or head else name
            chosen |= dict.fromkeys(own, fit)
    kv = KV_FORMATS.get(kv_format, "" if kv_format == "auto" else "?")
    if kv == "?":
        raise formats.FormatError(f"kv_format={kv_format!r}: use auto, {', '.join(KV_FORMATS)}")
    if kv or name not in ("auto", "f16"):
        caches = {cache for op in p.ops for cache in op.operands("pages", access="write")}
        if not kv and name != "f32":
            caches = {cache for cache in caches if p.tensors[cache].format != formats.CACHED}
        chosen |= dict.fromkeys(caches, kv or ("f32" if name == "f32" else "bf16"))
    tensors = {n: replace(t, format=chosen.get(n, t.format)) for n, t in p.tensors.items()}
    rounded = {op.site: x_format(tensors[op.operands(*MATRICES)[0]].format) for op in products}
    ops = (replace(op, x_format=rounded[op.site]) if op.site in rounded else op for op in p.ops)  # type: ignore[call-arg]
    return p.with_ops([_with_scales(op, tensors) for op in ops], tensors)


def _with_scales(op: Op, tensors: dict[str, Tensor]) -> Op:
    """Returns a copy of a KvWrite or Attend op in which only caches of the format e4m3 have scales (k_scale, v_scale).

    The scales of other caches are None in the copy. Any other op is returned unchanged. tensors: the Program's tensors
    by name.
    """
    if not isinstance(op, (KvWrite, Attend)):
        return op
    k, v = (tensors[cache].format == formats.CACHED for cache in (op.k_cache, op.v_cache))
    return replace(op, k_scale=op.k_scale if k else None, v_scale=op.v_scale if v else None)


def _table_formats(p: Program, name: str) -> dict[str, str]:
    """Returns the new format of each embedding table, as a dict {name of the table: name of the format}.

    The format is `name` if this is f32 or bf16. For any other `name` the dict is empty: `embed` copies single rows, so
    a narrower table would not make a step faster.
    """
    return dict.fromkeys((w for op in p.ops for w in op.operands("table")), name) if name in ("f32", "bf16") else {}


def _output_heads(p: Program, products: list[Op]) -> set[str]:
    """Returns a set with the names of all weights that may be the output head.

    These are the matrices with which `products` compute the logits, and the embedding tables, because the output head
    may be tied to one of them. products: the ops whose weights get a new format.
    """
    heads = {w for op in p.ops for w in op.operands("table")}
    for op in products:
        if any(p.tensors[out].shape[0] == "R" for out in op.outputs):
            heads.update(op.operands("matrix"))
    return heads


def fitted(name: str, *weights: Tensor) -> str:
    """Choose a group size for the format `name` that fits all the weights. Returns the format's new name.

    A group size fits if it divides the number of columns of each weight; otherwise padding would be stored and
    multiplied. A format with groups of 128 values gets the largest group size of 128, 96, 64 and 32 that fits. If none
    of them fits, the result is `name`. q4_k becomes int4g32 if 256 does not fit. Any other format stays as it is.
    """
    fmt, k = formats.get(name), gcd(*(int(w.shape[-1]) for w in weights))
    if name == "q4_k" and k % formats.BLOCK:
        return SHORT["int4"]
    whole = [g for g in (128, 96, 64, 32) if k % g == 0]
    return f"{fmt.family}g{whole[0]}" if fmt.group == 128 and whole else name


def _full_name(weights: str) -> str:
    """The full name of a format of weights, such as int8g128 for int8; "auto" and full names do not change.

    Raises FormatError for an unknown name, and for a format that weights cannot have.
    """
    name = SHORT.get(weights, weights)
    try:
        if name == "auto" or name in PLAIN or formats.get(name).grouped:
            return name
    except formats.FormatError:
        pass
    raise formats.FormatError(f"weights={weights!r}: use auto, {', '.join((*PLAIN, *SHORT))}, or {formats.CHOSEN}")


def set_activation_format(p: Program, activations: str = "auto") -> Program:
    """A copy of the Program in which linears with FP8 weights round their inputs to FP8 too, if `activations` is "fp8".

    The inputs then have one scale per row (format fp8row). With "auto", `p` is returned unchanged. Raises FormatError
    for another value, and for "fp8" if no linear has FP8 weights.
    """
    if activations == "auto":
        return p
    if activations != "fp8":
        raise formats.FormatError(f"activations={activations!r}: use auto or fp8")
    eight = {
        op.site
        for op in p.ops
        if isinstance(op, Linear) and formats.get(p.tensors[op.w].format).family.startswith("fp8")
    }
    if not eight:
        raise formats.FormatError("activations fp8 needs FP8 weights: choose weights fp8 or fp8row")
    ops = [replace(op, x_format="fp8row") if isinstance(op, Linear) and op.site in eight else op for op in p.ops]
    return p.with_ops(ops, p.tensors)
