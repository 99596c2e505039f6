"""Faults of replicas (faked, without processes) and of the cluster's own parts: the cluster goes on serving."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import stat
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.faked import LOAD, FakedProcess, faked, run, until
from support.served import TEST_TIMEOUT_S

from intaglio.cluster.admin import blocks_folder
from intaglio.cluster.cluster import Cluster
from intaglio.cluster.front import Front, FrontOptions
from intaglio.cluster.link import Link, LinkLost
from intaglio.cluster.metrics import RouterMetrics
from intaglio.cluster.process import LOG_BYTES, ReplicaFailed, ReplicaProcess
from intaglio.cluster.relayed import RelayedRequest
from intaglio.router import Autoscaler, Job
from intaglio.server.private_socket import private_socket


def process_of(cluster: Cluster, name: str) -> FakedProcess:
    process = cluster.processes[name]
    assert isinstance(process, FakedProcess)
    return process


def state_of(cluster: Cluster, name: str) -> str:
    return cluster.backends.router.replicas[name].state


def test_a_start_that_fails_in_an_unknown_way_is_logged_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def before_start(process: FakedProcess) -> None:
        if process.starts == 2:
            raise RuntimeError("planted")

    async def test() -> None:
        async with faked(tmp_path, monkeypatch, {"mixed": 1}, before_start=before_start) as cluster:
            process_of(cluster, "r0").end()
            await until(lambda: process_of(cluster, "r0").starts == 3 and state_of(cluster, "r0") == "ready")

    run(test())
    assert "r0 could not be started: planted" in caplog.text


def test_a_load_report_that_cannot_be_used_ends_the_replica_and_not_its_supervision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bad: list[dict[str, Any]] = []

    async def test() -> None:
        async with faked(tmp_path, monkeypatch, {"mixed": 1}, load=lambda: bad.pop() if bad else dict(LOAD)) as cluster:
            for times, report in enumerate(({"wrong": 1}, {**LOAD, "failed": "the engine crashed"}), 2):
                bad.append(report)
                await until(
                    lambda n=times: process_of(cluster, "r0").starts == n and state_of(cluster, "r0") == "ready"
                )
            said = [what for _, what in cluster.incidents]
            assert any("its load report cannot be used" in what for what in said)
            assert any("counts as lost: the engine crashed" in what for what in said)

    with caplog.at_level(logging.ERROR):
        run(test())
    assert "r0 counts as lost: its load report cannot be used" in caplog.text and "KeyError" in caplog.text
    assert "r0 cannot serve any more and counts as lost: the engine crashed" in caplog.text


def test_a_log_that_an_error_shows_is_not_for_all_tenants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def before_start(process: FakedProcess) -> None:
        if process.starts == 2:
            raise ReplicaFailed("it did not start: " + "x" * 300 + "\na secret")

    async def test() -> None:
        async with faked(tmp_path, monkeypatch, {"mixed": 1}, before_start=before_start) as cluster:
            process_of(cluster, "r0").end()
            await until(lambda: process_of(cluster, "r0").starts == 3 and state_of(cluster, "r0") == "ready")
            shown = [one["what"] for one in cluster.state()["incidents"]]
            assert any("it did not start: xxx" in what for what in shown)
            assert all(len(what) <= 200 and "secret" not in what for what in shown)

    run(test())
    assert "a secret" in caplog.text


def test_replicas_drain_while_another_starts_and_it_can_be_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Ray, where a replica waits for a node with free CPUs."""
    original, waiting = FakedProcess.start, list[FakedProcess]()

    async def start(process: FakedProcess) -> Link:
        if process.name in ("r3", "r4"):
            waiting.append(process)
            await asyncio.Event().wait()
        return await original(process)

    async def test() -> None:
        async with faked(tmp_path, monkeypatch, {"mixed": 3}) as cluster:
            scaling = asyncio.ensure_future(cluster.scale(5))
            await until(lambda: len(waiting) == 2)
            async with asyncio.timeout(TEST_TIMEOUT_S):
                await cluster.drain("r1")
                await cluster.drain("r3")
                await cluster.scale(1)
                with pytest.raises(ReplicaFailed, match="r3 was removed before it served"):
                    await scaling
            assert list(cluster.processes) == ["r0"] == list(cluster.backends.router.replicas)
            assert [process.stops for process in waiting] == [1, 1]

    monkeypatch.setattr(FakedProcess, "start", start)
    run(test())


def test_a_replica_that_ends_while_it_drains_is_not_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with faked(tmp_path, monkeypatch, {"mixed": 2}) as cluster:
            backends, process = cluster.backends, process_of(cluster, "r0")
            jobs = [Job(f"j{i}") for i in range(2)]
            placed = [await backends.place(job) for job in jobs]
            [mine] = [p.job for p in placed if p.replica == "r0"]
            draining = asyncio.ensure_future(cluster.drain("r0"))
            await until(lambda: state_of(cluster, "r0") == "draining")
            process.end()
            await until(lambda: state_of(cluster, "r0") == "dead")
            assert (await backends.place(mine, again=True)).replica == "r1"
            assert await draining == 1
            await asyncio.sleep(0.15)  # more than the first wait before a start
            assert process.starts == 1 and set(backends.router.replicas) == {"r1"} == set(cluster.processes)

    run(test())


REFUSAL = json.dumps({"error": {"code": "late", "message": "too much to do"}}).encode()


class LateReplica:
    """Begins a stream, ends it as a replica that drains does, and refuses `refusals` requests to go on with it."""

    def __init__(self, refusals: float) -> None:
        self.refusals, self.asked = refusals, 0

    def __call__(self, header: dict[str, Any], send: Any) -> None:
        self.asked += 1
        ok = {"status": 200, "headers": []}
        if self.asked == 1:
            send({"head": {"made_by": ["p", "n", "w"], "tokens": 3}})
            send(ok)
            send({"deltas": [[0, "a", [5, -0.5, [], None]]]}, b"a")
            send({"end": True, "code": "draining"})
        elif self.asked <= 1 + self.refusals:
            send({"status": 429, "headers": []})
            send({"end": True}, REFUSAL)
        else:
            assert header["relay"]["deltas"] == [[0, "a", [5, -0.5, [], None]]]
            send(ok)
            send({"deltas": [[0, "b", [6, -0.5, [], None], "stop"]]}, b"b")
            send({"end": True})


async def relayed(cluster: Cluster, seconds: float) -> bytes:
    """What a client of a stream with a deadline in `seconds` receives."""
    out = bytearray()

    async def send(message: Any) -> None:
        out.extend(message.get("body", b""))

    job = Job("j", deadline=cluster.backends.clock() + seconds)
    request = RelayedRequest(cluster.backends, job, "/v1/completions", [], b"{}", stream=True)
    await request.run(send)
    assert not cluster.backends.router.replicas["r0"].jobs and not cluster.backends.router.queue.charged
    return bytes(out)


def test_a_stream_that_busy_replicas_refuse_goes_on_until_its_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        replica = LateReplica(random.randrange(9, 30))
        async with faked(tmp_path, monkeypatch, {"mixed": 1}, answer=replica) as cluster:
            assert await relayed(cluster, 600.0) == b"ab"
            assert cluster.backends.moves["refused"] == replica.refusals + 1

    run(test())


def test_a_replica_that_ended_before_it_had_the_request_is_no_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, failures = Link.call, 5  # as after a failed write, until the end of the connection is read

    def closing(link: Link, header: dict[str, Any], body: bytes = b"") -> Any:
        nonlocal failures
        if header["do"] == "request" and failures:
            failures -= 1
            raise LinkLost("the connection to the replica has ended")
        return call(link, header, body)

    def answer(header: dict[str, Any], send: Any) -> None:
        send({"status": 200, "headers": []})
        send({"end": True}, b"a")

    async def test() -> None:
        async with faked(tmp_path, monkeypatch, {"mixed": 1}, answer=answer) as cluster:
            assert await relayed(cluster, 600.0) == b"a"
            assert cluster.backends.moves == {"refused": 5}

    monkeypatch.setattr(Link, "call", closing)
    run(test())


def test_a_stream_that_is_always_refused_ends_with_an_error_after_its_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        now, replica = [0.0], LateReplica(float("inf"))

        def answer(header: dict[str, Any], send: Any) -> None:
            replica(header, send)
            if replica.asked == 2:  # the first token has been passed on
                now[0] += 601.0

        async with faked(tmp_path, monkeypatch, {"mixed": 1}, answer=answer, clock=lambda: now[0]) as cluster:
            text = await relayed(cluster, 600.0)
            assert text.startswith(b"adata: ") and b'"late"' in text and text.endswith(b"[DONE]\n\n")

    run(test())


def test_a_cluster_that_ends_is_alive_and_not_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with faked(tmp_path, monkeypatch, {"mixed": 1}) as cluster:
            front = Front(cluster.backends, FrontOptions(), cluster.state)
            transport = httpx.ASGITransport(app=front)  # type: ignore[arg-type]
            async with httpx.AsyncClient(transport=transport, base_url="http://cluster") as client:
                assert [(await client.get(path)).status_code for path in ("/ready", "/health")] == [200, 200]
                front.draining = True
                assert [(await client.get(path)).status_code for path in ("/ready", "/health")] == [503, 200]

    run(test())


def test_metrics_of_a_replica_that_is_gone_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with faked(tmp_path, monkeypatch, {"mixed": 2}) as cluster:
            metrics = RouterMetrics(cluster.backends)
            for name in ("r0", "r1", ""):
                request = RelayedRequest(cluster.backends, Job(name), "/v1/completions", [], b"", stream=False)
                request.replica, request.status = name, 200
                metrics.ended(request)
            assert b'{server="r0"' in metrics.render()
            await cluster.drain("r0")
            text = metrics.render()
            assert b'"r0"' not in text and b'{server="r1"' in text and b'{server="",status="200"}' in text
            assert set(cluster.backends.finished) == {"r1"}

    run(test())


HANDED = {"tokens": 130, "handed": 128, "whole": 128, "lease": "ab" * 16, "peer": ""}


def test_the_lease_of_handed_blocks_is_renewed_until_the_first_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    original = Link.ask

    async def ask(link: Link, header: dict[str, Any], timeout: float) -> dict[str, Any]:
        calls.append(header)
        return await original(link, header, timeout)

    def noted(kind: str) -> int:
        return sum(header.get(kind) == [HANDED["lease"]] for header in calls)

    async def test() -> None:
        async with faked(tmp_path, monkeypatch, {"prefill": 1, "decode": 1}) as cluster:
            backends = cluster.backends
            for end in ("first token", "no token", "prefill lost"):
                calls.clear()
                job = Job(f"job of {end}")
                await backends.place(job)
                backends.leases[job.id] = "p0", str(HANDED["lease"])
                await until(lambda: noted("renew") > 2)
                if end == "first token":
                    backends.first_token(job, {})
                elif end == "prefill lost":
                    process_of(cluster, "p0").end()
                    await until(lambda job=job: job.id not in backends.leases)
                backends.ended(job, 1)
                assert not backends.leases
                if end != "prefill lost":
                    await until(lambda: noted("release") == 1)
                calls.clear()
                await until(lambda: len(calls) > 4)
                assert not noted("renew") and not noted("release") and not backends.released

    monkeypatch.setattr(Link, "ask", ask)
    run(test())


def test_a_prefill_replica_that_fails_costs_only_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer is an error, or it dies; then the decode replica computes the prompt."""
    asked: list[bool] = []

    def answer(header: dict[str, Any], send: Any) -> None:
        asked.append(header["relay"]["prefill"])
        if not header["relay"]["prefill"]:
            send({"status": 200, "headers": []})
            send({"deltas": [[0, "b", [6, -0.5, [], None], "stop"]]}, b"b")
            send({"end": True})
        elif len(asked) == 1:
            send({"status": 500, "headers": []})
            send({"end": True}, b"{}")
        elif len(asked) == 3:
            FakedProcess.end(ends[0])
        else:
            send({"status": 200, "headers": []})
            send({"end": True}, json.dumps(HANDED).encode())

    ends: list[FakedProcess] = []

    async def test() -> None:
        async with faked(tmp_path, monkeypatch, {"prefill": 1, "decode": 1}, answer=answer) as cluster:
            ends.append(process_of(cluster, "p0"))
            backends = cluster.backends
            for i in range(3):
                out: list[Any] = []

                async def send(message: Any, out: list[Any] = out) -> None:
                    out.append(message.get("body", b""))

                job = Job(f"j{i}", tuple(bytes([i, k]) for k in range(4)), prompt_tokens=128)
                request = RelayedRequest(backends, job, "/v1/completions", [], b"{}", stream=True)
                await request.run(send)
                assert b"".join(out) == b"b" and request.replica == "d0"
                await until(lambda: state_of(cluster, "p0") == "ready")
            assert not backends.calls and not backends.router.queue.charged
            assert all(not r.jobs for r in backends.router.replicas.values())
            assert backends.prefills == {"refused": 1, "lost": 1, "handed": 1}, backends.prefills

    run(test())
    assert asked == [True, False, True, False, True, False]


def test_the_autoscaler_adds_and_removes_replicas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Scaler(Autoscaler):
        asked = 2

        def wanted(self, router: Any, replicas: int, now: float) -> int:
            return self.asked

    async def test() -> None:
        scaler = Scaler(1, 9)
        async with faked(tmp_path, monkeypatch, {"mixed": 1}, autoscaler=scaler) as cluster:
            for scaler.asked in (2, 4, 1):
                await until(lambda: len(cluster.processes) == scaler.asked == len(cluster.backends.links))

    monkeypatch.setattr("intaglio.cluster.cluster.AUTOSCALE", 0.01)
    run(test())


def test_replicas_that_go_are_drained_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with faked(tmp_path, monkeypatch, {"mixed": 4}) as cluster:
            placed = [await cluster.backends.place(Job(f"j{i}")) for i in range(4)]
            assert {p.replica for p in placed} == set(cluster.processes)
            scaling = asyncio.ensure_future(cluster.scale(1))
            await until(lambda: all(state_of(cluster, f"r{i}") == "draining" for i in (1, 2, 3)))
            for p in placed:
                cluster.backends.ended(p.job, 1)
            await scaling
            assert list(cluster.processes) == ["r0"]

    run(test())


# Processes and files


def test_a_long_log_is_moved_and_the_process_writes_on(tmp_path: Path) -> None:
    process = ReplicaProcess("r0", [], tmp_path)
    process.trim_log()  # there is none yet
    with process.log.open("ab") as log:
        log.write(b"x" * LOG_BYTES)
        log.flush()
        process.trim_log()
        assert process.log.stat().st_size == LOG_BYTES
        log.write(b"y")
        log.flush()
        process.trim_log()
        log.write(b"after")
    assert process.log.read_bytes() == b"after"
    assert (tmp_path / "r0.log.1").stat().st_size == LOG_BYTES + 1


def test_a_process_group_is_not_killed_once_its_number_may_be_anothers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[int] = []
    monkeypatch.setattr("intaglio.cluster.process.os.killpg", lambda pid, _: killed.append(pid))
    monkeypatch.setattr("intaglio.cluster.process.sys.executable", "/bin/false")

    async def test() -> None:
        process = ReplicaProcess("r0", [], tmp_path)
        with pytest.raises(ValueError, match="did not start"):
            await process.start()
        await process.wait()
        assert killed == [process.pid]  # what it may have left running
        process.kill()
        await process.stop()
        assert killed == [process.pid]

    run(test())


def test_a_private_socket_is_this_users_alone_and_leaves_the_umask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def umask(mask: int) -> int:
        raise AssertionError("the umask is that of all threads")

    monkeypatch.setattr("os.umask", umask)
    for _ in range(2):  # the second replaces the socket that the first has left, as a killed process does
        with private_socket(tmp_path / "s") as s:
            assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o600
            s.listen()
            with pytest.raises(OSError, match="a process listens at .*/s already"):
                private_socket(tmp_path / "s")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file exists and is no socket"):
        private_socket(tmp_path / "file")


def test_the_folder_of_handed_blocks_goes_and_so_does_what_a_killed_router_left(tmp_path: Path) -> None:
    killed = blocks_folder(tmp_path)
    left = killed.__enter__()  # whose end never comes
    assert left.is_dir()
    with blocks_folder(tmp_path) as blocks:
        assert not left.exists() and blocks.is_dir()
        assert (tmp_path / "blocks").readlink() == blocks and stat.S_IMODE(blocks.stat().st_mode) == 0o700
        (blocks / "a").mkdir()
    assert not blocks.exists() and not os.path.lexists(tmp_path / "blocks")
