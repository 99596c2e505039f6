"""Devices in a child process: same results, and any death of the process raises DeviceLost."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.serving import add, request, run_checked, smallest_program, truth

from intaglio.batch import Chunk, bind
from intaglio.devices import ArrayWeights, DeviceError, DeviceLost, StateSpec, StepRequest, open_device
from intaglio.devices.oracle import OracleDevice
from intaglio.devices.processes import GroupExecutable
from intaglio.devices.worker import WorkerDevice
from intaglio.runtime import Engine

STATE = StateSpec(16, 4)
ONE = bind([Chunk([1, 2], 0, [3], [0, 1])], 4)


def load(**options: Any) -> GroupExecutable:
    device = WorkerDevice(open_device("oracle"), **options)
    executable = device.load(smallest_program(), ArrayWeights({}), STATE)
    assert isinstance(executable, GroupExecutable)
    return executable


def gone(pid: int, seconds: float = 60) -> bool:
    """True if the process ends within `seconds`."""
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


def test_results_equal_those_of_the_device() -> None:
    here = open_device("oracle").load(smallest_program(), ArrayWeights({}), STATE)
    there = load()
    for options in ({}, {"logits": True}):
        a, b = here.step(StepRequest(ONE, **options)), there.step(StepRequest(ONE, **options))  # type: ignore[arg-type]
        np.testing.assert_array_equal(a.tokens, b.tokens)
        assert (a.logits is None) == (b.logits is None)
        if a.logits is not None and b.logits is not None:
            np.testing.assert_array_equal(a.logits, b.logits)
    there.close()
    assert gone(there.pids[0])


def test_several_steps_can_be_in_flight() -> None:
    there = load()
    good, bad = StepRequest(ONE), StepRequest(bind([Chunk([97], 0, [0])], 4))
    pending = [there.launch(request) for request in (good, bad, good)]
    np.testing.assert_array_equal(pending[2].result().tokens, pending[0].result().tokens)
    assert all(step.done() for step in pending)
    with pytest.raises(DeviceError, match="token id 97"):
        pending[1].result()
    left = there.launch(good)
    there.close()
    for lost in (left, there.launch(good)):
        with pytest.raises(DeviceLost):
            lost.result()


def test_errors_of_the_device_are_raised_and_the_worker_goes_on() -> None:
    there = load()
    with pytest.raises(DeviceError, match=r"DeviceError: token id 97 is outside 0\.\.96") as caught:
        there.step(StepRequest(bind([Chunk([97], 0, [0])], 4)))
    assert not isinstance(caught.value, DeviceLost)
    assert len(there.step(StepRequest(ONE)).tokens) == 2
    there.close()


def test_an_error_while_experts_are_switched_ends_the_process() -> None:
    """Some layers may have switched; other errors about experts change nothing."""
    there = load()
    with pytest.raises(DeviceError, match="cannot move experts") as caught:
        there.load_experts({})
    assert not isinstance(caught.value, DeviceLost) and there.experts_loaded() and not there.has_experts()
    with pytest.raises(DeviceLost, match="SwitchError: experts could not be switched: .*cannot move experts"):
        there.switch_experts()
    there.close()


@dataclass(frozen=True)
class Unloadable:
    """Weights whose reading fails."""

    def recipe(self) -> tuple[str, dict[str, object]]:
        return "intaglio.devices:ArrayWeights", {"arrays": {}}


def test_a_failed_load_raises_the_cause() -> None:
    with pytest.raises(DeviceError, match="KeyError: 'embed"):
        WorkerDevice(open_device("reference")).load(smallest_program(), Unloadable(), STATE)  # type: ignore[arg-type]


def test_a_request_that_cannot_be_unpickled_is_an_error() -> None:
    class Local(OracleDevice):
        name = "local"

    Local.__module__, Local.__qualname__ = "no_such_module", "Local"
    sys.modules["no_such_module"] = type(sys)("no_such_module")
    sys.modules["no_such_module"].Local = Local  # type: ignore[attr-defined]
    with pytest.raises(DeviceError, match="ModuleNotFoundError: No module named 'no_such_module'"):
        WorkerDevice(Local()).load(smallest_program(), ArrayWeights({}), STATE)
    del sys.modules["no_such_module"]


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_killed_worker_raises_device_lost(when: str) -> None:
    there = load()
    if when == "before":
        os.kill(there.pids[0], signal.SIGKILL)
        there.processes.processes[0].wait()
    else:
        os.kill(there.pids[0], signal.SIGSTOP)  # the request is sent but never read
        killer = subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -9 {there.pids[0]}"])
    with pytest.raises(DeviceLost, match=f"(worker {there.pids[0]} of rank 0 exited|is gone).*: -9"):
        there.step(StepRequest(ONE))
    if when == "during":
        killer.wait()


def test_a_hanging_worker_is_killed_and_raises_device_lost() -> None:
    there = load()
    there.step_timeout = 0.2
    os.kill(there.pids[0], signal.SIGSTOP)
    with pytest.raises(DeviceLost, match="no answer in 0.2 s"):
        there.step(StepRequest(ONE))
    assert gone(there.pids[0])


def test_the_worker_ignores_signals_to_its_parent() -> None:
    there = load()
    assert os.getsid(there.pids[0]) != os.getsid(0)  # a Ctrl-C in the terminal does not reach it
    os.kill(there.pids[0], signal.SIGTERM)
    assert len(there.step(StepRequest(ONE)).tokens) == 2
    there.close()


def test_the_worker_ends_with_its_parent() -> None:
    script = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); from devices.test_worker import load\n"
        "there = load(); print(there.pids[0], flush=True); os.kill(os.getpid(), 9)"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parent.parent)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert gone(int(done.stdout))


def test_an_engine_continues_with_a_new_worker() -> None:
    def start() -> GroupExecutable:
        return load()

    engine = Engine(start(), clock=lambda: 0.0, rng=random.Random(0), restart=start)
    made = add(engine, *(request(f"r{i}", range(i, i + 5), max_tokens=8, temperature=1.0, seed=i) for i in range(3)))
    pids = set()
    for _ in range(3):
        while not engine.step():  # the first step after a loss has no events
            pass
        executable = engine.executable
        assert isinstance(executable, GroupExecutable)
        pids.add(executable.pids[0])
        os.kill(executable.pids[0], signal.SIGKILL)
        assert engine.step() == [] and not engine.idle
    run_checked(engine)
    assert [s.finish_reason for s in made] == ["length"] * 3 and all(s.output == truth(s) for s in made)
    assert len(pids) == 3 == engine.counts.restarts == engine.counts.faults["worker"]
    engine.executable.close()


def test_without_a_new_worker_all_requests_end_with_a_reason() -> None:
    engine = Engine(load(), clock=lambda: 0.0, rng=random.Random(0))
    made = add(engine, request("a", [1], max_tokens=9), request("b", [2], max_tokens=9))
    engine.step()
    os.kill(engine.executable.pids[0], signal.SIGKILL)  # type: ignore[attr-defined]
    events = run_checked(engine)
    assert [s.finish_reason for s in made] == ["error"] * 2 and engine.idle
    assert all(e.fault and e.fault.kind == "worker" and ": -9" in e.fault.message for e in events)
    with pytest.raises(RuntimeError, match="the device was lost"):
        engine.add(request("c", [1]))
