"""What clients may send: the bodies of OpenAI's API and of vLLM's extensions to it, as far as they are supported.

A field that is not here is refused by name. Every field says its range, so that the OpenAPI description does too.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from intaglio.runtime.request import MOST_BIAS, MOST_CHOICES, MOST_LOGPROBS, MOST_PENALTY

Whole = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Penalty = Annotated[float, Field(ge=-MOST_PENALTY, le=MOST_PENALTY, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]
Seconds = Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)]
Json = dict[str, JsonValue]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Body):
    """`continuous_usage_stats`, as in vLLM: with include_usage, every chunk tells the tokens so far."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchema(Body):
    name: Text
    schema_: Annotated[Json, Field(alias="schema")]
    description: str | None = None
    strict: Literal[True] | None = None


class ResponseFormat(Body):
    """text, any JSON object, or JSON that matches a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Body):
    """One of: a JSON schema, a regular expression, a Lark grammar, or a list of texts to choose from."""

    json_: Annotated[Json | str | None, Field(alias="json")] = None
    regex: Text | None = None
    grammar: Text | None = None
    choice: Annotated[list[Text], Field(min_length=1)] | None = None


class Asked(Body):
    """What both kinds of generation take. From `top_k` on: beyond OpenAI's API, named as in vLLM where that has it."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: (
        dict[
            Annotated[str, Field(pattern="^[0-9]{1,9}$")],
            Annotated[float, Field(ge=-MOST_BIAS, le=MOST_BIAS, allow_inf_nan=False)],
        ]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    priority: Annotated[int, Field(ge=-(2**31), le=2**31 - 1)] | None = None
    cache_salt: Text | None = None
    structured_outputs: StructuredOutputs | None = None
    timeout: Seconds | None = None
    queue_timeout: Seconds | None = None


class CompletionRequest(Asked):
    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
    )
    max_tokens: Whole | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool | None = None
    response_format: ResponseFormat | None = None


class TextPart(Body):
    type: Literal["text"]
    text: str


class Function(Body):
    name: Text
    arguments: str


class ToolCall(Body):
    id: str
    type: Literal["function"] = "function"
    function: Function


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class ToolFunction(Body):
    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: ToolFunction


class Named(Body):
    name: Text


class ToolChoice(Body):
    type: Literal["function"]
    function: Named


class Conversation(Body):
    """What a chat template renders."""

    messages: Annotated[list[Message], Field(min_length=1)]
    tools: list[Tool] | None = None
    chat_template_kwargs: Json | None = None


class ChatRequest(Asked, Conversation):
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: Literal[True] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high"] | None = None


class TokenizeText(Body):
    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChat(Conversation):
    model: str | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[TokenId]


class EmbeddingRequest(Body):
    model: str | None = None
    input: str | list[str] | list[TokenId] | list[list[TokenId]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Whole | None = None
    user: str | None = None


def expected(body: type[BaseModel], error: dict[str, Any]) -> tuple[str, str]:
    """One of pydantic's errors as (what to say, the field it is about)."""
    place = [str(part) for part in error["loc"] if not _union_tag(part)]
    field = ".".join(place)
    if error["type"] == "extra_forbidden":
        known = f"; supported: {', '.join(_names(body))}" if len(place) == 1 else ""
        return f"{field} is not supported here; leave it out{known}", field
    if error["type"] == "missing":
        return f"{field} is missing", field
    return (f"{field}: {error['msg']}" if field else str(error["msg"])), field


def _names(body: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in body.model_fields.items()]


def _union_tag(part: object) -> bool:
    """Whether a part of a place names an arm of a union, not something in the body."""
    return isinstance(part, str) and (
        "[" in part or part in ("str", "int", "float", "bool", "dict", "constrained-str", "none", *_MODELS)
    )


_MODELS = {c.__name__ for c in Body.__subclasses__()} | {c.__name__ for c in Conversation.__subclasses__()}
