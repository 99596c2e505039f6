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


class Prefill:
    """ASGI response to a request whose prompts are computed here and continued by another replica.

    The engine saves each K/V block to its tier as soon as the block is full. The response, {"tokens", "handed"}, comes
    when all are saved: the length of the first prompt, and how many of its tokens are in the tier. Nothing is computed
    if the engine has no tier, or if the logits of prompt tokens are wanted, for which the other replica computes the
    prompt anyway.
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
        handed = await asyncio.to_thread(self._handed)
        await Json({"tokens": len(self.first.prompt), "handed": handed})(scope, receive, send)

    async def _run(self, submission: Submission) -> None:
        await submission.admitted
        async for _ in submission.deltas():
            pass

    def _handed(self) -> int:
        """Number of tokens of the first prompt whose blocks are in the tier, once all saved blocks are there."""
        tier, names = self.model.llm.tier, self.model.driver.engine.block_names
        if tier is None or not self.model.saves_blocks:
            return 0
        tier.flush()
        return tier.lookup(names.of(self.first.prompt, self.first.salt)) * names.block_size


def prompt_only(request: Request) -> Request:
    """The Request that computes only the prompt of `request`: it ends with the first token."""
    return Request(
        request.id, request.prompt, SamplingParams(max_tokens=1, ignore_eos=True), priority=request.priority,
        queue_timeout=request.queue_timeout, timeout=request.timeout, salt=request.salt,
    )  # fmt: skip
