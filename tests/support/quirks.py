"""Quirks of published checkpoints, for tests that combine them at random: of tensors and config, and of tokenizers."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch as safetensors
import torch
import transformers
from support.tiny import tiny

FAMILIES = [
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "granite",
    "olmo2",
    "glm4",
    "cohere2",
    "phi3",
    "qwen3moe",
    "mixtral",
]
TIED = ("qwen2", "gemma2", "granite", "cohere2")
Draw = random.Random


def table(path: Path, file: str, drop: tuple[str, ...] = (), **change: Any) -> None:
    at = path / file
    held = json.loads(at.read_text()) if at.exists() else {}
    at.write_text(json.dumps({k: v for k, v in {**held, **change}.items() if k not in drop}))


def held(path: Path) -> dict[str, torch.Tensor]:
    return {n: x for f in path.glob("model*.safetensors") for n, x in safetensors.load_file(f).items()}


def store(path: Path, tensors: dict[str, torch.Tensor], name: str = "model.safetensors") -> None:
    safetensors.save_file({n: x.contiguous().clone() for n, x in tensors.items()}, path / name, {"format": "pt"})


# Quirks of the model. Each takes (path, random numbers, family).


def head(path: Path, draw: Draw, family: str) -> None:
    """A tied model with a head of its own, equal or not, or with the head alone."""
    if family in TIED:
        tensors = held(path)
        embed = tensors["model.embed_tokens.weight"]
        how = draw.choice(["equal", "other", "alone"])
        tensors["lm_head.weight"] = embed if how != "other" else embed.flip(0)
        if how == "alone":
            del tensors["model.embed_tokens.weight"]
        store(path, tensors)


def inner(path: Path, draw: Draw, family: str) -> None:
    """Saved from the inner model."""
    tensors = held(path)
    if "lm_head.weight" not in tensors:
        store(path, {n.removeprefix("model."): x for n, x in tensors.items()})


def leftovers(path: Path, draw: Draw, family: str) -> None:
    at = "model.layers.0.self_attn."
    extra = {
        "model.rotary_emb.inv_freq": torch.ones(8), f"{at}rotary_emb.inv_freq": torch.ones(8),
        f"{at}masked_bias": torch.tensor(-1e9), f"{at}bias": torch.ones(1, 1, 9, 9).tril().bool(),
        "model.norm.bias": torch.zeros(64), f"{at}k_scale": torch.tensor(0.5),
        "v_head.summary.weight": torch.ones(1, 64), "empty": torch.zeros(0),
    }  # fmt: skip
    chosen = draw.sample(sorted(extra), draw.randint(1, len(extra)))
    tensors = held(path)
    store(path, {**{n: extra[n] for n in chosen}, **tensors})


def shards(path: Path, draw: Draw, family: str) -> None:
    """Several files, an index that lists too little or too much, perhaps a tensor twice."""
    tensors = held(path)
    names = sorted(tensors)
    draw.shuffle(names)
    n = draw.randint(2, 4)
    parts = [names[i::n] for i in range(n)]
    if draw.random() < 0.4:
        parts[0].append(parts[1][0])
    files = [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    listed = {}
    for part, file in zip(parts, files, strict=True):
        store(path, {name: tensors[name] for name in part}, file)
        listed |= {name: file for name in part[: len(part) if draw.random() < 0.5 else 1]}
    if draw.random() < 0.4:
        listed["model.layers.1.self_attn.rotary_emb.inv_freq"] = files[0]
    (path / "model.safetensors").unlink()
    table(path, "model.safetensors.index.json", metadata={}, weight_map=listed)


def beside(path: Path, draw: Draw, family: str) -> None:
    """Files that are not the model."""
    for name in draw.sample(["consolidated", "mtp", "optimizer", "adapter_model"], draw.randint(1, 3)):
        store(path, {"x": torch.ones(3)}, f"{name}.safetensors")
    if (path / "model.safetensors").exists() and draw.random() < 0.3:
        table(path, "model.safetensors.index.json", metadata={}, weight_map={"x": "model-00001-of-00001.safetensors"})


def named(path: Path, draw: Draw, family: str) -> None:
    """The architecture by other means."""
    own = json.loads((path / "config.json").read_text())["architectures"][0]
    choice = draw.choice([None, [], [own.replace("ForCausalLM", "Model")], ["GPT2LMHeadModel"], [own, "Other"]])
    table(path, "config.json", architectures=choice)


def keys(path: Path, draw: Draw, family: str) -> None:
    """Keys that mean nothing to the class."""
    extra = {
        "unsloth_version": "2024.9", "_name_or_path": "x/y", "torch_dtype": "bfloat16", "attention_multiplier_x": 0.3,
        "pretraining_tp": 1, "use_cache": False, "temperature": 0.6, "my_settings": {"a": 1}, "n_group_of_mine": 3,
        "quantization_config": None, "embd_pdrop": 0.1, "max_length": 20, "id2label": {"0": "x"}, "rope_theta_x": 7.0,
    }  # fmt: skip
    table(path, "config.json", **{k: extra[k] for k in draw.sample(sorted(extra), draw.randint(1, 6))})


def scaling(path: Path, draw: Draw, family: str) -> None:
    """rope_scaling added by hand, with or without a base."""
    if family in ("phi3", "mixtral"):  # transformers itself trips over Mixtral's null head_dim
        return
    length = draw.choice([32, 64, 256])
    how: dict[str, Any] = draw.choice([
        {"rope_type": "yarn", "factor": draw.choice([2.0, 4.0]), "original_max_position_embeddings": length},
        {"type": "yarn", "factor": 4.0, "attention_factor": 1.1, "beta_fast": 16},
        {"type": "linear", "factor": 3.0}, {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": length},
        {"rope_type": "default"},
    ])  # fmt: skip
    base = draw.choice([{}, {"rope_theta": 5e5}])
    table(path, "config.json", rope_scaling={**how, **base})


def older(path: Path, draw: Draw, family: str) -> None:
    """The older spelling of rope: rope_theta and rope_scaling, perhaps beside the newer one."""
    if family == "phi3":
        return
    drop = ("rope_parameters",) if draw.random() < 0.7 else ()
    table(path, "config.json", drop, rope_theta=draw.choice([1e4, 5e5, 1000000]))


def tied_flag(path: Path, draw: Draw, family: str) -> None:
    """tie_word_embeddings left to the family's default, or null."""
    if "lm_head.weight" in held(path) and family not in TIED:
        table(path, "config.json", tie_word_embeddings=draw.choice([False, True]))


def kept_experts(path: Path, draw: Draw, family: str) -> None:
    if family in ("qwen3moe", "mixtral"):
        model = transformers.AutoModelForCausalLM.from_pretrained(path)
        model.save_pretrained(path, save_original_format=False)


def explicit(path: Path, draw: Draw, family: str) -> None:
    """The file of weights by name."""
    if (path / "model.safetensors").exists():
        (path / "model.safetensors").rename(path / "other.safetensors")
        store(path, {"x": torch.ones(3)})
        table(path, "config.json", transformers_weights="other.safetensors")


MODEL = [kept_experts, tied_flag, head, inner, leftovers, named, keys, scaling, older, shards, beside, explicit]


# Quirks of the tokenizer.


def cut(path: Path, draw: Draw) -> None:
    how = {"direction": "Right", "max_length": draw.randint(1, 8), "strategy": "LongestFirst", "stride": 0}
    pad = {
        "strategy": draw.choice(["BatchLongest", {"Fixed": 32}]), "direction": draw.choice(["Left", "Right"]),
        "pad_to_multiple_of": draw.choice([None, 8]), "pad_id": 256, "pad_type_id": 0, "pad_token": "<pad>",
    }  # fmt: skip
    table(path, "tokenizer.json", truncation=draw.choice([None, how]), padding=draw.choice([None, pad]))


def flags(draw: Draw) -> dict[str, bool]:
    return {k: draw.random() < 0.3 for k in ("lstrip", "rstrip", "single_word", "normalized", "special")}


def decoder(path: Path, draw: Draw) -> None:
    """Tokens of added_tokens_decoder: new ones, and old ones with other flags."""
    new = {
        str(261 + i): {"content": t, **flags(draw)}
        for i, t in enumerate(draw.sample(["<|im_end|>", "<tool>", "<|x|>"], 2))
    }
    old = {"259": {"content": "<user>", **flags(draw)}} if draw.random() < 0.5 else {}
    table(path, "tokenizer_config.json", added_tokens_decoder={**old, **new})


def added(path: Path, draw: Draw) -> None:
    table(
        path,
        "added_tokens.json",
        **{t: 261 + i for i, t in enumerate(draw.sample(["<|im_end|>", "<tool>"], draw.randint(1, 2)))},
    )


def maps(path: Path, draw: Draw) -> None:
    how = {"content": "<|im_end|>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    table(path, "special_tokens_map.json", eos_token=draw.choice(["<eos>", how]))
    if draw.random() < 0.5:
        table(path, "special_tokens_map.json", additional_special_tokens=draw.sample(["<tool>", "<|x|>"], 1))


def specials(path: Path, draw: Draw) -> None:
    extra = {
        "pad_token": "[PAD]", "extra_special_tokens": ["<|x|>"], "image_token": "<tool>", "sep_token": "!",
        "split_special_tokens": True, "additional_special_tokens": ["<|x|>", "<tool>"], "add_bos_token": True,
        "add_eos_token": True, "model_max_length": 12, "legacy": False, "unk_token": None,
    }  # fmt: skip
    table(path, "tokenizer_config.json", **{k: extra[k] for k in draw.sample(sorted(extra), draw.randint(1, 4))})


def templates(path: Path, draw: Draw) -> None:
    body = "{{ messages|length }}{{ eos_token }}{% if tools %}{{ tools|length }}{% endif %}{{ bos_token }}"
    names = draw.sample(["default", "tool_use", "rag"], draw.randint(1, 3))
    where = draw.choice(["list", "files", "both", "jinja"])
    if where in ("list", "both"):
        table(path, "tokenizer_config.json", chat_template=[{"name": n, "template": f"{n} {body}"} for n in names])
    if where in ("files", "both"):
        (path / "additional_chat_templates").mkdir()
        for n in names:
            (path / "additional_chat_templates" / f"{n}.jinja").write_text(f"file {n} {body}")
    if where == "jinja":
        (path / "chat_template.jinja").write_text(f"jinja {body}")


TOKENIZER = [cut, decoder, added, maps, specials, templates]


def applied(draw: Draw, quirks: list[Callable[..., None]]) -> list[Callable[..., None]]:
    """A random few, in their order."""
    return [q for q in quirks if draw.random() < 0.3]


def quirky(path: Path, source: Path, seed: int) -> Path:
    """A tiny checkpoint in `path` of a random family, with a random few quirks; the same for the same seed.

    source: folder for the checkpoint without quirks.
    """
    draw = random.Random(seed)
    family = draw.choice(FAMILIES)
    shutil.copytree(tiny(family, source, num_hidden_layers=2), path)
    chosen = applied(draw, MODEL)
    if inner in chosen and shards in chosen:
        chosen.remove(inner)
    for quirk in chosen:
        quirk(path, draw, family)
    for quirk in applied(draw, TOKENIZER):
        quirk(path, draw)
    return path
