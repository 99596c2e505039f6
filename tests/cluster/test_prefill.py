"""Disaggregated prefill and decode, real processes: answers are those of one server, whichever replica is killed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.clustered import Clustered, clustered, hand_over, kill_each_role
from support.collector import TraceCollector, trace_collector
from support.served import TEST_TIMEOUT_S, Served, wait_for

from intaglio.cluster.admin import BLOCKS, cluster_folder


@pytest.fixture(scope="module")
def collector() -> Iterator[TraceCollector]:
    with trace_collector() as c, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")  # milliseconds until spans are sent
        yield c


@pytest.fixture(scope="module")
def cluster(folder: Path, collector: TraceCollector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clustered]:
    runtime = tmp_path_factory.mktemp("c")
    words = "--prefill", "1", "--decode", "2", "--threads", "1", "--otlp-endpoint", collector.url
    with clustered(folder, runtime, 0, *words) as c:
        blocks = (cluster_folder("test") / BLOCKS).readlink()
        assert blocks.is_dir()
        yield c
        c.wait_ready()
    assert not blocks.exists()


def test_a_prompt_is_computed_on_one_replica_and_continued_on_another(cluster: Clustered, alone: Served) -> None:
    hand_over(cluster, alone)
    assert {name: r["role"] for name, r in cluster.replicas().items()} == {
        "p0": "prefill", "d0": "decode", "d1": "decode",
    }  # fmt: skip


def test_a_trace_follows_a_request_over_router_and_replicas(cluster: Clustered, collector: TraceCollector) -> None:
    trace = f"{random.getrandbits(128) | 1:032x}"
    body = {"model": "tiny", "prompt": f"another prompt, {random.randrange(10**9)}; " * 12, "max_tokens": 4}
    headers = {"traceparent": f"00-{trace}-00000000000000ff-01"}
    httpx.post(f"{cluster.url}/v1/completions", json=body, headers=headers, timeout=TEST_TIMEOUT_S)
    wait_for(lambda: sum(s.trace == trace for s in collector.spans) == 14)
    [whole] = [s for s in collector.spans if s.parent == "00000000000000ff"]
    parts = collector.children(whole)
    assert [s.name for s in parts] == [
        "wait for a prefill replica", "compute the prompt", "wait for a replica", "generate",
    ]  # fmt: skip
    for part, role, phases in ((parts[1], "p", ["queue", "prefill", "decode", "save K/V"]),
                               (parts[3], "d", ["queue", "prefill", "decode"])):  # fmt: skip
        assert part.attributes["replica"].startswith(role)
        [served] = collector.children(part)
        assert (served.service, served.name) == ("intaglio", "POST /v1/completions")
        assert [s.name for s in collector.children(served)] == phases


def test_killed_prefill_and_decode_replicas_change_no_answer(cluster: Clustered, alone: Served) -> None:
    kill_each_role(cluster, alone)


def test_replicas_are_added_by_role(cluster: Clustered) -> None:
    with pytest.raises(ValueError, match="no mixed replicas; allowed: prefill, decode"):
        cluster.ask("scale", replicas=2, role="mixed")
    cluster.ask("scale", replicas=1)
    assert sorted(cluster.replicas()) == ["d0", "p0"]
