"""Measured kernels of serving engines: how rows become modelled calls, calibration, rows that are not covered."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from intaglio.chips import ChipError, Target, target
from intaglio.cli import app
from intaglio.codesign.engine_tables import (
    FORMATS,
    calibrate_kernels,
    engine_target,
    is_engine_table,
    read_rows,
    translated,
    validate_engines,
)
from intaglio.codesign.validate import predict, timing
from intaglio.silicon.kernels.product import linear_timing


def test_errors_are_reported_by_kernel_and_the_rest_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "h100_sxm"
    folder.mkdir()
    us = linear_timing(target("h100_sxm"), 4096, 4096, 4096).seconds * 1e6
    rows = [("slow", "bfloat16", 2 * us), ("exact", "bfloat16", us), ("four", "nvfp3", us), ("exact", "bfloat16", 0.1)]
    text = "".join(f"{kernel},{dtype},4096,4096,4096,{t}\n" for kernel, dtype, t in rows)
    (folder / "vllm_gemm.csv").write_text("kernel_source,gemm_dtype,m,n,k,us\n" + text)
    (folder / "vllm_msa_context_module.csv").write_text("kernel_source,us\nsparse,20\n")
    records, left = validate_engines(tmp_path, 1.0, 1)
    assert [(r.table, r.rows) for r in records] == [("vllm_gemm exact", 1), ("vllm_gemm slow", 1)]
    assert [r.median for r in records] == pytest.approx([0, 50])
    assert left == [
        f"h100_sxm vllm_gemm: 1 rows are in formats other than {', '.join(FORMATS)}",
        "h100_sxm vllm_msa_context_module: this table is not covered by the closed forms",
    ]
    done = CliRunner().invoke(app, ["validate", str(tmp_path), "--min-us", "1"])
    assert done.exit_code == 0 and "not covered by the closed forms" in " ".join(done.output.split())


def test_rows_alternate_between_fit_and_test_and_say_what_their_kernel_does(tmp_path: Path) -> None:
    head = (
        "kernel_source,batch_size,isl,num_heads,num_key_value_heads,head_dim,attn_dtype,kv_cache_dtype,step,window_size"
    )
    rows = [("fa3", "bfloat16", 8, 0), ("fa3", "fp8", 8, 2), ("fa3", "bfloat16", 8, 0), ("fa3", "bfloat16", 8, 4)]
    text = "".join(f"{k},1,512,{h},{kv},64,{a},fp8,0,0,30\n" for k, a, h, kv in rows)
    file = tmp_path / "sglang_context_attention.csv"
    file.write_text(f"{head},us\n{text}")
    found, others = read_rows(file, "context_attention")
    assert not others and is_engine_table(file)
    assert [(r["kernel"], r["split"], r["n_kv_heads"]) for r in found] == [
        ("fa3", "fit", "8"), ("fa3 (8-bit queries)", "fit", "2"), ("fa3", "test", "8"), ("fa3", "fit", "4"),
    ]  # fmt: skip
    file.write_text(f"{head},us,split\n{text.replace(',30', ',30,test')}")
    assert {r["split"] for r in read_rows(file, "context_attention")[0]} == {"test"}
    reduce = {"num_gpus": "8", "message_size": "4096", "us": "9", "kernel_source": "own"}
    assert (translated("custom_allreduce", reduce) or {})["bytes"] == "8192"


def test_experts_without_a_gate_are_known_by_kernel_and_by_shape() -> None:
    row = {"moe_dtype": "bfloat16", "num_tokens": "64", "topk": "6", "num_experts": "128", "moe_tp_size": "1",
           "moe_ep_size": "1", "distribution": "balanced", "us": "100"}  # fmt: skip
    for kernel, hidden, inner, gated in (
        ("cutlass", 4096, 1536, "1"), ("nongated", 4096, 1536, "0"), ("cutlass", 8192, 5120, "0"),
    ):  # fmt: skip
        found = translated(
            "moe", {**row, "kernel_source": kernel, "hidden_size": str(hidden), "inter_size": str(inner)}
        )
        assert found and found["gated"] == gated


@settings(max_examples=30, deadline=None)
@given(
    chip=st.sampled_from(["h100_sxm", "b200_sxm"]), phase=st.sampled_from(["context", "generation"]),
    batch=st.integers(1, 300), length=st.integers(1, 5000), heads=st.integers(1, 64), mamba=st.booleans(),
    kernel=st.sampled_from(["causal_conv1d_fn", "chunk_gated_delta_rule"]),
)  # fmt: skip
def test_recurrent_rows_take_longer_with_more_tokens_and_never_beat_the_memory(
    chip: str, phase: str, batch: int, length: int, heads: int, mamba: bool, kernel: str
) -> None:
    shape = {"batch_size": batch, "d_conv": 4}
    if mamba:
        table, kernel = "mamba2", "causal_conv1d_fn"
        shape |= {"nheads": heads, "head_dim": 64, "n_groups": 8, "d_state": 128}
    else:
        table, shape = (
            "gdn",
            {**shape, "num_k_heads": heads, "head_k_dim": 128, "num_v_heads": heads, "head_v_dim": 128},
        )
    rows = []
    for tokens in (batch * (length if phase == "context" else 1), 2 * batch * length):
        row = {**shape, "num_tokens": tokens, "kernel_source": kernel, "phase": phase, "us": 1}
        rows.append(translated(table, {name: str(value) for name, value in row.items()}) or {})
    on = target(chip)
    one, two = (timing(on, "recurrent", row) for row in rows)
    assert on.library.launch_s < one.seconds <= two.seconds
    assert two.hbm_bytes <= (two.seconds - on.library.launch_s) * on.chip.l2_rate
    width = 2 * heads * 128 + heads * 128 if not mamba else 2 * 8 * 128 + heads * 64
    assert rows[0]["channels"] == str(width)


@settings(max_examples=30, deadline=None)
@given(
    chip=st.sampled_from(["h100_sxm", "b200_sxm"]), batch=st.integers(1, 300), length=st.integers(1, 5000),
    rate=st.floats(0.5, 50), cycles=st.floats(0, 1e5), kernel=st.sampled_from(["causal_conv1d_fn", "chunk_delta"]),
    scan=st.sampled_from([1, 6]),
)  # fmt: skip
def test_recurrent_kernels_never_move_more_than_their_cores_do(
    chip: str, batch: int, length: int, rate: float, cycles: float, kernel: str, scan: int
) -> None:
    row = {"phase": "context", "kernel": kernel, "batch": str(batch), "tokens": str(batch * length),
           "channels": "2048", "conv_width": "4", "n_k_heads": "4",
           "head_k_dim": "128", "n_v_heads": "8", "head_v_dim": "128"}  # fmt: skip
    free = target(chip).with_library(scan_kernels=scan)
    bound = free.with_library(core_bytes_per_cycle=rate, row_cycles=cycles)
    found, least = (timing(on, "recurrent", row) for on in (bound, free))
    moved_s = found.hbm_bytes / (rate * free.chip.cores * free.chip.clock_hz)
    assert found.seconds >= max(least.seconds, moved_s) * (1 - 1e-9)
    jobs = batch * (2048 if kernel.startswith("causal") else 8) / free.chip.cores
    rows_s = jobs * cycles / free.chip.clock_hz if scan == 1 or kernel.startswith("causal") else 0.0
    assert found.seconds >= rows_s * (1 - 1e-9)


@pytest.mark.parametrize("chip", ["h100_sxm", "b200_sxm"])
def test_products_of_heads_move_all_bytes_where_a_loop_outgrows_the_l2(chip: str) -> None:
    on, row = target(chip), {"dtype": "bfloat16", "tokens": "16384", "n_heads": "64"}
    moved = 16384 * 64 * (128 + 512) * 2 + 64 * 128 * 512 * 2
    assert timing(on, "bmm", row).hbm_bytes == moved
    assert timing(on, "bmm", {**row, "tokens": "64", "n_heads": "1"}).hbm_bytes == 0


def test_the_keys_alone_are_convolved_in_one_engines_table() -> None:
    row = {"kernel_source": "causal_conv1d_fn", "phase": "context", "batch_size": "1", "num_tokens": "64",
           "d_conv": "4", "num_k_heads": "16", "head_k_dim": "128", "num_v_heads": "32", "head_v_dim": "64",
           "us": "9"}  # fmt: skip
    channels = {e: (translated("gdn", row, e) or {})["channels"] for e in ("vllm", "sglang", "trtllm")}
    assert channels == {"vllm": "6144", "sglang": "6144", "trtllm": "2048"}


@settings(max_examples=30, deadline=None)
@given(chip=st.sampled_from(["h100_sxm", "b200_sxm"]), batch=st.integers(1, 300), context=st.integers(1, 60_000),
       heads=st.sampled_from([1, 8, 16, 128]), dtype=st.sampled_from(["bfloat16", "fp8"]))  # fmt: skip
def test_latent_attention_reads_each_latent_once(chip: str, batch: int, context: int, heads: int, dtype: str) -> None:
    row = {"kernel_source": "k", "kv_cache_dtype": dtype, "batch_size": str(batch), "isl": "1", "num_heads": str(heads),
           "step": str(context), "us": "1"}  # fmt: skip
    found = translated("generation_mla", row)
    assert found and found["kernel"] == "k (MLA)"
    on = target(chip)
    spent = timing(on, "mla_decode", found)
    read = batch * (context + 1) * 576 * (1 if dtype == "fp8" else 2)
    longer = timing(on, "mla_decode", {**found, "context_len": str(context + 4096)})
    assert spent.seconds <= longer.seconds and spent.seconds >= (read - on.chip.l2_bytes) / on.chip.hbm_rate


def test_four_bit_weights_of_experts_are_read_as_such() -> None:
    on, row = target("b200_sxm"), {"tokens": "4", "hidden": "4096", "intermediate": "4096", "top_k": "8",
                                   "n_experts": "64", "tp": "1", "ep": "1", "load": "balanced"}  # fmt: skip
    found = {d: timing(on, "experts", {**row, "dtype": d}) for d in ("bfloat16", "fp8_block", "w4a16_mxfp4", "nvfp4")}
    weights = {name: t.weight_bytes for name, t in found.items()}
    assert weights["bfloat16"] == 2 * weights["fp8_block"]
    assert weights["w4a16_mxfp4"] == pytest.approx(weights["bfloat16"] * 4.25 / 16)
    assert weights["nvfp4"] == pytest.approx(weights["bfloat16"] * 4.5 / 16)


def engine_table(folder: Path, on: Target, kernel: str, seed: int, count: int = 40) -> Path:
    """A file vllm_gemm.csv with FP8 products of one kernel, as fast as on `on`."""
    rng, rows = np.random.default_rng(seed), []
    for _ in range(count):
        row = {name: str(int(2 ** rng.uniform(6, 13))) for name in "mnk"}
        us = predict(on, "matmul", [{**row, "dtype": "fp8", "kernel": kernel}])[0]
        rows.append(f"{kernel},fp8,{row['m']},{row['n']},{row['k']},{us}\n")
    folder.mkdir(exist_ok=True)
    (folder / "vllm_gemm.csv").write_text("kernel_source,gemm_dtype,m,n,k,us\n" + "".join(rows))
    return folder / "vllm_gemm.csv"


def test_a_named_kernel_is_the_engines_and_the_library_can_be_chosen(tmp_path: Path) -> None:
    kernel = "CutlassFP8ScaledMMLinearKernel"
    engine_table(tmp_path / "h100_sxm", engine_target("h100_sxm", "vllm"), kernel, 0)
    (own,), _ = validate_engines(tmp_path, 0.0, 0)
    (cold,), _ = validate_engines(tmp_path, 0.0, 0, library_name="chip")
    (ampere,), _ = validate_engines(tmp_path, 0.0, 0, library_name="ampere")
    assert own.median == pytest.approx(0, abs=1e-6) and cold.median > 2 and ampere.median != cold.median
    assert own.halves["fit"].rows == own.halves["test"].rows == 20
    (half,), _ = validate_engines(tmp_path, 0.0, 0, split="test")
    assert half.rows == 20
    done = CliRunner().invoke(app, ["validate", str(tmp_path), "--library", "chip"])
    assert done.exit_code == 0 and "fit, test: median errors" in " ".join(done.output.split())
    with pytest.raises(ChipError, match="unknown kernel library 'none'"):
        validate_engines(tmp_path, 0.0, 0, library_name="none")


def test_calibrate_fits_an_engines_kernels_and_writes_a_library(tmp_path: Path) -> None:
    """A kernel with half the matrix rate and a slower launch is found from 16 of 40 rows."""
    kernel, start = "CutlassFP8ScaledMMLinearKernel", engine_target("h100_sxm", "vllm")
    slower = start.with_library(mxu_efficiency=0.3, launch_s=6e-6)
    file = engine_table(tmp_path / "h100_sxm", slower, kernel, 1)
    asked = ["calibrate", str(file), "--chip", "h100_sxm", "--points", "16", "--output", str(tmp_path), "--min-us", "0"]
    done = CliRunner().invoke(app, [*asked, "--json"])
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    (rest,) = answer["rest"]
    assert rest["rows"] == 24 and rest["median"] < 0.4 * rest["before"]
    written = str(tmp_path / "h100_sxm_calibrated_library.toml")
    assert answer["files"][1] == written
    (found,), _ = validate_engines(tmp_path, 0.0, 0, library_name=written)
    assert found.median < 0.4 * rest["before"]
    words = ["calibrate", str(file), "--chip", answer["files"][0], "--output", str(tmp_path / "h100_sxm")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2 and "as their base; write them beside it, with --output" in done.stderr
    assert list((tmp_path / "h100_sxm").glob("*.toml")) == []


def test_calibrate_takes_tables_of_one_engine(tmp_path: Path) -> None:
    head = "kernel_source,gemm_dtype,m,n,k,us\n"
    for name in ("vllm_gemm.csv", "sglang_gemm.csv", "vllm_msa.csv", "mine.csv"):
        (tmp_path / name).write_text(head)
    base = target("h100_sxm")
    for names, why in (
        (["vllm_gemm.csv", "sglang_gemm.csv"], "give tables of one engine"),
        (["vllm_gemm.csv", "mine.csv"], "give tables of one engine"),
        (["vllm_msa.csv"], "no closed form covers this table; those covered are gemm"),
        (["vllm_gemm.csv"], "no kernel has two rows"),
    ):
        with pytest.raises(ValueError, match=why):
            calibrate_kernels(base, [tmp_path / name for name in names], 24, 20.0)


def test_a_table_of_servers_is_left_out(tmp_path: Path) -> None:
    """serving.csv beside tables of kernels or of engines stops neither; the line names the command for it."""
    us = linear_timing(target("h100_sxm"), 4096, 4096, 4096).seconds * 1e6
    engines, kernels = tmp_path / "engines", tmp_path / "kernels"
    (engines / "h100_sxm").mkdir(parents=True)
    kernels.mkdir()
    names = {engines / "h100_sxm" / "vllm_gemm.csv": "gemm_dtype", kernels / "h100_sxm_matmul.csv": "dtype"}
    for file, dtype in names.items():
        file.write_text(f"kernel_source,{dtype},m,n,k,us\ncublas,bfloat16,4096,4096,4096,{us}\n")
    for folder in (engines, kernels):
        (folder / "serving.csv").write_text("backend\nvllm\n")
        done = CliRunner().invoke(app, ["validate", str(folder)])
        text = " ".join(done.output.split())
        assert done.exit_code == 0 and "serving.csv is left out" in text and "use validate-serving" in text


def test_a_folder_without_tables_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no <chip>/<engine>_<table>.csv; engines are vllm, sglang, trtllm"):
        validate_engines(tmp_path, 0.0, 1)


def test_a_folder_called_like_no_chip_is_named_also_beside_others(tmp_path: Path) -> None:
    for folder in ("h100_sxm", "h800_sxm"):
        engine_table(tmp_path / folder, engine_target("h100_sxm", "vllm"), "CutlassFP8ScaledMMLinearKernel", 0)
    with pytest.raises(ValueError, match=r"h800_sxm/vllm_gemm.csv: no chip is called 'h800_sxm'; chips are a100_sxm"):
        validate_engines(tmp_path, 0.0, 1)
    done = CliRunner().invoke(app, ["validate", str(tmp_path)])
    assert done.exit_code == 2 and "no chip is called 'h800_sxm'" in done.stderr


@pytest.mark.parametrize("chip", ["a100_sxm", "l40s", "h200_sxm", "gb200"])
def test_a_chip_without_constants_of_its_own_is_validated_and_calibrated(tmp_path: Path, chip: str) -> None:
    """A kernel slower than on the chip whose constants it has is found from 16 of 40 rows."""
    kernel, lent = "CutlassFP8ScaledMMLinearKernel", engine_target(chip, "vllm")
    file = engine_table(tmp_path / chip, lent.with_library(mxu_efficiency=0.4, launch_s=6e-6), kernel, 2)
    (cold,), _ = validate_engines(tmp_path, 0.0, 0)
    assert cold.chip == chip and cold.median > 5
    (rest,) = calibrate_kernels(target(chip), [file], 16, 0.0)[1]
    assert rest.rows == 24 and rest.median < 0.5 * rest.before


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("kernel_source,gemm_dtype,m,n,us\nk,fp8,1,1,30\n", "vllm_gemm.csv: column k is missing"),
        ("kernel_source,gemm_dtype,m,n,k,us\nk,fp8,1,1,-1,30\n", "vllm_gemm.csv: row 1 below the header: k is '-1'"),
        ("kernel_source,gemm_dtype,m,n,k,us\nk,fp8,1,1,1,nan\n", "vllm_gemm.csv: row 1 below the header: us is 'nan'"),
    ],
)
def test_a_bad_row_of_an_engines_table_is_named(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "h100_sxm").mkdir()
    file = tmp_path / "h100_sxm" / "vllm_gemm.csv"
    file.write_text(text)
    for words in (
        ["validate", str(tmp_path)],
        ["calibrate", str(file), "--chip", "h100_sxm", "--output", str(tmp_path)],
    ):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 2 and why in done.stderr


def test_validate_refuses_options_and_folders_that_leave_nothing(tmp_path: Path) -> None:
    file = tmp_path / "h100_sxm_matmul.csv"
    file.write_text("dtype,m,n,k,us\nbfloat16,64,64,64,30\n")
    for words, why in (
        ([tmp_path, "--split", "foo"], "--split is 'foo'; give fit or test"),
        ([tmp_path, "--min-us", "nan"], "--min-us is nan; give a finite number of at least 0"),
        ([tmp_path, "--min-us", "-5"], "--min-us is -5; give a finite number of at least 0"),
        ([tmp_path / "none"], "none does not exist; give a folder"),
        ([file], "h100_sxm_matmul.csv is not a folder"),
        ([tmp_path, "--min-us", "1e9"], "took 1e+09 us or more: change --min-us, --split or the tables"),
        ([tmp_path, "--split", "test"], "took 0 us or more and is of split test: change"),
    ):
        done = CliRunner().invoke(app, ["validate", *map(str, words)])
        assert done.exit_code == 2 and why in done.stderr, done.output
        assert done.stderr.count("\n") == 1
    file.write_text("dtype,m,n,k,us\n")
    done = CliRunner().invoke(app, ["validate", str(tmp_path)])
    assert done.exit_code == 2 and f"no row in {tmp_path} took 0 us or more" in done.stderr
