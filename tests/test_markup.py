"""Reasoning and tool calls read out of streamed text: however it is cut, the same comes out, and no text is lost."""

from __future__ import annotations

import json
import random
from itertools import pairwise

import pytest

from intaglio.server.markup import FORMS, Call, Form, Reader, Said, begins_inside, call_grammar, form_of, reasons

TAGGED, LIST, WHOLE = FORMS["<tool_call>"], FORMS["[TOOL_CALLS]"], FORMS['"parameters"']
CALL = '{"name": "f", "arguments": {"a": [1, "é"]}}'
LLAMA = '{"name": "f", "parameters": {"a": [1, "é"]}}'
F = Call("f", '{"a": [1, "é"]}')


def read(text: str, cuts: list[int], form: Form | None, thinks: bool, inside: bool) -> tuple[str, str, list[Call]]:
    """(reasoning, content, calls) of a text fed in pieces cut at these places."""
    reader, said, calls = Reader(form, thinks, inside), {"reasoning": "", "content": ""}, []
    places = [0, *sorted(cuts), len(text)]
    parts = [text[a:b] for a, b in pairwise(places)]
    for i, part in enumerate(parts):
        for new in reader.feed(part, last=i == len(parts) - 1):
            if isinstance(new, Said):
                said[new.role] += new.text
            else:
                calls.append(new)
    assert reader.held == "" and reader.calls == len(calls)
    return said["reasoning"], said["content"], calls


@pytest.mark.parametrize(
    ("text", "form", "inside", "wanted"),
    [
        ("plain < text > with { } [", None, False, ("", "plain < text > with { } [", [])),
        ("why</think>\n\nso", None, True, ("why", "so", [])),
        ("\n<think>\nwhy</think>so <think>", None, False, ("\nwhy", "so <think>", [])),
        ("never ends", None, True, ("never ends", "", [])),
        (f"<think>w</think>\n<tool_call>\n{CALL}\n</tool_call>", TAGGED, False, ("w", "", [F])),
        (f"Hm. <tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>", TAGGED, False, ("", "Hm. ", [F, F])),
        (f" \n <tool_call>{CALL}</tool_call> \n <tool_call>{CALL}</tool_call> ", TAGGED, False, ("", " ", [F, F])),
        (f"<tool_call>{{</tool_call> <tool_call>{CALL}", TAGGED, False, ("", "<tool_call>{</tool_call> ", [F])),
        ("<tool_call>{broken</tool_call>x", TAGGED, False, ("", "<tool_call>{broken</tool_call>x", [])),
        (f"<tool_call>{CALL}", TAGGED, False, ("", "", [F])),
        ("a <tool_cal", TAGGED, False, ("", "a <tool_cal", [])),
        (f"[{CALL}, {CALL}]", LIST, False, ("", "", [F, F])),
        (f"[TOOL_CALLS] [{CALL}]", LIST, False, ("", "", [F])),
        ("[1, 2]", LIST, False, ("", "[1, 2]", [])),
        (f"<|python_tag|>{LLAMA}", WHOLE, False, ("", "", [F])),
        (f" {LLAMA}", WHOLE, False, ("", "", [F])),
        ('{"name": "f"}', WHOLE, False, ("", '{"name": "f"}', [])),
        ("Hello {", WHOLE, False, ("", "Hello {", [])),
        ("", TAGGED, False, ("", "", [])),
    ],
)  # fmt: skip
def test_however_it_is_cut(text: str, form: Form | None, inside: bool, wanted: tuple[str, str, list[Call]]) -> None:
    rng = random.Random()
    assert read(text, [], form, True, inside) == wanted
    assert read(text, list(range(len(text))), form, True, inside) == wanted
    for _ in range(300):
        cuts = [rng.randrange(len(text) + 1) for _ in range(rng.randrange(6))]
        assert read(text, cuts, form, True, inside) == wanted, cuts


def test_no_text_is_lost() -> None:
    rng = random.Random()
    bits = ["<tool_call>", "</tool_call>", "{", "}", "<", "<tool", "x", "\n", " ", '{"name": "f"}']
    for _ in range(300):
        text = "x" + "".join(rng.choices(bits, k=rng.randrange(12)))
        cuts = [rng.randrange(len(text) + 1) for _ in range(4)]
        _, content, calls = read(text, cuts, TAGGED, False, False)
        assert calls == [] and "".join(content.split()) == "".join(text.split())


def test_forms_are_known_by_their_templates() -> None:
    assert form_of("{% if tools %}<tool_call>{% endif %}") == TAGGED
    assert form_of('{% if tools %}{"name": x, "parameters": y}{% endif %}') == WHOLE
    assert form_of("{{ tools }}") is None and form_of("<tool_call>") is None and form_of(None) is None
    assert reasons("...</think>...") and not reasons("plain") and not reasons(None)
    assert begins_inside("<assistant><think>\n") and not begins_inside("<think></think>\n")


@pytest.mark.parametrize("form", FORMS.values())
def test_a_grammar_allows_what_is_read_back(form: Form) -> None:
    from llguidance import LLMatcher

    kind, text = call_grammar(form, {"f": {"type": "object"}, "g": {"type": "object"}})
    if kind == "lark":
        assert LLMatcher.validate_grammar(text) == ""
    else:
        assert [s["properties"]["name"] for s in json.loads(text)["anyOf"]] == [{"const": "f"}, {"const": "g"}]
