"""Models with recurrent state on the host device: the same tokens and bits alone, together, preempted and in chunks.

Steps that fail after their work, and workers that are killed, change nothing either.
"""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from support.tiny import VOCABULARY, tiny

from intaglio import LLM, SamplingParams
from intaglio.devices import DeviceError, StepRequest
from intaglio.runtime import Engine, Request, check_invariants

pytest.importorskip("transformers")
SEED = int(os.environ.get("TEST_SEED", random.SystemRandom().randrange(2**32)))
Case = tuple[list[int], SamplingParams]
Outcome = tuple[list[int], list[float]]
FEW = ("lfm2", "qwen3_next", "mamba2", "falcon_h1", "jamba")  # all ops, alone and beside attention


def cases(rng: random.Random) -> list[Case]:
    """Requests with prompts of 1 to 60 tokens, greedy and sampled. The first two need a second K/V block each."""
    grows = SamplingParams(max_tokens=12, ignore_eos=True)
    found = [([rng.randrange(VOCABULARY) for _ in range(30)], grows) for _ in range(2)]
    for _ in range(16):
        prompt = [rng.randrange(VOCABULARY) for _ in range(rng.choice((1, 2, 5, 20, 60)))]
        options: dict[str, Any] = {"max_tokens": rng.randint(1, 12), "ignore_eos": True}
        if rng.random() < 0.6:
            options |= {"temperature": rng.uniform(0.3, 1.5), "seed": rng.getrandbits(60)}
        found.append((prompt, SamplingParams(**options)))
    return found


def outcomes(engine: Engine, several: list[Case], before_step: Any = lambda: None) -> list[Outcome]:
    """The results of all requests run together."""
    made = [s for i, (prompt, params) in enumerate(several) for s in engine.add(Request(f"{i}", prompt, params))]
    while not engine.idle:
        before_step()
        engine.step()
    check_invariants(engine)
    assert {s.finish_reason for s in made} == {"length"}
    return [(s.output, s.logprobs) for s in made]


@pytest.mark.parametrize("family", FEW)
def test_tokens_do_not_depend_on_company(tmp_path: Path, family: str) -> None:
    print(f"TEST_SEED={SEED}")
    rng, path = random.Random(SEED), tiny(family, tmp_path / family)
    several = cases(rng)

    def engine(**options: Any) -> Engine:
        return LLM(path, threads=2, cache=None, **options).engine

    alone = engine()
    want = [outcome for case in several for outcome in outcomes(alone, [case])]
    together = engine()
    assert outcomes(together, several) == want
    assert together.counts.preemptions == together.counts.cached_tokens == 0

    small = engine(kv_tokens=96, max_batch_tokens=48)
    assert outcomes(small, several) == want
    assert small.counts.preemptions > 0

    cut = engine()

    def resize() -> None:
        cut.scheduler.max_batch_tokens = rng.choice((1, 3, 7, 40, 300))

    assert outcomes(cut, several, resize) == want

    failing = engine(max_sequences=5)
    run = failing.executable.run  # type: ignore[attr-defined]

    def fails(step: StepRequest) -> Any:
        result = run(step)
        if rng.random() < 0.3 and len(step.batch.q_len) > 1:  # a single sequence that fails twice would end
            raise DeviceError("planted, after the work")
        return result

    failing.executable.run = fails  # type: ignore[attr-defined]
    assert outcomes(failing, several) == want
    assert failing.counts.faults["step"] > 0


def test_worker_killed(tmp_path: Path) -> None:
    rng, path = random.Random(SEED), tiny("lfm2", tmp_path / "lfm2")
    several = cases(rng)
    want = outcomes(LLM(path, threads=2, cache=None).engine, several)
    engine, step = LLM(path, threads=2, cache=None, worker=True, max_sequences=6).engine, iter(range(10**6))

    def kill() -> None:
        if next(step) in (2, 9):
            os.kill(engine.executable.pids[0], signal.SIGKILL)  # type: ignore[attr-defined]

    assert outcomes(engine, several, kill) == want
    assert engine.counts.restarts == 2
    engine.executable.close()


@pytest.mark.parametrize("layout", ["pp2", "tp2"])
def test_ranks_as_processes(tmp_path: Path, layout: str) -> None:
    rng, path = random.Random(SEED), tiny("lfm2", tmp_path / "lfm2")
    several = cases(rng)
    want = outcomes(LLM(path, threads=2, cache=None, layout=layout, in_process=True).engine, several)
    ranks = LLM(path, threads=2, cache=None, layout=layout).engine
    assert outcomes(ranks, several) == want
    ranks.executable.close()
    if layout == "pp2":
        assert want == outcomes(LLM(path, threads=2, cache=None).engine, several)
