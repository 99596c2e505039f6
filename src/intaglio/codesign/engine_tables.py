"""Measured tables of serving engines' kernels, `<chip>/<engine>_<table>.csv`: read, compared with the model, fitted.

Their rows are read as rows of the tables of validate.py. Column kernel_source names the kernel that ran; errors are
reported for each kernel. A row is modelled by the engine's kernel of that name (data/kernels), or by the chip's own
library, with the benchmark's conditions. Tables and formats that the closed forms do not cover are reported by name.
"""

from __future__ import annotations

import csv
import dataclasses
from collections import Counter
from collections.abc import Sequence
from math import prod
from pathlib import Path

from intaglio.chips import CHIPS, ChipError, Target, engine_library, target
from intaglio.chips.kernel_record import KernelRecord
from intaglio.codesign.calibrate import Fitted
from intaglio.codesign.kernel_fit import Case, calibrate_kernel
from intaglio.codesign.table_rows import check_rows, integers
from intaglio.codesign.validate import FORMAT, UNGATED, Record, Row, dtype_of, record
from intaglio.progress import Progress, counted, silent

ENGINES = ("vllm", "sglang", "trtllm")
FORMATS = tuple(FORMAT)
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
    "custom_allreduce": ("collectives", {"n_chips": "num_gpus", "elements": "message_size"}),
}  # fmt: skip
COLUMNS["scale_matrix"] = COLUMNS["computescale"] = "quantise", {"dtype": "quant_dtype", "m": "m", "k": "k"}
COLUMNS["gdn"] = "recurrent", {
    "phase": "phase", "batch": "batch_size", "tokens": "num_tokens", "conv_width": "d_conv", "n_k_heads": "num_k_heads",
    "head_k_dim": "head_k_dim", "n_v_heads": "num_v_heads", "head_v_dim": "head_v_dim",
}  # fmt: skip
COLUMNS["mamba2"] = "recurrent", {
    "phase": "phase", "batch": "batch_size", "tokens": "num_tokens", "conv_width": "d_conv", "n_v_heads": "nheads",
    "head_v_dim": "head_dim", "groups": "n_groups", "state": "d_state",
}  # fmt: skip
COLUMNS["mla_bmm"] = "bmm", {"dtype": "bmm_dtype", "tokens": "num_tokens", "n_heads": "num_heads"}
MLA = {
    "kv_dtype": "kv_cache_dtype",
    "batch": "batch_size",
    "query_len": "isl",
    "context_len": "step",
    "n_heads": "num_heads",
}
COLUMNS["context_mla"], COLUMNS["generation_mla"] = ("mla_prefill", MLA), ("mla_decode", MLA)
COLUMNS["generation_attention"] = "attention_decode", COLUMNS["context_attention"][1]
WORDY = ("fp8_block", "nvfp4", "w4a16_mxfp4", "w4a8_mxfp4_mxfp8")
NAMED = {"context_mla": "MLA", "generation_mla": "MLA", "computescale": "scale", "mamba2": "Mamba 2"}
NO_GATE = (*UNGATED, (4096, 2688), (8192, 5120))  # (hidden, inner) of experts that these benchmarks ran without a gate


def translated(table: str, row: Row, engine: str = "") -> dict[str, str] | None:
    """Returns a row of an engine's table with the column names of validate.TABLES, as a new dict.

    The new row also has a column `kernel`: the name that the file data/kernels/ENGINE.toml gives the measured kernel.
    The result is None if the row's number format is not one of FORMATS.

    table: name of the engine's table, a key of COLUMNS. engine: name of the engine; "": any.
    """
    _, columns = COLUMNS[table]
    out = {name: row[theirs] for name, theirs in columns.items()}
    kernel = row["kernel_source"]
    if table == "custom_allreduce":
        out |= {"op": "all_reduce", "bytes": str(2 * int(out["elements"]))}
    elif COLUMNS[table][0] == "recurrent":
        keys = ("n_k_heads", "head_k_dim") if "n_k_heads" in out else ("groups", "state")
        inputs = 2 * prod(integers(out, *keys))  # queries and keys
        values = prod(integers(out, "n_v_heads", "head_v_dim"))
        keys_only = engine == "trtllm" and table == "gdn" and kernel == "causal_conv1d_fn"  # what its benchmark runs
        out["channels"] = str(inputs // 2 if keys_only else inputs + values)
    elif dtype_of(out) not in FORMATS:
        return None
    if out.get("n_kv_heads") == "0":  # as many as query heads
        out["n_kv_heads"] = out["n_heads"]
    if row.get("attn_dtype") == "fp8":
        kernel += " (8-bit queries)"
    if out.get("dtype") in WORDY:  # kernels of one name for several formats of as many bits
        kernel += f" ({out['dtype']})"
    if table in NAMED:  # kernels of the same name stand in another table too
        kernel += f" ({NAMED[table]})"
    if table == "moe":
        gated = "nongated" not in kernel and (int(out["hidden"]), int(out["intermediate"])) not in NO_GATE
        out["gated"] = str(int(gated))
    return {**out, "us": row["us"], "kernel": kernel}


def read_rows(
    path: Path, table: str, min_us: float = 0.0, split: str | None = None
) -> tuple[list[dict[str, str]], int]:
    """Read a CSV file of an engine's kernel latencies. Returns (rows, number of rows in unknown number formats).

    The rows are a list of dicts {column: text}, with the column names of validate.TABLES and a column `split`. If the
    file has no column `split`, rows of the same kernel and number format get "fit" and "test" in turn. A row whose
    number format is not one of FORMATS is only counted.

    Args:
        path: the file.
        table: name of the engine's table, a key of COLUMNS, such as gemm.
        min_us: rows that took fewer microseconds are left out of the list.
        split: "fit" or "test": the list has only rows with this value of `split`; None: all rows.

    Raises TableError, a ValueError, for rows that check_rows() refuses.
    """
    with path.open(newline="") as f:
        rows = list(csv.DictReader(f))
    check_rows(path, rows, (*COLUMNS[table][1].values(), "kernel_source"))
    out, number = list[dict[str, str]](), Counter[tuple[str, str]]()
    for row in rows:
        found = translated(table, row, parts_of(path)[0])
        if found is not None:
            kind = found["kernel"], dtype_of(found)
            out.append({**found, "split": row.get("split") or ("fit", "test")[number[kind] % 2]})
            number[kind] += 1
    return [r for r in out if float(r["us"]) >= min_us and split in (None, r["split"])], len(rows) - len(out)


def parts_of(path: Path) -> tuple[str, str]:
    """Returns (engine, name of the table) from the name of a file <engine>_<table>.csv.

    The table is "" if the name has no underscore.
    """
    engine, _, table = path.stem.partition("_")
    return engine, table


def tables_of(folder: Path) -> list[tuple[Path, str, str, str]]:
    """Find the CSV files CHIP/ENGINE_TABLE.csv of measured kernel latencies in a folder.

    Returns a list of (file, chip, engine, name of the table), sorted by path. A file is left out if ENGINE is not one
    of ENGINES. Raises ValueError if no file remains, and if the folder CHIP of a file is not named after a chip.
    """
    paths = [p for p in sorted(folder.glob("*/*.csv")) if parts_of(p)[0] in ENGINES]
    if not paths:
        raise ValueError(f"{folder} holds no <chip>/<engine>_<table>.csv; engines are {', '.join(ENGINES)}")
    if unknown := next((p for p in paths if p.parent.name not in CHIPS), None):
        raise ValueError(
            f"{unknown}: no chip is called {unknown.parent.name!r}; chips are {', '.join(CHIPS)}. "
            f"Call the folder after one of them, or keep it out of {folder}"
        )
    return [(p, p.parent.name, *parts_of(p)) for p in paths]


def kinds(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Group rows by kernel and number format. Returns {(kernel, number format): list of rows}, sorted by the two names.

    rows: dicts {column: text} with a column `kernel`.
    """
    out: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda r: (r["kernel"], dtype_of(r))):
        out.setdefault((row["kernel"], dtype_of(row)), []).append(row)
    return out


def engine_target(chip: str, engine: str, constants: str = "") -> Target:
    """Returns the Target of a chip whose kernel library also has the kernels of a serving engine.

    The library is the chip's own, with the engine's kernels added. If the engine's kernels are not known, nothing is
    added. Raises ChipError for an unknown chip.

    Args:
        chip: name or file of the chip.
        engine: the engine's name, such as vllm.
        constants: generation of chips, such as hopper, whose fitted constants the engine's kernels get; "": the
            generation of this chip.
    """
    on = target(chip)
    return Target(on.chip, engine_library(engine, on.library, constants))


def validate_engines(
    folder: Path, min_us: float, worst: int, split: str | None = None, library_name: str = "engine"
) -> tuple[list[Record], list[str]]:
    """Compare modelled with measured times of serving engines' kernels. Returns (list of Records, list of remarks).

    There is one Record for each combination of chip, engine's table, kernel and number format. A remark is one line of
    text about a table or number formats that the closed forms do not cover.

    Args:
        folder: holds `<chip>/<engine>_<table>.csv`.
        min_us: rows that took fewer microseconds are left out.
        worst: how many rows with the largest errors a Record lists.
        split: "fit" or "test": only rows of this half, see read_rows(); None: all rows.
        library_name: which kernel library models the rows. "engine": the engine's kernel that the row names, or the
            chip's own library if that kernel is not known. "chip": the chip's own library. Any other text: the library
            of this name or file, on all chips.

    Raises ValueError if the folder has no such file; TableError, a ValueError, for rows that check_rows() refuses;
    ChipError if a chip cannot run a row's call, and for an unknown library.
    """
    records, left = list[Record](), list[str]()
    for path, chip, engine, table in tables_of(folder):
        name = path.stem
        if table not in COLUMNS:
            left.append(f"{chip} {name}: this table is not covered by the closed forms")
            continue
        rows, others = read_rows(path, table, min_us, split)
        if others:
            left.append(f"{chip} {name}: {others} rows are in formats other than {', '.join(FORMATS)}")
        if library_name == "engine":
            on = engine_target(chip, engine)
        else:
            on = target(chip, None if library_name == "chip" else library_name)
        for (kernel, dtype), mine in kinds(rows).items():
            try:
                records.append(record(on, COLUMNS[table][0], dtype, mine, worst, f"{name} {kernel}"))
            except ChipError as error:
                raise ChipError(f"{chip} {name} {kernel}: {error}") from None
    return records, left


def is_engine_table(path: Path) -> bool:
    """True if a file is a table of a serving engine.

    Such a file is called <engine>_<table>.csv and has a column kernel_source.
    """
    with path.open(newline="") as f:
        columns = next(csv.reader(f), [])
    return parts_of(path)[0] in ENGINES and "kernel_source" in columns


def calibrate_kernels(
    base: Target, paths: Sequence[Path], points: int, min_us: float, seed: int = 0, progress: Progress = silent
) -> tuple[Target, list[Fitted]]:
    """Fit a serving engine's kernels on a chip to a few measured rows of each kernel. Returns (Target, errors).

    The Target has the chip of `base`, and its library with the fitted kernels put first. `errors` is a list with a
    Fitted for each kernel and number format: the errors on the rows that were not used for the fit. A kernel with only
    one row of at least `min_us` microseconds is not fitted.

    Args:
        base: the chip with its own library.
        paths: tables of one engine, files <engine>_<table>.csv.
        points: maximum number of rows of a kernel to fit to, see kernel_fit.calibrate_kernel().
        min_us: rows that took fewer microseconds are left out.
        seed: seed of the random resamples that give the errors' confidence intervals.
        progress: called before each kernel.

    Raises ValueError if a file is not an engine's table, if the files are of several engines, if a table is not in
    COLUMNS, and if no kernel has two rows; TableError, a ValueError, for rows that check_rows() refuses.
    """
    engines = {parts_of(path)[0] for path in paths}
    if len(engines) != 1 or not all(is_engine_table(path) for path in paths):
        names = ", ".join(path.name for path in paths)
        raise ValueError(f"{names}: give tables of one engine, <engine>_<table>.csv; engines are {', '.join(ENGINES)}")
    engine, work = engines.pop(), list[tuple[str, str, list[Row]]]()
    for path in paths:
        table = parts_of(path)[1]
        if table not in COLUMNS:
            raise ValueError(f"{path}: no closed form covers this table; those covered are {', '.join(COLUMNS)}")
        rows, _ = read_rows(path, table, min_us)
        work += [(table, kernel, mine) for (kernel, _), mine in kinds(rows).items() if len(mine) > 1]
    if not work:
        raise ValueError(f"no kernel has two rows of {min_us:g} us or more; give --min-us")
    on = Target(base.chip, engine_library(engine, base.library))
    records, rest = list[KernelRecord](), list[Fitted]()
    for item in counted(work, progress, lambda item: item[1]):
        case = Case(base, COLUMNS[item[0]][0], tuple(item[2]))
        found, errors = calibrate_kernel(case, on, points, seed)
        records += found
        rest += [dataclasses.replace(errors, table=f"{item[0]} {item[1]}")] if errors else []
    kernels = (*records, *base.library.kernels)
    return Target(base.chip, dataclasses.replace(base.library, engine=engine, kernels=kernels)), rest
