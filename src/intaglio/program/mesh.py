"""MeshProgram: the Programs of all ranks of one model, and the check that their collectives match.

Independent of layouts: the compiler makes the Programs, a device runs them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from intaglio.ops import AllGather, AllToAll, Collective, Grouped, Recv, ReduceScatter, Send
from intaglio.program.program import Program, ProgramError
from intaglio.program.verify import verify


@dataclass(frozen=True)
class MeshProgram:
    """The Programs of all ranks that share a model, in order of rank. There may be a single rank.

    `layout`: the layout by which the model was sharded, as text such as tp4; empty for one rank.
    """

    programs: tuple[Program, ...]
    layout: str = ""

    @property
    def last(self) -> Program:
        """The last rank's Program, which computes the logits."""
        return self.programs[-1]

    @property
    def stages(self) -> int:
        """Number of pipeline stages. A rank that receives (op recv) from a lower rank is one stage after it."""
        stage = list[int]()
        for program in self.programs:
            before = [op.peer for op in program.ops if isinstance(op, Recv) and op.peer < len(stage)]
            stage.append(1 + max((stage[peer] for peer in before), default=0))
        return max(stage)


def verify_mesh(mesh: MeshProgram) -> None:
    """Verify each rank's Program, then all together. Raises ProgramError naming ranks and sites.

    Ranks must be in order and have the same name and context. The peers of each collective must take part in it.
    """
    for program in mesh.programs:
        verify(program)
    wrong = [*_misplaced(mesh)] or [*CollectiveMatcher(mesh).run()]
    if wrong:
        raise ProgramError(f"the mesh of {mesh.last.name!r} does not fit together:\n  " + "\n  ".join(wrong[:8]))


def _misplaced(mesh: MeshProgram) -> Iterator[str]:
    """Yield a message for each Program with a wrong rank or mesh size, or another name or context than rank 0's."""
    first, n = mesh.programs[0], len(mesh.programs)
    for i, p in enumerate(mesh.programs):
        if (p.mesh, p.rank) != (n, i):
            yield f"Program {i} of {n} says it is rank {p.rank} of mesh {p.mesh}"
        if (p.name, p.context) != (first.name, first.context):
            yield f"rank {i} is {p.name!r} context={p.context}, rank 0 {first.name!r} context={first.context}"


class CollectiveMatcher:
    """Runs the collectives of all ranks without values, to find mismatches and deadlocks.

    A send never waits; every other collective waits for its peers.
    """

    def __init__(self, mesh: MeshProgram) -> None:
        self.programs = mesh.programs
        self.queues = [deque(op for op in p.ops if isinstance(op, Collective)) for p in mesh.programs]
        self.messages: dict[tuple[int, int], deque[Send]] = {}  # sent but not received, by (sender, receiver)

    def run(self) -> Iterator[str]:
        """Run all ranks' collectives, and yield a message for each fault; no message if all collectives match.

        The first mismatch ends the run. If ranks wait for each other in a deadlock, there is a message for each that
        waits. Sends that are never received are faults too.
        """
        rank = idle = 0
        while idle < len(self.programs):
            idle += 1
            while self.queues[rank] and (fault := self.advance(rank)) is not None:
                idle = 0
                if fault:
                    yield fault
                    return
            rank = (rank + 1) % len(self.programs)
        for rank, queue in enumerate(self.queues):
            if queue:
                op = queue[0]
                peers = f"rank {op.peer}" if isinstance(op, Recv) else f"ranks {op.group}"  # type: ignore[attr-defined]
                yield f"deadlock: rank {rank} waits at {op.site} ({op.kind}) for {peers}"
        for (sender, receiver), ops in self.messages.items():
            if ops:
                yield f"rank {sender} sends at {ops[0].site} what rank {receiver} never receives"

    def advance(self, rank: int) -> str | None:
        """Run the next collective of `rank`, which must have one left, if its peers have come to it.

        Returns "" if it has run, None if it must wait for a peer, and an error message that names ranks and sites if
        the ranks do not agree about it.
        """
        op = self.queues[rank][0]
        if isinstance(op, Send):
            self.messages.setdefault((rank, op.peer), deque()).append(op)
            self.queues[rank].popleft()
            return ""
        if isinstance(op, Recv):
            return self.receive(rank, op)
        assert isinstance(op, Grouped)
        heads = [self.queues[r][0] if self.queues[r] else None for r in op.group]
        grouped = [head for head in heads if isinstance(head, Grouped) and head.group == op.group]
        if len(grouped) < len(heads):
            return None
        members = [(self.programs[r], head) for r, head in zip(op.group, grouped, strict=True)]
        terms = [_terms(p, head) for p, head in members]
        for r in op.group:
            self.queues[r].popleft()
        if len(set(terms)) > 1:
            return f"ranks {op.group} disagree at {op.site}: {', '.join(map(str, dict.fromkeys(terms)))}"
        return _shape_mismatch(members)

    def receive(self, rank: int, op: Recv) -> str | None:
        """Match the op `op` of `rank`, a Recv, with the oldest tensor that rank `op.peer` has sent to `rank`.

        Returns "" if the two ops fit, None if nothing has been sent yet, and an error message that names ranks and
        sites if they do not fit.
        """
        messages = self.messages.get((op.peer, rank))
        if not messages:
            return None
        send = messages.popleft()
        self.queues[rank].popleft()
        fits = _terms(self.programs[op.peer], send) == _terms(self.programs[rank], op)
        return (
            ""
            if fits
            else f"rank {op.peer} sends {send.x} at {send.site}, rank {rank} expects another shape for {op.out}"
        )


def _terms(p: Program, op: Collective) -> Hashable:
    """The properties of a collective that must be equal on all its peers, as one hashable value.

    They are the shape and the wire format. Except for send and recv, they also include the kind, the site (name of the
    op's place in the model) and `slots`, the number of column blocks that an all_reduce adds to each other.
    """
    if isinstance(op, Send):
        return p.tensors[op.x].shape, op.wire
    if isinstance(op, Recv):
        return (op.rows, op.width), op.wire
    rows, width = p.tensors[op.inputs[0]].shape if isinstance(op, ReduceScatter) else p.tensors[op.outputs[0]].shape
    return op.kind, op.site, "T" if isinstance(op, AllToAll) else rows, width, op.wire, getattr(op, "slots", 1)


def _shape_mismatch(members: list[tuple[Program, Grouped]]) -> str:
    """An error message if what the ranks hold of a collective's tensor does not fit together; "" if it does.

    If the op joins the ranks' columns, their numbers must add up to its width. If the tensor is split by token rows,
    rank i of n must have the share T:i/n. members: (Program, its op) of each rank.
    """
    op, inputs = members[0][1], [p.tensors[head.x].shape for p, head in members]
    if isinstance(op, AllToAll) or (isinstance(op, AllGather) and not op.tokens):
        widths = [int(shape[1]) for shape in inputs]
        if sum(widths) != op.width:
            return f"ranks {op.group} give {widths} columns to {op.site}; wanted {op.width} in total"
    outputs = [p.tensors[head.out].shape for p, head in members]
    rows = [shape[0] for shape in (inputs if isinstance(op, AllGather) else outputs)]
    if str(rows[0]).startswith("T:") and rows != [f"T:{i}/{len(members)}" for i in range(len(members))]:
        return f"ranks {op.group} have rows {rows} at {op.site}; wanted the shares of {len(members)} in order"
    return ""
