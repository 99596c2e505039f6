"""Request bodies: the supported fields of OpenAI's API and of vLLM's extensions.

Unknown fields are refused by name, unless they are null, which is the same as leaving them out. Fields declare their
ranges, which the OpenAPI description repeats. HINTS are fields without an effect on the answer here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from intaglio.runtime.request import MAX_LOGIT_BIAS, MAX_LOGPROB_TOKEN_IDS, MAX_LOGPROBS, MAX_N, MAX_PENALTY

Whole = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Penalty = Annotated[float, Field(ge=-MAX_PENALTY, le=MAX_PENALTY, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]
Seconds = Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)]
Json = dict[str, JsonValue]
HINTS = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "length_penalty", "use_beam_search", "spaces_between_special_tokens",
)  # fmt: skip


class Body(BaseModel):
    """Base class of request bodies: strict types; unknown fields are refused unless they are null."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_unknown_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict) or all(value is not None for value in data.values()):
            return data
        known = _names(cls)
        return {name: value for name, value in data.items() if value is not None or name in known}


class StreamOptions(Body):
    """Options of a streamed response.

    include_usage: True to send the token counts (usage) in a last chunk. continuous_usage_stats: True to send the
    counts so far in every chunk too; it has an effect only with include_usage.
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchema(Body):
    """A JSON schema with a name, as in OpenAI's response_format."""

    name: Text
    schema_: Annotated[Json, Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Body):
    """Output format: text, any JSON object, or JSON that matches a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Body):
    """Output constraint, one of: a JSON schema, a regular expression, a Lark grammar, or a list of allowed texts."""

    json_: Annotated[Json | str | None, Field(alias="json")] = None
    regex: Text | None = None
    grammar: Text | None = None
    choice: Annotated[list[Text], Field(min_length=1)] | None = None


class ModelRequest(Body):
    """A request body that names a model; the name may be left out if one model is served."""

    model: str | None = None


class GenerationRequest(ModelRequest):
    """The request fields that completions and chat completions share.

    The fields from `top_k` on are not in OpenAI's API. Those that vLLM has too have vLLM's names.
    """

    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: (
        dict[
            Annotated[str, Field(pattern="^[0-9]{1,9}$")],
            Annotated[float, Field(ge=-MAX_LOGIT_BIAS, le=MAX_LOGIT_BIAS, allow_inf_nan=False)],
        ]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: Json | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    priority: Annotated[int, Field(ge=-(2**31), le=2**31 - 1)] | None = None
    cache_salt: Text | None = None
    structured_outputs: StructuredOutputs | None = None
    min_tokens: Whole | None = None
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1)] | None = None
    bad_words: Annotated[list[Text], Field(max_length=1024)] | None = None
    logprob_token_ids: Annotated[list[TokenId], Field(min_length=1, max_length=MAX_LOGPROB_TOKEN_IDS)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    length_penalty: Annotated[float, Field(ge=1, le=1)] | None = None
    use_beam_search: Literal[False] | None = None
    request_id: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")] | None = None
    timeout: Seconds | None = None
    queue_timeout: Seconds | None = None


class CompletionRequest(GenerationRequest):
    """Body of /v1/completions."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
    )
    max_tokens: Whole | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    response_format: ResponseFormat | None = None


class TextPart(Body):
    """One part of a message's content: a text."""

    type: Literal["text"]
    text: str


class RefusalPart(Body):
    """Part of an assistant message's content: the text in which the model declined to answer."""

    type: Literal["refusal"]
    refusal: str


class Function(Body):
    """The function part of a tool call: the name of the called function, and its arguments as JSON text."""

    name: Text
    arguments: str


class ToolCall(Body):
    """A tool call in an earlier assistant message.

    `index` is accepted because streamed responses number calls with it; here it is ignored.
    """

    id: str | None = None
    type: Literal["function"] = "function"
    function: Function
    index: int | None = None


class Message(Body):
    """One message of a conversation.

    Clients may send back `refusal`, `annotations` and `reasoning`, which occur in responses of OpenAI and vLLM. Fields
    that are not listed here are passed to the chat template if the template reads them.
    """

    model_config = ConfigDict(extra="allow", strict=True)

    role: Annotated[str, Field(pattern="^[a-zA-Z0-9_.-]{1,64}$")]
    content: str | list[TextPart | RefusalPart] | None = None
    name: str | None = None
    refusal: str | None = None
    annotations: list[Json] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class ToolFunction(Body):
    """A function that the model may call, with the JSON schema of its parameters."""

    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


class Tool(Body):
    """One entry of `tools`: a function that the model may call."""

    type: Literal["function"]
    function: ToolFunction


class Named(Body):
    """The object {"name": ...} in a tool_choice that forces the call of one function."""

    name: Text


class ToolChoice(Body):
    """Value of tool_choice that forces a call of one function."""

    type: Literal["function"]
    function: Named


class Conversation(Body):
    """The request fields that are rendered by the chat template: messages, tools and the template's variables."""

    messages: Annotated[list[Message], Field(min_length=1)]
    tools: list[Tool] | None = None
    chat_template_kwargs: Json | None = None
    documents: list[dict[str, str]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class ChatRequest(GenerationRequest, Conversation):
    """Body of /v1/chat/completions."""

    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    include_reasoning: bool | None = None
    echo: bool | None = None


class TokenizeText(ModelRequest):
    """Body of POST /tokenize if the client sends a text."""

    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChat(Conversation, ModelRequest):
    """Body of POST /tokenize if the client sends a conversation."""

    return_token_strs: bool | None = None


class DetokenizeRequest(ModelRequest):
    """Body of POST /detokenize: the token ids to convert to text."""

    tokens: list[TokenId]


class EmbeddingRequest(ModelRequest):
    """Body of /v1/embeddings, which is refused."""

    input: str | list[str] | list[TokenId] | list[list[TokenId]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Whole | None = None
    user: str | None = None


def error_message(body: type[BaseModel], error: dict[str, Any]) -> tuple[str, str]:
    """Returns (message, name of the invalid field) for `error`, one error of pydantic's validation of a `body`."""
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
    """True if `part`, one item of the location of a pydantic error, does not name a field.

    For a field whose type is a union, pydantic puts the name of the union's member into the location too.
    """
    return isinstance(part, str) and (
        "[" in part or part in ("str", "int", "float", "bool", "dict", "constrained-str", "none", *_MODELS)
    )


_MODELS = {c.__name__ for c in Body.__subclasses__()} | {c.__name__ for c in Conversation.__subclasses__()}
