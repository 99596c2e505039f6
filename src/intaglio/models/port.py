"""From a checkpoint to its Program: choose the family, describe the model, hold the description against the tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from intaglio.models import (
    cohere,
    deepseek,
    gemma,
    glm,
    gptoss,
    granite,
    llama,
    minimax,
    mistral,
    olmo,
    phi,
    qwen,
    smollm,
)
from intaglio.models.checkpoint import PLAIN, Checkpoint
from intaglio.models.config import Config, PortError
from intaglio.models.decoder import Writer
from intaglio.models.family import Family
from intaglio.program import Program
from intaglio.program.source import expand, is_run, shape_after

FILES = (llama, mistral, qwen, phi, gemma, olmo, granite, cohere, deepseek, glm, gptoss, minimax, smollm)
DTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
HARMLESS = re.compile(r"rotary_emb\.(\w+_)?inv_freq$")  # tables that transformers used to save; computed here
FEATURES = re.compile(
    r"expert|moe|lora_rank|conv|mamba|ssm|state|linear_|delta|index|sink|nextn|mtp|vision|audio|encoder"
)
DECIDED_BY = {  # the config keys that decide a weight's shape
    "experts.": "moe_intermediate_size or intermediate_size, hidden_size",
    "embed_tokens.weight": "vocab_size, hidden_size",
    "lm_head.weight": "vocab_size, hidden_size",
    "q_proj.": "num_attention_heads * head_dim, hidden_size",
    "k_proj.": "num_key_value_heads * head_dim, hidden_size",
    "v_proj.": "num_key_value_heads * head_dim, hidden_size",
    "qkv_proj.": "(num_attention_heads + 2 * num_key_value_heads) * head_dim, hidden_size",
    "o_proj.": "hidden_size, num_attention_heads * head_dim",
    "gate_proj.": "intermediate_size, hidden_size",
    "up_proj.": "intermediate_size, hidden_size",
    "gate_up_proj.": "2 * intermediate_size, hidden_size",
    "down_proj.": "hidden_size, intermediate_size",
    "gate.weight": "the number of experts, hidden_size",
    "router.": "the number of experts, hidden_size",
    "kv_b_proj.": "num_attention_heads * (qk_nope_head_dim + v_head_dim), kv_lora_rank",
    "q_norm.": "head_dim, or num_attention_heads * head_dim",
    "k_norm.": "head_dim, or num_key_value_heads * head_dim",
}


def families() -> dict[str, Family]:
    """The ported architectures by the name config.json gives them."""
    return {family.architecture: family for file in FILES for family in file.FAMILIES}


def port(checkpoint: Checkpoint, context: int | None = None, name: str | None = None) -> Program:
    """The Program of a checkpoint, for positions below `context` (default: all the model was made for).

    Weights keep the formats they are stored in. Raises PortError for a model nobody ported, a setting nobody
    implemented, or tensors that do not match config.json.
    """
    family = _family(checkpoint.architecture, checkpoint.config)
    stored = {n: checkpoint.format(n) for n in checkpoint.names}
    prefix = next((p for p in family.prefixes if p + "embed_tokens.weight" in stored), family.prefixes[0])

    def format(source: str) -> str:
        if stored.get(source, "f32"):
            return stored.get(source, "f32")
        raise PortError(f"{source} is stored as {checkpoint.dtype(source)}; ports take {', '.join(PLAIN)}")

    title = name or re.sub(r"\s+", "-", checkpoint.path.resolve().name)
    program = _program(family, checkpoint.config, context, title, prefix, format, checkpoint.order)
    _match(program, checkpoint, family)
    return program


def port_config(
    config: Mapping[str, Any], context: int | None = None, name: str | None = None, format: str | None = None
) -> Program:
    """The Program of a config.json alone, weights in `format` (default: the config's dtype, bf16 if it has none)."""
    named = config.get("architectures") or [None]
    family = _family(str(named[0]), config)
    inner = {**config.get("text_config", {}), **config}
    dtype = str(inner.get("dtype") or inner.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if format is None and dtype not in DTYPES:
        raise PortError(f"config.json: dtype {dtype!r} is not ported; known are {', '.join(DTYPES)}")
    Config(inner, {}).refuse(
        "quantization_config", why="how its tensors are quantised is read off a checkpoint's files"
    )
    stored = format or DTYPES[dtype]
    return _program(family, config, context, name or family.architecture, family.prefixes[0], lambda source: stored)


def _family(architecture: str, config: Mapping[str, Any]) -> Family:
    known = families()
    if architecture not in known:
        odd = sorted(k for k, v in config.items() if FEATURES.search(k) and v not in (None, False, 0))
        seen = f" Its config.json speaks of {', '.join(odd)}, which no port here knows." if odd else ""
        raise PortError(f"architecture {architecture} is not ported.{seen} Ported are {', '.join(sorted(known))}")
    return known[architecture]


def _program(
    family: Family,
    config: Mapping[str, Any],
    context: int | None,
    name: str,
    prefix: str,
    format: Callable[[str], str],
    order: Callable[[str], str] = lambda source: "",
) -> Program:
    outer = {k: v for k, v in config.items() if k != "text_config"}
    c = Config({**outer, **config.get("text_config", {})}, family.defaults)
    limit = c.whole("max_position_embeddings")
    length = context or limit
    if not 1 <= length <= limit:
        raise PortError(f"context={context} is outside 1..{limit} (max_position_embeddings); ask for less")
    d = replace(family.describe(c, length), prefix=prefix)
    return Writer(d, name, length, format, order).program()


def _match(program: Program, checkpoint: Checkpoint, family: Family) -> None:
    """Every tensor the Program reads is there in its shape, and none is left over. Raises PortError."""
    wanted = {
        name: (steps, t.shape[1:] if is_run(source) else t.shape)
        for t in program.of_role("weight")
        for source in t.source
        for name, steps in expand(source)
    }
    where = f"{checkpoint.path} ({family.architecture})"
    if missing := sorted(wanted.keys() - checkpoint.names):
        raise PortError(f"{where} lacks {_some(missing)}, which its config.json asks for")
    tied = "lm_head.weight" not in program.tensors
    ignored = (*family.ignored, *_predictors(checkpoint.config))
    extra = sorted(
        n
        for n in checkpoint.names - wanted.keys() - checkpoint.orders
        if not (HARMLESS.search(n) or n.startswith(ignored) or (tied and n.endswith("lm_head.weight")))
    )
    if extra:
        raise PortError(f"{where} holds {_some(extra)}, which the port of {family.models} would leave unused")
    for name, (steps, shape) in sorted(wanted.items()):
        found = shape_after(checkpoint.shape(name), steps)
        if found != shape:
            keys = next((keys for part, keys in DECIDED_BY.items() if part in name), "hidden_size")
            raise PortError(f"{where}: {name} is {list(found)}, config.json makes it {list(shape)} ({keys})")


def _predictors(config: Mapping[str, Any]) -> list[str]:
    """Where the layers stand that only predict tokens further ahead: after the last one."""
    n, more = config.get("num_hidden_layers", 0), config.get("num_nextn_predict_layers") or 0
    return [f"model.layers.{i}." for i in range(n, n + more)]


def _some(names: list[str]) -> str:
    return f"{len(names)} tensors ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
