"""Replay of journals: every simulated history, and a run on the host whose worker is killed; a full disk."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from simulation.options import ClientRequest, Options
from simulation.rules import Rules
from simulation.world import ORACLE, PROGRAM, World
from support.serving import oracle_engine, request, run_checked, smallest_program
from typer.testing import CliRunner

from intaglio import LLM, SamplingParams
from intaglio.cli import app
from intaglio.debugging.replay import replay_journal
from intaglio.devices import ArrayWeights, Executable, StateSpec
from intaglio.runtime import Grammar, JournalError, Request, RequestError, replay


def through_json(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in [json.dumps(e) for e in entries]]


def client_requests(world: World) -> Iterator[ClientRequest]:
    """The client's request behind each entry of a world's journal that adds or resumes one."""
    asked, admitted = iter(world.asked), dict[str, ClientRequest]()
    for entry in world.journal:
        if entry["do"] == "add":
            yield (wanted := next(asked))
            if entry["refused"] is None:
                admitted[wanted.id] = wanted
        elif entry["do"] == "resume":
            yield admitted[entry["resumption"]["request"]["id"]]


def test_simulated_histories_replay_from_their_journals() -> None:
    """Except histories with rows of NaN, which the oracle does not repeat, and with the simulation's own drafts."""
    whole = faults = 0
    for seed in range(150):
        world = World(seed, None, Rules)
        o = world.options
        if o.max_drafts or o.faults.nan or world.tier:
            continue
        world.run()
        clients = client_requests(world)

        def load(o: Options = o, windows: tuple[int, int] = world.windows) -> Executable:
            return ORACLE.load(PROGRAM, ArrayWeights({}), StateSpec(o.pages, o.page_tokens, o.slots, *windows))

        def revive(r: Request, clients: Iterator[ClientRequest] = clients) -> Request:
            whole = World.request(next(clients))
            return replace(r, stop_checker=whole.stop_checker, matcher=whole.matcher)

        done = replay(through_json(world.journal), load, revive)
        assert done.divergence is None, f"seed {seed}: {done.divergence}"
        assert done.tokens == world.engine.counts.output_tokens
        whole, faults = whole + 1, faults + done.faults
    assert whole > 30 and faults > 30


def test_differences_are_named() -> None:
    def record() -> list[dict[str, Any]]:
        journal: list[dict[str, Any]] = []
        engine = oracle_engine(journal=journal.append)
        engine.add(request("a", [1, 2, 3], max_tokens=4, seed=5, logit_bias={3: 1.0}))
        engine.step()
        engine.abort("a")
        engine.drain()
        run_checked(engine)
        return through_json(journal)

    def load() -> Executable:
        return ORACLE.load(smallest_program(), ArrayWeights({}), StateSpec(16, 4))

    assert replay(record(), load).divergence is None
    for change, message in (
        (
            lambda e: e[2]["events"][0].__setitem__(2, 96),
            r"entry 2, step 1 \(step\): recorded: request a, choice 0, token 96, ",
        ),
        (lambda e: e[1].update(refused="Refused"), r"entry 1, .*: a was refused with Refused, now admitted"),
        (lambda e: e[2]["clock"].append(9.0), "the journal has 1 clock readings more"),
        (lambda e: e[2].update(launches=["it burns"]), "the journal has .*|request a"),
        (lambda e: e[3].update(events=[]), "0 events recorded, 1 replayed"),
    ):
        entries = record()
        change(entries)  # type: ignore[no-untyped-call]
        wrong = replay(entries, load).divergence
        with pytest.raises(AssertionError, match=message):
            assert wrong is None, wrong
    with pytest.raises(JournalError, match="begins with 'add'"):
        replay(record()[1:], load)
    with pytest.raises(JournalError, match="recorded with pages 16, this engine has 4"):
        replay(record(), lambda: ORACLE.load(smallest_program(), ArrayWeights({}), StateSpec(4, 4)))


def record_an_incident(file: Path) -> tuple[LLM, list[str]]:
    """The host with a worker that is killed twice, with stop strings, a grammar, an abort and a refusal."""
    llm = LLM(worker=True, journal=file, max_drafts=3, max_batch_tokens=24)
    params = [
        SamplingParams(max_tokens=30, temperature=0.9, seed=None, stop=["\n"]),
        SamplingParams(max_tokens=30, grammar=Grammar("regex", r"[a-z]{4,9} = \d+;"), n=2, temperature=1.0),
        SamplingParams(max_tokens=150, ignore_eos=True, logit_bias={5: 1.5}, repetition_penalty=1.1),
    ]
    made = [s for i, p in enumerate(params) for s in llm.engine.add(llm.prepare("import os\n", p, id=f"r{i}")[0])]
    with pytest.raises(RequestError):
        llm.engine.add(llm.prepare("x", params[2], id="r2")[0])
    with pytest.raises(RequestError):
        llm.engine.add(replace(llm.prepare("x", params[0], id="r3")[0], prompt=[99999]))
    for step in range(1000):
        if step in (4, 11):
            os.kill(llm.engine.executable.inner.pids[0], signal.SIGKILL)  # type: ignore[attr-defined]
        if step == 20:
            llm.engine.abort("r2")
        llm.engine.step()
        if llm.engine.idle:
            break
    llm.engine.executable.inner.close()  # type: ignore[attr-defined]
    return llm, [str(s.finish_reason) for s in made]


def test_incident_on_the_host_replays_exactly(tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"
    llm, reasons = record_an_incident(file)
    assert reasons[-1] == "abort" and llm.engine.counts.restarts == 2
    run = CliRunner().invoke(app, ["replay", str(file)])
    assert run.exit_code == 0, run.output
    assert "5 requests" in run.output and "2 failed launches" in run.output and "came out the same" in run.output
    with file.open("a") as f:
        f.write('{"do": "st')  # as a killed process leaves it
    assert replay_journal(file).divergence is None
    facts = json.loads(CliRunner().invoke(app, ["replay", str(file), "--json"]).output)
    assert facts["divergence"] is None and (facts["requests"], facts["faults"]) == (5, 2)
    other = CliRunner().invoke(app, ["replay", str(file), "--device", "oracle"])
    assert other.exit_code == 1 and "not the same: entry " in other.output


def test_other_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"
    for text, message in (
        ("", "begins with 'nothing'"), ("{}\n", ":1 is no entry"), ("what\n{}\n", ":1 is not JSON"),
        ('{"do": "step"}\n', "begins with 'step'"),
    ):  # fmt: skip
        file.write_text(text)
        run = CliRunner().invoke(app, ["replay", str(file)])
        assert run.exit_code == 2 and message in run.output


def test_full_disk_ends_the_journal_not_the_service() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with pytest.warns(UserWarning, match="the journal /dev/full ends here"):
        llm = LLM(device="oracle", journal="/dev/full")
    assert len(llm.generate([[1, 2]], SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids) == 3
