"""Converts request bodies to engine requests: prompts, sampling parameters, grammars.

Runs in a separate thread, because long prompts are slow to tokenize and large schemas slow to compile. That thread must
not call the engine; it uses `llm.admission`, which is thread-safe.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from intaglio.llm import LLM
from intaglio.runtime import Grammar, SamplingParams
from intaglio.server.conversation import render
from intaglio.server.driver import Prepared
from intaglio.server.markup import OutputStyle, after_analysis, after_reasoning, call_grammar, parameters
from intaglio.server.problem import Problem
from intaglio.server.protocol import (
    HINTS,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    ResponseFormat,
    StructuredOutputs,
    Tool,
)

MAX_PROMPTS = 128  # in one completion request
COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for completions
OBJECT = {"type": "object"}
SAME = {  # fields that SamplingParams has under the same name
    "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "stop",
    "stop_token_ids", "ignore_eos", "min_tokens", "allowed_token_ids", "bad_words", "logprob_token_ids",
    "include_stop_str_in_output", "skip_special_tokens",
}  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """The server's own time limits for every request.

    Both are in seconds from the request's arrival; None: no limit. `timeout`: the request must end within this time.
    `queue_timeout`: its first step must begin within this time.
    """

    timeout: float | None = None
    queue_timeout: float | None = None


@dataclass(frozen=True)
class Settings:
    """Settings that the server adds to every request of a model: timeouts, and the checkpoint's sampling defaults."""

    limits: Limits = Limits()
    defaults: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reading:
    """Settings with which the output of one prompt is turned into the response.

    Attributes:
        style: how to parse the text of a chat into reasoning, content and tool calls.
        ignored: names of request fields that had no effect.
        echo: text to put in front of the output, if the request asked for echo; "" if it did not.
        prefix: number of tokens at the prompt's beginning, such as BOS, that have no text in `echo`.
        suffix: number of tokens at the prompt's end, such as EOS, that have no text in `echo`.
    """

    style: OutputStyle
    ignored: tuple[str, ...] = ()
    echo: str = ""
    prefix: int = 0
    suffix: int = 0


def prepare_completion(
    llm: LLM, body: CompletionRequest, id: str, settings: Settings
) -> tuple[list[Prepared], list[Reading]]:
    """Returns two lists for a completion request, with one Prepared and one Reading for each prompt.

    A Prepared holds the engine's request for a prompt. A Reading says how to turn its output into the response.

    id: id of the response, from which the ids of the engine's requests are made. settings: what the server adds to
    every request. Raises Problem, or an error that as_problem() converts to one, if the request is invalid.
    """
    prompts = _prompts(body.prompt)
    if body.max_tokens == 0 and not body.echo:
        raise Problem(400, "max_tokens is 0; allowed: 1 or more, or 0 with echo=true", param="max_tokens")
    choices, room = len(prompts) * candidates(body), llm.admission.max_waiting
    if choices > room:
        raise Problem(
            400, f"{len(prompts)} prompts and n={candidates(body)} are {choices} choices; allowed: up to {room}"
        )
    if body.logprob_token_ids and body.logprobs is None:
        raise Problem(400, "logprob_token_ids needs logprobs", param="logprob_token_ids")
    grammar = _grammar(body.response_format, body.structured_outputs)
    prepared, readings = [], []
    for i, prompt in enumerate(prompts):
        special = body.add_special_tokens is not False
        whole = encode(llm, prompt, special) if isinstance(prompt, str) else prompt
        asked = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        ids = _truncated(llm, body, whole, asked)
        most = _max_tokens(llm, len(ids), asked, "max_tokens")
        scores: dict[str, Any] = {"logprobs": body.logprobs or 0}
        if body.echo and body.logprobs is not None:
            scores["prompt_logprobs"] = body.logprobs
        params = _params(body, settings, max_tokens=max(1, most), grammar=grammar, **scores)
        options = _options(body, settings.limits)
        request, transcripts = llm.prepare(ids, params, name=f"prompt {i}", id=f"{id}-{i}", **options)
        prepared.append(Prepared(request, transcripts))
        readings.append(Reading(OutputStyle(), tuple(hints(body)), *_echo(llm, body, prompt, ids)))
    return prepared, readings


def _echo(llm: LLM, body: CompletionRequest, prompt: str | list[int], ids: list[int]) -> tuple[str, int, int]:
    """Returns (text, before, after): the text to echo, and how many special tokens the prompt has around it.

    before, after: numbers of tokens that the tokenizer has added at the beginning and at the end of the prompt, such as
    BOS and EOS; they have no characters in the text. If the request does not ask for echo, the result is ("", 0, 0).

    If the prompt was given as token ids or has been cut, the text is decoded from `ids`. It then shows special tokens
    too, so both numbers are 0.

    Args:
        llm: the model.
        body: the request.
        prompt: the prompt in the form in which it was given, a text or token ids.
        ids: token ids of the prompt as the engine gets it.

    Raises Problem if the text must be decoded and the model has no tokenizer.
    """
    if not body.echo:
        return "", 0, 0
    if isinstance(prompt, str):
        bare = encode(llm, prompt, special=False)
        for after in range(len(ids) - len(bare) + 1):
            before = len(ids) - len(bare) - after
            if ids[before : before + len(bare)] == bare:
                return prompt, before, after
    if llm.model.tokenizer is None:
        raise Problem(400, f"{llm.model.path.name} has no tokenizer; leave echo out", param="echo")
    return llm.model.tokenizer.decode(ids, skip_special=False), 0, 0


def prepare_chat(llm: LLM, body: ChatRequest, id: str, settings: Settings) -> tuple[Prepared, Reading]:
    """Returns (Prepared, Reading) for a chat request.

    Prepared: the engine's request. Reading: how the output becomes the response.

    id: id of the response, from which the id of the engine's request is made. settings: what the server adds to every
    request. Raises Problem, or an error that as_problem() converts to one, if the request is invalid.
    """
    tools = body.tools or []
    forced = _forced(body, tools)
    wishes = {"reasoning_effort": body.reasoning_effort, "verbosity": body.verbosity}
    rendered = render(llm, body, body.tool_choice, **wishes)
    style = rendered.style
    grammar = _grammar(body.response_format, body.structured_outputs)
    if forced:
        if grammar:
            why = "tool_choice forces a tool call, so the output can have no other format; leave one out"
            raise Problem(400, why, param="tool_choice")
        assert style.form and llm.model.tokenizer
        several = body.tool_choice == "required" and body.parallel_tool_calls is not False
        grammar = Grammar(*call_grammar(style.form, forced, several, llm.model.tokenizer.special_ids))
        style = replace(style, forced=True, tools=forced)
    if grammar and llm.model.tokenizer:
        if style.inside and style.thinking:
            grammar = replace(grammar, before=after_reasoning(style.thinking, llm.model.tokenizer.special_ids))
        elif style.harmony and not forced:
            grammar = replace(grammar, before=after_analysis(llm.model.tokenizer.special_ids))
    if body.top_logprobs and not body.logprobs:
        raise Problem(400, "top_logprobs needs logprobs=true", param="top_logprobs")
    if body.logprob_token_ids and not body.logprobs:
        raise Problem(400, "logprob_token_ids needs logprobs=true", param="logprob_token_ids")
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise Problem(400, "max_tokens is the old name of max_completion_tokens; give one", param="max_tokens")
    asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    ids = _truncated(llm, body, encode(llm, rendered.text, special=bool(body.add_special_tokens)), asked)
    most = _max_tokens(llm, len(ids), asked, "max_completion_tokens")
    params = _params(body, settings, max_tokens=most, grammar=grammar, logprobs=body.top_logprobs or 0)
    options = {"special": style.marks, **_options(body, settings.limits)}
    last = body.messages[-1]
    prepared = Prepared(*llm.prepare(ids, params, name="the conversation", id=f"{id}-0", **options))
    echo = last.content if body.echo and last.role == "assistant" and isinstance(last.content, str) else ""
    return prepared, Reading(style, tuple([*hints(body), *rendered.ignored]), echo)


def hints(body: GenerationRequest) -> list[str]:
    """Returns the names of the fields that a request gives although they have no effect here, as a list."""
    return [
        name for name in HINTS if name in body.model_fields_set and body.model_dump(include={name})[name] is not None
    ]


def candidates(body: GenerationRequest) -> int:
    """Returns how many choices to generate for each prompt: best_of if the request gives it, else n.

    Raises Problem if best_of is less than n, or if it differs from n in a streamed request.
    """
    n, best = body.n or 1, body.best_of
    if best is None:
        return n
    if best < n:
        raise Problem(400, f"best_of is {best}, n is {n}; allowed: n or more", param="best_of")
    if best > n and body.stream:
        raise Problem(400, f"best_of is {best}, n is {n}; with stream=true they must be equal", param="best_of")
    return best


def encode(llm: LLM, text: str, special: bool = True) -> list[int]:
    """Returns a list of the token ids of `text`. Raises Problem if the model has no tokenizer.

    special: True to add the tokenizer's special tokens, such as BOS.
    """
    if llm.model.tokenizer is None:
        raise Problem(400, f"{llm.model.path.name} has no tokenizer; give token ids", param="prompt")
    return llm.model.tokenizer.encode(text, special)


def _truncated(llm: LLM, body: GenerationRequest, ids: list[int], asked: int | None) -> list[int]:
    """Returns the prompt's token ids `ids` as a list, cut to at most truncate_prompt_tokens ids.

    The value -1 of the request's field truncate_prompt_tokens stands for the largest length that leaves room for
    `asked` output tokens in the context, but at least 1. If the field is missing, nothing is cut. Raises Problem if it
    is 0.

    If the request's truncation_side is "right", the first ids are kept; otherwise the last ids are kept.

    asked: number of output tokens that the request asks for; None counts as 1.
    """
    most = body.truncate_prompt_tokens
    if most is None:
        return ids
    if most == 0:
        raise Problem(400, "truncate_prompt_tokens is 0; allowed: 1 or more, or -1", param="truncate_prompt_tokens")
    if most == -1:
        most = max(1, llm.admission.max_tokens(0) - max(1, asked or 1))
    return ids[:most] if body.truncation_side == "right" else ids[-most:]


def _forced(body: ChatRequest, tools: list[Tool]) -> dict[str, dict[str, Any]]:
    """Returns the tools that a forced tool call may name, as a dict from name to argument schema.

    The dict is empty if tool_choice does not force a call. Raises Problem if it forces a call and the request has no
    tools, or not the tool that tool_choice names.
    """
    choice = body.tool_choice
    if choice in (None, "auto", "none"):
        return {}
    known = parameters(tools)
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
    """Returns the Grammar that the output must match; None if the request does not restrict the output.

    Raises Problem if response_format and structured_outputs give more than one grammar, or if response_format's type
    and its json_schema do not agree.
    """
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
    """Returns a list of the request's prompts. Each prompt is a text or a list of token ids.

    prompt: the body's `prompt`, which validation has checked: one prompt, or a list of at least one prompt. Raises
    Problem if there are more than MAX_PROMPTS prompts.
    """
    prompts: list[str | list[int]] = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    if len(prompts) > MAX_PROMPTS:
        raise Problem(400, f"prompt has {len(prompts)} prompts; allowed: up to {MAX_PROMPTS}", param="prompt")
    return prompts


def _max_tokens(llm: LLM, prompt: int, asked: int | None, name: str) -> int:
    """Returns the largest number of output tokens of a request.

    This is `asked`. If `asked` is None, it is all the room that the prompt leaves in the context.

    prompt: number of prompt tokens. name: the request field that gives `asked`, for the error text. Raises Problem if
    the prompt fills the context, or if `asked` is more than the room left.
    """
    context, room = llm.model.program.context, llm.admission.max_tokens(prompt)
    if room < 1:
        why = f"the prompt has {prompt} tokens, the context holds {context}; shorten it by {1 - room}"
        raise Problem(400, why, param="prompt", code="context_length_exceeded")
    if asked is not None and asked > room:
        why = f"{name} is {asked}, the prompt has {prompt} tokens, the context holds {context}; allowed: up to {room}"
        raise Problem(400, why, param=name, code="context_length_exceeded")
    return room if asked is None else asked


def _params(body: GenerationRequest, settings: Settings, **more: Any) -> SamplingParams:
    """Returns the SamplingParams of a request. more: parameters that the caller has computed.

    A field that the request does not give gets the checkpoint's default. If the checkpoint has none, it gets OpenAI's
    default: temperature 1, no top-k, no top-p. Raises ParamsError for a value out of range, and Problem if best_of is
    invalid.
    """
    given = body.model_dump(include=SAME, exclude_none=True)
    if body.prompt_logprobs is not None:
        more["prompt_logprobs"] = max(body.prompt_logprobs, more.get("prompt_logprobs", 0))
    if body.top_k is not None:
        given["top_k"] = max(0, body.top_k)
    if body.seed is not None:
        given["seed"] = body.seed % 2**63
    if body.logit_bias:
        given["logit_bias"] = {int(id): bias for id, bias in body.logit_bias.items()}
    return SamplingParams(**{"temperature": 1.0, **settings.defaults, **given, **more, "n": candidates(body)})


def _options(body: GenerationRequest, limits: Limits) -> dict[str, Any]:
    """Returns a dict of arguments for Request: priority, cache salt, timeout and queue_timeout.

    Both timeouts are in seconds. Each is the shorter of the client's timeout and the server's.
    """
    return {
        "priority": body.priority or 0,
        "salt": body.cache_salt,
        "timeout": _shorter(body.timeout, limits.timeout),
        "queue_timeout": _shorter(body.queue_timeout, limits.queue_timeout),
    }


def _shorter(*seconds: float | None) -> float | None:
    return min((s for s in seconds if s is not None), default=None)
