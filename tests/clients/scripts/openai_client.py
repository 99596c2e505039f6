"""The official openai client: chat, streams, tools and structured output."""

import json

from common import GREETING, KEY, MODEL, SUNNY, URL, Verdict, run, weather
from openai import OpenAI

client = OpenAI(base_url=URL, api_key=KEY, max_retries=0)
USER = [{"role": "user", "content": "hi"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}]


def chat() -> None:
    assert client.chat.completions.create(model=MODEL, messages=USER).choices[0].message.content == GREETING


def stream() -> None:
    with client.chat.completions.stream(model=MODEL, messages=USER) as events:
        assert next(e for e in events if e.type == "content.done").content == GREETING


def parse() -> None:
    done = client.chat.completions.parse(model=MODEL, messages=USER, response_format=Verdict)
    assert isinstance(done.choices[0].message.parsed, Verdict)


def tools() -> None:
    """The client's own message goes back into the history as it came."""
    message = client.chat.completions.create(model=MODEL, messages=USER, tools=TOOLS).choices[0].message
    [call] = message.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": weather(**json.loads(call.function.arguments))}
    for written in (message, message.model_dump()):
        done = client.chat.completions.create(model=MODEL, messages=[*USER, written, result], tools=TOOLS)
        assert done.choices[0].message.content == SUNNY


def tool_stream() -> None:
    with client.chat.completions.stream(model=MODEL, messages=USER, tools=TOOLS) as events:
        done = [e for e in events if e.type == "tool_calls.function.arguments.done"]
    assert [(e.name, json.loads(e.arguments)) for e in done] == [("get_weather", {"city": "Paris"})]


run(chat, stream, parse, tools, tool_stream)
