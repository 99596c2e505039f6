"""Disaggregated prefill and decode with K/V blocks over TCP: answers are those of one server, also after kills."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.clustered import Clustered, clustered, hand_over, kill_each_role
from support.served import Served
from typer.testing import CliRunner

from intaglio.cli import app
from intaglio.cluster.admin import BLOCKS, cluster_folder
from intaglio.cluster.budget import DECODE_BYTES, peer_budget, size_words
from intaglio.llm import LLM
from intaglio.machine import Machine
from intaglio.runtime import RequestError
from intaglio.tiers.peer import TOKEN_VARIABLE


@pytest.fixture(scope="module")
def cluster(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clustered]:
    runtime = tmp_path_factory.mktemp("c")
    words = "--prefill", "1", "--decode", "2", "--threads", "1", "--", "--kv-peer", "tcp://127.0.0.1:0"
    with clustered(folder, runtime, 0, *words) as c:
        assert not (cluster_folder("test") / BLOCKS).is_symlink()
        yield c
        c.wait_ready()


def test_a_decode_replica_fetches_the_blocks_of_the_prefill_replica(cluster: Clustered, alone: Served) -> None:
    hand_over(cluster, alone)
    assert not any(cluster.blocks(event, "p0", "d0", "d1") for event in ("corrupt", "late", "errors"))


def test_killed_prefill_and_decode_replicas_change_no_answer(cluster: Clustered, alone: Served) -> None:
    kill_each_role(cluster, alone)


def test_replicas_share_an_eighth_of_the_memory(cluster: Clustered) -> None:
    rng = random.Random()
    for _ in range(100):
        memory, replicas = rng.randrange(1 << 42), rng.randint(1, 64)
        budgets = {role: peer_budget(role, replicas, memory) for role in ("mixed", "prefill", "decode")}
        assert budgets["mixed"] == budgets["prefill"] <= 8 << 30 and 1 <= budgets["decode"] <= DECODE_BYTES
        assert sum(rng.choice(list(budgets.values())) for _ in range(replicas)) <= max(replicas, memory // 8)
    assert size_words(["--kv-cache-size=1GiB"], 5) == size_words(["--kv-cache-size", "1GiB"], 5) == []
    for name, replica in cluster.replicas().items():
        words = psutil.Process(replica["pid"]).cmdline()
        size = int(words[words.index("--kv-cache-size") + 1])
        assert size == peer_budget("prefill" if name == "p0" else "decode", 3, Machine().memory)


def test_what_does_not_go_together_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*words: str) -> str:
        result = CliRunner().invoke(app, [*words])
        assert result.exit_code != 0
        return f"{result.exception} {result.output}"

    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert "needs a token; set INTAGLIO_KV_TOKEN" in refused("serve", "--kv-peer", "tcp://127.0.0.1:0")
    monkeypatch.setenv(TOKEN_VARIABLE, "short")
    assert "use 16 or more" in refused("serve", "--kv-peer", "tcp://127.0.0.1:0")
    monkeypatch.setenv(TOKEN_VARIABLE, "long enough for a token")
    assert "is no address" in refused("serve", "--kv-peer", "127.0.0.1:0")
    assert "cannot connect to 0.0.0.0" in refused("serve", "--kv-peer", "tcp://0.0.0.0:0")
    assert "cannot connect to ::" in refused("serve", "--kv-peer", "tcp://[::]:0")
    fixed = "tcp://127.0.0.1:9071"
    said = refused("serve", f"a={tmp_path}", f"b={tmp_path}", "--kv-peer", fixed)
    assert "is for one model, here are 2" not in said and "port for one model, here are 2; write port 0" in said
    for words in (["--kv-peer", fixed], [f"--kv-peer={fixed}"]):
        assert "has a port for one replica; write port 0" in refused("cluster", "up", "--", *words)
    assert "cannot connect to 0.0.0.0" in refused("cluster", "up", "--", "--kv-peer", "tcp://0.0.0.0:0")
    assert "does not go with --ray" in refused("cluster", "up", "--ray", "auto", "--", "--kv-peer", "tcp://127.0.0.1:0")
    from intaglio.cli.serve import peer_address

    with pytest.raises(RequestError, match="leave out one of them"):
        LLM(kv_cache_dir=tmp_path, kv_peer=peer_address("tcp://127.0.0.1:0"))
    with pytest.raises(RequestError, match="leave out journal or kv_peer"):
        LLM(kv_peer=peer_address("tcp://127.0.0.1:0"), journal=tmp_path / "journal")
    with pytest.raises(RequestError, match="leave out journal or kv_cache_dir"):
        LLM(kv_cache_dir=tmp_path, journal=tmp_path / "journal")
