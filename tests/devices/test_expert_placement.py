"""Expert placement: logits are bitwise equal whichever rank holds which experts, with or without redundant experts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.tiny import tiny

from intaglio.batch import Chunk, bind
from intaglio.compiler import Layout, LayoutError, build, build_mesh
from intaglio.devices import Executable, MeshDevice, RanksDevice, StateSpec, StepRequest, open_device
from intaglio.devices.host import HostDevice
from intaglio.models import Checkpoint, port
from intaglio.ops import AllReduce, Experts
from intaglio.program import ExpertPlacement, MeshProgram, Program

PAGE, STATE = 16, StateSpec(6, 16)
CASES = [("qwen3moe", "ep2r1"), ("deepseekv2", "ep3r0"), ("gptoss", "tp2ep2r2"), ("llama4", "tp2ep2r0")]
FIXED = 5  # seed of the tokens where results are compared with sums in another order: no near tie in routing among them
WIDE = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 128, "head_dim": 16}
ROUNDING = 2.0**-24


def open_tiny(family: str, folder: Path) -> Checkpoint:
    return Checkpoint.open(tiny(family, folder / family, **WIDE))


def experts_ops(program: Program) -> list[Experts]:
    return [op for op in program.ops if isinstance(op, Experts)]


def shuffled(program: Program, ranks: int, redundant: int, rng: np.random.Generator) -> ExpertPlacement:
    """A random placement, with copies of random experts: other loads than those that even() assumes."""
    layers = {}
    for op in experts_ops(program):
        count = int(program.tensors[op.gate].shape[0])
        order = rng.permutation(count)
        even = ExpertPlacement.even([op.site], count, ranks, redundant).layers[op.site]
        layers[op.site] = tuple(tuple(sorted(int(order[e]) for e in own)) for own in even)
    return ExpertPlacement(layers)


def steps(executable: Executable, rng: np.random.Generator) -> list[np.ndarray]:
    """Logits of a prefill of two sequences, and of two decode steps of both."""
    tokens = rng.integers(0, 263, 12).tolist()
    batches = [bind([Chunk(tokens[:9], 0, [4, 1], range(9)), Chunk(tokens[:3], 0, [2], [0, 2])], PAGE)]
    batches += [bind([Chunk([tokens[i]], i, [4, 1], [0]), Chunk([tokens[i]], i - 6, [2], [0])], PAGE) for i in (9, 10)]
    return [np.asarray(executable.step(StepRequest(b, logits=True)).logits) for b in batches]


def mesh_of(c: Checkpoint, layout: str, placement: ExpertPlacement | None = None) -> MeshProgram:
    return build_mesh(port(c), replace(Layout.parse(layout), placement=placement))


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_any_placement_has_the_same_bits(tmp_path: Path, family: str, layout: str, rng: np.random.Generator) -> None:
    """On the host, in one process; and near the unsharded model, as any tensor-parallel sum."""
    c, ways = open_tiny(family, tmp_path), Layout.parse(layout)
    device = MeshDevice(HostDevice(1))

    def run(mesh: MeshProgram | Program, seed: int) -> list[np.ndarray]:
        return steps(device.load(mesh, c, STATE), np.random.default_rng(seed))

    seed = int(rng.integers(1 << 32))
    wanted = run(mesh_of(c, layout), seed)
    for _ in range(2):
        placement = shuffled(port(c), ways.ep, ways.redundant or 0, rng)
        mesh = mesh_of(c, layout, placement)
        assert all(op.held == placement.layers[op.site][0] for op in experts_ops(mesh.programs[0]))
        for got, x in zip(run(mesh, seed), wanted, strict=True):
            np.testing.assert_array_equal(got, x)
    for got, x in zip(run(mesh, FIXED), run(build(port(c)), FIXED), strict=True):
        assert np.abs(got - x).max() <= 8 * (128 + 2 * ways.lanes) * ROUNDING * np.abs(x).max()


@pytest.mark.parametrize("layout", ["ep2r2", "ep4r1"])
def test_the_reference_device_runs_placements(tmp_path: Path, layout: str, rng: np.random.Generator) -> None:
    c, ways = open_tiny("qwen3moe", tmp_path), Layout.parse(layout)
    device = MeshDevice(open_device("reference"))
    mesh = mesh_of(c, layout, shuffled(port(c), ways.ep, ways.redundant or 0, rng))
    got = steps(device.load(mesh, c, STATE), np.random.default_rng(FIXED))
    whole = steps(device.load(build(port(c)), c, STATE), np.random.default_rng(FIXED))
    for a, b in zip(got, whole, strict=True):
        assert np.abs(a - b).max() <= 8 * 4 * (ways.lanes + 2) * ROUNDING * np.abs(b).max()


def test_processes_have_the_bits_of_the_mesh_with_a_placement(tmp_path: Path, rng: np.random.Generator) -> None:
    c = open_tiny("gptoss", tmp_path)
    mesh, seed = mesh_of(c, "ep2r2", shuffled(port(c), 2, 2, rng)), int(rng.integers(1 << 32))
    wanted = steps(MeshDevice(HostDevice(1)).load(mesh, c, STATE), np.random.default_rng(seed))
    there = RanksDevice(2, cache=None, silence=60.0).load(mesh, c, STATE)
    for got, x in zip(steps(there, np.random.default_rng(seed)), wanted, strict=True):
        np.testing.assert_array_equal(got, x)
    there.close()  # type: ignore[attr-defined]


def test_copies_divide_the_tokens(tmp_path: Path, rng: np.random.Generator) -> None:
    """Each result of an expert is computed by one rank: the slots of all ranks have it once, and zeros elsewhere."""
    c = open_tiny("qwen3moe", tmp_path)
    mesh = mesh_of(c, "ep2r4", shuffled(port(c), 2, 4, rng))
    site = experts_ops(mesh.programs[0])[0].site
    tokens = rng.integers(0, 263, 15).tolist()
    executable = MeshDevice(HostDevice(1)).load(mesh, c, STATE)
    taps = executable.step(StepRequest(bind([Chunk(tokens, 0, [4], [0])], PAGE), taps=[site])).taps
    op = experts_ops(mesh.programs[0])[0]
    top = int(mesh.programs[0].tensors[op.ids].shape[1])
    computed = [np.abs(x.reshape(len(tokens), op.slots, -1)[:, :top]).max(axis=2) > 0 for x in taps.values()]
    np.testing.assert_array_equal(np.sum(computed, axis=0), np.ones((len(tokens), top)))
    assert all(own.any() for own in computed)
    reduce = next(o for o in mesh.programs[0].ops if isinstance(o, AllReduce) and o.x == op.out)
    assert reduce.slots == op.slots


def test_layouts_with_redundant_experts(tmp_path: Path) -> None:
    assert Layout.parse("ep4r8") == Layout(ep=4, redundant=8) and str(Layout.parse("tp2ep2pp2r0")) == "tp2ep2pp2r0"
    for wrong, why in (("tp4r2", "need ep2 or more"), ("r2", "wanted some of"), ("ep4r", "wanted some of")):
        with pytest.raises(LayoutError, match=why):
            Layout.parse(wrong)
    for fields, why in (({"redundant": 1}, "'r1': .* need ep2"), ({"ep": 2, "sp": True, "redundant": 0}, "'ep2spr0'")):
        with pytest.raises(LayoutError, match=why):
            Layout(**fields)  # type: ignore[arg-type]
    c = open_tiny("qwen3moe", tmp_path)
    count = int(port(c).tensors[experts_ops(port(c))[0].gate].shape[0])
    with pytest.raises(LayoutError, match="redundant experts: .* use fewer"):
        build_mesh(port(c), f"ep2r{2 * count}")
    site = experts_ops(port(c))[0].site
    missing = ExpertPlacement({site: ((0, 1), (0, 1))})
    with pytest.raises(LayoutError, match="no rank holds experts"):
        mesh_of(c, "ep2r0", missing)
