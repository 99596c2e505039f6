"""The machine's network: its times are those of the collective schedules over its links, simulated once and cached."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio import collectives
from intaglio.chips import ChipError, target
from intaglio.silicon.kernels.collectives import (
    BYTES_PER_SUMMED_BYTE,
    Network,
    chunk_fraction,
    collective_timing,
    schedule_seconds,
    unit_seconds,
)

SOHU = target("sohu")
SIZES = st.floats(2, 30).map(lambda x: int(2**x))
MESH = {"topology": "mesh", "count": 14}  # of 8 chips: two links between any two
NETS = {
    "mesh": lambda n: collectives.full(n, 2 * SOHU.chip.links.bytes_per_s, SOHU.library.link_latency_s),
    "k44": lambda n: collectives.bipartite(n, SOHU.chip.links.bytes_per_s, SOHU.library.link_latency_s),
    "switch": lambda n: collectives.switch(n, SOHU.chip.links.chip_bytes_per_s, SOHU.library.link_latency_s),
}
EXACT = 0.004  # relative error of interpolating linearly between simulated chunk sizes, which are 9 % apart
JUMP = 0.2  # times jump where the order of transfers at a link changes with size: by up to 15 % in 146,000 random cases


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(NETS)), st.sampled_from(collectives.COLLECTIVES), st.integers(2, 8), SIZES)
def test_a_collective_takes_the_time_of_its_schedule(kind: str, op: str, ranks: int, moved: int) -> None:
    """Modelled time is that of the fastest schedule on the chip's topology; two_step only where there are two sides."""
    on = SOHU.with_chip(**(MESH if kind == "mesh" else {"topology": kind}))
    network, local, barrier_s = NETS[kind](ranks), on.chip.l2_rate / BYTES_PER_SUMMED_BYTE, on.library.barrier_s
    took = collective_timing(on, op, ranks, moved)
    best, seconds = collectives.choose(op, network, moved, local=local)
    if best.algorithm == "two_step" and kind != "k44":
        assert took.seconds - barrier_s >= seconds * (1 - JUMP)
    else:
        assert took.seconds - barrier_s == pytest.approx(seconds, rel=JUMP)
    named = collectives.schedule(op, took.choice.split(",")[0], ranks)
    share = collectives.clock.chunk_bytes(named, moved)
    assert collectives.seconds(named, network, share, local) == pytest.approx(took.seconds - barrier_s, rel=JUMP)
    sent = [sum(s.kind == "send" and s.rank == r for s in named.steps) * share[0] for r in range(ranks)]
    assert took.link_bytes >= sum(sent) / (1 if op == "send" else ranks) * (
        1 - 1e-9
    )  # a transfer over several links counts on each


def test_small_and_large_payloads_use_different_algorithms() -> None:
    why = {n: collective_timing(SOHU, "all_reduce", 8, n).choice.split(",")[0] for n in (10_000, 100_000_000)}
    assert why == {10_000: "one_shot", 100_000_000: "two_step"}
    on_a_switch = collective_timing(SOHU.with_chip(topology="switch"), "all_reduce", 8, 100_000_000)
    assert on_a_switch.choice.startswith("halving") and on_a_switch.seconds > collective_timing(
        SOHU, "all_reduce", 8, 100_000_000
    ).seconds  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "op", "algorithm"),
    [(kind, op, "ring") for kind in ("switch", "torus") for op in ("all_reduce", "all_gather", "reduce_scatter")]
    + [("switch", "all_to_all", "direct")],
)
def test_time_grows_linearly_beyond_the_simulated_ranks(kind: str, op: str, algorithm: str) -> None:
    for ranks, moved in ((20, 1e3), (27, 1e6), (27, 1e9)):
        network, link, latency, local = Network(kind, ranks, 20.0), 1e10, 1e-6, 20.0
        s = collectives.schedule(op, algorithm, ranks)
        chunk = moved * chunk_fraction(network, op, algorithm) / link / latency
        whole = collectives.seconds(s, network.topology(ranks), [chunk] * s.chunks, local) * latency
        assert schedule_seconds(network, op, algorithm, link, latency, moved) == pytest.approx(whole, rel=EXACT)


@pytest.mark.parametrize("name", ["a100_sxm", "h100_sxm", "gb200", "tpu_v6e"])
def test_more_bytes_and_more_chips_take_longer(name: str) -> None:
    """Bytes on the links never exceed their bandwidth, and long transfers come close to it."""
    on = target(name)
    groups = [n for n in (2, 4, 7, 8, 16, 64, 256) if n <= on.chip.links.max_chips]
    for op in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all"):
        times = [[collective_timing(on, op, n, b).seconds for b in (10**3, 10**6, 10**9)] for n in groups[:5]]
        assert all(row == sorted(row) for row in times)
        assert [row[0] for row in times] == sorted(row[0] for row in times)
        took = collective_timing(on, op, groups[-1] if op != "all_to_all" else groups[2], 10**10)
        assert (
            took.seconds >= took.busy["NET"] * 0.7 and took.steps >= 1
        )  # in-network reduction saves up to three tenths


def test_few_simulations_serve_all_sizes() -> None:
    collective_timing.cache_clear()
    unit_seconds.cache_clear()
    for moved in range(1_000_000, 2_000_000, 500):
        collective_timing(SOHU, "all_reduce", 8, moved)
    assert unit_seconds.cache_info().currsize <= len(collectives.algorithms("all_reduce", 8)) * 11


def test_too_many_chips_for_a_network_are_refused() -> None:
    with pytest.raises(ChipError, match="all_reduce over 16 chips: one network of sohu connects at most 8, and none"):
        collective_timing(SOHU, "all_reduce", 16, 10)
    with pytest.raises(ChipError, match="unknown collective 'reduce'; use one of all_reduce"):
        collective_timing(SOHU, "reduce", 8, 10)
    assert collective_timing(SOHU, "all_reduce", 1, 10).seconds == 0
