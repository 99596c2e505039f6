"""WorkerDevice: runs a device in a child process, so that a crash or hang of the device does not end this one.

The process is a group of one (see processes/): a child that dies, shows no sign of life, or does not answer a step
within `step_timeout` seconds becomes DeviceLost.
"""

from __future__ import annotations

from intaglio.devices.device import Device, DeviceError, DeviceFacts, Executable, StateSpec, Weights
from intaglio.devices.processes import GroupExecutable, Job, RankStart
from intaglio.devices.ranks import SILENCE, STEP_TIMEOUT
from intaglio.program import MeshProgram, Program


class WorkerDevice(Device):
    """A device that runs each executable of another device in a child process.

    inner: the other device. step_timeout: limit in seconds on a step. silence: seconds without a sign of life after
    which a process that a signal has suspended (SIGSTOP) counts as hung. Raises DeviceError if `inner` has a modelled
    clock, because steps in a child process would not advance that clock.
    """

    name = "worker"

    def __init__(self, inner: Device, step_timeout: float = STEP_TIMEOUT, silence: float = SILENCE) -> None:
        if inner.clock.modelled:
            raise DeviceError(f"device {inner.name!r} has a modelled clock and cannot be a worker; leave worker out")
        self.inner, self.step_timeout, self.silence = inner, step_timeout, silence

    def facts(self) -> DeviceFacts:
        return self.inner.facts()

    def load(self, program: Program | MeshProgram, weights: Weights, state: StateSpec) -> Executable:
        """Start a child process and load the Program there. Returns the Executable, which sends steps to the process.

        weights: an ArrayWeights, whose arrays are sent, or a source with a recipe(), by which the child opens it
        itself. Raises DeviceError if the weights are neither or the device raises an error, DeviceLost if the process
        ends while it loads.
        """
        programs, layout = ((program,), "") if isinstance(program, Program) else (program.programs, program.layout)
        job = Job(self.inner.recipe(), programs, layout, weights, state)
        return GroupExecutable([RankStart(job)], False, self.step_timeout, self.silence, "worker")

    def load_program(self, program: Program, weights: Weights, state: StateSpec) -> Executable:
        return self.load(program, weights, state)
