"""Ops rope and sinusoid: definition compared with an independent computation, shape rules, and work counted by hand."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.op_cases import BATCH, apply, close, quick, random, refuses, seeds, tensors

from intaglio.ops import Rope, Sinusoid
from intaglio.ops.op import Work


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


@quick
@given(seeds, st.integers(1, 20), st.integers(0, 3))
def test_sinusoid(seed: int, pairs: int, first: int) -> None:
    """As the tables that XGLM and Marian add to their embeddings: sines of all frequencies, then cosines."""
    positions = np.random.default_rng(seed).integers(0, 4096, 5).astype(np.int32)
    frequencies = (10000.0 ** (-np.arange(pairs) / pairs)).astype(np.float32)
    got = apply(Sinusoid(site="s", positions="p", frequencies="f", out="out", first=first), p=positions, f=frequencies)
    angle = torch.from_numpy(positions + first).float()[:, None] * torch.from_numpy(frequencies)
    close(got, torch.cat([angle.sin(), angle.cos()], dim=1))


def test_sinusoid_refuses() -> None:
    op = Sinusoid(site="s", positions="p", frequencies="f", out="out")
    refuses(op, r"p is f32\[T\]; wanted i32", p="f32[T]", f="f32[4]")
    refuses(
        Sinusoid(site="s", positions="p", frequencies="f", out="out", first=-1), "first=-1; wanted 0 or more",
        p="i32[T]", f="f32[4]",
    )  # fmt: skip


def test_sinusoid_work() -> None:
    op = Sinusoid(site="s", positions="p", frequencies="f", out="out")
    table = tensors(p="i32[T]", f="f32[4]", out="f32[T, 8]")
    assert op.work(table, BATCH) == Work(5 * 8, 0, 0, 5 * 8 * 4 + 5 * 4 + 4 * 4)
