"""The formats of tool calls and of reasoning, and how the format is recognised from a chat template."""

from __future__ import annotations

import re
from dataclasses import dataclass

from intaglio.server.markup import harmony, marked
from intaglio.server.markup.json_calls import enclosed, plain
from intaglio.server.markup.pythonic import pythonic
from intaglio.server.markup.source import Reading
from intaglio.server.markup.tagged import DSML, GLM, INVOKE, QWEN, tagged


@dataclass(frozen=True)
class Form:
    """The format in which one model family writes tool calls in its output.

    Attributes:
        name: name of the format, its key in FORMS.
        read: function that parses the calls.
        openers: delimiters in the output; a call begins after one of them.
        bare: True if calls may also stand at the beginning of the output without a delimiter. Such a call counts only
            if it names a tool of the request.
        ends_reasoning: True if a delimiter of `openers` inside reasoning ends the reasoning.
        short_ids: True if ids of calls must have exactly nine letters or digits.
        single: True if a message may have at most one call.
        marks: delimiters that detokenization must keep in the text even if they are special tokens, for the parser.
    """

    name: str
    read: Reading
    openers: tuple[str, ...] = ()
    bare: bool = False
    ends_reasoning: bool = False
    short_ids: bool = False
    single: bool = False
    marks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Thinking:
    """Delimiters of reasoning in a model's output.

    Attributes:
        begin: delimiter before the reasoning.
        end: delimiter after the reasoning.
        dropped: delimiters around the final answer, such as <answer> and </answer>, which are removed from the content.
            They come in pairs: an opening one, then its closing one.
    """

    begin: str
    end: str
    dropped: tuple[str, ...] = ()


HERMES = Form("hermes", tagged("</tool_call>", QWEN, GLM), ("<tool_call>",), marks=("<tool_call>", "</tool_call>"))
PLAIN = Form("plain", plain, bare=True)
FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        Form("harmony", plain, single=True, marks=harmony.MARKS),
        Form(
            "deepseek", marked.deepseek, (marked.DEEPSEEK["calls"], marked.DEEPSEEK["call"]), ends_reasoning=True,
            marks=(*marked.DEEPSEEK.values(),),
        ),
        Form(
            "dsml", tagged("</｜DSML｜function_calls>", DSML), ("<｜DSML｜function_calls>",),
            marks=("｜DSML｜", "<｜DSML｜function_calls>", "</｜DSML｜function_calls>"),
        ),
        Form(
            "kimi", marked.kimi, (marked.KIMI["calls"], marked.KIMI["call"]), ends_reasoning=True,
            marks=(*marked.KIMI.values(),),
        ),
        Form(
            "minimax", tagged("</minimax:tool_call>", INVOKE), ("<minimax:tool_call>",),
            marks=("<minimax:tool_call>", "</minimax:tool_call>"),
        ),
        Form("minimax-m1", enclosed("</tool_calls>"), ("<tool_calls>",), marks=("<tool_calls>", "</tool_calls>")),
        Form("qwen-coder", HERMES.read, HERMES.openers, marks=HERMES.marks),
        Form("glm", HERMES.read, HERMES.openers, marks=HERMES.marks),
        Form(
            "cohere", enclosed(marked.END_ACTION), (marked.ACTION,), marks=(marked.ACTION, marked.END_ACTION)
        ),
        Form(
            "granite", enclosed("<|/tool_call|>", "</tool_call>"), ("<|tool_call|>", "<tool_call>"),
            marks=("<|tool_call|>", "<|/tool_call|>"),
        ),
        HERMES,
        Form(
            "mistral-args", marked.mistral, (marked.MISTRAL,), bare=True, short_ids=True,
            marks=(marked.MISTRAL, marked.ARGS, marked.CALL_ID),
        ),
        Form("mistral", marked.mistral, (marked.MISTRAL,), bare=True, short_ids=True, marks=(marked.MISTRAL,)),
        Form(
            "olmo", pythonic("</function_calls>"), ("<function_calls>",),
            marks=("<function_calls>", "</function_calls>"),
        ),
        Form(
            "llama4", pythonic("<|python_end|>"), ("<|python_start|>",), bare=True,
            marks=("<|python_start|>", "<|python_end|>"),
        ),
        Form("pythonic", pythonic(), ("<|python_tag|>",), bare=True, marks=("<|python_tag|>",)),
        Form("llama", pythonic(), ("<|python_tag|>",), bare=True, single=True, marks=("<|python_tag|>",)),
        PLAIN,
    )
}  # fmt: skip
SIGNS = (  # a regular expression that a chat template matches, and the form it tells; the first that matches counts
    (r"<\|channel\|>", "harmony"),
    ("｜DSML｜", "dsml"),
    ("<｜tool▁calls▁begin｜>", "deepseek"),
    (r"<\|tool_calls_section_begin\|>|<\|tool_call_begin\|>", "kimi"),
    ("<minimax:tool_call>", "minimax"),
    ("<tool_calls>", "minimax-m1"),
    ("<function=", "qwen-coder"),
    ("<arg_key>", "glm"),
    (r"<\|START_ACTION\|>", "cohere"),
    (r"<\|tool_call\|>", "granite"),
    ("<tool_call>", "hermes"),
    (r"\[ARGS\]", "mistral-args"),
    (r"\[TOOL_CALLS\]", "mistral"),
    ("<function_calls>", "olmo"),
    (r"<\|python_start\|>", "llama4"),
    (r"\[func_name1\(", "pythonic"),
    ('"parameters"', "llama"),
)
ANSWER = ("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>")
THINKING = (
    Thinking("<|START_THINKING|>", "<|END_THINKING|>", ANSWER),
    Thinking("<think>", "</think>"),
    Thinking("[THINK]", "[/THINK]"),
    Thinking("Here is my thought process:", "Here is my response:"),
)


def form_of(template: str | None) -> Form | None:
    """Returns the Form in which a chat template expects tool calls; None if it is unknown.

    Returns None also if the template takes no tools.
    """
    if not takes_tools(template):
        return None
    return next((FORMS[name] for sign, name in SIGNS if re.search(sign, template or "")), None)


def takes_tools(template: str | None) -> bool:
    """True if a chat template reads the variable `tools`, so that the template writes the tools into the prompt itself.

    False if there is no template (None).
    """
    return template is not None and re.search(r"\btools\b", template) is not None


def thinking_of(template: str | None) -> Thinking | None:
    """Returns the delimiters that a chat template puts around reasoning; None if it uses no known ones.

    They are the first Thinking in THINKING whose end delimiter occurs in the template. Returns None also if there is no
    template (None).
    """
    return next((t for t in THINKING if template and t.end in template), None)
