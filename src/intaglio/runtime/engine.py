"""The engine: continuous batching of requests on one device, a step at a time, in named stages.

admission.py admits requests. A step then expires requests past their deadline (live_requests.py), schedules
(scheduler.py), launches (launcher.py), accounts (accounting.py), saves K/V blocks (offload.py), and recovers if the
device is lost (recovery.py). Each stage is an object of the engine with public methods. Clock, randomness, device and
restart are passed in. One thread calls the engine; only its `admission` may be called from any thread.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Callable
from dataclasses import replace
from math import inf
from typing import Protocol

from intaglio.devices import DeviceLost, Executable
from intaglio.runtime.accounting import Accounting
from intaglio.runtime.admission import Admission, EngineLoad
from intaglio.runtime.block_events import BlockEvent, BlockEvents, BlockSnapshot
from intaglio.runtime.block_names import BlockNames, BlockScope
from intaglio.runtime.checkpoints import CHECKPOINT_BLOCKS
from intaglio.runtime.clock import MonotonicClock
from intaglio.runtime.connector import Connector
from intaglio.runtime.expert_balance import MOVE_EVERY, ExpertBalancer
from intaglio.runtime.kv import BlockPool
from intaglio.runtime.latency import LatencyEstimator
from intaglio.runtime.launcher import Launcher, launch_groups
from intaglio.runtime.live_requests import LiveRequests
from intaglio.runtime.offload import Offload
from intaglio.runtime.recovery import Recovery
from intaglio.runtime.request import Event, Refused, Request, RequestError
from intaglio.runtime.resumption import Resumption
from intaglio.runtime.scheduler import ScheduledSequence, Scheduler
from intaglio.runtime.sequence import Sequence
from intaglio.runtime.slots import SlotPool
from intaglio.runtime.stats import Counts, Gauges, StepRecord
from intaglio.runtime.token_filter import TokenFilter
from intaglio.runtime.windows import Windows


class Rng(Protocol):
    """Interface of the random source that gives seeds to requests without one; random.Random satisfies it."""

    def getrandbits(self, k: int, /) -> int:
        """A random integer of `k` bits."""


class Engine:
    """Serves requests on one executable, until it is drained or its device is lost and cannot be replaced.

    Args:
        executable: the loaded Program.
        clock: seconds, from any start; it may go back.
        rng: source of seeds for requests without one.
        max_batch_tokens: token rows of a step.
        max_sequences: sequences that run at once.
        max_waiting: sequences that wait.
        max_drafts: draft tokens per sequence and step; 0 switches speculative decoding off.
        checkpoint_blocks: of a model with recurrent state: K/V blocks between the positions of a long prompt at which
            the state is kept for the prefix cache (see Checkpoints); 0: such a model has no prefix cache.
        restart: loads the same Program again after the device was lost.
        numerics: what decides the bits of results besides the Program, such as "host avx2 tp2": device, instruction set
            and layout. A request suspended on another engine is resumed only if both have the same.
        scope: BlockScope for the names of K/V blocks; None: from the Program and `numerics`, with unknown weights.
        rebalance_every: seconds between two proposals of another placement of experts, for layouts with redundant
            experts; 0: experts are never moved.
        connector: a tier that keeps K/V blocks outside the engine; None if there is none. If the model or the device
            cannot use it, the tier is told so and not used.
        incarnation: text that is different for each start of an engine; block events carry it.
        max_restarts: attempts for each loss; when all have failed, every sequence ends in error and `failed` has the
            reason.
    """

    def __init__(
        self,
        executable: Executable,
        *,
        clock: Callable[[], float],
        rng: Rng,
        max_batch_tokens: int = 512,
        max_sequences: int = 256,
        max_waiting: int = 1024,
        max_drafts: int = 0,
        checkpoint_blocks: int = CHECKPOINT_BLOCKS,
        restart: Callable[[], Executable] | None = None,
        max_restarts: int = 5,
        numerics: str = "",
        scope: BlockScope | None = None,
        incarnation: str = "",
        rebalance_every: float = MOVE_EVERY,
        connector: Connector | None = None,
    ) -> None:
        bounds: dict[str, float] = {
            "max_batch_tokens": max_batch_tokens,
            "max_sequences": max_sequences,
            "max_waiting": max_waiting,
        }
        for name, value in bounds.items():
            if value < 1:
                raise RequestError(f"{name} is {value}; allowed: 1 or more")
        rest = {"max_drafts": max_drafts, "checkpoint_blocks": checkpoint_blocks, "rebalance_every": rebalance_every}
        for name, value in rest.items():
            if value < 0:
                raise RequestError(f"{name} is {value}; allowed: 0 or more")
        self.program, self.state = executable.program, executable.state
        context, size = self.program.context, self.state.page_tokens
        self.clock, self.rng = MonotonicClock(clock), rng
        self.counts, self.latency = Counts(), LatencyEstimator()
        self.scope = scope or BlockScope.of(self.program, size, numerics)
        self.pool = BlockPool(self.state.pages, size, self.scope.digest, BlockEvents(incarnation))
        self.slots = SlotPool(self.state.slots)
        self.admission = Admission(
            context=context, vocabulary=self.program.vocabulary, num_blocks=self.pool.total, block_size=size,
            max_waiting=max_waiting, max_batch_tokens=max_batch_tokens,
        )  # fmt: skip
        self.offload = Offload(self._usable(connector, executable), self.pool, self.clock)
        self.windows = Windows(
            self.state, self.scope.digest, context=context, max_batch_tokens=max_batch_tokens,
            max_drafts=max_drafts, depth=executable.depth,
        )  # fmt: skip
        self.scheduler = Scheduler(
            self.pool, self.slots, context=context, max_batch_tokens=max_batch_tokens, max_sequences=max_sequences,
            max_drafts=max_drafts, offload=self.offload, windows=self.windows, checkpoint_blocks=checkpoint_blocks,
        )  # fmt: skip
        self.live = LiveRequests(self.scheduler, self.clock, self.latency, self.counts)
        self.launcher = Launcher(executable, self.live, self.counts)
        self.offload.device = self.launcher
        self.experts = ExpertBalancer(self.launcher, rebalance_every or inf)
        self.accounting = Accounting(self.live, self.scheduler, self.clock, self.counts, context)
        self.recovery = Recovery(self.launcher, self.live, self.scheduler, self.counts, restart, max_restarts)
        self.numerics, self.draining = numerics, False
        self.last_step: StepRecord | None = None  # of the last step in which anything ran

    @property
    def executable(self) -> Executable:
        """The loaded Program (Executable) on the device in use."""
        return self.launcher.executable

    @executable.setter
    def executable(self, executable: Executable) -> None:
        self.launcher.executable = executable

    @property
    def requests(self) -> dict[str, list[Sequence]]:
        """A dict of the live requests: request id to the sequences of all its choices."""
        return self.live.by_id

    @property
    def idle(self) -> bool:
        """True if no request is live, so step() would do nothing."""
        return not self.live.by_id

    @property
    def failed(self) -> str | None:
        """The reason why the device is lost and cannot be replaced; None while the engine works."""
        return self.recovery.failed

    def add(self, request: Request) -> list[Sequence]:
        """Queue a request. Returns a list with one Sequence per choice; the engine extends them, callers may read them.

        Raises RequestError if the request can never be served or its id is in use. Raises Refused, with the seconds
        after which to retry, if it cannot be served now.
        """
        seed = self.rng.getrandbits(62) if request.params.seed is None else request.params.seed
        return self._admit(request, seed, range(request.params.n))

    def suspend(self, id: str) -> Resumption | None:
        """Take a request out of the engine, with no event. Returns its Resumption, for resume() on any engine.

        Returns None if no such request is live.
        """
        now, left = self.clock.read(), self.live.release(id)
        return Resumption.of(left, now, self.scope.program, self.numerics) if left else None

    def resume(self, resumption: Resumption) -> list[Sequence]:
        """Queue a suspended request, to go on after its output. Returns a list of a Sequence per unfinished choice.

        The request's stop checkers and matchers must be new ones; the engine passes the output so far to them. Raises
        RequestError if this engine would not give the same bits, and the errors of add().
        """
        request = resumption.request
        seed = request.params.seed
        assert seed is not None, "a resumption has the seed in use"
        return self._admit(request, seed, [c.index for c in resumption.choices], resumption)

    def abort(self, id: str) -> list[Event]:
        """End all choices of a request now. Returns a list of their last Events; [] if no such request is live."""
        self.clock.read()
        return [self.live.end(s, "abort") for s in self.live.of(id)]

    def drain(self) -> None:
        """Refuse new requests from now on; admitted requests run to their end."""
        self.draining = True

    def step(self) -> list[Event]:
        """Run one step: decodes and prefill chunks of as many sequences as fit. Returns a list of Events; [] when idle.

        On a pipeline of N stages, launch until N steps (micro-batches) are under way, then wait for the oldest.
        """
        began = self.clock.read()
        self.live.expire(began)
        collected: list[ScheduledSequence] = []
        try:
            collected += self.submit(began)
            if self.launcher.under_way:
                collected += self.collect()
            self.offload.save()
            self.move_experts(began)
        except DeviceLost as lost:
            self.recovery.recover(lost)
        self._close_step(collected, began)
        return self.live.take_events()

    def submit(self, now: float) -> list[ScheduledSequence]:
        """Schedule and launch steps until as many are under way as the executable has pipeline stages.

        Normally this waits for nothing and returns []: collect() reads the results later. If a sequence is suspected of
        having made the device fail, only one launch may be under way at a time. Then each launch is waited for, and its
        results are applied, before the next one.

        Returns a list of the ScheduledSequences whose results were applied. Raises DeviceLost if the device is lost.
        now: the time in seconds.
        """
        collected: list[ScheduledSequence] = []
        depth = self.executable.depth
        if depth > 1 and any(s.suspect for s in self.live.sequences()):
            depth = 1
        while len(self.launcher.under_way) < depth:
            scheduled = self.scheduler.schedule(depth)
            if not scheduled:
                break
            self._start(scheduled, now)
            for group in launch_groups(scheduled):
                while self.launcher.under_way and depth == 1:
                    collected += self.collect()
                self.launcher.launch(group)
        return collected

    def collect(self) -> list[ScheduledSequence]:
        """Wait for the oldest launch under way and apply its results to its sequences.

        Returns a list of the ScheduledSequences of that launch. Call it only while a launch is under way. Raises
        DeviceLost if the device is lost.
        """
        launch = self.launcher.under_way[0]
        for done in self.launcher.complete(launch):
            self.accounting.account(done)
        return launch.scheduled

    def move_experts(self, now: float) -> None:
        """Let the ExpertBalancer do what is due: count the tokens of each expert, move experts between ranks.

        Called between two steps. The balancer has an interval of its own for each of the two; most calls do nothing.
        Does nothing for a model without experts. now: the time in seconds. Raises DeviceLost if the device is lost.
        """
        self.experts.tick(now, last=self.idle)

    def run(self) -> list[Event]:
        """Run steps until no request is left. Returns a list of all Events in order."""
        events: list[Event] = []
        while not self.idle:
            events += self.step()
        return events

    def load(self) -> EngineLoad:
        """The EngineLoad: a snapshot of the work queued and running, for Admission."""
        live, waiting = self.live.sequences(), self.scheduler.waiting
        return EngineLoad(
            waiting=len(waiting), waiting_tokens=sum(s.remaining for s in waiting), live=len(live),
            prefill_tokens=sum(s.remaining for s in live if s.remaining > 1), latency=replace(self.latency),
            draining=self.draining, failed=self.failed,
        )  # fmt: skip

    def gauges(self) -> Gauges:
        """The engine's current state as Gauges: numbers of sequences, blocks and slots."""
        waiting, pool, slots = self.scheduler.waiting, self.pool, self.slots
        return Gauges(
            len(self.scheduler.running), len(waiting), sum(s.length for s in waiting), pool.total, pool.held,
            len(pool.evictable), slots.total, slots.held, len(slots.evictable), self.draining, self.failed,
            self.windows.limit, self.windows.reserved, self.windows.pool.held,
        )  # fmt: skip

    def _usable(self, connector: Connector | None, executable: Executable) -> Connector | None:
        """`connector` if this model and device can use one; else None, and the connector tells the operator why."""
        why = ""
        if self.state.slots:
            why = f"{self.program.name} has recurrent state, which is not kept with them"
        elif self.state.window_pages:
            why = (
                f"the layers of {self.program.name} with a window give theirs back; set window_tokens to 0 to keep all"
            )
        elif not executable.block_bytes:
            why = f"{type(executable.unwrapped()).__name__} cannot read or write K/V blocks"
        if connector and why:
            connector.say("off", f"K/V blocks are not kept outside the engine: {why}")
        return None if why else connector

    @property
    def block_names(self) -> BlockNames:
        """The BlockNames of this engine, which computes the names of its K/V blocks from token ids."""
        return self.pool.names

    def block_events(self, after: int) -> list[BlockEvent] | None:
        """A list of the prefix cache's events after number `after`.

        Returns None if some of them are not kept any more; the caller then needs block_snapshot().
        """
        return self.pool.events.after(after)

    def block_snapshot(self) -> BlockSnapshot:
        """The BlockSnapshot of the prefix cache now."""
        return self.pool.snapshot()

    def _admit(
        self, request: Request, seed: int, choices: abc.Sequence[int], resumption: Resumption | None = None
    ) -> list[Sequence]:
        """Check the choices of a new or suspended request and queue them. Returns a list with a Sequence for each.

        Raises RequestError if the request is invalid, Refused if the engine takes no more work. In both cases the
        choices are counted as refused.

        Args:
            request: the request.
            seed: seed of choice 0.
            choices: numbers of the choices to queue.
            resumption: None for a new request; for a suspended one, its output so far, after which the choices go on.
        """
        n = len(choices)
        self.counts.received += n
        try:
            if request.id in self.requests:
                raise RequestError(f"request {request.id!r} is still running; every request needs its own id")
            if resumption:
                resumption.check(self.scope.program, self.numerics)
            self.admission.check(request)
            sequences = self._sequences(request, seed, choices, self.admission.admit(request, self.load()))
            if resumption:
                for s in sequences:
                    resumption.apply(s)
        except (RequestError, Refused) as e:
            self.counts.refused[e.reason if isinstance(e, Refused) else "invalid"] += n
            raise
        self.live.add(sequences)
        return sequences

    def _sequences(self, request: Request, seed: int, choices: abc.Sequence[int], estimate: float) -> list[Sequence]:
        """Make the Sequences of a request's choices. Returns them as a list, in the order of `choices`.

        Raises RequestError if the caller's function that makes stop checkers or matchers fails.

        Args:
            request: the request.
            seed: seed of choice 0; choice i samples with seed + i.
            choices: numbers of the choices.
            estimate: estimated seconds until the request ends.
        """
        now, first = self.clock.read(), self.counts.admitted
        try:
            checkers = [request.stop_checker(i) if request.stop_checker else None for i in choices]
            matchers = [request.matcher(i) if request.matcher else None for i in choices]
        except Exception as e:  # both are functions of the caller
            raise RequestError(f"making the stop checker or the matcher of the request failed: {e}") from e
        allowed = TokenFilter.of(request, self.program.vocabulary)
        return [
            Sequence(request, i, (seed + i) % 2**63, first + at, now, estimate, checkers[at], matchers[at], allowed)
            for at, i in enumerate(choices)
        ]

    def _start(self, scheduled: list[ScheduledSequence], now: float) -> None:
        """Record start time and prefix-cache hits of the sequences that are in their first step. now: seconds."""
        for s in (one.sequence for one in scheduled):
            if s.started is None:
                s.started, s.cached_tokens = now, min(s.computed, len(s.prompt) - 1)  # resumed: output may be there too
                self.counts.prompt_tokens += len(s.prompt)
                self.counts.cached_tokens += s.cached_tokens

    def _close_step(self, scheduled: list[ScheduledSequence], began: float) -> None:
        """Count the step, record it as last_step and update the latency estimator, if any sequence ran in it.

        began: the step's start in seconds.
        """
        if scheduled:
            seconds = self.clock.read() - began
            decode = sum(one.num_tokens + len(one.drafts) for one in scheduled if one.decodes)
            prefill = sum(one.num_tokens for one in scheduled if not one.decodes)
            sampled = sum(e.scored is not None for e in self.live.events)
            self.counts.steps += 1
            self.counts.computed_tokens += prefill + decode
            self.last_step = StepRecord(self.counts.steps, began, seconds, prefill, decode, len(scheduled), sampled)
            if self.counts.steps == 2:
                self.latency.forget_steps()  # the first also read the weights into memory
            self.latency.observe_step(prefill + decode, sampled, seconds)
        self.counts.preemptions = self.scheduler.preemptions
