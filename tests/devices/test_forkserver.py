"""The fork server: children inherit only what they are given, exit statuses, and no process outlives the parent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from devices.test_worker import gone

from intaglio.devices.processes import ForkServer, forkserver
from intaglio.devices.processes.forkserver import ForkServerError

HERE = Path(__file__)
ME = "support.forked"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ForkServer]:
    monkeypatch.setenv("PYTHONPATH", str(HERE.parents[1]))
    found = ForkServer()
    yield found
    found.close()


def told(server: ForkServer, files: Sequence[int] = (), modules: Sequence[str] = ()) -> dict[str, object]:
    """What tell() writes in a child."""
    ours, theirs = os.pipe()
    try:
        child = server.fork(f"{ME}:tell", "x" * 40_000, [theirs, *files], modules)
        assert child.wait() == 0
        return dict(json.loads(os.read(ours, 60_000)))
    finally:
        for file in (ours, theirs):
            os.close(file)


def test_a_child_has_what_it_is_given_and_nothing_else(
    server: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    assert told(server)["variable"] is None
    monkeypatch.setenv("INTAGLIO_TEST", "changed")
    monkeypatch.chdir(tmp_path)
    seen = told(server, modules=["numpy"])
    assert seen.pop("argument") == "x" * 40_000
    assert seen == {
        "variable": "changed", "folder": str(tmp_path), "leader": True, "threads": 1, "held": 0,
        "imported": True, "files": 1,
    }  # fmt: skip
    server.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_more_descriptors_than_a_message_takes(server: ForkServer) -> None:
    file = os.open("/dev/null", os.O_RDONLY)
    assert told(server, [file] * (2 * forkserver.MOST_FILES))["files"] == 2 * forkserver.MOST_FILES + 1
    os.close(file)


@pytest.mark.parametrize("code", [0, 3, -signal.SIGKILL, -signal.SIGSEGV])
def test_exit_status(server: ForkServer, code: int) -> None:
    child = server.fork(f"{ME}:leave", str(code), ())
    assert child.returncode is None
    assert child.wait() == child.wait() == child.returncode == code
    child.kill()  # it has ended


def test_a_target_that_raises_does_not_return_to_the_server(server: ForkServer) -> None:
    assert server.fork(f"{ME}:fail", "wrong", ()).wait() == 1
    assert server.fork("no.such.module:f", "", (), ["no.such.module"]).wait() == 1
    assert told(server)["threads"] == 1


def test_a_server_with_threads_does_not_fork(
    server: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "threaded.py").write_text(
        "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(HERE.parents[1])]))
    with pytest.raises(ForkServerError, match="modules that were imported have started 1 threads"):
        told(server, modules=["threaded"])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_another_server_replaces_one_that_is_gone_or_hangs(
    server: ForkServer, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = os.pipe()
    orphan = server.fork(f"{ME}:wait", "", [ours])
    assert server.process
    first = server.process.pid
    os.kill(first, number)
    with monkeypatch.context() as impatient, pytest.raises(ForkServerError):
        impatient.setattr(forkserver, "TIMEOUT", 0.5)
        server.status(orphan.pid)
    assert told(server)["threads"] == 1
    assert server.process and server.process.pid != first and gone(first)
    os.close(theirs)
    os.close(ours)
    orphan.kill()
    assert orphan.wait() is None and gone(orphan.pid)  # nobody knows how it ended


def test_close_kills_the_children_of_a_server_that_hangs(server: ForkServer) -> None:
    ours, theirs = os.pipe()
    child = server.fork(f"{ME}:wait", "", [ours])
    assert server.process
    os.kill(server.process.pid, signal.SIGSTOP)
    server.close()
    assert gone(child.pid) and child.wait() is None  # nobody knows how it ended
    os.close(theirs)
    os.close(ours)


def test_all_end_with_the_parent(tmp_path: Path) -> None:
    """The server, and a child even if it is stopped and so does not notice."""
    code = (
        "import os, signal; from intaglio.devices.processes import ForkServer; server = ForkServer(); "
        f"ours, theirs = os.pipe(); child = server.fork('{ME}:wait', '', [ours]); "
        "os.kill(child.pid, signal.SIGSTOP); print(server.process.pid, child.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    path = os.pathsep.join([str(HERE.parents[1]), str(HERE.parents[2] / "src")])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True
    )
    assert done.returncode == -signal.SIGKILL
    assert all(gone(int(pid)) for pid in done.stdout.split())
