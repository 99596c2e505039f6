"""Prefill and decode apart, with real processes: the answers are those of one server, whichever side is killed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.clustered import Clustered, asked, clustered, send
from support.served import Served, wait_for

from intaglio.cluster.admin import BLOCKS, cluster_folder


@pytest.fixture(scope="module")
def cluster(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clustered]:
    runtime = tmp_path_factory.mktemp("c")
    with clustered(folder, runtime, 0, "--prefill", "1", "--decode", "2", "--threads", "1") as c:
        blocks = (cluster_folder("test") / BLOCKS).readlink()
        assert blocks.is_dir()
        yield c
        c.wait_ready()
    assert not blocks.exists()


def tier(cluster: Clustered, event: str, *names: str) -> float:
    """A count of the K/V tiers of these replicas."""
    return sum(cluster.metric(f'intaglio:kv_tier_blocks_total{{event="{event}",server="{name}"}}') for name in names)


def test_a_prompt_is_computed_on_one_replica_and_continued_on_another(cluster: Clustered, alone: Served) -> None:
    prompt = f"a prompt of its own, {random.randrange(10**9)}, of more than a few blocks. " * 8
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 12, "ignore_eos": True, "stream": False, "seed": 5}
    assert send(cluster.url, "/v1/completions", body) == send(alone.url, "/v1/completions", body)
    assert cluster.metric('intaglio:router_prefills_total{result="handed"}') == 1
    wait_for(lambda: tier(cluster, "hits", "d0", "d1") > 4)  # with the next load report
    assert tier(cluster, "saved", "p0") >= tier(cluster, "hits", "d0", "d1")
    assert {name: r["role"] for name, r in cluster.replicas().items()} == {
        "p0": "prefill", "d0": "decode", "d1": "decode",
    }  # fmt: skip


def test_killed_prefill_and_decode_replicas_change_no_answer(cluster: Clustered, alone: Served) -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    print(f"{seed=}")
    requests = [asked(rng, i) for i in range(10)]
    for path, body in requests:  # prompts of their own, so that each is computed anew
        if path == "/v1/completions" and isinstance(body["prompt"], str):
            body["prompt"] = f"{rng.random()} {body['prompt']}"
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(send, cluster.url, *request) for request in requests]
        wait_for(lambda: any(r["requests"] for r in cluster.replicas().values()))
        cluster.kill("p0")
        cluster.kill(rng.choice(["d0", "d1"]))
        got = [answer.result() for answer in answers]
        wanted = list(pool.map(lambda request: send(alone.url, *request), requests))
    for request, mine, theirs in zip(requests, got, wanted, strict=True):
        assert mine == theirs, request
    cluster.wait_ready()
    assert sum(r["restarts"] for r in cluster.replicas().values()) == 2


def test_replicas_are_added_by_role(cluster: Clustered) -> None:
    with pytest.raises(ValueError, match="no mixed replicas; allowed: prefill, decode"):
        cluster.ask("scale", replicas=2, role="mixed")
    cluster.ask("scale", replicas=1)
    assert sorted(cluster.replicas()) == ["d0", "p0"]
