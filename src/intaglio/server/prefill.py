"""Prefill: computes a prompt's K/V for another replica, which loads it from the tier that both use and generates."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from starlette.types import Receive, Scope, Send

from intaglio.runtime import Request, SamplingParams
from intaglio.server.delivery import while_connected
from intaglio.server.driver import Prepared, Submission
from intaglio.server.problem import Json
from intaglio.server.served_model import ServedModel
from intaglio.server.tracing import span
from intaglio.tiers import DiskTier

LEASE = 15.0  # seconds that handed blocks stay pinned after the last renewal


class Prefill:
    """ASGI response to a request whose prompts are computed here, while another replica generates the output.

    The engine saves each full K/V block to its tier. All blocks of the prompts are pinned by a lease, which is renewed
    while they are computed. When all blocks are saved, the response {"tokens", "handed", "whole", "lease"} is sent: the
    length of the first prompt, how many of its tokens have their K/V in the tier, pinned, how many would have if all
    blocks had been kept, and the lease, which the router renews for as long as the blocks are wanted.

    Nothing is computed if the engine has no tier, or for prompts whose log-probabilities are wanted: those the other
    replica computes itself.
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
                with self.model.driver.submitted(self.prompts) as submission:
                    await while_connected(receive, self._run(submission, self.tier))
                    self.model.trace(submission)
                names = self._names(self.first)
                whole = len(names) * self.model.driver.engine.block_names.block_size
                with span("save K/V"):
                    handed = await asyncio.to_thread(self._handed, self.tier, names)
            lease = self.lease if handed else ""
            answer = {"tokens": len(self.first.prompt), "handed": handed, "whole": whole, "lease": lease}
            await Json(answer)(scope, receive, send)
            self.lease = "" if lease else self.lease  # it is the router's now
        finally:
            if self.tier and self.lease:
                self.tier.release(self.lease)

    async def _run(self, submission: Submission, tier: DiskTier) -> None:
        renewing = asyncio.ensure_future(self._renew(tier))
        try:
            await submission.admitted
            async for _ in submission.deltas():
                pass
        finally:
            renewing.cancel()

    async def _renew(self, tier: DiskTier) -> None:
        while self.lease:
            await asyncio.sleep(LEASE / 4)
            await asyncio.to_thread(tier.renew, self.lease, LEASE)

    def _names(self, *requests: Request) -> list[str]:
        """Names of the full blocks of these requests' prompts, without repetitions; by default of all prompts."""
        names = self.model.driver.engine.block_names
        chosen = requests or [p.request for p in self.prompts]
        return list(dict.fromkeys(name for r in chosen for name in names.of(r.prompt, r.salt)))

    def _handed(self, tier: DiskTier, names: Sequence[str]) -> int:
        """Number of the first prompt's tokens whose K/V blocks are in the tier and pinned.

        Waits until all blocks being saved are in the tier.
        """
        tier.flush()
        blocks = tier.handed(self.lease, names) if self.lease else 0
        return blocks * self.model.driver.engine.block_names.block_size


def renew_leases(model: ServedModel, renewed: Sequence[str], released: Sequence[str]) -> None:
    """Renew and release leases that a router holds on blocks in a model's tier. A lease that has run out stays so."""
    if tier := model.llm.tier:
        for lease in renewed:
            tier.renew(lease, LEASE)
        for lease in released:
            tier.release(lease)


def prompt_only(request: Request) -> Request:
    """A copy of `request` that computes only the prompt: it generates one token and ends."""
    return Request(
        request.id, request.prompt, SamplingParams(max_tokens=1, ignore_eos=True), priority=request.priority,
        queue_timeout=request.queue_timeout, timeout=request.timeout, salt=request.salt,
    )  # fmt: skip
