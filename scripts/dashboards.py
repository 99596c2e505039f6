"""Write the Grafana dashboards, deploy/grafana/dashboards/*.json, from the tables of panels below.

python scripts/dashboards.py
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent / "deploy" / "grafana" / "dashboards"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
ACROSS, WIDTH, HEIGHT = 3, 8, 7  # panels in a row, and a panel's size in Grafana's grid of 24 columns
PERIOD = "[$__rate_interval]"


@dataclass(frozen=True)
class Panel:
    """One time series panel: its title, Grafana unit, and queries, each PromQL with the legend of its series."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]


def rate(metric: str, by: str = "") -> str:
    """PromQL: the rate of a counter per second, summed; by: the label whose values stay apart."""
    return f"sum{f' by ({by}) ' if by else ''}(rate({metric}{PERIOD}))"


def quantiles(histogram: str) -> tuple[tuple[str, str], ...]:
    """Queries for the 50th and 99th percentile of a histogram."""
    return tuple(
        (f"histogram_quantile({q}, sum by (le) (rate({histogram}_bucket{PERIOD})))", f"p{round(100 * q)}")
        for q in (0.5, 0.99)
    )


CLUSTER = (
    Panel("Replicas that take requests", "short", (("sum(vllm:healthy_pods_total)", "replicas"),)),
    Panel("Requests a second", "reqps", ((rate("vllm:num_incoming_requests_total", "model"), "{{model}}"),)),
    Panel("Waiting in the router", "short", (("intaglio:router_queued", "requests"),)),
    Panel("Latency", "s", quantiles("vllm:request_latency_seconds")),
    Panel("Time to the first token, mean", "s", (("vllm:avg_ttft", "{{server}}"),)),
    Panel("Refused a second", "reqps", ((rate("intaglio:router_refused_total", "reason"), "{{reason}}"),)),
    Panel("Running", "short", (("vllm:num_requests_running", "{{server}}"),)),
    Panel("K/V cache held", "percentunit", (("vllm:kv_cache_usage_perc", "{{server}}"),)),
    Panel("Prompt tokens found cached", "percentunit", (("vllm:gpu_prefix_cache_hit_rate", "{{server}}"),)),
    Panel("Moved to another replica a second", "reqps", ((rate("intaglio:router_moves_total", "cause"), "{{cause}}"),)),
    Panel("Lost with a replica", "short", (("intaglio:replica_lost_requests_total", "{{server}}"),)),
    Panel("K/V blocks of the tier a second", "ops", ((rate("intaglio:kv_tier_blocks_total", "event"), "{{event}}"),)),
    Panel("Prefill apart a second", "reqps", ((rate("intaglio:router_prefills_total", "result"), "{{result}}"),)),
)
SERVER = (
    Panel("Choices", "short", (
        ("sum(vllm:num_requests_running)", "running"), ("sum(vllm:num_requests_waiting)", "waiting"),
    )),
    Panel("Tokens a second", "short", (
        (rate("vllm:prompt_tokens_total"), "prompt"), (rate("vllm:generation_tokens_total"), "generated"),
    )),
    Panel("Ended a second", "reqps", ((rate("vllm:request_success_total", "finished_reason"), "{{finished_reason}}"),)),
    Panel("Time to the first token", "s", quantiles("vllm:time_to_first_token_seconds")),
    Panel("Between tokens", "s", quantiles("vllm:inter_token_latency_seconds")),
    Panel("Latency", "s", quantiles("vllm:e2e_request_latency_seconds")),
    Panel("In the queue", "s", quantiles("vllm:request_queue_time_seconds")),
    Panel("K/V cache held", "percentunit", (("vllm:kv_cache_usage_perc", "{{model_name}}"),)),
    Panel("Prompt tokens found cached", "percentunit", (
        (f"{rate('vllm:prefix_cache_hits_total')} / {rate('vllm:prefix_cache_queries_total')}", "share"),
    )),
    Panel("Preemptions a second", "ops", ((rate("vllm:num_preemptions_total"), "preemptions"),)),
    Panel("Slots of recurrent state", "short", (
        ("sum(intaglio:state_slots_held)", "held"), ("sum(intaglio:state_checkpoints)", "kept for the prefix cache"),
    )),
    Panel("Device restarts", "short", (("sum(intaglio:device_restarts_total)", "restarts"),)),
)  # fmt: skip
DASHBOARDS = {"cluster": ("Intaglio cluster", CLUSTER), "server": ("Intaglio server", SERVER)}


def panel(number: int, p: Panel) -> dict[str, Any]:
    """A panel as Grafana's JSON. number: its place, from 0, row by row."""
    targets = [
        {"refId": chr(ord("A") + i), "datasource": SOURCE, "expr": expression, "legendFormat": legend}
        for i, (expression, legend) in enumerate(p.queries)
    ]
    at = {"x": number % ACROSS * WIDTH, "y": number // ACROSS * HEIGHT, "w": WIDTH, "h": HEIGHT}
    options = {"defaults": {"unit": p.unit, "min": 0}, "overrides": []}
    return {
        "id": number + 1, "type": "timeseries", "title": p.title, "gridPos": at, "datasource": SOURCE,
        "targets": targets, "fieldConfig": options,
    }  # fmt: skip


def dashboard(name: str) -> str:
    """The text of the file NAME.json."""
    title, panels = DASHBOARDS[name]
    variable = {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"}
    content = {
        "uid": f"intaglio-{name}", "title": title, "tags": ["intaglio"], "schemaVersion": 39, "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"}, "templating": {"list": [variable]},
        "panels": [panel(i, p) for i, p in enumerate(panels)],
    }  # fmt: skip
    return json.dumps(content, indent=1) + "\n"


if __name__ == "__main__":
    for name in DASHBOARDS:
        (FOLDER / f"{name}.json").write_text(dashboard(name), encoding="utf-8")
