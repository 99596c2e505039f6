"""Layouts with `sums`: tp1sums2 has the bits of tp2, because it adds row-parallel products in the parts of tp2.

Also how layouts name what decides bits (`numerics`), and layouts that are refused.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.tiny import FAMILIES, tiny

from intaglio.batch import Chunk, bind
from intaglio.compiler import Layout, LayoutError, build_mesh
from intaglio.devices import MeshDevice, StateSpec, StepRequest, open_device
from intaglio.models import Checkpoint, port

WIDE = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 128, "head_dim": 16}
TOKENS = np.random.default_rng(3).integers(0, 263, 17).tolist()
PAGE = 16
FORMATS = [("auto", "host"), ("int8", "host")]
MORE_FORMATS = [("bf16", "host"), ("int4", "host"), ("int8", "reference")]  # of two families, which is enough


def logits(checkpoint: Checkpoint, layout: str, weights: str, device: str) -> np.ndarray:
    """Logits of every token of TOKENS as uint32, so that -0 and 0 differ."""
    mesh = build_mesh(port(checkpoint), layout, weights)
    ex, found = MeshDevice(open_device(device)).load(mesh, checkpoint, StateSpec(4, PAGE)), []
    for start, end in ((0, 13), (13, 16), (16, 17)):
        chunk = Chunk(TOKENS[start:end], start, [3, 1], range(end - start))
        got = ex.step(StepRequest(bind([chunk], PAGE), logits=True)).logits
        assert got is not None
        found.append(got)
    return np.concatenate(found).view(np.uint32)


@pytest.mark.parametrize("family", FAMILIES)
def test_sums_in_parts_have_the_bits_of_a_larger_tp(tmp_path: Path, family: str) -> None:
    """With int8 a cut of 128 columns divides groups, so that each part of the embedding has scales of its own."""
    c = Checkpoint.open(tiny(family, tmp_path / family, **WIDE))
    for weights, device in [*FORMATS, *(MORE_FORMATS if family in ("llama", "qwen2") else ())]:
        for larger, layouts in (("tp2", ["tp1sums2"]), ("tp4", ["tp1sums4", "tp2sums4", "tp2pp2sums4"])):
            wanted = logits(c, larger, weights, device)
            for layout in layouts:
                got = logits(c, layout, weights, device)
                np.testing.assert_array_equal(got, wanted, f"{layout} {weights} {device}")


def test_without_sums_the_bits_are_others(tmp_path: Path) -> None:
    c = Checkpoint.open(tiny("llama", tmp_path / "llama", **WIDE))
    assert not np.array_equal(logits(c, "tp1", "auto", "host"), logits(c, "tp2", "auto", "host"))


def test_numerics_name_what_decides_bits() -> None:
    named = {
        "tp1": "", "pp2": "", "tp2": "tp2", "tp2pp2": "tp2", "tp2sp": "tp2", "tp1sums2": "tp2", "tp2pp2sums4": "tp4",
        "ep2": "ep2", "tp2ep2": "tp2ep2", "ep2r2": "ep2r2",
    }  # fmt: skip
    assert {text: Layout.parse(text).numerics for text in named} == named
    for text in ("tp1sums4", "tp2pp2sums4", "tp2"):
        assert str(Layout.parse(text)) == text


def test_layouts_that_cannot_be_are_refused(tmp_path: Path) -> None:
    for text in ("tp2sums3", "tp4sums2", "tp1ep2sums2", "tp2sums4sp"):
        with pytest.raises(LayoutError, match="it goes with a tp that divides"):
            Layout.parse(text)
    mixture = port(Checkpoint.open(tiny("mixtral", tmp_path / "mixtral")))
    with pytest.raises(LayoutError, match=r"layers.0.mlp.experts: its sums cannot .* use tp2 itself"):
        build_mesh(mixture, "tp1sums2")
    few = port(Checkpoint.open(tiny("llama", tmp_path / "llama", **WIDE)))
    with pytest.raises(LayoutError, match="tp=16 does not divide"):
        build_mesh(few, "tp2sums16")
