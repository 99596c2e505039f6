"""Suspended requests resumed on another engine at any moment: they give the tokens that they would have given."""

from __future__ import annotations

import json
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from intaglio import LLM, SamplingParams
from intaglio.debugging.replay import replay_journal
from intaglio.runtime import (
    Engine,
    Event,
    Grammar,
    Refused,
    Request,
    RequestError,
    Resumption,
    Sequence,
    check_invariants,
)

SEED = int(os.environ.get("TEST_SEED", random.SystemRandom().randrange(2**32)))
Outcome = tuple[list[int], list[float], str | None]
PROMPTS = ("def f(", "import os\nimport sys\nfor name in sys.argv[1:]:\n    print(", "class A:\n    def ")
KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 1.0, "n": 3},
    {"temperature": 0.8, "repetition_penalty": 1.2, "frequency_penalty": 0.5, "logit_bias": {10: 2.0}},
    {"stop": ["\n", "):"], "temperature": 0.7},
    {"grammar": Grammar("json_schema", {"type": "object", "properties": {"a": {"type": "integer"}}})},
    {"grammar": Grammar("regex", "[a-z]{3,9}( [a-z]{1,5}){2}"), "temperature": 1.2, "n": 2},
    {"logprobs": 3, "temperature": 1.0},
    {"prompt_logprobs": 2, "temperature": 1.0, "min_tokens": 4},
    {"bad_words": ["self", "name"], "temperature": 1.0},
)


def made(llm: LLM, i: int, **options: Any) -> Request:
    """Request `i`, with functions that have seen no token."""
    params = SamplingParams(max_tokens=12, seed=1000 + i, **KINDS[i % len(KINDS)])
    return llm.prepare(PROMPTS[i % len(PROMPTS)], params, id=f"{i}", **options)[0]


def revived(llm: LLM, resumption: Resumption) -> Resumption:
    """The resumption as another process reads it, with functions made there."""
    read = Resumption.from_dict(json.loads(json.dumps(resumption.as_dict())))
    fresh = made(llm, int(read.request.id))
    return replace(read, request=replace(read.request, stop_checker=fresh.stop_checker, matcher=fresh.matcher))


def run(llms: list[LLM], count: int, rng: random.Random | None) -> tuple[dict[tuple[str, int], Outcome], list[Event]]:
    """The outcome of each choice, by request and choice; with `rng`, requests move between the engines at random."""
    sequences: dict[tuple[str, int], Sequence] = {}
    events: list[Event] = []
    for i in range(count):
        sequences |= {(s.request.id, s.index): s for s in llms[0].engine.add(made(llms[0], i))}
    while not all(llm.engine.idle for llm in llms):
        for llm in llms:
            events += llm.engine.step()
            for id in list(llm.engine.requests) if rng else ():
                if rng and rng.random() < 0.3:
                    to = rng.choice(llms)
                    suspended = llm.engine.suspend(id)
                    assert suspended
                    sequences |= {(id, s.index): s for s in to.engine.resume(revived(to, suspended))}
            check_invariants(llm.engine)
    return {key: (s.output, s.logprobs, s.finish_reason) for key, s in sequences.items()}, events


def test_requests_that_move_between_engines_give_the_same_tokens() -> None:
    print(f"TEST_SEED={SEED}")
    count = 3 * len(KINDS)
    want, events = run([LLM()], count, None)
    engines = [LLM(), LLM(max_drafts=3), LLM(kv_tokens=192, max_batch_tokens=24)]
    got, moved = run(engines, count, random.Random(SEED))
    assert got == want and {reason for _, _, reason in want.values()} == {"stop", "length"}
    assert sum(llm.engine.counts.suspended for llm in engines) > 20
    for key in want:  # each token and the end are told once, by the engine that had the request then
        of_one = [[(e.token, e.scored, e.finish_reason, e.prompt) for e in told if (e.request, e.index) == key]
                  for told in (events, moved)]  # fmt: skip
        assert of_one[0] == of_one[1]


def test_a_suspended_request_leaves_no_block_and_no_event() -> None:
    llm = LLM(device="oracle")
    engine = llm.engine
    engine.add(Request("a", [1, 2, 3], SamplingParams(max_tokens=9, n=2)))
    engine.step(), engine.step()
    resumption = engine.suspend("a")
    assert resumption and engine.idle and engine.step() == [] and engine.gauges().blocks_held == 0
    assert [len(c.output) for c in resumption.choices] == [
        2,
        1,
    ]  # the second starts after the first
    assert resumption.request.params.seed is not None  # drawn by the first engine
    assert engine.suspend("a") is None
    [first, second] = engine.resume(resumption)
    assert (first.seed, second.seed) == (resumption.request.params.seed, resumption.request.params.seed + 1)
    engine.run()
    assert len(first.output) == len(second.output) == 9


def test_only_choices_that_have_not_ended_are_resumed() -> None:
    llm = LLM(device="oracle")
    want = llm.engine.add(Request("want", [5], SamplingParams(max_tokens=8, n=3, seed=4, temperature=1.0)))
    llm.engine.run()
    ends = frozenset({want[1].output[2]})
    first = llm.engine.add(Request("a", [5], want[0].request.params, ends))
    for _ in range(4):
        llm.engine.step()
    ended = {s.index for s in first if s.state == "ended"}
    assert 1 in ended and len(ended) < 3
    resumption = llm.engine.suspend("a")
    assert resumption and {c.index for c in resumption.choices} == {0, 1, 2} - ended
    resumed = llm.engine.resume(resumption)
    llm.engine.run()
    for s in resumed:
        assert s.output == want[s.index].output[: len(s.output)] and s.finish_reason in ("length", "stop")


def engine_of(llm: LLM, now: list[float], **options: Any) -> Engine:
    return Engine(llm.load(), clock=lambda: now[0], rng=random.Random(1), **options)


def test_timeouts_move_as_the_time_that_is_left() -> None:
    llm, now, later = LLM(device="oracle"), [100.0], [7.0]
    engine, other = engine_of(llm, now), engine_of(llm, later)
    engine.add(Request("a", [1], SamplingParams(max_tokens=50), timeout=10.0, queue_timeout=3.0))
    now[0] += 2
    waiting = engine.suspend("a")
    assert waiting and (waiting.request.timeout, waiting.request.queue_timeout) == (8.0, 1.0)
    other.resume(waiting)
    other.step()
    later[0] += 5
    running = other.suspend("a")
    assert running and (running.request.timeout, running.request.queue_timeout) == (3.0, None)  # it has started
    now[0] += 10
    engine.resume(running)
    engine.step()
    now[0] += 3
    assert engine.step()[-1].finish_reason == "deadline"
    late = engine_of(llm, now)
    late.add(Request("b", [1], SamplingParams(max_tokens=50), timeout=1.0))
    now[0] += 2
    overdue = late.suspend("b")
    assert overdue and overdue.request.timeout and overdue.request.timeout < 1e-6
    late.resume(overdue)
    now[0] += 1
    assert late.step()[-1].finish_reason == "deadline"


def test_what_would_give_other_bits_is_refused() -> None:
    llm, now = LLM(device="oracle"), [0.0]
    engine = engine_of(llm, now, numerics="host avx2")
    engine.add(Request("a", [1], SamplingParams(max_tokens=5, seed=1)))
    resumption = engine.suspend("a")
    assert resumption
    with pytest.raises(RequestError, match="suspended on 'host avx2', this engine is 'host avx512'"):
        engine_of(llm, now, numerics="host avx512").resume(resumption)
    with pytest.raises(RequestError, match=r"suspended with Program 0000, this engine has \w+; resume it on"):
        engine.resume(replace(resumption, program="0000"))
    busy = Request("a", [1], SamplingParams(max_tokens=5))
    engine.add(busy)
    with pytest.raises(RequestError, match="still running"):
        engine.resume(resumption)
    engine.drain()
    engine.abort("a")
    with pytest.raises(Refused, match="draining"):
        engine.resume(resumption)
    check_invariants(engine)


def test_functions_that_do_not_fit_the_output_are_refused() -> None:
    llm = LLM()
    grammar = Grammar("regex", "[a-z]{20}")
    llm.engine.add(llm.prepare("x", SamplingParams(max_tokens=9, grammar=grammar, stop=["#"]), id="a")[0])
    llm.engine.step(), llm.engine.step()
    resumption = llm.engine.suspend("a")
    assert resumption and resumption.choices[0].output
    other = llm.prepare("x", SamplingParams(max_tokens=9, grammar=Grammar("regex", "[0-9]{20}")), id="a")[0]
    with pytest.raises(RequestError, match="its grammar does not allow output token 1"):
        llm.engine.resume(replace(resumption, request=replace(resumption.request, matcher=other.matcher)))
    stops = replace(resumption.request, stop_checker=lambda index: lambda token: True)
    with pytest.raises(RequestError, match="its stop checker ends it at output token 1"):
        llm.engine.resume(replace(resumption, request=stops))
    check_invariants(llm.engine)


def test_a_journal_replays_suspensions(tmp_path: Path) -> None:
    llm = LLM(journal=tmp_path / "journal")
    for i in range(len(KINDS)):
        llm.engine.add(made(llm, i))
    for step in range(6):
        llm.engine.step()
        id = f"{step}"
        if suspended := llm.engine.suspend(id):
            llm.engine.resume(revived(llm, suspended))
    llm.engine.run()
    done = replay_journal(tmp_path / "journal")
    assert done.divergence is None and done.tokens == llm.engine.counts.output_tokens > 50
