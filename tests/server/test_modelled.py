"""A model served on a simulated chip: tokens equal the host's, times equal those of the timing model."""

from __future__ import annotations

import re
from typing import Any

import pytest
from support.served import Slow, served

from intaglio.batch import Chunk, bind
from intaglio.chips import ChipError
from intaglio.compiler import build_mesh
from intaglio.devices import DeviceError
from intaglio.llm import LLM
from intaglio.models import Checkpoint, port
from intaglio.runtime import SamplingParams
from intaglio.silicon.plan import Plan
from intaglio.silicon.sizes import sizes_of

EIGHT = {"device": "silicon", "chip": "sohu", "chips": 8}
GREEDY = {"model": "tiny", "temperature": 0, "extra_body": {"ignore_eos": True}}


def test_chips_share_the_time_and_not_the_tokens() -> None:
    prompt, params = "def read(self", SamplingParams(max_tokens=5, ignore_eos=True)
    want = LLM().generate(prompt, params)
    for layout in ("tp8", "tp4pp2"):
        llm = LLM(device="silicon", layout=layout)
        assert llm.generate(prompt, params) == want
        stages = build_mesh(port(Checkpoint.open(llm.model.path)), layout, wire="bf16").programs[:: int(layout[2])]
        n, seconds = len(want[0].prompt_token_ids), 0.0
        for start, tokens in [(0, n), *((n + i, 1) for i in range(4))]:
            batch = bind([Chunk([0] * tokens, start, [0], [tokens - 1])], llm.state.page_tokens)
            on = llm.device.inner.target  # type: ignore[attr-defined]
            seconds += sum(Plan(p, on).run(sizes_of(batch)).seconds for p in stages)
        assert llm.clock() == pytest.approx(seconds)


def test_what_cannot_be_modelled_is_refused() -> None:
    with pytest.raises(DeviceError, match="chips is 4 but layout tp2 has 2 ranks"):
        LLM(device="silicon", layout="tp2", chips=4)
    with pytest.raises(DeviceError, match="chip and chips are for device silicon, not 'host'"):
        LLM(chips=8)
    moving: list[dict[str, Any]] = [{"expert_placement": "p.json"}, {"rebalance_every": 60.0}, {"rebalance_every": 0}]
    for option in moving:
        with pytest.raises(DeviceError, match="device 'silicon' moves no experts; leave out expert_placement and reb"):
            LLM(device="silicon", layout="ep2r0", **option)
    with pytest.raises(ChipError, match="unknown chip 'abacus'"):
        LLM(device="silicon", chip="abacus")


def test_a_server_tells_the_chips_time_and_calls_it_modelled() -> None:
    """However slow the host: what it takes here has no part in it."""
    results = []
    for seconds in (0.0, 0.02):
        with served(None, llm=EIGHT) as s:
            s.llm.engine.executable = Slow(s.llm.engine.executable, seconds)
            answer = s.client().completions.create(prompt="def read(self", max_tokens=12, **GREEDY)
            usage = answer.usage.model_dump()
            chunks = list(
                s.client().completions.create(
                    prompt="class Queue:", max_tokens=12, stream=True, stream_options={"include_usage": True}, **GREEDY
                )
            )
            results.append((answer.choices[0].text, usage, chunks[-1].usage.model_dump()))
            metrics, state = s.get("/metrics").text, s.get("/state").json()
    assert results[0] == results[1]
    text, usage, streamed = results[0]
    [want] = LLM().generate("def read(self", SamplingParams(max_tokens=12, ignore_eos=True))
    assert text == want.text
    times, later = usage["modelled"], streamed["modelled"]
    first, each = times["time_to_first_token_seconds"], times["time_per_output_token_seconds"]
    assert times["by"] == later["by"] == state["modelled"] == "8 x sohu, tp8"
    assert times["seconds"] == pytest.approx(first + 11 * each)
    assert 0 < first < 0.01 and 0 < each < 0.01  # of launches and collectives of some us
    assert state["clock"] == pytest.approx(times["seconds"] + later["seconds"])  # nothing passes between requests
    labels = '{engine="0",model_name="tiny"}'
    assert f"intaglio:modelled_time_to_first_token_seconds_count{labels} 2.0" in metrics
    found = re.search(rf"^intaglio:modelled_clock_seconds{labels} (\S+)$", metrics, re.MULTILINE)
    assert found and float(found[1]) == pytest.approx(state["clock"])
    assert not re.search(r"^vllm:\w*_seconds", metrics, re.MULTILINE)  # those are names of measured times
    assert f"vllm:request_generation_tokens_count{labels} 2.0" in metrics


def test_deadlines_are_the_chips() -> None:
    with served(None, llm=EIGHT) as s:
        s.llm.engine.executable = Slow(s.llm.engine.executable, 0.01)

        def ask(timeout: float) -> str:
            body = {"prompt": "def ", "max_tokens": 30, "ignore_eos": True, "timeout": timeout}
            return s.post("/v1/completions", body).json()["choices"][0]["finish_reason"]

        assert ask(0.1) == "length"  # 0.3 s and more here, some milliseconds there
        assert ask(0.001) == "deadline"
