"""The op sample: definition compared with an independent computation, shape rules, and work counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.op_cases import BATCH, apply, close, random, refuses, seeds, tensors, torched
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from intaglio.batch import GREEDY, Chunk, Sampling, bind
from intaglio.ops import (
    Sample,
)  # fmt: skip
from intaglio.ops.op import Work
from intaglio.ops.sample import draw, kept_mass, uniform


def test_sample() -> None:
    """Greedy and drawn rows side by side; logprobs under the unfiltered softmax; bad rows spoil no other."""
    logits = random(0, 4, 50) * 3
    logits[2, 7] = np.nan
    samplings = (GREEDY, Sampling(temperature=0.7, top_k=5, seed=3), GREEDY, Sampling(temperature=1.0, seed=4))
    chunks = [Chunk([1, 2], 3 * i, [0, 1, 2], rows=[1], sampling=s) for i, s in enumerate(samplings)]
    op = Sample(site="s", logits="logits", tokens="tokens", logprobs="logprobs")
    results = op.reference({"logits": logits}, bind(chunks, 4))
    tokens, logprobs = results["tokens"], results["logprobs"]
    assert tokens[0] == logits[0].argmax() and tokens[2] == -1 and np.isnan(logprobs[2])
    for r in (1, 3):  # the position the token will take: two after the chunk's start
        assert tokens[r] == draw(logits[r], samplings[r], 3 * r + 2)
    for r in (0, 1, 3):
        close(logprobs[r], torch.log_softmax(torched(logits[r]), 0)[tokens[r]])
    np.testing.assert_array_equal(apply(op, bind(chunks, 4), logits=logits), tokens)


def test_sample_ties_go_to_the_lower_id() -> None:
    logits = np.float32([1, 5, 5, 5, 0])
    assert draw(logits, GREEDY, 0) == 1
    np.testing.assert_array_equal(np.flatnonzero(kept_mass(logits, Sampling(temperature=1, top_k=2))), [1, 2])
    np.testing.assert_array_equal(np.flatnonzero(kept_mass(logits, Sampling(temperature=1, top_p=0.1))), [1])


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    seeds, st.floats(0.2, 3), st.integers(0, 60), st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
    st.one_of(st.just(0.0), st.floats(0.001, 1)),
)  # fmt: skip
def test_sample_keeps_what_transformers_keeps(seed: int, temperature: float, k: int, p: float, min_p: float) -> None:
    logits = random(seed, 40) * 2
    chain = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    chain += [TopKLogitsWarper(k)] if k else []
    chain += [TopPLogitsWarper(p)] if p < 1 else []
    chain += [MinPLogitsWarper(min_p)] if min_p else []
    want = torch.softmax(chain(torch.zeros(1, 1), torched(logits)[None])[0], 0).numpy()
    mass = kept_mass(logits, Sampling(temperature=temperature, top_k=k, top_p=p, min_p=min_p))
    np.testing.assert_array_equal(np.flatnonzero(mass), np.flatnonzero(want))
    close(mass / mass.sum(), want)


@pytest.mark.parametrize("s", [{}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.2}, {"temperature": 2.0}])
@pytest.mark.parametrize("by", ["seed", "position"])
def test_sample_draws_in_proportion(s: dict[str, float], by: str) -> None:
    """Pearson's chi-square over 3000 draws: above mean + 5 sigma once in some 10,000 runs, and the seeds are fixed."""
    logits, n = np.float32([0.5, -1, 2, 1.5, 0, 0.2, -0.5, 1]), 3000
    sampling = {"temperature": 1.0, **s}
    mass = kept_mass(logits, Sampling(**sampling))  # type: ignore[arg-type]
    expected = n * mass / mass.sum()
    at = [(i, 7) if by == "seed" else (7, i) for i in range(n)]
    tokens = [draw(logits, Sampling(**sampling, seed=seed), position) for seed, position in at]  # type: ignore[arg-type]
    counts = np.bincount(tokens, minlength=8)
    kept = expected > 0
    assert not counts[~kept].any()
    free = kept.sum() - 1
    assert ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum() < free + 5 * (2 * free) ** 0.5


def test_sample_is_a_function_of_seed_and_position() -> None:
    logits = random(0, 100)
    hot = Sampling(temperature=1.0, seed=11)
    first = [draw(logits, hot, position) for position in range(50)]
    assert [draw(logits, hot, position) for position in reversed(range(50))] == first[::-1]
    assert len(set(first)) > 20
    numbers = [uniform(seed, position) for seed in (0, 1, -1, 2**63) for position in (0, 1, 2**31)]
    assert len(set(numbers)) == 12 and all(0 <= u < 1 for u in numbers)


@pytest.mark.parametrize(
    "s", [GREEDY, Sampling(temperature=1.0), Sampling(temperature=0.5, top_k=2, top_p=0.5, min_p=0.1)]
)
def test_sample_of_rows_with_nan_or_infinity(s: Sampling) -> None:
    inf = np.float32(np.inf)
    assert draw(np.float32([1, np.nan, 3]), s, 0) == -1
    assert draw(np.float32([-inf, -inf]), s, 0) == -1
    assert draw(np.float32([1, inf]), s, 0) == -1
    assert draw(np.float32([-inf, 2, -inf]), s, 0) == 1  # masked by a grammar, say


def test_sample_refuses() -> None:
    op = Sample(site="s", logits="logits", tokens="tokens", logprobs="logprobs")
    refuses(op, r"logits is f32\[R\]; wanted a matrix", logits="f32[R]")


def test_sample_work() -> None:
    op = Sample(site="s", logits="logits", tokens="tokens", logprobs="logprobs")
    table = tensors(logits="f32[R, 50]", tokens="i32[R]", logprobs="f32[R]")
    assert op.work(table, BATCH) == Work(4 * 3 * 50, 0, 0, 3 * 50 * 4 + 3 * 4 + 3 * 4)
