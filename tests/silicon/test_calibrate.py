"""Calibration: finds constants and facts again, from tables that the model made with noise; refuses bad tables."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from intaglio.chips import ChipError, Target, target
from intaglio.cli import app
from intaglio.codesign.calibrate import Search, by_table, calibrate, chosen, samples, value_of, with_value
from intaglio.codesign.validate import Row, predict

NOISE = 0.03  # standard deviation of the logarithm of a synthesised latency
START = target("b200_sxm")


def products(rng: np.random.Generator, count: int) -> list[dict[str, str]]:
    """Rows of products of 1 to 8,192 rows, half of them bound by memory."""
    rows = []
    for i in range(count):
        m = int(2 ** rng.uniform(0, 5)) if i % 2 else int(2 ** rng.uniform(8, 13))
        n, k = (int(2 ** rng.uniform(12, 14.5)) // 64 * 64 for _ in range(2))
        rows.append({"dtype": "bfloat16", "m": str(m), "n": str(n), "k": str(k), "split": "fit"})
    return rows


def decodes(rng: np.random.Generator, count: int) -> list[dict[str, str]]:
    """Rows of decode attention over an FP8 cache that the L2 does not hold."""
    rows = []
    for _ in range(count):
        batch, context = int(2 ** rng.uniform(4, 7)), int(2 ** rng.uniform(13, 15))
        shape = {
            "batch": batch,
            "query_len": 1,
            "context_len": context,
            "n_heads": 32,
            "n_kv_heads": 8,
            "head_dim": 128,
        }
        rows.append({"kv_dtype": "fp8", **{k: str(v) for k, v in shape.items()}, "window": "0", "split": "fit"})
    return rows


def synthesised(on: Target, table: str, rows: list[dict[str, str]], rng: np.random.Generator) -> list[Row]:
    """The rows with the latencies of `on`, each times a log-normal error of NOISE."""
    us = predict(on, table, rows) * np.exp(NOISE * rng.normal(size=len(rows)))
    return [{**row, "us": f"{t:.3f}"} for row, t in zip(rows, us, strict=True)]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


def test_planted_constants_are_found(rng: np.random.Generator) -> None:
    planted = {"chip.hbm_efficiency": 0.6, "library.mxu_efficiency": 0.7}
    rows = synthesised(START.changed(planted), "matmul", products(rng, 36), rng)
    found = calibrate(START, samples({"matmul": rows}, 0.0), points=24, folds=2)
    for name, value in planted.items():
        assert found.constants[name][1] == pytest.approx(value, rel=0.15), name
    for fit in (*found.crossed, *found.rest):
        assert fit.median < 100 * 2 * NOISE + 3 < fit.before and fit.low <= fit.median <= fit.high
    assert sum(f.rows for f in found.crossed) == 24 and sum(f.rows for f in found.rest) == 12
    assert found.wanted and all(spread >= 0 for *_, spread in found.wanted)


def test_a_planted_fact_is_found(rng: np.random.Generator) -> None:
    planted = with_value(START, "decode.kv_native", False, "e4m3")
    rows = synthesised(planted, "attention_decode", decodes(rng, 16), rng)
    search = Search(START, samples({"attention_decode": rows}, 0.0))
    search.choose_facts()
    assert search.on.kernel("decode", "e4m3", 128).library.kv_native is False
    assert "decode.kv_native (fp8)" in search.facts
    assert np.median(np.abs(search.data[0].errors(search.on))) < 3 * NOISE


def test_constants_of_a_family_keep_the_ratio_of_its_kernels() -> None:
    slow = START.kernel("prefill", "e4m3", 192).library.mxu_efficiency
    now = value_of(START, "prefill.mxu_efficiency")
    other = with_value(START, "prefill.mxu_efficiency", now / 2)
    assert other.kernel("prefill", "e4m3", 192).library.mxu_efficiency == pytest.approx(slow / 2)
    assert other.kernel("decode", "bf16", 128) == START.kernel("decode", "bf16", 128)


def test_chosen_rows_span_the_latencies(rng: np.random.Generator) -> None:
    rows = synthesised(START, "matmul", products(rng, 60), rng)
    (sample,) = samples({"matmul": rows}, 0.0)
    picked = chosen(sample, 10)
    assert len(set(picked.tolist())) == 10
    assert {sample.us[picked].min(), sample.us[picked].max()} == {sample.us.min(), sample.us.max()}


def test_the_command_writes_files_that_give_the_fitted_target(tmp_path: Path, rng: np.random.Generator) -> None:
    file = tmp_path / "mine.csv"
    for_file = synthesised(START.changed({"chip.hbm_efficiency": 0.6}), "attention_decode", decodes(rng, 12), rng)
    with file.open("w", newline="") as f:
        writer = csv.DictWriter(f, list(for_file[0]))
        writer.writeheader()
        writer.writerows(for_file)
    words = ["calibrate", str(file), "--chip", "b200_sxm", "--output", str(tmp_path), "--folds", "2", "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    on = target(answer["files"][0])
    for name, (_, value) in answer["constants"].items():
        assert value_of(on, name) == value
    assert on.library.name == "b200_sxm_calibrated_library" and on.library.generation == "blackwell"
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 2 and "exists; remove it, or choose another --name" in again.output
    for name in ("../mine", "folder/mine", str(tmp_path / "mine")):
        refused = CliRunner().invoke(app, [*words, "--name", name])
        assert refused.exit_code == 2 and "give a name without folders" in " ".join(refused.output.split()), name


@pytest.mark.parametrize(("text", "why"), [("m,n\n1,2\n", "wanted those of a table"), ("m,n,k,us\n", "has no rows")])
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, text: str, why: str) -> None:
    file = tmp_path / "mine.csv"
    file.write_text(text)
    with file.open(newline="") as f, pytest.raises(ValueError, match=why):
        by_table({str(file): list(csv.DictReader(f))})


HEAD = "dtype,m,n,k,us\n"
GOOD = "bfloat16,64,64,64,30\n"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("dtype,m,k,us\nfp8,1,1,30\n", "column n is missing; needed are dtype, m, n, k, us"),
        (
            HEAD + GOOD + "float99,64,64,64,30\n",
            "row 2 below the header: dtype is 'float99'; allowed: one of bfloat16, ",
        ),
        (HEAD + GOOD + GOOD + "fp8,64,64\n", "row 3 below the header ends before column k"),
        (HEAD + "fp8,64,64,64,30,5\n", "row 1 below the header has more values than the header"),
        (HEAD + "fp8,many,64,64,30\n", "row 1 below the header: m is 'many'; allowed: a whole number"),
        (HEAD + "fp8,64,0,64,30\n", "row 1 below the header: n is '0'; allowed: a whole number of at least 1"),
        (
            HEAD + "fp8,64,64,64,\n",
            "row 1 below the header: us is ''; allowed: a finite number of microseconds above 0",
        ),
        *(
            (HEAD + f"fp8,64,64,64,{us}\n", f"us is '{us}'; allowed: a finite number")
            for us in ("nan", "0", "-3", "inf")
        ),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, text: str, why: str) -> None:
    """Both commands that read tables print one line with the file, and exit with code 2."""
    file = tmp_path / "h100_sxm_matmul.csv"
    file.write_text(text)
    for words in (["validate", str(tmp_path)], ["calibrate", str(file), "--chip", "h100_sxm"]):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 2 and done.stderr.startswith(f"error: {file}: ") and why in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_recurrent_table_needs_the_heads_of_the_delta_rule(tmp_path: Path) -> None:
    """Rows of convolutions alone do without them."""
    file, columns = tmp_path / "h100_sxm_recurrent.csv", "phase,kernel,batch,tokens,channels,conv_width"
    file.write_text(f"{columns},us\ncontext,causal_conv1d_fn,1,64,128,4,30\n")
    assert CliRunner().invoke(app, ["validate", str(tmp_path)]).exit_code == 0
    file.write_text(f"{columns},us\ncontext,chunk_gated_delta_rule,1,64,128,4,30\n")
    done = CliRunner().invoke(app, ["validate", str(tmp_path)])
    assert done.exit_code == 2 and "column n_k_heads, head_k_dim, n_v_heads, head_v_dim is missing" in done.stderr
    heads = "n_k_heads,head_k_dim,n_v_heads,head_v_dim"
    file.write_text(f"{columns},{heads},us\ncontext,chunk_gated_delta_rule,1,64,128,4,2,64,2,64,30\n")
    assert CliRunner().invoke(app, ["validate", str(tmp_path)]).exit_code == 0


def test_fewer_rows_than_folds_are_refused(rng: np.random.Generator) -> None:
    rows = synthesised(START, "matmul", products(rng, 3), rng)
    with pytest.raises(ValueError, match="3 rows; 4 folds need at least as many"):
        calibrate(START, samples({"matmul": rows}, 0.0))
    with pytest.raises(ChipError, match="mxu_efficiency=0; it must be above 0"):
        with_value(START, "library.mxu_efficiency", 0)
