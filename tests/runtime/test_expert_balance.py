"""ExpertBalancer in an engine: when it counts and moves experts, and what follows if the device fails meanwhile."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np
import pytest
from support.serving import add, oracle_engine, request, run_checked, smallest_program, truth

from intaglio.devices import (
    ArrayWeights,
    BlockingExecutable,
    DeviceError,
    DeviceLost,
    Executable,
    StateSpec,
    StepRequest,
    StepResult,
    open_device,
)
from intaglio.devices.expert_load import ExpertLoad
from intaglio.program.expert_placement import Ranks
from intaglio.runtime import Engine, RecordedEngine, Request, replay
from intaglio.runtime.expert_balance import ExpertBalancer

SITES = [f"layers.{i}.mlp.experts" for i in range(5)]
EVEN: Ranks = ((0, 1, 2), (1, 2, 3))


def oracle() -> Executable:
    return open_device("oracle").load(smallest_program(), ArrayWeights({}), StateSpec(16, 4))


class Mixture(BlockingExecutable):
    """The oracle, as if it had experts: each step routes its tokens to experts 0 and 1, which rank 0 holds.

    held: the experts of each rank. calls: counts of the questions about experts. errors: what a question raises once.
    """

    def __init__(self, held: Ranks = EVEN, errors: Mapping[str, Exception] | None = None, depth: int = 1) -> None:
        self.inner = oracle()
        self.program, self.state, self.depth = self.inner.program, self.inner.state, depth
        self.placed = dict.fromkeys(SITES, held)
        self.loading: Mapping[str, Ranks] = {}
        self.tokens, self.calls, self.errors = np.zeros(4, np.int64), Counter[str](), dict(errors or {})

    def run(self, request: StepRequest) -> StepResult:
        self.tokens = self.tokens + np.array([9, 9, 1, 0]) * len(request.batch.tokens)
        return self.inner.step(request)

    def ask(self, what: str) -> None:
        self.calls[what] += 1
        if what in self.errors:
            raise self.errors.pop(what)

    def has_experts(self) -> bool:
        return True

    def expert_loads(self) -> dict[str, ExpertLoad]:
        self.ask("loads")
        return {site: ExpertLoad(self.tokens, held) for site, held in self.placed.items()}

    def load_experts(self, layers: Mapping[str, Ranks]) -> None:
        self.ask("load")
        assert not self.loading
        self.loading = layers

    def experts_loaded(self) -> bool:
        self.ask("loaded")
        return True

    def switch_experts(self) -> None:
        self.ask("switch")
        self.placed |= self.loading
        self.loading = {}


def engine_of(
    executable: Executable, restart: Callable[[], Executable] | None = None, tick: float = 0.01, **options: object
) -> Engine:
    """An engine whose clock advances by `tick` seconds at each reading, and that balances every half second."""
    now = [0.0]

    def clock() -> float:
        now[0] += tick
        return now[0]

    kind = RecordedEngine if "journal" in options else Engine
    engine = kind(executable, clock=clock, rng=random.Random(0), restart=restart, **options)  # type: ignore[arg-type]
    engine.experts.every = 0.5
    return engine


def long_requests(count: int = 2) -> list[Request]:
    return [request(f"r{i}", [i + 1, 2, 3], max_tokens=50, ignore_eos=True) for i in range(count)]


def run_for(engine: Engine, seconds: float) -> None:
    """Run requests one after another until the clock has advanced so far."""
    start, i = engine.clock.read(), 0
    while engine.clock.read() < start + seconds:
        i += 1
        engine.add(request(f"more{i}", [i % 50 + 1, 2], max_tokens=60, ignore_eos=True))
        run_checked(engine)


@pytest.mark.parametrize("question", ["loads", "load", "loaded", "switch"])
def test_a_device_lost_while_experts_move_is_replaced_at_once(question: str) -> None:
    fresh = Mixture()
    engine = engine_of(Mixture(errors={question: DeviceLost("planted")}), lambda: fresh)
    sequences = add(engine, *long_requests(3))
    run_checked(engine)
    run_for(engine, 5.0)
    assert engine.counts.restarts == 1 and engine.executable is fresh
    assert all(s.output == truth(s) and not s.fault and not s.device_losses for s in sequences)
    assert not engine.experts.failed and fresh.calls["switch"] == engine.experts.moves > 0
    assert fresh.placed[SITES[0]] != EVEN


def test_a_failure_to_load_ends_moving_until_the_device_is_replaced() -> None:
    fresh = Mixture()
    first = Mixture(errors={"load": DeviceError("no such file")})
    engine = engine_of(first, lambda: fresh)
    run_for(engine, 3.0)
    assert engine.experts.failed == "no such file" and first.calls["load"] == 1 and not engine.experts.moves
    first.errors["loads"] = DeviceLost("planted")
    run_for(engine, 3.0)
    assert engine.executable is fresh and not engine.experts.failed and engine.experts.moves


def test_one_layer_is_balanced_between_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    executable = Mixture(((0, 1), (2, 3)))
    engine, balanced = engine_of(executable), Counter[str]()
    engine.experts.worth = 100.0  # no layer is worth it, so nothing is loaded between
    propose = ExpertBalancer.propose

    def counted(self: ExpertBalancer, site: str, recent: np.ndarray) -> Ranks | None:
        balanced[site] += 1
        return propose(self, site, recent)

    monkeypatch.setattr(ExpertBalancer, "propose", counted)
    add(engine, *long_requests())
    while not engine.idle:
        before = balanced.total()
        engine.step()
        assert balanced.total() <= before + 1
    run_for(engine, 3.0)
    assert set(balanced) == set(SITES)
    assert not executable.calls["load"]


def test_experts_that_cannot_move_are_counted_rarely_and_when_no_request_is_left() -> None:
    for tick in (0.001, 0.3):
        executable = Mixture(((), ()))
        engine = engine_of(executable, tick=tick)
        engine.add(request("a", [1, 2, 3], max_tokens=60, ignore_eos=True))
        run_checked(engine)
        elapsed = engine.clock.read()
        assert set(executable.calls) == {"loads"}
        assert 2 <= executable.calls["loads"] <= 2 + elapsed / 10  # in the first step, and after the last
        assert (elapsed > 20) == (tick > 0.1)
        np.testing.assert_array_equal(engine.experts.loads[SITES[0]].tokens, executable.tokens)


def test_a_pipeline_with_steps_under_way_is_asked_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every question waits until all steps have ended."""
    executable = Mixture(depth=2)
    engine = engine_of(executable, tick=0.05)
    engine.experts.worth = 0.0  # every layer is moved, again and again
    tick, waits, looks = engine.experts.tick, list[float](), list[float]()

    def watched(now: float, last: bool = False) -> None:
        before, busy = executable.calls.total(), bool(engine.launcher.under_way)
        tick(now, last)
        if busy:
            looks.append(now)
            waits.extend([now] * (executable.calls.total() > before))

    monkeypatch.setattr(engine.experts, "tick", watched)
    for i in range(6):
        engine.add(request(f"r{i}", [i + 1, 2], max_tokens=55, ignore_eos=True))
    run_checked(engine)
    seconds = looks[-1] - looks[0]
    assert seconds > 5 and engine.experts.moves > 5
    assert len(waits) <= 3 + seconds * 1.1 < len(looks) / 2


def test_a_model_without_experts_is_asked_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = oracle_engine()
    monkeypatch.setattr(engine.launcher, "between_steps", None)
    add(engine, *long_requests())
    run_checked(engine)
    assert not engine.experts.loads


@pytest.mark.parametrize("question", ["loads", "switch"])
def test_a_device_lost_between_two_steps_replays(question: str) -> None:
    journal: list[dict[str, object]] = []
    engine = engine_of(Mixture(errors={question: DeviceLost("planted")}), Mixture, journal=journal.append)
    for _ in range(3):  # the journal has all readings of the clock, so nobody else reads it
        add(engine, *long_requests())
        run_checked(engine)
    assert engine.counts.restarts == 1 and [e["losses"] for e in journal if "losses" in e] == [["lost: planted"]]
    done = replay(journal, oracle)
    assert done.divergence is None and done.tokens == engine.counts.output_tokens
    without = [{name: value for name, value in entry.items() if name != "losses"} for entry in journal]
    assert replay(without, oracle).divergence
