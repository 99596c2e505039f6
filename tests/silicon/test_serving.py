"""Whole servers in virtual time: latencies from the chip's steps, pipelines, memory, and the schedule of a real run."""

from __future__ import annotations

import itertools
import json
import random
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from support.toy import CONTEXT, PAGE, random_weights, transformer
from typer.testing import CliRunner

from intaglio.chips import ChipError, target
from intaglio.cli import app
from intaglio.codesign.memory import KvRoom
from intaglio.codesign.serving import (
    EngineSettings,
    Limits,
    ServingResult,
    moments,
    ramped,
    request_seconds,
    simulate_serving,
    state_of,
)
from intaglio.codesign.simulate import ported, stages
from intaglio.compiler import build
from intaglio.devices import Executable, PendingStep, StateSpec, StepRequest, open_device
from intaglio.devices.clock import VirtualClock
from intaglio.devices.device import CompletedStep
from intaglio.devices.silicon import SiliconExecutable, TimeOnlyExecutable
from intaglio.measure.load import Outcome
from intaglio.measure.modelled import run_load
from intaglio.measure.workload import LoadRequest
from intaglio.program import Program
from intaglio.runtime import Engine, Request, SamplingParams
from intaglio.runtime.stats import StepRecord
from intaglio.silicon.plan import Plan
from intaglio.silicon.sizes import BatchSizes

CARD, CHIP = "llama-3-8b", "h100_sxm"


def run(
    requests: Sequence[LoadRequest], layout: str = "tp1", concurrency: int | None = None, **settings: float
) -> ServingResult:
    program, limits = ported(CARD, None), Limits(ttft=0.5, tpot=0.05)
    engine = EngineSettings(**settings)  # type: ignore[arg-type]
    compiled = stages(program, layout, "auto", "auto", "auto")
    return simulate_serving(program, compiled, target(CHIP), layout, requests, engine, limits, concurrency)


def test_a_single_request_takes_its_steps() -> None:
    plan = Plan(stages(ported(CARD, None), "tp1", "auto", "auto", "auto")[0], target(CHIP))
    prompt, output, chunk, overhead = 700, 5, 512, 1e-4
    found = run([LoadRequest(0.0, prompt, output)], max_batch_tokens=chunk, step_overhead_s=overhead)
    first = [BatchSizes(chunk, 0, ((chunk, chunk, 1),)), BatchSizes(prompt - chunk, 1, ((prompt - chunk, prompt, 1),))]
    later = [BatchSizes(1, 1, ((1, prompt + i, 1),)) for i in range(1, output)]
    costs = [plan.cost(s) for s in (*first, *later)]
    ttft, tpot = found.summary.times["ttft"]["p50"], found.summary.times["tpot"]["p50"]
    assert ttft == pytest.approx(sum(seconds for seconds, _ in costs[:2]) + 2 * overhead)
    assert tpot == pytest.approx(sum(seconds for seconds, _ in costs[2:]) / (output - 1) + overhead)
    idle = len(costs) * overhead * target(CHIP).chip.energy.idle_w
    assert found.joules == pytest.approx(sum(joules for _, joules in costs) + idle)
    assert (found.steps, found.chips, found.preemptions) == (len(costs), 1, 0)


def test_a_plan_costs_what_its_timeline_shows() -> None:
    rng = random.Random()
    for chip, layout in (("sohu", "tp8"), ("h100_sxm", "tp2"), ("tpu_v6e", "tp1")):
        plan = Plan(stages(ported(CARD, None), layout, "auto", "auto", "auto")[0], target(chip))
        for _ in range(3):
            keys, n = rng.randrange(2, 4000), rng.randrange(1, 60)
            sizes = BatchSizes(n + keys, n + 1, ((1, keys, n), (keys, keys, 1)))
            timeline, (seconds, joules) = plan.run(sizes), plan.cost(sizes)
            assert seconds == timeline.seconds
            assert joules == pytest.approx(sum(timeline.joules().values()))


def test_overheads_and_limits() -> None:
    load = [LoadRequest(0.0, 300, 8)] * 6
    plain = run(load, concurrency=2)
    slow = run(load, concurrency=2, step_overhead_s=0.01, request_overhead_s=0.2)
    assert plain.within_limits == 1.0 and plain.goodput == pytest.approx(6 / plain.summary.seconds)
    more = slow.summary.times["tpot"]["mean"] - plain.summary.times["tpot"]["mean"]
    assert more >= 0.01 * (1 - 1e-9)
    later = slow.summary.times["ttft"]["mean"] - plain.summary.times["ttft"]["mean"]
    assert later >= (0.2 + 0.01) * (1 - 1e-9)
    assert run(load, step_overhead_s=0.06).within_limits == 0.0  # every token is late


def test_concurrency_is_kept() -> None:
    """With one request open at a time, all are alone; with all open at once, they share steps and wait longer."""
    load = [LoadRequest(0.0, 200, 10)] * 4
    alone, apart, together = run(load[:1]), run(load, concurrency=1), run(load)
    for name in ("ttft", "tpot", "whole"):
        assert apart.summary.times[name]["p50"] == pytest.approx(alone.summary.times[name]["p50"])
    assert apart.steps == 4 * alone.steps and together.steps < apart.steps
    assert together.summary.times["ttft"]["mean"] > apart.summary.times["ttft"]["mean"]
    assert together.summary.output_tokens_per_s > 2 * apart.summary.output_tokens_per_s


def test_a_ramp_spreads_the_first_requests() -> None:
    load = [LoadRequest(0.0, 100, 10)] * 6
    assert [r.at for r in ramped(load, 4, 2.0)] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]
    compiled, on = stages(ported(CARD, None), "tp1", "auto", "auto", "auto"), target(CHIP)
    alone = request_seconds(compiled, on, load[0], 1)
    assert run(load[:1]).summary.times["whole"]["p50"] == pytest.approx(alone, rel=0.01)


def test_stages_of_a_pipeline_work_on_different_steps() -> None:
    """A stage starts a step when the stage before has ended it and when it has ended the step before itself."""
    program = transformer()
    two = (Plan(program, target("sohu")), Plan(program, target("h100_sxm")))
    clock = VirtualClock()
    executable = SiliconExecutable(TimeOnlyExecutable(program, StateSpec(8, PAGE)), two, clock, overhead_s=1e-7)
    engine = Engine(executable, clock=clock, rng=random.Random(0), max_sequences=2, max_batch_tokens=4)
    for name in "ab":
        engine.add(Request(name, [1, 2, 3, 4], SamplingParams(max_tokens=1)))
    first, second = engine.step(), engine.step()
    assert [e.request for e in (*first, *second)] == ["a", "b"]
    a, b = (plan.cost(BatchSizes(4, 1, ((4, 4, 1),)))[0] for plan in two)
    launched = 1e-7, 2e-7
    first_end = launched[0] + a + b
    second_end = max(max(launched[1], launched[0] + a) + a, first_end) + b
    assert clock() == pytest.approx(second_end, rel=1e-12)
    assert executable.busy_s == pytest.approx(2 * (a + b))


def test_the_kv_cache_is_what_memory_leaves() -> None:
    program, on = ported(CARD, None), target(CHIP)
    compiled = stages(program, "tp1", "auto", "auto", "auto")
    half, most = (state_of(compiled, on, EngineSettings(memory_share=share)).pages for share in (0.5, 0.9))
    block = sum(t.nbytes({"P": 1, "B": 32, "N": 0}) for t in compiled[0].of_role("state"))
    assert 0 <= int(0.9 * on.chip.hbm_bytes) - int(0.5 * on.chip.hbm_bytes) - (most - half) * block + block < 2 * block
    with pytest.raises(ChipError, match="no room for a K/V cache: weights 16.1 GB"):
        state_of(compiled, on, EngineSettings(memory_share=0.2))
    with pytest.raises(ValueError, match="memory_share is 1.5; allowed: above 0, up to 1"):
        EngineSettings(memory_share=1.5)
    with pytest.raises(ValueError, match="a request of 8,000 \\+ 1,000 tokens; the context of llama-3-8b is 8,192"):
        run([LoadRequest(0.0, 8000, 1000)])


class Measured(Executable):
    """Runs steps on another executable, and advances a clock by the seconds that each took."""

    def __init__(self, inner: Executable, clock: VirtualClock) -> None:
        self.inner, self.clock, self.seconds = inner, clock, list[float]()
        self.program, self.state = inner.program, inner.state

    def launch(self, request: StepRequest) -> PendingStep:
        began = time.perf_counter()
        result = self.inner.step(request)
        self.seconds.append(time.perf_counter() - began)
        self.clock.seconds += self.seconds[-1]
        return CompletedStep(result)


class Told(Plan):
    """A Plan whose steps cost what they are told to, in order."""

    def __init__(self, program: Program, seconds: Sequence[float]) -> None:
        super().__init__(program, target("sohu"))
        self.told = iter(seconds)

    def cost(self, sizes: BatchSizes) -> tuple[float, float]:
        return next(self.told), 0.0


def schedule(executable: Executable, clock: VirtualClock, load: Sequence[LoadRequest]) -> list[StepRecord]:
    """The steps in which the engine serves a load, as the engine records them."""
    engine = Engine(executable, clock=clock, rng=random.Random(0), max_batch_tokens=24, max_sequences=4)
    rng, ids, steps = random.Random(1), itertools.count(), list[StepRecord]()
    inner = engine.step

    def step() -> list[object]:
        events = inner()
        if engine.last_step and (not steps or engine.last_step != steps[-1]):
            steps.append(engine.last_step)
        return events  # type: ignore[return-value]

    engine.step = step  # type: ignore[method-assign, assignment]

    def request_of(planned: LoadRequest) -> Request:
        prompt = [rng.randrange(executable.program.vocabulary) for _ in range(planned.prompt)]
        return Request(str(next(ids)), prompt, SamplingParams(max_tokens=planned.output))

    outcomes = run_load(engine, clock, load, request_of)
    assert all(o.error is None for o in outcomes) and len(outcomes) == len(load)
    return steps


def test_virtual_time_has_the_schedule_of_a_real_run() -> None:
    """One trace served with real tokens, and in virtual time with the step times that were measured: the same steps."""
    raw = transformer()
    program, weights, state = build(raw, "auto"), random_weights(raw), StateSpec(10, 16)
    rng = np.random.default_rng()
    at = np.cumsum(rng.exponential(2e-4, 30))
    load = [LoadRequest(float(t), int(rng.integers(1, 40)), int(rng.integers(1, CONTEXT - 40))) for t in at]
    clock = VirtualClock()
    real = Measured(open_device("host", threads=1).load(program, weights, state), clock)
    seen = schedule(real, clock, load)
    again = VirtualClock()
    virtual = SiliconExecutable(TimeOnlyExecutable(program, state), [Told(program, real.seconds)], again)
    assert schedule(virtual, again, load) == seen
    assert len(seen) > 30 and {s.prefill_tokens > 0 for s in seen} == {True, False}
    assert again() == clock()


def test_moments_count_requests_and_tokens() -> None:
    """Against a loop over all requests; before the first arrival and after the last response nothing is open."""
    rng = random.Random()
    load = []
    for _ in range(rng.randrange(1, 40)):
        first = None if rng.random() < 0.1 else rng.uniform(0, 5)
        end = (first or 0.0) + rng.uniform(0.01, 5)
        planned = LoadRequest(rng.uniform(0, 9), rng.randrange(1, 500), rng.randrange(1, 90))
        load.append(Outcome(planned, planned.at, end, first, (), planned.prompt, planned.output))
    found = moments(load, KvRoom.of_tokens(500), 2, count=7)
    last = max(o.start + o.end for o in load)
    assert [m.at for m in found] == pytest.approx([i * last / 6 for i in range(7)])
    for m in found:
        held, waiting, decoding = 0.0, 0, 0
        for o in load:
            first, end = o.start + (o.end if o.first is None else o.first), o.start + o.end
            waiting += o.start <= m.at < first
            if first <= m.at < end:
                decoding += 1
                held += o.prompt + o.output * (m.at - first) / (end - first)
        assert (m.waiting, m.decoding) == (waiting, decoding)
        assert m.kv_share == pytest.approx(held / 1000)
    assert (found[-1].waiting, found[-1].decoding) == (0, 0) and moments([], KvRoom.of_tokens(1)) == ()


def test_the_command_writes_a_chart_and_prices(tmp_path: Path) -> None:
    words = ["simulate-serving", CARD, "--chip", CHIP, "--input", "100", "--output", "4", "--requests", "4"]
    file = tmp_path / "q.svg"
    done = CliRunner().invoke(app, [*words, "--price", "2", "--plot", str(file)])
    assert done.exit_code == 0 and " at 2 for a chip and an hour" in done.stdout, done.output
    assert len(list(ET.parse(file).getroot().iter("{http://www.w3.org/2000/svg}polyline"))) == 3
    for more, why in (
        (["--layout", "tp1,tp2", "--plot", str(file)], "a chart shows one run"), (["--price", "-1"], "--price is -1"),
    ):  # fmt: skip
        done = CliRunner().invoke(app, [*words, *more])
        assert done.exit_code != 0 and why in done.output


def test_the_command() -> None:
    words = ["simulate-serving", CARD, "--layout", "tp1,pp2", "--chip", CHIP, "--input", "100", "--output", "4"]
    done = CliRunner().invoke(app, [*words, "--concurrency", "2", "--requests", "4", "--json"])
    assert done.exit_code == 0, done.output
    one, two = json.loads(done.stdout)
    assert (one["layout"], one["chips"], two["layout"], two["chips"]) == ("tp1", 1, "pp2", 2)
    assert one["summary"]["answered"] == two["summary"]["answered"] == 4
    assert one["output_tokens_per_s_per_chip"] == pytest.approx(one["summary"]["output_tokens_per_s"])
    done = CliRunner().invoke(app, [*words, "--rate", "5", "--requests", "3", "--workload", "code", "--tpot", "1e-9"])
    assert done.exit_code == 0 and "0%" in done.stdout, done.output
