"""The silicon device, modelled time of whole steps, co-design, and their commands."""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.silicon import FUSED, SMALL
from support.tiny import FAMILIES, MIXTURES, tiny
from support.toy import CONTEXT, PAGE, Toy, random_weights, transformer
from typer.testing import CliRunner

from intaglio.batch import Chunk, bind
from intaglio.chips import CHIPS, ChipError, target
from intaglio.cli import app
from intaglio.codesign.simulate import Serving, Simulation, cards, ported, stages, what_helps
from intaglio.codesign.validate import expert_rows, validate
from intaglio.compiler import build
from intaglio.devices import DeviceError, StateSpec, StepRequest, open_device
from intaglio.devices.silicon import SiliconDevice
from intaglio.models import Checkpoint, port
from intaglio.runtime import Engine, Request, SamplingParams
from intaglio.silicon.kernels import timing
from intaglio.silicon.kernels.map import MapKernel
from intaglio.silicon.plan import Plan, exposed_seconds
from intaglio.silicon.sizes import BatchSizes, sizes_of
from intaglio.silicon.timeline import chrome_trace

STATE = StateSpec(32, PAGE)
LOAD = BatchSizes(67, 4, ((1, 300, 3), (64, 64, 1)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def two_steps(program: object, weights: object, device: object) -> list[np.ndarray]:
    """Logits of two steps: a prompt, then its next token beside another prompt."""
    executable = device.load(program, weights, STATE)  # type: ignore[attr-defined]
    first = bind([Chunk([5, 7, 11, 2, 9], 0, [3, 1], rows=(0, 4))], PAGE)
    second = bind([Chunk([4], 5, [3, 1], rows=(0,)), Chunk([8, 8, 6], 0, [7], rows=(2,))], PAGE)
    return [executable.step(StepRequest(b, logits=True)).logits for b in (first, second)]


@pytest.mark.parametrize("family", (*FAMILIES, *MIXTURES, "deepseek_v32", "glm_moe_dsa", "deepseek_v4"))
def test_every_family_runs_on_chip_instructions(folder: Path, family: str) -> None:
    """Whole models: views, caches over several steps, compiled Programs. For single kernels see test_kernels.py."""
    checkpoint = Checkpoint.open(tiny(family, folder / family))
    program = build(port(checkpoint, CONTEXT), "auto")
    chips = two_steps(program, checkpoint, SiliconDevice(SMALL if len(family) % 2 else FUSED, values="chip"))
    for got, want in zip(chips, two_steps(program, checkpoint, open_device("reference")), strict=True):
        # FP32 against float64 through four layers: some hundred roundings of 2^-24 of values near the largest
        np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def test_routing_and_experts_are_timed(folder: Path) -> None:
    checkpoint = Checkpoint.open(tiny("mixtral", folder / "mixtral"))
    program = build(port(checkpoint, CONTEXT), "auto")
    timed = SiliconDevice("sohu", values="reference").load(program, checkpoint, STATE)
    result = timed.step(StepRequest(bind([Chunk([5, 7, 11], 0, [3], rows=(2,))], PAGE), timed=True))
    assert all(result.timings[op.site] > 0 for op in program.ops if op.kind in ("route", "experts"))


def test_compressed_attention_and_streams_are_timed(folder: Path) -> None:
    """DeepSeek-V4: a table of experts is no operand of the matrix array, and every op takes time."""
    checkpoint = Checkpoint.open(tiny("deepseek_v4", folder / "deepseek_v4"))
    program = build(port(checkpoint, CONTEXT), "auto")
    for chip in ("sohu", "b200_sxm"):
        timeline = Plan(program, target(chip)).run(LOAD)
        assert {span.kind for span in timeline.ops} >= {"pool_keys", "attend_pooled", "sinkhorn", "mix_streams"}
        assert all(span.end > span.start for span in timeline.ops)


@pytest.mark.parametrize("weights", ["int8", "int4", "fp8"])
def test_compiled_weights_run_on_chip_instructions(weights: str) -> None:
    raw = transformer(Toy(inner=64))
    program, values = build(raw, weights, "int8"), random_weights(raw)
    chips = two_steps(program, values, SiliconDevice(SMALL, values="chip"))
    for got, want in zip(chips, two_steps(program, values, open_device("reference")), strict=True):
        # differences of FP32 sums may move a value to the next int8 code: 1 % of a row's largest
        np.testing.assert_allclose(got, want, atol=0.03 * np.abs(want).max())


def test_an_engine_runs_in_virtual_time() -> None:
    """Request times come from the chip's virtual clock alone, and are the same in each run."""

    def run() -> list[float]:
        device = SiliconDevice(chip="h100_sxm", values="oracle")
        raw = transformer()
        executable = device.load(build(raw, "auto"), random_weights(raw), STATE)
        engine = Engine(executable, rng=random.Random(0), clock=device.clock)
        request = Request("r", [1, 2, 3, 4, 5], SamplingParams(max_tokens=4))
        engine.add(request)
        expected, ended = 0.0, None
        while not engine.idle:
            ended = engine.step()[-1].usage
            expected += sum(t.seconds for t in executable.timelines)
            assert device.clock() == pytest.approx(expected)
        assert ended is not None and ended.first_token is not None
        return [ended.first_token, ended.ended]

    first, ended = run()
    assert 0 < first < ended
    assert run() == [first, ended]


def test_timings_by_site_sum_to_the_timeline() -> None:
    raw = transformer()
    program = build(raw, "auto")
    executable = SiliconDevice("sohu", values="reference").load(program, random_weights(raw), STATE)
    result = executable.step(StepRequest(bind([Chunk([1, 2, 3], 0, [0], rows=(2,))], PAGE), timed=True))
    assert list(result.timings) == [op.site for op in program.ops]
    assert sum(result.timings.values()) == pytest.approx(executable.timelines[0].seconds)  # type: ignore[attr-defined]


def test_an_unknown_device_for_values_is_refused() -> None:
    with pytest.raises(DeviceError, match="values='gpu'; use one of host, reference, oracle, chip"):
        SiliconDevice(values="gpu")


def test_equal_layers_share_kernels() -> None:
    def misses(layers: int) -> int:
        timing.cache_clear()
        Plan(build(transformer(Toy(layers=layers)), "auto"), target("sohu")).run(LOAD)
        return timing.cache_info().misses

    assert misses(2) == misses(6)


@settings(max_examples=30, deadline=None)
@given(name=st.sampled_from(sorted(CHIPS)), rows=st.integers(1, 4000), keys=st.integers(1, 6000), n=st.integers(1, 200))
def test_no_step_is_faster_than_the_data_sheet_allows(name: str, rows: int, keys: int, n: int) -> None:
    """A step takes at least FLOPs over peak rate, and weights and cached keys and values over HBM bandwidth."""
    on, program = target(name), PROGRAM
    load = BatchSizes(rows + n, n + 1, ((1, keys, n), (rows, rows, 1)))
    timeline = Plan(program, on).run(load)
    assert timeline.flops_share("bf16") <= 1
    weights = sum(t.nbytes({}) for t in program.of_role("weight") if t.name != "embed.weight")
    assert timeline.seconds >= weights / on.chip.hbm_bytes_per_s
    cached = 2 * keys * n * 4 * 128 * 2 * 8  # K and V, bf16, 4 heads of 128, 8 layers
    assert timeline.seconds >= cached / on.chip.hbm_bytes_per_s


def model(layers: int) -> object:
    from intaglio.models import port_config

    config = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632,
        "num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 4,
        "max_position_embeddings": 8192, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
    }  # fmt: skip
    return build(port_config(config), "auto")


PROGRAM = model(8)


def test_the_timeline_is_contiguous_and_sums_up() -> None:
    timeline = Plan(PROGRAM, target("h100_sxm")).run(LOAD)  # type: ignore[arg-type]
    ends = [e.end for e in timeline.ops]
    assert [e.start for e in timeline.ops] == [0.0, *ends[:-1]]
    assert sum(timeline.spent_on().values()) == pytest.approx(timeline.seconds)
    assert sum(timeline.by_kind().values()) == pytest.approx(timeline.seconds)
    assert timeline.joules()["HBM"] == pytest.approx(timeline.totals().hbm_bytes * timeline.chip.energy.hbm_byte)
    assert "bound by" in timeline.report("bf16")
    events = json.loads(chrome_trace([timeline]))["traceEvents"]
    spans = [e for e in events if e["ph"] == "X" and e["tid"] == 0]
    assert [e["name"] for e in spans] == [op.site for op in PROGRAM.ops]  # type: ignore[attr-defined]
    assert all(e["dur"] >= 0 for e in events if e["ph"] == "X")


def test_prefetched_weights_overlap_with_compute() -> None:
    """Decoding one sequence is bound by reading weights: prefetching hides launches and other ops, and no more."""
    sohu = target("sohu")
    one = BatchSizes(1, 1, ((1, 100, 1),))
    ahead = Plan(PROGRAM, sohu).run(one).seconds  # type: ignore[arg-type]
    without = Plan(PROGRAM, sohu.with_library(prefetches_weights=False, dual_batch_overlap=False)).run(one).seconds  # type: ignore[arg-type]
    assert ahead < without
    weights = sum(t.nbytes({}) for t in PROGRAM.of_role("weight") if t.name != "embed.weight")  # type: ignore[attr-defined]
    assert ahead >= weights / sohu.chip.hbm_rate


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10), st.booleans()), min_size=1, max_size=40))
def test_exposed_time_of_dual_batch_overlap_is_bounded(ops: list[tuple[float, float, bool]]) -> None:
    """Exposed time is at most the collectives' total time, and at least that total minus all compute."""
    seconds, link = [(a, b) for a, b, _ in ops], [far for *_, far in ops]
    seen = exposed_seconds(seconds, link)
    assert seen.keys() == {i for i, far in enumerate(link) if far} and all(s >= -1e-9 for s in seen.values())
    far = sum(a + b for a, b, f in ops if f)
    work = sum(a + b for a, b, f in ops if not f)
    assert max(0.0, far - work) - 1e-9 <= sum(seen.values()) <= far + 1e-9


def halved(*seconds: float) -> list[tuple[float, float]]:
    return [(s / 2, s / 2) for s in seconds]


SEQUENCES = st.lists(st.tuples(st.integers(1, 300), st.integers(0, 500), st.integers(1, 9)), min_size=1, max_size=5)


@given(sequences=SEQUENCES, data=st.data())
def test_halves_of_a_batch(sequences: list[tuple[int, int, int]], data: st.DataObject) -> None:
    sizes = tuple((q, q + before, n) for q, before, n in sequences)
    tokens = sum(q * n for q, _, n in sizes)
    whole = BatchSizes(tokens, data.draw(st.integers(0, tokens)), sizes)
    a, b = whole.halves()
    assert a.tokens + b.tokens == tokens and a.rows + b.rows == whole.rows
    assert abs(a.tokens - b.tokens) <= 1 and abs(a.rows - b.rows) <= 1
    pairs = [sum(n * sum(range(keys - q + 1, keys + 1)) for q, keys, n in s.sequences) for s in (whole, a, b)]
    assert pairs[0] == pairs[1] + pairs[2]  # every query sees the same keys
    for half in (a, b):
        assert half.tokens == sum(q * n for q, _, n in half.sequences) and half.rows <= half.tokens


@pytest.mark.parametrize("layout", ["tp8", "tp8sp", "tp4pp2", "tp2pp4"])
@pytest.mark.parametrize("name", ["sohu", "tpu_v6e"])
def test_a_longer_batch_never_takes_less_time(layout: str, name: str) -> None:
    programs = stages(ported("llama-3-8b", None), layout, "fp8row", "int8", "fp8")
    plan = Plan.of(programs, target(name))[0]
    for make in (lambda n: BatchSizes(n, n, ((1, 1024, n),)), lambda n: BatchSizes(n, 1, ((n, n, 1),))):
        spent = [plan.run(make(n)).seconds for n in (1, 64, 127, 128, 200, 254, 255, 256, 257, 300, 384, 511, 512, 700)]
        assert spent == sorted(spent)


def test_exposed_time_of_small_examples() -> None:
    """Compute 4, link 4, compute 4 in halves of 2: each half computes while the other communicates."""
    assert exposed_seconds(halved(4, 4, 4), [False, True, False]) == {1: 0.0}
    assert exposed_seconds(halved(4, 8, 4), [False, True, False]) == {1: 4.0}  # each half waits 2
    assert exposed_seconds(halved(4, 4), [False, True]) == {
        1: 2.0
    }  # nothing left to compute while the second half communicates
    # two collectives with a norm between: the norm waits for the other half's compute, and the links wait for the norm
    assert sum(exposed_seconds(halved(8, 4, 1, 4, 8), [False, True, False, True, False]).values()) == 3.0


def test_sizes_of_a_batch() -> None:
    batch = bind([Chunk([1, 2], 3, [0, 1], rows=(1,)), Chunk([5], 7, [2, 3], rows=(0,))], PAGE)
    assert sizes_of(batch) == BatchSizes(3, 2, ((1, 8, 1), (2, 5, 1)))


PARAMETERS = {  # of the shipped configs in billions, as their publishers give them; GLM-4.5 without its MTP layer
    "deepseek-v3": 671, "glm-4.5": 353, "glm-5": 744, "gpt-oss-120b": 116.8, "gpt-oss-20b": 20.9, "kimi-k2": 1026,
    "llama-3-70b": 70.6, "llama-3-8b": 8.03, "llama-3.1-405b": 406, "llama-3.1-70b": 70.6, "llama-3.1-8b": 8.03,
    "minimax-m2": 229, "mistral-7b-v0.3": 7.25, "mixtral-8x7b": 46.7, "qwen3-235b-a22b": 235, "qwen3-30b-a3b": 30.5,
    "qwen3-32b": 32.8, "qwen3-8b": 8.19, "qwen3.5-397b-a17b": 397,
}  # fmt: skip


def test_shipped_configs_have_the_published_number_of_parameters() -> None:
    assert sorted(PARAMETERS) == sorted(cards())
    for card, billions in PARAMETERS.items():
        weights = ported(card, None).of_role("weight")
        assert sum(math.prod(int(d) for d in w.shape) for w in weights) / 1e9 == pytest.approx(billions, rel=0.005)


@pytest.mark.parametrize(
    ("card", "layout"),
    [
        ("llama-3-8b", "tp1"),
        ("qwen3-32b", "tp1"),
        ("mixtral-8x7b", "tp2"),
        ("gpt-oss-20b", "ep2"),
        ("deepseek-v3", "tp2ep4"),
    ],
)
def test_shipped_configs_are_simulated_without_weights(card: str, layout: str) -> None:
    programs = stages(ported(card, None), layout, "fp8row", "int8", "fp8")
    phases = Simulation.of(programs, target("sohu"), layout).phases(Serving(512, 16))
    assert [p.name for p in phases] == ["prefill", "decode", "mixed"]
    assert all(0 < p.flops_share <= 1 for p in phases)
    assert (
        phases[2].period < phases[0].period + phases[1].period
    )  # a mixed step reads the weights once for prefill and decode


def test_no_improvement_of_a_chip_slows_it_down() -> None:
    programs = stages(ported("llama-3-8b", None), "tp1", "fp8row", "int8", "fp8")
    gains = what_helps(programs, target("sohu"), "tp1", Serving(512, 16))
    assert all(gain > 0.999 for _, gain in gains)
    assert gains[0][1] > 1.02


def test_a_model_that_does_not_fit_is_refused() -> None:
    programs = stages(ported("llama-3-70b", None), "tp1", "auto", "auto", "auto")
    with pytest.raises(ChipError, match=r"141.1 GB of weights a chip; h100_sxm has 80 GB of HBM; use more chips"):
        Simulation.of(programs, target("h100_sxm"), "tp1")


@pytest.mark.parametrize(("text", "why"), [("[1, 2]", "holds a JSON list; wanted an object"), ('{"a":', "is not JSON")])
def test_a_config_that_is_no_json_object_is_refused_with_its_path(tmp_path: Path, text: str, why: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"{file} {why}"):
        ported(str(file), None)


def test_a_load_that_does_not_fit_is_refused_with_the_largest_that_does() -> None:
    """Llama-3-70B on eight chips of 144 GB, INT8 K/V: 1,023 requests of 8,704 tokens on average take 182 GB a chip."""
    programs = stages(ported("llama-3-70b", None), "tp8", "fp8row", "int8", "fp8")
    simulation = Simulation.of(programs, target("sohu"), "tp8")
    use = simulation.memory(Serving(8192, 1024))
    by_hand = (1023 * 8704 + 8192) * 80 * 2 * (128 + 2)  # one K/V head a chip, a scale of two bytes a head
    assert use.kv == pytest.approx(by_hand, rel=0.01) and use.kv > 182e9
    assert use.weights == sum(w.nbytes({}) for w in programs[0].of_role("weight")) and 0 < use.activations < 2e9
    with pytest.raises(ChipError, match=r"not even a batch of 1 fits; prompts of up to [45],\d\d\d tokens would"):
        simulation.phases(Serving(7000, 1100))
    fits = max(b for b in range(1, 40) if simulation.memory(Serving(2048, 128, b)).fits)
    assert simulation.phases(Serving(2048, 128, fits))
    with pytest.raises(ChipError, match=f"the largest batch that fits is {fits}"):
        simulation.phases(Serving(2048, 128, fits + 1))
    with pytest.raises(ValueError, match=r"requests of 8,192 \+ 1,024 tokens; the context of llama-3-70b is 8,192"):
        simulation.phases(Serving(8192, 1024))


def test_a_pipeline_holds_the_requests_of_all_its_steps() -> None:
    """Each stage has an eighth of the layers, and the K/V cache of eight steps in flight."""

    def held(layout: str) -> int:
        programs = stages(ported("llama-3-8b", None), layout, "fp8row", "int8", "fp8")
        return Simulation.of(programs, target("sohu"), layout).memory(Serving(512, 16)).kv

    assert held("pp8") == held("tp1")
    assert held("tp2") == held("tp1") / 2


TABLE = """dtype,m,n,k,us,split
bfloat16,4096,4096,4096,{0},test
bfloat16,1,4096,4096,1000,test
bfloat16,64,64,64,3,fit
"""


def test_validate_compares_modelled_with_measured_tables(tmp_path: Path) -> None:
    from intaglio.silicon.kernels.product import linear_timing

    us = linear_timing(target("h100_sxm"), 4096, 4096, 4096).seconds * 1e6
    (tmp_path / "h100_sxm_matmul.csv").write_text(TABLE.format(us * 2))
    (record,) = validate(tmp_path, "test", 20.0)
    assert (record.chip, record.table, record.dtype, record.rows) == ("h100_sxm", "matmul", "bfloat16", 2)
    assert record.worst[0].words == "m=1 n=4096 k=4096"
    assert record.mean == pytest.approx((50 + abs(record.worst[0].predicted / 1000 - 1) * 100) / 2)
    (tmp_path / "b300_matmul.csv").write_text(TABLE)
    with pytest.raises(ValueError, match=r"b300_matmul.csv: expected <chip>_<table>.csv; chips are a100_sxm"):
        validate(tmp_path)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 5000), top=st.sampled_from([1, 2, 8]), ep=st.sampled_from([1, 4, 16]),
    load=st.sampled_from(["balanced", "power_law_1.01", "power_law_1.2"]), in_order=st.booleans(),
)  # fmt: skip
def test_expert_rows_sum_to_all_routed_rows(tokens: int, top: int, ep: int, load: str, in_order: bool) -> None:
    counts = expert_rows(tokens, top, 64, ep, load, in_order)
    assert len(counts) == 64 // ep
    assert max(counts) <= tokens or load == "balanced"
    assert tokens * top / ep <= sum(counts) + 64 // ep <= tokens * top + 64
    assert ep > 1 or sum(counts) == tokens * top


@pytest.mark.skipif("INTAGLIO_TABLES" not in os.environ, reason="INTAGLIO_TABLES names no folder of measured tables")
def test_errors_against_measured_tables() -> None:
    asked = {"matmul": (5, 8), "attention_prefill": (15, 22), "attention_decode": (15, 22), "experts": (15, 22)}
    eight_bits = {"matmul": (8, 13)}
    for r in validate(Path(os.environ["INTAGLIO_TABLES"]), "test", 20.0):
        if r.table in asked:
            median, mean = (eight_bits if r.dtype == "fp8" else {}).get(r.table, asked[r.table])
            assert r.median < median and r.mean < mean, r
    for r in validate(Path(os.environ["INTAGLIO_TABLES"]), "test"):
        assert r.table != "collectives" or (r.median < 8 and r.mean < 12), r


def test_comparing_layouts_equals_simulating_each_alone() -> None:
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


def test_commands_print_json() -> None:
    run = CliRunner()
    found = run.invoke(
        app, ["simulate", "llama-3-8b", "--chip", "h100_sxm", "--json", "--set", "chip.hbm_bytes_per_s=4e12"]
    )
    assert found.exit_code == 0, found.output
    phases = {p["phase"]: p for p in json.loads(found.stdout)["phases"]}
    assert phases["decode"]["report"].startswith("bound by HBM")
    assert run.invoke(app, ["simulate", "llama-9"]).exit_code == 2
    assert run.invoke(app, ["simulate", "llama-3-8b", "--set", "hbm"]).exit_code == 2
    assert "sohu" in json.loads(run.invoke(app, ["chips", "--json"]).stdout)
    assert "500,000 tokens/s" in run.invoke(app, ["chips", "sohu"]).stdout
    names = {i["name"] for i in json.loads(run.invoke(app, ["isa", "--json"]).stdout)}
    assert {"Matmul", "Softmax", "Halt"} <= names
    assert (
        run.invoke(app, ["isa", "--page"]).stdout
        == (Path(__file__).parent.parent.parent / "docs" / "isa.md").read_text()
    )


def test_arithmetic_of_a_map_is_counted_by_operators() -> None:
    """Operations are counted in the parsed expression. An earlier count by characters took signs of numbers and
    grouping parentheses for operations: expressions of ports and passes have the same count, CHEAPER_NOW a lower one.
    """
    by_characters = {e: 1 + e.count("(") + sum(map(e.count, "+-*/")) for e in SHIPPED + CHEAPER_NOW}
    now = {e: MapKernel("T", 8, 2, expr=e).operations for e in by_characters}
    assert {e: now[e] for e in SHIPPED} == {e: by_characters[e] for e in SHIPPED}
    assert [(by_characters[e], now[e]) for e in CHEAPER_NOW] == [(3, 2), (3, 2), (4, 3)]
    exps = [MapKernel("T", 8, 2, expr=e).cycles(SMALL.chip, 64) > now[e] * 64 / SMALL.chip.vec_lanes for e in SHIPPED]
    assert exps == ["(" in e for e in SHIPPED]


SHIPPED = ("silu(a) * b", "gelu_tanh(a) * b", "a + b", "a + b * 0.22", "tanh(a / 30.0) * 30.0", "a + b * sigmoid(c)")
CHEAPER_NOW = ("a * 1e-05", "a * -0.5", "(a + b) * c")
