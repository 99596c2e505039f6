"""Client script, pydantic-ai: chat, streams, tools, and its two ways of structured output."""

import asyncio

from common import GREETING, KEY, MODEL, SUNNY, URL, Verdict, run, weather
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=URL, api_key=KEY))


def chat() -> None:
    assert Agent(model).run_sync("hi").output == GREETING


def stream() -> None:
    async def collect() -> str:
        async with Agent(model).run_stream("hi") as answer:
            return "".join([piece async for piece in answer.stream_text(delta=True)])

    assert asyncio.run(collect()) == GREETING


def tools() -> None:
    agent = Agent(model)
    agent.tool_plain(name="get_weather")(weather)
    assert agent.run_sync("hi").output == SUNNY


def by_tool() -> None:
    assert isinstance(Agent(model, output_type=ToolOutput(Verdict)).run_sync("hi").output, Verdict)


def by_json_schema() -> None:
    assert isinstance(Agent(model, output_type=NativeOutput(Verdict)).run_sync("hi").output, Verdict)


run(chat, stream, tools, by_tool, by_json_schema)
