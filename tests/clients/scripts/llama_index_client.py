"""Client script for llama-index, class OpenAILike: chat, streams, structured output, and an agent with tools."""

import asyncio

from common import GREETING, KEY, MODEL, SUNNY, URL, Verdict, run, weather
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

options = {"api_base": URL, "api_key": KEY, "model": MODEL, "is_chat_model": True, "max_retries": 0}
llm = OpenAILike(**options, is_function_calling_model=True)
weather_tool = FunctionTool.from_defaults(weather, name="get_weather")
USER = [ChatMessage(role="user", content="hi")]


def chat() -> None:
    assert llm.chat(USER).message.content == GREETING


def stream() -> None:
    assert "".join(chunk.delta or "" for chunk in llm.stream_chat(USER)) == GREETING


def by_tool() -> None:
    assert isinstance(llm.structured_predict(Verdict, PromptTemplate("hi")), Verdict)


def ask_agent(streaming: bool) -> str:
    """The answer of an agent whose connections belong to this event loop alone."""

    async def ask() -> str:
        own = OpenAILike(**options, is_function_calling_model=True)
        return str(await FunctionAgent(tools=[weather_tool], llm=own, streaming=streaming).run("hi"))

    return asyncio.run(ask())


def tools() -> None:
    assert ask_agent(streaming=False) == SUNNY


def tool_stream() -> None:
    assert ask_agent(streaming=True) == SUNNY


run(chat, stream, by_tool, tools, tool_stream)
