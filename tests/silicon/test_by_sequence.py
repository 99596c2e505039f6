"""Kernels with by_sequence=False: their modelled time depends on counts of the batch, not on each sequence's keys."""

from __future__ import annotations

from random import Random

import pytest

from intaglio.chips import target
from intaglio.codesign.simulate import cards, stages
from intaglio.models import port_config
from intaglio.models.files.header import read_json
from intaglio.silicon.plan import Plan
from intaglio.silicon.sizes import BatchSizes


@pytest.mark.parametrize(
    ("card", "layout"), [("gpt-oss-20b", "tp2"), ("glm-5", "tp2ep2"), ("qwen3.5-397b-a17b", "tp2")]
)
def test_times_without_the_keys(card: str, layout: str) -> None:
    rng = Random()
    config = read_json(cards()[card])
    short = {"layer_types": config["layer_types"][:4]} if "layer_types" in config else {}
    program = port_config({**config, **short, "num_hidden_layers": 4})
    plan = Plan(stages(program, layout, "fp8", "auto", "auto")[0], target(rng.choice(("sohu", "h100_sxm"))))
    sequences = []
    for _ in range(rng.randrange(1, 4)):
        q = rng.choice((1, rng.randrange(2, 300)))
        sequences.append((q, q + rng.randrange(3000), rng.randrange(1, 9)))
    tokens, rows = sum(q * n for q, _, n in sequences), sum(n for *_, n in sequences)
    sizes = BatchSizes(tokens, rows, tuple(sequences), rng.random() < 0.5)
    kinds = {type(k).__name__: k.by_sequence for k in plan.kernels}
    assert kinds["LinearKernel"] is False and True in kinds.values()  # some kernel reads keys
    for kernel in plan.kernels:
        if not kernel.by_sequence:
            assert kernel.time(plan.target, sizes, False) == kernel.time(plan.target, sizes.counts, False)
