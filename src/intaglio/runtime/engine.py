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
    """Interface of a source of random numbers, such as random.Random. The engine draws seeds for requests from it."""

    def getrandbits(self, k: int, /) -> int:
        """Returns a random integer of `k` bits: 0 or more, below 2**k."""


class Engine:
    """Serves requests on one device, step by step, with continuous batching.

    It works until it is drained, or until its device is lost and cannot be replaced.

    Args:
        executable: the Program loaded on the device.
        clock: function that returns the time in seconds; the time may go back.
        rng: random numbers, for the seeds of requests without a seed.
        max_batch_tokens: maximum number of token rows in a step.
        max_sequences: maximum number of sequences that run at the same time.
        max_waiting: maximum number of sequences that wait.
        max_drafts: maximum number of draft tokens per sequence and step; 0 switches speculative decoding off.
        checkpoint_blocks: for models with recurrent state: in a prompt, the state is saved for the prefix cache every
            this many K/V blocks (see Checkpoints). 0: such a model has no prefix cache.
        restart: function that loads the same Program again after the device was lost; None if there is no replacement.
        max_restarts: attempts to replace a lost device. If all fail, every sequence ends in error and `failed` has the
            reason.
        numerics: device, instruction set and layout, such as "host avx2 tp2", which decide the bits of results besides
            the Program. A request that another engine has suspended can be resumed only if both engines have the same
            `numerics`.
        scope: BlockScope for the names of K/V blocks; None to make it from the Program and `numerics`, with unknown
            weights.
        incarnation: text that is different for each start of an engine; block events contain it.
        rebalance_every: seconds between two proposals of a new placement of experts, for layouts with redundant
            experts; 0 to never move experts.
        connector: the tier, a store of K/V blocks outside the engine; None if there is none. If the model or the device
            cannot use a tier, the tier is told the reason and is not used.
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
        """Returns the Program loaded on the device in use, as an Executable."""
        return self.launcher.executable

    @executable.setter
    def executable(self, executable: Executable) -> None:
        self.launcher.executable = executable

    @property
    def requests(self) -> dict[str, list[Sequence]]:
        """Returns the live requests as a dict: request id to a list of the sequences of all its choices."""
        return self.live.by_id

    @property
    def idle(self) -> bool:
        """True if no request is live, so that step() would do nothing."""
        return not self.live.by_id

    @property
    def failed(self) -> str | None:
        """Returns why the engine cannot serve any more: its device is lost and cannot be replaced.

        None while it works.
        """
        return self.recovery.failed

    def add(self, request: Request) -> list[Sequence]:
        """Queue a request. Returns a list with one Sequence for each choice (output) of the request.

        The engine extends the sequences with each step; callers may read them. Raises RequestError if the request can
        never be served or if its id is in use. Raises Refused if the request cannot be served now; the error says when
        to try again.
        """
        seed = self.rng.getrandbits(62) if request.params.seed is None else request.params.seed
        return self._admit(request, seed, range(request.params.n))

    def suspend(self, id: str) -> Resumption | None:
        """Take a request out of the engine without emitting an event.

        Returns its Resumption, which any engine can resume(). Returns None if no request with this id is live.
        """
        now, left = self.clock.read(), self.live.release(id)
        return Resumption.of(left, now, self.scope.program, self.numerics) if left else None

    def resume(self, resumption: Resumption) -> list[Sequence]:
        """Queue a suspended request, which continues after the output that it has. Returns a list of its Sequences.

        There is one Sequence for each choice that has not ended. The stop checkers and matchers in `resumption.request`
        must be new; the engine passes the output so far to them. Raises RequestError if this engine would not give the
        same bits as the engine that suspended the request, and the same errors as add().
        """
        request = resumption.request
        seed = request.params.seed
        assert seed is not None, "a resumption has the seed in use"
        return self._admit(request, seed, [c.index for c in resumption.choices], resumption)

    def abort(self, id: str) -> list[Event]:
        """End all choices of a request now.

        Returns a list of their last Events; [] if no request with this id is live.
        """
        self.clock.read()
        return [self.live.end(s, "abort") for s in self.live.of(id)]

    def drain(self) -> None:
        """Refuse new requests from now on; admitted requests run to their end."""
        self.draining = True

    def step(self) -> list[Event]:
        """Run one step: decodes and prefill chunks of as many sequences as fit. Returns a list of the step's Events.

        On a pipeline of N stages, steps are launched until N of them are under way; then the oldest is waited for.
        Returns [] if there is nothing to do.
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
        """Launch a step for each idle pipeline stage. Returns a list of the ScheduledSequences of ended launches.

        Normally the list is empty, because the results of the steps are read later, by collect(). The exception is a
        sequence that is suspected of having made the device fail. Then only one launch may be under way at a time, so
        each launch is waited for before the next one.

        now: the time in seconds. Raises DeviceLost if the device is lost.
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

        Returns a list of its ScheduledSequences. Call it only while a launch is under way. Raises DeviceLost if the
        device is lost.
        """
        launch = self.launcher.under_way[0]
        for done in self.launcher.complete(launch):
            self.accounting.account(done)
        return launch.scheduled

    def move_experts(self, now: float) -> None:
        """Count each expert's tokens and move experts between ranks, if one of these is due. Returns nothing.

        The ExpertBalancer does both, at two intervals. So most calls do nothing, and for a model without experts all of
        them. Called between two steps.

        now: the time in seconds. Raises DeviceLost if the device is lost.
        """
        self.experts.tick(now, last=self.idle)

    def run(self) -> list[Event]:
        """Run steps until no request is live. Returns a list of all Events, in order."""
        events: list[Event] = []
        while not self.idle:
            events += self.step()
        return events

    def load(self) -> EngineLoad:
        """Returns an EngineLoad: how much work is queued and running now. Admission needs it."""
        live, waiting = self.live.sequences(), self.scheduler.waiting
        return EngineLoad(
            waiting=len(waiting), waiting_tokens=sum(s.remaining for s in waiting), live=len(live),
            prefill_tokens=sum(s.remaining for s in live if s.remaining > 1), latency=replace(self.latency),
            draining=self.draining, failed=self.failed,
        )  # fmt: skip

    def gauges(self) -> Gauges:
        """Returns the engine's current numbers of sequences, K/V blocks and state slots, as Gauges."""
        waiting, pool, slots = self.scheduler.waiting, self.pool, self.slots
        return Gauges(
            len(self.scheduler.running), len(waiting), sum(s.length for s in waiting), pool.total, pool.held,
            len(pool.evictable), slots.total, slots.held, len(slots.evictable), self.draining, self.failed,
            self.windows.limit, self.windows.reserved, self.windows.pool.held,
        )  # fmt: skip

    def _usable(self, connector: Connector | None, executable: Executable) -> Connector | None:
        """Returns `connector` if this model and device can use one; else None.

        A connector that cannot be used is told the reason, as a message to the operator.
        """
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
        """Returns the BlockNames of this engine: an object that computes the names of K/V blocks from token ids."""
        return self.pool.names

    def block_events(self, after: int) -> list[BlockEvent] | None:
        """Returns a list of the prefix cache's events (BlockEvent) with numbers above `after`.

        Returns None if some of these events are no longer kept; the caller then needs block_snapshot().
        """
        return self.pool.events.after(after)

    def block_snapshot(self) -> BlockSnapshot:
        """Returns the names of all blocks that are in the prefix cache now, as a BlockSnapshot."""
        return self.pool.snapshot()

    def _admit(
        self, request: Request, seed: int, choices: abc.Sequence[int], resumption: Resumption | None = None
    ) -> list[Sequence]:
        """Check a new or suspended request and queue its choices. Returns a list with one Sequence for each choice.

        Raises RequestError if the request is invalid, and Refused if the engine takes no more work. The choices are
        then counted as refused.

        Args:
            request: the request.
            seed: seed of choice 0.
            choices: numbers of the choices to queue.
            resumption: for a suspended request, its output so far, after which the choices continue; None for a new
                request.
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
        """Returns new Sequences for choices of a request, as a list in the order of `choices`. They are not queued yet.

        Raises RequestError if the caller's function that makes stop checkers or matchers fails.

        Args:
            request: the request.
            seed: seed of choice 0; choice i has the seed `seed` + i.
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
        """Record the start time and the prefix-cache hits of sequences in their first step. Returns nothing.

        scheduled: the sequences of the step; those that have started before are skipped. now: the time in seconds.
        """
        for s in (one.sequence for one in scheduled):
            if s.started is None:
                s.started, s.cached_tokens = now, min(s.computed, len(s.prompt) - 1)  # resumed: output may be there too
                self.counts.prompt_tokens += len(s.prompt)
                self.counts.cached_tokens += s.cached_tokens

    def _close_step(self, scheduled: list[ScheduledSequence], began: float) -> None:
        """Record a step that has ended: in the counts, in `last_step` and in the latency estimator. Returns nothing.

        Only the number of preemptions is updated if no sequence ran in the step. scheduled: the sequences of the step.
        began: start of the step, in seconds.
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
