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


class Prefill:
    """ASGI response to a request whose prompts are computed here, while another replica generates the output.

    The engine saves each full K/V block to its tier. When all blocks are saved, the response {"tokens", "handed"} is
    sent: the length of the first prompt, and how many of its tokens have their K/V in the tier.

    Nothing is computed if the engine has no tier, or for prompts whose log-probabilities are wanted: those the other
    replica computes itself.
    """

    def __init__(self, model: ServedModel, prompts: Sequence[Prepared]) -> None:
        self.model = model
        self.first = prompts[0].request
        wanted = [p for p in prompts if p.request.params.prompt_logprobs is None and not p.request.scored]
        self.prompts = [Prepared(prompt_only(p.request), p.transcripts[:1]) for p in wanted]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.prompts and self.model.saves_blocks:
            with self.model.driver.submitted(self.prompts) as submission:
                await while_connected(receive, self._run(submission))
                self.model.trace(submission)
        with span("save K/V"):
            handed = await asyncio.to_thread(self._handed)
        await Json({"tokens": len(self.first.prompt), "handed": handed})(scope, receive, send)

    async def _run(self, submission: Submission) -> None:
        await submission.admitted
        async for _ in submission.deltas():
            pass

    def _handed(self) -> int:
        """Number of the first prompt's tokens whose K/V blocks are in the tier; 0 if the engine saves none.

        Waits until all blocks being saved are in the tier.
        """
        tier, names = self.model.llm.tier, self.model.driver.engine.block_names
        if tier is None or not self.model.saves_blocks:
            return 0
        tier.flush()
        return tier.lookup(names.of(self.first.prompt, self.first.salt)) * names.block_size


def prompt_only(request: Request) -> Request:
    """A copy of `request` that computes only the prompt: it generates one token and ends."""
    return Request(
        request.id, request.prompt, SamplingParams(max_tokens=1, ignore_eos=True), priority=request.priority,
        queue_timeout=request.queue_timeout, timeout=request.timeout, salt=request.salt,
    )  # fmt: skip
