"""A server in this process on a free port, and checks that it leaves nothing behind. Used by tests."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import uvloop

from intaglio.batch import Batch
from intaglio.devices import BlockingExecutable, StepRequest, StepResult
from intaglio.llm import LLM
from intaglio.runtime import check_invariants
from intaglio.server.serve import listen, serve
from intaglio.server.service import Options, Service

TEST_TIMEOUT_S = 120.0  # seconds for what takes milliseconds, on a machine that may be stopped for a while
TOOLS = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools> call as <tool_call>{% endif %}"
    "{% for m in messages %}{{ '<' + m['role'] + '>' + (m['content'] or '') + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking %}<think>\n{% endif %}{% endif %}"
    "{# what was thought ends with </think> #}"
)


class Slow(BlockingExecutable):
    """An executable that takes some seconds longer, and calls a function of the test before each step."""

    def __init__(self, inner: Any, seconds: float = 0.0, before: Callable[[Batch], None] | None = None) -> None:
        self.inner, self.seconds, self.before = inner, seconds, before
        self.program, self.state = inner.program, inner.state

    def run(self, request: StepRequest) -> StepResult:
        time.sleep(self.seconds)
        if self.before:
            self.before(request.batch)
        return self.inner.step(request)


class Served:
    """A running server of models by name. `llm` is the first; `code` is the exit code once it has ended."""

    def __init__(self, llms: Mapping[str, LLM], options: Options) -> None:
        self.llms, self.llm, self.code = llms, next(iter(llms.values())), -1
        self.listener = listen("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.ready = threading.Event()
        self.service: Service
        self.thread = threading.Thread(target=self._run, args=(options,), daemon=True)
        self.thread.start()
        assert self.ready.wait(TEST_TIMEOUT_S)

    def _run(self, options: Options) -> None:
        self.code = uvloop.run(serve(self.llms, options, self.listener, self._announce, signals=False))

    def _announce(self, service: Service) -> None:
        self.service, self.loop = service, asyncio.get_running_loop()
        self.tasks = len(asyncio.all_tasks())
        self.ready.set()

    def client(self, **options: Any) -> openai.OpenAI:
        given = {"api_key": "none", "max_retries": 0, "timeout": TEST_TIMEOUT_S, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **given)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=TEST_TIMEOUT_S, **options)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=TEST_TIMEOUT_S)

    def quiet(self) -> None:
        """Wait until no request is open, and check that nothing was left behind."""
        wait_for(self.at_rest)
        for llm in self.llms.values():
            assert llm.engine.pool.held == 0
            check_invariants(llm.engine)
        wait_for(lambda: len(self._tasks()) <= self.tasks + 1)  # one more for a connection that is kept open

    def at_rest(self) -> bool:
        """True if no HTTP request is open and no request is in an engine."""
        snapshots = [model.driver.snapshot for model in self.service.models.values()]
        return all(s.idle and s.active == 0 for s in snapshots) and self.service.open == 0

    def _tasks(self) -> set[Any]:
        return asyncio.run_coroutine_threadsafe(self._all(), self.loop).result(TEST_TIMEOUT_S)

    @staticmethod
    async def _all() -> set[Any]:
        return {t for t in asyncio.all_tasks() if t is not asyncio.current_task()}

    def stop(self) -> int:
        self.service.drain()
        self.thread.join(TEST_TIMEOUT_S)
        assert not self.thread.is_alive()
        return self.code


@contextmanager
def served(folder: Path | str | None, llm: dict[str, Any] | None = None, **options: Any) -> Iterator[Served]:
    """A server of a checkpoint, called tiny, on the reference device."""
    with serving({"tiny": LLM(folder, **{"device": "reference", **(llm or {})})}, **options) as s:
        yield s


@contextmanager
def serving(llms: Mapping[str, LLM], **options: Any) -> Iterator[Served]:
    """A server of models; checks at its end that nothing is left."""
    s = Served(llms, Options(**options))
    try:
        yield s
        if s.thread.is_alive():
            s.quiet()
    finally:
        s.stop()


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TEST_TIMEOUT_S
    while not what():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)


def prompt(rng: random.Random, n: int) -> str:
    return "".join(rng.choice("abcdefgh ,.:\n") for _ in range(n))


def streaming(s: Served, tokens: int = 200) -> Any:
    """A stream of `tokens` tokens that no sampled token ends."""
    asked: Any = {"max_tokens": tokens, "extra_body": {"ignore_eos": True}}
    return s.client().completions.create(model="tiny", prompt="a", stream=True, **asked)
