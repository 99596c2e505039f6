"""RanksDevice: runs a mesh on the host with one process per rank, with collectives inside the native step."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from intaglio.devices.device import Device, DeviceFacts, Executable, StateSpec, Weights
from intaglio.devices.processes.forkserver import ForkServer
from intaglio.devices.processes.group import GroupExecutable, RankStart
from intaglio.devices.processes.job import Job
from intaglio.program import MeshProgram, Program, verify_mesh

STEP_TIMEOUT = 300.0  # seconds; far above any step that works
SILENCE = 0.7  # seconds without a sign of life after which a stopped process counts as hung


def share_cores(cores: Sequence[int], ranks: int, threads: int) -> list[tuple[int, ...]]:
    """Divide CPU cores among the ranks of this host. Returns a list with a tuple of core numbers for each rank.

    Each rank gets `threads` consecutive items of the list `cores`. If the list has fewer than ranks * threads items,
    every tuple is empty, which means that the rank may run on any core.
    """
    if ranks * threads > len(cores):
        return [()] * ranks
    return [tuple(cores[r * threads : (r + 1) * threads]) for r in range(ranks)]


class RanksDevice(Device):
    """The CPU of this machine as a device that runs a mesh with one process per rank.

    Args:
        threads: number of CPU threads of all ranks together; None: one per core. Each rank has an equal share, at least
            one thread, and cores of its own if there are enough.
        isa: instruction set of the CPU; None: $INTAGLIO_ISA, or the best one if that is not set.
        cache: folder for packed weights, "auto" or None, as described at HostDevice.
        step_timeout: seconds after which a step, or a wait inside a step, is given up.
        silence: seconds without a sign of life after which a suspended process (SIGSTOP) counts as hung. The limit is
            longer for a process that is not suspended, see group.watch().
    """

    name = "host"

    def __init__(
        self, threads: int | None = None, isa: str | None = None, *, cache: str | Path | None = "auto",
        step_timeout: float = STEP_TIMEOUT, silence: float = SILENCE,
    ) -> None:  # fmt: skip
        from intaglio.devices.host import HostDevice  # needs the compiled part, as other devices do not

        self.whole: HostDevice = HostDevice(threads, isa, cache=cache)
        self.step_timeout, self.silence, self.server = step_timeout, silence, ForkServer()

    def facts(self) -> DeviceFacts:
        return self.whole.facts()

    def load(self, program: Program | MeshProgram, weights: Weights, state: StateSpec) -> Executable:
        """Start a process for each rank and load the rank's Program in it. Returns one Executable for all ranks.

        A mesh of one rank is loaded in this process. Raises ProgramError for an invalid Program, DeviceError if a
        process cannot load its Program, and DeviceLost if a process ends while it loads.
        """
        return self.reload(None, program, weights, state)

    def reload(
        self, lost: Executable | None, program: Program | MeshProgram, weights: Weights, state: StateSpec
    ) -> Executable:
        if isinstance(program, Program) or len(program.programs) == 1:
            return self.whole.load(program, weights, state)
        from intaglio.devices.host import HostDevice

        verify_mesh(program)
        ranks = len(program.programs)
        threads = max(1, self.whole.threads // ranks)
        inner = HostDevice(threads, self.whole.isa, cache=self.whole.cache)
        cores = share_cores(sorted(os.sched_getaffinity(0)), ranks, threads)
        starts = [
            RankStart(Job(inner.recipe(), (p,), program.layout, weights, state), cores[r])
            for r, p in enumerate(program.programs)
        ]
        earlier = lost.unwrapped() if lost else None
        return GroupExecutable(
            starts, True, self.step_timeout, self.silence,
            replaces=earlier if isinstance(earlier, GroupExecutable) else None, server=self.server,
        )  # fmt: skip

    def load_program(self, program: Program, weights: Weights, state: StateSpec) -> Executable:
        return self.whole.load_program(program, weights, state)
