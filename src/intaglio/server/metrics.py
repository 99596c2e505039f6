"""What Prometheus reads: the engine's counts and gauges, and latencies of requests, under vLLM's names, so that its
dashboards and routers work; what vLLM has no name for begins with `intaglio:`. Modelled seconds are never under a name
of measured ones: they begin with `intaglio:modelled_`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from intaglio.runtime import StepRecord, Usage
from intaglio.server.driver import Answer, Piece, Snapshot

FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
EACH = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80)
WHOLE = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
STEP = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
REASONS = ("stop", "length", "abort", "deadline", "error")
HISTOGRAMS = {
    "time_to_first_token_seconds": ("From arrival to the first token.", FIRST),
    "inter_token_latency_seconds": ("Between tokens of one choice.", EACH),
    "request_time_per_output_token_seconds": ("A request's mean time a token after its first.", EACH),
    "e2e_request_latency_seconds": ("From arrival to the end.", WHOLE),
    "request_queue_time_seconds": ("From arrival to the first step.", WHOLE),
    "request_prefill_time_seconds": ("From the first step to the first token.", WHOLE),
    "request_decode_time_seconds": ("From the first token to the end.", WHOLE),
    "request_inference_time_seconds": ("From the first step to the end.", WHOLE),
    "request_prompt_tokens": ("Tokens of a prompt.", TOKENS),
    "request_generation_tokens": ("Tokens of an output.", TOKENS),
    "request_params_max_tokens": ("max_tokens asked for.", TOKENS),
    "request_params_n": ("n asked for.", (1, 2, 5, 10, 20)),
    "iteration_tokens_total": ("Tokens of a step.", STEP),
}


class Metrics:
    """One server's series. `look` gives the engine's last Snapshot, `facts` what never changes; `modelled` is the
    engine's clock, if its seconds are modelled."""

    def __init__(
        self,
        model: str,
        look: Callable[[], Snapshot],
        facts: dict[str, str],
        modelled: Callable[[], float] | None = None,
    ) -> None:
        self.labels = {"model_name": model, "engine": "0"}
        self.registry = CollectorRegistry()
        names = list(self.labels)
        families = {}
        for name, (text, buckets) in HISTOGRAMS.items():
            title = f"vllm:{name}"
            if modelled and name.endswith("_seconds"):  # of a chip, whose steps may take microseconds
                title, text = f"intaglio:modelled_{name}", f"{text} Modelled."
                buckets = tuple(sorted({b / 1000 for b in buckets} | set(buckets)))
            families[name] = Histogram(title, text, names, buckets=buckets, registry=self.registry)
        self.histograms = {name: family.labels(**self.labels) for name, family in families.items()}
        self.registry.register(_Engine(self.labels, look, facts, modelled))
        self._last: dict[tuple[str, int], float] = {}  # when each running choice last gave a token
        self._step = 0

    def render(self) -> bytes:
        return generate_latest(self.registry)

    def watch(self, answers: list[Answer], step: StepRecord | None) -> None:
        """Take in what a step gave."""
        observe = self.histograms
        if step and step.number > self._step:
            self._step = step.number
            observe["iteration_tokens_total"].observe(step.prefill_tokens + step.decode_tokens)
        now = step.began + step.seconds if step else 0.0
        for ticket, what in answers:
            if not isinstance(what, Piece):
                continue
            key = (ticket.jobs[0].request.id, what.choice)
            if what.scored:
                if key in self._last:
                    observe["inter_token_latency_seconds"].observe(max(0.0, now - self._last[key]))
                self._last[key] = now
            if what.finish_reason:
                self._last.pop(key, None)
            if what.usage:
                params = ticket.jobs[what.choice // ticket.n].request.params
                self._ended(what.usage, params.max_tokens, params.n)

    def _ended(self, u: Usage, max_tokens: int, n: int) -> None:
        seen = {
            "e2e_request_latency_seconds": u.ended - u.arrived,
            "request_prompt_tokens": u.prompt_tokens,
            "request_generation_tokens": u.output_tokens,
            "request_params_max_tokens": max_tokens,
            "request_params_n": n,
        }
        if u.started is not None:
            seen["request_queue_time_seconds"] = u.started - u.arrived
            seen["request_inference_time_seconds"] = u.ended - u.started
        if u.started is not None and u.first_token is not None:
            seen["time_to_first_token_seconds"] = u.first_token - u.arrived
            seen["request_prefill_time_seconds"] = u.first_token - u.started
            seen["request_decode_time_seconds"] = u.ended - u.first_token
            if u.output_tokens > 1:
                seen["request_time_per_output_token_seconds"] = (u.ended - u.first_token) / (u.output_tokens - 1)
        for name, value in seen.items():
            self.histograms[name].observe(value)


class _Engine(Collector):
    """Counters and gauges, read from the engine's snapshot when asked for."""

    def __init__(
        self,
        labels: dict[str, str],
        look: Callable[[], Snapshot],
        facts: dict[str, str],
        modelled: Callable[[], float] | None,
    ) -> None:
        self.labels, self.look, self.facts, self.modelled = labels, look, facts, modelled

    def collect(self) -> Iterator[Metric]:
        snapshot = self.look()
        g, c = snapshot.gauges, snapshot.counts
        yield self._gauge("vllm:num_requests_running", "Choices in the running batch.", g.running)
        yield self._gauge("vllm:num_requests_waiting", "Choices waiting to run.", g.waiting)
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of KV blocks held; 1 is all.", g.kv_usage)
        yield self._gauge("intaglio:kv_blocks_cached", "KV blocks kept for their content alone.", g.blocks_cached)
        yield self._gauge("intaglio:draining", "Whether nothing more is admitted.", int(g.draining))
        facts = GaugeMetricFamily("vllm:cache_config_info", "The KV cache.", labels=[*self.labels, *self.facts])
        facts.add_metric([*self.labels.values(), *self.facts.values()], 1)
        yield facts
        if self.modelled:
            text = "Seconds that have passed on the chips, modelled."
            yield self._gauge("intaglio:modelled_clock_seconds", text, self.modelled())
        totals = {
            "vllm:num_preemptions": ("Times a choice was put back to wait.", c.preemptions),
            "vllm:prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", c.prompt_tokens),
            "vllm:prefix_cache_hits": ("Prompt tokens found there.", c.cached_tokens),
            "vllm:prompt_tokens": ("Tokens of prompts begun.", c.prompt_tokens),
            "vllm:prompt_tokens_cached": ("Of these, found in the prefix cache.", c.cached_tokens),
            "vllm:generation_tokens": ("Tokens generated.", c.output_tokens),
            "vllm:spec_decode_num_drafts": ("Rounds of speculation.", c.drafts),
            "vllm:spec_decode_num_draft_tokens": ("Tokens guessed.", c.draft_tokens),
            "vllm:spec_decode_num_accepted_tokens": ("Of these, right.", c.accepted_tokens),
            "intaglio:steps": ("Steps of the engine.", c.steps),
            "intaglio:device_restarts": ("Times the device was replaced.", c.restarts),
            "intaglio:requests_admitted": ("Choices taken in.", c.admitted),
        }
        for name, (text, value) in totals.items():
            yield self._counter(name, text, {(): value}, ())
        ended: dict[tuple[str, ...], int] = {(r,): c.finished[r] for r in REASONS}
        yield self._counter("vllm:request_success", "Choices that ended, by reason.", ended, ("finished_reason",))
        refused: dict[tuple[str, ...], int] = {
            (r,): c.refused[r] for r in ("full", "late", "draining", "failed", "invalid")
        }
        yield self._counter("intaglio:requests_refused", "Choices refused, by reason.", refused, ("reason",))
        faults: dict[tuple[str, ...], int] = {(kind,): c.faults[kind] for kind in ("request", "step", "worker")}
        yield self._counter("intaglio:faults", "Requests, launches and devices that failed.", faults, ("kind",))

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=list(self.labels))
        family.add_metric(list(self.labels.values()), value)
        return family

    def _counter(self, name: str, text: str, values: Mapping[tuple[str, ...], int], more: tuple[str, ...]) -> Metric:
        family = CounterMetricFamily(name, text, labels=[*self.labels, *more])
        for label, value in values.items():
            family.add_metric([*self.labels.values(), *label], value)
        return family
