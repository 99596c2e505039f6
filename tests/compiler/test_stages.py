"""Pipeline stages: how many layers each has, by the time of the longest stage."""

from __future__ import annotations

import math
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
from support.tiny import tiny

from intaglio.compiler import build_mesh, build_stages
from intaglio.compiler.stages import WORTH, stage_of
from intaglio.models import Checkpoint, port, port_config
from intaglio.ops import Embed
from intaglio.ops.op import WEIGHT_MATRICES
from intaglio.program import Program


def split(p: Program, stages: int) -> list[int]:
    """The number of layers of each stage."""
    layers = {
        op.site.split(".")[1]: s for op, s in zip(p.ops, stage_of(p, stages), strict=True) if "layers." in op.site
    }
    return [list(layers.values()).count(s) for s in range(stages)]


def head_in_layers(p: Program) -> float:
    """Elements of the output head over those of the matrices of a layer."""
    inside = outside = 0
    for op in p.ops:
        size = sum(int(np.prod(p.tensors[w].shape, dtype=int)) for w in op.operands(*WEIGHT_MATRICES))
        inside += size if "layers." in op.site else 0
        outside += 0 if "layers." in op.site or isinstance(op, Embed) else size
    return outside * len({op.site.split(".")[1] for op in p.ops if "layers." in op.site}) / inside


def test_a_heavy_head_takes_the_place_of_layers_in_the_last_stage(tmp_path: Path, rng: np.random.Generator) -> None:
    """Against all splits of the layers into runs."""
    for i in range(8):
        layers, stages = int(rng.integers(2, 9)), int(rng.integers(2, 4))
        words = 263 if i == 0 else 1 << int(rng.integers(9, 14))
        p = port(Checkpoint.open(tiny("llama", tmp_path / str(i), num_hidden_layers=layers, vocab_size=words)))
        if layers < stages:
            continue
        head = head_in_layers(p) / 2

        def longest(runs: list[int], head: float = head) -> float:
            return max(*runs[:-1], runs[-1] + head)

        cuts = ((0, *c, layers) for c in combinations(range(1, layers), stages - 1))
        best = min(longest([b - a for a, b in pairwise(c)]) for c in cuts)
        equal = [[n * stages // layers for n in range(layers)].count(s) for s in range(stages)]
        found = split(p, stages)
        assert sum(found) == layers and min(found) > 0 and max(found[:-1]) - min(found[:-1]) <= 1
        if found == equal:
            assert best > (1 - WORTH) * longest(equal) * (1 - 1e-9), (layers, stages, head)
        else:
            assert best == longest(found) <= (1 - WORTH) * longest(equal) * (1 + 1e-9), (layers, stages, head)
        assert build_mesh(p, f"pp{stages}").stages == stages


def test_a_light_head_changes_nothing(tmp_path: Path) -> None:
    p = port(Checkpoint.open(tiny("llama", tmp_path, num_hidden_layers=5, vocab_size=263, intermediate_size=4096)))
    assert split(p, 2) == [3, 2]


def test_half_of_a_head_of_four_layers_counts(tmp_path: Path) -> None:
    """16 layers and a head like Llama-3.2-1B's: 9 and 7 layers; with four stages the last has 2."""
    p = port(Checkpoint.open(tiny("llama", tmp_path, num_hidden_layers=16, vocab_size=263)))
    words = round(263 * 4.3 / head_in_layers(p))
    p = port(Checkpoint.open(tiny("llama", tmp_path, num_hidden_layers=16, vocab_size=words)))
    assert split(p, 2) == [9, 7] and split(p, 4) == [5, 5, 4, 2]


def test_no_rank_has_larger_weights_than_the_first() -> None:
    """The first rank stands for all. It once had 1,664 of 13,824 columns: 8 chips were 8.09 times as fast as one."""
    config = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 256, "intermediate_size": 13824,
        "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 32,
        "max_position_embeddings": 512, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
    }  # fmt: skip
    (first, *_), ranks = build_stages(port_config(config), "tp8"), build_mesh(port_config(config), "tp8").programs
    sizes = [[math.prod(map(int, w.shape)) for w in rank.of_role("weight")] for rank in (first, *ranks)]
    assert all(own >= other for rank in sizes for own, other in zip(sizes[0], rank, strict=True))
    assert sizes[0] != sizes[-1]  # 108 blocks of 128 columns on 8 ranks
