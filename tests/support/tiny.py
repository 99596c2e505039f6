"""Tiny random checkpoints of every ported family, built by transformers, and the comparison of a device against it.

Not a test: tests import it. Weights are shaken so that no norm is all ones, no bias zero and no attention flat.
"""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from support.families import MORE
from support.recurrent import LATENT, MSCALE, RECURRENT, ROPE, YARN

VOCABULARY = 263  # odd, prime, and room for 256 bytes and the special tokens
SPECIALS = ("<pad>", "<bos>", "<eos>", "<user>", "<assistant>")  # ids 256..260
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 256,
    "bos_token_id": 257,
    "eos_token_id": 258,
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
    "short_factor": [1.0 + 0.05 * i for i in range(6)], "long_factor": [1.5 + 0.7 * i for i in range(6)],
}  # fmt: skip
THREE_TO_ONE = ["sliding_attention"] * 3 + ["full_attention"]

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"class": "Llama", "rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True},
    "mistral": {"class": "Mistral", "sliding_window": 24, "head_dim": 24},
    "qwen2": {"class": "Qwen2", "tie_word_embeddings": True},
    "qwen3": {"class": "Qwen3", "head_dim": 32},
    "phi3": {"class": "Phi3", "rope_parameters": LONGROPE, "original_max_position_embeddings": 32},
    "gemma2": {
        "class": "Gemma2", "head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 20,
        "attn_logit_softcapping": 4.0, "final_logit_softcapping": 20.0,
    },
    "gemma3": {
        "class": "Gemma3", "config": "Gemma3TextConfig", "head_dim": 32, "query_pre_attn_scalar": 24,
        "sliding_window": 20, "layer_types": THREE_TO_ONE,
    },
    "olmo2": {"class": "Olmo2"},
    "olmo3": {
        "class": "Olmo3", "sliding_window": 20,
        "rope_parameters": {"full_attention": YARN, "sliding_attention": {**ROPE, "rope_theta": 500000.0}},
    },
    "granite": {
        "class": "Granite", "embedding_multiplier": 6.0, "residual_multiplier": 0.22, "attention_multiplier": 0.3,
        "logits_scaling": 8.0, "tie_word_embeddings": True,
    },
    "cohere2": {"class": "Cohere2", "sliding_window": 20, "logit_scale": 0.25},
    "smollm3": {"class": "SmolLM3", "use_sliding_window": True, "sliding_window": 20},
    "glm4": {"class": "Glm4", "head_dim": 24, "partial_rotary_factor": 0.5},
}  # fmt: skip
# Those with experts, and mostly with attention of their own.
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"class": "Mixtral", "num_local_experts": 6, "sliding_window": 24},
    "qwen2moe": {
        "class": "Qwen2Moe", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 72, "mlp_only_layers": [2],
    },
    "qwen3moe": {
        "class": "Qwen3Moe", "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "head_dim": 32,
        "norm_topk_prob": True, "decoder_sparse_step": 2,
    },
    "olmoe": {"class": "Olmoe", "num_experts": 8, "num_experts_per_tok": 3},
    "granitemoe": {
        "class": "GraniteMoe", "embedding_multiplier": 6.0, "residual_multiplier": 0.22, "attention_multiplier": 0.3,
        "logits_scaling": 8.0, "num_local_experts": 6, "num_experts_per_tok": 2,
    },
    "gptoss": {
        "class": "GptOss", "num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 24, "sliding_window": 20,
        "rope_parameters": {**YARN, "truncate": False}, "swiglu_limit": 1.5,
    },
    "deepseekv2": {
        "class": "DeepseekV2", **LATENT, "q_lora_rank": None, "topk_method": "group_limited_greedy", "n_group": 4,
        "topk_group": 2, "routed_scaling_factor": 1.7, "rope_parameters": MSCALE,
    },
    "deepseekv3": {
        "class": "DeepseekV3", **LATENT, "q_lora_rank": 36, "n_group": 2, "topk_group": 1, "attention_bias": True,
        "rope_parameters": MSCALE,
    },
    "kimik2": {"class": "DeepseekV3", **LATENT, "q_lora_rank": 36, "n_group": 1, "topk_group": 1},
    "glm4moe": {
        "class": "Glm4Moe", "head_dim": 24, "moe_intermediate_size": 48, "n_routed_experts": 8,
        "num_experts_per_tok": 3, "use_qk_norm": True, "attention_bias": True, "n_group": 2, "topk_group": 2,
    },
    "llama4": {
        "class": "Llama4", "config": "Llama4TextConfig", "head_dim": 24, "num_local_experts": 4,
        "intermediate_size_mlp": 88, "interleave_moe_layer_step": 2, "attention_chunk_size": 16, "floor_scale": 8,
        "attn_scale": 0.4, "rope_parameters": LLAMA3,
    },
    "minimaxm2": {
        "class": "MiniMaxM2", "head_dim": 24, "num_local_experts": 8, "num_experts_per_tok": 3,
        "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5},
    },
    "phimoe": {
        "class": "Phimoe", "num_local_experts": 6, "lm_head_bias": True, "attention_bias": True,
        "router_jitter_noise": 0.3, "sliding_window": None,
    },
}  # fmt: skip
# Those that test_more_ports.py holds to transformers, on the host alone: whole, in chunks, decoding, and sharded.
ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "first_k_dense_replace": 1}
OTHERS: dict[str, dict[str, Any]] = {
    "ernie4_5": {"class": "Ernie4_5", "head_dim": 24, "use_bias": True},
    "ernie4_5_moe": {
        "class": "Ernie4_5_Moe", "moe_num_experts": 8, "moe_k": 3, "moe_intermediate_size": 48, "use_bias": True,
        "moe_num_shared_experts": 2, "moe_layer_end_index": 2,
    },
    "seed_oss": {"class": "SeedOss", "head_dim": 24, "attention_out_bias": True, "mlp_bias": True},
    "exaone4": {"class": "Exaone4", "sliding_window": 20},
    "exaone_moe": {
        "class": "ExaoneMoe", "sliding_window": 20, "num_experts": 8, "num_experts_per_tok": 3,
        "moe_intermediate_size": 48, "n_group": 2, "topk_group": 1,
    },
    "hunyuan_dense": {
        "class": "HunYuanDenseV1", "head_dim": 24, "attention_bias": True,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 1.0, "alpha": 50.0},
    },
    "hunyuan_moe": {"class": "HunYuanMoEV1", "head_dim": 24, "num_experts": 8, "moe_topk": 3},
    "helium": {"class": "Helium", "head_dim": 16, "num_key_value_heads": 4},
    "dots1": {"class": "Dots1", **ROUTED, "n_shared_experts": 2, "sliding_window": 20, "max_window_layers": 2},
    "nemotron": {"class": "Nemotron", "head_dim": 24, "attention_bias": True, "mlp_bias": True},
    "arcee": {"class": "Arcee", "head_dim": 24, "rope_parameters": LLAMA3},
    "jais2": {"class": "Jais2", "head_dim": 24},
    "gemma": {"class": "Gemma", "head_dim": 24, "num_key_value_heads": 1},
    "vaultgemma": {
        "class": "VaultGemma", "head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 20,
        "attn_logit_softcapping": 4.0, "final_logit_softcapping": 20.0,
    },
    "glm": {"class": "Glm", "head_dim": 24, "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}},
    "solar_open": {"class": "SolarOpen", **ROUTED, "head_dim": 24, "attention_bias": True},
    "glm4_moe_lite": {"class": "Glm4MoeLite", **LATENT, "q_lora_rank": 36},
    # tied, transformers 5.24 draws its embeddings anew when it loads them
    "youtu": {"class": "Youtu", **LATENT, "q_lora_rank": 36, "attention_bias": True, "tie_word_embeddings": False},
    "olmo": {"class": "Olmo", "clip_qkv": 0.9, "attention_bias": True},
    "flex_olmo": {"class": "FlexOlmo", "num_experts": 6, "num_experts_per_tok": 3},
    "cohere": {"class": "Cohere", "logit_scale": 0.25, "attention_bias": True},
    "cwm": {"class": "Cwm", "head_dim": 24, "sliding_window": 20},
    "hyperclovax": {
        "class": "HyperCLOVAX", "embedding_multiplier": 6.0, "residual_multiplier": 0.22, "attention_multiplier": 0.3,
        "logits_scaling": 0.125,
    },
    "granitemoeshared": {
        "class": "GraniteMoeShared", "embedding_multiplier": 6.0, "residual_multiplier": 0.22,
        "attention_multiplier": 0.3, "logits_scaling": 8.0, "num_local_experts": 6, "shared_intermediate_size": 72,
    },
    "phi": {"class": "Phi", "num_key_value_heads": 4, "qk_layernorm": True},
    "starcoder2": {"class": "Starcoder2", "sliding_window": 20},
    "stablelm": {
        "class": "StableLm", "use_qkv_bias": True, "rope_parameters": {**ROPE, "partial_rotary_factor": 0.25}
    },
    "stablelm_parallel": {"class": "StableLm", "use_parallel_residual": True},
    "persimmon": {"class": "Persimmon"},
    "gpt_neox": {"class": "GPTNeoX"},
    "gpt_neox_sequential": {"class": "GPTNeoX", "use_parallel_residual": False, "attention_bias": False},
    "gpt2": {"class": "GPT2LMHeadModel", "config": "GPT2Config", "scale_attn_by_inverse_layer_idx": True},
    "gpt_bigcode": {"class": "GPTBigCode"},
    "gpt_bigcode_heads": {"class": "GPTBigCode", "multi_query": False},
    "gpt_neo": {"class": "GPTNeo", "attention_types": [[["global", "local"], 2]], "window_size": 20},
    "gptj": {"class": "GPTJ", "rotary_dim": 12},
    "codegen": {"class": "CodeGen", "rotary_dim": 12},
    "opt": {"class": "OPT", "ffn_dim": 96, "word_embed_proj_dim": 64},
    "biogpt": {"class": "BioGpt"},
    "falcon": {"class": "Falcon"},
    "falcon_new": {"class": "Falcon", "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
    "falcon_sequential": {"class": "Falcon", "parallel_attn": False, "multi_query": False},
    "nanochat": {"class": "NanoChat"},
    "ministral": {"class": "Ministral", "head_dim": 24, "sliding_window": 20, "layer_types": THREE_TO_ONE},
    "afmoe": {
        "class": "Afmoe", "head_dim": 24, "moe_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 3,
        "sliding_window": 20, "mup_enabled": True, "route_scale": 1.7,
    },
    "hy_v3": {
        "class": "HYV3", "head_dim": 24, "moe_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 3,
    },
    "mellum": {
        "class": "Mellum", "head_dim": 24, "moe_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 3,
        "sliding_window": 20, "layer_types": THREE_TO_ONE, "mlp_layer_types": ["dense"] + ["sparse"] * 3,
    },
    "flint": {
        "class": "Flint", "head_dim": 24, "moe_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 3,
        "sliding_window": 20, "shared_expert_intermediate_size": 72,
    },
    "granite_swa": {
        "class": "GraniteSWA", "embedding_multiplier": 6.0, "residual_multiplier": 0.22, "attention_multiplier": 0.3,
        "logits_scaling": 8.0, "sliding_window": 20, "layer_rope_theta": [0, 10000.0, 10000.0, 50000.0],
    },
    "granitemoe_swa": {
        "class": "GraniteMoeSWA", "embedding_multiplier": 6.0, "residual_multiplier": 0.22,
        "attention_multiplier": 0.3, "logits_scaling": 8.0, "num_local_experts": 6, "shared_intermediate_size": 72,
        "sliding_window": 20,
    },
}  # fmt: skip
OTHERS |= MORE
_built: dict[str, Path] = {}
_placed: dict[Path, str] = {}

CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<' + message['role'] + '>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def tiny(family: str, path: str | Path, dtype: str = "float32", **overrides: Any) -> Path:
    """A checkpoint of `family`, with config keys overridden, in the folder `path`.

    It has a byte-level tokenizer if the vocabulary is large enough. Built once per session for each set of arguments,
    then copied.
    """
    path = Path(path)
    key = json.dumps([family, dtype, overrides], sort_keys=True)
    if _placed.get(path) == key and (path / "config.json").exists():
        return path  # as it stands: a file that is mapped must not be written again
    _placed[path] = key
    if key in _built and (_built[key] / "config.json").exists():
        shutil.copytree(_built[key], path, dirs_exist_ok=True)
        return path
    build(family, path, dtype, overrides)
    _built[key] = path.parent / f".{path.name}.built"
    shutil.copytree(path, _built[key], dirs_exist_ok=True)
    return path


def build(family: str, path: Path, dtype: str, overrides: dict[str, Any]) -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    table = {**BASE, **(FAMILIES | MIXTURES | OTHERS | RECURRENT)[family], **overrides}
    name = table.pop("class")
    shards = table.pop("max_shard_size", "5GB")
    config = getattr(transformers, table.pop("config", f"{name}Config"))(**json.loads(json.dumps(table)))
    torch.manual_seed(seed := zlib.crc32(family.encode()))  # for what shake() adds to, such as the rates of a decay
    model = getattr(transformers, architecture(name))(config)
    shake(model, seed)
    model.to(getattr(torch, dtype)).save_pretrained(path, max_shard_size=shards)
    if config.vocab_size >= 256 + len(SPECIALS):
        tokenizer(path)


def architecture(name: str) -> str:
    """The class of transformers that a row's `class` names."""
    whole = name.endswith(("Model", "ForConditionalGeneration")) or name == "BertGenerationDecoder"
    return name if whole else f"{name}ForCausalLM"


def drawn(path: str | Path, draw: np.random.Generator, vocabulary: int, count: int) -> list[int]:
    """Random token ids without that of padding, which some models of transformers hide or give no position."""
    pad = json.loads((Path(path) / "config.json").read_text()).get("pad_token_id")
    return [int(x) + (x == pad) for x in draw.integers(0, vocabulary - 1, count)]


def shake(model: Any, seed: int) -> None:
    """Random weights of a trained model's magnitude: products of unit results, norms about 1 or 0, biases about 0.2."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for listed in (b for name, b in model.named_buffers() if name.endswith("tid2eid")):  # distinct experts by token
            each = torch.rand(len(listed), model.config.n_routed_experts, generator=draw).argsort(1)
            listed.copy_(each[:, : listed.shape[1]])
        kept = [(name, b) for name, b in model.named_buffers() if name.endswith(("correction_bias", "layer_scalar"))]
        for name, p in (*model.named_parameters(), *kept):
            if not p.requires_grad and p.dim() == 2 and not name.endswith("correction_bias"):
                continue  # a table of sinusoids
            noise = torch.randn(p.shape, generator=draw)
            turned = type(model).__name__ in ("GptOssForCausalLM", "Llama4ForCausalLM")  # these keep experts as [K, N]
            if p.dim() == 3:
                p.copy_(noise * 1.3 / p.shape[1 if turned else 2] ** 0.5)
            elif name.endswith("bias"):
                p.copy_(0.2 * noise)
            elif p.dim() == 2:
                gain = 0.4 if "adapter" in name else 1.3  # an adapter changes a result by less than it is
                p.copy_(noise * (0.5 if "embed" in name else gain / p.shape[1] ** 0.5))
            elif name.endswith("sinks"):
                p.copy_(noise + 1)
            else:
                p.copy_(p + 0.3 * noise)


def tokenizer(path: str | Path) -> Path:
    """A byte-level tokenizer in `path`: ids 0..255 are bytes, SPECIALS follow; with a chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    t = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    t.decoder = decoders.ByteLevel()
    t.add_special_tokens([AddedToken(s, special=True) for s in SPECIALS])
    t.save(str(path / "tokenizer.json"))
    table = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>",
        "chat_template": CHAT, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    (path / "tokenizer_config.json").write_text(json.dumps(table))
    (path / "generation_config.json").write_text(json.dumps({"bos_token_id": 257, "eos_token_id": [258]}))
    return path


def error(ours: np.ndarray, wanted: np.ndarray) -> float:
    """max |ours - wanted| / max |wanted|; infinite if ours has NaN."""
    gap = float(np.abs(ours - wanted).max() / np.abs(wanted).max())
    return gap if np.isfinite(gap) else float("inf")


def truth(path: str | Path, tokens: list[int]) -> np.ndarray:
    """Logits float32 [tokens, vocabulary] by transformers: eager attention, float32, one pass without a cache."""
    import torch

    from intaglio.debugging.check import reference_model

    torch.set_num_threads(1)
    model = reference_model(path)
    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0].float().numpy()


def compare_sharded(path: str | Path, limit: float, tokens: int = 24) -> None:
    """Assert that logits of sharded Programs (tp2, pp2, and ep2 if there are experts) are within `limit` of truth()."""
    from intaglio.batch import Chunk, bind
    from intaglio.compiler import build_mesh
    from intaglio.devices import MeshDevice, StateSpec, StepRequest, open_device
    from intaglio.models import Checkpoint, port

    checkpoint = Checkpoint.open(path)
    program = port(checkpoint)
    ids = drawn(path, np.random.default_rng(3), program.vocabulary, tokens)
    wanted, state = truth(path, ids), StateSpec(4, 16, 2 * program.recurrent)
    experts = any(op.kind == "experts" for op in program.ops)
    for layout in ("tp2", "pp2", *(["ep2"] if experts else [])):
        mesh = MeshDevice(open_device("host")).load(build_mesh(program, layout), checkpoint, state)
        chunk = Chunk(ids, 0, [2, 1], range(tokens), state=state.pair(0, 0))
        got = mesh.step(StepRequest(bind([chunk], 16), logits=True)).logits
        assert got is not None and error(got, wanted) < limit, layout


def compare(
    path: str | Path,
    device: str = "reference",
    weights: str | None = None,
    program: Any = None,
    *,
    prompt: int = 48,
    steps: int = 32,
    seed: int = 0,
    context: int | None = None,
) -> dict[str, float]:
    """Errors of `device` against transformers, by way of running: the prompt at once, in random chunks (beside a
    decoding stranger), and `steps` forced decode steps. Runs `program` (default: the port's) as it is, or compiled to
    `weights` ("auto", "int8", ...) if given."""
    from intaglio.batch import Chunk, bind
    from intaglio.compiler import build as compiled
    from intaglio.devices import StateSpec, StepRequest, open_device
    from intaglio.models import Checkpoint, port

    checkpoint = Checkpoint.open(path)
    rows = checkpoint.config.get("max_position_embeddings")  # some models have fewer positions than that
    program = program or port(checkpoint, context or (rows and rows - 2))
    program = compiled(program, weights) if weights else program
    draw = np.random.default_rng(seed)
    tokens, stranger = (drawn(path, draw, program.vocabulary, prompt + steps) for _ in range(2))
    wanted = truth(path, tokens)
    page, each = 16, -(-(prompt + steps) // 16)
    state = StateSpec(3 * each + 1, page, 6 * program.recurrent)
    ex = open_device(device).load(program, checkpoint, state)
    blocks = [[int(x) for x in part] for part in (1 + draw.permutation(3 * each)).reshape(3, each)]

    def run(*chunks: Chunk) -> np.ndarray:
        got = ex.step(StepRequest(bind(chunks, page), logits=True)).logits
        assert got is not None
        return got

    out = {
        "prefill": error(
            run(Chunk(tokens[:prompt], 0, blocks[0], range(prompt), state=state.pair(0, 0))), wanted[:prompt]
        )
    }
    at, rows = 0, list[np.ndarray]()
    while at < prompt:
        n = min(int(draw.integers(1, 12)), prompt - at)
        beside = Chunk(stranger[at : at + n], at, blocks[2], [n - 1], state=state.pair(2, len(rows)))
        mine = Chunk(tokens[at : at + n], at, blocks[1], range(n), state=state.pair(1, len(rows)))
        rows.append(run(beside, mine)[1:])
        at += n
    out["chunked"] = error(np.concatenate(rows), wanted[:prompt])
    if steps:
        decoded = [
            run(Chunk([tokens[i]], i, blocks[0], [0], state=state.pair(0, i - prompt + 1)))
            for i in range(prompt, prompt + steps)
        ]
        out["decode"] = error(np.concatenate(decoded), wanted[prompt:])
    return out
