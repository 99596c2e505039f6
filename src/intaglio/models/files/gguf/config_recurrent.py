"""Converts the metadata of a GGUF file to the keys of config.json, for models with recurrent blocks, by family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from intaglio.models.config import PortError
from intaglio.models.files.gguf.config import SIGMOID, base, experts, first_with, partial, rows, whole_heads
from intaglio.models.files.gguf.metadata import Metadata


def alone(m: Metadata, model: str) -> dict[str, Any]:
    """The keys of config.json for a model that consists only of Mamba or Mamba-2 blocks, as a dict.

    model: value of the key `architectures`. Raises CheckpointError for a missing key.
    """
    return {
        "architectures": [model], "llama_names": True, "vocab_size": m.tables.shape("model.embed_tokens.weight")[0],
        "hidden_size": m.hidden, "num_hidden_layers": m.layers, "max_position_embeddings": m.whole("context_length"),
        "layer_norm_epsilon": m.real("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "lm_head.weight" not in m.tables.names, "state_size": m.whole("ssm.state_size"),
        "conv_kernel": m.whole("ssm.conv_kernel"), "expand": m.whole("ssm.inner_size") / m.hidden,
        "use_conv_bias": m.has("mixer.conv1d.bias"), "use_bias": m.has("mixer.in_proj.bias"),
    }  # fmt: skip


def mamba(m: Metadata) -> dict[str, Any]:
    """The config.json of Mamba or FalconMamba as a dict, made from the metadata `m` of a GGUF file.

    The model is FalconMamba if the file says that dt, B and C are normed. These norms get the epsilon of the layers'
    norms; llama.cpp does the same. Raises CheckpointError for a missing key, PortError for a value that is not
    supported.
    """
    normed = m.flag("ssm.dt_b_c_rms")
    c = alone(m, "FalconMambaForCausalLM" if normed else "MambaForCausalLM")
    return c | {
        "intermediate_size": m.whole("ssm.inner_size"), "time_step_rank": m.whole("ssm.time_step_rank"),
        "mixer_rms_eps": c["layer_norm_epsilon"],
    }  # fmt: skip


def mamba2(m: Metadata) -> dict[str, Any]:
    """The config.json of Mamba-2 as a dict, made from the metadata `m` of a GGUF file.

    The dict has no key time_step_limit, so the step size dt is not clamped. llama.cpp does the same. Raises
    CheckpointError for a missing key, PortError for a value that is not supported.
    """
    heads = m.whole("ssm.time_step_rank")
    return alone(m, "Mamba2ForCausalLM") | {
        "num_heads": heads, "head_dim": m.whole("ssm.inner_size") // heads, "n_groups": m.whole("ssm.group_count", 1),
    }  # fmt: skip


def periodic(m: Metadata, found: Sequence[int], what: str) -> tuple[int, int]:
    """Returns two ints (period, offset): the layers `found` are exactly the layers i with i % period == offset.

    In a model of n layers, the pair is (n + 1, n) if `found` is empty, and (n + 1, number of the layer) if `found` has
    only one layer. Raises PortError if there is no such pair.

    Args:
        m: the metadata, which has the number of layers.
        found: numbers of the layers, ascending.
        what: what these layers have, for the error message.
    """
    offset = found[0] if found else m.layers
    period = found[1] - offset if len(found) > 1 else m.layers + 1
    if [i for i in range(m.layers) if i % period == offset] != list(found):
        raise PortError(f"{m.file.path}: layers {list(found)} have {what}; wanted every n-th layer")
    return period, offset


def jamba(m: Metadata) -> dict[str, Any]:
    """The config.json of Jamba as a dict, made from the metadata `m` of a GGUF file.

    A layer has attention if it has K/V heads, and experts if the file has a router for it. Raises CheckpointError for a
    missing key. Raises PortError unless the layers with attention repeat with a fixed period, and the layers with
    experts too.
    """
    attention = periodic(m, [i for i, n in enumerate(m.kv_heads_by_layer) if n], "attention")
    mixed = [i for i in range(m.layers) if m.has("feed_forward.router.weight", i)]
    sparse = periodic(m, mixed, "experts")
    return base(m) | (experts(m) if mixed else {"num_experts": 1}) | {
        "architectures": ["JambaForCausalLM"], "attn_layer_period": attention[0], "attn_layer_offset": attention[1],
        "expert_layer_period": sparse[0], "expert_layer_offset": sparse[1], "mamba_d_state": m.whole("ssm.state_size"),
        "mamba_d_conv": m.whole("ssm.conv_kernel"), "mamba_dt_rank": m.whole("ssm.time_step_rank"),
        "mamba_expand": m.whole("ssm.inner_size") / m.hidden, "mamba_conv_bias": _has(m, "mamba.conv1d.bias"),
        "mamba_proj_bias": _has(m, "mamba.in_proj.bias"),
    }  # fmt: skip


def _has(m: Metadata, name: str) -> bool:
    return first_with(m, name) is not None


def ssm(m: Metadata) -> dict[str, Any]:
    """The keys of config.json for the Mamba-2 blocks of a model that also has attention, as a dict.

    They have the names that Granite 4 and Falcon-H1 use. Raises CheckpointError for a missing key.
    """
    inner, heads = m.whole("ssm.inner_size"), m.whole("ssm.time_step_rank")
    return {
        "mamba_n_heads": heads, "mamba_d_head": inner // heads, "mamba_n_groups": m.whole("ssm.group_count", 1),
        "mamba_d_state": m.whole("ssm.state_size"), "mamba_d_conv": m.whole("ssm.conv_kernel"),
        "mamba_d_ssm": inner, "mamba_expand": inner / m.hidden, "mamba_conv_bias": _has(m, "mamba.conv1d.bias"),
        "mamba_proj_bias": _has(m, "mamba.in_proj.bias"),
    }  # fmt: skip


def falcon_h1(m: Metadata) -> dict[str, Any]:
    """The config.json of Falcon-H1 as a dict, made from the metadata `m` of a GGUF file.

    The model's multipliers are already part of the weights in the file. Raises CheckpointError for a missing key,
    PortError for a value that is not supported.
    """
    whole_heads(m)
    return base(m) | ssm(m) | {
        "architectures": ["FalconH1ForCausalLM"], "mamba_rms_norm": m.has("mamba.norm.weight"),
        "mamba_norm_before_gate": False, "mlp_bias": m.has("feed_forward.gate_proj.bias"),
        "projectors_bias": m.has("mamba.out_proj.bias"),
    }  # fmt: skip


def granite_hybrid(m: Metadata) -> dict[str, Any]:
    """The config.json of Granite 4 as a dict, made from the metadata `m` of a GGUF file.

    A layer has attention if it has K/V heads. Attention has rope only if the file has the key rope.scaling.finetuned.
    Raises CheckpointError for a missing key, PortError for a value that is not supported.
    """
    whole_heads(m)
    rope = m.flag("rope.scaling.finetuned")
    shared = rows(m, "block_sparse_moe.shared_mlp.gate_proj.weight") or rows(m, "shared_mlp.gate_proj.weight")
    mixed = bool(m.get("expert_count"))
    biased = next((i for i, n in enumerate(m.kv_heads_by_layer) if n), 0)
    return base(m) | ssm(m) | (experts(m) if mixed else {"num_local_experts": 0}) | {
        "architectures": ["GraniteMoeHybridForCausalLM"], "llama_names": True, "shared_intermediate_size": shared,
        "layer_types": ["attention" if n else "mamba" for n in m.kv_heads_by_layer],
        "position_embedding_type": "rope" if rope else None, "embedding_multiplier": m.real("embedding_scale", 1.0),
        "residual_multiplier": m.real("residual_scale", 1.0), "logits_scaling": m.real("logit_scale", 1.0),
        "attention_multiplier": m.real("attention.scale", m.head_dim**-0.5),
        "attention_bias": m.has("self_attn.q_proj.bias", biased),
    }  # fmt: skip


def nemotron_h(m: Metadata) -> dict[str, Any]:
    """The config.json of Nemotron-H as a dict, made from the metadata `m` of a GGUF file.

    A layer with a router has experts. Of the other layers, one with an MLP width is an MLP, one with K/V heads but no
    MLP width is attention, and all others are Mamba-2 blocks. The dict has no key time_step_limit, so the step size dt
    is not clamped. llama.cpp does the same. Raises CheckpointError for a missing key, PortError if MLPs have different
    widths.
    """
    widths, heads = [int(x) for x in m.by_layer("feed_forward_length")], m.whole("ssm.time_step_rank")
    mixed = [m.has("mixer.gate.weight", i) for i in range(m.layers)]
    if len({n for n, mix in zip(widths, mixed, strict=True) if n and not mix}) > 1:
        m.one("feed_forward_length")
    kinds = [
        "moe" if mix else "mlp" if width else "attention" if n else "mamba"
        for mix, width, n in zip(mixed, widths, m.kv_heads_by_layer, strict=True)
    ]
    own = kinds.index("attention") if "attention" in kinds else 0
    return base(m, width=max(widths)) | (ungated_experts(m) if any(mixed) else {}) | {
        "architectures": ["NemotronHForCausalLM"], "llama_names": True, "layers_block_type": kinds,
        "layer_norm_epsilon": m.real("attention.layer_norm_rms_epsilon"), "mamba_num_heads": heads,
        "mamba_head_dim": m.whole("ssm.inner_size") // heads, "n_groups": m.whole("ssm.group_count", 1),
        "ssm_state_size": m.whole("ssm.state_size"), "conv_kernel": m.whole("ssm.conv_kernel"),
        "use_conv_bias": _has(m, "mixer.conv1d.bias"), "mamba_proj_bias": _has(m, "mixer.in_proj.bias"),
        "attention_bias": m.has("self_attn.q_proj.bias", own),
        "mlp_bias": _has(m, "mixer.up_proj.bias") or _has(m, "mixer.shared_experts.up_proj.bias"),
    }  # fmt: skip


def ungated_experts(m: Metadata) -> dict[str, Any]:
    """The keys of config.json for Nemotron-H's experts, which have no gate projection, as a dict.

    Raises CheckpointError for a missing key, PortError for a value that is not supported.
    """
    m.fixed("expert_gating_func", SIGMOID)
    count = m.whole("expert_group_count", 1)
    return experts(m) | {
        "n_group": count, "topk_group": m.whole("expert_group_used_count", 1 if count < 2 else None),
        "norm_topk_prob": m.flag("expert_weights_norm"),
        "routed_scaling_factor": m.real("expert_weights_scale", 0.0) or 1.0,
        "moe_shared_expert_intermediate_size": rows(m, "mixer.shared_experts.up_proj.weight"),
        "moe_latent_size": m.whole("moe_latent_size", 0) or None,
    }  # fmt: skip


def delta_nets(model: str) -> Any:
    """Make the function that turns the metadata of a Qwen3-Next or Qwen3.5 GGUF file into a config.json (a dict).

    A layer is a gated delta net if the file has a tensor A_log (ssm_a) for it, otherwise attention. The function raises
    CheckpointError for a missing key, PortError for a value that is not supported.

    model: value of the key `architectures`.
    """

    def describe(m: Metadata) -> dict[str, Any]:
        keys, heads = m.whole("ssm.group_count"), m.whole("ssm.time_step_rank")
        usual = base(m) | partial(m)
        c = usual | (experts(m) if m.get("expert_count") else {}) | {
            "architectures": [model], "linear_conv_kernel_dim": m.whole("ssm.conv_kernel"),
            "linear_key_head_dim": m.whole("ssm.state_size"), "linear_num_key_heads": keys,
            "linear_num_value_heads": heads, "linear_value_head_dim": m.whole("ssm.inner_size") // heads,
            "separate_projections": True, "layer_types": [
                "linear_attention" if m.has("linear_attn.A_log", i) else "full_attention" for i in range(m.layers)
            ],
        }  # fmt: skip
        shared = m.get("expert_shared_feed_forward_length") or rows(m, "mlp.shared_expert.gate_proj.weight")
        return c | ({"shared_expert_intermediate_size": int(shared), "norm_topk_prob": True} if shared else {})

    return describe


def lfm2(m: Metadata) -> dict[str, Any]:
    """The config.json of LFM2 as a dict, made from the metadata `m` of a GGUF file.

    A layer without K/V heads has a short convolution instead of attention. Raises CheckpointError for a missing key,
    PortError for a value that is not supported.
    """
    whole_heads(m)
    c = base(m)
    kinds = ["full_attention" if n else "conv" for n in m.kv_heads_by_layer]
    return c | {
        "architectures": ["Lfm2ForCausalLM"], "layer_types": kinds, "norm_eps": c["rms_norm_eps"],
        "conv_L_cache": m.whole("shortconv.l_cache"),
        "conv_bias": any(m.has("conv.conv.bias", i) for i in range(m.layers)),
        "block_auto_adjust_ff_dim": False,
    }  # fmt: skip


def lfm2_moe(m: Metadata) -> dict[str, Any]:
    """The config.json of LFM2 with experts as a dict, made from the metadata `m` of a GGUF file.

    Raises CheckpointError for a missing key, PortError for a value that is not supported.
    """
    m.fixed("expert_gating_func", SIGMOID)
    dense = m.whole("leading_dense_block_count", 0)
    return lfm2(m) | experts(m) | {
        "architectures": ["Lfm2MoeForCausalLM"], "num_dense_layers": dense, "norm_topk_prob": True,
        "use_expert_bias": m.has("feed_forward.expert_bias", dense),
        "routed_scaling_factor": m.real("expert_weights_scale", 0.0) or 1.0,
    }  # fmt: skip
