"""Configurations of more tiny models, in the form of tiny.py: older architectures, and encoders run as decoders."""

from __future__ import annotations

from typing import Any

DECODES: dict[str, Any] = {"is_decoder": True, "type_vocab_size": 3}
COUNTED: dict[str, Any] = {**DECODES, "pad_token_id": 1}
DECODER: dict[str, Any] = {"decoder_layers": 3, "decoder_attention_heads": 4, "decoder_ffn_dim": 80}
SEES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "intermediate_size": 32,
    "image_size": 32,
    "num_attention_heads": 2,
}
NEMOTRON = {
    "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"], "ssm_state_size": 24,
    "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2, "head_dim": 24, "n_routed_experts": 8,
    "num_experts_per_tok": 3, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 72, "routed_scaling_factor": 2.5,
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "diffllama": {"class": "DiffLlama", "num_key_value_heads": 4, "head_dim": 24, "attention_bias": True},
    "diffllama_groups": {"class": "DiffLlama", "num_attention_heads": 8, "num_key_value_heads": 2},
    "bert": {"class": "BertLMHeadModel", "config": "BertConfig", **DECODES},
    "ernie": {"class": "Ernie", **DECODES, "hidden_act": "relu"},
    "megatron_bert": {"class": "MegatronBert", **DECODES},
    "bert_generation": {"class": "BertGenerationDecoder", "config": "BertGenerationConfig", "is_decoder": True},
    "big_bird": {"class": "BigBird", **DECODES, "attention_type": "original_full", "rescale_embeddings": True},
    "electra": {"class": "Electra", **DECODES, "embedding_size": 40},
    "rembert": {"class": "RemBert", **DECODES, "input_embedding_size": 40, "output_embedding_size": 72},
    "roformer": {"class": "RoFormer", **DECODES, "embedding_size": 40},
    "roformer_wide": {"class": "RoFormer", **DECODES, "embedding_size": 80},
    "roberta": {"class": "Roberta", **COUNTED},
    "camembert": {"class": "Camembert", **COUNTED},
    "xlm_roberta": {"class": "XLMRoberta", **COUNTED, "tie_word_embeddings": False},
    "xlm_roberta_xl": {"class": "XLMRobertaXL", **COUNTED},
    "data2vec_text": {"class": "Data2VecText", **COUNTED},
    "bart": {"class": "Bart", **DECODER},
    "plbart": {"class": "PLBart", **DECODER, "scale_embedding": True},
    "mvp": {"class": "Mvp", **DECODER},
    "trocr": {"class": "TrOCR", **DECODER},
    "blenderbot_small": {"class": "BlenderbotSmall", **DECODER},
    "marian": {"class": "Marian", **DECODER, "scale_embedding": True},
    "mbart": {"class": "MBart", **DECODER, "tie_word_embeddings": False},
    "blenderbot": {"class": "Blenderbot", **DECODER},
    "pegasus": {"class": "Pegasus", **DECODER, "activation_function": "relu"},
    "bigbird_pegasus": {"class": "BigBirdPegasus", **DECODER, "use_bias": True},
    "xglm": {"class": "XGLM", "num_layers": 3, "attention_heads": 4, "ffn_dim": 80, "pad_token_id": 1},
    "ctrl": {"class": "CTRLLMHeadModel", "config": "CTRLConfig", "dff": 80},
    "openai_gpt": {"class": "OpenAIGPTLMHeadModel", "config": "OpenAIGPTConfig"},
    "gpt_neox_japanese": {
        "class": "GPTNeoXJapanese", "intermediate_multiple_size": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
    "bloom": {"class": "Bloom"},
    "bloom_six_heads": {"class": "Bloom", "hidden_size": 72, "num_attention_heads": 6},
    "mpt": {"class": "Mpt", "max_seq_len": 256},
    "mpt_six_heads": {
        "class": "Mpt", "max_seq_len": 256, "hidden_size": 72, "num_attention_heads": 6,
        "attn_config": {"clip_qkv": 0.9, "softmax_scale": 0.3},
    },
    "apertus": {"class": "Apertus", "attention_bias": True},
    "bitnet": {"class": "BitNet", "num_key_value_heads": 1},
    "ministral3": {
        "class": "Ministral3", "head_dim": 24, "sliding_window": 20,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 16.0, "mscale": 1.0,
                            "mscale_all_dim": 1.0, "original_max_position_embeddings": 16,
                            "llama_4_scaling_beta": 0.3},
    },
    "minicpm3": {
        "class": "MiniCPM3", "kv_lora_rank": 40, "q_lora_rank": 36, "qk_nope_head_dim": 24, "qk_rope_head_dim": 12,
        "v_head_dim": 20, "num_key_value_heads": 4, "dim_model_base": 32, "tie_word_embeddings": False,
        "mlp_bias": True,
    },
    "axk1": {
        "class": "AXK1", "kv_lora_rank": 40, "q_lora_rank": 36, "qk_nope_head_dim": 24, "qk_rope_head_dim": 12,
        "v_head_dim": 20, "num_key_value_heads": 4, "moe_intermediate_size": 48, "n_routed_experts": 8,
        "num_experts_per_tok": 3, "n_group": 2, "topk_group": 1,
    },
    "deepseek_v32": {
        "class": "DeepseekV32", "kv_lora_rank": 40, "q_lora_rank": 36, "qk_nope_head_dim": 24, "qk_rope_head_dim": 12,
        "v_head_dim": 20, "num_key_value_heads": 4, "moe_intermediate_size": 48, "n_routed_experts": 8,
        "num_experts_per_tok": 3, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "attention_bias": True,
        "index_topk": 11, "index_head_dim": 20, "index_n_heads": 8,
    },
    "glm_moe_dsa": {
        "class": "GlmMoeDsa", "kv_lora_rank": 40, "q_lora_rank": 36, "qk_nope_head_dim": 24, "qk_rope_head_dim": 12,
        "v_head_dim": 20, "num_key_value_heads": 4, "moe_intermediate_size": 48, "n_routed_experts": 8,
        "num_experts_per_tok": 3, "index_topk": 13, "index_head_dim": 16, "index_n_heads": 6,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "indexer_types": ["full", "shared", "full", "shared"],
    },
    "deepseek_v4": {
        "class": "DeepseekV4", "num_hidden_layers": 5, "num_key_value_heads": 1, "head_dim": 24, "q_lora_rank": 36,
        "layer_types": [
            "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention",
            "compressed_sparse_attention", "heavily_compressed_attention",
        ],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 11},
        "mlp_layer_types": ["hash_moe", "moe", "hash_moe", "moe", "moe"], "partial_rotary_factor": 1 / 3,
        "rope_parameters": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32},
        "compress_rope_theta": 160000.0, "sliding_window": 13, "moe_intermediate_size": 48,
        "n_routed_experts": 8, "num_experts_per_tok": 3, "swiglu_limit": 0.7, "o_groups": 2, "o_lora_rank": 20,
        "index_n_heads": 6, "index_head_dim": 12, "index_topk": 5, "hc_mult": 3,
    },
    "mimo_v2_flash": {
        "class": "MiMoV2Flash", "head_dim": 24, "v_head_dim": 20, "num_key_value_heads": 1, "sliding_window": 20,
        "moe_intermediate_size": 48, "n_routed_experts": 8, "num_experts_per_tok": 3,
    },
    "modernbert_decoder": {"class": "ModernBertDecoder", "local_attention": 40, "attention_bias": True},
    "modernbert_window": {"class": "ModernBertDecoder", "local_attention": 40, "sliding_window": 11},
    "cohere2_moe": {
        "class": "Cohere2Moe", "head_dim": 24, "sliding_window": 20, "first_k_dense_replace": 1, "num_experts": 8,
        "prefix_dense_intermediate_size": 80, "num_shared_experts": 2, "expert_selection_fn": "sigmoid",
        "logit_scale": 0.25,
    },
    "dbrx": {
        "class": "Dbrx", "max_seq_len": 256, "d_model": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 0.9, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 48, "moe_num_experts": 6, "moe_top_k": 2},
    },
    "aria_text": {"class": "AriaText", "intermediate_size": 48, "moe_num_experts": 6},
    "emu3": {"class": "Emu3", "config": "Emu3TextConfig"},
    "apertus1p5_text": {"class": "Apertus1p5Text", "tie_word_embeddings": True},
    "cohere_compass": {
        "class": "CohereCompass", "config": "CohereCompassTextConfig", "sliding_window": 20, "logit_scale": 0.25,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
            "full_attention": None,
        },
    },
    "fuyu": {
        "class": "Fuyu",
        "text_config": {
            "model_type": "persimmon", "vocab_size": 263, "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 256, "hidden_act": "relu2",
            "rope_parameters": {"rope_type": "default", "rope_theta": 25000.0, "partial_rotary_factor": 0.5},
        },
    },
    "git": {"class": "Git", "vision_config": SEES},
    "mllama": {
        "class": "Mllama", "config": "MllamaTextConfig", "cross_attention_layers": [1], "num_hidden_layers": 5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "got_ocr2": {
        "class": "GotOcr2ForConditionalGeneration", "config": "GotOcr2Config", "tie_word_embeddings": True,
        "vision_config": {**SEES, "output_channels": 16},
        "text_config": {
            "model_type": "qwen2", "vocab_size": 263, "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
            "max_position_embeddings": 256,
        },
    },
    "gemma4": {
        "class": "Gemma4", "config": "Gemma4TextConfig", "head_dim": 16, "global_head_dim": 32, "sliding_window": 20,
        "hidden_size_per_layer_input": 12, "vocab_size_per_layer_input": 263, "final_logit_softcapping": 20.0,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gemma4_keys": {
        "class": "Gemma4", "config": "Gemma4TextConfig", "head_dim": 16, "global_head_dim": 32, "sliding_window": 20,
        "hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "num_global_key_value_heads": 1,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gemma4_shared": {
        "class": "Gemma4", "config": "Gemma4TextConfig", "head_dim": 16, "global_head_dim": 32, "sliding_window": 12,
        "hidden_size_per_layer_input": 12, "vocab_size_per_layer_input": 263, "final_logit_softcapping": 20.0,
        "num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3, "num_kv_shared_layers": 3,
        "use_double_wide_mlp": True, "num_key_value_heads": 1,
    },
    "gemma4_experts": {
        "class": "Gemma4", "config": "Gemma4TextConfig", "head_dim": 16, "global_head_dim": 32, "sliding_window": 20,
        "hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "num_global_key_value_heads": 1,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "enable_moe_block": True, "num_experts": 6,
        "top_k_experts": 2, "moe_intermediate_size": 40,
    },
    "gemma4_unified": {
        "class": "Gemma4Unified", "config": "Gemma4UnifiedTextConfig", "head_dim": 16, "global_head_dim": 32,
        "sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gemma3n": {
        "class": "Gemma3n", "config": "Gemma3nTextConfig", "head_dim": 24, "sliding_window": 12, "num_hidden_layers": 6,
        "hidden_size_per_layer_input": 12, "vocab_size_per_layer_input": 257, "final_logit_softcapping": 20.0,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
        "laurel_rank": 10, "altup_num_inputs": 3, "intermediate_size": [96, 96, 104, 96, 72, 96],
        "activation_sparsity_pattern": [0.95, 0.7, 0.0, 0.5, 0.0, 0.2],
    },
    "roberta_prelayernorm": {"class": "RobertaPreLayerNorm", **COUNTED},
}  # fmt: skip

UNGATED: dict[str, dict[str, Any]] = {  # with experts that have no gate
    "nemotron_h_moe": {"class": "NemotronH", **NEMOTRON},
    "nemotron_h_latent": {
        "class": "NemotronH", **NEMOTRON, "moe_latent_size": 40, "n_group": 1, "norm_topk_prob": False,
    },
}  # fmt: skip
