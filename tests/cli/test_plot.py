"""Charts as SVG: valid XML, a mark for each value, to scale, and written by the command."""

from __future__ import annotations

import json
import random
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from typer.testing import CliRunner

from intaglio.cli import app
from intaglio.cli.plot import bars, check_path, lines, number, ticks
from intaglio.model import BUNDLED

SVG = "{http://www.w3.org/2000/svg}"


def test_ticks_are_round_and_reach_the_largest_value() -> None:
    rng = random.Random()
    for _ in range(200):
        most = 10 ** rng.uniform(-9, 12)
        found = ticks(most)
        assert found[0] == 0 and found[-1] >= most * (1 - 1e-6) > found[-2] * (1 - 1e-6)
        assert 3 <= len(found) <= 8
    assert ticks(0.0) == ticks(float("inf")) == [0.0, 1.0]


def test_bars_are_to_scale_and_coloured_by_group() -> None:
    rng = random.Random()
    rows = [(rng.choice("ab"), f"<{i}> & co", rng.uniform(1, 100)) for i in range(rng.randrange(1, 30))]
    root = ET.fromstring(bars('a "title" & <more>', "units", rows))
    found = [r for r in root.iter(f"{SVG}rect") if r.get("class") != "page"]
    assert len(found) == len(rows)
    scale = [float(r.get("width", 0)) / value for r, (*_, value) in zip(found, rows, strict=True)]
    assert max(scale) == pytest.approx(min(scale), rel=0.1)
    assert len({r.get("fill") for r in found}) == len({group for group, *_ in rows})
    assert any("<0> & co" in (t.text or "") for t in root.iter(f"{SVG}text"))


def test_lines_have_a_point_for_each_value() -> None:
    rng = random.Random()
    series = {f"s{i}": [(rng.uniform(0, 9), rng.uniform(0, 9), "x") for _ in range(4)] for i in range(12)}
    root = ET.fromstring(lines("t", "x", "y", series))
    assert len(list(root.iter(f"{SVG}circle"))) == 48 and len(list(root.iter(f"{SVG}polyline"))) == 12
    box = [float(v) for v in (root.get("viewBox") or "").split()]
    for c in root.iter(f"{SVG}circle"):
        assert 0 <= float(c.get("cx", -1)) <= box[2] and 0 <= float(c.get("cy", -1)) <= box[3]
    ET.fromstring(lines("t", "x", "y", {}))


def test_the_command_writes_a_chart(tmp_path: Path) -> None:
    """With --concurrency a point for each load, with --prefill and --decode too; other names are refused."""
    runner, load = CliRunner(), ["--input", "9", "--output", "5", "--concurrency", "2,4"]
    for name, more, points in (
        ("a.svg", ["--layout", "tp1"], 2), ("b.svg", ["--prefill", "tp1", "--decode", "tp1"], 2),
    ):  # fmt: skip
        file = tmp_path / name
        done = runner.invoke(app, ["simulate", str(BUNDLED), *load, *more, "--plot", str(file)])
        assert done.exit_code == 0, done.output
        assert len(list(ET.parse(file).getroot().iter(f"{SVG}circle"))) == points
    with pytest.raises(ValueError, match=r"ends in \.svg"):
        check_path(Path("x.png"))
    check_path(None)


def test_values_are_written_without_exponents() -> None:
    rng = random.Random()
    for value in (12345.0, 1e12, *(10 ** rng.uniform(-3, 12) for _ in range(100))):
        text = number(value)
        assert "e" not in text and float(text.replace(",", "")) == pytest.approx(value, rel=1e-3)
    assert number(12345) == "12,345"


def test_without_results_no_chart_is_written_and_it_is_said(tmp_path: Path) -> None:
    """A search whose limit no load keeps writes no file; its table, its assumptions and JSON are whole."""
    file = tmp_path / "a.svg"
    search = ["simulate", str(BUNDLED), "--input", "9", "--output", "5", "--find", "--tpot", "0.000001"]
    for more in ([], ["--chips", "2", "--prefill", "tp1", "--decode", "tp1,tp3"]):
        done = CliRunner().invoke(app, [*search, *more, "--plot", str(file)])
        assert done.exit_code == 0, done.output
        assert "no chart is written" in done.stderr and not file.exists()
        assert "over a chip's ;" not in done.stdout
        shown = json.loads(CliRunner().invoke(app, [*search, *more, "--json"]).stdout)
        assert [each["layout"] for each in shown["refused"]] == (["tp3"] if more else [])
