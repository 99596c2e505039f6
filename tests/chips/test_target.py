"""Targets: a chip with a kernel library, changes to either, and errors for combinations that do not fit."""

from __future__ import annotations

import json
from typing import get_type_hints

import pytest
from typer.testing import CliRunner

from intaglio.chips import CHIPS, DEFAULT_LIBRARY, LIBRARIES, ChipError, Target, chip, library, ranges, target
from intaglio.chips.library import KernelLibrary
from intaglio.chips.spec import ChipSpec, Constants, Energy, Links
from intaglio.cli import app


def test_every_chip_has_a_default_library_and_every_library_a_chip() -> None:
    assert DEFAULT_LIBRARY.keys() == CHIPS.keys()
    assert set(DEFAULT_LIBRARY.values()) == LIBRARIES.keys()
    assert target("h100_sxm", "ampere") == Target(chip("h100_sxm"), library("ampere"))
    with pytest.raises(ChipError, match="unknown kernel library 'volta'; known: ada, ampere"):
        target("h100_sxm", "volta")


def test_chip_and_library_change_independently() -> None:
    on = target("sohu").changed(
        {"chip.hbm_bytes_per_s": 8e12, "library.link_latency_s": 2e-6, "chip.topology": "switch"}
    )
    assert (on.chip.hbm_bytes_per_s, on.library.link_latency_s, on.chip.links.topology) == (8e12, 2e-6, "switch")
    assert on.with_chip(hbm_bytes_per_s=6e12, topology="k44").chip == chip("sohu")
    assert on.with_library(link_latency_s=1e-6).library == library("static")
    assert on.get("chip.hbm_latency_s") == chip("sohu").constants.hbm_latency_s


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("link_latency_s", "unknown field 'link_latency_s': write library.link_latency_s"),
        ("hbm_bytes_per_s", "unknown field 'hbm_bytes_per_s': write chip.hbm_bytes_per_s"),
        ("name", "unknown field 'name': write chip.name or library.name"),
        ("speed", "unknown field 'speed': write chip.FIELD or library.FIELD"),
        ("chip.link_latency_s", "a chip has no field 'link_latency_s'; it has acc_bytes, "),
        ("library.hbm_bytes", "a kernel library has no field 'hbm_bytes'; it has activation_bytes, "),
        ("core.x", "unknown field 'core.x': write chip.FIELD or library.FIELD"),
    ],
)
def test_the_error_for_an_unknown_field_says_what_to_write(name: str, why: str) -> None:
    with pytest.raises(ChipError, match=why):
        target("sohu").changed({name: 1})
    with pytest.raises(ChipError, match=why):
        target("sohu").get(name)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"library.tiles": ((1024, 1024),)}, "tile 1024x1024 needs 4194304 bytes of accumulators"),
        ({"chip.sram_bytes": 1000}, "needs .* bytes of SRAM for two stages; a core has 1000"),
        ({"library.tiles": ()}, "library 'static': tiles is empty"),
        ({"library.mxu_efficiency": 1.2}, "library 'static': mxu_efficiency=1.2; it must be above 0"),
        ({"library.launch_s": -1}, "launch_s=-1; allowed: 0 to 1"),
        ({"library.expert_tiles": "some"}, "expert_tiles='some'; use one of best, by_experts"),
    ],
)
def test_a_library_that_does_not_fit_the_chip_is_refused(changes: dict[str, object], why: str) -> None:
    with pytest.raises(ChipError, match=why):
        target("sohu").changed(changes)


def test_every_number_has_a_range() -> None:
    shares = {
        "hbm_efficiency",
        "l2_efficiency",
        "mxu_efficiency",
        "grouped_mxu_efficiency",
        "l2_usable",
        "link_efficiency",
        "small_reduce_efficiency",
    }  # checked as such
    listed = (tuple[int, ...], tuple[int, int, int], tuple[tuple[int, int], ...])
    numbers = {
        name
        for part in (ChipSpec, Links, Energy, Constants, KernelLibrary)
        for name, kind in get_type_hints(part).items()
        if kind in (int, float, *listed)
    }
    assert numbers - shares == {*ranges.CHIP, *ranges.LINKS, *ranges.ENERGY, *ranges.CONSTANTS, *ranges.LIBRARY}


def simulate(*words: str) -> tuple[float, str]:
    """Seconds of a decode step, and the name of the library."""
    found = CliRunner().invoke(app, ["simulate", "llama-3-8b", "--chip", "h100_sxm", "--json", *words])
    assert found.exit_code == 0, found.output
    answer = json.loads(found.stdout)
    return next(p["step_seconds"] for p in answer["phases"] if p["phase"] == "decode"), answer["library"]


def test_the_command_line_changes_chip_and_library() -> None:
    base, name = simulate()
    assert name == "hopper"
    assert simulate("--set", "chip.hbm_bytes_per_s=6e12")[0] < base
    assert simulate("--set", "library.launch_s=0")[0] < base
    assert simulate("--set", "library.persistent=true", "--set", "library.kv_splits=1,2")[0] != base
    assert simulate("--set", "chip.macs={bf16 = 1, e4m3 = 2}")[0] > base
    assert simulate("--set", "library.tiles=[16, 64], [64, 64]", "--set", "chip.array_shape=16,8,32")[0] > 0
    other, name = simulate("--library", "ampere")
    assert name == "ampere" and other != base


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("launch_s=0", "write library.launch_s"),
        ("chip.hbm", "wanted field=value, such as chip.hbm_bytes_per_s=8e12"),
        ("library.persistent=2", "persistent=2; wanted true or false, such as false"),
        ("chip.cores=many", "cores=many; wanted a whole number, such as 132"),
        ("chip.cores=1.5", "cores=1.5; wanted a whole number, such as 132"),
        ("chip.macs=2", "wanted a list, each of it [a text, a whole number], such as {bf16 = 2048,"),
        ("chip.macs={bf17 = 2}", "macs lists bf17=2; formats are"),
        ("chip.array_shape=16", "wanted [a whole number, a whole number, a whole number], such as 16,8,16"),
        ("chip.array_shape=0,0,0", "array_shape=(0, 0, 0); allowed: 1 to 100,000"),
        ("chip.clock_hz=1e30", "clock_hz=1e+30; allowed: 1,000 to 1e+12"),
        ("chip.clock_hz=inf", "clock_hz=inf; allowed: 1,000 to 1e+12"),
        ("chip.clock_hz=nan", "clock_hz=nan; allowed: 1,000 to 1e+12"),
        ("chip.clock_hz=", "clock_hz=; wanted a number, such as 1830000000.0"),
        ("chip.links=1", "chip.links has parts; give one of them: chip.count, chip.bytes_per_s"),
        ("library.split_k=0", "split_k=(0,); allowed: 1 to 1e+09"),
        ("library.split_k=", "split_k=(); allowed: 1 to 1e+09"),
        ("library.launch_s=1e30", "launch_s=1e+30; allowed: 0 to 1"),
        ("library.decode_jobs=0", "decode_jobs=0; allowed: 1 to 1e+09"),
        ("library.protocols=1", "library.protocols is a table; write it in a library file"),
        ("chip.hbm_bytes=1e6", "has 0.001 GB of HBM"),
        ("library.tiles=1,2", "wanted a list, each of it [a whole number, a whole number], such as [16, 64]"),
    ],
)
def test_the_command_line_says_what_to_write(change: str, why: str) -> None:
    found = CliRunner().invoke(app, ["simulate", "llama-3-8b", "--chip", "h100_sxm", "--set", change])
    assert found.exit_code == 2 and why in " ".join(found.output.split())


def test_libraries_are_listed() -> None:
    run = CliRunner()
    assert json.loads(run.invoke(app, ["libraries", "--json"]).stdout).keys() == LIBRARIES.keys()
    assert "merge_launch" in run.invoke(app, ["libraries", "hopper"]).stdout
    assert "ampere" in run.invoke(app, ["libraries"]).stdout
    assert json.loads(run.invoke(app, ["chips", "--json"]).stdout)["l40s"]["library"] == "ada"
