"""Does the time model rank layouts (tp, pp, ep) of a model as measured servers do? Rates per chip, and good choices."""

from __future__ import annotations

import random

import pytest

from intaglio.codesign.measured import Compared, Row
from intaglio.codesign.ranking import CLOSE, MODEL_AND_CHIP, MODEL_CHIP_LENGTHS, rankings, rate, share_good

POINT = {
    "backend": "vllm", "backend_version": "1", "model_path": "x/Llama-3.1-8B-Instruct", "system": "h100_sxm",
    "mode": "agg", "isl": "128", "osl": "101", "gemm_quant_mode": "", "moe_quant_mode": "", "precision": "",
    "pp_size": "1", "attention_dp_size": "1", "moe_tp_size": "1", "moe_ep_size": "1",
}  # fmt: skip


def point(tp: int, open_: int, measured: float, modelled: float, **columns: str) -> Compared:
    """A row whose server takes `measured` seconds for a token, and in the model `modelled`."""
    own = {
        "tp_size": str(tp),
        "concurrency": str(open_),
        "silicon_ttft_ms": "0.001",
        "silicon_tpot_ms": str(measured * 1e3),
    }
    return Compared(Row({**POINT, **own, **columns}), 1e-6, modelled)


def test_rates_are_per_chip() -> None:
    one = point(4, 8, 0.01, 0.01)
    assert rate(one.row, 0.0, 0.01) == pytest.approx(8 * 101 / (100 * 0.01) / 4)
    assert rate(one.row, 1.0, 0.01) == pytest.approx(8 * 101 / 2 / 4)


def test_a_recommendation_is_good_if_it_is_close_to_the_best() -> None:
    """With one load: whatever the model's scale, only its order counts; the measured loss of its choice is reported."""
    rng = random.Random()
    scale, loss = rng.uniform(0.1, 10), rng.uniform(0.001, 0.3)
    best, chosen, other = point(1, 8, 0.01, 0.011), point(2, 8, 0.005 / (1 - loss), 0.005), point(4, 8, 0.01, 0.01)
    cases = [Compared(c.row, c.ttft, c.tpot * scale) for c in (best, chosen, other)]
    (found,) = rankings(cases, at_one_load=True, least=2)
    assert (found.recommended, found.best, found.layouts) == ("tp2 with 8 open", "tp1 with 8 open", 3)
    assert found.reached == pytest.approx(1 - loss, rel=1e-3)
    assert found.good == (found.reached >= CLOSE)
    assert share_good([found]) == float(found.good)


def test_cases_need_points_and_two_layouts() -> None:
    loads = [point(tp, n, 0.01, 0.01) for tp in (1, 2) for n in (1, 2, 4, 8)]
    assert [r.points for r in rankings(loads)] == [8]
    assert len(rankings(loads, at_one_load=True, least=2)) == 4
    assert rankings(loads[:-1]) == [] and rankings([c for c in loads if c.row.number("tp_size") == 1] * 2) == []
    refused = [Compared(c.row, refused="x") for c in loads]
    apart = [Compared(Row({**c.row.columns, "mode": "disagg"}), 1.0, 1.0) for c in loads]
    assert rankings(refused) == [] and rankings(apart) == []
    assert rankings([*loads[:4], *(point(2, n, 0.01, 0.01, isl="256") for n in (1, 2, 4, 8))]) == []
    again = [*loads, loads[0]]  # measured twice: one point
    assert [r.points for r in rankings(again)] == [8]


def test_a_case_may_be_a_model_and_a_chip() -> None:
    """All that was measured of them is compared, whatever the engine, formats and lengths; layouts count once."""
    loads = [point(tp, 4, tp * 0.01, 0.01, isl=isl, backend=b) for tp in (1, 2) for isl in ("1", "9") for b in "ab"]
    path = [point(4, 4, 0.01, 0.01, model_path="y/Llama-3.1-8B-Instruct")]
    (found,) = rankings([*loads, *path], least=1, same=MODEL_AND_CHIP, least_layouts=3)
    assert (found.question, found.layouts, found.points) == (("llama-3.1-8b", "h100_sxm"), 3, 9)
    assert found.best.startswith("tp1 with 4 open") and found.recommended.startswith("tp1 with 4 open")
    assert rankings(loads, least=1, same=MODEL_AND_CHIP, least_layouts=3) == []
    by_lengths = rankings([*loads, *path], least=1, same=MODEL_CHIP_LENGTHS, least_layouts=2)
    assert [(r.question[2:], r.points) for r in by_lengths] == [(("1", "101"), 4), (("9", "101"), 4)]


def test_servers_apart_are_compared_if_asked() -> None:
    """Their layout is that of both kinds of servers, and their rate is per chip of all servers."""
    sizes = {f"{p}_{name}": "1" for p in ("prefill", "decode") for name in ("num_workers", "tp_size", "pp_size")}
    apart = point(1, 8, 0.01, 0.01, mode="disagg", **{**sizes, "decode_num_workers": "2"})
    assert rate(apart.row, 0.0, 0.01) == pytest.approx(8 * 101 / (100 * 0.01) / 3)
    cases = [point(2, 8, 0.01, 0.01), apart]
    assert rankings(cases, least=1) == []
    (found,) = rankings(cases, least=2, apart=True)
    assert (found.best, found.layouts) == ("tp2 with 8 open", 2)
