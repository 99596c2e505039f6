"""Sharded models equal unsharded ones: every family with every layout its heads allow; errors of impossible layouts.

Bounds count roundings. Cutting a sum over K into P parts changes only where float32 rounds: at most twice a part on the
reference (which sums a part in float64), and along the K-long chain on the host; a layer has two such sums.
"""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.tiny import FAMILIES, MIXTURES, tiny
from support.toy import MANNERS, Toy, mixed_batches, random_weights, tangle, transformer
from typer.testing import CliRunner

from intaglio.batch import Chunk, bind
from intaglio.cli import app
from intaglio.compiler import Layout, LayoutError, build, build_mesh, shard
from intaglio.debugging.replay import replay_journal
from intaglio.devices import ArrayWeights, DeviceError, MeshDevice, StateSpec, StepRequest, open_device
from intaglio.devices.mesh import run_collective
from intaglio.llm import LLM
from intaglio.models import Checkpoint, port
from intaglio.ops import AllGather, AllReduce, AllToAll, Linear, Norm, OpError, Recv, ReduceScatter, Send, Tensor
from intaglio.ops.collective import Collective
from intaglio.program import MeshProgram, Program, ProgramError, parse_program, verify_mesh
from intaglio.runtime import Grammar, SamplingParams

ROUNDING = 2.0**-24
LAYERS, WIDEST = 4, 128  # of the tiny checkpoints below; WIDEST is their longest sum
WIDE = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 128, "head_dim": 16}
TOKENS, PAGE = 17, 16


def bound(device: str, layout: str) -> float:
    parts = Layout.parse(layout).lanes
    return 2 * LAYERS * (2 * parts if device == "reference" else WIDEST + parts) * ROUNDING


@cache
def checkpoint(family: str, folder: Path) -> Checkpoint:
    return Checkpoint.open(tiny(family, folder / family, **WIDE))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mesh")


def run(program: Program | MeshProgram, weights, device: str, tokens: list[int], cuts=(13,)) -> np.ndarray:
    """Logits of every token: prefill in chunks that end at `cuts`, beside another sequence, then decoding."""
    inner, state = open_device(device), StateSpec(6, PAGE)
    ex = MeshDevice(inner).load(program, weights, state)
    out, ends = [], [*cuts, *range(cuts[-1] + 1, len(tokens) + 1)]
    for start, end in zip([0, *ends], ends, strict=False):
        mine = Chunk(tokens[start:end], start, [4, 1], range(end - start))
        beside = [Chunk(tokens[:3], 0, [2], [0])] if start == 0 else []
        got = ex.step(StepRequest(bind([mine, *beside], PAGE), logits=True)).logits
        assert got is not None
        out.append(got[: end - start])
    return np.concatenate(out)


def apart(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))


@cache
def whole_logits(family: str, folder: Path, device: str) -> tuple[list[int], np.ndarray]:
    c = checkpoint(family, folder)
    tokens = np.random.default_rng(len(family)).integers(0, 263, TOKENS).tolist()
    return tokens, run(build(port(c)), c, device, tokens)


@cache
def compiled(family: str, folder: Path, layout: str) -> MeshProgram:
    return build_mesh(port(checkpoint(family, folder)), layout)


@pytest.mark.parametrize("device", ["reference", "host"])
@pytest.mark.parametrize("layout", ["tp2", "tp4", "tp8", "pp2", "pp3", "tp2ep2pp2", "tp4pp3"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sharded_equals_unsharded(folder: Path, family: str, layout: str, device: str) -> None:
    c = checkpoint(family, folder)
    tokens, wanted = whole_logits(family, folder, device)
    got = run(compiled(family, folder, layout), c, device, tokens)
    if Layout.parse(layout).lanes > 1:
        assert apart(got, wanted) <= bound(device, layout)
    else:
        np.testing.assert_array_equal(got, wanted)  # pipeline stages only transfer values


@pytest.mark.parametrize("device", ["reference", "host"])
@pytest.mark.parametrize("layout", ["tp8", "pp3", "ep2", "ep4pp2", "tp2ep2"])
@pytest.mark.parametrize("family", MIXTURES)
def test_sharded_mixtures_equal_unsharded(folder: Path, family: str, layout: str, device: str) -> None:
    """By columns, by expert, and by both; latents, sinks and chunks among them. A near tie in routing would show as
    another model's logits; these weights and tokens, which are always the same, have none."""
    tokens, wanted = whole_logits(family, folder, device)
    programs = compiled(family, folder, layout)
    got = run(programs, checkpoint(family, folder), device, tokens)
    if Layout.parse(layout).lanes > 1:
        assert apart(got, wanted) <= bound(device, layout)
    else:
        np.testing.assert_array_equal(got, wanted)
    held = [sum(op.kind == "experts" for op in rank.ops) for rank in programs.programs]
    whole = sum(op.kind == "experts" for op in port(checkpoint(family, folder)).ops)
    assert sum(held) == Layout.parse(layout).lanes * whole > 0


@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_sequence_parallel_norms_give_the_same_bits(folder: Path, family: str) -> None:
    """A row's norm and residual have the same bits on any lane; with fewer tokens than lanes some lanes have no row."""
    c, layout = checkpoint(family, folder), "tp4" if family in FAMILIES else "tp2pp2"
    tokens, _ = whole_logits(family, folder, "host")
    split = compiled(family, folder, f"{layout}sp")
    rank = split.programs[1]
    kinds = Counter(op.kind for op in rank.ops)
    assert kinds["reduce_scatter"] and not kinds["all_reduce"]
    norms = [op for op in rank.ops if isinstance(op, Norm) and not op.group and rank.tensors[op.x].view is None]
    assert {rank.tensors[op.out].shape[0] for op in norms} >= {f"T:1/{Layout.parse(layout).tp}"}
    for device in ("reference", "host") if family in FAMILIES else ("host",):
        wanted = run(compiled(family, folder, layout), c, device, tokens)
        np.testing.assert_array_equal(run(split, c, device, tokens), wanted)


def test_each_rank_holds_its_experts(folder: Path) -> None:
    """Six experts on four lanes: one or two whole experts each, as single weights or a stack; or columns of all."""
    for family in ("mixtral", "gptoss"):
        p = port(Checkpoint.open(tiny(family, folder / family)))
        site, ranks = "layers.0.mlp.experts", shard(p, "ep4")
        ops = [next(op for op in rank.ops if op.site == site) for rank in ranks]
        shapes = [rank.tensors[f"{site}.gate"].shape for rank in ranks]
        assert [(op.first, shape[0], op.of) for op, shape in zip(ops, shapes, strict=True)] == [
            (0, 2, 6), (2, 1, 6), (3, 2, 6), (5, 1, 6),
        ]  # fmt: skip
        (source,) = ranks[2].tensors[f"{site}.down"].source
        assert ("{3..4}" if family == "mixtral" else "|s3:5/6") in source
        halves = [rank.tensors[f"{site}.down"].shape[2] for rank in shard(p, "tp2")]
        assert sum(halves) == p.tensors[f"{site}.down"].shape[2] and len(halves) == 2
    with pytest.raises(LayoutError, match="experts has 6 experts of 96 columns, too few for layout ep8"):
        shard(p, "ep8")


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 5))
@example(3163694551, 2)  # a product that is read whole and through a view
@example(1332343195, 3)  # a view of a map of such a product
def test_sharded_random_programs_equal_unsharded(seed: int, lanes: int) -> None:
    """Random Programs that no port would produce: results that sharding rules do not split are gathered."""
    p = tangle(seed)
    weights = random_weights(p, seed)
    got = run(build_mesh(p, f"tp{lanes}", check=True), weights, "reference", [5, 1, 9, 9, 30], cuts=(3,))
    wanted = run(p, weights, "reference", [5, 1, 9, 9, 30], cuts=(3,))
    depth = len(p.ops)  # a bound on consecutive sums; a difference or a norm may amplify an error
    assert apart(got, wanted) <= 16 * depth * 2 * lanes * ROUNDING


@pytest.mark.parametrize("manner", MANNERS)
def test_layouts_round_trip_and_hold_each_weight_once(manner: str) -> None:
    p = transformer(MANNERS[manner])
    for layout in ("tp2", "pp2", "tp2pp2", "tp4"):
        ranks = shard(p, layout)
        verify_mesh(MeshProgram(ranks))
        for rank in ranks:
            assert parse_program(str(rank)) == rank
        if layout == "pp2":
            held = [t.name for rank in ranks for t in rank.of_role("weight")]
            assert set(held) == {t.name for t in p.of_role("weight")}
            assert set(held) - {"embed.weight"} == {n for n in held if held.count(n) == 1} - {"embed.weight"}
        if layout == "tp2":
            count = sum(int(np.prod(t.shape)) for rank in ranks for t in rank.of_role("weight") if len(t.shape) == 2)
            table = int(np.prod(p.tensors["embed.weight"].shape)) if MANNERS[manner].tied else 0
            all_of_it = sum(int(np.prod(t.shape)) for t in p.of_role("weight") if len(t.shape) == 2)
            assert (
                count == all_of_it + table
            )  # a tied embedding is split by columns for embed and by rows for the logits


def shares(x: np.ndarray, rank: Program, name: str) -> np.ndarray:
    from intaglio.devices.weights import assemble

    t = rank.tensors[name]
    return np.asarray(assemble(t, ArrayWeights({t.source[0].split("|")[0]: x})))


def test_each_lane_reads_its_rows_and_columns() -> None:
    p = transformer(Toy(layers=1))
    ranks = shard(p, "tp4")
    draw = np.random.default_rng(3)
    for name, axis in (("q_proj", 0), ("o_proj", 1)):
        t = p.tensors[f"layers.0.attn.{name}.weight"]
        x = draw.normal(size=t.shape).astype(np.float32)
        held = [shares(x, rank, t.name) for rank in ranks]
        np.testing.assert_array_equal(np.concatenate(held, axis=axis), x)
    t = p.tensors["layers.0.attn.k_proj.weight"]  # 2 K/V heads of width 8 on 4 lanes: two lanes hold each
    x = draw.normal(size=t.shape).astype(np.float32)
    for lane, rank in enumerate(ranks):
        np.testing.assert_array_equal(shares(x, rank, t.name), x[8 * (lane // 2) : 8 * (lane // 2 + 1)])
    assert [rank.tensors["layers.0.attn.k_cache"].shape[2] for rank in ranks] == [1] * 4
    for rank in shard(transformer(Toy(layers=1, kv_heads=1)), "tp4"):  # one K/V head: every lane holds it
        assert rank.tensors["layers.0.attn.k_proj.weight"].source == ("model.layers.0.attn.k_proj.weight",)


@pytest.mark.parametrize("weights", ["int8", "int4", "q4_k"])
@pytest.mark.parametrize("device", ["reference", "host"])
def test_shares_have_the_codes_of_the_whole_weight(tmp_path: Path, device: str, weights: str) -> None:
    """Weights are split between groups of 128 or blocks of 256, so that codes and scales do not change."""
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 768 if weights == "q4_k" else 640,
        "num_attention_heads": 4,
        "head_dim": 128,
    }
    c = Checkpoint.open(tiny("qwen2", tmp_path, num_hidden_layers=2, num_key_value_heads=2, **sizes))
    tokens = np.random.default_rng(1).integers(0, 263, 9).tolist()
    wanted = run(build(port(c), weights), c, device, tokens, cuts=(6,))
    got = run(build_mesh(port(c), "tp2", weights), c, device, tokens, cuts=(6,))
    # an activation that differs in its last bit may round to the next code: 1/127 of its group's largest value
    assert apart(got, wanted) <= 2 * 2 / 127


def test_a_quantised_block_is_not_split() -> None:
    """A split by heads that would divide a block is refused."""
    p = transformer(Toy(layers=1, heads=4, kv_heads=4, head_dim=64))
    with pytest.raises(LayoutError, match=r"o_proj.weight is q4_k\[256, 256\], and a cut at column 128 would split a "):
        build_mesh(p, "tp2", "q4_k")
    assert len(build_mesh(p, "tp2", "int8g256").programs) == 2  # groups of the same length, which may be padded


def test_a_mesh_is_batch_invariant(folder: Path) -> None:
    c = checkpoint("llama", folder)
    tokens = np.random.default_rng(7).integers(0, 263, TOKENS).tolist()
    programs = build_mesh(port(c), "tp4pp2")
    once = run(programs, c, "host", tokens, cuts=(13,))
    np.testing.assert_array_equal(run(programs, c, "host", tokens, cuts=(4, 5, 16)), once)


def test_a_narrow_wire_format_adds_only_its_rounding(folder: Path) -> None:
    c = checkpoint("qwen3", folder)
    tokens, wanted = whole_logits("qwen3", folder, "reference")
    programs = build_mesh(port(c), "tp2pp2", wire="bf16")
    assert {op.wire for rank in programs.programs for op in rank.ops if isinstance(op, Collective)} == {"bf16"}
    got = run(programs, c, "reference", tokens)
    assert bound("reference", "tp2") < apart(got, wanted) <= 2 * LAYERS * 3 * 2.0**-8


def test_taps_and_timings(folder: Path) -> None:
    c = checkpoint("llama", folder)
    programs, batch = build_mesh(port(c), "tp2"), bind([Chunk([1, 2, 3], 0, [0], [2])], PAGE)
    site = "layers.0.attn.o_proj"
    for device in ("reference", "host"):
        ex = MeshDevice(open_device(device)).load(programs, c, StateSpec(2, PAGE))
        got = ex.step(StepRequest(batch, taps=[site, f"{site}.all_reduce"], timed=True))
        a, b = got.taps[f"{site}@0"], got.taps[f"{site}@1"]
        np.testing.assert_array_equal(got.taps[f"{site}.all_reduce@1"], a + b)
        assert set(got.timings) == {op.site for op in programs.last.ops}


@pytest.mark.parametrize("wire", ["f32", "bf16"])
def test_schedules_equal_the_ops_bit_for_bit(wire: str) -> None:
    draw = np.random.default_rng(11)
    for ranks in (1, 2, 3, 8):
        group = tuple(range(ranks))
        x = [draw.normal(size=(3, 5)).astype(np.float32) for _ in group]
        reduce = AllReduce(site="s", x="x", out="y", group=group, wire=wire)
        gather = AllGather(site="s", x="x", out="y", group=group, width=5 * ranks, wire=wire)
        rows = replace(gather, tokens=True, width=5)
        scatter = ReduceScatter(site="s", x="x", out="y", group=group, share=0, wire=wire)
        swap = AllToAll(site="s", x="x", out="y", group=group, share=0, width=5 * ranks, wire=wire)
        for op in (reduce, gather, rows, scatter, swap):
            for a, b in zip(run_collective(op, x), op.exchange(x), strict=True):
                np.testing.assert_array_equal(a, b)


def test_ranks_of_layouts() -> None:
    assert [Layout.parse(t) for t in ("tp4pp2", "pp2tp4", "tp2", "ep2pp3")] == [
        Layout(4, 1, 2), Layout(4, 1, 2), Layout(2), Layout(1, 2, 3),
    ]  # fmt: skip
    assert str(Layout(4, 1, 2)) == "tp4pp2" and str(Layout()) == "tp1" and Layout(2, 2, 2).rank(1, 3) == 7
    assert Layout.parse("tp4pp2sp") == Layout(4, 1, 2, True) and str(Layout(4, sp=True)) == "tp4sp"
    for wrong in ("sp", "pp2sp", "tp2ep2sp"):
        with pytest.raises(LayoutError, match="sp"):
            Layout.parse(wrong)
    for wrong in ("", "tp", "tp0", "tp2tp2", "dp2", "tp2 pp2", "tp2sppp2"):
        with pytest.raises(LayoutError, match=f"layout {wrong!r}; wanted some of tpN"):
            Layout.parse(wrong)
    ranks = shard(transformer(Toy(layers=5)), "tp2pp3")
    layers = [sorted({op.site[:8] for op in r.ops if op.kind == "attend"}) for r in ranks]
    assert layers[0] == layers[1] == ["layers.0", "layers.1"] and layers[4] == layers[5] == ["layers.4"]


def test_impossible_layouts_are_refused() -> None:
    p = transformer(Toy(layers=2, heads=6, kv_heads=2))
    with pytest.raises(
        LayoutError, match=r"attend has 6 heads over 2 kv heads, which tp=4 does not divide; use tp=1, 2, 6"
    ):
        shard(p, "tp4")
    with pytest.raises(LayoutError, match="pp=3 stages, but toy has 2 layers; use pp2 or less"):
        shard(p, "pp3")
    with pytest.raises(LayoutError, match="shard a Program before it is (merged|fused)"):
        shard(build(p), "tp2")
    with pytest.raises(LayoutError, match="op all_gather has no sharding rule; register one"):
        shard(shard(transformer(Toy()), "tp2")[0], "tp2")


def pair() -> tuple[Program, Program]:
    a, b = shard(transformer(Toy(layers=2)), "tp2")
    return a, b


def changed(p: Program, at: str, **fields: object) -> Program:
    return p.with_ops([replace(op, **fields) if op.site == at else op for op in p.ops], p.tensors)  # type: ignore[arg-type]


def scattered(a: Program, b: Program, share: int) -> list[Program]:
    """The pair with its first sum as a reduce_scatter; rank 1 gets the rows of `share`, which no op reads."""
    out = []
    for p, own in ((a, 0), (b, share)):
        at = next(i for i, op in enumerate(p.ops) if isinstance(op, AllReduce))
        op = p.ops[at]
        extra = ReduceScatter(site="more", x=op.inputs[0], out="more", group=(0, 1), share=own)
        table = {**p.tensors, "more": Tensor("more", (f"T:{own}/2", p.tensors[op.outputs[0]].shape[1]), "f32", "temp")}
        out.append(p.with_ops([*p.ops[:at], extra, *p.ops[at:]], table))
    return out


SUM = "layers.0.attn.o_proj.all_reduce"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda a, b: (a, replace(b, context=7)), "rank 1 is 'toy' context=7, rank 0 'toy' context=64"),
        (lambda a, b: (b, a), "Program 0 of 2 says it is rank 1 of mesh 2"),
        (lambda a, b: (a, changed(b, SUM, site="other")), "disagree at layers.0.attn.o_proj.all_reduce"),
        (lambda a, b: (a, changed(b, SUM, wire="bf16")), "disagree at"),
        (lambda a, b: (a, changed(b, "lm_head", w="layers.0.mlp.gate_proj.weight")), "breaks rule shapes_agree"),
        (
            lambda a, b: (a.with_ops([*a.ops, Send(site="x", x="norm", peer=1)], a.tensors), b),
            "rank 0 sends at x what rank 1 never receives",
        ),
        (lambda a, b: scattered(a, b, 0), r"have rows \['T:0/2', 'T:0/2'\] at .*; wanted the shares of 2 in order"),
    ],
)  # fmt: skip
def test_ranks_that_do_not_match_are_refused(spoil, says: str) -> None:
    with pytest.raises(ProgramError, match=says):
        verify_mesh(MeshProgram(spoil(*pair())))


def test_stages_that_do_not_match_are_refused() -> None:
    a, b = shard(transformer(Toy(layers=2)), "pp2")
    (recv,) = (op for op in b.ops if isinstance(op, Recv))
    with pytest.raises(ProgramError, match=r"deadlock: rank 1 waits at .* \(recv\) for rank 0"):
        verify_mesh(MeshProgram((a.with_ops([op for op in a.ops if not isinstance(op, Send)], a.tensors), b)))
    with pytest.raises(ProgramError, match="rank 0 sends layers.0.mlp.add at .*, rank 1 expects another shape"):
        verify_mesh(MeshProgram((a, changed(b, recv.site, wire="bf16"))))


def test_a_single_rank_and_unsupported_devices_are_refused() -> None:
    p = transformer(Toy())
    weights, ranks, state = random_weights(p), shard(p, "tp2"), StateSpec(9, 4)
    alone = open_device("reference").load(ranks[0], weights, state)
    with pytest.raises(DeviceError, match=r"rank 0 of 2 waits for the others; load all of them into a MeshDevice"):
        alone.step(StepRequest(mixed_batches()[0]))
    with pytest.raises(DeviceError, match="device 'oracle' cannot run a mesh; use reference or host"):
        MeshDevice(open_device("oracle")).load(MeshProgram(ranks), weights, state)
    with pytest.raises(DeviceError, match="device 'reference' runs one rank; load tp2 by a MeshDevice"):
        open_device("reference").load(MeshProgram(ranks, "tp2"), weights, state)
    linear = next(op for op in ranks[0].ops if isinstance(op, Linear))
    with pytest.raises(OpError, match="a single rank cannot compute it"):
        AllReduce(site="s", x=linear.out, out="y", group=(0, 1)).reference({}, mixed_batches()[0])


def test_expert_parallel_ranks_share_all_but_attention(folder: Path) -> None:
    """Also without experts: each expert-parallel group computes attention, all lanes share the MLP."""
    c = checkpoint("qwen3", folder)
    tokens, wanted = whole_logits("qwen3", folder, "reference")
    mesh = build_mesh(port(c), "ep3")
    ranks = mesh.programs
    assert [r.tensors["layers.0.attn.k_cache"].shape[2] for r in ranks] == [2, 2, 2]
    assert sum(int(r.tensors["layers.0.mlp.down_proj.weight"].shape[1]) for r in ranks) == 96
    assert not [op.site for op in ranks[0].ops if "attn" in op.site and isinstance(op, Collective)]
    assert apart(run(mesh, c, "reference", tokens), wanted) <= bound("reference", "ep3")


def test_an_engine_on_a_mesh_equals_one_on_a_single_rank(folder: Path) -> None:
    """Batching, chunked prefill, preemption and sampling work on a mesh as on one rank."""
    checkpoint("qwen3", folder)
    path = folder / "qwen3"
    one, mesh = (
        LLM(path, layout=layout, in_process=True, max_batch_tokens=7, kv_tokens=96) for layout in (None, "tp4pp2")
    )
    assert len(mesh.mesh.programs) == 8 and mesh.mesh.layout == "tp4pp2" and mesh.model.program == one.model.program
    ids = np.random.default_rng(2).integers(0, 263, (2, 19)).tolist()
    for a, b in zip(mesh.logits(ids), one.logits(ids), strict=True):
        assert apart(a, b) <= bound("host", "tp4")
    params = SamplingParams(max_tokens=24, temperature=0.8, seed=5, ignore_eos=True)
    first, again = (mesh.generate(prompts, params) for prompts in (ids, ids[::-1]))
    assert [o.token_ids for o in first] == [o.token_ids for o in again][::-1]
    assert {o.finish_reason for o in first} == {"length"}


def test_the_journal_of_a_mesh_can_be_replayed(folder: Path, tmp_path: Path) -> None:
    checkpoint("qwen3", folder)
    path, journal = folder / "qwen3", tmp_path / "journal"
    llm = LLM(path, layout="tp2pp2", in_process=True, kv_tokens=96, kv_format="int8", journal=journal)
    odd = Grammar("regex", "(a|b)+")
    params = SamplingParams(max_tokens=9, temperature=0.9, seed=3, ignore_eos=True, repetition_penalty=1.4)
    first = llm.generate([[1, 2, 3], [4, 5]], params)
    assert set(llm.generate("x", SamplingParams(max_tokens=6, grammar=odd))[0].text) <= {"a", "b"}
    assert [len(o.token_ids) for o in first] == [9, 9]
    again = replay_journal(journal)
    assert again.steps > 0 and again.tokens >= 18 and again.divergence is None


def test_a_mesh_runs_in_a_worker(folder: Path) -> None:
    checkpoint("qwen3", folder)
    params = SamplingParams(max_tokens=9, temperature=0.9, seed=3, ignore_eos=True)
    here, there = (
        LLM(folder / "qwen3", layout="tp2pp2", in_process=True, kv_tokens=96, worker=worker) for worker in (False, True)
    )
    assert there.generate([[1, 2, 3], [4, 5]], params) == here.generate([[1, 2, 3], [4, 5]], params)
    os.kill(there.engine.executable.pids[0], signal.SIGKILL)  # type: ignore[attr-defined]
    assert there.generate([[4, 5]], params) == here.generate([[4, 5]], params)
    there.engine.executable.close()


def test_layouts_on_the_command_line() -> None:
    cli = CliRunner()
    shown = cli.invoke(app, ["disasm", "--layout", "tp2pp2", "--rank", "2", "--full"])
    program = parse_program(shown.stdout)
    assert (program.mesh, program.rank) == (4, 2) and "recv" in {op.kind for op in program.ops}
    raw = parse_program(cli.invoke(app, ["disasm", "--layout", "tp2", "--raw", "--full"]).stdout)
    assert "layers.0.attn.q_proj" in {op.site for op in raw.ops}
    said = cli.invoke(app, ["generate", "--layout", "tp2", "--prompt", "def f(", "--max-tokens", "3", "--json"])
    assert said.exit_code == 0 and len(json.loads(said.stdout)[0]["token_ids"]) == 3
    for args, says in (
        (["disasm", "--layout", "tp2", "--rank", "2"], "--rank 2: layout tp2 has ranks 0..1"),
        (["generate", "--layout", "tp3", "--prompt", "x"], "which tp=3 does not divide"),
        (["generate", "--layout", "dp3", "--prompt", "x"], "layout 'dp3'; wanted some of tpN"),
    ):
        failed = cli.invoke(app, args)
        assert failed.exit_code == 2 and says in failed.stderr
