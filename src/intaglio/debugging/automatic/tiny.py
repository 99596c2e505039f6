"""Tiny random models of an architecture, and variants of their configuration: sizes, switches and numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from intaglio.debugging.porting import PortingError
from intaglio.models.config import ACTIVATIONS

LAYERS = 4
SIZES: dict[str, Any] = {  # of the tiny model, where its configuration has such a key
    "hidden_size": 64, "intermediate_size": 88, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "vocab_size": 263, "num_key_value_heads": 2, "head_dim": 24, "max_position_embeddings": 257, "num_experts": 8,
    "num_local_experts": 8, "n_routed_experts": 8, "moe_num_experts": 8, "num_experts_per_tok": 3, "moe_topk": 3,
    "moe_k": 3, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 56, "shared_intermediate_size": 56,
    "n_group": 1, "topk_group": 1, "sliding_window": 20, "ffn_dim": 88, "decoder_ffn_dim": 88,
    "decoder_layers": LAYERS, "decoder_attention_heads": 4, "word_embed_proj_dim": 64, "num_layers": LAYERS,
    "attention_heads": 4, "num_heads": 4, "n_inner": 88, "rotary_dim": 12, "intermediate_size_mlp": 72,
}  # fmt: skip
OTHER_SIZES: dict[str, Any] = {  # a second set
    "hidden_size": 96, "intermediate_size": 104, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 12,
    "vocab_size": 271, "moe_intermediate_size": 48, "num_experts": 6, "num_local_experts": 6, "n_routed_experts": 6,
    "moe_num_experts": 6, "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2, "ffn_dim": 104, "decoder_ffn_dim": 104,
    "decoder_attention_heads": 6, "shared_expert_intermediate_size": 72, "shared_intermediate_size": 72,
    "word_embed_proj_dim": 96, "attention_heads": 6, "num_heads": 6, "n_inner": 104, "sliding_window": 14,
}  # fmt: skip
TOKENS = {"pad_token_id": 256, "bos_token_id": 257, "eos_token_id": 258}
DERIVED = ("layer_types", "mlp_layer_types", "no_rope_layers", "moe_layers", "qk_head_dim", "layers_block_type")
OTHER_LAYERS = ("conv", "linear_attention", "indexed_attention", "hybrid", "chunked_attention")  # of layer_types
TRAINING = ("dropout", "pdrop", "initializer", "init_std", "aux", "jitter", "_coef", "layerdrop", "z_loss", "token_id")
OUTPUTS = (
    "use_cache", "output_", "return_dict", "is_encoder_decoder", "add_cross_attention", "is_decoder", "torchscript",
    "tie_encoder_decoder", "chunk_size_feed_forward", "gradient_checkpointing", "pretraining_tp", "_index", "use_mems",
)  # fmt: skip
EPS = 3e-5
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}
LARGEST = 5_000_000  # parameters of a tiny model


def parameters(make: Any, config: Any) -> int:
    """Return the number of parameters of the model make(config); 0 if it cannot be built.

    The model is built on torch's meta device. `make` is a function that builds a transformers model. `config` is a
    transformers config object.
    """
    import torch

    try:
        with torch.device("meta"):
            return sum(p.numel() for p in make(config, attn_implementation="eager").parameters())
    except TypeError:
        return 0


class TinyModels:
    """Builds tiny transformers models of one architecture with random weights.

    Args:
        config: the config.json of the model to port, or the default configuration that transformers has for its
            model_type.

    Raises PortingError if torch or transformers is missing.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        try:
            import torch
            import transformers
        except ImportError:
            raise PortingError(
                "an automatic port needs torch and transformers: pip install torch transformers"
            ) from None
        torch.set_num_threads(1)
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        inner = {**config, **(config.get("text_config") or {})}
        self.architecture = str((config.get("architectures") or [""])[0])
        self.model_type = str(inner["model_type"])
        usual = transformers.AutoConfig.for_model(self.model_type).get_text_config()
        self.kind = type(usual)
        self.usual: dict[str, Any] = usual.to_dict()
        self.derived = {  # computed where config.json is silent: the class has None or another value
            k for k, value in self.usual.items() if (own := getattr(self.kind, k, value)) is None or own != value
        }
        self.own = dict(getattr(self.kind, "attribute_map", None) or {})  # usual name of a key: the one it has here
        self.given = {k: v for k, v in inner.items() if k in self.usual and k not in (*DERIVED, "dtype", "torch_dtype")}
        self.model_class = getattr(transformers, self.architecture, None)
        self.without: set[str] = set()  # keys that this architecture does not take at other values

    def key(self, name: str) -> str:
        """Return the key under which this architecture's configuration stores the setting `name`.

        For example, GPT-2 stores hidden_size as n_embd. The result is `name` itself if the architecture has no other
        key for it.
        """
        return self.own.get(name, name)

    def has(self, name: str) -> bool:
        """True if this architecture's configuration has the setting `name`.

        It may have the setting under the key `name` or under the key that key() returns.
        """
        return self.key(name) in self.usual

    def settings(self, **changes: Any) -> dict[str, Any]:
        """Return the tiny model's configuration as a dict {key of config.json: value}.

        It starts from the values of the model to port. The sizes are then made small, and `changes` are applied last.
        """
        sizes = {self.key(k): v for k, v in SIZES.items() if self.has(k) and self._sized(k) and k not in self.without}
        tokens = {k: v for k, v in TOKENS.items() if k in self.usual}
        eps = {k: EPS for k in self.usual if "eps" in k and isinstance(self.usual[k], float)}
        return {**self.given, **sizes, **tokens, **eps, **{self.key(k): v for k, v in changes.items()}}

    def _sized(self, key: str) -> bool:
        """True if the tiny model sets the size `key` to a small value; False if it leaves out the key.

        The key is left out if its value in the original model is None, because None switches a feature off. A few keys,
        such as head_dim, are set even then, because for them None means that the size is computed from other sizes.
        """
        value = self.given.get(self.key(key), self.usual.get(self.key(key)))
        return value is not None or key in (
            "num_key_value_heads",
            "n_inner",
            "head_dim",
            "n_routed_experts",
            "num_experts_per_tok",
        )

    def config(self, **changes: Any) -> Any:
        """Return the tiny model's configuration as a transformers config object.

        The keyword arguments in `changes` set keys of the configuration to other values. Raises PortingError if
        transformers refuses the configuration.
        """
        try:
            return self.kind(**json.loads(json.dumps(self.settings(**changes))))
        except Exception as e:
            raise PortingError(f"transformers refuses a {self.model_type} with {changes or 'small sizes'}: {e}") from e

    def untraced_layer_types(self) -> list[str]:
        """Return a list of layer types that the architecture supports and that the tiny model does not have.

        A layer type is a text that can stand in the config key layer_types. Each type in OTHER_LAYERS is tried: a model
        is built whose first layer has this type. The type is in the list if this model contains a class of modules that
        the tiny model does not contain. The list is empty if the configuration has no key layer_types. Raises
        PortingError if the tiny model cannot be built.
        """
        if "layer_types" not in self.usual:
            return []
        known, found = {type(m) for m in self.build().modules()}, list[str]()
        for kind in OTHER_LAYERS:
            try:
                other = self.build(layer_types=[kind] + ["full_attention"] * (LAYERS - 1))
            except PortingError:
                continue  # the architecture has no such layer
            if {type(m) for m in other.modules()} - known:
                found.append(kind)
        return found

    def build(self, **changes: Any) -> Any:
        """Build a tiny transformers model with random weights, and return it.

        Each keyword argument in `changes` sets one key of the model's configuration. Raises PortingError if
        transformers cannot build the model, or if it has more than LARGEST parameters.
        """
        import torch
        import transformers

        config = self.config(**changes)
        made = (
            transformers.AutoModelForCausalLM.from_config if self.model_class is None else self.model_class._from_config
        )
        try:
            count = parameters(made, config)
            if count > LARGEST:
                raise ValueError(f"it has {count:,} parameters, of sizes that the tiny model does not set")
            torch.manual_seed(0)
            model = made(config, attn_implementation="eager")
        except Exception as e:
            raise PortingError(f"transformers cannot build a tiny {self.model_type} with {changes}: {e}") from e
        model = model.float().eval()
        if hasattr(model.config, "_experts_implementation"):
            model.config._experts_implementation = "eager"
        draw = torch.Generator().manual_seed(1)
        frozen = {  # tables of sinusoids
            n for n, p in model.named_parameters()
            if not p.requires_grad and p.dim() == 2 and not n.endswith("correction_bias")
        }  # fmt: skip
        with torch.no_grad():
            for name, p in model.state_dict().items():
                if name in frozen or not p.is_floating_point() or "inv_freq" in name or "embed_scale" in name:
                    continue
                noise = torch.randn(p.shape, generator=draw)
                if p.dim() > 1:
                    p.copy_(noise * (0.5 if "emb" in name else 1.2 / max(p.shape[-1], 1) ** 0.5))
                else:
                    p.copy_(p + 0.3 * noise)
        return model

    def save(self, model: Any, folder: Path) -> None:
        """Write the transformers model `model` to `folder`, as a checkpoint."""
        model.save_pretrained(folder)

    def switches(self) -> dict[str, list[Any]]:
        """Return a dict {config key: list of other values to try for this key}.

        A model built with one of these values shows what the key changes. For a flag the other value is its opposite,
        for an activation another activation, and for a float another number. An integer gets another value only if it
        is an interval ("every n-th layer has this feature"). Keys for which no other value is tried are left out.
        """
        table = self.settings()
        out: dict[str, list[Any]] = {}
        sizes = {self.key(k) for k in SIZES}
        full = {**self.usual, **table}
        for key, value in full.items():
            if any(part in key for part in (*TRAINING, *OUTPUTS)) or key in DERIVED:
                continue
            if isinstance(value, bool):
                out[key] = [not value]
            elif isinstance(value, str) and value in ACTIVATIONS:
                out[key] = ["relu" if ACTIVATIONS[value] != "relu" else "silu"]
            elif "eps" in key and isinstance(value, float):
                out[key] = [7e-5]
            elif isinstance(value, float):
                out[key] = [value * 1.5 if value else 0.7]
            elif isinstance(value, int) and key not in sizes and "interval" in key:
                out[key] = [value + 1]
            elif value is None and "softcap" in key:
                out[key] = [4.0]
            elif value is None and "window" in key and "layers" not in key:
                out[key] = [20]
            elif value is None and ("clip" in key or "bias" in key):
                out[key] = [0.9] if "clip" in key else [True]
        rope = self.config().to_dict().get("rope_parameters")
        if isinstance(rope, Mapping) and "rope_theta" in rope:
            part = 0.75 if rope.get("partial_rotary_factor", 1.0) == 0.5 else 0.5
            out["rope_parameters"] = [
                {**rope, "partial_rotary_factor": part},
                {**rope, "rope_theta": 777.0},
                {**rope, **YARN},
            ]
        return {k: v for k, v in out.items() if v}
