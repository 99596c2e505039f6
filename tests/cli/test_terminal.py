"""The command line on a terminal: the progress bar, Ctrl-C, and a reader of stdout that goes away."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from support.terminal import on_terminal
from support.tiny import tiny

from intaglio.cli.progress import report_lines

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"  # the cursor
FOR_EVER = "1000000"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny("llama", tmp_path_factory.mktemp("terminal") / "tiny", num_hidden_layers=2))


def test_a_bar_says_what_is_being_done(folder: str) -> None:
    words = ("bench", folder, "--prompt-tokens", "8", "--sequences", "1", "--runs", "2", "--device", "reference")
    seen = on_terminal(words)
    assert seen.status == 0
    for what in (f"loading {folder}"[:20], "loading the weights", "100%"):
        assert what in seen.screen
    assert "\x1b" not in seen.piped and "prefill" in seen.piped
    assert seen.screen.count(HIDE) == seen.screen.count(SHOW) > 0
    assert seen.screen.endswith(f"{SHOW}\r\x1b[1A\x1b[2K")  # erased


def test_no_bar_in_json_or_without_a_terminal(folder: str) -> None:
    words = ("bench", folder, "--prompt-tokens", "8", "--sequences", "1", "--runs", "1", "--device", "reference")
    seen = on_terminal((*words, "--json"))
    assert seen.screen == "" and len(json.loads(seen.piped)["rows"]) == 2
    done = subprocess.run([sys.executable, "-m", "intaglio", *words], capture_output=True, text=True, check=True)
    assert "\x1b" not in done.stderr + done.stdout


def test_a_file_gets_a_line_from_time_to_time() -> None:
    seconds, written = [0.0], list[str]()
    report = report_lines(written.append, lambda: seconds[0])
    for done in range(8):
        report(done, 8, f"row {done}")
        seconds[0] += 12
    report(0, 0, "writing")
    assert written == ["row 3: 38%, 36 s", "row 6: 75%, 72 s"]
    seconds[0] = 150
    report(0, 0, "writing")
    assert written[2:] == ["writing: 2 min"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("bench", "{folder}", "--device", "reference", "--runs", FOR_EVER), "loading"),
        (("bench", "{folder}", "--device", "reference", "--runs", FOR_EVER), "prefill of 1 x"),
        (("profile", "{folder}", "--device", "reference", "--runs", FOR_EVER), "prefill of 1 x"),
        (("simulate", "llama-3-70b", "--layout", ",".join(["tp8"] * 99)), "timing array rate"),
        (("generate", "{folder}", "--prompt", "x", "--max-tokens", "200", "--device", "reference"), "loading"),
        (("bench", "serve", "{folder}", "--rate", "0.001"), "starting the server"),
        (("bench", "serve", "{folder}", "--rate", "0.001"), "requests ended"),
        (("serve", "{folder}", "--port", "0"), "loading"),
    ],
)
def test_ctrl_c_leaves_the_terminal_as_it_was(folder: str, words: tuple[str, ...], text: str) -> None:
    seen = on_terminal([w.format(folder=folder) for w in words], interrupt=text)
    assert seen.status == 130
    assert "Traceback" not in seen.screen + seen.piped and seen.screen.endswith("\rinterrupted\r\n")
    assert seen.screen.count(HIDE) == seen.screen.count(SHOW)


def test_ctrl_c_drains_a_server(folder: str) -> None:
    seen = on_terminal(("serve", folder, "--port", "0"), interrupt="serving ")
    assert seen.status == 0
    assert "Traceback" not in seen.screen and "draining" in seen.screen


@pytest.mark.parametrize("words", ["chips", "models --json", "disasm --full {folder}", "isa --page"])
def test_a_reader_that_goes_away_is_no_error(folder: str, words: str) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "intaglio", *words.format(folder=folder).split()]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.stderr == "" and done.returncode == 141
