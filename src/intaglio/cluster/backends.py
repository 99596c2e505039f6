"""Backends: the Router with its links to replicas. Hands out placements, polls loads, notices lost replicas."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from intaglio.cluster.link import Call, Link, LinkLost
from intaglio.router import (
    BlocksCleared,
    BlocksRemoved,
    BlocksStored,
    CacheEvent,
    CacheIndex,
    Job,
    LoadReport,
    Placement,
    Refusal,
    Router,
)
from intaglio.runtime import StepFit

log = logging.getLogger("intaglio.cluster")
POLL = 0.2  # seconds between load reports of a replica
TICK = 0.05  # seconds between looks for requests that have waited too long
FINISHED_KEPT = 1 << 16  # ended requests of a replica that are kept for its rates and averages
OUTPUT_FIRST, OUTPUT_SHARE = 64.0, 0.05  # mean output length in tokens: first guess, weight of the next request


class ReplicaBroken(ValueError):
    """Raised when a replica reports that it cannot serve any more."""


class Backends:
    """The router's links to replicas, and the requests that wait for a replica or run on one.

    Args:
        router: decides on which replica a request is placed.
        silence: seconds without a load report after which a replica counts as lost, even if its process lives.
        clock: function that returns the time in seconds.

    The owner sets the attribute `on_lost` to a function (name, reason, error), which is called when a replica is lost.
    `name` is the replica. `reason` says why this process gave the replica up; "" if the connection ended by itself.
    `error` is the unexpected exception that caused the loss, or None.
    """

    def __init__(self, router: Router, silence: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.router, self.silence, self.clock = router, silence, clock
        self.links: dict[str, Link] = {}
        self.calls: dict[str, Call] = {}  # by job id, those on a replica
        self.waiting: dict[str, asyncio.Future[Placement]] = {}  # by job id
        self.output_tokens = OUTPUT_FIRST  # mean over late requests
        self.moves: Counter[str] = Counter()  # by cause: lost, drained, refused
        self.prefills: Counter[str] = Counter()  # prompts given to prefill replicas, by what came of it
        self.leases: dict[str, tuple[str, str]] = {}  # by job id: prefill replica that renews it, lease on its blocks
        self.released: dict[str, list[str]] = {}  # by replica: leases to end with the next poll
        self.finished: dict[str, deque[tuple[float, float, float]]] = {}  # by replica: end, TTFT, seconds of requests
        self.on_lost: Callable[[str, str, Exception | None], None] = lambda name, why, error: None
        self._reasons: dict[str, tuple[str, Exception | None]] = {}  # by replica that this process has given up
        self._polls: dict[str, asyncio.Task[None]] = {}
        self._ticking: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the task that refuses requests which have waited too long."""
        self._ticking = asyncio.ensure_future(self._tick())

    async def close(self) -> None:
        """Stop polling the replicas and close all links."""
        tasks = [*self._polls.values(), *([self._ticking] if self._ticking else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for link in list(self.links.values()):
            await link.close()

    # Replicas

    async def attach(self, name: str, link: Link) -> None:
        """Start to use `link` as the link to the replica `name`. Wait for its first load report; poll it from now on.

        Raises LinkLost if the connection ends, TimeoutError if the replica does not answer within `silence` seconds,
        ReplicaBroken if the replica says that it cannot serve.
        """
        self.links[name] = link
        self.finished.setdefault(name, deque(maxlen=FINISHED_KEPT))
        link.on_lost = lambda: self._lost(name, link)
        await self._poll_once(name, link)
        self._polls[name] = asyncio.ensure_future(self._poll(name, link))
        self.pump()

    def forget(self, name: str) -> None:
        """Remove a replica that has ended for good. The requests that it still has continue at other replicas."""
        self.router.died(name)
        self.router.remove_replica(name)
        self._forget_leases(name)
        self.finished.pop(name, None)
        self.pump()

    def drain(self, name: str) -> int:
        """Place no more requests on the replica `name`, and move its requests if another replica can take them.

        Returns the number of requests that the replica has at this moment, whether or not they are moved.
        """
        jobs = self.router.drain(name)
        if any(r.placeable for r in self.router.replicas.values()):
            for job in jobs:
                if call := self.calls.get(job.id):
                    call.move()
        return len(jobs)

    def leaving(self, name: str) -> bool:
        """True if the replica `name` is being drained and another replica can take its requests."""
        others = any(r.placeable for r in self.router.replicas.values())
        return self.router.replicas[name].state == "draining" and others

    async def emptied(self, name: str, timeout: float) -> bool:
        """Wait until a replica has no requests, at most `timeout` seconds. Returns True if it then has none."""
        ends = self.clock() + timeout
        while (replica := self.router.replicas.get(name)) and replica.jobs and self.clock() < ends:
            await asyncio.sleep(TICK)
        return not (replica and replica.jobs)

    def _lost(self, name: str, link: Link) -> None:
        if self.links.get(name) is not link:
            return
        del self.links[name]
        if poll := self._polls.pop(name, None):
            poll.cancel()
        self._forget_leases(name)
        if name in self.router.replicas:
            jobs = self.router.died(name)
            if jobs:
                log.warning("replica %s was lost with %d requests, which go on elsewhere", name, len(jobs))
        self.on_lost(name, *self._reasons.pop(name, ("", None)))
        self.pump()

    async def _poll(self, name: str, link: Link) -> None:
        try:
            while True:
                await asyncio.sleep(POLL)
                await self._poll_once(name, link)
                self.pump()
        except LinkLost:
            pass
        except Exception as e:
            what = f"replica {name} counts as lost: its load report cannot be used"
            if isinstance(e, TimeoutError):
                what = f"replica {name} has not answered for {self.silence:.0f} s and counts as lost"
            elif isinstance(e, ReplicaBroken):
                what = f"replica {name} cannot serve any more and counts as lost: {e}"
            self._reasons[name] = what, None if isinstance(e, TimeoutError | ReplicaBroken) else e
            link.abort()

    async def _poll_once(self, name: str, link: Link) -> None:
        index = self.router.replicas[name].index
        after = -1 if index.stale else index.sequence
        asked: dict[str, Any] = {"do": "load", "incarnation": index.incarnation, "after": after}
        if renewed := [lease for replica, lease in self.leases.values() if replica == name]:
            asked["renew"] = renewed
        if released := self.released.pop(name, None):
            asked["release"] = released
        load = await link.ask(asked, self.silence)
        if link.lost:  # after the answer and before it was read here
            raise LinkLost("the replica has ended")
        if load.get("failed"):
            raise ReplicaBroken(load["failed"])
        if name in self.router.replicas:
            self.router.ready(name, load["incarnation"])
            self.router.report(name, read_report(load))
            apply_blocks(index, load)

    # Requests

    async def place(self, job: Job, again: bool = False) -> Placement:
        """Queue a job, wait until it is placed on a replica, and return the Placement.

        The caller must call ended() for the job afterwards, even if this method raises. Raises Refusal if the job is
        not admitted, or is not placed within the time that it may wait.

        again: True if the job was placed before. It is then always admitted, and may wait until its deadline.
        """
        if again:
            job = replace(job, start_by=None)
            self.router.resubmit(job)
        elif placement := self.router.place(job, self.clock()):
            return placement
        placed = self.waiting[job.id] = asyncio.get_running_loop().create_future()
        self.pump()
        try:
            return await placed
        finally:
            self.waiting.pop(job.id, None)

    def pump(self) -> None:
        """Place the queued jobs that can be placed now. Returns nothing.

        A task that waits in place() for one of these jobs is woken.
        """
        if not self.router.queue:
            return
        for placement in self.router.dispatch(self.clock()):
            waiter = self.waiting.get(placement.job.id)
            if waiter is not None and not waiter.done():  # else its client has left, and ended() follows
                waiter.set_result(placement)

    def first_token(self, job: Job, head: dict[str, Any]) -> None:
        """Tell the router that a job's first token has come. Returns nothing.

        The router then knows that the prompt is computed, and which K/V blocks the replica holds. If a prefill replica
        handed over blocks for the job, the lease that protects these blocks from eviction is ended.

        Args:
            job: the job.
            head: facts about the prompt, from the replica: number of `tokens`, `names` of the K/V blocks, `block_size`.
                If `head` has no `tokens`, the job's own estimate is used; if it has no `names`, no blocks are recorded.
        """
        self.router.started(job.id, self.clock(), head.get("tokens", job.prompt_tokens), tuple(head.get("names", ())),
                            head.get("block_size", 1))  # fmt: skip
        self.release(job)
        self.pump()

    def release(self, job: Job) -> None:
        """End the lease on the K/V blocks that a prefill replica keeps for a job, if there is a lease. Returns nothing.

        The prefill replica is told of it with the next poll, and may then evict the blocks.
        """
        if found := self.leases.pop(job.id, None):
            replica, lease = found
            if replica in self.links:  # else nobody renews it, and it runs out
                self.released.setdefault(replica, []).append(lease)

    def _forget_leases(self, name: str) -> None:
        """Delete the router's record of the leases on K/V blocks of the lost replica `name`. Returns nothing.

        A lease protects the blocks of a job from eviction. It ends by itself if nobody renews it.
        """
        self.released.pop(name, None)
        for id in [id for id, (replica, _) in self.leases.items() if replica == name]:
            del self.leases[id]

    def ended(self, job: Job, output_tokens: int) -> None:
        """Tell the router that a job has ended, or that its client has left. Returns nothing.

        output_tokens: number of tokens passed on to the client, summed over the choices of the request.
        """
        self.router.ended(job, output_tokens)
        self.release(job)
        if output_tokens:
            self.output_tokens += OUTPUT_SHARE * (output_tokens / job.choices - self.output_tokens)
        self.pump()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            try:
                self._expire()
                self.pump()
            except Exception as e:
                log.error("placing requests failed; it is tried again", exc_info=e)

    def _expire(self) -> None:
        for job in self.router.expired(self.clock()):
            waiter = self.waiting.get(job.id)
            if waiter and not waiter.done():
                waiter.set_exception(Refusal("late", "no replica had room for it in its time", 1.0))


def read_report(load: dict[str, Any]) -> LoadReport:
    """Returns the LoadReport (queue and cache state of a replica) contained in `load`.

    load: the replica's answer to the call "load", a dict.
    """
    names = (
        "running", "waiting", "kv_usage", "draining", "max_sequences", "max_batch_tokens", "prompt_tokens",
        "cached_tokens", "output_tokens",
    )  # fmt: skip
    return LoadReport(steps=StepFit(*load["steps"]), tier=load["tier"], **{name: load[name] for name in names})


def apply_blocks(index: CacheIndex, load: dict[str, Any]) -> None:
    """Update `index`, the router's record of the K/V blocks that a replica has cached. Returns nothing.

    load: the replica's answer to the call "load". It has the changes since the last call, or a snapshot of all blocks.
    """
    if (snapshot := load.get("snapshot")) is not None:
        index.snapshot(load["incarnation"], load["sequence"], snapshot)
    for sequence, kind, name in load.get("events", ()):
        event: CacheEvent = BlocksCleared()
        if kind != "cleared":
            event = BlocksStored((name,)) if kind == "stored" else BlocksRemoved((name,))
        index.apply(load["incarnation"], sequence, event)
