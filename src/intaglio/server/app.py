"""ASGI application: routes, API keys, limits and the sending of responses. Generated output is built in answer.py."""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from intaglio import __version__
from intaglio.server import openapi
from intaglio.server.answer import ChatChoice, Choice, CompletionChoice, Envelope
from intaglio.server.conversation import render
from intaglio.server.delivery import Answer, ClientDisconnected
from intaglio.server.driver import Prepared
from intaglio.server.incoming import CLOSE, check_key, read_body, request_id
from intaglio.server.prefill import Prefill
from intaglio.server.prepare import Settings, encode, prepare_chat, prepare_completion
from intaglio.server.problem import Json, Problem, as_problem
from intaglio.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    GenerationRequest,
    TokenizeChat,
    TokenizeText,
    error_message,
)
from intaglio.server.relay import Relay, RelayedAnswer
from intaglio.server.served_model import ServedModel
from intaglio.server.service import Service
from intaglio.server.tracing import traced

log = logging.getLogger("intaglio.server")
B = TypeVar("B", bound=BaseModel)
PUBLIC_PATHS = frozenset(  # no API key, no limit of requests
    ("/", "/health", "/ping", "/ready", "/version", "/metrics", "/openapi.json")
)
PAGE = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"


def build(service: Service) -> ASGIApp:
    """Returns the ASGI application of the HTTP server. It serves all models of `service`."""
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
        Route("/ping", api.health, methods=["GET", "POST"]),
        Route("/ready", api.ready),
        Route("/version", api.version),
        Route("/metrics", api.metrics),
        Route("/openapi.json", api.openapi),
        Route("/", api.page),
    ]
    app: ASGIApp = Guard(Router(routes, redirect_slashes=False), service)
    if service.options.origins:
        app = CORSMiddleware(app, allow_origins=list(service.options.origins), allow_methods=["*"], allow_headers=["*"])
    return app


def _unrouted(scope: Scope, error: HTTPException) -> Problem:
    """Returns the error response, a Problem, for a request that no route takes.

    The status is 404 for an unknown path, and 405 for a method that the path does not take.

    scope: the ASGI scope of the request. error: the router's exception; its status code and headers are kept.
    """
    where = f"{scope['method']} {scope['path']}"
    what = {404: f"{where}: there is no such path", 405: f"{where}: the path does not take this method"}
    return Problem(error.status_code, what[error.status_code], headers=dict(error.headers or {}))


class Guard:
    """Middleware around all routes: checks API keys, limits concurrent requests, sets request ids, reports errors."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request = Request(scope)
        scope["state"]["id"] = id = request_id(request.headers.get("x-request-id", ""))
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message["headers"], (b"x-request-id", id.encode())]
            await send(message)

        scope["app"] = self  # makes the router raise errors instead of writing responses
        counted = scope["path"] not in PUBLIC_PATHS
        self.service.open += counted
        try:
            if counted:
                self._admit(request)
            with traced(self.service.options.tracing, request.method, scope["path"], request.headers):
                await self.app(scope, receive, send_with_id)
        except ClientDisconnected:
            log.info("%s: the client has disconnected", id)
        except Exception as e:
            problem = _unrouted(scope, e) if isinstance(e, HTTPException) else as_problem(e)
            if problem is None:
                log.error("%s: %s %s failed", id, scope["method"], scope["path"], exc_info=e)
                problem = Problem(500, f"internal error; the log has it under {id}")
            if started:
                raise
            await problem.response()(scope, receive, send_with_id)
        finally:
            self.service.open -= counted

    def _admit(self, request: Request) -> None:
        options = self.service.options
        if options.keys and request.method != "OPTIONS":
            check_key(options.keys, request.headers.get("authorization", ""))
        if self.service.open > options.max_open:
            why = f"{options.max_open} requests are open already; retry later"
            raise Problem(429, why, code="too_many_requests", retry_after=1, headers={"connection": "close"})


class Api:
    """The HTTP handlers, one method per endpoint."""

    def __init__(self, service: Service) -> None:
        self.service = service

    # Generation

    async def chat(self, request: Request) -> ASGIApp:
        """POST /v1/chat/completions. Returns an ASGI response that generates the output, sent whole or as a stream.

        Raises Problem, or an error that as_problem() converts, if the request is invalid or refused.
        """
        body = await self._body(request, ChatRequest)
        relay = _relay(request)
        id = f"chatcmpl-{relay.id if relay else uuid.uuid4().hex}"
        model = self.service.find(body.model)
        prompt, reading = await self._prepare(prepare_chat, model, body, id)
        n = prompt.request.params.n
        choices = [ChatChoice(i, prompt, body, reading, model.vocabulary) for i in range(n)]
        first = {"prompt_token_ids": list(prompt.request.prompt)} if body.return_token_ids else None
        created = relay.created if relay else None
        envelope = Envelope("chat.completion", _public_id(id, body), model.name, first, created)
        return self._answer(relay, model, body, [prompt], choices, envelope, reading.ignored)

    async def complete(self, request: Request) -> ASGIApp:
        """POST /v1/completions. Returns an ASGI response that generates the output, sent whole or as a stream.

        Raises Problem, or an error that as_problem() converts, if the request is invalid or refused.
        """
        body = await self._body(request, CompletionRequest)
        relay = _relay(request)
        id = f"cmpl-{relay.id if relay else uuid.uuid4().hex}"
        model = self.service.find(body.model)
        prompts, readings = await self._prepare(prepare_completion, model, body, id)
        choices: list[Choice] = []
        for prompt, reading in zip(prompts, readings, strict=True):
            for _ in range(prompt.request.params.n):
                choices.append(CompletionChoice(len(choices), prompt, body, reading, model.vocabulary))
        created = relay.created if relay else None
        envelope = Envelope("text_completion", _public_id(id, body), model.name, None, created)
        return self._answer(relay, model, body, prompts, choices, envelope, readings[0].ignored)

    @staticmethod
    def _answer(
        relay: Relay | None, model: ServedModel, body: Any, prompts: list[Prepared], choices: list[Any],
        envelope: Envelope, ignored: Sequence[str],
    ) -> ASGIApp:  # fmt: skip
        """Returns the ASGI response that computes and sends the answer to a generation request.

        - A request that came from a client directly: an Answer.
        - A request from a router that asks only for the prompt's K/V cache: a Prefill. Another replica generates the
          output.
        - Any other request from a router: a RelayedAnswer. The router may name a peer, a replica that has the K/V cache
          of the prompts. This method then arranges that the engine fetches the cache from the peer.

        relay: the fields that a router added to the request; None if it came from a client. body: the parsed request.
        prompts: the prompts of the body. choices: a response builder for each choice. envelope: the response's other
        fields, such as its id. ignored: names of the request's fields that have no effect.

        Raises Problem if this replica cannot continue an output that another replica began, or if stream_options or
        prompt_logprobs contradicts `stream`.
        """
        if relay is None:
            return Answer(model, body, prompts, choices, envelope, ignored)
        prompts = relay.prepared(prompts, model.identity)
        if relay.prefill:
            return Prefill(model, prompts)
        if relay.peer:
            model.announce([prompt.request for prompt in prompts], relay.peer)
        return RelayedAnswer(model, body, prompts, choices, envelope, ignored, relay.deltas)

    async def _prepare(self, how: Callable[..., Any], model: ServedModel, body: BaseModel, id: str) -> Any:
        refusal = self.service.admitting(model)
        if refusal and refusal.code != "queue_full":  # for a full queue the engine estimates Retry-After
            raise refusal
        settings = Settings(self.service.options.limits, model.defaults)
        return await self.service.prepare(how, model.llm, body, id, settings)

    async def embed(self, request: Request) -> Response:
        """POST /v1/embeddings. Always raises Problem: no model here computes embeddings."""
        model = self.service.find((await self._body(request, EmbeddingRequest)).model)
        raise Problem(400, f"{model.name} generates text; it gives no embeddings", param="model", code="unsupported")

    # Tokenizer

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize. Returns the response with the token ids of a text or of a conversation.

        Raises Problem if the body is invalid or the model has no tokenizer.
        """
        raw = await self._read(request)
        chat = re.search(rb'"messages"\s*:', raw)
        body: TokenizeChat | TokenizeText = self._parse(raw, TokenizeChat) if chat else self._parse(raw, TokenizeText)
        model = self.service.find(body.model)
        ids = await self.service.prepare(self._tokenized, model, body)
        answer = {"count": len(ids), "max_model_len": model.llm.model.program.context, "tokens": ids}
        if body.return_token_strs:
            answer["token_strs"] = [model.vocabulary.piece(id)[0] for id in ids]
        return Json(answer)

    @staticmethod
    def _tokenized(model: ServedModel, body: TokenizeChat | TokenizeText) -> list[int]:
        if isinstance(body, TokenizeText):
            return encode(model.llm, body.prompt, special=body.add_special_tokens is not False)
        return encode(model.llm, render(model.llm, body).text, special=False)

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize. Returns the response with the text of token ids.

        Raises Problem if an id is outside the vocabulary or the model has no tokenizer.
        """
        body = await self._body(request, DetokenizeRequest)
        model = self.service.find(body.model)
        top = model.llm.model.program.vocabulary - 1
        if bad := [id for id in body.tokens if id > top]:
            raise Problem(400, f"tokens: {bad[0]} is outside 0..{top}", param="tokens")
        return Json({"prompt": await self.service.prepare(self._decode, model, body.tokens)})

    @staticmethod
    def _decode(model: ServedModel, ids: list[int]) -> str:
        if model.llm.model.tokenizer is None:
            raise Problem(400, f"{model.name} has no tokenizer", param="model")
        return model.llm.model.tokenizer.decode(ids, skip_special=False)

    # Models and status

    async def models(self, request: Request) -> Response:
        """GET /v1/models. Returns the response with the list of served models."""
        return Json({"object": "list", "data": [m.card(self.service.started) for m in self.service.models.values()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME. Returns the response that describes one served model.

        Raises Problem 404 if no model with this name is served.
        """
        return Json(self.service.find(request.path_params["name"]).card(self.service.started))

    async def health(self, request: Request) -> Response:
        """GET /health. Returns a response with status 200 if the engine of every model works, else 503.

        An engine does not work if it has failed, or if its current step takes longer than the option step_timeout.
        """
        why = self.service.alive()
        return Json({"status": why or "ok"}, 503 if why else 200)

    async def version(self, request: Request) -> Response:
        """GET /version. Returns the response with the version of the package."""
        return Json({"version": __version__})

    async def ready(self, request: Request) -> Response:
        """GET /ready. Returns a response with status 200 if at least one model would admit a request now.

        Raises Problem 503 otherwise.
        """
        if refusal := self.service.ready():
            raise refusal
        return Json({"status": "ready"})

    async def metrics(self, request: Request) -> Response:
        """GET /metrics. Returns the response with all metrics in Prometheus' text format."""
        return Response(self.service.metrics.render(), media_type="text/plain; version=0.0.4")

    async def state(self, request: Request) -> Response:
        """GET /state. Returns a JSON response with queue, K/V cache and steps of one model, and all models' names.

        The query parameter `model` selects the model (default: the first). The query parameter `since` is the number of
        a step: only later steps are included. Raises Problem if one of these parameters is invalid.
        """
        since = request.query_params.get("since", "0")
        if not re.fullmatch("[0-9]{1,18}", since, re.ASCII):
            raise Problem(400, f"since is {since!r}; allowed: the number of a step", param="since")
        name = request.query_params.get("model", next(iter(self.service.models)))
        return Json({**self.service.find(name).state(int(since)), "models": list(self.service.models)})

    async def openapi(self, request: Request) -> Response:
        """GET /openapi.json. Returns the response with the OpenAPI description of the server."""
        return Json(openapi.describe(tuple(self.service.models)))

    async def page(self, request: Request) -> Response:
        """GET /. Returns the response with the status page as HTML."""
        html = files("intaglio.server").joinpath("page.html").read_bytes()
        return Response(html, media_type="text/html", headers={"content-security-policy": PAGE})

    # Request bodies

    async def _body(self, request: Request, kind: type[B]) -> B:
        return self._parse(await self._read(request), kind)

    def _parse(self, raw: bytes, kind: type[B]) -> B:
        try:
            body = kind.model_validate_json(raw)
        except ValidationError as e:
            errors: list[Any] = e.errors(include_url=False, include_context=False, include_input=False)
            worst = max(errors, key=_weight)
            message, param = error_message(kind, worst)
            raise Problem(400, message, param=param or None) from None
        return body

    async def _read(self, request: Request) -> bytes:
        """Returns the request's body as bytes.

        Raises Problem 415 if the content type is not application/json, 408 if the body comes too slowly, and 413 if it
        is too long. Raises ClientDisconnected if the client closes its connection.

        Browsers send application/json to another origin only if CORS allows it; therefore no other content type is
        accepted.
        """
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":
            raise Problem(415, f"the content type is {kind or 'missing'}; allowed: application/json", headers=CLOSE)
        options, length = self.service.options, int(request.headers.get("content-length", "0"))
        return await read_body(request.receive, options.max_body, options.read_timeout, length)


def _relay(request: Request) -> Relay | None:
    """Returns the Relay of a request; None if the request did not come from a router.

    A Relay has the fields that a router adds before it forwards the request to this replica.
    """
    relay: Relay | None = request.scope.get("relay")
    return relay


def _public_id(id: str, body: GenerationRequest) -> str:
    """Returns the id that the client sees in the response: `id`, unless the request's body gives a request_id.

    With a request_id, the part of `id` after the first hyphen is replaced by it: "cmpl-17" and request_id "abc" give
    "cmpl-abc". The engine uses `id` in both cases.
    """
    return f"{id.split('-')[0]}-{body.request_id}" if body.request_id else id


def _weight(error: Any) -> tuple[bool, bool, int]:
    """Returns a sort key, a tuple, for one of pydantic's validation errors; the error with the largest key is reported.

    Pydantic reports several errors if a value matches no member of a union. An error about an unknown field has the
    largest key. Next come errors about wrong values, then errors about wrong types. Among errors of one kind, the error
    at the deepest place in the body has the largest key.
    """
    kind = error["type"]
    return kind == "extra_forbidden", not kind.endswith("_type"), len(error["loc"])
