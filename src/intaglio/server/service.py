"""Service: the models of one server with shared limits, metrics and the thread that prepares requests.

Independent of HTTP; app.py maps its results to responses.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from intaglio.llm import LLM
from intaglio.server.driver import Drain, Halt
from intaglio.server.metrics import Metrics
from intaglio.server.prepare import Limits
from intaglio.server.problem import Problem
from intaglio.server.served_model import ServedModel
from intaglio.server.tracing import Tracing

T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """Server options. Times are in seconds, sizes in bytes.

    Attributes:
        keys: accepted API keys; (): no key is needed.
        origins: origins that CORS allows.
        limits: longest timeouts of requests.
        max_body: largest size of a request's body.
        max_open: maximum number of requests open at once.
        read_timeout: time within which a request's headers must arrive, and then within which its body must arrive.
        write_timeout: time after which a client that does not read its response is disconnected.
        defaults: for each model name, values of SamplingParams fields for requests that do not give these fields; see
            sampling_defaults().
        step_timeout: time after which /health reports that a step hangs.
        tracing: records a trace of each generation request; None: no traces.
    """

    keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    max_body: int = 8 << 20
    max_open: int = 1024
    read_timeout: float = 30.0
    write_timeout: float = 60.0
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    step_timeout: float = 300.0
    tracing: Tracing | None = None


class Service:
    """The models of one server, by name. Created and used on the event loop."""

    def __init__(self, llms: Mapping[str, LLM], options: Options) -> None:
        self.options = options
        self.metrics = Metrics(modelled=any(llm.modelled for llm in llms.values()))
        self.models = {
            name: ServedModel(name, llm, self.metrics, options.defaults.get(name, {})) for name, llm in llms.items()
        }
        self.started = int(time.time())
        self.open = 0  # requests counted against max_open
        self.draining = False
        self._preparing = ThreadPoolExecutor(1, "prepare")

    def start(self) -> None:
        """Start the engines' threads."""
        for model in self.models.values():
            model.driver.start()

    async def prepare(self, work: Callable[..., T], *arguments: Any) -> T:
        """Call work(*arguments) in the thread that prepares requests, and return its result."""
        return await asyncio.get_running_loop().run_in_executor(self._preparing, work, *arguments)

    def drain(self) -> None:
        """Refuse new requests from now on; admitted requests run to their end."""
        self.draining = True
        self._send(Drain())

    def halt(self) -> None:
        """Abort all requests and end the engines' threads."""
        self.draining = True
        self._send(Halt())

    def close(self) -> None:
        """Tell all threads to stop, without waiting for them. Call it after the last request."""
        self._send(Halt())
        self._preparing.shutdown(wait=False, cancel_futures=True)

    def find(self, name: str | None) -> ServedModel:
        """Returns the ServedModel with the given name; if `name` is None, the only model of the server.

        Raises Problem if there is no model with this name, or if `name` is None and there are several models.
        """
        names = ", ".join(map(repr, self.models))
        served = f"there {'are' if len(self.models) > 1 else 'is'} {names}"
        if name is None and len(self.models) > 1:
            raise Problem(400, f"model is missing; {served}", param="model")
        if name is not None and name not in self.models:
            raise Problem(404, f"there is no model {name!r}; {served}", param="model", code="model_not_found")
        return next(iter(self.models.values())) if name is None else self.models[name]

    @property
    def broken(self) -> str | None:
        """The reason why no model can serve requests any more, as text; None if at least one model can."""
        reasons = [model.broken for model in self.models.values()]
        return self._join(reasons) if all(reasons) else None

    @property
    def ended(self) -> bool:
        """True if all engines' threads have ended."""
        return all(model.driver.ended.is_set() for model in self.models.values())

    async def wait_ended(self) -> None:
        """Wait until all engines' threads have ended."""
        for model in self.models.values():
            await model.driver.ended.wait()

    def alive(self) -> str | None:
        """Liveness check. Returns the reason why the process should be restarted, as text; None if it is healthy."""
        return self._join([model.broken or model.hanging(self.options.step_timeout) for model in self.models.values()])

    def admitting(self, model: ServedModel) -> Problem | None:
        """Returns the error that a new request for this model would get now; None if it would be admitted."""
        if self.draining and not model.broken:
            return Problem(503, "the server is shutting down and admits no requests", code="draining", retry_after=1)
        return model.refusal()

    def ready(self) -> Problem | None:
        """Readiness check. Returns None if at least one model admits requests, else the first model's error."""
        refusals = [self.admitting(model) for model in self.models.values()]
        return refusals[0] if all(refusals) else None

    def _join(self, reasons: list[str | None]) -> str | None:
        """Returns one line of text that joins the given reasons; None if all of them are None.

        reasons: for each model, in the order of self.models, the reason why it does not work; None if it works. If the
        server has several models, each reason in the text is preceded by its model's name.
        """
        named = [(name, why) for name, why in zip(self.models, reasons, strict=True) if why]
        return "; ".join(f"{name}: {why}" if len(reasons) > 1 else why for name, why in named) or None

    def _send(self, message: Drain | Halt) -> None:
        for model in self.models.values():
            model.driver.send(message)
