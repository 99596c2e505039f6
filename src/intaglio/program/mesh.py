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
    """The Programs of all ranks that share a model, in order of rank. A MeshProgram may have a single rank.

    `layout` is the layout by which the model was divided over the ranks, as text such as "tp4"; "" for a single rank.
    """

    programs: tuple[Program, ...]
    layout: str = ""

    @property
    def last(self) -> Program:
        """The last rank's Program, which computes the logits."""
        return self.programs[-1]

    @property
    def stages(self) -> int:
        """Returns the number of pipeline stages.

        A rank that receives tensors from a lower rank is one stage after that rank.
        """
        stage = list[int]()
        for program in self.programs:
            before = [op.peer for op in program.ops if isinstance(op, Recv) and op.peer < len(stage)]
            stage.append(1 + max((stage[peer] for peer in before), default=0))
        return max(stage)


def verify_mesh(mesh: MeshProgram) -> None:
    """Check that each rank's Program is valid and that the Programs fit together. Returns nothing.

    They fit if the ranks are in order, if all have the same model name and context length, and if their collectives
    match: every rank that a collective names takes part in it, with a fitting shape. Raises ProgramError, naming ranks
    and sites (names of ops).
    """
    for program in mesh.programs:
        verify(program)
    wrong = [*_misplaced(mesh)] or [*CollectiveMatcher(mesh).run()]
    if wrong:
        raise ProgramError(f"the mesh of {mesh.last.name!r} does not fit together:\n  " + "\n  ".join(wrong[:8]))


def _misplaced(mesh: MeshProgram) -> Iterator[str]:
    """Yield an error message for each Program that does not belong at its place in the mesh.

    It belongs there if its `rank` is its index, if its `mesh` is the number of Programs, and if its name and context
    equal those of rank 0.
    """
    first, n = mesh.programs[0], len(mesh.programs)
    for i, p in enumerate(mesh.programs):
        if (p.mesh, p.rank) != (n, i):
            yield f"Program {i} of {n} says it is rank {p.rank} of mesh {p.mesh}"
        if (p.name, p.context) != (first.name, first.context):
            yield f"rank {i} is {p.name!r} context={p.context}, rank 0 {first.name!r} context={first.context}"


class CollectiveMatcher:
    """Steps through the collectives of all ranks, without computing values, to find mismatches and deadlocks.

    In this model, a send never waits for its receiver. Every other collective waits for its peers.
    """

    def __init__(self, mesh: MeshProgram) -> None:
        self.programs = mesh.programs
        self.queues = [deque(op for op in p.ops if isinstance(op, Collective)) for p in mesh.programs]
        self.messages: dict[tuple[int, int], deque[Send]] = {}  # sent but not received, by (sender, receiver)

    def run(self) -> Iterator[str]:
        """Step through the collectives of all ranks and yield a message for each fault.

        Yields nothing if all collectives match. There are three kinds of fault:

        - Ranks disagree about a collective. This ends the run.
        - Ranks wait for each other in a deadlock. There is one message for each rank that waits.
        - A rank sends a tensor that is never received.
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
        """Try to pass the next collective of `rank`: compare it with the same collective on its peers.

        Returns "" if the collective was passed. Returns None if `rank` must wait, because a peer has not come to this
        collective yet. Returns an error message, naming ranks and sites (names of ops), if the ranks disagree about it.
        Call it only if `rank` has a collective left.
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
        """Match `op`, a Recv on `rank`, with the oldest unreceived tensor that rank `op.peer` has sent to `rank`.

        Returns "" if the tensors of the send and of the receive have the same shape and the same format on the wire.
        Returns an error message, naming ranks and sites (names of ops), if they differ. Returns None if there is no
        unreceived tensor yet.
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
    """Returns a tuple of the properties of `op`, a collective, that must be the same on all its ranks.

    The tuple is hashable. For a send or recv these are the tensor's shape and its format on the wire. Any other
    collective also has its kind, its site (name of the op's place in the model) and `slots`, the number of column
    blocks that an all_reduce adds to each other. `p` is the Program that contains `op`.
    """
    if isinstance(op, Send):
        return p.tensors[op.x].shape, op.wire
    if isinstance(op, Recv):
        return (op.rows, op.width), op.wire
    rows, width = p.tensors[op.inputs[0]].shape if isinstance(op, ReduceScatter) else p.tensors[op.outputs[0]].shape
    return op.kind, op.site, "T" if isinstance(op, AllToAll) else rows, width, op.wire, getattr(op, "slots", 1)


def _shape_mismatch(members: list[tuple[Program, Grouped]]) -> str:
    """Returns an error message if the ranks' parts of a collective's tensor do not fit together; "" if they fit.

    If the collective joins the columns of all ranks, the column counts must add up to the op's width. If the tensor is
    split by token rows over n ranks, rank i must have part i, which is written T:i/n.

    members: for each rank, its Program and its op.
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
