"""Prefill and decode replicas of different tensor parallelism: the answers of one server with the larger tp."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.clustered import Clustered, asked, clustered, compare, hand_over, kill_each_role, long
from support.served import Served, served, wait_for

from intaglio.cluster.admin import BLOCKS, cluster_folder
from intaglio.tiers.leases import Leases

REQUESTS = int(os.environ.get("CLUSTER_REQUESTS", "16"))
WAYS = {
    "prefill tp2, decode tp1": ("--prefill-layout", "tp2"),
    "prefill tp1, decode tp2, over TCP": ("--decode-layout", "tp2", "--", "--kv-peer", "tcp://127.0.0.1:0"),
}


@pytest.fixture(scope="module")
def alone(folder: Path) -> Iterator[Served]:
    """One server with tp2, undisturbed."""
    with served(folder, {"device": "host", "layout": "tp2"}) as s:
        yield s


@pytest.fixture(scope="module", params=WAYS)
def cluster(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Clustered]:
    words = "--prefill", "1", "--decode", "2", "--threads", "1", *WAYS[request.param]
    with clustered(folder, tmp_path_factory.mktemp("c"), 0, *words) as c:
        yield c
        c.wait_ready()
        blocks = cluster_folder("test") / BLOCKS
        if blocks.exists():  # else they are in the replicas' memory, and end with them
            wait_for(lambda: not Leases(blocks).pinned())


def test_a_prompt_is_computed_on_one_layout_and_continued_on_another(cluster: Clustered, alone: Served) -> None:
    hand_over(cluster, alone)


def test_killed_prefill_and_decode_replicas_change_no_answer(cluster: Clustered, alone: Served) -> None:
    kill_each_role(cluster, alone)


def test_either_side_is_lost_at_random_moments(cluster: Clustered, alone: Served) -> None:
    """Among them moments without any prefill replica, when decode replicas compute prompts, and the other way round."""
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    print(f"{seed=}")
    requests = [asked(rng, i) for i in range(REQUESTS)]
    for path, body in requests:
        if path == "/v1/completions" and isinstance(body["prompt"], str):
            body["prompt"] = f"{rng.random()} {body['prompt']}"

    def trouble() -> None:
        events = [["p0"], ["d0"], ["p0", "d1"]]
        events += [rng.choice(events) for _ in range(REQUESTS // 24)]
        for names in events:
            wait_for(lambda: all(r["state"] == "ready" for r in cluster.replicas().values()))
            time.sleep(rng.random() / 2)
            for name in names:
                cluster.kill_and_wait(name)

    compare(cluster, alone, [*(long(seed, prompt=f"{seed} abc " * 30) for seed in range(4)), *requests], trouble)
    cluster.wait_ready()
    wait_for(lambda: not any(r["running"] or r["waiting"] or r["kv_usage"] for r in cluster.replicas().values()))


def test_without_decode_replicas_prefill_replicas_continue_streams(cluster: Clustered, alone: Served) -> None:
    cluster.wait_ready()
    cluster.ask("scale", replicas=1, role="decode")
    [decode] = [name for name in cluster.replicas() if name.startswith("d")]
    moved = cluster.metric('intaglio:router_moves_total{cause="lost"}')

    def trouble() -> None:
        wait_for(lambda: cluster.replicas()[decode]["running"] > 0)
        cluster.kill(decode)

    requests = [long(seed, prompt="a prompt for both sides. " * 12, max_tokens=600) for seed in range(3)]
    compare(cluster, alone, requests, trouble)
    assert cluster.metric('intaglio:router_moves_total{cause="lost"}') > moved
