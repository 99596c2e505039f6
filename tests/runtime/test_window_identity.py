"""Models with a sliding window on the host device: the same bits, whether window blocks are given back or not.

Requests alone with all K/V kept, then with few window blocks: together, preempted, cut small, speculated, from the
prefix cache, resumed on other engines, with steps that fail after their work, and on several ranks.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from support.identity import Case, Drafts, Outcome, failing, moved
from support.tiny import VOCABULARY, tiny

from intaglio import LLM, SamplingParams
from intaglio.runtime import Engine, Request, RequestError, check_invariants

pytest.importorskip("transformers")
WINDOW = 20
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma3": {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": {"num_hidden_layers": 2},
    "gemma3n": {  # two layers have K/V caches, the third reads the first one's
        "num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "num_kv_shared_layers": 1, "intermediate_size": [96, 72, 96], "activation_sparsity_pattern": [0.9, 0.0, 0.5],
    },
    "deepseek_v4": {  # entries pooled from runs are kept, the rows from which they are pooled are given back
        "num_hidden_layers": 3, "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
    },
}  # fmt: skip


def cases(rng: random.Random, count: int) -> list[Case]:
    """Requests of four groups whose prompts begin alike, greedy and sampled. The first two need a fifth K/V block."""
    prefixes = [[rng.randrange(VOCABULARY) for _ in range(n)] for n in (1, 40, 96, 150)]
    grows = SamplingParams(max_tokens=8, ignore_eos=True)
    found = [([rng.randrange(VOCABULARY) for _ in range(126)], grows) for _ in range(2)]
    for _ in range(count - 2):
        prompt = rng.choice(prefixes) + [rng.randrange(VOCABULARY) for _ in range(rng.choice((0, 1, 2, 9)))]
        options: dict[str, Any] = {"max_tokens": rng.randint(1, 9), "ignore_eos": True}
        if rng.random() < 0.5:
            options |= {"temperature": rng.uniform(0.3, 1.5), "seed": rng.getrandbits(60)}
        found.append((prompt, SamplingParams(**options)))
    return found


def outcomes(engine: Engine, several: list[Case], drafts: tuple[random.Random, list[Outcome]] | None = None) -> Any:
    """The results of all requests run together."""
    made = [s for i, (prompt, params) in enumerate(several) for s in engine.add(Request(f"{i}", prompt, params))]
    for i, s in enumerate(made if drafts else ()):
        s.lookup = Drafts(drafts[0], s.prompt, drafts[1][i][0])  # type: ignore[index, assignment]
    while not engine.idle:
        engine.step()
        check_invariants(engine)
    return [(s.output, s.logprobs) for s in made]


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_do_not_depend_on_blocks_given_back(tmp_path: Path, family: str) -> None:
    seed = random.randrange(2**32)
    rng, path = random.Random(seed), tiny(family, tmp_path / family, sliding_window=WINDOW, **FAMILIES[family])
    several = cases(rng, 10 if family == "gemma3" else 6)

    def engine(window_tokens: int = 8 * 32, **options: Any) -> Engine:
        return LLM(path, threads=1, cache=None, window_tokens=window_tokens, **options).engine

    whole = engine(0)
    assert not whole.windows.on
    want = [outcome for case in several for outcome in outcomes(whole, [case])]
    together = engine(20 * 32)
    assert together.state.window == WINDOW and together.state.window_pages == 20
    assert outcomes(together, several) == want, seed
    small = engine(4 * 32, kv_tokens=192, max_batch_tokens=24)
    assert outcomes(small, several) == want, seed
    crowded = engine(40 * 32, kv_tokens=256, max_batch_tokens=64)
    assert outcomes(crowded, several) == want and crowded.counts.preemptions > 0, seed
    speculated = engine(max_drafts=3, max_batch_tokens=64)
    assert outcomes(speculated, several, (rng, want)) == want and speculated.counts.accepted_tokens > 0, seed
    cached = engine(120 * 32, max_batch_tokens=64)
    assert outcomes(cached, several) == outcomes(cached, several) == want and cached.counts.cached_tokens > 150, seed
    assert moved([engine(max_batch_tokens=64), engine(max_drafts=3, max_batch_tokens=32)], several, rng) == want, seed
    assert outcomes(failing(engine(max_batch_tokens=64), rng), several) == want, seed
    stages = engine(max_batch_tokens=64, layout="pp2", in_process=True)
    assert outcomes(stages, several) == want, seed
    shards: dict[str, Any] = {"max_batch_tokens": 64, "layout": "tp2", "in_process": True}
    assert outcomes(engine(**shards), several) == outcomes(engine(0, **shards), several), seed


def test_ranks_as_processes_give_window_blocks_back(tmp_path: Path) -> None:
    path = tiny("gemma3", tmp_path / "gemma3", sliding_window=WINDOW, **FAMILIES["gemma3"])
    seed = random.randrange(2**32)
    several = cases(random.Random(seed), 6)
    results = []
    for window_tokens in (0, 8 * 32):
        llm = LLM(path, threads=2, cache=None, window_tokens=window_tokens, layout="tp2", max_batch_tokens=64)
        try:
            results.append(outcomes(llm.engine, several))
            assert llm.engine.windows.on == (window_tokens > 0)
        finally:
            llm.close()
    assert results[0] == results[1], seed


def test_memory_of_a_long_sequence(tmp_path: Path) -> None:
    """By default window layers keep a small part of a long context if that is enough for all sequences, else all."""
    long = tiny("gemma3", tmp_path / "long", sliding_window=WINDOW, max_position_embeddings=8192, **FAMILIES["gemma3"])
    engine = LLM(long, threads=1, cache=None, max_batch_tokens=128, max_sequences=64).engine
    prompt = [random.randrange(VOCABULARY) for _ in range(2000)]
    engine.add(Request("r", prompt, SamplingParams(max_tokens=4, ignore_eos=True)))
    held = []
    while not engine.idle:
        engine.step()
        held.append((engine.pool.held, engine.windows.pool.held))
    assert max(full for full, _ in held) == 63
    assert max(window for _, window in held) <= 2
    assert LLM(long, threads=1, cache=None, context=256).state.window_pages == 0
    wide = tiny("mistral", tmp_path / "wide", sliding_window=4096, max_position_embeddings=32768, num_hidden_layers=2)
    for window_tokens in (None, 8192):
        engine = LLM(wide, threads=1, cache=None, window_tokens=window_tokens).engine
        for i in range(16):
            engine.add(Request(f"r{i}", [1, 2, 3, 4, i], SamplingParams(max_tokens=8000, ignore_eos=True)))
        engine.step()
        assert len(engine.scheduler.running) == 16


def test_refusals(tmp_path: Path) -> None:
    path = tiny("gemma3", tmp_path / "gemma3", sliding_window=WINDOW, **FAMILIES["gemma3"])
    with pytest.raises(RequestError, match="window_tokens is 64; a window of 20 tokens in steps of 32 needs 160 or"):
        LLM(path, threads=1, cache=None, window_tokens=64, max_batch_tokens=32)
    with pytest.raises(RequestError, match="window_tokens gives some back; leave out one of them"):
        LLM(path, threads=1, cache=None, window_tokens=640, kv_cache_dir=tmp_path / "kv")
    assert not LLM(path, threads=1, cache=None, kv_cache_dir=tmp_path / "kv").engine.windows.on
    with pytest.raises(RequestError, match="no layer of the model has a window"):
        LLM(tiny("llama", tmp_path / "llama"), threads=1, cache=None, window_tokens=640)
