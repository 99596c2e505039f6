"""The llama.cpp architectures that are supported: the names of their tensors, and how to read their metadata."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from intaglio.models.files.gguf import config, config_gemma, config_gpt, config_mixtures, config_recurrent, recurrent
from intaglio.models.files.gguf.metadata import Metadata
from intaglio.models.files.gguf.tensors import Place, Tables

Change = Callable[[Tables, Metadata, str, Place], None]

INDEXER = {
    "indexer.k_norm": "self_attn.indexer.k_norm", "indexer.proj": "self_attn.indexer.weights_proj",
    "indexer.attn_k": "self_attn.indexer.wk", "indexer.attn_q_b": "self_attn.indexer.wq_b",
}  # fmt: skip
PROJECTIONS = ("gate", "up", "down")
COMMON = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
}  # fmt: skip
SANDWICH = {
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
LATENT = {
    "attn_q_a": "self_attn.q_a_proj", "attn_q_a_norm": "self_attn.q_a_layernorm", "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa", "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
}  # fmt: skip


def mlp(block: str = "mlp") -> dict[str, str]:
    """The names of a dense MLP's tensors, as {name in llama.cpp: name in transformers}.

    Names are without the layer's number and without .weight: {"ffn_up": "mlp.up_proj", ...}. block: name of the MLP's
    module in transformers.
    """
    return {f"ffn_{n}": f"{block}.{n}_proj" for n in PROJECTIONS}


def mixture(
    block: str = "mlp", router: str = "gate", own: str = "{}_proj", shared: str = "", correction: str = ""
) -> dict[str, str]:
    """The names of a mixture of experts' tensors, as {name in llama.cpp: name in transformers}.

    Names are without the layer's number and without .weight. The names of experts' projections contain "{e}" in place
    of the expert's number.

    Args:
        block: name of the mixture's module in transformers.
        router: name of the router's module in the block.
        own: name of an expert's projection, with {} in place of gate, up or down. "w": they are called w1 (gate), w3
            (up) and w2 (down).
        shared: name of the shared expert's module; "": none.
        correction: name of the router's bias; "": none.
    """
    numbered = {"gate": "w1", "up": "w3", "down": "w2"}
    names = {"ffn_gate_inp": f"{block}.{router}", "exp_probs_b": correction and f"{block}.{correction}"}
    for n in PROJECTIONS:
        names[f"ffn_{n}_exps"] = f"{block}.experts.{{e}}." + (numbered[n] if own == "w" else own.format(n))
        names[f"ffn_{n}_shexp"] = shared and f"{block}.{shared}.{n}_proj"
    return {ours: theirs for ours, theirs in names.items() if theirs}


@dataclass(frozen=True)
class Architecture:
    """Rules that translate the metadata and tensor names of one llama.cpp architecture to those of transformers.

    Names of tensors are without the layer's number and without .weight or .bias, such as attn_q for
    blk.3.attn_q.weight.

    Attributes:
        describe: function that makes a config.json, as a dict, from the file's metadata.
        names: {name in llama.cpp: name in transformers}, in addition to those in COMMON.
        permuted: True if the file stores the rows of Q and K in the order for interleaved rope.
        shift: offset that the converter added to norm weights.
        variants: {name in llama.cpp of a tensor that only some files have: a dict like `names`}. If a file has the
            tensor, the entries of this dict override those of `names`.
        changes: {name in llama.cpp of a tensor whose values the converter has changed: function that undoes the change
            and adds the tensor to the file's Tables}.
        scales: {name X in llama.cpp: full name in transformers of the tensor X.scale}.
    """

    describe: Callable[[Metadata], dict[str, Any]]
    names: Mapping[str, str] = field(default_factory=mlp)
    permuted: bool = False
    shift: float = 0.0
    variants: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    changes: Mapping[str, Change] = field(default_factory=dict)
    scales: Mapping[str, str] = field(default_factory=dict)

    def variant(self, parts: Collection[str]) -> Architecture:
        """A copy of this Architecture with the tensor names that fit one file.

        The entries of `variants` are applied for those tensors that the file has. parts: names in llama.cpp of the
        file's tensors, without layer numbers and without .weight or .bias, such as attn_q.
        """
        names = dict(self.names)
        for part, others in self.variants.items():
            names |= others if part in parts else {}
        return replace(self, names=names, variants={})

    def name(self, part: str) -> str | None:
        """The name in transformers of a tensor in a GGUF file; None if the tensor is not known.

        For example, attn_q gives self_attn.q_proj. The result is without .weight. part: name of the tensor in
        llama.cpp.
        """
        return self.names.get(part) or COMMON.get(part)


MIXTRAL = mixture("block_sparse_moe", own="w")
UP_DOWN = {"ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}  # an MLP without a gate
LFM2 = {
    "token_embd_norm": "model.embedding_norm", "attn_norm": "operator_norm", "ffn_norm": "ffn_norm",
    "attn_q_norm": "self_attn.q_layernorm", "attn_k_norm": "self_attn.k_layernorm",
    "attn_output": "self_attn.out_proj", "ffn_gate": "feed_forward.w1", "ffn_up": "feed_forward.w3",
    "ffn_down": "feed_forward.w2", "shortconv.conv": "conv.conv", "shortconv.in_proj": "conv.in_proj",
    "shortconv.out_proj": "conv.out_proj",
}  # fmt: skip
SCAN = {
    "ssm_in": "in_proj", "ssm_conv1d": "conv1d", "ssm_x": "x_proj", "ssm_dt": "dt_proj", "ssm_a": "A_log",
    "ssm_d": "D", "ssm_out": "out_proj", "ssm_dt_norm": "dt_layernorm", "ssm_b_norm": "b_layernorm",
    "ssm_c_norm": "c_layernorm",
}  # fmt: skip
SSM = {
    "ssm_in": "in_proj", "ssm_conv1d": "conv1d", "ssm_dt": "dt_bias", "ssm_a": "A_log", "ssm_d": "D",
    "ssm_norm": "norm", "ssm_out": "out_proj",
}  # fmt: skip
SSM_CHANGES = {"ssm_a": recurrent.rates, "ssm_d": recurrent.vector, "ssm_norm": recurrent.vector}
DELTA = {
    "attn_qkv": "linear_attn.in_proj_qkv", "attn_gate": "linear_attn.in_proj_z", "ssm_beta": "linear_attn.in_proj_b",
    "ssm_alpha": "linear_attn.in_proj_a", "ssm_ba": "linear_attn.in_proj_ba", "ssm_in": "linear_attn.in_proj_qkvz",
    "ssm_conv1d": "linear_attn.conv1d", "ssm_dt": "linear_attn.dt_bias", "ssm_a": "linear_attn.A_log",
    "ssm_norm": "linear_attn.norm", "ssm_out": "linear_attn.out_proj",
    "post_attention_norm": "post_attention_layernorm",
}  # fmt: skip
TILED = ("attn_qkv", "attn_gate", "ssm_beta", "ssm_alpha", "ssm_conv1d", "ssm_dt", "ssm_a")
TILED_CHANGES = {part: recurrent.by_value_head for part in TILED} | {"ssm_out": recurrent.columns_by_value_head}
SHARED = mixture(shared="shared_expert") | {"ffn_gate_inp_shexp": "mlp.shared_expert_gate"}
OLDER_NORMS = {"ffn_norm": "pre_ff_layernorm", "output_norm": "model.final_layernorm"}
PER_LAYER = {
    "per_layer_token_embd": "model.embed_tokens_per_layer", "inp_gate": "per_layer_input_gate",
    "per_layer_model_proj": "model.per_layer_model_projection", "proj": "per_layer_projection",
    "per_layer_proj_norm": "model.per_layer_projection_norm", "post_norm": "post_per_layer_input_norm",
}  # fmt: skip
ALTUP = {
    "altup_proj": "model.altup_projections.{e}", "altup_unembd_proj": "model.altup_unembed_projections.{e}",
    "altup_correct_coef": "altup.correction_coefs", "altup_correct_scale": "altup.correct_output_scale",
    "altup_predict_coef": "altup.prediction_coefs", "altup_router": "altup.modality_router",
    "altup_router_norm": "altup.router_norm", "laurel_l": "laurel.linear_left", "laurel_r": "laurel.linear_right",
    "laurel_post_norm": "laurel.post_laurel_norm",
}  # fmt: skip
BITNET = mlp() | {"attn_sub_norm": "self_attn.attn_sub_norm", "ffn_sub_norm": "mlp.ffn_sub_norm"}
SPARSE = mlp() | LATENT | INDEXER | mixture(shared="shared_experts", correction="gate.e_score_correction_bias")


def block(name: str, names: Mapping[str, str]) -> dict[str, str]:
    """A copy of the dict `names` for tensors inside a module: each value begins with the module's name and a dot.

    names: {name in llama.cpp: name in transformers}. name: name of the module.
    """
    return {ours: f"{name}.{theirs}" for ours, theirs in names.items()}


NEMOTRON_H = mlp("mixer") | block("mixer", SSM) | {"attn_norm": "norm", "output_norm": "model.norm_f"}
REFUSED = {  # architectures that are near to one with a port: why it cannot run them, and what to do
    "gemma4-assistant": "it drafts tokens for a Gemma 4 model and cannot run alone; give the model's file",
}
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(config.llama, mlp() | MIXTRAL, permuted=True),
    "mistral3": Architecture(config.mistral3, mlp() | MIXTRAL, permuted=True),
    "llama4": Architecture(
        config_mixtures.llama4, mlp("feed_forward") | mixture("feed_forward", "router", shared="shared_expert")
    ),
    "qwen2": Architecture(config.qwen("Qwen2ForCausalLM")),
    "qwen2vl": Architecture(config.qwen("Qwen2ForCausalLM")),
    "qwen3": Architecture(config.qwen("Qwen3ForCausalLM")),
    "qwen3vl": Architecture(config.qwen("Qwen3ForCausalLM")),
    "qwen2moe": Architecture(
        config_mixtures.qwen_moe("Qwen2MoeForCausalLM", normalised=False),
        mlp() | mixture(shared="shared_expert") | {"ffn_gate_inp_shexp": "mlp.shared_expert_gate"},
    ),
    "qwen3moe": Architecture(config_mixtures.qwen_moe("Qwen3MoeForCausalLM", normalised=True), mlp() | mixture()),
    "qwen3vlmoe": Architecture(config_mixtures.qwen_moe("Qwen3MoeForCausalLM", normalised=True), mlp() | mixture()),
    "gemma": Architecture(config.plain("GemmaForCausalLM"), shift=1.0),
    "gemma2": Architecture(config_gemma.gemma2, mlp() | SANDWICH, shift=1.0),
    "gemma3": Architecture(config_gemma.gemma3, mlp() | SANDWICH, shift=1.0),
    "gemma3n": Architecture(config_gemma.gemma3n, mlp() | SANDWICH | PER_LAYER | ALTUP),
    "phi3": Architecture(
        config.phi3, {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"}
    ),
    "phimoe": Architecture(config_mixtures.phimoe, MIXTRAL),
    "granite": Architecture(config.granite("GraniteForCausalLM"), permuted=True),
    "granitemoe": Architecture(
        config.granite("GraniteMoeForCausalLM"),
        mixture("block_sparse_moe", "router.layer", shared="shared_mlp"), permuted=True,
    ),
    "olmo2": Architecture(config.olmo2, mlp() | SANDWICH),
    "olmoe": Architecture(config_mixtures.olmoe, mixture()),
    "command-r": Architecture(config.command_r),
    "cohere2": Architecture(config.cohere2),
    "arcee": Architecture(config.plain("ArceeForCausalLM"), UP_DOWN, permuted=True),
    "seed_oss": Architecture(
        config.plain("SeedOssForCausalLM"), mlp() | {"post_attention_norm": "post_attention_layernorm"}
    ),
    "ernie4_5": Architecture(config.plain("Ernie4_5ForCausalLM")),
    "hunyuan-dense": Architecture(
        config.plain("HunYuanDenseV1ForCausalLM"),
        mlp() | {"attn_q_norm": "self_attn.query_layernorm", "attn_k_norm": "self_attn.key_layernorm"},
    ),
    "exaone4": Architecture(
        config.exaone4,
        mlp() | {
            "post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
        },
    ),
    "dots1": Architecture(
        config_mixtures.dots1, mlp() | mixture(shared="shared_experts", correction="gate.e_score_correction_bias")
    ),
    "ernie4_5-moe": Architecture(
        config_mixtures.ernie4_5_moe,
        mlp() | mixture(shared="shared_experts", correction="moe_statics.e_score_correction_bias"),
    ),
    "olmo": Architecture(config.olmo, permuted=True),
    "nemotron": Architecture(config.nemotron, UP_DOWN, shift=1.0),
    "starcoder2": Architecture(config.starcoder2, {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}),
    "smollm3": Architecture(config.smollm3, permuted=True),
    "glm4": Architecture(
        config.glm4,
        {
            "post_attention_norm": "post_self_attn_layernorm", "post_ffw_norm": "post_mlp_layernorm",
            "ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj",
        },
    ),
    "glm4moe": Architecture(
        config_mixtures.glm4_moe,
        mlp() | mixture(shared="shared_experts", correction="gate.e_score_correction_bias")
        | {"post_attention_norm": "post_attention_layernorm"},
    ),
    "gpt-oss": Architecture(
        config_mixtures.gpt_oss,
        mixture(router="router") | {"post_attention_norm": "post_attention_layernorm", "attn_sinks": "self_attn.sinks"},
    ),
    "minimax-m2": Architecture(
        config_mixtures.minimax_m2, mixture("block_sparse_moe", own="w", correction="e_score_correction_bias")
    ),
    "gpt2": Architecture(
        config_gpt.gpt2, UP_DOWN | {"position_embd": "model.embed_positions", "attn_norm": "ln_1", "ffn_norm": "ln_2"}
    ),
    "starcoder": Architecture(
        config_gpt.starcoder,
        UP_DOWN | {"position_embd": "model.embed_positions", "attn_norm": "ln_1", "ffn_norm": "ln_2"},
    ),
    "gptneox": Architecture(config_gpt.gptneox, UP_DOWN),
    "falcon": Architecture(
        config_gpt.falcon, UP_DOWN, variants={"attn_norm_2": {"attn_norm": "ln_mlp", "attn_norm_2": "ln_attn"}}
    ),
    "phi2": Architecture(config_gpt.phi2, UP_DOWN),
    "stablelm": Architecture(config_gpt.stablelm),
    "bloom": Architecture(config_gpt.bloom, UP_DOWN | {"token_embd_norm": "model.word_embeddings_layernorm"}),
    "mpt": Architecture(config_gpt.mpt, UP_DOWN | {"attn_norm": "norm_1", "ffn_norm": "norm_2"}),
    "chatglm": Architecture(config.chatglm, {"ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"}),
    "hunyuan-moe": Architecture(
        config_mixtures.hunyuan_moe,
        mixture(router="gate.wg", shared="shared_mlp")
        | {"attn_q_norm": "self_attn.query_layernorm", "attn_k_norm": "self_attn.key_layernorm"},
    ),
    "afmoe": Architecture(
        config_mixtures.afmoe,
        mlp() | mixture(router="router.gate", shared="shared_experts", correction="expert_bias")
        | {
            "attn_gate": "self_attn.gate_proj", "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_mlp_layernorm", "post_ffw_norm": "post_mlp_layernorm",
        },
    ),
    "lfm2": Architecture(config_recurrent.lfm2, LFM2),
    "lfm2moe": Architecture(
        config_recurrent.lfm2_moe, LFM2 | mixture("feed_forward", own="w", correction="expert_bias")
    ),
    "minicpm3": Architecture(config.minicpm3, mlp() | LATENT),
    "deepseek2": Architecture(
        config_mixtures.deepseek2,
        mlp() | LATENT | mixture(shared="shared_experts", correction="gate.e_score_correction_bias"),
    ),
    "glm-dsa": Architecture(config_mixtures.indexed("GlmMoeDsaForCausalLM"), SPARSE),
    "deepseek32": Architecture(config_mixtures.indexed("DeepseekV32ForCausalLM"), SPARSE),
    "jais2": Architecture(config.jais2, UP_DOWN),
    "mamba": Architecture(
        config_recurrent.mamba,
        block("mixer", SCAN) | {"attn_norm": "norm", "output_norm": "model.norm_f"}, changes={"ssm_a": recurrent.rates},
    ),
    "mamba2": Architecture(
        config_recurrent.mamba2,
        block("mixer", SSM) | {"attn_norm": "norm", "output_norm": "model.norm_f"}, changes=SSM_CHANGES,
    ),
    "jamba": Architecture(
        config_recurrent.jamba,
        mlp("feed_forward") | mixture("feed_forward", "router") | block("mamba", SCAN) | OLDER_NORMS,
        changes={"ssm_a": recurrent.rates},
    ),
    "falcon-h1": Architecture(
        config_recurrent.falcon_h1, mlp("feed_forward") | block("mamba", SSM) | OLDER_NORMS, changes=SSM_CHANGES
    ),
    "granitehybrid": Architecture(
        config_recurrent.granite_hybrid,
        mlp("shared_mlp") | mixture("block_sparse_moe", "router.layer", shared="shared_mlp") | block("mamba", SSM),
        permuted=True, changes=SSM_CHANGES,
    ),
    "nemotron_h": Architecture(config_recurrent.nemotron_h, NEMOTRON_H, changes=SSM_CHANGES),
    "nemotron_h_moe": Architecture(
        config_recurrent.nemotron_h,
        NEMOTRON_H | mixture("mixer", shared="shared_experts", correction="gate.e_score_correction_bias")
        | {"ffn_latent_down": "mixer.fc1_latent_proj", "ffn_latent_up": "mixer.fc2_latent_proj"},
        changes=SSM_CHANGES,
    ),
    "qwen3next": Architecture(
        config_recurrent.delta_nets("Qwen3NextForCausalLM"), SHARED | DELTA, shift=1.0,
        changes={"ssm_a": recurrent.rates, "ssm_ba": recurrent.beta_and_step, "ssm_in": recurrent.queries_to_gate},
    ),
    "qwen35": Architecture(
        config_recurrent.delta_nets("Qwen3_5ForCausalLM"), mlp() | DELTA, shift=1.0, changes=TILED_CHANGES
    ),
    "qwen35moe": Architecture(
        config_recurrent.delta_nets("Qwen3_5MoeForCausalLM"), SHARED | DELTA, shift=1.0, changes=TILED_CHANGES
    ),
    "gemma4": Architecture(
        config_gemma.gemma4,
        mlp() | SANDWICH | PER_LAYER | mixture("moe", "router.proj") | {
            "layer_output_scale": "layer_scalar", "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
            "post_ffw_norm_1": "post_feedforward_layernorm_1", "post_ffw_norm_2": "post_feedforward_layernorm_2",
        },
        scales={"ffn_gate_inp": "moe.router.scale", "ffn_down_exps": "moe.router.per_expert_scale"},
    ),
    "exaone-moe": Architecture(
        config_mixtures.exaone_moe,
        mlp() | mixture(shared="shared_experts", correction="e_score_correction_bias"),
    ),
    "apertus": Architecture(
        config.apertus, UP_DOWN | {"attn_norm": "attention_layernorm", "ffn_norm": "feedforward_layernorm"}
    ),
    "dbrx": Architecture(
        config_mixtures.dbrx,
        mixture("ffn", "router.layer")
        | {"attn_norm": "norm_attn_norm.norm_1", "attn_output_norm": "norm_attn_norm.norm_2"},
    ),
    "bitnet": Architecture(config.bitnet("silu"), BITNET),
    "bitnet-b1.58": Architecture(config.bitnet("relu2"), BITNET),
    "cohere2moe": Architecture(config_mixtures.cohere2_moe, mlp() | mixture(shared="shared_experts")),
    "mellum": Architecture(config_mixtures.mellum, mlp() | mixture()),
    "hy_v3": Architecture(
        config_mixtures.hy_v3, mlp() | mixture(router="router.gate", shared="shared_mlp", correction="expert_bias")
    ),
    "mimo2": Architecture(
        config_mixtures.mimo2,
        mlp() | mixture(correction="gate.e_score_correction_bias")
        | {"attn_sinks": "self_attn.attention_sink_bias"},
    ),
}  # fmt: skip
