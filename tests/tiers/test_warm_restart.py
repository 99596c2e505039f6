"""A new engine on the directory of an earlier one: the same tokens and log-probabilities, without computing them."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intaglio import LLM, SamplingParams
from intaglio.devices import DeviceError
from intaglio.runtime import Request, RequestError

VARIANTS: dict[str, dict[str, Any]] = {
    "host": {},
    "int8 cache": {"kv_format": "int8"},
    "worker": {"worker": True},
    "tp2": {"layout": "tp2"},
    "pp2": {"layout": "pp2"},
    "tp2 in one process": {"layout": "tp2", "in_process": True},
}


def prompts(llm: LLM) -> list[list[int]]:
    """Three prompts with a common beginning of about 200 tokens."""
    rng = random.Random(3)
    head = [rng.randrange(3, llm.model.program.vocabulary) for _ in range(200)]
    return [[*head, *(rng.randrange(3, 200) for _ in range(n))] for n in (1, 40, 77)]


def outcomes(llm: LLM) -> tuple[list[tuple[list[int], list[float]]], int]:
    """Tokens and log-probabilities of the prompts, some greedy and some drawn, and their cached tokens in all."""
    engine, made = llm.engine, []
    engine.offload.timeout = 120.0  # seconds; a machine that is stopped for a while must not fail the test
    for i, prompt in enumerate(prompts(llm)):
        params = SamplingParams(max_tokens=12, temperature=0.8 * (i % 2), seed=i, ignore_eos=True)
        made += engine.add(Request(f"{i}", prompt, params, llm.model.eos_ids))
        while not engine.idle:
            engine.step()
    return [(s.output, s.logprobs) for s in made], sum(s.cached_tokens for s in made)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_warm_restart_gives_the_same_bits(tmp_path: Path, options: dict[str, Any]) -> None:
    plain = LLM(**options)
    without, in_pool = outcomes(plain)
    plain.close()
    cold = LLM(**options, kv_cache_dir=tmp_path)
    assert outcomes(cold) == (without, in_pool)
    cold.close()
    warm = LLM(**options, kv_cache_dir=tmp_path)
    found, cached = outcomes(warm)
    warm.close()
    assert found == without
    assert warm.tier and warm.tier.counts.hits >= 9  # 6 blocks of the common beginning, and some of each
    assert cached >= in_pool + 192 and warm.tier.counts.corrupt == 0


def test_blocks_are_shared_only_between_engines_that_compute_equal_bits(tmp_path: Path) -> None:
    """A worker computes the same bits as the host in this process, and so does one thread; tp2 does not."""
    for options, warm in (({}, False), ({"worker": True}, True), ({"layout": "tp2"}, False), ({"threads": 1}, True)):
        llm = LLM(**options, kv_cache_dir=tmp_path)  # type: ignore[arg-type]
        outcomes(llm)
        llm.close()
        assert llm.tier and (llm.tier.counts.hits > 0) == warm, options


@pytest.mark.parametrize("device", ["host", "reference"])
def test_contents_of_blocks_are_read_and_written(device: str) -> None:
    llm = LLM(device=device, kv_tokens=128)
    executable = llm.engine.executable
    llm.generate([[5, 6, 7] * 20], SamplingParams(max_tokens=2))
    contents = executable.read_blocks([0, 1])
    assert contents.shape == (2, executable.block_bytes) and contents.any()
    executable.write_blocks([3, 2], contents)
    assert np.array_equal(executable.read_blocks([2, 3]), contents[::-1])
    assert np.array_equal(executable.read_blocks([0, 1]), contents)
    for blocks, values, why in (
        ([4], contents[:1], r"block 4 is outside 0\.\.3"),
        ([0], contents, "contents of 1 blocks"),
        ([0], contents[:1, 1:], "they must be uint8"),
    ):
        with pytest.raises(DeviceError, match=why):
            executable.write_blocks(blocks, values)


def test_device_that_cannot_move_blocks_says_so_once_and_serves(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"not kept outside the engine: SiliconExecutable cannot read or write K/V"):
        llm = LLM(device="silicon", kv_cache_dir=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert llm.generate([[5, 6, 7] * 20], SamplingParams(max_tokens=2))[0].finish_reason == "length"
    assert not list(tmp_path.iterdir())


def test_options_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="kv_cache_bytes is 0; allowed: 1 or more"):
        LLM(kv_cache_dir=tmp_path, kv_cache_bytes=0)
    with pytest.raises(RequestError, match="leave out journal or kv_cache_dir"):
        LLM(kv_cache_dir=tmp_path, journal=tmp_path / "journal.jsonl")
