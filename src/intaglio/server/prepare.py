"""From a body to what the engine is asked: prompts, sampling parameters, grammars. Runs in a thread of its own, for a
long prompt takes long to divide into tokens and a large schema to compile; nothing here awaits.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from intaglio.llm import LLM
from intaglio.runtime import Grammar, SamplingParams
from intaglio.server.driver import Job
from intaglio.server.markup import Form, begins_inside, call_grammar, form_of, reasons
from intaglio.server.problem import Problem
from intaglio.server.protocol import (
    Asked,
    ChatRequest,
    CompletionRequest,
    Conversation,
    Message,
    ResponseFormat,
    StructuredOutputs,
    Tool,
)

MOST_PROMPTS = 128  # in one completion request; more is several requests
COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for completions
OBJECT = {"type": "object"}


@dataclass(frozen=True)
class Limits:
    """What every request is held to. Seconds; None waits for ever."""

    timeout: float | None = None
    queue_timeout: float | None = None


@dataclass(frozen=True)
class Style:
    """How one chat's text is to be read."""

    form: Form | None
    reasons: bool
    inside: bool


def completion_jobs(llm: LLM, body: CompletionRequest, id: str, limits: Limits) -> list[Job]:
    """A job a prompt. Raises Problem, or what `told()` makes one."""
    prompts = _prompts(body.prompt)
    if body.max_tokens == 0 and not body.echo:
        raise Problem(400, "max_tokens is 0; allowed: 1 or more, or 0 with echo=true", param="max_tokens")
    choices, room = len(prompts) * (body.n or 1), llm.engine.max_waiting
    if choices > room:
        raise Problem(400, f"{len(prompts)} prompts and n={body.n or 1} are {choices} choices; allowed: up to {room}")
    grammar = _grammar(body.response_format, body.structured_outputs)
    jobs = []
    for i, prompt in enumerate(prompts):
        ids = encode(llm, prompt) if isinstance(prompt, str) else prompt
        most = _most(llm, len(ids), COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens, "max_tokens")
        scores = {"logprobs": body.logprobs or 0}
        if body.echo and body.logprobs is not None:
            scores["prompt_logprobs"] = body.logprobs
        params = _params(body, max_tokens=max(1, most), grammar=grammar, **scores)
        request, transcripts = llm.prepare(ids, params, name=f"prompt {i}", id=f"{id}-{i}", **_options(body, limits))
        jobs.append(Job(request, transcripts))
    return jobs


def chat_job(llm: LLM, body: ChatRequest, id: str, limits: Limits) -> tuple[Job, Style]:
    """The job of a conversation. Raises Problem, or what `told()` makes one."""
    prompt = render(llm, body, effort=body.reasoning_effort)
    template = llm.tokenizer.template if llm.tokenizer else None
    tools = body.tools or []
    form = form_of(template) if tools and body.tool_choice != "none" else None
    style = Style(form, reasons(template), begins_inside(prompt))
    grammar = _grammar(body.response_format, body.structured_outputs)
    forced = _forced(body, tools)
    if forced:
        if grammar:
            raise Problem(400, "tool_choice forces a call, so the format is given; leave one out", param="tool_choice")
        assert form
        grammar = Grammar(*call_grammar(form, forced))
    if grammar and style.inside:
        why = "the chat template has the model reason first, which no grammar allows; turn that off by"
        raise Problem(400, f"{why} chat_template_kwargs, such as enable_thinking=false", param="chat_template_kwargs")
    if body.top_logprobs is not None and not body.logprobs:
        raise Problem(400, "top_logprobs needs logprobs=true", param="top_logprobs")
    ids = encode(llm, prompt, special=False)
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise Problem(400, "max_tokens is the old name of max_completion_tokens; give one", param="max_tokens")
    asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    most = _most(llm, len(ids), asked, "max_completion_tokens")
    params = _params(body, max_tokens=most, grammar=grammar, logprobs=body.top_logprobs or 0)
    return Job(*llm.prepare(ids, params, name="the conversation", id=f"{id}-0", **_options(body, limits))), style


def encode(llm: LLM, text: str, special: bool = True) -> list[int]:
    """Token ids of a text; with `special`, those that the tokenizer adds by itself."""
    if llm.tokenizer is None:
        raise Problem(400, f"{llm.path.name} has no tokenizer; give token ids", param="prompt")
    return llm.tokenizer.encode(text, special)


def render(llm: LLM, body: Conversation, effort: str | None = None, **options: Any) -> str:
    """The prompt of a conversation by the model's chat template, which may use no field that it does not read."""
    tokenizer = llm.tokenizer
    if tokenizer is None or tokenizer.template is None:
        raise Problem(400, f"{llm.path.name} has no chat template; use /v1/completions", param="messages")
    extra: dict[str, Any] = dict(body.chat_template_kwargs or {})
    reserved = sorted({"messages", "tools", "add_generation_prompt"} & extra.keys())
    if reserved:
        raise Problem(400, f"chat_template_kwargs: {reserved[0]} is set by the request itself", param=reserved[0])
    if effort is not None:
        extra["reasoning_effort"] = effort
    unread = sorted(name for name in extra if not re.search(rf"\b{re.escape(name)}\b", tokenizer.template))
    if unread:
        raise Problem(400, f"{unread[0]} is not supported: the model's chat template does not read it", param=unread[0])
    if body.tools:
        if form_of(tokenizer.template) is None:
            raise Problem(400, "tools is not supported: the model's chat template takes none known here", param="tools")
        extra["tools"] = [tool.model_dump(exclude_none=True) for tool in body.tools]
    return tokenizer.chat([_message(i, m) for i, m in enumerate(body.messages)], **extra, **options)


def _message(i: int, m: Message) -> dict[str, Any]:
    """A message as templates know it: plain text, arguments as an object."""
    out: dict[str, Any] = m.model_dump(exclude_none=True)
    out["role"] = "system" if m.role == "developer" else m.role
    if isinstance(m.content, list):
        out["content"] = "\n".join(part.text for part in m.content)
    out.setdefault("content", "" if m.tool_calls else None)
    if out["content"] is None:
        raise Problem(400, f"messages.{i}.content is missing", param=f"messages.{i}.content")
    for call in out.get("tool_calls", ()):
        try:
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        except (ValueError, RecursionError):
            where = f"messages.{i}.tool_calls"
            raise Problem(400, f"{where}: the arguments of {call['id']} are not JSON", param=where) from None
    return out


def _forced(body: ChatRequest, tools: list[Tool]) -> dict[str, dict[str, Any]]:
    """The tools one of which must be called, with the schemas of their arguments; none if none must."""
    choice = body.tool_choice
    if choice in (None, "auto", "none"):
        return {}
    known: dict[str, dict[str, Any]] = {t.function.name: t.function.parameters or OBJECT for t in tools}
    if not known:
        raise Problem(400, "tool_choice needs tools", param="tool_choice")
    if isinstance(choice, str):
        return known
    assert choice
    name = choice.function.name
    if name not in known:
        raise Problem(400, f"tool_choice names {name!r}; tools has {', '.join(known)}", param="tool_choice")
    return {name: known[name]}


def _grammar(form: ResponseFormat | None, structured: StructuredOutputs | None) -> Grammar | None:
    asked: list[Grammar] = []
    if form and form.type == "json_object":
        asked.append(Grammar("json_schema", OBJECT))
    if form and form.type == "json_schema":
        if form.json_schema is None:
            raise Problem(400, "response_format.json_schema is missing", param="response_format.json_schema")
        asked.append(Grammar("json_schema", form.json_schema.schema_))
    elif form and form.json_schema is not None:
        where = "response_format.json_schema"
        raise Problem(400, f"{where} goes with type json_schema, not {form.type}", param=where)
    if structured:
        s = structured
        given = [
            Grammar("json_schema", s.json_) if s.json_ is not None else None,
            Grammar("regex", s.regex) if s.regex else None,
            Grammar("lark", s.grammar) if s.grammar else None,
            Grammar("regex", "|".join(map(re.escape, s.choice))) if s.choice else None,
        ]
        asked += [g for g in given if g]
    if len(asked) > 1:
        why = "response_format and structured_outputs: give one of json, regex, grammar, choice in all"
        raise Problem(400, why, param="structured_outputs")
    return asked[0] if asked else None


def _prompts(prompt: Any) -> list[str | list[int]]:
    """One prompt or many, text or ids, as a list."""
    prompts: list[str | list[int]] = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    if len(prompts) > MOST_PROMPTS:
        raise Problem(400, f"prompt has {len(prompts)} prompts; allowed: up to {MOST_PROMPTS}", param="prompt")
    return prompts


def _most(llm: LLM, prompt: int, asked: int | None, name: str) -> int:
    """Tokens to generate at most: as asked, or as many as there is room for."""
    context, room = llm.program.context, llm.engine.most_tokens(prompt)
    if room < 1:
        why = f"the prompt has {prompt} tokens, the context holds {context}; shorten it by {1 - room}"
        raise Problem(400, why, param="prompt", code="context_length_exceeded")
    if asked is not None and asked > room:
        why = f"{name} is {asked}, the prompt has {prompt} tokens, the context holds {context}; allowed: up to {room}"
        raise Problem(400, why, param=name, code="context_length_exceeded")
    return room if asked is None else asked


def _params(body: Asked, **more: Any) -> SamplingParams:
    """OpenAI's defaults where nothing is asked: temperature 1, and nothing cut off."""
    names = ("top_p", "n", "seed", "presence_penalty", "frequency_penalty", "min_p", "repetition_penalty", "ignore_eos")
    given = {name: value for name in names if (value := getattr(body, name)) is not None}
    return SamplingParams(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=max(0, body.top_k or 0),
        stop=body.stop or (),
        stop_token_ids=body.stop_token_ids or (),
        logit_bias={int(id): bias for id, bias in (body.logit_bias or {}).items()},
        **given,
        **more,
    )


def _options(body: Asked, limits: Limits) -> dict[str, Any]:
    """Fields of Request. A client may shorten the server's deadlines, not lengthen them."""
    return {
        "priority": body.priority or 0,
        "salt": body.cache_salt,
        "timeout": _shorter(body.timeout, limits.timeout),
        "queue_timeout": _shorter(body.queue_timeout, limits.queue_timeout),
    }


def _shorter(*seconds: float | None) -> float | None:
    return min((s for s in seconds if s is not None), default=None)
