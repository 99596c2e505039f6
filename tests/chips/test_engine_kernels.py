"""Kernels of serving engines as data: records by generation, constants, and the factor on memory rates."""

from __future__ import annotations

from pathlib import Path

import pytest

from intaglio.chips import CHIPS, ChipError, Target, engine_kernels, engine_library, engine_names, library, target
from intaglio.chips.engine_kernels import CONSTANTS, GENERATIONS, engine_records, entries, measured_generations


@pytest.mark.parametrize("engine", engine_names())
@pytest.mark.parametrize("chip", ["h100_sxm", "h200_sxm", "b200_sxm", "l40s", "sohu"])
def test_every_kernel_fits_every_chip_and_is_only_used_by_name(engine: str, chip: str) -> None:
    base = target(chip)
    on = Target(base.chip, engine_library(engine, base.library))
    mine = on.library.kernels[: -len(base.library.kernels) or None]
    assert len(mine) == len(entries(engine)) and on.library.engine == engine
    for record in mine:
        assert not record.default and record.why.startswith("fitted on rows marked fit of table")
        own = on.reduced(record)
        assert own.library.memory_factor == 1 and not own.library.kernels
        assert 0 < own.chip.constants.hbm_efficiency <= 1 and 0 < own.chip.constants.l2_efficiency <= 1
    for op in ("prefill", "decode", "experts"):
        assert on.library.record(op, "bf16", 128) == base.library.record(op, "bf16", 128)


def test_the_engines_are_known() -> None:
    assert engine_names() == ("sglang", "trtllm", "vllm")


def test_an_engine_without_a_file_changes_nothing() -> None:
    assert engine_library("llama", library("hopper")) is library("hopper")
    assert engine_records("llama", "hopper") == ()


@pytest.mark.parametrize(("text", "why"), [("[[kernels", "not TOML"), ("kernels = 3", "kernels=3"), ("", "None")])
def test_a_broken_file_of_an_engine_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, why: str
) -> None:
    monkeypatch.setattr(engine_kernels, "KERNELS", tmp_path)
    file = tmp_path / f"broken{abs(hash(text))}.toml"  # a name of its own, since entries() remembers what it read
    file.write_text(text)
    with pytest.raises(ChipError, match=f"^{file}: .*{why}"):
        engine_library(file.stem, library("hopper"))


def test_constants_are_those_of_the_generation_or_of_the_one_asked_for() -> None:
    both = [(e, k) for e in engine_names() for k in entries(e) if all(g in k for g in GENERATIONS)]
    assert both
    for engine, entry in both:
        number = entries(engine).index(entry)
        for generation in GENERATIONS:
            own = dict(engine_records(engine, generation)[number].changes)
            other = next(g for g in GENERATIONS if g != generation)
            lent = dict(engine_records(engine, generation, constants=other)[number].changes)
            names = CONSTANTS[entry["op"]]
            assert all(own[name] == entry[generation][name] and lent[name] == entry[other][name] for name in names)
            assert {n: v for n, v in own.items() if n not in names} == {n: v for n, v in lent.items() if n not in names}
    single = [(e, k, g) for e in engine_names() for k in entries(e) for g in GENERATIONS if g not in k]
    for engine, entry, missing in single:
        number = entries(engine).index(entry)
        assert engine_records(engine, missing)[number].changes == engine_records(engine, "ada")[number].changes


def test_the_generations_of_a_kernels_measurements_are_those_with_constants() -> None:
    for engine in engine_names():
        for entry in entries(engine):
            found = measured_generations(engine, entry["kernel"])
            assert found and {g for g in GENERATIONS if g in entry} <= set(found) <= set(GENERATIONS)
    assert measured_generations("vllm", "none") == measured_generations("llama", "none") == ()


def test_constants_of_links_that_another_generation_lends_follow_the_links() -> None:
    base, lent = library("blackwell"), library("hopper")
    for engine in engine_names():
        for entry, record in zip(entries(engine), engine_library(engine, base, "hopper").kernels, strict=False):
            if entry["op"] == "collectives":
                found, given = dict(record.changes), entry["hopper"]
                assert found["barrier_s"] == pytest.approx(given["barrier_s"] * base.barrier_s / lent.barrier_s)
                assert found["small_reduce_efficiency"] == given["small_reduce_efficiency"]
                assert found["link_efficiency"] == min(1, given["link_efficiency"] * base.link_efficiency)
    own = engine_library("vllm", base)
    assert own.kernels[: len(entries("vllm"))] == engine_records("vllm", "blackwell")


@pytest.mark.parametrize("chip", sorted(CHIPS))
def test_the_memory_factor_never_gives_more_than_the_peak(chip: str) -> None:
    on = target(chip)
    record = engine_records("vllm", "hopper")[0]
    for factor in (0.1, 1.0, 3.0):
        changed = record.__class__(op="products", kernel="k", why="a test", changes=(("memory_factor", factor),))
        found = on.reduced(changed).chip
        assert found.constants.hbm_efficiency == pytest.approx(min(1, factor * on.chip.constants.hbm_efficiency))
        assert found.hbm_rate <= found.hbm_bytes_per_s
