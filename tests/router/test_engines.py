"""The router in front of shipped engines in virtual time, with step times that vary at random."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from support.routed import steps_of
from support.routed_engines import EngineFleet, StepModel, Talk

from intaglio.router import Job, LoadReport, Pace, Router
from intaglio.router.pace import TRUSTED_STEPS
from intaglio.runtime import StepFit
from intaglio.runtime.latency import STEP_DECAY

EQUAL = [StepModel(0.014, 0.0008, noise=0.2, cold=0.5)] * 2
SHARED = Talk(users=16, systems=8, system=960, turns=6, stagger=10.0)


def fleet(policy: str, talk: Talk, seed: int, models: list[StepModel] = EQUAL, **options: float) -> EngineFleet:
    return EngineFleet(Router(policy), models, talk, 8192, seed, **options).run()


def gains(talk: Talk, seeds: int) -> tuple[float, float]:
    """(TTFT, seconds) of round robin over those of cache-aware routing, of the means over seeds."""
    ttft, seconds = Counter[str](), Counter[str]()
    for seed in range(seeds):
        for policy in ("round-robin", "cache-aware"):
            found = fleet(policy, talk, seed)
            ttft[policy] += found.mean_ttft
            seconds[policy] += found.seconds
    return ttft["round-robin"] / ttft["cache-aware"], seconds["round-robin"] / seconds["cache-aware"]


def test_where_nothing_is_shared_equal_replicas_get_equal_work_whatever_they_measured_first() -> None:
    """Before the pace was common, one replica got nearly all requests: TTFT was three times that of round robin."""
    ttft, rate = gains(Talk(users=48, turns=1, systems=0, own=306, stagger=14.0), 12)
    assert ttft > 0.95 and rate > 0.98  # over 40 seeds the means are 1.00 and 1.00


def test_shared_prefixes_give_half_the_ttft_and_more_throughput() -> None:
    ttft, rate = gains(SHARED, 4)
    assert ttft > 2 and rate > 1.3


def test_a_replica_that_joins_takes_over_work_from_one_whose_cache_is_full() -> None:
    for seed in range(3):
        found = fleet("cache-aware", replace(SHARED, turns=12, stagger=4.0), seed, joins=12.0)
        assert Counter(p.replica for p in found.placed)["r1"] > 0.15 * len(found.placed)
        assert found.mean_ttft < 3  # 6 s while it got nothing


def test_a_slow_replica_gets_less_work() -> None:
    slow = [EQUAL[0], replace(EQUAL[0], slow=3.0)]
    talk = Talk(users=60, turns=1, systems=0, own=306, stagger=20.0)
    for seed in range(3):
        found = fleet("cache-aware", talk, seed, slow)
        assert Counter(p.replica for p in found.placed)["r1"] < 0.4 * len(found.placed)


def test_a_pooled_fit_is_the_fit_of_all_steps(py_rng: random.Random) -> None:
    fits, rows = [], []
    for _ in range(py_rng.randint(1, 4)):
        fit, steps = StepFit(), py_rng.randint(1, 30)
        for i in range(steps):
            tokens, seconds = py_rng.randint(1, 600), py_rng.uniform(0.01, 0.5)
            fit = fit.with_step(tokens, seconds)
            rows.append((STEP_DECAY ** (steps - 1 - i), tokens, seconds))
        fits.append(fit)
    weights, tokens, seconds = np.array(rows).T
    pooled, mean = StepFit.pooled(fits), np.average(tokens, weights=weights)
    assert pooled.weight == pytest.approx(weights.sum(), rel=1e-9)
    assert pooled.mean_tokens == pytest.approx(mean, rel=1e-9)
    assert pooled.mean_seconds == pytest.approx(np.average(seconds, weights=weights), rel=1e-9)
    scale = (weights * np.abs(tokens - mean)).sum()  # of the sums below, in which terms cancel
    off = (weights * (tokens - mean) * (seconds - pooled.mean_seconds)).sum()
    assert pooled.tokens_by_seconds == pytest.approx(off, rel=1e-9, abs=1e-9 * (1 + scale))
    assert pooled.tokens_squared == pytest.approx((weights * (tokens - mean) ** 2).sum(), rel=1e-9, abs=1e-6)


def test_a_pooled_fit_of_nothing_is_that_of_no_step() -> None:
    assert StepFit.pooled([]) == StepFit.pooled([StepFit(), StepFit()]) == StepFit()


def reporting(*fits: StepFit) -> Router:
    router = Router()
    for i, fit in enumerate(fits):
        router.add_replica(f"r{i}")
        router.ready(f"r{i}", "life")
        router.report(f"r{i}", LoadReport(steps=fit))
    return router


def test_replicas_of_which_one_only_decoded_and_one_computed_a_prompt_have_one_pace() -> None:
    router = reporting(StepFit().with_step(10, 0.02), StepFit().with_step(510, 0.52))
    for pace in router.paces().values():
        assert (pace.per_step, pace.per_token) == pytest.approx((0.01, 0.001)) and pace.measured
    assert reporting(StepFit(), StepFit()).paces() == {"r0": Pace(), "r1": Pace()}
    assert reporting(StepFit(), steps_of(Pace(0.01, 0.001))).paces()["r0"].measured


@pytest.mark.parametrize("weight", [1.0, TRUSTED_STEPS])
def test_a_replicas_own_speed_counts_by_the_number_of_its_steps(weight: float) -> None:
    fast, slow = Pace(0.01, 0.001), Pace(0.04, 0.004)
    paces = reporting(steps_of(fast, weight), steps_of(slow, weight)).paces()
    ratio = 4 ** (weight / (weight + TRUSTED_STEPS))
    assert paces["r1"].per_token / paces["r0"].per_token == pytest.approx(ratio)
    assert paces["r1"].per_step / paces["r0"].per_step == pytest.approx(ratio)


def test_prefill_and_decode_replicas_have_paces_of_their_own() -> None:
    router = Router()
    for name, role, pace in (("p0", "prefill", Pace(0.01, 0.001)), ("d0", "decode", Pace(0.02, 0.004))):
        router.add_replica(name, role)  # type: ignore[arg-type]
        router.report(name, LoadReport(steps=steps_of(pace)))
    paces = router.paces()
    assert paces["p0"].per_token == pytest.approx(0.001) and paces["d0"].per_token == pytest.approx(0.004)


def test_a_replica_whose_cache_is_full_has_room_for_one_job_more_than_runs() -> None:
    router = reporting(StepFit())
    replica = router.replicas["r0"]
    for i in range(9):
        router.report("r0", LoadReport(running=4, waiting=i % 2, kv_usage=0.8))  # 5 would fit
        assert replica.has_room == (i < 6 or i % 2 == 0)
        replica.assign(Job(f"j{i}"), 1, 0.0)
