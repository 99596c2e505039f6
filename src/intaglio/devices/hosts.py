"""HostsDevice: runs a mesh with its ranks on several hosts, through an agent on each."""

from __future__ import annotations

from pathlib import Path

from intaglio.devices.device import Device, DeviceError, DeviceFacts, Executable, StateSpec, Weights
from intaglio.devices.processes.hosts import HostsExecutable, Rendezvous
from intaglio.devices.processes.job import Job
from intaglio.devices.ranks import SILENCE, STEP_TIMEOUT
from intaglio.program import MeshProgram, Program, verify_mesh


class HostsDevice(Device):
    """A device that runs the ranks of a mesh on several hosts, with the same number of ranks on each.

    Ranks are assigned to hosts in the order in which the hosts' agents connected. If more than `hosts` agents connect,
    the others are spares. The weights must be at the same path on every host. Raises DeviceError if `hosts` is less
    than 1.

    Args:
        rendezvous: the coordinator's listening socket and its connected agents.
        hosts: number of hosts that the mesh needs.
        isa: instruction set of the CPUs, the same on all hosts; None: $INTAGLIO_ISA, or the best one of this host if
            that is not set.
        cache: folder on each host where packed weights are kept for the next start; None: they are not kept. "auto":
            weights of 64 MB or more are kept in $INTAGLIO_CACHE, or in ~/.cache/intaglio/packed if that is not set.
        patience: seconds to wait until enough agents have connected.
        step_timeout: seconds after which a step, or a wait inside a step, is given up.
        silence: seconds without a sign of life after which a suspended process (SIGSTOP) counts as hung.
    """

    name = "host"

    def __init__(
        self, rendezvous: Rendezvous, hosts: int, isa: str | None = None, *, cache: str | Path | None = "auto",
        patience: float = 60.0, step_timeout: float = STEP_TIMEOUT, silence: float = SILENCE,
    ) -> None:  # fmt: skip
        from intaglio.devices.host import HostDevice

        if hosts < 1:
            raise DeviceError(f"hosts is {hosts}; allowed: 1 or more")
        self.rendezvous, self.hosts, self.patience = rendezvous, hosts, patience
        self.step_timeout, self.silence = step_timeout, silence
        self.whole = HostDevice(1, isa, cache=cache)

    def facts(self) -> DeviceFacts:
        return self.whole.facts()

    def load(self, program: Program | MeshProgram, weights: Weights, state: StateSpec) -> Executable:
        """Start the ranks on the hosts and load a mesh there. Returns the Executable.

        Raises ProgramError for invalid Programs. Raises DeviceError if the ranks cannot be divided evenly among the
        hosts, if hosts are missing, or if loading fails. Raises DeviceLost if a host is lost while it loads.
        """
        return self.reload(None, program, weights, state)

    def reload(
        self, lost: Executable | None, program: Program | MeshProgram, weights: Weights, state: StateSpec
    ) -> Executable:
        from intaglio.devices.host import HostDevice

        ranks = 1 if isinstance(program, Program) else len(program.programs)
        if isinstance(program, Program) or ranks % self.hosts:
            raise DeviceError(f"{ranks} ranks cannot be dealt out to {self.hosts} hosts evenly; choose another layout")
        verify_mesh(program)
        each = ranks // self.hosts
        agents = self.rendezvous.wait(self.hosts, self.patience)
        jobs = []
        for i, agent in enumerate(agents):
            threads = max(1, agent.cores // each)
            inner = HostDevice(threads, self.whole.isa, cache=self.whole.cache).recipe()
            mine = program.programs[i * each : (i + 1) * each]
            jobs.append([Job(inner, (p,), program.layout, weights, state) for p in mine])
        earlier = lost.unwrapped() if lost else None
        return HostsExecutable(
            agents, program, jobs, state, self.step_timeout, self.silence,
            replaces=earlier if isinstance(earlier, HostsExecutable) else None,
        )  # fmt: skip

    def load_program(self, program: Program, weights: Weights, state: StateSpec) -> Executable:
        return self.load(program, weights, state)
