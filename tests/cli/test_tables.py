"""What every command prints fits a terminal of 80 columns: each command is run as on such a terminal."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.tiny import tiny
from typer.testing import CliRunner, Result

from intaglio import LLM, SamplingParams
from intaglio.chips import CHIPS, LIBRARIES
from intaglio.cli import app
from intaglio.cli.fields import quantity
from intaglio.cli.progress import console
from intaglio.cli.show import out, table

REFERENCE = "--device reference"
MEASURE = f"--prompt-tokens 8 --runs 1 {REFERENCE}"
# each command as it prints most; {folder} is a checkpoint, {journal} a record, {tables} measured kernel times. A new
# command is not tested until it stands here, and test_every_command_is_tried fails until it does.
LINES = {
    "demo": (),  # its tables are those of bench and simulate; test_cli runs it
    "generate": (f"{{folder}} --prompt ab --prompt cd --max-tokens 3 {REFERENCE}",),
    "chat": (f"{{folder}} --max-tokens 2 {REFERENCE}",),
    "build": ("{folder} --weights int4",),
    "disasm": ("{folder}",),
    "models": ("",),
    "port": ("{folder}",),
    "check": (f"{{folder}} {REFERENCE}", "{folder} --bisect reference,reference:int4"),
    "bench model": (f"{{folder}} --sequences 1,2 {MEASURE}", "{folder} --prompt-tokens 8 --runs 1"),
    "bench serve": ("{folder} --device silicon --requests 2 --rate inf",),
    "profile": (f"{{folder}} {MEASURE}", "{folder} --prompt-tokens 8 --runs 1"),
    "replay": ("{journal}",),
    "serve": ("/nowhere --port 0",),  # a server prints no table
    "simulate": (
        "{folder} --input 9 --output 5 --what-helps", "{folder} --layout tp2,pp2 --input 9 --output 5",
        "llama-3-8b --input 700 --output 100 --set chip.clock_hz=1e6",
        "{folder} --chip sohu,h100_sxm --layout tp1,dp2tp2 --input 9 --output 5 --concurrency 4,1024 --ttft 1",
        "{folder} --chip h100_sxm --prefill tp1,2xtp1 --decode tp2,tp1 --input 9 --output 5 --concurrency 4",
        "{folder} --chip h100_sxm --layout tp1,dp2tp1 --input 9 --output 5 --find --max-batch-tokens 64 --ttft 3",
        "{folder} --chip h100_sxm --chips 2 --input 9 --output 5 --find --max-batch-tokens 64 --ttft 3",
        "{folder} --chip h100_sxm --chips 3 --prefill tp1 --decode tp1,tp2 --input 9 --output 5 --find --tpot 9",
    ),
    "simulate-serving": (
        "{folder} --chip sohu,h100_sxm --input 9 --output 5 --requests 4",
        "{folder} --input 9 --output 5 --rate 100 --requests 4 --price 2.5",
        "{folder} --layout dp2tp1 --input 9 --output 5 --rate 100 --requests 4 --route round-robin",
    ),
    "chips": ("", *CHIPS),
    "libraries": ("", *LIBRARIES),
    "isa": ("",),
    "validate": ("{tables}",),
    "calibrate": (),  # writes files; tests/silicon/test_calibrate.py runs it
    "validate-serving": ("{servers}", "{servers} --ranking --closed-form"),
    "agent": (),  # nothing is printed; tests/devices/test_hosts.py runs these two
    "launch": (),
    "cluster up": (),  # these need a cluster that runs; tests/cluster has one
    "cluster status": (),
    "cluster drain": (),
    "cluster scale": (),
    "cluster down": (),
}  # fmt: skip
SERVERS = """\
backend,model_path,system,mode,isl,osl,gemm_quant_mode,moe_quant_mode,tp_size,silicon_ttft_ms,silicon_tpot_ms,concurrency
vllm,meta-llama/Llama-3.1-8B-Instruct,h100_sxm,agg,128,8,,,1,50,8,2
sglang,zai/Unknown,h100_sxm,agg,128,8,fp8,fp8,1,50,8,2
"""
CASES = [(command, line) for command, lines in LINES.items() for line in lines]
QUICK = {"chips", "libraries", "isa", "models"}
UNWRAPPED = {"disasm", "generate", "chat"}  # the text of a Program parses back; that of a model is its own


def commands() -> Iterator[str]:
    for c in app.registered_commands:
        yield str(c.name or c.callback.__name__)  # type: ignore[union-attr]
    for group in app.registered_groups:
        for c in group.typer_instance.registered_commands:  # type: ignore[union-attr]
            yield f"{group.name} {c.name or c.callback.__name__}"  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    at = tmp_path_factory.mktemp("tables")
    folder = tiny("llama", at / "tiny", num_hidden_layers=2, max_position_embeddings=512)
    LLM(folder, device="reference", journal=at / "journal").generate("ab", SamplingParams(max_tokens=3))
    (at / "measured").mkdir()
    rows = "m,n,k,dtype,us,split\n" + "".join(f"{m},4096,4096,bfloat16,{m},fit\n" for m in (64, 4096))
    (at / "measured" / "h100_sxm_matmul.csv").write_text(rows)
    (at / "servers.csv").write_text(SERVERS)
    places = {"folder": folder, "journal": at / "journal", "tables": at / "measured"}
    return {**places, "servers": at / "servers.csv"}


def run(places: dict[str, Path], command: str, line: str, terminal: bool) -> Result:
    words = f"{command} {line}".format(**places).split()
    env = {"FORCE_COLOR": "1"} if terminal else {}  # rich then takes any stream for a terminal
    return CliRunner().invoke(app, words, env=env, input="hello\n", catch_exceptions=False)


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_every_command_is_tried() -> None:
    assert sorted(LINES) == sorted(commands())


@pytest.mark.parametrize(("command", "line"), CASES)
def test_what_is_printed_fits_the_terminal(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch, command: str, line: str
) -> None:
    monkeypatch.setattr("intaglio.model.BUNDLED", places["folder"])
    for width in (80, 100) if command in QUICK else (80,):
        for stream in (out, console):
            monkeypatch.setattr(stream, "width", width)
        result = run(places, command, line, terminal=True)
        assert result.exit_code in ((2,) if command == "serve" else (0, 1)), result.output
        text = plain(result.stdout)
        assert "…" not in text  # rich's mark for what it has cut
        if command not in UNWRAPPED:
            assert [x for x in text.splitlines() if len(x) > width] == []
        assert command != "chips" or line or len(text.splitlines()) < 3 * len(CHIPS)  # six a chip with a narrow column


@pytest.mark.parametrize(
    ("command", "line"), [case for case in CASES if case[0] not in ("demo", "chat", "port", "serve")]
)
def test_json_has_no_progress_and_pipes_no_colour(places: dict[str, Path], command: str, line: str) -> None:
    result = run(places, command, f"{line} --json", terminal=True)
    assert plain(result.stderr) == ""
    json.loads(result.stdout)
    piped = run(places, command, line, terminal=False)
    assert "\x1b" not in piped.output


@pytest.mark.parametrize("command", sorted(LINES))
def test_help_is_not_cut(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 80)
    result = CliRunner().invoke(app, [*command.split(), "--help"])
    assert result.exit_code == 0 and "…" not in result.stdout
    assert [x for x in result.stdout.splitlines() if len(x) > 80] == []


def test_a_table_never_cuts_a_header_or_a_number(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(out, "width", 40)
    out.print(table(("site", "measured\nms", "bound\nms"), [("layers.*.mlp.experts.gate_up_proj [x]", "1,234.5", "9")]))
    text = capsys.readouterr().out
    assert all(part in text for part in ("measured", "bound", "1,234.5")) and "…" not in text
    assert "".join(line.split(" ")[0] for line in text.splitlines()[3:]).startswith("layers.*.mlp.experts.gate_up_proj")


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("hbm_bytes_per_s", 3.35e12, "3.35 TB/s"),
        ("sram_bytes", 232448, "232.448 kB"),
        ("launch_s", 3.61e-6, "3.61 us"),
        ("mac", 5.5e-13, "0.55 pJ"),
        ("cores", 132, "132"),
        ("macs", (("bf16", 2048), ("int8", 4096)), "bf16 2,048, int8 4,096"),
        ("switch_adds", True, "true"),
        ("extra", (), "none"),
        ("tiles", ((16, 64), (16, 128)), "16x64, 16x128"),
    ],
)
def test_a_value_has_its_unit(name: str, value: object, text: str) -> None:
    assert quantity(name, value) == text
