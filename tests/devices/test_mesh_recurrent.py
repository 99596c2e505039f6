"""Models with recurrent state under tensor parallelism: lanes hold their heads or channels, and logits stay the same.

Bounds count roundings as in test_mesh.py, here of up to three sums over the lanes in a layer; a state passes what a
token deviates on to the tokens after it, so a layer may deviate twice as much.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny import RECURRENT, tiny

from intaglio import formats
from intaglio.batch import Chunk, bind
from intaglio.compiler import Layout, LayoutError, build, build_mesh, shard
from intaglio.devices import MeshDevice, StateSpec, StepRequest, open_device
from intaglio.devices.weights import assemble
from intaglio.formats import Quantised
from intaglio.models import Checkpoint, port
from intaglio.ops import LinearAttention, RgLru, SelectiveScan, ShortConv
from intaglio.program import MeshProgram, Program

pytest.importorskip("transformers")
ROUNDING = 2.0**-24
LAYERS, WIDEST = 4, 128  # of the tiny checkpoints below; WIDEST is their longest sum
PAGE, TOKENS = 16, 24
ONE_GROUP: dict[str, dict[str, Any]] = {  # every lane has the only group of B and C; its norm needs all columns
    "bamba": {"mamba_n_groups": 1},
    "mamba2": {"n_groups": 1},
    "falcon_h1": {"mamba_n_groups": 1, "mamba_norm_before_gate": True},
}
CASES = [(family, False) for family in RECURRENT] + [(family, True) for family in ONE_GROUP]


def bound(device: str, layout: str) -> float:
    parts = Layout.parse(layout).lanes
    return 2 * 3 * LAYERS * (2 * parts if device == "reference" else WIDEST + parts) * ROUNDING


@cache
def checkpoint(family: str, one_group: bool, folder: Path) -> Checkpoint:
    name = f"{family}{'-one' if one_group else ''}"
    return Checkpoint.open(tiny(family, folder / name, **(ONE_GROUP[family] if one_group else {})))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recurrent")


def run(program: Program | MeshProgram, weights: Checkpoint, device: str, cuts: Sequence[int]) -> np.ndarray:
    """Logits of every token, computed in steps that end at `cuts`, the first beside another sequence."""
    state = StateSpec(6, PAGE, 6)
    ex = MeshDevice(open_device(device)).load(program, weights, state)
    tokens = np.random.default_rng(len(weights.config["architectures"][0])).integers(0, 255, TOKENS).tolist()
    out, held = [], -1
    for start, end in zip([0, *cuts], [*cuts, TOKENS], strict=True):
        mine = Chunk(tokens[start:end], start, [4, 1], range(end - start), state=(held, held ^ 1 if held >= 0 else 0))
        beside = [Chunk(tokens[:3], 0, [2], [0], state=(-1, 4))] if start == 0 else []
        got = ex.step(StepRequest(bind([mine, *beside], PAGE), logits=True)).logits
        assert got is not None
        out.append(got[: end - start])
        held = mine.state[1]
    return np.concatenate(out)


DECODING = (13, 17, *range(18, TOKENS))


@cache
def whole_logits(family: str, one_group: bool, folder: Path, device: str) -> np.ndarray:
    c = checkpoint(family, one_group, folder)
    return run(build(port(c)), c, device, DECODING)


def state_bytes(program: Program) -> int:
    return sum(t.nbytes({"N": 1}) for t in program.of_role("state") if t.shape[0] == "N")


@pytest.mark.parametrize(
    ("device", "layout"),
    [("reference", "tp2"), ("reference", "tp4"), *(("host", x) for x in ("tp2", "tp4", "tp2pp2", "tp2sp", "tp2ep2"))],
)
@pytest.mark.parametrize(("family", "one_group"), CASES)
def test_sharded_equals_unsharded(folder: Path, family: str, one_group: bool, device: str, layout: str) -> None:
    c = checkpoint(family, one_group, folder)
    program = port(c)
    if "ep" in layout and not any(op.kind == "experts" for op in program.ops):
        layout = "tp2"
    wanted = whole_logits(family, one_group, folder, device)
    got = run(build_mesh(program, layout, check=True), c, device, DECODING)
    assert np.abs(got - wanted).max() <= bound(device, layout) * np.abs(wanted).max()


@pytest.mark.parametrize(("family", "one_group"), CASES)
def test_bits_of_lanes_do_not_depend_on_cuts(folder: Path, family: str, one_group: bool) -> None:
    c = checkpoint(family, one_group, folder)
    seed = int(os.environ.get("TEST_SEED", random.SystemRandom().randrange(2**32)))
    cuts = sorted(random.Random(seed).sample(range(1, TOKENS), 6))
    tp2, tp2pp2 = (build_mesh(port(c), layout) for layout in ("tp2", "tp2pp2"))
    wanted = run(tp2, c, "host", DECODING)
    np.testing.assert_array_equal(run(tp2, c, "host", cuts), wanted, f"{cuts}")
    np.testing.assert_array_equal(run(tp2pp2, c, "host", cuts), wanted, f"{cuts}")  # stages only transfer values


@pytest.mark.parametrize("family", RECURRENT)
def test_lanes_hold_their_heads_or_channels(folder: Path, family: str) -> None:
    """States add up to the whole model's. So do the weights of the projections into the block and out of it."""
    program = port(checkpoint(family, False, folder))
    lanes = shard(program, "tp2")
    assert sum(map(state_bytes, lanes)) == state_bytes(program)
    assert all(0 < state_bytes(lane) <= 2 / 3 * state_bytes(program) for lane in lanes)
    for op in program.ops:
        if isinstance(op, LinearAttention | SelectiveScan | RgLru | ShortConv):
            axis = 2 if isinstance(op, ShortConv) else 1
            held = [int(lane.tensors[op.state].shape[axis]) for lane in lanes]
            assert min(held) and sum(held) == program.tensors[op.state].shape[axis], op.site
    names = [t.name for t in program.of_role("weight") if any(p in t.name for p in ("in_proj", "out_proj", "conv"))]
    for name in names:
        held = [lane.tensors[name].nbytes({}) for lane in lanes if name in lane.tensors]
        assert sum(held) == program.tensors[name].nbytes({}), name


def test_lanes_of_one_group_have_a_copy_of_it(folder: Path) -> None:
    """The columns of B and C of the group are on every lane; those of x, gate and step are divided."""
    program = port(checkpoint("mamba2", True, folder))  # 8 heads of 16 columns, 24 columns of B and C
    for lane in shard(program, "tp4"):
        assert lane.tensors["layers.0.mixer.state"].shape == ("N", 2, 24, 16)
        assert lane.tensors["layers.0.mixer.conv.state"].shape == ("N", 3, 2 * 16 + 2 * 24)
        assert lane.tensors["layers.0.mixer.in_proj.weight"].shape[0] == 2 * (2 * 16) + 2 * 24 + 2


def test_heads_that_lanes_cannot_divide_are_refused(folder: Path) -> None:
    with pytest.raises(LayoutError, match=r"mixer\.scan has 8 heads in 2 groups, which tp=5 .* use tp=1, 2, 4, 6, 8$"):
        shard(port(checkpoint("mamba2", False, folder)), "tp5")
    with pytest.raises(LayoutError, match=r"mixer\.scan has 96 channels, too few for tp=97; use tp=96 or less"):
        shard(port(checkpoint("mamba", False, folder)), "tp97")


WHOLE_GROUPS: dict[str, dict[str, Any]] = {  # lanes hold multiples of 128 columns
    "mamba2": {"hidden_size": 128, "num_heads": 8, "head_dim": 32, "n_groups": 2, "state_size": 64,
               "num_hidden_layers": 2},
    "qwen3_5": {
        "hidden_size": 256, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "head_dim": 128, "intermediate_size": 512, "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
    },
}  # fmt: skip


def groups(program: Program, name: str, weights: Checkpoint) -> set[bytes]:
    """The dequantised groups of a quantised weight, in any order."""
    held = assemble(program.tensors[name], weights)
    assert isinstance(held, Quantised), name
    return {group.tobytes() for group in held.rows(slice(None)).reshape(-1, held.group)}


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("family", WHOLE_GROUPS)
def test_shares_have_the_codes_of_the_whole_weight(folder: Path, family: str, weights: str) -> None:
    """The lanes' groups are together those of the whole weight, to the bit: none is split and quantised anew."""
    c = Checkpoint.open(tiny(family, folder / f"{family}-wide", **WHOLE_GROUPS[family]))
    whole, mesh = build(port(c), weights), build_mesh(port(c), "tp2", weights)
    coded = [t.name for t in whole.of_role("weight") if formats.get(t.format).grouped]
    assert any("out_proj" in name for name in coded) and any("in_proj" in name for name in coded)
    for name in coded:
        held = [groups(lane, name, c) for lane in mesh.programs if name in lane.tensors]
        assert set[bytes]().union(*held) == groups(whole, name, c), name
    wanted, got = (run(p, c, "host", DECODING) for p in (whole, mesh))
    # an activation that differs in its last bit may round to the next code: 1/127 of its group's largest value
    assert np.abs(got - wanted).max() <= 2 * 2 / 127 * np.abs(wanted).max()
