"""Replicas on a local Ray cluster of two nodes: the answers are those of one server, also when a raylet is killed.

`make ray` runs these tests, after installing the extra that they need.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.clustered import Clustered, asked, clustered, compare, long, runs, send
from support.served import TEST_TIMEOUT_S, Served, wait_for

pytest.importorskip("ray", reason="needs the extra `cluster`: make ray")

from ray.cluster_utils import Cluster

from intaglio.cli.cluster import connect_ray

REQUESTS = int(os.environ.get("CLUSTER_REQUESTS", "24"))
NODE = {"num_cpus": 2, "object_store_memory": 80 << 20}


class Nodes:
    """A local Ray cluster. The first node has two CPUs and is not killed."""

    def __init__(self) -> None:
        self.ray = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
        self.second = self.ray.add_node(**NODE)

    def kill_raylet(self) -> None:
        """Kill the raylet of the second node, and so all that runs there."""
        [raylet] = self.second.all_processes["raylet"]
        raylet.process.send_signal(signal.SIGKILL)
        raylet.process.wait()  # its workers look whether it is there

    def replace(self) -> None:
        """Add a node in place of the killed one."""
        self.ray.remove_node(self.second, allow_graceful=False)
        self.second = self.ray.add_node(**NODE)


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("c")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(folder))  # also of the processes on the nodes
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        yield folder


@pytest.fixture(scope="module")
def nodes(runtime: Path) -> Iterator[Nodes]:
    nodes = Nodes()
    yield nodes
    nodes.ray.shutdown()


@pytest.fixture(scope="module")
def cluster(folder: Path, runtime: Path, nodes: Nodes) -> Iterator[Clustered]:
    pids: list[int] = []
    with clustered(folder, runtime, 3, "--ray", nodes.ray.address, "--threads", "1") as c:
        yield c
        c.wait_ready()
        pids = [r["pid"] for r in c.replicas().values()]
    wait_for(lambda: not any(map(runs, pids)))


def node_of(replica: dict[str, Any]) -> str:
    """The beginning of the id of a replica's node."""
    return replica["node"].split("(")[1].removesuffix(")") if replica["node"] else ""


def test_replicas_are_spread_over_the_nodes(cluster: Clustered) -> None:
    where = [node_of(r) for r in cluster.replicas().values()]
    assert len(set(where)) == 2 and len(where) == 3


def test_a_killed_raylet_changes_no_answer(cluster: Clustered, nodes: Nodes, alone: Served) -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    print(f"{seed=}")
    there = [r["pid"] for r in cluster.replicas().values() if nodes.second.node_id.startswith(node_of(r))]
    assert there

    def busy() -> bool:
        found = cluster.replicas().values()
        return any(r["requests"] for r in found if r["pid"] in there)

    def trouble() -> None:
        wait_for(busy)
        nodes.kill_raylet()

    compare(cluster, alone, [*(long(seed) for seed in range(6)), *(asked(rng, i) for i in range(REQUESTS))], trouble)
    assert cluster.metric('intaglio:router_moves_total{cause="lost"}') > 0
    wait_for(lambda: not any(map(runs, there)))  # no process is left on the node
    nodes.replace()
    cluster.wait_ready()
    expected = {node.node_id[:8] for node in (nodes.ray.head_node, nodes.second)}
    assert {node_of(r) for r in cluster.replicas().values()} == expected


def test_killed_drained_and_added_replicas_change_no_answer(cluster: Clustered, alone: Served) -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    print(f"{seed=}")

    def trouble() -> None:
        wait_for(lambda: cluster.replicas()["r0"]["requests"] > 0)
        cluster.kill("r0")
        cluster.ask("drain", replica="r1", restart=True)
        cluster.ask("scale", replicas=4)
        cluster.ask("scale", replicas=3)

    compare(cluster, alone, [*(long(seed) for seed in range(6)), *(asked(rng, i) for i in range(REQUESTS))], trouble)


def test_a_stopped_replica_is_killed_and_placed_again(cluster: Clustered, alone: Served) -> None:
    stopped = 0

    def trouble() -> None:
        nonlocal stopped
        wait_for(lambda: any(r["requests"] for r in cluster.replicas().values()))
        stopped = next(r["pid"] for r in cluster.replicas().values() if r["requests"])
        os.kill(stopped, signal.SIGSTOP)

    compare(cluster, alone, [long(seed) for seed in range(4)], trouble)
    wait_for(lambda: not runs(stopped))
    cluster.wait_ready()


def test_a_layout_that_no_node_can_hold_and_no_cluster_are_refused(nodes: Nodes) -> None:
    launcher = connect_ray(nodes.ray.address, "other")
    try:
        assert launcher.threads(1) == 2 and launcher.threads(3) == 1
        with pytest.raises(ValueError, match=r"needs 3 CPUs of one Ray node, the largest has 2; give fewer"):
            launcher.prepare([], 3, 1)
        launcher.prepare([], 2, 2)
        assert launcher.bundles == [{"CPU": 1.0}] * 2
    finally:
        launcher.close()


def test_a_killed_router_leaves_no_replica_and_no_rank(
    folder: Path, cluster: Clustered, nodes: Nodes, tmp_path: Path
) -> None:
    cluster.ask("scale", replicas=1)  # so that a node has two free CPUs
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        other = Clustered(folder, tmp_path, 1, "--ray", nodes.ray.address, "--layout", "tp2", "--threads", "2")
        [replica] = other.replicas().values()
        ranks = [child.pid for child in psutil.Process(replica["pid"]).children(recursive=True)]
        assert len(ranks) >= 2
        send(other.url, *long(1, max_tokens=5))
        other.process.send_signal(signal.SIGKILL)
        other.process.wait(TEST_TIMEOUT_S)
    wait_for(lambda: not any(map(runs, [replica["pid"], *ranks])))


def test_prefill_and_decode_replicas_of_two_nodes_hand_blocks_over_by_tcp(
    folder: Path, cluster: Clustered, nodes: Nodes, alone: Served, tmp_path: Path
) -> None:
    cluster.ask("scale", replicas=1)  # so that each node has a free CPU
    words = "--ray", nodes.ray.address, "--prefill", "1", "--decode", "1", "--threads", "1"
    with clustered(folder, tmp_path, 0, *words) as other:
        prompt = f"a prompt of its own, {random.randrange(10**9)}, of more than a few blocks. " * 8
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 12, "ignore_eos": True, "stream": False, "seed": 5}
        assert send(other.url, "/v1/completions", body) == send(alone.url, "/v1/completions", body)
        assert len({node_of(r) for r in other.replicas().values()}) == 2
        hits = 'intaglio:kv_tier_blocks_total{event="hits",server="d0"}'
        wait_for(lambda: other.metric(hits) > 4)  # with the next load report
        pids = [r["pid"] for r in other.replicas().values()]
    wait_for(lambda: not any(map(runs, pids)))
