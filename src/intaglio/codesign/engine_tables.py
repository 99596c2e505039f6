"""Reads tables of serving engines' kernels, `<chip>/<engine>_<table>.csv`, as rows of the tables of validate.py.

Column kernel_source names the kernel that ran; errors are reported by it. The chip's own kernel library is modelled,
with the benchmark's conditions. Tables and formats that the closed forms do not express are named.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from intaglio.chips import CHIPS, ChipError, target
from intaglio.codesign.validate import Record, Row, record

ENGINES = ("vllm", "sglang", "trtllm")
FORMATS = ("bfloat16", "fp8", "int8")
COLUMNS = {  # table of an engine -> (table of validate.py, its columns -> those of the engine's table)
    "gemm": ("matmul", {"dtype": "gemm_dtype", "m": "m", "n": "n", "k": "k"}),
    "context_attention": ("attention_prefill", {
        "kv_dtype": "kv_cache_dtype", "batch": "batch_size", "query_len": "isl", "context_len": "step",
        "n_heads": "num_heads", "n_kv_heads": "num_key_value_heads", "head_dim": "head_dim", "window": "window_size",
    }),
    "moe": ("experts", {
        "dtype": "moe_dtype", "tokens": "num_tokens", "hidden": "hidden_size", "intermediate": "inter_size",
        "top_k": "topk", "n_experts": "num_experts", "tp": "moe_tp_size", "ep": "moe_ep_size", "load": "distribution",
    }),
}  # fmt: skip
COLUMNS["generation_attention"] = "attention_decode", COLUMNS["context_attention"][1]


def translated(table: str, row: Row) -> dict[str, str] | None:
    """A row of an engine's table as a dict by the column names of validate.py.

    The column `kernel` has the name of the row's kernel. None if the row's number format is not one of FORMATS. table:
    name of the engine's table, a key of COLUMNS.
    """
    _, columns = COLUMNS[table]
    out = {name: row[theirs] for name, theirs in columns.items()}
    if (out.get("dtype") or out["kv_dtype"]) not in FORMATS:
        return None
    if out.get("n_kv_heads") == "0":  # as many as query heads
        out["n_kv_heads"] = out["n_heads"]
    return {**out, "us": row["us"], "kernel": row["kernel_source"]}


def validate_engines(folder: Path, min_us: float, worst: int) -> tuple[list[Record], list[str]]:
    """Compare modelled with measured times of serving engines' kernels. Returns (Records, remarks).

    There is a Record for each chip, engine's table, kernel and format, and a remark, one line of text, for each table
    or format that the closed forms do not express.

    Args:
        folder: holds `<chip>/<engine>_<table>.csv`.
        min_us: rows that took fewer microseconds are left out.
        worst: how many rows with the largest errors a Record lists.

    Raises ValueError if the folder has no such file, ChipError if a chip cannot run a row's call.
    """
    records, left = list[Record](), list[str]()
    paths = [p for p in sorted(folder.glob("*/*.csv")) if p.parent.name in CHIPS and p.stem.split("_")[0] in ENGINES]
    if not paths:
        raise ValueError(f"{folder} holds no <chip>/<engine>_<table>.csv; engines are {', '.join(ENGINES)}")
    for path in paths:
        table = path.stem.partition("_")[2]
        if table not in COLUMNS:
            left.append(f"{path.parent.name} {path.stem}: this table is not expressed by the closed forms")
            continue
        with path.open(newline="") as f:
            rows = [r for r in csv.DictReader(f) if float(r["us"]) >= min_us]
        found = [translated(table, r) for r in rows]
        if None in found:
            others = f"{found.count(None)} rows are not in a format expressed: {', '.join(FORMATS)}"
            left.append(f"{path.parent.name} {path.stem}: {others}")
        kept = [r for r in found if r is not None]
        records += by_kernel(path.parent.name, path.stem, COLUMNS[table][0], kept, worst)
    return records, left


def by_kernel(chip: str, name: str, table: str, rows: Sequence[dict[str, str]], worst: int) -> list[Record]:
    """Errors of the modelled times of one table, as a list of Records: one for each kernel and number format in it.

    Args:
        chip: name of the chip.
        name: what the Records call the table; the kernel's name is added.
        table: how the rows are modelled, a key of validate.TABLES.
        rows: the measured rows, with a column `kernel`.
        worst: how many rows with the largest errors a Record lists.

    Raises ChipError if the chip cannot run a row's call.
    """
    out = []
    for kernel, dtype in sorted({(r["kernel"], r.get("dtype") or r["kv_dtype"]) for r in rows}):
        mine = [r for r in rows if (r["kernel"], r.get("dtype") or r["kv_dtype"]) == (kernel, dtype)]
        try:
            out.append(record(target(chip), table, dtype, mine, worst, f"{name} {kernel}"))
        except ChipError as error:
            raise ChipError(f"{chip} {name} {kernel}: {error}") from None
    return out
