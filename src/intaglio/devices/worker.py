"""Any device in a process of its own: whatever kills it or makes it hang kills that process alone.

The parent's half is an Executable; the child's is `serve()`. They speak pickled tuples over a pair of sockets. A child
that dies, or is silent for longer than `patience`, becomes DeviceLost.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Collection
from multiprocessing.connection import Connection
from pathlib import Path

from intaglio.batch import Batch
from intaglio.devices.device import Device, DeviceError, DeviceLost, Executable, StateSpec, StepResult, Weights
from intaglio.program import Program

PATIENCE = 300.0  # seconds a step may take; SIGSTOP and swapping count, so this is far above any step that works
LOADING = 3600.0  # and a load, which may read and pack hundreds of gigabytes
START = f"import sys; from {__name__} import serve; serve(int(sys.argv[1]))"


class WorkerExecutable:
    """A Program loaded by a child process. `pid` is its id."""

    def __init__(
        self, device: Device, program: Program, weights: Weights, state: StateSpec, patience: float = PATIENCE
    ) -> None:
        self.program, self.state, self.patience = program, state, patience
        mine, theirs = socket.socketpair()
        with theirs:
            source = str(Path(__file__).parents[2])
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}
            self.process = subprocess.Popen(
                [sys.executable, "-c", START, str(theirs.fileno())], env=environment, pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, start_new_session=True,  # a Ctrl-C is for the parent, who drains first
            )  # fmt: skip
        self.pid = self.process.pid
        self.wire = Connection(mine.detach())
        self._ask((device, program, weights, state), LOADING)

    def step(
        self, batch: Batch, *, logits: bool = False, taps: Collection[str] = (), timed: bool = False
    ) -> StepResult:
        """One step, over there. Raises DeviceError for what the device raised, DeviceLost if there is no device."""
        result = self._ask((batch, {"logits": logits, "taps": tuple(taps), "timed": timed}), self.patience)
        assert isinstance(result, StepResult)
        return result

    def close(self) -> None:
        """End the process, however it fares."""
        self.wire.close()
        self.process.kill()
        self.process.wait()

    def _ask(self, question: tuple[object, ...], patience: float) -> object:
        try:
            self.wire.send(question)
            if not self.wire.poll(patience):
                raise TimeoutError(f"no answer in {patience:g} s")
            good, answer = self.wire.recv()
        except Exception as e:  # an end of file, a broken pipe, half a message: the same thing, by many names
            self.close()
            why = f"{type(e).__name__} {e}".strip()
            raise DeviceLost(f"worker {self.pid} is gone ({why}; exit status {self.process.returncode})") from e
        if not good:
            raise DeviceError(str(answer))
        return answer


class WorkerDevice:
    """Another device, each of whose executables has a process of its own. Raises DeviceError for a device with a clock:
    steps in another process would not move it."""

    name = "worker"

    def __init__(self, inner: Device, patience: float = PATIENCE) -> None:
        if hasattr(inner, "clock"):
            raise DeviceError(f"device {inner.name!r} keeps the time itself and cannot be a worker; leave worker out")
        self.inner, self.patience = inner, patience

    def load(self, program: Program, weights: Weights, state: StateSpec) -> Executable:
        """Start a process and load there. `weights` must pickle. Raises what the device raises, as DeviceError."""
        return WorkerExecutable(self.inner, program, weights, state, self.patience)


def serve(descriptor: int) -> None:
    """The child: load what is asked for, then answer steps until the parent is gone."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends with its parent, which may still have streams to finish
    wire = Connection(descriptor)
    executable: Executable | None = None
    while True:
        try:
            message = wire.recv_bytes()
        except (EOFError, ConnectionError):
            return
        try:
            question = pickle.loads(message)
            if executable is None:
                device, program, weights, state = question
                executable = device.load(program, weights, state)
                answer: object = None
            else:
                batch, options = question
                answer = executable.step(batch, **options)
        except Exception as e:  # whatever a device can raise is an answer
            wire.send((False, f"{type(e).__name__}: {e}"))
        else:
            wire.send((True, answer))
