"""RelayedRequest: one generation request through the router, over as many replicas as it takes.

The router keeps the deltas of everything that it has passed on. If the replica dies or drains, it sends the request to
another with these deltas, and passes on what follows. A request that no replica can continue ends with an
error, never silently.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from typing import Any

from starlette.types import Send

from intaglio.cluster.backends import POLL, Backends
from intaglio.cluster.link import Call, LinkLost, Moved
from intaglio.cluster.prefill import prefill
from intaglio.router import Job, Refusal
from intaglio.server.delivery import DONE
from intaglio.server.problem import Problem, dumps
from intaglio.server.tracing import span, trace_headers

log = logging.getLogger("intaglio.cluster")
MAX_LOSSES = 3  # replicas that may die under a request; one that kills replicas must not kill them all
MAX_REFUSALS = 8  # times that it may be refused, because replicas drain or are full
MOVABLE = frozenset(("shutdown", "draining", "failed", "queue_full", "late", "too_many_requests"))
BUSY = frozenset(("queue_full", "late", "too_many_requests"))  # a replica serves, and has too much to do


class RelayedRequest:
    """One generation request of a client, which the router passes to replicas. run() serves it.

    Attributes:
        job: what the router knows of the request: prefix keys, lengths, tenant and deadlines.
        path, headers, raw: path, headers and body of the HTTP request.
        stream: True if the response is streamed.
        began: time at which the request arrived, in seconds by the router's clock.
        output_tokens: number of tokens passed on to the client so far.
    """

    def __init__(
        self, backends: Backends, job: Job, path: str, headers: list[tuple[str, str]], raw: bytes, stream: bool
    ) -> None:
        self.backends, self.job, self.path, self.headers, self.raw = backends, job, path, headers, raw
        self.stream = stream
        self.began = backends.clock()
        self.created, self.seed = int(time.time()), random.getrandbits(62)
        self.deltas: list[Any] = []
        self.head: dict[str, Any] = {}
        self.output_tokens = 0
        self.first: float | None = None  # when its first token came
        self.started = False  # the response has begun
        self.announced = False  # its first token on the present replica has come
        self.losses = self.refusals = 0
        self.replica = ""
        self.peer = ""  # where replicas fetch the K/V blocks of its prompts
        self.status = 0

    async def run(self, send: Send) -> None:
        """Serve the request to its end. Returns nothing.

        If the request fails before the response has begun, Problem is raised. If it fails later, the response is ended
        with the error.
        """
        try:
            again = await self._prefill()
            while not await self._attempt(send, again):
                again = True
        except Problem as problem:
            if not self.started:
                raise
            await self._fail(send, problem)
        finally:
            self.backends.ended(self.job, self.output_tokens)

    async def _prefill(self) -> bool:
        """Have a prefill replica compute the prompt, if the router decides so.

        Returns True if the router placed the job on a prefill replica, even if that replica then failed; else False. If
        the result is True, the job has been admitted and must not be admitted a second time. Raises Problem if the
        router refuses the job.
        """
        try:
            made = await prefill(self.backends, self.job, lambda: self._header(prefill=True), self.raw)
            self.job, placed, self.peer = made
        except Refusal as e:
            raise as_problem(e) from None
        return placed

    async def _attempt(self, send: Send, again: bool) -> bool:
        """Run the request on one replica. Returns True if the request has ended, else False.

        After False, another replica must continue the request. again: True if the job was placed before. Raises Problem
        if the router refuses the job, or if the request has lost MAX_LOSSES replicas.
        """
        try:
            with span("wait for a replica"):
                placement = await self.backends.place(self.job, again)
        except Refusal as e:
            raise as_problem(e) from None
        self.replica, self.announced = placement.replica, False
        try:
            with span("generate", replica=self.replica, earlier_tokens=self.output_tokens):
                try:
                    begun = self._call()
                except LinkLost as e:  # it ended before it had the request, and the router is about to notice
                    self._count_refusal(f"replica {self.replica} cannot be reached: {e}", "failed")
                    await asyncio.sleep(POLL)
                    return False
                return await self._pass_on(begun, send)
        except LinkLost as e:
            log.info("request %s has lost replica %s: %s", self.job.id, self.replica, e)
            self.losses += 1
            self.backends.moves["lost"] += 1
            if self.losses >= MAX_LOSSES:
                why = f"{self.losses} replicas ended while they worked on this request"
                raise Problem(503, why, code="replica_lost", retry_after=1) from None
        except Moved:
            self.backends.moves["drained"] += 1
        finally:
            if call := self.backends.calls.pop(self.job.id, None):
                call.close()
        return False

    def _call(self) -> Call:
        link = self.backends.links.get(self.replica)
        if link is None:
            raise LinkLost("the replica has ended")
        if self.backends.leaving(self.replica):
            raise Moved
        call = self.backends.calls[self.job.id] = link.call(self._header(), self.raw)
        return call

    def _header(self, prefill: bool = False) -> dict[str, Any]:
        """Returns the header of the call that sends this request to a replica, as a dict.

        The keys are do, method, path, headers (of the HTTP request) and relay (fields of a Relay). The relay has the
        output that the client has already been sent, so that the replica only generates the tokens after it.

        prefill: True if the replica should compute only the K/V of the prompt.
        """
        relay = {
            "id": self.job.id, "created": self.created, "seed": self.seed,
            "waited": self.backends.clock() - self.began,
            "made_by": self.head.get("made_by") if self.deltas else None, "deltas": self.deltas, "prefill": prefill,
            "peer": self.peer,
        }  # fmt: skip
        headers = [*self.headers, *trace_headers()]
        return {"do": "request", "method": "POST", "path": self.path, "headers": headers, "relay": relay}

    async def _pass_on(self, call: Call, send: Send) -> bool:
        """Pass the frames of a replica's answer on to the client, as they arrive.

        Returns True once the whole response, or an error, has been sent. Returns False if the replica refuses the
        request, or ends it early, for a reason such as being full; another replica must then take the request.

        Raises LinkLost if the replica fails, Moved if it is being drained; another replica may then continue the
        request. Raises Problem if replicas have refused the request too often.

        Args:
            call: the call whose answer is passed on.
            send: ASGI's function that sends to the client.
        """
        start: dict[str, Any] | None = None
        while True:
            header, body = await call.frame()
            if head := header.get("head"):
                self.head = self.head if self.deltas else head
            if header.get("over"):
                raise LinkLost("the replica failed")
            status = header.get("status")
            if status is not None and status != 200:
                return await self._refused(call, header, body, send)
            if status == 200:
                start = _start(200, header["headers"])
            if start and not self.started and (self.stream or header.get("end")):  # a whole response comes at once
                self.status, self.started = 200, True
                await send(start)
            movable = header.get("code") in MOVABLE
            if not movable and (body or header.get("end")):  # before the router notes it, for which nobody need wait
                await send({"type": "http.response.body", "body": body, "more_body": not header.get("end")})
            if deltas := header.get("deltas"):
                self._keep(deltas)
            if movable:
                self._count_refusal(f"the replica ended it: {header['code']}", header["code"])
                return False
            if header.get("end"):
                return True

    def _keep(self, deltas: list[Any]) -> None:
        self.deltas += deltas
        tokens = sum(1 for d in deltas if len(d) > 2 and d[2])
        if tokens and not self.output_tokens:
            self.first = self.backends.clock()
        if tokens and not self.announced:
            self.announced = True
            self.backends.first_token(self.job, self.head)
        self.output_tokens += tokens

    async def _refused(self, call: Call, header: dict[str, Any], body: bytes, send: Send) -> bool:
        """Handle a replica's error response. Returns True if the error has been sent to the client, else False.

        After False, another replica must take the request. Raises Problem 503 if the request may be refused any number
        of times until its deadline (see _patient()), and the deadline is over.

        Args:
            call: the call to the replica.
            header: header of the error response's first frame.
            body: body of the first frame.
            send: ASGI's function that sends to the client.
        """
        whole, part = bytearray(body), header
        while not part.get("end"):
            part, body = await call.frame()
            whole += body
        error = _error(bytes(whole))
        code = error.get("code") or ""
        movable = header["status"] in (429, 503) and code in MOVABLE
        if movable and (self._patient(code) or self.refusals < MAX_REFUSALS):
            self._count_refusal(error.get("message", ""), code)
            await asyncio.sleep(POLL)  # until the replica's next report tells that it drains or is full
            return False
        if self.started:
            problem = Problem(503, error.get("message", "it could not be continued"), code="cannot_continue")
            await self._fail(send, problem)
            return True
        self.status, self.started = header["status"], True
        await send(_start(header["status"], header["headers"]))
        await send({"type": "http.response.body", "body": bytes(whole), "more_body": False})
        return True

    def _patient(self, code: str | None) -> bool:
        """True if a refused request is tried again until its deadline, no matter how often it is refused.

        This needs three things: the request has a deadline, the client has been sent output, and the replica refused
        because it is busy.

        code: the code of the refusal; None if it has none.
        """
        return bool(self.deltas) and code in BUSY and self.job.deadline is not None

    def _count_refusal(self, why: str, code: str) -> None:
        """Count a refusal by a replica. Raises Problem 503 if the request must not be tried again.

        A request may be refused MAX_REFUSALS times. Refusals by busy replicas do not count if the request has a
        deadline and the client has been sent output; such a request is tried again until its deadline.

        Args:
            why: message of the replica's error.
            code: code of the replica's error.
        """
        self.backends.moves["refused"] += 1
        if not self._patient(code):
            self.refusals += 1
            if self.refusals > MAX_REFUSALS:
                raise Problem(503, why, code="unavailable", retry_after=1)
        elif self.job.deadline is not None and self.backends.clock() >= self.job.deadline:
            raise Problem(503, f"its timeout is over; to the last attempt the answer was: {why}", code="late")

    async def _fail(self, send: Send, problem: Problem) -> None:
        """End a response that has already begun, after an error. Returns nothing.

        If the response is a stream, its last event is `problem`. Any other response is cut off.
        """
        body = b"data: " + dumps(problem.as_dict()) + b"\n\n" + DONE if self.stream else b""
        await send({"type": "http.response.body", "body": body, "more_body": False})


def as_problem(refusal: Refusal) -> Problem:
    """Returns the HTTP error for a job that the router refuses.

    The status is 503 if no replica serves. Otherwise it is 429, and the client may try again later.
    """
    if refusal.reason == "unavailable":
        return Problem(503, str(refusal), code="unavailable", retry_after=refusal.retry_after)
    code = "queue_full" if refusal.reason == "full" else "late"
    return Problem(429, str(refusal), code=code, retry_after=refusal.retry_after)


def _start(status: int, headers: list[list[str]]) -> dict[str, Any]:
    pairs = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
    return {"type": "http.response.start", "status": status, "headers": pairs}


def _error(body: bytes) -> dict[str, Any]:
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return {}
    return error if isinstance(error, dict) else {}
