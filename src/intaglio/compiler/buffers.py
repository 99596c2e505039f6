"""Memory planning: temps whose lifetimes do not overlap share a buffer, as variables share registers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from intaglio import formats
from intaglio.ops import Tensor
from intaglio.ops.op import Dim
from intaglio.program import Program


def plan_buffers(p: Program) -> Program:
    """A copy of the Program in which each temp (intermediate result) has the number of a buffer.

    A buffer is a piece of memory. A temp is an op's result that is not an output of the Program. Temps whose lifetimes
    do not overlap share a buffer. Buffers are assigned in one scan over the ops, like registers. A temp takes the
    narrowest free buffer that is wide enough. If none is, the widest free buffer is widened; if none is free, a new
    buffer is made. A view uses the buffer of the tensor that it views. A result of an op never shares a buffer with the
    op's operands. Temps with T rows (one per token) and temps with R rows (one per row of logits) have separate
    buffers, since the two numbers vary independently.
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
    """True if some temp (intermediate result) of the Program has a buffer, which plan_buffers() assigns."""
    return any(t.buffer is not None for t in p.tensors.values())


@dataclass(frozen=True)
class Buffer:
    """The size of a buffer, in which a device keeps intermediate results of a Program.

    Attributes:
        rows: number of rows: an int, or the symbol of a number that depends on the batch, such as T (tokens).
        row_bytes: bytes per row.
    """

    rows: Dim
    row_bytes: int


def buffers(p: Program) -> dict[str | int, Buffer]:
    """The sizes of all buffers of a Program, as a dict {number of the buffer: Buffer}.

    An intermediate result without a buffer has an entry of its own: {name of the tensor: Buffer of its size}.
    """
    sizes: dict[str | int, Buffer] = {}
    for t in p.of_role("temp"):
        if not t.view:
            key = t.name if t.buffer is None else t.buffer
            narrower = sizes[key].row_bytes if key in sizes else 0
            sizes[key] = Buffer(t.shape[0], max(narrower, _row_bytes(t)))
    return sizes


def bytes_per_row(p: Program) -> int:
    """Bytes per row of all buffers of a Program together: the sum of their `row_bytes`, see buffers()."""
    return sum(b.row_bytes for b in buffers(p).values())


def _row_bytes(t: Tensor) -> int:
    """Bytes of one row of the tensor `t`, whose first axis counts the rows."""
    return prod(int(d) for d in t.shape[1:]) * formats.get(t.format).bits // 8
