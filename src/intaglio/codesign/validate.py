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
    """The modelled Timing of the matrix product that a row of a measured table describes.

    If the row's format has activations of 8 or 4 bits, the Timing includes the kernels that quantise them from bf16.
    Raises ChipError if the chip's arrays do not take the row's format.
    """
    m, n, k = integers(row, "m", "n", "k")
    format, x_format, w_bits = formats_of(row)
    warm = stay_in_l2(on, n * k, w_bits)
    product = linear_timing(on, m, n, k, x_format, format, w_bits, resident=warm)
    return product if formats.bits(x_format) >= 16 else product + quantise(on, m, k)


def stay_in_l2(on: Target, weights: int, w_bits: float, others: float = 0.0) -> bool:
    """True if a product's weights stay in the L2 while a benchmark repeats the product.

    The benchmark has several copies of the weights and uses them in turn, see Conditions.weight_copies; all must fit.

    weights: number of the weights. w_bits: bits of a weight with its scales. others: bytes that must fit beside them.
    """
    copies = conditions(on.library).weight_copies * weights * w_bits / 8
    return copies + others <= on.chip.l2_bytes * on.library.l2_usable


def formats_of(row: Row) -> tuple[str, str, float]:
    """(format of weights, format of activations, bits of a weight with its scales) of a row with a column dtype."""
    format = FORMAT[row["dtype"]]
    return format, X_FORMAT.get(row["dtype"], format), W_BITS.get(row["dtype"], formats.bits(format))


def quantise(on: Target, m: int, k: int) -> Timing:
    """The modelled Timing of the kernels that quantise bf16 activations [m, k] before a matrix product.

    The kernel library's quantise_launches, quantise_bytes and row_cycles describe these kernels. The Timing is 0 s if
    quantise_launches is 0.
    """
    if not on.library.quantise_launches:
        return Timing(0.0)
    launches = on.library.quantise_launches * on.library.launch_s
    moved_s = elementwise_seconds(on, m * k * on.library.quantise_bytes, m * k * QUANTISE_HELD) - on.library.launch_s
    rows_s = -(-m // on.chip.cores) * on.library.row_cycles / on.chip.clock_hz
    return Timing(launches + max(moved_s, rows_s), {"L2": moved_s})


def quantised(on: Target, row: Row) -> Timing:
    """The modelled Timing of quantising activations [m, k]. row: a row of a measured table, with columns m and k."""
    return quantise(on, *integers(row, "m", "k"))


def bmm(on: Target, row: Row) -> Timing:
    """The modelled Timing of a batched matrix product of DeepSeek-V3, with the sizes in a row of a measured table.

    For each head, queries [tokens, 128] are multiplied by the head's key up-projection [128, 512]. If the row's format
    has queries of 8 or 4 bits, the Timing includes the kernels that quantise them from bf16. row: {column: text} with
    dtype, tokens and n_heads. Raises ChipError if the chip's arrays do not take the row's format.
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

    The write of the new keys and values to the K/V cache is included.

    Raises ChipError if the chip's arrays do not take the row's format.
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
    """The modelled Timing of what comes before attention: queries and keys are rotated, keys and values are cached.

    If the library's fused_rotation is True, one kernel does both and reads keys and values once. Otherwise the bytes of
    the rotation are added to the kernel that writes the cache. Bytes move at HBM's rate, or at core_rate() if that is
    lower. tokens: number of new tokens.
    """
    rate, fused = min(on.chip.hbm_rate, core_rate(on)), on.library.fused_rotation
    of_head = 4.0 + h.bits / 4 if fused else 4.0  # bytes of a K/V head for each of its columns
    moved = tokens * h.head_dim * (4.0 * h.heads + of_head * h.kv_heads)
    timing = Timing(moved / rate, {"HBM": moved / on.chip.hbm_rate}, moved, moved)
    return timing + (Timing(on.library.launch_s) if fused else kv_write_timing(on, tokens, h))


def cast(on: Target, values: float, bits: int) -> Timing:
    """The modelled Timing of a kernel that converts cached keys and values to bf16 before attention.

    The Timing is 0 s if no such kernel runs: because the library's kv_cast_bytes is 0, the cached values have more than
    8 bits, or there are none. values: number of cached elements of keys and values that attention reads. bits: bits of
    one such element.
    """
    moved = values * on.library.kv_cast_bytes
    if not moved or bits > 8:
        return Timing(0.0)
    seconds = moved / on.chip.hbm_rate
    return Timing(on.library.launch_s + seconds, {"HBM": seconds}, moved, moved)


def latent_attention(on: Target, row: Row) -> Timing:
    """The modelled Timing of the attention call of DeepSeek-V3 (MLA) that a row of a measured table describes.

    The write of the new latents to the cache is included. With one query per sequence, all heads attend to the cached
    latents. With more queries (prompts), each query head has a key head and a value head of its own, in bf16.
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
    """The modelled Timing of the collective that a row of a measured table describes.

    Raises ChipError if the chip cannot run the collective.
    """
    n, moved = integers(row, "n_chips", "bytes")
    return collective_timing(on, COLLECTIVE.get(row["op"], row["op"]), n, moved)


def experts(on: Target, row: Row) -> Timing:
    """The modelled Timing of the layer of routed experts that a row of a measured table describes.

    It is the time on the rank that gets the most tokens.

    Raises ChipError if the chip's arrays do not take the row's format.
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
    """Number of rows of each expert on the most loaded of `ep` ranks, as a tuple.

    Args:
        tokens: number of tokens in the batch; tokens * top_k rows are routed.
        top_k: number of experts of each token.
        n: number of experts on all ranks.
        ep: number of ranks that share the experts.
        load: "balanced"; or "power_law_A", such as power_law_1.2: the experts' rows are proportional to n evenly spaced
            quantiles of the density x**-A on 1 <= x <= 0.8 * tokens, in a fixed random order. An expert has at most
            `tokens` rows. The benchmark that measured the table does the same.
        in_order: where rows that are left over by rounding go. True: to experts in the order of their rounded counts,
            the largest first (the older benchmark). False: in the order of their counts before rounding. If rounding
            gives too many rows, experts lose some in the reverse order.
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
    """The KernelRecord (description of one kernel) that a measured row's column `kernel` names.

    None if the row names no kernel, or if the library of `on` has no record with this name that fits the row's number
    format and head width. table: name of the row's table, a key of TABLES.
    """
    if not (name := row.get("kernel", "")):
        return None
    how = FAMILY[table], FORMAT.get(dtype_of(row), ""), int(row.get("head_dim", 0)), name
    return next((r for r in on.library.kernels if r.serves(*how)), None)


def timing(on: Target, table: str, row: Row) -> Timing:
    """The modelled Timing of the call that a measured row describes.

    The call runs the kernel that the row names if the library has it, see record_of_row(), and otherwise the library's
    default kernels. table: name of the row's table, a key of TABLES. Raises ChipError if the chip cannot run the call.
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
    """Statistics of the errors 100 * (predicted - measured) / measured of some rows, in per cent.

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
        """The Errors of some rows.

        predicted: modelled microseconds of each row. us: measured microseconds of each row.
        """
        error = (predicted / us - 1) * 100
        size = np.abs(error)
        return cls(len(us), float(np.median(size)), float(size.mean()), float(error.mean()))


@dataclass(frozen=True)
class Worst:
    """A row with a large error.

    Attributes:
        words: the call as text, see words().
        us: measured microseconds.
        predicted: modelled microseconds.
        reason: the cause of the error, in words.
    """

    words: str
    us: float
    predicted: float
    reason: str


@dataclass(frozen=True)
class Record(Errors):
    """Errors of the modelled times for one chip, table (or kernel) and number format.

    The fields inherited from Errors are for all rows of the table in this format: `rows` is the number of rows,
    `median` and `mean` are those of the absolute errors in per cent, and `bias` is the mean of the signed errors.

    Attributes:
        chip: name of the chip.
        table: name of the table, such as matmul.
        dtype: number format, as in the table.
        halves: {value of the rows' column `split`, fit or test: Errors of these rows}; {} if the rows have none.
        regimes: {what bounds the modelled time, one of regime.REGIMES: Errors of these rows}; only those with rows.
        causes: {cause of an error, a key of regime.CAUSES: number of rows} of the 5 % of rows with the largest errors.
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
    """Read every file `<chip>_<table>.csv` of a folder. Returns {(chip, table): rows}, each row a dict by column name.

    The file serving.csv is skipped: it has measurements of whole servers, not of kernels. Raises ValueError for an
    unknown chip or table, and if there is no file to read; TableError for rows that check_rows() refuses.
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
    """The number format of a row as text: its column dtype, or else its column kv_dtype.

    For a row with neither column, such as a collective's, the text is "two bytes": values of such tables have 16 bits.
    """
    return row.get("dtype") or row.get("kv_dtype") or "two bytes"


def predict(on: Target, table: str, rows: Iterable[Row]) -> np.ndarray:
    """Modelled microseconds of each row of a table, as an array [rows]. table: its name, a key of TABLES.

    Raises ChipError if the chip cannot run a row's call.
    """
    return np.array([timing(on, table, row).seconds for row in rows]) * 1e6


def measured(rows: Sequence[Row]) -> np.ndarray:
    """Measured microseconds of each row, as an array [rows]."""
    return np.array([float(row["us"]) for row in rows])


def validate(
    folder: Path, split: str | None = None, min_us: float = 0.0, worst: int = 5, progress: Progress = silent
) -> list[Record]:
    """Compare modelled with measured times. Returns a list of Records, one for every chip, table and number format.

    Args:
        folder: holds `<chip>_<table>.csv`.
        split: only rows with this value of column `split` count; None: all.
        min_us: rows that took fewer microseconds are left out.
        worst: how many rows with the largest errors a Record lists.
        progress: called before each table.

    Raises ValueError for an unknown chip or table, and if the folder has no such file; ChipError if a chip cannot run a
    row's call.
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
    """A list of Calls, one for each row of a table: the modelled Timing, and how much of it is launch overhead.

    For a collective the ranks' barrier counts as launch overhead. Raises ChipError if the chip cannot run a row's call.
    """
    without = on.with_library(launch_s=0.0, barrier_s=0.0)
    out = []
    for row in rows:
        found = timing(on, table, row)
        out.append(Call(on, found, max(0.0, found.seconds - timing(without, table, row).seconds)))
    return out


def record(on: Target, table: str, dtype: str, rows: Sequence[Row], worst: int, name: str = "") -> Record:
    """The Record of the errors of predicted against measured times of `rows`.

    Raises ChipError if the chip cannot run a row's call.

    Args:
        on: chip and kernel library.
        table: the rows' table, a key of TABLES.
        dtype: number format of the rows.
        rows: at least one measured row.
        worst: how many rows with the largest errors the Record lists.
        name: what the Record calls the table; "": `table`.
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
    """A row's call as text: "name=value" pairs of its columns, without format, latency and split."""
    return " ".join(f"{k}={v}" for k, v in row.items() if k not in ("us", "split", "dtype", "kv_dtype"))


def errors_as_dict(e: Errors) -> dict[str, Any]:
    """A dict for JSON of Errors, rounded to three decimals."""
    return {
        "rows": e.rows, "median_abs_error_pct": round(e.median, 3), "mean_abs_error_pct": round(e.mean, 3),
        "bias_pct": round(e.bias, 3),
    }  # fmt: skip


def as_dict(r: Record) -> dict[str, Any]:
    """A dict for JSON of a Record's fields, with errors and predicted times rounded to three decimals."""
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
