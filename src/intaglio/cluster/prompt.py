"""Reads from a request's body what the router needs: the prompt's text, sizes, priority and time limits.

It checks nothing: the replica does, and answers a wrong body with the error. A field of a wrong type counts as missing.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from intaglio.router import CHUNK_BYTES, Job, PromptMemory, prefix_keys

COMPLETION_TOKENS = 16  # max_tokens of a completion that gives none
BYTES_PER_TOKEN = 4  # of the end of a prompt that fills no chunk
TOKEN_BYTES = 4  # of a token id in the text of a prompt that is given as ids


@dataclass(frozen=True)
class TimeLimits:
    """The router's limits on the duration of a request, in seconds; None: no limit. A request may set lower limits.

    Attributes:
        timeout: time from the request's arrival to its end.
        queue_timeout: time from the request's arrival to its start on a replica.
    """

    timeout: float | None = 600.0
    queue_timeout: float | None = 120.0


def make_job(
    id: str, body: dict[str, Any], memory: PromptMemory, now: float, limits: TimeLimits, tenant: str, output: float
) -> Job:
    """Returns a generation request's Job, with which the router places the request on a replica.

    A Job holds facts about the request, such as the length of its prompt.

    Args:
        id: the job's id.
        body: the request's fields. A field that is missing or has a wrong type gets its default.
        memory: token counts of earlier prompts, from which this prompt's length is estimated.
        now: the time in seconds.
        limits: limits on the request's duration.
        tenant: name of the tenant that is charged.
        output: mean output length of recent requests, in tokens.
    """
    salt = repr((body.get("model"), body.get("cache_salt"))).encode("utf-8", "surrogatepass")
    pieces = list(_pieces(body))
    keys = prefix_keys(salt, pieces)
    rest = sum(map(len, pieces)) - len(keys) * CHUNK_BYTES
    most = _whole(body, "max_completion_tokens", _whole(body, "max_tokens", None))
    if most is None:
        most = COMPLETION_TOKENS if "prompt" in body else 10**9
    choices = max(_whole(body, "n", 1) or 1, _whole(body, "best_of", 1) or 1)
    prompts = body.get("prompt")
    several = len(prompts) if isinstance(prompts, list) and prompts and not isinstance(prompts[0], int) else 1
    timeout = _shorter(_seconds(body, "timeout"), limits.timeout)
    queue = _shorter(_seconds(body, "queue_timeout"), limits.queue_timeout)
    return Job(
        id, keys, max(1, memory.estimate_tokens(keys) + rest // BYTES_PER_TOKEN), max(1, min(most, int(output))),
        max(1, choices * several), tenant, _whole(body, "priority", 0, -(2**31)) or 0,
        None if timeout is None else now + timeout, None if queue is None else now + queue,
    )  # fmt: skip


def _pieces(body: dict[str, Any]) -> Iterator[bytes]:
    """Yield a request's prompt in pieces of bytes: the tools and each message of a chat, or the prompt of a completion.

    If the body has several prompts, only the first is yielded.
    """
    if "prompt" in body:
        prompt = body["prompt"]
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            prompt = prompt[0]
        if isinstance(prompt, str):
            yield prompt.encode("utf-8", "surrogatepass")
        elif isinstance(prompt, list) and all(isinstance(id, int) and 0 <= id < 2**31 for id in prompt):
            yield array("I", prompt).tobytes()
        return
    if body.get("tools"):
        yield json.dumps(body["tools"]).encode()
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else ():
        yield json.dumps(message, sort_keys=True).encode()


def _whole(body: dict[str, Any], name: str, default: int | None, least: int = 0) -> int | None:
    value = body.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31 else default


def _seconds(body: dict[str, Any], name: str) -> float | None:
    value = body.get(name)
    return float(value) if isinstance(value, int | float) and 0 < value <= 86400 else None


def _shorter(*seconds: float | None) -> float | None:
    return min((s for s in seconds if s is not None), default=None)
