"""Plugins: an installed package adds an op with its kernels, a chip and a model family through its entry point.

They run on reference, host, mesh and silicon, from the command line and the API."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.tiny import tiny

PACKAGE = '''
"""Llama with its projections of q, k and v clamped, as OLMo's clip_qkv does, and a chip."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from intaglio.chips import register_chip, target
from intaglio.devices.host import host_kernel
from intaglio.models import Family, families, register_family
from intaglio.models.decoder import Writer
from intaglio.ops import Op, Work
from intaglio.ops.op import array, operand, result
from intaglio.silicon import WorkKernel, chip_kernel


@dataclass(frozen=True, kw_only=True)
class Clamp(Op, kind="clamp"):
    """out = min(max(x, -limit), limit), element by element. x, out f32 [rows, width]."""

    elementwise: ClassVar[bool] = True
    x: str = operand()
    out: str = result()
    limit: float

    def shapes(self, t):
        return {self.out: (t[self.x].shape, "f32")}

    def reference(self, v, batch):
        return {self.out: np.clip(array(v, self.x), -np.float32(self.limit), np.float32(self.limit))}

    def work(self, t, batch):
        return self.moved(t, batch, 2 * t[self.x].nbytes(batch.sizes) // 4)


@host_kernel(Clamp)
def clamp(op, v, batch):
    return {op.out: np.clip(array(v, op.x), -np.float32(op.limit), np.float32(op.limit))}


@chip_kernel(Clamp)
@dataclass(frozen=True)
class ClampKernel(WorkKernel):
    """Timed by the op's work."""


class ClampingWriter(Writer):
    def linear(self, site, *args, **options):
        y = super().linear(site, *args, **options)
        return self.b.op(Clamp, site + ".clamp", y, limit=0.05) if site.endswith(("q_proj", "k_proj", "v_proj")) else y


llama = families()["LlamaForCausalLM"]
register_family(Family("ClampedForCausalLM", "Clamped", llama.defaults, llama.describe, writer=ClampingWriter))
register_chip(target("sohu").with_chip(name="wide", description="sohu with twice the HBM rate", hbm_bytes_per_s=8e12))
'''

RUN = """
import sys
import numpy as np
from intaglio import LLM
from intaglio.program import parse_program

path = sys.argv[1]
ids = list(range(3, 40))
reference = LLM(path, device="reference")
assert "clamp" in {op.kind for op in reference.model.program.ops}
assert parse_program(str(reference.model.program)) == reference.model.program
want = reference.logits([ids])[0]
for options in (
    {}, {"threads": 1}, {"layout": "tp2"}, {"device": "reference", "layout": "tp2"}, {"layout": "pp2"},
    {"device": "silicon", "chip": "wide"}, {"device": "silicon", "chip": "wide", "chips": 2},
):
    got = LLM(path, **{"cache": None, **options}).logits([ids])[0]
    off = np.abs(got - want).max() / np.abs(want).max()
    assert off < (2e-2 if "chips" in options else 1e-4), (options, off)  # between chips values travel in bf16
    print(options, off)
clamped = LLM(path.replace("clamped", "plain"), cache=None).logits([ids])[0]
assert np.abs(clamped - want).max() > 1e-2 * np.abs(want).max()  # the clamp does something
"""


def outside(folder: Path, source: str, name: str = "clamped") -> dict[str, str]:
    """Install a package of one module beside the others, without pip: the environment in which Python finds it."""
    folder.mkdir()
    (folder / f"{name}_models.py").write_text(source)
    info = folder / f"{name}_models-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-models\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[intaglio.plugins]\n{name} = {name}_models\n")
    return {**os.environ, "PYTHONPATH": str(folder)}


def python(environment: dict[str, str], *words: str, code: int = 0) -> str:
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny llama, and the same weights called ClampedForCausalLM."""
    plain, clamped = tiny("llama", tmp_path / "plain"), tiny("llama", tmp_path / "clamped")
    config = json.loads((clamped / "config.json").read_text())
    (clamped / "config.json").write_text(
        json.dumps({**config, "architectures": ["ClampedForCausalLM"], "model_type": "clamped"})
    )
    assert plain.name == "plain"
    return clamped


def test_an_op_a_chip_and_a_family_from_outside_run_everywhere(tmp_path: Path, model: Path) -> None:
    environment = outside(tmp_path / "site", PACKAGE)
    said = python(environment, "-c", RUN, str(model))
    assert said.count("{") == 7
    assert "ClampedForCausalLM" in python(environment, "-m", "intaglio", "models")
    assert "wide" in python(environment, "-m", "intaglio", "chips")
    output = python(
        environment, "-m", "intaglio", "simulate", str(model), "--chip", "wide", "--input", "32", "--output", "8"
    )
    assert "1 x wide" in output
    without = {**environment, "INTAGLIO_PLUGINS": "another"}
    refused = python(without, "-m", "intaglio", "build", str(model), code=2)
    assert "architecture ClampedForCausalLM is not ported" in refused


def test_a_plugin_that_cannot_be_imported_is_named(tmp_path: Path) -> None:
    environment = outside(tmp_path / "site", "import no_such_module_here", name="broken")
    said = python(environment, "-m", "intaglio", "models", code=2)
    assert "plugin 'broken' (broken_models, of package broken-models) cannot be imported" in said
    assert "ModuleNotFoundError: No module named 'no_such_module_here'" in said and "INTAGLIO_PLUGINS" in said
    assert "LlamaForCausalLM" in python({**environment, "INTAGLIO_PLUGINS": ""}, "-m", "intaglio", "models")
