"""Removing the dead: ops whose results nobody reads, and tensors nobody names."""

from __future__ import annotations

from intaglio.program import Program


def remove_dead(p: Program) -> Program:
    """Keep what leads to an output, touches state or is waited for, the tensors that names, and the inputs."""
    needed = {t.name for t in p.tensors.values() if t.role in ("input", "output")}
    kept = []
    for op in reversed(p.ops):
        if op.stateful or op.lasting or not needed.isdisjoint(op.outputs):
            kept.append(op)
            needed.update(name for n in op.inputs for name in (n, p.base(n)))
            needed.update(op.outputs)
    return p.with_ops(reversed(kept), {n: t for n, t in p.tensors.items() if n in needed})
