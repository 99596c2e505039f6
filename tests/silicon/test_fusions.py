"""Kernels of an engine's graph: fusions, random routing, and the engine's own all_reduce."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from intaglio.chips import ChipError, target
from intaglio.codesign.fusions import FUSIONS, FusedKernel, fused_kernels
from intaglio.codesign.placement import Placement
from intaglio.codesign.simulate import ported
from intaglio.codesign.steps import Formats, Server, StepTimes
from intaglio.program import Program
from intaglio.silicon.kernels import ChipKernel
from intaglio.silicon.kernels.collectives import CollectiveKernel, collective_timing
from intaglio.silicon.kernels.experts import expected_rows
from intaglio.silicon.sizes import BatchSizes

ON = target("h100_sxm")
STEP = BatchSizes(8, 8, ((1, 300, 8),))


@pytest.fixture(scope="module")
def split() -> Program:
    """One chip's part of a mixture of experts whose norms of queries and keys span all heads."""
    return Server.of(ported("minimax-m2", None), Placement.parse("tp2"), Formats()).stages[0]


def names(kernels: list[ChipKernel]) -> Counter[str]:
    return Counter(
        "+".join(type(p).__name__.removesuffix("Kernel") for p in (k.parts if isinstance(k, FusedKernel) else (k,)))
        for k in kernels
    )


def test_ops_that_are_launched_together(split: Program) -> None:
    layers = sum(op.kind == "attend" for op in split.ops)
    plain, n = names(fused_kernels(split, ())), 2 * layers
    assert plain["Norm"] == 4 * layers + 1 and plain["Map"] == n and plain["Rope"] == n
    assert sum(plain.values()) == sum(op.kind != "experts" for op in split.ops)
    assert names(fused_kernels(split, ("add_norm",)))["Map+Norm"] == n - 1  # not before the last tokens are selected
    assert names(fused_kernels(split, ("reduce_norm",)))["Collective+Map+Norm"] == n - 1
    assert names(fused_kernels(split, ("rope",)))["Rope+Rope"] == layers
    assert names(fused_kernels(split, ("rope_write",)))["Rope+Rope+KvWrite"] == layers
    sums = [k for k in fused_kernels(split, ("norm_sums",)) if isinstance(k, CollectiveKernel)]
    assert sum(k.kind == "all_reduce" and k.width == 2 for k in sums) == layers
    assert sum(k.kind == "all_gather" for k in sums) == plain["Collective"] - n - n
    with pytest.raises(ValueError, match="unknown fusion mystery; there are add_norm"):
        fused_kernels(split, ("mystery",))


def test_a_fused_kernel_has_one_launch(split: Program) -> None:
    fused = [k for k in fused_kernels(split, tuple(FUSIONS)) if isinstance(k, FusedKernel)]
    assert fused
    for k in set(fused):
        times = [p.time(ON, STEP, False).seconds for p in k.parts]
        saved = (len(times) - 1) * ON.library.launch_s
        assert k.time(ON, STEP, False).seconds == pytest.approx(sum(times) - saved)


def test_one_all_reduce_for_routed_and_shared_experts() -> None:
    program = Server.of(ported("glm-4.5", None), Placement.parse("tp2"), Formats()).stages[0]
    joins = sum(op.site.endswith(".join") for op in program.ops)
    before, after = (names(fused_kernels(program, f))["Collective"] for f in ((), ("shared_sum",)))
    assert joins and before - after == joins


def test_kernels_of_their_own() -> None:
    """With "glu" or "quantise", activations or the rounding of rows are kernels of their own in a dense model."""
    server = Server.of(
        ported("llama-3-8b", None), Placement(Placement.parse("tp1").attention), Formats("fp8", "auto", "fp8")
    )
    layers, counts = 32, []
    for how in ((), ("glu",), ("quantise",)):
        times = StepTimes(server, ON, how)
        counts.append(sum(part.count for part in times.parts[0]))
    assert counts[1] - counts[0] == layers
    assert counts[2] - counts[0] >= 4 * layers


def test_random_routing() -> None:
    """Rows are as many as routed; experts with rows as many as expected of independent tokens."""
    assert expected_rows(5, 4, 4, 4) == (5,) * 4
    for _ in range(20):
        experts = random.choice((32, 128, 256, 512))
        top, tokens, chips = random.randint(1, 8), random.randint(1, 4096), random.choice((1, 2, 4, 8))
        held = experts // chips
        counts = expected_rows(tokens, top, experts, held)
        assert len(counts) == held and sum(counts) == max(1, round(tokens * top / chips))
        assert abs(sum(c > 0 for c in counts) - held * (1 - (1 - top / experts) ** tokens)) <= 1


def test_an_engines_own_all_reduce() -> None:
    own = ON.with_library(small_reduce_s=3e-6, small_reduce_efficiency=0.6)
    for chips in (2, 4, 8):
        small = collective_timing(own, "all_reduce", chips, 4096)
        assert small.choice == "one_shot, engine, 1 steps" and small.steps == 1
        assert 3e-6 < small.seconds < collective_timing(ON, "all_reduce", chips, 4096).seconds
        assert collective_timing(own, "all_reduce", chips, 1 << 30) == collective_timing(
            ON, "all_reduce", chips, 1 << 30
        )
        assert collective_timing(own, "all_gather", chips, 4096) == collective_timing(ON, "all_gather", chips, 4096)
    assert collective_timing(own, "all_reduce", 8, 1 << 19).choice.startswith("two_shot")
    with pytest.raises(ChipError, match="small_reduce_efficiency=0"):
        ON.with_library(small_reduce_efficiency=0.0)
