"""The use made of each metadata key of a GGUF file: read, or ignored and why."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from intaglio.models.config import PortError
from intaglio.models.files.gguf.file import GgufFile

ORIGIN = "says where the model comes from, or how the file was made"
PREDICTS = "of layers that only predict tokens further ahead"
SHAPES = "the shapes of the tensors say it"
TOKENIZER = (  # keys that the tokenizer reads
    "model", "tokens", "token_type", "scores", "merges", "pre", "add_bos_token", "add_eos_token", "add_space_prefix",
    "remove_extra_whitespaces", "precompiled_charsmap", "normalizer.lowercase", "normalizer.strip_accents",
    "bos_token_id", "eos_token_id", "eot_token_id", "eom_token_id", "unknown_token_id", "seperator_token_id",
    "padding_token_id", "cls_token_id", "mask_token_id",
)  # fmt: skip
USED = {
    "general.architecture": "names the architecture", "general.alignment": "says where tensors begin",
    "split.count": "says how many parts the model has", **{f"tokenizer.ggml.{key}": "read by the tokenizer" for key in
    TOKENIZER}, "tokenizer.chat_template*": "a chat template",
}  # fmt: skip
IGNORED = {  # patterns of whole keys
    "general.*": ORIGIN, "quantize.*": ORIGIN, "split.*": "of the parts of a split model", "imatrix.*": ORIGIN,
    "tokenizer.ggml.*_token_id": "a token that prompts name by its text", "tokenizer.huggingface.json":
    "the tokenizer in another form", "tokenizer.rwkv.*": "of another kind of tokenizer",
    "tokenizer.ggml.token_type_count": "rows of a table that a decoder does not have",
    "tokenizer.ggml.added_tokens": "user-defined tokens have a type of their own",
    "tokenizer.ggml.escape_whitespaces": "follows from the kind of tokenizer",
    "tokenizer.ggml.*_token_ids": "tokens that prompts name by their text",
}  # fmt: skip
MODEL = {  # keys after the architecture's name
    "vocab_size": SHAPES, "embedding_length": SHAPES, "tensor_data_layout": ORIGIN, "nextn_predict_layers": PREDICTS,
    "attention.key_length": SHAPES, "attention.value_length": SHAPES, "attention.key_length_mla": SHAPES,
    "attention.value_length_mla": SHAPES, "expert_shared_feed_forward_length": SHAPES, "feed_forward_length": SHAPES,
    "expert_feed_forward_length": SHAPES, "expert_shared_count": SHAPES, "leading_dense_block_count": SHAPES,
    "moe_every_n_layers": SHAPES, "interleave_moe_layer_step": SHAPES, "full_attention_interval": SHAPES,
    "rope.dimension_sections": "of images and video; a text has one position per token",
    "rope.scaling.finetuned": "says whether the model was trained on after its rope was scaled",
    "use_parallel_residual": "follows from the tensors",
    "rope.dimension_count": "the port's rope is fixed for this architecture",
    "rope.dimension_count_swa": "the port's rope is fixed for this architecture",
    "n_deepstack_layers": "of images", "pooling_type": "of embedding models; logits do not depend on it",
    "attention.head_count": SHAPES, "attention.head_count_kv": SHAPES, "attention.recurrent_layers": SHAPES,
    "attention.value_length_swa": SHAPES, "attention.key_length_swa": SHAPES,
}  # fmt: skip

COMPUTES: dict[str, tuple[Any, ...]] = {  # keys by which llama.cpp computes otherwise: the values that change nothing
    **dict.fromkeys((
        "attention.scale", "logit_scale", "embedding_scale", "residual_scale", "expert_weights_scale",
        "rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor",
    ), (0, 1)),
    **dict.fromkeys((
        "attn_logit_softcapping", "final_logit_softcapping", "router_logit_softcapping", "attention.clamp_kqv",
        "attention.max_alibi_bias", "attention.temperature_scale", "attention.temperature_length",
        "attention.sliding_window", "swiglu_clamp_exp", "swiglu_clamp_shexp",
    ), (0,)),
    "expert_gating_func": (0, 1), "expert_group_count": (0, 1), "attention.causal": (True,),
    "rope.scaling.yarn_ext_factor": (1,), "rope.scaling.yarn_log_multiplier": (0,),
}  # fmt: skip


@dataclass(frozen=True)
class KeyFate:
    """Report that says whether one metadata key of a GGUF file was used or ignored, and why.

    Attributes:
        key: the key.
        used: True if the key was used, False if it was ignored.
        why: the reason.
        note: a message for the user; "" if none is needed.
    """

    key: str
    used: bool
    why: str
    note: str = ""


def judge_keys(file: GgufFile, seen: Collection[str]) -> Iterator[KeyFate]:
    """Yield a KeyFate for each metadata key of a GGUF file.

    A KeyFate says whether the key was used or ignored, and why.

    Raises PortError if an unread key has a value that changes llama.cpp's results: this package would then compute
    something else than llama.cpp.

    Args:
        file: the file.
        seen: keys that were read for the model's config, with the architecture's prefix, such as llama.block_count.
    """
    own = f"{file.architecture}."
    for key, value in file.fields.items():
        if key in seen:
            yield KeyFate(key, True, "read for the model's settings")
            continue
        if why := _listed(key, USED):
            yield KeyFate(key, True, why)
            continue
        neutral = COMPUTES.get(key.removeprefix(own)) if key.startswith(own) else None
        if neutral and any(v not in neutral for v in (value if isinstance(value, list) else [value])):
            raise PortError(
                f"{file.path}: {key}={value!r} is not ported for this architecture; wanted no such key, or "
                f"{' or '.join(map(repr, neutral))}"
            )
        if neutral:
            yield KeyFate(key, False, "has the value that changes nothing")
            continue
        why = MODEL.get(key.removeprefix(own), "") if key.startswith(own) else ""
        if key == f"{own}attention.layer_norm_epsilon" and f"{own}attention.layer_norm_rms_epsilon" in seen:
            why = "norms are RMS norms, whose epsilon is another key"
        why = why or _listed(key, IGNORED)
        if not why and (value in (None, False, "", "none") or (value == 0 and not isinstance(value, list))):
            why = "empty or off"
        if why:
            yield KeyFate(key, False, why)
            continue
        why = (
            "nothing here reads it" if key.startswith((own, "tokenizer.")) else "of another program, or of another part"
        )
        shown = f"[{len(value)} values]" if isinstance(value, list) else repr(value)[:60]
        yield KeyFate(key, False, why, f"{file.path.name}: {key}={shown} is ignored: {why}")


def _listed(key: str, table: dict[str, str]) -> str:
    return next((why for pattern, why in table.items() if fnmatchcase(key, pattern)), "")
