"""Memory of a loaded model: about the size of its file, and while loading not more than the loaded model.

Checkpoints of random bits, tens of MB each, are loaded by a process of their own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

gguf = pytest.importorskip("gguf")
safetensors = pytest.importorskip("safetensors.numpy")
pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there is no /proc to read it from")

HIDDEN, FFN, VOCABULARY, LAYERS = 1024, 4096, 8192, 5
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": HIDDEN,
    "intermediate_size": FFN, "num_hidden_layers": LAYERS, "num_attention_heads": 16, "num_key_value_heads": 4,
    "head_dim": 64, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": True, "hidden_act": "silu",
}  # fmt: skip
LOAD = """
import gc, json, sys
from intaglio.compiler import build
from intaglio.devices import StateSpec
from intaglio.devices.host import HostDevice
from intaglio.models import Checkpoint, port

def held():
    gc.collect()
    lines = dict(line.split(":") for line in open("/proc/self/status").read().splitlines())
    return {name: int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM")}

checkpoint = Checkpoint.open(sys.argv[1])
program = build(port(checkpoint))
before = held()
ex = HostDevice(2, cache=None).load(program, checkpoint, StateSpec(4, 16))
print(json.dumps([before, held(), ex.packed_bytes]))
"""


def matrices() -> dict[str, tuple[int, int]]:
    layer = {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (256, HIDDEN), "self_attn.v_proj": (256, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (FFN, HIDDEN), "mlp.up_proj": (FFN, HIDDEN),
        "mlp.down_proj": (HIDDEN, FFN),
    }  # fmt: skip
    return {f"model.layers.{i}.{n}": s for i in range(LAYERS) for n, s in layer.items()}


def norms() -> dict[str, np.ndarray]:
    names = [f"model.layers.{i}.{n}" for i in range(LAYERS) for n in ("input_layernorm", "post_attention_layernorm")]
    return {f"{n}.weight": np.ones(HIDDEN, np.float32) for n in [*names, "model.norm"]}


def write_gguf(folder: Path, draw: np.random.Generator, kind: str) -> Path:
    """Write a GGUF checkpoint of random blocks with small scales."""
    size, values, scales = {"Q4_K": (144, 256, (1, 3)), "Q6_K": (210, 256, (209,))}[kind]
    path = folder / "model.gguf"
    w = gguf.GGUFWriter(path, "llama")
    w.add_block_count(LAYERS)
    w.add_context_length(256)
    w.add_embedding_length(HIDDEN)
    w.add_feed_forward_length(FFN)
    w.add_head_count(16)
    w.add_head_count_kv(4)
    w.add_key_length(64)
    w.add_layer_norm_rms_eps(1e-5)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, (n, k) in (matrices() | {"model.embed_tokens": (VOCABULARY, HIDDEN)}).items():
        blocks = draw.integers(0, 256, (n, k // values, size), dtype=np.uint8)
        for at in scales:
            blocks[..., at] &= 0x0F
        raw = gguf.GGMLQuantizationType[kind]
        w.add_tensor(f"{names.get_name(name)}.weight", blocks.reshape(n, -1), raw_dtype=raw)
    for name, x in norms().items():
        w.add_tensor(names.get_name(name, try_suffixes=(".weight",)), x)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def fp8(draw: np.random.Generator, n: int, k: int) -> dict[str, np.ndarray]:
    """Random FP8 codes without NaN."""
    codes = draw.integers(0, 256, (n, k), dtype=np.uint8) & 0xBF
    scales = draw.random((-(-n // 128), -(-k // 128)), np.float32)
    return {"weight": codes.view(ml_dtypes.float8_e4m3fn), "weight_scale_inv": scales}


def int4(draw: np.random.Generator, n: int, k: int) -> dict[str, np.ndarray]:
    return {
        "weight_packed": draw.integers(-(2**31), 2**31, (n, k // 8)).astype(np.int32),
        "weight_scale": draw.random((n, k // 128), np.float32).astype(ml_dtypes.bfloat16),
        "weight_shape": np.array([n, k]),
    }


def gptq(draw: np.random.Generator, n: int, k: int) -> dict[str, np.ndarray]:
    order = draw.permutation(k)
    return {
        "qweight": draw.integers(-(2**31), 2**31, (k // 8, n)).astype(np.int32),
        "qzeros": draw.integers(-(2**31), 2**31, (k // 128, n // 8)).astype(np.int32),
        "scales": draw.random((k // 128, n), np.float32).astype(np.float16),
        "g_idx": (np.argsort(order) // 128).astype(np.int32),
    }


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
SAFETENSORS = {
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "compressed int4": (int4, {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": INT4}}}),
    "gptq act-order": (gptq, {"quant_method": "gptq", "bits": 4, "desc_act": True}),
}


def write_safetensors(folder: Path, draw: np.random.Generator, kind: str) -> Path:
    encode, config = SAFETENSORS[kind]
    table = draw.normal(size=(VOCABULARY, HIDDEN)).astype(ml_dtypes.bfloat16)
    tensors = {"model.embed_tokens.weight": table} | norms()
    for name, (n, k) in matrices().items():
        tensors |= {f"{name}.{part}": x for part, x in encode(draw, n, k).items()}
    safetensors.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": config}))
    return folder / "model.safetensors"


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", *SAFETENSORS])
def test_a_model_takes_about_as_much_memory_as_its_file(tmp_path: Path, kind: str) -> None:
    """Beyond what the process held with the checkpoint open and the Program built: within 10 % of the file, and at its
    peak within 15 % of the file and of what is packed of it together."""
    draw = np.random.default_rng()
    file = (write_safetensors if kind in SAFETENSORS else write_gguf)(tmp_path, draw, kind)
    where = str(tmp_path if kind in SAFETENSORS else file)
    done = subprocess.run([sys.executable, "-c", LOAD, where], capture_output=True, text=True, check=True)
    before, after, packed = json.loads(done.stdout)
    size = file.stat().st_size
    assert size > 40_000_000
    assert 0.9 * size < after["VmRSS"] - before["VmRSS"] < 1.1 * size
    assert after["VmHWM"] - before["VmRSS"] < 1.15 * (size + packed)
