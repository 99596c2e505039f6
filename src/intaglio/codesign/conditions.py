"""Conditions under which a table of kernel latencies was measured, as data: data/benchmarks.toml.

A benchmark repeats one call: its keys and values stay in a large L2, and so do the copies of a small weight. It also
runs helper kernels that a served step does not. Validation applies the conditions; simulated serving does not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from intaglio.chips import KernelLibrary
from intaglio.chips.files import DATA, read_toml


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """How a published benchmark measured its kernel latencies on one generation of chips.

    Attributes:
        weight_copies: number of copies of a matrix product's weights; repeated calls use the copies in turn.
        warm_cache: True if keys and values are in the L2 when attention starts, or as many of them as the L2 can hold.
        older_experts: True for the benchmark's older version, which differs in two ways. It gave the experts of every
            model a gate projection, even if the model has none. And it rounded each expert's number of token rows, then
            gave the rows that were left over to the experts with the largest rounded numbers.
        expert_kernels: {number format: name of the kernel, in the chip's kernel library, that ran the experts}. A
            format is missing if the library's default kernel ran the experts.
    """

    weight_copies: int
    warm_cache: bool
    older_experts: bool
    expert_kernels: dict[str, str] = field(default_factory=dict)


@lru_cache
def table() -> dict[str, Any]:
    """Returns the content of the file data/benchmarks.toml, as a dict."""
    return read_toml(DATA / "benchmarks.toml")


def conditions(library: KernelLibrary) -> Conditions:
    """Returns the Conditions under which the shipped tables of kernel latencies were measured on a generation of chips.

    Conditions say, for example, whether the L2 was warm. They are read from data/benchmarks.toml, sections `default`
    and library.generation, such as hopper. Values in the second section override values in the first.

    library: the chip's kernel library.
    """
    found = table()
    return Conditions(**{k: v for k, v in (found["default"] | found.get(library.generation, {})).items() if k != "why"})
