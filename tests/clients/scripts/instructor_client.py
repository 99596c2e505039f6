"""Client script for instructor: structured output in its modes TOOLS, JSON and JSON_SCHEMA, and partial streams."""

import instructor
from common import KEY, MODEL, URL, Verdict, run
from openai import OpenAI

USER = [{"role": "user", "content": "hi, answer in JSON"}]


def check(mode: instructor.Mode):
    def one() -> None:
        client = instructor.from_openai(OpenAI(base_url=URL, api_key=KEY, max_retries=0), mode=mode)
        done = client.chat.completions.create(model=MODEL, response_model=Verdict, messages=USER, max_retries=0)
        assert isinstance(done, Verdict)

    one.__name__ = mode.name.lower()
    return one


def partial() -> None:
    client = instructor.from_openai(OpenAI(base_url=URL, api_key=KEY, max_retries=0), mode=instructor.Mode.TOOLS)
    *_, last = client.chat.completions.create_partial(model=MODEL, response_model=Verdict, messages=USER)
    assert last.reasoning in ("because", "therefore")


run(check(instructor.Mode.TOOLS), check(instructor.Mode.JSON), check(instructor.Mode.JSON_SCHEMA), partial)
