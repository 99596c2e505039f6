"""Mamba, Mamba-2 and FalconMamba: one recurrent block per layer, without attention, MLP or positions."""

from __future__ import annotations

from typing import Any

from intaglio.models.config import Config, PortError
from intaglio.models.decoder import Decoder, Layer, ScanMixer, SsmMixer
from intaglio.models.decoder.mixers import Mixer
from intaglio.models.ports.family import Family


def plain(c: Config, context: int, mixer: Mixer) -> Decoder:
    """Returns the Decoder (model description) of a model whose layers have only a recurrent block, from config.json.

    The layers have no attention and no MLP. Raises PortError for another activation than silu.

    c: the config. context: not used. mixer: the recurrent block.
    """
    c.need_silu("Mamba is ported with silu")
    hidden = c.whole("hidden_size")
    layers = tuple(Layer(mixer=mixer, mlp=False) for _ in range(c.whole("num_hidden_layers")))
    return Decoder(
        vocabulary=c.whole("vocab_size"), hidden=hidden, intermediate=hidden, heads=1, kv_heads=1, head_dim=hidden,
        context=c.whole("max_position_embeddings"), layers=layers, ropes={}, activation="silu",
        eps=c.real("layer_norm_epsilon"), tied=c.flag("tie_word_embeddings"), scale=1.0,
        norms={"attn.norm": "norm"}, prefix="backbone.", table="backbone.embeddings", head="lm_head",
        final_norm="norm_f",
    )  # fmt: skip


def limits(c: Config, key: str = "time_step_limit") -> dict[str, Any]:
    """Returns the limits of Mamba's step size dt as {"low": float, "high": float}. `high` is 0 if there is no limit.

    They are arguments of a mixer (description of a recurrent block). Raises PortError unless the config has two numbers
    with 0 <= low < high.

    c: the config. key: the config's key of the two limits.
    """
    value = c.get(key, (0.0, float("inf")))
    pair = list(value) if isinstance(value, list | tuple) else []
    infinite = ({"__float__": "Infinity"}, "Infinity")  # the first as transformers writes it
    pair = [float("inf") if x in infinite else x for x in pair]
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in pair)
    if len(pair) != 2 or not numbers or not 0 <= pair[0] < pair[1]:
        raise PortError(f"config.json: {key}={value!r}; wanted two numbers, 0 <= low < high, high may be Infinity")
    return {"low": float(pair[0]), "high": 0.0 if pair[1] == float("inf") else float(pair[1])}


def check_groups(c: Config, heads: str, groups: str) -> None:
    """Raise PortError unless the number of heads is a multiple of the number of groups. Returns nothing.

    c: the config. heads: config key of the number of heads. groups: config key of the number of groups.
    """
    if c.whole(heads) % c.whole(groups):
        raise PortError(f"config.json: {heads}={c.whole(heads)} is not a multiple of {groups}={c.whole(groups)}")


def rank_of(c: Config, key: str) -> int:
    """Returns dt_rank of Mamba, an int: the number of columns of the step size dt before the projection dt_proj.

    It is the value of the config key `key`. If the value is "auto" or missing, it is hidden_size / 16, rounded up.
    Raises PortError for another value than "auto" or an integer of 1 or more.
    """
    return -(-c.whole("hidden_size") // 16) if c.get(key, "auto") == "auto" else c.whole(key)


def mamba2(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Mamba-2 for up to `context` positions, from config.json.

    Raises PortError for settings that are not ported.
    """
    heads, dim = c.whole("num_heads"), c.whole("head_dim")
    if heads * dim != int(c.real("expand") * c.whole("hidden_size")):
        raise PortError(f"config.json: num_heads={heads} of head_dim={dim} are not expand * hidden_size columns")
    check_groups(c, "num_heads", "n_groups")
    bias = c.flag("use_bias")
    mixer = SsmMixer(
        heads=heads, head_dim=dim, groups=c.whole("n_groups"), state=c.whole("state_size"), taps=c.whole("conv_kernel"),
        eps=c.real("layer_norm_epsilon"), bias=bias, out_bias=bias, conv_bias=c.flag("use_conv_bias"), block="mixer",
        **limits(c),
    )  # fmt: skip
    return plain(c, context, mixer)


def scan(c: Config, **more: Any) -> ScanMixer:
    """Returns the ScanMixer (description of the recurrent block) of Mamba and FalconMamba, from config.json.

    Raises PortError for missing or wrong settings.

    c: the config. more: further arguments of ScanMixer.
    """
    inner = c.whole("intermediate_size", int(c.real("expand") * c.whole("hidden_size")))
    return ScanMixer(
        inner=inner, state=c.whole("state_size"), rank=rank_of(c, "time_step_rank"), taps=c.whole("conv_kernel"),
        bias=c.flag("use_bias"),
        conv_bias=c.flag("use_conv_bias"), **more,
    )  # fmt: skip


def mamba(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of Mamba for up to `context` positions, from config.json.

    Raises PortError for missing or wrong settings.
    """
    return plain(c, context, scan(c))


def falcon_mamba(c: Config, context: int) -> Decoder:
    """Returns the Decoder (model description) of FalconMamba for up to `context` positions, from config.json.

    It is Mamba with norms of dt, B and C that have no weights. Raises PortError for missing or wrong settings.
    """
    return plain(c, context, scan(c, eps=c.real("mixer_rms_eps")))


MAMBA = {
    "hidden_size": 768, "state_size": 16, "num_hidden_layers": 32, "layer_norm_epsilon": 1e-5, "expand": 2,
    "conv_kernel": 4, "use_conv_bias": True, "hidden_act": "silu", "tie_word_embeddings": True,
    "max_position_embeddings": 1 << 20,  # the state has no limit of its own
}  # fmt: skip
MAMBA2 = {
    **MAMBA, "num_heads": 128, "head_dim": 64, "hidden_size": 4096, "state_size": 128, "num_hidden_layers": 64,
    "n_groups": 8, "tie_word_embeddings": False,
}  # fmt: skip
NAMES: dict[str, Any] = {"prefixes": ("backbone.",), "tops": ("embeddings", "norm_f", "layers.0.norm")}
FALCON = {**MAMBA, "hidden_size": 4096, "num_hidden_layers": 64, "mixer_rms_eps": 1e-6}
FAMILIES = (
    Family(
        "Mamba2ForCausalLM", "Mamba-2 130M to 2.7B, Mamba-Codestral-7B", MAMBA2, mamba2, model_types=("mamba2",),
        **NAMES,
    ),
    Family("MambaForCausalLM", "Mamba 130M to 2.8B", MAMBA, mamba, model_types=("mamba",), **NAMES),
    Family(
        "FalconMambaForCausalLM", "FalconMamba-7B", FALCON, falcon_mamba, model_types=("falcon_mamba",), **NAMES
    ),
)  # fmt: skip
