"""Modelled collectives over several nodes: bounds from parts inside a node and from the slowest network; errors."""

from __future__ import annotations

import random

import pytest

from intaglio.chips import ChipError, target
from intaglio.codesign.disaggregated import Apart
from intaglio.codesign.placement import Placement
from intaglio.codesign.queue import QueueSettings
from intaglio.codesign.simulate import ported
from intaglio.codesign.steps import Formats, Server, StepTimes
from intaglio.silicon.kernels.collectives import collective_timing
from intaglio.silicon.kernels.nodes import STAGES, nodes_of

ON = target("h100_sxm")
SIZE, RATE = ON.chip.links.max_chips, ON.chip.links.node_bytes_per_s


@pytest.mark.parametrize("op", sorted(STAGES))
def test_bounds_of_several_nodes(op: str) -> None:
    """Bytes of a chip's own part cross its adapter; more nodes, slower adapters and more bytes take longer."""
    rng = random.Random()
    k, moved = rng.randrange(2, 9), rng.randrange(10**4, 10**8)
    took = collective_timing(ON, op, k * SIZE, moved)
    part = moved if op == "all_to_all" else moved / SIZE
    crossing = (2 if op == "all_reduce" else 1) * part * (k - 1) / k
    assert took.seconds >= crossing / RATE + ON.chip.links.node_latency_s
    assert took.link_bytes > crossing
    inside = collective_timing(ON, op, SIZE, moved)
    assert took.seconds > inside.seconds * (0.5 if op == "all_reduce" else 1)  # in one node a switch may sum
    slower = collective_timing(ON.with_chip(node_bytes_per_s=RATE / 2), op, k * SIZE, moved)
    assert slower.seconds - took.seconds == pytest.approx(crossing / RATE, rel=1e-6)
    assert collective_timing(ON, op, 2 * k * SIZE, moved).seconds > took.seconds
    assert collective_timing(ON, op, k * SIZE, 2 * moved).seconds > took.seconds


def test_adapters_as_fast_as_links_cost_about_one_network() -> None:
    """Two nodes with adapters of the links' rate and latency: a large all_gather takes little more than in one."""
    links = ON.chip.links
    fast = ON.with_chip(node_bytes_per_s=links.chip_bytes_per_s, node_latency_s=ON.library.link_latency_s)
    one = ON.with_chip(max_chips=16)
    both = [collective_timing(on, "all_gather", 16, 10**9).seconds for on in (fast, one)]
    assert both[0] == pytest.approx(both[1], rel=0.25)


def test_what_nodes_refuse() -> None:
    with pytest.raises(
        ChipError, match="all_reduce over 12 chips of h100_sxm: nodes have 8 chips; use a multiple of 8"
    ):
        collective_timing(ON, "all_reduce", 12, 1000)
    with pytest.raises(ChipError, match="send over 16 chips: only"):
        collective_timing(ON, "send", 16, 1000)
    with pytest.raises(ChipError, match="none joins several"):
        nodes_of(target("mi300x").chip, 16, "x")


def test_nodes_of_one_chip_and_steps_between_nodes() -> None:
    """Nodes of one chip still start with a barrier; more nodes never take fewer steps; max_chips is at least 1."""
    alone = ON.with_chip(max_chips=1)
    for op in STAGES:
        took = [collective_timing(alone, op, k, 1000) for k in range(2, 20)]
        assert all(t.seconds > ON.library.barrier_s + t.steps * ON.chip.links.node_latency_s for t in took)
        steps, seconds = [t.steps for t in took], [t.seconds for t in took]
        assert steps == sorted(steps) and seconds == sorted(seconds)
    with pytest.raises(ChipError, match="max_chips=0; allowed: 1 to"):
        ON.with_chip(max_chips=0)


def test_servers_and_their_kv_cross_nodes() -> None:
    """A server of two nodes takes longer for a small step than the same chips in one network; K/V takes the adapter."""
    program, small = ported("llama-3-8b", None), ((1, 100, ()), (1, 100, ((64, 64, 1),)))
    server = Server.of(program, Placement.parse("tp8"), Formats())
    wide = [ON.with_chip(max_chips=n) for n in (4, 8)]
    for decoding, keys, chunks in small:
        two, one = (StepTimes(server, on).exact(decoding, keys, chunks)[0] for on in wide)
        assert two > one
    apart, alone = (Apart(t, t, QueueSettings(1), QueueSettings(1)) for t in (StepTimes(server, on) for on in wide))
    assert alone.crosses_nodes and apart.crosses_nodes  # 16 chips in all
    inside = StepTimes(server, ON.with_chip(max_chips=16))
    near = Apart(inside, inside, QueueSettings(1), QueueSettings(1))
    ratio = apart.transfer_s(10**6) / near.transfer_s(10**6)
    assert ratio == pytest.approx(ON.chip.links.chip_bytes_per_s / RATE, rel=0.01)
