"""Decides for each key of config.json whether it is used, safely ignored, or must be reported to the user.

A port's Config records the keys that it reads. Every other key is empty or off, on a list here with the reason why it
is harmless, fixed to the one value that the port computes, or reported in a note. Some unread keys are errors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from intaglio.models.config import Config, PortError, Settings
from intaglio.models.ports import Family

TRAINING = "used in training only"
ORIGIN = "says where the model comes from"
OUTPUTS = "asks for outputs or code paths of transformers"
ENDS = "a token id; the tokenizer and ends of sequence are read from it and from generation_config.json"
SAMPLING = "a default for sampling in the old place; generation_config.json has them"
TASKS = "belongs to other tasks or to encoder-decoder models"
OTHER_PARTS = "of a part that is not ported (vision, audio), or of how prompts mark it"
AHEAD = "of layers that only predict tokens further ahead"

HARMLESS: dict[str, str] = {
    **dict.fromkeys((
        "attention_dropout", "attn_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout",
        "hidden_dropout_prob", "attention_probs_dropout_prob", "residual_dropout", "embedding_dropout", "ffn_dropout",
        "dropout", "activation_dropout", "classifier_dropout", "summary_first_dropout", "initializer_range",
        "lambda_std_dev", "initializer_factor", "init_std", "init_device", "router_aux_loss_coef", "aux_loss_alpha",
        "seq_aux", "router_z_loss_coef", "router_jitter_noise", "input_jitter_noise", "gradient_checkpointing",
        "output_router_logits", "label_smoothing", "z_loss", "moe_dropout", "router_dtype", "mup_base_width",
        "use_fused_crossentropy", "fused_ce", "rescale_prenorm_residual", "load_balance_loss_weight", "lora_dropout",
        "time_step_min", "time_step_max", "time_step_floor", "time_step_init_scheme", "time_step_scale", "mamba_dt_min",
        "mamba_dt_max", "mamba_dt_init_floor", "z_loss_coefficient", "linear_a_log_min", "linear_a_log_max",
        "linear_dt_min", "linear_dt_max", "linear_dt_init_floor",
        "is_training", "layerdrop", "finetuned", "train_batch_size", "initialization_scheme", "altup_coef_clip",
        "altup_lr_multiplier",
    ), TRAINING),
    **dict.fromkeys((
        "transformers_version", "_name_or_path", "name_or_path", "auto_map", "unsloth_version", "unsloth_fixed",
        "unsloth_training", "_commit_hash", "model_name", "license", "base_model", "_diffusers_version", "_unsloth_fix",
        "creator", "author", "version", "_from_model_config", "peft_version", "description", "custom_pipelines",
        "original_repo", "_class_name", "library_name", "merged_from",
    ), ORIGIN),
    **dict.fromkeys((
        "use_cache", "output_attentions", "output_hidden_states", "return_dict", "use_return_dict", "torchscript",
        "use_bfloat16", "_attn_implementation", "attn_implementation", "_attn_implementation_autoset",
        "_attn_implementation_internal", "_experts_implementation", "use_flash_attn", "use_flash_attention",
        "_flash_attn_2_enabled", "flash_attn", "use_cache_quantization", "use_cache_kernel", "softmax_in_fp32",
        "pretraining_tp", "ep_size", "tp_size", "tp_plan", "tensor_parallel", "chunk_size_feed_forward", "pruned_heads",
        "keys_to_ignore_at_inference", "gradient_checkpointing_kwargs", "use_kernels", "use_xla", "use_mamba_kernels",
        "cache_implementation", "fp32", "fp16", "bf16", "onnx", "use_dynamic_ntk", "use_logn_attn",
        "transformers_weights", "tf_legacy_loss", "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32",
        "chunk_size", "mamba_chunk_size", "residual_in_fp32", "use_mambapy", "use_associative_scan",
        "mamba_ssm_cache_dtype", "mamba_ssm_dtype", "num_logits_to_keep",
        "reorder_and_upcast_attn", "slow_but_exact", "n_ctx", "enable_moe_fp32_combine", "moe_shared_expert_overlap",
    ), OUTPUTS),
    **dict.fromkeys((
        "pad_token_id", "sep_token_id", "unk_token_id", "cls_token_id",
        "mask_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "eod_token_id",
        "im_start_token_id", "im_end_token_id", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids",
        "tokenizer_class", "tokenizer", "bos_token", "eos_token", "pad_token", "padding_side", "prefix", "chat_format",
    ), ENDS),
    **dict.fromkeys((
        "temperature", "top_k", "top_p", "typical_p", "do_sample", "max_length", "min_length", "max_new_tokens",
        "num_beams", "num_beam_groups", "num_return_sequences", "length_penalty", "repetition_penalty",
        "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "diversity_penalty", "early_stopping",
        "exponential_decay_length_penalty", "remove_invalid_values", "output_scores", "return_dict_in_generate",
        "generation_config", "max_model_len", "seq_length", "model_max_length", "max_seq_len", "max_sequence_length",
    ), SAMPLING),
    **dict.fromkeys((
        "id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params",
        "is_decoder", "is_encoder_decoder", "add_cross_attention", "cross_attention_hidden_size",
        "tie_encoder_decoder", "decoder", "encoder", "summary_type", "summary_use_proj", "summary_activation",
        "summary_proj_to_labels", "vocab_file", "sentence_pooling", "num_choices",
        "encoder_layers", "encoder_ffn_dim", "encoder_attention_heads", "encoder_layerdrop", "decoder_layerdrop",
        "share_encoder_decoder_embeddings", "task_type_vocab_size", "summary_last_dropout", "attention_type",
        "block_size", "num_random_blocks", "prompt_length", "prompt_mid_dim",
    ), TASKS),
    **dict.fromkeys((
        "vision_config", "audio_config", "vision_feature_layer", "vision_feature_select_strategy",
        "mm_tokens_per_image", "image_token_index", "image_token_id", "video_token_id", "video_token_index",
        "audio_token_id", "vision_start_token_id", "vision_end_token_id", "vision_token_id", "boi_token_index",
        "eoi_token_index", "boi_token_id", "eoi_token_id", "boa_token_id", "eoa_token_id", "image_seq_length",
        "projector_hidden_act", "multimodal_projector_bias", "img_processor", "embd_layer", "audio_processor",
        "vision_lora", "speech_lora", "image_size", "patch_size", "deepstack_visual_indexes",
    ), OTHER_PARTS),
    **dict.fromkeys((
        "num_nextn_predict_layers", "num_mtp_modules", "use_mtp", "mtp_transformer_layers", "mtp_num_layers",
        "mtp_loss_weight", "num_assistant_tokens", "mtp_layers_block_type", "mtp_hybrid_override_pattern",
        "mtp_loss_scaling_factor",
    ), AHEAD),
    "dtype": "each tensor's header says its own type", "torch_dtype": "each tensor's header says its own type",
    "sliding_window": "no layer of this model slides", "use_sliding_window": "layer_types says which layers slide",
    "topk_group": "all experts are in one group", "n_group": "all experts are in one group",
    "attention_layers": "a copy of attention_types, layer by layer",
    "hybrid_layer_ids": "layers_block_type says which layers are hybrid",
    "qk_head_dim": "the sum of qk_nope_head_dim and qk_rope_head_dim",
    "_sliding_window_pattern": "a copy of sliding_window_pattern that layer_types replaces",
    "sliding_window_pattern": "layer_types says which layers slide",
    "max_window_layers":
    "use_sliding_window is off, or layer_types says which layers slide",
}  # fmt: skip
USED = {  # keys that others than a port read
    "architectures": "names the architecture", "model_type": "names the architecture",
    "eos_token_id": "an end of sequence, beside those of generation_config.json and the tokenizer",
    "bos_token_id": "the first token, if generation_config.json and the tokenizer name none",
}  # fmt: skip
ROPE = {
    "mrope_section": "text has the same position on all three axes",
    "mrope_interleaved": "text has the same position on all three axes",
    "type": "the older name of rope_type, which stands beside it",
    "finetuned": "says that the model was trained with this scaling",
}
QUANTISED = {
    **dict.fromkeys((
        "desc_act", "sym", "static_groups", "true_sequential", "damp_percent", "damp_auto_increment", "dataset", "mse",
        "batch_size", "cache_block_outputs", "hyb_act", "model_free", "quant_mode", "algo_config",
        "nsamples", "seqlen", "iters", "lr", "enable_minmax_tuning",
        "enable_quanted_input", "low_gpu_mem_usage", "scale_dtype", "act_group_aware", "rotation",
        "quantization_status", "expert_dtype", "method",
        "global_compression_ratio", "version", "producer", "quant_algo", "creator", "autoround_version", "calib_data",
        "act_bits", "gptaq", "gptaq_alpha", "true_sequential_groups", "run_compressed", "meta", "quantizer",
    ), "how the codes were found; the codes, zeros and g_idx say the rest"),
    **dict.fromkeys((
        "ignore", "ignored_layers", "modules_to_not_convert", "exclude_modules", "lm_head",
        "modules_in_block_to_quantize",
        "global_quant_config", "layer_quant_config", "layer_type_quant_config", "exclude", "skip_modules", "data_type",
        "quant_config", "load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit", "bnb_4bit_quant_type",
        "bnb_4bit_use_double_quant", "bnb_4bit_quant_storage", "llm_int8_skip_modules", "nbits", "axis",
        "block_name_to_quantize", "quantized_layers", "config_groups", "group_size",
        "module_name_preceding_first_block", "modules_to_fuse", "model_seqlen", "targets",
        "to_quant_block_names", "block_modules_to_quantize", "inside_layer_modules", "layers_to_quantize",
    ), "which modules are quantised, and in what groups; their tensors say so"),
    **dict.fromkeys((
        "activation_scheme", "activation_scale_ub", "input_activations", "output_activations", "kv_cache_scheme",
        "kv_cache_quant_algo", "kv_cache_quant_algos", "has_zero_point", "act_dynamic", "act_data_type",
        "act_group_size", "act_sym", "kv_cache_quant_config", "kv_cache_post_rope", "kv_cache_group",
        "softmax_quant_spec",
        "bnb_4bit_compute_dtype", "llm_int8_threshold", "llm_int8_has_fp16_weight", "min_kv_scale",
    ), "activations and the K/V cache have formats of their own here"),
    **dict.fromkeys((
        "use_cuda_fp16", "use_triton", "disable_exllama", "use_exllama", "exllama_config", "exllama_version", "backend",
        "max_input_length", "do_fuse", "fuse_max_seq_len", "tokenizer", "model_name_or_path", "model_file_base_name",
        "pad_token_id", "dequantize", "scale_fmt", "fmt", "weight_format", "use_kernels", "pack_dtype", "quant_dtype",
        "export", "llm_int8_enable_fp32_cpu_offload", "view_as_float", "is_marlin_format",
        "checkpoint_format", "format", "sparsity_config", "transform_config", "zero_point",
        "quant_method", "offload_to_disk", "parallel_packing", "vram_strategy", "lm_head_low_gpu_mem_usage",
    ), "a setting of another program's kernels or packing, with its usual value"),
}  # fmt: skip
CHANGES_CODES = re.compile(
    r"rotat|hadamard|transform|smooth|outlier|codebook|lut|spars|prun|permut|lora|low_rank|equali|residual|offset|svd"
)
NEUTRAL: tuple[Any, ...] = (None, False, 0, 0.0, "", [], {})
COMPUTES = re.compile(
    r"rope|rotary|theta|attn|attention|norm|eps|scal|multiplier|softcap|cap$|clip|expert|moe|router|window|bias|layer|"
    r"head|activation|act$|act_fn|alibi|position|mask|residual|parallel|gate|mlp|ffn|group|rank|lora"
)


@dataclass(frozen=True)
class Fate:
    """Report that says whether one key of a checkpoint's settings was used or ignored, and why.

    A Fate can also report on a whole file of the checkpoint.

    Attributes:
        file: name of the file.
        key: path of the key in the file, such as text_config.head_dim; "" for the whole file.
        fate: "used" or "ignored".
        why: the reason.
        note: a message for the user; "" if none is needed.
    """

    file: str
    key: str
    fate: str
    why: str
    note: str = ""


def judge_config(c: Config, family: Family, config: Mapping[str, Any], file: str) -> list[Fate]:
    """Returns a list with a Fate for each key in config.json.

    A Fate says whether the port used or ignored the key, and why. Keys of nested tables that the port reads, such as
    rope_parameters, have a Fate too.

    Args:
        c: the Config of the text model, which has recorded the keys that were read.
        family: the port. Its attribute `fixed` lists, for some keys, the only values that the port implements.
        config: contents of config.json.
        file: the file's name, for the Fates.

    Raises PortError in two cases. A key of `family.fixed` has a value that is not listed there. Or the model has code
    of its own (auto_map), and the port does not read a key whose name suggests that it changes results.
    """
    inner = config.get("text_config")
    own = isinstance(inner, Mapping) and bool(inner)
    out = []
    for key, value in config.items():
        if own and key not in c.seen:
            if key == "text_config":
                out.append(Fate(file, key, "used", "describes the text model"))
            else:
                out.append(_judge_unread(file, key, key, value, family, config, outer=True))
        else:
            out += _judge(c, family, config, file, key, key, value)
    if own and isinstance(inner, Mapping):
        for key, value in inner.items():
            out += _judge(c, family, config, file, key, f"text_config.{key}", value)
    return out


def judge_quantisation(q: Settings, where: str, taken: bool, cache: str = "") -> list[Fate]:
    """Returns a list with a Fate for each key of the quantisation settings.

    A Fate says whether the key was used or ignored, and why.

    Args:
        q: the settings, which have recorded the keys that were read.
        where: text that names the file and key of the settings, such as "config.json: quantization_config".
        taken: True if the settings were used to decode matrices of the checkpoint; False if no matrix is quantised.
        cache: the key of `q` that asks for an E4M3 K/V cache; "" if there is none.

    Raises PortError for a key that was not read and whose name suggests that it changes how codes are decoded.
    """
    file, _, at = where.partition(": ")
    out = []
    for key, value in q.given.items():
        path = f"{at}.{key}" if at else key
        if key == cache:
            out.append(Fate(file, path, "used", "asks for a K/V cache in FP8 (E4M3); --kv bf16 makes it bf16"))
        elif key in QUANTISED and key.startswith("kv_cache"):
            out.append(Fate(file, path, "ignored", QUANTISED[key]))
        elif key in q.seen and taken:
            out.append(Fate(file, path, "used", "says how matrices are quantised"))
        elif not taken:
            out.append(Fate(file, path, "ignored", "no tensor of the checkpoint is quantised so"))
        elif key in QUANTISED:
            out.append(Fate(file, path, "ignored", QUANTISED[key]))
        elif _neutral(value):
            out.append(Fate(file, path, "ignored", "empty or off"))
        elif CHANGES_CODES.search(key):
            raise PortError(
                f"{file}: {path}={_short(value)}: no reader here knows this setting, which may change what codes mean; "
                "if the model computes the same without it, remove the key"
            )
        else:
            why = "the reader of this method has no such setting"
            out.append(Fate(file, path, "ignored", why, f"{file}: {path}={_short(value)} is ignored: {why}"))
    return out


def _judge(
    c: Config, family: Family, config: Mapping[str, Any], file: str, key: str, path: str, value: Any
) -> Iterator[Fate]:
    """Yield a Fate for one key of config.json: whether the port used or ignored the key, and why.

    If the value is a table of which the port has read keys, a Fate for each key of the table follows.

    Args:
        c: the Config of the text model, which has recorded the keys that were read.
        family: the port.
        config: contents of config.json.
        file: the file's name, for the Fates.
        key: the key.
        path: the key's place in the file, such as text_config.KEY.
        value: the key's value.

    Raises PortError for a value that the port does not implement.
    """
    if key in c.replaced:
        note = f"{path} is ignored: {c.replaced[key]}" if "no effect" in c.replaced[key] else ""
        yield Fate(file, path, "ignored", c.replaced[key], note)
        return
    if key not in c.seen or key in family.fixed:
        yield _judge_unread(file, key, path, value, family, config)
        return
    yield Fate(file, path, "used", "read by the port" if value is not None else "null; the family's default holds")
    for part in c.parts:
        if part.at.split(".")[0] != key or not part.given:
            continue
        if part.at != key:
            yield Fate(file, path + part.at.removeprefix(key), "used", "settings of these layers")
        for name, held in part.given.items():
            at = path + part.path(name).removeprefix(key)
            if name in part.ignored:
                why = part.ignored[name]
                yield Fate(file, at, "ignored", why, f"{file}: {at}={_short(held)} is ignored: {why}")
            elif name in part.seen:
                yield Fate(file, at, "used", "read by the port")
            else:
                yield _judge_nested(file, name, at, held, str(part.given.get("rope_type", part.given.get("type", ""))))


def _judge_nested(file: str, key: str, path: str, value: Any, kind: str) -> Fate:
    if _neutral(value):
        return Fate(file, path, "ignored", "empty or off")
    if key in ROPE:
        return Fate(file, path, "ignored", ROPE[key])
    why = f"rope of type {kind or 'default'!r} has no such setting"
    return Fate(file, path, "ignored", why, f"{file}: {path}={_short(value)} is ignored: {why}")


def _judge_unread(
    file: str, key: str, path: str, value: Any, family: Family, config: Mapping[str, Any], outer: bool = False
) -> Fate:
    if key in family.fixed and not outer:
        if value is None or value in family.fixed[key]:
            return Fate(file, path, "ignored", "the only value that the port computes")
        known = " or ".join(map(repr, family.fixed[key]))
        raise PortError(f"{file}: {path}={value!r}; the port of {family.models} computes {known}")
    if key in ("quantization_config", "compression_config", "quantization") and isinstance(value, Mapping) and value:
        return Fate(file, path, "used", "says how matrices are quantised")
    if key in USED and value is not None:
        return Fate(file, path, "used", USED[key])
    if _neutral(value):
        return Fate(file, path, "ignored", "empty or off")
    if key in HARMLESS:
        return Fate(file, path, "ignored", HARMLESS[key])
    code = config.get("auto_map")
    own_code = isinstance(code, Mapping) and "AutoModelForCausalLM" in code
    if own_code and COMPUTES.search(key) and not outer:
        raise PortError(
            f"{file}: {path}={_short(value)} is read by nothing here, and the model brings code of its own (auto_map) "
            f"that may read it; if {family.architecture} computes the same without it, remove the key"
        )
    why = (
        "outside text_config, which alone describes the text model" if outer
        else f"the port of {family.architecture} has no such setting"
    )  # fmt: skip
    return Fate(file, path, "ignored", why, f"{file}: {path}={_short(value)} is ignored: {why}")


def _neutral(value: Any) -> bool:
    return any(value is n or (type(value) is type(n) and value == n) for n in NEUTRAL)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
