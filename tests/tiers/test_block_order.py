"""K/V blocks shared by engines with different layouts: taken if both compute the same bits, otherwise not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.tiny import tiny

from intaglio.compiler import build_mesh
from intaglio.llm import LLM
from intaglio.models import Checkpoint, port
from intaglio.runtime import SamplingParams
from intaglio.tiers import BlockOrder

PROMPT = [(7 * i) % 250 for i in range(150)]  # four full blocks, and a part of a fifth
SHAPE = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 128, "head_dim": 16}
PARAMS = SamplingParams(max_tokens=12, temperature=0.9, seed=5)


def run(path: Path, blocks: Path | None, layout: str, kv: str = "auto", device: str = "host") -> tuple[list, int, int]:
    """(tokens and log-probabilities, blocks loaded, blocks saved) of one engine with this directory of blocks."""
    where = {"kv_cache_dir": blocks} if blocks else {}
    llm = LLM(
        path, device, layout=layout, in_process=True, cache=None, kv_tokens=512, context=256, kv_format=kv, **where
    )
    try:
        output = llm.generate([PROMPT], PARAMS)[0]
    finally:
        llm.close()
    counts = llm.tier.counts if llm.tier else None
    return [output.token_ids, output.logprobs], counts.hits if counts else 0, counts.saved if counts else 0


@pytest.mark.parametrize("device", ["host", "reference"])
@pytest.mark.parametrize("kv", ["bf16", "int8"])
@pytest.mark.parametrize("pair", [
    "tp2 tp1sums2", "tp1sums2 tp2", "tp2pp2 tp2", "pp2 tp1", "tp4 tp2sums4", "tp2pp2sums4 tp4", "tp1sums4 tp4sp",
])  # fmt: skip
def test_blocks_of_one_layout_are_those_of_another(tmp_path: Path, pair: str, kv: str, device: str) -> None:
    """With tp4 there are more lanes than kv heads, so that two lanes hold each head."""
    saver, loader = pair.split()
    path = tiny("llama", tmp_path / "model", **SHAPE)
    alone, _, _ = run(path, None, loader, kv, device)
    first, hits, saved = run(path, tmp_path / "blocks", saver, kv, device)
    assert (first, hits) == (alone, 0) and saved >= 4
    again, hits, _ = run(path, tmp_path / "blocks", loader, kv, device)
    assert (again, hits) == (alone, 4)


def test_blocks_of_other_bits_are_not_taken(tmp_path: Path) -> None:
    path = tiny("llama", tmp_path / "model", **SHAPE)
    run(path, tmp_path / "blocks", "tp2")
    for layout in ("tp1", "tp4", "tp2sums4", "pp2"):
        alone, _, _ = run(path, None, layout)
        first, hits, _ = run(path, tmp_path / "blocks", layout)
        assert first == alone
        assert hits == {"tp2sums4": 4, "pp2": 4}.get(layout, 0), layout  # of tp4 and tp1, saved just before


def test_a_block_comes_back_from_the_order_of_the_whole_model(tmp_path: Path) -> None:
    ported = port(Checkpoint.open(tiny("llama", tmp_path / "model", **SHAPE)))
    [whole] = build_mesh(ported, "tp1").programs
    for layout, tp, heads in (("tp2", 2, 1), ("tp4", 4, 1), ("tp2pp2", 2, 1), ("pp2", 1, 2)):
        ranks = build_mesh(ported, layout).programs
        parts = [heads * 24 for rank in ranks for t in rank.of_role("state")]
        order = BlockOrder(whole, ranks, tp, parts)
        assert order.own_bytes == sum(parts) and order.block_bytes == 48 * len(whole.of_role("state"))
        block = np.random.default_rng(0).integers(0, 256, order.block_bytes).astype(np.uint8)
        np.testing.assert_array_equal(order.to_whole(order.to_own(block)), block)
        with pytest.raises(ValueError, match="K/V caches"):
            BlockOrder(whole, ranks, tp, parts[:-1])
    half = build_mesh(ported, "tp2").programs[:1]
    parts = [24 for _ in half[0].of_role("state")]
    with pytest.raises(ValueError, match="do not hold all heads"):
        BlockOrder(whole, half, 2, parts)
    with pytest.raises(ValueError, match="the whole model"):
        BlockOrder(whole, build_mesh(ported, "pp2").programs[:1], 1, [48] * 4)
