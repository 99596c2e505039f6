"""Expert placements, their balancer and files: every expert has a rank, ranks hold as many, loads are nearly equal."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.program.expert_placement import (
    ExpertPlacement,
    PlacementError,
    balance,
    check_writable,
    rank_loads,
    replace_file,
    replicate,
    slots_of,
    turns,
)

SITE = "layers.0.mlp.experts"


@st.composite
def loads(draw: st.DrawFn) -> tuple[np.ndarray, int, int]:
    """(tokens of each expert, ranks, experts on each rank)."""
    experts, ranks = draw(st.integers(1, 40)), draw(st.integers(1, 9))
    each = draw(st.integers(-(-experts // ranks), experts))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["even", "skewed", "few", "none"]))
    tokens = {
        "even": rng.integers(0, 100, experts), "skewed": (rng.pareto(1.0, experts) * 10).astype(np.int64),
        "few": rng.integers(0, 2, experts) * 1000, "none": np.zeros(experts, np.int64),
    }[kind]  # fmt: skip
    return tokens.astype(np.float64), ranks, each


@settings(max_examples=150, deadline=None)
@given(loads())
def test_balanced(case: tuple[np.ndarray, int, int]) -> None:
    load, ranks, each = case
    held = balance(load, ranks, each)
    ExpertPlacement({SITE: held}).check(len(load), ranks)
    assert {len(own) for own in held} == {each}
    copies = np.bincount([e for own in held for e in own], minlength=len(load))
    share = load / copies
    sums = rank_loads(held, share)
    np.testing.assert_allclose(sums.sum(), load.sum())
    assert sums.max() - sums.min() <= share.max() * (1 + 1e-6)
    assert sums.max() <= load.sum() / ranks + share.max() * (1 + 1e-6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=5), st.integers(0, 5), st.integers(1, 4))
def test_replication_is_the_best_there_is(tokens: list[int], more: int, most: int) -> None:
    """The largest load of a copy is as small as any number of copies of each expert can make it."""
    load, slots = np.array(tokens, np.float64), min(len(tokens) + more, len(tokens) * most)
    copies = replicate(load, slots, most)
    assert copies.sum() == slots and 1 <= copies.min() <= copies.max() <= most
    every = (c for c in product(range(1, most + 1), repeat=len(tokens)) if sum(c) == slots)
    best = min((load / np.array(c)).max() for c in every)
    assert (load / copies).max() == pytest.approx(best)


def test_hot_experts_get_copies() -> None:
    held = balance(np.array([90.0, 1, 1, 1, 1, 1]), 3, 3)
    assert sum(0 in own for own in held) == 3
    assert turns(((0, 1), (0, 2)), 1) == {"held": (0, 2), "copy": (1, 0), "copies": (2, 1), "rank": 1, "ranks": 2}


def test_text_and_errors() -> None:
    placement = ExpertPlacement.even([SITE, "layers.1.mlp.experts"], 8, 4, 3)
    assert ExpertPlacement.parse(placement.text()) == placement
    assert [len(own) for own in placement.layers[SITE]] == [3] * 4 and slots_of(8, 4, 3) == 3
    placement.check(8, 4)
    with pytest.raises(PlacementError, match="is JSON such as"):
        ExpertPlacement.parse("[1, 2]")
    for ranks, why in (
        (((0, 1), (2,)), r"places \[2, 1\] experts; wanted equal numbers on 2 ranks"),
        (((0, 1), (1, 1)), r"rank 1 holds experts \(1, 1\); wanted different numbers of 0..2"),
        (((0, 1), (1, 3)), r"rank 1 holds experts \(1, 3\); wanted different numbers of 0..2"),
        (((0, 1), (0, 1)), r"no rank holds experts \[2\]"),
    ):
        with pytest.raises(PlacementError, match=why):
            ExpertPlacement({SITE: ranks}).check(3, 2)
    with pytest.raises(PlacementError, match="9 on each of 2 ranks, but there are 8; use fewer"):
        ExpertPlacement.even([SITE], 8, 2, 9)


def test_a_placement_is_kept_in_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, placement = tmp_path / "placement.json", ExpertPlacement.even([SITE], 8, 4, 3)
    assert ExpertPlacement.read(file) is None
    for kept in (placement, ExpertPlacement.even([SITE], 6, 2, 0)):
        kept.keep(file)
        assert ExpertPlacement.read(file) == kept and [*tmp_path.iterdir()] == [file]
    file.write_text("[1, 2]")
    with pytest.raises(PlacementError, match=r"placement\.json: an expert placement is JSON such as"):
        ExpertPlacement.read(file)
    with pytest.raises(PlacementError, match="is a directory|Is a directory"):
        ExpertPlacement.read(tmp_path)
    for _ in range(2):
        caplog.clear()
        placement.keep(tmp_path / "none" / "placement.json")
        assert re.search(r"is not kept in .*none/placement\.json: .*No such file", caplog.text)
    (tmp_path / "folder").mkdir()
    placement.keep(tmp_path / "folder")
    assert "is not kept in" in caplog.text and {p.name for p in tmp_path.iterdir()} == {"placement.json", "folder"}


def test_writers_of_one_file_leave_whole_placements(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Threads replace one file by placements of different lengths; every read finds one of them, whole."""
    file, placements = tmp_path / "placement.json", [ExpertPlacement.even([SITE], n, 4, 0) for n in (8, 400)]

    def write(placement: ExpertPlacement) -> None:
        for _ in range(100):
            placement.keep(file)

    write(placements[0])
    with ThreadPoolExecutor(2) as writers:
        ended = [writers.submit(write, p) for p in placements]
        while not all(e.done() for e in ended):
            assert ExpertPlacement.read(file) in placements
    assert ExpertPlacement.read(file) in placements and [*tmp_path.iterdir()] == [file] and not caplog.text


def test_a_failed_replacement_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "placement.json"
    file.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        replace_file(file, "\ud800")
    assert file.read_text() == "old" and [*tmp_path.iterdir()] == [file]


def test_a_folder_is_tried_before_experts_move(tmp_path: Path) -> None:
    check_writable(tmp_path / "placement.json")
    assert not [*tmp_path.iterdir()]
    (tmp_path / "file").touch()
    with pytest.raises(PlacementError, match=r"placement .*file/p\.json: no file can be written to .*Not a directory"):
        check_writable(tmp_path / "file" / "p.json")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"a": [[0.9, 1.7]]}', r"a: rank 0 holds 0\.9; allowed: integers from 0"),
        ('{"a": [[0], [1, true]]}', "a: rank 1 holds True; allowed"),
        ('{"a": [[-1]]}', "a: rank 0 holds -1; allowed"),
        ('{"a": [["1"]]}', "a: rank 0 holds '1'; allowed"),
        ('{"a": [[1e400]]}', "a: rank 0 holds inf; allowed"),
        ('{"a": [[NaN]]}', "a: rank 0 holds nan; allowed"),
        ('{"a": ["01"]}', r"a is \['01'\]; wanted a list with a list of experts for each rank"),
        ('{"a": {"0": [1]}}', "a is {'0': .*}; wanted a list"),
        ('{"a": [[0]], "b": [[0]], "a": [[1]]}', "'a' is written twice; write each site once"),
        ("3", "is JSON such as .*; this is 3"),
        ('{"a": [[' + "9" * 5000 + "]]}", "is JSON such as .*; this is not: Exceeds the limit"),
        ("[" * 100_000, "is JSON such as .*; this is not: .*recursion"),
    ],
)  # fmt: skip
def test_only_integers_are_experts(text: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(PlacementError, match=rf"p\.json: .*{why}"):
        ExpertPlacement.read(tmp_path / "p.json")
