"""SamplingParams: penalties and biases by their definitions, and scores of the likeliest tokens."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from support.serving import VOCABULARY, add, oracle_engine, request, run_checked, truth
from transformers import RepetitionPenaltyLogitsProcessor

from intaglio.batch import Sampling
from intaglio.ops.sample import draw, edited
from intaglio.runtime import SamplingParams
from intaglio.runtime.sampling import edits, score


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


def after(p: SamplingParams, logits: np.ndarray, prompt: list[int], output: list[int]) -> np.ndarray:
    return edited(logits, Sampling(edits=edits(p, prompt, output)))


def test_repetition_penalty_equals_transformers(rng: np.random.Generator) -> None:
    for _ in range(20):
        logits = rng.normal(size=50).astype(np.float32) * 4
        prompt, output = rng.integers(0, 50, 12).tolist(), rng.integers(0, 50, 7).tolist()
        penalty = float(rng.uniform(0.5, 2))
        want = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + output]), torch.tensor(logits)[None])[0]
        np.testing.assert_allclose(
            after(SamplingParams(repetition_penalty=penalty), logits, prompt, output), want, rtol=1e-6
        )


def test_penalties_and_biases_follow_the_openai_formula(rng: np.random.Generator) -> None:
    """l - count * frequency - (count > 0) * presence + bias, with counts over the output."""
    for _ in range(20):
        logits = rng.normal(size=30).astype(np.float32)
        prompt, output = rng.integers(0, 30, 9).tolist(), rng.integers(0, 30, 20).tolist()
        presence, frequency = rng.uniform(-2, 2, 2)
        bias = {int(i): float(rng.uniform(-100, 100)) for i in rng.integers(0, 30, 4)}
        counts = Counter(output)
        want = [
            x - counts[i] * frequency - (counts[i] > 0) * presence + bias.get(i, 0)
            for i, x in enumerate(logits.tolist())
        ]
        p = SamplingParams(presence_penalty=presence, frequency_penalty=frequency, logit_bias=bias)
        np.testing.assert_allclose(after(p, logits, prompt, output), want, rtol=1e-5, atol=1e-5)


def test_default_parameters_make_no_edits() -> None:
    assert edits(SamplingParams(temperature=1.0, top_k=3), [1, 2], [3]) is None
    logits = np.float32([3, 1, 2])
    assert edited(logits, Sampling()) is logits


def test_a_bias_of_100_decides_and_of_minus_100_forbids() -> None:
    logits = np.float32([3, 1, 2, 0])
    for hot in (0.0, 1.0):
        for bias, allowed in (({3: 100.0}, {3}), ({0: -100.0, 2: -100.0}, {1, 3})):
            changed = edits(SamplingParams(logit_bias=bias), [0], [])
            drawn = {draw(logits, Sampling(hot, seed=s, edits=changed), 0) for s in range(50)}
            assert drawn <= allowed


def test_scores_are_log_softmax_and_ties_go_to_the_lower_id(rng: np.random.Generator) -> None:
    for _ in range(30):
        logits = np.round(rng.normal(size=40) * 2).astype(np.float32)  # rounded: ties everywhere
        want = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), 0).numpy()
        most, token = int(rng.integers(0, 41)), int(rng.integers(0, 40))
        scored = score(logits, token, most)
        assert scored.logprob == pytest.approx(want[token], abs=1e-12)
        assert [i for i, _ in scored.top] == np.lexsort((np.arange(40), -logits))[:most].tolist()
        np.testing.assert_allclose([x for _, x in scored.top], want[[i for i, _ in scored.top]], atol=1e-12)


def test_penalties_survive_preemption_and_drafts() -> None:
    def outputs(**options: int) -> list[list[int]]:
        engine = oracle_engine(**options)
        made = add(engine, *(
            request(f"r{i}", range(i, i + 6), max_tokens=18, temperature=1.0, seed=i, frequency_penalty=0.7,
                    repetition_penalty=1.1, logit_bias={4: 2.0}) for i in range(4)
        ))  # fmt: skip
        run_checked(engine)
        assert all(s.output == truth(s) for s in made)
        preempted.append(sum(s.preemptions for s in made))
        return [s.output for s in made]

    preempted: list[int] = []
    assert outputs(pages=100) == outputs(pages=7, max_batch_tokens=3)
    assert preempted[0] == 0 < preempted[1]


def test_likeliest_tokens_come_with_each_token_and_with_the_prompt() -> None:
    engine = oracle_engine(max_batch_tokens=4)
    prompt = list(range(9))
    engine.add(request("r", prompt, max_tokens=3, logprobs=2, prompt_logprobs=1))
    events = run_checked(engine)
    first, drawn = events[0], events[1:]
    assert first.prompt and first.scored is None and [s.token for s in first.prompt] == prompt[1:]
    for e in drawn:
        assert e.scored and e.scored.logprob == 0 and e.scored.top[0] == (e.token, 0.0) and len(e.scored.top) == 2
    assert all(len(s.top) == 1 and s.top[0][1] == 0 for s in first.prompt)
    assert {s.logprob for s in first.prompt} <= {0.0, -np.inf}


def test_prompt_is_scored_once_despite_chunks_preemption_and_cache() -> None:
    """With the prefix in the cache, in small chunks, and preempted half way."""
    engine = oracle_engine(pages=5, max_batch_tokens=2)
    engine.add(request("warm", range(10), max_tokens=1))
    run_checked(engine)
    engine.add(request("r", range(10), max_tokens=4, prompt_logprobs=0))
    engine.step()
    [sequence] = engine.requests["r"]
    engine.scheduler.preempt(sequence)
    events = run_checked(engine)
    assert sequence.preemptions == 1 and sequence.cached_tokens == 0
    assert [e.prompt is not None for e in events] == [True] + [False] * 4
    assert [s.token for s in events[0].prompt or ()] == list(range(1, 10)) and sequence.output == truth(sequence)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0), ("n", 129), ("presence_penalty", 2.5), ("frequency_penalty", float("nan")), ("repetition_penalty", 0),
        ("logit_bias", {1: 101}), ("logit_bias", [1]), ("logprobs", 21), ("logprobs", None), ("prompt_logprobs", -1),
        ("stop_token_ids", "ab"), ("stop_token_ids", [1.5]), ("grammar", "regex"),
    ],
)  # fmt: skip
def test_bad_params_are_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{field} .*; allowed: "):
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^logit_bias key is -1"):
        SamplingParams(logit_bias={-1: 1.0})


def test_ids_outside_the_vocabulary_are_refused_with_the_request() -> None:
    engine = oracle_engine()
    for params, message in (
        ({"logit_bias": {VOCABULARY: 1.0}}, "biased token id 97"),
        ({"stop_token_ids": [98]}, "stop token id 98"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.add(request("r", [1], **params))
