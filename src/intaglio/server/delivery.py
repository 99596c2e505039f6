"""Delivery of the response to a generation request: submits its prompts, sends the output whole or as a stream."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any
from urllib.parse import quote

from starlette.types import Receive, Scope, Send

from intaglio.server.answer import ChatChoice, Envelope, best, modelled, usage, usage_so_far
from intaglio.server.driver import ChoiceDelta, Prepared, Submission
from intaglio.server.problem import Json, Problem, dumps
from intaglio.server.protocol import ChatRequest, CompletionRequest
from intaglio.server.served_model import ServedModel

DONE = b"data: [DONE]\n\n"
SAFE = "/[]()@:*"  # characters besides letters, digits and _.-~ that a header's names keep


class ClientDisconnected(Exception):
    """Raised when the client has closed its connection before the response was complete."""


class Answer:
    """ASGI response to a generation request: submits the prompts to the engine and sends the output, whole or streamed.

    If the client disconnects, the request is cancelled in the engine.

    prompts: the prompts of the body. choices: a response builder for each choice. envelope: the response's other
    fields. ignored: names of request fields that have no effect, for the header X-Ignored-Fields. earlier: the output,
    as deltas, that another replica has already sent to the client; this response continues after it.

    Raises Problem if stream_options or prompt_logprobs contradicts `stream`.
    """

    def __init__(
        self, model: ServedModel, body: ChatRequest | CompletionRequest, prompts: list[Prepared], choices: list[Any],
        envelope: Envelope, ignored: Sequence[str], earlier: Sequence[ChoiceDelta] = (),
    ) -> None:  # fmt: skip
        self.model, self.body, self.prompts, self.choices, self.envelope = model, body, prompts, choices, envelope
        # names are the client's own; percent-encoded, for a header holds only printable ASCII
        self.headers = {"x-ignored-fields": ", ".join(quote(name, safe=SAFE) for name in ignored)} if ignored else {}
        self.earlier = earlier
        if body.stream_options is not None and not body.stream:
            raise Problem(400, "stream_options goes with stream=true", param="stream_options")
        if body.prompt_logprobs is not None and body.stream:
            raise Problem(400, "prompt_logprobs does not go with stream=true", param="prompt_logprobs")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.model.driver.submitted(self.prompts, self.earlier) as submission:
            try:
                await while_connected(scope, self._answer(submission, scope, receive, send))
            finally:
                self.model.trace(submission)

    async def _answer(self, submission: Submission, scope: Scope, receive: Receive, send: Send) -> None:
        await submission.admitted
        if self.body.stream:
            return await self._stream(submission, send)
        for delta in self.earlier:
            self.choices[delta.choice].feed(delta)
        async for deltas in submission.deltas():
            for delta in deltas:
                self.choices[delta.choice].feed(delta)
            await self._note(send, deltas, not submission.open)
        choices = best(self.choices, self.body.n or 1, submission.n)
        more: dict[str, Any] = {}
        if isinstance(self.body, ChatRequest):
            ids = self.envelope.first.get("prompt_token_ids")
            more = {"prompt_logprobs": self.choices[0].prompt_scores, "prompt_token_ids": ids}
        whole = self.envelope.whole(choices, self._usage(submission), **more)
        await Json(whole, headers=self.headers)(scope, receive, send)

    async def _stream(self, submission: Submission, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        headers += [(name.encode(), value.encode()) for name, value in self.headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        options = self.body.stream_options
        with_usage = bool(options and options.include_usage)
        each = with_usage and bool(options and options.continuous_usage_stats)
        output = sum(delta.scored is not None for delta in self.earlier)
        if any([self.choices[delta.choice].feed(delta) for delta in self.earlier]):  # those chunks have been sent
            self.envelope.first = {}
        try:
            async for deltas in submission.deltas():
                events = []
                for delta in deltas:
                    output += delta.scored is not None
                    if choice := self.choices[delta.choice].feed(delta):
                        so_far = usage_so_far(submission, output * self._generates) if each else None
                        events.append(_event(self.envelope.chunk([choice], so_far, with_usage)))
                await self._send(send, b"".join(events), deltas)
        except Problem as problem:  # the status line has been sent, so the error goes into the stream
            return await self._fail(send, problem)
        end = _event(self.envelope.chunk([], self._usage(submission), True)) if with_usage else b""
        await self._send(send, end + DONE, (), more=False)

    async def _note(self, send: Send, deltas: Sequence[ChoiceDelta], last: bool) -> None:
        """Hook for subclasses; does nothing here. Called with each list of new deltas if the response is not streamed.

        last: True if no more deltas follow.
        """

    async def _send(self, send: Send, body: bytes, deltas: Sequence[ChoiceDelta], more: bool = True) -> None:
        """Send events of a stream to the client. Returns nothing.

        body: one or more events as bytes; nothing is sent if it is empty. more: False if the stream ends after this
        body. deltas: the engine's deltas from which the events were made; only subclasses use them.
        """
        if body:
            await send({"type": "http.response.body", "body": body, "more_body": more})

    async def _fail(self, send: Send, problem: Problem) -> None:
        """Send `problem` as an error event and end the stream."""
        await self._send(send, _event(problem.as_dict()) + DONE, (), more=False)

    @property
    def _generates(self) -> bool:
        """True if the request generates tokens; False if it only scores the prompt (max_tokens is 0)."""
        return self.body.max_tokens != 0

    def _usage(self, submission: Submission) -> dict[str, Any]:
        chats = [choice for choice in self.choices if isinstance(choice, ChatChoice)]
        reasons = any(choice.style.thinking or choice.style.harmony for choice in chats)
        reasoning = sum(choice.reasoning_tokens for choice in chats) if reasons else None
        counts = usage(submission, self._generates, reasoning)
        by = self.model.llm.modelled
        return {**counts, "modelled": modelled(submission, by)} if by else counts


def _event(value: Any) -> bytes:
    return b"data: " + dumps(value) + b"\n\n"


async def while_connected(scope: Scope, work: Coroutine[Any, Any, None]) -> None:
    """Run `work`; if the client disconnects first, cancel it and raise ClientDisconnected. Returns nothing.

    scope: the ASGI scope of the request. The future scope["state"]["disconnected"] is done once the client has
    disconnected.
    """
    disconnected: asyncio.Future[None] = scope["state"]["disconnected"]
    worker, left, over = asyncio.current_task(), False, False
    assert worker is not None

    def cancel(_: asyncio.Future[None]) -> None:
        nonlocal left
        if not over:
            left = True
            worker.cancel()

    disconnected.add_done_callback(cancel)
    try:
        await work
    except asyncio.CancelledError:
        if left and not worker.uncancel():  # else others have cancelled it too, and want to see that
            raise ClientDisconnected from None
        raise
    finally:
        over = True  # remove_done_callback() does not stop a call that the loop has already scheduled
        disconnected.remove_done_callback(cancel)
