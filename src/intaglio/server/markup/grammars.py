"""Grammars of forced tool calls, with arguments that match the schemas of the tools; and of reasoning before an answer.

In formats whose arguments are not JSON, a forced call is JSON between the format's delimiters; the parsers accept both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

from intaglio.models.text.grammar import JSON_STYLE
from intaglio.server.markup import harmony, marked
from intaglio.server.markup.forms import Form, Thinking
from intaglio.server.markup.source import Tools

MAX_FORCED_CALLS = 16  # of one message
WRAPPED = {  # begin and end of calls that are JSON objects or lists
    "hermes": ("<tool_call>", "\n", "</tool_call>"),
    "qwen-coder": ("<tool_call>", "\n", "</tool_call>"),
    "glm": ("<tool_call>", "\n", "</tool_call>"),
    "minimax": ("<minimax:tool_call>", "\n", "</minimax:tool_call>"),
    "minimax-m1": ("<tool_calls>", "\n", "</tool_calls>"),
    "dsml": ("<｜DSML｜function_calls>", "\n", "</｜DSML｜function_calls>"),
    "olmo": ("<function_calls>", "", "</function_calls>"),
    "granite": ("<|tool_call|>", "", ""),
    "cohere": (marked.ACTION, "", marked.END_ACTION),
    "mistral": (marked.MISTRAL, "", ""),
}
GAP = "gap: /\\n{0,2}/"  # empty lines between reasoning and answer
LISTS = ("granite", "cohere", "mistral")


def call_grammar(
    form: Form, tools: Tools, several: bool, special: Mapping[str, int]
) -> tuple[Literal["lark", "json_schema"], str]:
    """Returns a grammar that forces the model to call tools, as (kind, the grammar's text).

    A call must name one of `tools` and must have the format `form`. The kind is "lark" or "json_schema". If `several`
    is True, the grammar allows 1 to MAX_FORCED_CALLS calls. If `several` is False, or if form.single is True, it allows
    exactly one call.

    special: the tokenizer's special tokens, text to id; a Lark grammar names them by id.
    """
    several = several and not form.single

    mark = partial(_mark, special=special)
    match form.name:
        case "harmony":
            head = f'{mark("<|channel|>")} "commentary to=functions.'
            tail = f'{mark("<|constrain|>")} "json" {mark("<|message|>")}'
            return _by_name(tools, lambda name, args: f'{head}{name} " {tail} {args}', "start: call")
        case "mistral-args":
            return _by_name(
                tools, lambda name, args: f'{mark(marked.MISTRAL)} "{name}" {mark(marked.ARGS)} {args}', _many(several)
            )
        case "deepseek":
            m = {key: mark(text) for key, text in marked.DEEPSEEK.items()}
            start = f"start: {m['calls']} calls {m['end_calls']}\n" + _many(several, "calls")
            return _by_name(tools, lambda name, args: f'{m["call"]} "{name}" {m["sep"]} {args} {m["end_call"]}', start)
        case "kimi":
            m = {key: mark(text) for key, text in marked.KIMI.items()}
            start = f"start: {m['calls']} calls {m['end_calls']}\n" + _many(several, "calls")
            number = "/[0-9]{1,2}/" if several else '"0"'
            return _by_name(
                tools,
                lambda name, args: f'{m["call"]} "functions.{name}:" {number} {m["sep"]} {args} {m["end_call"]}',
                start,
            )
    keys = {"cohere": ("tool_name", "parameters")}.get(form.name, ("name", "arguments"))
    if form.name in ("llama", "llama4", "pythonic"):
        keys = ("name", "parameters")
    extra = {"tool_call_id": {"type": "string", "pattern": "^[0-9]{1,2}$"}} if form.name == "cohere" else {}
    one = _object(tools, keys, extra)
    if form.name not in WRAPPED:
        return "json_schema", json.dumps(_list(one) if several and form.name == "plain" else one)
    begin, space, end = WRAPPED[form.name]
    schema = _list(one, MAX_FORCED_CALLS if several else 1) if form.name in LISTS else one
    gap = f" {json.dumps(space)} " if space else " "
    call = f"{mark(begin)}{gap}body{gap}{mark(end) if end else ''}"
    start = _many(several and form.name not in LISTS)
    return "lark", f"{start}\ncall: {call}\nbody: %json {json.dumps({**schema, 'x-guidance': JSON_STYLE})}"


def after_reasoning(thinking: Thinking, special: Mapping[str, int]) -> str:
    """Returns a Lark grammar, as text, for output that begins inside reasoning and continues with an answer.

    The grammar allows any text, then the end delimiter of the reasoning, then up to two line breaks, then the answer.
    The answer is the term @answer, which the grammar does not define: the caller adds the answer's own grammar under
    this name. Delimiters around the answer (`thinking.dropped`), such as <answer> and </answer>, are optional.

    special: the tokenizer's special tokens, text to id.
    """
    opening, closing = thinking.dropped[::2], thinking.dropped[1::2]
    answer = f"gap{_optional(opening, special)} @answer{_optional(closing, special)}"
    return f"start: reasoning {answer}\n{_until('reasoning', thinking.end, special)}\n{GAP}"


def after_analysis(special: Mapping[str, int]) -> str:
    """Returns a Lark grammar, as text, for harmony output: messages on channel analysis, then one on channel final.

    There may be any number of messages on the channel analysis. The text of the final message is the term @answer,
    which the grammar does not define: the caller adds the grammar of the answer under this name.

    special: the tokenizer's special tokens, text to id.
    """
    m = {text: _mark(text, special) for text in harmony.MARKS}
    channel, message, start = m[harmony.CHANNEL], m[harmony.MESSAGE], m[harmony.START]
    return "\n".join(
        (
            f'start: analysis* {channel} "final" (" "? {m[harmony.CONSTRAIN]} "json")? {message} @answer',
            f'analysis: {channel} "analysis" {message} reasoning {start} "assistant"',
            _until("reasoning", "<|end|>", special),
        )
    )


def _mark(text: str, special: Mapping[str, int]) -> str:
    """Returns the Lark term that matches the delimiter `text`.

    The term is the token's id if the delimiter is one of the tokenizer's special tokens, else a quoted string. special:
    the special tokens, text to id.
    """
    return f"<[{special[text]}]>" if text in special else json.dumps(text, ensure_ascii=False)


def _until(rule: str, end: str, special: Mapping[str, int]) -> str:
    """Returns a Lark rule, as text, that matches any text up to and including the first delimiter `end`.

    rule: name of the rule. special: the tokenizer's special tokens, text to id.
    """
    if end in special:
        return f"{rule}: /(?s:.*)/ {_mark(end, special)}"
    literal = re.escape(end).replace("/", r"\/")
    return f"{rule}[lazy]: /(?s:.*){literal}/"


def _optional(marks: Sequence[str], special: Mapping[str, int]) -> str:
    """Returns a Lark term, as text, that matches one of the delimiters `marks` or nothing.

    The term is "" if `marks` is empty.

    special: the tokenizer's special tokens, text to id. A delimiter that is a special token is matched as this token.
    """
    return f" ({' | '.join(_mark(m, special) for m in marks)})?" if marks else ""


def _many(several: bool, rule: str = "start") -> str:
    """Returns a Lark rule, as text, that matches one `call`, or up to MAX_FORCED_CALLS calls if `several` is True.

    Several calls are separated by line breaks. rule: name of the rule.
    """
    return f'{rule}: call ("\\n" call){{0,{MAX_FORCED_CALLS - 1}}}' if several else f"{rule}: call"


def _by_name(tools: Tools, write: Any, start: str) -> tuple[Literal["lark"], str]:
    """Returns ("lark", text of a Lark grammar) for a call of any tool.

    The grammar allows each tool only with arguments that match the tool's own schema. Its rule `call` has one
    alternative for each tool. start: text of the rules that refer to `call`. write: function that returns the text of
    one alternative; its arguments are the tool's name and the name of the rule that matches the tool's arguments.
    """
    rules = [start, "call: " + " | ".join(f"call{i}" for i in range(len(tools)))]
    for i, (name, schema) in enumerate(tools.items()):
        rules.append(f"call{i}: {write(name, f'args{i}')}")
        rules.append(f"args{i}: %json {json.dumps({**schema, 'x-guidance': JSON_STYLE})}")
    return "lark", "\n".join(rules)


def _object(tools: Tools, keys: tuple[str, str], extra: dict[str, Any]) -> dict[str, Any]:
    """Returns the JSON schema, as a dict, of a tool call that is written as a JSON object.

    keys: names of two fields of the object: the field for the tool's name and the field for its arguments. extra:
    schemas of other required fields, by name. The schemas of the tools' arguments are stored in $defs, and their
    references are adjusted to that place.
    """
    schemas = [
        {
            "type": "object",
            "properties": {**extra, keys[0]: {"const": name}, keys[1]: {"$ref": f"#/$defs/{_pointer(name)}"}},
            "required": [*extra, *keys],
            "additionalProperties": False,
        }
        for name in tools
    ]
    defs = {name: moved(schema, f"#/$defs/{_pointer(name)}") for name, schema in tools.items()}
    return {**(schemas[0] if len(schemas) == 1 else {"anyOf": schemas}), "$defs": defs}


def _list(schema: dict[str, Any], most: int = MAX_FORCED_CALLS) -> dict[str, Any]:
    items = {key: value for key, value in schema.items() if key != "$defs"}
    return {"type": "array", "items": items, "minItems": 1, "maxItems": most, "$defs": schema["$defs"]}


def moved(schema: Any, root: str) -> Any:
    """Returns a copy of a JSON schema that can be placed inside another schema.

    The references in it are adjusted: each reference "#REST" becomes `root` followed by REST. root: JSON pointer of the
    new place, beginning with "#".
    """
    if isinstance(schema, list):
        return [moved(item, root) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    out = {key: moved(value, root) for key, value in schema.items()}
    if isinstance(ref := out.get("$ref"), str) and ref.startswith("#"):
        out["$ref"] = root + ref[1:]
    return out


def _pointer(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
