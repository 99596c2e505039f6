"""Client script, openai-agents over the chat API: chat, tools, streams and structured output."""

import asyncio

from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, Runner, function_tool, set_tracing_disabled
from common import GREETING, KEY, MODEL, SUNNY, URL, Verdict, run, weather
from openai import AsyncOpenAI

set_tracing_disabled(True)


def agent(**fields) -> Agent:
    model = OpenAIChatCompletionsModel(model=MODEL, openai_client=AsyncOpenAI(base_url=URL, api_key=KEY, max_retries=0))
    return Agent(name="assistant", model=model, **fields)


def chat() -> None:
    assert Runner.run_sync(agent(instructions="Be brief."), "hi").final_output == GREETING


def tools() -> None:
    one = agent(tools=[function_tool(weather, name_override="get_weather")])
    assert Runner.run_sync(one, "hi").final_output == SUNNY


def tools_one_at_a_time() -> None:
    settings = ModelSettings(parallel_tool_calls=False)
    one = agent(tools=[function_tool(weather, name_override="get_weather")], model_settings=settings)
    assert Runner.run_sync(one, "hi").final_output == SUNNY


def stream() -> None:
    async def collect() -> tuple[str, str]:
        tools = [function_tool(weather, name_override="get_weather")]
        running, text = Runner.run_streamed(agent(tools=tools), "hi"), ""
        async for event in running.stream_events():
            if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
                text += event.data.delta
        return text, running.final_output

    assert asyncio.run(collect()) == (SUNNY, SUNNY)


def by_json_schema() -> None:
    assert isinstance(Runner.run_sync(agent(output_type=Verdict), "hi").final_output, Verdict)


run(chat, tools, tools_one_at_a_time, stream, by_json_schema)
