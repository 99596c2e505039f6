"""The router's parts: prefix keys, index, fair queue, placement, admission; and the whole in virtual time.

Long because each part is held to a slow reference that is written here.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.routed import CHUNK, SimReplica, Simulation, steps_of

from intaglio.router import (
    CHUNK_BYTES,
    POLICIES,
    BlocksCleared,
    BlocksRemoved,
    BlocksStored,
    CacheIndex,
    FairQueue,
    Job,
    Limits,
    LoadReport,
    Pace,
    PromptMemory,
    Refusal,
    Role,
    Router,
    estimate,
    prefix_keys,
)
from intaglio.router.index import ASSUMED_SECONDS, CONFIRMED_SECONDS
from intaglio.router.router import SCANNED
from intaglio.runtime import StepFit

PACE = Pace(0.01, 0.001, measured=True)
PACE_STEPS = steps_of(PACE)


def keys_of(*chunks: int) -> tuple[bytes, ...]:
    """Prefix keys of a text of these chunks."""
    return prefix_keys(b"", [bytes([c]) * CHUNK_BYTES for c in chunks])


def job(id: str, *chunks: int, tail: int = 8, **options: Any) -> Job:
    keys = keys_of(*chunks)
    return Job(id, keys, len(keys) * CHUNK + tail, **options)


def router_of(n: int, policy: str = "cache-aware", **options: Any) -> Router:
    router = Router(policy, **options)
    for i in range(n):
        router.add_replica(f"r{i}")
        router.ready(f"r{i}", f"r{i}.0")
        router.report(f"r{i}", LoadReport(steps=PACE_STEPS))
    return router


# Prefix keys


@given(st.lists(st.integers(0, 3), max_size=6), st.lists(st.integers(0, 3), max_size=6), st.integers(1, 300))
def test_keys_are_shared_exactly_as_far_as_the_text_is(a: list[int], b: list[int], cut: int) -> None:
    shared = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    first, second = keys_of(*a), keys_of(*b)
    assert len(first) == len(a)
    assert first[:shared] == second[:shared]
    assert not set(first[shared:]) & set(second[shared:])
    text = b"".join(bytes([c]) * CHUNK_BYTES for c in a)
    assert prefix_keys(b"", [text[:cut], text[cut:]]) == first  # however the text is cut into pieces
    assert not set(prefix_keys(b"salt", [text])) & set(first)


# Index


def test_a_stored_block_counts_until_it_is_removed() -> None:
    memory, index, keys = PromptMemory(), CacheIndex(), keys_of(1, 2, 3)
    memory.learn(keys, 96, ("a", "b", "c"), 32)
    index.apply("life 1", 1, BlocksStored(("a", "b", "c")))
    assert index.cached_tokens(keys, memory, 0.0) == 96
    index.apply("life 1", 2, BlocksRemoved(("c",)))
    assert index.cached_tokens(keys, memory, 0.0) == 64
    index.apply("life 1", 2, BlocksRemoved(("b",)))  # a repeated event
    assert index.cached_tokens(keys, memory, 0.0) == 64
    index.apply("life 1", 3, BlocksCleared())
    assert index.cached_tokens(keys, memory, 0.0) == 0


def test_a_gap_makes_the_index_stale_until_a_snapshot() -> None:
    memory, index, keys = PromptMemory(), CacheIndex(), keys_of(1, 2)
    memory.learn(keys, 64, ("a", "b"), 32)
    index.apply("life 1", 1, BlocksStored(("a",)))
    index.apply("life 1", 3, BlocksStored(("b",)))
    assert index.stale and index.cached_tokens(keys, memory, 0.0) == 0
    index.snapshot("life 1", 2, ("a",))  # older than what is known
    assert index.stale
    index.snapshot("life 1", 4, ("a", "b"))
    assert not index.stale and index.cached_tokens(keys, memory, 0.0) == 64


def test_a_restarted_replica_has_cached_nothing() -> None:
    memory, index, keys = PromptMemory(), CacheIndex(), keys_of(1, 2)
    memory.learn(keys, 64, ("a", "b"), 32)
    index.restarted("life 1")
    index.assume(keys, 0.0)
    index.apply("life 1", 1, BlocksStored(("a", "b")))
    assert index.cached_tokens(keys, memory, 0.0) == 64
    index.restarted("life 2")
    assert index.cached_tokens(keys, memory, 0.0) == 0


def test_assumed_prefixes_expire_once_there_are_events() -> None:
    memory, index, keys = PromptMemory(), CacheIndex(), keys_of(1, 2)
    index.restarted("life 1")
    index.assume(keys, 0.0)
    assert index.cached_tokens(keys, memory, 1e6) == 64  # the only knowledge there is
    index.apply("life 1", 1, BlocksStored(("other",)))
    assert index.cached_tokens(keys, memory, ASSUMED_SECONDS) == 64
    assert index.cached_tokens(keys, memory, ASSUMED_SECONDS + 1) == 0
    assert index.cached_tokens(keys_of(1, 9), memory, 9.0) == 32
    index.computed(keys, 5.0)  # from now on events would tell of its blocks
    assert index.cached_tokens(keys, memory, 5.0 + CONFIRMED_SECONDS) == 64
    assert index.cached_tokens(keys, memory, 5.1 + CONFIRMED_SECONDS) == 0


@given(st.data())
def test_the_confirmed_set_is_the_replicas_cache_or_the_index_is_stale(data: st.DataObject) -> None:
    """Events may be lost, repeated and come late, and the replica may restart; a snapshot repairs all of it."""
    index, cache, life, log = CacheIndex(), set[str](), 0, list[tuple[str, int, Any]]()
    for _ in range(data.draw(st.integers(1, 25))):
        match data.draw(st.sampled_from(["store", "remove", "clear", "restart", "repeat", "snapshot"])):
            case "restart":
                life, cache, log = life + 1, set(), []
                index.restarted(str(life))
                continue
            case "repeat" if log:
                index.apply(*data.draw(st.sampled_from(log)))
                continue
            case "snapshot":
                index.snapshot(str(life), len(log), cache)
                assert not index.stale and index.names == cache
                continue
            case "clear":
                cache, event = set(), BlocksCleared()
            case "remove" if cache:
                gone = data.draw(st.sampled_from(sorted(cache)))
                cache, event = cache - {gone}, BlocksRemoved((gone,))
            case _:
                new = data.draw(st.sampled_from("abcdef"))
                cache, event = cache | {new}, BlocksStored((new,))
        log.append((str(life), len(log) + 1, event))
        if not data.draw(st.booleans()):
            continue  # lost
        index.apply(*log[-1])
        assert index.stale or index.names == cache
    index.snapshot(str(life), len(log), cache)
    assert not index.stale and index.names == cache


# Fair queue


def drained(queue: FairQueue, most: int = 10**6) -> list[Job]:
    out: list[Job] = []
    while queue and len(out) < most:
        head = next(queue.order())
        queue.take(head)
        out.append(head)
    return out


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 50))
@settings(max_examples=20)
def test_tenants_are_served_in_proportion_to_their_weights(a: int, b: int, first: int) -> None:
    queue = FairQueue({"a": a, "b": b})
    rng = random.Random(first)
    for i in range(150):
        for tenant in "ab":
            queue.push(Job(f"{tenant}{i}", (), rng.randrange(1, 100), tenant=tenant))
    served = {"a": 0.0, "b": 0.0}
    for one in drained(queue, 150):  # neither has run out: the least share of 150 is 25, the largest 125
        served[one.tenant] += one.tokens
    assert abs(served["a"] / a - served["b"] / b) <= 2 * 116  # a job's tokens are at most 115


def test_a_tenant_that_was_away_saves_nothing_up() -> None:
    queue = FairQueue()
    for i in range(50):
        queue.push(Job(f"a{i}", (), 100, tenant="a"))
    for _ in range(40):
        queue.take(next(queue.order()))
    for i in range(20):
        queue.push(Job(f"b{i}", (), 100, tenant="b"))
    assert [j.tenant for j in drained(queue)][:20].count("b") == 10


def test_priority_comes_before_fairness_and_arrival_before_neither() -> None:
    queue = FairQueue()
    for id, priority in (("x", 1), ("y", 0), ("z", 1), ("w", -1)):
        queue.push(Job(id, priority=priority))
    assert [j.id for j in drained(queue)] == ["w", "y", "x", "z"]


def test_the_charge_is_corrected_by_the_true_output() -> None:
    queue = FairQueue()
    long, short = Job("a0", (), 10, 1000, tenant="a"), Job("b0", (), 10, 1000, tenant="b")
    for one in (long, short, Job("a1", (), 10, tenant="a"), Job("b1", (), 10, tenant="b")):
        queue.push(one)
    queue.take(long)
    queue.take(short)
    queue.settle(long, 1000)
    queue.settle(short, 3)
    assert [j.id for j in drained(queue)] == ["b1", "a1"]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(-1, 1), st.integers(1, 50)), max_size=40))
def test_every_job_leaves_the_queue_once(jobs: list[tuple[str, int, int]]) -> None:
    queue = FairQueue({"a": 3})
    for i, (tenant, priority, tokens) in enumerate(jobs):
        queue.push(Job(str(i), (), tokens, tenant=tenant, priority=priority))
    planned = [j.id for j in queue.order()]
    out = drained(queue)
    assert sorted(j.id for j in out) == sorted(map(str, range(len(jobs))))
    assert [j.priority for j in out] == sorted(j.priority for j in out)
    assert sorted(planned) == sorted(j.id for j in out)
    assert len(queue) == 0 and all(not t.waiting for t in queue.tenants.values())


@given(st.lists(st.tuples(st.sampled_from("ptd"), st.integers(0, 9)), max_size=60))
def test_the_counts_of_the_queue_are_those_of_a_walk_over_it(steps: list[tuple[str, int]]) -> None:
    queue = FairQueue()
    for what, n in steps:
        waiting = {job.id: job for job in queue.jobs()}
        one = waiting.get(str(n)) or Job(
            str(n),
            (),
            10 + n,
            tenant="ab"[n % 2],
            priority=n % 3,
            stage="prefill" if n % 4 == 0 else "all",
            handed=n // 2,
        )
        if what == "t" and one.id in waiting:
            queue.take(one)
        elif what == "d":
            queue.discard(replace(one, start_by=None, prompt_tokens=1))  # the id is what counts
        elif what == "p" and one.id not in waiting:
            queue.push(one)
        left = list(queue.jobs())
        assert len(queue) == len(left) == sum(queue.waiting(tenant) for tenant in "ab")
        assert sorted(job.id for job in queue.order()) == sorted(job.id for job in left)
        for stage in ("all", "prefill"):
            mine = [job for job in left if job.stage == stage]
            assert queue.jobs_of[stage] == len(mine)
            assert queue.tokens_of[stage] == sum(job.prompt_tokens - job.handed for job in mine)


def test_a_tenant_with_one_waiting_job_at_a_time_is_charged_too() -> None:
    queue = FairQueue()
    for i in range(100):
        queue.push(Job(f"a{i}", (), 84, tenant="a"))  # 100 tokens with the output
    taken, i = {"a": 0, "b": 0}, 0
    while taken["a"] < 5000:
        if not queue.waiting("b"):
            queue.push(Job(f"b{i}", (), 984, tenant="b"))
            i += 1
        head = next(queue.order())
        queue.take(head)
        queue.settle(head, head.output_tokens)
        taken[head.tenant] += head.tokens
    assert abs(taken["a"] - taken["b"]) <= 2000


def test_tenants_that_never_return_are_forgotten() -> None:
    queue = FairQueue()
    for i in range(3000):
        one = Job(str(i), (), 100 + i, tenant=f"user {i}")
        queue.push(one)
        assert next(queue.order()) == one
        queue.take(one)
        queue.settle(one, one.output_tokens)
        assert len(queue.tenants) <= 1025
    assert "user 2999" in queue.tenants


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_must_be_above_zero(weight: float) -> None:
    with pytest.raises(ValueError, match="weight of tenant 'a'"):
        FairQueue({"a": weight})


# Placement and admission


def walked(router: Router, now: float) -> list[tuple[str, str]]:
    """(job, replica) of all that dispatch() should place, by a walk over all waiting jobs on a copy of the router."""
    router = deepcopy(router)
    placed, ahead, placements = list[tuple[str, str]](), Counter[str](), router.placements
    for stage in ("all", "prefill"):
        for job in [job for job in router.queue.order() if job.stage == stage][:SCANNED]:
            alive = [r for r in router.replicas.values() if r.placeable]
            role = [r for r in alive if (r.role == "prefill") == (stage == "prefill")] or alive
            options = [estimate(r, job, router.memory, now, router.paces()[r.name], ahead[r.name]) for r in role]
            best = POLICIES[router.policy](options) if options else None
            if best is None:
                continue
            if not best.replica.has_room:
                ahead[best.replica.name] += best.uncached
                continue
            placements += 1
            best.replica.assign(job, best.uncached, now)
            best.replica.last_placed = placements
            best.replica.index.assume(job.keys, now)
            placed.append((job.id, best.replica.name))
    return placed


@pytest.mark.parametrize("policy", POLICIES)
def test_dispatch_places_what_a_walk_over_all_waiting_jobs_would(policy: str, py_rng: random.Random) -> None:
    rng = py_rng
    router = router_of(0, policy)
    roles: list[Role] = ["mixed", "prefill", "decode"]
    for i, role in enumerate(rng.choices(roles, k=rng.randint(1, 4))):
        router.add_replica(f"r{i}", role)
        router.ready(f"r{i}", f"r{i}.0")
        router.report(f"r{i}", LoadReport(steps=PACE_STEPS, max_batch_tokens=rng.choice((8, 64)), max_sequences=4))
    running: list[Job] = []
    for i in range(200):
        stage = rng.choice(("all", "all", "prefill"))
        router.queue.push(
            job(str(i), *rng.choices(range(3), k=rng.randint(0, 4)), tail=rng.randint(1, 90), stage=stage)
        )
        expected = walked(router, float(i))
        placements = router.dispatch(float(i))
        assert [(p.job.id, p.replica) for p in placements] == expected
        running += [p.job for p in placements]
        for one in running:
            if rng.random() < 0.5:
                router.started(one.id, float(i), one.prompt_tokens)
        if running and rng.random() < 0.4:
            router.ended(running.pop(rng.randrange(len(running))), 3)
    assert router.placements > 20


@pytest.mark.parametrize("policy", POLICIES)
def test_a_job_placed_at_once_is_placed_as_by_submit_and_dispatch(policy: str, py_rng: random.Random) -> None:
    rng, placed = py_rng, list[Job]()
    router = router_of(rng.randint(1, 3), policy)
    for r in router.replicas:
        router.report(r, LoadReport(steps=PACE_STEPS, max_batch_tokens=rng.choice((8, 64)), max_sequences=4))
    for i in range(100):
        one, other = job(str(i), *rng.choices(range(3), k=rng.randint(0, 4)), tail=rng.randint(1, 90)), deepcopy(router)
        one = replace(one, tenant=rng.choice("ab"), deadline=rng.choice((None, i + 0.5, i + 9.0)))
        try:
            other.submit(one, float(i))
        except Refusal as refusal:
            with pytest.raises(Refusal, match=re.escape(str(refusal))):
                router.place(one, float(i))
        else:
            expected = other.dispatch(float(i)) if len(other.queue) == 1 else []
            found = router.place(one, float(i))
            assert [(p.job, p.replica, p.estimate.cached, p.estimate.end) for p in ([found] if found else [])] == [
                (p.job, p.replica, p.estimate.cached, p.estimate.end) for p in expected
            ]
        assert router.refused == other.refused and len(router.queue) == len(other.queue)
        assert {n: t.counter for n, t in router.queue.tenants.items()} == {
            n: t.counter for n, t in other.queue.tenants.items()
        }
        placed += [job for r in router.replicas.values() for job in r.jobs.values() if job not in placed]
        for ended in [job for job in placed if rng.random() < 0.3]:
            placed.remove(ended)
            router.started(ended.id, float(i), ended.prompt_tokens)
            router.ended(ended, rng.randrange(20))
        if rng.random() < 0.5:
            router.dispatch(float(i))
    assert router.placements > 20


def test_a_replica_near_the_end_of_a_prompt_is_sooner_free() -> None:
    router = router_of(1)
    replica = router.replicas["r0"]
    for i in range(2):
        router.submit(Job(f"j{i}", (), 400), 0.0)
    router.dispatch(0.0)  # a prompt token takes 1 ms
    assert [replica.prefill_left(now, PACE.per_token) for now in (0.0, 0.1, 0.4, 9.0)] == [800, 700, 400, 400]
    router.started("j0", 0.5, 400)
    assert [replica.prefill_left(now, PACE.per_token) for now in (0.5, 0.6, 9.0)] == [400, 300, 0]
    router.started("j1", 1.0, 400)
    assert replica.prefill_left(1.0, PACE.per_token) == replica.prefill_tokens == 0


def test_a_job_goes_where_its_prefix_is() -> None:
    router = router_of(3)
    router.submit(job("one", 1, 2, 3), 0.0)
    [first] = router.dispatch(0.0)
    router.ended(first.job, 16)
    router.submit(job("other", 9, 9, 9), 1.0)
    [other] = router.dispatch(1.0)
    assert other.replica != first.replica
    router.submit(job("two", 1, 2, 3, 4), 2.0)
    [second] = router.dispatch(2.0)
    assert second.replica == first.replica and second.estimate.cached == 96


def test_no_replica_stays_idle_while_jobs_of_one_prefix_queue_at_another() -> None:
    router, placed = router_of(2), Counter[str]()
    for i in range(6):
        router.submit(job(f"j{i}", *[1] * 12, 10 + i, 10 + i, output_tokens=16), 0.0)
        placed.update(p.replica for p in router.dispatch(0.0))
    assert min(placed.values()) >= 2 and len(placed) == 2


def test_a_long_queue_outweighs_a_cached_prefix() -> None:
    router = router_of(2)
    router.submit(job("first", 1, 2), 0.0)
    [first] = router.dispatch(0.0)
    for i in range(4):
        router.replicas[first.replica].assign(job(f"extra{i}", 5, 6, 7, 8), 136, 1.0)
    router.submit(job("second", 1, 2), 1.0)
    [second] = router.dispatch(1.0)
    assert second.replica != first.replica


def one_after_another(router: Router, count: int) -> list[str]:
    """The replicas of jobs of which each ends before the next comes."""
    used = []
    for i in range(count):
        router.submit(Job(f"j{i}"), float(i))
        [placed] = router.dispatch(float(i))
        used.append(placed.replica)
        router.ended(placed.job, 1)
    return used


def test_equal_replicas_take_turns() -> None:
    router = router_of(3)
    used = one_after_another(router, 6)
    assert sorted(used[:3]) == ["r0", "r1", "r2"] and used[3:] == used[:3]


@pytest.mark.parametrize("slow", [None, Pace(9.0, 1.0)])
def test_a_replica_is_measured_again_though_it_seems_slow(slow: Pace | None) -> None:
    router = router_of(2)
    router.report("r0", LoadReport(steps=steps_of(Pace(0.001, 0.00001))))
    router.report("r1", LoadReport(steps=steps_of(slow) if slow else StepFit()))
    assert one_after_another(router, 80).count("r1") == (2 if slow else 40)


def test_jobs_wait_in_the_router_once_a_replica_has_enough_prefill() -> None:
    router = router_of(1)
    for i in range(100):
        router.submit(Job(f"j{i}", (), 512), 0.0)
    assert len(router.dispatch(0.0)) == 4
    router.started("j0", 0.1, 512)
    assert [p.job.id for p in router.dispatch(0.1)] == ["j4"]


def test_a_draining_or_dead_replica_gets_nothing_and_gives_up_its_jobs() -> None:
    router = router_of(2)
    for i in range(4):
        router.submit(Job(f"j{i}"), 0.0)
    placed = router.dispatch(0.0)
    mine = [p.job for p in placed if p.replica == "r0"]
    assert router.drain("r0") == mine
    for moved in mine:
        router.resubmit(moved)
    assert [p.replica for p in router.dispatch(0.0)] == ["r1"] * len(mine)
    router.remove_replica("r0")
    assert len(router.died("r1")) == 4
    assert router.replicas["r1"].jobs == {} and router.replicas["r1"].failures == 4
    with pytest.raises(Refusal) as e:
        router.submit(Job("late"), 1.0)
    assert e.value.reason == "unavailable"


def test_a_full_queue_refuses_and_keeps_room_for_other_tenants() -> None:
    router = router_of(1, limits=Limits(8))
    for i in range(4):
        router.submit(Job(f"run{i}", (), 512), 0.0)
    router.dispatch(0.0)
    for i in range(4):
        router.submit(Job(f"a{i}", (), 512, tenant="a"), 0.0)
    with pytest.raises(Refusal, match="this tenant's"):
        router.submit(Job("a4", (), 512, tenant="a"), 0.0)
    for i, tenant in enumerate("bcde"):
        router.submit(Job(f"other{i}", (), 512, tenant=tenant), 0.0)
    with pytest.raises(Refusal, match="max_queued is 8") as e:
        router.submit(Job("last", (), 512, tenant="z"), 0.0)
    assert e.value.retry_after >= 1 and router.refused == {"full": 2}


def test_a_job_that_would_be_late_is_refused_at_once() -> None:
    router = router_of(1)
    with pytest.raises(Refusal) as e:
        router.submit(Job("a", (), 1000, 1, deadline=0.5), 0.0)
    assert e.value.reason == "late"
    router.submit(Job("b", (), 1000, 1, deadline=1.5), 0.0)
    router.submit(Job("c", (), 1000, 1, deadline=9.0, start_by=3.0), 0.0)
    for i in range(8):
        router.submit(Job(f"d{i}", (), 1000, 1), 0.0)
    with pytest.raises(Refusal) as e:
        router.submit(Job("e", (), 10, 1, start_by=1.0), 0.0)
    assert e.value.reason == "late" and e.value.retry_after > 1
    unknown = Router()
    unknown.add_replica("r")
    unknown.ready("r", "r.0")
    unknown.submit(Job("a", (), 1000, 1, deadline=0.5), 0.0)  # nothing is known of its pace yet


def test_what_waited_too_long_is_given_back() -> None:
    router = router_of(1)
    for i in range(8):
        router.submit(Job(f"j{i}", (), 512, deadline=None if i < 4 else 50.0 + i), 0.0)
    router.dispatch(0.0)
    assert [j.id for j in router.expired(55.5)] == ["j4", "j5"]
    assert len(router.queue) == 2


def test_estimates_grow_with_work_and_shrink_with_cache() -> None:
    router = router_of(1)
    replica, memory = router.replicas["r0"], router.memory
    cold = estimate(replica, job("a", 1, 2, 3), memory, 0.0, PACE)
    replica.index.assume(keys_of(1, 2), 0.0)
    warm = estimate(replica, job("a", 1, 2, 3), memory, 0.0, PACE)
    assert (warm.cached, warm.uncached) == (64, 40) and warm.first_token < cold.first_token
    assert estimate(replica, job("a", 1, 2, tail=0), memory, 0.0, PACE).uncached == 1  # its logits are needed
    busy = estimate(replica, job("a", 1, 2, 3), memory, 0.0, PACE, ahead=1000)
    assert busy.end > warm.end


def test_wrong_names_are_refused() -> None:
    with pytest.raises(ValueError, match="cache-aware, round-robin"):
        Router("fastest")
    router = router_of(1)
    with pytest.raises(ValueError, match="'r0' already"):
        router.add_replica("r0")
    with pytest.raises(ValueError, match="max_queued is 0"):
        Limits(0)


# The whole, in virtual time


def conversations(rng: random.Random, users: int, turns: int, chunks: int) -> list[tuple[float, Job]]:
    """(arrival, job) of users who each go on from their own prompt, after one of two long system prompts."""
    out = []
    for user in range(users):
        text = [user % 2] * 8 + [100 + user] * 12
        at = rng.random() * 4
        for turn in range(turns):
            out.append((at, job(f"u{user}t{turn}", *text, output_tokens=rng.randrange(4, 24), tenant=f"t{user % 3}")))
            text = [*text, *(rng.randrange(256) for _ in range(chunks))]
            at += rng.expovariate(0.5)
    return out


def simulate(trace: list[tuple[float, Job]], policy: str, chunks: int = 800, **options: Any) -> Simulation:
    replicas = [SimReplica(f"r{i}", PACE, chunks) for i in range(3)]
    simulation = Simulation(Router(policy, Limits(10_000)), replicas, **options)
    for at, one in trace:
        simulation.at(at, "job", one)
    return simulation


@pytest.mark.parametrize("events", [True, False])
def test_shared_prefixes_are_found_where_round_robin_computes_them_again(events: bool) -> None:
    computed, waited = Counter[str](), Counter[str]()
    for seed in range(6):  # over other seeds, single traces gain between 1.05 and 4 times
        trace = conversations(random.Random(seed), 12, 6, 1)
        for policy in POLICIES:
            simulation = simulate(trace, policy, events=events)
            waited[policy] += simulation.run().mean_ttft
            computed[policy] += sum(r.computed for r in simulation.replicas)
            assert len(simulation.result.end) == len(trace)
    assert computed["cache-aware"] * 1.8 < computed["round-robin"]
    assert waited["cache-aware"] * 1.8 < waited["round-robin"]


def test_where_nothing_is_shared_it_is_no_worse_than_round_robin() -> None:
    waited, seconds = Counter[str](), Counter[str]()
    for seed in range(4):
        rng = random.Random(seed)
        trace = []
        for i in range(300):
            chunks = [rng.randrange(256) for _ in range(rng.randrange(1, 12))]
            trace.append((rng.random() * 20, job(f"j{i}", *chunks, output_tokens=rng.randrange(4, 40))))
        for policy in POLICIES:
            result = simulate(trace, policy).run()
            waited[policy] += result.mean_ttft
            seconds[policy] += result.seconds
            assert len(result.end) == 300
    assert waited["cache-aware"] <= waited["round-robin"] * 1.02
    assert seconds["cache-aware"] <= seconds["round-robin"] * 1.02


@pytest.mark.parametrize("events", [True, False])
def test_every_job_ends_though_replicas_die_drain_and_reports_are_lost(events: bool, py_rng: random.Random) -> None:
    rng = py_rng
    trace = conversations(rng, 20, 4, 2)
    lost = frozenset(rng.sample(range(1, 200), 40))
    simulation = simulate(trace, "cache-aware", chunks=60, events=events, lost_events=lost)
    for _ in range(3):
        name, at = rng.choice(["r0", "r1"]), rng.random() * 8
        simulation.at(at, "kill", name)
        simulation.at(at + 0.5, "start", name)
    simulation.at(rng.random() * 8, "drain", "r2")
    result, router = simulation.run(), simulation.router
    assert set(result.end) | set(result.refused) == {j.id for _, j in trace}
    assert not set(result.end) & set(result.refused)
    assert set(result.refused.values()) <= {"unavailable"}
    assert len(router.queue) == 0 and all(not r.jobs for r in router.replicas.values())


def test_a_burst_of_one_tenant_does_not_delay_another() -> None:
    trace = [(0.0, Job(f"a{i}", (), 400, 4, tenant="a")) for i in range(200)]
    trace += [(1.0 + i, Job(f"b{i}", (), 400, 4, tenant="b")) for i in range(5)]
    result = simulate(trace, "cache-aware").run()
    mean = {t: sum(s for id, s in result.first.items() if id[0] == t) / n for t, n in (("a", 200), ("b", 5))}
    assert mean["b"] * 4 < mean["a"]


# What a decision costs, moved jobs, and prefill apart from decode


class CountingMemory(PromptMemory):
    """A PromptMemory that counts look-ups."""

    looked = 0

    def find(self, key: bytes) -> Any:
        self.looked += 1
        return super().find(key)


def test_a_decision_does_not_walk_over_all_keys_of_the_waiting_jobs() -> None:
    router, n = router_of(3), 1000
    router.memory = memory = CountingMemory()
    for i in range(40):
        keys = tuple(f"{i} {k}".encode() for k in range(n))
        router.submit(Job(f"j{i}", keys, n * CHUNK), 0.0)
    router.dispatch(0.0)
    assert len(router.queue) == 40 - 3  # each fills a replica
    router.started(next(iter(router.replicas["r0"].jobs)), 1.0, n * CHUNK, tuple(map(str, range(n))), CHUNK)
    memory.looked = 0
    router.dispatch(1.0)
    assert 0 < memory.looked <= 37 * 3 * 11  # by bisection


@given(st.lists(st.integers(0, 2), min_size=1, max_size=9), st.data())
def test_the_longest_cached_prefix_is_that_of_a_walk_over_all(chunks: list[int], data: st.DataObject) -> None:
    """Of prompts that were sent, and blocks of which some were evicted, children before parents."""
    memory, index, now = PromptMemory(), CacheIndex(), 100.0
    index.snapshot("life", 0, ())
    names = dict[bytes, str]()
    prompts = [chunks, *data.draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), max_size=4))]
    for i, prompt in enumerate(prompts):
        keys = keys_of(*prompt)
        if data.draw(st.booleans()):
            names |= {key: key.hex() for key in keys}
            memory.learn(keys, CHUNK * len(keys), [key.hex() for key in keys], CHUNK)
            kept = data.draw(st.integers(0, len(keys)))
            index.names |= {key.hex() for key in keys[:kept]}
        if data.draw(st.booleans()):
            index.assume(keys, data.draw(st.sampled_from([80.0, 90.5 + i])))
    keys = keys_of(*chunks)
    single = [index.cached_tokens(keys[:n], memory, now) for n in range(1, len(keys) + 1)]
    assert index.cached_tokens(keys, memory, now) == max(single)


def test_a_moved_job_is_charged_once() -> None:
    router = router_of(2)
    one = Job("a0", (), 100, 10, tenant="a")
    router.submit(one, 0.0)
    [placed] = router.dispatch(0.0)
    router.died(placed.replica)
    router.resubmit(one)
    [again] = router.dispatch(1.0)
    assert again.replica != placed.replica and router.queue.tenants["a"].counter == 110
    router.ended(one, 4)
    assert router.queue.tenants["a"].counter == 104 and not router.queue.charged


def test_a_moved_job_that_waits_in_vain_has_its_output_charged() -> None:
    router = router_of(1)
    one = Job("a0", (), 100, 10, tenant="a", deadline=5.0)
    router.submit(one, 0.0)
    router.dispatch(0.0)
    router.died("r0")
    router.resubmit(one)
    assert router.expired(6.0) == [one]
    router.ended(one, 3)
    assert router.queue.tenants["a"].counter == 103 and not router.queue.charged


def apart(prefill: int = 1, decode: int = 2) -> Router:
    router = Router()
    for role, n in (("prefill", prefill), ("decode", decode)):
        for i in range(n):
            name = f"{role[0]}{i}"
            router.add_replica(name, "prefill" if role == "prefill" else "decode")
            router.ready(name, f"{name}.0")
            router.report(name, LoadReport(steps=PACE_STEPS))
    return router


def test_a_prompt_is_computed_on_a_prefill_replica_and_goes_on_at_a_decode_replica() -> None:
    router = apart()
    one = job("one", 1, 2, 3)
    assert router.wants_prefill(one, 0.0)
    router.submit(replace(one, stage="prefill"), 0.0)
    [first] = router.dispatch(0.0)
    assert first.replica == "p0"
    handed = replace(one, handed=96)
    assert not router.wants_prefill(handed, 0.1)
    router.resubmit(handed)
    [second] = router.dispatch(0.1)
    assert second.replica in ("d0", "d1") and second.estimate.cached == 96 and not router.replicas["p0"].jobs
    router.ended(handed, 16)
    assert router.queue.tenants == {} or router.queue.tenants[""].counter <= one.tokens  # charged once
    router.submit(job("two", 1, 2, 3), 1.0)
    [warm] = router.dispatch(1.0)
    assert warm.replica == second.replica and not router.wants_prefill(job("three", 1, 2, 3), 1.0)


def test_without_one_side_the_other_does_all() -> None:
    router = apart()
    router.died("p0")
    assert not router.wants_prefill(job("one", 1, 2, 3), 0.0)
    router.restarting("p0")
    router.ready("p0", "p0.1")
    for name in ("d0", "d1"):
        router.died(name)
    assert not router.wants_prefill(job("one", 1, 2, 3), 0.0)
    router.submit(job("one", 1, 2, 3), 0.0)
    assert [p.replica for p in router.dispatch(0.0)] == ["p0"]
    assert not apart(0, 2).wants_prefill(job("one", 1, 2, 3), 0.0)
    assert not apart().wants_prefill(Job("short", (), 40), 0.0)


def test_jobs_that_wait_for_a_prefill_replica_go_elsewhere_if_none_is_left() -> None:
    router = apart(1, 1)
    for i in range(20):
        router.submit(Job(f"j{i}", (), 512, stage="prefill"), 0.0)
    assert {p.replica for p in router.dispatch(0.0)} == {"p0"}
    for moved in router.drain("p0"):
        router.resubmit(moved)
    assert {p.replica for p in router.dispatch(0.1)} == {"d0"}


def test_waiting_prompts_hold_up_no_decode_replica() -> None:
    """Neither in order, however many prompts wait, nor in the time that a request for a decode replica would wait."""
    router = apart(1, 1)
    for i in range(100):
        router.submit(Job(f"j{i}", (), 8000, stage="prefill"), 0.0)
    router.dispatch(0.0)
    router.submit(Job("handed", (), 8000, handed=7999), 0.1)
    assert [(p.job.id, p.replica) for p in router.dispatch(0.1)] == [("handed", "d0")]
    router.submit(Job("short", (), 20, start_by=5.0), 0.2)
