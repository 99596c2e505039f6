"""The command line over a tiny checkpoint on the reference device: output, JSON, files, and errors in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.tiny import tiny
from typer.testing import CliRunner, Result

import intaglio.cli
from intaglio import LLM, SamplingParams, __version__
from intaglio.devices import open_device
from intaglio.measure.bench import DECODE_STEPS, BenchError, Roofs, bench, measured_roofs
from intaglio.model import BUNDLED
from intaglio.program import load

REFERENCE = ("--device", "reference")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tiny("llama", tmp_path_factory.mktemp("cli") / "tiny", num_hidden_layers=3)
    (path / "list.json").write_text("[1]")
    (path / "broken.json").write_text('{"a":')
    return str(path)


def run(*words: str, input: str | None = None, code: int = 0) -> Result:
    result = CliRunner().invoke(intaglio.cli.app, list(words), input=input)
    assert result.exit_code == code, result.output
    return result


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("simulate llama-3-8b --batch 0", r"Invalid value for '--batch': .*; see .*simulate --help"),
        ("simulate llama-3-8b --output x", r"Invalid value for '--output': .*; see .*simulate --help"),
        ("simulate", r"Missing argument .*; see .*simulate --help"),
        ("generate --nope", r"No such option: --nope.*; see .*generate --help"),
        ("cluster up --nope", r"No such option: --nope.*; see .*cluster up --help"),
        ("bench serve --rate x", r"Invalid value for '--rate': .*; see .*bench serve --help"),
        ("nope", r"No such command 'nope'; see .* --help"),
        ("--nope", r"No such option: --nope; see .* --help"),
    ],
)
def test_a_wrong_option_or_argument_is_refused_in_one_line(words: str, says: str) -> None:
    done = run(*words.split(), code=2)
    assert re.fullmatch(rf"error: {says}\n", done.stderr), done.output
    assert done.stdout == ""


def test_version_and_help() -> None:
    assert run("--version").stdout == f"intaglio {__version__}\n"
    commands = ("demo", "generate", "chat", "build", "disasm", "check", "bench", "profile", "models", "serve")
    text = run("--help").stdout
    assert all(c in text for c in commands)
    for command in commands:
        assert "Usage" in run(command, "--help").stdout


def test_generate_streams_what_the_api_gives(folder: str) -> None:
    words = (
        "--max-tokens",
        "9",
        "--temperature",
        "0.9",
        "--top-k",
        "50",
        "--top-p",
        "0.9",
        "--min-p",
        "0.01",
        "--seed",
        "4",
    )
    result = run("generate", folder, "--prompt", "def ", *words, *REFERENCE)
    params = SamplingParams(9, 0.9, 50, 0.9, 0.01, 4)
    [output] = LLM(folder, device="reference").generate("def ", params)
    assert result.stdout == f"def {output.text}\n"
    assert "9 tokens" in result.stderr and "finish reason: length" in result.stderr
    assert run("generate", folder, *words, *REFERENCE, input="def ").stdout == result.stdout


def test_generate_json_takes_several_prompts_and_stops(folder: str) -> None:
    words = ("generate", folder, "--prompt", "ab", "--prompt", "cd", "--max-tokens", "12", "--json", *REFERENCE)
    outputs = json.loads(run(*words).stdout)
    assert [o["prompt"] for o in outputs] == ["ab", "cd"]
    assert all(len(o["token_ids"]) == len(o["logprobs"]) for o in outputs)
    stop = outputs[0]["text"][2]
    cut = json.loads(run(*words, "--stop", "never", "--stop", stop).stdout)[0]
    assert cut["finish_reason"] == "stop" and cut["text"] == outputs[0]["text"].partition(stop)[0]
    assert "cd" in run(*words[:-3], *REFERENCE).stdout  # without --json


def test_chat_keeps_the_history(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[dict[str, str]]] = []
    original = LLM.chat_prompt
    monkeypatch.setattr(LLM, "chat_prompt", lambda self, m: (seen.append(list(m)), original(self, m))[1])
    run("chat", folder, "--max-tokens", "3", "--temperature", "0", *REFERENCE, input="hello\n\nagain\n")
    assert [m["role"] for m in seen[-1]] == ["user", "assistant", "user"]
    assert seen[-1][0]["content"] == "hello" and seen[-1][2]["content"] == "again"


def test_chat_says_at_once_that_there_is_no_template(folder: str, tmp_path: Path) -> None:
    plain = tiny("llama", tmp_path / "plain", num_hidden_layers=3)
    settings = json.loads((plain / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (plain / "tokenizer_config.json").write_text(json.dumps(settings))
    result = run("chat", str(plain), *REFERENCE, input="hello\n", code=2)
    assert "chat_template" in result.stderr and result.stdout == ""


def test_build_and_disasm(folder: str, tmp_path: Path) -> None:
    file = tmp_path / "out.program"
    report = run("build", folder, "-o", str(file), "--weights", "int4").stdout
    assert "set_weight_formats: " in report and "int4g32" in report and str(file) in report
    program = load(file)
    assert run("disasm", str(file), "--full").stdout == str(program)
    assert run("disasm", folder, "--weights", "int4", "--full").stdout == str(program)
    folded, raw = run("disasm", folder).stdout, run("disasm", folder, "--raw").stdout
    assert "layers.2: as layers.1" in folded and "qkv_proj" in folded
    assert "qkv_proj" not in raw and ".attn.q_proj" in raw
    facts = json.loads(run("disasm", str(file), "--json").stdout)
    assert facts["hash"] == program.hash and sum(facts["ops"].values()) == len(program.ops)
    facts = json.loads(run("build", folder, "--json", "--context", "64").stdout)
    assert facts["context"] == 64 and facts["output"] is None and facts["passes"]
    assert "--raw" in run("disasm", str(file), "--raw", code=2).stderr


def test_models() -> None:
    assert "LlamaForCausalLM" in run("models").stdout
    assert "LlamaForCausalLM" in json.loads(run("models", "--json").stdout)["families"]


def test_check(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "logits" in run("check", folder, *REFERENCE).stdout
    assert json.loads(run("check", folder, *REFERENCE, "--json").stdout)["ok"] is True
    monkeypatch.setattr(
        "intaglio.debugging.check.tolerances", lambda p, n: dict.fromkeys((op.site for op in p.ops), 0.0)
    )
    run("check", folder, *REFERENCE, code=1)


def test_bench(folder: str) -> None:
    words = ("bench", folder, "--prompt-tokens", "8,40", "--sequences", "1,2", "--runs", "1", *REFERENCE)
    assert "no measured roofs" in run(*words).stdout
    rows = json.loads(run(*words, "--json").stdout)["rows"]
    assert [(r["phase"], r["sequences"], r["prompt_tokens"]) for r in rows[:3]] == [
        ("prefill", 1, 8), ("decode", 1, 8), ("prefill", 1, 40),
    ]  # fmt: skip
    assert len(rows) == 8 and all(r["tokens_per_second"] > 0 and r["share"] is None for r in rows)
    assert "'8;40' is not a list" in run("bench", folder, "--prompt-tokens", "8;40", *REFERENCE, code=2).stderr


def test_bench_counts_work_against_the_roofs(folder: str) -> None:
    llm = LLM(folder, device="oracle")
    ticks = iter(range(10**6))
    sizes: dict[str, Any] = {"lengths": [100], "sequences": [3], "max_batch_tokens": 64}
    roofs = Roofs(bandwidth=lambda megabytes: 1e3, peak=lambda format: {"f32": 1e9}[format])
    prefill, decode = bench(llm.engine.executable, roofs, clock=lambda: float(next(ticks)), **sizes)
    assert prefill.seconds == 5 and prefill.tokens_per_second == 60  # five steps of at most 64 tokens, a tick each
    assert decode.seconds == 1 and decode.tokens_per_second == 3
    weights = sum(t.nbytes({}) for t in llm.model.program.of_role("weight") if t.name != "embed.weight")
    assert weights < decode.bytes < prefill.bytes and decode.bound_by == "memory"
    assert decode.bound_seconds == pytest.approx(decode.bytes / 1e3) and decode.share == decode.bound_seconds
    fast_memory = Roofs(bandwidth=lambda megabytes: 1e12, peak=lambda format: 1e6)
    prefill, _ = bench(llm.engine.executable, fast_memory, **sizes)
    assert prefill.bound_by == "matrix" and prefill.bound_seconds == pytest.approx(prefill.flops / 1e6)
    with pytest.raises(BenchError, match=f"at most {256 - DECODE_STEPS} tokens"):
        bench(llm.engine.executable, lengths=[250])
    with pytest.raises(BenchError, match="pages of KV"):
        bench(llm.engine.executable, lengths=[200], sequences=[9999])
    assert "no measured roofs" in str(measured_roofs(open_device("reference")))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("generate", "{folder}", "--prompt", "x", "--top-p", "3"), "top_p is 3.0; allowed: above 0, up to 1"),
        (("generate", "{folder}", "--prompt", "x" * 300), "prompt 0: the prompt has 300 tokens, the context holds 256"),
        (("generate", "{folder}"), "nothing to continue"),
        (("generate", "{folder}", "--prompt", "x", "--weights", "int3"), "int3"),
        (("generate", "{folder}", "--prompt", "x", "--kv", "int3"), "kv_format='int3': use auto, f32, bf16, int8"),
        (("generate", "{folder}", "--prompt", "x", "--device", "abacus"), "no device called 'abacus'"),
        (("generate", "/nowhere", "--prompt", "x"), "/nowhere"),
        (("build", "{folder}", "-o", "/nowhere/x.program"), "--output /nowhere/x.program: there is no folder /nowhere"),
        (("build", "{folder}", "-o", "{folder}"), "{folder}: Is a directory"),
        (("serve", "{folder}", "--journal", "/nowhere/x"), "--journal /nowhere/x: there is no folder /nowhere"),
        (("simulate", "llama-3-70b", "--trace", "/nowhere/x"), "--trace /nowhere/x: there is no folder /nowhere"),
        (
            ("simulate", "llama-3-8b", "--by", "chip"),
            "--step-overhead, --plot and several chips go with --concurrency or --find",
        ),
        (("simulate", "llama-3-8b", "--find", "--concurrency", "4"), "leave --concurrency out"),
        (
            ("simulate", "llama-3-8b", "--chips", "4", "--layout", "tp2", "--concurrency", "4"),
            "--chips 4 but layout tp2 has another number of chips",
        ),
        (
            ("simulate", "llama-3-8b", "--prefill", "tp1", "--decode", "tp1", "--concurrency", "4", "--chips", "4"),
            "--chips 4 with --prefill, --decode and --concurrency",
        ),
        (
            ("simulate", "llama-3-8b", "--concurrency", "4", "--ttft", "nan"),
            "--ttft is nan; give a finite number above",
        ),
        (("simulate", "llama-3-8b", "--concurrency", "4", "--tpot", "0"), "--tpot is 0; give a finite number above 0"),
        (("simulate-serving", "llama-3-8b", "--tpot", "-5"), "--tpot is -5; give a finite number above 0"),
        (("simulate-serving", "llama-3-8b", "--ttft", "inf"), "--ttft is inf; give a finite number above 0"),
        (("simulate", "{folder}/list.json"), "{folder}/list.json holds a JSON list; wanted an object"),
        (("simulate", "{folder}/broken.json"), "{folder}/broken.json is not JSON"),
        (("bench", "{folder}", "--context", "5"), "a context of 5 tokens is too short to measure: 16 of them"),
        (("disasm", "{folder}/config.json"), "line 1: a program starts with"),
    ],
)
def test_an_error_is_one_line_and_code_2(folder: str, words: tuple[str, ...], message: str) -> None:
    words = tuple(w.format(folder=folder) for w in words)
    words += () if "--device" in words or words[0] in ("build", "disasm", "simulate", "simulate-serving") else REFERENCE
    result = run(*words, code=2)
    assert result.stderr.startswith("error: ") and message.format(folder=folder) in result.stderr
    assert "Traceback" not in result.output and result.stderr.count("\n") == 1


def test_modelled_times_are_not_measured(folder: str) -> None:
    for command in ("bench", "profile"):
        result = run(command, folder, "--device", "silicon", code=2)
        assert "device 'silicon' has nothing to measure" in result.stderr
    words = ("generate", folder, "--prompt", "def ", "--max-tokens", "3", "--device", "silicon")
    assert run(*words).stderr == run(*words).stderr  # the speed too: it is the chip's
    assert "tokens/s, modelled: 1 x sohu, tp1;" in run(*words).stderr


def test_debug_shows_the_traceback(folder: str) -> None:
    result = CliRunner().invoke(intaglio.cli.app, ["--debug", "generate", "/nowhere", "--prompt", "x", *REFERENCE])
    assert isinstance(result.exception, ValueError)


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundled = tiny("llama", tmp_path / "tiny", num_hidden_layers=1, max_position_embeddings=512)
    monkeypatch.setattr("intaglio.model.BUNDLED", bundled)
    text = run("demo", *REFERENCE).stdout
    for part in ("program  tiny: ", "device   reference", "class Queue", "prefill", "decode", "no measured roofs"):
        assert part in text
    modelled = text[text.index("modelled: Llama-3-70B") :]
    for layout in ("tp8", "tp4pp2", "tp2pp4", "pp8"):
        assert f"\n{layout}: bound by " in modelled and "helps most: " in modelled


def test_the_readme_lists_every_command_and_quotes_real_text() -> None:
    readme = (Path(__file__).parent.parent.parent / "README.md").read_text()
    names = [c.name or c.callback.__name__ for c in intaglio.cli.app.registered_commands]  # type: ignore[union-attr]
    for name in [*names, "bench [MODEL]", "bench serve"]:
        assert f"| `intaglio {name}" in readme
    if not BUNDLED.is_dir():
        pytest.skip("the bundled model is not here")
    quoted = readme.split("```\nprogram ")[1].split("```")[0].splitlines()[1:]
    printed = run("disasm", "--weights", "int8").stdout.splitlines()
    assert [line for line in quoted if line.strip() != "..." and line not in printed] == []
