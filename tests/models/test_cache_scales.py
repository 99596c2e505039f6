"""FP8 K/V caches that checkpoints ask for, against transformers with a cache that rounds by the same scales."""

from __future__ import annotations

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.published import logits, typical
from support.tiny import error, tiny

from intaglio.batch import Chunk, bind
from intaglio.compiler import build, build_mesh
from intaglio.devices import MeshDevice, StateSpec, StepRequest, open_device
from intaglio.models import Checkpoint, CheckpointError, PortError, account, port

SCALES = {0: (0.011, 0.02), 1: (0.004, 0.013)}  # of keys and values; the layers differ, and some values are clipped
TOKENS = list(range(40))
MODELOPT = {"quant_method": "modelopt", "quant_algo": None, "kv_cache_quant_algo": "FP8"}
SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


class Rounded(transformers.DynamicCache):
    """transformers' cache, whose keys and values are divided, clipped, rounded to E4M3 and multiplied again."""

    scales = SCALES

    def update(self, keys, values, layer, *rest, **more):
        k, v = (self._rounded(x, s) for x, s in zip((keys, values), self.scales[layer], strict=True))
        return super().update(k, v, layer, *rest, **more)

    @staticmethod
    def _rounded(x, scale):
        s = torch.tensor(scale)[:, None, None] if isinstance(scale, tuple) else torch.tensor(scale)
        return (x / s).clamp(-448, 448).to(torch.float8_e4m3fn).float() * s


def judged(path, scales=SCALES):
    """Logits of transformers with the rounding cache."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    cache = Rounded(config=model.config)
    cache.scales = scales
    with torch.no_grad():
        return model(torch.tensor([TOKENS]), past_key_values=cache, use_cache=True).logits[0].numpy()


def folder(tmp_path, tensors, config, family="qwen3", **how):
    """A float32 checkpoint of two layers with more tensors, and the plain one beside it."""
    path = tiny(family, tmp_path / "source", num_hidden_layers=2, **how)
    own = tmp_path / "own"
    own.mkdir()
    for file in path.iterdir():
        (own / file.name).write_bytes(file.read_bytes())
    arrays = load_file(path / "model.safetensors")
    save_file({**arrays, **tensors}, own / "model.safetensors")
    table = json.loads((path / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**table, **({"quantization_config": config} if config else {})}))
    return path, own


def scale_tensors(k="self_attn.k_proj.k_scale", v="self_attn.v_proj.v_scale", shape=()):
    out = {}
    for i, (a, b) in SCALES.items():
        out |= {f"model.layers.{i}.{n}": torch.full(shape, x) for n, x in ((k, a), (v, b))}
    return out


NAMES = {
    "modelopt": (scale_tensors(), MODELOPT),
    "compressed-tensors": (
        scale_tensors("self_attn.k_scale", "self_attn.v_scale", (1,)),
        {"quant_method": "compressed-tensors", "kv_cache_scheme": SCHEME, "config_groups": {}},
    ),
    "autofp8": (
        scale_tensors("self_attn.k_proj.output_scale", "self_attn.v_proj.output_scale"),
        {"quant_method": "compressed-tensors", "kv_cache_scheme": "static", "config_groups": {}},
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_scales_are_used(tmp_path, name):
    """By reference, host, chip and two lanes; without them, and with --kv bf16 and f32, the logits are others."""
    tensors, config = NAMES[name]
    plain, own = folder(tmp_path, tensors, config)
    wanted = judged(plain)
    c = Checkpoint.open(own)
    program = port(c)
    caches = [t for t in program.tensors.values() if t.name.endswith("cache")]
    assert len(caches) == 4 and {t.format for t in caches} == {"e4m3"}
    got = {device: logits(own, device) for device in ("reference", "host", "silicon")}
    mesh = MeshDevice(open_device("host")).load(build_mesh(program, "tp2"), c, StateSpec(4, 16))
    got["tp2"] = mesh.step(StepRequest(bind([Chunk(TOKENS, 0, range(4), range(40))], 16), logits=True)).logits
    for device, ours in got.items():  # float32 sums in other orders move a few values across a rounding boundary
        assert typical(ours, wanted) < 2e-3 and error(ours, wanted) < 0.02, device
    unscaled = {0: (1.0, 1.0), 1: (1.0, 1.0)}
    assert typical(judged(plain, unscaled), wanted) > 5e-3
    for kv in ("f32", "bf16", "int8"):
        other = build(port(c), "auto", kv)
        assert not any(n.endswith(("k_scale", "v_scale")) for op in other.ops for n in op.inputs)
        assert typical(logits(own, "reference", other), wanted) > 5e-3
    a = account(own)
    fates = {t.name: t for t in a.tensors}
    assert all(fates[n].fate == "used" and fates[n].becomes for n in tensors)
    assert [k.fate for k in a.keys if k.key.endswith(("kv_cache_scheme", "kv_cache_quant_algo"))] == ["used"]


def test_scales_of_a_checkpoint_that_does_not_ask_for_fp8_wait_for_the_option(tmp_path):
    plain, own = folder(tmp_path, scale_tensors(), {})
    c = Checkpoint.open(own)
    assert error(logits(own, "reference"), logits(plain, "reference")) == 0
    assert typical(logits(own, "host", build(port(c), "auto", "fp8")), judged(plain)) < 2e-3
    assert {t.why for t in account(own).tensors if t.fate == "ignored"} == {
        "a scale of an FP8 K/V cache, for which the settings do not ask; --kv fp8 uses it"
    }
    program = build(port(Checkpoint.open(plain)), "auto", "fp8")  # without scales they are 1
    assert typical(logits(plain, "host", program), judged(plain, {0: (1.0, 1.0), 1: (1.0, 1.0)})) < 2e-3


def test_one_scale_for_each_head_one_for_both_and_those_not_calibrated(tmp_path):
    """A scale per K/V head; kv_scale; a scale of keys alone, which is that of values too; 0 and less stand for 1."""
    at = "model.layers.{}.self_attn."
    cases = (
        ({at.format(0) + "k_scale": torch.tensor([0.01, 0.02]).reshape(2, 1, 1),
          at.format(0) + "v_scale": torch.tensor([0.03, 0.005]).reshape(2, 1, 1),
          at.format(1) + "k_scale": torch.tensor(0.01), at.format(1) + "v_scale": torch.tensor(-1.0)},
         {0: ((0.01, 0.02), (0.03, 0.005)), 1: (0.01, 1.0)}),
        ({at.format(0) + "kv_scale": torch.tensor(0.02), at.format(1) + "k_proj.k_scale": torch.tensor(0.01)},
         {0: (0.02, 0.02), 1: (0.01, 0.01)}),
    )  # fmt: skip
    for i, (tensors, scales) in enumerate(cases):
        (tmp_path / str(i)).mkdir()
        plain, own = folder(tmp_path / str(i), tensors, MODELOPT)
        wanted = judged(plain, scales)
        c = Checkpoint.open(own)
        mesh = MeshDevice(open_device("host")).load(build_mesh(port(c), "tp2"), c, StateSpec(4, 16))
        step = StepRequest(bind([Chunk(TOKENS, 0, range(4), range(40))], 16), logits=True)
        for ours in (logits(own, "host"), mesh.step(step).logits):
            assert typical(ours, wanted) < 2e-3


def test_the_latent_cache_has_one_scale(tmp_path):
    plain, own = folder(tmp_path, scale_tensors("self_attn.k_scale", "self_attn.v_scale"), MODELOPT, "kimik2")
    ours, without = logits(own, "host"), logits(plain, "host")
    assert error(ours, logits(own, "reference")) < 0.02
    assert 1e-3 < typical(ours, without) < 0.2


def test_bad_scales_are_refused(tmp_path):
    at = "model.layers.0.self_attn.k_scale"
    for i, (values, kind, message) in enumerate((
        (torch.tensor(float("nan")), CheckpointError, f"{at} is nan: a scale of the K/V cache is a finite number"),
        (torch.ones(3), PortError, "layers.0.attn.k_scale has 3 values for 2 K/V heads; wanted one, or one per head"),
    )):  # fmt: skip
        (tmp_path / str(i)).mkdir()
        _, own = folder(tmp_path / str(i), {at: values}, MODELOPT)
        with pytest.warns() if i == 0 else nullcontext(), pytest.raises(kind, match=message):
            port(Checkpoint.open(own))


def test_settings_left_over_from_another_version_ask_for_nothing(tmp_path):
    _, own = folder(tmp_path, {}, {})
    (own / "hf_quant_config.json").write_text(
        json.dumps({"producer": {"name": "modelopt"}, "quantization": {"kv_cache_quant_algo": "FP8"}})
    )
    assert {t.format for t in port(Checkpoint.open(own)).tensors.values() if t.name.endswith("cache")} == {"f32"}
    assert np.isfinite(logits(own, "reference")).all()
