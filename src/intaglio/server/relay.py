"""Responses through a router: the deltas that a replica sends beside a response, so that another can continue it.

With each part of a response the replica sends the deltas from which it was made. The router keeps them. If the replica
dies or drains, the router sends the request again to another replica, with all deltas so far; that replica brings its
engine and its response builder to the same point and sends what follows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from starlette.types import Receive, Scope, Send

from intaglio.runtime import Fault, Scored, Usage
from intaglio.server.delivery import DONE, Answer
from intaglio.server.driver import ChoiceDelta, Prepared
from intaglio.server.problem import Problem, dumps

HEAD = "relay.head"  # ASGI message: facts of the prompt, before the first part of a response
NOTE = "relay.note"  # ASGI message: deltas of a response that is not streamed; last: the response follows at once
SEED_STRIDE = 2**40  # between the seeds of the prompts of one request; more than the choices of a prompt
ENCODER = json.JSONEncoder(separators=(",", ":"))
SHORT_TIME = 1e-9  # seconds; a timeout must be above 0


@dataclass(frozen=True)
class Relay:
    """The fields that a router adds to a request when it sends the request to a replica.

    Attributes:
        id: id of the response, without its prefix.
        created: Unix time of the response, seconds.
        seed: seed for a request that has none. With it every replica draws the same tokens.
        waited: seconds that the request has spent in the router and on other replicas.
        made_by: ServedModel.identity of the replica that generated `deltas`; None if there are no deltas.
        deltas: the output that other replicas have generated so far.
        prefill: True if this replica must compute only the K/V cache of the prompts, for another replica (see
            prefill.py).
        peer: address of a replica from which this replica can fetch K/V blocks of the prompts; "" if there is none.
    """

    id: str
    created: int
    seed: int
    waited: float = 0.0
    made_by: tuple[str, str, str] | None = None
    deltas: tuple[ChoiceDelta, ...] = ()
    prefill: bool = False
    peer: str = ""

    @classmethod
    def from_dict(cls, table: dict[str, Any]) -> Relay:
        """Returns the Relay for `table`, a dict in the form that as_dict() returns."""
        made_by = tuple(table["made_by"]) if table["made_by"] else None
        deltas = tuple(read_delta(d) for d in table["deltas"])
        facts = table["id"], table["created"], table["seed"], table["waited"], made_by, deltas
        return cls(*facts, table["prefill"], table["peer"])

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields of the Relay as a dict that can be written as JSON."""
        return {**vars(self), "deltas": [write_delta(d) for d in self.deltas]}

    def prepared(self, prompts: list[Prepared], engine: tuple[str, str, str]) -> list[Prepared]:
        """Returns a list of copies of `prompts` for this replica.

        The request in each copy is changed:

        - Timeouts are shortened by the seconds that the request has already waited elsewhere (self.waited).
        - queue_timeout becomes None if the client has already received output.
        - A request without a seed gets a seed that is made from self.seed and the prompt's number, so that every
          replica draws the same tokens.

        engine: ServedModel.identity of this replica.

        Raises Problem 503 if a replica with another identity began the output (self.made_by). This replica could then
        not continue the output with bitwise equal results.
        """
        if self.made_by is not None and self.made_by != engine:
            why = f"it was begun by {self.made_by[1]} and Program {self.made_by[0][:12]}, this replica is {engine[1]}"
            other = "has other weights or another version" if self.made_by[:2] == engine[:2] else "gives other bits"
            raise Problem(503, f"{why} and Program {engine[0][:12]}, which {other}", code="cannot_continue")
        begun = any(delta.scored for delta in self.deltas)
        out = []
        for i, prompt in enumerate(prompts):
            request = prompt.request
            seed = request.params.seed
            if seed is None:
                seed = (self.seed + i * SEED_STRIDE) % 2**63
            queue = None if begun else _left(request.queue_timeout, self.waited)
            request = replace(
                request, params=replace(request.params, seed=seed), queue_timeout=queue,
                timeout=_left(request.timeout, self.waited),
            )  # fmt: skip
            out.append(Prepared(request, prompt.transcripts))
        return out


class RelayedAnswer(Answer):
    """A replica's answer to a request that came from a router.

    In addition to the HTTP response for the client, the replica sends the router the generated tokens as ChoiceDeltas.
    With them another replica can continue the output if this replica fails. They are sent as extra ASGI messages, or as
    extra fields of ASGI messages; only the control channel between router and replica understands them.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = self.prompts[0].request
        head = {"made_by": self.model.identity, "tokens": len(request.prompt)}
        await send({"type": HEAD, "head": {**head, **self.model.block_names(request.prompt, request.salt)}})
        await super().__call__(scope, receive, send)

    async def _note(self, send: Send, deltas: Sequence[ChoiceDelta], last: bool) -> None:
        await send({"type": NOTE, "deltas": deltas, "last": last})

    async def _send(self, send: Send, body: bytes, deltas: Sequence[ChoiceDelta], more: bool = True) -> None:
        await send({"type": "http.response.body", "body": body, "more_body": more, "deltas": deltas})

    async def _fail(self, send: Send, problem: Problem) -> None:
        body = b"data: " + dumps(problem.as_dict()) + b"\n\n" + DONE
        await send({"type": "http.response.body", "body": body, "more_body": False, "code": problem.code})


def write_delta(d: ChoiceDelta) -> list[Any]:
    """Returns a ChoiceDelta as a list that json.dumps() accepts. read_delta() converts the list back.

    Log-probabilities that are infinite or NaN stay floats, which Python's JSON writes as Infinity and NaN.
    """
    prompt = None if d.prompt is None else [_write_scored(s) for s in d.prompt]
    scored = _write_scored(d.scored) if d.scored else None
    usage = list(vars(d.usage).values()) if d.usage else None
    fault = [d.fault.kind, d.fault.message] if d.fault else None
    out = [d.choice, d.text, scored, d.finish_reason, usage, prompt, d.stop_reason, fault]
    while out[-1] is None:
        out.pop()
    return out


def read_delta(values: Sequence[Any]) -> ChoiceDelta:
    """Returns the ChoiceDelta for `values`, a list that write_delta() has made."""
    padded: list[Any] = list(values) + [None] * (8 - len(values))
    choice, text, scored, reason, usage, prompt, stop, fault = padded
    return ChoiceDelta(
        choice, text, _read_scored(scored) if scored else None, reason, Fault(*fault) if fault else None,
        Usage(*usage) if usage else None, None if prompt is None else tuple(_read_scored(s) for s in prompt), stop,
    )  # fmt: skip


def encode(value: Any) -> bytes:
    """Returns `value` as compact JSON, in bytes.

    Infinities and NaN are written as Infinity and NaN, which json.loads() reads.
    """
    return ENCODER.encode(value).encode()


def _write_scored(s: Scored) -> list[Any]:
    return [int(s.token), float(s.logprob), [[int(id), float(p)] for id, p in s.top], s.rank]


def _read_scored(values: Sequence[Any]) -> Scored:
    token, logprob, top, rank = values
    return Scored(token, logprob, tuple((id, p) for id, p in top), rank)


def _left(seconds: float | None, waited: float) -> float | None:
    return None if seconds is None else max(seconds - waited, SHORT_TIME)
