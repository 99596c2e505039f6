"""Compares modelled with measured kernel latencies, for tables of measurements of real chips.

A table is a file `<chip>_<table>.csv` with the measured latency in column `us`. Column `split` marks rows to which the
chip's constants were fitted (`fit`) and rows for testing them (`test`). The functions here translate a row into kernel
calls; intaglio.silicon models their times.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from intaglio import formats
from intaglio.chips import CHIPS, Target, target
from intaglio.chips.kernel_record import KernelRecord
from intaglio.codesign.conditions import conditions
from intaglio.codesign.recurrent_tables import recurrent
from intaglio.codesign.regime import REGIMES, Call
from intaglio.codesign.table_rows import check_rows, integers, needed
from intaglio.progress import Progress, counted, silent
from intaglio.silicon.kernels.attend import attend_timing
from intaglio.silicon.kernels.collectives import collective_timing
from intaglio.silicon.kernels.experts import core_rate, elementwise_seconds, experts_timing
from intaglio.silicon.kernels.kv_write import Heads, kv_write_timing
from intaglio.silicon.kernels.product import linear_timing
from intaglio.silicon.timing import Timing

Row = Mapping[str, str]
FORMAT = {  # number format of a table -> that of keys and values, or of weights
    "bfloat16": "bf16", "float16": "f16", "fp8": "e4m3", "int8": "int8", "fp8_block": "e4m3", "nvfp4": "e2m1",
    "int4_wo": "int4", "w4a16_mxfp4": "e2m1", "w4a8_mxfp4_mxfp8": "e2m1",
}  # fmt: skip
X_FORMAT = {"int4_wo": "bf16", "w4a16_mxfp4": "bf16", "w4a8_mxfp4_mxfp8": "e4m3"}  # of activations, if another
W_BITS = {"nvfp4": 4.5, "int4_wo": 4.125, "w4a16_mxfp4": 4.25, "w4a8_mxfp4_mxfp8": 4.25}  # of a weight with its scales
MLA_PROMPT, MLA_LATENT = (192, 128), (576, 512)  # widths of a key and a value of DeepSeek-V3, and of cached latents
COLLECTIVE = {"alltoall": "all_to_all"}
QUANTISE_HELD = 4.0  # bytes of the L2 that a value takes meanwhile: bf16, the 8-bit result, and lines of other data
TAIL_ROWS = 20  # of so many rows, the one with the largest error counts among the causes of errors
UNGATED = ((2688, 1856), (1024, 2688), (2048, 5120))  # (hidden, inner) of Nemotron 3's experts: relu2, no gate


def matmul(on: Target, row: Row) -> Timing:
    """The modelled Timing of the matrix product that a measured row describes.

    row: the row of a measured table that gives sizes and number format. If the activations have 8 or 4 bits, the Timing
    includes the kernels that quantise them from bf16. Raises ChipError if the chip's arrays do not take the number
    format.
    """
    m, n, k = integers(row, "m", "n", "k")
    format, x_format, w_bits = formats_of(row)
    warm = stay_in_l2(on, n * k, w_bits)
    product = linear_timing(on, m, n, k, x_format, format, w_bits, resident=warm)
    return product if formats.bits(x_format) >= 16 else product + quantise(on, m, k)


def stay_in_l2(on: Target, weights: int, w_bits: float, others: float = 0.0) -> bool:
    """True if the weights of a matrix product stay in the L2 cache while a benchmark repeats the product.

    The benchmark uses several copies of the weights in turn, see Conditions.weight_copies. All copies must fit.
    weights: number of weights in one copy. w_bits: bits per weight, with its scales. others: bytes of other data that
    must fit too.
    """
    copies = conditions(on.library).weight_copies * weights * w_bits / 8
    return copies + others <= on.chip.l2_bytes * on.library.l2_usable


def formats_of(row: Row) -> tuple[str, str, float]:
    """Number formats from a row's dtype: (of weights, of activations, bits per weight with its scales)."""
    format = FORMAT[row["dtype"]]
    return format, X_FORMAT.get(row["dtype"], format), W_BITS.get(row["dtype"], formats.bits(format))


def quantise(on: Target, m: int, k: int) -> Timing:
    """The modelled Timing (seconds and busy times) of the kernels that quantise activations before a matrix product.

    The activations are bf16 [m, k]. The kernel library's fields quantise_launches, quantise_bytes and row_cycles
    describe these kernels. If quantise_launches is 0, no kernel runs and the Timing is 0 s.
    """
    if not on.library.quantise_launches:
        return Timing(0.0)
    launches = on.library.quantise_launches * on.library.launch_s
    moved_s = elementwise_seconds(on, m * k * on.library.quantise_bytes, m * k * QUANTISE_HELD) - on.library.launch_s
    rows_s = -(-m // on.chip.cores) * on.library.row_cycles / on.chip.clock_hz
    return Timing(launches + max(moved_s, rows_s), {"L2": moved_s})


def quantised(on: Target, row: Row) -> Timing:
    """The modelled Timing of the kernels that quantise bf16 activations [m, k]. row: a measured row with m and k."""
    return quantise(on, *integers(row, "m", "k"))


def bmm(on: Target, row: Row) -> Timing:
    """The modelled Timing of a batched matrix product of DeepSeek-V3: queries times key up-projections, per head.

    For each head, queries [tokens, 128] are multiplied by the head's key up-projection [128, 512]. If the queries have
    8 or 4 bits, the Timing includes the kernels that quantise them from bf16. row: a row of a measured table, {column:
    text}, with dtype, tokens and n_heads. Raises ChipError if the chip's arrays do not take the number format.
    """
    tokens, heads = integers(row, "tokens", "n_heads")
    format, x_format, w_bits = formats_of(row)
    width, latent = MLA_PROMPT[1], MLA_LATENT[1]
    values = tokens * heads * (width * formats.bits(x_format) / 8 + latent * 2.0)  # bytes of x and of the result
    warm = stay_in_l2(on, heads * latent * width, w_bits, values)
    product = linear_timing(
        on, tokens, latent, width, x_format, format, w_bits, resident=warm, heads=heads, streamed=not warm
    )
    return product if formats.bits(x_format) >= 16 else product + quantise(on, tokens * heads, width)


def attention(on: Target, row: Row) -> Timing:
    """The modelled Timing of the attention call that a row of a measured table describes.

    The Timing includes the rotation of queries and keys, and the write of the new keys and values to the K/V cache.
    Raises ChipError if the chip's arrays do not take the format.
    """
    batch, q, before, heads, kv, d, window = integers(
        row, "batch", "query_len", "context_len", "n_heads", "n_kv_heads", "head_dim", "window"
    )
    h = Heads(heads, kv, d, d, window, 8 if row["kv_dtype"] == "fp8" else 16)
    attended = attend_timing(on, h, ((q, before + q, batch),), conditions(on.library).warm_cache)
    launches = on.library.attention_launches - 2  # attention and cache write have their own
    rest = Timing(launches * on.library.launch_s) + cast(
        on, batch * before * h.kv_heads * h.kv_width(on.library), h.bits
    )
    return attended + prepared(on, batch * q, h) + rest


def prepared(on: Target, tokens: int, h: Heads) -> Timing:
    """The modelled Timing of the work before attention: rotate queries and keys, write keys and values to the cache.

    If the library's `fused_rotation` is True, one kernel does both and reads keys and values once. Otherwise the
    rotation's bytes are added to the time of the kernel that writes the cache. Bytes move at the rate of HBM or at
    core_rate(), whichever is lower. tokens: number of new tokens. h: numbers and widths of the attention heads.
    """
    rate, fused = min(on.chip.hbm_rate, core_rate(on)), on.library.fused_rotation
    of_head = 4.0 + h.bits / 4 if fused else 4.0  # bytes of a K/V head for each of its columns
    moved = tokens * h.head_dim * (4.0 * h.heads + of_head * h.kv_heads)
    timing = Timing(moved / rate, {"HBM": moved / on.chip.hbm_rate}, moved, moved)
    return timing + (Timing(on.library.launch_s) if fused else kv_write_timing(on, tokens, h))


def cast(on: Target, values: float, bits: int) -> Timing:
    """The modelled Timing of a kernel that converts cached keys and values to bf16 before attention.

    No such kernel runs, and the Timing is 0 s, if the library's kv_cast_bytes is 0, if the cached values have more than
    8 bits, or if `values` is 0. values: number of cached key and value elements that attention reads. bits: bits per
    element.
    """
    moved = values * on.library.kv_cast_bytes
    if not moved or bits > 8:
        return Timing(0.0)
    seconds = moved / on.chip.hbm_rate
    return Timing(on.library.launch_s + seconds, {"HBM": seconds}, moved, moved)


def latent_attention(on: Target, row: Row) -> Timing:
    """The modelled Timing of the attention call of DeepSeek-V3 (MLA) that a row of a measured table describes.

    The Timing includes the write of the new latents to the cache. With one query per sequence, all heads attend to the
    cached latents. With more queries (prompts), each query head has its own key head and value head, in bf16.
    """
    batch, q, before, heads = integers(row, "batch", "query_len", "context_len", "n_heads")
    bits = 8 if row["kv_dtype"] == "fp8" else 16
    h = Heads(heads, heads, *MLA_PROMPT)
    if q == 1:
        h = Heads(heads, 1, *MLA_LATENT, bits=bits, values_in_keys=True)
    half = MLA_LATENT[0] // 2  # kv_write counts keys and values; a latent is one row
    launches = on.library.attention_launches - 2
    attended = attend_timing(on, h, ((q, before + q, batch),), conditions(on.library).warm_cache)
    written = kv_write_timing(on, batch * q, Heads(1, 1, half, half, bits=bits))
    written += cast(on, batch * before * MLA_LATENT[0], bits)
    return attended + written + Timing(launches * on.library.launch_s)


def collective(on: Target, row: Row) -> Timing:
    """The modelled Timing of the collective that a measured row describes.

    row: the row of a measured table that names the collective and gives chips and bytes. Raises ChipError if the chip
    cannot run the collective.
    """
    n, moved = integers(row, "n_chips", "bytes")
    return collective_timing(on, COLLECTIVE.get(row["op"], row["op"]), n, moved)


def experts(on: Target, row: Row) -> Timing:
    """The modelled Timing of a layer of routed experts, on the rank that gets the most tokens.

    row: the row of a measured table that gives the layer's sizes, number format, ranks and load. Raises ChipError if
    the chip's arrays do not take the number format.
    """
    tokens, hidden, inner, top_k, n, tp, ep = integers(
        row, "tokens", "hidden", "intermediate", "top_k", "n_experts", "tp", "ep"
    )
    how = conditions(on.library)
    older = how.older_experts  # the older benchmark gave every model's experts a gate
    counts = expert_rows(tokens, top_k, n, ep, row["load"], in_order=older)
    format, x_format, w_bits = formats_of(row)
    gated = older or (hidden, inner) not in UNGATED
    gated = row["gated"] == "1" if "gated" in row else gated
    inner = max(1, inner // tp)
    kernel = how.expert_kernels.get(row["dtype"], "")
    kernel = kernel if any(r.kernel == kernel for r in on.library.kernels) else ""  # another library on the chip
    layer = on, tokens, top_k, counts, n, hidden, inner, x_format, format, w_bits
    return experts_timing(*layer, gated=gated, kernel=kernel)


def expert_rows(tokens: int, top_k: int, n: int, ep: int, load: str, in_order: bool) -> tuple[int, ...]:
    """How many rows each expert on the most loaded of `ep` ranks computes, as a tuple with one int per expert.

    Args:
        tokens: number of tokens in the batch.
        top_k: number of experts of each token, so that tokens * top_k rows are computed on all ranks.
        n: number of experts on all ranks.
        ep: number of ranks that share the experts.
        load: how the benchmark distributed the rows. "balanced": evenly. "power_law_A", such as power_law_1.2: in
            proportion to n evenly spaced quantiles of the density x**-A on 1 <= x <= 0.8 * tokens, in a fixed random
            order, with at most `tokens` rows per expert.
        in_order: the order in which experts get the rows that are missing after counts were rounded. True (the older
            benchmark): by rounded count, the largest first. False: by count before rounding, the largest first. If
            there are too many rows after rounding, experts lose rows in the reverse order.
    """
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


def record_of_row(on: Target, table: str, row: Row) -> KernelRecord | None:
    """The library's KernelRecord (description) of the kernel that a measured row names in its column `kernel`.

    Returns None if the row names no kernel, or if the library of `on` has no record of this name for the row's number
    format and head width. table: name of the row's table, a key of TABLES.
    """
    if not (name := row.get("kernel", "")):
        return None
    how = FAMILY[table], FORMAT.get(dtype_of(row), ""), int(row.get("head_dim", 0)), name
    return next((r for r in on.library.kernels if r.serves(*how)), None)


def timing(on: Target, table: str, row: Row) -> Timing:
    """The modelled Timing of the kernel call that a measured row describes.

    If the row names a kernel and the library has it (see record_of_row()), this kernel is timed, otherwise the
    library's default kernels. table: name of the row's table, a key of TABLES. Raises ChipError if the chip cannot run
    the call.
    """
    record = record_of_row(on, table, row)
    return TABLES[table](on.reduced(record) if record else on, row)


SERVING = "serving.csv"  # of measured servers, beside the tables of kernels
TABLES: dict[str, Callable[[Target, Row], Timing]] = {
    "matmul": matmul,
    "attention_prefill": attention,
    "attention_decode": attention,
    "collectives": collective,
    "experts": experts,
    "quantise": quantised,
    "recurrent": recurrent,
    "bmm": bmm,
    "mla_prefill": latent_attention,
    "mla_decode": latent_attention,
}
FAMILY = {  # table -> the op of the kernel records that describe its kernels
    "matmul": "products", "attention_prefill": "prefill", "attention_decode": "decode", "collectives": "collectives",
    "experts": "experts", "quantise": "products", "bmm": "products",
    "recurrent": "recurrent", "mla_prefill": "prefill", "mla_decode": "decode",
}  # fmt: skip


@dataclass(frozen=True)
class Errors:
    """Statistics of the errors of modelled times, in per cent. A row's error is 100 * (predicted / measured - 1).

    Attributes:
        rows: number of rows.
        median: median of the absolute errors.
        mean: mean of the absolute errors.
        bias: mean of the signed errors.
    """

    rows: int
    median: float  # of the absolute errors
    mean: float  # of the absolute errors
    bias: float  # mean of the signed errors

    @classmethod
    def of(cls, predicted: np.ndarray, us: np.ndarray) -> Errors:
        """The Errors (statistics of the errors) of modelled times.

        predicted: modelled microseconds, an array [rows]. us: measured microseconds of the same rows, an array [rows].
        """
        error = (predicted / us - 1) * 100
        size = np.abs(error)
        return cls(len(us), float(np.median(size)), float(size.mean()), float(error.mean()))


@dataclass(frozen=True)
class Worst:
    """A measured row whose modelled time has a large error.

    Attributes:
        words: the kernel call as text, see words().
        us: measured microseconds.
        predicted: modelled microseconds.
        reason: the likely cause of the error, as text.
    """

    words: str
    us: float
    predicted: float
    reason: str


@dataclass(frozen=True)
class Record(Errors):
    """Statistics of the errors of modelled times for one chip, table (or kernel) and number format.

    The inherited fields `rows`, `median`, `mean` and `bias` are over all rows of the table in this format, in per cent.

    Attributes:
        chip: name of the chip.
        table: name of the table, such as matmul.
        dtype: number format, as written in the table.
        halves: {value of the rows' column `split`, "fit" or "test": Errors of these rows}; {} without such a column.
        regimes: {what limits the modelled time, one of regime.REGIMES: Errors of these rows}, without empty groups.
        causes: {cause of an error, a key of regime.CAUSES: number of rows}, over the 5 % of rows with the largest
            errors.
        worst: some rows with the largest errors, the largest first.
    """

    chip: str
    table: str
    dtype: str
    halves: Mapping[str, Errors]
    regimes: Mapping[str, Errors]
    causes: Mapping[str, int]
    worst: tuple[Worst, ...]


def tables(folder: Path) -> dict[tuple[str, str], list[dict[str, str]]]:
    """Read all files `<chip>_<table>.csv` of a folder. Returns {(chip, table): rows}; a row is a dict {column: text}.

    The file serving.csv is skipped: it has measurements of whole servers, not of kernels. Raises ValueError for an
    unknown chip or table, and if there is no file to read. Raises TableError for a missing column or a value that is
    not allowed.
    """
    found = {}
    for path in sorted(p for p in folder.glob("*.csv") if p.name != SERVING):
        name = next((c for c in sorted(CHIPS, key=len, reverse=True) if path.stem.startswith(c + "_")), None)
        table = path.stem[len(name) + 1 :] if name else ""
        if name is None or table not in TABLES:
            raise ValueError(
                f"{path}: expected <chip>_<table>.csv; chips are {', '.join(CHIPS)}, tables {', '.join(TABLES)}"
            )
        with path.open(newline="") as f:
            found[name, table] = list(csv.DictReader(f))
        check_rows(path, found[name, table], needed(table, found[name, table]), FORMAT)
    if not found:
        raise ValueError(f"{folder} holds no <chip>_<table>.csv; tables are {', '.join(TABLES)}")
    return found


def dtype_of(row: Row) -> str:
    """The number format in a row's column dtype or kv_dtype; "two bytes" for a row with neither."""
    return row.get("dtype") or row.get("kv_dtype") or "two bytes"


def predict(on: Target, table: str, rows: Iterable[Row]) -> np.ndarray:
    """Modelled microseconds of the kernel call of each row, as an array [rows].

    table: name of the rows' table, a key of TABLES. Raises ChipError if the chip cannot run a row's call.
    """
    return np.array([timing(on, table, row).seconds for row in rows]) * 1e6


def measured(rows: Sequence[Row]) -> np.ndarray:
    """Measured microseconds of each row, as an array [rows]."""
    return np.array([float(row["us"]) for row in rows])


def validate(
    folder: Path, split: str | None = None, min_us: float = 0.0, worst: int = 5, progress: Progress = silent
) -> list[Record]:
    """Compare modelled with measured kernel times. Returns a Record for each chip, table and number format, as a list.

    Args:
        folder: the folder of the measured tables, `<chip>_<table>.csv`.
        split: value of the column `split`, "fit" or "test". Rows with another value are left out. None: all rows count.
        min_us: rows whose measured time is below this number of microseconds are left out.
        worst: number of rows with the largest errors that each Record lists.
        progress: called before each table.

    Raises ValueError for an unknown chip or table or a folder without tables, ChipError if a chip cannot run a row's
    call.
    """
    out = []
    progress(0, 0, f"reading {folder}")
    for (name, table), rows in counted(list(tables(folder).items()), progress, lambda item: " ".join(item[0])):
        for dtype in sorted({dtype_of(r) for r in rows}):
            mine = [
                r for r in rows
                if dtype_of(r) == dtype and split in (None, r.get("split")) and float(r["us"]) >= min_us
            ]  # fmt: skip
            if mine:
                out.append(record(target(name), table, dtype, mine, worst))
    return out


def calls(on: Target, table: str, rows: Iterable[Row]) -> list[Call]:
    """The Calls of a table's rows, as a list. A Call has the modelled Timing and how much of it is launch overhead.

    For a collective, the barrier between the ranks counts as launch overhead. table: name of the rows' table, a key of
    TABLES. Raises ChipError if the chip cannot run a row's call.
    """
    without = on.with_library(launch_s=0.0, barrier_s=0.0)
    out = []
    for row in rows:
        found = timing(on, table, row)
        out.append(Call(on, found, max(0.0, found.seconds - timing(without, table, row).seconds)))
    return out


def record(on: Target, table: str, dtype: str, rows: Sequence[Row], worst: int, name: str = "") -> Record:
    """The Record of some measured rows: statistics of the errors of their modelled times, and the worst rows.

    Raises ChipError if the chip cannot run a row's call.

    Args:
        on: chip and kernel library.
        table: name of the rows' table, a key of TABLES.
        dtype: number format of the rows.
        rows: the measured rows, at least one.
        worst: number of rows with the largest errors that the Record lists.
        name: the Record's field `table`; "": the argument `table`.
    """
    us, found = measured(rows), calls(on, table, rows)
    predicted = np.array([c.timing.seconds for c in found]) * 1e6
    far = np.argsort(-np.abs(predicted / us - 1))
    regimes, halves = np.array([c.regime for c in found]), np.array([row.get("split", "") for row in rows])
    return Record(
        **vars(Errors.of(predicted, us)), chip=on.chip.name, table=name or table, dtype=dtype,
        halves={h: Errors.of(predicted[halves == h], us[halves == h]) for h in ("fit", "test") if h in halves},
        regimes={r: Errors.of(predicted[regimes == r], us[regimes == r]) for r in REGIMES if r in regimes},
        causes=Counter(found[i].cause(us[i] * 1e-6) for i in far[: -(-len(rows) // TAIL_ROWS)]),
        worst=tuple(
            Worst(words(rows[i]), float(us[i]), float(predicted[i]), found[i].reason(us[i] * 1e-6)) for i in far[:worst]
        ),
    )  # fmt: skip


def words(row: Row) -> str:
    """The kernel call of a measured row as text: "name=value" for its columns, without format, latency and split."""
    return " ".join(f"{k}={v}" for k, v in row.items() if k not in ("us", "split", "dtype", "kv_dtype"))


def errors_as_dict(e: Errors) -> dict[str, Any]:
    """A dict for JSON with the statistics in `e`, rounded to three decimals."""
    return {
        "rows": e.rows, "median_abs_error_pct": round(e.median, 3), "mean_abs_error_pct": round(e.mean, 3),
        "bias_pct": round(e.bias, 3),
    }  # fmt: skip


def as_dict(r: Record) -> dict[str, Any]:
    """A dict for JSON with the fields of `r`. Errors and predicted times are rounded to three decimals."""
    return {
        "chip": r.chip, "table": r.table, "dtype": r.dtype, **errors_as_dict(r),
        "halves": {name: errors_as_dict(e) for name, e in r.halves.items()},
        "regimes": {name: errors_as_dict(e) for name, e in r.regimes.items()},
        "causes": dict(r.causes),
        "worst": [
            {"row": w.words, "measured_us": w.us, "predicted_us": round(w.predicted, 3), "reason": w.reason}
            for w in r.worst
        ],
    }  # fmt: skip
