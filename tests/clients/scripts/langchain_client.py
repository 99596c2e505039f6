"""Client script, LangChain: chat, streams, tools, and its three methods of structured output."""

from common import GREETING, KEY, MODEL, SUNNY, URL, Verdict, run
from common import weather as get_weather
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

llm = ChatOpenAI(base_url=URL, api_key=KEY, model=MODEL, max_retries=0)
weather = tool("get_weather")(get_weather)


def chat() -> None:
    assert llm.invoke("hi").content == GREETING


def stream() -> None:
    assert "".join(chunk.content for chunk in llm.stream("hi")) == GREETING


def by_function_calling() -> None:
    assert isinstance(llm.with_structured_output(Verdict, method="function_calling").invoke("hi"), Verdict)


def by_json_schema() -> None:
    assert isinstance(llm.with_structured_output(Verdict, method="json_schema").invoke("hi"), Verdict)


def by_json_mode() -> None:
    assert isinstance(llm.with_structured_output(Verdict, method="json_mode").invoke("answer in JSON"), Verdict)


def tools() -> None:
    bound = llm.bind_tools([weather])
    history = [HumanMessage("hi"), bound.invoke("hi")]
    for call in history[1].tool_calls:
        history.append(ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"]))
    assert len(history) == 3 and bound.invoke(history).content == SUNNY


def tools_one_at_a_time() -> None:
    bound = llm.bind_tools([weather], parallel_tool_calls=False, tool_choice="get_weather")
    assert len(bound.invoke("hi").tool_calls) == 1


def tool_stream() -> None:
    whole = None
    for chunk in llm.bind_tools([weather]).stream("hi"):
        whole = chunk if whole is None else whole + chunk
    assert [(c["name"], c["args"]) for c in whole.tool_calls] == [("get_weather", {"city": "Paris"})]


run(chat, stream, by_function_calling, by_json_schema, by_json_mode, tools, tools_one_at_a_time, tool_stream)
