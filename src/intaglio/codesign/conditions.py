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
    """How a benchmark repeated the calls in the tables of one generation of chips, and which of its kernels ran.

    Attributes:
        weight_copies: number of copies of a product's weights, which are used in turn.
        attention_launches: number of kernels of one attention call: cache write, preparation, attention.
        warm_cache: True if keys and values are in the L2, as far as they fit.
        older_experts: True if every expert has a gate, and rows left over by rounding go to the first experts.
        expert_kernels: {format: kernel of the library}, for formats whose kernel is not the library's default.
    """

    weight_copies: int
    attention_launches: int
    warm_cache: bool
    older_experts: bool
    expert_kernels: dict[str, str] = field(default_factory=dict)


@lru_cache
def table() -> dict[str, Any]:
    """The content of the file data/benchmarks.toml, as a dict."""
    return tomllib.loads((DATA / "benchmarks.toml").read_text(encoding="utf-8"))


def conditions(library: KernelLibrary) -> Conditions:
    """The Conditions under which the tables for chips of this library's generation were measured.

    An unknown generation has those of the section `default`.
    """
    found = table()
    return Conditions(**{k: v for k, v in (found["default"] | found.get(library.generation, {})).items() if k != "why"})
