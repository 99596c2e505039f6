"""Chips: reasons for the numbers of shipped ones, replace(), chip and library files, and errors for invalid chips."""

from __future__ import annotations

from pathlib import Path

import pytest

from intaglio.chips import CHIPS, ChipError, Links, chip, library, replace, target


def test_the_claim_for_sohu_needs_over_four_fifths_of_its_peak() -> None:
    share = 8.74e15 / chip("sohu").peak_flops("e4m3")
    assert 0.8 < share < 0.9


@pytest.mark.parametrize("name", CHIPS)
def test_every_chip_gives_reasons_for_its_numbers(name: str) -> None:
    spec = chip(name)
    given = dict(spec.reasons)
    assert given
    assert all(hasattr(spec, field) for field in given)


def test_a_format_runs_as_the_narrowest_wider_format_of_the_array() -> None:
    assert chip("a100_sxm").runs_as("e4m3") == "bf16"
    assert chip("h100_sxm").runs_as("int4") == "int8"
    assert chip("sohu").runs_as("bf16") == "bf16"
    with pytest.raises(ChipError, match="no matrix rate for i32; it has .*: --weights bf16, int8 or int4"):
        chip("sohu").mac_rate("i32")


def test_replace_changes_fields_of_nested_parts() -> None:
    more = replace(chip("sohu"), hbm_bytes_per_s=8e12, hbm_latency_s=0.5e-6, topology="switch", name="other")
    assert (more.hbm_bytes_per_s, more.constants.hbm_latency_s, more.links.topology) == (8e12, 0.5e-6, "switch")
    assert more.cores == chip("sohu").cores
    with pytest.raises(ChipError, match="no field 'hbm'"):
        replace(more, hbm=1)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"links": Links(count=2, bytes_per_s=1e9, topology="k44", max_chips=8)},
            "k44 connects 8 chips with 4 links each",
        ),
        ({"count": 0}, "max_chips=8 but 0 links; one chip cannot reach another"),
        ({"topology": "mesh"}, "count=4 links to 7 other chips; a mesh needs equally many to each"),
        ({"topology": "none"}, "max_chips=8 but topology 'none'"),
        ({"topology": "ether"}, "topology 'ether'; use one of switch"),
        ({"cores": 0}, "cores=0; allowed: 1 to 1e"),
        ({"hbm_efficiency": 1.2}, "constants.hbm_efficiency=1.2; it must be above 0"),
        ({"macs": (("bf17", 4),)}, "macs lists bf17=4"),
        ({"macs": 2}, "macs=2; give .format, multiply-accumulates. pairs"),
    ],
)
def test_an_invalid_chip_is_refused_with_the_reason(changes: dict[str, object], why: str) -> None:
    with pytest.raises(ChipError, match=why):
        replace(chip("sohu"), **changes)


def test_the_error_for_an_unknown_chip_lists_the_known_ones() -> None:
    with pytest.raises(ChipError, match="unknown chip 'b300'; known: a100_sxm"):
        chip("b300")


BOARD = """
description = "a test board"
base = "h100_sxm"
library = "hopper"
cores = 64
[links]
count = 4
[reasons]
cores = "half a die"
[sheet_flops]
bf16 = 480e12
"""


def test_a_chip_file_takes_missing_values_from_its_base(tmp_path: Path) -> None:
    file = tmp_path / "board.toml"
    file.write_text(BOARD)
    board, base = target(str(file)), chip("h100_sxm")
    assert board.chip == replace(
        base, name="board", description="a test board", cores=64, count=4, reasons=board.chip.reasons
    )
    assert board.library == library("hopper")
    kept = {field: why for field, why in base.reasons if field not in ("cores", "links")}
    assert dict(board.chip.reasons) == {**kept, "cores": "half a die"}
    (tmp_path / "half.toml").write_text('base = "board"\nlibrary = "ampere"\ncores = 32\n')
    assert target(str(tmp_path / "half.toml")).chip.links.count == 4


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("cores = 64", "core = 64", "unknown field core; known: name, description, cores"),
        ("cores = 64", "cores = 6.4", "cores=6.4; wanted a whole number"),
        ("cores = 64", 'cores = "64"', "cores='64'; wanted a whole number"),
        ("cores = 64", "cores = 0", "chip 'board': cores=0; allowed: 1 to 1e"),
        ("count = 4", "lanes = 4", "unknown field links.lanes; known: count"),
        ('library = "hopper"', "library = 1", "library=1; give the name"),
        (
            'base = "h100_sxm"',
            "",
            "links.bytes_per_s, links.topology, links.max_chips missing, and no base has a value",
        ),
        ('"h100_sxm"', '"h101"', "no file for base 'h101'; looked for"),
        ('"h100_sxm"', '"board"', "base 'board' has 'board' as its own base"),
        ("480e12", "500e12", "the peak rate in bf16 is 4.797e\\+14 FLOP/s, but sheet_flops says 5e\\+14"),
        *(("480e12", v, f"sheet_flops.bf16 is {v}; allowed: a number of FLOP/s above 0") for v in ("0", "-1", "inf")),
        *(("480e12", v, "sheet_flops.bf16 is .*; allowed: a number") for v in ("nan", "true", "'x'", "[]")),
        (BOARD, 'base = "h100_sxm"\nlibrary = "hopper"\nsheet_flops = 3', "sheet_flops is 3; wanted a table"),
        ("[links]", "[links", "not TOML"),
        ('cores = "half', 'core = "half', "unknown field reasons.core; known: name, description, cores"),
    ],
)
def test_an_invalid_chip_file_is_refused_with_the_key(tmp_path: Path, old: str, new: str, why: str) -> None:
    file = tmp_path / "board.toml"
    file.write_text(BOARD.replace(old, new, 1))
    with pytest.raises(ChipError, match=f"board.toml: {why}"):
        chip(str(file))


def test_a_library_is_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    grid = "{ rows = [16, 64], columns = [32], max_values = 600, transposed = true }"
    file.write_text(f'description = "mine"\nbase = "ampere"\ntiles = [[64, 64], {grid}]\n')
    assert library(str(file)).tiles == ((16, 32), (32, 16), (64, 64))
    assert library(str(file)).protocols == library("ampere").protocols
    file.write_text('base = "ampere"\ntiles = [{ rows = [16] }]\n')
    with pytest.raises(ChipError, match="a grid has rows, columns"):
        library(str(file))
    file.write_text('base = "ampere"\ntiles = [64, 64]\n')
    with pytest.raises(ChipError, match="mine.toml: tiles has 64; give a tile"):
        library(str(file))
    with pytest.raises(ChipError, match="none.toml: No such file"):
        library(str(tmp_path / "none.toml"))
