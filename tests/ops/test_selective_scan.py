"""The ops selective_scan and rg_lru: definitions compared with PyTorch and transformers, shape rules, work by hand."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.op_cases import BATCH, close, quick, random, refuses, seeds, tensors, torched

from intaglio.batch import Chunk, bind
from intaglio.ops import RgLru, SelectiveScan
from intaglio.ops.op import Work

SCAN = SelectiveScan(site="s", x="x", step="step", b="b", c="c", rate="rate", skip="skip", state="state", out="out")
LRU = RgLru(
    site="s", x="x", input_gate="i", decay_gate="r", rate="rate", input_bias="ib", decay_bias="rb", state="state",
    out="out",
)  # fmt: skip
TOKENS = 7
WHOLE = bind([Chunk(range(TOKENS), 0, range(TOKENS), state=(-1, 1))], 1)


@quick
@given(seeds, st.integers(1, 6), st.integers(1, 5))
def test_selective_scan(seed: int, width: int, n: int) -> None:
    shapes = {"x": (TOKENS, width), "step": (TOKENS, width), "b": (TOKENS, n), "c": (TOKENS, n), "rate": (width, n)}
    v = {name: random(seed + i, *shape) for i, (name, shape) in enumerate({**shapes, "skip": (width,)}.items())}
    x, b, c = (torched(v[name]) for name in ("x", "b", "c"))
    dt, a = F.softplus(torched(v["step"])), -torched(v["rate"]).exp()
    h, want = torch.zeros(width, n, dtype=torch.float64), []
    for t in range(TOKENS):
        h = (dt[t][:, None] * a).exp() * h + (dt[t] * x[t])[:, None] * b[t]
        want.append(h @ c[t] + torched(v["skip"]) * x[t])
    state = np.full((2, width, n), np.nan, np.float32)
    close(SCAN.reference({**v, "state": state}, WHOLE)["out"], torch.stack(want), 1e-5)
    close(state[1], h, 1e-5)


@quick
@given(seeds, st.integers(1, 6))
def test_rg_lru(seed: int, width: int) -> None:
    v = {name: random(seed + i, TOKENS, width) for i, name in enumerate("xir")}
    v |= {name: random(seed + 5 + i, width) for i, name in enumerate(("rate", "ib", "rb"))}
    gate = torch.sigmoid(torched(v["r"]) + torched(v["rb"]))
    log = -8 * gate * F.softplus(torched(v["rate"]))
    x = torched(v["x"]) * torch.sigmoid(torched(v["i"]) + torched(v["ib"]))
    h, want = torch.zeros(width, dtype=torch.float64), []
    for t in range(TOKENS):
        h = log[t].exp() * h + x[t] * ((1 - (2 * log[t]).exp()).sqrt() if t else 1)
        want.append(h)
    state = np.full((2, width), np.nan, np.float32)
    close(LRU.reference({**v, "state": state}, WHOLE)["out"], torch.stack(want), 1e-5)
    close(state[1], h, 1e-5)


def test_selective_scan_refuses() -> None:
    good = {
        "x": "f32[T, 8]", "step": "f32[T, 8]", "b": "f32[T, 3]", "c": "f32[T, 3]", "rate": "f32[8, 3]",
        "skip": "f32[8]", "state": "f32[N, 8, 3]",
    }  # fmt: skip
    for change, says in (
        ({"step": "f32[T, 7]"}, "must have one shape"),
        ({"c": "f32[T, 4]"}, "must have one shape"),
        ({"rate": "f32[8]"}, r"rate is f32\[8\]; wanted \[8, 3\]"),
        ({"skip": "f32[3]"}, r"skip is f32\[3\]; wanted \[8\]"),
        ({"state": "f32[N, 3, 8]"}, r"state is f32\[N, 3, 8\]; wanted f32\[N, 8, 3\]"),
    ):
        refuses(SCAN, says, **{**good, **change})


def test_rg_lru_refuses() -> None:
    good = {name: "f32[T, 8]" for name in "xir"} | {name: "f32[8]" for name in ("rate", "ib", "rb")}
    good["state"] = "f32[N, 8]"
    refuses(LRU, "must have one shape", **{**good, "r": "f32[T, 4]"})
    refuses(LRU, r"rb is f32\[4\]; wanted \[8\]", **{**good, "rb": "f32[4]"})
    refuses(LRU, r"state is f32\[N, 4\]; wanted f32\[N, 8\]", **{**good, "state": "f32[N, 4]"})


def test_selective_scan_work() -> None:
    table = tensors(
        x="f32[T, 8]", step="f32[T, 8]", b="f32[T, 3]", c="f32[T, 3]", rate="f32[8, 3]", skip="f32[8]",
        state="f32[N, 8, 3]", out="f32[T, 8]",
    )  # fmt: skip
    moved = 5 * (8 + 8 + 3 + 3 + 8) * 4 + (8 * 3 + 8) * 4
    assert SCAN.work(table, BATCH) == Work(7 * 5 * 8 * 3, 0, 2 * 2 * 8 * 3 * 4, moved)


def test_rg_lru_work() -> None:
    table = tensors(**{name: "f32[T, 8]" for name in ("x", "i", "r", "out")}, rate="f32[8]", ib="f32[8]", rb="f32[8]",
                    state="f32[N, 8]")  # fmt: skip
    assert LRU.work(table, BATCH) == Work(14 * 5 * 8, 0, 2 * 2 * 8 * 4, 4 * 5 * 8 * 4 + 3 * 8 * 4)
