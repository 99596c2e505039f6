"""Memory planning: temps whose lifetimes do not overlap share a buffer, as variables share registers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from intaglio import formats
from intaglio.ops import Tensor
from intaglio.ops.op import Dim
from intaglio.program import Program


def plan_buffers(p: Program) -> Program:
    """A copy of the Program with a buffer assigned to each temp (result of an op that is no output of the Program).

    The assignment is one linear scan over the ops, as in register allocation. A temp takes the narrowest free buffer
    that is wide enough, else the widest free one, which is widened, else a new one. A view uses the buffer of its base.
    An op's results never share a buffer with its operands. Temps of T rows and of R rows have separate buffers, since
    the two counts vary independently.
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
    """True if plan_buffers() has assigned a buffer to any temp (intermediate result) of the Program."""
    return any(t.buffer is not None for t in p.tensors.values())


@dataclass(frozen=True)
class Buffer:
    """Size of a buffer in which a device keeps temps (intermediate results): rows times bytes per row.

    Attributes:
        rows: a number, or the symbol of a batch size such as T.
        row_bytes: bytes of a row.
    """

    rows: Dim
    row_bytes: int


def buffers(p: Program) -> dict[str | int, Buffer]:
    """The size of each buffer of a Program, as a dict from its number to a Buffer.

    A temp (intermediate result) to which no buffer is assigned is in the dict by its name, with its own size.
    """
    sizes: dict[str | int, Buffer] = {}
    for t in p.of_role("temp"):
        if not t.view:
            key = t.name if t.buffer is None else t.buffer
            narrower = sizes[key].row_bytes if key in sizes else 0
            sizes[key] = Buffer(t.shape[0], max(narrower, _row_bytes(t)))
    return sizes


def bytes_per_row(p: Program) -> int:
    """Sum of `row_bytes` over all buffers of a Program (see buffers())."""
    return sum(b.row_bytes for b in buffers(p).values())


def _row_bytes(t: Tensor) -> int:
    """Bytes of one row of the tensor `t`, an intermediate result."""
    return prod(int(d) for d in t.shape[1:]) * formats.get(t.format).bits // 8
