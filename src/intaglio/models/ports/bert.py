"""BERT and its kin run as decoders (`is_decoder`): norms after each addition, a dense layer before the head.

Roberta counts positions from padding_idx + 1. RoBERTa-PreLayerNorm, XLM-RoBERTa-XL and Megatron-BERT have norms before
the branches. Electra, RemBERT and RoFormer may have embeddings of another width than the model. Also here: ERNIE 1 to
3, BigBird with full attention, BertGeneration and GIT's text decoder.
"""

from __future__ import annotations

from typing import Any

from intaglio.models.config import Config, PortError
from intaglio.models.decoder import BEFORE, SUM, Decoder, Layer, layer_norm_sizes
from intaglio.models.decoder.rope import Table
from intaglio.models.ports.bart import sinusoid
from intaglio.models.ports.family import Family
from intaglio.program.source import parts_of

BERT = {
    "hidden_act": "gelu", "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "hidden_size": 768,
    "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072, "type_vocab_size": 2,
    "vocab_size": 30522, "pad_token_id": 0, "is_decoder": False, "tie_word_embeddings": True,
}  # fmt: skip
ROBERTA = {**BERT, "vocab_size": 50265, "pad_token_id": 1}
NAMES = {
    "embed_tokens": "embeddings.word_embeddings", "embed_types": "embeddings.token_type_embeddings",
    "embed_positions": "embeddings.position_embeddings",
    "layers": "encoder.layer", "self_attn.o_proj": "attention.output.dense", "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key", "self_attn.v_proj": "attention.self.value",
    "mlp.up_proj": "intermediate.dense", "mlp.down_proj": "output.dense",
}  # fmt: skip
AFTER = {"attention_norm": "attention.output.LayerNorm", "mlp_norm": "output.LayerNorm"}
CLS, LM = "cls.predictions.decoder", "lm_head.decoder"  # modules of the head
CLS_HEAD = {
    "head_dense": "cls.predictions.transform.dense", "head_norm": "cls.predictions.transform.LayerNorm",
    f"{CLS}.bias": "cls.predictions.bias",
}  # fmt: skip
LM_HEAD = {"head_dense": "lm_head.dense", "head_norm": "lm_head.layer_norm", f"{LM}.bias": "lm_head.bias"}


def encoder(c: Config) -> dict[str, Any]:
    """Returns a dict of arguments for Decoder that all models of this file share, from config.json.

    Norms come after each addition. Raises PortError unless is_decoder is true: otherwise each token of the model
    attends to later tokens, too.
    """
    if not c.flag("is_decoder"):
        raise PortError(
            "config.json: is_decoder=False makes this an encoder, whose tokens see those after them; set it to true to "
            "run the model as a decoder, as transformers' ForCausalLM class asks"
        )
    c.refuse("add_cross_attention", why="a decoder alone attends to no encoder")
    s = layer_norm_sizes(c, "layer_norm_eps")
    return s | {
        "norms": SUM, "positions": s["context"], "token_types": int(c.get("type_vocab_size", 0)),
        "embed_norm": "embeddings.LayerNorm", "final_norm": "", "head_dense": s["hidden"], "head_bias": True,
    }  # fmt: skip


def git(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of GIT's text decoder, from config.json.

    It is a causal BERT without token types. Images are not ported. Raises PortError for missing or wrong settings.
    context: the largest number of positions.
    """
    c.table["is_decoder"] = True
    s = encoder(c) | {"head_dense": 0, "token_types": 0}
    return Decoder(**s, head="output", sources={**NAMES, **AFTER})


def numbered(c: Config) -> None:
    """Subtract pad_token_id + 1 from the config's max_position_embeddings. Changes `c` in place and returns nothing.

    In models such as RoBERTa, position 0 has row pad_token_id + 1 of the table of position embeddings, and earlier rows
    are not used. Raises PortError if no position is left.
    """
    rows, first = c.whole("max_position_embeddings"), int(c.get("pad_token_id", 0)) + 1
    if first >= rows:
        raise PortError(
            f"config.json: pad_token_id={first - 1} leaves none of max_position_embeddings={rows}; positions count "
            "from pad_token_id + 1"
        )
    c.table["max_position_embeddings"] = rows - first


def bert(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of BERT for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    return Decoder(**encoder(c), head=CLS, sources={**NAMES, **AFTER, **CLS_HEAD})


def ernie(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of ERNIE 1 to 3 for up to `context` positions, from config.json.

    Raises PortError for settings that are not ported.
    """
    c.refuse("use_task_id", why="embeddings of task types are not ported")
    return bert(c, context)


def big_bird(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of BigBird, from config.json, with full attention.

    Raises PortError for settings that are not ported. context: the largest number of positions.
    """
    kind = c.get("attention_type")
    if kind != "original_full":
        raise PortError(
            f"config.json: attention_type={kind!r} is not ported (random blocks of keys); set it to original_full, "
            "which transformers takes too when it decodes with a cache"
        )
    s, bias = encoder(c), c.flag("use_bias")
    s |= {"qkv_bias": bias, "embed_scale": s["hidden"] ** 0.5 if c.flag("rescale_embeddings") else 1.0}
    return Decoder(**s, head=CLS, sources={**NAMES, **AFTER, **CLS_HEAD})


def bert_generation(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of BertGeneration for up to `context` positions, from config.json.

    It is a BERT without token types, and without a dense layer before the head. Raises PortError for missing or wrong
    settings.
    """
    return Decoder(**encoder(c) | {"head_dense": 0, "token_types": 0}, head=LM, sources={**NAMES, **AFTER, **LM_HEAD})


def megatron(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Megatron-BERT for up to `context` positions, from config.json.

    It has norms before attention, before the MLP and after the last layer. Raises PortError for missing or wrong
    settings.
    """
    s = encoder(c) | {"norms": BEFORE, "final_norm": "norm", "embed_norm": ""}
    sources = {**NAMES, "attention_norm": "attention.ln", "mlp_norm": "ln", "norm": "encoder.ln", **CLS_HEAD}
    return Decoder(**s, head=CLS, sources=sources)


def electra(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Electra's generator, from config.json.

    Its embeddings may be narrower than its layers. Raises PortError for missing or wrong settings. context: the largest
    number of positions.
    """
    s, width = encoder(c), c.whole("embedding_size")
    s |= {"head_dense": width, "head_activation": "gelu", "embed_width": width if width != s["hidden"] else 0}
    sources = {
        **NAMES, **AFTER, "embed_proj": "embeddings_project", "head_dense": "generator_predictions.dense",
        "head_norm": "generator_predictions.LayerNorm",
    }  # fmt: skip
    return Decoder(**s, head="generator_lm_head", sources=sources)


def rembert(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of RemBERT for up to `context` positions, from config.json.

    The embedding and the output head have other widths than the layers. Raises PortError for missing or wrong settings.
    """
    s = encoder(c) | {"embed_width": c.whole("input_embedding_size"), "head_dense": c.whole("output_embedding_size")}
    sources = {
        **NAMES, **AFTER, "embed_proj": "encoder.embedding_hidden_mapping_in", "head_dense": "cls.predictions.dense",
        "head_norm": "cls.predictions.LayerNorm",
    }  # fmt: skip
    return Decoder(**s, head=CLS, sources=sources)


def roformer(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of RoFormer for up to `context` positions, from config.json.

    Queries and keys have rope (style interleaved); there are no learned positions. Raises PortError for settings that
    are not ported.
    """
    c.refuse("rotary_value", why="values are not rotated here")
    s, width = encoder(c) | {"positions": 0}, c.get("embedding_size") or c.whole("hidden_size")
    s |= {"ropes": {"rope": Table(sinusoid(s["head_dim"]), style="interleaved")}}
    s |= {
        "layers": (Layer(),) * len(s["layers"]),
        "head_dense": width,
        "embed_width": width if width != s["hidden"] else 0,
    }
    return Decoder(**s, head=CLS, sources={**NAMES, **AFTER, **CLS_HEAD, "embed_proj": "embeddings_project"})


def counted(c: Config) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns two dicts for models such as RoBERTa: (arguments of Decoder, tensor names).

    The second dict maps parts of Llama's tensor names to the checkpoint's names. The caller adds more names to it and
    passes it to Decoder as the argument `sources`, which the first dict does not have. Position 0 has row pad_token_id
    + 1 of the table of position embeddings. Raises PortError for missing or wrong settings.
    """
    s, table = encoder(c) | {"head_activation": "gelu"}, "embeddings.position_embeddings.weight"
    first = int(c.get("pad_token_id", 0)) + 1
    return s, {**NAMES, **LM_HEAD, table: parts_of(table, (first, s["positions"]))[1]}


def roberta(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of RoBERTa, used as a decoder, from config.json.

    Raises PortError for missing or wrong settings. context: the largest number of positions.
    """
    s, sources = counted(c)
    return Decoder(**s, head=LM, sources={**sources, **AFTER})


def roberta_prelayernorm(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of RoBERTa-PreLayerNorm for up to `context` positions, from config.json.

    It has norms before attention, before the MLP and after the last layer. Raises PortError unless the config sets
    is_decoder.
    """
    s, sources = counted(c)
    sources |= {"attention_norm": "attention.LayerNorm", "mlp_norm": "intermediate.LayerNorm", "norm": "LayerNorm"}
    return Decoder(**s | {"norms": BEFORE, "final_norm": "norm"}, head=LM, sources=sources)


def xlm_roberta_xl(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of XLM-RoBERTa-XL for up to `context` positions, from config.json.

    It has norms before attention, before the MLP and after the last layer, but none on the embeddings. Raises PortError
    for missing or wrong settings.
    """
    s, sources = counted(c)
    sources |= {
        "attention_norm": "attention.self_attn_layer_norm", "mlp_norm": "LayerNorm", "norm": "encoder.LayerNorm"
    }  # fmt: skip
    return Decoder(**s | {"norms": BEFORE, "final_norm": "norm", "embed_norm": ""}, head=LM, sources=sources)


def row(architecture: str, kind: str, models: str, describe: Any, defaults: dict[str, Any], prefix: str) -> Family:
    """Returns the Family (port) of an architecture like BertLMHeadModel: BERT or a variant, run as a decoder.

    Args:
        architecture: the architecture's name in config.json.
        kind: model_type in config.json.
        models: the released models of this architecture.
        describe: function (Config, context length in tokens) -> Decoder.
        defaults: values of config keys that config.json may leave out.
        prefix: name of the encoder's module, with which tensor names begin.
    """
    return Family(
        architecture, models, defaults, describe, model_types=(kind,), prefixes=(f"{prefix}.",),
        tops=("embeddings.word_embeddings",), prepare=numbered if defaults["pad_token_id"] == 1 else None,
        ignored=(f"{prefix}.pooler.", "cls.seq_relationship.", f"{prefix}.encoder.embed_positions."),
        fixed={"position_embedding_type": ("absolute",)},
    )  # fmt: skip


WIDE = {
    **ROBERTA, "vocab_size": 250880, "layer_norm_eps": 1e-5, "max_position_embeddings": 514,
    "type_vocab_size": 1,
}  # fmt: skip
FAMILIES = (
    Family(
        "GitForCausalLM", "GIT (text; images are not ported)",
        {**BERT, "num_hidden_layers": 6, "max_position_embeddings": 1024, "tie_word_embeddings": False}, git,
        model_types=("git",), prefixes=("git.",), tops=("embeddings.word_embeddings",),
        ignored=("git.image_encoder.", "git.visual_projection.", "git.img_temporal_embedding."),
    ),
    row("BertLMHeadModel", "bert", "BERT, with is_decoder", bert, BERT, "bert"),
    row("ErnieForCausalLM", "ernie", "ERNIE 1, 2, 3, with is_decoder", ernie, BERT, "ernie"),
    row("MegatronBertForCausalLM", "megatron-bert", "Megatron-BERT, with is_decoder", megatron, BERT, "bert"),
    row("BertGenerationDecoder", "bert-generation", "BertGeneration", bert_generation, BERT, "bert"),
    row("BigBirdForCausalLM", "big_bird", "BigBird with full attention, with is_decoder", big_bird,
        {**BERT, "hidden_act": "gelu_new", "max_position_embeddings": 4096, "use_bias": True,
         "attention_type": "block_sparse"}, "bert"),
    row("ElectraForCausalLM", "electra", "Electra generators, with is_decoder", electra,
        {**BERT, "embedding_size": 128, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024},
        "electra"),
    row("RemBertForCausalLM", "rembert", "RemBERT, with is_decoder", rembert,
        {**BERT, "input_embedding_size": 256, "output_embedding_size": 1664, "tie_word_embeddings": False}, "rembert"),
    row("RoFormerForCausalLM", "roformer", "RoFormer, with is_decoder", roformer,
        {**BERT, "max_position_embeddings": 1536}, "roformer"),
    row("RobertaForCausalLM", "roberta", "RoBERTa, with is_decoder", roberta, ROBERTA, "roberta"),
    row("CamembertForCausalLM", "camembert", "CamemBERT, with is_decoder", roberta, ROBERTA, "roberta"),
    row("XLMRobertaForCausalLM", "xlm-roberta", "XLM-RoBERTa, with is_decoder", roberta, ROBERTA, "roberta"),
    row("XLMRobertaXLForCausalLM", "xlm-roberta-xl", "XLM-RoBERTa-XL, with is_decoder", xlm_roberta_xl, WIDE,
        "roberta"),
    row("Data2VecTextForCausalLM", "data2vec-text", "data2vec text, with is_decoder", roberta, ROBERTA,
        "data2vec_text"),
    row("RobertaPreLayerNormForCausalLM", "roberta-prelayernorm", "RoBERTa-PreLayerNorm, with is_decoder",
        roberta_prelayernorm, ROBERTA, "roberta_prelayernorm"),
)  # fmt: skip
