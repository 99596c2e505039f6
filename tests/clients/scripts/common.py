"""What the client scripts share: server address, expected answers, tool get_weather, schema Verdict, and run().

Each script holds the same conversation with its own client package. The server at sys.argv[1] has a model that greets;
asked with the tool get_weather, it calls it for Paris; given the tool's result, it answers SUNNY. With a schema it
writes any text that matches.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import Literal

from pydantic import BaseModel, Field

URL, KEY, MODEL = f"{sys.argv[1]}/v1", "none", "tiny"
GREETING, SUNNY = "Hello from the model.", "It is 22 degrees in Paris."


class Inner(BaseModel):
    """A part of the answer."""

    kind: Literal["a", "b"]


class Verdict(BaseModel):
    """The answer to a question."""

    reasoning: Literal["because", "therefore"]
    verdict: bool
    score: int = Field(ge=0, le=9)
    inner: Inner


def weather(city: str) -> str:
    """The weather in a city."""
    assert city == "Paris", city
    return "22 degrees"


def run(*checks: Callable[[], None]) -> None:
    """Run the checks, each by itself; the exit code is the number of those that failed."""
    failed = 0
    for check in checks:
        try:
            check()
            print(f"passed {check.__name__}")
        except Exception:
            failed += 1
            print(f"FAILED {check.__name__}\n{traceback.format_exc()[-3000:]}")
    sys.exit(failed)
