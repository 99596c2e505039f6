"""A device in a process of its own: the same answers, and no way to die that is not DeviceLost."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import add, request, run_checked, smallest_program, truth

from intaglio.batch import Chunk, bind
from intaglio.devices import ArrayWeights, DeviceError, DeviceLost, StateSpec, open_device
from intaglio.devices.worker import WorkerDevice, WorkerExecutable
from intaglio.runtime import Engine

STATE = StateSpec(16, 4)
ONE = bind([Chunk([1, 2], 0, [3], [0, 1])], 4)


def load(**options: Any) -> WorkerExecutable:
    device = WorkerDevice(open_device("oracle"), **options)
    executable = device.load(smallest_program(), ArrayWeights({}), STATE)
    assert isinstance(executable, WorkerExecutable)
    return executable


def gone(pid: int, seconds: float = 60) -> bool:
    """Whether a process comes to its end."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def test_it_answers_as_the_device_itself() -> None:
    here = open_device("oracle").load(smallest_program(), ArrayWeights({}), STATE)
    there = load()
    for options in ({}, {"logits": True}):
        a, b = here.step(ONE, **options), there.step(ONE, **options)  # type: ignore[arg-type]
        np.testing.assert_array_equal(a.tokens, b.tokens)
        assert (a.logits is None) == (b.logits is None)
        if a.logits is not None and b.logits is not None:
            np.testing.assert_array_equal(a.logits, b.logits)
    there.close()
    assert gone(there.pid)


def test_what_the_device_raises_comes_back_and_it_lives_on() -> None:
    there = load()
    with pytest.raises(DeviceError, match=r"DeviceError: token id 97 is outside 0\.\.96") as caught:
        there.step(bind([Chunk([97], 0, [0])], 4))
    assert not isinstance(caught.value, DeviceLost)
    assert len(there.step(ONE).tokens) == 2
    there.close()


@dataclass(frozen=True)
class Unloadable:
    """Weights no device can read."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return ArrayWeights, ({},)


def test_a_load_that_fails_says_why() -> None:
    with pytest.raises(DeviceError, match="KeyError: 'embed"):
        WorkerDevice(open_device("reference")).load(smallest_program(), Unloadable(), STATE)  # type: ignore[arg-type]


def test_what_the_worker_cannot_read_is_an_answer_too() -> None:
    class Local:
        name = "local"

    Local.__module__, Local.__qualname__ = "no_such_module", "Local"
    sys.modules["no_such_module"] = type(sys)("no_such_module")
    sys.modules["no_such_module"].Local = Local  # type: ignore[attr-defined]
    with pytest.raises(DeviceError, match="ModuleNotFoundError: No module named 'no_such_module'"):
        WorkerDevice(Local()).load(smallest_program(), ArrayWeights({}), STATE)  # type: ignore[arg-type]
    del sys.modules["no_such_module"]


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_killed_worker_is_lost(when: str) -> None:
    there = load()
    if when == "before":
        os.kill(there.pid, signal.SIGKILL)
        there.process.wait()
    else:
        os.kill(there.pid, signal.SIGSTOP)  # the question is asked, and never read
        killer = subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -9 {there.pid}"])
    with pytest.raises(DeviceLost, match=f"worker {there.pid} is gone .*exit status -9"):
        there.step(ONE)
    if when == "during":
        killer.wait()


def test_a_worker_that_hangs_is_killed_and_lost() -> None:
    there = load()
    there.patience = 0.2
    os.kill(there.pid, signal.SIGSTOP)
    with pytest.raises(DeviceLost, match="TimeoutError no answer in 0.2 s"):
        there.step(ONE)
    assert gone(there.pid)


def test_it_shrugs_off_the_signals_meant_for_its_parent() -> None:
    there = load()
    assert os.getsid(there.pid) != os.getsid(0)  # a Ctrl-C in the terminal does not reach it
    os.kill(there.pid, signal.SIGTERM)
    assert len(there.step(ONE).tokens) == 2
    there.close()


def test_it_ends_with_its_parent() -> None:
    script = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); from test_worker import load\n"
        "there = load(); print(there.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert gone(int(done.stdout))


def test_an_engine_goes_on_with_another_worker() -> None:
    def start() -> WorkerExecutable:
        return load()

    engine = Engine(start(), clock=lambda: 0.0, rng=random.Random(0), restart=start)
    made = add(engine, *(request(f"r{i}", range(i, i + 5), max_tokens=8, temperature=1.0, seed=i) for i in range(3)))
    pids = set()
    for _ in range(3):
        while not engine.step():  # the first after a loss has no events
            pass
        executable = engine.executable
        assert isinstance(executable, WorkerExecutable)
        pids.add(executable.pid)
        os.kill(executable.pid, signal.SIGKILL)
        assert engine.step() == [] and not engine.idle
    run_checked(engine)
    assert [s.finish_reason for s in made] == ["length"] * 3 and all(s.output == truth(s) for s in made)
    assert len(pids) == 3 == engine.counts.restarts == engine.counts.faults["worker"]
    engine.executable.close()  # type: ignore[attr-defined]


def test_without_another_everything_ends_with_a_reason() -> None:
    engine = Engine(load(), clock=lambda: 0.0, rng=random.Random(0))
    made = add(engine, request("a", [1], max_tokens=9), request("b", [2], max_tokens=9))
    engine.step()
    os.kill(engine.executable.pid, signal.SIGKILL)  # type: ignore[attr-defined]
    events = run_checked(engine)
    assert [s.finish_reason for s in made] == ["error"] * 2 and engine.idle
    assert all(e.fault and e.fault.kind == "worker" and "exit status -9" in e.fault.message for e in events)
    with pytest.raises(RuntimeError, match="the device was lost"):
        engine.add(request("c", [1]))
