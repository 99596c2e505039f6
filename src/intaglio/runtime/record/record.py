"""RecordedEngine: an engine that writes a journal of its calls and external inputs, for deterministic replay.

An engine has four external inputs: clock, random numbers, executable and restart. The Recorder wraps them and keeps
the clock's readings, the last random number, and whether each launch and restart succeeded; RecordedEngine also keeps
losses of the device between two steps. replay.py supplies these and runs the steps again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from intaglio.devices import DeviceLost, Executable, PendingStep, StepRequest, StepResult
from intaglio.runtime.engine import Engine, Rng
from intaglio.runtime.record.journal import write_engine, write_event, write_failure
from intaglio.runtime.request import Event, Refused, Request, RequestError
from intaglio.runtime.request_fields import write_request
from intaglio.runtime.resumption import Resumption
from intaglio.runtime.sequence import Sequence

T = TypeVar("T")

Journal = Callable[[dict[str, Any]], None]


class Recorder:
    """Collects the external inputs that an engine reads between two journal entries.

    Attributes:
        readings: clock readings, in seconds.
        launches: for each launch, None if it succeeded, else its error as text.
        restarts: for each attempt to replace the device: False if it failed, "kept" if the new device also has the K/V
            of the lost one, else True.
        losses: the error, as text, of each loss of the device that was noticed between two steps.
        seed: the latest random number, which is the seed of a request that gave none; 0 before the first.
    """

    def __init__(self) -> None:
        self.readings: list[float] = []
        self.launches: list[str | None] = []
        self.restarts: list[bool | str] = []
        self.losses: list[str] = []
        self.seed = 0

    def clock(self, inner: Callable[[], float]) -> Callable[[], float]:
        """Returns a clock function that reads the clock `inner` and records each reading in `readings`."""

        def read() -> float:
            self.readings.append(inner())
            return self.readings[-1]

        return read

    def executable(self, inner: Executable) -> Executable:
        """Returns an Executable that runs on `inner` and records the outcome of each launch in `launches`."""
        return RecordedExecutable(inner, self.launches)

    def restart(self, inner: Callable[[], Executable]) -> Callable[[], Executable]:
        """Returns a function that calls `inner` to replace a lost device, and records the outcome in `restarts`.

        `inner` returns the executable loaded on the new device. The function returns an executable that runs on it and
        records its launches in `launches`. It raises what `inner` raises.
        """

        def load() -> Executable:
            self.restarts.append(False)
            executable = self.executable(inner())
            self.restarts[-1] = "kept" if executable.state_kept else True
            return executable

        return load

    def rng(self, inner: Rng) -> Rng:
        """Returns a random number generator that draws from `inner` and keeps the latest number as `seed`.

        The engine draws a number as the seed of a request without one. RecordedEngine then writes `seed` into the
        journal entry of the request.
        """
        return RecordedRng(inner, self)

    def take_readings(self) -> list[float]:
        """Returns the clock readings since the last call of this method, as a list of seconds.

        The recorder then forgets them.
        """
        readings = self.readings.copy()
        self.readings.clear()
        return readings

    def take_outcomes(self) -> dict[str, Any]:
        """Returns the outcomes of device calls since the last call of this method, as a dict of journal fields.

        The recorder then forgets the outcomes. Each field is a list in order of time:

        - "launches": for each step, None if it succeeded, else its error as text.
        - "restarts": for each attempt to replace the device: False if it failed, "kept" if the new device has the K/V
          cache of the lost one, else True.
        - "losses": the error, as text, of each loss of the device between two steps. The field is missing if there was
          none.
        """
        outcomes: dict[str, Any] = {"launches": self.launches.copy(), "restarts": self.restarts.copy()}
        if self.losses:
            outcomes["losses"] = self.losses.copy()
        for kept in (self.launches, self.restarts, self.losses):
            kept.clear()
        return outcomes


@dataclass(frozen=True)
class RecordedStep:
    """A step that was launched on a device and whose outcome is recorded when its result is read.

    Attributes:
        inner: the launched step.
        launches: list to which result() appends the outcome: None if the step succeeded, else its error as text.
    """

    inner: PendingStep
    launches: list[str | None]

    def done(self) -> bool:
        """True if the step has ended, so that result() returns at once."""
        return self.inner.done()

    def result(self) -> StepResult:
        """Wait for the step and record its outcome. Returns its StepResult, or raises its error."""
        try:
            result = self.inner.result()
        except Exception as e:
            self.launches.append(write_failure(e))
            raise
        self.launches.append(None)
        return result


class RecordedExecutable(Executable):
    """Executable that runs steps on the executable `inner` and appends the outcome of each step to the list `launches`.

    An outcome is None if the step succeeded, else its error as text.
    """

    def __init__(self, inner: Executable, launches: list[str | None]) -> None:
        self.inner, self.launches = inner, launches
        self.program, self.state, self.state_kept = inner.program, inner.state, inner.state_kept
        self.depth = inner.depth

    def launch(self, request: StepRequest) -> PendingStep:
        return RecordedStep(self.inner.launch(request), self.launches)

    def unwrapped(self) -> Executable:
        return self.inner.unwrapped()

    def between_steps(self, call: Callable[[Executable], T]) -> T:
        return self.inner.between_steps(call)

    def close(self) -> None:
        self.inner.close()


class RecordedRng:
    """Random number generator that draws from `inner` and stores the latest number as `recorder.seed`."""

    def __init__(self, inner: Rng, recorder: Recorder) -> None:
        self.inner, self.recorder = inner, recorder

    def getrandbits(self, k: int, /) -> int:
        """Returns a random integer of `k` bits from `inner`, after storing it as `recorder.seed`."""
        self.recorder.seed = self.inner.getrandbits(k)
        return self.recorder.seed


class RecordedEngine(Engine):
    """An Engine that writes a journal, from which replay() can run the same steps again.

    There is one journal entry for the construction and one for each call of add, suspend, resume, step, abort and
    drain. An entry is a dict that can be written as JSON; `journal` is the function that is called with it. If add or
    resume raises RequestError or Refused, the entry has the error's name. A call that raises any other error writes no
    entry.
    """

    def __init__(
        self,
        executable: Executable,
        *,
        journal: Journal,
        clock: Callable[[], float],
        rng: Rng,
        restart: Callable[[], Executable] | None = None,
        **options: Any,
    ) -> None:
        self.journal, self.recorder = journal, (recorder := Recorder())
        super().__init__(
            recorder.executable(executable), clock=recorder.clock(clock), rng=recorder.rng(rng),
            restart=recorder.restart(restart) if restart else None, **options,
        )  # fmt: skip
        self._write("engine", **write_engine(self))

    def add(self, request: Request) -> list[Sequence]:
        try:
            sequences = super().add(request)
        except (RequestError, Refused) as e:
            self._write_add(request, type(e).__name__)
            raise
        self._write_add(request, None)
        return sequences

    def suspend(self, id: str) -> Resumption | None:
        resumption = super().suspend(id)
        self._write("suspend", id=id)
        return resumption

    def resume(self, resumption: Resumption) -> list[Sequence]:
        try:
            sequences = super().resume(resumption)
        except (RequestError, Refused) as e:
            self._write("resume", resumption=resumption.as_dict(), refused=type(e).__name__)
            raise
        self._write("resume", resumption=resumption.as_dict(), refused=None)
        return sequences

    def step(self) -> list[Event]:
        events = super().step()
        outcomes = self.recorder.take_outcomes()
        self._write("step", **outcomes, events=[write_event(e) for e in events])
        return events

    def move_experts(self, now: float) -> None:
        try:
            super().move_experts(now)
        except DeviceLost as e:
            self.recorder.losses.append(write_failure(e))
            raise

    def abort(self, id: str) -> list[Event]:
        events = super().abort(id)
        self._write("abort", id=id, events=[write_event(e) for e in events])
        return events

    def drain(self) -> None:
        super().drain()
        self._write("drain")

    def _write_add(self, request: Request, refused: str | None) -> None:
        seed = self.recorder.seed if request.params.seed is None else request.params.seed
        self._write("add", request=write_request(request, seed), refused=refused)

    def _write(self, do: str, **facts: Any) -> None:
        self.journal({"do": do, "clock": self.recorder.take_readings(), **facts})
