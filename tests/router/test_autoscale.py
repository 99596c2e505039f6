"""The autoscaler in virtual time: adds replicas by queue length, removes them after a quiet time, keeps its bounds."""

from __future__ import annotations

import random

import pytest
from support.routed import steps_of

from intaglio.router import Autoscaler, Job, LoadReport, Pace, Router
from intaglio.router.autoscale import DOWN_AFTER, UP_AFTER


def serving(replicas: int, per_token: float = 0.001) -> Router:
    router = Router()
    for i in range(replicas):
        router.add_replica(f"r{i}")
        router.ready(f"r{i}", "life")
        router.report(f"r{i}", LoadReport(steps=steps_of(Pace(0.01, per_token)), max_sequences=8))
    return router


def test_a_queue_adds_as_many_as_it_needs_and_only_after_a_while() -> None:
    for seconds in (0.5, 1.5, 30.0):
        router, scaler = serving(1), Autoscaler(1, 9)
        router.submit(Job("a", prompt_tokens=int(seconds * 1000)), 0.0)
        assert scaler.wanted(router, 1, 0.0) == 1
        assert scaler.wanted(router, 1, UP_AFTER - 0.1) == 1
        assert scaler.wanted(router, 1, UP_AFTER) == 2, seconds  # at most twice as many at a time
        assert "1 requests wait" in scaler.why
    router, scaler = serving(4), Autoscaler(1, 9)
    router.submit(Job("a", prompt_tokens=5500), 0.0)
    assert [scaler.wanted(router, 4, now) for now in (0.0, UP_AFTER)] == [4, 6]


def test_sequences_that_wait_in_a_replica_add_none_and_are_no_quiet_time() -> None:
    router, scaler = serving(2), Autoscaler(1, 9)
    router.report("r1", LoadReport(steps=steps_of(Pace(0.01, 0.001)), max_sequences=8, waiting=3))
    for now in (0.0, UP_AFTER, 2 * DOWN_AFTER):
        assert scaler.wanted(router, 2, now) == 2


def test_a_queue_that_comes_and_goes_adds_none() -> None:
    router, scaler = serving(1), Autoscaler(1, 9)
    for i in range(20):
        job = Job(f"j{i}", prompt_tokens=9000)
        router.submit(job, i)
        assert scaler.wanted(router, 1, i) == 1
        router.ended(job, 0)
        assert scaler.wanted(router, 1, i + 0.5) == 1


def test_a_quiet_time_removes_one_at_a_time() -> None:
    router, scaler = serving(3), Autoscaler(1, 9)
    assert scaler.wanted(router, 3, 0.0) == 3
    assert scaler.wanted(router, 3, DOWN_AFTER) == 2
    router.remove_replica("r2")
    assert scaler.wanted(router, 2, DOWN_AFTER + 1) == 2  # the time starts again
    assert scaler.wanted(router, 2, 2 * DOWN_AFTER + 1) == 1
    router.remove_replica("r1")
    assert scaler.wanted(router, 1, 9 * DOWN_AFTER) == 1


def test_none_is_removed_if_the_others_would_become_slower_by_a_quarter() -> None:
    for per_token, sequences, wanted in ((0.0001, 4, 1), (0.1, 4, 2), (0.0001, 10, 2)):  # 10 are too many for one
        router, scaler = serving(2, per_token), Autoscaler(1, 9)
        for i in range(sequences):
            router.submit(Job(f"j{i}"), 0.0)
        assert len(router.dispatch(0.0)) == sequences
        assert scaler.wanted(router, 2, 0.0) == 2
        assert scaler.wanted(router, 2, DOWN_AFTER) == wanted, (per_token, sequences)


def test_it_stays_within_its_bounds_whatever_happens() -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    print(f"{seed=}")
    scaler, replicas, now = Autoscaler(2, 5), 2, 0.0
    for step in range(300):
        router = serving(replicas, rng.choice((1e-5, 1e-3, 1.0)))
        for i in range(rng.choice((0, 0, 3))):
            router.submit(Job(f"{step}-{i}", prompt_tokens=rng.randrange(1, 10**5)), now)
        replicas = scaler.wanted(router, replicas, now)
        assert 2 <= replicas <= 5
        now += rng.choice((0.5, 2.0, 40.0))
    assert scaler.wanted(serving(1), 1, now) == 2 and scaler.wanted(serving(7), 7, now) == 5


def test_wrong_bounds_are_refused() -> None:
    for least, most in ((0, 2), (3, 2)):
        with pytest.raises(ValueError, match=f"between {least} and {most} replicas; allowed"):
            Autoscaler(least, most)
