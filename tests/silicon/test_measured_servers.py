"""Rows of measured servers: their layouts and formats, inexpressible rows, comparison; disaggregated servers."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from typer.testing import CliRunner

from intaglio.chips import CHIPS, ChipError, target
from intaglio.cli import app
from intaglio.codesign.disaggregated import Apart, run_apart, serve_apart
from intaglio.codesign.engines import EngineProfile, EngineTimes, engine, engines
from intaglio.codesign.fleet import serve_fleet
from intaglio.codesign.measured import Compared, Row, agreements, compare_all, completed, rows
from intaglio.codesign.placement import Placement
from intaglio.codesign.queue import QueueSettings
from intaglio.codesign.simulate import ported
from intaglio.codesign.steps import Formats, Server, StepTimes
from intaglio.measure.workload import LoadRequest

POINT = {
    "backend": "vllm", "model_path": "meta-llama/Llama-3.1-8B-Instruct", "system": "h100_sxm", "mode": "agg",
    "isl": "128", "osl": "8", "gemm_quant_mode": "", "moe_quant_mode": "", "tp_size": "1", "pp_size": "1",
    "attention_dp_size": "", "moe_tp_size": "1", "moe_ep_size": "1", "silicon_ttft_ms": "50", "silicon_tpot_ms": "8",
    "concurrency": "2", "batch_size": "",
}  # fmt: skip


@pytest.fixture(scope="module")
def times() -> StepTimes:
    return StepTimes(Server.of(ported("llama-3-8b", None), Placement.parse("tp1"), Formats()), target("h100_sxm"))


def row(**columns: str) -> Row:
    return Row({**POINT, **columns})


def test_layouts_of_rows() -> None:
    """Columns (tp, dp, moe tp, moe ep) and the placement that they mean for a mixture of experts."""
    for sizes, meant in (
        (("8", "1", "8", "1"), "tp8"), (("8", "1", "1", "8"), "tp8/ep8"), (("64", "1", "8", "8"), "tp8/ep8"),
        (("1", "64", "8", "8"), "dp8/ep8"), (("1", "8", "1", "8"), "dp8/ep8"), (("4", "4", "1", "16"), "dp4/ep4"),
        (("2", "2", "1", "4"), "dp2/ep2"), (("4", "", "2", "2"), "tp4/tp2ep2"), (("16", "1", "4", "4"), "tp4/ep4"),
    ):  # fmt: skip
        names = ("tp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size")
        found = row(model_path="deepseek-ai/DeepSeek-R1", **dict(zip(names, sizes, strict=True)))
        assert (str(found.placement()), found.group) == (meant, "mixture")
    dense = row(tp_size="4", attention_dp_size="2")
    assert (str(dense.placement()), dense.group) == ("dp2tp4", "dense")


def test_formats_of_rows() -> None:
    vllm, trt = engine("vllm"), engine("trtllm")
    assert row().formats(vllm) == Formats("bf16", "auto", "weights")
    assert row(gemm_quant_mode="fp8").formats(trt) == Formats("fp8", trt.kv, "weights")
    four = {"gemm_quant_mode": "nvfp4", "moe_quant_mode": "nvfp4"}
    assert row(model_path="x/Kimi-K2.5", **four).formats(vllm) == Formats("bf16", vllm.kv, "weights", "nvfp4")
    assert row(model_path="x/gpt-oss-120b", **four).formats(vllm).experts == "mxfp4"


def test_rows_that_cannot_be_expressed(tmp_path: Path) -> None:
    assert row().refusal() is None
    for columns, why in (
        ({"model_path": "nobody/none"}, "no card of nobody/none"), ({"system": "none"}, "no chip none"),
        ({"mode": "disagg"}, "the number of prefill or decode servers is not given"),
        ({"concurrency": ""}, "neither concurrency nor batch size"),
    ):  # fmt: skip
        assert row(**columns).refusal() == why
    [long] = compare_all([row(isl="140000", osl="10")])
    assert long.refused == "requests of 140,010 tokens; the context of llama-3.1-8b is 131,072"
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="wanted rows with columns backend"):
        rows(tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("column", "value", "allowed"),
    [
        *(
            ("silicon_ttft_ms", v, "a finite number of milliseconds above 0")
            for v in ("0", "-5", "nan", "inf", "", "x")
        ),
        ("silicon_tpot_ms", "0", "a finite number of milliseconds above 0"),
        *(("isl", v, "a whole number from 1 to 16,777,216") for v in ("0", "-1", "1.5", "", "nan", "inf", "1e8")),
        *(("osl", v, "a whole number from 2 to 16,777,216") for v in ("-1", "0", "1", "16777217")),
        *(("concurrency", v, "a whole number from 1 to 65,536") for v in ("0", "-3", "2.5", "65537", "1e12")),
        *(("batch_size", v, "a whole number from 1 to 65,536") for v in ("abc", "0")),
        ("tp_size", "0", "a whole number from 1 to 65,536"),
        ("decode_num_workers", "-1", "a whole number from 1 to 65,536"),
        ("moe_ep_size", "-1", "a whole number from 0 to 65,536"),
    ],
)
def test_a_wrong_value_is_refused_by_name(tmp_path: Path, column: str, value: str, allowed: str) -> None:
    """In one line, with file, row, column, value and what is allowed; the row before it is right."""
    columns = POINT | {"decode_num_workers": ""}
    file = tmp_path / "t.csv"
    file.write_text("\n".join(",".join(r) for r in (columns, columns.values(), (columns | {column: value}).values())))
    done = CliRunner().invoke(app, ["validate-serving", str(file)])
    assert done.exit_code == 2 and done.stderr.count("\n") == 1
    assert f"{file}: row 2 below the header: {column} is {value!r}; allowed: {allowed}; correct or" in done.stderr


def test_whole_numbers_may_have_a_point_and_columns_of_servers_may_be_empty(tmp_path: Path) -> None:
    file, columns = tmp_path / "t.csv", POINT | {"concurrency": "2.0", "moe_tp_size": "0", "tp_size": ""}
    file.write_text("\n".join(",".join(r) for r in (columns, columns.values())))
    (found,) = rows(file)
    assert (found.concurrency, found.ttft, str(found.placement())) == (2, 0.05, "tp1")


def test_numbers_of_servers_come_from_a_row_with_the_same_measurement() -> None:
    """All columns of servers are taken from it. A row that differs in another column gives none; nor do two answers."""
    servers = {"prefill_num_workers": "2", "decode_num_workers": "3", "prefill_attention_dp_size": "4"}
    unknown = {**dict.fromkeys(servers, ""), "prefill_tp_size": "4"}
    servers["prefill_tp_size"] = "1"
    said = row(mode="disagg", model_path="a/DeepSeek-V3", **servers)
    silent = row(mode="disagg", model_path="b/DeepSeek-R1", **unknown)
    assert completed([said])[0] is said
    alone, found = completed([silent])[0], completed([silent, said])[0]
    assert alone.twin is None and alone.refusal() == "the number of prefill or decode servers is not given"
    assert found.refusal() is None and found.twin is said and found.split == said.split
    assert found.columns["model_path"] == "b/DeepSeek-R1"
    assert {name: found.columns[name] for name in servers} == servers
    counts = agreements([Compared(found, 0.1, 0.1), Compared(said, 0.1, 0.1), Compared(silent, refused="x")])
    assert [(a.rows, a.derived) for a in counts] == [(2, 1)] * 2
    for name, value in (
        ("silicon_ttft_ms", "50.1"), ("concurrency", "4"), ("backend", "sglang"), ("model_path", "x/GLM-5"),
        ("decode_num_workers", ""), ("mode", "agg"),
    ):  # fmt: skip
        assert completed([silent, row(**{**said.columns, name: value})])[0] is silent, name
    other = row(**{**said.columns, "decode_num_workers": "5"})
    assert completed([silent, said, other])[0] is silent


def test_the_closed_form_is_close_to_the_queue() -> None:
    """Times per token of a steady load by both ways, with lengths at which chunks of prompts rarely meet."""
    plain = EngineProfile(name="x", description="", max_batch_tokens=2048)
    asked = [row(concurrency=str(Random().randrange(1, 17)), isl="256", osl="256")]
    by_queue, by_form = (next(compare_all(asked, lambda _: plain, closed_form=c)) for c in (False, True))
    assert by_form.tpot == pytest.approx(by_queue.tpot, rel=0.15)
    assert by_form.ttft > 0 and not by_form.refused


def test_a_row_is_compared_with_the_queue() -> None:
    """A profile's additions come in full on top of the kernels' times; rows of equal questions are in one half."""
    plain = EngineProfile(name="x", description="", max_batch_tokens=512)
    slow = EngineProfile(name="x", description="", max_batch_tokens=512, step_s=0.01, request_s=0.5)
    other = row(silicon_ttft_ms="70")
    assert other.split == row().split
    asked = [row(), other, row(mode="disagg")]
    fast, late = (list(compare_all(asked, lambda _, p=p: p)) for p in (plain, slow))  # type: ignore[misc]
    good = [c for c in fast if not c.refused]
    assert len(good) == 2 and good[0].tpot == good[1].tpot
    worse = [c for c in late if not c.refused]
    assert worse[0].tpot == pytest.approx(good[0].tpot + 0.01, rel=1e-6)
    assert worse[0].ttft > good[0].ttft + 0.51 * 0.999
    found = agreements(fast)
    assert [(a.engine, a.group, a.rows) for a in found] == [("vllm", "dense", 2), ("all", "dense", 2)]
    assert found[0].tpot == pytest.approx(abs(good[0].tpot / 0.008 - 1))


@pytest.mark.parametrize("closed_form", [False, True])
def test_rows_say_how_many_drafts_their_recipe_assumes(closed_form: bool) -> None:
    recipe = {"system": "h100_sxm", "layout": "tp1", "draft_tokens": 3, "tokens_per_step": 2.0}
    drafting = EngineProfile(name="x", description="", recipes=(recipe,))
    asked = [row(), row(tp_size="2"), row(system="h200_sxm")]
    found = [next(compare_all([one], lambda _: drafting, closed_form=closed_form)) for one in asked]
    assert [(c.draft_tokens, c.refused) for c in found] == [(3, ""), (0, ""), (0, "")]


def test_shipped_recipes_name_their_chip() -> None:
    assert all(recipe["system"] in CHIPS for name in engines() for recipe in engine(name).recipes)


def test_a_row_with_prefill_and_decode_apart() -> None:
    """Each kind has its layout and its number of servers; more decode servers give a shorter TPOT."""
    sizes = {f"{p}_{name}": "1" for p in ("prefill", "decode") for name in ("num_workers", "tp_size", "pp_size")}
    one, two = row(mode="disagg", **sizes), row(mode="disagg", **{**sizes, "decode_num_workers": "2"})
    assert one.group == "disaggregated" and str(two.placement("decode_")) == "dp2tp1"
    profile = EngineProfile(name="x", description="", request_s=0.5)
    slow, fast = compare_all([one, two], lambda _: profile)
    assert not slow.refused and fast.tpot < slow.tpot and slow.ttft > 0.5


def test_requests_wait_for_a_free_sequence_of_a_decode_server() -> None:
    """A recipe's decode_sequences limit decode servers by the requests open. The others wait, by Little's law."""
    sizes = {f"{p}_{name}": "1" for p in ("prefill", "decode") for name in ("num_workers", "tp_size", "pp_size")}
    asked = row(mode="disagg", **{**sizes, "decode_num_workers": "2"}, isl="64", osl="400", concurrency="8")
    recipe = {"system": "h100_sxm", "prompt": 64, "decode_sequences": ((2, 9), (8, 2), (9, 1))}
    narrow = EngineProfile(name="x", description="", recipes=(recipe, {**recipe, "prompt": 65, "step_s": 1.0}))
    free, full = (
        next(compare_all([asked], lambda _, p=p: p)) for p in (EngineProfile(name="x", description=""), narrow)
    )
    assert free.ttft < 20 * free.tpot and full.tpot <= free.tpot
    waiting = (8 - 2 * 2) / (2 * 2) * 399 * full.tpot  # for each that decodes one waits, so for a whole response
    assert full.ttft == pytest.approx(waiting, rel=0.15)
    with pytest.raises(ValueError, match="engine x: route is 'x'; allowed: least-open, round-robin"):
        EngineProfile(name="x", description="", route="x")


def test_servers_apart_have_the_router_and_the_queue_of_a_fleet(times: StepTimes) -> None:
    """Prefill servers that get requests in turn do what replicas of a fleet do with the prompts."""
    rng = Random()
    many = StepTimes(Server.of(times.server.program, Placement.parse("dp3tp1"), Formats()), times.target)
    many.tables = times.tables
    at = sorted(rng.uniform(0, 2) for _ in range(12))
    load = [LoadRequest(t, rng.randrange(16, 600), rng.randrange(2, 40)) for t in at]
    settings = QueueSettings(100_000, 512, rng.randrange(2, 9))
    run = run_apart(Apart(many, times, settings, settings, "round-robin"), load, at)
    prompts = [LoadRequest(r.at, r.prompt, 1) for r in load]
    assert tuple(tuple(q.done) for q in run.prefill) == serve_fleet(many, settings, prompts, 3, "round-robin").outcomes
    assert len(run.ended) == 12 and len(run.decode[0].done) == 12
    assert all(o.end >= o.first > 0 for q in run.decode for o in q.done)
    with pytest.raises(ValueError, match="route 'x'; use one of least-open, round-robin"):
        run_apart(Apart(many, times, settings, settings, "x"), load, at)


def test_profiles(times: StepTimes, tmp_path: Path) -> None:
    assert {"vllm", "sglang", "trtllm"} <= set(engines())
    for name in engines():
        profile = engine(name)
        assert EngineTimes(times, profile).cost(4, 100.0)[0] > 0
    seconds = times.cost(4, 100.0)[0]
    assert EngineTimes(times, EngineProfile(name="x", description="")).cost(4, 100.0)[0] == seconds
    graphs = EngineProfile(name="x", description="", graph_launch_s=0.0, decode_factor=2.0)
    launches = sum(part.count for part in times.parts[0]) * times.target.library.launch_s
    assert EngineTimes(times, graphs).cost(4, 100.0)[0] <= 2 * (seconds - launches) * (1 + 1e-9)
    chunk = [(64, 64, 1)]
    assert EngineTimes(times, graphs).cost(4, 100.0, chunk) == times.cost(4, 100.0, chunk)
    slow = EngineProfile(name="x", description="", decode_factor=3.0, prefill_factor=2.0)
    for chunks, factor in (((), 3.0), (chunk, 2.0)):  # the chips idle in the time that a factor adds
        spent, joules = times.cost(4, 100.0, chunks)
        more = (factor - 1) * spent * times.target.chip.energy.idle_w
        assert EngineTimes(times, slow).cost(4, 100.0, chunks) == pytest.approx((factor * spent, joules + more))
    here = {"hopper": {"small_reduce_s": 2e-6}, "blackwell": {"small_reduce_s": 3e-6}}
    own = EngineProfile(name="x", description="", generations=here, library={"barrier_s": 1e-6})
    assert own.on(times.target).library.small_reduce_s == 2e-6
    assert own.on(target("b200_sxm")).library.small_reduce_s == 3e-6
    assert own.on(target("a100_sxm")).library.barrier_s == 1e-6
    grouped = {"hopper": {"fp8": {"grouped_mxu_efficiency": 0.1, "barrier_s": 2e-6}}}
    own = EngineProfile(name="x", description="", library={"barrier_s": 1e-6}, experts=grouped)
    libraries = [own.on(times.target, experts).library for experts in ("fp8", "nvfp4", "")]
    assert [one.barrier_s for one in libraries] == [2e-6, 1e-6, 1e-6]
    assert libraries[0].grouped_mxu_efficiency == 0.1 != libraries[1].grouped_mxu_efficiency
    late = EngineProfile(name="x", description="", older={"before": "1.1", "step_s": 0.5})
    steps = [late.of(release).step_s for release in ("1.0.0rc3", "", "1.1.0rc2.post2", "1.2", "nightly-5b8c")]
    assert steps == [0.5, 0.5, 0, 0, 0]
    assert late.of("1.0").settings(1).step_s == 0.5 and own.of("") == own
    recipes = (
        {"card": "a", "poll_steps": ((1, 2), (8, 5)), "why": "x"}, {"card": "a", "layout": "tp2", "step_s": 0.1},
        {"card": "a", "release": "1.2", "draft_tokens": 2, "tokens_per_step": 1.5, "step_s": 0.2},
    )  # fmt: skip
    cooked = EngineProfile(name="x", description="", recipes=recipes)
    on_one = EngineProfile(name="x", description="", recipes=({"system": "b200_sxm", "step_s": 0.3},))
    assert [on_one.of("", system=s).step_s for s in ("b200_sxm", "h100_sxm", "")] == [0.3, 0, 0]
    found = [cooked.of(release, card, "tp2") for release, card in (("1.2", "a"), ("1.3", "a"), ("1.2", "b"))]
    assert [(p.step_s, p.draft_tokens, p.tokens_per_step) for p in found] == [(0.2, 2, 1.5), (0.1, 0, 1.0), (0, 0, 1)]
    assert [found[0].settings(1, concurrency=n).poll_steps for n in (1, 7, 8, 90)] == [2, 2, 5, 5]
    assert found[2].settings(1, concurrency=9).poll_steps == 0 and found[0].settings(1).tokens_per_step == 1.5
    with pytest.raises(ChipError, match="engine x: a recipe has mystery; allowed: admission_steps"):
        EngineProfile(name="x", description="", recipes=({"mystery": 1},))
    with pytest.raises(ValueError, match="tokens_per_step is 3; allowed: 1 to 2, with draft_tokens 1"):
        EngineProfile(name="x", description="", draft_tokens=1, tokens_per_step=3)
    for older in ({"step_s": 1.0}, {"before": "1.1", "mystery": 1}):
        with pytest.raises(ChipError, match="engine x: older has .*; wanted before = a release"):
            EngineProfile(name="x", description="", older=older)
    with pytest.raises(ValueError, match="engine x: unknown fusion mystery; known: add_norm"):
        EngineProfile(name="x", description="", fusions=("mystery",))
    with pytest.raises(ValueError, match="ranks is 'mystery'; allowed: any, round-robin, random"):
        EngineProfile(name="x", description="", ranks="mystery")
    assert (
        EngineProfile(name="x", description="", apart={"ranks": "random"}).of("", apart=True).settings(1).ranks
        == "random"
    )
    with pytest.raises(ValueError, match="no serving engine 'x'; known are"):
        engine("x")
    text = 'description = ""\n[[recipes]]\ncard = "a"\npoll_steps = [[1, 3]]\nfusions = ["glu"]\n'
    (tmp_path / "r.toml").write_text(text)
    read = engine(str(tmp_path / "r.toml")).of("", "a")
    assert (read.poll_steps, read.fusions) == (((1, 3),), ("glu",))
    (tmp_path / "e.toml").write_text('description = ""\nstep = 1\n')
    with pytest.raises(ChipError, match="unknown step; a profile has"):
        engine(str(tmp_path / "e.toml"))
    for text, why in (
        ("a = ", "not TOML"), ("step_s = 1.0", "description missing"), ('step_s = "x"', "step_s='x'; wanted a number"),
        ("poll_steps = 3", "poll_steps=3; wanted"), ("poll_steps = [[1, 2, 3]]", "wanted"), ("recipes = 1", "wanted"),
        ("apart = 1", "apart=1; wanted"), ("[[recipes]]\nfusions = 1", "recipes.fusions=1; wanted"),
        ("[older]\nbefore = '1.0'\npoll_steps = [1]", "older.poll_steps=1; wanted"),
        ("[library]\n1 = 2\n[library]", "not TOML"),
        ("graph_launch_s = true", "graph_launch_s=True; wanted a number"), ("experts = { x = 1 }", "experts.x=1; want"),
    ):  # fmt: skip
        given = text if why in ("not TOML", "description missing") else f'description = ""\n{text}'
        (tmp_path / "e.toml").write_text(given)
        with pytest.raises(ChipError, match=f"e.toml: .*{why}"):
            engine(str(tmp_path / "e.toml"))
    with pytest.raises(ValueError, match="step_s is -1"):
        EngineProfile(name="x", description="", step_s=-1.0)


def test_prefill_and_decode_apart(times: StepTimes) -> None:
    """One request: its prompt, the journey of its K/V, its decode steps; more decode servers serve more."""
    two = StepTimes(Server.of(times.server.program, Placement.parse("dp2tp1"), Formats()), times.target)
    settings = QueueSettings(100_000, 2048, 64)
    request = LoadRequest(0.0, 800, 40)
    alone = serve_apart(Apart(times, times, settings, settings), request, 1)
    prompt = times.cost(0, 1, [(800, 800, 1)])[0]
    moved = 800 * times.server.kv_bytes_per_token / times.target.chip.links.chip_bytes_per_s
    assert times.server.kv_bytes_per_token == 2 * 2 * 8 * 128 * 32
    assert alone.ttft == pytest.approx(prompt + moved + times.target.library.link_latency_s, rel=1e-6)
    assert alone.tpot == pytest.approx(times.cost(1, 820.0)[0], rel=0.02)
    assert alone.chips == 2
    small = QueueSettings(100_000, 2048, 8)  # decode servers with 8 sequences each, which limit the rate
    few, many = (serve_apart(Apart(times, on, settings, small), LoadRequest(0.0, 100, 200), 24) for on in (times, two))
    assert many.chips == 3 and many.ttft < few.ttft and many.tokens_per_s > 1.5 * few.tokens_per_s
    with pytest.raises(ValueError, match="one new token never reach a decode server"):
        serve_apart(Apart(times, times, settings, settings), LoadRequest(0.0, 800, 1), 1)
