"""`intaglio simulate` of disaggregated prefill and decode: which layouts it recommends, and errors if none fits."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from intaglio.cli import app
from intaglio.cli.apart import why_unfit
from intaglio.codesign import ratio
from intaglio.codesign.disaggregated import ApartResult
from intaglio.codesign.simulate import SAME, cards, ported
from intaglio.model import BUNDLED

PAIR = ["--chip", "h100_sxm", "--input", "9", "--output", "5", "--prefill", "tp1", "--decode", "tp1", "--chips", "2"]


def simulate(*words: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["simulate", str(BUNDLED), *PAIR, *words])
    assert done.exit_code == code, done.output
    return done.output


@pytest.mark.parametrize(
    ("by", "best", "figure"), [("watt", "thrifty", "2.00 tok/J"), ("chip", "fast", "150 tok/s a chip")]
)
def test_a_search_ranks_by_what_by_says(monkeypatch: pytest.MonkeyPatch, by: str, best: str, figure: str) -> None:
    """One pair has more output per chip, the other more per watt: each is first, and recommended, by its measure."""
    fast, thrifty = (
        ApartResult(4, 0.1, 0.01, rate, watts, 0.5, 0.5, 2) for rate, watts in ((300.0, 200.0), (200.0, 100.0))
    )

    def found(*_: Any) -> list[tuple[str, str, ApartResult]]:
        return [("fast", "tp1", fast), ("thrifty", "tp1", thrifty)]

    monkeypatch.setattr(ratio, "search", found)
    text = " ".join(simulate("--find", "--by", by).split())
    assert f"Most output per {by} within the limits: {best} and tp1 with 4 open, 2 chips: {figure}" in text
    assert json.loads(simulate("--find", "--by", by, "--json"))["results"][0]["prefill"] == best
    if by == "watt":  # the default
        assert json.loads(simulate("--find", "--json"))["results"][0]["prefill"] == best


def test_another_measure_is_refused() -> None:
    assert "--by price; use one of watt, chip" in simulate("--find", "--by", "price", code=2)


def test_nothing_found_says_what_is_in_the_way() -> None:
    """Latencies are named only if they have a limit and some numbers of servers use all chips."""
    assert why_unfit([], ["tp1"], 2, False).startswith("no layout of --prefill fits")
    assert why_unfit(["tp1"], [], 2, True).startswith("no layout of --decode fits")
    assert why_unfit(["tp8", "tp4"], ["dp8/ep8"], 8, True).startswith("--chips 8 are too few")
    assert "take 12 or more" in why_unfit(["tp8", "tp4"], ["dp8/ep8"], 8, False)
    assert why_unfit(["tp2"], ["tp2"], 5, False).startswith("no numbers of servers of these layouts use all 5 chips")
    assert why_unfit(["tp2"], ["tp1", "tp2"], 5, False).startswith("no decode server has room")
    assert why_unfit(["tp2"], ["tp1"], 5, True) == ""
    for more in ([], ["--json"], ["--tpot", "9"]):
        text = simulate("--find", "--decode", "tp2", *more, code=2)
        assert "error: --chips 2 are too few" in text and "longer latencies" not in text
    assert "allow longer latencies" in simulate("--find", "--tpot", "0.000001")


def test_nothing_that_fits_is_an_error_and_one_of_several_is_not() -> None:
    """The error names chip, layout and reason. Latencies, which have no limit here, are not named."""
    whole = ["simulate", "llama-3-8b", "--chip", "l40s", "--set", "chip.hbm_bytes=9e9", "--input", "9", "--output", "5"]
    for more in (["--concurrency", "2"], ["--concurrency", "2", "--json"], ["--find"]):
        done = CliRunner().invoke(app, [*whole, *more])
        assert done.exit_code == 2 and "longer latencies" not in done.output
        assert "error: llama-3-8b does not fit l40s with tp1: 16.1 GB of weights a chip" in done.stderr
    done = CliRunner().invoke(app, [*whole, "--concurrency", "2", "--layout", "tp1,tp8"])
    assert done.exit_code == 0 and "l40s tp1 is left out" in done.stdout and "tp8 " in done.stdout


def test_models_of_one_architecture_share_a_card() -> None:
    assert set(SAME.values()) <= set(cards()) and not set(SAME) & set(cards())
    r1, v3 = (ported(name, None) for name in ("deepseek-r1", "deepseek-v3"))
    assert str(r1) == str(v3)
