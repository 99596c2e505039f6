"""Rankings of measured servers: whether the model recommends the layouts that measured best.

A case is one question: model, chip, serving engine and release, formats and lengths; or only a model and a chip, with
all that was measured of them. Its points are the layouts and numbers of open requests that were measured. The model
recommends the point with the most output tokens per second per chip, by its own latencies; the recommendation is good
if that point's measured rate is close to the best.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from intaglio.codesign.measured import Compared, Row

LEAST = 8  # points of a case
CLOSE = 0.95  # of the best measured rate per chip
SAME = (
    "backend", "backend_version", "model_path", "system", "isl", "osl", "gemm_quant_mode", "moe_quant_mode",
    "precision",
)  # fmt: skip
MODEL_AND_CHIP = ("card", "system")  # `card` is the name of the model's card, whatever its path
MODEL_CHIP_LENGTHS = (*MODEL_AND_CHIP, "isl", "osl")


def servers(row: Row) -> tuple[str, int]:
    """Returns (layout as text, number of chips) of the server whose measurements the row has.

    For disaggregated servers the text names the layouts of the prefill servers and of the decode servers, and the chips
    of both are counted.
    """
    phases = ("prefill_", "decode_") if row.group == "disaggregated" else ("",)
    kinds = [row.placement(phase) for phase in phases]
    return " and ".join(map(str, kinds)), sum(one.chips for one in kinds)


def rate(row: Row, ttft: float, tpot: float) -> float:
    """Output tokens per second per chip of a measured row, computed from latencies.

    The chips are those of the row's servers, and the formula is Little's law. ttft, tpot: mean latencies in seconds,
    measured or modelled: time to the first token, and time per token after it.
    """
    output = row.number("osl")
    return row.concurrency * output / (ttft + tpot * (output - 1)) / servers(row)[1]


@dataclass(frozen=True)
class Ranked:
    """Comparison of the recommended way to serve a model on a chip with the best measured way.

    The recommended way has the highest modelled output tokens/s per chip. A point is a way to serve that a benchmark
    measured: a layout and a number of open requests. If the compared rows differ in further columns, such as the
    engine, their values belong to the point too.

    Attributes:
        question: texts that all compared rows have in common, such as model, chip and engine; and "N open" if only
            points with N open requests are compared.
        layouts: number of different layouts.
        points: number of different points.
        recommended: the point with the highest modelled output tokens/s per chip, as text.
        best: the point with the highest measured output tokens/s per chip, as text.
        reached: measured output tokens/s per chip of `recommended`, divided by measured output tokens/s per chip of
            `best`.
    """

    question: tuple[str, ...]
    layouts: int
    points: int
    recommended: str
    best: str
    reached: float

    @property
    def good(self) -> bool:
        """True if the recommended point's measured output tokens/s per chip are at least 95 % of the best point's."""
        return self.reached >= CLOSE


def rankings(
    compared: Sequence[Compared], at_one_load: bool = False, least: int = LEAST, same: Sequence[str] = SAME,
    least_layouts: int = 2, apart: bool = False,
) -> list[Ranked]:  # fmt: skip
    """Compare recommended ways to serve with the best measured ways. Returns a list with a Ranked for each case.

    Measured rows are first grouped into cases: the rows of a case have equal values in the columns `same`, such as LLM,
    chip and engine. The rows of a case are then grouped into points, the ways to serve that were measured: the rows of
    a point have the same layout and number of open requests, and equal values in all columns of SAME. The recommended
    point of a case has the best modelled rate. Rows that were not modelled are left out. The list is ordered by the
    values in `same`. It is empty if no case has enough points and layouts.

    Args:
        compared: measured and modelled latencies of the rows.
        at_one_load: True to make a separate case for each number of open requests.
        least: least number of points; cases with fewer are left out.
        same: names of the columns in which all rows of a case are equal.
        least_layouts: least number of different layouts, 2 or more; cases with fewer are left out.
        apart: True to compare rows of disaggregated servers too. Their layout names prefill and decode servers.
    """
    cases: dict[tuple[str, ...], list[Compared]] = {}
    for c in compared:
        if not c.refused and (apart or c.row.group != "disaggregated"):
            more = (f"{c.row.concurrency} open",) if at_one_load else ()
            cases.setdefault(values(c.row, same) + more, []).append(c)
    found = (
        ranked_case(asked, mine, [name for name in SAME if name not in same]) for asked, mine in sorted(cases.items())
    )
    return [r for r in found if r.points >= least and r.layouts >= max(2, least_layouts)]


def values(row: Row, names: Sequence[str]) -> tuple[str, ...]:
    """The texts of a row in the columns `names`, as a tuple; "" for a column without text.

    For the name "card" the tuple has the name of the shipped config of the row's model; "" if there is none.
    """
    return tuple((row.card if name == "card" else row.columns.get(name)) or "" for name in names)


def ranked_case(asked: tuple[str, ...], mine: Sequence[Compared], others: Sequence[str]) -> Ranked:
    """Compare the way to serve that the timing model recommends with the best measured way. Returns a Ranked.

    The rows are grouped into points, the ways to serve. The rows of a point have the same layout, the same number of
    open requests and equal values in the columns `others`. The rate of a point, in output tokens/s per chip, is the
    mean of the rates of its rows.

    Args:
        asked: values that all rows have in common, such as model and chip; they become Ranked.question.
        mine: the rows, at least one.
        others: names of further columns; rows with different values in these columns belong to different points.
    """
    points: dict[tuple[str, ...], list[tuple[float, float]]] = {}
    for c in mine:
        pair = rate(c.row, c.row.ttft, c.row.tpot), rate(c.row, c.ttft, c.tpot)
        name = f"{servers(c.row)[0]} with {c.row.concurrency} open"
        points.setdefault((name, *values(c.row, others)), []).append(pair)
    seen = {point: [statistics.fmean(p[i] for p in pairs) for i in (0, 1)] for point, pairs in points.items()}
    best, chosen = (max(seen, key=lambda point, i=i: seen[point][i]) for i in (0, 1))  # type: ignore[misc]
    first, second = (" ".join(filter(None, point)) for point in (chosen, best))
    layouts = {servers(c.row)[0] for c in mine}
    return Ranked(asked, len(layouts), len(points), first, second, seen[chosen][0] / seen[best][0])


def share_good(found: Sequence[Ranked]) -> float:
    """Fraction of the cases in `found`, 0 to 1, in which the recommended way to serve is good (see Ranked.good).

    Raises ValueError if `found` is empty.
    """
    return statistics.fmean(r.good for r in found)
