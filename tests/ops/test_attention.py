"""The ops kv_write and attend: definition compared with PyTorch, shape rules, and work counted by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.op_cases import BATCH, apply, close, random, refuses, tensors, torched

from intaglio import formats
from intaglio.batch import Chunk, bind
from intaglio.ops import (
    Attend,
    KvWrite,
)  # fmt: skip
from intaglio.ops.op import Work


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


def test_kv_write_e4m3() -> None:
    """Divided by the scale of the head, clipped, rounded; attention multiplies the codes with the scale again."""
    own = {n: np.zeros((4, 4, 2, 3), formats.E4M3) for n in "kv"}
    k, v = random(0, 5, 6), random(1, 5, 6)
    k[0, 0], k[1, 3], v[2, 5], v[3, 0] = 1e9, -1e9, np.nan, np.inf
    scales = {"ks": np.array([0.25, 2], np.float32), "vs": np.array([3, 0.5], np.float32)}
    op = KvWrite(site="s", k="a", v="b", k_cache="k", v_cache="v", k_scale="ks", v_scale="vs")
    op.reference({"a": k, "b": v, **own, **scales}, BATCH)
    for name, new, by in (("k", k, scales["ks"]), ("v", v, scales["vs"])):
        for t, slot in enumerate([4, 5, 6, 8, 9]):
            got = own[name][slot // 4, slot % 4].astype(np.float64)
            for h, head in enumerate(new[t].reshape(2, 3).astype(np.float64)):
                for x, code in zip(head / by[h], got[h], strict=True):
                    if not np.isfinite(x):
                        assert np.isnan(code)
                    elif abs(x) > 448:
                        assert code == np.sign(x) * 448
                    else:  # half a step: 2^-4 of the value, or 2^-10 where values are subnormal
                        assert abs(code - x) <= max(abs(x) * 2.0**-4, 2.0**-10)
    fields = {"site": "a", "q": "q", "k_cache": "k", "v_cache": "v", "out": "y", "heads": 2, "scale": 1.0}
    q, held = random(2, 5, 6), {n: np.nan_to_num(c.astype(np.float32)) for n, c in own.items()}
    plain = {n: c * scales[f"{n}s"][:, None] for n, c in held.items()}
    held = {n: c.astype(formats.E4M3) for n, c in held.items()}
    scaled = Attend(**fields, k_scale="ks", v_scale="vs").reference({"q": q, **held, **scales}, BATCH)["y"]
    np.testing.assert_allclose(scaled, Attend(**fields).reference({"q": q, **plain}, BATCH)["y"], rtol=1e-6)


def test_kv_write_refuses() -> None:
    op = KvWrite(site="s", k="k", v="v", k_cache="k_cache", v_cache="v_cache")
    own = {"k": "f32[T, 6]", "v": "f32[T, 6]", "k_cache": "f32[P, B, 2, 3]", "v_cache": "bf16[P, B, 2, 3]"}
    refuses(op, r"v is f32\[T, 8\] but v_cache holds 2 heads of 3", **{**own, "v": "f32[T, 8]"})
    scaled = replace(op, k_scale="s")
    refuses(scaled, r"s is f32\[3\]; wanted \[2\]", **own, s="f32[3]")
    for bad in ("f16[P, B, 2, 3]", "f32[P, B, 6]", "f32[B, P, 2, 3]", "f32[P, B, S, 3]"):
        refuses(
            op, r"a cache is \[P, B, heads, head_dim\] in f32 or bf16 or int8row or e4m3", **{**own, "k_cache": bad}
        )


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
