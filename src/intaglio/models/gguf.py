"""GGUF files (llama.cpp) of the llama, qwen2 and qwen3 architectures: their metadata as a config, their tensors by the
names transformers gives them. The file's structure is read by the `gguf` library; blocks become codes here, unrounded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from intaglio.formats import Quantised
from intaglio.models.config import PortError
from intaglio.models.published import Coded, Part, Reader

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
PLAIN = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


def _halves(blocks: np.ndarray, at: int) -> np.ndarray:
    """The f16 at byte `at` of each block, as float32 [rows, blocks, 1]."""
    return np.ascontiguousarray(blocks[..., at : at + 2]).view(np.float16).astype(np.float32)


def _joined(blocks: np.ndarray) -> np.ndarray:
    return blocks.reshape(len(blocks), -1)


def _q8_0(b: np.ndarray) -> Quantised:
    """32 values: f16 scale, 32 signed bytes."""
    return Quantised(_joined(np.ascontiguousarray(b[..., 2:]).view(np.int8)), _joined(_halves(b, 0)), 32)


def _q4_0(b: np.ndarray) -> Quantised:
    """32 values: f16 scale, 16 bytes, the low nibbles before the high ones, 8 above their codes."""
    codes = np.concatenate([b[..., 2:] & 15, b[..., 2:] >> 4], axis=-1).astype(np.int8) - np.int8(8)
    return Quantised(_joined(codes), _joined(_halves(b, 0)), 32)


def _q4_k(b: np.ndarray) -> Quantised:
    """256 values in 8 runs of 32: f16 d and dmin, 12 bytes of 6-bit scales and minima, nibbles; d sc q - dmin m."""
    low, mid, high = (b[..., 4 + 4 * i : 8 + 4 * i] for i in range(3))
    scales = np.concatenate([low & 63, (high & 15) | ((low >> 2) & 48)], axis=-1).astype(np.float32)
    minima = np.concatenate([mid & 63, (high >> 4) | ((mid >> 2) & 48)], axis=-1).astype(np.float32)
    bytes = b[..., 16:].reshape(*b.shape[:-1], 4, 1, 32)
    codes = np.concatenate([bytes & 15, bytes >> 4], axis=-2).astype(np.int8)
    d, least = _halves(b, 0), _halves(b, 2)
    return Quantised(
        _joined(codes), _joined(d * scales), 32, minima=_joined(least * minima), units=_joined(d),
        low_units=_joined(least)
    )  # fmt: skip


def _q6_k(b: np.ndarray) -> Quantised:
    """256 values in 16 runs of 16: 128 bytes of low nibbles, 64 of high pairs (codes + 32), 16 signed scales, f16 d."""
    low = b[..., :128].reshape(*b.shape[:-1], 2, 1, 64) >> np.array([[0], [4]], np.uint8) & 15
    high = b[..., 128:192].reshape(*b.shape[:-1], 2, 1, 32) >> np.array([[0], [2], [4], [6]], np.uint8) & 3
    codes = (low.reshape(*b.shape[:-1], 8, 32) | high.reshape(*b.shape[:-1], 8, 32) << 4).astype(np.int8) - np.int8(32)
    scales = np.ascontiguousarray(b[..., 192:208]).view(np.int8).astype(np.float32)
    d = _halves(b, 208)
    return Quantised(_joined(codes), _joined(d * scales), 16, units=_joined(d))


BLOCKS: dict[str, tuple[str, int, int, Callable[[np.ndarray], Quantised]]] = {  # format, values and bytes a block
    "Q8_0": ("int8g32f16", 32, 34, _q8_0),
    "Q4_0": ("int4g32f16", 32, 18, _q4_0),
    "Q4_K": ("q4_k", 256, 144, _q4_k),
    "Q6_K": ("q6_k", 256, 210, _q6_k),
}


@dataclass(frozen=True)
class Raw:
    """A tensor as it lies in the file: bytes of blocks [rows, bytes a row], or values."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Raw], dict[str, Coded], set[str]]:
    """(config, tensors of the file, matrices in blocks by transformers' names, the tensors those take up)."""
    try:
        import gguf
    except ImportError:
        raise PortError(f"{path} is a GGUF file: pip install gguf, the library that reads them") from None
    reader = gguf.GGUFReader(path)

    def get(key: str, default: Any = None) -> Any:
        field = reader.get_field(key)
        return default if field is None else field.contents()

    arch = str(get("general.architecture"))
    if arch not in ARCHITECTURES:
        raise PortError(f"{path}: architecture {arch!r} is not read; known are {', '.join(ARCHITECTURES)}")
    raw: dict[str, Raw] = {}
    coded: dict[str, Coded] = {}
    factors: list[float] = []
    heads = {"attn_q": int(get(f"{arch}.attention.head_count")), "attn_k": int(get(f"{arch}.attention.head_count_kv"))}
    for t in reader.tensors:
        shape = tuple(int(d) for d in reversed(t.shape.tolist()))
        if t.name == "rope_freqs.weight":
            factors = [float(x) for x in t.data]
            continue
        name, part = _name(t.name)
        turned = heads.get(part, 0) if arch == "llama" and len(shape) == 2 else 0
        _add(path, t, name, shape, turned, raw, coded)
    return _config(arch, get, raw, coded, factors), raw, coded, {n for n in raw if n.startswith("blocks of ")}


def _name(name: str) -> tuple[str, str]:
    """(transformers' name, the part of a layer that it is)."""
    words = name.split(".")
    at, part = (f"model.layers.{words[1]}.", words[2]) if words[0] == "blk" else ("", words[0])
    if part not in NAMES:
        raise PortError(f"tensor {name} of a GGUF file belongs to nothing these architectures have")
    return f"{at}{NAMES[part]}.{words[-1]}", part


def _add(
    path: Path, t: Any, name: str, shape: tuple[int, ...], heads: int, raw: dict[str, Raw], coded: dict[str, Coded]
) -> None:
    """One tensor, into the table it belongs to. `heads`: its rows stand in llama.cpp's order, head by head."""
    kind, start = t.tensor_type.name, int(t.data_offset)
    if kind in PLAIN:
        at = f"blocks of {name}" if heads else name
        raw[at] = Raw(kind, shape, start, start + int(t.n_bytes))
        if heads:
            head = shape[0] // heads
            coded[name] = Coded(PLAIN[kind], shape, {at: Part()}, lambda read: _in_order(read(at), head), whole=head)
        return
    if kind not in BLOCKS:
        known = ", ".join((*PLAIN, *BLOCKS))
        raise PortError(f"{path}: tensor {t.name} is {kind}; known are {known}")
    format, values, size, decode = BLOCKS[kind]
    at, blocks = f"blocks of {name}", shape[-1] // values
    raw[at] = Raw("U8", (*shape[:-1], blocks * size), start, start + int(t.n_bytes))

    head = shape[0] // heads if heads else 1

    def read_blocks(read: Reader) -> Quantised:
        q = decode(read(at).reshape(-1, blocks, size))
        return q.each(lambda x: _in_order(x, head)) if heads else q

    coded[name] = Coded(format, shape, {at: Part()}, read_blocks, whole=head)


def _in_order(x: np.ndarray, head: int) -> np.ndarray:
    """llama.cpp keeps the rows of a head that rope pairs beside each other; here they stand by halves."""
    return np.ascontiguousarray(x.reshape(-1, head // 2, 2, x.shape[1]).swapaxes(1, 2)).reshape(x.shape)


def _config(
    arch: str, get: Callable[..., Any], raw: dict[str, Raw], coded: dict[str, Coded], factors: list[float]
) -> dict[str, Any]:
    """The metadata in the words of config.json."""
    table = "model.embed_tokens.weight"
    shape = coded[table].shape if table in coded else raw[table].shape
    heads = int(get(f"{arch}.attention.head_count"))
    bias = "model.layers.0.self_attn.q_proj.bias" in raw
    config = {
        "architectures": [ARCHITECTURES[arch]], "vocab_size": shape[0], "hidden_size": shape[1],
        "intermediate_size": int(get(f"{arch}.feed_forward_length")), "num_attention_heads": heads,
        "num_hidden_layers": int(get(f"{arch}.block_count")),
        "num_key_value_heads": int(get(f"{arch}.attention.head_count_kv", heads)),
        "head_dim": int(get(f"{arch}.attention.key_length", shape[1] // heads)),
        "max_position_embeddings": int(get(f"{arch}.context_length")),
        "rms_norm_eps": float(get(f"{arch}.attention.layer_norm_rms_epsilon")),
        "rope_theta": float(get(f"{arch}.rope.freq_base", 10000.0)),
        "tie_word_embeddings": "lm_head.weight" not in {**raw, **coded},
    }  # fmt: skip
    if arch != "qwen2":
        config["attention_bias"] = bias
    scaling, length = get(f"{arch}.rope.scaling.type"), config["max_position_embeddings"]
    if factors:  # llama3's scaling, worked out pair by pair
        both = {"short_factor": factors, "long_factor": factors, "attention_factor": 1.0}
        config["rope_scaling"] = {"rope_type": "longrope", **both, "original_max_position_embeddings": length}
    elif scaling not in (None, "none"):
        pretrained = int(get(f"{arch}.rope.scaling.original_context_length", length))
        factor = float(get(f"{arch}.rope.scaling.factor", 1.0))
        config["rope_scaling"] = {
            "rope_type": str(scaling),
            "factor": factor,
            "original_max_position_embeddings": pretrained,
        }
    return config
