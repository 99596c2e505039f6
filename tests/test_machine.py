"""Machine: models of one process share its threads by turns and its memory in equal parts."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from support.tiny import tiny

from intaglio import LLM, SamplingParams
from intaglio.devices import BlockingExecutable, DeviceError, Executable, StepRequest, StepResult
from intaglio.llm import PAGE_TOKENS
from intaglio.machine import Machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama", tmp_path_factory.mktemp("machine") / "tiny", num_hidden_layers=2)


class Alone(BlockingExecutable):
    """An executable that counts the steps under way, of all that share `inside`."""

    def __init__(self, inner: Executable, inside: list[int], most: list[int]) -> None:
        self.inner, self.inside, self.most = inner, inside, most
        self.program, self.state = inner.program, inner.state

    def run(self, request: StepRequest) -> StepResult:
        self.inside.append(1)
        self.most.append(len(self.inside))
        result = self.inner.step(request)
        self.inside.pop()
        return result


def test_models_of_one_machine_take_turns(folder: Path) -> None:
    machine, inside, most = Machine(models=2), list[int](), list[int]()
    llms = [LLM(folder, device="reference", machine=machine) for _ in range(2)]
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    wanted = LLM(folder, device="reference").generate([[1, 2, 3]], params)
    for llm in llms:
        inner = llm.engine.executable.inner  # type: ignore[attr-defined]
        llm.engine.executable = machine.shared(Alone(inner, inside, most))
    got: list[Any] = []
    threads = [threading.Thread(target=lambda m=m: got.append(m.generate([[1, 2, 3]], params))) for m in llms]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [wanted, wanted] and set(most) == {1} and len(most) == 80


def test_questions_to_the_device_take_turns(folder: Path) -> None:
    """So none is asked while another model runs a step."""
    machine = Machine(models=2)
    engine = LLM(folder, device="reference", machine=machine).engine
    inner = engine.executable.unwrapped()
    assert engine.launcher.between_steps(lambda asked: (asked is inner, machine.turn.locked())) == (True, True)
    with pytest.raises(DeviceError, match="planted"):
        engine.launcher.between_steps(lambda _: (_ for _ in ()).throw(DeviceError("planted")))
    assert not machine.turn.locked()


def test_memory_is_split_among_models(folder: Path) -> None:
    per_token = 2 * 2 * 2 * 16 * 4  # layers, K and V, heads, columns, bytes
    for models in (1, 2):
        machine = Machine(memory=4 * 1024 * per_token, models=models)
        assert machine.kv_bytes == 1024 * per_token // models
        llm = LLM(folder, device="reference", machine=machine)
        state = [t for t in llm.model.program.of_role("state")]
        assert sum(int(t.shape[2]) * int(t.shape[3]) * 4 for t in state) == per_token
        assert llm.state.pages * PAGE_TOKENS == 1024 // models


def test_a_model_alone_takes_no_turns(folder: Path) -> None:
    llm = LLM(folder, device="reference")
    assert llm.machine.shared(llm.engine.executable) is llm.engine.executable


def test_what_a_machine_refuses(folder: Path) -> None:
    with pytest.raises(DeviceError, match="memory is 0 bytes for 1 models"):
        Machine(memory=0)
    with pytest.raises(DeviceError, match="device 'host' takes its threads from the machine; leave threads out"):
        LLM(folder, threads=2, machine=Machine(1))
    with pytest.raises(DeviceError, match="device 'reference' takes no number of threads"):
        LLM(folder, device="reference", threads=2)
