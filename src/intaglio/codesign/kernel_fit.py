"""Fits kernels of serving engines to measured latencies: facts that hold on every chip, and constants of each chip.

The search is a coordinate descent from the kernels of shipped libraries. It maximises a likelihood of the logarithmic
errors; facts must gain FACT_GAIN, and constants have priors: around their start, and around the other chips' constants.
scripts/fit_kernels.py writes the results to data/kernels.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import log, log1p
from typing import Any

import numpy as np

from intaglio.chips import LIBRARIES, ChipError, Target
from intaglio.chips.engine_kernels import CONSTANTS, measured_generations
from intaglio.chips.kernel_record import WIDEST, KernelRecord
from intaglio.codesign.calibrate import ANY_WIDTH, WHY, Fitted, Sample, chosen, fitted, spread
from intaglio.codesign.kernel_facts import ATTENTION, EIGHT_BITS, FACTS, MENUS, STARTS
from intaglio.codesign.validate import FAMILY, FORMAT, Row, dtype_of, measured, predict, record_of_row

FACT_ROUNDS = 2  # of the search that also try facts
LEAST_GAIN = 0.02  # log-likelihood that another value of a constant, or of a fact that differs already, must gain
FACT_GAIN = 4.0  # log-likelihood that another fact must gain
CHIP_GAIN = 12.0  # log-likelihood that facts of its own must gain for a chip
DROP_COST = 1.0  # log-likelihood that a fact must be worth to differ from the chip's own library
SPLIT_GAIN = 8.0  # log-likelihood that values of its own must gain for a range of head widths, on each chip
LEFT_OUT_GAIN = 2.0  # log-likelihood of rows left out of a fit that a calibration must gain
FOLDS = 4  # parts of the rows in a cross-validation
WIDTH_ROWS = 10  # least number of rows of such a range
# Widths of prior distributions of the logarithm of a constant. Those of seconds are wider: benchmarks without a CUDA
# graph count the host's time of a launch.
PRIOR_WIDTH = 0.25  # about the value of the chip's own library
KNOWN_WIDTH = 0.12  # in a calibration, about the value that was fitted to chips of the same generation
APART_WIDTH, TIME_APART = 0.15, 0.2  # of the ratio of two chips' constants
STEPS = (0.3, 0.15, 0.06, 0.03)  # relative steps of the search, one for each round
LEAST_SPREAD = 0.02  # of the errors; a better fit than that is within the noise of measurements
LEAST_US = 1e-3  # of a prediction: kernels may be left out altogether
MOST_ERROR = 0.7  # larger logarithmic errors count as this, so that a few rows do not decide
Values = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Measured latencies of one kernel on one chip: rows of a benchmark's table.

    Attributes:
        on: the chip with its own kernel library.
        table: the kind of benchmark table that the rows come from, as a key of validate.TABLES. The kind decides which
            model predicts the times of the rows.
        rows: the rows, with the kernel's name in column `kernel`.
    """

    on: Target
    table: str
    rows: tuple[Row, ...]

    def of_widths(self, least: int, most: int) -> Case:
        """Returns a copy of this case with only the rows whose head_dim is from `least` to `most`, both included.

        A row without a column head_dim counts as one with head_dim 0.
        """
        mine = tuple(r for r in self.rows if least <= int(r.get("head_dim", 0)) <= most)
        return dataclasses.replace(self, rows=mine)

    @property
    def op(self) -> str:
        """Kind of the kernel's calls, one of kernel_record.OPS, such as "products" or "prefill"."""
        return FAMILY[self.table]

    def start(self, library: str = "") -> Values:
        """Returns the values from which a fit starts, as a dict {name of a constant or fact: value}.

        Constants (CONSTANTS) are numbers such as efficiencies. They start with the values of the chip's own library.
        Facts (FACTS) are discrete properties such as tile sizes. They start with the values of `library`; but the fact
        "tiles" starts as None, which stands for the value of the chip's own library. In both libraries, the values are
        those of the default kernel for the call in self.rows[0].

        library: name of a shipped library; "": the chip's own.
        """
        row = self.rows[0]
        how = FORMAT.get(dtype_of(row), ""), int(row.get("head_dim", 0))
        own = self.on.library.with_record(self.on.library.record(self.op, *how))
        facts = LIBRARIES[library].with_record(LIBRARIES[library].record(self.op, *how)) if library else own
        out = {name: getattr(own, name) for name in CONSTANTS[self.op]}
        if self.op == "collectives":
            out["small_reduce_s"] = out["small_reduce_s"] or out["barrier_s"]
        return out | {name: None if name == "tiles" else getattr(facts, name) for name in FACTS[self.op]}

    def record(self, values: Mapping[str, Any], head_dims: tuple[int, int] = ANY_WIDTH) -> KernelRecord:
        """Returns a KernelRecord (description of one kernel) for the kernel and number format measured in this case.

        Args:
            values: {field: value} of the record. A field with the value None is left out of the record, so the kernel
                has the value of its library.
            head_dims: least and largest head width for which the record holds.
        """
        format = FORMAT.get(dtype_of(self.rows[0]))
        return KernelRecord(
            op=self.op, kernel=self.rows[0]["kernel"], why=WHY, formats=(format,) if format else (),
            head_dims=head_dims, default=False,
            changes=tuple((name, value) for name, value in values.items() if value is not None),
        )  # fmt: skip

    def target(self, values: Mapping[str, Any]) -> Target:
        """Returns a Target with this case's chip, whose library has only one kernel record, made by record(values).

        The record has the kernel name of this case's rows, so the predicted times of these rows use `values`: {field:
        value}.
        """
        return Target(self.on.chip, dataclasses.replace(self.on.library, kernels=(self.record(values),)))

    def errors(self, values: Mapping[str, Any]) -> np.ndarray:
        """Returns log(predicted / measured time) of each row, as an array [rows].

        values: {field: value} of the kernel record from which the times are predicted.
        """
        found = np.maximum(predict(self.target(values), self.table, self.rows), LEAST_US)
        return np.log(found / measured(self.rows))

    def cost(self, values: Mapping[str, Any]) -> float:
        """Returns the negative log-likelihood of the measured times, up to a constant, as a float; lower is better.

        The likelihood is that of the errors log(predicted / measured time) of all rows. The spread of the errors is
        estimated from the same errors.

        values: {field: value} of the kernel record from which the times are predicted. Raises ChipError if the chip
        cannot have these values.
        """
        size = np.abs(self.errors(values))
        spread = LEAST_SPREAD + (float(np.median(size)) + 2 * float(np.minimum(size, MOST_ERROR).mean())) / 3
        return len(size) * log(spread)


class KernelSearch:
    """A search for the properties of one kernel that best explain its measured rows on all chips.

    Facts are discrete properties, such as tile sizes; a change of a fact is tried on all chips at once. Constants are
    numbers such as efficiencies; each chip has its own value, with a prior distribution.

    Attributes:
        cases: a Case (measured rows on one chip) for each chip.
        values: for each case, a dict {name of a constant or fact: best value so far}.
        begun: for each case, {name of a constant: centre of its prior}.
        width: width of the priors of the constants' logarithms. Constants in seconds have priors twice as wide.
    """

    def __init__(
        self, cases: Sequence[Case], values: Sequence[Values], begun: Sequence[Values] | None = None,
        width: float = PRIOR_WIDTH,
    ) -> None:  # fmt: skip
        self.cases, self.values, self.width = list(cases), [dict(v) for v in values], width
        self.begun = [dict(v) for v in begun or values]
        self.costs = [self.cost(i, v) for i, v in enumerate(self.values)]
        self.apart = self.cost_apart(self.values)

    @property
    def total(self) -> float:
        """The cost that the search minimises: the sum of cost() over all cases, plus cost_apart()."""
        return sum(self.costs) + self.apart

    def cost_apart(self, values: Sequence[Values]) -> float:
        """Returns the negative log-prior of the differences between the chips' constants. Larger differences cost more.

        One kernel should reach the same fractions of the peak rates, and start in the same time, on every chip. So
        facts that explain all chips with similar constants are preferred; they should also hold for chips without
        measurements. The result is 0 for collectives, because their constants follow the chips' links.

        values: for each case, {name of a constant or fact: value}.
        """
        op = self.cases[0].op
        if op == "collectives":
            return 0.0
        pairs = [(a[n], b[n], n) for a, b in combinations(values, 2) for n in CONSTANTS[op]]
        return sum((log(a / b) / (TIME_APART if n.endswith("_s") else APART_WIDTH)) ** 2 / 2 for a, b, n in pairs)

    def cost(self, number: int, values: Values) -> float:
        """Returns the negative log-posterior of one case, as a float; lower is better.

        It is Case.cost() plus the negative log-prior of the case's constants. The prior of a constant's logarithm has
        its centre in self.begun. It has heavy tails, so that a chip whose constants are very different is fitted, too.
        number: index of the case. values: {name of a constant or fact: value}.
        """
        case, begun = self.cases[number], self.begun[number]
        widths = {n: self.width * (1 + n.endswith("_s")) for n in CONSTANTS[case.op] if begun[n] > 0}
        moved = [log(values[n] / begun[n]) / width for n, width in widths.items()]
        return case.cost(values) + sum(log1p(m * m / 2) for m in moved)

    def attempt(self, changes: Mapping[int, Values], least: float) -> bool:
        """Try new values of constants or facts in some cases, and keep the values if the total cost falls enough.

        Returns True if the values were kept. Otherwise nothing changes. Values that a chip cannot have are not kept.

        Args:
            changes: {index of a case: {name of a constant or fact: new value}}.
            least: the total cost (see `total`) must fall by at least this number.
        """
        tried = {i: self.values[i] | mine for i, mine in changes.items()}
        try:
            costs = {i: self.cost(i, v) for i, v in tried.items()}
        except ChipError:
            return False
        apart = self.cost_apart([tried.get(i, v) for i, v in enumerate(self.values)])
        if sum(c - self.costs[i] for i, c in costs.items()) + apart - self.apart > -least:
            return False
        self.apart = apart
        for i, cost in costs.items():
            self.values[i], self.costs[i] = tried[i], cost
        return True

    def alternatives(self) -> Iterator[Values]:
        """Yield each possible value of each fact of the kernel, as a dict {name of the fact: value}.

        Facts are the kernel's discrete properties, such as tile sizes. FACTS lists their possible values. Values that
        are in use already are yielded, too. Facts about 8-bit formats are left out for bf16 kernels.
        """
        wide = dtype_of(self.cases[0].rows[0]) == "bfloat16"
        for field, values in FACTS[self.cases[0].op].items():
            if not (wide and field in EIGHT_BITS):
                yield from ({field: value} for value in values)

    def fit_constant(self, number: int, name: str, step: float) -> None:
        """Improve the value of one constant of one case, in place in self.values[number]. Returns nothing.

        The value is multiplied by 1 + step again and again. This ends when a multiplication would not lower the total
        cost by at least LEAST_GAIN; that multiplication is not kept. Then the value is divided by 1 + step in the same
        way. An efficiency stays at most 1.

        number: index of the case. name: name of the constant.
        """
        for factor in (1 + step, 1 / (1 + step)):
            while True:
                now = self.values[number][name]
                value = min(now * factor, 1.0) if name.endswith("efficiency") else now * factor
                if value == now or not self.attempt({number: {name: value}}, LEAST_GAIN):
                    break

    def fit_constants(self, step: float) -> None:
        """Improve all constants of all cases by fit_constant(), in place in self.values. Returns nothing."""
        for i, case in enumerate(self.cases):
            for name in CONSTANTS[case.op]:
                self.fit_constant(i, name, step)

    def drop_facts(self) -> float:
        """Set facts (discrete properties) back to the values of the chips' own libraries where this hardly matters.

        A fact is set back, in all cases, if the total cost then rises by at most DROP_COST. Returns the total cost at
        the end.
        """
        own = [case.start() for case in self.cases]
        for field in FACTS[self.cases[0].op]:
            back = {i: {field: v[field]} for i, v in enumerate(own) if self.values[i][field] != v[field]}
            if back:
                self.attempt(back, -DROP_COST)
        return self.total

    def run(self, facts: bool = True) -> float:
        """Search for better values, in one round for each step size in STEPS, and store the best in `values`.

        Returns the total cost at the end, see `total`. facts: True to try other values of the kernel's discrete
        properties (FACTS), too, in the first FACT_ROUNDS rounds; False to fit constants only.
        """
        for number, step in enumerate(STEPS):
            for changes in self.alternatives() if facts and number < FACT_ROUNDS else ():
                new = {i: changes for i, mine in enumerate(self.values) if changes.items() - mine.items()}
                if new:
                    # A fact that differs already adds no parameter if it takes a third value
                    known = all(self.values[i][f] == self.begun[i][f] for f in changes for i in new)
                    self.attempt(new, FACT_GAIN if known else LEAST_GAIN)
            self.fit_constants(step)
        return self.total


def fit_kernel(cases: Sequence[Case]) -> tuple[float, list[Values]]:
    """Fit one kernel to its measured rows on one or more chips. Returns (cost, values).

    The cost is a negative log-posterior: lower is better. `values` is a list with a dict {name of a constant or fact:
    value} for each case. Facts (discrete properties such as tile sizes) are the same in all cases, with one exception:
    if a separate fit of each case is clearly better, each case has its own facts, because the engine then seems to run
    different kernels of this name on these chips.

    cases: the rows, one Case for each chip.
    """
    together = fit_together(cases)
    if len(cases) < 2:
        return together
    alone = [fit_together([case])[1][0] for case in cases]
    search = KernelSearch(cases, alone, [case.start() for case in cases])
    for step in STEPS[1:]:
        search.fit_constants(step)  # again, now with the differences between the chips
    cost = search.total + CHIP_GAIN * (len(cases) - 1)
    return (cost, search.values) if cost < together[0] else together


def fit_together(cases: Sequence[Case]) -> tuple[float, list[Values]]:
    """Fit one kernel to its measured rows on one or more chips, and return (cost, values).

    The facts (discrete properties) are the same on all chips. A lower cost is better. `values` is a list with a dict
    {name of a constant or fact: value} for each case.

    Several searches are run, and the result with the lowest cost is returned. They start from the facts of each library
    in STARTS and of each kernel in MENUS. cases: the rows, one Case for each chip, at least one.
    """
    best: tuple[float, list[Values]] | None = None
    tried, op = list[list[Values]](), cases[0].op
    starts = STARTS[:1] if op in ATTENTION else STARTS
    for name, menu in (*((name, {}) for name in starts), *(("", menu) for menu in MENUS[op])):
        begun = [case.start(name) | menu for case in cases]
        facts = [{f: values[f] for f in FACTS[op]} for values in begun]
        if facts in tried:
            continue
        tried.append(facts)
        try:
            search = KernelSearch(cases, begun)
        except ChipError:
            continue
        if menu:  # constants that suit its facts, before other facts are tried
            search.fit_constants(STEPS[0])
        search.run()
        found = search.drop_facts()
        if best is None or found < best[0]:
            best = found, search.values
    assert best is not None  # the chip's own library always fits it
    return best


def fit_by_width(cases: Sequence[Case]) -> list[tuple[tuple[int, int], dict[str, Values]]]:
    """Fit a kernel to its measured rows, and return a list of (range of head widths, values).

    The kernel is fitted separately for each range of head widths if that is clearly better. A range is (least, largest)
    head width. The values are {name of a chip: {name of a constant or fact: value}}, for the chips that have rows in
    the range. The list has one range, of all widths, if separate fits are not clearly better or the rows have no column
    head_dim.

    cases: the rows, one Case for each chip.
    """
    cost, whole = fit_kernel(cases)
    found = [(ANY_WIDTH, by_chip(cases, whole))]
    ranges = width_ranges(cases)
    if len(ranges) < 2:
        return found
    split, parts = 0.0, []
    for least, most in ranges:
        mine = [c.of_widths(least, most) for c in cases]
        mine = [c for c in mine if c.rows]
        part, values = fit_kernel(mine)
        split += part + SPLIT_GAIN * len(mine)
        parts.append(((least, most), by_chip(mine, values)))
    return parts if split - SPLIT_GAIN * len(cases) < cost else found


def by_chip(cases: Sequence[Case], values: Sequence[Values]) -> dict[str, Values]:
    """Returns a kernel's values as a dict {name of a chip: {name of a constant or fact: value}}.

    cases: measured rows, one Case for each chip. values: the kernel's values for each of `cases`, in the same order.
    """
    return {c.on.chip.name: v for c, v in zip(cases, values, strict=True)}


def width_ranges(cases: Sequence[Case]) -> list[tuple[int, int]]:
    """Divide the head widths from 0 to WIDEST into ranges. Returns a list of (least, largest), both included.

    Each range is so wide that at least WIDTH_ROWS rows of all cases together have a head_dim in it. If there are fewer
    rows in all, or no rows with a column head_dim, the list has one range.
    """
    counts = Counter(int(r["head_dim"]) for c in cases for r in c.rows if "head_dim" in r)
    ends, rows = list[int](), 0
    for width in sorted(counts):
        rows += counts[width]
        if rows >= WIDTH_ROWS:
            ends.append(width)
            rows = 0
    return list(zip([0, *(end + 1 for end in ends[:-1])], [*ends[:-1], WIDEST], strict=True))


def engine_values(case: Case, on: Target) -> Values:
    """Returns the constants and facts (properties such as tile sizes) of a serving engine's kernel, as {name: value}.

    The first of the case's measured rows names the kernel. If the library of `on` has no such kernel, the result is
    case.start(), the values of the chip's own default kernel.

    on: the chip, with a library that has the engine's kernels, see engine_tables.engine_target().
    """
    record = record_of_row(on, case.table, case.rows[0])
    if record is None:
        return case.start()
    kernel = on.library.with_record(record)
    return case.start() | {n: getattr(kernel, n) for n in (*CONSTANTS[case.op], *FACTS[case.op])}


def fit_rows(case: Case, begun: Values, facts: bool, width: float = PRIOR_WIDTH) -> Values:
    """Fit a kernel to the rows of one case. Returns the fitted values, {name of a constant or fact: value}.

    Args:
        case: the measured rows.
        begun: the values to start from; priors of constants have their centres there.
        facts: True to fit facts (discrete properties), too, not only constants.
        width: width of the priors of the constants' logarithms.
    """
    search = KernelSearch([case], [begun], width=width)
    search.run(facts)
    return search.values[0]


def fit_predicts(case: Case, begun: Values) -> bool:
    """True if fitted constants predict the rows of a case clearly better than the values `begun`, by cross-validation.

    Clearly better means that the log-likelihood of the rows rises by more than LEFT_OUT_GAIN. Rows, in the order of
    their latency, are dealt to FOLDS folds in turn. The rows of each fold are predicted by a fit to the rows of the
    other folds. This fit starts from `begun`, with priors of width KNOWN_WIDTH. With fewer rows than folds the result
    is False.
    """
    if len(case.rows) < FOLDS:
        return False
    order = np.argsort(measured(case.rows), kind="stable")
    errors = np.zeros(len(order))
    for fold in range(FOLDS):
        left, kept = order[fold::FOLDS], np.delete(order, np.s_[fold::FOLDS])
        part, rest = (dataclasses.replace(case, rows=tuple(case.rows[i] for i in index)) for index in (left, kept))
        errors[left] = part.errors(fit_rows(rest, begun, facts=False, width=KNOWN_WIDTH))
    return len(order) * log(spread(case.errors(begun)) / spread(errors)) > LEFT_OUT_GAIN


def calibrated_values(case: Case, on: Target) -> Values:
    """Returns the values {name of a constant or fact: value} of an engine's kernel, fitted to the few rows of `case`.

    What is fitted depends on the library of `on`:

    - It has the kernel, measured on chips of this generation: constants are fitted if fit_predicts() is True, that is,
      if they then predict rows left out of the fit clearly better. Otherwise the result is the library's values.
    - It has the kernel, but measured on other generations only: constants are fitted.
    - It does not have the kernel: the fit starts from the chip's own default kernel; constants and facts are fitted.
    """
    begun, library = engine_values(case, on), on.library
    if record_of_row(on, case.table, case.rows[0]) is None:
        return fit_rows(case, begun, facts=True)
    if library.generation not in measured_generations(library.engine, case.rows[0]["kernel"]):
        return fit_rows(case, begun, facts=False)
    return fit_rows(case, begun, False, KNOWN_WIDTH) if fit_predicts(case, begun) else begun


def calibrate_kernel(
    case: Case, on: Target, points: int = 24, seed: int = 0
) -> tuple[tuple[KernelRecord, ...], Fitted | None]:
    """Fit a serving engine's kernel to a few of its measured rows. Returns (KernelRecords, errors).

    KernelRecords is a tuple with one record of the fitted values for each range of head widths that has its own record
    in the library of `on`. `errors` is a Fitted: the errors in per cent, before and after the fit, on the rows that the
    fit did not use. It is None if the case has only one row, because the fit uses this row.

    calibrated_values() decides which constants and facts are fitted.

    Args:
        case: the rows, at least one.
        on: the chip with a library that has the engine's kernels.
        points: largest number of rows to fit to, at even quantiles of the latency. At most half of the rows are used,
            but at least one.
        seed: seed of the random resamples that give the confidence interval.
    """
    sample = Sample(case.table, dtype_of(case.rows[0]), case.rows, measured(case.rows))
    used = chosen(sample, max(1, min(points, len(case.rows) // 2)))
    parts: dict[tuple[int, int], list[Row]] = {}
    for row in sample.part(used).rows:
        record = record_of_row(on, case.table, row)
        parts.setdefault(record.head_dims if record else ANY_WIDTH, []).append(row)
    records = list[KernelRecord]()
    for widths, rows in parts.items():
        few = dataclasses.replace(case, rows=tuple(rows))
        records.append(few.record(calibrated_values(few, on), widths))
    left = np.setdiff1d(np.arange(len(case.rows)), used)
    if not len(left):
        return tuple(records), None
    library = dataclasses.replace(on.library, kernels=(*records, *on.library.kernels))
    found, rest = Target(on.chip, library), sample.part(left)
    return tuple(records), fitted(rest, rest.errors(on), rest.errors(found), np.random.default_rng(seed))
