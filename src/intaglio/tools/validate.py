"""Predicted against measured: tables of kernel latencies of real parts, and what the machine says of the same calls.

A table is `<chip>_<what>.csv` with a column `us`; `split` says which rows found the chip's constants (fit) and which
judge them (test). What a row's call consists of is said here, once; how long that takes is the machine's business.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from intaglio.chips import CHIPS, ChipSpec, chip
from intaglio.silicon.kernels.attention import Heads, attend_timing, kv_write_timing
from intaglio.silicon.kernels.experts import experts_timing, move
from intaglio.silicon.kernels.linear import linear_timing
from intaglio.silicon.network import collective_timing

Row = Mapping[str, str]
FORMAT = {"bfloat16": "bf16", "float16": "f16", "fp8": "e4m3", "int8": "int8"}
COLLECTIVE = {"alltoall": "all_to_all"}
QUANTISE_LAUNCHES = 3  # kernels that find the largest value, scale, and round, before an FP8 product
QUANTISE_BYTES = 8.0  # that they move for each value of a bf16 activation
UNGATED = ((2688, 1856), (1024, 2688), (2048, 5120))  # hidden and inner width of Nemotron 3's experts: relu2, no gate
ATTEND_LAUNCHES = 3  # kernels of one attention call: rope and pages, offsets, attention


def whole(row: Row, *names: str) -> list[int]:
    return [int(row[name]) for name in names]


def matmul(spec: ChipSpec, row: Row) -> float:
    """A linear: x in bf16; with FP8 weights x is rounded first, by kernels of its own."""
    m, n, k = whole(row, "m", "n", "k")
    format = FORMAT[row["dtype"]]
    seconds = linear_timing(spec, m, n, k, format, format).seconds
    if format not in ("bf16", "f16"):
        launch = (QUANTISE_LAUNCHES - 1) * spec.constants.launch_s
        seconds += launch + move(spec, m * k * QUANTISE_BYTES)
    return seconds


def attention(spec: ChipSpec, row: Row) -> float:
    """An attention call: queries, keys and values are read, keys and values go to their pages, then attention."""
    batch, q, before, heads, kv, d, window = whole(
        row, "batch", "query_len", "context_len", "n_heads", "n_kv_heads", "head_dim", "window"
    )
    h = Heads(heads, kv, d, d, window, 8 if row["kv_dtype"] == "fp8" else 16)
    tokens = batch * q
    first = kv_write_timing(spec, tokens, h).seconds + tokens * (2 * heads + 2 * kv) * d * 2 / spec.hbm_rate
    rest = (ATTEND_LAUNCHES - 2) * spec.constants.launch_s
    return first + rest + attend_timing(spec, h, ((q, before + q, batch),)).seconds


def collective(spec: ChipSpec, row: Row) -> float:
    n, moved = whole(row, "n_chips", "bytes")
    return collective_timing(spec, COLLECTIVE.get(row["op"], row["op"]), n, moved).seconds


def experts(spec: ChipSpec, row: Row) -> float:
    """A routed-expert layer of the most loaded rank."""
    tokens, hidden, inner, top_k, n, tp, ep = whole(
        row, "tokens", "hidden", "intermediate", "top_k", "n_experts", "tp", "ep"
    )
    older = spec.flash < 3  # benchmark: it put a gate before every model's experts
    counts = loads(tokens, top_k, n, ep, row["load"], in_order=older)
    format, gated = FORMAT[row["dtype"]], older or (hidden, inner) not in UNGATED
    inner = max(1, inner // tp)
    return experts_timing(spec, tokens, top_k, counts, n, hidden, inner, format, format, gated=gated).seconds


def loads(tokens: int, top_k: int, n: int, ep: int, load: str, in_order: bool) -> tuple[int, ...]:
    """Rows of each expert on the most loaded of `ep` ranks. `balanced` spreads them evenly; `power_law_a` draws shares
    by the quantiles of a power law between 1 and 0.8 tokens, as the benchmark did; what rounding leaves goes to the
    largest, ties to the first expert (`in_order`, the older benchmark) or to any."""
    total = tokens * top_k
    if load == "balanced":
        spread = np.bincount(np.arange(total) * n // total, minlength=n) if total < n else np.full(n, total // n)
        spread[: total - int(spread.sum())] += 1
        return tuple(int(v) for v in spread[: n // ep])
    a = float(load.rsplit("_", 1)[1])
    u = 1 - (np.random.default_rng(0).permutation(n) + 0.5) / n
    low, high = 1.0, max(1.0001, 0.8 * tokens)
    share = ((high ** (1 - a) - low ** (1 - a)) * u + low ** (1 - a)) ** (1 / (1 - a))
    counts = np.minimum(np.round(share / share.sum() * total).astype(int), tokens)
    order = np.argsort(-counts if in_order else -share, kind="stable")
    left, i = total - int(counts.sum()), 0
    while left:
        j = order[i % n] if left > 0 else order[-1 - i % n]
        if left > 0 and counts[j] < tokens:
            counts[j], left = counts[j] + 1, left - 1
        elif left < 0 and counts[j] > 0:
            counts[j], left = counts[j] - 1, left + 1
        i += 1
    ranks = counts.reshape(ep, -1)
    return tuple(int(v) for v in ranks[ranks.sum(axis=1).argmax()])


TABLES: dict[str, Callable[[ChipSpec, Row], float]] = {
    "matmul": matmul,
    "attention_prefill": attention,
    "attention_decode": attention,
    "collectives": collective,
    "experts": experts,
}


@dataclass(frozen=True)
class Record:
    """One chip, table and number format. Errors are (predicted - measured) / measured, in per cent."""

    chip: str
    table: str
    dtype: str
    rows: int
    median: float
    mean: float
    bias: float
    worst: tuple[tuple[str, float, float], ...]  # the row in words, measured us, predicted us


def tables(folder: Path) -> dict[tuple[str, str], list[dict[str, str]]]:
    """Rows of every `<chip>_<table>.csv` in the folder. Raises ValueError for a chip or a table nobody knows."""
    found = {}
    for path in sorted(folder.glob("*.csv")):
        name = next((c for c in sorted(CHIPS, key=len, reverse=True) if path.stem.startswith(c + "_")), None)
        table = path.stem[len(name) + 1 :] if name else ""
        if name is None or table not in TABLES:
            raise ValueError(
                f"{path}: wanted <chip>_<table>.csv; chips are {', '.join(CHIPS)}, tables {', '.join(TABLES)}"
            )
        with path.open(newline="") as f:
            found[name, table] = list(csv.DictReader(f))
    if not found:
        raise ValueError(f"{folder} holds no <chip>_<table>.csv; tables are {', '.join(TABLES)}")
    return found


def dtype_of(row: Row) -> str:
    return row.get("dtype") or row.get("kv_dtype") or "two bytes"


def predict(spec: ChipSpec, table: str, rows: Iterable[Row]) -> np.ndarray:
    """Microseconds of each row."""
    return np.array([TABLES[table](spec, row) for row in rows]) * 1e6


def measured(rows: Sequence[Row]) -> np.ndarray:
    return np.array([float(row["us"]) for row in rows])


def validate(folder: Path, split: str | None = None, min_us: float = 0.0, worst: int = 5) -> list[Record]:
    """Every chip, table and dtype, over rows of this split that took at least `min_us` microseconds."""
    out = []
    for (name, table), rows in tables(folder).items():
        for dtype in sorted({dtype_of(r) for r in rows}):
            mine = [
                r for r in rows
                if dtype_of(r) == dtype and split in (None, r.get("split")) and float(r["us"]) >= min_us
            ]  # fmt: skip
            if mine:
                out.append(record(name, table, dtype, mine, predict(chip(name), table, mine), worst))
    return out


def record(name: str, table: str, dtype: str, rows: Sequence[Row], predicted: np.ndarray, worst: int) -> Record:
    us = measured(rows)
    error = (predicted / us - 1) * 100
    far = np.argsort(-np.abs(error))[:worst]
    size = np.abs(error)
    return Record(
        name, table, dtype, len(rows), float(np.median(size)), float(size.mean()), float(error.mean()),
        tuple((words(rows[i]), float(us[i]), float(predicted[i])) for i in far),
    )  # fmt: skip


def words(row: Row) -> str:
    return " ".join(f"{k}={v}" for k, v in row.items() if k not in ("us", "split", "dtype", "kv_dtype"))


def as_dict(r: Record) -> dict[str, Any]:
    """For JSON: what was asked for first."""
    return {
        "chip": r.chip, "table": r.table, "dtype": r.dtype, "rows": r.rows,
        "median_abs_error_pct": round(r.median, 3), "mean_abs_error_pct": round(r.mean, 3),
        "bias_pct": round(r.bias, 3),
        "worst": [{"row": w, "measured_us": m, "predicted_us": round(p, 3)} for w, m, p in r.worst],
    }  # fmt: skip
