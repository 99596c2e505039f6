"""Published OpenAI-compatible client libraries (openai, LangChain, LiteLLM, ...) against the server.

`make clients` installs each in an environment of its own and names the interpreters; their programs are in scripts/.
Every client runs against a model whose chat template knows tools, and one whose template does not.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.scripted import scripted
from support.served import TOOLS, Served, served
from support.tiny import tiny

SCRIPTS = Path(__file__).parent / "scripts"
ROOT = Path(__file__).parents[2]
CLIENTS = {  # script to the module that it needs
    "openai_client": "openai", "langchain_client": "langchain_openai", "litellm_client": "litellm",
    "pydantic_ai_client": "pydantic_ai", "instructor_client": "instructor", "openai_agents_client": "agents",
    "llama_index_client": "llama_index.llms.openai_like",
}  # fmt: skip
NO_TOOLS = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
VERDICT = '{"reasoning": "because", "verdict": true, "score": 5, "inner": {"kind": "a"}}'


def say(prompt: str) -> str:
    """What the model answers; see scripts/common.py."""
    if re.search(r"(<tool>|<tool_response>\s*)22 degrees", prompt):
        return "It is 22 degrees in Paris."
    if "get_weather" in prompt:
        return CALL
    return VERDICT if "JSON" in prompt else "Hello from the model."


@pytest.fixture(scope="module", params=["knows tools", "knows no tools"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tiny(
        "llama", tmp_path_factory.mktemp("clients") / "tiny", num_hidden_layers=1, max_position_embeddings=16384
    )
    template = TOOLS if request.param == "knows tools" else NO_TOOLS
    (folder / "chat_template.jinja").write_text(template)
    with served(folder, llm={"device": "host"}) as s, scripted(s.llm, say):
        yield s


def interpreter(client: str) -> str:
    """The Python that has a client's packages; skips the test if there is none."""
    places = [p for p in os.environ.get("INTAGLIO_CLIENTS", "").split(":") if p]
    places += [str(p / "bin" / "python") for p in sorted(ROOT.glob(".venv-clients*"))] + [sys.executable]
    for python in places:
        probe = [python, "-c", f"import importlib.util as u, sys; sys.exit(u.find_spec({CLIENTS[client]!r}) is None)"]
        if Path(python).exists() and subprocess.run(probe, capture_output=True).returncode == 0:
            return python
    pytest.skip(f"{CLIENTS[client]} is not installed: `make clients` installs it and runs these tests")


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_works(server: Served, client: str) -> None:
    telemetry = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "OPENAI_AGENTS_DISABLE_TRACING": "1"}
    done = subprocess.run(
        [interpreter(client), str(SCRIPTS / f"{client}.py"), server.url],
        capture_output=True, text=True, timeout=300, env={**os.environ, **telemetry},
    )  # fmt: skip
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-6000:] + done.stderr[-3000:]
