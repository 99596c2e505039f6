"""Prometheus metrics: the engine's counters and gauges, and latency histograms.

Names are vLLM's, so that its dashboards and routers work; metrics that vLLM lacks begin with `intaglio:`. Modelled
seconds have names of their own, which begin with `intaglio:modelled_`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from intaglio.runtime import StepRecord, TierCounts, Usage
from intaglio.server.driver import ChoiceDelta, Snapshot, Update

FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
EACH = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80)
WHOLE = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
STEP = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
LABELS = ("model_name", "engine")  # vLLM's; there is one engine a model
REASONS = ("stop", "length", "abort", "deadline", "error")
REFUSALS = ("full", "late", "draining", "failed", "invalid")
FAULTS = ("request", "step", "worker")
TIER_EVENTS = ("hits", "misses", "corrupt", "late", "saved", "dropped", "evicted", "refused", "expired", "errors")
ByLabel = Mapping[tuple[str, ...], float]  # values by the values of further labels
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
    """Prometheus registry of one server; every series has the label model_name.

    modelled: True if times are those of simulated chips. Histograms of times then have names that begin with
    intaglio:modelled_ instead of vllm:.
    """

    def __init__(self, modelled: bool = False) -> None:
        self.registry = CollectorRegistry()
        self.families: dict[str, Histogram] = {}
        self.models: list[ModelMetrics] = []
        for name, (text, buckets) in HISTOGRAMS.items():
            title = f"vllm:{name}"
            if modelled and name.endswith("_seconds"):  # steps of a simulated chip may take microseconds
                title, text = f"intaglio:modelled_{name}", f"{text} Modelled."
                buckets = tuple(sorted({b / 1000 for b in buckets} | set(buckets)))
            self.families[name] = Histogram(title, text, LABELS, buckets=buckets, registry=self.registry)
        self.registry.register(EngineCollector(self.models))

    def render(self) -> bytes:
        """Returns all metrics in Prometheus' text format, as bytes."""
        return generate_latest(self.registry)

    def add_model(
        self, name: str, look: Callable[[], Snapshot], facts: dict[str, str], clock: Callable[[], float] | None = None,
        tier: TierCounts | None = None,
    ) -> ModelMetrics:  # fmt: skip
        """Add the metrics of one model to the registry. Returns its ModelMetrics.

        Args:
            name: the model's name.
            look: function that returns the engine's latest Snapshot.
            facts: properties of the K/V cache, as labels of the metric cache_config_info.
            clock: function that returns the engine's modelled time in seconds; None if times are measured.
            tier: counts of the tier, the store in which the engine keeps K/V blocks; None if it has no tier.
        """
        labels = dict(zip(LABELS, (name, "0"), strict=True))
        histograms = {title: family.labels(**labels) for title, family in self.families.items()}
        self.models.append(ModelMetrics(labels, histograms, look, facts, clock, tier))
        return self.models[-1]


class ModelMetrics:
    """Latency histograms of one model, and the functions that EngineCollector calls for its counters and gauges.

    Attributes:
        labels: Prometheus labels of the model.
        histograms: the histograms by name, without prefix.
        look: function that returns the engine's latest Snapshot.
        facts: fixed properties of the K/V cache, name to text.
        clock: function that returns the modelled time in seconds; None if times are measured.
        tier: counts of the tier, the store in which the engine keeps K/V blocks; None if it has no tier.
    """

    def __init__(
        self, labels: dict[str, str], histograms: dict[str, Histogram], look: Callable[[], Snapshot],
        facts: dict[str, str], clock: Callable[[], float] | None, tier: TierCounts | None,
    ) -> None:  # fmt: skip
        self.labels, self.histograms, self.look, self.facts, self.clock = labels, histograms, look, facts, clock
        self.tier = tier
        self._last: dict[tuple[str, int], float] = {}  # time of the last token of each running choice
        self._step = 0

    def watch(self, updates: list[Update], step: StepRecord | None) -> None:
        """Add the latest updates of the engine to the histograms. Returns nothing.

        updates: the new updates; each ChoiceDelta among them adds its latencies, other updates are ignored. step: the
        engine's latest step, or None before the first step; its token count is added once, even if the step is passed
        again.
        """
        observe = self.histograms
        if step and step.number > self._step:
            self._step = step.number
            observe["iteration_tokens_total"].observe(step.prefill_tokens + step.decode_tokens)
        now = step.began + step.seconds if step else 0.0
        for submission, what in updates:
            if not isinstance(what, ChoiceDelta):
                continue
            key = (submission.prompts[0].request.id, what.choice)
            if what.scored:
                if key in self._last:
                    observe["inter_token_latency_seconds"].observe(max(0.0, now - self._last[key]))
                self._last[key] = now
            if what.finish_reason:
                self._last.pop(key, None)
            if what.usage:
                params = submission.prompts[what.choice // submission.n].request.params
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


IMBALANCE = "Largest load of a rank over the mean; of an expert, if the layout has no redundant experts."


class EngineCollector(Collector):
    """Counters and gauges of all models, read from their engines' snapshots at each scrape."""

    def __init__(self, models: Sequence[ModelMetrics]) -> None:
        self.models = models

    def collect(self) -> Iterator[Metric]:
        gauges = {
            "vllm:num_requests_running": ("Choices in the running batch.", lambda g: g.running),
            "vllm:num_requests_waiting": ("Choices waiting to run.", lambda g: g.waiting),
            "vllm:kv_cache_usage_perc": ("Share of KV blocks in use; 1 is all.", lambda g: g.kv_usage),
            "intaglio:kv_blocks_cached": ("KV blocks kept for their content alone.", lambda g: g.blocks_cached),
            "intaglio:state_slots": ("Slots of recurrent state.", lambda g: g.slots),
            "intaglio:state_slots_held": ("Of these, held by sequences.", lambda g: g.slots_held),
            "intaglio:state_checkpoints": ("Of these, kept for the prefix cache alone.", lambda g: g.checkpoints),
            "intaglio:window_blocks": ("Blocks of layers with a window.", lambda g: g.window_blocks),
            "intaglio:window_blocks_reserved": ("Of these, reserved.", lambda g: g.window_blocks_reserved),
            "intaglio:window_blocks_held": ("Of these, held by sequences.", lambda g: g.window_blocks_held),
            "intaglio:draining": ("Whether nothing more is admitted.", lambda g: int(g.draining)),
        }  # fmt: skip
        seen = [(m, m.look()) for m in self.models]
        for name, (text, read) in gauges.items():
            yield _gauge(name, text, [(m, read(s.gauges)) for m, s in seen])
        for m in self.models[:1]:
            facts = GaugeMetricFamily("vllm:cache_config_info", "The KV cache.", labels=[*LABELS, *m.facts])
            for model in self.models:
                facts.add_metric([*model.labels.values(), *model.facts.values()], 1)
            yield facts
        clocks = [(m, m.clock()) for m in self.models if m.clock]
        if clocks:
            yield _gauge("intaglio:modelled_clock_seconds", "Seconds that have passed on the chips, modelled.", clocks)
        totals = {
            "vllm:num_preemptions": ("Preemptions of sequences.", lambda c: c.preemptions),
            "vllm:prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", lambda c: c.prompt_tokens),
            "vllm:prefix_cache_hits": ("Prompt tokens found there.", lambda c: c.cached_tokens),
            "vllm:prompt_tokens": ("Tokens of prompts begun.", lambda c: c.prompt_tokens),
            "vllm:prompt_tokens_cached": ("Of these, found in the prefix cache.", lambda c: c.cached_tokens),
            "vllm:generation_tokens": ("Tokens generated.", lambda c: c.output_tokens),
            "vllm:spec_decode_num_drafts": ("Rounds of speculation.", lambda c: c.drafts),
            "vllm:spec_decode_num_draft_tokens": ("Draft tokens proposed.", lambda c: c.draft_tokens),
            "vllm:spec_decode_num_accepted_tokens": ("Of these, accepted.", lambda c: c.accepted_tokens),
            "intaglio:steps": ("Steps of the engine.", lambda c: c.steps),
            "intaglio:device_restarts": ("Times the device was replaced.", lambda c: c.restarts),
            "intaglio:requests_admitted": ("Choices taken in.", lambda c: c.admitted),
        }
        for name, (text, read) in totals.items():
            yield _counter(name, text, [(m, {(): read(s.counts)}) for m, s in seen])
        yield from self._tiers()
        yield from self._experts(seen)
        by_label = {
            "vllm:request_success": ("Choices ended, by reason.", "finished_reason", REASONS, lambda c: c.finished),
            "intaglio:requests_refused": ("Choices refused, by reason.", "reason", REFUSALS, lambda c: c.refused),
            "intaglio:faults": ("Requests, launches and devices that failed.", "kind", FAULTS, lambda c: c.faults),
        }
        for name, (text, label, values, read) in by_label.items():
            yield _counter(name, text, [(m, {(v,): read(s.counts)[v] for v in values}) for m, s in seen], label)

    def _experts(self, seen: Sequence[tuple[ModelMetrics, Snapshot]]) -> Iterator[Metric]:
        """Yield the metrics of mixture-of-experts layers.

        Nothing is yielded if no engine counts the tokens of each expert.

        seen: for each model, its ModelMetrics and its engine's latest Snapshot.
        """
        mixtures = [(m, s) for m, s in seen if s.experts]
        if not mixtures:
            return
        tokens: list[tuple[ModelMetrics, ByLabel]] = [
            (m, {(site, str(e)): n for site, load in s.experts.items() for e, n in enumerate(load.tokens.tolist())})
            for m, s in mixtures
        ]
        yield _counter("intaglio:expert_tokens", "Tokens routed to each expert.", tokens, "site", "expert")
        ranks = GaugeMetricFamily("intaglio:expert_imbalance", IMBALANCE, labels=[*LABELS, "site"])
        for m, s in mixtures:
            for site, load in s.experts.items():
                ranks.add_metric([*m.labels.values(), site], load.imbalance())
        yield ranks
        moves: list[tuple[ModelMetrics, ByLabel]] = [(m, {(): s.expert_moves}) for m, s in mixtures]
        yield _counter("intaglio:expert_moves", "Layers whose experts were moved between ranks.", moves)
        text = "1 if experts cannot be moved, as the log says why; 0 otherwise."
        failed = GaugeMetricFamily("intaglio:expert_moves_failed", text, labels=LABELS)
        for m, s in mixtures:
            failed.add_metric(list(m.labels.values()), float(bool(s.expert_failure)))
        yield failed

    def _tiers(self) -> Iterator[Metric]:
        """Yield the metrics of the tiers, the stores in which engines keep K/V blocks.

        Nothing is yielded if no model has a tier.
        """
        tiers = [(m, m.tier) for m in self.models if m.tier]
        if not tiers:
            return
        sizes = [int(m.facts["block_size"]) for m, _ in tiers]
        text = "Prompt tokens looked up in the K/V tier."
        asked: list[tuple[ModelMetrics, ByLabel]] = [
            (m, {(): (t.hits + t.misses + t.late) * size}) for (m, t), size in zip(tiers, sizes, strict=True)
        ]
        yield _counter("vllm:external_prefix_cache_queries", text, asked)
        hits: list[tuple[ModelMetrics, ByLabel]] = [
            (m, {(): t.hits * size}) for (m, t), size in zip(tiers, sizes, strict=True)
        ]
        yield _counter("vllm:external_prefix_cache_hits", "Prompt tokens loaded from there.", hits)
        events: list[tuple[ModelMetrics, ByLabel]] = [
            (m, {(event,): getattr(t, event) for event in TIER_EVENTS}) for m, t in tiers
        ]
        yield _counter("intaglio:kv_tier_blocks", "Blocks of the K/V tier, by what became of them.", events, "event")
        moved: list[tuple[ModelMetrics, ByLabel]] = [
            (m, {("load",): t.loaded_bytes, ("save",): t.saved_bytes}) for m, t in tiers
        ]
        yield _counter("intaglio:kv_tier_bytes", "Bytes loaded from and saved in the K/V tier.", moved, "direction")
        yield _gauge("intaglio:kv_tier_held_bytes", "Bytes in the K/V tier.", [(m, t.held_bytes) for m, t in tiers])


def _gauge(name: str, text: str, values: list[tuple[ModelMetrics, float]]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=LABELS)
    for model, value in values:
        family.add_metric([*model.labels.values()], value)
    return family


def _counter(name: str, text: str, values: list[tuple[ModelMetrics, ByLabel]], *more: str) -> Metric:
    family = CounterMetricFamily(name, text, labels=[*LABELS, *more])
    for model, by_label in values:
        for label, value in by_label.items():
            family.add_metric([*model.labels.values(), *label], value)
    return family
