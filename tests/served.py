"""A server in this process, on a free port, and what to hold it to when all is quiet. Not a test: tests import it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import uvloop

from intaglio.batch import Batch
from intaglio.devices import StepResult
from intaglio.llm import LLM
from intaglio.runtime import check_invariants
from intaglio.server.serve import listen, serve
from intaglio.server.service import Options, Service

PATIENCE = 120.0  # seconds for what takes milliseconds, on a machine that may be stopped for a while
TOOLS = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools> call as <tool_call>{% endif %}"
    "{% for m in messages %}{{ '<' + m['role'] + '>' + (m['content'] or '') + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking %}<think>\n{% endif %}{% endif %}"
    "{# what was thought ends with </think> #}"
)


class Slow:
    """An executable that takes some seconds longer, and does what a test tells it to before each step."""

    def __init__(self, inner: Any, seconds: float = 0.0, before: Callable[[Batch], None] | None = None) -> None:
        self.inner, self.seconds, self.before = inner, seconds, before
        self.program, self.state = inner.program, inner.state

    def step(
        self, batch: Batch, *, logits: bool = False, taps: Collection[str] = (), timed: bool = False
    ) -> StepResult:
        time.sleep(self.seconds)
        if self.before:
            self.before(batch)
        return self.inner.step(batch, logits=logits, taps=taps, timed=timed)


class Served:
    """A running server. `code` is its exit code once it has ended."""

    def __init__(self, llm: LLM, options: Options) -> None:
        self.llm, self.code = llm, -1
        self.listener = listen("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.ready = threading.Event()
        self.service: Service
        self.thread = threading.Thread(target=self._run, args=(options,), daemon=True)
        self.thread.start()
        assert self.ready.wait(PATIENCE)

    def _run(self, options: Options) -> None:
        self.code = uvloop.run(serve(self.llm, options, self.listener, self._announce, signals=False))

    def _announce(self, service: Service) -> None:
        self.service, self.loop = service, asyncio.get_running_loop()
        self.tasks = len(asyncio.all_tasks())
        self.ready.set()

    def client(self, **options: Any) -> openai.OpenAI:
        given = {"api_key": "none", "max_retries": 0, "timeout": PATIENCE, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **given)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=PATIENCE, **options)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=PATIENCE)

    def quiet(self) -> None:
        """Wait until nothing is under way, and see that nothing was left behind."""
        engine = self.llm.engine
        wait_for(lambda: engine.idle and self.service.open == 0 and not self.service.driver._running)
        assert engine.pool.held == 0
        check_invariants(engine)
        wait_for(lambda: len(self._tasks()) <= self.tasks + 1)  # one more for a connection that is kept open

    def _tasks(self) -> set[Any]:
        return asyncio.run_coroutine_threadsafe(self._all(), self.loop).result(PATIENCE)

    @staticmethod
    async def _all() -> set[Any]:
        return {t for t in asyncio.all_tasks() if t is not asyncio.current_task()}

    def stop(self) -> int:
        self.service.drain()
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()
        return self.code


@contextmanager
def served(folder: Path | str | None, llm: dict[str, Any] | None = None, **options: Any) -> Iterator[Served]:
    """A server of a checkpoint on the reference device; whatever it was asked, nothing is left when it ends."""
    s = Served(LLM(folder, **{"device": "reference", **(llm or {})}), Options(**{"name": "tiny", **options}))
    try:
        yield s
        if s.thread.is_alive():
            s.quiet()
    finally:
        s.stop()


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)
