"""Profiles of a model: sites folded over layers, sums equal to the step's time, roofline bounds, worst sites first."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.tiny import tiny
from typer.testing import CliRunner

import intaglio.cli
from intaglio import LLM
from intaglio.batch import Batch
from intaglio.devices import BlockingExecutable, StateSpec, StepRequest, StepResult
from intaglio.measure.bench import MOST_MEGABYTES, Bound, Roofs, measured_roofs, moved
from intaglio.measure.profile import WORST, Profile, fold, profile
from intaglio.program import Program


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama", tmp_path_factory.mktemp("profile") / "tiny", num_hidden_layers=3)


class Clockwork(BlockingExecutable):
    """An executable whose every op takes as many ms as its place in the Program, and 7 ms go by beside them."""

    def __init__(self, program: Program) -> None:
        self.program, self.state, self.now = program, StateSpec(64, 16), 0.0
        self.ms = {op.site: float(i) for i, op in enumerate(program.ops)}

    def run(self, request: StepRequest) -> StepResult:
        self.now += (sum(self.ms.values()) + 7) / 1e3 if request.timed else 0.005
        timings = {site: ms / 1e3 for site, ms in self.ms.items()} if request.timed else {}
        return StepResult(np.zeros(0, np.int32), np.zeros(0, np.float32), timings=timings)


ROOFS = Roofs(bandwidth=lambda megabytes: 1e9, peak=lambda format: 1e8)


def run(program: Program, roofs: Roofs | None = ROOFS) -> list[Profile]:
    executable = Clockwork(program)
    return profile(
        executable, roofs, sequences=2, prompt_tokens=40, runs=2, max_batch_tokens=32, clock=lambda: executable.now
    )


def test_sites_fold_over_layers() -> None:
    assert fold("layers.3.mlp.down_proj") == "layers.*.mlp.down_proj"
    assert fold("layers.31.experts.7.up_proj") == "layers.*.experts.*.up_proj"
    assert fold("lm_head") == "lm_head" and fold("layers2.norm") == "layers2.norm"


def test_times_add_up(folder: Path) -> None:
    program = LLM(folder, device="oracle").model.program
    prefill, decode = run(program)
    assert (prefill.phase, prefill.steps, decode.phase, decode.steps) == ("prefill", 3, "decode", 1)
    one = sum(range(len(program.ops)))
    for p in (prefill, decode):
        assert [s.site for s in p.sites] == list(dict.fromkeys(fold(op.site) for op in program.ops))
        assert sum(s.count for s in p.sites) == len(program.ops)
        assert p.seconds == pytest.approx(p.steps * (one + 7) / 1e3)
        assert p.untimed_seconds == pytest.approx(p.steps * 0.005)
        assert p.outside_seconds == pytest.approx(p.steps * 7 / 1e3)
        assert sum(s.seconds for s in p.sites) + p.outside_seconds == pytest.approx(p.seconds)
        assert p.outside_share == pytest.approx(7 / (one + 7))
    places = [i for i, op in enumerate(program.ops) if fold(op.site) == "layers.*.mlp.down_proj"]
    [down] = [s for s in decode.sites if s.site == "layers.*.mlp.down_proj"]
    assert (down.count, down.label) == (3, "layers.*.mlp.down_proj ×3")
    assert down.seconds == pytest.approx(sum(places) / 1e3)


def test_bounds_are_the_work_over_the_roofs(folder: Path) -> None:
    program = LLM(folder, device="oracle").model.program
    batches: list[Batch] = []

    class Noting(Clockwork):
        def run(self, request: StepRequest) -> StepResult:
            batches.append(request.batch)
            return super().run(request)

    executable = Noting(program)
    prefill, _ = profile(executable, ROOFS, prompt_tokens=20, runs=1, clock=lambda: executable.now)
    work = program.work(batches[0])
    for s in prefill.sites:
        mine = [w for site, w in work.items() if fold(site) == s.site]
        want = Bound(sum(map(moved, mine)) / 1e9, sum(w.flops for w in mine) / 1e8)
        assert s.bound_seconds == pytest.approx(want.seconds) and s.bound_by == want.by
        assert s.lost == pytest.approx(s.seconds - want.seconds)


def test_the_worst_are_sorted_and_in_words(folder: Path) -> None:
    for roofs in (ROOFS, None):
        for p in run(LLM(folder, device="oracle").model.program, roofs):
            lost = [s.lost for s in p.worst]
            assert len(lost) == WORST and lost == sorted((s.lost for s in p.sites), reverse=True)[:WORST]
            text = p.gap(p.worst[0])
            assert text.startswith(f"{p.worst[0].label} takes {p.worst[0].seconds * 1e3:,.2f} ms")
            assert ("lost" in text) == (roofs is not None) and f"% of {p.phase}" in text


def test_site_at_its_bound_loses_nothing(folder: Path) -> None:
    slow = Roofs(bandwidth=lambda megabytes: 1.0, peak=lambda format: 1.0)
    [_, decode] = run(LLM(folder, device="oracle").model.program, slow)
    [head] = [s for s in decode.sites if s.site == "lm_head"]
    assert head.lost < 0 and decode.gap(head).endswith("it is at its roof")


def test_profile_of_the_host(folder: Path) -> None:
    llm = LLM(folder, threads=2)
    for p in profile(llm.engine.executable, ROOFS, prompt_tokens=32, runs=2):
        assert 0 <= p.outside_seconds < p.seconds
        assert sum(s.seconds for s in p.sites) < 2 * p.seconds and all(s.seconds >= 0 for s in p.sites)


def test_bandwidth_is_measured_within_a_gigabyte(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("intaglio._native.read_bandwidth", lambda n, megabytes, isa: asked.append(megabytes) or 1.0)
    roofs = measured_roofs(LLM(folder).device)
    assert isinstance(roofs, Roofs)
    for megabytes in (1, 1024, 2048, 1 << 20):
        roofs.bandwidth(megabytes)
    assert asked == [1, MOST_MEGABYTES] and MOST_MEGABYTES == 1024


def test_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("intaglio.measure.bench.measured_roofs", lambda device: ROOFS)
    words = ["profile", str(folder), "--prompt-tokens", "16", "--sequences", "2", "--runs", "1", "--no-cache"]
    text = CliRunner().invoke(intaglio.cli.app, words)
    assert text.exit_code == 0, text.output
    for part in ("prefill of 2 x 16 tokens", "decode of 2 after 16 tokens", "layers.*", "outside kernels", " takes "):
        assert part in text.stdout
    phases = json.loads(CliRunner().invoke(intaglio.cli.app, [*words, "--json"]).stdout)["phases"]
    assert [(p["phase"], p["sequences"], p["prompt_tokens"]) for p in phases] == [("prefill", 2, 16), ("decode", 2, 16)]
    for p in phases:
        assert {s["site"] for s in p["worst"]} <= {s["site"] for s in p["sites"]}
        lost = [s["lost"] for s in p["worst"]]
        assert len(lost) == WORST and lost == sorted(lost, reverse=True) and all(s["text"] for s in p["worst"])
        assert all(s["bound_seconds"] >= 0 and s["count"] >= 1 for s in p["sites"])
    far = CliRunner().invoke(intaglio.cli.app, ["profile", str(folder), "--prompt-tokens", "9999"])
    assert far.exit_code == 2 and "at most" in far.stderr
