"""DBRX: LayerNorms without bias; queries, keys and values clipped, in one tensor; experts stacked by rows."""

from __future__ import annotations

from collections.abc import Mapping

from intaglio.models.config import Config, PortError
from intaglio.models.decoder import Decoder, Layer, Mixture, sizes, sparse
from intaglio.models.decoder.rope import parameters, table
from intaglio.models.ports.family import Family

DEFAULTS = {
    "max_position_embeddings": 2048, "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16,
    "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip


def dbrx(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of DBRX for up to `context` positions, from config.json.

    Raises PortError for settings that are not ported.
    """
    attention, ffn = c.settings("attn_config"), c.settings("ffn_config")
    act = ffn.get("ffn_act_fn") or {"name": "silu"}
    if not isinstance(act, Mapping) or "name" not in act:
        raise PortError(f"config.json: ffn_config.ffn_act_fn={act!r}; wanted an object with the key name")
    power = ffn.get("moe_normalize_expert_weights", 1.0)
    if power not in (None, 1, 1.0):
        raise PortError(
            f"config.json: ffn_config.moe_normalize_expert_weights={power!r} is not ported; wanted 1 or null"
        )
    for key in ("attn_pdrop", "hidden_size", "moe_jitter_eps", "moe_loss_weight"):
        attention.get(key), ffn.get(key)  # of training, or a copy
    c.table |= {
        "num_key_value_heads": attention.get("kv_n_heads", 1), "head_dim": None, "hidden_act": act["name"],
        "intermediate_size": ffn.get("ffn_hidden_size", 3584), "layer_norm_eps": 1e-5,  # torch's default
    }  # fmt: skip
    c.named |= {"num_key_value_heads": "attn_config.kv_n_heads", "intermediate_size": "ffn_config.ffn_hidden_size"}
    c.named["hidden_act"] = "ffn_config.ffn_act_fn"
    c.table.setdefault("rope_theta", attention.get("rope_theta", 10000.0))
    s = sizes(c, eps="layer_norm_eps")
    count, width = int(ffn.get("moe_num_experts", 4) or 0), s["intermediate"]
    m = Mixture(
        count=count, top=int(ffn.get("moe_top_k", 1) or 0), width=width, block="ffn", router="router.layer",
        sources=(f"experts.mlp.w1|h{count}", f"experts.mlp.v1|h{count}", f"experts.mlp.w2|h{count}|T"),
        route={"normalise": power is not None},
    )  # fmt: skip
    heads, kv = s["hidden"], s["kv_heads"] * s["head_dim"]
    ends = (0, heads, heads + kv, heads + 2 * kv)
    sources = {
        f"self_attn.{n}.weight": f"norm_attn_norm.attn.Wqkv.weight|r{a}:{z}/{ends[3]}"
        for n, a, z in zip(("q_proj", "k_proj", "v_proj"), ends[:3], ends[1:], strict=True)
    }  # fmt: skip
    sources |= {
        "self_attn.o_proj": "norm_attn_norm.attn.out_proj", "embed_tokens": "wte", "norm": "norm_f", "layers": "blocks",
    }  # fmt: skip
    d = Decoder(
        **s, ropes={"rope": table(c, parameters(c), s["head_dim"], context)},
        layers=(Layer(),) * c.whole("num_hidden_layers"), norm="layer", mixture=m, head="lm_head",
        norms={"attn.norm": "norm_attn_norm.norm_1", "mlp.norm": "norm_attn_norm.norm_2"},
        clip_qkv=float(attention.get("clip_qkv") or 0), sources=sources,
    )  # fmt: skip
    return sparse(d)


FAMILIES = (
    Family(
        "DbrxForCausalLM", "DBRX", DEFAULTS, dbrx, model_types=("dbrx",), prefixes=("transformer.",), tops=("wte",),
        aliases={
            "hidden_size": "d_model", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
            "max_position_embeddings": "max_seq_len",
        },
    ),
)  # fmt: skip
