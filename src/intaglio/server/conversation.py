"""Renders conversations to prompt text: messages, tools and variables in the form that the chat template expects.

Templates that take no tools get them as text, by a plain default, and calls and their results as text too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from intaglio.llm import LLM
from intaglio.models import Tokenizer, TokenizerError
from intaglio.server.markup import (
    HERMES,
    PLAIN,
    Form,
    OutputStyle,
    begins_inside,
    form_of,
    parameters,
    takes_tools,
    thinking_of,
)
from intaglio.server.problem import Problem
from intaglio.server.protocol import Conversation, Message, RefusalPart

ContentFormat = Literal["text", "parts", "none"]
_formats: dict[str, ContentFormat] = {}  # by template
PROBE = "Qzx7probe"  # a text that no template holds
DEFAULT_TOOLS = """You may call these functions:
{tools}
To call one, answer with a line <tool_call>{{"name": NAME, "arguments": {{...}}}}</tool_call> for each call."""


@dataclass
class Rendered:
    """A prompt that the chat template has rendered from a request.

    Attributes:
        text: the prompt.
        style: the OutputStyle with which the model's output is parsed.
        ignored: names of request fields that had no effect, since the template does not read them.
    """

    text: str
    style: OutputStyle
    ignored: list[str] = field(default_factory=list)


def render(llm: LLM, body: Conversation, choice: Any = None, **wishes: Any) -> Rendered:
    """Render a conversation with the model's chat template. Returns a Rendered, which has the prompt's text.

    choice: the request's tool_choice. wishes: values for template variables that are only hints, such as
    reasoning_effort. The name of each hint that the template does not read is added to Rendered.ignored.

    Raises Problem in three cases: the model has no chat template; the template cannot express the conversation (its
    roles, user texts or tool calls); the template does not read a field that would change the answer. Raises
    TokenizerError if the template itself reports an error.
    """
    tokenizer = llm.model.tokenizer
    tools = body.tools or []
    template = tokenizer.template_for(bool(tools)) if tokenizer else None
    if tokenizer is None or template is None:
        why = f"{llm.model.path.name} has no chat template"
        raise Problem(400, f"{why}; use /v1/completions, or serve it with --chat-template FILE", param="messages")
    form, native = form_of(template), takes_tools(template)
    if tools and native and form is None and choice in (None, "auto"):
        why = "tools is not supported with tool_choice auto: the model's chat template has no known tool-call format"
        raise Problem(400, f"{why}; use tool_choice required, or a function's name", param="tools")
    form = form or (PLAIN if native else HERMES)
    out = Rendered("", OutputStyle())
    variables = _variables(template, body, wishes, out)
    messages = [_message(i, m, template, form, out) for i, m in enumerate(body.messages)]
    if native and tools:
        variables["tools"] = [tool.model_dump(exclude_none=True) for tool in tools]
    elif not native:
        shown = [tool.model_dump(exclude_none=True) for tool in tools] if choice != "none" else []
        messages = _as_text(messages, shown)
    content = content_format(tokenizer, template, variables)
    if content == "parts":
        messages = [_in_parts(m) for m in messages]
    elif content == "none":
        raise Problem(400, "the model's chat template leaves out the text of user messages", param="messages")
    out.text = _chat(tokenizer, messages, body, variables)
    _check_roles(body.messages, out.text)
    thinking, harmony = thinking_of(template), form.name == "harmony"
    reading = form if tools and choice != "none" else None
    known = parameters(tools) if reading else {}
    out.style = OutputStyle(reading, thinking, begins_inside(out.text, thinking), harmony=harmony, tools=known)
    return out


def _variables(template: str, body: Conversation, wishes: Mapping[str, Any], out: Rendered) -> dict[str, Any]:
    """Returns a dict of variables for the chat template: chat_template_kwargs, `documents`, and hints of the request.

    A hint is a request field, such as reasoning_effort, that has no effect if the template does not read it. A hint
    does not replace a variable that chat_template_kwargs sets. If the template reads enable_thinking but not
    reasoning_effort, the hint reasoning_effort becomes the variable enable_thinking: False for "none", True for any
    other value.

    Args:
        template: text of the chat template.
        body: the request.
        wishes: value of each hint by name; None for a hint that the request does not give.
        out: the names of hints that have no effect are added to out.ignored.

    Raises Problem if chat_template_kwargs has a variable that the server sets itself or that the template does not
    read.
    """
    given: dict[str, Any] = dict(body.chat_template_kwargs or {})
    reserved = sorted({"messages", "tools", "documents", "add_generation_prompt"} & given.keys())
    if reserved:
        raise Problem(400, f"chat_template_kwargs: {reserved[0]} is set by the request itself", param=reserved[0])
    if body.documents is not None:
        given["documents"] = body.documents
    if unread := sorted(name for name in given if not reads(template, name)):
        raise Problem(400, f"{unread[0]} is not supported: the model's chat template does not read it", param=unread[0])
    for name, value in wishes.items():
        if value is None:
            continue
        if reads(template, name):
            given.setdefault(name, value)
        elif name == "reasoning_effort" and reads(template, "enable_thinking"):
            given.setdefault("enable_thinking", value != "none")
        else:
            out.ignored.append(name)
    return given


def reads(template: str, name: str) -> bool:
    """True if the template contains `name` as a whole word."""
    return re.search(rf"\b{re.escape(name)}\b", template) is not None


def _message(i: int, m: Message, template: str, form: Form, out: Rendered) -> dict[str, Any]:
    """Returns message `m`, number `i` of the conversation, as a dict for the chat template.

    The content becomes plain text, and the arguments of tool calls become objects. A field that the API does not define
    is passed on if the template reads it; otherwise its name is added to out.ignored. Raises Problem if the content is
    missing or a field is not supported.
    """
    data: dict[str, Any] = {"role": "system" if m.role == "developer" else m.role}
    content = m.content
    if isinstance(content, list):
        content = "\n".join(part.refusal if isinstance(part, RefusalPart) else part.text for part in content)
    if content is None:
        content = m.refusal if m.refusal else "" if m.role == "assistant" else None
    if content is None:
        raise Problem(400, f"messages.{i}.content is missing", param=f"messages.{i}.content")
    data["content"] = content
    if m.name is not None:
        data["name"] = m.name
    reasoning = m.reasoning_content if m.reasoning_content is not None else m.reasoning
    if reasoning:
        data |= {"reasoning_content": reasoning, "reasoning": reasoning}
        if re.search(r"\.thinking\b|\[['\"]thinking['\"]\]", template):
            data["thinking"] = "\n".join(text for text in (reasoning, content if m.tool_calls else "") if text)
            data["content"] = "" if m.tool_calls else content
    if m.tool_calls:
        data["tool_calls"] = [_call(i, call, form) for call in m.tool_calls]
    if m.tool_call_id is not None:
        data["tool_call_id"] = _short(m.tool_call_id) if form.short_ids else m.tool_call_id
    for name, value in (m.model_extra or {}).items():
        if name in ("audio", "function_call"):
            why = f"messages.{i}.{name} is not supported here; leave it out"
            raise Problem(400, f"{why}, and use tool_calls" if name == "function_call" else why, param=name)
        if reads(template, name):
            data[name] = value
        else:
            out.ignored.append(f"messages.{i}.{name}")
    return data


def _call(i: int, call: Any, form: Form) -> dict[str, Any]:
    """Returns a tool call of an earlier message as a dict for the chat template, with the arguments as an object.

    i: number of the message, for the error text. Raises Problem if the call's arguments are not JSON.
    """
    try:
        arguments = json.loads(call.function.arguments) if call.function.arguments.strip() else {}
    except (ValueError, RecursionError):
        where = f"messages.{i}.tool_calls"
        raise Problem(400, f"{where}: the arguments of {call.id} are not JSON", param=where) from None
    id = {"id": _short(call.id) if form.short_ids else call.id} if call.id is not None else {}
    return {**id, "type": "function", "function": {"name": call.function.name, "arguments": arguments or {}}}


def _short(id: str) -> str:
    """Returns the last nine letters and digits of a tool-call id, the form that Mistral's templates require.

    An id with fewer than nine letters and digits is padded with zeros in front.
    """
    return re.sub("[^a-zA-Z0-9]", "", id)[-9:].rjust(9, "0")


def _as_text(messages: list[dict[str, Any]], tools: Sequence[Any]) -> list[dict[str, Any]]:
    """Returns a copy of the messages in which tool calls and tool results are plain text.

    It is for chat templates that do not know tools. The descriptions of `tools` are added to the system message; a
    system message is created if there is none.
    """
    out: list[dict[str, Any]] = []
    for m in messages:
        m = dict(m)
        if m["role"] == "tool":
            m = {"role": "user", "content": f"<tool_response>\n{m['content']}\n</tool_response>"}
            if out and out[-1]["role"] == "user" and out[-1]["content"].endswith("</tool_response>"):
                out[-1] = {"role": "user", "content": f"{out[-1]['content']}\n{m['content']}"}
                continue
        elif calls := m.pop("tool_calls", None):
            written = [f"<tool_call>{json.dumps(c['function'], ensure_ascii=False)}</tool_call>" for c in calls]
            m["content"] = "\n".join([*([m["content"]] if m["content"] else []), *written])
        out.append(m)
    if tools:
        listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        text = DEFAULT_TOOLS.format(tools=listed)
        if out[0]["role"] == "system":
            out[0] = {**out[0], "content": f"{out[0]['content']}\n\n{text}"}
        else:
            out.insert(0, {"role": "system", "content": text})
    return out


def _in_parts(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def content_format(tokenizer: Tokenizer, template: str, variables: Mapping[str, Any]) -> ContentFormat:
    """Returns the form in which a chat template expects a message's content: "text", "parts" or "none".

    - "text": the template writes the content if it is a string.
    - "parts": the template writes the content only if it is a list of typed parts.
    - "none": the template leaves out the content in both forms.

    The function renders a test message in both forms to find out, and caches the result for each template. If the
    template reports an error for a test message and neither form works, the form is unknown and "text" is returned.

    variables: the template's variables; only `tools` is used for the test.
    """
    if template not in _formats:
        _formats[template] = _probe(tokenizer, {"tools": variables["tools"]} if "tools" in variables else {})
    return _formats[template]


def _probe(tokenizer: Tokenizer, variables: Mapping[str, Any]) -> ContentFormat:
    parts = [{"type": "text", "text": PROBE}]
    refused = 0
    given: tuple[tuple[ContentFormat, Any], ...] = (("text", PROBE), ("parts", parts))
    for form, content in given:
        try:
            if PROBE in tokenizer.chat([{"role": "user", "content": content}], **variables):
                return form
        except TokenizerError:  # a template may ask for more than one message
            refused += 1
    return "text" if refused else "none"


def _chat(tokenizer: Tokenizer, messages: list[dict[str, Any]], body: Conversation, variables: dict[str, Any]) -> str:
    """Render the conversation with the chat template. Returns the text of the prompt.

    If the request sets continue_final_message, the prompt ends right after the last message's text.

    The server may have added a system message that lists the tools. If the template refuses this message, its text is
    put in front of the first user message instead.

    Raises Problem if the last message cannot be continued, or if the request sets both continue_final_message and
    add_generation_prompt. Raises TokenizerError if the template refuses the conversation.
    """
    cut = bool(body.continue_final_message)
    if cut and body.add_generation_prompt:
        why = "continue_final_message and add_generation_prompt exclude each other; leave one out"
        raise Problem(400, why, param="continue_final_message")
    prompt = not cut and body.add_generation_prompt is not False
    try:
        text = tokenizer.chat(messages, add_generation_prompt=prompt, **variables)
    except TokenizerError:
        merged = _without_system(messages)
        if merged is None or body.messages[0].role in ("system", "developer"):
            raise
        text = tokenizer.chat(merged, add_generation_prompt=prompt, **variables)
    return _open_final_message(text, body.messages[-1]) if cut else text


def _without_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """Returns a new list of the messages, without the system message. Its text is put before the first user message.

    Returns None unless the conversation begins with a system message and a user message whose contents are strings.
    """
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return None
    if not all(isinstance(m["content"], str) for m in messages[:2]):
        return None
    content = f"{messages[0]['content']}\n\n{messages[1]['content']}"
    return [{**messages[1], "content": content}, *messages[2:]]


def _open_final_message(text: str, message: Message) -> str:
    """Returns the prompt `text`, cut right after the final message's text, so that the model continues this message.

    If the message's text occurs several times in the prompt, the last occurrence counts. If it does not occur, it is
    searched without the white space at its ends.

    Raises Problem if the message has no text, or if neither form of its text occurs in the prompt.
    """
    content = message.content if isinstance(message.content, str) else "".join(
        part.text for part in message.content or () if not isinstance(part, RefusalPart)
    )  # fmt: skip
    wanted = content if text.rfind(content) >= 0 else content.strip()
    at = text.rfind(wanted)
    if not wanted.strip() or at < 0:
        why = "continue_final_message: the final message has no text that the chat template writes as it stands"
        raise Problem(400, why, param="continue_final_message")
    return text[: at + len(wanted)]


def _check_roles(messages: Sequence[Message], text: str) -> None:
    """Raise Problem if the chat template has left out a message whose role it does not know. Returns nothing.

    Only messages with another role than system, developer, user, assistant or tool are checked. Each text of such a
    message must occur in the rendered prompt `text`.
    """
    for i, m in enumerate(messages):
        if m.role in ("system", "developer", "user", "assistant", "tool"):
            continue
        parts = [m.content] if isinstance(m.content, str) else [p.text for p in m.content or () if p.type == "text"]
        if any(part.strip() not in text for part in parts):
            known = "'system', 'developer', 'user', 'assistant', 'tool'"
            why = f"messages.{i}.role is {m.role!r}, which the model's chat template leaves out; allowed: {known}"
            raise Problem(400, why, param=f"messages.{i}.role")
