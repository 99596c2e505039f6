"""The runtime on the oracle device: any workload gives the tokens that the oracle defines, and leaks nothing."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.serving import CONTEXT, VOCABULARY, add, oracle_engine, request, run_checked, smallest_program, truth

from intaglio.devices import (
    ArrayWeights,
    BlockingExecutable,
    PendingStep,
    StateSpec,
    StepRequest,
    StepResult,
    open_device,
)
from intaglio.devices.oracle import expected
from intaglio.runtime import BlockPool, Engine, KvError, ParamsError, RequestError, SamplingParams, check_invariants


@st.composite
def workloads(draw: st.DrawFn) -> dict[str, Any]:
    """A pool small enough to force preemption, any token budget, requests that fit the pool, and times of aborts."""
    page_tokens = draw(st.sampled_from([1, 2, 4, 8]))
    pages = draw(st.integers(3, 14))
    room = min(CONTEXT, pages * page_tokens)
    requests = []
    for _ in range(draw(st.integers(1, 7))):
        prompt = draw(st.integers(1, room))
        requests.append({
            "prompt": prompt,
            "max_tokens": draw(st.integers(1, min(24, room - prompt + 1))),
            "temperature": draw(st.sampled_from([0.0, 0.8])),
            "seed": draw(st.sampled_from([None, 7])),
            "eos": draw(st.sampled_from([0, 0, 1, 8])),
            "at": draw(st.integers(0, 12)),
            "abort": draw(st.one_of(st.none(), st.integers(0, 30))),
        })  # fmt: skip
    budget, sequences = draw(st.sampled_from([1, 2, 5, 16, 512])), draw(st.sampled_from([1, 3, 256]))
    return {
        "pages": pages, "page_tokens": page_tokens, "max_batch_tokens": budget, "max_sequences": sequences,
        "requests": requests, "seed": draw(st.integers(0, 3)),
    }  # fmt: skip


def play(w: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """(events, requests) of a workload whose requests arrive and are aborted at given steps."""
    w = dict(w)
    rng = random.Random(w["seed"])
    specs = w.pop("requests")
    engine = oracle_engine(**w)
    requests = []
    for i, s in enumerate(specs):
        prompt = [rng.randrange(VOCABULARY) for _ in range(s["prompt"])]
        params = {k: s[k] for k in ("max_tokens", "temperature", "seed")}
        r = request(f"r{i}", prompt, frozenset(range(s["eos"])), **params)
        requests.append(r)
    made: dict[str, Any] = {}
    events, step = [], 0
    while not engine.idle or any(s["at"] >= step for s in specs):
        for r, s in zip(requests, specs, strict=True):
            if s["at"] == step:
                [made[r.id]] = engine.add(r)
            if s["abort"] is not None and s["at"] + s["abort"] == step:
                events += engine.abort(r.id)
        check_invariants(engine)
        events += engine.step()
        check_invariants(engine)
        step += 1
        assert step < 5000, "the engine does not come to an end"
    assert engine.pool.held == 0 and engine.counts.finished.total() == len(requests)
    return events, [made[r.id] for r in requests]


@given(workloads())
@settings(max_examples=120, deadline=None)
def test_random_workloads_give_the_oracle_tokens(w: dict[str, Any]) -> None:
    events, made = play(w)
    for r, s in zip(made, w["requests"], strict=True):
        mine = [e for e in events if e.request == r.request.id]
        assert [e.token for e in mine if e.token is not None] == r.output == truth(r)
        assert [e.finish_reason is not None for e in mine] == [False] * (len(mine) - 1) + [True]
        reason = mine[-1].finish_reason
        assert reason == r.finish_reason and (s["abort"] is not None or reason != "abort")
        assert (reason == "stop") == bool(r.output and r.output[-1] in r.request.eos_ids)
        assert (reason == "length") <= (len(r.output) == s["max_tokens"])
    assert play(w)[0] == events  # the same seed gives the same log


def test_preemption_chunking_and_batch_composition_change_no_token() -> None:
    def outputs(**options: Any) -> list[list[int]]:
        engine = oracle_engine(**options)
        requests = [request(f"r{i}", range(i, 9 + i), max_tokens=20, temperature=1.0, seed=i) for i in range(6)]
        made = add(engine, *requests)
        run_checked(engine)
        preempted.append(sum(s.preemptions for s in made))
        return [s.output for s in made]

    preempted: list[int] = []
    roomy = outputs(pages=100)
    assert outputs(pages=8, max_batch_tokens=3) == roomy == outputs(pages=100, max_sequences=1)
    assert preempted[0] == 0 and preempted[1] > 0


def test_step_is_within_budget_decodes_first_then_by_arrival() -> None:
    engine = oracle_engine(pages=64, max_batch_tokens=6)
    for i, n in enumerate((4, 20, 3)):
        engine.add(request(f"r{i}", range(n), max_tokens=3))
    seen = []
    while not engine.idle:
        plan = engine.scheduler.schedule()  # the same plan again in step(): scheduling twice changes nothing
        seen.append([(p.sequence.request.id, p.num_tokens) for p in plan])
        engine.step()
    assert seen[0] == [("r0", 4), ("r1", 2)]
    assert seen[1] == [("r0", 1), ("r1", 5)]
    assert all(sum(n for _, n in s) <= 6 for s in seen)
    assert seen[3:5] == [[("r1", 6)], [("r1", 2), ("r2", 3)]]


def test_prompt_as_long_as_the_context() -> None:
    engine = oracle_engine()
    full, near = add(engine, request("full", [1] * 64, max_tokens=9), request("near", [1] * 62, max_tokens=9))
    run_checked(engine)
    assert (len(full.output), len(near.output)) == (1, 3)
    assert full.finish_reason == near.finish_reason == "length"
    assert near.output == truth(near)


def test_max_tokens_limit_is_exact() -> None:
    for pages in (4, 16, 40):  # a pool smaller than the context, as large, and larger
        engine = oracle_engine(pages=pages)
        room = min(pages * 4, CONTEXT)
        for n in (1, 5, room):
            most = engine.admission.max_tokens(n)
            engine.admission.check(request("r", [1] * n, max_tokens=most))
            if pages * 4 < CONTEXT:
                with pytest.raises(RequestError, match="can need"):
                    engine.admission.check(request("r", [1] * n, max_tokens=most + 1))
            [s] = engine.add(request("r", [1] * n, max_tokens=most))
            run_checked(engine)
            assert len(s.output) == most == room - n + 1 and s.finish_reason == "length"
        assert engine.admission.max_tokens(room + 1) == 0


def test_refused_at_add() -> None:
    engine = oracle_engine(pages=4)
    for prompt, params, message in (
        ([], {}, "the prompt is empty"),
        ([1] * 65, {}, "the prompt has 65 tokens, the context holds 64; shorten it by 1"),
        ([5, 97], {}, "token id 97 is outside 0..96"),
        ([5, -1], {}, "token id -1 is outside 0..96"),
        ([1] * 10, {"max_tokens": 8}, "can need 20 tokens of K/V cache, which holds 16"),
    ):
        with pytest.raises(RequestError, match=message.replace(".", r"\.")):
            engine.add(request("r", prompt, **params))
    engine.add(request("r", [1]))
    with pytest.raises(RequestError, match="'r' is still running"):
        engine.add(request("r", [1]))
    assert engine.abort("nobody") == []
    check_invariants(engine)


class Faulty(BlockingExecutable):
    """An executable that returns no token for a row, or fails the whole step, when told to."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.program, self.state = inner, inner.program, inner.state
        self.no_token: set[int] = set()  # sequences' first tokens
        self.fail = False
        self.poison: int | None = None  # a token with which every step fails

    def run(self, request: StepRequest) -> StepResult:
        batch = request.batch
        if self.fail or self.poison in batch.tokens:
            self.fail = False
            raise MemoryError(f"no room for {self.poison}")
        result = self.inner.step(request)
        owner = np.repeat(np.arange(len(batch.q_len)), batch.q_len)[batch.rows]
        bad = [int(batch.sampling[r].seed) in self.no_token for r in range(len(owner))]
        return replace(result, tokens=np.where(bad, -1, result.tokens))


def faulty_engine() -> tuple[Engine, Faulty]:
    inner = open_device("oracle").load(smallest_program(), ArrayWeights({}), StateSpec(16, 4))
    device = Faulty(inner)
    return Engine(device, clock=lambda: 0.0, rng=random.Random(0), max_batch_tokens=8), device


def test_row_without_a_finite_logit_ends_only_its_request() -> None:
    engine, device = faulty_engine()
    made = add(engine, *(request(f"r{i}", range(3), max_tokens=6, seed=i) for i in range(3)))
    engine.step()
    device.no_token = {1}
    run_checked(engine)
    assert [s.finish_reason for s in made] == ["length", "error", "length"]
    fault = made[1].fault
    assert fault and fault.kind == "request" and "no finite value" in fault.message
    assert all(s.output == truth(s) for s in made)
    assert engine.pool.held == 0


def test_step_that_fails_once_ends_no_request() -> None:
    engine, device = faulty_engine()
    made = add(engine, *(request(f"r{i}", range(6), max_tokens=6) for i in range(3)))
    device.fail = True  # the budget of 8 admits r0 and part of r1
    run_checked(engine)
    assert [s.finish_reason for s in made] == ["length"] * 3 and engine.counts.faults == {"step": 1}
    assert all(s.output == truth(s) for s in made) and engine.pool.held == 0


@pytest.mark.parametrize("company", [0, 1, 6])
def test_request_that_fails_a_step_is_found_and_others_continue(company: int) -> None:
    engine, device = faulty_engine()
    engine.scheduler.max_batch_tokens = 64
    made = add(engine, *(request(f"r{i}", [i + 1, 2, 3], max_tokens=6) for i in range(company)))
    engine.step()
    device.poison = 50
    made += add(engine, request("bad", [50, 2], max_tokens=6))
    run_checked(engine)
    assert [s.finish_reason for s in made] == ["length"] * company + ["error"]
    fault = made[-1].fault
    assert fault and fault.kind == "step" and fault.message == "the step failed: MemoryError: no room for 50"
    assert all(s.output == truth(s) for s in made) and engine.pool.held == 0


def test_stop_checker_gets_each_token_and_its_failure_ends_only_its_request() -> None:
    engine = oracle_engine()
    seen: list[int] = []
    stopping = replace(
        request("stopping", [1, 2], max_tokens=9), stop_checker=lambda index: lambda t: seen.append(t) or len(seen) == 4
    )
    broken = replace(request("broken", [3], max_tokens=9), stop_checker=lambda index: lambda t: bool(1 // 0))
    made = add(engine, stopping, broken, request("plain", [4], max_tokens=9))
    run_checked(engine)
    assert [s.finish_reason for s in made] == ["stop", "error", "length"]
    assert seen == made[0].output and len(seen) == 4
    assert [s.output for s in made] == [truth(s) for s in made]


def test_eos_can_be_ignored() -> None:
    engine = oracle_engine()
    every = frozenset(range(VOCABULARY))
    on, off = add(
        engine, request("on", [1], every, max_tokens=5), request("off", [1], every, max_tokens=5, ignore_eos=True)
    )
    run_checked(engine)
    assert (len(on.output), on.finish_reason, len(off.output), off.finish_reason) == (1, "stop", 5, "length")


def test_scored_requests_give_logits_of_every_position_and_no_tokens() -> None:
    engine = oracle_engine(max_batch_tokens=5)
    scored, other = add(
        engine, replace(request("scored", range(13)), scored=True), request("other", range(4), max_tokens=5)
    )
    run_checked(engine)
    logits = np.concatenate(scored.logits)
    assert logits.shape == (13, VOCABULARY) and scored.output == [] and scored.finish_reason == "length"
    assert logits.argmax(axis=1).tolist() == [expected(range(i + 1), VOCABULARY) for i in range(13)]
    assert other.output == truth(other)


def test_times_come_from_the_clock() -> None:
    engine = oracle_engine()
    [r] = engine.add(request("r", [1, 2], max_tokens=3))
    usage = run_checked(engine)[-1].usage
    assert usage and (usage.prompt_tokens, usage.output_tokens) == (2, 3)
    assert r.arrived < (r.started or 0) < (r.first_token or 0) < (r.ended or 0)
    assert (usage.arrived, usage.started, usage.first_token, usage.ended) == (
        r.arrived, r.started, r.first_token, r.ended,
    )  # fmt: skip


@given(st.lists(st.integers(0, 5), max_size=40), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_the_pool_conserves_blocks(sizes: list[int], rng: random.Random) -> None:
    pool, held = BlockPool(11, 4), []
    for n in sizes:
        if n > len(pool.free):
            with pytest.raises(KvError, match=f"{n} blocks requested"):
                pool.allocate(n)
        else:
            held += pool.allocate(n)
        if held and rng.random() < 0.3:
            shared = rng.choice(held)
            pool.share([shared])
            held.append(shared)
        while held and rng.random() < 0.4:
            pool.release([held.pop(rng.randrange(len(held)))])
        assert len(pool.free) + pool.held == 11 and pool.held == len(set(held))
    pool.release(held)
    assert sorted(pool.free) == list(range(11))


def test_the_pool_refuses_a_double_free() -> None:
    pool = BlockPool(3, 4)
    blocks = pool.allocate(2)
    pool.release(blocks)
    for bad in (blocks[0], 2, 3, -1):
        with pytest.raises(KvError, match=f"block {bad} is not held"):
            pool.release([bad])
    with pytest.raises(KvError, match="at least 1"):
        BlockPool(0, 4)


@pytest.mark.parametrize(
    "field, value",
    [
        ("max_tokens", 0), ("max_tokens", 1.5), ("max_tokens", True), ("temperature", -0.1),
        ("temperature", float("nan")), ("temperature", float("inf")), ("temperature", "hot"), ("top_k", -1),
        ("top_p", 0), ("top_p", 1.01), ("min_p", -0.1), ("min_p", 1.1), ("seed", -1), ("seed", 2**63),
        ("stop", ("a", "")), ("stop", (3,)), ("stop", ""), ("stop", None),
    ],
)  # fmt: skip
def test_bad_params_are_named(field: str, value: object) -> None:
    with pytest.raises(ParamsError, match=f"^{field} .*; allowed: "):
        SamplingParams(**{field: value})  # type: ignore[arg-type]


def test_good_params() -> None:
    assert SamplingParams(stop="x").stop == SamplingParams(stop=["x"]).stop == ("x",)
    SamplingParams(1, 0, 0, 1e-9, 1, 2**63 - 1, [], True)


def test_before_launch_is_called_before_each_launch() -> None:
    engine, order = oracle_engine(), list[str]()
    launch = engine.executable.launch

    def noted(request: StepRequest) -> PendingStep:
        order.append("launched")
        return launch(request)

    engine.executable.launch = noted  # type: ignore[method-assign]
    engine.launcher.before_launch = lambda: order.append("told")
    engine.step()
    assert order == []  # nothing to do, nothing launched
    n = random.randrange(2, 9)
    add(engine, request("a", [5, 6, 7], max_tokens=n))
    run_checked(engine)
    assert order == ["told", "launched"] * n
