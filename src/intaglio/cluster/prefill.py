"""Disaggregated prefill: a prefill replica computes the prompt before the request goes to a decode replica.

The prefill replica saves K/V blocks, while it computes, where all replicas of the cluster load them from: in a folder
that they share, or in its own memory, from which they fetch them over TCP. The blocks stay pinned there until the
request has its first token: the router renews their lease. What fails here only costs time: the decode replica loads
the blocks that are there and computes the rest, with the same bits.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from intaglio.cluster.backends import Backends
from intaglio.cluster.link import LinkLost, Moved
from intaglio.router import Job
from intaglio.server.tracing import span

ATTEMPTS = 3  # prefill replicas that are tried
PREFILLS = ("handed", "partial", "empty", "lost", "drained", "refused")  # partial, empty: not all, no blocks are kept


async def prefill(
    backends: Backends, job: Job, header: Callable[[], dict[str, Any]], raw: bytes
) -> tuple[Job, bool, str]:
    """Have a prefill replica compute a job's prompt, if the router finds this worthwhile.

    It is worthwhile if the cluster has prefill replicas and enough of the prompt is not cached. Up to ATTEMPTS replicas
    are tried. Raises Refusal if the router does not admit the job, or cannot place it before its time limit.

    Args:
        backends: the links to the replicas.
        job: the job whose prompt is computed.
        header: function that makes the header of the call.
        raw: the request's body.

    Returns (job, placed, peer):

    - job: if a replica has computed the prompt, a copy of the job with the prompt's true length and the number of
      tokens whose K/V is handed over. Otherwise the job itself.
    - placed: True if the job was placed on a prefill replica, even on a replica that failed. The job has then been
      admitted already.
    - peer: address at which other replicas fetch the K/V blocks; "" if the blocks are in a folder, or no blocks are
      handed over.
    """
    placed = False
    for _ in range(ATTEMPTS):
        if not backends.router.wants_prefill(job, backends.clock()):
            break
        with span("wait for a prefill replica"):
            placement = await backends.place(replace(job, stage="prefill"), placed)
        placed = True
        try:
            with span("compute the prompt", replica=placement.replica):
                found = await _computed(backends, job, placement.replica, header(), raw)
        except LinkLost:
            backends.prefills["lost"] += 1
            continue
        except Moved:
            backends.prefills["drained"] += 1
            continue
        if found is None:
            backends.prefills["refused"] += 1
            break
        complete = found["handed"] >= found["whole"]
        backends.prefills["empty" if not found["handed"] else "handed" if complete else "partial"] += 1
        if found["lease"]:
            backends.leases[job.id] = placement.replica, found["lease"]
        return replace(job, prompt_tokens=max(1, found["tokens"]), handed=found["handed"]), placed, found["peer"]
    return job, placed, ""


async def _computed(
    backends: Backends, job: Job, replica: str, header: dict[str, Any], raw: bytes
) -> dict[str, Any] | None:
    """Have `replica` compute the prompt of a job, and return the replica's answer; None if the answer is an error.

    The answer is a dict with the keys:

    - tokens: number of tokens of the prompt.
    - handed: number of the prompt's tokens whose K/V other replicas can load.
    - whole: number of the prompt's tokens that lie in full K/V blocks. Only full blocks can be handed over. `handed` is
      less than `whole` if the replica did not keep all of these blocks.
    - lease: the lease that protects the blocks from eviction; "" if no blocks are handed over.
    - peer: address at which other replicas fetch the blocks; "" if the blocks are in a folder.

    header: header of the call. raw: body of the HTTP request. Raises LinkLost if the replica is lost, Moved if it is
    being drained.
    """
    link = backends.links.get(replica)
    if link is None:
        raise LinkLost("the replica has ended")
    if backends.leaving(replica):
        raise Moved
    call = backends.calls[job.id] = link.call(header, raw)
    try:
        start, whole = await call.whole()
    finally:
        backends.calls.pop(job.id, None)
        call.close()
    found: dict[str, Any] | None = json.loads(whole) if start["status"] == 200 else None
    return found
