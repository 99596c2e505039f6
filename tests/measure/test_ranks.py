"""Times of ranks: waiting times derived from the time in each collective, and a trace with a track for each rank."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.tiny import tiny
from typer.testing import CliRunner

import intaglio.cli
from intaglio.compiler import build_mesh
from intaglio.devices import StepResult
from intaglio.measure.ranks import chrome_trace, rank_times, waited
from intaglio.models import Checkpoint, port
from intaglio.ops import Collective, Grouped, Recv, Send
from intaglio.program import MeshProgram

NONE = np.empty(0, np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama", tmp_path_factory.mktemp("ranks") / "tiny", num_hidden_layers=2)


def timings_of(mesh: MeshProgram) -> list[dict[str, float]]:
    """Times as if rank 1 came last to every collective: it spends 1 there, the others 3; every other op takes 0.5."""
    return [
        {op.site: 0.5 if not isinstance(op, Collective) else 1.0 if p.rank == 1 else 3.0 for op in p.ops}
        for p in mesh.programs
    ]


def test_the_last_to_come_is_named(folder: Path) -> None:
    mesh = build_mesh(port(Checkpoint.open(folder)), "tp2pp2")
    timings = timings_of(mesh)
    waits = waited(mesh, timings)
    grouped = [sum(isinstance(op, Grouped) for op in p.ops) for p in mesh.programs]
    assert waits[0] == {1: 2.0 * grouped[0]} and waits[1] == {}
    receives = [sum(isinstance(op, Recv) for op in p.ops) for p in mesh.programs]
    assert receives == [0, 0, 1, 1] and waits[2][0] + waits[3][1] == 6.0
    steps = [StepResult(NONE, NONE, rank_timings=tuple(timings))] * 3
    for times, program in zip(rank_times(mesh, steps), mesh.programs, strict=True):
        collectives = [op for op in program.ops if isinstance(op, Collective)]
        assert times.collectives == len(collectives) * (1.0 if times.rank == 1 else 3.0)
        assert times.seconds == times.collectives + 0.5 * (len(program.ops) - len(collectives))
        assert times.waited == waits[times.rank]
    sends = sum(isinstance(op, Send) for op in mesh.programs[0].ops)
    assert sends == 1  # which waits for nobody


def test_the_trace_has_a_track_for_each_rank() -> None:
    events = json.loads(chrome_trace([{"a": 1.0, "b": 0.5}, {"a": 0.25}]))["traceEvents"]
    assert [e["args"]["name"] for e in events if e["ph"] == "M"] == ["rank 0", "rank 1"]
    spans = [(e["pid"], e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert spans == [(0, "a", 0.0, 1e6), (0, "b", 1e6, 5e5), (1, "a", 0.0, 2.5e5)]


def test_profile_of_ranks(folder: Path, tmp_path: Path) -> None:
    words = ["profile", str(folder), "--layout", "tp2", "--prompt-tokens", "8", "--runs", "1", "--no-cache"]
    done = CliRunner().invoke(intaglio.cli.app, [*words, "--json", "--trace", str(tmp_path / "trace")])
    assert done.exit_code == 0, done.output
    ranks = json.loads(done.stdout)["ranks"]
    assert [r["rank"] for r in ranks] == [0, 1] and all(0 < r["collectives"] < r["seconds"] for r in ranks)
    tracks = {e["pid"] for e in json.loads((tmp_path / "trace").read_text())["traceEvents"]}
    assert tracks == {0, 1}
    wrong = CliRunner().invoke(intaglio.cli.app, ["profile", str(folder), "--trace", str(tmp_path / "trace")])
    assert wrong.exit_code == 2 and "add --layout" in wrong.output
