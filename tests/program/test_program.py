"""Programs: the text form reads back equal, the hash tells any two apart, and every verifier rule finds its fault."""

from __future__ import annotations

import os
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.toy import MANNERS, VOCABULARY, Toy, mixed_batches, tangle, transformer

from intaglio.compiler import build, build_mesh
from intaglio.ops import (
    REGISTRY,
    AllReduce,
    Attend,
    AttendPooled,
    Embed,
    KvWrite,
    Linear,
    Map,
    OpError,
    PoolKeys,
    Sample,
    Select,
    Send,
    Tensor,
)  # fmt: skip
from intaglio.program import (
    INPUTS,
    Builder,
    Program,
    ProgramError,
    load,
    parse_program,
    save,
    verify,
)
from intaglio.program.verify import RULES

GOLDEN = Path(__file__).parent.parent / "golden"


# The text form


def reads_back(program: Program) -> None:
    text = str(program)
    again = parse_program(text)
    assert again == program
    assert str(again) == text and again.hash == program.hash


@pytest.mark.parametrize("manner", MANNERS)
def test_transformers_read_back_equal(manner: str) -> None:
    program = transformer(MANNERS[manner])
    reads_back(program)
    reads_back(build(program, "int4"))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_random_programs_read_back_equal(seed: int) -> None:
    program = tangle(seed)
    reads_back(program)
    reads_back(build(program, "int8"))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    scale=st.floats(allow_nan=False, allow_infinity=False),
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=5),
    buffer=st.none() | st.integers(0, 999),
    context=st.integers(1, 10**7),
    source=st.lists(st.from_regex(r"[A-Za-z_][\w.\-/]*", fullmatch=True), min_size=1, max_size=3),
)
def test_any_numbers_and_names_read_back_equal(
    scale: float, values: list[float], buffer: int | None, context: int, source: list[str]
) -> None:
    b = Builder("numbers", context)
    b.const("numbers", values)
    b.op(Embed, "embed", "tokens", b.weight("layers.7.w", (3, 4), source, "int8g64"), scale=scale)
    b.tensors["embed"] = replace(b.tensors["embed"], buffer=buffer)
    reads_back(b.done())


def test_save_and_load(tmp_path: Path) -> None:
    program = build(transformer())
    save(program, tmp_path / "toy.program")
    assert load(tmp_path / "toy.program") == program
    broken = program.with_ops(program.ops[1:], program.tensors)
    with pytest.raises(ProgramError, match="written_before_read"):
        save(broken, tmp_path / "broken.program")
    (tmp_path / "broken.program").write_text(f"{broken}\nend\n")
    with pytest.raises(ProgramError, match="embed"):
        load(tmp_path / "broken.program")


def damaged(rng: random.Random, text: str) -> bytes:
    """The text of a file with one fault: cut, a bit flipped, a character replaced, lines swapped, doubled or lost."""
    lines, raw = text.splitlines(keepends=True), text.encode()
    i, j, at = rng.randrange(len(lines)), rng.randrange(len(lines)), rng.randrange(len(raw))
    match rng.randrange(7):
        case 0:
            return raw[:at]
        case 1:
            return "".join(lines[:i]).encode()
        case 2:
            return raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1 :]
        case 3:
            return raw[:at] + rng.choice("=()[], \t9x'\"%.\0-").encode() + raw[at + rng.randrange(2) :]
        case 4:
            lines[i], lines[j] = lines[j], lines[i]
        case 5:
            lines.insert(i, lines[j])
        case _:
            del lines[i]
    return "".join(lines).encode()


@pytest.mark.parametrize("layout", ["whole", "tp2pp2"])
def test_a_damaged_file_is_refused_or_means_the_same(tmp_path: Path, py_rng: random.Random, layout: str) -> None:
    """Every fault ends in an error with the file, and the line and its value or the rule broken, or changes nothing."""
    program = build(transformer()) if layout == "whole" else build_mesh(transformer(), layout).programs[3]
    path = tmp_path / "some.program"
    save(program, path)
    text, seen = path.read_text(), Counter[str]()
    for i in range(200):
        edited = i % 2 == 1  # without a hash: another valid Program is read as it is
        path.write_bytes(damaged(py_rng, f"{program}\nend\n" if edited else text))
        try:
            assert load(path) == program or edited, path.read_text()
            seen["same"] += 1
        except ProgramError as e:
            found = re.search(r"some.program: line (\d+)", str(e))
            assert str(path) in str(e) and (found or "not UTF-8" in str(e) or "breaks rule" in str(e)), e
            if found and found[1] != "1" and "declared twice" not in str(e):
                line = path.read_text(errors="replace").splitlines()[int(found[1]) - 1].strip()
                assert any(repr(word)[1:-1] in str(e) for word in line.split()), (str(e), line)
            seen["line" if found else "rule"] += 1
    assert seen["line"] > 50


def test_files_end_with_a_hash_or_are_marked_as_edited(tmp_path: Path) -> None:
    program, path = build(transformer()), tmp_path / "some.program"
    save(program, path)
    text = path.read_text()
    assert text == f"{program}\nend sha256={program.hash}\n"
    path.write_text(text.replace("scale=0.", "scale=1."))
    with pytest.raises(
        ProgramError, match=r"some.program: line \d+: sha256 is .* make the line 'end' if you edited it"
    ):
        load(path)
    path.write_text(text.replace("scale=0.", "scale=1.").replace(f" sha256={program.hash}", ""))
    assert load(path) != program
    path.write_text(str(program))
    with pytest.raises(ProgramError, match=r"some.program: line \d+ is the last and is '.*'; wanted 'end sha256=HASH'"):
        load(path)
    path.write_bytes(text.encode() + b"\xff")
    with pytest.raises(ProgramError, match=r"some.program: byte \d+ is not UTF-8 text"):
        load(path)


def test_the_hash_changes_with_anything() -> None:
    p = transformer(Toy(layers=1))
    first = p.ops[0]
    others = [
        replace(p, name="other"), replace(p, context=p.context + 1), replace(p, mesh=2), replace(p, mesh=2, rank=1),
        p.with_ops((replace(first, scale=2.0), *p.ops[1:]), p.tensors),
        p.with_ops((replace(first, site="first"), *p.ops[1:]), p.tensors),
        p.with_ops(p.ops[::-1], p.tensors),
        declare(p, "embed.weight", format="bf16"), declare(p, "embed.weight", source=("elsewhere",)),
        declare(p, "embed.weight", shape=(60, 32)),
        declare(p, "embed", buffer=0),
        declare(p, "rope.frequencies", values=(1.0,) * 4),
    ]  # fmt: skip
    hashes = [p.hash, *(other.hash for other in others)]
    assert len(set(hashes)) == len(hashes)
    assert p.hash == transformer(Toy(layers=1)).hash and re.fullmatch("[0-9a-f]{64}", p.hash)


HEAD = "program toy context=8 mesh=1 rank=0\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "line 1: a program starts with"),
        ("programme toy", "line 1: a program starts with"),
        (HEAD + "\nnonsense", "line 3: 'nonsense' is neither"),
        (HEAD + "input tokens i32", "line 2: 'i32' is not a type such as"),
        (HEAD + "input tokens i32[T]\ninput tokens i32[T]", "line 3: tokens is declared twice"),
        (
            HEAD + "x: f32[T, 4] = embed2(tokens, w)",
            "line 2: 'embed2(tokens, w)' is not a call of a known op (all_gather, ",
        ),
        (HEAD + "x: f32[T, 4] = embed(tokens, w) size=3", "line 2: op embed has no attribute 'size'; it has scale"),
        (HEAD + "x: f32[T, 4] = embed(tokens, w) scale=3*", "line 2: "),
        (HEAD + "x: f32[T, 4] = embed(tokens)", "line 2: "),
        (HEAD + "x: f32[T, 4] = embed(tokens, w, more)", "line 2: "),
        (HEAD + "x: embed(tokens, w)", "line 2: '' are not the 1 results of op embed: out in 'x: embed(tokens, w)'"),
        (HEAD + "x: f32[T, 4] = embed(tokens, w) scale3", "line 2: 'scale3' is no attribute of op embed"),
        (HEAD + "x: f32[T, 4] = embed(tokens, w) scale=3 scale=4", "line 2: attribute scale is given twice"),
        (HEAD + "x: f32[T, 4] = embed(tokens, w) scale=3..", "line 2: scale is '3..'; wanted a number"),
        (HEAD + "x: f32[T, 4] = embed(tokens, tokens=w)", "line 2: 'tokens=w' is no operand of op embed"),
        (HEAD + "x: f32[T, 4] = view y from z", "line 2: "),
        (HEAD + "layers.1: as layers.0", "line 2: "),
    ],
)
def test_parse_errors_name_the_line(text: str, says: str) -> None:
    with pytest.raises(ProgramError, match="^" + re.escape(says)):
        parse_program(text)


def test_fold_prints_equal_layers_once() -> None:
    for program in (transformer(Toy(layers=9)), build(transformer(Toy(layers=9)), "int4")):
        text = program.text(fold=True)
        assert "layers.2 .. layers.8: as layers.1\n" in text
        assert len(text.splitlines()) < len(str(program).splitlines()) / 2
        assert text.count("attend(") == 2  # layer 0 reads the embedding: it is not like the others
    mixed = transformer(Toy(layers=4))
    odd = [replace(op, window=7) if op.site == "layers.2.attn.attend" else op for op in mixed.ops]
    assert mixed.with_ops(odd, mixed.tensors).text(fold=True).count("attend(") == 4


@pytest.mark.parametrize("name", ["toy", "toy-int4", "toy-tp2pp2-rank0", "toy-tp2pp2-rank3"])
def test_golden_text(name: str) -> None:
    if "rank" in name:
        program = build_mesh(transformer(), "tp2pp2").programs[int(name[-1])]
    else:
        program = transformer() if name == "toy" else build(transformer(), "int4")
    path = GOLDEN / f"{name}.program"
    if os.environ.get("UPDATE_GOLDEN") == "1":
        path.parent.mkdir(exist_ok=True)
        path.write_text(str(program))
    assert str(program) == path.read_text(), "the text form changed; if that is meant, run with UPDATE_GOLDEN=1"
    assert parse_program(path.read_text()) == program


# What a Program knows of itself


def test_lookups() -> None:
    p = build(transformer(Toy(layers=1)))
    assert p.vocabulary == VOCABULARY
    assert [t.name for t in p.of_role("input")] == list(INPUTS)
    assert p.base("layers.0.attn.k_proj") == "layers.0.attn.qkv_proj" and p.base("embed") == "embed"
    assert [op.site for op in p.uses("layers.0.attn.k_proj")] == ["layers.0.attn.k_rope"]
    producer = p.producer("layers.0.attn.k_proj")
    assert producer is not None and producer.site == "layers.0.attn.qkv_proj"
    assert p.producer("tokens") is None
    work = p.work(mixed_batches()[0])
    assert list(work) == [op.site for op in p.ops]
    assert work["layers.0.mlp.down_proj"].flops == 2 * 8 * 32 * 40  # 8 tokens in the first batch


def test_builder_names_results_after_sites() -> None:
    b = Builder("names", 8)
    x = b.op(Embed, "embed", "tokens", b.weight("w", (5, 4), "w"))
    assert x == "embed"
    assert b.op(Map, "double", x, expr="a * 2", out="twice") == "twice"
    assert b.op(Sample, "sample", b.op(Select, "select", x, "rows")) == "sample"
    assert b.tensors["sample.logprobs"].shape == ("R",)
    with pytest.raises(OpError, match=r"down \(linear\): w is f32\[5, 4\] but part has 3 columns"):
        b.op(Linear, "down", b.view("part", "select", 0, 3), "w")


# The rules: each is broken once, and says who broke it

Break = Callable[[Program], Program]


def swap(p: Program, at: str, **change: object) -> Program:
    """`p` with the op at the site `at` changed."""
    ops = [replace(op, **change) if op.site == at else op for op in p.ops]  # type: ignore[arg-type]
    return p.with_ops(ops, p.tensors)


def declare(p: Program, name: str, **change: object) -> Program:
    """`p` with the tensor `name` declared otherwise."""
    return replace(p, tensors={**p.tensors, name: replace(p.tensors[name], **change)})  # type: ignore[arg-type]


def without(p: Program, site: str) -> Program:
    return p.with_ops([op for op in p.ops if op.site != site], p.tensors)


def before(p: Program, site: str, first: str) -> Program:
    """`p` with the op at `first` moved ahead of the one at `site`."""
    moved = next(op for op in p.ops if op.site == first)
    ops = [x for op in p.ops if op.site != first for x in ((moved, op) if op.site == site else (op,))]
    return p.with_ops(ops, p.tensors)


def view(p: Program, name: str, base: str | None, start: int = 0) -> Program:
    """`p` with 8 columns of `base` under a name of their own, or of nothing."""
    made = Tensor(name, ("T", 8), "f32", "temp", view=(base, start) if base else None)
    return replace(p, tensors={**p.tensors, name: made})


def embed_twice(p: Program) -> Program:
    again = replace(p.ops[0], site="again")
    return p.with_ops((p.ops[0], again, *p.ops[1:]), p.tensors)


def joined(p: Program, group: tuple[int, ...]) -> Program:
    """`p` with the embedding summed over ranks."""
    op = AllReduce(site="join", x="embed", out="join", group=group)
    return p.with_ops([*p.ops, op], {**p.tensors, "join": replace(p.tensors["embed"], name="join")})


def pooled() -> Program:
    """A Program in which attention reads one cache through a window, and again without one."""
    b = Builder("pooled", 64)
    x = b.op(Embed, "embed", "tokens", b.weight("embed.weight", (8, 4), "embed"))
    cache, entries = b.cache("cache", 1, 4, "f32"), b.cache("entries", 1, 4, "f32", 2)
    b.op(KvWrite, "write", x, x, cache, cache)
    bias, norm = b.weight("bias", (2, 4), "bias"), b.weight("norm", (4,), "norm")
    b.op(PoolKeys, "pool", cache, cache, bias, norm, b.const("turns", [1.0]), entries, every=2)
    b.op(AttendPooled, "near", x, cache, entries, heads=1, scale=1.0, window=3, every=2)
    b.op(Attend, "far", x, cache, cache, heads=1, scale=1.0)
    return Program("toy", tuple(b.ops), b.tensors, 64)


BREAKS: dict[str, list[tuple[Break, str]]] = {
    "names_resolve": [
        (lambda p: swap(p, "embed", w="nowhere"), r"embed \(embed\) names 'nowhere', which is not in the table"),
        (lambda p: view(p, "v", "nowhere", 0), "v is a view of 'nowhere'"),
        (lambda p: replace(p, tensors={**p.tensors, "alias": p.tensors["embed"]}), "lists 'embed' under 'alias'"),
    ],
    "tensors_well_formed": [
        (lambda p: declare(p, "embed", role="scratch"), "embed has role 'scratch'; use one of input"),
        (lambda p: declare(p, "embed.weight", format="fp3"), "embed.weight: unknown number format 'fp3'"),
        (lambda p: declare(p, "embed.weight", shape=(0, 32)), r"embed.weight is f32\[0, 32\]; dims are positive"),
        (lambda p: declare(p, "embed.weight", shape=("V", 32)), r"embed.weight is f32\[V, 32\]; .* N or a share"),
        (lambda p: declare(p, "embed.weight", shape=()), "embed.weight is"),
        (lambda p: declare(p, "rope.frequencies", values=(1.0,)), r"const rope.frequencies is f32\[4\] but carries 1"),
        (lambda p: declare(p, "norm.weight", source=()), "weight norm.weight names no checkpoint tensor"),
    ],
    "sites_unique": [(lambda p: swap(p, "lm_head", site="embed"), "two ops stand at site 'embed'")],
    "faces_present": [
        (lambda p: p, r"select: op select has no work\(\)"),
        (lambda p: p, "op 'select' is not registered"),
    ],
    "shapes_agree": [
        (lambda p: declare(p, "embed", shape=("T", 33)), r"embed \(embed\) computes embed as f32\['T', 32\]"),
        (lambda p: swap(p, "layers.0.attn.attend", heads=3), r"layers.0.attn.attend \(attend\): "),
        (lambda p: declare(p, "next_tokens", format="f32"), r"sample \(sample\) computes next_tokens as i32"),
    ],
    "written_before_read": [
        (lambda p: without(p, "embed"), r"layers.0.attn.norm \(norm\) reads embed before anything"),
        (lambda p: before(p, "layers.0.attn.norm", "layers.0.attn.q_proj"), "reads layers.0.attn.norm before"),
        (lambda p: view(p, "spare", None), "temp spare is never written"),
        (lambda p: without(p, "sample"), "output next_tokens is never written"),
        (embed_twice, r"again \(embed\) writes embed a second time"),
        (lambda p: declare(p, "embed", role="input"), r"embed \(embed\) writes embed, a input; only temps and outputs"),
        (lambda p: declare(p, "norm", view=("embed", 0)), r"norm \(norm\) writes norm, a view"),
    ],
    "views_inside": [
        (lambda p: view(p, "v", "embed", 30), r"view v f32\[T, 8\] from column 30 does not lie inside embed"),
        (lambda p: view(p, "v", "embed", -1), "from column -1 does not lie inside"),
        (lambda p: view(p, "v", "select", 0), r"does not lie inside select f32\[R, 32\]"),
        (lambda p: view(view(p, "v", "embed", 0), "w", "v", 0), "view w is of v, a view; views are of temps"),
        (lambda p: view(p, "v", "positions", 0), r"does not lie inside positions i32\[T\]"),
        (lambda p: view(p, "v", "lm_head.weight", 0), "view v is of lm_head.weight, a weight"),
    ],
    "state_kept": [
        (lambda p: before(p, "layers.0.attn.kv_write", "layers.0.attn.attend"), r"reads state .*k_cache before"),
        (lambda p: declare(p, "norm.weight", role="state"), r"norm \(norm\) names state norm.weight in an operand"),
        (lambda p: declare(p, "layers.0.attn.k_cache", role="input"), "k_cache, a.* as state"),
    ],
    "windows_kept": [
        (lambda p: pooled(), r"near \(attend_pooled\) reads cache through a window, and others do without one: far"),
    ],
    "buffers_apart": [
        (
            lambda p: declare(declare(p, "embed", buffer=3), "layers.0.attn.norm", buffer=3),
            "layers.0.attn.norm writes layers.0.attn.norm into buffer 3 while embed there is still to be read",
        ),
        (
            lambda p: declare(declare(p, "next_tokens", buffer=1, role="temp"), "logprobs", buffer=1, role="temp"),
            "sample writes logprobs into buffer 1 while next_tokens",
        ),
    ],
    "collectives_placed": [
        (lambda p: replace(p, rank=1), "rank 1 is outside a mesh of 1"),
        (lambda p: joined(p, (1,)), r"join \(all_reduce\) has group=\(1,\); wanted ranks of 0\.\.0, 0 among them"),
        (lambda p: joined(p, (0, 1)), r"join \(all_reduce\) has group=\(0, 1\)"),
        (
            lambda p: p.with_ops([*p.ops, Send(site="out", x="embed", peer=0)], p.tensors),
            r"out \(send\) has peer=0; wanted another rank than 0",
        ),
    ],
}  # fmt: skip


def test_every_rule_is_broken_here() -> None:
    assert set(BREAKS) == {rule.__name__ for rule in RULES}


@pytest.mark.parametrize(("rule", "case"), [(rule, i) for rule, cases in BREAKS.items() for i in range(len(cases))])
def test_verify_catches(rule: str, case: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = transformer(Toy(layers=1, tied=False))
    verify(whole)
    change, says = BREAKS[rule][case]
    broken = change(whole)
    if rule == "faces_present":
        if "work" in says:
            monkeypatch.delattr(Select, "work")
        else:
            monkeypatch.delitem(REGISTRY, "select")
    with pytest.raises(ProgramError, match=f"^program 'toy' breaks rule {rule}:\n(.*\n)*.*{says}"):
        verify(broken)


def test_many_faults_are_counted() -> None:
    p = transformer(Toy(layers=3))
    broken = p.with_ops([replace(op, site="same") for op in p.ops], p.tensors)
    with pytest.raises(ProgramError, match=r"\.\.\. and \d+ more$"):
        verify(broken)
