"""Configurations of the tiny models with recurrent state, which tiny.py builds. Not a test: tests import it."""

from __future__ import annotations

from typing import Any

from support.families import UNGATED

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "rope_theta": 500000.0, "factor": 8.0, "original_max_position_embeddings": 32}
LATENT = {
    "kv_lora_rank": 40, "qk_nope_head_dim": 24, "qk_rope_head_dim": 12, "v_head_dim": 20, "num_key_value_heads": 4,
    "moe_intermediate_size": 48, "first_k_dense_replace": 1, "n_routed_experts": 8, "num_experts_per_tok": 3,
}  # fmt: skip
MSCALE = {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}
DELTA = {
    "layer_types": ["linear_attention", "full_attention"] * 2, "head_dim": 24, "linear_key_head_dim": 12,
    "linear_value_head_dim": 20, "linear_num_key_heads": 2, "linear_num_value_heads": 6,
    "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5},
}  # fmt: skip
SSM = {"mamba_n_heads": 8, "mamba_n_groups": 2, "mamba_d_state": 24}
# Those with recurrent state, which test_recurrent_ports.py tests.
RECURRENT: dict[str, dict[str, Any]] = {
    "lfm2": {
        "class": "Lfm2", "layer_types": ["conv", "full_attention"] * 2, "block_multiple_of": 8, "conv_bias": True,
    },
    "lfm2_moe": {
        "class": "Lfm2Moe", "layer_types": ["conv", "full_attention"] * 2, "moe_intermediate_size": 48,
        "num_experts": 8, "num_experts_per_tok": 3, "num_dense_layers": 1, "conv_L_cache": 4,
    },
    "qwen3_next": {
        "class": "Qwen3Next", **DELTA, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 72, "mlp_only_layers": [2],
    },
    "qwen3_5": {"class": "Qwen3_5", "config": "Qwen3_5TextConfig", **DELTA},
    "qwen3_5_moe": {
        "class": "Qwen3_5Moe", "config": "Qwen3_5MoeTextConfig", **DELTA, "num_experts": 8, "num_experts_per_tok": 3,
        "moe_intermediate_size": 40, "shared_expert_intermediate_size": 72,
    },
    "olmo_hybrid": {
        "class": "OlmoHybrid", "layer_types": ["linear_attention", "full_attention"] * 2, "linear_num_key_heads": 2,
        "linear_num_value_heads": 6, "linear_key_head_dim": 12, "linear_value_head_dim": 20, "attention_bias": True,
    },
    "olmo_hybrid_nope": {
        "class": "OlmoHybrid", "rope_parameters": {"rope_type": "default", "rope_theta": None},
        "linear_allow_neg_eigval": False, "linear_conv_kernel_dim": 3, "tie_word_embeddings": True,
    },
    "kimi_linear": {
        "class": "KimiLinear", **LATENT, "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_num_heads": 6, "linear_head_dim": 12, "n_group": 2, "topk_group": 1, "num_local_experts": 8,
    },
    "kimi_linear_compressed": {
        "class": "KimiLinear", **LATENT, "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_num_heads": 4, "linear_head_dim": 20, "linear_conv_kernel_dim": 3, "q_lora_rank": 36,
        "attention_bias": True, "num_local_experts": 8, "norm_topk_prob": False, "n_shared_experts": 2,
    },
    "bailing_hybrid": {
        "class": "BailingHybrid", **LATENT, "layer_types": ["linear_attention", "full_attention"] * 2, "head_dim": 20,
        "n_group": 2, "topk_group": 1, "num_local_experts": 8, "q_lora_rank": 36, "attention_bias": True,
        "kda_lower_bound": -2.0,
    },
    "bailing_hybrid_softplus": {
        "class": "BailingHybrid", **LATENT, "layer_types": ["linear_attention", "full_attention"] * 2, "head_dim": 12,
        "n_group": 1, "topk_group": 1, "num_local_experts": 8, "kda_safe_gate": False, "short_conv_kernel_size": 3,
        "rope_parameters": MSCALE, "norm_topk_prob": False,
    },
    "lfm3": {
        "class": "Lfm3", "layer_types": ["conv", "sliding_attention", "conv", "full_attention"], "head_dim": 24,
        "sliding_window": 20, "attention_bias": True, "conv_bias": True, "conv_L_cache": 4,
    },
    "lfm3_plain": {
        "class": "Lfm3", "layer_types": ["conv", "sliding_attention", "conv", "full_attention"], "head_dim": 16,
        "sliding_window": 20, "use_sandwich_norm": False, "use_attention_gate": False, "tie_word_embeddings": False,
        "rope_parameters": {"sliding_attention": YARN, "full_attention": {**ROPE, "rope_theta": 500000.0}},
    },
    "zamba2": {
        "class": "Zamba2", "layers_block_type": ["mamba", "hybrid"] * 2, "num_mem_blocks": 1,
        "use_shared_attention_adapter": True, "adapter_rank": 8, "use_mem_rope": True, "mamba_d_state": 24,
        "mamba_ngroups": 2, "add_bias_linear": True, "time_step_min": 0.4, "num_key_value_heads": 4,
    },
    "zamba2_plain": {
        "class": "Zamba2", "layers_block_type": ["hybrid", "mamba", "hybrid", "mamba"], "adapter_rank": 4,
        "mamba_d_state": 12, "n_mamba_heads": 4, "mamba_ngroups": 2, "tie_word_embeddings": False,
        "hidden_act": "gelu_pytorch_tanh",
    },
    "zamba": {
        "class": "Zamba", "layers_block_type": ["mamba", "hybrid"] * 2, "mamba_d_state": 6, "num_key_value_heads": 2,
    },
    "zamba_three_heads": {
        "class": "Zamba", "layers_block_type": ["hybrid", "mamba", "hybrid", "mamba"], "mamba_d_state": 5,
        "hidden_size": 48, "n_mamba_heads": 3, "mamba_dt_rank": 4, "attention_head_dim": 20, "mamba_conv_bias": False,
        "tie_word_embeddings": False, "num_key_value_heads": 4,
    },
    "mamba2": {
        "class": "Mamba2", "num_heads": 8, "head_dim": 16, "state_size": 24, "n_groups": 2, "use_bias": True,
        "time_step_limit": [0.1, 1.5],
    },
    "mamba": {"class": "Mamba", "state_size": 6, "use_bias": True},
    "falcon_mamba": {"class": "FalconMamba", "state_size": 6},
    "bamba": {"class": "Bamba", **SSM, "attn_layer_indices": [1, 3], "attention_bias": True},
    "granitemoehybrid": {
        "class": "GraniteMoeHybrid", **SSM, "layer_types": ["linear_attention", "full_attention"] * 2,
        "num_local_experts": 6, "shared_intermediate_size": 72, "embedding_multiplier": 6.0,
        "residual_multiplier": 0.22, "attention_multiplier": 0.3, "logits_scaling": 8.0,
    },
    "granitemoehybrid_dense": {
        "class": "GraniteMoeHybrid", **SSM, "layer_types": ["linear_attention", "full_attention"] * 2,
        "num_local_experts": 0, "shared_intermediate_size": 72, "position_embedding_type": "rope",
    },
    "falcon_h1": {
        "class": "FalconH1", **SSM, "mamba_d_ssm": 96, "mamba_rms_norm": True, "mamba_norm_before_gate": False,
        "key_multiplier": 0.7, "attention_out_multiplier": 1.3, "attention_in_multiplier": 0.8,
        "ssm_in_multiplier": 1.2, "ssm_out_multiplier": 0.9, "ssm_multipliers": [0.8, 1.1, 0.9, 1.2, 0.7],
        "mlp_multipliers": [0.9, 1.4], "embedding_multiplier": 3.0, "lm_head_multiplier": 0.5,
    },
    "recurrent_gemma": {
        "class": "RecurrentGemma", "block_types": ["recurrent", "attention"], "attention_window_size": 12,
        "lru_width": 72, "hidden_size": 64,
    },
    "minimax": {
        "class": "MiniMax", "layer_types": ["linear_attention", "full_attention"] * 2, "num_local_experts": 4,
        "linear_attn_alpha_factor": 1.5, "linear_attn_beta_factor": 0.8, "full_attn_alpha_factor": 0.9,
        "full_attn_beta_factor": 1.2, "mlp_alpha_factor": 1.3, "mlp_beta_factor": 0.7,
    },
    "jamba": {
        "class": "Jamba", "num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 6,
        "expert_layer_offset": 0,
    },
    "nemotron_h": {
        "class": "NemotronH", "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"],
        "ssm_state_size": 24, "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2, "head_dim": 24,
        "time_step_min": 0.4, "mamba_proj_bias": True,
    },
    **UNGATED,
}  # fmt: skip
