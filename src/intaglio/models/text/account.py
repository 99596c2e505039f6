"""The use made of each key in a tokenizer's files and in generation_config.json: read, or ignored and why."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from intaglio.models.files.header import read_json
from intaglio.models.keys import NEUTRAL, Fate
from intaglio.models.text.files import NAMED, TEMPLATES, read_ends

FILES = {
    "tokenizer.json": "the tokenizer", "tokenizer.model": "the tokenizer, as there is no tokenizer.json",
    "tokenizer_config.json": "special tokens and chat templates",
    "special_tokens_map.json": "special tokens, as older versions name them", "added_tokens.json":
    "added tokens, as older versions list them", "generation_config.json": "ends of sequence and sampling defaults",
    "chat_template.jinja": "the chat template", "chat_template.json": "the chat template of an older processor",
}  # fmt: skip
PARTS = {
    "truncation": "switched off: it is for batches in training and would cut prompts",
    "padding": "switched off: it is for batches in training and would pad prompts",
    "version": "the version of the file's layout",
}
USED = {
    "added_tokens_decoder", "chat_template", "split_special_tokens", "extra_special_tokens",
    "additional_special_tokens",
    "fix_mistral_regex", *NAMED,
}  # fmt: skip
REBUILT = ("add_bos_token", "add_eos_token", "legacy", "tokenizer_class")  # read if there is no tokenizer.json
CODED = "a setting of transformers' Python classes; tokenizer.json says how text is split"
BATCHES = "for batches and their lengths; prompts are neither cut nor padded here"
CONFIG = {
    **dict.fromkeys((
        "tokenizer_class", "auto_map", "processor_class", "name_or_path", "backend", "use_fast", "legacy",
        "sp_model_kwargs", "add_prefix_space", "errors", "vocab_file", "merges_file", "tokenizer_file", "unk_id",
        "vocab",
        "spaces_between_special_tokens", "from_slow", "tokenizer_object", "do_lower_case", "strip_accents", "is_local",
        "local_files_only", "special_tokens_map_file", "__type", "use_default_system_prompt", "init_inputs",
        "remove_space",
        "keep_accents", "trim_offsets", "model_specific_special_tokens", "fast_tokenizer_files", "verbose",
    ), CODED),
    **dict.fromkeys((
        "model_max_length", "max_len", "max_length", "padding_side", "truncation_side", "pad_to_multiple_of",
        "model_input_names", "stride", "truncation", "padding", "pad_token_type_id", "truncation_strategy",
        "return_token_type_ids",
    ), BATCHES),
    "add_bos_token": "the post-processor of tokenizer.json decides, as in transformers 5",
    "add_eos_token": "the post-processor of tokenizer.json decides, as in transformers 5",
    "clean_up_tokenization_spaces": "not applied to byte-pair tokenizers, as in transformers 5",
    "response_template": "a parser of answers", "response_schema": "a parser of answers",
    "chat_control_tokens": "a setting of transformers' apply_chat_template",
}  # fmt: skip
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
ENDS = ("bos_token_id", "eos_token_id")
GENERATION = {
    "pad_token_id": "nothing is padded here", "transformers_version": "says where the file comes from",
    "_from_model_config": "says where the file comes from", "decoder_start_token_id": "for encoder-decoder models",
    "use_cache": "the K/V cache is always used", "cache_implementation": "the K/V cache is paged here",
    "do_sample": "temperature says whether tokens are drawn", "max_length": "requests say how many tokens they want",
    "max_new_tokens": "requests say how many tokens they want", "chat_format": "a chat template says how",
    "trust_remote_code": "no code of a model is run here",
}  # fmt: skip
OWN_WAY = "a way of generating that is transformers' own; requests say how theirs is drawn"


def judge_tokenizer(path: Path) -> list[Fate]:
    """Returns a list with a Fate for each key of a folder's tokenizer files.

    A Fate says whether the key was used or ignored, and why. generation_config.json counts as a tokenizer file. Each
    chat template that is a file of its own has a Fate, too. Raises CheckpointError for a file that is not JSON, and for
    an eos_token_id that is neither an id nor a list of ids.

    path: the checkpoint's folder.
    """
    read_ends(path)
    out: list[Fate] = []
    held = {name: read_json(path / name) for name in FILES if name.endswith(".json") and (path / name).exists()}
    rebuilt = "tokenizer.json" not in held
    modern = "added_tokens_decoder" in held.get("tokenizer_config.json", {})
    for name, table in held.items():
        for key, value in table.items():
            if rebuilt and name == "tokenizer_config.json" and key in REBUILT:
                out.append(Fate(name, key, "used", "says how the tokenizer of tokenizer.model is used"))
            else:
                out.append(_judge(name, key, value, modern))
    out += _templates(path)
    return out


def _judge(file: str, key: str, value: Any, modern: bool) -> Fate:
    if file == "tokenizer.json":
        if key in PARTS:
            return Fate(file, key, "ignored", PARTS[key] if value is not None else "empty or off")
        return Fate(file, key, "used", "read by the tokenizers library")
    if file in ("special_tokens_map.json", "added_tokens.json"):
        why = "tokenizer_config.json's added_tokens_decoder takes its place" if modern else "names a token"
        return Fate(file, key, "ignored" if modern else "used", why)
    if file == "chat_template.json":
        return Fate(file, key, "used", "the template, if no newer file or key has one")
    if file == "generation_config.json":
        return _judge_generation(file, key, value)
    if key in USED:
        return Fate(file, key, "used", "read by the tokenizer")
    if key.endswith("_token") and isinstance(value, str):
        return Fate(file, key, "used", "a special token of the model's own")
    if key in CONFIG:
        return Fate(file, key, "ignored", CONFIG[key])
    if any(type(value) is type(n) and value == n for n in NEUTRAL):
        return Fate(file, key, "ignored", "empty or off")
    why = "neither transformers 5 nor the tokenizer here reads it"
    return Fate(file, key, "ignored", why, f"{file}: {key} is ignored: {why}")


def _judge_generation(file: str, key: str, value: Any) -> Fate:
    if key in ENDS:
        return Fate(file, key, "used", "ends of sequence and the bos token")
    if key in SAMPLING:
        return Fate(file, key, "used", "a default of the server for requests that do not say")
    if key in GENERATION:
        return Fate(file, key, "ignored", GENERATION[key])
    if any(type(value) is type(n) and value == n for n in NEUTRAL):
        return Fate(file, key, "ignored", "empty or off")
    return Fate(file, key, "ignored", OWN_WAY, f"{file}: {key} is ignored: {OWN_WAY}")


def _templates(path: Path) -> Iterator[Fate]:
    """Yield a Fate for each chat template that is a file of its own. All say that the file was used.

    path: the checkpoint's folder.
    """
    if (path / "chat_template.jinja").exists():
        yield Fate("chat_template.jinja", "chat_template", "used", "the chat template; it comes before other places")
    for file in sorted((path / TEMPLATES).glob("*.jinja")):
        yield Fate(f"{TEMPLATES}/{file.name}", "chat_template", "used", f"the template named {file.stem}")
