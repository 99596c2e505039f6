"""OpenTelemetry traces: the spans of a request, with their times and attributes, belong to the client's trace."""

from __future__ import annotations

import builtins
import random
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.collector import trace_collector
from support.served import served

from intaglio.runtime import Usage
from intaglio.server.tracing import Tracing, span, trace_choices, trace_headers


def test_a_request_is_a_span_with_its_phases(folder: Path) -> None:
    trace, parent = f"{random.getrandbits(128) | 1:032x}", f"{random.getrandbits(64) | 1:016x}"
    with trace_collector() as collector:
        tracing = Tracing(collector.url, "tests")
        with served(folder, tracing=tracing) as s:
            body: dict[str, Any] = {"model": "tiny", "prompt": "abc", "max_tokens": 5, "n": 2, "ignore_eos": True}
            s.post("/v1/completions", body, headers={"traceparent": f"00-{trace}-{parent}-01"})
            s.post("/v1/completions", {**body, "n": 1, "stream": True})
            s.post("/v1/completions", {"model": "other", "prompt": "a"})
            s.get("/v1/models")
            s.quiet()
        tracing.close()
        first, second, refused = sorted(collector.named("POST /v1/completions"), key=lambda s: s.began)
        assert len(collector.spans) == 3 + 3 * 3  # of each choice: queue, prefill, decode
    assert (first.trace, first.parent, first.service) == (trace, parent, "tests")
    assert second.parent == "" and second.trace != trace
    assert not collector.children(refused)
    for request, n in ((first, 2), (second, 1)):
        children = collector.children(request)
        for choice in range(n):
            phases = [c for c in children if c.attributes["intaglio.choice"] == choice]
            assert [p.name for p in phases] == ["queue", "prefill", "decode"]
            assert all(a.ended == b.began for a, b in pairwise(phases))
            assert request.began <= phases[0].began and phases[-1].ended <= request.ended
            last = phases[-1].attributes
            assert last["gen_ai.usage.input_tokens"] == 3 and last["gen_ai.usage.output_tokens"] == 5


def test_phases_are_recorded_at_their_times_however_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow client takes the last part of its response long after the choice has ended."""
    late, today = random.uniform(1.0, 500.0), 1e9
    monkeypatch.setattr("intaglio.server.tracing.time", SimpleNamespace(time=lambda: today))
    with trace_collector() as collector:
        tracing = Tracing(collector.url, "tests")
        with tracing.request("POST /v1/completions", {}):
            trace_choices({0: Usage(3, 0, 5, 0, 10.0, 11.0, 12.0, 14.0)}, "tiny", 14.0 + late)
        tracing.close()
    [decode] = collector.named("decode")
    assert abs(decode.ended / 1e9 - (today - late)) < 1e-5 and abs(decode.ended - decode.began - 2e9) < 1e4


def test_without_a_traced_request_nothing_is_recorded() -> None:
    with span("anything", replica="r0"):
        assert trace_headers() == []


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def refuse(name: str, *arguments: Any, **more: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ImportError(f"no {name}", name="opentelemetry")
        return load(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ValueError, match=r"traces need opentelemetry: pip install 'intaglio\[otel\]'"):
        Tracing("http://localhost:1/v1/traces", "tests")
