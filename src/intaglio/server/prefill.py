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
    """ASGI response to a request whose prompts are computed here, while another replica generates the output.

    The engine saves each full K/V block to its tier, a store of blocks. A lease protects all blocks of the prompts from
    eviction; it is renewed while they are computed and saved. When all blocks are saved, a response of JSON is sent:

    - tokens: number of tokens of the first prompt.
    - whole: number of the first prompt's tokens that lie in full K/V blocks; only full blocks can be handed over. 0 if
      nothing is computed.
    - handed: number of the first prompt's tokens whose blocks are in the tier and protected. It is less than `whole` if
      a block could not be saved or the lease has run out.
    - lease: the lease, which the router renews for as long as the blocks are wanted; "" if no tokens are handed.
    - peer: the address at which the other replica fetches the blocks; "" if it finds them in a folder that both use.

    Nothing is computed if the engine has no tier. Prompts whose log-probabilities are wanted are left out; the other
    replica computes them itself.
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
        """A list of the names of the full K/V blocks of the prompts of `requests`, each name once.

        requests: if none are given, all requests of this response count.
        """
        names = self.model.driver.engine.block_names
        chosen = requests or [p.request for p in self.prompts]
        return list(dict.fromkeys(name for r in chosen for name in names.of(r.prompt, r.salt)))

    def _handed(self, tier: StoreTier, names: Sequence[str]) -> int:
        """Number of leading prompt tokens whose K/V blocks another replica can load from the tier (a store of blocks).

        They are tokens of the request's first prompt. Counted are whole blocks that are stored and that the request's
        lease protects from eviction; 0 without a lease. Waits until the engine's blocks are saved.

        tier: the store. names: names of the first prompt's full blocks, in order.
        """
        tier.flush()
        blocks = tier.handed(self.lease, names) if self.lease else 0
        return blocks * self.model.driver.engine.block_names.block_size


class HeldLeases:
    """Renews the leases of a router's requests, which keep their K/V blocks from being evicted from a tier.

    A tier is a store of K/V blocks that replicas share. Each lease held is renewed every RENEWAL seconds. A lease that
    has run out cannot be renewed, and its blocks may be gone. Methods called on the event loop never wait: another
    thread does the work, because another process may have locked the tier.
    """

    def __init__(self, tier: StoreTier) -> None:
        self.tier = tier
        self._due: dict[str, float] = {}  # by lease: time of the event loop at which it is to be renewed
        self._released: list[str] = []
        self._working: asyncio.Task[None] | None = None

    def update(self, held: Iterable[str], released: Iterable[str]) -> None:
        """Replace the leases to renew by `held`, and end the leases `released`. Returns at once, before that is done.

        A lease protects K/V blocks from eviction for a time. held, released: ids of leases.
        """
        now = asyncio.get_running_loop().time()
        self._due = {lease: self._due.get(lease, now) for lease in held}
        self._released += released
        if (self._due or self._released) and (self._working is None or self._working.done()):
            self._working = asyncio.ensure_future(self._work())

    async def _work(self) -> None:
        """End the leases in `_released` and renew the leases that are due, until nothing is left to do.

        Returns nothing. A lease protects K/V blocks from eviction for a time. This runs as a task, which update()
        starts if none is running.
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
    """A copy of `request` that computes only the prompt: it generates one token and ends."""
    return Request(
        request.id, request.prompt, SamplingParams(max_tokens=1, ignore_eos=True), priority=request.priority,
        queue_timeout=request.queue_timeout, timeout=request.timeout, salt=request.salt,
    )  # fmt: skip
