"""Tables of serving engines: rows are translated, kernels told apart, and what is not expressed is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from intaglio.chips import target
from intaglio.cli import app
from intaglio.codesign.engine_tables import validate_engines
from intaglio.silicon.kernels.product import linear_timing


def test_errors_are_reported_by_kernel_and_the_rest_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "h100_sxm"
    folder.mkdir()
    us = linear_timing(target("h100_sxm"), 4096, 4096, 4096).seconds * 1e6
    rows = [("slow", "bfloat16", 2 * us), ("exact", "bfloat16", us), ("four", "nvfp4", us), ("exact", "bfloat16", 0.1)]
    text = "".join(f"{kernel},{dtype},4096,4096,4096,{t}\n" for kernel, dtype, t in rows)
    (folder / "vllm_gemm.csv").write_text("kernel_source,gemm_dtype,m,n,k,us\n" + text)
    (folder / "vllm_gdn.csv").write_text("kernel_source,us\nconv,20\n")
    records, left = validate_engines(tmp_path, 1.0, 1)
    assert [(r.table, r.rows) for r in records] == [("vllm_gemm exact", 1), ("vllm_gemm slow", 1)]
    assert [r.median for r in records] == pytest.approx([0, 50])
    assert left == [
        "h100_sxm vllm_gdn: this table is not expressed by the closed forms",
        "h100_sxm vllm_gemm: 1 rows are not in a format expressed: bfloat16, fp8, int8",
    ]
    done = CliRunner().invoke(app, ["validate", str(tmp_path), "--min-us", "1"])
    assert done.exit_code == 0 and "not expressed by the closed forms" in " ".join(done.output.split())


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
