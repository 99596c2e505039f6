"""Conditions under which a table of kernel latencies was measured, as data: data/benchmarks.toml.

A benchmark repeats one call: its keys and values stay in a large L2, and so do the copies of a small weight. It also
runs helper kernels that a served step does not. Validation applies the conditions; simulated serving does not.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from intaglio.chips import KernelLibrary
from intaglio.chips.files import DATA


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """How a published benchmark measured its kernel latencies on one generation of chips.

    Attributes:
        weight_copies: number of copies of a product's weights, which are used in turn.
        streams: True if neither the activations nor the result of a product stay in the L2 from one call to the next,
            where they and the copies of the weights outgrow it.
        warm_cache: True if keys and values are in the L2, as far as they fit.
        older_experts: True for the benchmark's older version. There every expert has a gate. The numbers of token rows
            per expert are rounded; rows that are then missing go to the experts with the largest rounded numbers.
        expert_kernels: {number format: name of the library's kernel that ran experts in it}, for formats in which
            this was not the library's default kernel.
    """

    weight_copies: int
    streams: bool
    warm_cache: bool
    older_experts: bool
    expert_kernels: dict[str, str] = field(default_factory=dict)


@lru_cache
def table() -> dict[str, Any]:
    """The content of the file data/benchmarks.toml, as a dict."""
    return tomllib.loads((DATA / "benchmarks.toml").read_text(encoding="utf-8"))


def conditions(library: KernelLibrary) -> Conditions:
    """How the benchmark's tables were measured for chips of this library's generation, as Conditions.

    They come from the section `default` of data/benchmarks.toml. The section of the generation, if there is one,
    replaces some of its values. So does the section `engines`, if the library has the kernels of a serving engine.
    """
    found = table()
    values = found["default"] | found.get(library.generation, {}) | (found["engines"] if library.engine else {})
    return Conditions(**{k: v for k, v in values.items() if k != "why"})
