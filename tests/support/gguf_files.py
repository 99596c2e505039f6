"""Writes GGUF files of transformers checkpoints, in any GGUF type, as convert_hf_to_gguf.py does. Used by tests.

Names come from the gguf library's own map; rows are permuted, experts stacked, and 1 is added to Gemma's norms. A
second checkpoint holds the values that the GGUF file's tensors stand for."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from support import gguf_hybrids as hybrids

Values = dict[str, np.ndarray]
ARCHITECTURES = {  # model_type -> llama.cpp's
    "llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
    "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "gemma2": "gemma2", "gemma3_text": "gemma3", "phi3": "phi3",
    "phimoe": "phimoe", "granite": "granite", "granitemoe": "granitemoe", "olmo2": "olmo2", "olmo3": "olmo2",
    "olmoe": "olmoe", "cohere2": "cohere2", "smollm3": "smollm3", "glm4": "glm4", "glm4_moe": "glm4moe",
    "gpt_oss": "gpt-oss", "minimax_m2": "minimax-m2", "llama4_text": "llama4", "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2", "gemma": "gemma", "cohere": "command-r", "seed_oss": "seed_oss", "arcee": "arcee",
    "hunyuan_v1_dense": "hunyuan-dense", "ernie4_5": "ernie4_5", "exaone4": "exaone4", "nemotron": "nemotron",
    "starcoder2": "starcoder2", "dots1": "dots1", "ernie4_5_moe": "ernie4_5-moe", "olmo": "olmo", "gpt2": "gpt2",
    "gpt_bigcode": "starcoder", "gpt_neox": "gptneox", "falcon": "falcon", "phi": "phi2", "stablelm": "stablelm",
    "bloom": "bloom", "mpt": "mpt", "glm": "chatglm", "hunyuan_v1_moe": "hunyuan-moe", "afmoe": "afmoe",
    "minicpm3": "minicpm3", "lfm2": "lfm2", "lfm2_moe": "lfm2moe", "ministral3": "mistral3",
    "granitemoeshared": "granitemoe", "solar_open": "glm4moe", "glm4_moe_lite": "deepseek2", "youtu": "deepseek2",
    **hybrids.ARCHITECTURES,
}  # fmt: skip
USUAL = {  # Llama's name of a config key, by those of others
    "n_embd": "hidden_size", "d_model": "hidden_size", "n_layer": "num_hidden_layers", "n_layers": "num_hidden_layers",
    "n_head": "num_attention_heads", "n_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads",
    "n_positions": "max_position_embeddings", "max_seq_len": "max_position_embeddings",
    "seq_length": "max_position_embeddings", "layer_norm_epsilon": "layer_norm_eps", "moe_topk": "num_experts_per_tok",
}  # fmt: skip
PERMUTED = ("llama", "mistral3", "granite", "granitemoe", "granitehybrid", "smollm3", "arcee", "olmo")
FOURFOLD = ("gpt2", "gpt_bigcode", "falcon", "bloom", "mpt")  # whose inner width is four times the outer by default
WHOLE_QKV = ("gptneox", "bloom", "falcon")  # whose q, k and v converters put one after another
BLOCK_BYTES = {  # of 256 values (IQ4_NL: 32), where the f16 scales are; types that the library reads but does not write
    "Q2_K": (84, (80, 82)), "Q3_K": (110, (108,)), "Q4_K": (144, (0, 2)), "Q5_K": (176, (0, 2)), "Q6_K": (210, (208,)),
    "IQ4_NL": (18, (0,)), "IQ4_XS": (136, (0,)), "IQ3_S": (110, (0,)), "IQ3_XXS": (98, (0,)), "IQ2_XXS": (66, (0,)),
    "IQ2_XS": (74, (0,)), "IQ2_S": (82, (0,)), "IQ1_S": (50, (0,)), "IQ1_M": (56, ()),
}  # fmt: skip
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4", *BLOCK_BYTES)


def permuted(w: np.ndarray, heads: int) -> np.ndarray:
    """The order of rows that converters give q and k of llama, weights and biases."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def in_halves(w: np.ndarray, heads: int) -> np.ndarray:
    """And back."""
    halves = w.reshape(heads, w.shape[0] // heads // 2, 2, *w.shape[1:]).swapaxes(1, 2)
    return np.ascontiguousarray(halves.reshape(w.shape))


def encoded(w: np.ndarray, kind: str, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(blocks, the values they stand for) by the library; of types that it only reads, random blocks of about the size
    of `w`, some of them with a scale of 0."""
    import gguf

    type = gguf.GGMLQuantizationType[kind]
    if kind not in BLOCK_BYTES:
        blocks = gguf.quants.quantize(np.ascontiguousarray(w, np.float32), type)
        return blocks, np.asarray(gguf.quants.dequantize(blocks, type), np.float32).reshape(w.shape)
    size, scales = BLOCK_BYTES[kind]
    values = 32 if kind == "IQ4_NL" else 256
    blocks = draw.integers(0, 256, (w.size // values, size), dtype=np.uint8)
    sizes = draw.uniform(0.5, 1.5, len(blocks)) * draw.choice([1.0, 1.0, 1.0, -1.0, 0.0], len(blocks))

    def scaled(by: float) -> np.ndarray:
        for at in scales:
            blocks[:, at : at + 2] = (sizes * by).astype(np.float16)[:, None].view(np.uint8)
        if kind == "IQ1_M":  # four nibbles, each the high one of a word
            half = (np.abs(sizes) * by).astype(np.float16).view(np.uint16)
            for i in range(4):
                nibble = (half >> (4 * i) & 15).astype(np.uint8)
                blocks[:, 49 + 2 * i] = (blocks[:, 49 + 2 * i] & 15) | nibble << 4
        return np.asarray(gguf.quants.dequantize(blocks, type), np.float32)

    return _rows(w, (blocks, scaled(float(np.abs(w).mean() / np.abs(scaled(1.0)).mean()))), blocks)


def _rows(w: np.ndarray, pair: tuple[np.ndarray, np.ndarray], blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return blocks.reshape(*w.shape[:-1], -1), pair[1].reshape(w.shape)


def write(
    path: Path, folder: Path, kind: str | Callable[[str], str] = "F32", extra: Callable[[Any], None] | None = None,
    leave_out: tuple[str, ...] = (), seed: int = 2, named: str = "",
) -> tuple[Path, Path, Values]:  # fmt: skip
    """(a GGUF file of the checkpoint in `path`, a checkpoint of the values it holds, those values). `kind` is the type
    of matrices, or gives it by name; `extra` adds metadata; `leave_out` are keys not written; `named` is the
    architecture, if not that of the model_type."""
    import safetensors.numpy

    config = usual(json.loads((path / "config.json").read_text()))
    arrays = hybrids.prepared(safetensors.numpy.load_file(path / "model.safetensors"), architecture(config))
    folder.mkdir(exist_ok=True)
    plain = dict(arrays)
    for changed in write_file(folder / "model.gguf", config, arrays, kind, extra, leave_out, seed, named):
        plain |= changed
    shutil.copytree(path, folder / "plain")
    safetensors.numpy.save_file({n: x.copy(order="C") for n, x in plain.items()},
                                folder / "plain" / "model.safetensors", {"format": "pt"})  # fmt: skip
    return folder / "model.gguf", folder / "plain", plain


def write_file(
    file: Path, config: Mapping[str, Any], arrays: Values, kind: str | Callable[[str], str] = "F32",
    extra: Callable[[Any], None] | None = None, leave_out: tuple[str, ...] = (), seed: int = 2, named: str = "",
) -> Iterator[Values]:  # fmt: skip
    """Write a GGUF file of the tensors `arrays`, in float32, of a checkpoint with the config that usual() gives.

    Yields the checkpoint's tensors whose values the types of the file change, each with the values in the file. The
    file is complete when the iterator ends. Tensors wait in a temporary file, so `arrays` may read them one by one. The
    other arguments are those of write().
    """
    import gguf

    arch = architecture(config)
    w = gguf.GGUFWriter(file, named or arch, use_temp_file=True)
    for key, value in metadata(config, arch).items():
        if value is not None and key not in leave_out:
            _add(w, f"{named or arch}.{key}", value)
    for key, value in hybrids.added(config, arrays, arch).items():
        _add(w, key, value)
    if extra:
        extra(w)
    draw = np.random.default_rng(seed)
    names = gguf.get_tensor_name_map(
        next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == hybrids.NAMED_AS.get(arch, arch)),
        config["num_hidden_layers"],
    )
    for name, x, back in converted(arrays, config, arch):
        full = name if name.startswith(("rope_", "blk.")) else names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert full, name
        own = kind(full) if callable(kind) else kind
        plain_kind = "ffn_gate_inp" in full or "conv1d" in full or full.endswith(("norm.weight", ".bias"))
        if x.ndim < 2 or own == "F32" or plain_kind or not full.endswith("weight"):
            w.add_tensor(full, np.ascontiguousarray(x, np.float32))
            continue
        blocks, values = encoded(x, own, draw)
        w.add_tensor(full, blocks, raw_dtype=gguf.GGMLQuantizationType[own])
        yield back(values)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def architecture(c: Mapping[str, Any]) -> str:
    """llama.cpp's architecture for a config.json."""
    moe = c["model_type"] == "nemotron_h" and "moe" in c["layers_block_type"]
    return "nemotron_h_moe" if moe else ARCHITECTURES[c["model_type"]]


def usual(c: dict[str, Any]) -> dict[str, Any]:
    """The config with the keys that Llama has, and the inner width that older models leave out."""
    c = {**c, **{own: c[other] for other, own in USUAL.items() if c.get(other) is not None}}
    if c["model_type"] == "falcon" and not c["new_decoder_architecture"]:
        c["num_key_value_heads"] = 1 if c["multi_query"] else c["num_attention_heads"]
    if c["model_type"] == "gpt_bigcode":
        c["num_key_value_heads"] = 1
    if c["model_type"] in ("gpt2", "gpt_neox", "bloom", "mpt"):
        c["num_key_value_heads"] = None
    if c["model_type"] == "nemotron_h":
        c["num_hidden_layers"] = len(c["layers_block_type"])
    if c["model_type"] == "youtu":  # whose rows in tiny.py have keys of models with experts
        c |= dict.fromkeys(("n_routed_experts", "first_k_dense_replace", "n_shared_experts", "moe_intermediate_size"))
    if c["model_type"] in FOURFOLD:
        c["intermediate_size"] = c.get("ffn_hidden_size") or c.get("n_inner") or 4 * c["hidden_size"]
    return {"max_position_embeddings": 256} | {k: x for k, x in c.items() if x is not None}


def _add(w: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        w.add_bool(key, value)
    elif isinstance(value, list):
        w.add_array(key, value)
    elif isinstance(value, str):
        w.add_string(key, value)
    else:
        (w.add_float32 if isinstance(value, float) else w.add_uint32)(key, value)


def metadata(c: Mapping[str, Any], arch: str) -> dict[str, Any]:
    """What converters write, by keys of llama.cpp without the architecture; None: not written."""
    rope = c.get("rope_parameters") or {}
    sliding = rope.get("sliding_attention", {})
    rope = rope.get("full_attention", rope)
    kind = rope.get("rope_type", "default")
    head = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    experts = next((c[k] for k in ("num_local_experts", "num_experts", "n_routed_experts") if c.get(k)), None)
    pattern = [t == "sliding_attention" for t in c.get("layer_types") or []] or None
    out = {
        "block_count": c["num_hidden_layers"], "context_length": c["max_position_embeddings"],
        "embedding_length": c["hidden_size"], "feed_forward_length": c["intermediate_size"],
        "attention.head_count": c["num_attention_heads"], "attention.head_count_kv": c.get("num_key_value_heads"),
        "attention.key_length": c.get("head_dim"), "attention.value_length": c.get("head_dim"),
        "attention.layer_norm_rms_epsilon": c.get("rms_norm_eps"),
        "attention.layer_norm_epsilon": next(
            (c[k] for k in ("layer_norm_eps", "norm_eps", "norm_epsilon") if c.get(k)), None
        ), "rope.freq_base": float(rope.get("rope_theta", 1e4)),
        "rope.freq_base_swa": float(sliding["rope_theta"]) if sliding else None,
        "rope.scaling.type": kind if kind in ("linear", "yarn", "longrope") else None,
        "rope.scaling.factor": float(rope["factor"]) if kind in ("linear", "yarn") else None,
        "rope.scaling.original_context_length": rope.get("original_max_position_embeddings")
        if kind in ("yarn", "longrope")
        else None,
        "expert_count": experts, "expert_used_count": c.get("num_experts_per_tok") if experts else None,
        "expert_group_count": c.get("n_group"), "expert_group_used_count": c.get("topk_group"),
        "expert_feed_forward_length": c.get("moe_intermediate_size"),
        "rope.dimension_count": int(head * rope.get("partial_rotary_factor", 1.0)),
    }  # fmt: skip
    own: dict[str, Any] = {}
    match arch:
        case "gemma2":
            own = {"attn_logit_softcapping": c["attn_logit_softcapping"], "attention.sliding_window":
                   c["sliding_window"], "final_logit_softcapping": c["final_logit_softcapping"]}  # fmt: skip
        case "exaone4":
            own = {"attention.sliding_window": c["sliding_window"], "attention.sliding_window_pattern": pattern}
        case "command-r":
            own = {"logit_scale": c["logit_scale"], "rope.scaling.type": "none"}
        case "gemma3":
            own = {"attention.sliding_window": c["sliding_window"], "attention.sliding_window_pattern": pattern}
        case "granite" | "granitemoe":
            own = {"attention.scale": c["attention_multiplier"], "embedding_scale": c["embedding_multiplier"],
                   "residual_scale": c["residual_multiplier"], "logit_scale": c["logits_scaling"],
                   "expert_shared_feed_forward_length": c.get("shared_intermediate_size") or None}  # fmt: skip
        case "mistral3":
            own = {"rope.scaling.yarn_beta_fast": rope.get("beta_fast"), "attention.temperature_scale":
                   rope["llama_4_scaling_beta"], "rope.scaling.yarn_beta_slow": rope.get("beta_slow"),
                   "rope.scaling.yarn_log_multiplier": rope["mscale_all_dim"]}  # fmt: skip
        case "cohere2":
            own = {"logit_scale": c["logit_scale"], "attention.sliding_window": c["sliding_window"],
                   "rope.scaling.type": "none"}  # fmt: skip
        case "olmo2" if c.get("sliding_window"):
            own = {"attention.sliding_window": c["sliding_window"], "attention.sliding_window_pattern": pattern}
        case "phi3" | "phimoe":
            pretrained = c.get("original_max_position_embeddings") or c["max_position_embeddings"]
            factor = c["max_position_embeddings"] / pretrained
            heat = (1 + np.log(factor) / np.log(pretrained)) ** 0.5
            own = {"attention.sliding_window": c.get("sliding_window") or 0, "rope.scaling.attn_factor": float(heat),
                   "rope.scaling.original_context_length": pretrained}  # fmt: skip
            if kind != "longrope":
                own = {"attention.sliding_window": c.get("sliding_window") or 0}
        case "qwen2moe":
            own = {"expert_shared_feed_forward_length": c["shared_expert_intermediate_size"]}
        case "gpt-oss":
            own = {"attention.sliding_window": c["sliding_window"], "expert_feed_forward_length":
                   c["intermediate_size"], "rope.scaling.yarn_beta_fast": rope.get("beta_fast"),
                   "rope.scaling.yarn_beta_slow": rope.get("beta_slow")}  # fmt: skip
        case "llama4":
            own = {"feed_forward_length": c["intermediate_size_mlp"], "expert_feed_forward_length":
                   c["intermediate_size"], "interleave_moe_layer_step": c["interleave_moe_layer_step"]}  # fmt: skip
        case "minimax-m2":
            own = {"expert_feed_forward_length": c["intermediate_size"], "expert_gating_func": 2}
        case "olmo":
            own = {"attention.layer_norm_epsilon": 1e-5, "attention.clamp_kqv": c["clip_qkv"]}
        case "ernie4_5-moe":
            own = {"expert_count": c["moe_num_experts"], "expert_used_count": c["moe_k"]}
        case "glm4moe" | "dots1":
            own = {"expert_shared_count": c["n_shared_experts"], "leading_dense_block_count":
                   c["first_k_dense_replace"], "expert_gating_func": 2, "expert_weights_scale":
                   float(c["routed_scaling_factor"]), "expert_weights_norm": c["norm_topk_prob"]}  # fmt: skip
        case "deepseek2":
            own = _latent(c, rope)
        case "glm-dsa" | "deepseek32":
            own = _latent(c, rope) | hybrids.metadata(c, arch)
        case "gptneox" | "stablelm":
            own = {"use_parallel_residual": c["use_parallel_residual"]}
        case "mpt":
            clip = c["attn_config"].get("clip_qkv")
            own = {"attention.max_alibi_bias": 8.0, "attention.clamp_kqv": clip, "attention.layer_norm_epsilon": 1e-5}
        case "hunyuan-moe":
            own = {"expert_feed_forward_length": c["intermediate_size"],
                   "expert_shared_feed_forward_length": c["intermediate_size"]}  # fmt: skip
        case "afmoe":
            own = {"expert_shared_count": c["num_shared_experts"], "leading_dense_block_count": c["num_dense_layers"],
                   "expert_weights_norm": True, "expert_weights_scale": float(c["route_scale"]),
                   "attention.sliding_window": c["sliding_window"]}  # fmt: skip
        case "lfm2" | "lfm2moe":
            kinds = c["layer_types"]
            own = {"attention.head_count_kv": [c["num_key_value_heads"] * (k != "conv") for k in kinds],
                   "attention.layer_norm_rms_epsilon": c["norm_eps"], "attention.layer_norm_epsilon": None,
                   "shortconv.l_cache": c["conv_L_cache"], "leading_dense_block_count": c.get("num_dense_layers"),
                   "expert_gating_func": 2 if experts else None}  # fmt: skip
        case "minicpm3":
            own = {"attention.q_lora_rank": c["q_lora_rank"], "attention.kv_lora_rank": c["kv_lora_rank"],
                   "attention.key_length": c["qk_nope_head_dim"] + c["qk_rope_head_dim"],
                   "attention.value_length": None, "rope.dimension_count": c["qk_rope_head_dim"]}  # fmt: skip
        case _:
            own = hybrids.metadata(c, arch)
    return out | own


def _latent(c: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    heat, third = rope.get("mscale_all_dim"), c["model_type"] != "deepseek_v2"
    experts = c.get("n_routed_experts")
    rank, turned = c["kv_lora_rank"], c["qk_rope_head_dim"]
    return {
        "attention.head_count_kv": 1, "attention.q_lora_rank": c.get("q_lora_rank"), "attention.kv_lora_rank": rank,
        "attention.key_length": rank + turned, "attention.value_length": rank, "rope.dimension_count": turned,
        "attention.key_length_mla": c["qk_nope_head_dim"] + turned, "attention.value_length_mla": c["v_head_dim"],
        "leading_dense_block_count": c.get("first_k_dense_replace", c["num_hidden_layers"]),
        "expert_shared_count": c.get("n_shared_experts", 0),
        "expert_weights_scale": float(c["routed_scaling_factor"]) if experts else None,
        "expert_gating_func": 2 if third and experts else None,
        "expert_weights_norm": bool(c.get("norm_topk_prob")) if third and experts else None,
        "expert_feed_forward_length": c.get("moe_intermediate_size") or c["intermediate_size"],
        "rope.scaling.yarn_log_multiplier": 0.1 * heat if heat else None,
    }  # fmt: skip


Converted = tuple[str, np.ndarray, Callable[[np.ndarray], Values]]


def converted(arrays: Values, c: Mapping[str, Any], arch: str) -> Iterator[Converted]:
    """(name, values, how values under that name become those of the checkpoint) of each tensor a file has."""
    yield from _rope_factors(c)
    yield from hybrids.rope_factors(c, arch)
    stacks: dict[str, list[tuple[int, str]]] = {}
    for name, x in arrays.items():
        if (own := hybrids.special(name, x, c, arch)) is not None:
            yield from own
            continue
        heads = {"q_proj": c["num_attention_heads"], "k_proj": c.get("num_key_value_heads")}.get(name.split(".")[-2])
        numbered = re.fullmatch(r"(.*experts)\.(\d+)\.(\w+)\.weight", name)
        streams = re.fullmatch(r"(model\.altup_\w+)\.(\d+)\.weight", name)
        if numbered:
            stacks.setdefault(f"{numbered[1]}.{numbered[3]}.weight", []).append((int(numbered[2]), name))
        elif streams:
            stacks.setdefault(f"{streams[1]}.weight", []).append((int(streams[2]), name))
        elif heads and arch in PERMUTED:
            yield name, permuted(x, heads), lambda y, n=name, h=heads: {n: in_halves(y, h)}
        elif arch in hybrids.SHIFTED and name.endswith("norm.weight"):
            yield name, x + np.float32(1), lambda y, n=name: {n: y - np.float32(1)}
        elif "kv_b_proj" in name and arch in ("deepseek2", "glm-dsa", "deepseek32"):
            yield from _latent_halves(name, x, c)
        elif "experts." in name and "shared" not in name:
            yield from _fused(name, x, arch)
        elif "input_linear" in name:
            for i, (n, part) in enumerate(zip(("gate_proj", "up_proj"), np.split(x, 2, axis=1), strict=True)):
                at = name.replace("block_sparse_moe.input_linear", f"mlp.experts.{n}")
                yield at, part, lambda y, name=name, i=i: _into(arrays, name, np.split(arrays[name], 2, axis=1), i, y)
        elif name.endswith("shared_expert_gate.weight"):
            yield name, x[0], lambda y, n=name: {n: y[None]}
        elif arch in WHOLE_QKV and "query_key_value" in name:
            full = name.removeprefix("transformer.") if arch == "bloom" else name
            yield full, grouped(x, c), lambda y, n=name: {n: ungrouped(y, c)}
        elif name.endswith("conv.conv.weight"):
            yield name, x[:, 0], lambda y, n=name: {n: y[:, None]}
        elif arch == "gpt2" and ".c_" in name and x.ndim == 2:
            yield name, np.ascontiguousarray(x.T), lambda y, n=name: {n: np.ascontiguousarray(y.T)}
        else:
            full = name + ".weight" if name.endswith("sinks") else name
            if name.endswith("expert_bias") and arch != "hy_v3":
                full = name + ".bias"
            if arch == "bloom":
                full = name.removeprefix("transformer.")
            if name.endswith("e_score_correction_bias"):
                full = name.replace("_bias", ".bias")
            yield full, x, lambda y, n=name: {n: y}
    for name, parts in stacks.items():
        own = [n for _, n in sorted(parts)]
        name = name.removeprefix("model.") if arch == "lfm2moe" else name.replace("feed_forward.experts", "mlp.experts")
        name = re.sub(r"\w+(\.layers\.\d+)\.mixer\.experts", r"model\1.mlp.experts", name)
        yield name, np.stack([arrays[n] for n in own]), lambda y, own=own: dict(zip(own, y, strict=True))


def grouped(x: np.ndarray, c: Mapping[str, Any]) -> np.ndarray:
    """Rows of queries, then of keys, then of values, where transformers has them group of heads by group of heads."""
    kv = c.get("num_key_value_heads") or c["num_attention_heads"]
    each = x.reshape(kv, c["num_attention_heads"] // kv + 2, -1, *x.shape[1:])
    parts = [each[:, :-2], each[:, -2], each[:, -1]]
    return np.concatenate([p.reshape(-1, *x.shape[1:]) for p in parts])


def ungrouped(x: np.ndarray, c: Mapping[str, Any]) -> np.ndarray:
    """And back."""
    rows = np.arange(len(x)).astype(np.float32)
    return np.ascontiguousarray(x[np.argsort(grouped(rows, c))])


def _into(arrays: Values, name: str, halves: list[np.ndarray], i: int, y: np.ndarray) -> Values:
    halves = [h.copy() for h in halves]
    halves[i] = y
    arrays[name] = np.concatenate(halves, axis=1)
    return {name: arrays[name]}


def _fused(name: str, x: np.ndarray, arch: str) -> Iterator[Converted]:
    """Experts that transformers keeps as one tensor, turned (gpt-oss, Llama 4) or not."""
    turned, every = arch in ("gpt-oss", "llama4"), arch == "gpt-oss"
    bias = name.endswith("_bias")
    end = ".bias" if bias else ".weight"
    own = x if bias or not turned else x.swapaxes(1, 2)

    def back(y: np.ndarray) -> np.ndarray:
        return y if bias or not turned else np.ascontiguousarray(y.swapaxes(1, 2))

    base = name.removesuffix(".weight").removesuffix("_bias")
    if "gate_up_proj" not in base:
        yield base + end, own, lambda y: {name: back(y)}
        return
    half = own.shape[1] // 2
    rows = [slice(0, None, 2), slice(1, None, 2)] if every else [slice(0, half), slice(half, None)]
    whole = own.copy()
    for n, part in zip(("gate_proj", "up_proj"), rows, strict=True):

        def join(y: np.ndarray, part: slice = part) -> Values:
            whole[:, part] = y
            return {name: back(whole)}

        yield base.replace("gate_up_proj", n) + end, np.ascontiguousarray(own[:, part]), join


def _latent_halves(name: str, x: np.ndarray, c: Mapping[str, Any]) -> Iterator[Converted]:
    heads, nope, value = c["num_attention_heads"], c["qk_nope_head_dim"], c["v_head_dim"]
    both = x.reshape(heads, nope + value, -1).copy()

    def keys(y: np.ndarray) -> Values:
        both[:, :nope] = y.swapaxes(1, 2)
        return {name: both.reshape(x.shape)}

    def values(y: np.ndarray) -> Values:
        both[:, nope:] = y
        return {name: both.reshape(x.shape)}

    yield name.replace("kv_b", "k_b"), np.ascontiguousarray(both[:, :nope].swapaxes(1, 2)), keys
    yield name.replace("kv_b", "v_b"), np.ascontiguousarray(both[:, nope:]), values


def _rope_factors(c: Mapping[str, Any]) -> Iterator[Converted]:
    rope = c.get("rope_parameters") or {}
    if rope.get("rope_type") == "longrope":
        for n in ("long", "short"):
            yield f"rope_factors_{n}.weight", np.array(rope[f"{n}_factor"], np.float32), lambda y: {}
    if rope.get("rope_type") != "llama3":
        return
    dim = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    waves = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, dim, 2) / dim)
    low, high, length = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    smooth = np.clip((length / waves - low) / (high - low), 0, 1)
    factors = 1 / ((1 - smooth) / rope["factor"] + smooth)
    yield "rope_freqs.weight", factors.astype(np.float32), lambda y: {}
