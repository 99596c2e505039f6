"""Decoders of encoder-decoder models run alone, as transformers' ForCausalLM classes do: no attention to an encoder.

BART, PLBart, MVP, Marian, TrOCR and Blenderbot-Small have norms after each addition; MBart, Blenderbot, Pegasus and
BigBird-Pegasus before the branches. Pegasus and Marian add sinusoids, the others learned positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from intaglio.models.config import Config, PortError
from intaglio.models.decoder import BEFORE, SUM, Decoder, layer_norm_sizes
from intaglio.models.ports.family import Family
from intaglio.program.source import parts_of

ALIASES = {
    "hidden_size": "d_model", "num_hidden_layers": "decoder_layers", "num_attention_heads": "decoder_attention_heads",
    "intermediate_size": "decoder_ffn_dim", "hidden_act": "activation_function",
}  # fmt: skip
BART = {
    "hidden_act": "gelu", "max_position_embeddings": 1024, "hidden_size": 1024, "decoder_layers": 12,
    "decoder_attention_heads": 16, "decoder_ffn_dim": 4096, "scale_embedding": False, "tie_word_embeddings": True,
}  # fmt: skip
NAMES = {
    "self_attn.o_proj": "self_attn.out_proj", "mlp.up_proj": "fc1", "mlp.down_proj": "fc2",
    "attention_norm": "self_attn_layer_norm", "mlp_norm": "final_layer_norm",
}  # fmt: skip
OFFSET = 2  # rows of the table of positions before that of position 0


def fields(c: Config, offset: int = OFFSET) -> dict[str, Any]:
    """Returns a dict of arguments for Decoder that all models of this file share, from config.json.

    Norms come after each addition, and the embeddings are normed. Raises PortError for a model with an encoder.

    c: the config. offset: row of position 0 in the table of learned positions.
    """
    c.refuse("is_encoder_decoder", why="only the decoder alone is ported; save it from the ForCausalLM class")
    c.table["layer_norm_eps"] = 1e-5  # torch's default
    s, sources = layer_norm_sizes(c, "layer_norm_eps"), dict(NAMES)
    if offset:
        sources["embed_positions.weight"] = parts_of("embed_positions.weight", (offset, s["context"]))[1]
    return s | {
        "norms": SUM, "positions": s["context"], "final_norm": "",
        "embed_norm": "layernorm_embedding", "sources": sources, "head": "lm_head",
        "embed_scale": s["hidden"] ** 0.5 if c.flag("scale_embedding") else 1.0,
    }  # fmt: skip


def sinusoid(width: int) -> tuple[float, ...]:
    """Returns the frequencies of sinusoidal positions, a tuple of width / 2 floats: 10000^(-2i / width) at index i.

    This is the formula of Vaswani et al. 2017.
    """
    return tuple(float(x) for x in (10000.0 ** (-2 * np.arange(width // 2) / width)).astype(np.float32))


def bart(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of BART's decoder, from config.json. It attends to no encoder.

    Raises PortError for missing or wrong settings. context: the largest number of positions.
    """
    return Decoder(**fields(c))


def mvp(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of MVP's decoder, from config.json. It attends to no encoder.

    Raises PortError for settings that are not ported. context: the largest number of positions.
    """
    c.refuse("use_prompt", why="prompts that precede the keys of each layer are not ported")
    return bart(c, context)


def trocr(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of TrOCR's decoder, from config.json. It attends to no encoder.

    Raises PortError for settings that are not ported. context: the largest number of positions.
    """
    if not c.flag("use_learned_position_embeddings"):
        raise PortError(
            "config.json: use_learned_position_embeddings=False is not ported, nor does transformers 5 load it"
        )
    s = fields(c) | {"head": "output_projection"}
    if not c.flag("layernorm_embedding"):
        s["embed_norm"] = ""
    return Decoder(**s)


def blenderbot_small(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Blenderbot-Small's decoder, from config.json.

    It attends to no encoder. Embeddings are normed before positions are added. Raises PortError for missing or wrong
    settings. context: the largest number of positions.
    """
    return Decoder(**fields(c, offset=0), embed_norm_first=True)


def marian(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Marian's decoder, from config.json. It attends to no encoder.

    Positions are sinusoidal, and embeddings are not normed. Raises PortError for missing or wrong settings. context:
    the largest number of positions.
    """
    s = fields(c) | {"positions": 0, "embed_norm": ""}
    s["vocabulary"] = c.whole("decoder_vocab_size", s["vocabulary"])
    return Decoder(**s, sinusoid=sinusoid(s["hidden"]))


def before(c: Config, offset: int = 0) -> dict[str, Any]:
    """Returns a dict of arguments for Decoder, for models with norms before attention and MLP and after the last layer.

    Embeddings are not normed. Raises PortError for a model with an encoder.

    c: the config. offset: row of position 0 in the table of learned positions.
    """
    s = fields(c, offset) | {"norms": BEFORE, "final_norm": "norm", "embed_norm": ""}
    s["sources"] |= {"norm": "layer_norm"}
    return s


def mbart(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of mBART's decoder, from config.json. It attends to no encoder.

    Raises PortError for missing or wrong settings. context: the largest number of positions.
    """
    return Decoder(**before(c, OFFSET) | {"embed_norm": "layernorm_embedding"})


def blenderbot(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Blenderbot's decoder, from config.json. It attends to no encoder.

    Raises PortError for missing or wrong settings. context: the largest number of positions.
    """
    return Decoder(**before(c))


def pegasus(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Pegasus's decoder, from config.json. It attends to no encoder.

    Raises PortError for missing or wrong settings. context: the largest number of positions.
    """
    s = before(c) | {"positions": 0}
    return Decoder(**s, sinusoid=sinusoid(s["hidden"]))


def bigbird_pegasus(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of BigBird-Pegasus's decoder, from config.json. It attends to no encoder.

    Raises PortError for missing or wrong settings. context: the largest number of positions.
    """
    bias = c.flag("use_bias")
    s = before(c) | {"qkv_bias": bias, "o_bias": bias}
    s["sources"] |= {"norm": "layernorm_embedding"}
    return Decoder(**s)


def row(
    kind: str, architecture: str, models: str, describe: Callable[[Config, int], Decoder], **defaults: Any
) -> Family:
    """Returns the Family (port) of an encoder-decoder model like BART. Only the decoder of such a model is ported.

    Args:
        kind: model_type in config.json.
        architecture: the architecture's name in config.json.
        models: the released models of this architecture.
        describe: function (Config, context length in tokens) -> Decoder.
        defaults: defaults of config keys that differ from BART's defaults.
    """
    positions = () if describe not in (pegasus, marian) else ("model.decoder.embed_positions.",)  # computed here
    return Family(
        architecture, f"{models}: the decoder alone", {**BART, **defaults}, describe, model_types=(kind,),
        prefixes=("model.decoder.",), ignored=("*.encoder_attn.", "*.encoder_attn_layer_norm.", *positions),
        aliases=ALIASES, tops=("embed_tokens",),
    )  # fmt: skip


FAMILIES = (
    row("bart", "BartForCausalLM", "BART", bart),
    row("plbart", "PLBartForCausalLM", "PLBart", bart, hidden_size=768, decoder_layers=6, decoder_attention_heads=12,
        decoder_ffn_dim=3072, scale_embedding=True),
    row("mvp", "MvpForCausalLM", "MVP", mvp),
    row("trocr", "TrOCRForCausalLM", "TrOCR", trocr, max_position_embeddings=512, layernorm_embedding=True,
        use_learned_position_embeddings=True),
    row("blenderbot-small", "BlenderbotSmallForCausalLM", "Blenderbot 90M", blenderbot_small, hidden_size=512,
        max_position_embeddings=512, decoder_layers=8, decoder_ffn_dim=2048),
    row("marian", "MarianForCausalLM", "Marian, OPUS-MT", marian),
    row("mbart", "MBartForCausalLM", "mBART", mbart),
    row("blenderbot", "BlenderbotForCausalLM", "Blenderbot 400M, 1B, 3B", blenderbot, max_position_embeddings=128,
        hidden_size=2560, decoder_layers=24, decoder_attention_heads=32, decoder_ffn_dim=10240),
    row("pegasus", "PegasusForCausalLM", "Pegasus", pegasus),
    row("bigbird_pegasus", "BigBirdPegasusForCausalLM", "BigBird-Pegasus", bigbird_pegasus, hidden_act="gelu_new",
        max_position_embeddings=4096, decoder_layers=16, scale_embedding=True, use_bias=False),
)  # fmt: skip
