"""The native communicator: the same bits as run_collective(), and as the in-process mesh for collectives in a step.

Ranks are threads here; test_ranks.py has processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from support.tiny import FAMILIES, MIXTURES, RECURRENT, tiny

from intaglio import _native, formats
from intaglio.batch import Chunk, bind, shared_rows
from intaglio.compiler import build_mesh
from intaglio.devices import DeviceError, MeshDevice, StateSpec, StepRequest
from intaglio.devices.host import HostDevice
from intaglio.devices.mesh import run_collective
from intaglio.models import Checkpoint, port
from intaglio.ops import AllGather, AllReduce, AllToAll, ReduceScatter
from intaglio.ops.collective import Collective, Grouped

PAGE = 16
T = TypeVar("T")


def segment(ranks: int, ring_bytes: int = 4096) -> _native.Segment:
    file = os.memfd_create("test")
    try:
        os.ftruncate(file, _native.Segment.bytes_for(ranks, ring_bytes))
        _native.Segment.format(file, ranks, ring_bytes, 1)
        return _native.Segment(file)
    finally:
        os.close(file)


def together(ranks: int, run: Callable[[int], T]) -> list[T]:
    """Run every rank in a thread of its own; results in order of rank."""
    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(run, range(ranks)))


@pytest.mark.parametrize("wire", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_collectives_have_the_bits_of_run_collective(ranks: int, wire: str) -> None:
    seed = int.from_bytes(os.urandom(4))
    random, group = np.random.default_rng(seed), tuple(range(ranks))
    rows, width = int(random.integers(1, 60)), int(random.integers(1, 90))

    def values(n: int, columns: int) -> np.ndarray:
        x = (random.standard_normal((n, columns)) * 10.0 ** random.integers(-6, 5)).astype(np.float32)
        return formats.round_to(x, "bf16") if random.random() < 0.3 else x

    wide = [width + r for r in range(ranks)]
    shares = [len(shared_rows(rows, r, ranks)) for r in range(ranks)]
    same = [values(rows, width) for _ in group]
    unlike = [values(rows, w) for w in wide]
    runs = [values(n, width) for n in shares]
    cases: list[tuple[Callable[[int], Grouped], list[np.ndarray], list[tuple[int, int]]]] = [
        (lambda r: AllReduce(x="x", out="y", group=group, wire=wire, site="a"), same, [(rows, width)] * ranks),
        (lambda r: AllGather(x="x", out="y", group=group, width=sum(wide), wire=wire, site="b"), unlike,
         [(rows, sum(wide))] * ranks),
        (lambda r: AllGather(x="x", out="y", group=group, width=width, tokens=True, wire=wire, site="c"), runs,
         [(rows, width)] * ranks),
        (lambda r: ReduceScatter(x="x", out="y", group=group, share=r, wire=wire, site="d"), same,
         [(n, width) for n in shares]),
        (lambda r: AllToAll(x="x", out="y", group=group, share=r, width=sum(wide), wire=wire, site="e"), unlike,
         [(n, sum(wide)) for n in shares]),
    ]  # fmt: skip
    memory = segment(ranks)
    ends = [_native.Communicator(memory, r) for r in range(ranks)]

    def run(op: Grouped, r: int, x: np.ndarray, out: np.ndarray, algorithm: str) -> None:
        match op:
            case AllReduce():
                ends[r].all_reduce(op.site, op.group, x, out, wire, algorithm)
            case AllGather():
                ends[r].all_gather(op.site, op.group, x, out, op.tokens, wire)
            case ReduceScatter():
                ends[r].reduce_scatter(op.site, op.group, x, out, wire)
            case AllToAll():
                ends[r].all_to_all(op.site, op.group, x, out, wire)

    for make, inputs, shapes in cases:
        wanted = run_collective(make(0), inputs)
        for algorithm in ("one_shot", "two_shot", "automatic"):
            outs = [np.full(shape, -77, np.float32) for shape in shapes]
            together(ranks, lambda r: run(make(r), r, inputs[r], outs[r], algorithm))  # noqa: B023
            for got, right in zip(outs, wanted, strict=True):
                np.testing.assert_array_equal(got, right, f"{make(0)}, seed {seed}")


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        *((f, layout) for f in FAMILIES for layout in ("tp2", "tp2pp2")),
        *((f, "ep2") for f in MIXTURES),
        *((f, "tp2") for f in RECURRENT),
    ],
)
def test_a_native_step_has_the_bits_of_the_mesh(tmp_path: Path, family: str, layout: str) -> None:
    """Prefill in two chunks beside another sequence, then decoding."""
    c = Checkpoint.open(tiny(family, tmp_path / family))
    mesh, state = build_mesh(port(c), layout), StateSpec(6, PAGE, 6)
    memory = segment(len(mesh.programs), 1 << 16)
    ends = [_native.Communicator(memory, r) for r in range(len(mesh.programs))]
    here = MeshDevice(HostDevice(1)).load(mesh, c, state)
    ranks = [HostDevice(1 + r % 2, communicator=end).load(p, c, state) for r, (p, end) in
             enumerate(zip(mesh.programs, ends, strict=True))]  # fmt: skip
    tokens = np.random.default_rng(len(family)).integers(0, 263, 14).tolist()
    for start, end, slots in ((0, 9, (-1, 0)), (9, 12, (0, 1)), (12, 13, (1, 0)), (13, 14, (0, 1))):
        beside = [Chunk(tokens[:3], 0, [2], [0, 2], state=(-1, 4))] if start == 0 else []
        batch = bind([Chunk(tokens[start:end], start, [4, 1], range(end - start), state=slots), *beside], PAGE)
        wanted = here.step(StepRequest(batch, logits=True))
        got = together(len(ranks), lambda r: ranks[r].step(StepRequest(batch, logits=True)))[-1]  # noqa: B023
        assert got.logits is not None and wanted.logits is not None
        np.testing.assert_array_equal(got.logits, wanted.logits)
        np.testing.assert_array_equal(got.tokens, wanted.tokens)
        np.testing.assert_array_equal(got.logprobs, wanted.logprobs)


def test_taps_and_timings_of_a_native_collective(tmp_path: Path) -> None:
    c = Checkpoint.open(tiny("llama", tmp_path))
    mesh, state = build_mesh(port(c), "tp2"), StateSpec(6, PAGE)
    memory = segment(2)
    ranks = [HostDevice(2, communicator=_native.Communicator(memory, r)).load(p, c, state)
             for r, p in enumerate(mesh.programs)]  # fmt: skip
    site = next(op.site for op in mesh.last.ops if isinstance(op, AllReduce))
    request = StepRequest(bind([Chunk([1, 2, 3], 0, [1], [2])], PAGE), taps=[site], timed=True)
    wanted = MeshDevice(HostDevice(2)).load(mesh, c, state).step(request)
    for r, got in enumerate(together(2, lambda r: ranks[r].step(request))):
        np.testing.assert_array_equal(got.taps[site], wanted.taps[f"{site}@{r}"])
        assert got.timings[site] > 0


def test_a_step_that_waits_in_vain_ends_and_names_the_rank(tmp_path: Path) -> None:
    c = Checkpoint.open(tiny("llama", tmp_path))
    mesh, state = build_mesh(port(c), "tp2"), StateSpec(6, PAGE)
    memory = segment(2)
    end = _native.Communicator(memory, 0)
    end.timeout = 0.05
    rank = HostDevice(2, communicator=end).load(mesh.programs[0], c, state)
    request = StepRequest(bind([Chunk([1], 0, [1], [0])], PAGE))
    site = next(op.site for op in mesh.last.ops if isinstance(op, Collective))
    with pytest.raises(_native.CommunicatorError, match=f"^rank 0 at {site}: nothing came from rank 1 in 0.05 s$"):
        rank.step(request)
    with pytest.raises(
        _native.CommunicatorError, match=f"rank 0 aborted the group at {site}: nothing came from rank 1"
    ):
        rank.step(request)


def test_native_collectives_need_a_communicator(tmp_path: Path) -> None:
    native = _native.Executable("scalar", 1, 16, (9, 9, 9, 9, 0, 0, 0))
    rows = native.columns(native.buffer(16, False, 0, 1), 4, 4, 0)
    attributes = {"site": "s", "group": (0, 1), "wire": "f32"}
    with pytest.raises(ValueError, match="only as a rank with a communicator"):
        native.op("all_reduce", {"x": rows, "out": rows}, attributes)
    native.join(_native.Communicator(segment(2), 0))
    with pytest.raises(ValueError, match="wire='int8'; the host knows f32, bf16, f16"):
        native.op("all_reduce", {"x": rows, "out": rows}, {**attributes, "wire": "int8"})
    with pytest.raises(ValueError, match="takes group as integers"):
        native.op("all_reduce", {"x": rows, "out": rows}, {**attributes, "group": ["a"]})
    c = Checkpoint.open(tiny("llama", tmp_path))
    alone = HostDevice(1).load_program(build_mesh(port(c), "tp2").programs[0], c, StateSpec(6, PAGE))
    with pytest.raises(DeviceError, match="rank 0 of 2 waits for the others"):
        alone.step(StepRequest(bind([Chunk([1], 0, [1], [0])], PAGE)))
