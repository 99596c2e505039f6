"""Helpers that run requests in ways that must not change their tokens: drafts, moves between engines, failed steps."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

from support.serving import fail_after_work
from support.tiny import VOCABULARY

from intaglio import SamplingParams
from intaglio.runtime import Engine, Request, Resumption, check_invariants

Case = tuple[list[int], SamplingParams]
Outcome = tuple[list[int], list[float]]


class Drafts:
    """Proposes the tokens that will come, and sometimes a wrong one."""

    def __init__(self, rng: random.Random, prompt: list[int], output: list[int]) -> None:
        self.rng, self.tokens = rng, [*prompt, *output]

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        right = self.tokens[len(tokens) : len(tokens) + most]
        return [t if self.rng.random() < 0.7 else self.rng.randrange(VOCABULARY) for t in right]


def moved(engines: list[Engine], several: list[Case], rng: random.Random) -> list[Outcome]:
    """The results of all requests, each of which is suspended and resumed on another engine at random."""
    at = dict[str, Any]()
    for i, (prompt, params) in enumerate(several):
        [at[f"{i}"]] = rng.choice(engines).add(Request(f"{i}", prompt, params))
    while not all(engine.idle for engine in engines):
        for engine in engines:
            engine.step()
            for id in [id for id in engine.requests if rng.random() < 0.2]:
                text = json.dumps(engine.suspend(id).as_dict())  # type: ignore[union-attr]
                [at[id]] = rng.choice(engines).resume(Resumption.from_dict(json.loads(text)))
            if rng.random() < 0.1:
                check_invariants(engine)
    return [(at[f"{i}"].output, at[f"{i}"].logprobs) for i in range(len(several))]


def failing(engine: Engine, rng: random.Random) -> Engine:
    """The engine with steps that fail after their work; not those of one sequence, which would end at the second."""
    return fail_after_work(engine, lambda step: rng.random() < 0.3 and len(step.batch.q_len) > 1)
