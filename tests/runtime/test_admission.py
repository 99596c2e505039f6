"""Admission and scheduling: queue limits, priorities, deadlines, draining, lost devices."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from support.routed_engines import EngineReplica, StepModel
from support.serving import add, oracle_engine, request, run_checked, smallest_program, truth

from intaglio.devices import (
    ArrayWeights,
    BlockingExecutable,
    DeviceLost,
    PendingStep,
    StateSpec,
    StepRequest,
    StepResult,
    open_device,
)
from intaglio.runtime import Engine, Event, Refused, RequestError, check_invariants


class Clock:
    """A clock that shows the time it was set to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def timed_engine(**options: Any) -> tuple[Engine, Clock]:
    clock = Clock()
    executable = open_device("oracle").load(smallest_program(), ArrayWeights({}), StateSpec(16, 4))
    return Engine(executable, clock=clock, rng=random.Random(0), **options), clock


def ends(events: list[Event]) -> list[tuple[str, str | None]]:
    return [(e.request, e.finish_reason) for e in events if e.finish_reason]


def test_full_queue_returns_retry_after() -> None:
    engine, clock = timed_engine(max_waiting=3, max_sequences=1)
    add(engine, *(request(f"r{i}", range(10), max_tokens=5) for i in range(3)))
    with pytest.raises(Refused, match="3 sequences are waiting, max_waiting is 3; retry later") as refused:
        engine.add(request("late", [1]))
    assert (refused.value.reason, refused.value.retry_after) == ("full", 1.0)  # no step has been observed yet
    executable, launch = engine.executable, engine.executable.launch

    def slow(request: StepRequest) -> PendingStep:
        clock.now += 2.0
        return launch(request)

    executable.launch = slow  # type: ignore[method-assign]
    engine.step()
    engine.add(request("next", [1]))  # 21 tokens wait: one step more
    with pytest.raises(Refused) as refused:
        engine.add(request("late", [1]))
    assert refused.value.retry_after == pytest.approx(2)
    with pytest.raises(RequestError, match="n is 4, max_waiting is 3"):
        engine.add(request("wide", [1], n=4))
    assert engine.counts.refused == {"full": 2, "invalid": 4} and engine.counts.received == 4 + 2 + 4
    run_checked(engine)
    engine.add(request("late", [1]))


def loaded(rate: float, seconds: float, timeout: float | None) -> tuple[Engine, Clock, list[str], float]:
    """An engine with steps of 20 ms plus 2 ms per token, after a load of random arrivals.

    Returns also the requests' ends in order, and the duration of the longest. A request has 10 prompt and 30 output
    tokens, so 12.5 per second are its capacity.
    """
    clock = Clock()
    executable = open_device("oracle").load(smallest_program(), ArrayWeights({}), StateSpec(4000, 4))
    engine = Engine(executable, clock=clock, rng=random.Random(0))
    launch, rng = executable.launch, random.Random()

    def timed(request: StepRequest) -> PendingStep:
        clock.now += 0.02 + 0.002 * len(request.batch.tokens)
        return launch(request)

    executable.launch = timed  # type: ignore[method-assign]
    reasons, came, longest, due = [], dict[str, float](), 0.0, 0.0
    while due < seconds or not engine.idle:
        clock.now = max(clock.now, due) if engine.idle else clock.now
        while due <= min(clock.now, seconds):
            due += rng.expovariate(rate)
            name, prompt = f"r{engine.counts.received}", rng.choices(range(97), k=10)
            try:
                engine.add(request(name, prompt, max_tokens=30, timeout=timeout))
                came[name] = clock.now
            except Refused as e:
                assert e.retry_after and 1 <= e.retry_after <= 60
                reasons.append(e.reason)
        for name, reason in ends(engine.step()):
            reasons.append(str(reason))
            longest = max(longest, clock.now - came[name])
    return engine, clock, reasons, longest


def test_late_requests_are_refused_and_admitted_ones_meet_their_timeout() -> None:
    """At twice the capacity: hardly any request is started and then misses its timeout, and the device is busy."""
    engine, clock, reasons, longest = loaded(25, 60, timeout=10)
    assert set(reasons) <= {"length", "late", "deadline"} and reasons.count("late") > 300
    assert reasons.count("deadline") <= 0.05 * reasons.count("length") and longest < 10 + 0.02 + 0.002 * 512
    assert reasons.count("length") / clock.now > 0.8 * 12.5
    assert engine.counts.refused["late"] == reasons.count("late")


def test_requests_without_timeout_are_never_late() -> None:
    _, _, reasons, longest = loaded(25, 20, timeout=None)
    assert set(reasons) == {"length"} and longest > 10


def test_request_too_long_for_its_timeout_when_idle_is_admitted() -> None:
    """The timeout then limits the length of the answer, and the part that is ready is returned."""
    engine, clock = timed_engine()
    executable, launch = engine.executable, engine.executable.launch

    def slow(request: StepRequest) -> PendingStep:
        clock.now += 0.1 * len(request.batch.tokens)
        return launch(request)

    executable.launch = slow  # type: ignore[method-assign]
    add(engine, request("before", [9], max_tokens=20))
    run_checked(engine)
    add(engine, *(request(f"first{i}", range(5), max_tokens=6) for i in range(3)))
    engine.step()
    engine.step()  # 15 rows, then 3
    with pytest.raises(Refused, match=r"with 3 others it would take about .* s, its timeout is 2 s; retry later"):
        engine.add(request("short", [3, 4], max_tokens=4, timeout=2))
    add(engine, request("long", [2], max_tokens=20, timeout=2))
    assert dict(ends(run_checked(engine)))["long"] == "deadline"
    engine.add(request("short", [3, 4], max_tokens=4, timeout=2))
    assert ends(run_checked(engine)) == [("short", "length")]


def test_better_priority_starts_first_and_preempts() -> None:
    engine, _ = timed_engine(max_sequences=2)
    low = add(engine, *(request(f"low{i}", range(i, i + 5), max_tokens=12, priority=5) for i in range(3)))
    engine.step()
    assert [s.state for s in low] == ["running", "running", "waiting"]
    [high] = engine.add(request("high", range(9), max_tokens=3, priority=-1))
    engine.step()
    assert high.state == "running" and [s.state for s in low] == ["running", "waiting", "waiting"]
    order = [request for request, _ in ends(run_checked(engine))]
    assert order == ["high", "low0", "low1", "low2"]
    assert [s.preemptions for s in (high, *low)] == [0, 0, 1, 0] and all(s.output == truth(s) for s in (high, *low))


def test_no_preemption_if_the_request_would_not_fit_anyway() -> None:
    engine, _ = timed_engine()
    first, low = add(
        engine,
        request("first", range(40), max_tokens=20, priority=0),
        request("low", [1] * 8, max_tokens=4, priority=5),
    )
    engine.step()
    [wide] = engine.add(request("wide", [7] * 30, max_tokens=4, priority=1))  # 8 blocks; 16 - 10 - 2 are there
    engine.step()
    assert (first.state, low.state, wide.state) == ("running", "running", "waiting")
    run_checked(engine)
    assert low.preemptions == 0 and wide.output == truth(wide)


def test_deadlines_while_queued_in_prefill_and_in_decode() -> None:
    engine, clock = timed_engine(max_sequences=2, max_batch_tokens=8)
    running, prefilling = add(
        engine, request("running", [1], max_tokens=30, timeout=10, queue_timeout=3),
        request("prefilling", range(40), timeout=2.5),
    )  # fmt: skip
    queued, patient = add(
        engine, request("queued", [2], queue_timeout=2), request("patient", [3], max_tokens=2, queue_timeout=60)
    )
    events = engine.step() + engine.step()
    clock.now = 2.0
    events += engine.step()
    assert ends(events) == [("queued", "deadline")] and queued.started is None
    clock.now = 2.6
    assert ends(engine.step()) == [("prefilling", "deadline")]
    assert running.state == patient.state == "running"  # queue_timeout no longer applies
    check_invariants(engine)
    clock.now = 9.9
    assert ends(engine.step()) == [("patient", "length")]
    clock.now = 10.0
    [end] = engine.step()
    assert end.finish_reason == "deadline" and end.token is None and running.output == truth(running)
    assert end.usage and end.usage.output_tokens == len(running.output) > 3
    assert engine.idle and engine.pool.held == 0 and prefilling.output == []


def test_clock_that_goes_back_is_held() -> None:
    engine, clock = timed_engine()
    clock.now = 100.0
    [s] = engine.add(request("r", [1], max_tokens=3, timeout=5))
    clock.now = 3.0
    run_checked(engine)
    assert s.finish_reason == "length" and s.arrived == s.started == s.ended == 100.0


@pytest.mark.parametrize("bad", [{"timeout": 0}, {"queue_timeout": -1}, {"timeout": math.nan}])
def test_invalid_timeouts_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(RequestError, match=f"{next(iter(bad))} is .*; allowed: seconds above 0, or None"):
        oracle_engine().add(request("r", [1], **bad))


def test_an_abort_takes_effect_before_the_next_step() -> None:
    engine, _ = timed_engine()
    a, _ = engine.add(request("a", range(9), max_tokens=9, n=2, temperature=1.0, seed=1))
    [b] = engine.add(request("b", [1], max_tokens=2))
    engine.step()
    assert ends(engine.abort("a")) == [("a", "abort")] * 2
    assert engine.abort("a") == [] and a.blocks == [] and "a" not in engine.requests
    engine.add(request("a", [5], max_tokens=1))  # its id is free again
    run_checked(engine)
    assert b.output == truth(b)


def test_draining_finishes_admitted_requests_and_refuses_new_ones() -> None:
    engine, _ = timed_engine(max_sequences=1)
    made = add(engine, request("a", [1], max_tokens=4), request("b", [2], max_tokens=4))
    engine.step()
    engine.drain()
    with pytest.raises(Refused, match="draining") as refused:
        engine.add(request("c", [3]))
    assert refused.value.reason == "draining" and refused.value.retry_after is None
    assert engine.gauges().draining and not engine.idle
    assert ends(run_checked(engine)) == [("a", "length"), ("b", "length")]
    assert engine.idle and all(s.output == truth(s) for s in made)


class Deadly(BlockingExecutable):
    """An executable that is lost at one token, and at any token during the first `rage` steps."""

    def __init__(self, poison: int, rage: list[int]) -> None:
        self.inner = open_device("oracle").load(smallest_program(), ArrayWeights({}), StateSpec(16, 4))
        self.program, self.state, self.poison, self.rage = self.inner.program, self.inner.state, poison, rage

    def run(self, request: StepRequest) -> StepResult:
        if self.rage[0] > 0 or self.poison in request.batch.tokens:
            self.rage[0] -= 1
            raise DeviceLost("it is dead")
        return self.inner.step(request)


def deadly_engine(rage: int = 0, restarts: int = 100, **options: Any) -> Engine:
    state, left = [rage], [restarts]

    def restart() -> Deadly:
        left[0] -= 1
        if left[0] < 0:
            raise OSError("no more processes")
        return Deadly(50, state)

    return Engine(Deadly(50, state), clock=lambda: 0.0, rng=random.Random(0), restart=restart, **options)


@pytest.mark.parametrize("killers", [1, 2, 3])
def test_request_that_loses_the_device_ends_and_others_continue(killers: int) -> None:
    engine = deadly_engine()
    good = add(engine, *(request(f"good{i}", [i + 1, 2, 3], max_tokens=6) for i in range(4)))
    engine.step()
    bad = add(engine, *(request(f"bad{i}", [50, i], max_tokens=6) for i in range(killers)))
    run_checked(engine)
    assert [s.finish_reason for s in good] == ["length"] * 4 and all(s.output == truth(s) for s in good)
    for s in bad:
        assert s.fault and s.fault.kind == "worker"
        assert s.fault.message == "the device was lost: it is dead, in a step with this request only"
    assert engine.failed is None and engine.counts.restarts == engine.counts.faults["worker"] <= 1 + 3 * killers


def test_device_that_cannot_be_restarted_ends_every_sequence_once() -> None:
    for options in ({"rage": 100}, {"rage": 1, "restarts": 0}):
        engine = deadly_engine(**options, max_restarts=4)  # type: ignore[arg-type]
        made = add(engine, *(request(f"r{i}", [i + 1, 2], max_tokens=3) for i in range(6)))
        events = run_checked(engine)
        assert engine.failed and engine.idle and engine.step() == []
        assert sorted(ends(events)) == [(f"r{i}", "error") for i in range(6)]
        assert all(s.fault and s.fault.kind == "worker" for s in made)
        with pytest.raises(Refused, match="the device was lost: it is dead") as refused:
            engine.add(request("late", [1]))
        assert refused.value.reason == "failed" and engine.gauges().failed == engine.failed


def test_counts_and_gauges_add_up() -> None:
    engine = oracle_engine(pages=20, max_sequences=2)
    add(engine, *(request(f"r{i}", range(i, i + 6), max_tokens=4) for i in range(4)))
    engine.step()
    g = engine.gauges()
    assert (g.running, g.waiting, g.waiting_tokens, g.blocks, g.blocks_held) == (2, 2, 12, 20, 4)
    assert (
        g.kv_usage == 0.2
        and engine.last_step
        and engine.last_step.prefill_tokens == 12
        and engine.last_step.sequences == 2
    )
    engine.step()
    assert engine.last_step.number == 2 and engine.last_step.decode_tokens == engine.last_step.output_tokens == 2
    assert engine.last_step.seconds > 0 and engine.last_step.prefill_tokens == 0
    run_checked(engine)
    c, g = engine.counts, engine.gauges()
    assert (c.received, c.admitted, c.finished, c.output_tokens, c.prompt_tokens) == (4, 4, {"length": 4}, 16, 24)
    assert g.running == g.waiting == g.blocks_held == 0 and g.blocks_cached > 0
    assert c.computed_tokens == 24 + 4 * 3 - c.cached_tokens


def test_the_time_of_an_engines_first_step_counts_only_until_its_second() -> None:
    """The first step also reads the weights into memory."""
    replica = EngineReplica("r", StepModel(0.02, 0.001, cold=9.0), 1024, 0)
    replica.engine.add(request("a", [1, 2], max_tokens=3))
    for seconds in (9.022, 0.021):
        replica.engine.step()
        assert replica.engine.latency.steps.mean_seconds == pytest.approx(seconds)
