"""Random checkpoints in the shapes of known models, as a Hugging Face folder and as GGUF files of the same weights.

Weights are bfloat16, 0.02 * normal, a function of the tensor's name alone. Finished files are kept and used again.
"""

from __future__ import annotations

import json
import os
import re
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from intaglio.model import BUNDLED
from intaglio.models import Checkpoint

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {np.dtype(np.float32): "F32", BF16: "BF16"}
CONTEXT = 8192
GGML_ERROR = 4
GGUF_NAMES = {  # of a layer's tensors
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate": "ffn_gate_inp",
}  # fmt: skip
EXPERT = re.compile(r"(model\.layers\.(\d+)\.mlp\.experts\.)(\d+)\.(gate|up|down)_proj\.weight")
FILES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M")  # GGUF files that both engines read
OURS = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}  # formats here, and those of llama.cpp beside them
PEER_FORMATS = {**OURS, **{kind: kind for kind in FILES}}


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama or, with experts, of a Qwen3-MoE, whose experts have the width `ffn` each."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    tied: bool = True
    experts: int = 0
    top: int = 0  # experts a token goes to

    def config(self) -> dict[str, Any]:
        """As config.json has it."""
        kind: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        if self.experts:
            kind = {
                "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": self.experts,
                "num_experts_per_tok": self.top, "moe_intermediate_size": self.ffn, "norm_topk_prob": True,
                "decoder_sparse_step": 1, "mlp_only_layers": [],
            }  # fmt: skip
        return kind | {
            "hidden_act": "silu", "hidden_size": self.hidden, "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim, "vocab_size": self.vocabulary, "max_position_embeddings": CONTEXT,
            "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": self.tied, "torch_dtype": "bfloat16",
            "bos_token_id": 0, "eos_token_id": 1,
        }  # fmt: skip

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm": (self.hidden,), "post_attention_layernorm": (self.hidden,),
            "self_attn.q_proj": (q, self.hidden), "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden), "self_attn.o_proj": (self.hidden, q),
        }  # fmt: skip
        mlp = {
            "gate_proj": (self.ffn, self.hidden), "up_proj": (self.ffn, self.hidden),
            "down_proj": (self.hidden, self.ffn),
        }  # fmt: skip
        if self.experts:
            layer |= {"self_attn.q_norm": (self.head_dim,), "self_attn.k_norm": (self.head_dim,)}
            layer["mlp.gate"] = (self.experts, self.hidden)
            layer |= {f"mlp.experts.{e}.{n}": s for e in range(self.experts) for n, s in mlp.items()}
        else:
            layer |= {f"mlp.{n}": s for n, s in mlp.items()}
        table = {"model.embed_tokens.weight": (self.vocabulary, self.hidden), "model.norm.weight": (self.hidden,)}
        named = {f"model.layers.{i}.{n}.weight": s for i in range(self.layers) for n, s in layer.items()}
        return table | named | ({} if self.tied else {"lm_head.weight": (self.vocabulary, self.hidden)})

    def stored_bytes(self) -> int:
        return sum(2 * int(np.prod(s)) for s in self.tensors().values())


SHAPES = {
    "tiny": Shape(256, 2, 4, 2, 64, 768, 4096),  # for trying the scripts; as many ids as the bundled tokenizer
    "tiny-moe": Shape(256, 2, 4, 2, 64, 256, 4096, tied=False, experts=16, top=4),
    "135m": Shape(576, 30, 9, 3, 64, 1536, 49152),  # SmolLM2-135M
    "1b": Shape(2048, 16, 32, 8, 64, 8192, 128256),  # Llama-3.2-1B
    "8b": Shape(4096, 32, 32, 8, 128, 14336, 128256, tied=False),  # Llama-3.1-8B
    "moe": Shape(2048, 8, 32, 4, 128, 768, 151936, tied=False, experts=128, top=8),  # 8 layers of Qwen3-30B-A3B
}


def write_random(folder: Path, shape: Shape) -> Path:
    """The checkpoint of that shape in `folder`, if it is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "model.safetensors"
    if not weights.exists():
        (folder / "config.json").write_text(json.dumps(shape.config(), indent=2) + "\n")
        shapes = shape.tensors()
        write_safetensors(weights, {n: (s, BF16) for n, s in shapes.items()}, _random(shapes))
    return folder


def _random(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[np.ndarray]:
    for name, shape in shapes.items():
        x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32) * np.float32(0.02)
        yield (x if len(shape) == 2 else x + 1).astype(BF16)


def write_safetensors(
    path: Path, tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]], values: Iterator[np.ndarray]
) -> None:
    """One tensor in memory at a time; written aside and renamed, so that a file that is there is whole."""
    header: dict[str, Any] = {}
    at = 0
    for name, (shape, dtype) in tensors.items():
        end = at + int(np.prod(shape)) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    header["__metadata__"] = {"format": "pt"}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    aside = path.with_suffix(".new")
    with aside.open("wb") as f:
        f.write(len(head).to_bytes(8, "little") + head)
        for x in values:
            f.write(np.ascontiguousarray(x).view(np.uint8))
    os.replace(aside, path)


def write_tokenizer(folder: Path) -> Path:
    """The bundled model's tokenizer in `folder`, which holds a checkpoint: ids it lacks are words of their own."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = json.loads((BUNDLED / name).read_text())
        if name == "tokenizer.json":
            vocabulary = content["model"]["vocab"]
            known = {*vocabulary.values(), *(t["id"] for t in content["added_tokens"])}
            size = json.loads((folder / "config.json").read_text())["vocab_size"]
            vocabulary.update({f"w{i}": i for i in range(size) if i not in known})
        (folder / name).write_text(json.dumps(content))
    return folder


def gguf_path(folder: Path, kind: str) -> Path:
    return folder / f"model.{kind}.gguf"


def opened(folder: Path, format: str) -> Checkpoint:
    """The folder's checkpoint, or its GGUF file if `format` names one of FILES."""
    return Checkpoint.open(gguf_path(folder, format) if format in FILES else folder)


def write_gguf(folder: Path, kind: str, threads: int) -> Path:
    """The folder's checkpoint as llama.cpp reads it, in its format `kind` (BF16, Q8_0, Q4_0, ...), by its quantiser."""
    path, plain = gguf_path(folder, kind), gguf_path(folder, "BF16")
    if not plain.exists():
        _write_plain_gguf(Checkpoint.open(folder), plain)
    if not path.exists():
        _quantise_gguf(plain, path, kind, threads)
    return path


def _write_plain_gguf(checkpoint: Checkpoint, path: Path) -> None:
    import gguf

    c = checkpoint.config
    experts = c.get("num_experts", 0)
    writer = gguf.GGUFWriter(path.with_suffix(".new"), "qwen3moe" if experts else "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_vocab_size(c["vocab_size"])
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_head_count(c["num_attention_heads"])
    writer.add_head_count_kv(c["num_key_value_heads"])
    writer.add_key_length(c["head_dim"])
    writer.add_value_length(c["head_dim"])
    writer.add_rope_dimension_count(c["head_dim"])
    writer.add_rope_freq_base(c.get("rope_theta") or c["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(c["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(c["moe_intermediate_size"])
    _write_vocabulary(checkpoint.path, writer)
    stacks = gguf_stacks([n for n in checkpoint.entries if not (c["tie_word_embeddings"] and n == "lm_head.weight")])
    kinds = gguf.GGMLQuantizationType
    for name, parts in stacks.items():
        shape = checkpoint.shape(parts[0])
        shape = shape if len(parts) == 1 else (len(parts), *shape)
        width, kind = (4, kinds.F32) if _is_wide(name, shape) else (2, kinds.BF16)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), int(np.prod(shape)) * width, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, parts in stacks.items():
        values = [_gguf_values(part, checkpoint.read(part), c) for part in parts]
        x = values[0] if len(parts) == 1 else np.stack(values)
        writer.write_tensor_data(x.astype(np.float32) if _is_wide(name, x.shape) else x.view(np.uint16))
        for part in parts:
            checkpoint.release(part)
    writer.close()
    os.replace(path.with_suffix(".new"), path)


def gguf_stacks(names: Sequence[str]) -> dict[str, list[str]]:
    """The checkpoint's tensors that each of a GGUF's is made of: one, or one an expert."""
    stacks: dict[str, list[str]] = {}
    for name in names:
        found = EXPERT.fullmatch(name)
        stacks.setdefault(f"blk.{found[2]}.ffn_{found[4]}_exps.weight" if found else gguf_name(name), []).append(name)
    return stacks


def _is_wide(name: str, shape: tuple[int, ...]) -> bool:
    """Whether llama.cpp wants float32: vectors and routers."""
    return len(shape) == 1 or "ffn_gate_inp" in name


def _write_vocabulary(folder: Path, writer: Any) -> None:
    """The folder's tokenizer, if it has one; else none, and the model takes ids alone."""
    if not (folder / "tokenizer.json").exists():
        writer.add_tokenizer_model("no_vocab")
        return
    content = json.loads((folder / "tokenizer.json").read_text())
    names = {id: text for text, id in content["model"]["vocab"].items()} | {
        t["id"]: t["content"] for t in content["added_tokens"]
    }
    special = {t["id"] for t in content["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([names[i] for i in range(len(names))])
    writer.add_token_types([3 if i in special else 1 for i in range(len(names))])  # control, normal
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def gguf_name(name: str) -> str:
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in whole:
        return whole[stem] + ".weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[part]}.weight"


def _gguf_values(name: str, x: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """In a Llama, llama.cpp rotates neighbours, so rows of q and k are interleaved."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
    if heads and config["model_type"] == "llama":
        x = x.reshape(config[heads], 2, -1, x.shape[1]).swapaxes(1, 2).reshape(x.shape)
    return np.ascontiguousarray(x)


@cache
def llama_api() -> Any:
    """llama.cpp's C functions, silent but for errors. Optional, so imported late."""
    import llama_cpp

    @llama_cpp.llama_log_callback
    def tell(level: int, text: bytes, data: object) -> None:
        if level == GGML_ERROR:
            sys.stderr.write(text.decode(errors="replace"))

    llama_cpp.intaglio_log = tell  # the C side holds no reference
    llama_cpp.llama_log_set(tell, None)
    llama_cpp.llama_backend_init()
    return llama_cpp


def _quantise_gguf(plain: Path, path: Path, kind: str, threads: int) -> None:
    llama_cpp = llama_api()
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = threads
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    aside = path.with_suffix(".new")
    if llama_cpp.llama_model_quantize(str(plain).encode(), str(aside).encode(), params):
        raise RuntimeError(f"llama.cpp could not quantise {plain} to {kind}")
    os.replace(aside, path)
