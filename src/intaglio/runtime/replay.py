"""Running a record again: the same requests at the same times, on a device that fails where the record says it failed.

Who reads the record from a file is outside.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from intaglio.batch import Batch
from intaglio.devices import DeviceError, DeviceLost, Executable, StepResult
from intaglio.runtime.engine import Engine
from intaglio.runtime.journal import request_from, told
from intaglio.runtime.request import Refused, Request, RequestError

Entry = Mapping[str, Any]


class JournalError(ValueError):
    """A record that is none, or from another program."""


@dataclass(frozen=True)
class Replayed:
    """What was run again, and the first thing that came out otherwise (None: nothing did)."""

    steps: int
    requests: int
    tokens: int
    faults: int
    divergence: str | None


class Fated:
    """An executable that does its work where the record says it did, and fails where the record says it failed."""

    def __init__(self, load: Callable[[], Executable], fates: deque[str | None]) -> None:
        self.inner = load()
        self.program, self.state, self.fates = self.inner.program, self.inner.state, fates

    def step(
        self, batch: Batch, *, logits: bool = False, taps: Collection[str] = (), timed: bool = False
    ) -> StepResult:
        fate = self.fates.popleft() if self.fates else "this launch is not in the record"
        if fate is None:
            return self.inner.step(batch, logits=logits, taps=taps, timed=timed)
        raise DeviceLost(fate.removeprefix("lost: ")) if fate.startswith("lost: ") else DeviceError(fate)


class NoRng:
    """Recorded requests bring their seeds."""

    def getrandbits(self, k: int, /) -> int:
        raise JournalError("a request without a seed is in the record")


def replay(
    entries: Iterable[Entry], load: Callable[[], Executable], revive: Callable[[Request], Request] = lambda r: r
) -> Replayed:
    """Run a record again on executables like the one it was made on. `revive` gives a request its `stopped` and
    `matcher` back. Raises JournalError if the record does not begin with an engine, or is of another program."""
    player = Player(load, revive)
    for number, entry in enumerate(entries):
        if wrong := player.play(entry):
            where = f"entry {number}, step {player.steps} ({entry['do']}): "
            return player.replayed(where + wrong)
    return player.replayed(None)


class Player:
    """An engine that lives through a record: what the world did to the first one, it does to this one."""

    def __init__(self, load: Callable[[], Executable], revive: Callable[[Request], Request]) -> None:
        self.load, self.revive = load, revive
        self.readings: deque[float] = deque()
        self.fates: deque[str | None] = deque()
        self.restarts: deque[bool] = deque()
        self.engine: Engine | None = None
        self.steps = self.requests = self.tokens = self.faults = 0

    def play(self, entry: Entry) -> str | None:
        """Do what an entry says; what came of it that is not in the record, if anything."""
        self.readings.extend(entry.get("clock", ()))
        self.fates.extend(entry.get("launches", ()))
        self.restarts.extend(entry.get("restarts", ()))
        self.faults += sum(fate is not None for fate in entry.get("launches", ()))
        return self._do(entry) or self._left_over()

    def replayed(self, divergence: str | None) -> Replayed:
        return Replayed(self.steps, self.requests, self.tokens, self.faults, divergence)

    def _do(self, entry: Entry) -> str | None:
        do = entry["do"]
        if do == "engine":
            self.engine = self._begin(entry)
            return None
        if self.engine is None:
            raise JournalError(f"the record begins with {do!r}; it must begin with an engine")
        if do == "add":
            return self._add(self.engine, entry)
        if do == "drain":
            self.engine.drain()
            return None
        self.steps += do == "step"
        events = self.engine.step() if do == "step" else self.engine.abort(entry["id"])
        self.tokens += sum(e.token is not None for e in events)
        return _compare([told(e) for e in events], entry["events"])

    def _begin(self, entry: Entry) -> Engine:
        engine = Engine(
            Fated(self.load, self.fates), clock=self._clock, rng=NoRng(), restart=self._restart, **entry["options"]
        )  # fmt: skip
        here = engine.described()
        for name in ("program", "pages", "page_tokens"):
            if here[name] != entry[name]:
                raise JournalError(f"the record is of {name} {entry[name]}, this is {here[name]}; open the same model")
        return engine

    def _add(self, engine: Engine, entry: Entry) -> str | None:
        self.requests += 1
        request, found = request_from(entry["request"]), None
        try:
            engine.add(self.revive(request))
        except (RequestError, Refused) as e:
            found = type(e).__name__
        return None if found == entry["refused"] else f"{request.id} was {_as(entry['refused'])}, now {_as(found)}"

    def _clock(self) -> float:
        if not self.readings:  # asked more often than then: _left_over() or the events will tell
            return 0.0
        return self.readings.popleft()

    def _restart(self) -> Executable:
        if not self.restarts or not self.restarts.popleft():
            raise DeviceError("no other device was to be had")
        return Fated(self.load, self.fates)

    def _left_over(self) -> str | None:
        left = {
            "clock readings": len(self.readings),
            "launches": len(self.fates),
            "restarts": len(self.restarts),
        }
        more = [f"{n} {what}" for what, n in left.items() if n]
        return f"the record has {', '.join(more)} more" if more else None


def _as(refused: str | None) -> str:
    return f"refused with {refused}" if refused else "admitted"


def _compare(now: list[list[Any]], then: list[list[Any]]) -> str | None:
    for a, b in zip(now, then, strict=False):
        if a != b:
            return f"request {b[0]} choice {b[1]} got token {b[2]}, end {b[3]}; now request {a[0]} gets {a[2]}, {a[3]}"
    return None if len(now) == len(then) else f"{len(then)} events are in the record, now there are {len(now)}"
