"""Replay of a journal: the same requests, clock readings and device failures, up to the first event that differs.

The caller reads the entries from a file.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from intaglio.devices import DeviceError, Executable, PendingStep, StepRequest, StepResult
from intaglio.runtime.engine import Engine
from intaglio.runtime.record.journal import Entry, read_failure, write_engine, write_event
from intaglio.runtime.request import Refused, Request, RequestError
from intaglio.runtime.request_fields import read_request
from intaglio.runtime.resumption import Resumption


class JournalError(ValueError):
    """Raised for a journal that cannot be replayed.

    There are three reasons: its first entry does not describe the engine; it was recorded with another Program or
    another K/V cache size; or a request in it has no seed.
    """


@dataclass(frozen=True)
class Replayed:
    """Result of a replay.

    Attributes:
        steps: number of steps run.
        requests: number of requests that were added or resumed, including refused requests.
        tokens: number of tokens generated.
        faults: number of launches that had failed according to the journal.
        divergence: text that describes the first difference from the journal; None if there is none.
    """

    steps: int
    requests: int
    tokens: int
    faults: int
    divergence: str | None


class ReplayedExecutable(Executable):
    """Executable for a replay. It runs each step on `inner`, or raises the error that the journal records for the step.

    A step runs when its result is read.

    Args:
        inner: the executable that computes.
        launches: recorded outcomes of the steps, in order: None for success, else the error as text. Each is removed
            when its step runs.
        depth: number of steps that may be under way at once.
        state_kept: True if this executable replaces a lost one and has the K/V cache of the lost one.
    """

    def __init__(
        self, inner: Executable, launches: deque[str | None], depth: int = 1, state_kept: bool = False
    ) -> None:
        self.inner, self.depth, self.state_kept, self.launches = inner, depth, state_kept, launches
        self.program, self.state = inner.program, inner.state

    def launch(self, request: StepRequest) -> PendingStep:
        return ReplayedStep(self, request)


@dataclass(frozen=True)
class ReplayedStep:
    """A launched step of a replay. It runs when its result is read, not when it is launched.

    The journal lists the outcomes of steps in the order in which their results were read. So result() takes the next
    outcome from that list. If the outcome is a success, the step runs; if it is an error, the error is raised.
    """

    executable: ReplayedExecutable
    request: StepRequest

    def done(self) -> bool:
        """Always returns False, because the step runs only when its result is read."""
        return False

    def result(self) -> StepResult:
        """Run the step and return its StepResult, or raise the error that the journal records for it."""
        launches = self.executable.launches
        failure = launches.popleft() if launches else "this launch is not in the journal"
        if failure is not None:
            raise read_failure(failure)
        return self.executable.inner.step(self.request)


class ReplayedEngine(Engine):
    """An Engine for a replay. It moves no experts.

    If the journal records that the device was lost between two steps, this engine loses its device at the same place.

    losses: the recorded errors of these losses as text, in order. Each is removed when it is raised.
    """

    def __init__(self, executable: Executable, losses: deque[str], **options: Any) -> None:
        self.losses = losses
        super().__init__(executable, **options)

    def move_experts(self, now: float) -> None:
        def lose(_: Executable) -> None:
            raise read_failure(self.losses.popleft())

        if self.losses:
            self.launcher.between_steps(lose)


class RecordedSeeds:
    """Random source of an engine in a replay. It only raises errors, because recorded requests have their own seeds."""

    def getrandbits(self, k: int, /) -> int:
        """Always raises JournalError, because a recorded request must have a seed."""
        raise JournalError("the journal has a request without a seed")


def replay(
    entries: Iterable[Entry], load: Callable[[], Executable], revive: Callable[[Request], Request] = lambda r: r
) -> Replayed:
    """Run the calls of a journal again and compare the events.

    Returns a Replayed, which has the first difference if any. The replay ends at the first difference.

    Args:
        entries: the journal's entries, in order.
        load: function that returns an executable for the engine; called again after the loss of a device.
        revive: function that returns a recorded Request with new `stop_checker` and `matcher`, which a journal cannot
            hold.

    Raises JournalError if the journal cannot be replayed: its first entry does not describe the engine, a request has
    no seed, or it was recorded with another Program or another K/V cache size.
    """
    player = Player(load, revive)
    for number, entry in enumerate(entries):
        if difference := player.play(entry):
            where = f"entry {number}, step {player.steps} ({entry['do']}): "
            return player.replayed(where + difference)
    return player.replayed(None)


class Player:
    """Repeats the calls of a journal on a new engine, which reads the recorded clock, launch outcomes and restarts."""

    def __init__(self, load: Callable[[], Executable], revive: Callable[[Request], Request]) -> None:
        self.load, self.revive = load, revive
        self.readings: deque[float] = deque()
        self.launches: deque[str | None] = deque()
        self.restarts: deque[bool | str] = deque()
        self.losses: deque[str] = deque()
        self.engine: Engine | None = None
        self.depth = 1
        self.steps = self.requests = self.tokens = self.faults = 0

    def play(self, entry: Entry) -> str | None:
        """Repeat the call of one journal entry on the engine. Returns None if the engine does what the entry records.

        Otherwise returns a text that says what differs. Raises JournalError if the first entry does not describe the
        engine, if a request has no seed, or if the journal was recorded with another Program or another K/V cache size.
        """
        self.readings.extend(entry.get("clock", ()))
        self.launches.extend(entry.get("launches", ()))
        self.restarts.extend(entry.get("restarts", ()))
        self.losses.extend(entry.get("losses", ()))
        self.faults += sum(failure is not None for failure in entry.get("launches", ()))
        return self._do(entry) or self._left_over()

    def replayed(self, divergence: str | None) -> Replayed:
        """Returns the Replayed: the counts so far, and `divergence` as the first difference from the journal."""
        return Replayed(self.steps, self.requests, self.tokens, self.faults, divergence)

    def clock(self) -> float:
        """Returns the next recorded clock reading, in seconds.

        Returns 0 if none is left; the replay then differs from the journal.
        """
        return self.readings.popleft() if self.readings else 0.0

    def restart(self) -> Executable:
        """Returns an executable that replaces the lost one.

        The engine calls this when a recorded loss of the device is raised. If the journal says that the new device had
        the K/V cache of the lost one, the executable keeps the cache. Otherwise it is loaded anew, with an empty cache.
        Raises DeviceError if the recorded attempt failed, or if the journal records no further attempt.
        """
        outcome = self.restarts.popleft() if self.restarts else False
        if not outcome:
            raise DeviceError("the recorded restart failed")
        if outcome == "kept":
            assert self.engine and isinstance(self.engine.executable, ReplayedExecutable)
            return ReplayedExecutable(self.engine.executable.inner, self.launches, self.depth, state_kept=True)
        return ReplayedExecutable(self.load(), self.launches, self.depth)

    def _do(self, entry: Entry) -> str | None:
        do = entry["do"]
        if do == "engine":
            self.engine = self._begin(entry)
            return None
        if self.engine is None:
            raise JournalError(f"the journal begins with {do!r}; it must begin with an engine")
        if do == "add":
            request = read_request(entry["request"])
            return self._admit(entry, request.id, lambda engine: engine.add(self.revive(request)))
        if do == "suspend":
            self.engine.suspend(entry["id"])
            return None
        if do == "resume":
            read = Resumption.from_dict(entry["resumption"])
            here = replace(read, numerics=self.engine.numerics)  # a journal may be replayed on another device
            return self._admit(
                entry, read.request.id, lambda engine: engine.resume(replace(here, request=self.revive(read.request)))
            )
        if do == "drain":
            self.engine.drain()
            return None
        self.steps += do == "step"
        events = self.engine.step() if do == "step" else self.engine.abort(entry["id"])
        self.tokens += sum(e.token is not None for e in events)
        return _difference([write_event(e) for e in events], entry["events"])

    def _begin(self, entry: Entry) -> Engine:
        self.depth = entry.get("depth", 1)
        executable = ReplayedExecutable(self.load(), self.launches, self.depth)
        options = {"checkpoint_blocks": 0, **entry["options"]}  # old journals have none
        engine = ReplayedEngine(
            executable, self.losses, clock=self.clock, rng=RecordedSeeds(), restart=self.restart, **options
        )
        here = write_engine(engine)
        for name in ("program", "pages", "page_tokens", "slots"):
            if here[name] != entry.get(name, 0):
                raise JournalError(
                    f"the journal was recorded with {name} {entry.get(name, 0)}, this engine has {here[name]}; "
                    "open the same model"
                )
        return engine

    def _admit(self, entry: Entry, id: str, admit: Callable[[Engine], object]) -> str | None:
        """Add or resume a request by calling `admit`. Returns None if it is admitted or refused as the journal records.

        Otherwise returns a sentence that states the outcome now and the outcome in the journal.

        Args:
            entry: the journal's entry.
            id: the request's id, for the sentence.
            admit: function that adds or resumes the request on an engine.
        """
        assert self.engine
        self.requests += 1
        refused = None
        try:
            admit(self.engine)
        except (RequestError, Refused) as e:
            refused = type(e).__name__
        if refused == entry["refused"]:
            return None
        return f"{id} was {_admission(entry['refused'])}, now {_admission(refused)}"

    def _left_over(self) -> str | None:
        """Returns an error message if the engine has not read all recorded inputs, else None.

        The message gives the number of unread inputs of each kind, such as clock readings.
        """
        left = {
            "clock readings": len(self.readings),
            "launches": len(self.launches),
            "restarts": len(self.restarts),
            "losses": len(self.losses),
        }
        more = [f"{n} {what}" for what, n in left.items() if n]
        return f"the journal has {', '.join(more)} more" if more else None


def _admission(refused: str | None) -> str:
    return f"refused with {refused}" if refused else "admitted"


def _difference(now: list[list[Any]], then: list[list[Any]]) -> str | None:
    """Returns a text that describes the first difference between two lists of events; None if they are equal.

    If one list is the beginning of the other, the text gives their lengths.

    now: events of the replay. then: events in the journal. Both are as write_event() returns them.
    """
    for a, b in zip(now, then, strict=False):
        if a != b:
            recorded, replayed = ("request {}, choice {}, token {}, end {}".format(*event) for event in (b, a))
            return f"recorded: {recorded}; replayed: {replayed}"
    return None if len(now) == len(then) else f"{len(then)} events recorded, {len(now)} replayed"
