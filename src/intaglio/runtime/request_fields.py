"""Requests as JSON-serialisable fields, for journals and for requests that move to another engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from intaglio.runtime.request import Grammar, Request, SamplingParams


def write_request(request: Request, seed: int) -> dict[str, Any]:
    """Returns a request's fields as a dict that can be written as JSON.

    The fields stop_checker and matcher are left out, because they are functions.

    seed: the seed that the request uses; it replaces the seed in the sampling parameters.
    """
    bare = replace(request, stop_checker=None, matcher=None, params=replace(request.params, seed=seed))
    fields = asdict(bare)
    del fields["stop_checker"], fields["matcher"]
    return {**fields, "prompt": [int(t) for t in request.prompt], "eos_ids": sorted(request.eos_ids)}


def read_request(table: Mapping[str, Any]) -> Request:
    """Returns a Request, made from a dict of fields that write_request() returned.

    Its stop_checker and matcher are None; only the caller can create these again.
    """
    return Request(**{**table, "params": _read_params(table["params"]), "eos_ids": frozenset(table["eos_ids"])})


def _read_params(table: Mapping[str, Any]) -> SamplingParams:
    fields = dict(table)
    fields["logit_bias"] = {int(id): bias for id, bias in table["logit_bias"].items()}
    fields["grammar"] = Grammar(**table["grammar"]) if table["grammar"] else None
    return SamplingParams(**fields)
