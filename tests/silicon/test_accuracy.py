"""Regimes of modelled calls, causes of errors in words, and docs/accuracy.md, which scripts/accuracy.py writes."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from intaglio.chips import CHIPS, target
from intaglio.cli import app
from intaglio.codesign.regime import CAUSES, REGIMES, Call
from intaglio.codesign.validate import Row, calls, predict, record
from intaglio.silicon.timing import Timing

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("accuracy_script", ROOT / "scripts/accuracy.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_as_generated(script: ModuleType) -> None:
    figures = json.loads(script.DATA.read_text())
    assert script.PAGE.read_text() == script.page(figures), "run python scripts/accuracy.py"


@pytest.mark.skipif("INTAGLIO_TABLES" not in os.environ, reason="INTAGLIO_TABLES names no folder of measured tables")
def test_the_figures_are_those_of_the_model(script: ModuleType) -> None:
    """Medians over a fortieth of the rows; a change of the model changes some of them."""
    known = json.loads(script.DATA.read_text())["sample"]
    found = script.sample(Path(os.environ["INTAGLIO_TABLES"]))
    assert found == pytest.approx(known, abs=0.03), "run python scripts/accuracy.py TABLES"


def call(seconds: float, launch: float = 0.0, on: str = "h100_sxm", jobs: float = 0.0, **busy: float) -> Call:
    """A call with seconds of busy engines."""
    chip = target(on).chip
    hbm, flops = busy.get("HBM", 0.0) * chip.hbm_rate, busy.get("MXU", 0.0) * chip.peak_flops("bf16")
    return Call(target(on), Timing(seconds, busy, hbm, flops=flops, jobs=jobs), launch)


@pytest.mark.parametrize(
    ("made", "measured", "regime", "cause", "reason"),
    [
        (call(10e-6, 7e-6), 8e-6, "launch-bound", "launch", "launch is 70% of the modelled time"),
        (call(10e-6, HBM=9e-6), 7e-6, "memory-bound", "bandwidth", "reads its operands from HBM where"),
        (call(10e-6, MXU=9e-6), 8e-6, "compute-bound", "flops", "peak in bf16, which takes 9.0 us"),
        (call(10e-6, MXU=4e-6, jobs=144), 20e-6, "tail", "waves", "the last of 2 waves fills 12 of 132 cores;"),
        (call(10e-6, HBM=4e-6, jobs=12), 20e-6, "tail", "waves", "its jobs fill 12 of 132 cores; measured at 18% of"),
        (call(10e-6, MXU=8e-6, jobs=264), 20e-6, "compute-bound", "compute-bound", "MXU is busy for 80%"),
        (call(10e-6, NET=8e-6), 20e-6, "link-bound", "link-bound", "NET is busy for 80%"),
        (call(10e-6, L2=8e-6), 20e-6, "memory-bound", "memory-bound", "L2 is busy for 80%"),
        (call(10e-6, MXU=2e-6), 20e-6, "tail", "tail", "mostly latency: after the launch, MXU is busy for 20% of it"),
        (call(10e-6), 20e-6, "tail", "tail", "no engine is counted"),
    ],
)  # fmt: skip
def test_regimes_and_causes(made: Call, measured: float, regime: str, cause: str, reason: str) -> None:
    assert (made.regime, made.cause(measured)) == (regime, cause)
    assert reason in made.reason(measured)


@settings(max_examples=40, deadline=None)
@given(
    chip=st.sampled_from(sorted(CHIPS)), m=st.integers(1, 5000), n=st.integers(16, 20000), k=st.integers(64, 20000),
    factor=st.floats(0.2, 5.0),
)  # fmt: skip
def test_any_product_has_a_regime_and_a_reason(chip: str, m: int, n: int, k: int, factor: float) -> None:
    """Launch-bound exactly if the time without launches is less than half; no figure is negative or above all."""
    on, row = target(chip), {"m": f"{m}", "n": f"{n}", "k": f"{k}", "dtype": "bfloat16"}
    (found,) = calls(on, "matmul", [row])
    seconds = found.timing.seconds
    assert 0 < found.launch_s < seconds and found.regime in REGIMES
    assert (found.regime == "launch-bound") == (found.launch_s >= seconds / 2)
    assert found.cause(seconds * factor) in CAUSES and found.reason(seconds * factor)
    waves, last = found.last_wave
    assert 1 <= last <= on.chip.cores and (waves - 1) * on.chip.cores + last == round(found.timing.jobs)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_regimes_of_a_record_are_parts_of_it(seed: int) -> None:
    """Their rows and errors add up to the record's; a twentieth of the rows has a cause."""
    rng = np.random.default_rng(seed)
    rows: list[Row] = []
    for _ in range(int(rng.integers(1, 60))):
        size = {name: str(int(2 ** rng.uniform(3, 13))) for name in "mnk"}
        rows.append({**size, "dtype": "bfloat16", "us": str(2 ** rng.uniform(2, 9))})
    found = record(target("h100_sxm"), "matmul", "bfloat16", rows, 3)
    parts = found.regimes.values()
    assert sum(e.rows for e in parts) == found.rows == len(rows)
    assert sum(e.rows * e.mean for e in parts) == pytest.approx(found.rows * found.mean)
    assert sum(e.rows * e.bias for e in parts) == pytest.approx(found.rows * found.bias)
    assert sum(found.causes.values()) == -(-len(rows) // 20) and len(found.worst) == min(3, len(rows))
    error = np.abs(predict(target("h100_sxm"), "matmul", rows) / [float(r["us"]) for r in rows] - 1)
    assert abs(found.worst[0].predicted / found.worst[0].us - 1) == pytest.approx(error.max())


def test_validate_prints_regimes_and_reasons(tmp_path: Path) -> None:
    table = "dtype,m,n,k,us\nbfloat16,8192,8192,8192,1000\nbfloat16,1,64,64,9\n"
    (tmp_path / "h100_sxm_matmul.csv").write_text(table)
    text = " ".join(CliRunner().invoke(app, ["validate", str(tmp_path)]).output.split())
    assert "launch memory compute link tail" in text and "launch is" in text and "% of the modelled time" in text
    (found,) = json.loads(CliRunner().invoke(app, ["validate", str(tmp_path), "--json"]).stdout)
    assert set(found["regimes"]) == {"launch-bound", "compute-bound"} and found["worst"][0]["reason"]
