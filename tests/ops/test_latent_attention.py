"""The op head_linear, and latent, chunked and biased attention, compared with computations written out.

Also trailing rope, map's broadcast of a column, shape rules, and work compared with numbers worked out by hand.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.op_cases import apply, close, quick, random, refuses, seeds, tensors, torched

from intaglio.batch import Chunk, bind
from intaglio.ops import Attend, HeadLinear, KvWrite, Map, Rope
from intaglio.ops.op import Work


@quick
@given(seeds, st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), st.integers(0, 4))
def test_head_linear(seed: int, heads: int, n: int, k: int, rest: int) -> None:
    x, w = random(seed, 4, heads * (k + rest)), random(seed + 1, heads, n, k)
    op = HeadLinear(site="s", x="x", w="w", out="out")
    table = tensors(x=f"f32[T, {x.shape[1]}]", w=f"f32[{heads}, {n}, {k}]")
    got = op.reference({"x": x, "w": w}, None)["out"]  # type: ignore[arg-type]
    assert op.shapes(table) == {"out": (("T", got.shape[1]), "f32")}
    own = torched(x).reshape(4, heads, k + rest)
    want = torch.cat([torch.einsum("thk,hnk->thn", own[..., :k], torched(w)), own[..., k:]], dim=-1)
    close(got, want.reshape(4, -1), 2e-6)


def test_head_linear_refuses() -> None:
    op = HeadLinear(site="s", x="x", w="w", out="out")
    refuses(op, r"w is f32\[3, 4\]; wanted a matrix a head", x="f32[T, 12]", w="f32[3, 4]")
    refuses(op, r"w is int8g32\[3, 4, 4\]; wanted .* in a plain format", x="f32[T, 12]", w="int8g32[3, 4, 4]")
    refuses(op, r"x is f32\[T, 12\]; w wants 3 heads of 5 columns or more", x="f32[T, 12]", w="f32[3, 4, 5]")


def test_head_linear_work() -> None:
    op = HeadLinear(site="s", x="x", w="w", out="out")
    table = tensors(x="f32[T, 18]", w="bf16[3, 4, 5]", out="f32[T, 15]")
    assert op.work(table, bind([Chunk(range(5), 0, [0, 1])], 4)) == Work(2 * 5 * 60, 60 * 2, 0, 5 * 4 * (18 + 15))


def attended(op: Attend, q: np.ndarray, caches: dict[str, np.ndarray]) -> np.ndarray:
    """Over one sequence whose keys and values lie in order in two pages."""
    n = len(q)
    return apply(op, bind([Chunk(range(n), 0, [0, 1])], 8), q=q, **caches)


def paged(x: np.ndarray, heads: int) -> np.ndarray:
    out = np.zeros((2, 8, heads, x.shape[1] // heads), np.float32)
    out.reshape(16, heads, -1)[: len(x)] = x.reshape(len(x), heads, -1)
    return out


def test_latent_attention_absorbed_is_latent_attention_expanded() -> None:
    """Keys and values formed from the latents, head by head, against queries taken into the latent space."""
    heads, nope, rope, value, rank, n = 3, 5, 4, 6, 7, 13
    latent, k_rope, q = random(0, n, rank), random(1, n, rope), random(2, n, heads * (nope + rope))
    up_k, up_v = random(3, heads, nope, rank), random(4, heads, value, rank)
    keys = [np.einsum("tr,hkr->thk", latent, up_k), np.repeat(k_rope[:, None], heads, 1)]
    expanded = {
        "k_cache": paged(np.concatenate(keys, -1).reshape(n, -1), heads),
        "v_cache": paged(np.einsum("tr,hvr->thv", latent, up_v).reshape(n, -1), heads),
    }
    plain = Attend(site="s", q="q", k_cache="k_cache", v_cache="v_cache", out="out", heads=heads, scale=0.3)
    want = attended(plain, q, expanded)
    absorb = HeadLinear(site="s", x="x", w="w", out="out")
    inner = absorb.reference({"x": q, "w": up_k.swapaxes(1, 2)}, None)["out"]  # type: ignore[arg-type]
    caches = {"latent_cache": paged(latent, 1), "rope_cache": paged(k_rope, 1)}
    op = replace(plain, k_cache="latent_cache", v_cache="latent_cache", rope_cache="rope_cache")
    got = absorb.reference({"x": attended(op, inner, caches), "w": up_v}, None)["out"]  # type: ignore[arg-type]
    close(got, want, 1e-5)


def test_chunked_attention_sees_only_its_chunk() -> None:
    q, k, v = (random(i, 14, 8) for i in range(3))
    op = Attend(site="s", q="q", k_cache="k_cache", v_cache="v_cache", out="out", heads=2, scale=0.3, chunk=5)
    got = attended(op, q, {"k_cache": paged(k, 2), "v_cache": paged(v, 2)})
    for first in (0, 5, 10):
        part = slice(first, min(first + 5, 14))
        own = attended(replace(op, chunk=0), q[part], {"k_cache": paged(k[part], 2), "v_cache": paged(v[part], 2)})
        close(got[part], own)


def test_sink_is_a_key_with_zero_value() -> None:
    """Putting a key before all others whose score is the sink and whose value is zero."""
    q, k, v, sinks = random(0, 9, 8), random(1, 9, 8), random(2, 9, 8), random(3, 2) * 3
    op = Attend(site="s", q="q", k_cache="k_cache", v_cache="v_cache", sinks="sinks", out="out", heads=2, scale=0.3)
    table = tensors(q="f32[T, 8]", k_cache="f32[P, B, 2, 4]", v_cache="f32[P, B, 2, 4]", sinks="f32[2]")
    assert op.shapes(table) == {"out": (("T", 8), "f32")}
    batch = bind([Chunk(range(9), 0, [0, 1])], 8)
    got = op.reference({"q": q, "k_cache": paged(k, 2), "v_cache": paged(v, 2), "sinks": sinks}, batch)["out"]
    for h in range(2):
        own = slice(4 * h, 4 * h + 4)
        score = torched(q[:, own]) @ torched(k[:, own]).T * 0.3
        score = score.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
        p = torch.softmax(torch.cat([score, torched(sinks)[h].expand(9, 1)], dim=1), dim=1)[:, :9]
        close(got[:, own], p @ torched(v[:, own]))


def test_temperature_grows_with_the_position() -> None:
    q, k, v = (random(i, 14, 8) for i in range(3))
    plain = Attend(site="s", q="q", k_cache="k_cache", v_cache="v_cache", out="out", heads=2, scale=0.3)
    caches = {"k_cache": paged(k, 2), "v_cache": paged(v, 2)}
    heat = 1 + 0.4 * np.log1p(np.floor((np.arange(14) + 1) / 6))
    want = attended(plain, (q * heat[:, None]).astype(np.float32), caches)
    close(attended(replace(plain, temper=0.4, temper_every=6), q, caches), want, 2e-6)
    heat = 1 + 0.4 * np.log1p(np.floor(np.arange(14) / 6))
    want = attended(plain, (q * heat[:, None]).astype(np.float32), caches)
    close(attended(replace(plain, temper=0.4, temper_every=6, temper_from=0), q, caches), want, 2e-6)


def test_slopes_bias_the_scores_by_distance() -> None:
    """As BLOOM adds them: slope * key position, which differs by a constant in each row."""
    q, k, v, slopes = random(0, 9, 8), random(1, 9, 8), random(2, 9, 8), np.array([0.5, 0.0625], np.float32)
    op = Attend(site="s", q="q", k_cache="k_cache", v_cache="v_cache", slopes="slopes", out="out", heads=2, scale=0.3)
    batch = bind([Chunk(range(9), 0, [0, 1])], 8)
    got = op.reference({"q": q, "k_cache": paged(k, 2), "v_cache": paged(v, 2), "slopes": slopes}, batch)["out"]
    for h in range(2):
        own = slice(4 * h, 4 * h + 4)
        score = torched(q[:, own]) @ torched(k[:, own]).T * 0.3 + float(slopes[h]) * torch.arange(9)
        p = torch.softmax(score.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf), dim=1)
        close(got[:, own], p @ torched(v[:, own]))


def test_attention_refuses_contradictory_attributes() -> None:
    op = Attend(site="s", q="q", k_cache="k_cache", v_cache="v_cache", out="out", heads=2, scale=1.0)
    own = {"q": "f32[T, 8]", "k_cache": "f32[P, B, 2, 4]", "v_cache": "f32[P, B, 2, 4]"}
    refuses(replace(op, window=3, chunk=4), "window=3, chunk=4; give one of them", **own)
    refuses(replace(op, temper_every=0), "temper_every=0; wanted 1 or more", **own)
    refuses(replace(op, temper_from=2), "temper_from=2; wanted 0 or 1", **own)
    refuses(replace(op, slopes="slopes"), r"slopes is f32\[3\]; wanted \[2\]", **own, slopes="f32[3]")
    refuses(replace(op, sinks="sinks"), r"sinks is f32\[3\]; wanted \[2\]", **own, sinks="f32[3]")
    rope = {"rope_cache": "f32[P, B, 1, 2]"}
    refuses(replace(op, rope_cache="rope_cache"), "rope_cache has 1 heads but k_cache has 2", **own, **rope)


def test_attend_work_reads_latents_once() -> None:
    op = Attend(
        site="s", q="q", k_cache="c_cache", v_cache="c_cache", rope_cache="r_cache", out="out", heads=3, scale=1.0
    )
    table = tensors(q="f32[T, 18]", c_cache="bf16[P, B, 1, 4]", r_cache="bf16[P, B, 1, 2]", out="f32[T, 12]")
    got = op.work(table, bind([Chunk([1], 6, [0])], 8))
    assert got == Work(2 * 3 * (4 + 4 + 2) * 7, 0, 7 * (4 + 2) * 2, 4 * (18 + 12))


def test_trailing_rope_rotates_the_last_columns() -> None:
    x, table = random(0, 5, 3 * 10), np.array([1.0, 0.3], np.float32)
    at = np.arange(5, dtype=np.int32)
    for style in ("half", "interleaved"):
        op = Rope(site="s", x="x", positions="p", frequencies="f", out="out", head_dim=10, style=style, trailing=True)
        heads = x.reshape(5, 3, 10)
        alone = apply(replace(op, trailing=False, head_dim=4), x=heads[..., 6:].reshape(5, -1), p=at, f=table)
        got = apply(op, x=x, p=at, f=table).reshape(5, 3, 10)
        np.testing.assert_array_equal(got[..., :6], heads[..., :6])
        np.testing.assert_array_equal(got[..., 6:].reshape(5, -1), alone)


def test_map_broadcasts_one_column() -> None:
    a, b = random(0, 5, 7), random(1, 5, 1)
    got = apply(Map(site="s", a="a", b="b", out="out", expr="a * sigmoid(b)"), a=a, b=b)
    close(got, torched(a) * torch.sigmoid(torched(b)))
    refuses(
        Map(site="s", a="a", b="b", out="out", expr="a + b"),
        r"a is f32\[T, 4\] but b is f32\[R, 1\]",
        a="f32[T, 4]",
        b="f32[R, 1]",
    )


def test_latents_and_ropes_are_written_side_by_side() -> None:
    caches = {"k_cache": np.zeros((2, 4, 1, 5), np.float32), "v_cache": np.zeros((2, 4, 1, 2), np.float32)}
    k, v = random(0, 3, 5), random(1, 3, 2)
    op = KvWrite(site="s", k="k", v="v", k_cache="k_cache", v_cache="v_cache")
    apply(op, bind([Chunk([1, 2, 3], 3, [1, 0])], 4), k=k, v=v, **caches)
    np.testing.assert_array_equal(caches["k_cache"][[1, 0, 0], [3, 0, 1], 0], k)
    np.testing.assert_array_equal(caches["v_cache"][[1, 0, 0], [3, 0, 1], 0], v)
