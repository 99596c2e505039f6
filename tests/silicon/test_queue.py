"""Modelled serving: table of step times, event queue and closed form, against exact step times and the real engine."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from math import ceil

import pytest

from intaglio.chips import ChipError, target
from intaglio.codesign.placement import Placement, placements
from intaglio.codesign.queue import Queue, QueueSettings, serve
from intaglio.codesign.serving import EngineSettings, Limits, ramped, simulate_serving
from intaglio.codesign.simulate import cards, ported
from intaglio.codesign.steady import MOST, Candidate, Question, confirm, estimate, find
from intaglio.codesign.steps import Formats, Server, StepTimes
from intaglio.compiler import LayoutError
from intaglio.measure.workload import LoadRequest
from intaglio.models import port_config
from intaglio.models.files.header import read_json
from intaglio.silicon.plan import Plan
from intaglio.silicon.sizes import BatchSizes

CARD, CHIP = "llama-3-8b", "h100_sxm"
TABLE = 0.2  # relative error between entries of the table; at most 0.09 in 700 random steps, in the median 0.02


@pytest.fixture(scope="module")
def times() -> StepTimes:
    return StepTimes(Server.of(ported(CARD, None), Placement.parse("tp1"), Formats()), target(CHIP))


@pytest.fixture(scope="module")
def mixture() -> Server:
    config = {**read_json(cards()["qwen3-30b-a3b"]), "num_hidden_layers": 6}
    return Server.of(port_config(config), Placement.parse("dp4/tp2ep2"), Formats())


def test_placements() -> None:
    for text, chips, shown in (
        ("tp8", 8, "tp8"), ("dp2tp4", 8, "dp2tp4"), ("2xtp4", 8, "dp2tp4"), ("tp4pp2", 8, "tp4pp2"),
        ("dp8/ep8", 8, "dp8/ep8"), ("tp8/ep8", 8, "tp8/ep8"), ("8x(dp4tp2/tp2ep4)", 64, "8x(dp4tp2/tp2ep4)"),
        ("dp2tp2pp2/ep4", 8, "dp2tp2pp2/ep4"), ("tp2ep4", 8, "tp2ep4"), ("dp3tp1", 3, "dp3tp1"),
    ):  # fmt: skip
        found = Placement.parse(text)
        assert (found.chips, str(found)) == (chips, shown)
        assert Placement.parse(str(found)) == found
    for text in ("dp2", "dp0tp2", "0xtp2", "(tp2", "tp2)", "tp2/", "dp8/ep4", "x", "", "dp2tp2/ep8", "tp2/ep2pp2"):
        with pytest.raises(LayoutError):
            Placement.parse(text)


def test_all_placements_of_some_chips() -> None:
    """Each has all chips, none comes twice, and all that a reader would try are among them."""
    chips = random.Random().randrange(1, 49)
    for routed in (False, True):
        found = placements(chips, routed)
        assert {p.chips for p in found} == {chips} and len(set(map(str, found))) == len(found)
        assert routed or all(p.plain for p in found)
    dense, mixed = ({str(p) for p in placements(8, routed)} for routed in (False, True))
    assert dense >= {"tp8", "tp4pp2", "dp2tp4", "dp2tp2pp2", "pp8", "dp8tp1"} and len(dense) == 10
    assert mixed > dense and mixed >= {"tp8/ep8", "dp8/ep8", "dp4tp2/ep8", "2x(dp4/ep4)", "2x(tp4/ep4)"}
    with pytest.raises(ValueError, match="0 chips; give 1 or more"):
        placements(0, True)


def test_steps_are_those_of_plans(times: StepTimes, py_rng: random.Random) -> None:
    """Exact steps equal those of Plan, and those of the table are close."""
    rng, plan = py_rng, Plan(times.server.stages[0], times.target)
    for _ in range(10):
        n, keys, q, more = rng.randrange(1, 200), rng.randrange(2, 5000), rng.randrange(16, 1500), rng.randrange(900)
        decode = BatchSizes(n, n, ((1, keys, n),))
        mixed = BatchSizes(n + q, n + 1, ((1, keys, n), (q, q + more, 1)))
        chunks = ((q, q + more, 1),)
        assert times.exact(n, keys) == pytest.approx(plan.cost(decode))
        seconds = times.exact(n, keys, chunks)[0]
        assert seconds == pytest.approx(plan.cost(mixed)[0], rel=1e-9)
        assert times.cost(n, keys)[0] == pytest.approx(plan.cost(decode)[0], rel=TABLE)
        assert times.cost(n, keys, chunks)[0] == pytest.approx(seconds, rel=TABLE)


def test_pipelines_and_replicas() -> None:
    """Stages of a pipeline have a micro-batch each; replicas share the load and nothing else."""
    on, program = target(CHIP), ported(CARD, None)
    two = StepTimes(Server.of(program, Placement.parse("pp2"), Formats()), on)
    plans = Plan.of(two.server.stages, on)
    half = BatchSizes(8, 8, ((1, 500, 8),))
    each = [plan.cost(half)[0] for plan in plans]
    assert two.exact(16, 500)[0] == pytest.approx(max(sum(each), 2 * max(each)))
    question = Question(program, Formats(), 500, 50)
    one, both = (Candidate(question, Server.of(program, Placement.parse(p), Formats()), on) for p in ("tp1", "dp2tp1"))
    a, b = one.estimated(8, 2048), both.estimated(8, 2048)
    assert (b.ttft, b.tpot, b.per_chip) == (a.ttft, a.tpot, a.per_chip)
    assert (b.concurrency, b.tokens_per_s, b.watts) == (16, 2 * a.tokens_per_s, 2 * a.watts)


def test_experts_on_all_chips(mixture: Server) -> None:
    """With copies of attention each chip reads a part of the experts, for the tokens of all copies."""
    whole = Server.of(mixture.program, Placement.parse("tp1"), Formats())
    routed = whole.weight_bytes - mixture.weight_bytes
    assert 0.4 * whole.weight_bytes < routed < 0.75 * whole.weight_bytes
    on = target("h200_sxm")
    alone, shared = StepTimes(whole, on), StepTimes(mixture, on)
    few, many = alone.exact(16, 500)[0], shared.exact(64, 500)[0]
    assert 0.2 * few < many < 2 * few
    assert mixture.kv_room(on, 0.9, 2048, 256).tokens() >= 4 * whole.kv_room(on, 0.9, 2048, 256).tokens()
    with pytest.raises(ChipError, match="llama-3-8b has no experts"):
        Server.of(ported(CARD, None), Placement.parse("dp2/ep2"), Formats())


def test_formats_of_experts(mixture: Server) -> None:
    """Experts may have a format of their own; rows in the weights' format make FP8 products faster."""
    program, place = mixture.program, Placement.parse("tp1")
    plain, four = (Server.of(program, place, Formats(experts=e)) for e in ("", "nvfp4"))
    assert 0.28 < four.weight_bytes / plain.weight_bytes < 0.6
    eight, rows = (Server.of(program, place, Formats("fp8", activations=a)) for a in ("auto", "weights"))
    on = target("b200_sxm")
    long = ((4096, 4096, 1),)
    assert StepTimes(rows, on).exact(0, 1, long)[0] < 0.9 * StepTimes(eight, on).exact(0, 1, long)[0]
    StepTimes(four, on).exact(1, 100)


def test_the_queue_is_the_engine(times: StepTimes, py_rng: random.Random) -> None:
    """The same load on the engine and in the queue: the same steps, and close latencies and energies."""
    rng = py_rng
    open_, prompt, output = rng.randrange(2, 12), rng.randrange(100, 900), rng.randrange(10, 60)
    budget = rng.choice((256, 1024))
    load = ramped([LoadRequest(0.0, prompt, output)] * (3 * open_), open_, rng.choice((0.0, 0.3)))
    done = simulate_serving(
        times.server.program, times.server.stages, times.target, "tp1", load,
        EngineSettings(budget, 64, step_overhead_s=1e-4), Limits(), open_,
    )  # fmt: skip
    found = serve(times, QueueSettings(10**6, budget, 64, step_s=1e-4), load, open_)
    assert len(found.outcomes) == len(load)
    mean = {name: done.summary.times[name]["mean"] for name in ("ttft", "tpot")}
    assert found.steps == pytest.approx(done.steps, rel=0.05)
    assert statistics.fmean(o.first or 0.0 for o in found.outcomes) == pytest.approx(mean["ttft"], rel=0.3)
    assert statistics.fmean(o.each or 0.0 for o in found.outcomes) == pytest.approx(mean["tpot"], rel=0.1)
    assert found.joules == pytest.approx(done.joules, rel=0.15)


def test_requests_wait_for_the_cache_and_arrive_in_time(times: StepTimes) -> None:
    load = [LoadRequest(0.0, 100, 20)] * 8
    wide, narrow = (serve(times, QueueSettings(kv, 2048), load, 8) for kv in (8 * 120, 2 * 120))
    assert [o.first for o in wide.outcomes] == [wide.outcomes[0].first] * 8
    assert max(o.first or 0.0 for o in narrow.outcomes) > 3 * min(o.end for o in narrow.outcomes)
    with pytest.raises(ValueError, match="a request of 100 \\+ 20 tokens; the K/V cache holds 119"):
        serve(times, QueueSettings(119, 2048), load, 8)
    apart = serve(times, QueueSettings(10**6, 2048), [LoadRequest(10.0 * i, 100, 20) for i in range(3)])
    first = [o.first for o in apart.outcomes]
    assert first == pytest.approx([first[0]] * 3) and [o.start for o in apart.outcomes] == [0.0, 10.0, 20.0]
    late = serve(times, QueueSettings(10**6, 2048, request_s=0.5), load, 8)
    assert late.outcomes[0].first == pytest.approx((wide.outcomes[0].first or 0.0) + 0.5)
    separate = serve(times, QueueSettings(10**6, 64, mixed=False), load, 8)
    assert separate.steps == 13 + 19  # 800 prompt tokens in steps of 64; then all decode together


class OneSecond:
    """Costs of a server whose every step takes one second."""

    copies = 1

    def cost(self, decoding: int, context: float, chunks: Sequence[tuple[int, int, int]] = ()) -> tuple[float, float]:
        return 1.0, 1.0


class Ranks(OneSecond):
    """The same, with data-parallel copies of attention."""

    def __init__(self, copies: int) -> None:
        self.copies = copies


def test_prompts_wait_for_their_rank(py_rng: random.Random) -> None:
    """Each DP rank computes its own prompts in order, a step's tokens at a time, whatever the other ranks do."""
    rng = py_rng
    copies, budget = rng.randrange(1, 9), rng.randrange(10, 500)
    prompts = [rng.randrange(1, 1200) for _ in range(rng.randrange(1, 40))]
    for ranks in ("round-robin", "random"):
        queue = Queue(Ranks(copies), QueueSettings(10**6, budget, ranks=ranks, mixed=False))
        for prompt in prompts:
            queue.add(LoadRequest(0.0, prompt, 1), 0.0)
        of = [one.rank for one in queue.waiting]
        assert set(of) <= set(range(copies))
        assert ranks == "random" or of == [i % copies for i in range(len(prompts))]
        while queue.open:
            queue.admit()
            queue.take_steps(float("inf"))
        ahead = [sum(p for p, r in zip(prompts[: i + 1], of, strict=False) if r == of[i]) for i in range(len(of))]
        assert sorted(o.first or 0.0 for o in queue.done) == sorted(ceil(tokens / budget) for tokens in ahead)
        assert queue.steps == max(ceil(tokens / budget) for tokens in ahead)
    many = [Queue(Ranks(4), QueueSettings(10**6, ranks="random")) for _ in range(2)]
    for queue in many:
        for _ in range(60):
            queue.add(LoadRequest(0.0, 8, 1), 0.0)
    drawn, again = ([one.rank for one in queue.waiting] for queue in many)
    assert drawn == again and set(drawn) == {0, 1, 2, 3} != {*drawn[:4]}  # not in turn


def test_an_engine_that_looks_for_requests_now_and_then(py_rng: random.Random) -> None:
    """Looks come every few decode steps, and after each step with prompts; without running sequences at once."""
    rng = py_rng
    for poll in (0, 1, rng.randrange(2, 30)):
        at = rng.uniform(1.5, 80.0)
        load = [LoadRequest(0.0, 10, 200), LoadRequest(at, 10, 200), LoadRequest(at, 10, 1)]
        first, second, third = sorted(serve(OneSecond(), QueueSettings(10**6, poll_steps=poll), load).outcomes, key=str)
        every = max(1, poll)
        look = 1 + every * ceil((ceil(at) - 1) / every)  # the first look, at 1 s, is after the first prompt
        assert first.first == 1.0
        assert [o.first for o in (second, third)] == pytest.approx([look + 1 - at] * 2), (poll, at)
    full = QueueSettings(30, poll_steps=10)  # one at a time: the second is known, and starts when the first has ended
    found = serve(OneSecond(), full, [LoadRequest(0.0, 10, 16), LoadRequest(0.0, 10, 16)]).outcomes
    assert [o.first for o in found] == [1.0, 17.0]


def test_a_step_may_give_several_tokens(py_rng: random.Random) -> None:
    rng = py_rng
    gain, output, prompt = rng.uniform(1.0, 4.0), rng.randrange(2, 300), rng.randrange(1, 500)
    queue = Queue(OneSecond(), QueueSettings(10**6, tokens_per_step=gain))
    for _ in range(3):
        queue.add(LoadRequest(0.0, prompt, output), 0.0)
    while queue.open:
        queue.admit()
        queue.take_steps(float("inf"))
    assert [o.each for o in queue.done] == pytest.approx([ceil((output - 1) / gain) / (output - 1)] * 3)
    assert (queue.held, queue.keys) == (0, pytest.approx(0.0, abs=1e-6))


def test_a_closed_form_with_several_tokens_a_step(times: StepTimes) -> None:
    plain, twice = (estimate(times, QueueSettings(10**6, 2048, tokens_per_step=g), 64, 401, 4) for g in (1.0, 2.0))
    assert plain.tpot / 2 < twice.tpot < 0.6 * plain.tpot
    found = serve(times, QueueSettings(10**6, 2048, tokens_per_step=2.0), [LoadRequest(0.0, 64, 401)] * 16, 4).outcomes
    assert twice.tpot == pytest.approx(statistics.fmean(o.each or 0.0 for o in found), rel=0.2)


def test_steps_that_verify_drafts(times: StepTimes, py_rng: random.Random) -> None:
    """They compute all tokens, and read keys and values once if the rows of a head's queries fit one tile."""
    rng, plan = py_rng, Plan(times.server.stages[0], times.target)
    n, keys, queries = rng.randrange(1, 60), rng.randrange(2, 5000), rng.randrange(2, 9)
    drafts = StepTimes(times.server, times.target, queries=queries)
    tile = times.target.library.min_query_rows
    passes = -(-4 * queries // tile)  # four heads share a K/V head
    assert drafts.passes == passes and times.passes == 1
    tokens = n * queries
    wanted = plan.cost(BatchSizes(tokens, tokens, ((1, keys, n * passes),)))
    assert drafts.exact(n, keys) == pytest.approx(wanted)
    assert drafts.on(target("h200_sxm")).queries == queries
    longer = drafts.exact(n, keys, ((700, 900, 1),))[0]
    assert drafts.cost(n, keys, ((700, 900, 1),))[0] == pytest.approx(longer, rel=TABLE)


def test_the_closed_form_is_close_to_the_queue(times: StepTimes) -> None:
    settings = QueueSettings(10**6, 1024)
    for open_, prompt, output in ((1, 500, 50), (16, 500, 100), (64, 200, 200), (32, 1500, 20)):
        form = estimate(times, settings, prompt, output, open_)
        spread = form.ttft + form.tpot * output
        load = ramped([LoadRequest(0.0, prompt, output)] * (6 * open_), open_, spread)
        found = serve(times, settings, load, open_).outcomes
        middle = found[2 * open_ : 4 * open_]
        assert form.tpot == pytest.approx(statistics.fmean(o.each or 0.0 for o in middle), rel=0.2)
        assert form.ttft == pytest.approx(statistics.fmean(o.first or 0.0 for o in middle), rel=0.7)


def test_a_closed_form_is_never_above_the_rate_of_prefill(times: StepTimes) -> None:
    for prompt, output in ((8000, 128), (2000, 20)):
        chunks = [(1024, (prompt + 1024) // 2, 1)]
        most = 1024 / times.cost(0, 1.0, chunks)[0] / prompt * output
        for open_ in (100, 1000, 4000):
            assert estimate(times, QueueSettings(10**8, 1024, 4096), prompt, output, open_).tokens_per_s < 1.1 * most


def test_every_copy_of_attention_prefills_a_long_prompt(mixture: Server) -> None:
    """A prompt longer than a step's tokens does not keep the other copies waiting."""
    shared = StepTimes(mixture, target("h200_sxm"))
    load = [LoadRequest(0.0, 800, 1)] * 8
    done = serve(shared, QueueSettings(10**6, 200), load)
    assert done.steps == -(-8 // shared.copies) * 4


def test_the_search_keeps_the_limits(times: StepTimes) -> None:
    loose, tight = (
        Candidate(Question(times.server.program, Formats(), 500, 100, Limits(tpot=tpot)), times.server, times.target)
        for tpot in (0.02, 0.009)
    )
    found = [find([one], (1024,), "chip")[0] for one in (loose, tight)]
    assert all(d.confirmed and d.within for d in found)
    assert found[0].concurrency > found[1].concurrency and found[0].per_chip > found[1].per_chip
    assert loose.estimated(2 * found[0].concurrency, 1024).tpot > 0.02 and found[0].concurrency < MOST
    impossible = Question(times.server.program, Formats(), 500, 100, Limits(tpot=1e-6))
    one = Candidate(impossible, times.server, times.target)
    assert find([one], (1024,)) == []
    assert not confirm(one, one.estimated(1, 1024)).within
