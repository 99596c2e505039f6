"""Fusing: a map does its work inside the op it follows, so that its operand is never stored.

One walk serves all fusions; each brings a small function that says whether an op can take a map over.
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
TakeOver = Callable[[Map, str, Op, Mapping[str, Tensor]], Op | None]  # (map, operand x, the op behind x, tensors)


def fuse_glu(p: Program) -> Program:
    """activation(gate) * up, the two halves of one linear's result -> linear with glu."""
    return _fuse_maps(p, _glu)


def fuse_epilogues(p: Program) -> Program:
    """A scale, an activation or a residual added to a linear's result -> the linear's own."""
    return _fuse_maps(p, _epilogue)


def fuse_residual_norm(p: Program) -> Program:
    """A residual added to a norm's result -> the norm's own."""
    return _fuse_maps(p, _residual_norm)


def fuse_residual_experts(p: Program) -> Program:
    """A residual added to the experts' result -> the experts' own."""
    return _fuse_maps(p, _residual_experts)


def _fuse_maps(p: Program, take_over: TakeOver) -> Program:
    """Let the op behind each map's operand take the map over, where nothing else reads that operand.

    The fused op stands where the map stood, for only there are all the map's operands written. It keeps its site and
    its result's name, unless the map wrote an output.
    """
    tensors = dict(p.tensors)
    reads = Counter(p.base(name) for op in p.ops for name in op.inputs)
    ops: dict[str, Op] = {}  # by site, in order
    made: dict[str, Op] = {}  # by result
    renamed: dict[str, str] = {}

    def fused(m: Map) -> tuple[str, Op] | None:
        """The result that need not be stored, and the op that takes `m` over."""
        bases = [_base(tensors, name) for name in m.inputs]
        for x, base in reversed(list(zip(m.inputs, bases, strict=True))):
            if base in made and tensors[base].role == "temp" and reads[base] == bases.count(base):
                op = take_over(m, x, made[base], tensors)
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
    """Drop the result `old` with its views; `out`, under the name `keep`, is what is computed now."""
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
    """Peel "residual + activation(x * scale)" from the outside in; what is left must be x."""
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
        return None  # the linear scales before it activates, and activates once
    scale *= linear.scale
    return replace(linear, residual=residual, activation=activation or linear.activation, scale=scale)


def _residual_norm(m: Map, x: str, norm: Op, t: Mapping[str, Tensor]) -> Op | None:
    other = _other_of_sum(m, x)
    if not isinstance(norm, Norm) or x != norm.out or norm.residual is not None or other is None:
        return None
    return replace(norm, residual=other)


def _residual_experts(m: Map, x: str, experts: Op, t: Mapping[str, Tensor]) -> Op | None:
    other = _other_of_sum(m, x)
    if not isinstance(experts, Experts) or x != experts.out or experts.residual is not None or other is None:
        return None
    return replace(experts, residual=other) if t[other].shape == t[x].shape else None


def _other_of_sum(m: Map, x: str) -> str | None:
    """The other operand where the map is x and one other, added; None where it is more or less."""
    others = [name for name in m.inputs if name != x]
    steps = postfix(m.expr)
    sums = len(steps) == 3 and steps[0][0] == steps[1][0] == "operand" and steps[2] == PLUS
    return others[0] if sums and len(others) == 1 else None
