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

    That is so if its first entry does not describe the engine, it was recorded on another Program or pool size, or a
    request in it lacks a seed.
    """


@dataclass(frozen=True)
class Replayed:
    """Outcome of a replay.

    Attributes:
        steps: number of steps run.
        requests: number of requests added or resumed, refused ones included.
        tokens: number of tokens generated.
        faults: number of launches that the journal records as failed.
        divergence: the first difference from the journal, as text; None if there is none.
    """

    steps: int
    requests: int
    tokens: int
    faults: int
    divergence: str | None


class ReplayedExecutable(Executable):
    """Executable for a replay: runs each step on `inner`, or raises the failure that the journal records for the step.

    A step runs when its result is read.

    Args:
        inner: the executable that computes.
        launches: the recorded outcomes in order: the failure as text, or None. They are removed as steps run.
        depth: number of steps that may be under way at once.
        state_kept: True if this executable replaces one that was lost, and the K/V cache of the lost one was kept.
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
    outcome of that list: if the recorded step succeeded, this one runs; if it failed, the recorded error is raised.
    """

    executable: ReplayedExecutable
    request: StepRequest

    def done(self) -> bool:
        """Always False: the step runs only when its result is read."""
        return False

    def result(self) -> StepResult:
        """Run the step and return its result, or raise the recorded failure."""
        launches = self.executable.launches
        failure = launches.popleft() if launches else "this launch is not in the journal"
        if failure is not None:
            raise read_failure(failure)
        return self.executable.inner.step(self.request)


class ReplayedEngine(Engine):
    """An Engine for a replay. It moves no experts.

    Where the journal has a loss of the device between two steps, the engine loses its device too.

    losses: the recorded errors of these losses, as text, in order. Each is raised in turn and removed.
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
    """Replaces the engine's random source: recorded requests carry their seeds, so drawing a number is an error."""

    def getrandbits(self, k: int, /) -> int:
        """Always raise JournalError: a recorded request must have a seed."""
        raise JournalError("the journal has a request without a seed")


def replay(
    entries: Iterable[Entry], load: Callable[[], Executable], revive: Callable[[Request], Request] = lambda r: r
) -> Replayed:
    """Run a journal again on executables from `load()`, stopping at the first difference. Returns the Replayed.

    Args:
        entries: the journal's entries, in order.
        load: makes an executable.
        revive: function from a recorded Request to one with its `stop_checker` and `matcher` made again.

    Raises JournalError if the first entry does not describe the engine, a request has no seed, or the journal was
    recorded on another Program or pool size.
    """
    player = Player(load, revive)
    for number, entry in enumerate(entries):
        if difference := player.play(entry):
            where = f"entry {number}, step {player.steps} ({entry['do']}): "
            return player.replayed(where + difference)
    return player.replayed(None)


class Player:
    """Applies journal entries to a new engine, which is given the recorded clock readings, launches and restarts."""

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
        """Apply one journal entry to the engine, and compare what the engine does with what the entry records.

        Returns None if both agree, else a text that says what differs. Raises JournalError if the first entry does not
        describe the engine, a request has no seed, or the journal was recorded on another Program or pool size.
        """
        self.readings.extend(entry.get("clock", ()))
        self.launches.extend(entry.get("launches", ()))
        self.restarts.extend(entry.get("restarts", ()))
        self.losses.extend(entry.get("losses", ()))
        self.faults += sum(failure is not None for failure in entry.get("launches", ()))
        return self._do(entry) or self._left_over()

    def replayed(self, divergence: str | None) -> Replayed:
        """The Replayed (counts) so far, with `divergence` as its first difference."""
        return Replayed(self.steps, self.requests, self.tokens, self.faults, divergence)

    def clock(self) -> float:
        """The next recorded clock reading in seconds; 0 if none is left (the replay then differs from the journal)."""
        return self.readings.popleft() if self.readings else 0.0

    def restart(self) -> Executable:
        """The executable that replaces a lost one.

        It keeps the K/V cache if the journal says that the new device had it. Otherwise it is loaded anew, with an
        empty cache. The engine calls this when the replay raises a recorded loss.
        Raises DeviceError if the recorded restart failed, or if the journal records no further restart.
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
        """Add or resume a request, by calling `admit`.

        Returns None if it is admitted or refused as in the journal, else a sentence (str) that says both outcomes.

        entry: the journal's entry. id: the request's id, for the sentence.
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
        """A sentence (str) that counts the recorded inputs which the engine did not read; None if none is left."""
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
    """Text of the first difference between the replay's events (`now`) and the journal's (`then`); None if equal."""
    for a, b in zip(now, then, strict=False):
        if a != b:
            recorded, replayed = ("request {}, choice {}, token {}, end {}".format(*event) for event in (b, a))
            return f"recorded: {recorded}; replayed: {replayed}"
    return None if len(now) == len(then) else f"{len(then)} events recorded, {len(now)} replayed"
