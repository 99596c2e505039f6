"""Models with recurrent state on the host device: the same tokens and bits however requests are run.

200 requests alone, together, preempted, cut at random, speculated, from the prefix cache, resumed on other engines, and
with steps that fail after their work. Workers that are killed change nothing either.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.identity import Case, Drafts, Outcome, failing, moved
from support.tiny import RECURRENT, VOCABULARY, tiny

from intaglio import LLM, SamplingParams
from intaglio.runtime import Engine, Request, check_invariants

pytest.importorskip("transformers")
SEED = int(os.environ.get("TEST_SEED", random.SystemRandom().randrange(2**32)))
FEW = {"mamba2": 200, "qwen3_next": 200, "lfm2": 200, "falcon_h1": 20, "jamba": 20}  # requests of each
TWO: dict[str, Any] = {"num_hidden_layers": 2}  # layers, to save time
LAYERS = {
    "mamba2": TWO,
    "qwen3_next": {**TWO, "layer_types": ["linear_attention", "full_attention"], "mlp_only_layers": []},
    "lfm2": {**TWO, "layer_types": ["conv", "full_attention"]},
}


def cases(rng: random.Random, count: int) -> list[Case]:
    """Requests of four groups whose prompts begin alike, greedy and sampled.

    The first two need a second K/V block while they decode; the third and the last begin with the same 70 tokens, so at
    least one prefix is shared in every draw.
    """
    prefixes = [[rng.randrange(VOCABULARY) for _ in range(n)] for n in (1, 29, 40, 70)]
    grows = SamplingParams(max_tokens=12, ignore_eos=True)
    found = [([rng.randrange(VOCABULARY) for _ in range(30)], grows) for _ in range(2)]
    for index in range(2, count):
        prefix = prefixes[-1] if index in (2, count - 1) else rng.choice(prefixes)
        prompt = prefix + [rng.randrange(VOCABULARY) for _ in range(rng.choice((0, 1, 2, 9)))]
        options: dict[str, Any] = {"max_tokens": rng.randint(1, 7), "ignore_eos": True}
        if rng.random() < 0.6:
            options |= {"temperature": rng.uniform(0.3, 1.5), "seed": rng.getrandbits(60)}
        found.append((prompt, SamplingParams(**options)))
    return found


def outcomes(
    engine: Engine, several: list[Case], before_step: Callable[[], object] = lambda: None,
    drafts: tuple[random.Random, list[Outcome]] | None = None, shared: bool = True,
) -> list[Outcome]:  # fmt: skip
    """The results of all requests run together. shared: they may share a prefix."""
    made = [
        s for i, (prompt, params) in enumerate(several)
        for s in engine.add(Request(f"{i}", prompt, params, salt=None if shared else f"{i}"))
    ]  # fmt: skip
    if drafts:
        for s, (output, _) in zip(made, drafts[1], strict=True):
            s.lookup = Drafts(drafts[0], s.prompt, output)  # type: ignore[assignment]
    while not engine.idle:
        before_step()
        engine.step()
    check_invariants(engine)
    assert {s.finish_reason for s in made} == {"length"}
    return [(s.output, s.logprobs) for s in made]


@pytest.mark.parametrize("family", FEW)
def test_tokens_do_not_depend_on_company(tmp_path: Path, family: str) -> None:
    print(f"TEST_SEED={SEED}")
    rng, path = random.Random(SEED), tiny(family, tmp_path / family, **LAYERS.get(family, {}))
    several = cases(rng, FEW[family])

    def engine(**options: Any) -> Engine:
        return LLM(path, threads=1, cache=None, **options).engine

    alone = engine(state_cache_bytes=0)
    want = [outcome for case in several for outcome in outcomes(alone, [case])]
    assert alone.counts.cached_tokens == alone.counts.preemptions == 0

    together = engine()
    assert outcomes(together, several, shared=False) == want
    assert together.counts.preemptions == together.counts.cached_tokens == 0

    small = engine(kv_tokens=96, max_batch_tokens=48)
    assert outcomes(small, several) == want
    assert small.counts.preemptions > 0

    cut = engine()

    def resize() -> None:
        cut.scheduler.max_batch_tokens = rng.choice((3, 7, 40, 300))

    assert outcomes(cut, several, resize) == want

    speculated = engine(max_drafts=3)
    assert outcomes(speculated, several, drafts=(rng, want), shared=False) == want
    assert 0 < speculated.counts.accepted_tokens < speculated.counts.draft_tokens

    cached = engine(max_sequences=8)
    assert outcomes(cached, several) == want
    assert cached.counts.cached_tokens > (0.2 * cached.counts.prompt_tokens if len(several) == 200 else 0)

    at_once = failing(engine(max_sequences=5, kv_tokens=256, max_drafts=2), rng)
    assert outcomes(at_once, several, drafts=(rng, want)) == want
    counts = at_once.counts
    assert min(counts.faults["step"], counts.cached_tokens, counts.accepted_tokens) > 0

    engines = [engine(), engine(max_drafts=3, kv_tokens=160), engine(max_batch_tokens=24, state_cache_bytes=0)]
    assert moved(engines, several, rng) == want
    assert sum(one.counts.suspended for one in engines) > 0


def test_worker_killed(tmp_path: Path) -> None:
    rng, path = random.Random(SEED), tiny("lfm2", tmp_path / "lfm2")
    several = cases(rng, 16)
    want = outcomes(LLM(path, threads=2, cache=None).engine, several)
    engine, step = LLM(path, threads=2, cache=None, worker=True, max_sequences=4).engine, iter(range(10**6))

    def kill() -> None:
        if next(step) in (2, 9):
            os.kill(engine.executable.pids[0], signal.SIGKILL)  # type: ignore[attr-defined]

    assert outcomes(engine, several, kill) == want
    assert engine.counts.restarts == 2
    engine.executable.close()


@pytest.mark.parametrize("family", RECURRENT)
def test_lanes_in_one_process(tmp_path: Path, family: str) -> None:
    """tp2, which divides heads or channels and their state: preempted, cut at random, from the prefix cache, drafts."""
    print(f"TEST_SEED={SEED}")
    rng, path = random.Random(SEED), tiny(family, tmp_path / family, **LAYERS.get(family, {}))
    several = cases(rng, 12)

    def engine(**options: Any) -> Engine:
        return LLM(path, threads=1, cache=None, layout="tp2", in_process=True, **options).engine

    alone = engine(state_cache_bytes=0)
    want = [outcome for case in several for outcome in outcomes(alone, [case])]
    small = engine(kv_tokens=96, max_batch_tokens=48)
    assert outcomes(small, several) == want
    cut = engine(max_drafts=2, max_sequences=4)

    def resize() -> None:
        cut.scheduler.max_batch_tokens = rng.choice((3, 7, 40, 300))

    assert outcomes(cut, several, resize, drafts=(rng, want)) == want
    assert small.counts.preemptions > 0
    assert cut.counts.cached_tokens > 0


@pytest.mark.parametrize(("family", "layout"), [("lfm2", "pp2"), ("lfm2", "tp2"), ("qwen3_next", "tp2")])
def test_ranks_as_processes(tmp_path: Path, family: str, layout: str) -> None:
    rng, path = random.Random(SEED), tiny(family, tmp_path / family)
    several = cases(rng, 16)
    want = outcomes(LLM(path, threads=2, cache=None, layout=layout, in_process=True).engine, several)
    ranks = LLM(path, threads=2, cache=None, layout=layout, max_drafts=2, max_sequences=4).engine
    assert outcomes(ranks, several, drafts=(rng, want)) == want
    assert ranks.counts.cached_tokens > 0
    ranks.executable.close()
    if layout == "pp2":
        assert want == outcomes(LLM(path, threads=2, cache=None).engine, several)
