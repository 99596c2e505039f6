"""Traces of requests for OpenTelemetry, sent to a collector over OTLP. Needs `pip install 'intaglio[otel]'`.

A server and a router each record one span per request, with the phases of the request as its children. The header
`traceparent` (W3C Trace Context) joins them to one trace: with the client's spans, and a replica's with the router's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from itertools import pairwise
from typing import Any

from intaglio.runtime import Usage

GENERATE = frozenset(("/v1/chat/completions", "/v1/completions"))  # paths that generate
_active: ContextVar[Any] = ContextVar("tracer", default=None)  # OpenTelemetry's Tracer of the request in progress


class Tracing:
    """Records OpenTelemetry spans and sends them to a collector.

    A background thread sends the spans in batches.

    endpoint: URL of the collector for traces over HTTP, such as http://localhost:4318/v1/traces. service: name of this
    process in the traces. Raises ValueError if OpenTelemetry is not installed.
    """

    def __init__(self, endpoint: str, service: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as e:
            raise ValueError(f"traces need {e.name}: pip install 'intaglio[otel]'") from None
        self._provider = TracerProvider(resource=Resource.create({"service.name": service}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("intaglio")

    @contextmanager
    def request(self, name: str, headers: Mapping[str, str]) -> Iterator[None]:
        """Context manager that records the span of a request. It yields nothing.

        Spans that are recorded inside the block, such as those of span(), become children of this span. If the request
        has the header `traceparent`, the span becomes a child of the span that the header names.

        name: the span's name. headers: headers of the HTTP request, with names in lower case.
        """
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = TraceContextTextMapPropagator().extract(headers)
        token = _active.set(self._tracer)
        try:
            with self._tracer.start_as_current_span(name, context=parent, kind=SpanKind.SERVER):
                yield
        finally:
            _active.reset(token)

    def close(self) -> None:
        """Send the spans that have not been sent yet, and stop."""
        self._provider.shutdown()


def traced(tracing: Tracing | None, method: str, path: str, headers: Mapping[str, str]) -> AbstractContextManager[None]:
    """Context manager that records the span of an HTTP request if its path generates text. It yields nothing.

    It does nothing for other paths, or if `tracing` is None.

    method, path: method and path of the request, which make the span's name. headers: its headers, with names in lower
    case.
    """
    if tracing is None or path not in GENERATE:
        return nullcontext()
    return tracing.request(f"{method} {path}", headers)


def span(name: str, **attributes: str | int) -> AbstractContextManager[Any]:
    """Context manager that records a span as a child of the current span.

    Outside a traced request it does nothing. If an exception leaves the block, the span records it. name: the span's
    name. attributes: the span's attributes.
    """
    tracer = _active.get()
    return nullcontext() if tracer is None else tracer.start_as_current_span(name, attributes=attributes)


def trace_headers() -> list[tuple[str, str]]:
    """Returns the HTTP headers that continue the current trace in another process, as a list of (name, value).

    Send them with a request: the receiver's spans then become children of the current span. The list is empty if no
    request is being traced.
    """
    if _active.get() is None:
        return []
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return list(carrier.items())


def trace_choices(usages: Mapping[int, Usage], model: str, now: float) -> None:
    """Record the phases queue, prefill and decode of each choice as children of the current request's span.

    Nothing is recorded if the request is not traced or `usages` is empty. Phases that a choice did not reach are left
    out. Attributes that OpenTelemetry's conventions for generative AI define have the conventions' names; the names of
    the other attributes begin with "intaglio.". Returns nothing.

    Args:
        usages: the Usage (token counts and times) of each choice, by the choice's number.
        model: the model's name.
        now: the present time by the engine's clock in seconds, needed to convert the engine's times to times of day.
    """
    tracer = _active.get()
    if tracer is None or not usages:
        return
    shift = time.time() - now
    for choice, u in usages.items():
        facts = {"gen_ai.request.model": model, "intaglio.choice": choice}
        counts = {
            "gen_ai.usage.input_tokens": u.prompt_tokens, "gen_ai.usage.output_tokens": u.output_tokens,
            "intaglio.cached_tokens": u.cached_tokens, "intaglio.preemptions": u.preemptions,
        }  # fmt: skip
        edges = [("queue", u.arrived), ("prefill", u.started), ("decode", u.first_token), ("", u.ended)]
        reached = [(name, at) for name, at in edges if at is not None]
        for (name, began), (_, end) in pairwise(reached):
            own = counts if name == reached[-2][0] else {}
            child = tracer.start_span(name, start_time=_nanoseconds(began + shift), attributes={**facts, **own})
            child.end(_nanoseconds(end + shift))


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
