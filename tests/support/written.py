"""Checkpoints in published formats, written and dequantised by the libraries that the formats come from.

Not a test: tests import it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

Written = tuple[Path, Path, dict[str, torch.Tensor]]  # the checkpoint, the same dequantised, its matrices' values


def plain_beside(source: Path, folder: Path, values: dict[str, torch.Tensor]) -> Path:
    """The checkpoint `source` in float32 with these matrices instead."""
    plain = folder / "plain"
    shutil.copytree(source, plain)
    tensors = load_file(source / "model.safetensors") | values
    save_file({n: x.float().contiguous() for n, x in tensors.items()}, plain / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    return plain


def by_compressed_tensors(source: Path, folder: Path, weights: dict[str, Any], format: str | None = None) -> Written:
    """A model's linears, but the head, in a scheme of compressed-tensors; scales in the dtype of `source`."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam, is_module_quantized

    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    modules = {n: m for n, m in model.named_modules() if is_module_quantized(m)}
    for m in modules.values():
        n, k = m.weight.shape
        high, wide = {  # of what shares a scale
            "tensor": (n, k), "channel": (1, k), "group": (1, weights["group_size"]),
            "tensor_group": (1, weights["group_size"]),
            "block": weights.get("block_structure"),
        }[weights["strategy"]]  # fmt: skip
        parts = m.weight.data.reshape(n // high, high, k // wide, wide)
        least, most = parts.amin(dim=(1, 3)), parts.amax(dim=(1, 3))
        extra = {}
        if weights["strategy"] == "tensor_group":
            m.weight_global_scale.data.copy_(generate_gparam(least.min(), most.max()))
            extra = {"global_scale": m.weight_global_scale}
        scale, zero = calculate_qparams(least, most, m.quantization_scheme.weights, **extra)
        m.weight_scale.data.copy_(scale.reshape(m.weight_scale.shape))
        if hasattr(m, "weight_zero_point"):
            m.weight_zero_point.data.copy_(zero.reshape(m.weight_zero_point.shape))
    compressor = ModelCompressor.from_pretrained_model(model, format)
    compressor.compress_model(model)
    model.save_pretrained(folder / "coded")
    compressor.update_config(folder / "coded")
    compressor.decompress_model(model)
    values = {f"{n}.weight": m.weight.data for n, m in modules.items()}
    return folder / "coded", plain_beside(source, folder, values), values


def by_transformers_fp8(source: Path, folder: Path, monkeypatch: Any) -> Written:
    """FP8 in blocks of 128 x 128 by transformers' FineGrainedFP8Config, read back by transformers: it dequantises where
    there is no GPU. Only its check that there is one is left out when it quantises."""
    from transformers import FineGrainedFP8Config
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    with monkeypatch.context() as without:
        without.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: None)
        config = FineGrainedFP8Config(modules_to_not_convert=["lm_head"])
        model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.float32)
    model.save_pretrained(folder / "coded")
    held = load_file(folder / "coded" / "model.safetensors")
    read = AutoModelForCausalLM.from_pretrained(folder / "coded", dtype=torch.float32).state_dict()
    values = {n: read[n] for n, x in held.items() if x.dtype == torch.float8_e4m3fn}
    return folder / "coded", plain_beside(source, folder, values), values
