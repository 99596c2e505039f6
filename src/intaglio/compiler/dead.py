"""Dead-code removal: drops ops whose results no op reads, and tensors that no op names."""

from __future__ import annotations

from intaglio.program import Program


def remove_dead(p: Program) -> Program:
    """A copy of the Program without the ops and tensors that have no effect.

    An op has an effect if an output of the Program depends on it, if it writes state, or if it communicates with other
    ranks. A tensor is kept if it is an input or output of the Program, or if a remaining op uses it.
    """
    needed = {t.name for t in p.tensors.values() if t.role in ("input", "output")}
    kept = []
    for op in reversed(p.ops):
        if op.writes_state or op.has_effect or not needed.isdisjoint(op.outputs):
            kept.append(op)
            needed.update(name for n in op.inputs for name in (n, p.base(n)))
            needed.update(op.outputs)
    return p.with_ops(reversed(kept), {n: t for n, t in p.tensors.items() if n in needed})
