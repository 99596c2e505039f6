"""Structured output: the text always matches its grammar; batches, drafts and preemption do not change it.

Also the matcher's rollback, the cache of compiled grammars, and grammars that are refused.
"""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest

from intaglio import LLM, SamplingParams
from intaglio.models import GrammarError, Grammars
from intaglio.runtime import Grammar, ParamsError

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["class", "def"]},
        "lines": {"type": "integer", "minimum": 1, "maximum": 999},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{1,5}$"}, "maxItems": 2},
    },
    "required": ["name", "kind", "lines", "tags"],
    "additionalProperties": False,
}
DATE = r"(19|20)\d\d-(0[1-9]|1[0-2])-[0-2]\d"
SUM = 'start: NUMBER ("+" NUMBER){1,3}\nNUMBER: /[1-9][0-9]?/'


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM()


def params(kind: str, source: Any, **options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=120, grammar=Grammar(kind, source), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("hot", [0.0, 1.5])
def test_text_matches(llm: LLM, hot: float) -> None:
    several = [
        params(kind, source, temperature=hot, seed=seed)
        for seed in range(6)
        for kind, source in (("json_schema", SCHEMA), ("regex", DATE), ("lark", SUM))
    ]
    for o, p in zip(llm.generate(["x = "] * len(several), several), several, strict=True):
        assert o.finish_reason == "stop", o
        assert p.grammar
        if p.grammar.kind == "json_schema":
            found = json.loads(o.text)
            assert found.keys() == set(SCHEMA["required"]) and len(found["name"]) <= 12
            assert found["kind"] in ("class", "def") and 1 <= found["lines"] <= 999
            assert len(found["tags"]) <= 2 and all(re.fullmatch("[a-z]{1,5}", t) for t in found["tags"])
        elif p.grammar.kind == "regex":
            assert re.fullmatch(DATE, o.text)
        else:
            assert re.fullmatch(r"[1-9]\d?(\+[1-9]\d?){1,3}", o.text)


def test_batch_drafts_and_preemption_change_no_structured_output(llm: LLM) -> None:
    example = '{"name": "a", "kind": "def", "lines": 12, "tags": []}\n'
    prompts = ["import json\n", example, "def f(x):\n    return "]
    several = [params("json_schema", SCHEMA, temperature=1.0, seed=i, n=2) for i in range(3)]
    want = llm.generate(prompts, several)
    assert len(want) == 6 and len({o.text for o in want}) > 3
    guessing, tight = LLM(max_drafts=4), LLM(kv_tokens=192, max_batch_tokens=9)
    for other in (guessing, tight):
        assert [(o.text, o.logprobs) for o in other.generate(prompts, several)] == [(o.text, o.logprobs) for o in want]
    assert guessing.engine.counts.accepted_tokens > 0 and tight.engine.counts.preemptions > 0


def test_log_probabilities_are_unmasked(llm: LLM) -> None:
    [o] = llm.generate(["import os"], params("regex", "[^ -~]{3}"))  # nothing the model would say
    [logits] = llm.logits([o.prompt_token_ids + o.token_ids])
    rows = logits[len(o.prompt_token_ids) - 1 : -1].astype(np.float64)
    own = rows - rows.max(axis=1, keepdims=True)
    own -= np.log(np.exp(own).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(o.logprobs, own[np.arange(len(rows)), o.token_ids], atol=1e-4)


def test_invalid_grammars_are_refused_before_running(llm: LLM) -> None:
    steps = llm.engine.counts.steps
    for kind, source, message in (
        ("regex", "([", "the regex cannot be used: .*unclosed"), ("lark", "start: x", "the lark cannot be used"),
        ("json_schema", {"type": "nonsense"}, "the json_schema cannot be used: .*nonsense"),
        ("json_schema", "{", "the json_schema "), ("regex", "([" + "x" * 999, "the regex cannot be used: .*unclosed"),
    ):  # fmt: skip
        with pytest.raises(GrammarError, match=message) as e:
            llm.generate(["a"], params(kind, source))
        assert "\n" not in str(e.value) and len(str(e.value)) < 240
    assert llm.engine.counts.steps == steps
    for kind, source, options in (("yaml", "x", {}), ("regex", {}, {}), ("regex", "x", {"ignore_eos": True})):
        with pytest.raises(ParamsError, match="; allowed: "):
            params(kind, source, **options)


def test_matcher_rollback_restores_state(llm: LLM) -> None:
    assert llm.model.tokenizer
    grammars, eos = Grammars(llm.model.tokenizer, llm.model.program.vocabulary + 40), llm.model.tokenizer.eos_ids[0]
    a, b, z = (llm.model.tokenizer.encode(c, special=False)[0] for c in "abz")
    m = grammars.matcher("regex", "a?b{2,3}")

    def allowed() -> set[int]:
        return set(np.flatnonzero(np.unpackbits(m.mask().view(np.uint8), bitorder="little")).tolist())

    first = allowed()
    assert {a, b} <= first and eos not in first and max(first) < llm.model.program.vocabulary
    assert m.advance(b) and m.advance(b) and eos in allowed() and a not in allowed()
    assert not m.advance(z) and m.advance(b) and allowed() == {eos}
    other = m.copy()
    m.rollback(2)
    assert other.mask().tolist() != m.mask().tolist()
    assert not m.advance(a) and m.advance(b) and eos in allowed()
    m.rollback(2)
    assert allowed() == first == set(np.flatnonzero(
        np.unpackbits(grammars.matcher("regex", "a?b{2,3}").mask().view(np.uint8), bitorder="little")
    ).tolist())  # fmt: skip


def test_compiled_grammars_are_cached_with_a_limit(llm: LLM) -> None:
    assert llm.model.tokenizer
    grammars = Grammars(llm.model.tokenizer, llm.model.program.vocabulary)
    for i in range(70):
        grammars.matcher("regex", f"x{{{i}}}")
    assert len(grammars.compiled) == 64 and ("regex", "x{69}", "") in grammars.compiled


@pytest.mark.parametrize("kind, source, good, bad", [
    ("json_schema", '{"type": "object", "properties": {"a": {"type": "integer"}}}', '{"a": 12}', "[1]"),
    ("regex", "[0-9]{2}/x", "12/x", "1/x"),
    ("lark", 'start: "<" start2 ">"\nstart2: /[a-z]+/', "<ab>", "<1>"),
])  # fmt: skip
def test_a_grammar_can_stand_after_other_text(llm: LLM, kind: str, source: str, good: str, bad: str) -> None:
    assert llm.model.grammars and llm.model.tokenizer

    def accepted(text: str) -> bool:
        assert llm.model.grammars and llm.model.tokenizer
        matcher = llm.model.grammars.matcher(kind, source, "start: /[a-z ]*;/ @answer")
        whole = all(matcher.advance(token) for token in llm.model.tokenizer.encode(text, special=False))
        [eos] = llm.model.eos_ids
        return whole and bool(matcher.mask()[eos // 32] >> eos % 32 & 1)

    assert accepted(f"any words;{good}") and accepted(f";{good}")
    assert not accepted(good) and not accepted(f"any words;{bad}") and not accepted("any words;")
