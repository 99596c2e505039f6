"""What a prefill replica hands over: all of it pinned, or refused and counted; nothing is pinned for ever."""

from __future__ import annotations

import asyncio
import json
import os
import random
from pathlib import Path
from typing import Any

from support.served import TEST_TIMEOUT_S, Served, served

from intaglio.cluster.link import Link
from intaglio.server.app import build
from intaglio.server.control import control_channel
from intaglio.tiers import DiskTier

RELAY = {"id": "a", "created": 1, "seed": 2, "waited": 0.0, "made_by": None, "deltas": [], "prefill": True}


def prefilled(s: Served, path: Path, prompt: str, **more: Any) -> dict[str, Any]:
    """The answer to a prompt that a router has this server compute for another replica; `more`: of a load report."""
    body = json.dumps({"model": "tiny", "prompt": prompt, "max_tokens": 9}).encode()
    header = {"do": "request", "method": "POST", "path": "/v1/completions", "relay": RELAY,
              "headers": [["content-type", "application/json"]]}  # fmt: skip

    async def ask() -> dict[str, Any]:
        async with control_channel(build(s.service), s.service, path):
            link = await Link.connect(path)
            try:
                if more:
                    await link.ask({"do": "load", "incarnation": None, "after": -1, **more}, TEST_TIMEOUT_S)
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
        third = prefilled(s, path, prompt_of(rng), release=ended)
        assert third["handed"] == third["whole"]

        os.utime(
            tier.directory.leases.folder / f"{third['lease']}.lease", (1, 1)
        )  # as if nobody had renewed it: the router has died
        fourth = prefilled(s, path, prompt_of(rng), renew=[third["lease"]])
        assert fourth["handed"] == fourth["whole"] and tier.counts.expired == 1
        tier.release(fourth["lease"])
        assert not tier.directory.leases.pinned()
        assert len(said) == 1 and "pinned blocks have" in said[0]
