"""Fits constants and facts of a chip and its kernel library to a small table of measured kernel latencies.

Constants (CONSTANTS: latencies and efficiencies of chip, launches, kernels, collectives) are fitted. Facts (FACTS, such
as tiles and fusions) are chosen by likelihood. Errors are of rows left out of the fit. wanted(): calls to measure next.
Long because the likelihood, the search and its cross-validation work on the same constants and facts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, log
from typing import Any

import numpy as np

from intaglio.chips import LIBRARIES, ChipError, Target
from intaglio.chips.kernel_record import WIDEST, KernelRecord
from intaglio.codesign.table_rows import check_rows, needed
from intaglio.codesign.validate import FAMILY, FORMAT, Row, dtype_of, measured, predict
from intaglio.progress import Progress, silent

CONSTANTS: dict[str, tuple[str, ...]] = {  # family ("": every family) -> constants
    "": ("chip.hbm_efficiency", "chip.l2_efficiency", "library.launch_s", "chip.hbm_latency_s"),
    "products": ("library.mxu_efficiency",),
    "prefill": ("prefill.mxu_efficiency",),
    "decode": ("decode.mxu_efficiency",),
    "experts": ("library.grouped_mxu_efficiency",),
    "collectives": ("library.barrier_s", "library.link_efficiency", "library.link_latency_s", "chip.host_links"),
}
FACTS: dict[str, dict[str, tuple[Any, ...]]] = {  # family -> field of its records -> alternatives
    "products": {"matmul_stages": (4, 8)},
    "prefill": {
        "kv_native": (False, True), "pack_gqa": (False, True), "query_tiles": ((64,), (64, 128), (128, 256), (256,)),
        "key_tile": (64, 128), "softmax_overlap": (0.0, 0.5, 0.7),
    },
    "decode": {
        "kv_native": (False, True), "split_mha": (False, True), "merge_launch": (False, True),
        "pack_windowed": (False, True), "key_tile": (64, 128), "half_burst_cost": (1.0, 1.3),
    },
    "experts": {
        "experts_native": (False, True), "expert_tiles": ("best", "by_experts", "by_tokens"),
        "expert_fused_activation": (False, True), "expert_all_rows": (False, True), "routing_launches": (1, 3),
    },
    "collectives": {"switch_reduce_min_chips": (8, 16)},
}  # fmt: skip
WHY = "found by intaglio calibrate"
ANY_WIDTH = (0, WIDEST)
# Fitted after all others: they act on the same rows as a family's efficiency, and on fewer
LATER = {"chip.l2_efficiency": 1, "library.launch_s": 2, "chip.hbm_latency_s": 3}
PRODUCTS_WEIGHT = 4.0  # of their samples, in the choice of constants of every family
PRIOR_WIDTH = 0.2  # standard deviation of the logarithm of a constant about the value of the chip that it starts from
FACT_GAIN = 5.0  # log-likelihood that another fact must gain, since it adds a parameter
LEAST_SPREAD = 0.01  # of a table's errors; a better fit than that is within the noise of measurements
STEPS = (0.3, 0.12, 0.05)  # relative steps of the search, one for each round


@dataclass(frozen=True)
class Sample:
    """Measured kernel latencies: rows of one table, all in one number format.

    Parameters are fitted to Samples. rows: the measured calls, each a dict {column: text}. us: the measured
    microseconds of each row, an array [rows].
    """

    table: str
    dtype: str
    rows: tuple[Row, ...]
    us: np.ndarray

    def part(self, index: np.ndarray) -> Sample:
        """Returns a Sample with some of the rows. index: array of the rows' indices."""
        return Sample(self.table, self.dtype, tuple(self.rows[i] for i in index), self.us[index])

    def errors(self, on: Target) -> np.ndarray:
        """Returns log(predicted / measured time) of each row, as an array [rows]; `on` predicts the times."""
        return np.log(predict(on, self.table, self.rows) / self.us)


def samples(tables: Mapping[str, Sequence[Row]], min_us: float) -> list[Sample]:
    """Returns a list with one Sample for each table and number format.

    A Sample has the rows whose measured time is at least `min_us` microseconds. Rows of collectives are all kept,
    whatever their time, since short ones show the start-up time. tables: {name of a table: its rows}. There is no
    Sample for a table and format without rows to keep.
    """
    out = []
    for table, rows in tables.items():
        for dtype in sorted({dtype_of(r) for r in rows}):
            least = 0.0 if table == "collectives" else min_us
            mine = [r for r in rows if dtype_of(r) == dtype and float(r["us"]) >= least]
            if mine:
                out.append(Sample(table, dtype, tuple(mine), measured(mine)))
    return out


def chosen(sample: Sample, points: int) -> np.ndarray:
    """Returns the indices of `points` rows of a sample, at even quantiles of the latency, as an array [points].

    If `points` is 0, or not below the number of rows, the array has the indices of all rows, ordered by latency.
    """
    order = np.argsort(sample.us, kind="stable")
    if not points or points >= len(order):
        return order
    return order[np.round(np.linspace(0, len(order) - 1, points)).astype(int)]


def value_of(on: Target, name: str) -> Any:
    """Returns the value of one parameter of the target `on`. name: chip.FIELD, library.FIELD or FAMILY.FIELD.

    FAMILY is a kind of kernels, such as prefill (attention over prompts). Kernels of one kind may have different values
    of a field. For FAMILY.FIELD, the value of the kernel for bf16 and heads of 128 columns is returned.
    """
    part, field = name.split(".")
    if part in ("chip", "library"):
        return on.get(name)
    return getattr(on.kernel(part, "bf16", 128).library, field)


def with_value(on: Target, name: str, value: Any, format: str = "") -> Target:
    """Returns a copy of the target `on` with another value of one parameter. Raises ChipError for a value out of range.

    Args:
        on: the target.
        name: chip.FIELD, library.FIELD, or FAMILY.FIELD for a field of all kernels of a family, such as prefill.
        value: the new value. If FAMILY.FIELD is in CONSTANTS, such as prefill.mxu_efficiency, each kernel's value is
            multiplied by value / value_of(on, name), so that the ratios between kernels stay; values above 1 become 1.
        format: for FAMILY.FIELD, change only the kernels for this number format; "": kernels of all formats.
    """
    part, field = name.split(".")
    if part == "chip":
        return on.changed({name: value})
    if part == "library":
        return Target(on.chip, dataclasses.replace(on.library, **{field: value}))
    factor = value / value_of(on, name) if name in CONSTANTS[part] else None
    formats, records = (format,) if format else (), list[KernelRecord]()
    whole = False
    for r in on.library.kernels:
        mine = r.op == part and (not format or not r.formats or format in r.formats)
        if mine and format and r.formats != formats:  # the record serves other formats too, which keep its values
            records.append(dataclasses.replace(r, formats=formats, changes=merged(r, field, value)))
            records.append(r)
        elif mine:
            own = dict(r.changes).get(field, getattr(on.library, field))
            new = value if factor is None else min(own * factor, 1.0)
            records.append(dataclasses.replace(r, changes=merged(r, field, new)))
        else:
            records.append(r)
        whole |= mine and r.default and r.head_dims == ANY_WIDTH and (not r.formats or r.formats == formats)
    if not whole:
        changes = ((field, value),)
        records.append(KernelRecord(op=part, kernel="calibrated", why=WHY, changes=changes, formats=formats))
    return Target(on.chip, dataclasses.replace(on.library, kernels=tuple(records)))


def merged(record: KernelRecord, field: str, value: Any) -> tuple[tuple[str, Any], ...]:
    """Returns record.changes (pairs of field and value) with `field` set to `value`, as a new tuple."""
    return tuple({**dict(record.changes), field: value}.items())


def spread(errors: np.ndarray) -> float:
    """Returns the spread of logarithmic errors: (median + mean) / 2 of their absolute values.

    The spread is at least LEAST_SPREAD. Absolute values above 2 count as 2, so that a few rows do not decide.
    """
    size = np.minimum(np.abs(errors), 2.0)
    return max(LEAST_SPREAD, float(np.median(size) + size.mean()) / 2)


class Search:
    """A search for the chip and library (a Target) that make the measured samples most likely.

    The likelihood is for logarithmic errors with a Laplace distribution of unknown spread. Constants have a log-normal
    prior around their values in `start`. run() does the search.

    Attributes:
        start: the target to start with.
        on: the best target so far.
        data: the measured samples.
    """

    def __init__(self, start: Target, data: Sequence[Sample]) -> None:
        for family in ("prefill", "decode"):  # with a value of their own, so that those of products do not change them
            if any(FAMILY[s.table] == family for s in data):
                name = f"{family}.mxu_efficiency"
                start = with_value(start, name, value_of(start, name))
        self.start, self.on, self.data = start, start, data
        self.costs = [self.cost(start, s) for s in data]
        self.prior = dict.fromkeys(self.parameters(), 0.0)
        self.facts: dict[str, Any] = {}

    def parameters(self) -> list[str]:
        """Returns the names of the constants that influence the samples' predicted times, a list in fitting order."""
        families = {FAMILY[s.table] for s in self.data}
        names = [
            n for f, many in CONSTANTS.items() if f in families or (not f and families != {"collectives"}) for n in many
        ]
        tree = self.start.chip.links.topology == "pcie_tree"
        names = [n for n in names if n != "chip.host_links" or tree]
        return sorted(names, key=lambda n: LATER.get(n, 0))

    @staticmethod
    def cost(on: Target, sample: Sample) -> float:
        """Returns the negative log-likelihood of a sample, up to a constant; inf if `on` cannot run the calls."""
        try:
            return len(sample.rows) * log(spread(sample.errors(on)))
        except (ChipError, ZeroDivisionError):
            return inf

    def affected(self, name: str) -> list[int]:
        """Returns the indices in `data` of the samples whose predicted times can change with a constant, as a list.

        name: the constant. A constant of one kernel family, such as prefill.mxu_efficiency, changes the samples of this
        family. A constant that all families share, such as launch overhead, changes all samples except collectives.
        """
        family = next(f for f, many in CONSTANTS.items() if name in many)
        families = [FAMILY[s.table] for s in self.data]
        return [i for i, f in enumerate(families) if (f == family if family else f != "collectives")]

    def weight(self, number: int, common: bool) -> float:
        """Returns the number by which the cost of one sample is multiplied when two targets are compared.

        It is PRODUCTS_WEIGHT if `common` is True and the sample has matrix products, otherwise 1. Matrix products are
        modelled best, so they should decide about constants that all kernels share.

        number: the sample's index in `data`. common: True if all kernels share the constant that changed.
        """
        return PRODUCTS_WEIGHT if common and self.data[number].table == "matmul" else 1.0

    def attempt(
        self, other: Target, numbers: Sequence[int], prior: float = 0.0, least: float = 1e-6, common: bool = False
    ) -> bool:
        """Replace the best target, `self.on`, by `other` if the cost falls by at least `least`. Returns True if so.

        The cost is the negative log-likelihood of the samples plus the negative log-prior of the constants.

        Args:
            other: the target to try.
            numbers: indices of the samples to compare.
            prior: the negative log-prior of `other` minus the negative log-prior of `self.on`.
            least: least fall of the cost.
            common: True if all kernels share the constant that changed; samples of matrix products then count more,
                see weight().
        """
        costs = {i: self.cost(other, self.data[i]) for i in numbers}
        if sum((c - self.costs[i]) * self.weight(i, common) for i, c in costs.items()) + prior > -least:
            return False
        self.on = other
        for i, cost in costs.items():
            self.costs[i] = cost
        return True

    def fit_constant(self, name: str, step: float) -> None:
        """Replace `self.on` by the best target found that differs only in the constant `name`. Returns nothing.

        The constant is multiplied by 1 + step as long as the cost falls, then divided by 1 + step as long as the cost
        falls.
        """
        at_start = float(value_of(self.start, name))
        for factor in (1 + step, 1 / (1 + step)):
            while True:
                now = float(value_of(self.on, name))
                value = min(now * factor, 1.0) if name.endswith("efficiency") else now * factor
                prior = (log(value / at_start) / PRIOR_WIDTH) ** 2 / 2 if at_start > 0 else 0.0
                if value == now or at_start <= 0:
                    break
                try:
                    other = with_value(self.on, name, value)
                except ChipError:
                    break
                if not self.attempt(other, self.affected(name), prior - self.prior[name], common=name in CONSTANTS[""]):
                    break
                self.prior[name] = prior

    def choose_facts(self) -> None:
        """Try other values of the kernels' discrete properties (FACTS), and keep those that are clearly more likely.

        Each kernel family of the samples is tried separately. For attention and experts, each number format is tried
        separately, too. First all properties at once are set to the values of a shipped library, for one library after
        the other. Then one property at a time is set to each of its values in FACTS. Values are kept, in self.on and
        self.facts, if the log-likelihood rises by FACT_GAIN, or by twice FACT_GAIN if several properties change.
        Returns nothing.
        """
        for i, sample in enumerate(self.data):
            family = FAMILY[sample.table]
            format = FORMAT.get(sample.dtype, "")
            by_format = family in ("prefill", "decode", "experts")
            numbers = [i] if by_format else [j for j, s in enumerate(self.data) if FAMILY[s.table] == family]
            menus: list[dict[str, Any]] = []
            for other in LIBRARIES.values():
                kernel = other.with_record(other.record(family, format, 128))
                menus.append({field: getattr(kernel, field) for field in FACTS[family]})
            menus += [{field: value} for field, values in FACTS[family].items() for value in values]
            if any(r.op == family and not r.default for r in self.on.library.kernels):
                kept = tuple(r for r in self.on.library.kernels if r.op != family or r.default)
                on = Target(self.on.chip, dataclasses.replace(self.on.library, kernels=kept))
                if self.attempt(on, numbers, least=FACT_GAIN):
                    self.facts[f"{family} ({sample.dtype})"] = "the library's default kernel"
            for menu in menus:
                on, changed = self.on, {}
                try:
                    for field, value in menu.items():
                        name = f"{family}.{field}" if by_format else f"library.{field}"
                        now = getattr(on.kernel(family, format, 128).library, field)
                        if now != value:
                            on = with_value(on, name, value, format if by_format else "")
                            changed[f"{family}.{field} ({sample.dtype})"] = value
                except ChipError:
                    continue
                if changed and self.attempt(on, numbers, least=FACT_GAIN * min(len(changed), 2)):
                    self.facts |= changed

    def run(self, facts: bool, progress: Progress = silent, name: str = "") -> Target:
        """Search for the target that makes the samples most likely, and return it.

        The search has one round for each of STEPS. Constants are always fitted. facts: True to choose the kernels'
        discrete properties (FACTS), too, in every round but the last. progress: called before each round, with the
        description `name`.
        """
        for number, step in enumerate(STEPS):
            progress(number, len(STEPS), name)
            if facts and number < len(STEPS) - 1:
                self.choose_facts()
            for constant in self.parameters():
                self.fit_constant(constant, step)
        return self.on


@dataclass(frozen=True)
class Fitted:
    """Errors |predicted / measured - 1| in per cent, on one table and number format, before and after a fit.

    Attributes:
        table: name of the table.
        dtype: number format.
        rows: number of rows compared.
        before: median error of the target that the fit started from.
        median: median error of the fitted target.
        low: lower end of the median's 95 % confidence interval.
        high: upper end of that interval.
        mean: mean error of the fitted target.
    """

    table: str
    dtype: str
    rows: int
    before: float  # median error of the chip that the fit started from
    median: float
    low: float
    high: float
    mean: float


@dataclass(frozen=True)
class Calibration:
    """Result of calibrate(): the fitted target, its errors on rows that were not fitted, and calls to measure next."""

    on: Target
    kept: str  # "nothing", "constants" or "constants and facts": what of the fit best predicts rows that were left out
    constants: dict[str, tuple[float, float]]  # name -> (value at the start, fitted value)
    facts: dict[str, Any]  # facts that differ from the start, by name
    crossed: list[Fitted]  # errors on the rows used; each fold of them is predicted by a fit to the others
    rest: list[Fitted]  # errors on rows that were not used at all
    wanted: list[tuple[str, str, float]]  # (table, row in words, spread of its predictions in per cent)


def fitted(sample: Sample, before: np.ndarray, errors: np.ndarray, rng: np.random.Generator) -> Fitted:
    """Returns a Fitted, which sums up the errors of a sample's rows before and after a fit, in per cent.

    before, errors: log(predicted / measured) of each row before and after the fit. rng: draws 1000 bootstrap resamples
    of the rows, for the confidence interval of the median error after the fit.
    """
    size = np.abs(np.expm1(errors)) * 100
    draws = np.median(size[rng.integers(0, len(size), (1000, len(size)))], axis=1)
    low, high = map(float, np.percentile(draws, [2.5, 97.5]))
    first = float(np.median(np.abs(np.expm1(before))) * 100)
    return Fitted(sample.table, sample.dtype, len(size), first, float(np.median(size)), low, high, float(size.mean()))


def calibrate(
    start: Target, data: Sequence[Sample], points: int = 24, folds: int = 4, seed: int = 0, progress: Progress = silent
) -> Calibration:
    """Fit a target to measured latencies. Returns a Calibration.

    Constants, such as latencies and efficiencies, are fitted. Facts, such as tiles or native 8-bit kernels, are chosen
    among the alternatives in FACTS. There are three candidates: the unchanged start, fitted constants, and fitted
    constants with chosen facts. The result is the candidate that best predicts rows left out of the fit.

    Args:
        start: chip and kernel library to start from.
        data: the measurements. Each Sample has the measured rows (calls) of one table and number format.
        points: maximum number of rows of each Sample to fit to; 0: all rows.
        folds: number of parts into which these rows are divided for cross-validation.
        seed: seed of all random choices, such as the division into parts.
        progress: called before each round of the search.

    Raises ValueError if a Sample gives fewer rows to the fit than there are folds.
    """
    rng = np.random.default_rng(seed)
    numbers = [chosen(s, points) for s in data]
    used = [s.part(i) for s, i in zip(data, numbers, strict=True)]
    for s in used:
        if len(s.rows) < folds:
            raise ValueError(f"{s.table} {s.dtype}: {len(s.rows)} rows; {folds} folds need at least as many")
    turns = [rng.permutation(len(s.rows)) % folds for s in used]
    before = [s.errors(start) for s in used]
    trials: dict[bool | None, tuple[list[np.ndarray], list[Target]]] = {None: (before, [start])}
    trials |= {facts: left_out(start, used, turns, folds, facts, progress) for facts in (False, True)}
    best = min(trials, key=lambda t: sum(len(e) * log(spread(e)) for e in trials[t][0]))
    errors, others = trials[best]
    search = Search(start, used)
    on = start if best is None else search.run(best, progress, "fit to all rows")
    rest = []
    for s, i in zip(data, numbers, strict=True):
        left = np.setdiff1d(np.arange(len(s.rows)), i)
        if len(left):
            part = s.part(left)
            rest.append(fitted(part, part.errors(start), part.errors(on), rng))
    crossed = [fitted(s, b, e, rng) for s, b, e in zip(used, before, errors, strict=True)]
    constants = {n: (float(value_of(start, n)), float(value_of(on, n))) for n in search.parameters()}
    kept = {None: "nothing", False: "constants", True: "constants and facts"}[best]
    return Calibration(on, kept, constants, search.facts, crossed, rest, wanted(used, others, rng))


def left_out(
    start: Target, used: Sequence[Sample], turns: Sequence[np.ndarray], folds: int, facts: bool, progress: Progress
) -> tuple[list[np.ndarray], list[Target]]:
    """Cross-validate a fit. Returns (errors, targets).

    For each fold, a target is fitted to the rows of the other folds and predicts the times of the fold's own rows.
    `errors` is a list with an array for each sample: log(predicted / measured) of its rows. `targets` is a list of the
    fitted targets, one for each fold.

    start: the target where fits begin. used: the samples. turns: for each sample, an array with the fold number of each
    row. facts: True to choose the kernels' properties in FACTS, too, besides fitting constants.
    """
    errors, others = [np.zeros(len(s.rows)) for s in used], []
    for fold in range(folds):
        kept = [s.part(np.flatnonzero(t != fold)) for s, t in zip(used, turns, strict=True)]
        what = f"{'constants and facts' if facts else 'constants'}, fold {fold + 1} of {folds}"
        others.append(Search(start, kept).run(facts, progress, what))
        for s, t, e in zip(used, turns, errors, strict=True):
            left = np.flatnonzero(t == fold)
            e[left] = s.part(left).errors(others[-1])
    return errors, others


def wanted(data: Sequence[Sample], fits: Sequence[Target], rng: np.random.Generator) -> list[tuple[str, str, float]]:
    """Returns calls that should be measured next, as a list of (table, call as text, spread in per cent).

    `fits` are targets that were fitted to different parts of the rows. The spread of a call is the relative standard
    deviation of the times that these targets predict for it. Calls with a large spread are worth measuring.

    For each sample, up to 20 calls that were not measured are made up at random. A call has the columns of one measured
    row, except that its size (m, tokens, batch or bytes) is that of another row. The three calls with the largest
    spread are returned, or all if there are fewer than three. A sample with one row gives no calls.
    """
    out = []
    for s in data:
        known = {key(r) for r in s.rows}
        columns = [c for c in s.rows[0] if c not in ("us", "split")]
        candidates: dict[tuple[str, ...], Row] = {}
        for _ in range(20 if len(s.rows) > 1 else 0):
            a, b = (s.rows[int(i)] for i in rng.integers(0, len(s.rows), 2))
            size = next(c for c in ("m", "tokens", "batch", "bytes") if c in a)
            row = {c: (b if c == size else a)[c] for c in columns}
            if "elements" in row and row["bytes"] != a["bytes"]:
                row["elements"] = b["elements"]
            if key(row) not in known:
                candidates[key(row)] = row
        rows = list(candidates.values())
        if rows:
            times = np.log([predict(on, s.table, rows) for on in fits])
            apart = np.expm1(times.std(axis=0)) * 100
            for i in np.argsort(-apart)[:3]:
                out.append((s.table, " ".join(f"{c}={v}" for c, v in rows[i].items()), float(apart[i])))
    return out


def key(row: Row) -> tuple[str, ...]:
    """Returns the values that describe a row's call, as a tuple: all columns of the row except `us` and `split`."""
    return tuple(v for c, v in row.items() if c not in ("us", "split"))


def table_of(columns: Sequence[str]) -> str:
    """Returns the name of the kind of table that has these columns: matmul, attention, experts or collectives.

    Raises ValueError if no kind of table has these columns, or if the column `us` is missing.
    """
    marks = {"top_k": "experts", "n_chips": "collectives", "query_len": "attention", "k": "matmul"}
    found = next((table for mark, table in marks.items() if mark in columns), None)
    if found is None or "us" not in columns:
        raise ValueError(
            f"columns {', '.join(columns)}; wanted those of a table of intaglio validate, with the latency in us"
        )
    return found


def by_table(files: Mapping[str, Sequence[Row]]) -> dict[str, list[Row]]:
    """Collect the rows of all files by kind of table. Returns {name of the kind, a key of FAMILY: its rows}.

    The kind follows from the columns of a file. Attention rows with one new token for each sequence, and earlier keys
    in the cache, belong to attention_decode, other attention rows to attention_prefill.

    files: {path: rows}. Raises ValueError for a file without rows or with the columns of no kind of table; TableError,
    a ValueError, for rows that check_rows() refuses.
    """
    out: dict[str, list[Row]] = {}
    for path, rows in files.items():
        if not rows:
            raise ValueError(f"{path} has no rows")
        try:
            table = table_of(list(rows[0]))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        check_rows(path, rows, needed(table, rows), FORMAT)
        for row in rows:
            decode = table == "attention" and int(row["query_len"]) == 1 and int(row["context_len"]) > 0
            phase = f"attention_{'decode' if decode else 'prefill'}" if table == "attention" else table
            out.setdefault(phase, []).append(row)
    return out
