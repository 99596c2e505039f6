"""Plans of the host: steps of equal sizes are planned once, alone and in a mesh; cached plans give the same bits."""

from __future__ import annotations

import numpy as np
import pytest
from support.tiny import tiny

from intaglio.batch import Batch, Chunk, bind
from intaglio.compiler import build, build_mesh
from intaglio.devices import MeshDevice, StateSpec, StepRequest
from intaglio.devices.host import HostDevice, HostExecutable
from intaglio.models import Checkpoint, port

PAGE = 16
STATE = StateSpec(200, PAGE)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(tiny("llama", tmp_path_factory.mktemp("plans") / "tiny", max_position_embeddings=4096))


def load_single(checkpoint: Checkpoint) -> HostExecutable:
    executable = HostDevice(2, cache=None).load(build(port(checkpoint), "f32"), checkpoint, STATE)
    assert isinstance(executable, HostExecutable)
    return executable


def decode(position: int, sequences: int = 3, token: int = 1) -> Batch:
    """A batch that decodes one token of each sequence, all at the same position."""
    pages = -(-4096 // PAGE // 4)
    return bind([Chunk([token + s], position, range(s * pages, s * pages + position // PAGE + 1), [0])
                 for s in range(sequences)], PAGE)  # fmt: skip


def prefill(length: int, first: int = 0) -> Batch:
    return bind(
        [Chunk([i % 50 for i in range(first, first + length)], 0, range(-(-length // PAGE)), [length - 1])], PAGE
    )


def test_steps_of_equal_sizes_are_planned_once(checkpoint: Checkpoint) -> None:
    host = load_single(checkpoint)
    for position in range(40, 60):
        host.step(StepRequest(decode(position, token=position % 7)))
    assert host.plans == 1
    host.step(StepRequest(prefill(30)))
    host.step(StepRequest(prefill(30, first=9)))
    assert host.plans == 2
    host.step(StepRequest(decode(61)))  # the earlier plan is still cached
    assert host.plans == 2


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_each_rank_of_a_mesh_plans_once(checkpoint: Checkpoint, layout: str) -> None:
    programs = build_mesh(port(checkpoint), layout, "f32")
    mesh = MeshDevice(HostDevice(2, cache=None)).load(programs, checkpoint, STATE)
    for position in range(40, 50):
        mesh.step(StepRequest(decode(position, token=position % 7)))
    assert [rank.plans for rank in mesh.ranks] == [1, 1]


def test_different_sizes_need_new_plans(checkpoint: Checkpoint) -> None:
    host = load_single(checkpoint)
    batches = [decode(40), decode(40, sequences=2), decode(600), prefill(40), bind(
        [Chunk(range(3), 0, [0], [2]), Chunk([4], 0, [1], [0])], PAGE
    ), bind([Chunk([4], 0, [1], [0]), Chunk(range(3), 0, [0], [2])], PAGE)]  # fmt: skip
    for n, batch in enumerate(batches, 1):
        host.step(StepRequest(batch))
        assert host.plans == n
    host.step(StepRequest(decode(40), timed=True))
    host.step(StepRequest(decode(40), taps=["embed"]))
    for batch in batches:
        host.step(StepRequest(batch))
    assert host.plans == len(batches) + 2


def test_the_cache_keeps_the_last_eight_plans(checkpoint: Checkpoint) -> None:
    """Plans are evicted least recently used first."""
    host = load_single(checkpoint)
    for length in range(1, 10):
        host.step(StepRequest(prefill(length)))
    for length in range(9, 1, -1):
        host.step(StepRequest(prefill(length)))
    assert host.plans == 9
    host.step(StepRequest(prefill(1)))
    assert host.plans == 10


def test_a_cached_plan_gives_the_same_bits(checkpoint: Checkpoint, rng: np.random.Generator) -> None:
    """Steps of a few sizes in random order equal those of a new executable without cached plans."""
    host = load_single(checkpoint)
    for _ in range(40):
        batch = prefill(int(rng.integers(1, 13)), int(rng.integers(50)))
        got, want = (ex.step(StepRequest(batch, logits=True)) for ex in (host, load_single(checkpoint)))
        np.testing.assert_array_equal(got.logits, want.logits)
    assert host.plans > 8
