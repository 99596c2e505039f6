"""Fusion passes: move an elementwise map into the op that computes its operand, so that the operand is not stored.

All fusions use one walk over the ops, `_fuse_maps()`; each passes a function that decides whether an op can absorb a
map.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

from intaglio.ops import Experts, Linear, Map, Norm, Op, Tensor
from intaglio.ops.elementwise import postfix
from intaglio.ops.linear import ACTIVATIONS
from intaglio.program import Program

PLUS, TIMES = ("binary", "+"), ("binary", "*")
Absorb = Callable[[Map, str, Op, Mapping[str, Tensor]], Op | None]  # (map, operand x, the op that computes x, tensors)


def fuse_glu(p: Program) -> Program:
    """Fuse each op activation(gate) * up with the linear before it. Returns the new Program.

    gate and up are the two halves of the linear's result. The fused linear has the attributes `glu` and `activation`
    set, and the elementwise op (class Map) is removed.
    """
    return _fuse_maps(p, _glu)


def fuse_epilogues(p: Program) -> Program:
    """Fuse each linear with the elementwise op after it that scales, activates or adds a residual.

    Returns the new Program, in which these elementwise ops (class Map) are removed.
    """
    return _fuse_maps(p, _epilogue)


def fuse_residual_norm(p: Program) -> Program:
    """Fuse each elementwise op that adds a residual to a norm's result with the norm. Returns the new Program."""
    return _fuse_maps(p, _residual_norm)


def fuse_residual_experts(p: Program) -> Program:
    """Fuse each experts op with the elementwise op after it that adds a residual. Returns the new Program."""
    return _fuse_maps(p, _residual_experts)


def _fuse_maps(p: Program, absorb: Absorb) -> Program:
    """Fuse maps (elementwise ops of class Map) into the ops that compute their operands. Returns the new Program.

    A map is fused with the op that computes one of its operands if `absorb` returns a fused op and no other op reads
    this operand. The fused op takes the place of the map in the Program, since all operands of the map are computed
    there. It has the site (name) of the op that absorbed the map. Its result has the name of that op's result; but if
    the map's result is an output of the Program, it has the name of the map's result.

    absorb: function (map, name x of the operand, op that computes x, tensors by name) that returns the fused op, or
    None if the two cannot be fused.
    """
    tensors = dict(p.tensors)
    reads = Counter(p.base(name) for op in p.ops for name in op.inputs)
    ops: dict[str, Op] = {}  # by site, in order
    made: dict[str, Op] = {}  # by result
    renamed: dict[str, str] = {}

    def fused(m: Map) -> tuple[str, Op] | None:
        """Fuse the map `m` into the op that computes one of its operands.

        Returns (name of the operand, which no longer exists; the fused op). Returns None if no operand is an
        intermediate result that only `m` reads, or if `absorb` returns None for each.
        """
        bases = [_base(tensors, name) for name in m.inputs]
        for x, base in reversed(list(zip(m.inputs, bases, strict=True))):
            if base in made and tensors[base].role == "temp" and reads[base] == bases.count(base):
                op = absorb(m, x, made[base], tensors)
                if op is not None:
                    return base, op
        return None

    for op in p.ops:
        op = op.rename(renamed)
        found = fused(op) if isinstance(op, Map) else None
        if found:
            base, out = found[0], op.outputs[0]
            keep = out if tensors[out].role == "output" else base
            reads[keep] = reads[out]
            renamed[out] = keep
            del ops[made.pop(base).site]
            _retire(tensors, base, out, keep)
            op = found[1].rename({base: keep})
        ops[op.site] = op
        made |= dict.fromkeys(op.outputs, op)
    return p.with_ops(ops.values(), tensors)


def _base(tensors: Mapping[str, Tensor], name: str) -> str:
    view = tensors[name].view
    return view[0] if view else name


def _retire(tensors: dict[str, Tensor], old: str, out: str, keep: str) -> None:
    """Update the table `tensors` after a Map op was fused into the op before it. Returns nothing.

    Args:
        tensors: the Program's tensors by name; changed in place.
        old: name of the first op's result. It no longer exists: the tensor is deleted, and so are its views.
        out: name of the Map's result before the fusion.
        keep: name of the Map's result after the fusion.
    """
    for t in [t for t in tensors.values() if t.view]:
        if t.view and t.view[0] == old:
            del tensors[t.name]
        elif t.view and t.view[0] == out:
            tensors[t.name] = replace(t, view=(keep, t.view[1]))
    whole = replace(tensors[out], name=keep)
    for name in {old, out} - {keep}:
        del tensors[name]
    tensors[keep] = whole


def _glu(m: Map, x: str, linear: Op, t: Mapping[str, Tensor]) -> Op | None:
    """Fuse `linear` with the elementwise op `m` that computes activation(gate) * up. Returns the fused op, or None.

    gate and up must be the two halves of the linear's result. Returns None if `m` computes anything else, if `linear`
    is not a Linear, or if it already has an activation or a residual. t: tensors by name. `x` is not used.
    """
    if not isinstance(linear, Linear) or linear.residual is not None or linear.activation:
        return None
    match postfix(m.expr):
        case (("operand", g), ("call", call), ("operand", u), ("binary", "*")):
            gate, up = getattr(m, str(g)), getattr(m, str(u))
        case (("operand", u), ("operand", g), ("call", call), ("binary", "*")):
            gate, up = getattr(m, str(g)), getattr(m, str(u))
        case _:
            return None
    half = int(t[linear.out].shape[1]) // 2
    halves = t[gate].view == (linear.out, 0) and t[up].view == (linear.out, half)
    whole = t[gate].shape[1] == t[up].shape[1] and int(t[gate].shape[1]) * 2 == t[linear.out].shape[1]
    fits = halves and whole and call in ACTIVATIONS
    return replace(linear, glu=True, activation=str(call)) if fits else None


def _epilogue(m: Map, x: str, linear: Op, t: Mapping[str, Tensor]) -> Op | None:
    """Fuse `linear` with the elementwise op `m` that reads its result `x`. Returns the fused op, or None.

    `m` must compute residual + activation(scale * x), where each of residual, activation and scale may be missing.
    Returns None if `m` computes anything else, if `linear` already has a residual, or if it has an activation and `m`
    has a scale or another activation. t: tensors by name.
    """
    others = [name for name in m.inputs if name != x]
    if not isinstance(linear, Linear) or x != linear.out or linear.residual is not None or len(others) > 1:
        return None
    steps = [(step, getattr(m, str(value)) if step == "operand" else value) for step, value in postfix(m.expr)]
    residual, activation, scale = None, "", 1.0
    if others and steps[-1] == PLUS and ("operand", others[0]) in (steps[0], steps[-2]):
        residual = others[0]
        steps = steps[1:-1] if steps[0] == ("operand", residual) else steps[:-2]
    if steps[-1][0] == "call" and steps[-1][1] in ACTIVATIONS:
        activation = str(steps.pop()[1])
    numbers = [value for step, value in steps if step == "number"]
    if len(steps) == 3 and len(numbers) == 1 and steps[-1] == TIMES:
        scale = float(numbers[0])
        steps = [s for s in steps[:2] if s[0] != "number"]
    if steps != [("operand", x)] or (linear.activation and (activation or scale != 1)):
        return None  # a linear scales before its activation and has only one
    scale *= linear.scale
    return replace(linear, residual=residual, activation=activation or linear.activation, scale=scale)


def _residual_norm(m: Map, x: str, norm: Op, t: Mapping[str, Tensor]) -> Op | None:
    """Fuse `norm` with the elementwise op `m` that adds an operand to its result `x`. Returns the fused op, or None.

    The fused op is a copy of `norm` with this operand as its residual. Returns None if `m` computes anything else, if
    `norm` is not a Norm, or if it already has a residual. `t` is not used.
    """
    other = m.other_of_sum(x)
    if not isinstance(norm, Norm) or x != norm.out or norm.residual is not None or other is None:
        return None
    return replace(norm, residual=other)


def _residual_experts(m: Map, x: str, experts: Op, t: Mapping[str, Tensor]) -> Op | None:
    """Fuse `experts` with the elementwise op `m` that adds an operand to its result `x`. Returns the fused op, or None.

    The fused op is a copy of `experts` with this operand as its residual. Returns None if `m` computes anything else,
    if the operand has another shape than `x`, if `experts` is not an Experts op, or if it already has a residual. t:
    tensors by name.
    """
    other = m.other_of_sum(x)
    if not isinstance(experts, Experts) or x != experts.out or experts.residual is not None or other is None:
        return None
    return replace(experts, residual=other) if t[other].shape == t[x].shape else None
