"""The search for the ratio of prefill to decode servers: fills the chips, keeps latency limits, finds the best."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from intaglio.chips import target
from intaglio.codesign.ratio import best_ratio, kinds, most_decoding, prompt_rate, prompt_seconds, search
from intaglio.codesign.serving import Limits
from intaglio.codesign.simulate import ported
from intaglio.codesign.steady import Question
from intaglio.codesign.steps import Formats

ON = target("h100_sxm")


@pytest.fixture(scope="module")
def question() -> Question:
    return Question(ported("llama-3-8b", None), Formats("fp8"), 1000, 200, Limits(ttft=1.0, tpot=0.02))


def test_a_plan_fills_the_chips_and_no_ratio_serves_more(question: Question) -> None:
    rng = Random()
    chips, tpot = rng.randrange(2, 12), rng.uniform(0.008, 0.03)
    asked = replace(question, limits=Limits(ttft=1.0, tpot=tpot))
    found, refused = kinds(asked, ON, ["tp1"], 2048, 128)
    one, context = found["tp1"], asked.input + asked.output / 2
    best = best_ratio(one, one, asked, chips)
    n = most_decoding(one, asked.input, asked.output, tpot)
    assert refused == [] and best and best.prefill + best.decode == chips
    assert one.times.cost(n, context)[0] <= tpot
    full = n == min(one.settings.max_sequences, one.settings.room.sequences(asked.input + asked.output))
    assert full or one.times.cost(n + 1, context)[0] > tpot
    each = n / ((asked.output - 1) * one.times.cost(n, context)[0])
    rates = [min(0.85 * a * prompt_rate(one, asked.input)[0], (chips - a) * each) for a in range(1, chips)]
    assert best.rate == pytest.approx(max(rates))


def test_prompts_longer_than_a_step_are_cut(question: Question) -> None:
    found, _ = kinds(question, ON, ["tp1"], 512, 16)
    whole, _ = kinds(question, ON, ["tp1"], 4096, 16)
    cut_rate, cut_s = prompt_rate(found["tp1"], 1000)
    assert cut_rate == pytest.approx(1 / cut_s)
    assert prompt_rate(whole["tp1"], 1000)[0] > cut_rate


def test_the_limit_of_the_first_token_is_for_one_prompt(question: Question) -> None:
    """A limit shorter than a full step of many prompts, but longer than one of them alone, finds a ratio."""
    short = replace(question, input=Random().randrange(200, 400), output=10)
    found, _ = kinds(short, ON, ["tp1"], 8192, 16)
    one = found["tp1"]
    alone, (_, full) = prompt_seconds(one, short.input), prompt_rate(one, short.input)
    assert alone < full / 4
    asked = replace(short, limits=Limits(ttft=max(full / 2, 3 * alone)))
    best = best_ratio(one, one, asked, 2)
    assert best and best.prefill == best.decode == 1
    ((*_, done),) = search(asked, found, found, 2)
    assert done.ttft <= asked.limits.ttft
    assert best_ratio(one, one, replace(short, limits=Limits(ttft=alone / 2)), 2) is None


def test_layouts_that_do_not_fit_are_listed(question: Question) -> None:
    """Heads that ranks cannot share, and ranks that no network joins, do not end a search."""
    found, refused = kinds(question, ON.with_chip(node_bytes_per_s=0.0), ["tp3", "tp1", "tp16"], 2048, 16)
    assert list(found) == ["tp1"] and [layout for layout, _ in refused] == ["tp3", "tp16"]
    assert "none joins several" in dict(refused)["tp16"]


def test_what_is_found_keeps_the_limits(question: Question) -> None:
    """Confirmed by the queues; a limit that no load keeps finds nothing; replicas and too large models are refused."""
    small = replace(question, output=20, limits=Limits(ttft=1.0, tpot=0.012))
    found, _ = kinds(small, ON, ["tp1"], 2048, 8)
    ((first, second, done),) = search(small, found, found, 3)
    assert done.chips == 3 and done.ttft <= 1.0 and done.tpot <= 0.012
    assert {first, second} <= {"tp1", "dp2tp1"} and first != second
    never = replace(small, limits=Limits(tpot=1e-6))
    assert search(never, found, found, 3) == []
    with pytest.raises(ValueError, match="with --find give the layout of one server"):
        kinds(small, ON, ["dp2tp1"], 2048, 8)
    tiny = ON.with_chip(hbm_bytes=9_000_000_000)
    assert [layout for layout, _ in kinds(small, tiny, ["tp1"], 2048, 8)[1]] == ["tp1"]
