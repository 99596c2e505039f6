"""The ops pool_keys and attend_pooled, and choose_keys over entries: against PyTorch, whole and in parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.op_cases import BATCH, close, refuses, tensors

from intaglio.batch import Batch, Chunk, bind
from intaglio.ops import AttendPooled, ChooseKeys, PoolKeys
from intaglio.ops.op import Work

PAGE = 8
POOL: dict[str, Any] = {
    "site": "s", "value_cache": "value_cache", "gate_cache": "gate_cache", "bias": "b", "weight": "n",
    "frequencies": "f", "entries": "entry_cache",
}  # fmt: skip
POOL_TYPES = {
    "value_cache": "f32[P, B, 1, 6]", "gate_cache": "f32[P, B, 1, 6]", "b": "f32[3, 6]", "n": "f32[6]", "f": "f32[2]",
    "entry_cache": "f32[P, B/3, 1, 6]",
}  # fmt: skip
ATTEND: dict[str, Any] = {
    "site": "s", "q": "q", "cache": "k_cache", "entries": "e_cache", "out": "y", "heads": 2, "scale": 0.5, "every": 3,
}  # fmt: skip
TYPES = {"q": "f32[T, 8]", "k_cache": "f32[P, B, 1, 4]", "e_cache": "f32[P, B/3, 1, 4]"}


def one(length: int, start: int = 0) -> Batch:
    """A step of one sequence in blocks 2, 0, 3, 1: tokens from `start` to `length`."""
    return bind([Chunk(range(length - start), start, [2, 0, 3, 1])], PAGE)


def paged(rows: np.ndarray, every: int = 1) -> np.ndarray:
    """Rows of a sequence in the pages of one(), [4, rows of a page, heads, width]; a row for each run of `every`."""
    pages = np.full((4, -(-PAGE // every), *rows.shape[1:]), np.nan, np.float32)
    for i, row in enumerate(rows):
        last = (i + 1) * every - 1
        pages[[2, 0, 3, 1][last // PAGE], last % PAGE // every] = row
    return pages


def unpaged(pages: np.ndarray, count: int, every: int) -> np.ndarray:
    last = (np.arange(count) + 1) * every - 1
    return pages[np.array([2, 0, 3, 1])[last // PAGE], last % PAGE // every, 0]


def pooled(value: np.ndarray, gate: np.ndarray, v: dict[str, np.ndarray], every: int, overlap: bool) -> torch.Tensor:
    """Entries [runs, width] of a sequence's values and gates [tokens, halves, width], as transformers pools them."""
    n, halves, width = len(value) // every, *value.shape[1:]
    x, g = (torch.tensor(a[: n * every]).double().view(n, every, halves, width) for a in (value, gate))
    g = g + torch.tensor(v["b"]).double().view(every, halves, width)
    if overlap:
        wide, gates = torch.zeros(n, 2 * every, width).double(), torch.full((n, 2 * every, width), -torch.inf).double()
        wide[:, every:], gates[:, every:] = x[:, :, 1], g[:, :, 1]
        wide[1:, :every], gates[1:, :every] = x[:-1, :, 0], g[:-1, :, 0]
    else:
        wide, gates = x[:, :, 0], g[:, :, 0]
    y = (wide * gates.softmax(dim=1)).sum(dim=1)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6) * torch.tensor(v["n"]).double()
    angle = torch.arange(n)[:, None] * every * torch.tensor(v["f"]).double()
    cos, sin = angle.cos().repeat_interleave(2, 1), angle.sin().repeat_interleave(2, 1)
    turned = y[:, -2 * len(v["f"]) :].clone()
    half = torch.stack((-turned[:, 1::2], turned[:, 0::2]), -1).flatten(1)
    y[:, -2 * len(v["f"]) :] = turned * cos + half * sin
    return y


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("every", [2, 3, 8, 11])
def test_pool_keys(every: int, overlap: bool, rng: np.random.Generator) -> None:
    halves, width, length = 1 + overlap, 6, int(rng.integers(1, 33))
    value, gate = (rng.normal(size=(length, halves, width)).astype(np.float32) for _ in range(2))
    v = {
        "b": rng.normal(size=(every, halves * width)).astype(np.float32), "n": rng.normal(size=6).astype(np.float32),
        "f": np.array([1.0, 0.1], np.float32), "value_cache": paged(value), "gate_cache": paged(gate),
        "entry_cache": np.full((4, -(-PAGE // every), 1, width), np.nan, np.float32),
    }  # fmt: skip
    op = PoolKeys(**POOL, every=every, overlap=overlap)
    whole = {**v, "entry_cache": v["entry_cache"].copy()}
    assert op.reference(whole, one(length)) == {}
    count = length // every
    if count:
        close(unpaged(whole["entry_cache"], count, every), pooled(value, gate, v, every, overlap), 1e-5)
    assert np.isfinite(whole["entry_cache"]).sum() == count * width  # nothing else is written
    cut = int(rng.integers(0, length))
    for batch in (one(cut), one(length, cut)) if cut else (one(length),):
        op.reference(v, batch)
    np.testing.assert_array_equal(v["entry_cache"], whole["entry_cache"])


def test_pool_keys_refuses() -> None:
    op = PoolKeys(**POOL, every=3)
    assert op.shapes(tensors(**POOL_TYPES)) == {} and op.reach("value_cache") == op.reach("gate_cache") == 3
    assert PoolKeys(**POOL, every=3, overlap=True).reach("gate_cache") == 6 and op.reach("entry_cache") == 0
    refuses(PoolKeys(**POOL, every=1), "every=1; wanted 2 or more", **POOL_TYPES)
    refuses(PoolKeys(**POOL, every=3, overlap=True), r"wanted \[P, B, 2, head_dim\]", **POOL_TYPES)
    refuses(op, r"wanted \[P, B, 1, head_dim\] in f32 or bf16", **{**POOL_TYPES, "value_cache": "e4m3[P, B, 1, 6]"})
    refuses(op, r"gate_cache is f32\[P, B, 1, 8\] but", **{**POOL_TYPES, "gate_cache": "f32[P, B, 1, 8]"})
    refuses(op, r"wanted \[P, B/3, 1, head_dim\]", **{**POOL_TYPES, "entry_cache": "f32[P, B, 1, 6]"})
    refuses(op, "entry_cache has heads of 4", **{**POOL_TYPES, "entry_cache": "f32[P, B/3, 1, 4]"})
    refuses(op, r"b is f32\[4, 6\]; wanted \[3, 6\]", **{**POOL_TYPES, "b": "f32[4, 6]"})
    refuses(op, r"n is f32\[5\]; wanted \[6\]", **{**POOL_TYPES, "n": "f32[5]"})
    refuses(op, "f has 4 frequencies", **{**POOL_TYPES, "f": "f32[4]"})


def test_pool_keys_work() -> None:
    """BATCH has tokens at positions 0 .. 2, and 4 and 5: two of them close a run of three, of 3 tokens each."""
    table = tensors(**POOL_TYPES)
    temps = 4 * (3 * 6 + 6 + 2)
    assert PoolKeys(**POOL, every=3).work(table, BATCH) == Work((6 * 6 + 7 * 2) * 6, 0, 4 * 6 * (2 * 6 + 2), temps)


@pytest.mark.parametrize("chosen", [False, True])
def test_attend_pooled(chosen: bool, rng: np.random.Generator) -> None:
    """One softmax over the keys of the window, the entries whose runs have ended, and the sink."""
    length, start, window, every = 29, int(rng.integers(0, 29)), int(rng.integers(1, 12)), int(rng.integers(2, 12))
    q = rng.normal(size=(length - start, 8)).astype(np.float32)
    keys, entries = (rng.normal(size=(n, 1, 4)).astype(np.float32) for n in (length, length // every))
    sinks = rng.normal(size=2).astype(np.float32)
    v: dict[str, np.ndarray] = {"q": q, "k_cache": paged(keys), "e_cache": paged(entries, every), "z": sinks}
    picks = np.full((len(q), 3), -1, np.int32)
    for row, at in enumerate(range(start, length)):
        some = rng.choice((at + 1) // every, min(2, (at + 1) // every), replace=False)
        picks[row, 3 - len(some) :] = np.sort(some)
    op = AttendPooled(**{**ATTEND, "every": every}, window=window, sinks="z", chosen="c" if chosen else None)
    got = op.reference({**v, "c": picks}, one(length, start))["y"]
    for row, at in enumerate(range(start, length)):
        seen = picks[row][picks[row] >= 0] if chosen else np.arange((at + 1) // every)
        k = torch.tensor(np.concatenate([keys[max(0, at - window + 1) : at + 1, 0], entries[seen, 0]])).double()
        score = torch.tensor(q[row].reshape(2, 4)).double() @ k.T * 0.5
        p = torch.cat([score, torch.tensor(sinks).double()[:, None]], 1).softmax(1)[:, :-1]
        close(got[row], (p @ k).flatten(), 1e-5)


def test_attend_pooled_refuses() -> None:
    op = AttendPooled(**ATTEND, window=2)
    assert op.shapes(tensors(**TYPES)) == {"y": (("T", 8), "f32")}
    assert op.reach("k_cache") == 2 and op.reach("e_cache") == 0
    refuses(AttendPooled(**ATTEND, window=0), "window=0; wanted 1 or more", **TYPES)
    refuses(AttendPooled(**{**ATTEND, "every": 1}, window=2), "every=1; wanted 2 or more", **TYPES)
    refuses(op, r"wanted \[P, B/3, 1, head_dim\]", **{**TYPES, "e_cache": "f32[P, B/4, 1, 4]"})
    refuses(op, r"q is f32\[T, 9\]; wanted 2 heads of 4", **{**TYPES, "q": "f32[T, 9]"})
    refuses(op, "e_cache is bf16 but k_cache is f32", **{**TYPES, "e_cache": "bf16[P, B/3, 1, 4]"})
    refuses(op, "e_cache has heads of 5 but k_cache of 4", **{**TYPES, "e_cache": "f32[P, B/3, 1, 5]"})
    listed = AttendPooled(**ATTEND, window=2, chosen="c")
    refuses(listed, r"c is f32\[T, 3\]; wanted i32\[T, entries\]", **TYPES, c="f32[T, 3]")


def test_attend_pooled_work() -> None:
    """Keys seen by the tokens at 0 .. 2 and 4, 5: 1 + 2 + 2 and 2 + 2; entries: 0 + 0 + 1 and 1 + 2."""
    op = AttendPooled(**ATTEND, window=2)
    want = Work(4 * 2 * 4 * (9 + 4), 0, 16 * (3 + 1 + 3 + 2), 4 * 5 * 16)
    assert op.work(tensors(**TYPES, y="f32[T, 8]"), BATCH) == want


def test_choose_keys_among_entries(rng: np.random.Generator) -> None:
    """A token chooses among the entries whose runs end at its position or before."""
    length, every, top = 31, 3, 4
    q, weights = np.abs(rng.normal(size=(length, 12))), rng.normal(size=(length, 3)) + 3
    entries = np.abs(rng.normal(size=(length // every, 1, 4)))
    v = {"q": q.astype(np.float32), "h": weights.astype(np.float32), "cache": paged(entries, every)}
    op = ChooseKeys(site="s", q="q", weights="h", cache="cache", chosen="y", heads=3, top=top, scale=0.5, every=every)
    got = op.reference(v, one(length))["y"]
    for row in range(length):
        seen = (row + 1) // every
        score = torch.relu(0.5 * torch.tensor(v["q"][row].reshape(3, 4)).double() @ torch.tensor(entries[:seen, 0]).T)
        score = torch.tensor(v["h"][row]).double() @ score
        want = sorted(score.topk(min(top, seen)).indices.tolist())
        assert got[row].tolist() == [-1] * (top - len(want)) + want
    np.testing.assert_array_equal(op.reference({**v, "q": v["q"][7:], "h": v["h"][7:]}, one(length, 7))["y"], got[7:])
    types = {"q": "f32[T, 12]", "h": "f32[T, 3]", "cache": "f32[P, B, 1, 4]"}
    refuses(op, r"wanted \[P, B/3, 1, head_dim\]", **types)


def test_choose_keys_work_among_entries() -> None:
    """Tokens that see more than one entry score them: only the one at position 5, which sees two."""
    op = ChooseKeys(site="s", q="q", weights="h", cache="cache", chosen="y", heads=3, top=1, every=3)
    table = tensors(q="f32[T, 12]", h="f32[T, 3]", cache="f32[P, B/3, 1, 4]", y="i32[T, 1]")
    assert op.work(table, BATCH) == Work(2 * 3 * (2 * 4 + 3), 0, 2 * 16, 4 * 5 * (12 + 3 + 1))
