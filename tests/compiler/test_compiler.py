"""The compiler: every pass preserves the result, does what its name says, and changes nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.toy import (
    MANNERS,
    PAGE,
    SAME,
    VOCABULARY,
    Toy,
    apart,
    finish,
    mixed_batches,
    random_weights,
    run,
    site,
    tangle,
    transformer,
)

from intaglio import formats
from intaglio.batch import Chunk, bind
from intaglio.compiler import RECIPE, Pass, build
from intaglio.compiler.buffers import buffers, bytes_per_row, plan_buffers
from intaglio.compiler.dead import remove_dead
from intaglio.compiler.shard.lane import RULES
from intaglio.compiler.weights import fitted, set_weight_formats
from intaglio.devices import StateSpec, StepRequest, open_device
from intaglio.ops import REGISTRY, Collective, Embed, Linear, Map, Sample, Select, Tensor
from intaglio.program import Builder, Program, ProgramError, parse_program, verify

WEIGHTS = ("auto", "f32", "bf16", "f16", "int8", "int4", "int8g32", "int4g64")


def stages(program: Program, weights: str = "auto") -> Iterator[tuple[str, Program]]:
    """The Program after each pass that changed it, verified and read back from its text."""
    for step in RECIPE:
        after = step.run(program, weights) if step.run is set_weight_formats else step.run(program)
        verify(after)
        assert parse_program(str(after)) == after
        if after != program:
            yield step.name, after
        program = after


# Every pass keeps the result


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_passes_preserve_results_of_random_programs(seed: int) -> None:
    program = tangle(seed)
    weights = random_weights(program, seed)
    want = run(program, weights)
    for name, after in stages(program):
        assert apart(want, run(after, weights)) <= SAME, name


def test_random_programs_exercise_every_pass() -> None:
    fired = {name for seed in range(60) for name, _ in stages(tangle(seed))} | {"set_weight_formats"}
    assert fired == {step.name for step in RECIPE}


@pytest.mark.parametrize("manner", MANNERS)
def test_passes_preserve_results_of_transformers(manner: str) -> None:
    program = transformer(MANNERS[manner])
    weights = random_weights(program)
    want = run(program, weights)
    for name, after in stages(program):
        assert apart(want, run(after, weights)) <= SAME, name


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("stored", ["f32", "bf16"])
def test_passes_preserve_results_in_every_format(stored: str, weights: str) -> None:
    """Once the formats are set, the other passes may not change a thing: x is rounded, so a slip would show."""
    program = transformer(Toy(format=stored, layers=1, bias=True))
    checkpoint = random_weights(program)
    formatted = set_weight_formats(program, weights)
    assert apart(run(formatted, checkpoint), run(build(program, weights), checkpoint)) <= SAME


@pytest.mark.parametrize("manner", MANNERS)
def test_compilation_is_idempotent(manner: str) -> None:
    for weights in ("auto", "int4"):
        once = build(transformer(MANNERS[manner]), weights)
        assert build(once, weights) == once


def test_compiled_programs_are_batch_invariant() -> None:
    """The mixed batches against each sequence by itself, whole."""
    program = build(transformer(Toy(layers=1)), "int8")
    device = open_device("reference")
    weights = random_weights(transformer(Toy(layers=1)))
    mixed = device.load(program, weights, StateSpec(9, PAGE))
    seen: dict[int, list[tuple[int, int, np.ndarray]]] = {}
    for batch in mixed_batches():
        logits = mixed.step(StepRequest(batch, logits=True)).logits
        assert logits is not None
        for s, first in enumerate(batch.first_row):
            rows = range(first, first + batch.q_len[s])
            own = [(int(batch.positions[r]), int(batch.tokens[r]), logits[r]) for r in rows]
            seen.setdefault(int(batch.block_table[s, 0]), []).extend(own)
    for sequence in seen.values():
        _, tokens, rows = zip(*sorted(sequence, key=lambda x: x[0]), strict=True)
        alone = device.load(program, weights, StateSpec(9, PAGE))
        whole = alone.step(
            StepRequest(bind([Chunk(tokens, 0, [1, 2, 3, 4], range(len(tokens)))], PAGE), logits=True)
        ).logits
        assert whole is not None
        np.testing.assert_allclose(np.array(rows), whole, rtol=0, atol=1e-6 * np.abs(whole).max())


# What formats cost, derived from the formats


def weight_error(w: np.ndarray, name: str) -> np.ndarray:
    """Half a step of the format `name`, element by element. bf16 has 8 significant bits, f16 11. The step of int8 is
    the group's max / 127, of int4 max / 8."""
    fmt = formats.get(name)
    if not fmt.grouped:
        return np.abs(w) * {"f32": 0, "bf16": 2.0**-8, "f16": 2.0**-11}[name]
    peak = np.abs(formats.in_groups(w, fmt.group)).max(axis=2)
    return np.repeat(peak / (2 * (127 if fmt.bits == 8 else 8)), fmt.group, axis=1)[:, : w.shape[1]]


def x_error(x: np.ndarray, w_format: str) -> np.ndarray:
    """The same for activations, which follow the weights: bf16, or int8 in the groups of w."""
    fmt = formats.get(w_format)
    if not fmt.grouped:
        return np.abs(x) * 2.0**-8 if w_format == "bf16" else 0 * x
    return weight_error(x, f"int8g{fmt.group}")


def chain() -> Program:
    """embed, two linears with a residual, head: K of 40 and 72, multiples of no group."""
    b = Builder("chain", 64)
    embed = b.weight("embed.weight", (VOCABULARY, 40), "embed")
    x = b.op(Embed, "embed", "tokens", embed)
    y = b.op(Linear, "up", x, b.weight("up.weight", (72, 40), "up"), bias=b.weight("up.bias", (72,), "bias"))
    y = b.op(Linear, "down", y, b.weight("down.weight", (40, 72), "down"), residual=x)
    y = b.op(Select, "select", y, "rows")
    b.op(Linear, "head", y, b.weight("head.weight", (VOCABULARY, 40), "head"), out="logits", role="output")
    b.op(Sample, "sample", "logits", tokens="next_tokens", logprobs="logprobs", role="output")
    return b.done()


@pytest.mark.parametrize("weights", ["f32", "bf16", "f16", "int8", "int8g32", "int4", "int4g128"])
def test_quantised_programs_stay_within_what_their_formats_allow(weights: str) -> None:
    """Rounding errors are uniform over half a step either way, so their variance is its square over 3; independent
    errors add in quadrature. The error must be of that size: not above, and not far below, or nothing was rounded."""
    program = chain()
    checkpoint = random_weights(program)
    compiled = build(program, weights)
    got, want = run(compiled, checkpoint), run(program, checkpoint)
    w = {name: array.astype(np.float64) for name, array in checkpoint.arrays.items()}
    ids = np.concatenate([batch.tokens for batch in mixed_batches()])
    x0 = w["embed"][ids]
    v0 = weight_error(x0, "bf16" if weights == "bf16" else "f32") ** 2 / 3

    def variance(x: np.ndarray, v: np.ndarray, name: str) -> np.ndarray:
        """Of the result of the linear `name`, from x and the variance of its error."""
        format = compiled.tensors[name + ".weight"].format
        dw, dx = weight_error(w[name], format) ** 2 / 3, x_error(x, format) ** 2 / 3
        return (v + dx) @ (w[name] ** 2 + dw).T + x**2 @ dw.T

    x1 = x0 @ w["up"].T + w["bias"]
    x2 = x1 @ w["down"].T + x0
    v2 = variance(x1, variance(x0, v0, "up"), "down") + v0
    expected = np.sqrt(variance(x2, v2, "head").mean())
    error = np.sqrt(((got - want) ** 2).mean())
    assert 0.4 * expected <= error <= 1.3 * expected + SAME


@pytest.mark.parametrize(("weights", "step"), [("bf16", 2.0**-8), ("int8", 1 / 127), ("int4", 1 / 8)])
def test_quantised_transformers_stay_close(weights: str, step: float) -> None:
    """Independent errors of x and of weights, step / 2 each or so, that add up as the square root of their number."""
    program = transformer(Toy(tied=False))
    checkpoint = random_weights(program)
    got, want = run(build(program, weights), checkpoint), run(program, checkpoint)
    linears = 4 * 2 + 1
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < step * (2 * linears) ** 0.5


# set_weight_formats


def formats_of(p: Program, *names: str) -> list[str]:
    return [p.tensors[name].format for name in names]


@pytest.mark.parametrize(
    ("weights", "tied", "linear", "x", "table", "head", "cache"),
    [
        ("auto", True, "bf16", "bf16", "bf16", "bf16", "bf16"),
        ("f32", True, "f32", "f32", "f32", "f32", "f32"),
        ("f16", False, "f16", "f32", "bf16", "f16", "bf16"),
        ("int8", True, "int8g32", "int8", "int8g32", "int8g32", "bf16"),
        ("int8", False, "int8g32", "int8", "bf16", "int8g32", "bf16"),
        ("int4", True, "int4g32", "int8", "int8g32", "int8g32", "bf16"),
        ("int4", False, "int4g32", "int8", "bf16", "int8g32", "bf16"),
        ("q4_k", True, "int4g32", "int8", "int8g32", "int8g32", "bf16"),
        ("int4g128", False, "int4g128", "int8", "bf16", "int8g32", "bf16"),
        ("int8g32", False, "int8g32", "int8", "bf16", "int8g32", "bf16"),
        ("int8g128", False, "int8g128", "int8", "bf16", "int8g128", "bf16"),
        ("fp8", False, "fp8g32", "bf16", "bf16", "fp8g32", "bf16"),
    ],
)
def test_weight_formats(weights: str, tied: bool, linear: str, x: str, table: str, head: str, cache: str) -> None:
    p = set_weight_formats(transformer(Toy(format="bf16", tied=tied, bias=True)), weights)
    verify(p)
    names = ("layers.0.attn.q_proj.weight", "embed.weight", "embed.weight" if tied else "lm_head.weight")
    assert formats_of(p, *names, "layers.0.attn.k_cache") == [linear, table, head, cache]
    assert formats_of(p, "layers.0.attn.norm.weight", "layers.0.attn.q_proj.bias") == ["bf16", "bf16"]
    op = site(p, "layers.1.mlp.down_proj")
    assert isinstance(op, Linear) and op.x_format == x


def test_stored_f32_and_f16_keep_x_whole() -> None:
    for stored in ("f32", "f16"):
        p = build(transformer(Toy(format=stored)))
        assert {op.x_format for op in p.ops if isinstance(op, Linear)} == {"f32"}
    assert formats_of(build(transformer(Toy()), "int8"), "layers.0.attn.v_cache") == ["bf16"]
    assert formats_of(build(transformer(Toy(tied=False)), "bf16"), "embed.weight") == ["bf16"]


@pytest.mark.parametrize(
    ("k", "got"),
    [(2048, "int8g128"), (576, "int8g96"), (192, "int8g96"), (320, "int8g64"), (4000, "int8g32"), (90, "int8g128")],
)
def test_groups_fit_the_rows(k: int, got: str) -> None:
    assert fitted("int8g128", Tensor("w", (4, k), "bf16", "weight")) == got
    assert fitted("int4g32", Tensor("w", (4, k), "bf16", "weight")) == "int4g32"
    assert fitted("q4_k", Tensor("w", (4, k), "bf16", "weight")) == ("q4_k" if k == 2048 else "int4g32")


@pytest.mark.parametrize("weights", ["int3", "i32", "int8g33", "fp8g33", "int2row", ""])
def test_unknown_weights_are_refused(weights: str) -> None:
    with pytest.raises(formats.FormatError, match=rf"weights='{weights}'.*auto.*int4gN"):
        build(transformer(Toy(layers=1)), weights)


# remove_dead, plan_buffers


def test_dead_ops_are_removed_and_stateful_ones_kept() -> None:
    b = Builder("dead", 64)
    x = b.op(Embed, "embed", "tokens", b.weight("embed.weight", (VOCABULARY, 8), "embed"))
    y = b.op(Linear, "unread", x, b.weight("unread.weight", (8, 8), "unread"))
    b.op(Map, "last", b.view("part", y, 0, 4), expr="a * 2")
    b.view("nobody", x, 0, 4)
    b.const("numbers", [1.0])
    p = remove_dead(finish(b, x))
    verify(p)
    assert [op.site for op in p.ops] == ["embed", "select", "head", "sample"]
    assert not {"unread", "unread.weight", "part", "last", "nobody", "numbers"} & set(p.tensors)
    assert {"tokens", "positions", "rows"} <= set(p.tensors)  # positions, though nobody reads them
    kept = transformer(Toy(layers=1))
    assert remove_dead(kept) == kept
    assert "kv_write" in {op.kind for op in remove_dead(kept).ops}


@pytest.mark.parametrize("manner", MANNERS)
def test_buffers_hold_live_temps_and_little_more(manner: str) -> None:
    p = build(transformer(replace(MANNERS[manner], layers=6)))
    temps = [t for t in p.of_role("temp") if not t.view]
    assert all(t.buffer is not None for t in temps)
    assert all(t.buffer is None for t in p.tensors.values() if t.view or t.role != "temp")
    rows: dict[int | None, set[int | str]] = {}
    for t in temps:
        rows.setdefault(t.buffer, set()).add(t.shape[0])
    assert all(len(dims) == 1 for dims in rows.values())  # no buffer holds both rows T and rows R
    assert bytes_per_row(p) <= 1.5 * most_alive(p)
    assert len(rows) <= 7  # whatever the number of layers


def most_alive(p: Program) -> int:
    """Bytes a row of the temps alive at the fullest op: no plan can do with less."""
    alone = buffers(p.with_ops(p.ops, {n: replace(t, buffer=None) for n, t in p.tensors.items()}))
    first = {n: i for i, op in enumerate(p.ops) for n in op.outputs}
    last = {p.base(n): i for i, op in enumerate(p.ops) for n in (*op.outputs, *op.inputs)}
    return max(
        sum(b.row_bytes for n, b in alone.items() if first[str(n)] <= i <= last[str(n)]) for i in range(len(p.ops))
    )


def test_an_op_never_writes_where_it_reads() -> None:
    p = plan_buffers(transformer(Toy()))
    for op in p.ops:
        read = {p.tensors[p.base(n)].buffer for n in op.inputs} - {None}
        assert read.isdisjoint(p.tensors[n].buffer for n in op.outputs)


# build


def test_the_report_says_what_each_pass_did() -> None:
    lines: list[str] = []
    build(transformer(Toy()), "int4", report=lines)
    assert [line.partition(":")[0] for line in lines] == [step.name for step in RECIPE]
    assert lines[0] == "remove_dead: nothing to do"
    assert "14 weights f32 -> int4g32" in lines[1] and "1 weights f32 -> int8g32" in lines[1]
    assert lines[2] == "merge_projections: 15 linears -> 9, e.g. layers.0.attn.qkv_proj"
    assert lines[3] == "fuse_glu: 6 maps -> 4, e.g. layers.0.mlp.gate_up_proj"
    assert lines[4] == "fuse_epilogues: 4 maps -> 0, e.g. layers.0.attn.o_proj"
    assert lines[7].startswith("plan_buffers: 21 temps of 2,880 bytes per row -> 5 buffers of ")
    heard: list[str] = []
    build(transformer(Toy()), "int4", report=heard.append)
    assert heard == lines


def test_a_pass_that_breaks_a_rule_is_named() -> None:
    def lose_an_op(p: Program) -> Program:
        return p.with_ops(p.ops[1:], p.tensors)

    def undo(p: Program) -> Program:
        return transformer(Toy(layers=1))

    bad = (Pass("lose_an_op", lose_an_op, ""), Pass("undo", undo, ""))
    with pytest.raises(ProgramError, match=r"after pass lose_an_op: .*written_before_read"):
        build(transformer(Toy(layers=1)), passes=bad, check=True)
    assert build(transformer(Toy(layers=1)), passes=bad) == transformer(Toy(layers=1))  # only the end is checked
    with pytest.raises(ProgramError, match="after the last pass: "):
        build(transformer(Toy(layers=1)), passes=bad[:1])


def test_the_recipe_reads_as_one() -> None:
    assert all(step.name == step.run.__name__ and step.why for step in RECIPE)
    assert build(transformer(Toy(layers=1)), passes=()) == transformer(Toy(layers=1))


def test_every_op_has_a_sharding_rule() -> None:
    """A collective is what rules put in; an elementwise op goes by the rule of map."""
    for kind, op in REGISTRY.items():
        mine = op.__module__.startswith("intaglio.") and not issubclass(op, Collective)
        assert not mine or op.elementwise or op in RULES, f"write a sharding rule of {kind}, in compiler/shard/rules/"
