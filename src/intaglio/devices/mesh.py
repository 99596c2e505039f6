"""MeshDevice: runs all ranks of a mesh in one process, each on its own executable, with collectives by schedule.

Ranks run one after the other from collective to collective, so results depend only on the Programs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np

from intaglio import collectives
from intaglio.devices.device import (
    BlockingExecutable,
    CollectiveSteps,
    Device,
    DeviceError,
    DeviceFacts,
    Executable,
    RankExecutable,
    StateSpec,
    StepRequest,
    StepResult,
    Weights,
    check_batch,
    check_blocks,
    merge_ranks,
)
from intaglio.devices.expert_load import ExpertLoad, merge_loads
from intaglio.devices.recipe import Recipe, make
from intaglio.ops import AllGather, AllReduce, AllToAll, Collective, Grouped, Recv, Send
from intaglio.ops.collective import add_slots, split_rows
from intaglio.program import MeshProgram, Program, verify_mesh
from intaglio.program.expert_placement import Ranks


class MeshExecutable(BlockingExecutable):
    """Runs all ranks of a mesh in this process, as one executable.

    Its `program` is the Program of the last rank, which computes the logits.
    """

    def __init__(self, ranks: Sequence[RankExecutable], state: StateSpec) -> None:
        self.ranks, self.state = ranks, state
        self.program = ranks[-1].program

    def run(self, request: StepRequest) -> StepResult:
        """Run one step of every rank, and merge the ranks' results into one StepResult.

        Tokens and logits are those of the last rank. The seconds of each op are summed over ranks. If the result of an
        op was asked for (a tap), its value on rank r is stored under the op's name followed by `@r`. Raises DeviceError
        for a batch out of range.
        """
        check_batch(self.program, self.state, request.batch)
        return merge_ranks(MeshStep([rank.run_until_collective(request) for rank in self.ranks]).run())

    def has_experts(self) -> bool:
        return any(rank.has_experts() for rank in self.ranks)

    def expert_loads(self) -> dict[str, ExpertLoad]:
        return merge_loads([rank.expert_loads() for rank in self.ranks])

    def load_experts(self, layers: Mapping[str, Ranks]) -> None:
        for rank in self.ranks:
            rank.load_experts(layers)

    def experts_loaded(self) -> bool:
        return all([rank.experts_loaded() for rank in self.ranks])

    def switch_experts(self) -> None:
        for rank in self.ranks:
            rank.switch_experts()

    @property
    def block_parts(self) -> tuple[int, ...]:
        parts = [rank.block_parts for rank in self.ranks]
        return tuple(chain(*parts)) if all(parts) else ()

    def read_blocks(self, blocks: Sequence[int]) -> np.ndarray:
        return np.concatenate([rank.read_blocks(blocks) for rank in self.ranks], axis=1)

    def write_blocks(self, blocks: Sequence[int], contents: np.ndarray) -> None:
        check_blocks(self.state, self.block_bytes, blocks, contents)
        at = 0
        for rank in self.ranks:
            rank.write_blocks(blocks, contents[:, at : at + rank.block_bytes])
            at += rank.block_bytes


class MeshStep:
    """A step of all ranks of a mesh, while it runs.

    Attributes:
        ranks: each rank's step, a generator that yields at collectives.
        waiting: {rank that has not ended: (collective at which it waits, the rank's input)}.
        results: {rank that has ended: its StepResult}.
        messages: tensors that were sent and not yet received: {(sender, receiver): queue of tensors}.
    """

    def __init__(self, ranks: Sequence[CollectiveSteps]) -> None:
        self.ranks = ranks
        self.waiting: dict[int, tuple[Collective, np.ndarray | None]] = {}  # by rank
        self.results: dict[int, StepResult] = {}
        self.messages: dict[tuple[int, int], deque[np.ndarray]] = {}  # by (sender, receiver)

    def run(self) -> list[StepResult]:
        """Run the step of every rank to its end. Returns a list of the StepResults, in order of rank.

        Raises DeviceError if the ranks deadlock.
        """
        for rank in range(len(self.ranks)):
            self.resume(rank, None)
        while self.waiting:
            before = self._positions()
            for rank in list(self.waiting):
                if rank in self.waiting:
                    self.exchange(rank)
            if self._positions() == before:
                where = ", ".join(f"rank {r} at {op.site}" for r, (op, _) in self.waiting.items())
                raise DeviceError(f"deadlock: no rank can continue: {where}")
        return [self.results[rank] for rank in range(len(self.ranks))]

    def resume(self, rank: int, output: np.ndarray | None) -> None:
        """Continue the step of one rank until its next collective or its end. Returns None.

        At a collective, the op and the rank's input are stored in `waiting`. At the end, the StepResult is stored in
        `results`.

        `output` is the rank's result of the collective at which it waits. It is None after a send, and to begin the
        step.
        """
        self.waiting.pop(rank, None)
        try:
            self.waiting[rank] = self.ranks[rank].send(output)
        except StopIteration as end:
            self.results[rank] = end.value

    def exchange(self, rank: int) -> None:
        """Run the collective at which `rank` waits, if it can run now. Otherwise do nothing. Returns None.

        A send can always run; its tensor is stored in `messages`. A recv can run if its tensor is in `messages`. Any
        other collective can run if all ranks that take part in it wait at it.
        """
        op, x = self.waiting[rank]
        if isinstance(op, Send):
            assert x is not None
            self.messages.setdefault((rank, op.peer), deque()).append(op.carried(x))
            self.resume(rank, None)
        elif isinstance(op, Recv):
            if messages := self.messages.get((op.peer, rank)):
                self.resume(rank, messages.popleft())
        elif isinstance(op, Grouped):
            arrived = [self.waiting.get(r) for r in op.group]
            if all(item is not None and item[0].site == op.site for item in arrived):
                inputs = [np.asarray(item[1]) for item in arrived if item is not None]
                for r, output in zip(op.group, run_collective(op, inputs), strict=True):
                    self.resume(r, output)

    def _positions(self) -> tuple[int, list[str]]:
        """Return a tuple (number of waiting ranks, list of the names of the collective ops at which they wait).

        The caller compares the results before and after it has tried the collective of every waiting rank. If they are
        equal, no rank could continue, and the ranks are deadlocked.
        """
        return len(self.waiting), [op.site for op, _ in self.waiting.values()]


def run_collective(op: Grouped, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Run the collective `op` on the inputs of its ranks. Returns a list with each rank's output, in order of rank.

    `inputs` has one array per rank, in order of rank. Sums are added in this order, so that they are bitwise identical
    to those of op.exchange().
    """
    carried = [op.carried(x) for x in inputs]
    s = collectives.schedule(op.kind, "one_shot" if isinstance(op, AllReduce) else "direct", len(inputs))
    if isinstance(op, AllReduce):
        totals = [op.carried(total) for total in collectives.all_reduce(s, carried)]
        return [op.carried(add_slots(total, op.slots)) for total in totals]
    if isinstance(op, AllGather):
        axis = 0 if op.tokens else 1
        return [np.concatenate(parts, axis) for parts in collectives.all_gather(s, carried)]
    rows = [split_rows(x, len(inputs)) for x in carried]
    if isinstance(op, AllToAll):
        return [np.concatenate(parts, axis=1) for parts in collectives.all_to_all(s, rows)]
    return [op.carried(total) for total in collectives.reduce_scatter(s, rows)]


class MeshDevice(Device):
    """A device that runs all ranks of a mesh in this process, each on the device `inner`."""

    def __init__(self, inner: Device) -> None:
        self.inner, self.name, self.clock = inner, inner.name, inner.clock

    @classmethod
    def of(cls, inner: Recipe) -> MeshDevice:
        """Return a MeshDevice that runs each rank on a device made from the Recipe `inner`.

        A Recipe is a tuple (name of a function, its arguments).
        """
        device = make(inner)
        assert isinstance(device, Device)
        return cls(device)

    def recipe(self) -> Recipe:
        return f"{__name__}:MeshDevice.of", {"inner": self.inner.recipe()}

    def facts(self) -> DeviceFacts:
        return self.inner.facts()

    def load(self, program: Program | MeshProgram, weights: Weights, state: StateSpec) -> Executable:
        if isinstance(program, Program) or len(program.programs) == 1:
            return self.inner.load(program, weights, state)
        verify_mesh(program)
        ranks = [self.inner.load(rank, weights, state) for rank in program.programs]
        able = [rank for rank in ranks if isinstance(rank, RankExecutable)]
        if len(able) < len(ranks):
            raise DeviceError(f"device {self.name!r} cannot run a mesh; use reference or host")
        return MeshExecutable(able, state)

    def load_program(self, program: Program, weights: Weights, state: StateSpec) -> Executable:
        return self.inner.load_program(program, weights, state)
