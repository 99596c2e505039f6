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
    """A device that runs the steps of another device, `inner`, in a child process.

    Each executable gets a child process of its own. A crash or a hang of a child does not end this process.

    Args:
        inner: the device that the child processes open.
        step_timeout: seconds after which a step without an answer counts as failed.
        silence: seconds without a sign of life after which a child that a signal has suspended (SIGSTOP) counts as
            hung.

    Raises DeviceError if `inner` has a modelled clock, because steps in a child process would not advance that clock.
    """

    name = "worker"

    def __init__(self, inner: Device, step_timeout: float = STEP_TIMEOUT, silence: float = SILENCE) -> None:
        if inner.clock.modelled:
            raise DeviceError(f"device {inner.name!r} has a modelled clock and cannot be a worker; leave worker out")
        self.inner, self.step_timeout, self.silence = inner, step_timeout, silence

    def facts(self) -> DeviceFacts:
        return self.inner.facts()

    def load(self, program: Program | MeshProgram, weights: Weights, state: StateSpec) -> Executable:
        """Start a child process and load the Program there. Returns an Executable that sends each step to the child.

        weights: an ArrayWeights, whose arrays are sent to the child, or an object with a method recipe(). The recipe
        tells the child how to open the weights itself.

        Raises DeviceError if `weights` is neither of these, or if the device in the child raises an error. Raises
        DeviceLost if the child ends while it loads.
        """
        programs, layout = ((program,), "") if isinstance(program, Program) else (program.programs, program.layout)
        job = Job(self.inner.recipe(), programs, layout, weights, state)
        return GroupExecutable([RankStart(job)], False, self.step_timeout, self.silence, "worker")

    def load_program(self, program: Program, weights: Weights, state: StateSpec) -> Executable:
        return self.load(program, weights, state)
