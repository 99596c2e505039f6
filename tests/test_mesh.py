"""Sharded equals whole: every family by every layout its heads allow, on the reference and on the host.

Bounds count roundings. Cutting a sum over K into P parts changes only where float32 rounds: at most twice a part on the
reference (which sums a part in float64), and along the K-long chain on the host; a layer has two such sums.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, MIXTURES, tiny
from toy import MANNERS, Toy, mixed_batches, random_weights, tangle, transformer
from typer.testing import CliRunner

from intaglio.batch import Chunk, bind
from intaglio.cli import app
from intaglio.compiler import Layout, LayoutError, build, build_mesh, shard
from intaglio.devices import ArrayWeights, DeviceError, MeshDevice, StateSpec, open_device
from intaglio.devices.mesh import together
from intaglio.llm import LLM
from intaglio.models import Checkpoint, port
from intaglio.ops import AllGather, AllReduce, AllToAll, Linear, Norm, OpError, Recv, ReduceScatter, Send, Tensor
from intaglio.ops.collective import Collective
from intaglio.program import Program, ProgramError, parse_program, verify_mesh
from intaglio.runtime import Grammar, SamplingParams
from intaglio.tools.replay import replay_journal

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


def run(programs: Program | tuple[Program, ...], weights, device: str, tokens: list[int], cuts=(13,)) -> np.ndarray:
    """Logits of every token: prefill in pieces that end at `cuts`, beside a stranger, then decoding."""
    inner, state = open_device(device), StateSpec(6, PAGE)
    whole = isinstance(programs, Program)
    ex = inner.load(programs, weights, state) if whole else MeshDevice(inner).load(programs, weights, state)
    out, ends = [], [*cuts, *range(cuts[-1] + 1, len(tokens) + 1)]
    for start, end in zip([0, *ends], ends, strict=False):
        mine = Chunk(tokens[start:end], start, [4, 1], range(end - start))
        beside = [Chunk(tokens[:3], 0, [2], [0])] if start == 0 else []
        got = ex.step(bind([mine, *beside], PAGE), logits=True).logits
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
def compiled(family: str, folder: Path, layout: str) -> tuple[Program, ...]:
    return build_mesh(port(checkpoint(family, folder)), layout)


@pytest.mark.parametrize("device", ["reference", "host"])
@pytest.mark.parametrize("layout", ["tp2", "tp4", "tp8", "pp2", "pp3", "tp2ep2pp2", "tp4pp3"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sharded_equals_whole(folder: Path, family: str, layout: str, device: str) -> None:
    c = checkpoint(family, folder)
    tokens, wanted = whole_logits(family, folder, device)
    got = run(compiled(family, folder, layout), c, device, tokens)
    if Layout.parse(layout).lanes > 1:
        assert apart(got, wanted) <= bound(device, layout)
    else:
        np.testing.assert_array_equal(got, wanted)  # a pipeline moves values, and changes none


@pytest.mark.parametrize("device", ["reference", "host"])
@pytest.mark.parametrize("layout", ["tp8", "pp3", "ep2", "ep4pp2", "tp2ep2"])
@pytest.mark.parametrize("family", MIXTURES)
def test_mixtures_sharded_equal_whole(folder: Path, family: str, layout: str, device: str) -> None:
    """By columns, by expert, and by both; latents, sinks and chunks among them. A near tie in routing would show as
    another model's logits; these weights and tokens, which are always the same, have none."""
    tokens, wanted = whole_logits(family, folder, device)
    programs = compiled(family, folder, layout)
    got = run(programs, checkpoint(family, folder), device, tokens)
    if Layout.parse(layout).lanes > 1:
        assert apart(got, wanted) <= bound(device, layout)
    else:
        np.testing.assert_array_equal(got, wanted)
    held = [sum(op.kind == "experts" for op in rank.ops) for rank in programs]
    whole = sum(op.kind == "experts" for op in port(checkpoint(family, folder)).ops)
    assert sum(held) == Layout.parse(layout).lanes * whole > 0


@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_norms_split_along_tokens_change_no_bit(folder: Path, family: str) -> None:
    """Rows are normed and added alike wherever they are; with fewer tokens than lanes some lanes have none."""
    c, layout = checkpoint(family, folder), "tp4" if family in FAMILIES else "tp2pp2"
    tokens, _ = whole_logits(family, folder, "host")
    split = compiled(family, folder, f"{layout}sp")
    kinds = Counter(op.kind for op in split[1].ops)
    assert kinds["reduce_scatter"] and not kinds["all_reduce"]
    norms = [op for op in split[1].ops if isinstance(op, Norm) and not op.group and split[1].tensors[op.x].view is None]
    assert {split[1].tensors[op.out].shape[0] for op in norms} >= {f"T:1/{Layout.parse(layout).tp}"}
    for device in ("reference", "host") if family in FAMILIES else ("host",):
        wanted = run(compiled(family, folder, layout), c, device, tokens)
        np.testing.assert_array_equal(run(split, c, device, tokens), wanted)


def test_each_rank_holds_its_experts(folder: Path) -> None:
    """Six experts four ways: one or two whole ones each, by name or as rows of a stack; or all, and columns of each."""
    for family in ("mixtral", "gptoss"):
        p = port(Checkpoint.open(tiny(family, folder / family)))
        site, ranks = "layers.0.mlp.experts", shard(p, "ep4")
        ops = [next(op for op in rank.ops if op.site == site) for rank in ranks]
        shapes = [rank.tensors[f"{site}.gate"].shape for rank in ranks]
        assert [(op.first, shape[0], op.of) for op, shape in zip(ops, shapes, strict=True)] == [
            (0, 1, 6), (1, 2, 6), (3, 1, 6), (4, 2, 6),
        ]  # fmt: skip
        (source,) = ranks[3].tensors[f"{site}.down"].source
        assert ("{4..5}" if family == "mixtral" else "|s4:6/6") in source
        halves = [rank.tensors[f"{site}.down"].shape[2] for rank in shard(p, "tp2")]
        assert sum(halves) == p.tensors[f"{site}.down"].shape[2] and len(halves) == 2
    with pytest.raises(LayoutError, match="experts has 6 experts of 96 columns, too few for layout ep8"):
        shard(p, "ep8")


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 5))
@example(3163694551, 2)  # a product of which one view is read, and all of it
@example(1332343195, 3)  # a view of what a map makes of such a product
def test_tangles_sharded_equal_whole(seed: int, lanes: int) -> None:
    """Programs that no port would write: whatever the rules do not cut they gather."""
    p = tangle(seed)
    weights = random_weights(p, seed)
    got = run(build_mesh(p, f"tp{lanes}", check=True), weights, "reference", [5, 1, 9, 9, 30], cuts=(3,))
    wanted = run(p, weights, "reference", [5, 1, 9, 9, 30], cuts=(3,))
    depth = len(p.ops)  # at most as many sums one after the other; a difference or a norm may enlarge an error
    assert apart(got, wanted) <= 16 * depth * 2 * lanes * ROUNDING


@pytest.mark.parametrize("manner", MANNERS)
def test_layouts_read_back_and_hold_each_weight_once(manner: str) -> None:
    p = transformer(MANNERS[manner])
    for layout in ("tp2", "pp2", "tp2pp2", "tp4"):
        ranks = shard(p, layout)
        verify_mesh(ranks)
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
            assert count == all_of_it + table  # a tied table is cut by columns to embed, and by rows for logits


def shares(x: np.ndarray, rank: Program, name: str) -> np.ndarray:
    from intaglio.devices.device import assemble

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
    t = p.tensors["layers.0.attn.k_proj.weight"]  # 2 kv heads of 8 for 4 lanes: each is held twice
    x = draw.normal(size=t.shape).astype(np.float32)
    for lane, rank in enumerate(ranks):
        np.testing.assert_array_equal(shares(x, rank, t.name), x[8 * (lane // 2) : 8 * (lane // 2 + 1)])
    assert [rank.tensors["layers.0.attn.k_cache"].shape[2] for rank in ranks] == [1] * 4
    for rank in shard(transformer(Toy(layers=1, kv_heads=1)), "tp4"):  # one kv head: every lane has it, whole
        assert rank.tensors["layers.0.attn.k_proj.weight"].source == ("model.layers.0.attn.k_proj.weight",)


@pytest.mark.parametrize("weights", ["int8", "int4", "q4_k"])
@pytest.mark.parametrize("device", ["reference", "host"])
def test_shares_are_quantised_as_the_whole(tmp_path: Path, device: str, weights: str) -> None:
    """Cuts fall between groups of 128, or blocks of 256, so codes and scales are those of the whole."""
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
    # an activation whose last bit differs may round to the next code, one part in 127 of its group's largest
    assert apart(got, wanted) <= 2 * 2 / 127


def test_a_block_of_values_is_not_torn() -> None:
    """By heads, where there is no choice of where to cut."""
    p = transformer(Toy(layers=1, heads=4, kv_heads=4, head_dim=64))
    with pytest.raises(LayoutError, match=r"o_proj.weight is q4_k\[256, 256\], and a cut at column 128 would tear a "):
        build_mesh(p, "tp2", "q4_k")
    assert len(build_mesh(p, "tp2", "int8g256")) == 2  # whose groups are as long, but may be padded


def test_a_mesh_gives_the_same_bits_whatever_the_company(folder: Path) -> None:
    c = checkpoint("llama", folder)
    tokens = np.random.default_rng(7).integers(0, 263, TOKENS).tolist()
    programs = build_mesh(port(c), "tp4pp2")
    once = run(programs, c, "host", tokens, cuts=(13,))
    np.testing.assert_array_equal(run(programs, c, "host", tokens, cuts=(4, 5, 16)), once)


def test_a_short_wire_costs_its_rounding(folder: Path) -> None:
    c = checkpoint("qwen3", folder)
    tokens, wanted = whole_logits("qwen3", folder, "reference")
    programs = build_mesh(port(c), "tp2pp2", wire="bf16")
    assert {op.wire for rank in programs for op in rank.ops if isinstance(op, Collective)} == {"bf16"}
    got = run(programs, c, "reference", tokens)
    assert bound("reference", "tp2") < apart(got, wanted) <= 2 * LAYERS * 3 * 2.0**-8


def test_taps_and_timings(folder: Path) -> None:
    c = checkpoint("llama", folder)
    programs, batch = build_mesh(port(c), "tp2"), bind([Chunk([1, 2, 3], 0, [0], [2])], PAGE)
    site = "layers.0.attn.o_proj"
    for device in ("reference", "host"):
        ex = MeshDevice(open_device(device)).load(programs, c, StateSpec(2, PAGE))
        got = ex.step(batch, taps=[site, f"{site}.all_reduce"], timed=True)
        a, b = got.taps[f"{site}@0"], got.taps[f"{site}@1"]
        np.testing.assert_array_equal(got.taps[f"{site}.all_reduce@1"], a + b)
        assert set(got.timings) == {op.site for op in programs[0].ops}


@pytest.mark.parametrize("wire", ["f32", "bf16"])
def test_schedules_give_the_bits_of_the_definition(wire: str) -> None:
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
            for a, b in zip(together(op, x), op.exchange(x), strict=True):
                np.testing.assert_array_equal(a, b)


def test_the_layout_of_ranks() -> None:
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


def test_what_cannot_be_dealt_out_is_refused() -> None:
    p = transformer(Toy(layers=2, heads=6, kv_heads=2))
    with pytest.raises(LayoutError, match=r"attend has 6 heads over 2 kv heads; tp=4 fits not, tp=1, 2, 6 do"):
        shard(p, "tp4")
    with pytest.raises(LayoutError, match="pp=3 stages, but toy has 2 layers; use pp2 or less"):
        shard(p, "pp3")
    with pytest.raises(LayoutError, match="shard a Program before it is (merged|fused)"):
        shard(build(p), "tp2")
    with pytest.raises(LayoutError, match="op all_gather has no rule of sharding"):
        shard(shard(transformer(Toy()), "tp2")[0], "tp2")


def pair() -> tuple[Program, Program]:
    a, b = shard(transformer(Toy(layers=2)), "tp2")
    return a, b


def changed(p: Program, at: str, **fields: object) -> Program:
    return p.with_ops([replace(op, **fields) if op.site == at else op for op in p.ops], p.tensors)  # type: ignore[arg-type]


def scattered(a: Program, b: Program, share: int) -> list[Program]:
    """The first sum scattered along tokens: rank 1 gets the rows of `share`. Nothing reads them."""
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
        (lambda a, b: (a, changed(b, SUM, site="other")), "meet at layers.0.attn.o_proj.all_reduce with unlike terms"),
        (lambda a, b: (a, changed(b, SUM, wire="bf16")), "with unlike terms"),
        (lambda a, b: (a, changed(b, "lm_head", w="layers.0.mlp.gate_proj.weight")), "breaks rule shapes_agree"),
        (
            lambda a, b: (a.with_ops([*a.ops, Send(site="x", x="norm", peer=1)], a.tensors), b),
            "rank 0 sends at x what rank 1 never receives",
        ),
        (lambda a, b: scattered(a, b, 0), r"have rows \['T:0/2', 'T:0/2'\] at .*; wanted the shares of 2 in order"),
    ],
)  # fmt: skip
def test_a_mesh_that_does_not_fit_is_refused(spoil, says: str) -> None:
    with pytest.raises(ProgramError, match=says):
        verify_mesh(spoil(*pair()))


def test_stages_that_do_not_fit_are_refused() -> None:
    a, b = shard(transformer(Toy(layers=2)), "pp2")
    (recv,) = (op for op in b.ops if isinstance(op, Recv))
    with pytest.raises(ProgramError, match=r"rank 1 waits at .* \(recv\) for rank 0, in vain"):
        verify_mesh((a.with_ops([op for op in a.ops if not isinstance(op, Send)], a.tensors), b))
    with pytest.raises(ProgramError, match="rank 0 sends layers.0.mlp.add at .*, rank 1 expects .* otherwise"):
        verify_mesh((a, changed(b, recv.site, wire="bf16")))


def test_a_rank_alone_is_refused_and_other_devices_too() -> None:
    p = transformer(Toy())
    weights, ranks, state = random_weights(p), shard(p, "tp2"), StateSpec(9, 4)
    alone = open_device("reference").load(ranks[0], weights, state)
    with pytest.raises(DeviceError, match=r"rank 0 of 2 waits for the others; load all of them into a MeshDevice"):
        alone.step(mixed_batches()[0])
    with pytest.raises(DeviceError, match="device 'oracle' runs no mesh; use reference or host"):
        MeshDevice(open_device("oracle")).load(ranks, weights, state)
    linear = next(op for op in ranks[0].ops if isinstance(op, Linear))
    with pytest.raises(OpError, match="one rank alone has no answer"):
        AllReduce(site="s", x=linear.out, out="y", group=(0, 1)).reference({}, mixed_batches()[0])


def test_ways_of_experts_share_all_but_heads(folder: Path) -> None:
    """Without experts too: attention is done by each way, the MLP shared by all lanes."""
    c = checkpoint("qwen3", folder)
    tokens, wanted = whole_logits("qwen3", folder, "reference")
    ranks = build_mesh(port(c), "ep3")
    assert [r.tensors["layers.0.attn.k_cache"].shape[2] for r in ranks] == [2, 2, 2]
    assert sum(int(r.tensors["layers.0.mlp.down_proj.weight"].shape[1]) for r in ranks) == 96
    assert not [op.site for op in ranks[0].ops if "attn" in op.site and isinstance(op, Collective)]
    assert apart(run(ranks, c, "reference", tokens), wanted) <= bound("reference", "ep3")


def test_a_model_runs_on_a_mesh_as_on_one(folder: Path) -> None:
    """The engine above does not know: batches, chunks, preemption and sampling work as on one rank."""
    checkpoint("qwen3", folder)
    path = folder / "qwen3"
    one, mesh = (LLM(path, layout=layout, max_batch_tokens=7, kv_tokens=96) for layout in (None, "tp4pp2"))
    assert len(mesh.programs) == 8 and {p.mesh for p in mesh.programs} == {8} and mesh.program == one.program
    ids = np.random.default_rng(2).integers(0, 263, (2, 19)).tolist()
    for a, b in zip(mesh.logits(ids), one.logits(ids), strict=True):
        assert apart(a, b) <= bound("host", "tp4")
    params = SamplingParams(max_tokens=24, temperature=0.8, seed=5, ignore_eos=True)
    first, again = (mesh.generate(prompts, params) for prompts in (ids, ids[::-1]))
    assert [o.token_ids for o in first] == [o.token_ids for o in again][::-1]
    assert {o.finish_reason for o in first} == {"length"}


def test_a_mesh_keeps_a_journal_that_runs_again(folder: Path, tmp_path: Path) -> None:
    checkpoint("qwen3", folder)
    path, journal = folder / "qwen3", tmp_path / "journal"
    llm = LLM(path, layout="tp2pp2", kv_tokens=96, kv_format="int8", journal=journal)
    odd = Grammar("regex", "(a|b)+")
    params = SamplingParams(max_tokens=9, temperature=0.9, seed=3, ignore_eos=True, repetition_penalty=1.4)
    first = llm.generate([[1, 2, 3], [4, 5]], params)
    assert set(llm.generate("x", SamplingParams(max_tokens=6, grammar=odd))[0].text) <= {"a", "b"}
    assert [len(o.token_ids) for o in first] == [9, 9]
    again = replay_journal(journal)
    assert again.steps > 0 and again.tokens >= 18 and again.divergence is None
    with pytest.raises(DeviceError, match="layout 'tp2' with worker: ranks run in this process; leave one of the two"):
        LLM(path, layout="tp2", worker=True)


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
        (["generate", "--layout", "tp3", "--prompt", "x"], "tp=3 fits not"),
        (["generate", "--layout", "dp3", "--prompt", "x"], "layout 'dp3'; wanted some of tpN"),
    ):
        failed = cli.invoke(app, args)
        assert failed.exit_code == 2 and says in failed.stderr
