"""The Programs of a mesh, one a rank: whether together they are one model, and in which order their collectives meet.

Knows nothing of layouts; the compiler made them, a device steps them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator, Sequence

from intaglio.ops import AllGather, AllToAll, Collective, Grouped, Recv, ReduceScatter, Send
from intaglio.program.program import Program, ProgramError
from intaglio.program.verify import verify


def verify_mesh(programs: Sequence[Program]) -> None:
    """Each Program by itself, then all together: ranks in order, one context, every collective met by its peers.

    Raises ProgramError naming ranks and sites.
    """
    for program in programs:
        verify(program)
    wrong = [*_placed(programs)] or [*_met(programs)]
    if wrong:
        raise ProgramError(f"the mesh of {programs[0].name!r} does not fit together:\n  " + "\n  ".join(wrong[:8]))


def _placed(programs: Sequence[Program]) -> Iterator[str]:
    first, n = programs[0], len(programs)
    for i, p in enumerate(programs):
        if (p.mesh, p.rank) != (n, i):
            yield f"Program {i} of {n} says it is rank {p.rank} of mesh {p.mesh}"
        if (p.name, p.context) != (first.name, first.context):
            yield f"rank {i} is {p.name!r} context={p.context}, rank 0 {first.name!r} context={first.context}"


def _terms(p: Program, op: Collective) -> Hashable:
    """What must be equal on both sides."""
    if isinstance(op, Send):
        return p.tensors[op.x].shape, op.wire
    if isinstance(op, Recv):
        return (op.rows, op.width), op.wire
    rows, width = p.tensors[op.inputs[0]].shape if isinstance(op, ReduceScatter) else p.tensors[op.outputs[0]].shape
    return op.kind, op.site, "T" if isinstance(op, AllToAll) else rows, width, op.wire


def _met(programs: Sequence[Program]) -> Iterator[str]:
    """Step all ranks until none can go on; a send waits for nobody, the others for their peers."""
    waiting = [deque(op for op in p.ops if isinstance(op, Collective)) for p in programs]
    sent: dict[tuple[int, int], deque[Send]] = {}
    rank = 0
    idle = 0
    while idle < len(programs):
        queue, idle = waiting[rank], idle + 1
        while queue and (fault := _meet(programs, waiting, sent, rank)) is not None:
            idle = 0
            if fault:
                yield fault
                return
        rank = (rank + 1) % len(programs)
    for rank, queue in enumerate(waiting):
        if queue:
            op = queue[0]
            whom = f"rank {op.peer}" if isinstance(op, Recv) else f"ranks {op.group}"  # type: ignore[attr-defined]
            yield f"rank {rank} waits at {op.site} ({op.kind}) for {whom}, in vain"
    for (giver, taker), ops in sent.items():
        if ops:
            yield f"rank {giver} sends at {ops[0].site} what rank {taker} never receives"


def _meet(
    programs: Sequence[Program],
    waiting: Sequence[deque[Collective]],
    sent: dict[tuple[int, int], deque[Send]],
    rank: int,
) -> str | None:
    """Let `rank` do its next collective. None: it must wait; "": done; else what does not fit."""
    op = waiting[rank][0]
    if isinstance(op, Send):
        sent.setdefault((rank, op.peer), deque()).append(op)
        waiting[rank].popleft()
        return ""
    if isinstance(op, Recv):
        letters = sent.get((op.peer, rank))
        if not letters:
            return None
        send = letters.popleft()
        waiting[rank].popleft()
        fits = _terms(programs[op.peer], send) == _terms(programs[rank], op)
        return "" if fits else f"rank {op.peer} sends {send.x} at {send.site}, rank {rank} expects {op.out} otherwise"
    assert isinstance(op, Grouped)
    heads = [waiting[r][0] if waiting[r] else None for r in op.group]
    if any(not isinstance(head, Grouped) or head.group != op.group for head in heads):
        return None
    terms = [_terms(programs[r], head) for r, head in zip(op.group, heads, strict=True) if head]
    for r in op.group:
        waiting[r].popleft()
    if len(set(terms)) > 1:
        return f"ranks {op.group} meet at {op.site} with unlike terms: {', '.join(map(str, dict.fromkeys(terms)))}"
    return _parts([(programs[r], head) for r, head in zip(op.group, heads, strict=True) if isinstance(head, Grouped)])


def _parts(met: Sequence[tuple[Program, Grouped]]) -> str:
    """Whether what each rank brings and gets makes a whole; else what does not."""
    op, brought = met[0][1], [p.tensors[head.x].shape for p, head in met]
    if isinstance(op, AllToAll) or (isinstance(op, AllGather) and not op.tokens):
        widths = [int(shape[1]) for shape in brought]
        if sum(widths) != op.width:
            return f"ranks {op.group} bring {widths} columns to {op.site}; wanted {op.width} together"
    rows = (
        [shape[0] for shape in brought]
        if isinstance(op, AllGather)
        else [p.tensors[head.out].shape[0] for p, head in met]
    )
    if str(rows[0]).startswith("T:") and rows != [f"T:{i}/{len(met)}" for i in range(len(met))]:
        return f"ranks {op.group} have rows {rows} at {op.site}; wanted the shares of {len(met)} in order"
    return ""
