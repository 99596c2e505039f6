"""Charts as SVG text, without a plotting library: horizontal bars, and lines with points."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from intaglio.cli.show import err

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6d00", "#555555")  # Okabe and Ito's
WIDTH, HEIGHT, ROW = 860, 480, 20  # pixels; ROW: of a bar
LEFT, RIGHT, TOP, BOTTOM = 64, 190, 48, 48  # margins of a line chart
LABEL = 270  # pixels for the labels of bars
TICKS = 6  # of an axis, about
STYLE = """<style>
  text { font: 12px system-ui, sans-serif; fill: #1f2a37 } .title { font-size: 15px; font-weight: 600 }
  .note { fill: #57606a } .end { text-anchor: end } .mid { text-anchor: middle } .grid { stroke: #d0d7de }
  .page { fill: #ffffff }
</style>"""
Point = tuple[float, float, str]  # x, y, label


def svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    """Returns the text of an SVG file of `width` x `height` pixels. parts: the elements to draw, each as SVG text."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"'
    return "\n".join((
        f'{head} aria-label="{escape(title, {chr(34): "&quot;"})}">', STYLE,
        f'<rect class="page" width="{width}" height="{height}"/>', label(16, 26, title, "title"), *parts, "</svg>", "",
    ))  # fmt: skip


def label(x: float, y: float, text: str, kind: str = "note") -> str:
    """Returns the SVG element that shows `text` at the position (x, y), as a string.

    x, y: position in pixels. kind: names of CSS classes of the element, from STYLE.
    """
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def number(value: float) -> str:
    """Returns a value as text: from 1,000 on with thousands separators and no decimals, below with four digits.

    Below 1,000 it is formatted with %.4g, so zeros at the end are left out and values below 0.0001 have an exponent.
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def no_chart(path: Path) -> None:
    """Say on standard error that no chart was written to `path`, since there is nothing to draw."""
    text = f"--plot {path}: no chart is written, since there is no result to draw"
    err.print(text, markup=False, soft_wrap=not err.is_terminal)


def ticks(most: float) -> list[float]:
    """Returns a list of round numbers for the ticks of an axis, from 0 up to at least `most`.

    There are about TICKS numbers, at equal distances. Only the last one may be above `most`. The list is [0.0, 1.0] if
    `most` is not a finite number above 0.
    """
    if not 0 < most < math.inf:
        return [0.0, 1.0]
    raw = most / TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    return [i * step for i in range(math.ceil(most / step - 1e-9) + 1)]


def colours(names: Sequence[str]) -> dict[str, str]:
    """Returns a dict {name: colour} for the distinct names, in order; the colours repeat after eight names."""
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(dict.fromkeys(names))}


def bars(title: str, unit: str, rows: Sequence[tuple[str, str, float]]) -> str:
    """Returns a bar chart as the text of an SVG file, with a bar for each row (group, name, value), in order.

    Bars of a group have one colour. unit: unit of the values, as a note below the title.
    """
    found, top = colours([group for group, *_ in rows]), 60
    scale = (WIDTH - LABEL - 90) / (max((value for *_, value in rows), default=1.0) or 1.0)
    parts = [label(16, 44, unit)]
    for i, (group, name, value) in enumerate(rows):
        y, long = top + i * ROW, max(1.0, value * scale)
        parts.append(label(LABEL - 8, y + 14, f"{group} {name}", "end"))
        parts.append(f'<rect x="{LABEL}" y="{y + 3}" width="{long:.1f}" height="{ROW - 6}" fill="{found[group]}"/>')
        parts.append(label(LABEL + long + 6, y + 14, number(value)))
    return svg(WIDTH, top + len(rows) * ROW + 16, title, parts)


def lines(title: str, x_unit: str, y_unit: str, series: Mapping[str, Sequence[Point]]) -> str:
    """Returns a line chart as the text of an SVG file, with a line for each name in `series`. Axes start at 0.

    series: the points (x, y, label) of each line, by name. x_unit, y_unit: texts beside the axes.
    """
    points = [p for each in series.values() for p in each]
    xs, ys = (ticks(max(values, default=1.0)) for values in ([p[0] for p in points], [p[1] for p in points]))
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        return LEFT + wide * x / xs[-1], TOP + high * (1 - y / ys[-1])

    parts = []
    for y in ys:
        _, to = at(0, y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{LEFT + wide}" y1="{to:.1f}" y2="{to:.1f}"/>')
        parts.append(label(LEFT - 6, to + 4, number(y), "note end"))
    for x in xs:
        to, _ = at(x, 0)
        parts.append(f'<line class="grid" x1="{to:.1f}" x2="{to:.1f}" y1="{TOP}" y2="{TOP + high}"/>')
        parts.append(label(to, TOP + high + 16, number(x), "note mid"))
    parts += [label(LEFT + wide / 2, HEIGHT - 12, x_unit, "mid"), label(16, 42, y_unit)]
    for i, (name, colour) in enumerate(colours(list(series)).items()):
        ordered = sorted(series[name])
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(p[0], p[1]) for p in ordered))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        for x, y, text in ordered:
            cx, cy = at(x, y)
            parts.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="3.5" fill="{colour}"/>')
            parts.append(label(cx + 5, cy - 5, text))
        parts.append(f'<rect x="{LEFT + wide + 14}" y="{TOP + 18 * i}" width="10" height="10" fill="{colour}"/>')
        parts.append(label(LEFT + wide + 30, TOP + 18 * i + 9, name))
    return svg(WIDTH, max(HEIGHT, TOP + 18 * len(series) + 16), title, parts)


def check_path(path: Path | None) -> None:
    """Raise ValueError if `path`, the file for a chart, does not end in .svg. None (no chart) is accepted."""
    if path is not None and path.suffix != ".svg":
        raise ValueError(f"--plot {path}: the chart is an SVG file; give a name that ends in .svg")
