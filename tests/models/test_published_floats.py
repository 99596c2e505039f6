"""FP8, NVFP4, MXFP8 and MXFP6 checkpoints of compressed-tensors and NVIDIA Model Optimizer.

Values, logits (also with tp2), and that each tensor of the files is reported once. Wrong parts are refused.
"""

from __future__ import annotations

import json
import re

import pytest
import torch
from support.published import SIZES, hold, logits, quantised
from support.tiny import error, tiny, truth
from support.written import by_compressed_tensors

from intaglio.models import Checkpoint, PortError

ONE_ROUNDING = 2.0**-22  # of scale / global_scale, which here is scale * (1 / global_scale), and of the product
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def floats(bits, strategy, group, **more):
    return {"num_bits": bits, "type": "float", "strategy": strategy, "group_size": group, "symmetric": True, **more}


SCHEMES = {  # of compressed-tensors: weights, format here, rounding of values, bound of logits
    "nvfp4": (floats(4, "tensor_group", 16, scale_dtype="torch.float8_e4m3fn"), "nvfp4", ONE_ROUNDING, 0.05),
    "mxfp8": (floats(8, "group", 32, scale_dtype="torch.uint8"), "fp8g32", 0, 0.02),
    "mxfp6": (floats(6, "group", 32, scale_dtype="torch.uint8"), "fp8g32", 0, 0.02),
}


@pytest.mark.parametrize("kind", SCHEMES)
def test_compressed_tensors(tmp_path, kind):
    pytest.importorskip("compressed_tensors")
    weights, format, rounding, limit = SCHEMES[kind]
    source = tiny("llama", tmp_path / "source", "float32", **SIZES)
    coded, plain, values = by_compressed_tensors(source, tmp_path, weights)
    bf16 = max(rounding, 2.0**-8)  # the library dequantises to bf16
    hold(coded, plain, values, limit, {format}, bf16)


def nvfp4(w, name):
    """weight, weight_scale and weight_scale_2 as Model Optimizer defines them: value = E2M1 * E4M3 * float32."""
    n, k = w.shape
    groups = w.reshape(n, -1, 16)
    whole = w.abs().max() / (6 * 448)
    scale = (groups.abs().amax(dim=2) / 6 / whole).to(torch.float8_e4m3fn)
    step = (scale.float() * whole)[..., None]
    ratio = groups / step.clamp(min=1e-30)
    codes = (ratio.abs()[..., None] - E2M1).abs().argmin(dim=-1)
    back = torch.where(ratio < 0, -1, 1) * E2M1[codes] * step
    nibbles = (codes + 8 * (ratio < 0)).reshape(n, -1, 2)
    packed = (nibbles[..., 0] | nibbles[..., 1] << 4).to(torch.uint8)
    more = {"input_scale": torch.tensor(0.01)}
    return {"weight": packed, "weight_scale": scale, "weight_scale_2": whole, **more}, back.reshape(n, k)


def mxfp8(w, name):
    """weight E4M3, weight_scale U8: exponents of two of groups of 32."""
    n, k = w.shape
    groups = w.reshape(n, -1, 32)
    exponents = torch.floor(torch.log2(groups.abs().amax(dim=2))) - 8 + 127
    scale = torch.exp2(exponents - 127)[..., None]
    codes = (groups / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": codes.reshape(n, k), "weight_scale": exponents.to(torch.uint8)}, (codes.float() * scale).reshape(
        n, k
    )


def fp8(w, name):
    scale = w.abs().max() / 448
    codes = (w / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(1.0)}, codes.float() * scale


def mixed(w, name):
    """FP8 in attention, NVFP4 in the MLP, MXFP8 in the down projections; with scales of the K/V cache."""
    if "self_attn" in name:
        parts, back = fp8(w, name)
        return parts | ({"k_scale": torch.tensor(0.5)} if "k_proj" in name else {}), back
    return mxfp8(w, name) if "down_proj" in name else nvfp4(w, name)


def fp8_blocks(w, name):
    """Scales of 128 x 128, [N / 128, 1, K / 128, 1]."""
    blocks = w.reshape(len(w) // 128, 128, -1, 128)
    scale = blocks.abs().amax(dim=(1, 3), keepdim=True) / 448
    codes = (blocks / scale).to(torch.float8_e4m3fn)
    return {"weight": codes.reshape(w.shape), "weight_scale": scale}, (codes.float() * scale).reshape(w.shape)


MODELOPT = {
    "FP8_PB_WO": (fp8_blocks, {"fp8g128"}, {}),
    "NVFP4": (nvfp4, {"nvfp4"}, {"group_size": 16}),
    "MXFP8": (mxfp8, {"fp8g32"}, {"group_size": 32}),
    "MIXED_PRECISION": (mixed, {"nvfp4", "fp8g32", "fp8row"}, {"quantized_layers": {"l": {"quant_algo": "FP8"}}}),
}  # fmt: skip


@pytest.mark.parametrize("algo", MODELOPT)
@pytest.mark.parametrize("beside", [False, True])
def test_model_optimizer(tmp_path, algo, beside):
    """In quantization_config, or in hf_quant_config.json beside it."""
    encode, formats, more = MODELOPT[algo]
    own = {"quant_algo": algo, "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"], **more}
    config = {"quant_method": "modelopt", "producer": {"name": "modelopt"}, **own}
    coded, plain, values = quantised(tiny("llama", tmp_path / "source", **SIZES), tmp_path, encode, config)
    if beside:
        table = json.loads((coded / "config.json").read_text())
        del table["quantization_config"]
        (coded / "config.json").write_text(json.dumps(table))
        (coded / "hf_quant_config.json").write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": own}))
        assert error(logits(coded, "host"), truth(plain, list(range(40)))) < 0.05
        return
    hold(coded, plain, values, 0.05, formats)
    assert Checkpoint.open(coded).quantised_by == "config.json: quantization_config"


def test_what_model_optimizer_multiplies_activations_by_is_refused(tmp_path):
    def encode(w, name):
        parts, back = nvfp4(w, name)
        return parts | {"pre_quant_scale": torch.ones(w.shape[1])}, back

    config = {"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}
    coded, _, _ = quantised(tiny("llama", tmp_path / "source", **SIZES), tmp_path, encode, config)
    with pytest.raises(PortError, match=r"pre_quant_scale: activations are to be multiplied by it"):
        Checkpoint.open(coded)


@pytest.mark.parametrize("part", ["weight_scale", "weight_scale_2"])
def test_parts_of_other_shapes_are_refused(tmp_path, part):
    def encode(w, name):
        parts, back = nvfp4(w, name)
        return {**parts, part: torch.zeros(3, 5, dtype=parts[part].dtype)}, back

    config = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    coded, _, _ = quantised(tiny("llama", tmp_path / "source", **SIZES), tmp_path, encode, config)
    with pytest.raises(PortError, match=re.escape("[3, 5]") + ".*NVFP4 of 256 rows of"):
        Checkpoint.open(coded)
