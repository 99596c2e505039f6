"""Batch-invariance of 200 requests on the host device: the same tokens and bitwise equal log-probabilities.

Compares each request run alone with all of them under batching, preemption, prefix-cache hits, chunking, drafts and
worker crashes.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from intaglio import LLM, SamplingParams
from intaglio.runtime import Request, check_invariants

SEED = int(os.environ.get("TEST_SEED", random.SystemRandom().randrange(2**32)))
PREFIXES = (
    "import os\nimport sys\nimport json\n\n\ndef main(argv: list[str]) -> int:\n    "
    "for name in argv[1:]:\n        with open(name) as file:\n            data = json.load(file)\n        ",
    "class Queue:\n    def __init__(self, maxsize=0):\n        self.maxsize = maxsize\n        self.items = []\n\n"
    "    def put(self, item):\n        self.items.append(item)\n\n    def ",
    "for i in range(10):\n    print(i)\nfor i in range(10):\n    print(i)\nfor ",
    "def f(",
)
Outcome = tuple[list[int], list[float], str | None]


@dataclass(frozen=True)
class Case:
    prompt: list[int]
    params: SamplingParams


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """200 requests of four groups with common prefixes, greedy and sampled, some with penalties or filters."""
    print(f"TEST_SEED={SEED}")
    rng, encode = random.Random(SEED), LLM(device="oracle").model.tokenizer.encode  # type: ignore[union-attr]
    found = []
    for _ in range(200):
        prompt = encode(rng.choice(PREFIXES) + rng.choice(("", "x", "self", "return ", "with open(path) as f:\n")))
        options: dict[str, Any] = {"max_tokens": rng.randint(1, 16), "ignore_eos": rng.random() < 0.5}
        if rng.random() < 0.7:
            options |= {"temperature": rng.uniform(0.3, 1.5), "seed": rng.getrandbits(60)}
        if rng.random() < 0.3:
            options |= {"top_k": rng.randint(1, 50), "top_p": rng.uniform(0.5, 1), "min_p": rng.uniform(0, 0.1)}
        if rng.random() < 0.3:
            options |= {"frequency_penalty": rng.uniform(-1, 1), "repetition_penalty": rng.uniform(0.8, 1.3)}
        found.append(Case(prompt, SamplingParams(**options)))
    return found


def outcomes(llm: LLM, cases: list[Case], before_step: Any = lambda: None, **options: Any) -> list[Outcome]:
    """The results of all requests run together."""
    engine = llm.engine
    made = [
        s for i, a in enumerate(cases)
        for s in engine.add(Request(f"{i}", a.prompt, a.params, llm.model.eos_ids, **{"salt": f"{i}", **options}))
    ]  # fmt: skip
    while not engine.idle:
        before_step()
        engine.step()
    check_invariants(engine)
    return [(s.output, s.logprobs, s.finish_reason) for s in made]


@pytest.fixture(scope="module")
def single(cases: list[Case]) -> list[Outcome]:
    """The results of each request run alone, without prefix-cache hits, as each has its own salt."""
    llm = LLM()
    found = [outcome for i, a in enumerate(cases) for outcome in outcomes(llm, [a], salt=f"single {i}")]
    assert llm.engine.counts.cached_tokens == 0 and llm.engine.counts.preemptions == 0
    assert {reason for _, _, reason in found} <= {"stop", "length"}
    return found


def test_one_batch(cases: list[Case], single: list[Outcome]) -> None:
    llm = LLM()
    assert outcomes(llm, cases) == single
    assert llm.engine.counts.preemptions == 0


def test_small_pool_with_preemption(cases: list[Case], single: list[Outcome]) -> None:
    llm = LLM(kv_tokens=160, max_batch_tokens=64)
    assert outcomes(llm, cases) == single
    assert llm.engine.counts.preemptions > 5  # 20 to 45 of most seeds


def test_prefix_cache_hits(cases: list[Case], single: list[Outcome]) -> None:
    llm = LLM(max_sequences=8)
    assert outcomes(llm, cases, salt=None) == single
    hits, share = llm.engine.counts.cached_tokens, 0.2
    assert hits > share * llm.engine.counts.prompt_tokens


def test_prompt_chunks_of_any_size(cases: list[Case], single: list[Outcome]) -> None:
    llm, rng = LLM(), random.Random(SEED)

    def cut() -> None:
        llm.engine.scheduler.max_batch_tokens = rng.choice((1, 3, 7, 40, 300))

    assert outcomes(llm, cases, cut) == single


def test_speculative_decoding(cases: list[Case], single: list[Outcome]) -> None:
    llm = LLM(max_drafts=4)
    assert outcomes(llm, cases) == single
    counts = llm.engine.counts
    assert 0 < counts.accepted_tokens < counts.draft_tokens


def test_worker_killed_repeatedly(cases: list[Case], single: list[Outcome]) -> None:
    llm = LLM(worker=True)

    def kills() -> Iterator[None]:
        for step in range(10**6):
            if step in (3, 9, 20):
                os.kill(llm.engine.executable.pids[0], signal.SIGKILL)  # type: ignore[attr-defined]
            yield

    murder = kills()
    assert outcomes(llm, cases, lambda: next(murder)) == single
    assert llm.engine.counts.restarts == llm.engine.counts.faults["worker"] == 3
    llm.engine.executable.close()  # type: ignore[attr-defined]
