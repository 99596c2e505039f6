"""Memory account of a load: K/V of layers with a sliding window, against hand-made figures and the engine's pools."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.tiny import VOCABULARY, tiny

from intaglio import LLM, SamplingParams
from intaglio.chips import ChipError, target
from intaglio.codesign.memory import KvLimit, KvRoom, memory_use, page_bytes
from intaglio.codesign.placement import Placement
from intaglio.codesign.queue import Queue, QueueSettings
from intaglio.codesign.serving import EngineSettings, Limits, simulate_serving, state_of
from intaglio.codesign.simulate import Serving, Simulation, ported, stages
from intaglio.codesign.steps import Formats, Server
from intaglio.measure.workload import LoadRequest
from intaglio.program import Program
from intaglio.runtime import Request
from intaglio.runtime.windows import longest_window, reservations
from intaglio.silicon.sizes import BLOCK, sizes_of

GEMMA = {  # Gemma 3 27B with 12 of its layers
    "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "hidden_size": 5376, "num_hidden_layers": 12,
    "intermediate_size": 21504, "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128,
    "query_pre_attn_scalar": 168, "vocab_size": 262144, "max_position_embeddings": 131072, "sliding_window": 1024,
    "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 2, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "rope_local_base_freq": 1e4, "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True,
    "attention_bias": False,
}  # fmt: skip


def compiled(model: str, layout: str = "tp1") -> tuple[Program, ...]:
    return stages(ported(model, None), layout, "auto", "auto", "auto")


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("gemma") / "config.json"
    path.write_text(json.dumps(GEMMA), encoding="utf-8")
    return str(path)


def test_gpt_oss() -> None:
    """gpt-oss 20B: 12 layers see 128 tokens, 12 see all; each keeps 2,048 bytes a token (8 heads of 64, bf16)."""
    load = Serving(4096, 256)  # a prompt of 128 blocks; 255 sequences of 4,224 tokens, which are 132 blocks
    use = Simulation.of(compiled("gpt-oss-20b"), target("h200_sxm"), "tp1").memory(load)
    # A query at position 4,223 sees 4,096 .. 4,223: exactly 4 blocks. The prompt's step holds all its blocks.
    block = 12 * 2048 * 32
    assert use.kv == block * (128 + 255 * 132) + block * (128 + 255 * 4)
    [program] = compiled("gpt-oss-20b")
    assert page_bytes(program) == (block, block)
    whole = memory_use(program, load.mixed(), 1, use.hbm)
    assert whole.kv == 2 * block * (128 + 255 * 132) and whole.weights == use.weights


def test_gemma_on_a_pipeline(gemma: str) -> None:
    """12 Gemma 3 layers on stages of 7 and 5: 6 and 4 with a window of 1,024, one without; 8,192 bytes a token each."""
    load, programs, block = Serving(3000, 201, batch=2), compiled(gemma, "pp2"), 8192 * 32
    assert [page_bytes(p) for p in programs] == [(block, 6 * block), (block, 4 * block)]
    use = Simulation.of(programs, target("h200_sxm"), "pp2").memory(load)
    # Prompts of 94 blocks. 400 sequences of 3,100 tokens are 97 blocks; the last query sees 2,076 .. 3,099: from
    # block 64 on, 33 blocks. Two steps are in flight on the pipeline.
    assert use.kv == 2 * block * ((2 * 94 + 400 * 97) + 6 * (2 * 94 + 400 * 33))


def test_deepseek_v4(tmp_path: Path) -> None:
    """Pooled entries are kept for the whole context, keys and the rows of open runs for a window of 13 tokens."""
    pytest.importorskip("transformers")
    [program] = compiled(str(tiny("deepseek_v4", tmp_path / "v4")))
    load = Serving(100, 21)  # 20 sequences of 110 tokens: 4 blocks, of which the last query (position 109) sees 98 ..
    kv = Simulation.of([program], target("h200_sxm"), "tp1").memory(load).kv
    # 5 layers keep keys [24]; 2 pool runs of 4 (values and gates of 2 heads of 24, entries [24], and the indexer's:
    # values and gates of 2 x 12, entries [12]); 2 pool runs of 11 (values and gates [24], entries [24]); all float32.
    seen = 5 * 24 + 2 * (4 * 24 + 4 * 12) + 2 * 2 * 24
    entries = 2 * 32 // 4 * (24 + 12) + 2 * 3 * 24  # in a block: 8 runs of 4, 3 runs of 11
    assert page_bytes(program) == (4 * entries, 4 * 32 * seen)
    assert longest_window([program]) == 13
    assert kv == 4 * entries * (4 + 20 * 4) + 4 * 32 * seen * (4 + 20 * 1)


@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_the_account_is_what_the_engine_holds(tmp_path: Path, family: str, py_rng: random.Random) -> None:
    """At every step of a real engine, K/V bytes of the account are those of the blocks that its pools have given out.

    Every running sequence is in every step: prompts that share nothing, computed whole, and then decoded.
    """
    pytest.importorskip("transformers")
    rng = py_rng
    types = {"layer_types": ["sliding_attention", "full_attention"]} if family == "gemma3" else {}
    window = rng.randrange(10, 90)
    path = tiny(family, tmp_path / family, sliding_window=window, num_hidden_layers=2, **types)
    engine = LLM(
        path, threads=1, cache=None, window_tokens=128 * BLOCK, kv_tokens=256 * BLOCK, max_batch_tokens=2048
    ).engine
    program, inner, seen = engine.program, engine.executable, []
    assert engine.state.page_tokens == BLOCK and engine.windows.on
    launch = inner.launch

    def noted(step: Any) -> Any:
        full, windowed = page_bytes(program)
        held = full * engine.pool.held + windowed * engine.windows.pool.held
        account = memory_use(program, sizes_of(step.batch), 1, 0, longest_window([program]))
        seen.append((account.kv, held, engine.windows.pool.held < engine.pool.held))
        return launch(step)

    inner.launch = noted  # type: ignore[method-assign]
    for i in range(6):
        prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 200))]
        engine.add(Request(f"{i}", prompt, SamplingParams(max_tokens=rng.randrange(2, 40), ignore_eos=True)))
    while not engine.idle:
        engine.step()
    assert seen and all(account == held for account, held, _ in seen), (window, seen)
    assert any(gave_back for *_, gave_back in seen)


def test_more_requests_fit_a_simulated_engine(gemma: str) -> None:
    """The two kinds of blocks fill the memory, are enough for equally many requests, and the engine preempts none."""
    on, settings = target("h200_sxm"), EngineSettings(max_batch_tokens=512, max_sequences=1024)
    programs, prompt = compiled(gemma, "pp2"), 16000
    state = state_of(programs, on, settings, prompt)
    whole = state_of(programs, on, settings, 900)  # within the window: no layer could give anything back
    assert whole.window_pages == 0 < state.window_pages and state.pages > whole.pages
    full, windowed = (max(sizes) for sizes in zip(*map(page_bytes, programs), strict=True))
    held = state.pages * full + state.window_pages * windowed
    assert whole.pages * (full + windowed) - 2 * (full + windowed) < held <= (whole.pages + 1) * (full + windowed)
    most, shared = reservations(1024, BLOCK, context=131072, max_batch_tokens=512, depth=2)
    fit = state.pages // (prompt // BLOCK)
    assert abs(fit - min(1024, (state.window_pages - 1 - shared) / most)) <= 1
    load = [LoadRequest(0.0, prompt - 10, 10)] * 3
    done = simulate_serving(ported(gemma, None), programs, on, "pp2", load, settings, Limits())
    assert done.summary.answered == 3 and done.preemptions == 0
    assert done.kv_tokens >= fit * prompt > whole.pages * BLOCK


def test_room_counts_windows_and_disaggregated_servers_keep_all(gemma: str) -> None:
    on = target("h200_sxm")
    server = Server.of(ported(gemma, None), Placement.parse("tp1"), Formats())
    room, whole = (server.kv_room(on, 0.9, 512, 64, gives_back=back) for back in (True, False))
    length = 20000
    assert whole.window == 0 and room.window == (1024 // 32 + 3) * 32
    full, windowed = page_bytes(server.stages[0])
    assert whole.tokens() == whole.sequences(1) == whole.tokens(length)
    free = whole.limits[1].room
    assert room.sequences(length) == int(
        room.limits[1].room * BLOCK // (length * full + room.window * windowed)
    ) > 2 * whole.sequences(length)  # fmt: skip
    assert free - 16 * windowed - full - windowed <= room.limits[1].room <= free - 16 * windowed + full + windowed
    assert server.kv_bytes(length, room) == (length * full + room.window * windowed) / BLOCK
    assert server.kv_bytes(length, whole) == length * server.kv_bytes_per_token


@pytest.fixture(scope="module")
def simulations() -> list[Simulation]:
    layouts = (("llama-3-8b", "tp2pp2"), ("gpt-oss-20b", "pp2"), ("qwen3.5-397b-a17b", "tp8"))
    return [Simulation.of(compiled(card, layout), target("b300_sxm"), layout) for card, layout in layouts]


def test_what_a_refusal_names_fits_and_one_more_does_not(
    simulations: list[Simulation], py_rng: random.Random
) -> None:  # fmt: skip
    """The largest batch, or the longest prompt or response with a batch of 1, for random loads and sizes of HBM."""
    seen = set[str]()
    for _ in range(60):
        one = py_rng.choice(simulations)
        load = Serving(*(int(2 ** py_rng.uniform(0, most)) for most in (12, 11, 9)))
        weights = max(sum(w.nbytes({}) for w in p.of_role("weight")) for p in one.programs)
        hbm = int(weights * py_rng.choice((1.001, 1.01, 1.2, 2.0)))
        on = replace(one, target=one.target.changed({"chip.hbm_bytes": hbm}))
        use = on.memory(load)
        parts = use.weights, use.kv, use.activations
        assert min(parts) > 0 and sum(parts) == use.total and use.fits == (use.total <= hbm)
        if load.input + load.output > on.programs[0].context:
            continue
        if use.fits:
            on.check(load)
            continue
        with pytest.raises(ChipError) as refused:
            on.check(load)
        found = re.search(
            r"largest batch that fits is (\d+)|(prompts|responses) of up to ([\d,]+)|nor would", str(refused.value)
        )
        assert found, refused.value
        field = "batch" if found[1] else {"prompts": "input", "responses": "output"}.get(found[2], "")
        seen.add(field)
        alone = load if field == "batch" else replace(load, batch=1)
        if not field:
            assert not on.memory(replace(alone, input=1)).fits and not on.memory(replace(alone, output=1)).fits
            continue
        n = int((found[1] or found[3]).replace(",", ""))
        assert n < getattr(load, field) and on.memory(replace(alone, **{field: n})).fits
        assert not on.memory(replace(alone, **{field: n + 1})).fits
    assert "batch" in seen and len(seen) > 1


def test_logits_are_counted() -> None:
    [program] = compiled("llama-3-8b")
    few, many = (memory_use(program, Serving(8, n).decode(), 1, 0).activations for n in (2, 1026))
    assert many - few > 1024 * 128256 * 4


class OneSecond:
    """Steps of one second."""

    copies = 1

    def cost(self, decoding: int, context: float, chunks: Sequence[tuple[int, int, int]] = ()) -> tuple[float, float]:
        return 1.0, 1.0


def test_a_queue_keeps_every_limit_of_its_room(py_rng: random.Random) -> None:
    """Requests are admitted in order, as long as the sums of all admitted ones keep each limit; in the end none is."""
    rng = py_rng
    limits = tuple(
        KvLimit(rng.randrange(40_000, 100_000), rng.randrange(1, 9) * BLOCK, rng.randrange(9) * BLOCK) for _ in range(3)
    )
    room = KvRoom(limits, window=rng.randrange(1, 500))
    queue = Queue(OneSecond(), QueueSettings(room, max_sequences=10**6), prefills=False)
    for _ in range(400):
        queue.add(LoadRequest(0.0, rng.randrange(1, 2000), rng.randrange(2, 9)), 0.0)
    lengths = [one.length for one in queue.waiting]

    def fit(some: Sequence[int]) -> bool:
        kept = sum(min(room.window, n) for n in some)
        assert room.fits(sum(some), kept) == (room.used(sum(some), kept) <= 1)
        return all(sum(some) * x.full + kept * x.windowed <= x.room * BLOCK for x in limits)

    queue.admit()
    n = len(queue.running)
    assert 0 < n < 400 and fit(lengths[:n]) and not fit(lengths[: n + 1])
    while queue.open:
        queue.take_steps(float("inf"))
        queue.admit()
    assert queue.held == queue.kept == 0 and len(queue.done) == 400
    for length in (1, 7, 300, 4000):
        most = room.sequences(length)
        assert fit([length] * most) and not fit([length] * (most + 1))
    with pytest.raises(ValueError, match=r"a request of 90,000,000 \+ 2 tokens; the K/V cache holds"):
        queue.add(LoadRequest(0.0, 90_000_000, 2), 0.0)
