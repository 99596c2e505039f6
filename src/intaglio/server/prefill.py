"""Prefill: computes a prompt's K/V for another replica, which loads it from the tier that both use and generates."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import suppress

from starlette.types import Receive, Scope, Send

from intaglio.runtime import Request, SamplingParams
from intaglio.server.delivery import while_connected
from intaglio.server.driver import Prepared, Submission
from intaglio.server.problem import Json
from intaglio.server.served_model import ServedModel
from intaglio.server.tracing import span
from intaglio.tiers import PeerTier, StoreTier

LEASE = 15.0  # seconds that handed blocks stay pinned after the last renewal
RENEWAL = LEASE / 4  # seconds between renewals of a lease


class Prefill:
    """ASGI response to a router's request to compute only the K/V cache of prompts, for another replica.

    The other replica loads the cache from the engine's tier, a store of K/V blocks, and generates the output. The
    engine saves each full block to the tier. A lease protects the blocks from eviction; it is renewed while they are
    computed and saved. When all blocks are saved, a JSON response is sent to the router, with these fields:

    - tokens: number of tokens of the first prompt.
    - whole: how many of these tokens lie in full K/V blocks; only full blocks can be loaded. 0 if nothing is computed.
    - handed: how many of these tokens the other replica can load. The number is less than `whole` if a block could not
      be saved or the lease has run out.
    - lease: id of the lease, which the router renews as long as the blocks are needed; "" if `handed` is 0.
    - peer: address at which the other replica fetches the blocks; "" if both replicas use the same folder.

    Nothing is computed if the engine has no tier. A prompt for which log-probabilities are requested is left out; the
    other replica computes it itself.
    """

    def __init__(self, model: ServedModel, prompts: Sequence[Prepared]) -> None:
        self.model = model
        self.first = prompts[0].request
        wanted = [p for p in prompts if p.request.params.prompt_logprobs is None and not p.request.scored]
        self.prompts = [Prepared(prompt_only(p.request), p.transcripts[:1]) for p in wanted]
        self.tier = model.llm.tier if model.saves_blocks else None
        self.lease = ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        handed = whole = 0
        try:
            if self.tier and self.prompts:
                self.lease = await asyncio.to_thread(self.tier.pin, self._names(), LEASE)
                renewing = asyncio.ensure_future(self._renew(self.tier))
                try:
                    with self.model.driver.submitted(self.prompts) as submission:
                        await while_connected(scope, self._run(submission))
                        self.model.trace(submission)
                    names = self._names(self.first)
                    whole = len(names) * self.model.driver.engine.block_names.block_size
                    with span("save K/V"):
                        handed = await asyncio.to_thread(self._handed, self.tier, names)
                finally:
                    renewing.cancel()
            lease = self.lease if handed else ""
            peer = str(self.tier.address) if isinstance(self.tier, PeerTier) else ""
            answer = {"tokens": len(self.first.prompt), "handed": handed, "whole": whole, "lease": lease, "peer": peer}
            await Json(answer)(scope, receive, send)
            self.lease = "" if lease else self.lease  # it is the router's now
        finally:
            if self.tier and self.lease:
                self.tier.release(self.lease)

    async def _run(self, submission: Submission) -> None:
        await submission.admitted
        async for _ in submission.deltas():
            pass

    async def _renew(self, tier: StoreTier) -> None:
        while self.lease:
            await asyncio.sleep(RENEWAL)
            with suppress(TimeoutError):
                await asyncio.to_thread(tier.renew, self.lease, LEASE)

    def _names(self, *requests: Request) -> list[str]:
        """Returns a list of the names of all full K/V blocks of the prompts of `requests`, without duplicates.

        If no requests are given, the prompts of all requests of this response are used.
        """
        names = self.model.driver.engine.block_names
        chosen = requests or [p.request for p in self.prompts]
        return list(dict.fromkeys(name for r in chosen for name in names.of(r.prompt, r.salt)))

    def _handed(self, tier: StoreTier, names: Sequence[str]) -> int:
        """Returns the number of tokens of the first prompt whose K/V another replica can load from `tier`.

        These are the tokens of the prompt's first blocks, up to the first block that is not in the tier (a store of K/V
        blocks) or that the lease does not protect from eviction. Without a lease the number is 0. The function first
        waits until the engine's blocks are saved.

        names: names of the first prompt's full blocks, in order.
        """
        tier.flush()
        blocks = tier.handed(self.lease, names) if self.lease else 0
        return blocks * self.model.driver.engine.block_names.block_size


class HeldLeases:
    """Renews the leases that a router holds on K/V blocks. A lease protects blocks in a tier from eviction.

    A tier is a store of K/V blocks that replicas share. Each lease is renewed every RENEWAL seconds. A lease that has
    run out cannot be renewed, and its blocks may be gone. The tier may be locked by another process; therefore another
    thread calls it, and methods called on the event loop never wait.
    """

    def __init__(self, tier: StoreTier) -> None:
        self.tier = tier
        self._due: dict[str, float] = {}  # by lease: time of the event loop at which it is to be renewed
        self._released: list[str] = []
        self._working: asyncio.Task[None] | None = None

    def update(self, held: Iterable[str], released: Iterable[str]) -> None:
        """Renew the leases `held` from now on, and end the leases `released`. Returns at once; the work is done later.

        A lease protects K/V blocks from eviction for a time. held, released: ids of leases. A lease that was renewed
        before and is not in `held` is no longer renewed.
        """
        now = asyncio.get_running_loop().time()
        self._due = {lease: self._due.get(lease, now) for lease in held}
        self._released += released
        if (self._due or self._released) and (self._working is None or self._working.done()):
            self._working = asyncio.ensure_future(self._work())

    async def _work(self) -> None:
        """End the leases in `_released` and renew the leases that are due, until nothing is left to do.

        A lease protects K/V blocks from eviction for a time. This method runs as a task; update() starts the task if
        none is running. It returns nothing.
        """
        now = asyncio.get_running_loop().time
        while self._released or any(due <= now() for due in self._due.values()):
            began, released, self._released = now(), self._released, []
            due = [lease for lease, at in self._due.items() if at <= began]
            await asyncio.to_thread(self._apply, due, released)
            self._due |= {lease: began + RENEWAL for lease in due if lease in self._due}

    def _apply(self, renewed: Sequence[str], released: Sequence[str]) -> None:
        for lease in released:
            self.tier.release(lease)
        with suppress(TimeoutError):  # then the folder is locked, and each of the others would wait as long
            for lease in renewed:
                self.tier.renew(lease, LEASE)


def prompt_only(request: Request) -> Request:
    """Returns a Request that computes the prompt of `request` and then ends, after one generated token.

    It has the id, the priority, the time limits and the cache salt of `request`, but not its sampling parameters.
    """
    return Request(
        request.id, request.prompt, SamplingParams(max_tokens=1, ignore_eos=True), priority=request.priority,
        queue_timeout=request.queue_timeout, timeout=request.timeout, salt=request.salt,
    )  # fmt: skip
