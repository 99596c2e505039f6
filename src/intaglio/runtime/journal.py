"""How an engine's record is written: entries of plain values, a line of JSON each. replay.py runs it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from intaglio.runtime.request import Event, Grammar, Request, SamplingParams


def told(event: Event) -> list[Any]:
    """An event as the record keeps it."""
    return [event.request, event.index, event.token, event.finish_reason]


def recorded(request: Request, seed: int) -> dict[str, Any]:
    """A request as the record keeps it, with the seed that it runs with."""
    bare = replace(request, stopped=None, matcher=None, params=replace(request.params, seed=seed))
    fields = asdict(bare)
    del fields["stopped"], fields["matcher"]
    return {**fields, "prompt": [int(t) for t in request.prompt], "eos_ids": sorted(request.eos_ids)}


def params_from(table: Mapping[str, Any]) -> SamplingParams:
    """SamplingParams from what became of them in JSON."""
    fields = dict(table)
    fields["logit_bias"] = {int(id): bias for id, bias in table["logit_bias"].items()}
    fields["grammar"] = Grammar(**table["grammar"]) if table["grammar"] else None
    return SamplingParams(**fields)


def request_from(table: Mapping[str, Any]) -> Request:
    """A Request as it was recorded, less what only its caller can make: `stopped` and `matcher`."""
    return Request(**{**table, "params": params_from(table["params"]), "eos_ids": frozenset(table["eos_ids"])})
