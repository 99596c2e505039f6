"""Planning memory: temps that are never alive together share a buffer. Register allocation, with rows for registers."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from intaglio import formats
from intaglio.ops import Tensor
from intaglio.ops.op import Dim
from intaglio.program import Program


def plan_buffers(p: Program) -> Program:
    """Give each temp a buffer: one linear scan over the ops. Views lie in their base's.

    An op's results never share a buffer with its operands. Rows T and rows R have buffers of their own, since their
    numbers vary apart. A temp takes the narrowest free buffer that holds it, else widens the widest, else a new one.
    """
    last = {p.base(name): i for i, op in enumerate(p.ops) for name in (*op.outputs, *op.inputs)}
    widths: list[int] = []
    free: dict[Dim, set[int]] = {}
    buffer: dict[str, int] = {}
    for i, op in enumerate(p.ops):
        for t in (p.tensors[n] for n in op.outputs if p.tensors[n].role == "temp"):
            pool, need = free.setdefault(t.shape[0], set()), _row_bytes(t)
            roomy = [b for b in pool if widths[b] >= need]
            if pool:
                taken = min(roomy, key=lambda b: (widths[b], b)) if roomy else max(pool, key=lambda b: (widths[b], -b))
                pool.remove(taken)
                widths[taken] = max(widths[taken], need)
            else:
                taken = len(widths)
                widths.append(need)
            buffer[t.name] = taken
        for name in dict.fromkeys(p.base(n) for n in (*op.outputs, *op.inputs)):
            if name in buffer and last[name] == i:
                free[p.tensors[name].shape[0]].add(buffer[name])
    return p.with_ops(p.ops, {n: replace(t, buffer=buffer.get(n)) for n, t in p.tensors.items()})


def planned(p: Program) -> bool:
    return any(t.buffer is not None for t in p.tensors.values())


def row_bytes(p: Program) -> dict[str | int, int]:
    """Bytes a row of each buffer; of each temp, where it has none."""
    bytes: dict[str | int, int] = {}
    for t in p.of_role("temp"):
        if not t.view:
            key = t.name if t.buffer is None else t.buffer
            bytes[key] = max(bytes.get(key, 0), _row_bytes(t))
    return bytes


def _row_bytes(t: Tensor) -> int:
    return prod(int(d) for d in t.shape[1:]) * formats.get(t.format).bits // 8
