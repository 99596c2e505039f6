"""The op choose_keys, and attention over the positions that it chooses, against PyTorch and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.op_cases import BATCH, random, refuses, tensors

from intaglio.batch import Batch, Chunk, bind
from intaglio.ops import Attend, ChooseKeys
from intaglio.ops.op import Work

FIELDS: dict[str, Any] = {"site": "s", "q": "q", "weights": "h", "cache": "cache", "chosen": "y", "heads": 3}
TYPES = {"q": "f32[T, 12]", "h": "f32[T, 3]", "cache": "f32[P, B, 1, 4]"}


def chosen_of(batch: Batch, row: int, top: int, keys: np.ndarray, q: np.ndarray, weights: np.ndarray) -> list[int]:
    """The positions that row `row` chooses, by torch.topk, with scale 0.5: all that it sees, if they are few."""
    s = int(np.searchsorted(batch.first_row, row, side="right")) - 1
    seen = int(batch.positions[row]) + 1
    pages = keys[batch.block_table[s]].reshape(-1, keys.shape[-1])[:seen]
    score = torch.relu(0.5 * torch.tensor(q[row].reshape(3, -1)).double() @ torch.tensor(pages).double().T)
    score = torch.tensor(weights[row]).double() @ score
    return sorted(score.topk(min(top, seen)).indices.tolist())


@pytest.mark.parametrize("seed", range(4))
def test_choose_keys(seed: int) -> None:
    batch = bind([Chunk([5, 6, 7], 0, [1]), Chunk([8, 9], 4, [0, 2])], 4)
    q, weights, cache = random(seed, 5, 12), random(seed + 50, 5, 3) + 3, random(seed + 90, 4, 4, 1, 4)
    q = np.abs(q)
    cache = np.abs(cache)  # all products above 0, so that no two scores are equal
    got = ChooseKeys(**FIELDS, top=2, scale=0.5).reference({"q": q, "h": weights, "cache": cache}, batch)["y"]
    assert got.dtype == np.int32 and got.shape == (5, 2)
    for row in range(5):
        assert [p for p in got[row].tolist() if p >= 0] == chosen_of(batch, row, 2, cache, q, weights)
    assert got[0].tolist() == [-1, 0] and got[1].tolist() == [0, 1]


def test_choose_keys_ties_go_to_the_lower_position_and_nan_is_last() -> None:
    batch = bind([Chunk([1], 6, [0, 1])], 4)
    cache = np.zeros((2, 4, 1, 4), np.float32)
    cache[0, 2] = np.nan
    q, weights = np.ones((1, 12), np.float32), np.ones((1, 3), np.float32)
    op = ChooseKeys(**FIELDS, top=3)
    assert op.reference({"q": q, "h": weights, "cache": cache}, batch)["y"].tolist() == [[0, 1, 3]]
    cache[1, 1] = 1
    assert op.reference({"q": q, "h": weights, "cache": cache}, batch)["y"].tolist() == [[0, 1, 5]]


def test_choose_keys_refuses() -> None:
    op = ChooseKeys(**FIELDS, top=2)
    assert op.shapes(tensors(**TYPES)) == {"y": (("T", 2), "i32")}
    refuses(op, "cache has 2 heads; wanted 1", **{**TYPES, "cache": "f32[P, B, 2, 4]"})
    refuses(op, r"q is f32\[T, 9\]; wanted 3 heads of 4", **{**TYPES, "q": "f32[T, 9]"})
    refuses(op, r"h is f32\[T, 2\]; wanted 3 columns", **{**TYPES, "h": "f32[T, 2]"})
    refuses(ChooseKeys(**FIELDS, top=0), "top=0", **TYPES)
    refuses(ChooseKeys(**FIELDS, top=2, scale=0.0), "scale=0.0", **TYPES)


def test_choose_keys_work() -> None:
    """Rows that see more than two positions score all of them: those at positions 2, 4 and 5."""
    table = tensors(**TYPES, y="i32[T, 2]")
    moved = 4 * 5 * (12 + 3 + 2)
    want = Work((3 + 5 + 6) * 3 * (2 * 4 + 3), 0, (3 + 6) * 16, moved)
    assert ChooseKeys(**FIELDS, top=2).work(table, BATCH) == want


def test_attend_to_chosen_positions() -> None:
    """Attention over all positions, or over those of a window, given as a list, is attention with that window."""
    fields: dict[str, Any] = {"site": "s", "q": "q", "k_cache": "k", "v_cache": "v", "out": "y", "heads": 2, "scale": 1}
    values = {"q": random(0, 5, 12), "k": random(1, 3, 4, 2, 6), "v": random(2, 3, 4, 2, 5)}
    for window in (1, 2, 0):
        last = BATCH.positions[:, None] - np.arange(5, -1, -1)
        last[(last < 0) | (last <= BATCH.positions[:, None] - (window or 9))] = -1
        got = Attend(**fields, chosen="c").reference({**values, "c": last.astype(np.int32)}, BATCH)["y"]
        np.testing.assert_array_equal(got, Attend(**fields, window=window).reference(values, BATCH)["y"])


def test_attend_refuses_chosen_positions_that_are_no_integers() -> None:
    op = Attend(site="s", q="q", k_cache="k_cache", v_cache="v_cache", chosen="c", out="y", heads=2, scale=1.0)
    types = {"q": "f32[T, 6]", "k_cache": "f32[P, B, 2, 3]", "v_cache": "f32[P, B, 2, 3]"}
    refuses(op, r"c is f32\[T, 4\]; wanted i32\[T, positions\]", **types, c="f32[T, 4]")


def test_attend_work_with_chosen_positions() -> None:
    """A row that sees more than two positions reads two: 1 + 2 + 2 + 2 + 2 in all."""
    op = Attend(site="s", q="q", k_cache="k_cache", v_cache="v_cache", chosen="c", out="y", heads=2, scale=1.0)
    types = {"q": "f32[T, 6]", "k_cache": "f32[P, B, 2, 3]", "v_cache": "f32[P, B, 2, 3]", "c": "i32[T, 2]"}
    want = Work(2 * 2 * 6 * 9, 0, 2 * 24 * (3 + 4), 4 * 5 * (6 + 6 + 2))
    assert op.work(tensors(**types, y="f32[T, 6]"), BATCH) == want
