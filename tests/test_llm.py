"""The Python API (LLM) on the reference device: results, errors, and independence of results from the batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.tiny import VOCABULARY, tiny

import intaglio
from intaglio import LLM, SamplingParams
from intaglio.devices import CompletedStep, DeviceError, PendingStep, StepRequest
from intaglio.devices.oracle import expected
from intaglio.models import CheckpointError, TokenizerError, Transcript
from intaglio.runtime import ParamsError, Refused, RequestError, check_invariants


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama", tmp_path_factory.mktemp("llm") / "tiny", num_hidden_layers=2)


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, device="reference")


@pytest.fixture(autouse=True)
def nothing_left_behind(llm: LLM) -> object:
    yield
    check_invariants(llm.engine)
    assert not llm.engine.requests and llm.engine.pool.held == 0


def test_generate_takes_one_or_several_prompts_as_text_or_ids(llm: LLM) -> None:
    ids = llm.model.tokenizer.encode("def f") if llm.model.tokenizer else []
    params = SamplingParams(max_tokens=6)
    [text] = llm.generate("def f", params)
    assert [text] == llm.generate(ids, params) == llm.generate(["def f"], params) == llm.generate([ids], [params])
    assert text.prompt_token_ids == ids and len(text.token_ids) == len(text.logprobs) == 6
    assert text.finish_reason == "length" and text.error is None
    assert llm.generate([]) == [] and llm.logits([]) == []


def test_greedy_is_the_argmax_of_logits_and_logprobs_are_theirs(llm: LLM) -> None:
    ids = [5, 77, 200, 31]
    [o] = llm.generate([ids], SamplingParams(max_tokens=8, ignore_eos=True))
    [logits] = llm.logits([ids + o.token_ids])
    assert logits.dtype == np.float32 and logits.shape == (12, VOCABULARY)
    rows = logits[3:-1].astype(np.float64)
    assert rows.argmax(axis=1).tolist() == o.token_ids
    logprobs = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
    assert np.allclose(logprobs[np.arange(8), o.token_ids], o.logprobs, atol=1e-4)


def test_on_silicon_times_are_the_chips(folder: Path) -> None:
    """A step takes what it takes there, however long it takes here: the same run ends at the same moment."""

    def run() -> tuple[list[int], float]:
        on_chip = LLM(folder, device="silicon")
        [o] = on_chip.generate([[5, 77, 200]], SamplingParams(max_tokens=6, ignore_eos=True))
        assert on_chip.clock is on_chip.device.clock  # type: ignore[attr-defined]
        return o.token_ids, on_chip.clock()

    tokens, ended = run()
    assert len(tokens) == 6 and 0 < ended < 0.01  # two layers of 64 columns take a chip some 10 us a step
    assert run() == (tokens, ended)


def test_silicon_is_no_worker(folder: Path) -> None:
    with pytest.raises(DeviceError, match="device 'silicon' has a modelled clock and cannot be a worker"):
        LLM(folder, device="silicon", worker=True)


def test_choices_stand_side_by_side_and_are_those_of_the_next_seeds(llm: LLM) -> None:
    params = SamplingParams(max_tokens=8, temperature=1.2, seed=40, n=3, stop=["zz"])
    several = llm.generate(["abc", "de"], params)
    assert [o.prompt_token_ids for o in several[::3]] == [llm.model.tokenizer.encode(t) for t in ("abc", "de")]  # type: ignore[union-attr]
    for prompt, three in (("abc", several[:3]), ("de", several[3:])):
        each = [SamplingParams(max_tokens=8, temperature=1.2, seed=40 + i, stop=["zz"]) for i in range(3)]
        assert three == llm.generate([prompt] * 3, each)
    with pytest.raises(RequestError, match="n is 3; a stream has one choice"):
        llm.stream("abc", params)


def test_more_prompts_than_may_wait_are_fed_as_there_is_room(folder: Path, llm: LLM) -> None:
    narrow = LLM(folder, device="reference", max_waiting=2, max_sequences=1)
    params = SamplingParams(max_tokens=2)
    assert narrow.generate(["ab"] * 7, params) == llm.generate(["ab"] * 7, params)
    narrow.engine.drain()
    with pytest.raises(Refused, match="draining"):
        narrow.generate("ab")


def test_company_and_chunks_change_nothing(folder: Path, llm: LLM) -> None:
    prompts = ["import os", "x" * 40, [7], "class A:\n"]
    params = [SamplingParams(max_tokens=10, temperature=0.9, top_p=0.9, seed=i) for i in range(4)]
    together = llm.generate(prompts, params)
    assert together == [llm.generate(p, s)[0] for p, s in zip(prompts, params, strict=True)]
    tight = LLM(folder, device="reference", kv_tokens=64, max_batch_tokens=7)
    assert [o.token_ids for o in tight.generate(prompts, params)] == [o.token_ids for o in together]
    sequences = [list(range(50)), [1], list(range(90, 60, -1))]
    for a, b in zip(llm.logits(sequences), tight.logits(sequences), strict=True):
        assert np.allclose(a, b, atol=1e-4)


def test_on_the_host_not_even_a_bit_changes(folder: Path) -> None:
    roomy, tight = LLM(folder), LLM(folder, threads=1, kv_tokens=96, max_batch_tokens=7)
    prompts = ["import os", "x" * 40, [7], "class A:\n"]
    params = [SamplingParams(max_tokens=30, temperature=0.9, min_p=0.01, seed=i, ignore_eos=True) for i in range(4)]
    assert roomy.generate(prompts, params) == tight.generate(prompts, params)
    sequences = [list(range(50)), [1], list(range(90, 60, -1))]
    for a, b in zip(roomy.logits(sequences), tight.logits(sequences), strict=True):
        assert (a == b).all()


def test_text_ends_before_a_stop_string_and_the_stream_never_takes_back(llm: LLM) -> None:
    free = llm.generate("abc", SamplingParams(max_tokens=40, temperature=1.0, seed=3, ignore_eos=True))[0]
    stop = free.text[10:13]
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=3, ignore_eos=True, stop=["never there", stop])
    [o] = llm.generate("abc", params)
    assert o.finish_reason == "stop" and o.text == free.text[: free.text.index(stop)]
    assert o.token_ids == free.token_ids[: len(o.token_ids)]
    deltas = list(llm.stream("abc", params))
    assert "".join(d.text for d in deltas) == o.text
    assert [t for d in deltas for t in d.token_ids] == o.token_ids
    assert [d.finish_reason for d in deltas if d.finish_reason] == ["stop"]
    assert deltas[-1].finish_reason == "stop"


class Letters:
    """A decoder whose tokens are pieces of text."""

    def push(self, token: str) -> str:
        return token

    def end(self) -> str:
        return "é"


@pytest.mark.parametrize(
    ("pieces", "text", "handed"),
    [
        (["a", "b", "<", "e", "nd", ">", "c"], "ab", ["a", "b", "", "", "", ""]),
        (["a<", "b", "<e", "x"], "a<b<exé", ["a", "<b", "", "<ex", "é"]),
        (["x<end>y\n\nz"], "x", ["x"]),
        (["x\n", "\n<end>"], "x", ["x", ""]),
    ],
)
def test_a_transcript_holds_back_what_may_begin_a_stop_string(pieces: list[str], text: str, handed: list[str]) -> None:
    t = Transcript(None, [], ("<end>", "\n\n"))
    t.decoder = Letters()  # type: ignore[assignment]
    got = []
    for piece in pieces:
        stopped = t.push(piece)  # type: ignore[arg-type]
        got.append(t.settled(stopped))
        if stopped:
            break
    if not stopped:
        t.finish()
        got.append(t.settled(True))
    assert (t.text, got) == (text, handed)


def test_an_abandoned_stream_leaves_nothing_and_others_may_run_meanwhile(llm: LLM) -> None:
    params = SamplingParams(max_tokens=12)
    [alone] = llm.generate("hello", params)
    stream = llm.stream("hello", params)
    first = next(stream)
    llm.generate("other", params)  # also steps the stream's request
    rest = list(stream)
    assert first.text + "".join(d.text for d in rest) == alone.text
    abandoned = llm.stream("hello", params)
    next(abandoned)
    abandoned.close()  # type: ignore[attr-defined]


def test_seeds(llm: LLM) -> None:
    def draw(seed: int | None) -> list[int]:
        return llm.generate("a", SamplingParams(max_tokens=12, temperature=1.0, seed=seed))[0].token_ids

    assert draw(1) == draw(1) != draw(2)
    assert draw(None) != draw(None)


def test_chat_goes_through_the_template(llm: LLM, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    assert llm.model.tokenizer and llm.chat_prompt(messages) == llm.model.tokenizer.encode(
        llm.model.tokenizer.chat(messages), special=False
    )
    params = SamplingParams(max_tokens=5)
    assert llm.chat(messages, params) == llm.generate([llm.chat_prompt(messages)], params)[0]


def test_errors_name_the_prompt_before_anything_runs(llm: LLM) -> None:
    steps = llm.engine.counts.steps
    for prompts, message in (
        (["a", ""], "prompt 1 is empty"),
        ([[1], []], "prompt 1: the prompt is empty"),
        ([[1], [2], [263]], r"prompt 2: token id 263 is outside 0\.\.262"),
        ([[1], [-1]], "prompt 1: token id -1"),
        ([[1], [0.5]], "prompt 1: token ids are whole numbers, 0.5 is not"),
        ([[1], [1] * 257], "prompt 1: the prompt has 257 tokens, the context holds 256; shorten it by 1"),
    ):
        with pytest.raises(RequestError, match=message):
            llm.generate(prompts)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="2 SamplingParams for 1 prompts"):
        llm.generate("a", [SamplingParams()] * 2)
    with pytest.raises(ParamsError, match="top_p is 2"):
        llm.generate("a", SamplingParams(top_p=2))
    for sequences, message in (([[1], [999]], "sequence 1: token id 999"), ([[]], "sequence 0: the prompt is empty")):
        with pytest.raises(RequestError, match=message):
            llm.logits(sequences)
    with pytest.raises(RequestError, match="prompt 0: the prompt has 257"):
        llm.stream([1] * 257)
    assert llm.engine.counts.steps == steps


def test_errors_of_loading(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        LLM(tmp_path / "nowhere", device="reference")
    for options, error, message in (
        ({"device": "abacus"}, DeviceError, "no device called 'abacus'"),
        ({"weights": "int3"}, ValueError, "int3"),
        ({"context": 257}, ValueError, "257"),
        ({"threads": 2}, DeviceError, "takes no number of threads"),
        ({"kv_tokens": 0}, RequestError, "kv_tokens is 0"),
        ({"max_batch_tokens": 0}, RequestError, "max_batch_tokens is 0"),
    ):
        with pytest.raises(error, match=message):
            LLM(folder, **{"device": "reference", **options})  # type: ignore[arg-type]


def test_without_a_tokenizer_ids_go_in_and_out(folder: Path, tmp_path: Path) -> None:
    bare = tiny("llama", tmp_path / "bare", num_hidden_layers=2)
    for file in bare.glob("*token*"):
        file.unlink()
    llm = LLM(bare, device="reference")
    [o] = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=3, ignore_eos=True))
    assert o.text == "" and len(o.token_ids) == 3 and llm.model.eos_ids == {258}
    for call in (lambda: llm.generate("text"), lambda: llm.generate([[1]], SamplingParams(stop="x"))):
        with pytest.raises(TokenizerError, match="has no tokenizer"):
            call()


def test_any_device_serves_and_weights_are_chosen(folder: Path) -> None:
    oracle = LLM(folder, device="oracle", weights="int8", context=64)
    assert "int8" in str(oracle.model.program) and oracle.model.program.context == 64
    [o] = oracle.generate([[9, 8, 7]], SamplingParams(max_tokens=4, ignore_eos=True))
    assert o.token_ids[0] == expected([9, 8, 7], VOCABULARY)


def test_a_failing_device_is_reported(folder: Path) -> None:
    llm = LLM(folder, device="reference")

    def fail(request: StepRequest) -> PendingStep:
        return CompletedStep(DeviceError("it burns"))

    llm.engine.executable.launch = fail  # type: ignore[method-assign]
    [o] = llm.generate([[1]])
    assert o.finish_reason == "error" and o.error and "it burns" in o.error
    with pytest.raises(DeviceError, match="it burns"):
        llm.logits([[1]])


def test_the_api_works_from_a_script_elsewhere(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, time, intaglio\n"
        "assert 'numpy' not in sys.modules, 'import intaglio is not lazy'\n"
        "llm = intaglio.LLM(sys.argv[1], device='reference', weights='auto', threads=None)\n"
        "out = llm.generate(['def '], intaglio.SamplingParams(max_tokens=3))[0]\n"
        "print(len(out.token_ids), out.finish_reason, llm.logits([[1, 2]])[0].shape, intaglio.__version__)\n"
    )
    source = str(Path(intaglio.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(
        [sys.executable, str(script), str(folder)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["3", "length", "(2,", "263)", intaglio.__version__]
    with pytest.raises(AttributeError, match="no attribute 'LMM'"):
        _ = intaglio.LMM  # type: ignore[attr-defined]
