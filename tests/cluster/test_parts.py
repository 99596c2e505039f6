"""Parts of a cluster, tested without replica processes: messages, links, jobs from request bodies, load reports.

Also the administration socket, API keys, threads per replica, and which replicas may continue an output.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import threading
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.served import TEST_TIMEOUT_S, served, wait_for
from typer.testing import CliRunner

from intaglio.cli import app
from intaglio.cli.cluster import read_weights
from intaglio.cluster.admin import administration, ask, cluster_folder
from intaglio.cluster.backends import Backends, apply_blocks, read_report
from intaglio.cluster.link import Link, LinkLost, Moved
from intaglio.cluster.prompt import TimeLimits, make_job
from intaglio.cluster.threads import threads_that_fit
from intaglio.router import CacheIndex, PromptMemory, Router
from intaglio.runtime import Fault, Refused, Scored, Usage
from intaglio.server.control import FrameBuffer, control_channel, load_report, pack
from intaglio.server.driver import ChoiceDelta, Inspect
from intaglio.server.private_socket import private_socket
from intaglio.server.problem import Problem
from intaglio.server.relay import Relay, encode, read_delta, write_delta

reals = st.floats(allow_nan=False)
scores = st.builds(
    Scored, st.integers(0, 9), reals, st.lists(st.tuples(st.integers(0, 9), reals), max_size=3).map(tuple),
    st.none() | st.integers(1, 9),
)  # fmt: skip
deltas = st.builds(
    ChoiceDelta, st.integers(0, 9), st.text(), st.none() | scores, st.none() | st.sampled_from(["stop", "length"]),
    st.none() | st.builds(Fault, st.just("request"), st.text()),
    st.none() | st.builds(Usage, *[st.integers(0, 9)] * 4, reals, st.none() | reals, st.none() | reals, reals),
    st.none() | st.lists(scores, max_size=2).map(tuple), st.none() | st.text() | st.integers(0, 9),
)  # fmt: skip


@given(deltas)
def test_a_delta_survives_the_wire(delta: ChoiceDelta) -> None:
    assert read_delta(json.loads(encode(write_delta(delta)))) == delta


def test_a_probability_of_zero_survives_too() -> None:
    delta = ChoiceDelta(0, "", Scored(1, -math.inf))
    assert read_delta(json.loads(encode(write_delta(delta)))) == delta


def job(body: dict[str, Any], memory: PromptMemory | None = None) -> Any:
    return make_job("id", body, memory or PromptMemory(), 100.0, TimeLimits(60.0, 10.0), "t", 50.0)


def test_a_job_has_what_the_body_says() -> None:
    one = job({"prompt": "a" * 1000, "max_tokens": 7, "n": 2, "priority": -3, "timeout": 5, "queue_timeout": 99})
    assert (one.output_tokens, one.choices, one.priority, one.deadline, one.start_by) == (7, 2, -3, 105.0, 110.0)
    assert len(one.keys) == 7 and 200 <= one.prompt_tokens <= 300
    assert job({"prompt": ["a", "b", "c"], "n": 2}).choices == 6
    assert job({"prompt": [1, 2, 3] * 40}).prompt_tokens == 120
    assert job({"prompt": "a"}).output_tokens == 16 and job({"messages": []}).output_tokens == 50


def test_turns_of_a_conversation_share_their_beginning_and_salts_do_not() -> None:
    turns = [{"role": r, "content": c * 200} for r, c in (("system", "s"), ("user", "u"), ("assistant", "a"))]
    first, second = job({"messages": turns[:2]}), job({"messages": turns})
    assert len(first.keys) >= 3 and second.keys[: len(first.keys)] == first.keys
    assert not set(job({"messages": turns, "cache_salt": "x"}).keys) & set(second.keys)
    assert not set(job({"messages": turns, "model": "other"}).keys) & set(second.keys)


plain = st.none() | st.integers() | st.text() | st.booleans()
values = st.recursive(plain, lambda v: st.lists(v) | st.dictionaries(st.sampled_from(["role", "content", "a"]), v))


@given(values, st.sampled_from(["prompt", "messages", "n", "max_tokens", "timeout"]))
def test_any_body_gives_a_job(value: Any, name: str) -> None:
    one = job({"prompt": "a", name: value} if name != "messages" else {name: value})
    assert one.prompt_tokens >= 1 and one.output_tokens >= 1 and one.choices >= 1


def test_replicas_have_as_many_threads_as_fit_on_the_nodes() -> None:
    assert threads_that_fit([8, 8], 3) == 4 and threads_that_fit([3, 3], 2) == 3  # two of 5 do not fit on 8
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    print(f"{seed=}")
    for _ in range(200):
        nodes = [rng.randrange(1, 40) + rng.choice((0, 0.5)) for _ in range(rng.randint(1, 5))]
        replicas = rng.randint(1, 9)
        threads = threads_that_fit(nodes, replicas)
        assert threads == 1 or sum(int(n) // threads for n in nodes) >= replicas
        assert sum(int(n) // (threads + 1) for n in nodes) < replicas
    assert threads_that_fit([], 1) == threads_that_fit([2], 5) == 1


@given(st.lists(st.tuples(st.dictionaries(st.text(), st.integers()), st.binary(max_size=300)), max_size=6), st.data())
def test_frames_are_read_whole_however_their_bytes_arrive(
    frames: list[tuple[dict[str, Any], bytes]], data: st.DataObject
) -> None:
    sent = b"".join(pack(*frame) for frame in frames)
    found, buffer = list[tuple[dict[str, Any], bytes]](), FrameBuffer()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(sent)), max_size=8)))
    for begin, end in pairwise([0, *cuts, len(sent)]):
        found += buffer.feed(sent[begin:end])
    assert found == frames
    with pytest.raises(ValueError, match="allowed: up to"):
        list(buffer.feed(b"GET / HTTP/1.1\r\n"))


def test_a_link_ends_at_bytes_that_are_no_frame_and_with_the_replica(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 120) / "s"
    path.parent.mkdir()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"GET / HTTP/1.1\r\n")
        await reader.read()
        writer.close()

    async def main() -> None:
        async with await asyncio.start_unix_server(serve, sock=private_socket(path)):
            link = await Link.connect(path)
            with pytest.raises(LinkLost):
                await link.ask({"do": "x"}, TEST_TIMEOUT_S)
            assert link.lost
            await link.close()

    asyncio.run(main())


def test_calls_share_a_link_until_it_ends(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        frames, seen = FrameBuffer(), list[tuple[dict[str, Any], bytes]]()
        while len(seen) < 3:
            seen += frames.feed(await reader.read(1 << 16))
        for header, body in reversed(seen):
            writer.write(pack({"call": header["call"], "part": 1}, body))
        writer.write(pack({"call": seen[0][0]["call"], "end": True}))
        assert next(iter(frames.feed(await reader.read(1 << 16))))[0]["do"] == "cancel"
        writer.close()

    async def main() -> None:
        path = tmp_path / "s"
        async with await asyncio.start_unix_server(serve, sock=private_socket(path)):
            link = await Link.connect(path)
            lost = []
            link.on_lost = lambda: lost.append(True)
            calls = [link.call({"do": "x"}, bytes([i])) for i in range(3)]
            for i, call in enumerate(calls):
                assert await call.frame() == ({"part": 1}, bytes([i]))
            assert await calls[0].frame() == ({"end": True}, b"")
            calls[1].move()
            with pytest.raises(Moved):
                await calls[1].frame()
            calls[1].close()
            with pytest.raises(LinkLost):
                await calls[2].frame()
            assert link.lost and lost == [True] and not link.calls
            with pytest.raises(LinkLost):
                link.call({})

    asyncio.run(main())


def test_a_load_report_does_not_wait_for_a_long_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a healthy replica whose steps are long would count as lost."""
    monkeypatch.setattr("intaglio.server.control.ENGINE_WAIT", 0.05)
    with served(None) as s:
        [model], go, index = s.service.models.values(), threading.Event(), CacheIndex()

        def report() -> dict[str, Any]:
            answer = asyncio.run_coroutine_threadsafe(load_report(model, index.incarnation, -1, 300.0), s.loop)
            return answer.result(TEST_TIMEOUT_S)

        model.driver.send(Inspect(lambda _: go.wait(TEST_TIMEOUT_S), s.loop.create_future()))
        try:
            load = report()
        finally:
            go.set()
        assert read_report(load).max_sequences > 0 and not load["failed"]
        assert "snapshot" not in load and "events" not in load
        apply_blocks(index, load)
        assert index.stale
        wait_for(lambda: "snapshot" in report())


def test_a_load_report_of_an_engine_that_has_ended_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the router would wait until its silence counts as a loss."""

    async def ended(*_: Any) -> dict[str, Any]:
        raise Refused("failed", "the engine has ended and admits no requests", None)

    async def main() -> dict[str, Any]:
        model = SimpleNamespace(broken=None)
        service: Any = SimpleNamespace(models={"tiny": model}, options=SimpleNamespace(step_timeout=300.0))
        app: Any = None
        async with control_channel(app, service, tmp_path / "s"):
            link = await Link.connect(tmp_path / "s")
            try:
                return await link.ask({"do": "load", "incarnation": None, "after": -1}, TEST_TIMEOUT_S)
            finally:
                await link.close()

    monkeypatch.setattr("intaglio.server.control.load_report", ended)
    assert asyncio.run(main())["failed"] == "the engine has ended and admits no requests"


def test_output_is_continued_only_by_the_same_program_numerics_weights_and_version() -> None:
    made_by = ("program", "host avx2", "weights")
    relay = Relay("id", 1, 2, made_by=made_by)
    assert Relay.from_dict(json.loads(encode(relay.as_dict()))) == relay
    assert relay.prepared([], made_by) == [] == Relay("id", 1, 2).prepared([], made_by)
    for at, why in ((0, "other bits"), (1, "other bits"), (2, "other weights")):
        other = [*made_by]
        other[at] = "x"
        with pytest.raises(Problem, match=why):
            relay.prepared([], (other[0], other[1], other[2]))


def test_a_replica_that_ends_right_after_its_first_report_does_not_count_as_ready() -> None:
    class Ended:
        lost = False

        async def ask(self, header: dict[str, Any], timeout: float) -> dict[str, Any]:
            self.lost = True  # its connection ends before the answer is read
            return {}

    async def main() -> None:
        router = Router()
        router.add_replica("r0")
        link: Any = Ended()
        with pytest.raises(LinkLost):
            await Backends(router).attach("r0", link)
        assert not router.replicas["r0"].placeable

    asyncio.run(main())


@pytest.mark.parametrize("length", [1, 120])
def test_commands_are_answered_and_the_socket_is_ours_alone(
    length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a folder whose path is longer than the address of a Unix socket may be."""
    runtime = tmp_path / ("x" * length)
    runtime.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    folder = cluster_folder("one")
    (folder / "admin.sock").touch()  # left by a cluster that was killed
    started, done = threading.Event(), threading.Event()

    async def double(command: dict[str, Any]) -> Any:
        return 2 * command["value"]

    async def run() -> None:
        async with administration(folder, {"double": double}):
            assert os.stat(folder / "admin.sock").st_mode & 0o777 == 0o600
            with pytest.raises(ValueError, match="runs already"):
                async with administration(folder, {}):
                    pass
            started.set()
            await asyncio.to_thread(done.wait)

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    assert started.wait(60)
    try:
        assert ask("one", {"do": "double", "value": 4}) == 8
        with pytest.raises(ValueError, match="there are double"):
            ask("one", {"do": "halve"})
        with pytest.raises(ValueError, match="value"):
            ask("one", {"do": "double"})
    finally:
        done.set()
        thread.join()
    assert not (folder / "admin.sock").exists()
    with pytest.raises(ValueError, match="no cluster 'one' runs"):
        ask("one", {"do": "double"})


def test_a_folder_open_to_others_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    cluster_folder("one").chmod(0o755)
    with pytest.raises(ValueError, match="not a folder of this user alone"):
        cluster_folder("one")
    for name in ("", "a/b", "..", "x" * 40):
        with pytest.raises(ValueError, match="the cluster's name"):
            cluster_folder(name)


@pytest.mark.parametrize("command", ["serve", "cluster up"])
def test_an_empty_key_is_refused_since_all_clients_have_it(command: str) -> None:
    result = CliRunner().invoke(app, [*command.split(), "/no/such/model", "--api-key", "a", "--api-key", ""])
    assert result.exit_code != 0
    assert "--api-key is empty; give a key" in str(result.exception) + result.output


def test_weights_are_read() -> None:
    assert read_weights(["a=2", "b=c=0.5"]) == {"a": 2.0, "b=c": 0.5}
    for word in ("a", "a=", "a=x"):
        with pytest.raises(ValueError, match="TENANT=W"):
            read_weights([word])
