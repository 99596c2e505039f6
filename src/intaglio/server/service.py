"""One model being served: the engine's driver, the thread that prepares requests, limits and metrics; how it ends.

Knows nothing of HTTP but what app.py asks of it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from intaglio.llm import LLM
from intaglio.server.driver import Drain, Driver, Halt
from intaglio.server.metrics import Metrics
from intaglio.server.prepare import Limits
from intaglio.server.problem import Problem
from intaglio.server.vocabulary import Vocabulary

T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """How to serve. Seconds and bytes; `keys` empty: no key is asked for; `origins`: who may ask from a browser."""

    name: str = "intaglio"
    keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    max_body: int = 8 << 20
    max_open: int = 1024  # requests being read, waited for or answered
    reading: float = 30.0  # for a whole body to come
    stall: float = 60.0  # for a reader that takes nothing
    hang: float = 300.0  # for a step, before /health says that the engine hangs


class Service:
    """Made and used on the event loop."""

    def __init__(self, llm: LLM, options: Options) -> None:
        self.llm, self.options = llm, options
        state = llm.state
        facts = {"block_size": str(state.page_tokens), "num_gpu_blocks": str(state.pages)}
        clock = llm.engine.clock if llm.modelled else None
        self.metrics = Metrics(options.name, lambda: self.driver.snapshot, facts, clock)
        self.driver = Driver(llm.engine, self.metrics.watch)
        self.vocabulary = Vocabulary(llm.tokenizer)
        self.started = int(time.time())
        self.open = 0  # requests counted against max_open
        self.draining = False
        self._scribe = ThreadPoolExecutor(1, "scribe")

    def start(self) -> None:
        self.driver.start()

    async def prepare(self, work: Callable[..., T], *arguments: Any) -> T:
        """Run `work` in the thread that prepares requests."""
        return await asyncio.get_running_loop().run_in_executor(self._scribe, work, *arguments)

    def drain(self) -> None:
        """Admit nothing from now on."""
        self.draining = True
        self.driver.send(Drain())

    def halt(self) -> None:
        """End everything that runs, now."""
        self.draining = True
        self.driver.send(Halt())

    def close(self) -> None:
        """After the last request. Waits for nothing."""
        self.driver.send(Halt())
        self._scribe.shutdown(wait=False, cancel_futures=True)

    @property
    def broken(self) -> str | None:
        """Why nothing can be served any more; None if it can."""
        if self.driver.crash is not None:
            return f"the engine crashed: {self.driver.crash}"
        return self.driver.snapshot.gauges.failed

    def alive(self) -> str | None:
        """Why the process should be replaced; None if it should not."""
        s = self.driver.snapshot
        if self.broken:
            return self.broken
        silent = time.monotonic() - s.beat
        return None if s.idle or silent < self.options.hang else f"the engine has been in one step for {silent:.0f} s"

    def admitting(self) -> Problem | None:
        """Why a request would be refused now; None if it would not."""
        if self.broken:
            return Problem(503, self.broken, code="failed", retry_after=1)
        if self.draining:
            return Problem(503, "the server is shutting down and admits nothing", code="draining", retry_after=1)
        waiting, most = self.driver.snapshot.gauges.waiting, self.llm.engine.max_waiting
        if waiting >= most:
            return Problem(503, f"{waiting} wait already, max_waiting is {most}", code="queue_full", retry_after=1)
        return None

    def state(self, since: int) -> dict[str, Any]:
        """What the page shows: how things stand, and the steps after number `since`."""
        s = self.driver.snapshot
        steps = [r for r in list(self.driver.steps) if r.number > since]
        return {
            "model": self.options.name,
            "chat": bool(self.llm.tokenizer and self.llm.tokenizer.template),
            "context": self.llm.program.context,
            "clock": self.llm.engine.clock(),
            "modelled": self.llm.modelled,
            "running": s.gauges.running,
            "waiting": s.gauges.waiting,
            "blocks": s.gauges.blocks,
            "blocks_held": s.gauges.blocks_held,
            "blocks_cached": s.gauges.blocks_cached,
            "output_tokens": s.counts.output_tokens,
            "computed_tokens": s.counts.computed_tokens,
            "draining": s.gauges.draining,
            "steps": [[r.number, r.began, r.seconds, r.prefill_tokens, r.decode_tokens, r.sequences] for r in steps],
        }
