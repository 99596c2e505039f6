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
    """The Program with each map activation(gate) * up over the halves of a linear's result fused into that linear.

    The linear then has the attribute `glu`.
    """
    return _fuse_maps(p, _glu)


def fuse_epilogues(p: Program) -> Program:
    """The Program with each scale, activation or residual addition after a linear fused into that linear."""
    return _fuse_maps(p, _epilogue)


def fuse_residual_norm(p: Program) -> Program:
    """The Program with each addition of a residual to a norm's result fused into that norm."""
    return _fuse_maps(p, _residual_norm)


def fuse_residual_experts(p: Program) -> Program:
    """The Program with each addition of a residual to the experts' result fused into the experts op."""
    return _fuse_maps(p, _residual_experts)


def _fuse_maps(p: Program, absorb: Absorb) -> Program:
    """The Program with each map fused into the op that computes one of its operands, where `absorb` can do it.

    A map is fused only if nothing else reads that operand. The fused op takes the map's place in the order, because
    only there are all the map's operands written. It keeps its own site and the name of its own result; if the map
    wrote an output of the Program, it gets the map's result name. absorb: returns the fused op, or None.
    """
    tensors = dict(p.tensors)
    reads = Counter(p.base(name) for op in p.ops for name in op.inputs)
    ops: dict[str, Op] = {}  # by site, in order
    made: dict[str, Op] = {}  # by result
    renamed: dict[str, str] = {}

    def fused(m: Map) -> tuple[str, Op] | None:
        """(name of the operand that is no longer stored, the op fused with `m`); None if no op can absorb `m`."""
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
    """Update the tensors after a fusion: delete the result `old` with its views, rename the result `out` to `keep`."""
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
    """The linear with glu, if the map is activation(gate) * up over the two halves of its result; else None."""
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
    """The linear with the map's residual, activation and scale fused into it; None if that is not possible.

    The expression is matched from the outside in: `residual + activation(scale * x)`, each part optional. It is
    not possible if the map does anything else, or if the linear has a residual or an activation already that conflicts.
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
    """The norm with the map's other operand as its residual, if the map adds two operands; else None."""
    other = _other_of_sum(m, x)
    if not isinstance(norm, Norm) or x != norm.out or norm.residual is not None or other is None:
        return None
    return replace(norm, residual=other)


def _residual_experts(m: Map, x: str, experts: Op, t: Mapping[str, Tensor]) -> Op | None:
    """The experts op with the map's other operand as residual, if the map adds two operands of one shape; else None."""
    other = _other_of_sum(m, x)
    if not isinstance(experts, Experts) or x != experts.out or experts.residual is not None or other is None:
        return None
    return replace(experts, residual=other) if t[other].shape == t[x].shape else None


def _other_of_sum(m: Map, x: str) -> str | None:
    """The operand other than `x` if the map is the sum of `x` and that operand; None for any other expression."""
    others = [name for name in m.inputs if name != x]
    steps = postfix(m.expr)
    sums = len(steps) == 3 and steps[0][0] == steps[1][0] == "operand" and steps[2] == PLUS
    return others[0] if sums and len(others) == 1 else None
