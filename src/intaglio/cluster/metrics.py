"""Prometheus metrics of the router, with values for each replica. Names are those of the vLLM production stack.

The label `server` is the replica's name. Metrics that the production stack lacks begin with `intaglio:`.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from intaglio.cluster.backends import Backends
from intaglio.cluster.prefill import PREFILLS
from intaglio.cluster.relayed import RelayedRequest
from intaglio.router import Replica

WINDOW = 30.0  # seconds over which rates and averages are taken
LATENCY = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
MODELS_MAX = 64  # different values of the label `model`, which clients choose


class RouterMetrics:
    """The router's Prometheus metrics: counters of requests and histograms of their latencies.

    render() returns these metrics together with those of RouterCollector, which are read from the router at that
    moment.
    """

    def __init__(self, backends: Backends) -> None:
        self.backends, self.registry = backends, CollectorRegistry()
        self._models: dict[str, Counter] = {}  # the counters of incoming requests
        self._latencies: dict[tuple[str, str], Histogram] = {}  # by labels: replica, status
        self._incoming = Counter(
            "vllm:num_incoming_requests", "Requests that came to the router.", ["model"], registry=self.registry
        )
        self._latency = Histogram(
            "vllm:request_latency_seconds", "From a request's arrival at the router to its end.",
            ["server", "status"], buckets=LATENCY, registry=self.registry,
        )  # fmt: skip
        self.registry.register(RouterCollector(backends))

    def render(self) -> bytes:
        """Returns all metrics in Prometheus' text format, as bytes.

        First deletes the latencies of replicas that have been removed from the router, so that they do not appear any
        more.
        """
        for pair in [p for p in self._latencies if p[0] and p[0] not in self.backends.router.replicas]:
            self._latency.remove(*pair)
            del self._latencies[pair]
        return generate_latest(self.registry)

    def incoming(self, model: str) -> None:
        """Count a request that has come in. model: the name of the model that the request asks for.

        Once MODELS_MAX different names have been counted, a new name counts as "other".
        """
        if (counter := self._models.get(model)) is None:
            model = model if len(self._models) < MODELS_MAX else "other"
            counter = self._models[model] = self._incoming.labels(model)
        counter.inc()

    def ended(self, request: RelayedRequest) -> None:
        """Record the latencies of a request that has ended.

        The time of the whole request is labelled with replica and status, the time to the first token with the replica.
        """
        now = self.backends.clock()
        seconds = now - request.began
        labels = request.replica, str(request.status or "none")
        if (latency := self._latencies.get(labels)) is None:
            latency = self._latencies[labels] = self._latency.labels(*labels)
        latency.observe(seconds)
        if request.replica in self.backends.finished and request.first is not None:
            self.backends.finished[request.replica].append((now, request.first - request.began, seconds))


class RouterCollector(Collector):
    """Gauges and counters read from the router and its replicas at each scrape."""

    def __init__(self, backends: Backends) -> None:
        self.backends = backends

    def collect(self) -> Iterator[Metric]:
        router, backends = self.backends.router, self.backends
        replicas = list(router.replicas.values())
        since = backends.clock() - WINDOW
        late = {r.name: [f for f in backends.finished.get(r.name, ()) if f[0] >= since] for r in replicas}

        def mean(r: Replica, at: int) -> float:
            return sum(f[at] for f in late[r.name]) / len(late[r.name]) if late[r.name] else 0.0

        gauges = {
            "vllm:healthy_pods_total": ("1 if the replica takes requests.", lambda r: int(r.placeable)),
            "vllm:num_requests_running": ("Choices in the running batch.", lambda r: r.report.running),
            "vllm:num_requests_waiting": ("Choices waiting in the replica.", lambda r: r.report.waiting),
            "vllm:num_prefill_requests": ("Requests without a token yet.", lambda r: len(r.prefills)),
            "vllm:num_decoding_requests": ("Requests with a token.", lambda r: len(r.jobs) - len(r.prefills)),
            "vllm:kv_cache_usage_perc": ("Share of KV blocks in use; 1 is all.", lambda r: r.report.kv_usage),
            "vllm:gpu_prefix_cache_hits_total": ("Prompt tokens found cached.", lambda r: r.report.cached_tokens),
            "vllm:gpu_prefix_cache_queries_total": ("Prompt tokens looked up.", lambda r: r.report.prompt_tokens),
            "vllm:gpu_prefix_cache_hit_rate": (
                "Of prompt tokens looked up, the share found.",
                lambda r: r.report.cached_tokens / max(1, r.report.prompt_tokens),
            ),
            "vllm:current_qps": ("Requests ended a second, of late.", lambda r: len(late[r.name]) / WINDOW),
            "vllm:avg_ttft": ("Mean time to the first token of late, seconds.", lambda r: mean(r, 1)),
            "vllm:avg_latency": ("Mean time of requests of late, seconds.", lambda r: mean(r, 2)),
            "intaglio:replica_index_stale": ("1 while block events are missing.", lambda r: int(r.index.stale)),
            "intaglio:replica_index_blocks": ("KV blocks known to be cached.", lambda r: len(r.index.names)),
        }  # fmt: skip
        for name, (text, read) in gauges.items():
            gauge = GaugeMetricFamily(name, text, labels=["server"])
            for r in replicas:
                gauge.add_metric([r.name], read(r))
            yield gauge
        losses = CounterMetricFamily("intaglio:replica_lost_requests", "Requests it lost by dying.", labels=["server"])
        for r in replicas:
            losses.add_metric([r.name], r.failures)
        yield losses
        tiers = CounterMetricFamily(
            "intaglio:kv_tier_blocks", "K/V blocks of the replica's --kv-cache-dir.", labels=["server", "event"]
        )
        for r in replicas:
            for event, count in r.report.tier.items():
                if not event.endswith("_bytes"):
                    tiers.add_metric([r.name, event], count)
        yield tiers
        yield GaugeMetricFamily("intaglio:router_queued", "Requests that wait in the router.", len(router.queue))
        yield CounterMetricFamily(
            "intaglio:router_cached_tokens", "Prompt tokens expected cached.", router.cached_tokens
        )
        yield CounterMetricFamily("intaglio:router_placements", "Times a request was placed.", router.placements)
        for name, text, label, counts, values in (
            ("intaglio:router_refused", "Requests refused.", "reason", router.refused, ("full", "late", "unavailable")),
            ("intaglio:router_moves", "Requests moved.", "cause", backends.moves, ("lost", "drained", "refused")),
            ("intaglio:router_prefills", "Prompts given to prefill replicas.", "result", backends.prefills, PREFILLS),
        ):
            counter = CounterMetricFamily(name, text, labels=[label])
            for value in values:
                counter.add_metric([value], counts[value])
            yield counter
