"""The machine's network: its times are those of schedules over the chip's links, read once and memoised."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio import collectives
from intaglio.chips import ChipError, chip, replace
from intaglio.silicon.network import SUMMED, Net, collective_timing, piece, read, seconds_of

SOHU = chip("sohu")
SIZES = st.floats(2, 30).map(lambda x: int(2**x))
NETS = {
    "k44": lambda n: collectives.bipartite(n, SOHU.links.bytes_per_s, SOHU.constants.hop_s),
    "switch": lambda n: collectives.switch(n, SOHU.links.chip_bytes_per_s, SOHU.constants.hop_s),
}
EXACT = 0.004  # sizes are read 9 % apart and joined by lines: of what bends between two, less than this is lost
JUMP = 0.2  # where another transfer comes first at a link from some size on, times jump: 15 % seen in 146,000 draws


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(NETS)), st.sampled_from(collectives.COLLECTIVES), st.integers(2, 8), SIZES)
def test_a_static_schedule_takes_what_the_clock_of_schedules_says(kind: str, op: str, ranks: int, moved: int) -> None:
    """The quickest of all schedules over the chip's own links; two-step ones are weighed where there are two sides."""
    spec = replace(SOHU, topology=kind)
    net, local = NETS[kind](ranks), spec.shared_rate / SUMMED
    took = collective_timing(spec, op, ranks, moved)
    best, seconds = collectives.choose(op, net, moved, local=local)
    if best.algorithm == "two_step" and kind == "switch":
        assert took.seconds - spec.constants.meet_s >= seconds * (1 - JUMP)
    else:
        assert took.seconds - spec.constants.meet_s == pytest.approx(seconds, rel=JUMP)
    named = collectives.schedule(op, took.why.split(",")[0], ranks)
    share = collectives.clock.chunk_bytes(named, moved)
    assert collectives.seconds(named, net, share, local) == pytest.approx(
        took.seconds - spec.constants.meet_s, rel=JUMP
    )
    sent = [sum(s.kind == "send" and s.rank == r for s in named.steps) * share[0] for r in range(ranks)]
    assert took.link_bytes >= sum(sent) / (1 if op == "send" else ranks) * (
        1 - 1e-9
    )  # more where a chip stands between


def test_small_and_large_go_by_schedules_of_their_own() -> None:
    why = {n: collective_timing(SOHU, "all_reduce", 8, n).why.split(",")[0] for n in (10_000, 100_000_000)}
    assert why == {10_000: "one_shot", 100_000_000: "two_step"}
    on_a_switch = collective_timing(replace(SOHU, topology="switch"), "all_reduce", 8, 100_000_000)
    assert on_a_switch.why.startswith("halving") and on_a_switch.seconds > collective_timing(
        SOHU, "all_reduce", 8, 100_000_000
    ).seconds  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "op", "algorithm"),
    [(kind, op, "ring") for kind in ("switch", "torus") for op in ("all_reduce", "all_gather", "reduce_scatter")]
    + [("switch", "all_to_all", "direct")],
)
def test_groups_too_large_to_write_out_grow_evenly(kind: str, op: str, algorithm: str) -> None:
    for ranks, moved in ((20, 1e3), (27, 1e6), (27, 1e9)):
        net, link, latency, local = Net(kind, ranks, 20.0), 1e10, 1e-6, 20.0
        s = collectives.schedule(op, algorithm, ranks)
        chunk = moved * piece(net, op, algorithm) / link / latency
        whole = collectives.seconds(s, net.topology(ranks), [chunk] * s.chunks, local) * latency
        assert seconds_of(net, op, algorithm, link, latency, moved) == pytest.approx(whole, rel=EXACT)


@pytest.mark.parametrize("name", ["a100_sxm", "h100_sxm", "gb200", "tpu_v6e"])
def test_more_bytes_and_more_chips_take_longer(name: str) -> None:
    """And long streams reach what links and memory allow: bytes on the wire at the rate of the links, or less."""
    spec = chip(name)
    groups = [n for n in (2, 4, 7, 8, 16, 64, 256) if n <= spec.links.most]
    for op in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all"):
        times = [[collective_timing(spec, op, n, b).seconds for b in (10**3, 10**6, 10**9)] for n in groups[:5]]
        assert all(row == sorted(row) for row in times)
        assert [row[0] for row in times] == sorted(row[0] for row in times)
        took = collective_timing(spec, op, groups[-1] if op != "all_to_all" else groups[2], 10**10)
        assert took.seconds >= took.busy["NET"] * 0.7 and took.steps >= 1  # a switch that adds saves three tenths


def test_one_reading_serves_all_sizes() -> None:
    collective_timing.cache_clear()
    read.cache_clear()
    for moved in range(1_000_000, 2_000_000, 500):
        collective_timing(SOHU, "all_reduce", 8, moved)
    assert read.cache_info().currsize <= len(collectives.algorithms("all_reduce", 8)) * 11


def test_what_a_network_does_not_join_is_refused() -> None:
    with pytest.raises(ChipError, match="all_reduce over 16 chips: one network of sohu joins 8"):
        collective_timing(SOHU, "all_reduce", 16, 10)
    with pytest.raises(ChipError, match="no collective called 'reduce'; there are all_reduce"):
        collective_timing(SOHU, "reduce", 8, 10)
    assert collective_timing(SOHU, "all_reduce", 1, 10).seconds == 0
