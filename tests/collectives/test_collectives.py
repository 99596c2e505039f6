"""Collective schedules, for every number of ranks that they support: rules, results, modelled time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio import collectives as net
from intaglio.collectives import (
    COLLECTIVES,
    ScheduleError,
    Slot,
    TopologyError,
    algorithms,
    check,
    choose,
    execute,
    order,
    schedule,
    seconds,
)  # fmt: skip
from intaglio.collectives.clock import chunk_bytes
from intaglio.collectives.interpreter import cut
from intaglio.collectives.topology import Link, Topology

MOST = 12  # largest number of ranks for which every schedule is checked


def claimed(most: int = MOST) -> list[tuple[str, str, int, int]]:
    """Every (collective, algorithm, ranks, node) that has a schedule, up to `most` ranks."""
    return [
        (collective, algorithm, ranks, node)
        for collective in COLLECTIVES
        for ranks in range(1, most + 1)
        for node in (0, *(n for n in range(2, ranks) if ranks % n == 0))
        for algorithm in algorithms(collective, ranks, node)
        if (algorithm == "hierarchical") == bool(node)
    ]


def test_every_schedule_passes_all_rules():
    table = claimed()
    assert {row[1] for row in table} >= {"one_shot", "two_shot", "ring", "halving", "two_step", "hierarchical"}
    for row in table:
        check(schedule(*row))
    for ranks in (16, 24, 32):
        check(schedule("all_reduce", "two_shot", ranks))
        check(schedule("all_reduce", "ring", ranks))
        check(schedule("all_reduce", "hierarchical", ranks, 8))


@settings(max_examples=60, deadline=None)
@given(
    row=st.sampled_from(claimed(9)), rows=st.integers(0, 3), width=st.integers(0, 41), seed=st.integers(0, 2**32 - 1)
)
def test_every_schedule_computes_its_collective(row, rows, width, seed):
    s = schedule(*row)
    draw = np.random.default_rng(seed)
    x = [draw.normal(size=(rows, width)).astype(np.float32) for _ in range(s.ranks)]
    uneven = [draw.normal(size=(rows, draw.integers(0, 7))).astype(np.float32) for _ in range(s.ranks)]
    parts = [[draw.normal(size=(rows, w.shape[1])).astype(np.float32) for w in uneven] for _ in range(s.ranks)]
    if s.collective == "all_reduce":
        got = net.all_reduce(s, x)
        assert all(np.array_equal(a, got[0]) for a in got)  # the same bits on every rank
        assert_sum(s, got[0], x)
    elif s.collective == "reduce_scatter":
        for receiver, got in enumerate(net.reduce_scatter(s, parts)):
            assert_sum(s, got, [row[receiver] for row in parts])
    elif s.collective == "all_gather":
        for got in net.all_gather(s, uneven):
            assert all(np.array_equal(a, b) for a, b in zip(got, uneven, strict=True))
    elif s.collective == "all_to_all":
        for receiver, got in enumerate(net.all_to_all(s, parts)):
            assert all(np.array_equal(a, row[receiver]) for a, row in zip(got, parts, strict=True))
    else:
        got = execute(s, [{0: x[0]}, *({} for _ in range(s.ranks - 1))])
        assert np.array_equal(got[-1][0], x[0])


def assert_sum(s, got, x):
    """Assert equality with the sum in order of rank if the schedule has it, else within P - 1 float32 roundings."""
    exact = np.sum([a.astype(np.float64) for a in x], axis=0)
    room = (s.ranks - 1) * 2.0**-24 * np.sum([np.abs(a) for a in x], axis=0)
    assert (np.abs(got - exact) <= room).all()
    if order(s) == "rank":
        total = x[0]
        for a in x[1:]:
            total = total + a
        assert np.array_equal(got, total)


@settings(max_examples=40, deadline=None)
@given(row=st.sampled_from(claimed(6)), data=st.data())
def test_the_execution_order_does_not_change_results(row, data):
    s = schedule(*row)
    draw = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    inputs = [{c: draw.normal(size=3).astype(np.float32) for c in s.inputs(r)} for r in range(s.ranks)]
    waits = {i: set(step.after) for i, step in enumerate(s.steps)}
    sent = {step.tag: i for i, step in enumerate(s.steps) if step.kind == "send"}
    for i, step in enumerate(s.steps):
        if step.kind == "recv":
            waits[i].add(sent[step.tag])
    order: list[int] = []
    while waits:
        done = draw.choice([i for i, others in waits.items() if others.isdisjoint(waits)])
        del waits[done]
        order.append(int(done))
    for a, b in zip(execute(s, inputs), execute(s, inputs, order), strict=True):
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[c], b[c]) for c in a)


def test_order_of_sums():
    assert order(schedule("all_reduce", "one_shot", 5)) == order(schedule("reduce_scatter", "direct", 5)) == "rank"
    assert order(schedule("all_reduce", "halving", 8)) == order(schedule("all_reduce", "hierarchical", 8, 4)) == "tree"
    assert order(schedule("all_reduce", "ring", 4)) == order(schedule("all_reduce", "two_step", 8)) == "chunk"
    s, _ = choose("all_reduce", net.ring(8, 1e9, 1e-6), 1e9, ordered=True)
    assert order(s) != "chunk"


def test_the_summation_order_of_a_column_does_not_depend_on_the_rows():
    draw = np.random.default_rng(5)
    x = [draw.normal(size=(7, 19)).astype(np.float32) for _ in range(4)]
    for algorithm in algorithms("all_reduce", 4):
        s = schedule("all_reduce", algorithm, 4)
        whole = net.all_reduce(s, x)[0]
        assert np.array_equal(whole[2:3], net.all_reduce(s, [a[2:3] for a in x])[0])


def altered(s, i, **fields):
    steps = list(s.steps)
    steps[i] = steps[i]._replace(**fields)
    return replace(s, steps=tuple(steps))


def first(s, kind):
    return next(i for i, step in enumerate(s.steps) if step.kind == kind)


def planted():
    """Schedules with one fault each, with the rule that finds it and the expected message."""
    ring4, shot = schedule("all_reduce", "ring", 4), schedule("all_reduce", "one_shot", 3)
    recv, send, sum = first(ring4, "recv"), first(ring4, "send"), first(ring4, "reduce")
    yield altered(ring4, recv, kind="get"), "steps_well_formed", "has unknown kind 'get'"
    yield altered(ring4, sum, add=None), "steps_well_formed", "lacks a slot"
    yield altered(ring4, send, rank=4), "steps_well_formed", "outside 4 ranks"
    yield altered(ring4, recv, dst=Slot("in", 0)), "steps_well_formed", "writes to an input slot"
    yield altered(ring4, recv, tag=99), "transfers_paired", "no send with tag 99"
    yield altered(ring4, send, peer=2), "transfers_paired", "does not match"
    yield altered(ring4, first(ring4, "send") + 3, tag=0), "transfers_paired", "has tag 0, as has"
    yield replace(ring4, steps=ring4.steps[:recv] + ring4.steps[recv + 1 :]), "transfers_paired", "is never received"
    later = ring4.steps[recv].rank, len(ring4.steps) - 1
    last = max(i for i in range(later[1] + 1) if ring4.steps[i].rank == later[0])
    yield altered(ring4, recv, after=(last,)), "no_deadlock", "in a cycle"
    yield altered(ring4, sum, after=()), "hazards_ordered", "does not wait for"
    yield altered(ring4, sum, src=Slot("tmp", 77)), "hazards_ordered", "which no step has written"
    twice = shot.steps[first(shot, "reduce")]
    yield altered(shot, first(shot, "reduce"), add=twice.src), "every_contribution_summed_once", "as the sum of"
    lost = [i for i, step in enumerate(shot.steps) if step.dst == Slot("out", 0)][-1]
    yield altered(shot, lost, dst=Slot("tmp", 50)), "every_contribution_summed_once", "does not get chunk 0"
    other = [i for i, step in enumerate(shot.steps) if step.kind == "reduce" and step.rank == 2][-1]
    a = shot.steps[other]
    yield altered(shot, other, src=a.add, add=a.src), "every_contribution_summed_once", "is summed as"


@pytest.mark.parametrize(("s", "rule", "says"), list(planted()))
def test_a_planted_fault_is_found(s, rule, says):
    with pytest.raises(ScheduleError, match=f"breaks rule {rule}") as e:
        check(s)
    assert says in str(e.value)


def test_unsupported_schedules_are_refused():
    with pytest.raises(
        ScheduleError, match="no all_reduce algorithm 'halving' for 6 ranks; use one of one_shot, two_shot, ring"
    ):
        schedule("all_reduce", "halving", 6)
    with pytest.raises(ScheduleError, match="unknown collective 'reduce'; supported: all_reduce"):
        schedule("reduce", "ring", 6)
    with pytest.raises(ScheduleError, match="ranks=0"):
        schedule("all_reduce", "ring", 0)
    s = schedule("all_reduce", "one_shot", 2)
    with pytest.raises(ScheduleError, match=r"rank 1 has input chunks \[\]; wanted \[0\]"):
        execute(s, [{0: np.ones(1)}, {}])
    with pytest.raises(ScheduleError, match="waits for a message that was not sent"):
        execute(s, [{0: np.ones(1)}] * 2, [1, 0, 2, 3, 4, 5])
    with pytest.raises(ScheduleError, match=r"full\(3\) has 3 ranks, the schedule 2"):
        seconds(s, net.full(3, 1.0, 0.0), [1.0])
    with pytest.raises(TopologyError, match="no route from rank"):
        Topology("gap", 3, (Link(0, 1, 1.0, 0.0), Link(1, 0, 1.0, 0.0)))
    with pytest.raises(TopologyError, match="is invalid"):
        net.ring(3, 0.0, 0.0)


A, B, G, N = 3e-6, 50e9, 400e9, 7e6  # latency, link and local bandwidth, payload


def took(collective, algorithm, topology, nbytes=N, node=0, local=float("inf")):
    s = schedule(collective, algorithm, topology.ranks, node)
    return seconds(s, topology, chunk_bytes(s, nbytes), local)


@pytest.mark.parametrize("p", [2, 3, 4, 7, 8])
def test_times_agree_with_published_formulas(p):
    """Thakur, Rabenseifner and Gropp 2005, section 4: ring on a ring topology, others with a link for each pair."""
    share = (p - 1) / p * N
    circle, mesh = net.ring(p, B, A), net.full(p, B, A)
    for collective in ("all_gather", "reduce_scatter"):
        assert took(collective, "ring", circle) == pytest.approx((p - 1) * A + share / B)
    wanted = 2 * (p - 1) * A + 2 * share / B + share / G
    assert took("all_reduce", "ring", circle, local=G) == pytest.approx(wanted)
    assert took("all_reduce", "one_shot", mesh) == pytest.approx(A + N / B)
    assert took("all_reduce", "two_shot", mesh) == pytest.approx(2 * (A + N / p / B))
    assert took("all_to_all", "direct", mesh) == pytest.approx(A + N / p / B)
    assert took("all_to_all", "direct", net.switch(p, B, A)) == pytest.approx(A + share / B)
    if p in (2, 4, 8):
        rounds = p.bit_length() - 1  # rounds of different chunks may overlap
        formula = 2 * rounds * A + 2 * share / B
        assert 2 * share / B < took("all_reduce", "halving", net.switch(p, B, A)) <= formula * (1 + 1e-9)
    assert took("send", "direct", circle) == pytest.approx(A + N / B)


@pytest.mark.parametrize("h", [2, 3, 4, 5])
def test_two_step_reaches_the_bandwidth_bound_on_k_hh(h):
    """On K h,h a chip receives 2h - 1 shares (or sums of them) over h links; two_step takes no longer than that."""
    p, share = 2 * h, N / (2 * h)
    sides = net.bipartite(p, B, A)
    gather = (2 * h - 1) / h * share / B + 2 * A
    assert took("all_gather", "two_step", sides) == pytest.approx(gather)
    assert took("reduce_scatter", "two_step", sides) == pytest.approx(
        gather, abs=1.01 * A
    )  # the last chunk may cross one link less
    assert took("all_reduce", "two_step", sides) == pytest.approx(2 * gather, abs=2.01 * A)
    # all_to_all: of the parts that a chip sends, h cross one link and h - 1 two, over h links
    assert took("all_to_all", "two_step", sides) == pytest.approx((3 * h - 2) / h * share / B + 2 * A, abs=1.01 * A)


def test_choose_takes_the_fastest_schedule():
    sides = net.bipartite(8, B, A)
    small, large = choose("all_reduce", sides, 100.0), choose("all_reduce", sides, 1e9)
    assert (small[0].algorithm, large[0].algorithm) == ("one_shot", "two_step")
    for s, t in (small, large):
        others = [took("all_reduce", a, sides, 100.0 if s is small[0] else 1e9) for a in algorithms("all_reduce", 8)]
        assert t == pytest.approx(min(others))
    cluster = net.nodes(4, 8, (450e9, 1e-6), (50e9, 5e-6))
    best, _ = choose("all_reduce", cluster, 1e8, node=8)
    assert best.algorithm == "hierarchical"


def test_routes_and_contention():
    line = Topology("line", 3, tuple(Link(a, b, B, A) for a, b in ((0, 1), (1, 0), (1, 2), (2, 1))))
    assert [(link.src, link.dst) for link in line.route(0, 2)] == [(0, 1), (1, 2)]
    assert took("send", "direct", line) == pytest.approx(2 * A + N / B)
    # link 0 -> 1 carries the transfers to 1 and to 2, one after the other
    assert took("all_to_all", "direct", line, 3 * N) == pytest.approx(2 * N / B + 2 * A, rel=0.5 * A * B / N)
    grid = net.torus(4, 4, B, A)
    assert max(len(grid.route(0, r)) for r in range(16)) == 4
    assert {len(grid.route(r, r)) for r in range(16)} == {0}


def test_cut_gives_near_equal_parts_that_join_again():
    x = np.arange(22).reshape(2, 11)
    parts = cut(x, 4)
    assert [p.shape[1] for p in parts] == [2, 3, 3, 3]
    assert np.array_equal(np.concatenate(parts, axis=1), x)
