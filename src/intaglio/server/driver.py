"""Driver: runs an engine in its own thread and exchanges typed messages with the event loop.

Only this thread calls the engine. It reads submissions and cancellations from an inbox before every step, and delivers
updates in one callback on the event loop. Neither side blocks on the other. The updates of a step are delivered when
the next step has been launched: the device does not need the GIL, so the event loop can write responses without
delaying the engine.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from intaglio.devices.expert_load import ExpertLoad
from intaglio.models import Transcript
from intaglio.runtime import (
    Counts,
    Engine,
    Event,
    Fault,
    Gauges,
    Refused,
    Request,
    RequestError,
    Resumption,
    Scored,
    StepRecord,
    SuspendedChoice,
    Usage,
)
from intaglio.runtime.request import FinishReason

log = logging.getLogger("intaglio.server")
STEP_RECORDS_KEPT = 1024
ENDED = "the engine has ended and admits no requests"


@dataclass(frozen=True)
class Prepared:
    """One prompt, ready for the engine: its Request, and for each choice the Transcript that decodes the output."""

    request: Request
    transcripts: list[Transcript]


@dataclass(frozen=True)
class ChoiceDelta:
    """One engine event for one choice, with the output text that has become final since the previous event.

    Attributes:
        choice: index of the choice, counted over all prompts of the submission.
        text: the new text; "" if no text has become final.
        scored: the generated token with its log-probabilities; None if the event has no token.
        finish_reason: why the choice ended; None while it runs.
        fault: the error if finish_reason is "error"; else None.
        usage: token counts and times of the choice; None before the choice ends.
        prompt: if requested, log-probabilities of the prompt's tokens from the second on, in one event; else None.
        stop_reason: the stop string, or the id from stop_token_ids, that ended the choice; else None.
    """

    choice: int
    text: str
    scored: Scored | None = None
    finish_reason: FinishReason | None = None
    fault: Fault | None = None
    usage: Usage | None = None
    prompt: tuple[Scored, ...] | None = None
    stop_reason: str | int | None = None


@dataclass(frozen=True)
class Submit:
    """Message to the engine's thread: add a submission to the engine."""

    submission: Submission


@dataclass(frozen=True)
class Cancel:
    """Message to the engine's thread: abort the unfinished requests of a submission."""

    submission: Submission


@dataclass(frozen=True)
class Drain:
    """Message to the engine's thread: admit no more requests."""


@dataclass(frozen=True)
class Halt:
    """Message to the engine's thread: abort all requests and end the thread."""


@dataclass(frozen=True)
class Inspect:
    """Message to the engine's thread: call `function(engine)` and set the future `result` to its value or exception."""

    function: Callable[[Engine], Any]
    result: asyncio.Future[Any]

    @classmethod
    async def ask(cls, driver: Driver, function: Callable[[Engine], Any]) -> Any:
        """Call `function(engine)` in the engine's thread and return its result.

        Raises Refused if the engine has ended, and any exception that the function raises.
        """
        if driver.ended.is_set():
            raise Refused("failed", ENDED, None)
        message = cls(function, asyncio.get_running_loop().create_future())
        driver.send(message)
        return await message.result


Message = Submit | Cancel | Drain | Halt | Inspect


@dataclass(frozen=True)
class Admitted:
    """Update for the event loop: the engine has taken all prompts of a submission into its queue."""


Update = tuple["Submission", Admitted | Exception | ChoiceDelta]


@dataclass
class ActiveRequest:
    """A request that the engine is working on: one prompt of a submission.

    Attributes:
        submission: the prompts of the HTTP request to which this prompt belongs.
        first_choice: index of this request's choice 0 among all choices of the submission.
        open_choices: indices, within this request (0 to n - 1), of the choices that have not ended.
    """

    submission: Submission
    first_choice: int
    open_choices: set[int]


class Submission:
    """The prompts of one HTTP request, and a queue of the output that the engine generates for them.

    The queue holds ChoiceDeltas. The engine admits all prompts or none. Used on the event loop; the engine's thread
    only reads `prompts`, `n`, `earlier`.

    earlier: output that another engine has already generated for this request; this engine continues after it.
    """

    def __init__(self, prompts: list[Prepared], earlier: Sequence[ChoiceDelta] = ()) -> None:
        self.prompts, self.earlier = prompts, earlier
        self.n = prompts[0].request.params.n
        self.admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.usages: list[Usage | None] = [None for _ in range(len(prompts) * self.n)]
        for delta in earlier:
            self.usages[delta.choice] = delta.usage or self.usages[delta.choice]
        self.open = len(self.usages) - sum(d.finish_reason is not None for d in earlier)  # choices not ended
        self._deltas: deque[ChoiceDelta] = deque()
        self._arrived = asyncio.Event()

    def put(self, update: Admitted | Exception | ChoiceDelta) -> None:
        """Add one update from the engine's thread. Call it on the event loop.

        A ChoiceDelta is queued for deltas(). Admitted, or the exception of a refusal, becomes the outcome of
        `admitted`.
        """
        if isinstance(update, ChoiceDelta):
            self._deltas.append(update)
            self.usages[update.choice] = update.usage or self.usages[update.choice]
            self.open -= update.finish_reason is not None
            self._arrived.set()
        elif not self.admitted.done():  # it is cancelled if the client has disconnected
            if isinstance(update, Exception):
                self.admitted.set_exception(update)
            else:
                self.admitted.set_result(None)

    def unfinished(self, prompt: int) -> list[SuspendedChoice]:
        """Returns a list of the choices of one prompt that still need output; [] if none does.

        Each is a SuspendedChoice. If another engine began the output, choices that ended there are left out, and each
        SuspendedChoice holds the tokens that the other engine generated for it. prompt: index of the prompt in the
        submission, from 0.
        """
        first = prompt * self.n
        mine = [[d for d in self.earlier if d.choice == first + i] for i in range(self.n)]
        return [
            SuspendedChoice(
                i, tuple(d.scored.token for d in ds if d.scored), tuple(d.scored.logprob for d in ds if d.scored)
            )
            for i, ds in enumerate(mine)
            if not any(d.finish_reason for d in ds)
        ]

    def check_text(self, prompt: int, choices: Sequence[SuspendedChoice]) -> None:
        """Raise RequestError if a choice's text differs from the text that the client already has. Returns nothing.

        Another engine has sent the text of the first tokens (`self.earlier`). This engine has decoded the same tokens
        again.
        prompt: index of the prompt in the submission, from 0. choices: the prompt's choices to check.
        """
        for choice in choices:
            sent = "".join(d.text for d in self.earlier if d.choice == prompt * self.n + choice.index)
            text = self.prompts[prompt].transcripts[choice.index].settled(False)
            if text != sent:
                raise RequestError(
                    f"choice {choice.index} cannot be continued: its text is {text!r}, sent was {sent!r}"
                )

    async def deltas(self) -> AsyncIterator[list[ChoiceDelta]]:
        """Async iterator that yields lists of newly arrived ChoiceDeltas, until all choices have ended."""
        while self.open or self._deltas:
            await self._arrived.wait()
            self._arrived.clear()
            deltas = list(self._deltas)
            self._deltas.clear()
            yield deltas


@dataclass(frozen=True)
class Snapshot:
    """State of an engine after its last step or message.

    Attributes:
        gauges: the engine's gauges.
        counts: the engine's counters.
        beat: time.monotonic() at the snapshot. If this was long ago and the engine is not idle, a step hangs.
        idle: True if the engine has no work.
        active: number of requests in the engine.
        experts: load of the experts of each mixture-of-experts layer. The key is the name of the layer's op `experts`.
        expert_moves: how many times the experts of a layer have been moved between ranks.
        expert_failure: the reason why experts cannot be moved; "" if they can.
    """

    gauges: Gauges
    counts: Counts
    beat: float
    idle: bool
    active: int
    experts: Mapping[str, ExpertLoad] = field(default_factory=dict)
    expert_moves: int = 0
    expert_failure: str = ""


class Driver:
    """Runs an engine in its own thread and exchanges messages with the event loop.

    Attributes:
        engine: the engine.
        watch: function that is called on the event loop with the new updates and the latest step's record; the record
            is None before the first step.
        crash: the exception that ended the engine's thread; None if there was none.
        ended: asyncio event that is set when the thread has ended.
        snapshot: the engine's state after its last step or message.
    """

    def __init__(self, engine: Engine, watch: Callable[[list[Update], StepRecord | None], None]) -> None:
        self.engine, self.watch = engine, watch
        self.crash: BaseException | None = None
        self.steps: deque[StepRecord] = deque(maxlen=STEP_RECORDS_KEPT)
        self.ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._active: dict[str, ActiveRequest] = {}  # by request id
        self._updates: list[Update] = []
        self._launched = False  # whether the current step has been launched
        self._halted = False
        engine.launcher.before_launch = self._before_launch
        self.snapshot = self._take_snapshot()
        # Daemons: a device that hangs must not keep the process from ending.
        self._threads = [
            threading.Thread(target=run, name=name, daemon=True)
            for name, run in (("engine", self._run), ("updates", self._forward_updates))
        ]

    def start(self) -> None:
        """Start the engine's thread and the thread that forwards its updates to the event loop."""
        for thread in self._threads:
            thread.start()

    def send(self, message: Message) -> None:
        """Queue a message for the engine's thread."""
        self._inbox.put(message)

    @contextmanager
    def submitted(self, prompts: list[Prepared], earlier: Sequence[ChoiceDelta] = ()) -> Iterator[Submission]:
        """Context manager that submits prompts to the engine and yields their Submission.

        On exit it cancels the choices that have not ended. Raises Refused if the engine has ended. earlier: see
        Submission.
        """
        if self.ended.is_set():
            raise Refused("failed", ENDED, None)
        submission = Submission(prompts, earlier)
        self.send(Submit(submission))
        try:
            yield submission
        finally:
            submission.admitted.cancel()
            if submission.open:
                self.send(Cancel(submission))

    # In the engine's thread

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
            ends = [(a.submission, a.first_choice + i) for a in self._active.values() for i in sorted(a.open_choices)]
            self._updates += [(s, ChoiceDelta(i, "", finish_reason="error", fault=fault)) for s, i in ends]
            self._hand_over()
        finally:
            self._call(self._end)
            self._outbox.put(None)

    def _read_inbox(self) -> None:
        """Handle all messages in the inbox. If the engine has no work, block until the first message."""
        block = self.engine.idle
        while True:
            try:
                message = self._inbox.get(block)
            except queue.Empty:
                return
            block = False
            match message:
                case Submit(submission):
                    self._submit(submission)
                case Cancel(submission):
                    self._abort(submission)
                case Inspect():
                    self._inspect(message)
                case Drain():
                    self.engine.drain()
                case Halt():
                    self._halted = True
                    for submission in [a.submission for a in self._active.values()]:
                        self._abort(submission)
                    return

    def _inspect(self, message: Inspect) -> None:
        try:
            value = message.function(self.engine)
        except Exception as e:
            self._call(_settle, message.result, None, e)
        else:
            self._call(_settle, message.result, value, None)

    def _submit(self, submission: Submission) -> None:
        """Add all prompts of a submission to the engine, or none if the engine refuses one of them. Returns nothing.

        The outcome, Admitted or the error, is queued as an update for the event loop. If another engine began the
        output, a prompt is not added if all its choices ended on that engine.
        """
        n = submission.n
        try:
            for i, prompt in enumerate(submission.prompts):
                if not (choices := submission.unfinished(i)):
                    continue
                self._add(prompt.request, choices)
                self._active[prompt.request.id] = ActiveRequest(submission, i * n, {c.index for c in choices})
                submission.check_text(i, choices)
        except (Refused, RequestError) as e:
            for id in [id for id, a in self._active.items() if a.submission is submission]:
                del self._active[id]
                self.engine.abort(id)
            self._updates.append((submission, e))
        else:
            self._updates.append((submission, Admitted()))

    def _add(self, request: Request, choices: list[SuspendedChoice]) -> None:
        """Add a request to the engine's queue. Returns nothing.

        choices: the choices that still need output, with the tokens that another engine has generated for them. If
        there are such tokens or ended choices, the request is added as a Resumption, which continues after the tokens.
        """
        if len(choices) == request.params.n and not any(c.output for c in choices):
            self.engine.add(request)
        else:
            self.engine.resume(Resumption(request, tuple(choices), self.engine.scope.program, self.engine.numerics))

    def _abort(self, submission: Submission) -> None:
        for prompt in submission.prompts:
            if prompt.request.id in self._active:
                self._add_updates(self.engine.abort(prompt.request.id))

    def _step(self) -> None:
        before = self.engine.counts.steps
        self._launched = False
        self._add_updates(self.engine.step())
        if self.engine.counts.steps > before and self.engine.last_step:
            self.steps.append(self.engine.last_step)

    def _add_updates(self, events: list[Event]) -> None:
        """Append one ChoiceDelta per engine event to the pending updates, with the text that the event made final."""
        for e in events:
            active, ended = self._active[e.request], e.finish_reason is not None
            submission, choice = active.submission, active.first_choice + e.index
            transcript = submission.prompts[active.first_choice // submission.n].transcripts[e.index]
            if ended:
                transcript.finish()
                active.open_choices.discard(e.index)
                if not active.open_choices:
                    del self._active[e.request]
            text, stop = transcript.settled(ended), None
            if e.finish_reason == "stop":
                ids = submission.prompts[0].request.params.stop_token_ids
                stop = transcript.matched if transcript.stopped else e.token if e.token in ids else None
            delta = ChoiceDelta(choice, text, e.scored, e.finish_reason, e.fault, e.usage, e.prompt, stop)
            self._updates.append((submission, delta))

    def _take_snapshot(self) -> Snapshot:
        c = self.engine.counts
        counts = replace(c, refused=copy(c.refused), finished=copy(c.finished), faults=copy(c.faults))
        gauges, experts = self.engine.gauges(), self.engine.experts
        now, loads, active = time.monotonic(), dict(experts.loads), len(self._active)
        return Snapshot(gauges, counts, now, self.engine.idle, active, loads, experts.moves, experts.failed)

    def _publish(self) -> None:
        """Store a new snapshot of the engine, and hand the pending updates to the event loop.

        If the engine launched a step and has more work, the updates stay pending. _before_launch() hands them over just
        before the next launch, so that the event loop works while the device computes.
        """
        before, self.snapshot = self.snapshot, self._take_snapshot()
        if (why := self.snapshot.expert_failure) and not before.expert_failure:
            log.warning("experts are not moved until the device is replaced: %s", why)
        if self._updates and (self.engine.idle or not self._launched):
            self._hand_over()

    def _before_launch(self) -> None:
        self._launched = True
        if self._updates:
            self._hand_over()

    def _hand_over(self) -> None:
        updates, self._updates = self._updates, []
        self._call(self._deliver, updates, self.steps[-1] if self.steps else None)

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        """Schedule the call `function(*arguments)` on the event loop. Returns at once."""
        self._outbox.put(partial(function, *arguments))

    # In the thread "updates". Waking the event loop hands it the GIL; putting an item into a queue does not, so the
    # engine's thread continues to its launch.

    def _forward_updates(self) -> None:
        while call := self._outbox.get():
            try:
                self._loop.call_soon_threadsafe(call)
            except RuntimeError:  # the loop is closed
                self._halted = True
                return

    # On the event loop

    def _end(self) -> None:
        """Refuse all submissions and inspections that are still in the inbox, and drop the other messages.

        Runs on the event loop when the engine's thread has ended.
        """
        self.ended.set()
        while not self._inbox.empty():
            message = self._inbox.get()
            if isinstance(message, Submit):
                message.submission.put(Refused("failed", ENDED, None))
            elif isinstance(message, Inspect):
                _settle(message.result, None, Refused("failed", ENDED, None))

    def _deliver(self, updates: list[Update], step: StepRecord | None) -> None:
        for submission, update in updates:
            submission.put(update)
        self.watch(updates, step)


def _settle(future: asyncio.Future[Any], value: Any, error: Exception | None) -> None:
    if future.done():  # its waiter was cancelled
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(value)
