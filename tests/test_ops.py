"""The ops: their meaning against computations written elsewhere, their shape rules, their work counted by hand."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from intaglio import formats
from intaglio.batch import GREEDY, Batch, Chunk, Sampling, bind
from intaglio.formats import Quantised
from intaglio.ops import (
    REGISTRY,
    Attend,
    Embed,
    KvWrite,
    Linear,
    Map,
    Norm,
    Op,
    OpError,
    Permute,
    Rope,
    Sample,
    Select,
    Tensor,
)  # fmt: skip
from intaglio.ops.elementwise import FUNCTIONS, postfix
from intaglio.ops.linear import ACTIVATIONS
from intaglio.ops.op import FACES, Results, Shape, Tensors, Value, Work, operand, result
from intaglio.ops.sample import draw, kept_mass, uniform

quick = settings(max_examples=30, deadline=None, derandomize=True)
sides = st.integers(1, 40)
seeds = st.integers(0, 2**31)
TORCH = {
    "silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "exp": torch.exp,
}  # fmt: skip
BATCH = bind([Chunk([5, 6, 7], 0, [1], rows=[2]), Chunk([8, 9], 4, [0, 2], rows=[0, 1])], 4)  # T 5, S 2, R 3


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def torched(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x)).double()


def tensors(**types: str) -> dict[str, Tensor]:
    """Declarations such as x="f32[T, 8]"."""
    table = {}
    for name, text in types.items():
        format, _, dims = text.rstrip("]").partition("[")
        shape = tuple(int(d) if d.isdigit() else d for d in dims.split(", "))
        role = "weight" if name in ("w", "bias", "weight") else "state" if name.endswith("cache") else "temp"
        table[name] = Tensor(name, shape, format, role)
    return table


def apply(op: Op, batch: Batch = BATCH, **values: Value) -> np.ndarray:
    """The op's first result, once its shape rule has agreed to the operands and foretold the results."""
    kinds = {np.dtype(np.float32): "f32", np.dtype(np.int32): "i32", formats.BF16: "bf16"}
    table, tokens = {}, 0
    for name, v in values.items():
        if isinstance(v, Quantised):
            table[name] = Tensor(name, v.codes.shape, f"int8g{v.group}", "weight")
        else:
            shape: Shape = ("P", "B", *v.shape[2:]) if v.ndim == 4 else v.shape
            if isinstance(op, Rope | KvWrite | Attend) and (v.ndim == 2 or v.dtype == np.int32):
                shape, tokens = ("T", *v.shape[1:]), len(v)
            table[name] = Tensor(name, shape, kinds[v.dtype], "state" if v.ndim == 4 else "temp")
    said = op.shapes(table)
    results = op.reference(values, batch)
    assert list(results) == list(said) == list(op.outputs)
    for name, (shape, format) in said.items():
        bound = tuple(tokens if d == "T" else d for d in shape)
        assert results[name].shape == bound and results[name].dtype == formats.get(format).dtype
    return next(iter(results.values()), np.empty(0))


def close(got: np.ndarray, want: torch.Tensor | np.ndarray, rel: float = 1e-6) -> None:
    want = np.asarray(want, np.float64)
    np.testing.assert_allclose(got, want, rtol=rel, atol=rel * max(1.0, float(np.abs(want).max())))


# What an op is


@pytest.mark.parametrize("kind", REGISTRY)
def test_every_op_is_tested_here(kind: str) -> None:
    import test_collective_ops
    import test_experts

    written = {**vars(sys.modules[__name__]), **vars(test_experts), **vars(test_collective_ops)}
    for what in ("", "_refuses", "_work"):
        found = [name for name in written if name.startswith(f"test_{kind}{what}")]
        assert found, f"write test_{kind}{what}...: op {kind} has no test of its {what.strip('_') or 'meaning'}"


@pytest.mark.parametrize("face", FACES)
def test_an_op_without_a_face_is_no_op(face: str) -> None:
    faces = {name: lambda *_: None for name in FACES if name != face}
    with pytest.raises(TypeError, match=rf"op halved: missing {face}\(\); every op defines shapes, reference, work"):
        type("Halved", (Op,), faces, kind="halved")
    assert "halved" not in REGISTRY


def test_a_kind_is_defined_once() -> None:
    with pytest.raises(TypeError, match=r"op map is defined twice: intaglio\.ops\.elementwise and "):
        type("Map2", (Op,), {name: lambda *_: None for name in FACES}, kind="map")
    assert REGISTRY["map"] is Map


def test_operands_results_and_renaming(monkeypatch: pytest.MonkeyPatch) -> None:
    op = Linear(site="s", x="x", w="w", residual="r", out="y")
    assert op.inputs == ("x", "w", "r") and op.outputs == ("y",)
    assert Linear.named("attribute") == ("x_format", "scale", "activation", "glu")
    moved = op.rename({"x": "z", "r": "x", "y": "v", "other": "w"})
    assert moved == Linear(site="s", x="z", w="w", residual="x", out="v")
    assert op.rename({"a": "b"}) is op
    monkeypatch.setattr("intaglio.ops.op.REGISTRY", {})

    @dataclass(frozen=True, kw_only=True)
    class Two(Op, kind="two"):
        x: str = operand()
        out: str = result()
        more: str | None = result(optional=True)

        def shapes(self, t: Tensors) -> Results:
            return {}

        def reference(self, v: object, batch: Batch) -> dict[str, np.ndarray]:
            return {}

        def work(self, t: Tensors, batch: Batch) -> Work:
            return Work()

    assert Two(site="s", x="x", out="y").outputs == ("y",)
    assert Two(site="s", x="x", out="y", more="z").outputs == ("y", "z")


def test_work_adds_up() -> None:
    both = Work(1, 2, 3, 4) + Work(10, 20, 30, 40)
    assert both == Work(11, 22, 33, 44) and both.bytes == 99
    assert tensors(x="int8g32[T, 33]")["x"].nbytes({"T": 2}) == 2 * (33 + 4)


def refuses(op: Op, says: str, **types: str) -> None:
    with pytest.raises(OpError, match=rf"^s \({op.kind}\): .*{says}"):
        op.shapes(tensors(**types))


# data


@quick
@given(seeds, sides, sides)
def test_embed(seed: int, rows: int, width: int) -> None:
    w = random(seed, rows, width)
    ids = np.random.default_rng(seed).integers(0, rows, 7).astype(np.int32)
    op = Embed(site="s", tokens="tokens", w="w", out="out", scale=1.5)
    close(apply(op, tokens=ids, w=w), F.embedding(torch.from_numpy(ids), torched(w)) * 1.5)
    half = w.astype(formats.BF16)
    close(apply(op, tokens=ids, w=half), half[ids].astype(np.float64) * 1.5)
    q = formats.quantise(w, "int8g32")
    np.testing.assert_array_equal(apply(op, tokens=ids, w=q), q.rows(slice(None))[ids] * np.float32(1.5))


def test_embed_refuses() -> None:
    op = Embed(site="s", tokens="tokens", w="w", out="out")
    refuses(op, r"tokens is f32\[T\]; wanted i32", tokens="f32[T]", w="f32[9, 8]")
    refuses(op, r"w is f32\[9\]; wanted a matrix", tokens="i32[T]", w="f32[9]")


def test_embed_work_touches_the_rows_it_reads() -> None:
    op = Embed(site="s", tokens="tokens", w="w", out="out")
    table = tensors(tokens="i32[T]", w="bf16[100, 8]", out="f32[T, 8]")
    assert op.work(table, BATCH) == Work(5 * 8, 5 * 8 * 2, 0, 5 * 8 * 4)


def test_select() -> None:
    x = random(0, 5, 3)
    rows = np.array([4, 0, 4], np.int32)
    np.testing.assert_array_equal(apply(Select(site="s", x="x", rows="rows", out="out"), x=x, rows=rows), x[[4, 0, 4]])


def test_select_refuses() -> None:
    op = Select(site="s", x="x", rows="rows", out="out")
    refuses(op, r"rows is f32\[R\]; wanted i32", x="f32[T, 8]", rows="f32[R]")
    refuses(op, r"x is f32\[T\]; wanted a matrix", x="f32[T]", rows="i32[R]")


def test_select_work() -> None:
    op = Select(site="s", x="x", rows="rows", out="out")
    table = tensors(x="f32[T, 8]", rows="i32[R]", out="f32[R, 8]")
    assert op.work(table, BATCH) == Work(0, 0, 0, 2 * 3 * 8 * 4)


def test_permute() -> None:
    x, order = random(0, 5, 4), np.array([2, 0, 3, 1], np.int32)
    op = Permute(site="s", x="x", order="order", out="out")
    np.testing.assert_array_equal(apply(op, x=x, order=order), np.stack([x[:, j] for j in order], axis=1))


def test_permute_refuses() -> None:
    op = Permute(site="s", x="x", order="order", out="out")
    refuses(op, r"order is i32\[3\]; wanted i32\[4\]", x="f32[T, 4]", order="i32[3]")
    refuses(op, r"order is f32\[4\]; wanted i32\[4\]", x="f32[T, 4]", order="f32[4]")


def test_permute_work() -> None:
    op = Permute(site="s", x="x", order="order", out="out")
    table = tensors(x="f32[T, 8]", order="i32[8]", out="f32[T, 8]")
    table["order"] = replace(table["order"], role="weight")
    assert op.work(table, BATCH) == Work(0, 8 * 4, 0, 2 * 5 * 8 * 4)


# norm


@quick
@given(seeds, st.integers(1, 5), st.integers(2, 40), st.sampled_from([1e-6, 1e-5]))
def test_norm(seed: int, rows: int, width: int, eps: float) -> None:
    x, r = random(seed, rows, width), random(seed + 3, rows, width)
    w, b = random(seed + 1, width), random(seed + 2, width)
    own = {"x": torched(x), "w": torched(w), "b": torched(b)}
    got = apply(Norm(site="s", x="x", weight="w", out="out", eps=eps), x=x, w=w)
    close(got, F.rms_norm(own["x"], (width,), own["w"], eps))
    got = apply(Norm(site="s", x="x", weight="w", bias="b", out="out", norm="layer", eps=eps), x=x, w=w, b=b)
    close(got, F.layer_norm(own["x"], (width,), own["w"], own["b"], eps))
    got = apply(Norm(site="s", x="x", out="out", norm="l2", eps=eps), x=x)
    close(got, own["x"] * torch.rsqrt(own["x"].pow(2).sum(-1, keepdim=True) + eps))
    got = apply(Norm(site="s", x="x", weight="w", residual="r", out="out", offset=1.0, eps=eps), x=x, w=w, r=r)
    close(got, F.rms_norm(own["x"], (width,), own["w"] + 1, eps) + torched(r))


def test_norm_by_group_is_the_norm_of_each_head() -> None:
    x, w = random(0, 5, 24), random(1, 8)
    for kind in ("rms", "layer", "l2"):
        own = Norm(site="s", x="x", weight="w", out="out", norm=kind)
        got = apply(replace(own, group=8), x=x, w=w)
        heads = [apply(own, x=x[:, i : i + 8], w=w) for i in (0, 8, 16)]
        np.testing.assert_array_equal(got, np.concatenate(heads, axis=1))


def test_norm_refuses() -> None:
    op = Norm(site="s", x="x", weight="weight", out="out", norm="rms", group=0)
    refuses(op, r"weight is f32\[7\]; wanted \[8\]", x="f32[T, 8]", weight="f32[7]")
    refuses(op, "vectors stay in a plain format", x="f32[T, 8]", weight="int8g32[8]")
    refuses(Norm(site="s", x="x", out="out", norm="batch"), "norm='batch'; use one of rms, layer, l2", x="f32[T, 8]")
    refuses(Norm(site="s", x="x", out="out", group=3), "group=3 does not divide the width 8", x="f32[T, 8]")
    residual = Norm(site="s", x="x", residual="r", out="out")
    refuses(residual, r"x is f32\[T, 8\] but r is f32\[T, 4\]", x="f32[T, 8]", r="f32[T, 4]")


def test_norm_work() -> None:
    op = Norm(site="s", x="x", weight="weight", residual="r", out="out")
    table = tensors(x="f32[T, 8]", weight="bf16[8]", r="f32[T, 8]", out="f32[T, 8]")
    assert op.work(table, BATCH) == Work(6 * 5 * 8, 8 * 2, 0, 3 * 5 * 8 * 4)


# linear


@quick
@given(seeds, st.integers(1, 5), sides, sides, st.sampled_from(ACTIVATIONS))
def test_linear(seed: int, rows: int, n: int, k: int, activation: str) -> None:
    x, w, b, r = random(seed, rows, k), random(seed + 1, n, k), random(seed + 2, n), random(seed + 3, rows, n)
    plain = F.linear(torched(x), torched(w))
    close(apply(Linear(site="s", x="x", w="w", out="out"), x=x, w=w), plain)
    full = Linear(site="s", x="x", w="w", bias="b", residual="r", out="out", scale=0.5, activation=activation)
    want = TORCH[activation]((plain + torched(b)) * 0.5) + torched(r)
    close(apply(full, x=x, w=w, b=b, r=r), want, 2e-6)


@quick
@given(seeds, st.integers(1, 5), sides, sides, st.sampled_from(ACTIVATIONS))
def test_linear_glu(seed: int, rows: int, half: int, k: int, activation: str) -> None:
    x, r = random(seed, rows, k), random(seed + 3, rows, half)
    gate, up = random(seed + 1, half, k), random(seed + 2, half, k)
    op = Linear(site="s", x="x", w="w", residual="r", out="out", activation=activation, glu=True)
    want = TORCH[activation](F.linear(torched(x), torched(gate))) * F.linear(torched(x), torched(up)) + torched(r)
    close(apply(op, x=x, w=np.concatenate([gate, up]), r=r), want, 2e-6)


@quick
@given(seeds, st.integers(1, 5), sides, st.integers(1, 150), st.sampled_from([32, 64]))
def test_linear_in_other_formats(seed: int, rows: int, n: int, k: int, group: int) -> None:
    x, w = random(seed, rows, k), random(seed + 1, n, k)
    half = w.astype(formats.BF16)
    got = apply(Linear(site="s", x="x", w="w", out="out", x_format="bf16"), x=x, w=half)
    rounded = torch.from_numpy(x).bfloat16().double()
    close(got, F.linear(rounded, torched(half.astype(np.float32))))
    q = formats.quantise(w, f"int8g{group}")
    whole = torched(q.rows(slice(None)))
    got = apply(Linear(site="s", x="x", w="w", out="out", x_format="int8"), x=x, w=q)
    codes, scales = formats.quantise_rows(x, group)
    near = (codes.astype(np.float64) * scales[:, :, None]).reshape(rows, -1)[:, :k]  # x as the product sees it
    close(got, F.linear(torched(near), whole))


def test_linear_refuses() -> None:
    def op(**fields: object) -> Linear:
        return Linear(site="s", x="x", w="w", out="out", **fields)  # type: ignore[arg-type]

    x = "f32[T, 8]"
    refuses(op(), r"w is f32\[6, 9\] but x has 8 columns; w must be \[N, 8\]", x=x, w="f32[6, 9]")
    refuses(op(), "a weight has fixed rows", x=x, w="f32[R, 8]")
    refuses(op(x_format="int8"), "x_format=int8 with f32 weights; use f32 or bf16", x=x, w="f32[6, 8]")
    refuses(op(x_format="bf16"), "x_format=bf16 with int4g32 weights; use int8", x=x, w="int4g32[6, 8]")
    refuses(op(activation="exp"), "activation='exp'; use one of silu", x=x, w="f32[6, 8]")
    refuses(op(glu=True), "activation=''; use one of silu", x=x, w="f32[6, 8]")
    refuses(op(glu=True, activation="silu"), "glu needs an even number of rows, w has 7", x=x, w="f32[7, 8]")
    refuses(op(bias="bias"), r"bias is f32\[8\]; wanted \[6\]", x=x, w="f32[6, 8]", bias="f32[8]")
    refuses(op(residual="r"), r"residual r is f32\[T, 8\]; wanted", x=x, w="f32[6, 8]", r="f32[T, 8]")
    refuses(op(residual="r"), r"residual r is f32\[R, 6\]; wanted", x=x, w="f32[6, 8]", r="f32[R, 6]")


def test_linear_work() -> None:
    table = tensors(x="f32[T, 64]", w="int4g32[6, 64]", bias="f32[6]", r="f32[T, 6]", out="f32[T, 6]", half="f32[T, 3]")
    op = Linear(site="s", x="x", w="w", bias="bias", residual="r", out="out")
    weights = 6 * (32 + 2 * 2) + 6 * 4  # two scales a row
    assert op.work(table, BATCH) == Work(2 * 5 * 6 * 64, weights, 0, 4 * 5 * (64 + 6 + 6))
    glu = Linear(site="s", x="x", w="w", out="half", glu=True, activation="silu")
    assert glu.work(table, BATCH) == Work(2 * 5 * 6 * 64, 6 * 36, 0, 4 * 5 * (64 + 3))


# rope


@quick
@given(seeds, st.integers(1, 4), st.integers(1, 6), st.integers(0, 5), st.sampled_from(["half", "interleaved"]))
def test_rope(seed: int, heads: int, pairs: int, rest: int, style: str) -> None:
    """As complex numbers: pair (a, b) becomes (a + ib) e^(i angle)."""
    dim = 2 * pairs + rest
    x = random(seed, 5, heads * dim)
    positions = np.array([0, 1, 7, 100, 4095], np.int32)
    frequencies = (10000.0 ** (-np.arange(pairs) / pairs)).astype(np.float32)
    op = Rope(site="s", x="x", positions="p", frequencies="f", out="out", head_dim=dim, style=style, factor=1.2)
    got = apply(op, x=x, p=positions, f=frequencies)
    turn = 1.2 * np.exp(1j * (positions[:, None].astype(np.float32) * frequencies).astype(np.float64))
    want = x.reshape(5, heads, dim).astype(np.float64)
    for i in range(pairs):
        a, b = (i, i + pairs) if style == "half" else (2 * i, 2 * i + 1)
        z = (want[:, :, a] + 1j * want[:, :, b]) * turn[:, None, i]
        want[:, :, a], want[:, :, b] = z.real, z.imag
    close(got, want.reshape(5, -1))


def test_rope_is_that_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    table = LlamaRotaryEmbedding(LlamaConfig(hidden_size=32, num_attention_heads=2, max_position_embeddings=512))
    x, positions = random(0, 6, 32), np.array([0, 3, 17, 200, 511, 1], np.int32)
    cos, sin = table(torch.zeros(1), torch.from_numpy(positions)[None].long())
    q = torch.from_numpy(x).reshape(1, 6, 2, 16).transpose(1, 2)
    want, _ = apply_rotary_pos_emb(q, q, cos, sin)
    op = Rope(site="s", x="x", positions="p", frequencies="f", out="out", head_dim=16)
    got = apply(op, x=x, p=positions, f=table.inv_freq.numpy())
    close(got, want.transpose(1, 2).reshape(6, 32))


def test_rope_refuses() -> None:
    def op(**fields: object) -> Rope:
        own = {"head_dim": 8, **fields}
        return Rope(site="s", x="x", positions="p", frequencies="f", out="out", **own)  # type: ignore[arg-type]

    own = {"x": "f32[T, 16]", "p": "i32[T]", "f": "f32[4]"}
    refuses(op(), r"x is f32\[R, 16\]; wanted a row for every token", **{**own, "x": "f32[R, 16]"})
    refuses(op(style="spiral"), "style='spiral'; use one of half, interleaved", **own)
    refuses(op(head_dim=5), "head_dim=5 does not divide the width 16", **own)
    refuses(op(), "f has 5 frequencies; head_dim=8 has room for 4", **{**own, "f": "f32[5]"})


def test_rope_work() -> None:
    op = Rope(site="s", x="x", positions="p", frequencies="f", out="out", head_dim=8)
    table = tensors(x="f32[T, 16]", p="i32[T]", f="f32[4]", out="f32[T, 16]")
    assert op.work(table, BATCH) == Work(3 * 5 * 16, 0, 0, 2 * 5 * 16 * 4 + 5 * 4 + 4 * 4)


# attention


def test_kv_write() -> None:
    caches = {c: np.full((4, 4, 2, 3), 9, dtype) for c, dtype in (("k_cache", np.float32), ("v_cache", formats.BF16))}
    before = {name: cache.copy() for name, cache in caches.items()}
    k, v = random(0, 5, 6), random(1, 5, 6)
    apply(KvWrite(site="s", k="k", v="v", k_cache="k_cache", v_cache="v_cache"), k=k, v=v, **caches)
    for name, new in (("k_cache", k), ("v_cache", v.astype(formats.BF16))):
        want = before[name]
        for t, slot in enumerate([4, 5, 6, 8, 9]):  # positions 0..2 in page 1; positions 4, 5 in page 2
            want[slot // 4, slot % 4] = new[t].reshape(2, 3)
        np.testing.assert_array_equal(caches[name], want)


def test_kv_write_int8() -> None:
    """A scale a token and head, on which attention then builds."""
    own = {n: formats.Quantised(np.zeros((4, 4, 2, 3), np.int8), np.zeros((4, 4, 2, 1), np.float32), 3) for n in "kv"}
    k, v = random(0, 5, 6), random(1, 5, 6)
    op = KvWrite(site="s", k="a", v="b", k_cache="k", v_cache="v")
    op.reference({"a": k, "b": v, **own}, BATCH)
    for name, new in (("k", k), ("v", v)):
        pages = own[name].rows(slice(None))
        for t, slot in enumerate([4, 5, 6, 8, 9]):
            for h, head in enumerate(new[t].reshape(2, 3)):
                got, step = pages[slot // 4, slot % 4, h], np.abs(head).max() / 127
                assert np.abs(got - head).max() <= step * (0.5 + 127 * 2.0**-8)  # half a step, and the scale in bf16
                np.testing.assert_array_equal(got, formats.quantise(head[None], "int8row").rows(slice(None))[0])
        assert not own[name].codes[[0, 3]].any()


def test_kv_write_refuses() -> None:
    op = KvWrite(site="s", k="k", v="v", k_cache="k_cache", v_cache="v_cache")
    own = {"k": "f32[T, 6]", "v": "f32[T, 6]", "k_cache": "f32[P, B, 2, 3]", "v_cache": "bf16[P, B, 2, 3]"}
    refuses(op, r"v is f32\[T, 8\] but v_cache holds 2 heads of 3", **{**own, "v": "f32[T, 8]"})
    for bad in ("f16[P, B, 2, 3]", "f32[P, B, 6]", "f32[B, P, 2, 3]", "f32[P, B, S, 3]"):
        refuses(op, r"a cache is \[P, B, heads, head_dim\] in f32 or bf16 or int8row", **{**own, "k_cache": bad})


def test_kv_write_work() -> None:
    op = KvWrite(site="s", k="k", v="v", k_cache="k_cache", v_cache="v_cache")
    own = {"k": "f32[T, 6]", "v": "f32[T, 6]", "k_cache": "f32[P, B, 2, 3]", "v_cache": "bf16[P, B, 2, 3]"}
    assert op.work(tensors(**own), BATCH) == Work(0, 0, 5 * 6 * (4 + 2), 2 * 5 * 6 * 4)


@pytest.mark.parametrize(
    ("window", "softcap", "heads", "kv_heads", "v_dim"),
    [
        (0, 0.0, 4, 2, 8),
        (5, 0.0, 4, 4, 8),
        (0, 2.0, 6, 1, 8),
        (1, 0.0, 2, 1, 8),
        (7, 1.5, 4, 2, 6),
        (100, 0.0, 2, 2, 8),
    ],
)
def test_attend(window: int, softcap: float, heads: int, kv_heads: int, v_dim: int) -> None:
    """Two sequences in chunks over scattered pages, against dense attention over the whole of each."""
    dim, lengths, pages = 8, (11, 6), ([5, 0, 3], [2, 4])
    cache = {
        "k_cache": np.zeros((6, 4, kv_heads, dim), np.float32),
        "v_cache": np.zeros((6, 4, kv_heads, v_dim), np.float32),
    }
    q, k, v = ([random(10 * i + s, n, h * d) for s, n in enumerate(lengths)]
               for i, (h, d) in enumerate([(heads, dim), (kv_heads, dim), (kv_heads, v_dim)]))  # fmt: skip
    write = KvWrite(site="w", k="k", v="v", k_cache="k_cache", v_cache="v_cache")
    fields = {"heads": heads, "scale": 0.3, "window": window, "softcap": softcap}
    attend = Attend(site="s", q="q", k_cache="k_cache", v_cache="v_cache", out="out", **fields)  # type: ignore[arg-type]
    got: list[list[np.ndarray]] = [[], []]
    for step in ([(0, 0, 4)], [(1, 0, 5), (0, 4, 5)], [(0, 5, 11), (1, 5, 6)]):
        batch = bind([Chunk(range(i, j), i, pages[s]) for s, i, j in step], 4)
        own = {name: np.concatenate([x[s][i:j] for s, i, j in step]) for name, x in (("q", q), ("k", k), ("v", v))}
        apply(write, batch, k=own["k"], v=own["v"], **cache)
        out = apply(attend, batch, q=own["q"], **cache)
        for (s, _, _), first, n in zip(step, batch.first_row, batch.q_len, strict=True):
            got[s].append(out[first : first + n])
    for s, n in enumerate(lengths):
        dense = [torched(x[s]).reshape(n, -1, d).transpose(0, 1) for x, d in ((q, dim), (k, dim), (v, v_dim))]
        want = dense_attention(dense[0], dense[1], dense[2], window, softcap)
        close(np.concatenate(got[s]), want.transpose(0, 1).reshape(n, -1))


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, softcap: float) -> torch.Tensor:
    """[heads, tokens, head_dim]: torch's own where it can, else token by token."""
    n = q.shape[1]
    if not softcap:
        back = torch.arange(n)[:, None] - torch.arange(n)[None, :]
        mask = (back >= 0) & (back < (window or n))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True)
    out = torch.zeros(len(q), n, v.shape[2], dtype=torch.float64)
    for h in range(len(q)):
        kv = h // (len(q) // len(k))
        for i in range(n):
            first = max(0, i - window + 1) if window else 0
            score = softcap * torch.tanh(k[kv, first : i + 1] @ q[h, i] * 0.3 / softcap)
            out[h, i] = torch.softmax(score, 0) @ v[kv, first : i + 1]
    return out


def test_attend_refuses() -> None:
    def op(**fields: object) -> Attend:
        own = {"heads": 4, "scale": 1.0, **fields}
        return Attend(site="s", q="q", k_cache="k_cache", v_cache="v_cache", out="out", **own)  # type: ignore[arg-type]

    own = {"q": "f32[T, 12]", "k_cache": "f32[P, B, 2, 3]", "v_cache": "f32[P, B, 2, 5]"}
    assert op().shapes(tensors(**own)) == {"out": (("T", 20), "f32")}
    refuses(op(heads=3), r"q is f32\[T, 12\]; wanted 3 heads of 3", **own)
    refuses(op(), "v_cache has 1 heads but k_cache has 2", **{**own, "v_cache": "f32[P, B, 1, 5]"})
    three = {"k_cache": "f32[P, B, 3, 3]", "v_cache": "f32[P, B, 3, 3]"}
    refuses(op(), "heads=4 is not a multiple of the 3 kv heads", **{**own, **three})
    refuses(op(window=-1), "window=-1, softcap=0.0; not below 0", **own)
    refuses(op(softcap=-0.5), "window=0, softcap=-0.5; not below 0", **own)


@pytest.mark.parametrize(("window", "seen", "reach"), [(0, 1 + 2 + 3 + 5 + 6, 3 + 6), (2, 1 + 2 + 2 + 2 + 2, 3 + 3)])
def test_attend_work(window: int, seen: int, reach: int) -> None:
    """BATCH: three tokens at positions 0..2 of one sequence, two at 4, 5 of another."""
    op = Attend(site="s", q="q", k_cache="k_cache", v_cache="v_cache", out="out", heads=4, scale=1.0, window=window)
    table = tensors(q="f32[T, 12]", k_cache="f32[P, B, 2, 3]", v_cache="bf16[P, B, 2, 5]", out="f32[T, 20]")
    flops = 2 * 4 * (3 + 5) * seen  # a multiply and an add, for each head, for each of k's and v's columns
    assert op.work(table, BATCH) == Work(flops, 0, reach * (2 * 3 * 4 + 2 * 5 * 2), 5 * (12 + 20) * 4)


# map


@pytest.mark.parametrize("name", FUNCTIONS)
def test_map_functions(name: str) -> None:
    x = np.concatenate([np.linspace(-30, 30, 601), [0.0, -0.0, 1e-20, -1e-20]]).astype(np.float32)[None]
    got = apply(Map(site="s", a="a", out="out", expr=f"{name}(a)"), a=x)
    np.testing.assert_allclose(got, TORCH[name](torched(x)), rtol=3e-6, atol=1e-7)


@quick
@given(seeds, sides, sides)
def test_map(seed: int, rows: int, cols: int) -> None:
    a, b, c = (random(seed + i, rows, cols) for i in range(3))
    x, y, z = torched(a), torched(b), torched(c)
    for expr, want in (
        ("a + b * 0.22", x + y * 0.22), ("(a - b) / -4 - c", (y - x) / 4 - z), ("silu(a) * b", F.silu(x) * y),
        ("30 * tanh(a / 30)", 30 * torch.tanh(x / 30)), ("a - b - c", x - y - z),
        ("gelu(a + relu(b)) * c", F.gelu(x + F.relu(y)) * z),
    ):  # fmt: skip
        given = {n: v for n, v in (("a", a), ("b", b), ("c", c)) if ("operand", n) in postfix(expr)}
        close(apply(Map(site="s", out="out", expr=expr, **{n: n for n in given}), **given), want, 2e-6)


def test_map_expressions_as_steps() -> None:
    a, b, two = ("operand", "a"), ("operand", "b"), ("number", 2.0)
    assert postfix("silu(a) * b") == (a, ("call", "silu"), b, ("binary", "*"))
    assert postfix("a - (b - 2)") == (a, b, two, ("binary", "-"), ("binary", "-"))
    assert postfix("a * -2") == (a, ("number", -2.0), ("binary", "*"))


@pytest.mark.parametrize(
    "expr",
    ["a **b", "a @ b", "d", "a +", "", "sin(a)", "silu(a, b)", "silu(x=a)", "silu", "-a", "a if a else b", "True * a",
     "a[0]", "a.b", "'a'", "a < b", "lambda: a", "a; b", "silu(silu)"],
)  # fmt: skip
def test_map_expressions_not_understood(expr: str) -> None:
    with pytest.raises(OpError, match=r"^expression .* (is not understood; use a, b, c, numbers|does not parse)"):
        postfix(expr)


def test_map_refuses() -> None:
    refuses(Map(site="s", a="a", out="out", expr="a + b"), r"uses \['a', 'b'\] but operands are \['a'\]", a="f32[T, 8]")
    two = Map(site="s", a="a", b="b", out="out", expr="a * 2")
    refuses(two, r"uses \['a'\] but operands are \['a', 'b'\]", a="f32[T, 8]", b="f32[T, 8]")
    two = Map(site="s", a="a", b="b", out="out", expr="a + b")
    refuses(two, r"a is f32\[T, 8\] but b is f32\[R, 8\]; they must have one shape", a="f32[T, 8]", b="f32[R, 8]")


def test_map_work() -> None:
    op = Map(site="s", a="a", b="b", out="out", expr="silu(a) * b + 2")
    table = tensors(a="f32[T, 8]", b="f32[T, 8]", out="f32[T, 8]")
    assert op.work(table, BATCH) == Work(3 * 5 * 8, 0, 0, 3 * 5 * 8 * 4)


# sample


def test_sample() -> None:
    """Greedy and drawn rows side by side; logprobs under the unfiltered softmax; bad rows spoil no other."""
    logits = random(0, 4, 50) * 3
    logits[2, 7] = np.nan
    samplings = (GREEDY, Sampling(temperature=0.7, top_k=5, seed=3), GREEDY, Sampling(temperature=1.0, seed=4))
    chunks = [Chunk([1, 2], 3 * i, [0, 1, 2], rows=[1], sampling=s) for i, s in enumerate(samplings)]
    op = Sample(site="s", logits="logits", tokens="tokens", logprobs="logprobs")
    results = op.reference({"logits": logits}, bind(chunks, 4))
    tokens, logprobs = results["tokens"], results["logprobs"]
    assert tokens[0] == logits[0].argmax() and tokens[2] == -1 and np.isnan(logprobs[2])
    for r in (1, 3):  # the position the token will take: two after the chunk's start
        assert tokens[r] == draw(logits[r], samplings[r], 3 * r + 2)
    for r in (0, 1, 3):
        close(logprobs[r], torch.log_softmax(torched(logits[r]), 0)[tokens[r]])
    np.testing.assert_array_equal(apply(op, bind(chunks, 4), logits=logits), tokens)


def test_sample_ties_go_to_the_lower_id() -> None:
    logits = np.float32([1, 5, 5, 5, 0])
    assert draw(logits, GREEDY, 0) == 1
    np.testing.assert_array_equal(np.flatnonzero(kept_mass(logits, Sampling(temperature=1, top_k=2))), [1, 2])
    np.testing.assert_array_equal(np.flatnonzero(kept_mass(logits, Sampling(temperature=1, top_p=0.1))), [1])


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    seeds, st.floats(0.2, 3), st.integers(0, 60), st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
    st.one_of(st.just(0.0), st.floats(0.001, 1)),
)  # fmt: skip
def test_sample_keeps_what_transformers_keeps(seed: int, temperature: float, k: int, p: float, min_p: float) -> None:
    logits = random(seed, 40) * 2
    chain = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    chain += [TopKLogitsWarper(k)] if k else []
    chain += [TopPLogitsWarper(p)] if p < 1 else []
    chain += [MinPLogitsWarper(min_p)] if min_p else []
    want = torch.softmax(chain(torch.zeros(1, 1), torched(logits)[None])[0], 0).numpy()
    mass = kept_mass(logits, Sampling(temperature=temperature, top_k=k, top_p=p, min_p=min_p))
    np.testing.assert_array_equal(np.flatnonzero(mass), np.flatnonzero(want))
    close(mass / mass.sum(), want)


@pytest.mark.parametrize("s", [{}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.2}, {"temperature": 2.0}])
@pytest.mark.parametrize("by", ["seed", "position"])
def test_sample_draws_in_proportion(s: dict[str, float], by: str) -> None:
    """Pearson's chi-square over 3000 draws: above mean + 5 sigma once in some 10,000 runs, and the seeds are fixed."""
    logits, n = np.float32([0.5, -1, 2, 1.5, 0, 0.2, -0.5, 1]), 3000
    sampling = {"temperature": 1.0, **s}
    mass = kept_mass(logits, Sampling(**sampling))  # type: ignore[arg-type]
    expected = n * mass / mass.sum()
    at = [(i, 7) if by == "seed" else (7, i) for i in range(n)]
    tokens = [draw(logits, Sampling(**sampling, seed=seed), position) for seed, position in at]  # type: ignore[arg-type]
    counts = np.bincount(tokens, minlength=8)
    kept = expected > 0
    assert not counts[~kept].any()
    free = kept.sum() - 1
    assert ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum() < free + 5 * (2 * free) ** 0.5


def test_sample_counts_rather_than_remembers() -> None:
    logits = random(0, 100)
    hot = Sampling(temperature=1.0, seed=11)
    first = [draw(logits, hot, position) for position in range(50)]
    assert [draw(logits, hot, position) for position in reversed(range(50))] == first[::-1]
    assert len(set(first)) > 20
    numbers = [uniform(seed, position) for seed in (0, 1, -1, 2**63) for position in (0, 1, 2**31)]
    assert len(set(numbers)) == 12 and all(0 <= u < 1 for u in numbers)


@pytest.mark.parametrize(
    "s", [GREEDY, Sampling(temperature=1.0), Sampling(temperature=0.5, top_k=2, top_p=0.5, min_p=0.1)]
)
def test_sample_of_rows_with_holes(s: Sampling) -> None:
    inf = np.float32(np.inf)
    assert draw(np.float32([1, np.nan, 3]), s, 0) == -1
    assert draw(np.float32([-inf, -inf]), s, 0) == -1
    assert draw(np.float32([1, inf]), s, 0) == -1
    assert draw(np.float32([-inf, 2, -inf]), s, 0) == 1  # masked by a grammar, say


def test_sample_refuses() -> None:
    op = Sample(site="s", logits="logits", tokens="tokens", logprobs="logprobs")
    refuses(op, r"logits is f32\[R\]; wanted a matrix", logits="f32[R]")


def test_sample_work() -> None:
    op = Sample(site="s", logits="logits", tokens="tokens", logprobs="logprobs")
    table = tensors(logits="f32[R, 50]", tokens="i32[R]", logprobs="f32[R]")
    assert op.work(table, BATCH) == Work(4 * 3 * 50, 0, 0, 3 * 50 * 4 + 3 * 4 + 3 * 4)
