"""Reasoning and tool calls parsed from streamed text: any division into pieces gives the same parts.

No text is lost; formats are recognised by their templates; grammars allow what the parsers read.
"""

from __future__ import annotations

import json
import random
from itertools import pairwise
from typing import Any

import pytest
import tokenizers
from llguidance import LLMatcher, LLTokenizer

from intaglio.model import BUNDLED
from intaglio.models.text.grammar import JSON_STYLE
from intaglio.server.markup import (
    FORMS,
    CallStart,
    OutputStyle,
    Reader,
    TextDelta,
    Thinking,
    after_analysis,
    after_reasoning,
    begins_inside,
    call_grammar,
    form_of,
    thinking_of,
)
from intaglio.server.markup.harmony import MARKS

MAYBE = {"anyOf": [{"type": "string"}, {"type": "null"}]}
TOOLS: dict[str, Any] = {
    "f": {
        "type": "object",
        "properties": {"a": {"type": "array"}, "s": {"type": "string"}, "n": {"type": "integer"}, "o": MAYBE},
    },
    "g": {"type": "object"},
}
THINK, COHERE = thinking_of("<think></think>"), thinking_of("<|END_THINKING|>")
CALL = '{"name": "f", "arguments": {"a": [1, "é"]}}'
LLAMA = '{"name": "f", "parameters": {"a": [1, "é"]}}'
F, G, S = ("f", '{"a": [1, "é"]}'), ("g", "{}"), ("f", '{"s": "x"}')
QWEN = (
    "<tool_call>\n<function=f>\n<parameter=s>\nx </parameter> y\n</parameter>\n<parameter=n>\n5\n</parameter>\n"
    "</function>\n</tool_call>\n<tool_call>\n<function=g>\n</function>\n</tool_call>"
)
GLM = "<tool_call>f\n<arg_key>s</arg_key>\n<arg_value>x y</arg_value>\n<arg_key>n</arg_key>\n<arg_value>5</arg_value>\n"
MINIMAX = (
    '<minimax:tool_call>\n<invoke name="f">\n<parameter name="s">x</parameter>\n<parameter name="n">5</parameter>\n'
    '</invoke>\n<invoke name="g">\n</invoke>\n</minimax:tool_call>'
)  # fmt: skip
DSML = (
    '<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="s" string="true">x'
    "</｜DSML｜parameter>\n"
    "</｜DSML｜invoke>\n</｜DSML｜function_calls>"
)
V3 = (
    "hi<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{\"s\": \"x\"}\n```"
    "<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)  # fmt: skip
V31 = '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"s": "x"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
KIMI = (
    '<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"s": "x"}'
    "<|tool_call_end|><|tool_calls_section_end|>"
)
ACTION = '<|START_ACTION|>[\n {"tool_call_id": "0", "tool_name": "f", "parameters": {"s": "x"}}\n]<|END_ACTION|>'
ANALYSIS = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"


def read(
    text: str, cuts: list[int], form: str | None, thinking: Thinking | None = None, inside: bool = False
) -> tuple[str, str, list[tuple[str, str]]]:
    """(reasoning, content, calls) of a text fed in pieces cut at these places."""
    style = OutputStyle(FORMS[form] if form else None, thinking, inside, harmony=form == "harmony", tools=TOOLS)
    reader, said, calls = Reader(style), {"reasoning": "", "content": ""}, list[tuple[str, str]]()
    parts = [text[a:b] for a, b in pairwise([0, *sorted(cuts), len(text)])]
    for i, part in enumerate(parts):
        for new in reader.feed(part, last=i == len(parts) - 1):
            if isinstance(new, TextDelta):
                said[new.role] += new.text
            elif isinstance(new, CallStart):
                calls.append((new.name, ""))
            else:
                calls[-1] = (calls[-1][0], calls[-1][1] + new.text)
    assert reader.source.held == "" and reader.calls == len(calls)
    return said["reasoning"], said["content"], calls


@pytest.mark.parametrize(
    ("text", "form", "thinking", "inside", "wanted"),
    [
        ("plain < text > with { } [", None, THINK, False, ("", "plain < text > with { } [", [])),
        ("why</think>\n\nso", None, THINK, True, ("why", "so", [])),
        ("\n<think>\nwhy</think>so <think>", None, THINK, False, ("\nwhy", "so <think>", [])),
        ("never ends", None, THINK, True, ("never ends", "", [])),
        ("[THINK]w[/THINK]so", None, thinking_of("[/THINK]"), False, ("w", "so", [])),
        ("Here is my thought process: w Here is my response:\nso", None, thinking_of("Here is my response:"), False,
         (" w ", "so", [])),
        (f"<think>w</think>\n<tool_call>\n{CALL}\n</tool_call>", "hermes", THINK, False, ("w", "", [F])),
        (f"Hm. <tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>", "hermes", THINK, False,
         ("", "Hm. ", [F, F])),
        (f" \n <tool_call>{CALL}</tool_call> \n <tool_call>{CALL}</tool_call> ", "hermes", None, False,
         ("", " ", [F, F])),
        (f"<tool_call>{{</tool_call> <tool_call>{CALL}", "hermes", None, False, ("", "<tool_call>{</tool_call> ", [F])),
        ("<tool_call>{broken</tool_call>x", "hermes", None, False, ("", "<tool_call>{broken</tool_call>x", [])),
        ("a <tool_cal", "hermes", None, False, ("", "a <tool_cal", [])),
        ("", "hermes", None, False, ("", "", [])),
        # An end mark inside a string does not end the call; nor does one inside an argument between tags.
        ('<tool_call>{"name": "f", "arguments": {"s": "</tool_call>"}}</tool_call>', "hermes", None, False,
         ("", "", [("f", '{"s": "</tool_call>"}')])),
        ('<tool_call>{"name": "f", "arguments": {"s": "{\\"</tool_call>\\\\"}}</tool_call>x', "hermes", None, False,
         ("", "x", [("f", '{"s": "{\\"</tool_call>\\\\"}')])),
        # Sloppy calls whose meaning is plain.
        ('<tool_call>{"name": "f", "arguments": "{\\"s\\": \\"x\\"}"}</tool_call>', "hermes", None, False,
         ("", "", [S])),
        ('<tool_call>{"name": "g"}</tool_call>', "hermes", None, False, ("", "", [G])),
        ('<tool_call>{"name": "g", "arguments": null}</tool_call>', "hermes", None, False, ("", "", [G])),
        ('<tool_call>{"name": "g", "arguments": ""}</tool_call>', "hermes", None, False, ("", "", [G])),
        ('<tool_call>{"arguments": {"s": "a\nb\t"}, "name": "f"}</tool_call>', "hermes", None, False,
         ("", "", [("f", '{"s": "a\\nb\\t"}')])),
        (f"<tool_call>{CALL[:-1]}</tool_call>z", "hermes", None, False, ("", "z", [F])),
        (f"<tool_call>{CALL}}}</tool_call>z", "hermes", None, False, ("", "z", [F])),
        (f"<tool_call>[{CALL}]</tool_call>", "hermes", None, False, ("", "", [F])),
        ('<tool_call>{"name": "f", "arguments": {"s": "x', "hermes", None, False, ("", "", [("f", '{"s": "x')])),
        (f"ok\n{QWEN}", "qwen-coder", THINK, False, ("", "ok\n", [("f", '{"s": "x </parameter> y", "n": 5}'), G])),
        ("<tool_call>\n<function=f>\n<parameter=o>\nnull\n</parameter>\n<parameter=s>\n\n</parameter>\n</function>",
         "qwen-coder", None, False, ("", "", [("f", '{"o": null, "s": ""}')])),
        (f"{GLM}</tool_call>\n<tool_call>g\n</tool_call>", "glm", THINK, False,
         ("", "", [("f", '{"s": "x y", "n": 5}'), G])),
        ("<tool_call>f<arg_key>n</arg_key><arg_value>many</arg_value></tool_call>", "glm", None, False,
         ("", "", [("f", '{"n": "many"}')])),
        # Values that Python can read and JSON cannot express stay text.
        ("<tool_call>f<arg_key>a</arg_key><arg_value>[{1, 2}]</arg_value></tool_call>", "glm", None, False,
         ("", "", [("f", '{"a": "[{1, 2}]"}')])),
        ("<tool_call>f<arg_key>a</arg_key><arg_value>[NaN]</arg_value></tool_call>", "glm", None, False,
         ("", "", [("f", '{"a": "[NaN]"}')])),
        ("<tool_call>nothing known\n</tool_call>", "glm", None, False,
         ("", "<tool_call>nothing known\n</tool_call>", [])),
        (MINIMAX, "minimax", THINK, False, ("", "", [("f", '{"s": "x", "n": 5}'), G])),
        (DSML, "dsml", THINK, False, ("", "", [S])),
        (f"<tool_calls>\n{CALL}\n{CALL}\n</tool_calls>", "minimax-m1", THINK, False, ("", "", [F, F])),
        (f"[{CALL}, {CALL}]", "mistral", None, False, ("", "", [F, F])),
        (f"[TOOL_CALLS] [{CALL}]", "mistral", None, False, ("", "", [F])),
        (f"first[TOOL_CALLS] [{CALL}]", "mistral", None, False, ("", "first", [F])),
        ('[TOOL_CALLS]f[ARGS]{"s": "x"}[TOOL_CALLS]g[CALL_ID]abcdefghi[ARGS]{}', "mistral-args", None, False,
         ("", "", [S, G])),
        ("[1, 2]", "mistral", None, False, ("", "[1, 2]", [])),
        (f"<|python_tag|>{LLAMA}", "llama", None, False, ("", "", [F])),
        (f" {LLAMA}; {LLAMA}", "llama", None, False, ("", "", [F, F])),
        ('{"name": "Bob"}', "llama", None, False, ("", '{"name": "Bob"}', [])),
        ('{"answer": {"name": "f"}}', "llama", None, False, ("", '{"answer": {"name": "f"}}', [])),
        ("Hello {", "llama", None, False, ("", "Hello {", [])),
        ('[f(a=[1, "é"]), g()]', "pythonic", None, False, ("", "", [F, G])),
        ('[f(s="x), (y", o=None, n=-1)]', "pythonic", None, False,
         ("", "", [("f", '{"s": "x), (y", "o": null, "n": -1}')])),
        ("[x for x in y]", "pythonic", None, False, ("", "[x for x in y]", [])),
        ('<|python_start|>[f(s="x")]<|python_end|>', "llama4", None, False, ("", "", [S])),
        ('<function_calls>f(s="x")\ng()</function_calls>', "olmo", None, False, ("", "", [S, G])),
        (V3, "deepseek", THINK, False, ("", "hi", [S, G])),
        (f"w</think>{V31}", "deepseek", THINK, True, ("w", "", [S])),
        (f"<think>w{KIMI}", "kimi", THINK, False, ("w", "", [S])),
        (f"<|tool_call|>[{CALL}, {CALL}]", "granite", None, False, ("", "", [F, F])),
        (f"<|tool_call|>[{CALL}]<|/tool_call|>", "granite", None, False, ("", "", [F])),
        (f"<|START_THINKING|>plan<|END_THINKING|>{ACTION}", "cohere", COHERE, False, ("plan", "", [S])),
        ("<|START_THINKING|>plan<|END_THINKING|><|START_RESPONSE|>yes<|END_RESPONSE|>", "cohere", COHERE, False,
         ("plan", "yes", [])),
        (f"{ANALYSIS}<|channel|>final<|message|>Hello!<|return|>", "harmony", None, False, ("hm", "Hello!", [])),
        (f'{ANALYSIS}<|channel|>commentary to=functions.f <|constrain|>json<|message|>{{"s": "x"}}<|call|>', "harmony",
         None, False, ("hm", "", [S])),
        (f'{ANALYSIS} to=functions.f<|channel|>commentary json<|message|>{{"s": "x"}}', "harmony", None, False,
         ("hm", "", [S])),
        ("<|channel|>commentary<|message|>I will.<|end|><|start|>assistant<|channel|>final<|message|>So", "harmony",
         None, False, ("", "I will.So", [])),
        ("<|channel|>commentary to=functions.f<|message|>oops<|end|>", "harmony", None, False, ("", "oops", [])),
        ("no channel at all", "harmony", None, False, ("", "no channel at all", [])),
    ],
)  # fmt: skip
def test_however_it_is_cut(text: str, form: str | None, thinking: Any, inside: bool, wanted: Any) -> None:
    rng = random.Random()
    assert read(text, [], form, thinking, inside) == wanted
    assert read(text, list(range(len(text))), form, thinking, inside) == wanted
    for _ in range(100):
        cuts = [rng.randrange(len(text) + 1) for _ in range(rng.randrange(6))]
        assert read(text, cuts, form, thinking, inside) == wanted, cuts


def test_no_text_is_lost() -> None:
    rng = random.Random()
    bits = ["<tool_call>", "</tool_call>", "{", "}", "<", "<tool", "x", "\n", " ", '{"name": 5}', "<function=", '"']
    for _ in range(300):
        text = "x" + "".join(rng.choices(bits, k=rng.randrange(12)))
        cuts = [rng.randrange(len(text) + 1) for _ in range(4)]
        _, content, calls = read(text, cuts, "hermes")
        assert calls == [] and "".join(content.split()) == "".join(text.split())


def test_arguments_come_as_they_are_written() -> None:
    """Text inside an argument is handed on long before the call is complete."""
    openings = {
        "hermes": '<tool_call>{"name": "f", "arguments": {"s": "abc',
        "qwen-coder": "<tool_call>\n<function=f>\n<parameter=s>\nabc",
        "glm": "<tool_call>f\n<arg_key>s</arg_key>\n<arg_value>abc",
        "minimax": '<minimax:tool_call>\n<invoke name="f">\n<parameter name="s">abc',
        "deepseek": '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"s": "abc',
        "kimi": '<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"s": "abc',
        "mistral-args": '[TOOL_CALLS]f[ARGS]{"s": "abc',
        "llama": '{"name": "f", "parameters": {"s": "abc',
        "granite": '<|tool_call|>[{"name": "f", "arguments": {"s": "abc',
        "cohere": '<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "f", "parameters": {"s": "abc',
        "harmony": '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"s": "abc',
    }
    for name, text in openings.items():
        reader = Reader(OutputStyle(FORMS[name], harmony=name == "harmony", tools=TOOLS))
        parts = reader.feed(text)
        assert parts[0] == CallStart("f", "functions.f:0" if name == "kimi" else None), name
        assert "".join(p.text for p in parts[1:]) == '{"s": "abc', name  # type: ignore[union-attr]


def test_a_forced_call_leaves_no_content() -> None:
    for text in ("", "{", '{"na', '{"name": "f"'):
        reader = Reader(OutputStyle(FORMS["plain"], forced=True, tools=TOOLS))
        assert not any(isinstance(p, TextDelta) for p in reader.feed(text, last=True))


def test_forms_are_known_by_their_templates() -> None:
    def named(text: str) -> str | None:
        form = form_of("{% if tools %}" + text + "{% endif %}")
        return form.name if form else None

    signs = {
        "<tool_call>": "hermes", '{"name": x, "parameters": y}': "llama", "<tool_call><function=": "qwen-coder",
        "<tool_call>{name}<arg_key>": "glm", "[TOOL_CALLS]": "mistral", "[TOOL_CALLS]f[ARGS]": "mistral-args",
        "<|channel|>": "harmony", "<｜tool▁calls▁begin｜>": "deepseek", "<|tool_calls_section_begin|>": "kimi",
        "<minimax:tool_call>": "minimax", "<|tool_call|>": "granite", "<|START_ACTION|>": "cohere",
        "<function_calls>": "olmo", "<|python_start|>": "llama4", "[func_name1(params_name1=1)]": "pythonic",
    }  # fmt: skip
    assert {text: named(text) for text in signs} == signs
    assert form_of("{{ tools }}") is None and form_of("<tool_call>") is None and form_of(None) is None
    assert thinking_of("plain") is None and thinking_of(None) is None
    assert begins_inside("<assistant><think>\n", THINK) and not begins_inside("<think></think>\n", THINK)
    assert not begins_inside("<think>", None)


REFS: dict[str, Any] = {  # a schema with references to itself, as pydantic writes them
    "type": "object",
    "properties": {"x": {"$ref": "#/$defs/X"}},
    "required": ["x"],
    "additionalProperties": False,
    "$defs": {
        "X": {"type": "object", "properties": {"k": {"$ref": "#/$defs/Y"}}, "required": ["k"],
              "additionalProperties": False},
        "Y": {"enum": [1, 2]},
    },
}  # fmt: skip


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_grammar_allows_what_is_read_back(form: str, several: bool) -> None:
    """A text drawn at random from the grammar reads as calls whose arguments match."""
    tools = {"f": REFS, "g": {"type": "object", "properties": {}, "additionalProperties": False}}
    kind, source = call_grammar(FORMS[form], tools, several, {})
    tokenizer = LLTokenizer(str(BUNDLED / "tokenizer.json"))
    make = LLMatcher.grammar_from_lark
    grammar = LLMatcher.grammar_from_json_schema(source, defaults=JSON_STYLE) if kind == "json_schema" else make(source)
    rng = random.Random()
    matcher, ids = LLMatcher(tokenizer, grammar, log_level=0), list[int]()
    assert not matcher.is_error(), matcher.get_error()
    while not matcher.is_stopped():
        bits = matcher.compute_bitmask()
        allowed = [i for i in range(tokenizer.vocab_size) if bits[i // 8] >> i % 8 & 1]
        ids.append(tokenizer.eos_token if tokenizer.eos_token in allowed else rng.choice(allowed))
        assert matcher.try_consume_tokens([ids[-1]]) == 1
    text = tokenizer.decode_str([i for i in ids if i != tokenizer.eos_token])
    style = OutputStyle(FORMS[form], harmony=form == "harmony", forced=True, tools=tools)
    calls: list[list[str]] = []
    for part in Reader(style).feed(text, last=True):
        if isinstance(part, CallStart):
            calls.append([part.name, ""])
        else:
            assert not isinstance(part, TextDelta)
            calls[-1][1] += part.text
    assert calls, text
    for name, arguments in calls:
        found = json.loads(arguments)
        assert found == {} if name == "g" else name == "f" and found["x"]["k"] in (1, 2), text


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("marks", [("<think>", "</think>"), ("<|T|>", "<|/T|>", ("<|A|>", "<|/A|>"))])
def test_an_answer_may_follow_reasoning(special: bool, marks: Any) -> None:
    thinking = Thinking(*marks)
    accepts, ids = accepting(special, (thinking.end, *thinking.dropped))
    grammar = after_reasoning(thinking, ids)
    begin, close = thinking.dropped or ("", "")
    for reasoning in ("", "1 or\n[2]? 123 ", "<think"):
        assert accepts(grammar, f"{reasoning}{thinking.end}\n\n{begin}[1]{close}")
        assert accepts(grammar, f"{reasoning}{thinking.end}[1]")
        assert not accepts(grammar, f"{reasoning}{thinking.end}1") and not accepts(grammar, f"{reasoning}[1]")


@pytest.mark.parametrize("special", [False, True])
def test_an_answer_may_follow_analysis(special: bool) -> None:
    accepts, ids = accepting(special, MARKS)
    grammar = after_analysis(ids)
    analysis = "<|channel|>analysis<|message|>1, then [2]\n<|end|><|start|>assistant"
    for before in ("", analysis, analysis * 2):
        assert accepts(grammar, f"{before}<|channel|>final<|message|>[1]")
        assert accepts(grammar, f"{before}<|channel|>final <|constrain|>json<|message|>[1]")
        assert not accepts(grammar, f"{before}<|channel|>final<|message|>1") and not accepts(grammar, f"{before}[1]")


def accepting(special: bool, marks: Any) -> tuple[Any, dict[str, int]]:
    """Whether a grammar whose @answer is [1] accepts a text; and the ids of `marks`, if they are special tokens."""
    inner = tokenizers.Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
    if special:
        inner.add_special_tokens(list(marks))
    tokenizer = LLTokenizer(inner.to_str(), n_vocab=inner.get_vocab_size(), eos_token=[1])

    def accepts(grammar: str, text: str) -> bool:
        nested = {"grammars": [{"lark_grammar": grammar}, {"name": "answer", "lark_grammar": 'start: "[1]"'}]}
        matcher = LLMatcher(tokenizer, json.dumps(nested), log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        ids = inner.encode(text, add_special_tokens=False).ids
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    return accepts, {mark: inner.token_to_id(mark) for mark in marks} if special else {}
