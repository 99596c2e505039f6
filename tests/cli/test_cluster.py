"""`intaglio cluster`: what it prints, given a fake cluster that is only a socket; its options for roles and layouts."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from intaglio.cli import app
from intaglio.cli.cluster import blocks_words, read_layouts, read_roles
from intaglio.cluster.admin import administration, cluster_folder
from intaglio.router import Role

REPLICA = {
    "name": "p12", "role": "prefill", "pid": 1234567, "state": "draining", "requests": 4096, "running": 256,
    "waiting": 12345, "kv_usage": 0.996, "restarts": 12,
}  # fmt: skip
STATE = {"replicas": [REPLICA, {**REPLICA, "name": "d0", "role": "decode", "kv_usage": 0.0}], "queued": 7}


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """The commands that a cluster called default has been given."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    folder = cluster_folder("default")
    commands: list[dict[str, Any]] = []
    answers = {"status": STATE, "scale": STATE, "drain": 3, "down": None}
    started, done = threading.Event(), threading.Event()

    async def answer(command: dict[str, Any]) -> Any:
        commands.append(command)
        if command.get("replica") == "r9":
            raise ValueError("there is no replica 'r9'; there are p12, d0")
        return answers[command["do"]]

    async def run() -> None:
        async with administration(folder, dict.fromkeys(answers, answer)):
            started.set()
            await asyncio.to_thread(done.wait)

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    assert started.wait(60)
    yield commands
    done.set()
    thread.join()


def said(*words: str) -> str:
    result = CliRunner().invoke(app, ["cluster", *words])
    assert result.exit_code == 0, result.output
    return result.output


def test_status_is_a_table_of_80_columns_or_json(asked: list[dict[str, Any]]) -> None:
    head, first, second, last = said("status").splitlines()
    assert head.split() == [
        "replica",
        "role",
        "pid",
        "state",
        "requests",
        "running",
        "waiting",
        "K/V",
        "used",
        "restarts",
    ]
    assert first.split() == ["p12", "prefill", "1234567", "draining", "4096", "256", "12345", "100%", "12"]
    assert second.split()[:2] == ["d0", "decode"] and last == "7 requests wait in the router"
    assert max(map(len, (head, first, second))) <= 80 and len(head) == len(first)
    assert json.loads(said("status", "--json")) == STATE
    assert asked == [{"do": "status"}] * 2


def test_drain_scale_and_down_say_what_they_did(asked: list[dict[str, Any]]) -> None:
    assert said("drain", "d0") == "d0 had 3 requests; it is stopped\n"
    assert said("drain", "d0", "--restart") == "d0 had 3 requests; it is started again\n"
    assert "p12" in said("scale", "3") and "p12" in said("scale", "2", "--role", "prefill")
    assert said("down") == "cluster default is stopping\n"
    assert asked == [
        {"do": "drain", "replica": "d0", "restart": False}, {"do": "drain", "replica": "d0", "restart": True},
        {"do": "scale", "replicas": 3, "role": None}, {"do": "scale", "replicas": 2, "role": "prefill"}, {"do": "down"},
    ]  # fmt: skip


def test_errors_of_the_cluster_are_shown(asked: list[dict[str, Any]]) -> None:
    result = CliRunner().invoke(app, ["cluster", "drain", "r9"])
    assert result.exit_code != 0 and "there is no replica 'r9'" in str(result.exception) + result.output
    result = CliRunner().invoke(app, ["cluster", "status", "--name", "other"])
    assert result.exit_code != 0 and "no cluster 'other' runs here" in str(result.exception) + result.output


def test_roles_are_read_from_the_options() -> None:
    assert read_roles(None, None, None) == ({"mixed": 2}, None) and read_roles("3", None, None) == ({"mixed": 3}, None)
    assert read_roles("1..4", None, None) == ({"mixed": 1}, 4)
    assert read_roles(None, 1, 2) == ({"prefill": 1, "decode": 2}, None)
    for replicas, prefill, decode in ((None, 1, None), (None, None, 1)):
        with pytest.raises(ValueError, match="go together"):
            read_roles(replicas, prefill, decode)
    with pytest.raises(ValueError, match="--replicas does not go with"):
        read_roles("2", 1, 1)
    for text in ("0", "65", "x", "2..", "3..2", "1..65", "-1", "1...2"):
        with pytest.raises(ValueError, match="write a number from 1 to 64"):
            read_roles(text, None, None)


def test_layouts_of_both_roles_get_the_same_bits() -> None:
    apart: tuple[Role, ...] = ("prefill", "decode")
    for given, wanted in (
        ((None, None, None), [None, None]),
        (("tp2", None, None), ["tp2", "tp2"]),
        ((None, "tp2", None), ["tp2", "tp1sums2"]),
        (("tp2pp2", None, "tp4"), ["tp2pp2sums4", "tp4"]),
        (("tp2sums4", None, "tp1"), ["tp2sums4", "tp1sums4"]),
        ((None, "pp2", "tp1"), ["pp2", "tp1"]),
        ((None, "tp4sp", "tp1"), ["tp4sp", "tp1sums4"]),
    ):
        assert read_layouts(apart, *given) == dict(zip(apart, wanted, strict=True)), given
    assert read_layouts(["mixed"], "tp2", None, None) == {"mixed": "tp2"}
    with pytest.raises(ValueError, match="--decode-layout tp2 goes with --prefill and --decode"):
        read_layouts(["mixed"], None, None, "tp2")
    with pytest.raises(ValueError, match="sums3 gives the bits of tp3"):
        read_layouts(apart, None, "tp3", "tp2")
    with pytest.raises(ValueError, match="do not give the same bits"):
        read_layouts(apart, None, "ep2", "tp1")
    words = "cluster up --ray auto --prefill 1 --decode 1 --prefill-layout tp2"
    result = CliRunner().invoke(app, words.split())
    assert result.exit_code != 0 and "do not go with --ray" in str(result.exception) + result.output


def test_ray_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "intaglio.cluster.ray_launcher", raising=False)
    for words in ("--replicas 2", "--prefill 1 --decode 1"):
        result = CliRunner().invoke(app, ["cluster", "up", "--ray", "auto", *words.split()])
        why = r"--ray needs ray: pip install 'intaglio\[cluster\]'"
        assert result.exit_code != 0 and re.search(why, str(result.exception) + result.output)


def test_handed_blocks_have_half_of_what_is_free(tmp_path: Path) -> None:
    words = blocks_words(tmp_path, [])
    assert words[:2] == ["--kv-cache-dir", str(tmp_path)] and 0 < int(words[3]) <= 8 << 30
    assert blocks_words(tmp_path, ["--kv-cache-size=1GiB"]) == words[:2]
