"""Chips: sheets' peaks come out, replace() reaches every part, and chips that cannot be are refused with the reason."""

from __future__ import annotations

import pytest

from intaglio.chips import CHIPS, ChipError, Links, chip, replace

SHEET = {  # dense FLOP/s by the public data sheets
    ("a100_sxm", "bf16"): 312e12, ("a100_sxm", "int8"): 624e12, ("h100_sxm", "bf16"): 989e12,
    ("h100_sxm", "e4m3"): 1979e12, ("h200_sxm", "e4m3"): 1979e12, ("b200_sxm", "bf16"): 2250e12,
    ("b200_sxm", "e2m1"): 9000e12, ("gb200", "bf16"): 2500e12, ("l40s", "bf16"): 362e12, ("tpu_v5e", "bf16"): 197e12,
    ("tpu_v6e", "int8"): 1836e12,
}  # fmt: skip


@pytest.mark.parametrize(("name", "format"), SHEET)
def test_peaks_are_those_of_the_sheets(name: str, format: str) -> None:
    assert chip(name).peak_flops(format) == pytest.approx(SHEET[name, format], rel=0.01)


def test_sohu_can_deliver_the_claim_only_above_four_fifths_of_its_peak() -> None:
    share = 8.74e15 / chip("sohu").peak_flops("e4m3")
    assert 0.8 < share < 0.9


@pytest.mark.parametrize("name", CHIPS)
def test_every_preset_says_where_its_numbers_are_from(name: str) -> None:
    spec = chip(name)
    given = dict(spec.reasons)
    assert given
    assert all(hasattr(spec, field) for field in given)


def test_a_format_runs_as_the_narrowest_that_holds_its_values() -> None:
    assert chip("a100_sxm").runs_as("e4m3") == "bf16"
    assert chip("h100_sxm").runs_as("int4") == "int8"
    assert chip("sohu").runs_as("bf16") == "bf16"
    with pytest.raises(ChipError, match="no matrix rate for i32"):
        chip("sohu").mac_rate("i32")


def test_replace_reaches_into_the_parts() -> None:
    more = replace(chip("sohu"), hbm_bytes_per_s=8e12, hop_s=0.5e-6, topology="switch", name="other")
    assert (more.hbm_bytes_per_s, more.constants.hop_s, more.links.topology) == (8e12, 0.5e-6, "switch")
    assert more.cores == chip("sohu").cores
    with pytest.raises(ChipError, match="no field 'hbm'"):
        replace(more, hbm=1)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"tiles": ((1024, 1024),)}, "tile 1024x1024 takes 4194304 bytes of accumulators"),
        ({"sram_bytes": 1000}, "needs .* bytes of SRAM for two stages, of 1000"),
        ({"links": Links(count=2, bytes_per_s=1e9, topology="k44", most=8)}, "k44 joins 8 chips by 4 links each"),
        ({"count": 0}, "8 chips but 0 links: none can reach another"),
        ({"topology": "none"}, "8 chips but no links"),
        ({"topology": "ether"}, "topology 'ether'; use one of switch"),
        ({"cores": 0}, "cores=0; it must be above 0"),
        ({"hbm_share": 1.2}, "constants.hbm_share=1.2; a share"),
        ({"macs": (("bf17", 4),)}, "macs lists bf17=4"),
    ],
)
def test_an_impossible_chip_is_refused_with_the_reason(changes: dict[str, object], why: str) -> None:
    with pytest.raises(ChipError, match=why):
        replace(chip("sohu"), **changes)


def test_an_unknown_chip_names_those_there_are() -> None:
    with pytest.raises(ChipError, match="no chip called 'b300'; there are sohu"):
        chip("b300")
