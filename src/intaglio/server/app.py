"""The HTTP face: routes, keys, limits, and how an answer goes out. What an answer says is in answer.py."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import uuid
from collections.abc import Callable, Coroutine
from importlib.resources import files
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from intaglio.server import openapi
from intaglio.server.answer import ChatChoice, Choice, CompletionChoice, Envelope, modelled, usage, usage_so_far
from intaglio.server.driver import Job, Ticket
from intaglio.server.prepare import chat_job, completion_jobs, encode, render
from intaglio.server.problem import Json, Problem, dumps, told
from intaglio.server.protocol import (
    Asked,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeChat,
    TokenizeText,
    expected,
)
from intaglio.server.service import Service

log = logging.getLogger("intaglio.server")
B = TypeVar("B", bound=BaseModel)
OPEN = frozenset(("/", "/health", "/ready", "/metrics", "/openapi.json"))  # no key, and answered when all is full
PAGE = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"
DONE = b"data: [DONE]\n\n"


def build(service: Service) -> ASGIApp:
    """The application of one service."""
    api = Api(service)
    post = ["POST"]
    routes = [
        Route("/v1/chat/completions", api.chat, methods=post),
        Route("/v1/completions", api.complete, methods=post),
        Route("/v1/embeddings", api.embed, methods=post),
        Route("/v1/models", api.models),
        Route("/v1/models/{name:path}", api.model),
        Route("/tokenize", api.tokenize, methods=post),
        Route("/detokenize", api.detokenize, methods=post),
        Route("/state", api.state),
        Route("/health", api.health),
        Route("/ready", api.ready),
        Route("/metrics", api.metrics),
        Route("/openapi.json", api.openapi),
        Route("/", api.page),
    ]
    app: ASGIApp = Guard(Router(routes, redirect_slashes=False), service)
    if service.options.origins:
        app = CORSMiddleware(app, allow_origins=list(service.options.origins), allow_methods=["*"], allow_headers=["*"])
    return app


def _unrouted(scope: Scope, error: HTTPException) -> Problem:
    """What the router raises: no such path, or not with this method."""
    where = f"{scope['method']} {scope['path']}"
    what = {404: f"{where}: there is no such path", 405: f"{where}: the path does not take this method"}
    return Problem(error.status_code, what[error.status_code], headers=dict(error.headers or {}))


class Guard:
    """Around everything: keys, the number of open requests, a request's id, and errors as answers."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request = Request(scope)
        given = request.headers.get("x-request-id", "")
        scope["state"]["id"] = id = given if re.fullmatch(r"[\w.-]{1,128}", given, re.ASCII) else uuid.uuid4().hex
        started = False

        async def tell(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message["headers"], (b"x-request-id", id.encode())]
            await send(message)

        scope["app"] = self  # so that the router raises what it finds wrong, and writes no answer of its own
        counted = scope["path"] not in OPEN
        self.service.open += counted
        try:
            if counted:
                self._admit(request)
            await self.app(scope, receive, tell)
        except Gone:
            log.info("%s: the client has gone", id)
        except Exception as e:
            problem = _unrouted(scope, e) if isinstance(e, HTTPException) else told(e)
            if problem is None:
                log.error("%s: %s %s failed", id, scope["method"], scope["path"], exc_info=e)
                problem = Problem(500, f"internal error; the log has it under {id}")
            if started:
                raise
            await problem.response()(scope, receive, tell)
        finally:
            self.service.open -= counted

    def _admit(self, request: Request) -> None:
        options = self.service.options
        if options.keys and request.method != "OPTIONS":
            scheme, _, key = request.headers.get("authorization", "").partition(" ")
            given = key.strip().encode() if scheme.lower() == "bearer" else b""
            if not any([hmac.compare_digest(given, k.encode()) for k in options.keys]):
                headers = {"www-authenticate": "Bearer"}
                why = "a valid API key is needed: Authorization: Bearer KEY"
                raise Problem(401, why, code="invalid_api_key", headers=headers)
        if self.service.open > options.max_open:
            why = f"{options.max_open} requests are open already; retry later"
            raise Problem(429, why, code="too_many_requests", retry_after=1, headers={"connection": "close"})


class Gone(Exception):
    """The client has closed its connection."""


class Api:
    """The endpoints."""

    def __init__(self, service: Service) -> None:
        self.service, self.llm, self.name = service, service.llm, service.options.name

    # Generating

    async def chat(self, request: Request) -> ASGIApp:
        body = await self._body(request, ChatRequest)
        id = f"chatcmpl-{uuid.uuid4().hex}"
        job, style = await self._prepare(chat_job, body, id)
        choices = [ChatChoice(i, body, style, self.service.vocabulary) for i in range(job.request.params.n)]
        return Answer(self.service, body, [job], choices, Envelope("chat.completion", id, self.name))

    async def complete(self, request: Request) -> ASGIApp:
        body = await self._body(request, CompletionRequest)
        id = f"cmpl-{uuid.uuid4().hex}"
        jobs = await self._prepare(completion_jobs, body, id)
        texts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        choices: list[Choice] = []
        for i, job in enumerate(jobs):
            text = texts[i] if len(texts) == len(jobs) and isinstance(texts[i], str) else None
            if body.echo and text is None:
                text = await self.service.prepare(self._decode, list(job.request.prompt))
            for _ in range(job.request.params.n):
                choices.append(CompletionChoice(len(choices), job, body, str(text or ""), self.service.vocabulary))
        return Answer(self.service, body, jobs, choices, Envelope("text_completion", id, self.name))

    async def _prepare(self, how: Callable[..., Any], body: BaseModel, id: str) -> Any:
        refusal = self.service.admitting()
        if refusal and refusal.code != "queue_full":  # the engine itself says when to come back to a full queue
            raise refusal
        return await self.service.prepare(how, self.llm, body, id, self.service.options.limits)

    async def embed(self, request: Request) -> Response:
        await self._body(request, EmbeddingRequest)
        raise Problem(400, f"{self.name} generates text; it gives no embeddings", param="model", code="unsupported")

    # Text and ids

    async def tokenize(self, request: Request) -> Response:
        raw = await self._read(request)
        chat = re.search(rb'"messages"\s*:', raw)
        body: TokenizeChat | TokenizeText = self._parse(raw, TokenizeChat) if chat else self._parse(raw, TokenizeText)
        ids = await self.service.prepare(self._tokenized, body)
        answer = {"count": len(ids), "max_model_len": self.llm.program.context, "tokens": ids}
        if body.return_token_strs:
            answer["token_strs"] = [self.service.vocabulary.piece(id)[0] for id in ids]
        return Json(answer)

    def _tokenized(self, body: TokenizeChat | TokenizeText) -> list[int]:
        if isinstance(body, TokenizeText):
            return encode(self.llm, body.prompt, special=body.add_special_tokens is not False)
        asked = body.add_generation_prompt is not False
        return encode(self.llm, render(self.llm, body, add_generation_prompt=asked), special=False)

    async def detokenize(self, request: Request) -> Response:
        body = await self._body(request, DetokenizeRequest)
        top = self.llm.program.vocabulary - 1
        if bad := [id for id in body.tokens if id > top]:
            raise Problem(400, f"tokens: {bad[0]} is outside 0..{top}", param="tokens")
        return Json({"prompt": await self.service.prepare(self._decode, body.tokens)})

    def _decode(self, ids: list[int]) -> str:
        if self.llm.tokenizer is None:
            raise Problem(400, f"{self.name} has no tokenizer", param="model")
        return self.llm.tokenizer.decode(ids, skip_special=False)

    # What there is, and how it fares

    async def models(self, request: Request) -> Response:
        return Json({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return Json(self._model())

    def _model(self) -> dict[str, Any]:
        facts = {"id": self.name, "object": "model", "created": self.service.started, "owned_by": "intaglio"}
        return {**facts, "root": self.llm.path.name, "parent": None, "max_model_len": self.llm.program.context}

    async def health(self, request: Request) -> Response:
        why = self.service.alive()
        return Json({"status": why or "ok"}, 503 if why else 200)

    async def ready(self, request: Request) -> Response:
        if refusal := self.service.admitting():
            raise refusal
        return Json({"status": "ready"})

    async def metrics(self, request: Request) -> Response:
        return Response(self.service.metrics.render(), media_type="text/plain; version=0.0.4")

    async def state(self, request: Request) -> Response:
        since = request.query_params.get("since", "0")
        if not re.fullmatch("[0-9]{1,18}", since, re.ASCII):
            raise Problem(400, f"since is {since!r}; allowed: the number of a step", param="since")
        return Json(self.service.state(int(since)))

    async def openapi(self, request: Request) -> Response:
        return Json(openapi.describe(self.name))

    async def page(self, request: Request) -> Response:
        html = files("intaglio.server").joinpath("page.html").read_bytes()
        return Response(html, media_type="text/html", headers={"content-security-policy": PAGE})

    # Bodies

    async def _body(self, request: Request, kind: type[B]) -> B:
        return self._parse(await self._read(request), kind)

    def _parse(self, raw: bytes, kind: type[B]) -> B:
        try:
            body = kind.model_validate_json(raw)
        except ValidationError as e:
            errors: list[Any] = e.errors(include_url=False, include_context=False, include_input=False)
            worst = max(errors, key=_weight)
            message, param = expected(kind, worst)
            raise Problem(400, message, param=param or None) from None
        self._check_model(getattr(body, "model", None))
        return body

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.name:
            why = f"there is no model {name!r}; there is {self.name!r}"
            raise Problem(404, why, param="model", code="model_not_found")

    async def _read(self, request: Request) -> bytes:
        """The body, of a kind that a browser sends to another origin only if CORS allows it."""
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":
            raise Problem(415, f"the content type is {kind or 'missing'}; allowed: application/json", headers=CLOSE)
        most, seconds = self.service.options.max_body, self.service.options.reading
        length = request.headers.get("content-length", "0")
        raw = bytearray()
        try:
            async with asyncio.timeout(seconds):
                while int(length) <= most and len(raw) <= most:
                    message = await request.receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    raw += message.get("body", b"")
                    if not message.get("more_body", False) and len(raw) <= most:
                        return bytes(raw)
        except TimeoutError:
            raise Problem(408, f"the body did not come in {seconds:g} s", headers=CLOSE) from None
        raise Problem(413, f"the body is over {most} bytes, which is the limit", headers=CLOSE)


CLOSE = {"connection": "close"}


class Answer:
    """Asks the engine and answers with what comes: piece by piece for a stream, else at the end. If the client goes,
    so does what it asked for."""

    def __init__(self, service: Service, body: Asked, jobs: list[Job], choices: list[Any], envelope: Envelope) -> None:
        self.service, self.asked, self.jobs, self.choices, self.envelope = service, body, jobs, choices, envelope
        if body.stream_options is not None and not body.stream:
            raise Problem(400, "stream_options goes with stream=true", param="stream_options")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.service.driver.submitted(self.jobs) as ticket:
            await _attended(receive, self._answer(ticket, scope, receive, send))

    async def _answer(self, ticket: Ticket, scope: Scope, receive: Receive, send: Send) -> None:
        await ticket.admitted
        if self.asked.stream:
            return await self._stream(ticket, send)
        async for pieces in ticket.pieces():
            for piece in pieces:
                self.choices[piece.choice].feed(piece)
        whole = self.envelope.whole([choice.whole() for choice in self.choices], self._usage(ticket))
        await Json(whole)(scope, receive, send)

    async def _stream(self, ticket: Ticket, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        options = self.asked.stream_options
        told_usage = bool(options and options.include_usage)
        each = told_usage and bool(options and options.continuous_usage_stats)
        output = 0
        try:
            async for pieces in ticket.pieces():
                output += sum(piece.scored is not None for piece in pieces)
                news = [new for piece in pieces if (new := self.choices[piece.choice].feed(piece))]
                if news:
                    so_far = usage_so_far(ticket, output * self._generates) if each else None
                    chunks = [self.envelope.chunk([new], so_far, told_usage) for new in news]
                    await self._send(send, b"".join(_event(chunk) for chunk in chunks))
        except Problem as problem:  # the status has gone out, so it is told in the stream
            return await self._send(send, _event(problem.as_dict()) + DONE, more=False)
        end = _event(self.envelope.chunk([], self._usage(ticket), True)) if told_usage else b""
        await self._send(send, end + DONE, more=False)

    @staticmethod
    async def _send(send: Send, body: bytes, more: bool = True) -> None:
        await send({"type": "http.response.body", "body": body, "more_body": more})

    @property
    def _generates(self) -> bool:
        """Whether tokens are generated, not only those of the prompt scored."""
        return getattr(self.asked, "max_tokens", None) != 0

    def _usage(self, ticket: Ticket) -> dict[str, Any]:
        told = usage(ticket, self._generates)
        by = self.service.llm.modelled
        return {**told, "modelled": modelled(ticket, by)} if by else told


def _weight(error: Any) -> tuple[bool, bool, int]:
    """Which of a body's errors to tell: of the arms of a union, the one that came closest."""
    kind = error["type"]
    return kind == "extra_forbidden", not kind.endswith("_type"), len(error["loc"])


def _event(value: Any) -> bytes:
    return b"data: " + dumps(value) + b"\n\n"


async def _attended(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do the work as long as the client is there. Raises Gone if it goes."""
    doing = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_leaves(receive))
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise Gone
        await doing
    finally:
        for task in (doing, leaving):
            task.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)


async def _leaves(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
