"""The LiteLLM client, with its providers openai and hosted_vllm."""

import json

import litellm
from common import GREETING, KEY, MODEL, SUNNY, URL, Verdict, run, weather

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}]
USER = [{"role": "user", "content": "hi"}]


def ask(provider: str, **fields):
    given = {"messages": USER, "api_base": URL, "api_key": KEY, "num_retries": 0, **fields}
    return litellm.completion(model=f"{provider}/{MODEL}", **given)


def checks(provider: str) -> list:
    def chat() -> None:
        assert ask(provider).choices[0].message.content == GREETING

    def stream() -> None:
        chunks = [chunk.choices[0].delta.content or "" for chunk in ask(provider, stream=True)]
        assert "".join(chunks) == GREETING

    def schema() -> None:
        Verdict.model_validate_json(ask(provider, response_format=Verdict).choices[0].message.content)

    def tools() -> None:
        message = ask(provider, tools=TOOLS).choices[0].message
        [call] = message.tool_calls
        result = {"role": "tool", "tool_call_id": call.id, "content": weather(**json.loads(call.function.arguments))}
        done = ask(provider, tools=TOOLS, messages=[*USER, message.model_dump(), result])
        assert done.choices[0].message.content == SUNNY

    def hints() -> None:
        done = ask(provider, metadata={"a": "b"}, user="me", extra_body={"top_k": 5, "min_tokens": 1})
        assert done.choices[0].message.content == GREETING

    for check in (chat, stream, schema, tools, hints):
        check.__name__ = f"{provider}_{check.__name__}"
    return [chat, stream, schema, tools, hints]


run(*checks("openai"), *checks("hosted_vllm"))
