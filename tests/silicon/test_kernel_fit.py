"""Fits of engines' kernels: planted facts are found, ranges of head widths cover all widths, costs never rise."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.chips import target
from intaglio.chips.kernel_record import WIDEST
from intaglio.codesign.engine_tables import engine_target
from intaglio.codesign.kernel_fit import (
    FOLDS,
    WIDTH_ROWS,
    Case,
    KernelSearch,
    calibrated_values,
    engine_values,
    fit_predicts,
    width_ranges,
)
from intaglio.codesign.validate import predict

H100 = target("h100_sxm")


def products(seed: int, planted: dict[str, float], count: int = 20) -> Case:
    """FP8 products of random sizes, as fast as a kernel with the planted values of fields."""
    rng, rows = np.random.default_rng(seed), []
    for _ in range(count):
        rows.append({name: str(int(2 ** rng.uniform(6, 13))) for name in "mnk"} | {"dtype": "fp8", "kernel": "own"})
    start = Case(H100, "matmul", tuple({**row, "us": "1"} for row in rows))
    us = predict(start.target(start.start() | planted), "matmul", rows)
    return Case(H100, "matmul", tuple({**row, "us": str(t)} for row, t in zip(rows, us, strict=True)))


def test_a_planted_fact_is_found_among_the_alternatives() -> None:
    """Rows of kernels that quantise row by row, in one launch, are fitted to 5 %."""
    case = products(3, {"row_cycles": 1500.0, "quantise_launches": 1})
    search = KernelSearch([case], [case.start()])
    before = float(np.abs(case.errors(case.start())).max())
    search.run()
    found = search.values[0]
    assert found["row_cycles"] == 1500 and np.median(np.abs(case.errors(found))) < 0.05 < before


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), launch=st.floats(0.4, 2.5), rate=st.floats(0.5, 1.0))
def test_a_fit_of_constants_never_ends_worse_than_it_began(seed: int, launch: float, rate: float) -> None:
    start = H100.library
    planted = {"launch_s": start.launch_s * launch, "mxu_efficiency": start.mxu_efficiency * rate}
    case = products(seed, planted, 10)
    search = KernelSearch([case], [case.start()])
    first = sum(search.costs)
    assert search.run(facts=False) <= first
    assert case.cost(search.values[0]) <= case.cost(case.start())
    assert all(search.values[0][name] == value for name, value in case.start().items() if name == "persistent")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_calibration_moves_a_kernel_only_if_rows_that_it_did_not_see_gain(seed: int) -> None:
    slow = {"launch_s": 2.5 * H100.library.launch_s, "mxu_efficiency": 0.6 * H100.library.mxu_efficiency}
    for planted, moved in (({}, False), (slow, True)):
        case = products(seed, planted, 16)
        assert fit_predicts(case, case.start()) == moved
        few = Case(H100, "matmul", case.rows[: FOLDS - 1])
        assert not fit_predicts(few, few.start())


def test_differences_between_two_chips_constants_cost_and_the_total_cost_never_rises() -> None:
    names = ("mxu_efficiency", "launch_s")
    cases = [products(seed, {n: f * getattr(H100.library, n) for n in names}, 12) for seed, f in ((1, 1.0), (2, 0.7))]
    start = cases[0].start()
    search = KernelSearch(cases, [start, start | {"launch_s": 2 * start["launch_s"]}])
    apart = [search.cost_apart([start, start | {"launch_s": f * start["launch_s"]}]) for f in (0.25, 0.5, 1, 2, 3)]
    assert apart[0] > apart[1] > apart[2] == 0 and apart[4] > apart[3] == search.apart
    assert apart[1] == pytest.approx(apart[3])
    assert search.total == sum(search.costs) + search.apart
    before = search.total
    assert search.run(facts=False) == search.total < before
    assert search.apart == search.cost_apart(search.values) > 0


def test_constants_lent_by_another_generation_are_fitted_to_any_rows_and_known_ones_only_where_rows_gain() -> None:
    """Three rows are too few for a cross-validation: the constants that H100 lends are fitted, those of H100 stay."""
    kernel = "CutlassFP8ScaledMMLinearKernel"
    for chip, fitted in (("h100_sxm", False), ("h200_sxm", False), ("l40s", True)):
        on = engine_target(chip, "vllm")
        rows = [{"m": m, "n": "4096", "k": "4096", "dtype": "fp8", "kernel": kernel} for m in ("512", "2048", "8192")]
        us = 1.3 * predict(on, "matmul", rows)
        case = Case(target(chip), "matmul", tuple({**r, "us": str(t)} for r, t in zip(rows, us, strict=True)))
        assert (calibrated_values(case, on) != engine_values(case, on)) == fitted


@settings(max_examples=100, deadline=None)
@given(widths=st.lists(st.sampled_from([64, 80, 128, 192, 256, 512]), max_size=60))
def test_ranges_of_head_widths_cover_every_width_once(widths: list[int]) -> None:
    case = Case(H100, "attention_decode", tuple({"head_dim": str(w)} for w in widths))
    ranges = width_ranges([case])
    assert ranges[0][0] == 0 and ranges[-1][1] == WIDEST
    assert all(after[0] == before[1] + 1 for before, after in pairwise(ranges))
    if len(ranges) > 1:
        assert all(len(case.of_widths(*r).rows) >= WIDTH_ROWS for r in ranges)
