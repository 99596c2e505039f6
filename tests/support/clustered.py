"""A cluster of real processes, started by `intaglio cluster up`, and requests of many kinds for it. Used by tests."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from support.served import TEST_TIMEOUT_S, Served, prompt, wait_for

from intaglio.cluster.admin import ask
from intaglio.devices.processes import child_environment

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string", "maxLength": 12}},
          "required": ["a", "b"], "additionalProperties": False}  # fmt: skip
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": SCHEMA}}


class Clustered:
    """A running cluster. `name` is for its commands; they and the processes share a folder of the test's own.

    replicas: 0 if the words say how many there are.
    """

    def __init__(self, folder: Path, runtime: Path, replicas: int, *words: str) -> None:
        self.name = "test"
        self.output = runtime / "output.log"
        command = [
            sys.executable, "-m", "intaglio", "cluster", "up", str(folder), "--port", "0", "--name", self.name,
            *(["--replicas", str(replicas)] if replicas else []), *words,
        ]  # fmt: skip
        environment = {**child_environment(), "XDG_RUNTIME_DIR": str(runtime)}
        with self.output.open("w") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        wait_for(lambda: "serving" in self.said() or self.process.poll() is not None)
        found = re.search(r"replicas at (http://\S+)", self.said())
        assert found, self.said()
        self.url = found[1]

    def said(self) -> str:
        return self.output.read_text()

    def ask(self, do: str, **more: Any) -> Any:
        return ask(self.name, {"do": do, **more}, TEST_TIMEOUT_S)

    def replicas(self) -> dict[str, dict[str, Any]]:
        return {r["name"]: r for r in self.ask("status")["replicas"]}

    def kill(self, name: str) -> None:
        os.kill(self.replicas()[name]["pid"], signal.SIGKILL)

    def kill_and_wait(self, name: str) -> None:
        """Kill a replica, and wait until the router has noticed it."""
        before = self.replicas()[name]["restarts"]
        self.kill(name)
        wait_for(lambda: self.replicas()[name]["restarts"] > before)

    def wait_ready(self) -> None:
        """Wait until every replica serves, and nothing is in progress."""
        wait_for(lambda: all(r["state"] == "ready" and not r["requests"] for r in self.replicas().values()))
        assert self.ask("status")["queued"] == 0

    def metric(self, line: str) -> float:
        text = httpx.get(f"{self.url}/metrics", timeout=TEST_TIMEOUT_S).text
        return float(next(row for row in text.splitlines() if row.startswith(line)).rsplit(" ", 1)[1])

    def blocks(self, event: str, *replicas: str) -> float:
        """How often an event (hits, corrupt, ...) happened to blocks of these replicas' K/V tiers, from /metrics."""
        name = "intaglio:kv_tier_blocks_total"
        return sum(self.metric(f'{name}{{event="{event}",server="{replica}"}}') for replica in replicas)

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


@contextmanager
def clustered(folder: Path, runtime: Path, replicas: int, *words: str) -> Iterator[Clustered]:
    """A cluster; checks at its end that it leaves no process and no socket."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(runtime))
        cluster = Clustered(folder, runtime, replicas, *words)
        children = cluster.descendants()
        try:
            yield cluster
            children += cluster.descendants() if cluster.process.poll() is None else []
        finally:
            cluster.process.send_signal(signal.SIGINT)
            cluster.process.wait(TEST_TIMEOUT_S)
        wait_for(lambda: not any(runs(c.pid) for c in children))
        assert not list(runtime.rglob("*.sock"))


def runs(pid: int) -> bool:
    """True if the process has not ended; it may end while its status is asked."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def asked(rng: random.Random, i: int) -> tuple[str, dict[str, Any]]:
    """(path, body) of a request of kind `i`, each with a seed."""
    shared = "the same beginning of many prompts, long enough for some blocks. " * 3
    body: dict[str, Any] = {"model": "tiny", "seed": rng.randrange(2**40), "temperature": 0.8, "stream": i % 2 == 0}
    if body["stream"] and rng.random() < 0.5:
        body["stream_options"] = {"include_usage": True, "continuous_usage_stats": rng.random() < 0.5}
    chat = [{"role": "system", "content": shared}, {"role": "user", "content": prompt(rng, 20)}]
    match i // 2 % 5:
        case 0:
            return "/v1/completions", {
                **body, "prompt": shared + prompt(rng, 9), "max_tokens": 150, "ignore_eos": True, "logprobs": 2,
            }  # fmt: skip
        case 1:
            return "/v1/chat/completions", {
                **body, "messages": chat, "max_tokens": 60, "n": 3, "stop": ["e", "qq"], "logprobs": True,
                "top_logprobs": 2, "min_tokens": 20, "presence_penalty": 0.4,
            }  # fmt: skip
        case 2:
            form = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
            return "/v1/chat/completions", {**body, "messages": chat, "max_tokens": 60, "response_format": form}
        case 3:
            return "/v1/chat/completions", {
                **body, "messages": chat, "max_tokens": 60, "tools": [TOOL], "tool_choice": "required",
            }  # fmt: skip
    more = {"echo": True, "return_token_ids": True} if body["stream"] else {"best_of": 3, "n": 2, "prompt_logprobs": 1}
    prompts = [prompt(rng, 30) for _ in range(2)]
    return "/v1/completions", {**body, "prompt": prompts, "max_tokens": 80, "ignore_eos": True, **more}


def long(seed: int, **more: Any) -> tuple[str, dict[str, Any]]:
    """A stream of 400 tokens, if the text does not end before."""
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 400, "ignore_eos": True, "seed": seed, "stream": True}
    return "/v1/completions", {**body, **more}


def compare(
    cluster: Clustered, alone: Served, requests: list[tuple[str, dict[str, Any]]], trouble: Callable[[], None]
) -> None:
    """Send requests to the cluster while `trouble` is made, and compare all answers with those of one server."""
    with ThreadPoolExecutor(12) as pool:
        answers = [pool.submit(send, cluster.url, *request) for request in requests]
        trouble()
        got = [answer.result() for answer in answers]
        wanted = list(pool.map(lambda request: send(alone.url, *request), requests))
    for request, mine, theirs in zip(requests, got, wanted, strict=True):
        assert mine == theirs, request


def hand_over(cluster: Clustered, alone: Served) -> None:
    """Check that a decode replica (d0, d1) goes on with the blocks of the prefill replica p0, as one server answers."""
    prompt = f"a prompt of its own, {random.randrange(10**9)}, of more than a few blocks. " * 8
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 12, "ignore_eos": True, "stream": False, "seed": 5}
    assert send(cluster.url, "/v1/completions", body) == send(alone.url, "/v1/completions", body)
    assert cluster.metric('intaglio:router_prefills_total{result="handed"}') == 1
    # Each replica's counts come with its own next load report.
    wait_for(lambda: cluster.blocks("saved", "p0") >= cluster.blocks("hits", "d0", "d1") > 4)


def kill_each_role(cluster: Clustered, alone: Served) -> None:
    """Check that answers stay those of one server while prefill replica p0 and one of d0 and d1 are killed."""
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    print(f"{seed=}")
    requests = [asked(rng, i) for i in range(10)]
    for path, body in requests:  # prompts of their own, so that each is computed anew
        if path == "/v1/completions" and isinstance(body["prompt"], str):
            body["prompt"] = f"{rng.random()} {body['prompt']}"

    def trouble() -> None:
        wait_for(lambda: any(r["requests"] for r in cluster.replicas().values()))
        cluster.kill("p0")
        cluster.kill(rng.choice(["d0", "d1"]))

    compare(cluster, alone, requests, trouble)
    cluster.wait_ready()
    assert sum(r["restarts"] for r in cluster.replicas().values()) == 2


def send(url: str, path: str, body: dict[str, Any]) -> list[Any]:
    """Send a request. Returns its chunks, or its one response, without what differs between equal answers."""
    with httpx.stream("POST", url + path, json=body, timeout=TEST_TIMEOUT_S) as r:
        text = r.read().decode()
        assert r.status_code == 200, text
    if not body["stream"]:
        return [plain(json.loads(text))]
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert events[-1] == "[DONE]", text
    chunks = [json.loads(event) for event in events[:-1]]
    assert len({c["id"] for c in chunks}) == len({c["created"] for c in chunks}) == 1, text
    return by_choice([plain(c) for c in chunks])


def by_choice(chunks: list[Any]) -> list[Any]:
    """The chunks' choices by number, since choices may take turns in any way, and the last usage."""
    choices = sorted((c for chunk in chunks for c in chunk["choices"]), key=lambda c: c["index"])
    return [chunks[0]["model"], chunks[0].get("prompt_token_ids"), choices, chunks[-1].get("usage")]


def plain(value: Any) -> Any:
    """A response without ids, times and counts of cached tokens."""
    if isinstance(value, dict):
        kept = {k: plain(v) for k, v in value.items() if k not in ("id", "created", "prompt_tokens_details")}
        return {**kept, "id": "call"} if value.get("type") == "function" and value.get("id") else kept
    return [plain(v) for v in value] if isinstance(value, list) else value
