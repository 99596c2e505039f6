"""A cluster of real processes: the answers are those of one undisturbed server, whatever happens to replicas."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from support.clustered import Clustered, asked, clustered, compare, long, plain, runs, send
from support.served import TEST_TIMEOUT_S, Served, wait_for

from intaglio.cluster.admin import ask, cluster_folder
from intaglio.cluster.process import ReplicaFailed, ReplicaProcess

REQUESTS = int(os.environ.get("CLUSTER_REQUESTS", "24"))  # 500 takes some minutes


@pytest.fixture(scope="module")
def cluster(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clustered]:
    with clustered(folder, tmp_path_factory.mktemp("c"), 3) as c:
        yield c
        c.wait_ready()


def test_killed_drained_and_added_replicas_change_no_answer(cluster: Clustered, alone: Served) -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    print(f"{seed=}")
    descriptors = psutil.Process(cluster.process.pid).num_fds()

    def trouble() -> None:
        wait_for(lambda: cluster.replicas()["r0"]["requests"] > 0)
        cluster.kill("r0")
        time.sleep(0.3)
        cluster.ask("drain", replica="r1", restart=True)
        cluster.kill_and_wait("r2")
        for _ in range(REQUESTS // 24 - 1):  # one more event for about every 24 requests
            wait_for(lambda: all(r["state"] == "ready" for r in cluster.replicas().values()))
            name = rng.choice([*cluster.replicas()])
            match rng.choice(("kill", "drain", "scale")):
                case "kill":
                    cluster.kill_and_wait(name)
                case "drain":
                    cluster.ask("drain", replica=name, restart=True)
                case _:
                    cluster.ask("scale", replicas=7 - len(cluster.replicas()))  # 4 and 3 in turn

    running = (long(seed, max_tokens=600) for seed in range(6))  # when the first replica is killed
    compare(cluster, alone, [*running, *(asked(rng, i) for i in range(REQUESTS))], trouble)
    cluster.wait_ready()
    cluster.ask("scale", replicas=3)
    assert cluster.metric('intaglio:router_moves_total{cause="lost"}') > 0
    wait_for(lambda: not any(r["running"] or r["waiting"] or r["kv_usage"] for r in cluster.replicas().values()))
    wait_for(lambda: psutil.Process(cluster.process.pid).num_fds() <= descriptors)


def test_a_drained_replicas_streams_move_and_it_is_gone(cluster: Clustered, alone: Served) -> None:
    before = cluster.metric('intaglio:router_moves_total{cause="drained"}')

    def trouble() -> None:
        with ExitStack() as streams:
            while not [*cluster.replicas().values()][-1]["requests"]:  # the one that will go
                path, body = long(7, max_tokens=900)
                streams.enter_context(httpx.stream("POST", cluster.url + path, json=body, timeout=TEST_TIMEOUT_S))
            cluster.ask("scale", replicas=2)

    compare(cluster, alone, [long(seed, max_tokens=600) for seed in range(6)], trouble)
    assert cluster.metric('intaglio:router_moves_total{cause="drained"}') > before
    assert [r["state"] for r in cluster.replicas().values()] == ["ready"] * 2


def test_a_client_that_leaves_frees_its_replica(cluster: Clustered) -> None:
    path, body = long(1, max_tokens=900)
    with httpx.stream("POST", cluster.url + path, json=body, timeout=TEST_TIMEOUT_S) as r:
        lines = r.iter_lines()  # kept, because httpx closes the response with its iterator
        assert next(lines).startswith("data: {")
        assert sum(r["requests"] for r in cluster.replicas().values()) == 1
    cluster.wait_ready()
    wait_for(lambda: not any(r["running"] for r in cluster.replicas().values()))


def test_errors_are_the_replicas_own(cluster: Clustered, alone: Served) -> None:
    for path, body in (
        ("/v1/completions", {"model": "tiny", "prompt": "a", "temperature": 9}),
        ("/v1/completions", {"model": "other", "prompt": "a"}),
        ("/v1/chat/completions", {"model": "tiny", "messages": [], "stream": True}),
        ("/v1/completions", {"model": "tiny", "prompt": "a b c " * 1000, "max_tokens": 8}),
        ("/v1/completions", [1]),
    ):
        mine, theirs = (httpx.post(u + path, json=body, timeout=TEST_TIMEOUT_S) for u in (cluster.url, alone.url))
        assert (mine.status_code, mine.json()) == (theirs.status_code, theirs.json()), body
    assert httpx.post(f"{cluster.url}/v1/completions", content=b"{").status_code in (400, 415)
    assert httpx.get(f"{cluster.url}/nothing").status_code == 404
    assert httpx.get(f"{cluster.url}/v1/completions").status_code == 405
    late = httpx.post(f"{cluster.url}/v1/completions", json=long(1, timeout=0.001, stream=False)[1])
    if late.status_code == 200:
        assert late.json()["choices"][0]["finish_reason"] == "deadline"
    else:
        assert late.status_code in (429, 503) and late.headers["retry-after"]


def test_other_endpoints_come_from_a_replica(cluster: Clustered, alone: Served) -> None:
    mine, theirs = (httpx.get(f"{url}/v1/models").json() for url in (cluster.url, alone.url))
    assert plain(mine) == plain(theirs)
    text = {"model": "tiny", "prompt": "hello"}
    assert httpx.post(f"{cluster.url}/tokenize", json=text).json() == alone.post("/tokenize", text).json()
    assert httpx.get(f"{cluster.url}/health").json() == {"status": "ok"}
    assert {r["name"] for r in httpx.get(f"{cluster.url}/cluster").json()["replicas"]} == set(cluster.replicas())


def test_metrics_have_values_for_each_replica(cluster: Clustered) -> None:
    send(cluster.url, *long(5, max_tokens=3))
    assert cluster.metric('vllm:num_incoming_requests_total{model="tiny"}') > 0
    for name in cluster.replicas():
        assert cluster.metric(f'vllm:healthy_pods_total{{server="{name}"}}') == 1
    running = [f'vllm:num_requests_running{{server="{name}"}}' for name in cluster.replicas()]
    wait_for(lambda: not any(cluster.metric(line) for line in running))  # with the next load report


def test_a_conversation_goes_where_its_beginning_is_cached(cluster: Clustered) -> None:
    text = "a conversation with a beginning of its own. " * 6
    path, body = long(3, prompt=text, max_tokens=4, stream=False)
    counts = []
    for _ in range(4):
        answer = httpx.post(cluster.url + path, json=body, timeout=TEST_TIMEOUT_S).json()
        counts.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert counts[0] < counts[1] and counts[1:] == [counts[1]] * 3  # found at once, and then each time


def test_commands_refuse_what_cannot_be(cluster: Clustered) -> None:
    with pytest.raises(ValueError, match="no replica 'r99'"):
        cluster.ask("drain", replica="r99")
    with pytest.raises(ValueError, match="allowed: 1 to 64"):
        cluster.ask("scale", replicas=0)
    with pytest.raises(ValueError, match="is no command"):
        cluster.ask("dance")
    with pytest.raises(ValueError, match="no cluster 'other' runs"):
        ask("other", {"do": "status"})
    assert os.stat(cluster_folder("test")).st_mode & 0o777 == 0o700


def test_a_queue_adds_a_replica_which_takes_requests_too(folder: Path, tmp_path: Path, alone: Served) -> None:
    """With real replicas and real load: users who each send the same request again until there are two replicas."""
    with clustered(folder, tmp_path, 0, "--replicas", "1..2", "--", "--max-sequences", "1") as cluster:
        both = threading.Event()

        def user(seed: int) -> list[list[Any]]:
            answers = []
            while not both.is_set():
                answers.append(send(cluster.url, *long(seed)))
            return answers

        with ThreadPoolExecutor(4) as pool:
            users = [pool.submit(user, seed) for seed in range(4)]
            try:
                wait_for(lambda: len(r := cluster.replicas()) == 2 and all(x["output_tokens"] for x in r.values()))
            finally:
                both.set()
        for seed, answers in enumerate(users):
            [wanted] = {str(answer) for answer in answers.result()}
            assert wanted == str(send(alone.url, *long(seed))), seed
        incidents = [incident["what"] for incident in cluster.ask("status")["incidents"]]
        assert any(what.startswith("autoscaling from 1 to 2 replicas: ") for what in incidents)


def test_a_killed_router_leaves_no_replica(folder: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        cluster = Clustered(folder, tmp_path, 1)
        children = cluster.descendants()
        assert children
        cluster.process.send_signal(signal.SIGKILL)
        cluster.process.wait()
        wait_for(lambda: not any(runs(c.pid) for c in children))
        with pytest.raises(ValueError, match="no cluster 'test' runs"):
            cluster.ask("status")


def test_a_model_that_does_not_load_is_reported(tmp_path: Path) -> None:
    process = ReplicaProcess("r0", [str(tmp_path / "nothing")], tmp_path)
    process.log.write_text("an earlier start\n")
    with pytest.raises(ReplicaFailed, match="replica r0 did not start: .*nothing") as failed:
        asyncio.run(process.start())
    assert "an earlier start" not in str(failed.value)
    assert process.ended
