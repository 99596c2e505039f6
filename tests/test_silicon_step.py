"""The silicon device, whole steps in modelled time, and the commands that ask for them."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from silicon import FUSED, SMALL
from tiny import FAMILIES, MIXTURES, tiny
from toy import CONTEXT, PAGE, Toy, random_weights, transformer
from typer.testing import CliRunner

from intaglio.batch import Chunk, bind
from intaglio.chips import CHIPS, ChipError, chip, replace
from intaglio.cli import app
from intaglio.compiler import build
from intaglio.devices import DeviceError, StateSpec, open_device
from intaglio.models import Checkpoint, port
from intaglio.runtime import Engine, Request, SamplingParams
from intaglio.silicon.device import SiliconDevice
from intaglio.silicon.step import Load, Plan, exposed, load_of, timing
from intaglio.silicon.timeline import chrome_trace
from intaglio.tools.simulate import Serving, Simulation, cards, ported, stages, what_helps
from intaglio.tools.validate import loads, validate

STATE = StateSpec(32, PAGE)
LOAD = Load(67, 4, ((1, 300, 3), (64, 64, 1)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def two_steps(program: object, weights: object, device: object) -> list[np.ndarray]:
    """Logits of a mixed step: a prompt, then its next token beside another prompt."""
    executable = device.load(program, weights, STATE)  # type: ignore[attr-defined]
    first = bind([Chunk([5, 7, 11, 2, 9], 0, [3, 1], rows=(0, 4))], PAGE)
    second = bind([Chunk([4], 5, [3, 1], rows=(0,)), Chunk([8, 8, 6], 0, [7], rows=(2,))], PAGE)
    return [executable.step(b, logits=True).logits for b in (first, second)]


@pytest.mark.parametrize("family", (*FAMILIES, *MIXTURES))
def test_every_family_runs_on_chip_instructions(folder: Path, family: str) -> None:
    """Kernel by kernel they are held to the ops; here the whole of it: views, caches over steps, compiled Programs."""
    checkpoint = Checkpoint.open(tiny(family, folder / family))
    program = build(port(checkpoint, CONTEXT), "auto")
    chips = two_steps(program, checkpoint, SiliconDevice(SMALL if len(family) % 2 else FUSED, values="chip"))
    for got, want in zip(chips, two_steps(program, checkpoint, open_device("reference")), strict=True):
        # FP32 against float64 through four layers: some hundred roundings of 2^-24, each of a value near the largest
        np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def test_routing_and_experts_are_timed(folder: Path) -> None:
    checkpoint = Checkpoint.open(tiny("mixtral", folder / "mixtral"))
    program = build(port(checkpoint, CONTEXT), "auto")
    timed = SiliconDevice("sohu", values="reference").load(program, checkpoint, STATE)
    result = timed.step(bind([Chunk([5, 7, 11], 0, [3], rows=(2,))], PAGE), timed=True)
    assert all(result.timings[op.site] > 0 for op in program.ops if op.kind in ("route", "experts"))


@pytest.mark.parametrize("weights", ["int8", "int4", "fp8"])
def test_compiled_weights_run_on_chip_instructions(weights: str) -> None:
    raw = transformer(Toy(inner=64))
    program, values = build(raw, weights, "int8"), random_weights(raw)
    chips = two_steps(program, values, SiliconDevice(SMALL, values="chip"))
    for got, want in zip(chips, two_steps(program, values, open_device("reference")), strict=True):
        # FP32 sums may tip an activation or a cached value to the next int8 code: a hundredth of a row's largest
        np.testing.assert_allclose(got, want, atol=0.03 * np.abs(want).max())


def test_an_engine_runs_in_virtual_time() -> None:
    """Requests are timed by the chip's clock: no wall clock has a part in it, and the same run takes the same."""

    def run() -> list[float]:
        device = SiliconDevice(chip_name="h100_sxm", values="oracle")
        raw = transformer()
        executable = device.load(build(raw, "auto"), random_weights(raw), STATE)
        engine = Engine(executable, rng=random.Random(0), clock=device.clock)
        request = Request("r", [1, 2, 3, 4, 5], SamplingParams(max_tokens=4))
        engine.add(request)
        expected, ended = 0.0, None
        while not engine.idle:
            ended = engine.step()[-1].usage
            expected += executable.timeline.seconds
            assert device.clock() == pytest.approx(expected)
        assert ended is not None and ended.first_token is not None
        return [ended.first_token, ended.ended]

    first, ended = run()
    assert 0 < first < ended
    assert run() == [first, ended]


def test_timings_by_site_are_the_timeline() -> None:
    raw = transformer()
    program = build(raw, "auto")
    executable = SiliconDevice("sohu", values="reference").load(program, random_weights(raw), STATE)
    result = executable.step(bind([Chunk([1, 2, 3], 0, [0], rows=(2,))], PAGE), timed=True)
    assert list(result.timings) == [op.site for op in program.ops]
    assert sum(result.timings.values()) == pytest.approx(executable.timeline.seconds)  # type: ignore[attr-defined]


def test_an_unknown_source_of_values_is_refused() -> None:
    with pytest.raises(DeviceError, match="values='gpu'; use one of host, reference, oracle, chip"):
        SiliconDevice(values="gpu")


def test_layers_alike_cost_one() -> None:
    def misses(layers: int) -> int:
        timing.cache_clear()
        Plan(build(transformer(Toy(layers=layers)), "auto"), chip("sohu")).run(LOAD)
        return timing.cache_info().misses

    assert misses(2) == misses(6)


@settings(max_examples=30, deadline=None)
@given(name=st.sampled_from(sorted(CHIPS)), rows=st.integers(1, 4000), keys=st.integers(1, 6000), n=st.integers(1, 200))
def test_no_step_beats_the_sheet(name: str, rows: int, keys: int, n: int) -> None:
    """Time is at least FLOPs over peak, weights over HBM, and cached keys and values over HBM."""
    spec, program = chip(name), PROGRAM
    load = Load(rows + n, n + 1, ((1, keys, n), (rows, rows, 1)))
    timeline = Plan(program, spec).run(load)
    assert timeline.flops_share("bf16") <= 1
    weights = sum(t.nbytes({}) for t in program.of_role("weight") if t.name != "embed.weight")
    assert timeline.seconds >= weights / spec.hbm_bytes_per_s
    cached = 2 * keys * n * 4 * 128 * 2 * 8  # K and V, bf16, 4 heads of 128, 8 layers
    assert timeline.seconds >= cached / spec.hbm_bytes_per_s


def model(layers: int) -> object:
    from intaglio.models import port_config

    config = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632,
        "num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 4,
        "max_position_embeddings": 8192, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
    }  # fmt: skip
    return build(port_config(config), "auto")


PROGRAM = model(8)


def test_the_timeline_adds_up() -> None:
    timeline = Plan(PROGRAM, chip("h100_sxm")).run(LOAD)  # type: ignore[arg-type]
    ends = [e.end for e in timeline.entries]
    assert [e.start for e in timeline.entries] == [0.0, *ends[:-1]]
    assert sum(timeline.stalls().values()) == pytest.approx(timeline.seconds)
    assert sum(timeline.by_kind().values()) == pytest.approx(timeline.seconds)
    assert timeline.joules()["HBM"] == pytest.approx(timeline.totals().hbm_bytes * timeline.spec.energy.hbm_byte)
    assert "bound by" in timeline.report("bf16")
    events = json.loads(chrome_trace([timeline]))["traceEvents"]
    spans = [e for e in events if e["ph"] == "X" and e["tid"] == 0]
    assert [e["name"] for e in spans] == [op.site for op in PROGRAM.ops]  # type: ignore[attr-defined]
    assert all(e["dur"] >= 0 for e in events if e["ph"] == "X")


def test_weights_fetched_ahead_are_hidden_by_work() -> None:
    """Decode of one row is bound by weights: fetching ahead saves the ramps and the ops between, and no more."""
    sohu = chip("sohu")
    one = Load(1, 1, ((1, 100, 1),))
    ahead = Plan(PROGRAM, sohu).run(one).seconds  # type: ignore[arg-type]
    without = Plan(PROGRAM, replace(sohu, prefetch=False)).run(one).seconds  # type: ignore[arg-type]
    assert ahead < without
    weights = sum(t.nbytes({}) for t in PROGRAM.of_role("weight") if t.name != "embed.weight")  # type: ignore[attr-defined]
    assert ahead >= weights / sohu.hbm_rate


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 10), st.booleans()), min_size=1, max_size=40))
def test_two_halves_take_turns(ops: list[tuple[float, bool]]) -> None:
    """What is seen of collectives is what neither work hides: no more than their whole time, no less than what links
    need beyond all work."""
    seconds, link = [s for s, _ in ops], [far for _, far in ops]
    seen = exposed(seconds, link)
    assert seen.keys() == {i for i, far in enumerate(link) if far} and all(s >= -1e-9 for s in seen.values())
    far = sum(s for s, f in ops if f)
    assert max(0.0, far - (sum(seconds) - far)) - 1e-9 <= sum(seen.values()) <= far + 1e-9


def test_turns_by_hand() -> None:
    """Work 4, link 4, work 4: halves of 2. The second works while the first is sent, and the other way round."""
    assert exposed([4, 4, 4], [False, True, False]) == {1: 0.0}
    assert exposed([4, 8, 4], [False, True, False]) == {1: 4.0}  # both wait 2, one after the other
    assert exposed([4, 4], [False, True]) == {1: 2.0}  # nothing to do while the second half is sent
    # two collectives with a norm between: it waits for the other half's work, which nothing interrupts, and links wait
    assert sum(exposed([8, 4, 1, 4, 8], [False, True, False, True, False]).values()) == 3.0


def test_a_step_of_a_batch_has_its_sizes() -> None:
    batch = bind([Chunk([1, 2], 3, [0, 1], rows=(1,)), Chunk([5], 7, [2, 3], rows=(0,))], PAGE)
    assert load_of(batch) == Load(3, 2, ((1, 8, 1), (2, 5, 1)))


@pytest.mark.parametrize("card", sorted(cards()))
def test_cards_are_timed_without_weights(card: str) -> None:
    programs = stages(ported(card, None), "tp1", "fp8row", "int8", "fp8")
    phases = Simulation.of(programs, chip("sohu"), "tp1").phases(Serving(512, 16))
    assert [p.name for p in phases] == ["prefill", "decode", "mixed"]
    assert all(0 < p.flops_share <= 1 and p.format == "e4m3" for p in phases)
    assert phases[2].period < phases[0].period + phases[1].period  # weights are read once for both


def test_no_improvement_of_a_chip_hurts() -> None:
    programs = stages(ported("llama-3-8b", None), "tp1", "fp8row", "int8", "fp8")
    gains = what_helps(programs, chip("sohu"), "tp1", Serving(512, 16))
    assert all(gain > 0.999 for _, gain in gains)
    assert gains[0][1] > 1.02


def test_a_model_that_does_not_fit_is_refused() -> None:
    programs = stages(ported("llama-3-70b", None), "tp1", "auto", "auto", "auto")
    with pytest.raises(ChipError, match=r"141.1 GB of weights a chip; h100_sxm has 80 GB of HBM; use more chips"):
        Simulation.of(programs, chip("h100_sxm"), "tp1")


TABLE = """dtype,m,n,k,us,split
bfloat16,4096,4096,4096,{0},test
bfloat16,1,4096,4096,1000,test
bfloat16,64,64,64,3,fit
"""


def test_validate_compares_tables(tmp_path: Path) -> None:
    from intaglio.silicon.kernels.linear import linear_timing

    us = linear_timing(chip("h100_sxm"), 4096, 4096, 4096).seconds * 1e6
    (tmp_path / "h100_sxm_matmul.csv").write_text(TABLE.format(us * 2))
    (record,) = validate(tmp_path, "test", 20.0)
    assert (record.chip, record.table, record.dtype, record.rows) == ("h100_sxm", "matmul", "bfloat16", 2)
    assert record.worst[0][0] == "m=1 n=4096 k=4096"
    assert record.mean == pytest.approx((50 + abs(record.worst[0][2] / 1000 - 1) * 100) / 2)
    (tmp_path / "b300_matmul.csv").write_text(TABLE)
    with pytest.raises(ValueError, match=r"b300_matmul.csv: wanted <chip>_<table>.csv; chips are sohu"):
        validate(tmp_path)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 5000), top=st.sampled_from([1, 2, 8]), ep=st.sampled_from([1, 4, 16]),
    load=st.sampled_from(["balanced", "power_law_1.01", "power_law_1.2"]), in_order=st.booleans(),
)  # fmt: skip
def test_rows_of_experts_add_up(tokens: int, top: int, ep: int, load: str, in_order: bool) -> None:
    counts = loads(tokens, top, 64, ep, load, in_order)
    assert len(counts) == 64 // ep
    assert max(counts) <= tokens or load == "balanced"
    assert tokens * top / ep <= sum(counts) + 64 // ep <= tokens * top + 64
    assert ep > 1 or sum(counts) == tokens * top


@pytest.mark.skipif("INTAGLIO_TABLES" not in os.environ, reason="INTAGLIO_TABLES names no folder of measured tables")
def test_the_trust_figures() -> None:
    asked = {"matmul": (5, 8), "attention_prefill": (15, 22), "attention_decode": (15, 22), "experts": (15, 22)}
    eight_bits = {"matmul": (8, 13)}
    for r in validate(Path(os.environ["INTAGLIO_TABLES"]), "test", 20.0):
        if r.table in asked:
            median, mean = (eight_bits if r.dtype == "fp8" else {}).get(r.table, asked[r.table])
            assert r.median < median and r.mean < mean, r
    for r in validate(Path(os.environ["INTAGLIO_TABLES"]), "test"):
        assert r.table != "collectives" or (r.median < 8 and r.mean < 12), r


def test_layouts_are_compared_by_the_clock_of_each_alone() -> None:
    run = CliRunner()
    how = ["--weights", "fp8row", "--activations", "fp8", "--kv", "int8", "--json", "--layout"]
    both = json.loads(run.invoke(app, ["simulate", "llama-3-8b", *how, "tp2,pp2"]).stdout)
    for found, layout in zip(both, ("tp2", "pp2"), strict=True):
        alone = json.loads(run.invoke(app, ["simulate", "llama-3-8b", *how, layout, "--what-helps"]).stdout)
        assert found["layout"] == layout and alone["chips"] == 2
        assert found["tokens_per_s"] == alone["phases"][-1]["tokens_per_s"]
        assert found["gain"] == max(alone["what_helps"].values()) == alone["what_helps"][found["helps_most"]]
    refused = run.invoke(app, ["simulate", "llama-3-8b", "--layout", "tp2,tp4", "--chips", "2"])
    assert refused.exit_code == 2 and "--chips 2 but layout tp2,tp4 has 2, 4 ranks" in refused.output


def test_commands() -> None:
    run = CliRunner()
    found = run.invoke(app, ["simulate", "llama-3-8b", "--chip", "h100_sxm", "--json", "--set", "hbm_bytes_per_s=4e12"])
    assert found.exit_code == 0, found.output
    phases = {p["phase"]: p for p in json.loads(found.stdout)["phases"]}
    assert phases["decode"]["report"].startswith("bound by HBM")
    assert run.invoke(app, ["simulate", "llama-9"]).exit_code == 2
    assert run.invoke(app, ["simulate", "llama-3-8b", "--set", "hbm"]).exit_code == 2
    assert "sohu" in json.loads(run.invoke(app, ["chips", "--json"]).stdout)
    assert "500,000 tokens/s" in run.invoke(app, ["chips", "sohu"]).stdout
    names = {i["name"] for i in json.loads(run.invoke(app, ["isa", "--json"]).stdout)}
    assert {"Matmul", "Softmax", "Halt"} <= names
    assert run.invoke(app, ["isa", "--page"]).stdout == (Path(__file__).parent.parent / "docs" / "isa.md").read_text()
