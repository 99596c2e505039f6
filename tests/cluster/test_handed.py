"""K/V blocks that a prefill replica hands over: all are pinned, or refused and counted; no pin lasts for ever."""

from __future__ import annotations

import asyncio
import json
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.faked import until
from support.served import TEST_TIMEOUT_S, Served, served

from intaglio.cluster.link import Link
from intaglio.server.app import build
from intaglio.server.control import control_channel
from intaglio.tiers import DiskTier

RELAY = {"id": "a", "created": 1, "seed": 2, "waited": 0.0, "made_by": None, "deltas": [], "prefill": True,
         "peer": ""}  # fmt: skip


def prefilled(
    s: Served, path: Path, prompt: str, done: Callable[[], bool] = lambda: True, **more: Any
) -> dict[str, Any]:
    """The answer to a prompt that a router has this server compute for another replica.

    more: fields of a request for a load report before, after which `done` becomes true.
    """
    body = json.dumps({"model": "tiny", "prompt": prompt, "max_tokens": 9}).encode()
    header = {"do": "request", "method": "POST", "path": "/v1/completions", "relay": RELAY,
              "headers": [["content-type", "application/json"]]}  # fmt: skip

    async def ask() -> dict[str, Any]:
        async with control_channel(build(s.service), s.service, path):
            link = await Link.connect(path)
            try:
                if more:
                    await link.ask({"do": "load", "incarnation": None, "after": -1, **more}, TEST_TIMEOUT_S)
                    await until(done)
                start, whole = await link.call(header, body).whole()
                assert start["status"] == 200, whole
                return dict(json.loads(whole))
            finally:
                await link.close()

    return asyncio.run_coroutine_threadsafe(ask(), s.loop).result(TEST_TIMEOUT_S)


def prompt_of(rng: random.Random) -> str:
    return "".join(rng.choice("abcdefgh ,.") for _ in range(400))


def test_handed_blocks_stay_and_those_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    print(f"{seed=}")
    with served(None, {"device": "host", "threads": 1, "kv_cache_dir": tmp_path / "kv"}) as s:
        tier = s.llm.tier
        assert isinstance(tier, DiskTier)
        said = list[str]()
        tier.report = said.append
        path = tmp_path / "s"
        first = prefilled(s, path, prompt_of(rng))
        assert first["handed"] == first["whole"] > first["tokens"] - s.llm.engine.block_names.block_size
        pinned = tier.directory.leases.pinned()
        assert pinned and all(map(tier.directory.has, pinned)) and not tier.counts.refused
        size = sum(tier.directory.file(name).stat().st_size for name in pinned)

        tier.directory.budget = size + size // 3  # for a part of the next
        second = prefilled(s, path, prompt_of(rng), renew=[first["lease"]])
        assert second["handed"] < second["whole"] and tier.counts.refused > 0
        assert all(map(tier.directory.has, pinned))

        ended = [lease for lease in (first["lease"], second["lease"]) if lease]
        leases = tier.directory.leases
        third = prefilled(s, path, prompt_of(rng), lambda: not leases.pinned(), release=ended)
        assert third["handed"] == third["whole"]

        os.utime(
            tier.directory.leases.folder / f"{third['lease']}.lease", (1, 1)
        )  # as if nobody had renewed it: the router has died
        fourth = prefilled(s, path, prompt_of(rng), lambda: tier.counts.expired == 1, renew=[third["lease"]])
        assert fourth["handed"] == fourth["whole"] and tier.counts.expired == 1
        tier.release(fourth["lease"])
        assert not tier.directory.leases.pinned()
        assert len(said) == 1 and "pinned blocks have" in said[0]


HOST = {"device": "host", "threads": 1}


def test_a_load_report_does_not_wait_for_a_locked_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the router would take the replica for lost while another one evicts blocks."""
    monkeypatch.setattr("intaglio.server.prefill.RENEWAL", 1e6)
    with served(None, {**HOST, "kv_cache_dir": tmp_path / "kv"}) as s:
        tier = s.llm.tier
        assert isinstance(tier, DiskTier)
        lease, leases, renewed = tier.pin(["ab" * 32], 60.0), tier.directory.leases, list[str]()
        original = tier.renew

        def renew(lease: str, seconds: float) -> bool:
            done = original(lease, seconds)
            renewed.append(lease)
            return done

        async def ask() -> None:
            load = {"do": "load", "incarnation": None, "after": -1, "renew": [lease]}
            async with control_channel(build(s.service), s.service, tmp_path / "s"):
                link = await Link.connect(tmp_path / "s")
                with leases.locked():
                    for _ in range(3):
                        assert not (await link.ask(load, TEST_TIMEOUT_S))["failed"]
                    assert not renewed
                await until(lambda: renewed)
                for _ in range(3):  # reports come more often than leases are renewed
                    await link.ask(load, TEST_TIMEOUT_S)
                await link.close()
            assert renewed == [lease]

        monkeypatch.setattr(tier, "renew", renew)
        asyncio.run_coroutine_threadsafe(ask(), s.loop).result(TEST_TIMEOUT_S)


def test_the_lease_is_renewed_while_blocks_are_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("intaglio.server.prefill.RENEWAL", 0.01)
    with served(None, {**HOST, "kv_cache_dir": tmp_path / "kv"}) as s:
        tier = s.llm.tier
        assert isinstance(tier, DiskTier)
        renew, flush = tier.renew, tier.flush
        saving, renewed = threading.Event(), threading.Semaphore(0)

        def counted(lease: str, seconds: float) -> bool:
            begun = saving.is_set()
            done = renew(lease, seconds)
            if begun:
                renewed.release()
            return done

        def slow() -> None:
            saving.set()
            assert all(renewed.acquire(timeout=TEST_TIMEOUT_S / 2) for _ in range(2))
            flush()

        monkeypatch.setattr(tier, "renew", counted)
        monkeypatch.setattr(tier, "flush", slow)
        answer = prefilled(s, tmp_path / "s", prompt_of(random.Random()))
        assert answer["handed"] == answer["whole"] > 0
