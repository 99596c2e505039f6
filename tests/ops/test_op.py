"""The base class of ops: registration, required methods, operands and results, work."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from support.op_cases import tensors

from intaglio.batch import Batch
from intaglio.ops import (
    REGISTRY,
    Linear,
    Map,
    Op,
)  # fmt: skip
from intaglio.ops.op import FACES, Results, Tensors, Work, operand, result


@pytest.mark.parametrize("kind", REGISTRY)
def test_every_op_is_tested_here(kind: str) -> None:
    files = Path(__file__).parent.glob("test_*.py")
    written = re.findall(r"^def (test_\w+)", "\n".join(f.read_text() for f in files), re.MULTILINE)
    for what in ("", "_refuses", "_work"):
        found = [name for name in written if name.startswith(f"test_{kind}{what}")]
        assert found, f"write test_{kind}{what}...: op {kind} has no test of its {what.strip('_') or 'meaning'}"


@pytest.mark.parametrize("face", FACES)
def test_op_with_a_missing_method_is_refused(face: str) -> None:
    faces = {name: lambda *_: None for name in FACES if name != face}
    with pytest.raises(TypeError, match=rf"op halved: missing {face}\(\); every op defines shapes, reference, work"):
        type("Halved", (Op,), faces, kind="halved")
    assert "halved" not in REGISTRY


def test_a_kind_is_defined_once() -> None:
    with pytest.raises(TypeError, match=r"op map is defined twice: intaglio\.ops\.elementwise and "):
        type("Map2", (Op,), {name: lambda *_: None for name in FACES}, kind="map")
    assert REGISTRY["map"] is Map


def test_operands_results_and_renaming(monkeypatch: pytest.MonkeyPatch) -> None:
    op = Linear(site="s", x="x", w="w", residual="r", out="y")
    assert op.inputs == ("x", "w", "r") and op.outputs == ("y",)
    assert Linear.named("attribute") == ("x_format", "scale", "activation", "glu")
    moved = op.rename({"x": "z", "r": "x", "y": "v", "other": "w"})
    assert moved == Linear(site="s", x="z", w="w", residual="x", out="v")
    assert op.rename({"a": "b"}) is op
    monkeypatch.setattr("intaglio.ops.op.REGISTRY", {})

    @dataclass(frozen=True, kw_only=True)
    class Two(Op, kind="two"):
        x: str = operand()
        out: str = result()
        more: str | None = result(optional=True)

        def shapes(self, t: Tensors) -> Results:
            return {}

        def reference(self, v: object, batch: Batch) -> dict[str, np.ndarray]:
            return {}

        def work(self, t: Tensors, batch: Batch) -> Work:
            return Work()

    assert Two(site="s", x="x", out="y").outputs == ("y",)
    assert Two(site="s", x="x", out="y", more="z").outputs == ("y", "z")


def test_work_adds_up() -> None:
    both = Work(1, 2, 3, 4) + Work(10, 20, 30, 40)
    assert both == Work(11, 22, 33, 44) and both.bytes == 99
    assert tensors(x="int8g32[T, 33]")["x"].nbytes({"T": 2}) == 2 * (33 + 4)
