"""A collector of OpenTelemetry traces for tests: receives OTLP over HTTP and keeps the spans."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class Span:
    """One span. Ids are in hexadecimal, "" for no parent; times in nanoseconds since 1970."""

    service: str
    name: str
    trace: str
    id: str
    parent: str
    began: int
    ended: int
    attributes: dict[str, Any]


class TraceCollector:
    """The spans received so far, and the URL to send them to."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.url = ""

    def named(self, *names: str) -> list[Span]:
        return [s for s in self.spans if s.name in names]

    def children(self, parent: Span) -> list[Span]:
        return sorted((s for s in self.spans if s.parent == parent.id), key=lambda s: s.began)

    def receive(self, content: bytes) -> None:
        for resource in ExportTraceServiceRequest.FromString(content).resource_spans:
            service = _values(resource.resource.attributes)["service.name"]
            for s in (s for scope in resource.scope_spans for s in scope.spans):
                times = s.start_time_unix_nano, s.end_time_unix_nano
                ids = s.trace_id.hex(), s.span_id.hex(), s.parent_span_id.hex()
                self.spans.append(Span(service, s.name, *ids, *times, _values(s.attributes)))


def _values(pairs: Any) -> dict[str, Any]:
    return {p.key: getattr(p.value, p.value.WhichOneof("value")) for p in pairs}


@contextmanager
def trace_collector() -> Iterator[TraceCollector]:
    """A collector that listens on a free port of this host."""
    collector = TraceCollector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # the name that http.server calls
            collector.receive(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    collector.url = f"http://127.0.0.1:{server.server_port}/v1/traces"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
