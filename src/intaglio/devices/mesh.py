"""All ranks of a mesh in one process: each rank's Program on a device of its own kind, collectives by schedule.

Ranks step in turn from collective to collective, so that results depend on nothing but the Programs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from typing import cast

import numpy as np

from intaglio import collectives
from intaglio.batch import Batch
from intaglio.devices.device import Device, DeviceError, Rank, Rounds, StateSpec, StepResult, Weights, check_batch
from intaglio.ops import AllGather, AllReduce, AllToAll, Collective, Grouped, Recv, Send
from intaglio.ops.collective import split_rows
from intaglio.program import Program, verify_mesh


class MeshExecutable:
    """The ranks' Executables. `program` is the last rank's, which has the logits."""

    def __init__(self, ranks: Sequence[Rank], state: StateSpec) -> None:
        self.ranks, self.state = ranks, state
        self.program = ranks[-1].program

    def step(
        self, batch: Batch, *, logits: bool = False, taps: Collection[str] = (), timed: bool = False
    ) -> StepResult:
        """One step of every rank. What rank r has at a tapped site is under `site@r`; timings are sums over ranks."""
        check_batch(self.program, self.state, batch)
        results = _Step([rank.rounds(batch, logits=logits, taps=taps, timed=timed) for rank in self.ranks]).run()
        last, timings = results[-1], dict[str, float]()
        for result in results:
            for site, seconds in result.timings.items():
                timings[site] = timings.get(site, 0.0) + seconds
        taken = {f"{site}@{r}": x for r, result in enumerate(results) for site, x in result.taps.items()}
        return StepResult(last.tokens, last.logprobs, last.logits, taken, timings)


class _Step:
    """One step under way: where each rank stands, what it brings there, and what is sent and not yet received."""

    def __init__(self, rounds: Sequence[Rounds]) -> None:
        self.rounds = rounds
        self.at: dict[int, tuple[Collective, np.ndarray | None]] = {}
        self.results: dict[int, StepResult] = {}
        self.sent: dict[tuple[int, int], deque[np.ndarray]] = {}

    def run(self) -> list[StepResult]:
        for rank in range(len(self.rounds)):
            self.resume(rank, None)
        while self.at:
            before = len(self.at), [op.site for op, _ in self.at.values()]
            for rank in list(self.at):
                if rank in self.at:
                    self.meet(rank)
            if before == (len(self.at), [op.site for op, _ in self.at.values()]):
                where = ", ".join(f"rank {r} at {op.site}" for r, (op, _) in self.at.items())
                raise DeviceError(f"no rank can go on: {where}")
        return [self.results[rank] for rank in range(len(self.rounds))]

    def resume(self, rank: int, got: np.ndarray | None) -> None:
        """Let a rank go on to its next collective, or to its end."""
        self.at.pop(rank, None)
        try:
            self.at[rank] = self.rounds[rank].send(got)
        except StopIteration as end:
            self.results[rank] = end.value

    def meet(self, rank: int) -> None:
        """Do the collective at which `rank` stands, if its peers stand there too."""
        op, x = self.at[rank]
        if isinstance(op, Send):
            assert x is not None
            self.sent.setdefault((rank, op.peer), deque()).append(op.carried(x))
            self.resume(rank, None)
        elif isinstance(op, Recv):
            if letters := self.sent.get((op.peer, rank)):
                self.resume(rank, letters.popleft())
        elif isinstance(op, Grouped):
            there = [self.at.get(r) for r in op.group]
            if all(item is not None and item[0].site == op.site for item in there):
                brought = [np.asarray(item[1]) for item in there if item is not None]
                for r, got in zip(op.group, together(op, brought), strict=True):
                    self.resume(r, got)


def together(op: Grouped, x: Sequence[np.ndarray]) -> list[np.ndarray]:
    """What each rank of the group gets, by the schedule that sums in order of rank: bit for bit `op.exchange(x)`."""
    carried = [op.carried(part) for part in x]
    s = collectives.schedule(op.kind, "one_shot" if isinstance(op, AllReduce) else "direct", len(x))
    if isinstance(op, AllReduce):
        return [op.carried(total) for total in collectives.all_reduce(s, carried)]
    if isinstance(op, AllGather):
        axis = 0 if op.tokens else 1
        return [np.concatenate(parts, axis) for parts in collectives.all_gather(s, carried)]
    rows = [split_rows(part, len(x)) for part in carried]
    if isinstance(op, AllToAll):
        return [np.concatenate(parts, axis=1) for parts in collectives.all_to_all(s, rows)]
    return [op.carried(total) for total in collectives.reduce_scatter(s, rows)]


class MeshDevice:
    """Runs all ranks of a mesh on devices like `inner`."""

    def __init__(self, inner: Device) -> None:
        self.inner, self.name = inner, f"mesh of {inner.name}"

    def load(self, programs: Sequence[Program], weights: Weights, state: StateSpec) -> MeshExecutable:
        """Load every rank's Program. Raises ProgramError if they do not fit together, DeviceError if the device cannot
        be a rank."""
        verify_mesh(programs)
        ranks = [self.inner.load(program, weights, state) for program in programs]
        if not all(hasattr(rank, "rounds") for rank in ranks):
            raise DeviceError(f"device {self.inner.name!r} runs no mesh; use reference or host")
        return MeshExecutable([cast(Rank, rank) for rank in ranks], state)
