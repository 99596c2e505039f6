"""Records of a library's kernels: which one runs a call, what it changes, and errors of a file that describes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from intaglio.chips import ChipError, library, target

FILE = """
description = "a test library"
base = "hopper"

[[kernels]]
op = "prefill"
kernel = "wide"
formats = ["e4m3"]
head_dims = [129, 256]
why = "a test"
key_tile = 32

[[kernels]]
op = "prefill"
kernel = "slow"
default = false
why = "a test"
tiles = [[64, 64]]
mxu_efficiency = 0.25
"""


def test_the_first_record_that_fits_a_call_gives_its_values(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(FILE)
    own = library(str(file))
    on = target("h100_sxm", str(file))
    assert on.kernel("prefill", "e4m3", 192).library.key_tile == 32
    assert on.kernel("prefill", "e4m3", 192).library.mxu_efficiency == own.mxu_efficiency
    for op, format, width in (("prefill", "bf16", 192), ("prefill", "e4m3", 128), ("decode", "e4m3", 192)):
        assert on.kernel(op, format, width).library == own.with_record(None)
    slow = on.kernel("prefill", "bf16", 64, "slow").library
    assert (slow.tiles, slow.mxu_efficiency, slow.kernels) == (((64, 64),), 0.25, ())
    names = [r.kernel for r in own.kernels]
    assert names[:2] == ["wide", "slow"] and names[2:] == [r.kernel for r in library("hopper").kernels]
    with pytest.raises(ChipError, match="has no kernel 'fast'; it has wide, slow, flashinfer"):
        on.kernel("prefill", name="fast")


def test_a_changed_field_holds_for_every_kernel(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(FILE)
    on = target("h100_sxm", str(file)).with_library(key_tile=16)
    assert on.kernel("prefill", "e4m3", 192).library.key_tile == on.kernel("decode").library.key_tile == 16


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ('op = "prefill"', 'op = "attention"', "kernels.op='attention'; use one of products, prefill, decode"),
        ("key_tile = 32", "key_tiles = 32", "unknown field kernels.wide.key_tiles; known: "),
        ("key_tile = 32", "key_tile = 0", "key_tile=0; allowed: 1"),
        ("key_tile = 32", "key_tile = 1.5", "kernels.wide.key_tile=1.5; wanted a whole number"),
        ('why = "a test"', "", "kernels.wide.why missing"),
        ("head_dims = [129, 256]", "head_dims = [129]", "kernels.wide.head_dims=.129.; wanted"),
    ],
)
def test_an_invalid_record_is_refused_with_the_key(tmp_path: Path, old: str, new: str, why: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(FILE.replace(old, new, 1))
    with pytest.raises(ChipError, match=why):
        library(str(file))


def test_every_shipped_record_has_a_reason_and_changes_something() -> None:
    for name in ("ada", "ampere", "blackwell", "hopper"):
        for record in library(name).kernels:
            assert len(record.why) > 10 and record.changes, (name, record.kernel)
