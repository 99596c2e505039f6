"""The engine's thread, which alone touches the engine, and the typed messages between it and the event loop.

Requests and cancellations go in through an inbox that is read before every step; what a step gave comes out in one call
on the event loop. Neither side ever waits for the other. What came of a step is handed over when the next one is on the
device, which needs no interpreter: the event loop writes it out meanwhile, and does not hold up the next step.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from functools import partial

from intaglio.llm import Transcript
from intaglio.runtime import (
    Counts,
    Engine,
    Event,
    Fault,
    Gauges,
    Refused,
    Request,
    RequestError,
    Scored,
    StepRecord,
    Usage,
)
from intaglio.runtime.request import FinishReason

log = logging.getLogger("intaglio.server")
STEPS_KEPT = 1024  # of the timeline
OVER = "the engine has ended and admits nothing"


@dataclass(frozen=True)
class Job:
    """One prompt: what the engine is asked, and where the text of each choice will be."""

    request: Request
    transcripts: list[Transcript]


@dataclass(frozen=True)
class Piece:
    """What an event says, with the text it settles. `choice` counts over all jobs of a ticket."""

    choice: int
    text: str
    scored: Scored | None = None
    finish_reason: FinishReason | None = None
    fault: Fault | None = None
    usage: Usage | None = None
    prompt: tuple[Scored, ...] | None = None


@dataclass(frozen=True)
class Submit:
    ticket: Ticket


@dataclass(frozen=True)
class Cancel:
    ticket: Ticket


@dataclass(frozen=True)
class Drain:
    """Admit nothing more."""


@dataclass(frozen=True)
class Halt:
    """End everything now, and the thread."""


Message = Submit | Cancel | Drain | Halt


@dataclass(frozen=True)
class Admitted:
    pass


Answer = tuple["Ticket", Admitted | Exception | Piece]


@dataclass
class Running:
    """A request in the engine: whose it is, its first choice there, and which have not ended."""

    ticket: Ticket
    first: int
    left: set[int]


class Ticket:
    """The jobs of one HTTP request, admitted together or not at all. Belongs to the event loop, but for `jobs`."""

    def __init__(self, jobs: list[Job]) -> None:
        self.jobs = jobs
        self.n = jobs[0].request.params.n
        self.open = len(jobs) * self.n  # choices that have not ended
        self.admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.usages: list[Usage | None] = [None] * self.open
        self._pieces: deque[Piece] = deque()
        self._news = asyncio.Event()

    def put(self, what: Admitted | Exception | Piece) -> None:
        if isinstance(what, Piece):
            self._pieces.append(what)
            self.usages[what.choice] = what.usage or self.usages[what.choice]
            self.open -= what.finish_reason is not None
            self._news.set()
        elif not self.admitted.done():  # else who waited for it has gone
            if isinstance(what, Exception):
                self.admitted.set_exception(what)
            else:
                self.admitted.set_result(None)

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """All there is, as often as there is any, to the end of every choice."""
        while self.open or self._pieces:
            await self._news.wait()
            self._news.clear()
            news = list(self._pieces)
            self._pieces.clear()
            yield news


@dataclass(frozen=True)
class Snapshot:
    """How the engine stood after its last step, or last message. `beat` is when the thread last showed life."""

    gauges: Gauges
    counts: Counts
    beat: float
    idle: bool


class Driver:
    """Runs an engine in a thread of its own. `ended` is set when the thread is over; `crash` says why, if it should
    not be. `watch` is told, on the event loop, the pieces of each step."""

    def __init__(self, engine: Engine, watch: Callable[[list[Answer], StepRecord | None], None]) -> None:
        self.engine, self.watch = engine, watch
        self.crash: BaseException | None = None
        self.steps: deque[StepRecord] = deque(maxlen=STEPS_KEPT)
        self.ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._running: dict[str, Running] = {}  # by request id
        self._answers: list[Answer] = []
        self._launched = False  # in the step under way
        self._halted = False
        engine.launching = self._launching
        self.snapshot = self._look()
        # A daemon: a device that never comes back must not keep a process that was told twice to end.
        self._threads = [
            threading.Thread(target=run, name=name, daemon=True)
            for name, run in (("engine", self._run), ("herald", self._tell))
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def send(self, message: Message) -> None:
        self._inbox.put(message)

    @contextmanager
    def submitted(self, jobs: list[Job]) -> Iterator[Ticket]:
        """Ask for these jobs; whatever is left of them when the block ends is cancelled."""
        if self.ended.is_set():
            raise Refused("failed", OVER, None)
        ticket = Ticket(jobs)
        self.send(Submit(ticket))
        try:
            yield ticket
        finally:
            ticket.admitted.cancel()
            if ticket.open:
                self.send(Cancel(ticket))

    # In the thread

    def _run(self) -> None:
        try:
            while not self._halted:
                self._read_inbox()
                if not self.engine.idle and not self._halted:
                    self._step()
                self._publish()
        except BaseException as e:
            log.critical("the engine's thread crashed", exc_info=e)
            self.crash = e
            fault = Fault("worker", f"the engine crashed: {type(e).__name__}: {e}")
            ends = [(r.ticket, r.first + i) for r in self._running.values() for i in sorted(r.left)]
            self._answers = [(ticket, Piece(i, "", finish_reason="error", fault=fault)) for ticket, i in ends]
            self._hand_over()
        finally:
            self._call(self._over)
            self._outbox.put(None)

    def _read_inbox(self) -> None:
        """Take all that has come; when there is nothing else to do, wait for it."""
        block = self.engine.idle
        while True:
            try:
                message = self._inbox.get(block)
            except queue.Empty:
                return
            block = False
            match message:
                case Submit(ticket):
                    self._submit(ticket)
                case Cancel(ticket):
                    self._abort(ticket)
                case Drain():
                    self.engine.drain()
                case Halt():
                    self._halted = True
                    for ticket in [r.ticket for r in self._running.values()]:
                        self._abort(ticket)
                    return

    def _submit(self, ticket: Ticket) -> None:
        try:
            for i, job in enumerate(ticket.jobs):
                self.engine.add(job.request)
                self._running[job.request.id] = Running(ticket, i * ticket.n, set(range(ticket.n)))
        except (Refused, RequestError) as e:
            for id in [id for id, r in self._running.items() if r.ticket is ticket]:
                del self._running[id]
                self.engine.abort(id)
            self._answers.append((ticket, e))
        else:
            self._answers.append((ticket, Admitted()))

    def _abort(self, ticket: Ticket) -> None:
        for job in ticket.jobs:
            if job.request.id in self._running:
                self._take(self.engine.abort(job.request.id))

    def _step(self) -> None:
        before = self.engine.counts.steps
        self._launched = False
        self._take(self.engine.step())
        if self.engine.counts.steps > before and self.engine.last:
            self.steps.append(self.engine.last)

    def _take(self, events: list[Event]) -> None:
        for e in events:
            running, ended = self._running[e.request], e.finish_reason is not None
            ticket, choice = running.ticket, running.first + e.index
            transcript = ticket.jobs[running.first // ticket.n].transcripts[e.index]
            if ended:
                transcript.finish()
                running.left.discard(e.index)
                if not running.left:
                    del self._running[e.request]
            text = transcript.settled(ended)
            self._answers.append((ticket, Piece(choice, text, e.scored, e.finish_reason, e.fault, e.usage, e.prompt)))

    def _look(self) -> Snapshot:
        c = self.engine.counts
        counts = replace(c, refused=copy(c.refused), finished=copy(c.finished), faults=copy(c.faults))
        return Snapshot(self.engine.gauges(), counts, time.monotonic(), self.engine.idle)

    def _publish(self) -> None:
        self.snapshot = self._look()
        if self._answers and (self.engine.idle or not self._launched):  # else the next launch is near
            self._hand_over()

    def _launching(self) -> None:
        self._launched = True
        if self._answers:
            self._hand_over()

    def _hand_over(self) -> None:
        answers, self._answers = self._answers, []
        self._call(self._deliver, answers, self.steps[-1] if self.steps else None)

    def _call(self, what: Callable[..., None], *arguments: object) -> None:
        self._outbox.put(partial(what, *arguments))

    # In a thread of its own: to wake the event loop is to lose the interpreter to it; to put something in a queue is
    # not, so that the engine's thread goes on to launch

    def _tell(self) -> None:
        while what := self._outbox.get():
            try:
                self._loop.call_soon_threadsafe(what)
            except RuntimeError:  # the loop is closed: nobody is left to be told
                self._halted = True
                return

    # On the event loop

    def _over(self) -> None:
        """The thread has ended: refuse what it did not come to read."""
        self.ended.set()
        while not self._inbox.empty():
            if isinstance(message := self._inbox.get(), Submit):
                message.ticket.put(Refused("failed", OVER, None))

    def _deliver(self, answers: list[Answer], step: StepRecord | None) -> None:
        for ticket, what in answers:
            ticket.put(what)
        self.watch(answers, step)
