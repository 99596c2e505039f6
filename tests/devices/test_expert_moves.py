"""Experts that move between ranks while steps and requests run: tokens are counted, and the bits stay the same."""

from __future__ import annotations

import gc
import time
import weakref
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from devices.test_expert_placement import PAGE, STATE, mesh_of, open_tiny, shuffled, steps
from devices.test_hosts import TOKEN, agents
from prometheus_client.parser import text_string_to_metric_families
from support.served import served
from support.tiny import tiny

from intaglio.batch import Chunk, bind
from intaglio.compiler import LayoutError
from intaglio.devices import (
    DeviceError,
    Executable,
    HostsDevice,
    MeshDevice,
    RanksDevice,
    ReportedWeights,
    StepRequest,
)
from intaglio.devices.host import HostDevice
from intaglio.devices.processes.hosts import HostsExecutable, Rendezvous
from intaglio.llm import LLM
from intaglio.models import Checkpoint, port
from intaglio.ops import Experts, Route
from intaglio.program import ExpertPlacement, PlacementError
from intaglio.program.source import restacked
from intaglio.runtime import RequestError, SamplingParams

PATIENT = 120.0  # seconds after which experts should have moved, however busy the machine is


def waited(executable: Executable) -> None:
    while not executable.experts_loaded():
        time.sleep(0.001)


@pytest.mark.parametrize(
    ("family", "layout"), [("qwen3moe", "ep2r2"), ("gptoss", "tp2ep2r1"), ("deepseekv2", "ep2pp2r1")]
)
def test_moved_experts_have_the_bits_of_a_program_that_places_them(
    tmp_path: Path, family: str, layout: str, rng: np.random.Generator
) -> None:
    """In one process: moved twice, once to where they are placed from the start in another mesh."""
    c, device = open_tiny(family, tmp_path), MeshDevice(HostDevice(1))
    seed = int(rng.integers(1 << 32))
    executable = device.load(mesh_of(c, layout), c, STATE)
    redundant = int(layout.rpartition("r")[2])
    wanted = steps(executable, np.random.default_rng(seed))
    for _ in range(2):
        placement = shuffled(port(c), 2, redundant, rng)
        executable.load_experts(placement.layers)
        waited(executable)
        executable.switch_experts()
        assert {site: load.held for site, load in executable.expert_loads().items()} == placement.layers
        for got, x in zip(steps(executable, np.random.default_rng(seed)), wanted, strict=True):
            np.testing.assert_array_equal(got, x)
        packed = {n: w.image() for rank in executable.ranks for n, w in rank.matrices.items()}  # type: ignore[attr-defined]
        fresh = device.load(mesh_of(c, layout, placement), c, STATE)
        assert packed == {n: w.image() for rank in fresh.ranks for n, w in rank.matrices.items()}  # type: ignore[attr-defined]


def test_tokens_are_counted_and_experts_move_between_processes(tmp_path: Path, rng: np.random.Generator) -> None:
    c = open_tiny("qwen3moe", tmp_path)
    mesh = mesh_of(c, "ep2r2")
    here, there = (
        MeshDevice(HostDevice(1)).load(mesh, c, STATE),
        RanksDevice(2, cache=None, silence=60.0).load(mesh, c, STATE),
    )
    routes = [op for op in mesh.last.ops if isinstance(op, Route)]
    experts = [op for op in mesh.last.ops if isinstance(op, Experts)]
    total: dict[str, Counter[int]] = {op.site: Counter() for op in experts}
    tokens = rng.integers(0, 263, 12).tolist()
    for i in range(6):
        if i == 3:
            there.load_experts(shuffled(port(c), 2, 2, rng).layers)
            waited(there)
            there.switch_experts()
        request = StepRequest(bind([Chunk(tokens[2 * i : 2 * i + 2], 2 * i, [4, 1], range(2))], PAGE), logits=True)
        pending, wanted = there.launch(request), here.step(request)
        np.testing.assert_array_equal(pending.result().logits, wanted.logits)
    assert all(len(load.tokens) == 8 and load.tokens.sum() == 12 * 3 for load in there.expert_loads().values())
    for site, load in here.expert_loads().items():
        np.testing.assert_array_equal(there.expert_loads()[site].tokens, load.tokens)
    assert len(routes) == len(experts) == len(total) == len(here.expert_loads())
    with pytest.raises(DeviceError, match="places|takes"):
        there.load_experts({experts[0].site: ((0, 1), (0, 1))})
    there.close()


def test_a_model_under_load_moves_experts_and_keeps_its_tokens(tmp_path: Path, rng: np.random.Generator) -> None:
    tiny("qwen3moe", tmp_path / "model")
    params = SamplingParams(max_tokens=24, temperature=0.8, seed=int(rng.integers(1 << 30)))
    prompts = ["def f(", "one two", "Hello, ", "aaaa"]
    wanted = LLM(tmp_path / "model", layout="ep2r2", in_process=True, kv_tokens=256).generate(prompts, params)
    file = tmp_path / "placement.json"
    options: dict[str, Any] = {"layout": "ep2r2", "kv_tokens": 256, "cache": None, "expert_placement": file}
    llm = LLM(tmp_path / "model", **options)
    assert not file.exists()
    balancer = llm.engine.experts
    balancer.every = balancer.worth = 0.0  # at every look, whatever the loads are
    end = time.monotonic() + PATIENT
    while balancer.moves < 2 and time.monotonic() < end:
        assert llm.generate(prompts, params) == wanted
    assert balancer.moves >= 2 and not balancer.failed
    assert all(load.tokens.sum() > 0 for load in balancer.loads.values())
    llm.engine.executable.close()
    kept = ExpertPlacement.read(file)
    assert kept and kept.layers == {site: load.held for site, load in balancer.loads.items()}
    again = LLM(tmp_path / "model", **options, in_process=True, rebalance_every=0)
    assert again.generate(prompts, params) == wanted
    again.engine.experts.count()
    assert {site: load.held for site, load in again.engine.experts.loads.items()} == kept.layers
    assert again.engine.experts.every == float("inf")


def test_placements_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path, file = tiny("qwen3moe", tmp_path / "model"), tmp_path / "placement.json"
    ExpertPlacement({"layers.9.mlp.experts": ((0,), (1,))}).keep(file)
    for layout, why in (
        ("ep2r0", r"names layers\.9\.mlp\.experts, which \S+ lacks; .* are layers\.1\..*placement: .*placement\.json"),
        ("ep2", r"layout ep2 has no placement of experts to be read from .*placement\.json; use one such as ep2r0"),
        (None, "layout tp1 has no placement"),
    ):
        with pytest.raises(LayoutError, match=why):
            LLM(path, layout=layout, in_process=True, expert_placement=file)
    with pytest.raises(
        PlacementError, match=r"none/p\.json: no file can be written to the folder .*none: .*No such file"
    ):
        LLM(path, layout="ep2r0", in_process=True, expert_placement=tmp_path / "none" / "p.json")
    with pytest.raises(RequestError, match="rebalance_every is -1; allowed: 0 or more"):
        LLM(path, layout="ep2r0", in_process=True, rebalance_every=-1)


def test_moving_experts_of_a_layout_that_moves_none_is_refused_with_one_that_does(tmp_path: Path) -> None:
    path = tiny("qwen3moe", tmp_path)
    for layout, other in (
        ("ep2", r"ep2r0, or ep2r2 with two redundant experts"), ("tp2ep2pp2", "tp2ep2pp2r0, or tp2ep2pp2r2 with"),
        ("tp2", "one such as ep2r0 or ep4r8"), (None, "one such as ep2r0 or ep4r8"),
    ):  # fmt: skip
        why = f"layout {layout or 'tp1'} has no redundant experts, so .* rebalance_every has no effect; use {other}"
        with pytest.raises(LayoutError, match=why):
            LLM(path, layout=layout, in_process=True, rebalance_every=30)
    assert LLM(path, layout="ep2", in_process=True, rebalance_every=0).engine.experts.every == float("inf")


def test_experts_move_between_hosts_and_a_lost_host_changes_no_token(tmp_path: Path, rng: np.random.Generator) -> None:
    """Two agents with a rank each, and a spare. The group with the spare starts with the first placement."""
    path = tiny("qwen3moe", tmp_path)
    params = SamplingParams(max_tokens=16, temperature=0.8, seed=int(rng.integers(1 << 30)))
    prompts = ["def f(", "one two", "Hello, "]
    wanted = LLM(path, layout="ep2r2", in_process=True, kv_tokens=256).generate(prompts, params)
    with closing(Rendezvous("127.0.0.1", 0, TOKEN, PATIENT)) as rendezvous, agents(rendezvous, 3):
        llm = LLM(path, layout="ep2r2", hosts=HostsDevice(rendezvous, 2, cache=None), kv_tokens=256)
        balancer = llm.engine.experts
        balancer.every = balancer.worth = 0.0  # at every look, whatever the loads are

        def moved(times: int) -> None:
            end = time.monotonic() + PATIENT
            while balancer.moves < times and time.monotonic() < end:
                assert llm.generate(prompts, params) == wanted
            assert balancer.moves >= times and not balancer.failed

        moved(2)
        executable = llm.engine.executable.unwrapped()
        assert isinstance(executable, HostsExecutable)
        executable.agents[1].link.close()
        assert llm.generate(prompts, params) == wanted and llm.engine.counts.restarts == 1
        moved(balancer.moves + 1)
        llm.engine.executable.close()


class Forwarded:
    """A source of weights that reads those of a checkpoint."""

    def __init__(self, inner: Checkpoint) -> None:
        self.read, self.strips, self.release = inner.read, inner.strips, inner.release

    def identity(self) -> None:
        return None


def test_sources_of_other_matrices() -> None:
    assert restacked(["e.{2..3}.w|r0:1/2", "e.{6..6}.w|r0:1/2"], [2, 3, 6], [0, 1, 7], 8) == (
        "e.{0..1}.w|r0:1/2", "e.{7..7}.w|r0:1/2",
    )  # fmt: skip
    assert restacked(["e.{5..6}.w"], [1, 2], [0, 2], 4) == ("e.{4..4}.w", "e.{6..6}.w")
    assert restacked(["e|T|s1:3/4|c0:1/2"], [1, 2], [0, 3], 4) == ("e|T|s0:1/4|c0:1/2", "e|T|s3:4/4|c0:1/2")
    assert restacked(["b|c1:2/2|r1:2/4|c0:1/2"], [1], [0, 1], 4, "r") == ("b|c1:2/2|r0:2/4|c0:1/2",)
    assert restacked(["e|T"], [0, 1], [1], 2) == ("e|T|s1:2/2",)


def test_metrics_have_the_tokens_of_experts(tmp_path: Path) -> None:
    tiny("qwen3moe", tmp_path / "tiny")
    with served(tmp_path / "tiny", {"device": "host"}) as s:
        s.client().completions.create(model="tiny", prompt=[5, 6, 7], max_tokens=4, extra_body={"ignore_eos": True})
        s.quiet()
        families = {f.name: f.samples for f in text_string_to_metric_families(s.get("/metrics").text)}
    sites = {sample.labels["site"] for sample in families["intaglio:expert_imbalance"]}
    assert [x.value for x in families["intaglio:expert_moves_failed"]] == [0]
    counted = [x for x in families["intaglio:expert_tokens"] if x.name.endswith("_total")]
    assert len(counted) == 8 * len(sites) > 0
    assert sum(x.value for x in counted) == 3 * (3 + 4 - 1) * len(sites)  # three experts for each row computed
    assert all(1 <= x.value <= 8 for x in families["intaglio:expert_imbalance"])


def test_the_source_of_weights_is_kept_only_for_experts_that_can_move(tmp_path: Path, rng: np.random.Generator) -> None:
    """And without the report of progress, which would be called from the thread that packs."""
    c = open_tiny("qwen3moe", tmp_path)
    reports: list[int] = []
    for layout, kept in (("ep2", False), ("ep2r2", True)):
        mesh, source = mesh_of(c, layout), Forwarded(c)
        said = ReportedWeights(source, mesh, c.shape, lambda done, total, text: reports.append(done))
        executable = MeshDevice(HostDevice(1)).load(mesh, said, STATE)
        watched, count = weakref.ref(source), len(reports)
        del said, source
        gc.collect()
        assert (watched() is not None) == kept
        if kept:
            executable.load_experts(shuffled(port(c), 2, 2, rng).layers)
            waited(executable)
            assert len(reports) == count > 0
