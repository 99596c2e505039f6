"""Checks each row of tables (CSV) of measured kernels or servers before it is modelled; reads their integer columns."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from math import inf
from pathlib import Path

ATTENTION = ("kv_dtype", "batch", "query_len", "context_len", "n_heads", "n_kv_heads", "head_dim", "window")
MLA = ("kv_dtype", "batch", "query_len", "context_len", "n_heads")
NEEDED: dict[str, tuple[str, ...]] = {  # table of validate.py -> columns that its rows need, beside us
    "matmul": ("dtype", "m", "n", "k"),
    "attention_prefill": ATTENTION,
    "attention_decode": ATTENTION,
    "attention": ATTENTION,
    "collectives": ("op", "n_chips", "bytes"),
    "experts": ("dtype", "tokens", "hidden", "intermediate", "top_k", "n_experts", "tp", "ep", "load"),
    "quantise": ("m", "k"),
    "recurrent": ("phase", "kernel", "batch", "tokens", "channels", "conv_width"),
    "bmm": ("dtype", "tokens", "n_heads"),
    "mla_prefill": MLA,
    "mla_decode": MLA,
}
HEADS = ("n_k_heads", "head_k_dim", "n_v_heads", "head_v_dim")  # that rows of the gated delta rule need too
CONVOLUTION = "causal_conv1d"  # kernels of recurrent tables whose names begin so are convolutions
TEXTS = ("op", "kernel", "kernel_source", "load", "distribution", "phase")  # and all columns of formats
LOADS = re.compile(r"balanced|power_law_[0-9]+(\.[0-9]+)?")
PHASES = ("context", "generation")
TIMES = {"us": "microseconds", "silicon_ttft_ms": "milliseconds", "silicon_tpot_ms": "milliseconds"}  # measured
SIZES = ("batch_size", "tp_size", "pp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size")
APART = ("prefill_", "decode_")  # columns of the servers of a row of mode disagg start so
LENGTHS = ("isl", "osl")  # of the prompts and the responses of measured servers
SERVERS = ("concurrency", *SIZES, *(phase + name for phase in APART for name in (*SIZES, "num_workers")))  # or empty
MOST_TOKENS = 16 * 2**20  # of LENGTHS: above the context of every model
MOST_SERVERS = 2**16  # of SERVERS: each open request and each server takes memory and time in the simulation
ZERO = (  # columns that may be 0
    "context_len", "window", "step", "window_size", "num_key_value_heads",
    *(phase + name for phase in ("", *APART) for name in ("moe_tp_size", "moe_ep_size")),
)  # fmt: skip


class TableError(ValueError):
    """Raised for a table of measurements that lacks a column or has a value that is not allowed."""


def integers(row: Mapping[str, str], *names: str) -> list[int]:
    """The integers in the columns `names` of a row, as a list in the order of `names`.

    row: {column: text}, checked by check_rows().
    """
    return [int(row[name]) for name in names]


def needed(table: str, rows: Sequence[Mapping[str, str]]) -> tuple[str, ...]:
    """Names of the columns that a table must have, as a tuple, without the column `us` of measured microseconds.

    table: name of the table. The result is NEEDED[table]. A table of recurrent kernels needs the columns HEADS too,
    unless all its rows are convolutions.
    """
    heads = table == "recurrent" and any(not (r.get("kernel") or "").startswith(CONVOLUTION) for r in rows)
    return NEEDED[table] + (HEADS if heads else ())


def fault(column: str, value: str, formats: Collection[str]) -> str:
    """Check one value of a table's column. Returns "" if it is allowed, otherwise a text that says what is allowed.

    The text completes an error message, for example "a whole number of at least 1". formats: the number formats that
    are allowed in columns whose names end in dtype; empty: all formats.
    """
    if column.endswith("dtype"):
        return f"one of {', '.join(formats)}" if formats and value not in formats else ""
    if column == "phase":
        return "" if value in PHASES else "context or generation"
    if column in ("load", "distribution"):
        return "" if LOADS.fullmatch(value) else "balanced or power_law_A with a number A, such as power_law_1.2"
    if column in TEXTS:
        return "" if value else "a name"
    most = MOST_TOKENS if column in LENGTHS else MOST_SERVERS if column in SERVERS else inf
    least = 2 if column == "osl" else 0 if column in ZERO else 1  # a response of one token has no time per token
    try:
        if column in TIMES:
            good = 0 < float(value) < inf
        elif column in LENGTHS + SERVERS:  # may be written as 8.0, as some programs do if other rows are empty
            good = least <= float(value) <= most and float(value) % 1 == 0
        else:
            good = int(value) >= least
    except ValueError:
        good = False
    if good:
        return ""
    if column in TIMES:
        return f"a finite number of {TIMES[column]} above 0"
    return f"a whole number of at least {least}" if most == inf else f"a whole number from {least:,} to {most:,}"


def check_rows(
    path: Path | str, rows: Sequence[Mapping[str, str]], columns: Sequence[str], formats: Collection[str] = (),
    times: Sequence[str] = ("us",), optional: Sequence[str] = (),
) -> None:  # fmt: skip
    """Check the rows of a CSV file. Returns nothing if they are valid; raises TableError if they are not.

    The error names file, row, column and value. Errors are a missing column, a row with more or fewer values than the
    header, and a value that its column does not allow. Rows are counted from 1, the first below the header.

    Args:
        path: the file, for the message.
        rows: the rows, as csv.DictReader gives them. An empty list is valid.
        columns: names of the columns that must be there and are checked. The values in other columns are not checked.
        formats: the number formats that are allowed in columns whose names end in dtype; empty: all formats.
        times: names of the columns of measured times, keys of TIMES. They must be there and are checked too.
        optional: names of columns that may be missing or empty. A value in these columns is checked.
    """
    wanted = (*columns, *times)
    if rows and (missing := [c for c in wanted if c not in rows[0]]):
        raise TableError(f"{path}: column {', '.join(missing)} is missing; needed are {', '.join(wanted)}")
    for number, row in enumerate(rows, 1):
        if None in row:
            raise TableError(f"{path}: row {number} below the header has more values than the header; remove them")
        for column, value in row.items():
            if value is None:
                raise TableError(f"{path}: row {number} below the header ends before column {column}; add its value")
        for column in (*wanted, *(c for c in optional if row.get(c))):
            if allowed := fault(column, row[column], formats):
                raise TableError(
                    f"{path}: row {number} below the header: {column} is {row[column]!r}; allowed: {allowed}; "
                    "correct or remove the row"
                )
