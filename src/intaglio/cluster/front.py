"""ASGI application of the router: OpenAI's endpoints over all replicas, health, metrics and the cluster's state."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from intaglio.cluster.backends import Backends
from intaglio.cluster.link import LinkLost
from intaglio.cluster.metrics import RouterMetrics
from intaglio.cluster.prompt import TimeLimits, make_job
from intaglio.cluster.relayed import RelayedRequest
from intaglio.server.app import PAGE
from intaglio.server.delivery import ClientDisconnected, while_connected
from intaglio.server.incoming import check_key, read_body, request_id
from intaglio.server.problem import Json, Problem
from intaglio.server.tracing import GENERATE, Tracing, traced

log = logging.getLogger("intaglio.cluster")
PASSED_ON = frozenset(("/tokenize", "/detokenize", "/v1/embeddings", "/v1/models", "/openapi.json", "/version"))
PUBLIC = frozenset(("/", "/health", "/ping", "/ready", "/version", "/metrics", "/openapi.json"))  # no API key
PASSED_HEADERS = ("content-type",)
TENANT = "x-tenant-id"


@dataclass(frozen=True)
class FrontOptions:
    """Options of the router's HTTP application.

    Attributes:
        keys: accepted API keys; empty: no key is needed. A client that uses the first key is the tenant key0, one that
            uses the second key is key1, and so on.
        limits: how long a request may take and wait.
        max_body: maximum bytes of a request's body.
        max_open: maximum number of requests open at once; more are refused with 429.
        read_timeout: seconds within which a body must arrive.
        tracing: records a trace of each generation request; None: no traces.
    """

    keys: tuple[str, ...] = ()
    limits: TimeLimits = field(default_factory=TimeLimits)
    max_body: int = 8 << 20
    max_open: int = 4096
    read_timeout: float = 30.0
    tracing: Tracing | None = None


class Front:
    """The router's ASGI application. state: function that returns the cluster's state, for GET /cluster."""

    def __init__(self, backends: Backends, options: FrontOptions, state: Callable[[], dict[str, Any]]) -> None:
        self.backends, self.options, self.state = backends, options, state
        self.metrics = RouterMetrics(backends)
        self.open = 0
        self.draining = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        id = request_id(headers.get("x-request-id", ""))
        started = False

        async def send_marked(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                kept = [pair for pair in message["headers"] if pair[0].lower() != b"x-request-id"]
                message["headers"] = [*kept, (b"x-request-id", id.encode())]
            await send(message)

        counted = scope["path"] not in PUBLIC
        self.open += counted
        try:
            with traced(self.options.tracing, scope["method"], scope["path"], headers):
                await self._serve(scope, headers, id, receive, send_marked)
        except ClientDisconnected:
            log.info("%s: the client has disconnected", id)
        except Problem as problem:
            if started:
                raise
            await problem.response()(scope, receive, send_marked)
        except Exception as e:
            log.error("%s: %s %s failed", id, scope["method"], scope["path"], exc_info=e)
            if started:
                raise
            await Problem(500, f"internal error; the log has it under {id}").response()(scope, receive, send_marked)
        finally:
            self.open -= counted

    async def _serve(self, scope: Scope, headers: dict[str, str], id: str, receive: Receive, send: Send) -> None:
        path, method = scope["path"], scope["method"]
        tenant = self._tenant(path, headers)
        if path in GENERATE and method == "POST":
            return await self._generate(scope, headers, id, tenant, receive, send)
        if path in PASSED_ON or path.startswith("/v1/models/"):
            return await self._pass_on(scope, headers, receive, send)
        await self._own(path, method)(scope, receive, send)

    def _own(self, path: str, method: str) -> Response:
        """Returns the response to a request that the router answers itself, such as GET /health, /metrics or /cluster.

        Raises Problem 405 for a known path with a method that it does not take, 404 for an unknown path.
        """
        if method not in ("GET", "HEAD") and path in (*PUBLIC, *GENERATE, "/cluster"):
            raise Problem(405, f"{method} {path}: the path does not take this method")
        match path:
            case "/metrics":
                return Response(self.metrics.render(), media_type="text/plain; version=0.0.4")
            case "/health" | "/ping" | "/ready":
                if self.draining and path == "/ready":
                    return Json({"status": "the cluster is shutting down"}, 503)
                ready = any(r.placeable for r in self.backends.router.replicas.values())
                return Json({"status": "ok" if ready else "no replica is ready"}, 200 if ready else 503)
            case "/":
                html = files("intaglio.cluster").joinpath("page.html").read_bytes()
                return Response(html, media_type="text/html", headers={"content-security-policy": PAGE})
            case "/cluster":
                return Json(self.state())
        if path in GENERATE:
            raise Problem(405, f"{method} {path}: the path does not take this method")
        raise Problem(404, f"{method} {path}: there is no such path")

    def _tenant(self, path: str, headers: dict[str, str]) -> str:
        """Returns the name of the tenant to which a request is charged.

        - If API keys are set: key0 for the first key, key1 for the second key, and so on.
        - Without API keys, and for the paths in PUBLIC: the value of the header x-tenant-id; "" without that header.

        Raises Problem 401 for a missing or wrong key, and 429 if too many requests are open. Requests for the paths in
        PUBLIC, such as /health, are never refused.
        """
        keys = self.options.keys
        tenant = headers.get(TENANT, "")
        if keys and path not in PUBLIC:
            tenant = f"key{check_key(keys, headers.get('authorization', ''))}"
        if self.open > self.options.max_open and path not in PUBLIC:
            why = f"{self.options.max_open} requests are open already; retry later"
            raise Problem(429, why, code="too_many_requests", retry_after=1)
        return tenant

    async def _generate(
        self, scope: Scope, headers: dict[str, str], id: str, tenant: str, receive: Receive, send: Send
    ) -> None:
        raw = await read_body(receive, self.options.max_body, self.options.read_timeout)
        body = _parse(raw)
        backends = self.backends
        self.metrics.incoming(str(body.get("model", ""))[:64])
        if self.draining:
            raise Problem(503, "the cluster is shutting down and admits no requests", code="draining", retry_after=1)
        job = make_job(
            secrets.token_hex(16), body, backends.router.memory, backends.clock(), self.options.limits, tenant,
            backends.output_tokens,
        )  # fmt: skip
        passed = [(name, headers[name]) for name in PASSED_HEADERS if name in headers] + [("x-request-id", id)]
        request = RelayedRequest(backends, job, scope["path"], passed, raw, body.get("stream") is True)
        try:
            await while_connected(scope, request.run(send))
        finally:
            self.metrics.ended(request)

    async def _pass_on(self, scope: Scope, headers: dict[str, str], receive: Receive, send: Send) -> None:
        """Pass a request that generates no text, such as a list of models, to a replica, and send the response.

        Replicas are tried in order of their number of jobs, the fewest first. Raises Problem 503 if no replica answers,
        408 if the body comes too slowly, and 413 if the body is too large. Raises ClientDisconnected if the client
        disconnects.

        headers: the request's headers, with names in lower case. Only the headers in PASSED_HEADERS are sent to the
        replica.
        """
        raw = await read_body(receive, self.options.max_body, self.options.read_timeout)
        passed = [(name, headers[name]) for name in PASSED_HEADERS if name in headers]
        request = {
            "do": "request", "method": scope["method"], "path": scope["path"], "headers": passed,
            "query": scope["query_string"].decode("latin-1"),
        }  # fmt: skip
        for name, replica in sorted(self.backends.router.replicas.items(), key=lambda item: len(item[1].jobs)):
            if not replica.placeable or name not in self.backends.links:
                continue
            try:
                start, body = await self._collect(name, request, raw)
            except LinkLost:
                continue
            pairs = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in start["headers"]]
            await send({"type": "http.response.start", "status": start["status"], "headers": pairs})
            await send({"type": "http.response.body", "body": body})
            return
        raise Problem(503, "no replica is ready; retry later", code="unavailable", retry_after=1)

    async def _collect(self, name: str, request: dict[str, Any], raw: bytes) -> tuple[dict[str, Any], bytes]:
        call = self.backends.links[name].call(request, raw)
        try:
            return await call.whole()
        finally:
            call.close()


def _parse(raw: bytes) -> dict[str, Any]:
    """Returns the fields of a request's body, as a dict; {} if the body is not a JSON object."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}
