"""Writes tests/golden's quantised checkpoints, each by the library its format comes from: python scripts/goldens.py.

GPTQ with act-order, in 4 and in 8 bits, by gptqmodel 7.7.0, int4 with act-order by compressed-tensors 0.9.4, AWQ by
autoawq 0.2.9, K-quants by llama.cpp (llama-cpp-python 0.3.36). These are no test dependencies: gptqmodel needs a newer
torch than ours, compressed-tensors has stopped writing act-order, autoawq is no longer maintained. Beside each of the
first three checkpoints are its matrices as the library dequantises them, rounded to f16. Source: one random layer with
tied embeddings, in f16.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "tie_word_embeddings": True}
GROUP = 32


def source(folder: Path) -> Path:
    from tiny import tiny

    return tiny("llama", folder / "source", "float16", attention_bias=False, mlp_bias=False, **SIZES)


def keep(
    name: str, config: dict[str, object], tensors: dict[str, torch.Tensor], values: dict[str, torch.Tensor]
) -> None:
    """A checkpoint, and beside it what its matrices stand for."""
    folder = GOLDEN / name
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    save_file({n: x.contiguous() for n, x in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    save_file({n: x.half().contiguous() for n, x in values.items()}, GOLDEN / f"{name}.values.safetensors")


def write_gptq(folder: Path, name: str, bits: int) -> None:
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from safetensors.torch import load_file

    model = GPTQModel.load(str(source(folder)), QuantizeConfig(bits=bits, group_size=GROUP, desc_act=True, sym=False))
    draw = torch.Generator().manual_seed(1)
    texts = [torch.randint(0, 256, (64,), generator=draw).tolist() for _ in range(16)]
    model.quantize([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in texts], batch_size=1)
    model.save(str(folder / name))
    values = {}
    read = GPTQModel.load(str(folder / name), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16)
    for module, m in read.model.named_modules():
        if isinstance(m, TorchLinear):
            m.scales = m.scales.float()
            values[f"{module}.weight"] = m.dequantize_weight().T
    config = json.loads((folder / name / "config.json").read_text())
    config["quantization_config"].pop("meta", None)  # the settings of the run, among them paths
    keep(name, config, load_file(folder / name / "model.safetensors"), values)


def write_compressed(folder: Path) -> None:
    from compressed_tensors.compressors.quantized_compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams
    from transformers import AutoModelForCausalLM

    path = source(folder)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float16)
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=GROUP, actorder="group")
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    settings = QuantizationConfig(config_groups={"group_0": scheme}, format="pack-quantized", ignore=["lm_head"])
    packer = PackedQuantizationCompressor(settings)
    values, tensors = {}, dict(model.state_dict())
    del tensors["lm_head.weight"]
    for name, m in model.model.named_modules(prefix="model"):
        if isinstance(m, torch.nn.Linear):
            n, k = m.weight.shape
            order = torch.randperm(k, generator=torch.Generator().manual_seed(k))  # one for all that meet one input
            g_idx = torch.argsort(order).div(GROUP, rounding_mode="floor").int()
            runs = m.weight.data[:, order].reshape(n, -1, GROUP)
            scales, zeros = calculate_qparams(runs.amin(dim=2), runs.amax(dim=2), args)
            packed = packer.compress_weight(m.weight.data, scales, args, zeros, g_idx)
            packed |= {"weight_scale": scales.half(), "weight_g_idx": g_idx}
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{n}": x for n, x in packed.items()}
            values[f"{name}.weight"] = packer.decompress_weight(packed | {"weight_scale": scales.float()}, args)
    config = json.loads((path / "config.json").read_text())
    written = {"quantization_config": settings.model_dump(mode="json")}
    keep("compressed-act-order", config | written, tensors, values)


def write_awq(folder: Path) -> None:
    from awq.models._config import AwqConfig
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.quantize.quantizer import AwqQuantizer
    from awq.utils.packing_utils import dequantize_gemm
    from transformers import AutoModelForCausalLM

    path = source(folder)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float16)
    rounds = object.__new__(AwqQuantizer)  # of which one function is wanted, and no search for scales of activations
    rounds.group_size, rounds.zero_point, rounds.w_bit = GROUP, True, 4
    values, tensors = {}, dict(model.state_dict())
    del tensors["lm_head.weight"]
    for name, m in model.model.named_modules(prefix="model"):
        if isinstance(m, torch.nn.Linear):
            m.weight.data, scales, zeros = rounds.pseudo_quantize_tensor(m.weight.data)
            packed = WQLinear_GEMM.from_linear(m, 4, GROUP, False, scales.T.contiguous(), zeros.T.contiguous())
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{n}": x for n, x in packed.state_dict().items()}
            args = packed.qweight, packed.qzeros, packed.scales.float(), 4, GROUP
            values[f"{name}.weight"] = dequantize_gemm(*args).T
    config = json.loads((path / "config.json").read_text())
    keep("awq", config | {"quantization_config": AwqConfig(q_group_size=GROUP).to_transformers_dict()}, tensors, values)


def write_k_quants(folder: Path) -> None:
    from checkpoints import Shape, write_gguf, write_random

    shape = Shape(256, 1, 4, 2, 64, 256, 263)
    shutil.copy(write_gguf(write_random(folder / "k", shape), "Q4_K_M", 1), GOLDEN / "q4_k_m.gguf")


if __name__ == "__main__":
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    sys.path += [str(ROOT / "tests"), str(ROOT / "bench")]
    with tempfile.TemporaryDirectory() as folder:
        write_gptq(Path(folder), "gptq-act-order", 4)
        write_gptq(Path(folder), "gptq-8-bits", 8)
        write_compressed(Path(folder))
        write_awq(Path(folder))
        write_k_quants(Path(folder))
