"""A tokenizer's files, read in the same order as transformers.

tokenizer.json, or tokenizer.model in its absence; the tokens added beside it, the named special tokens, and the chat
templates. account() says how each key is used; encoding is in tokenizer.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from intaglio.models.config import CheckpointError
from intaglio.models.files.header import read_json
from intaglio.models.kinds import kind_wanted
from intaglio.models.text.sentencepiece import NAME as SENTENCEPIECE
from intaglio.models.text.sentencepiece import SentencePieceError, build_tokenizer, read_model, surround

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TEMPLATES = "additional_chat_templates"
MISTRAL = ("mistral", "mistral3", "voxtral", "ministral", "pixtral")
DEFAULT, TOOLS = "default", "tool_use"


class TokenizerError(ValueError):
    """Raised if a tokenizer cannot be read, if it does not fit its model, or if a chat template rejects a chat."""


@dataclass(frozen=True)
class TokenizerFiles:
    """Contents of a folder's tokenizer and config files.

    Attributes:
        inner: the tokenizer of the `tokenizers` library, with all added tokens.
        special: {name of a special token, such as bos_token: its text}.
        templates: {name: chat template}.
        model: the keys and values of config.json, overridden by generation_config.json.
        ends: ids of the tokens that end a sequence, from the same two files.
    """

    inner: tokenizers.Tokenizer
    special: Mapping[str, str]
    templates: Mapping[str, str]
    model: Mapping[str, Any]
    ends: tuple[int, ...]


def read_files(path: Path) -> TokenizerFiles:
    """Read a checkpoint folder's tokenizer and config files. Returns their contents as TokenizerFiles.

    Raises TokenizerError if a file is missing, damaged or not supported. The message names the file.
    """
    plain = (path / "tokenizer.json").exists()
    if not plain and not (path / SENTENCEPIECE).exists():
        other = sorted(f.name for f in path.glob("*token*")) if path.is_dir() else []
        hint = f"; {path} has {', '.join(other)}: convert with transformers' AutoTokenizer" if other else ""
        raise TokenizerError(f"{path / 'tokenizer.json'} is missing: download it{hint}")
    try:
        config, model, generation = (
            _optional(path / f) for f in ("tokenizer_config.json", "config.json", "generation_config.json")
        )
        special = _named(path, config)
        if plain:
            inner = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        else:
            inner, config = _rebuilt(path, config, special)
        _add_tokens(path, inner, config, special)
        if not plain:
            surround(inner, special, config)
        templates, ends = _templates(path, config), read_ends(path)
    except (CheckpointError, SentencePieceError) as e:
        raise TokenizerError(str(e)) from None
    except TokenizerError:
        raise
    except Exception as e:  # the library raises bare Exception
        name = "tokenizer.json" if plain else SENTENCEPIECE
        raise TokenizerError(f"{path / name} cannot be read: {e}; download it again") from None
    inner.no_truncation()  # both are for batches in training, and would cut or pad prompts
    inner.no_padding()
    inner.encode_special_tokens = bool(config.get("split_special_tokens"))
    if config.get("fix_mistral_regex") and model.get("model_type") in MISTRAL and inner.get_vocab_size() > 100_000:
        raise TokenizerError(
            f"{path / 'tokenizer_config.json'}: fix_mistral_regex is set, and tokenizer.json has the pattern to "
            "be fixed; save the tokenizer with it: AutoTokenizer.from_pretrained(folder, fix_mistral_regex=True)"
            ".save_pretrained(folder)"
        )
    return TokenizerFiles(inner, special, templates, {**model, **generation}, ends)


def read_ends(path: Path) -> tuple[int, ...]:
    """Returns a tuple of the ids of the tokens that end a sequence, from a checkpoint folder's generation_config.json.

    If generation_config.json does not have the key eos_token_id, config.json is read. () if neither has the key. Raises
    CheckpointError for a file that is not JSON, and for a value that is neither an id nor a list of ids.
    """
    for file in (path / "generation_config.json", path / "config.json"):
        table = _optional(file)
        if "eos_token_id" in table:
            return end_ids(file, table)
    return ()


def end_ids(file: Path, table: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns eos_token_id of a configuration as a tuple of ids. These tokens end a sequence.

    eos_token_id may be one id or a list. () if it is null or missing. An id beyond the vocabulary is kept; some
    published models have one. Raises CheckpointError for any other value.

    Args:
        file: the file that has the configuration, for the error.
        table: the configuration's keys and values.
    """
    named = table.get("eos_token_id")
    if wanted := kind_wanted("eos_token_id", named):
        raise CheckpointError(
            f"{file}: eos_token_id is {named!r}; wanted {wanted} (ids of the tokens that end a sequence): correct it, "
            "or download the file again"
        )
    return tuple(named) if isinstance(named, list | tuple) else () if named is None else (named,)


def _rebuilt(
    path: Path, config: dict[str, Any], special: dict[str, str]
) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Build the tokenizer of the file tokenizer.model.

    Returns (the tokenizer, the contents of tokenizer_config.json to use with it). The contents are usually `config`
    itself. If the SentencePiece model puts a space before a text and `config` has added_tokens_decoder, they are a copy
    of `config` in which added tokens are marked as not normalised. Without this mark, the space that is put before each
    run of text would keep the added tokens from being found.

    Args:
        path: the folder with tokenizer.model.
        config: contents of tokenizer_config.json.
        special: {name such as bos_token: its text}. The model's unk, bos and eos tokens are added if they are missing.

    Raises SentencePieceError for a file that is no SentencePiece model, or a kind of model that is not supported.
    """
    model = read_model(path / SENTENCEPIECE)
    for name, text in model.special.items():
        special.setdefault(name, text)
    if "bos_token" in special and "add_bos_token" not in config:
        warnings.warn(
            f"{path} has no add_bos_token in tokenizer_config.json: as in transformers 5, {special['bos_token']} is "
            "not put in front of a text; if the model wants it, set add_bos_token to true",
            stacklevel=4,
        )
    added = config.get("added_tokens_decoder")
    if model.dummy_prefix and isinstance(added, Mapping):  # each run of text between them gets a prefix of its own
        own = {id: {**t, "normalized": False} if isinstance(t, Mapping) else t for id, t in added.items()}
        return build_tokenizer(model, config), {**config, "added_tokens_decoder": own}
    return build_tokenizer(model, config), config


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _named(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Returns {name, such as bos_token: text} of the named special tokens in tokenizer_config.json.

    If tokenizer_config.json has no added_tokens_decoder (before transformers 4.33), special_tokens_map.json takes
    precedence. Raises TokenizerError for a token without text.

    path: the folder. config: contents of tokenizer_config.json.
    """
    held = {k: config[k] for k in NAMED if config.get(k)}
    if "added_tokens_decoder" not in config:
        older = _optional(path / "special_tokens_map.json")
        held |= {k: older[k] for k in NAMED if older.get(k)}
    return {k: _text(path, k, v) for k, v in held.items()}


def _text(path: Path, name: str, token: Any) -> str:
    """Returns the text of a special token, which a file may have as a string or as an object with the key `content`.

    Raises TokenizerError for any other token.

    Args:
        path: the file or folder, for the error.
        name: the token's key in the file, for the error.
        token: the value of that key.
    """
    text = token.get("content") if isinstance(token, Mapping) else token
    if not isinstance(text, str):
        raise TokenizerError(f"{path}: {name}={token!r}; wanted a string, or an object with `content`")
    return text


def _add_tokens(path: Path, inner: tokenizers.Tokenizer, config: Mapping[str, Any], special: Mapping[str, str]) -> None:
    """Add to `inner` the added tokens that tokenizer.json lacks, then special tokens. Returns nothing.

    The added tokens are listed in added_tokens_decoder of tokenizer_config.json or, without this key, in
    added_tokens.json. The special tokens are the tokens of `special` and the extra special tokens that the folder's
    files name. Raises TokenizerError if a token does not get the id that its file states.

    Args:
        path: folder of the files.
        inner: the tokenizer.
        config: contents of tokenizer_config.json.
        special: {name, such as eos_token: text}.
    """
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    own = [v for k, v in config.items() if k.endswith("_token") and k not in NAMED and isinstance(v, str)]
    marked = extra
    later: list[Any] = []
    if "added_tokens_decoder" not in config:
        older = _optional(path / "special_tokens_map.json")
        marked = extra = older.get("extra_special_tokens") or extra
        later = [] if extra else older.get("additional_special_tokens") or []  # too late for added_tokens.json
    if isinstance(extra, Mapping):  # names of the model's own
        own, extra, marked = [*own, *_texts(path, extra)], [], []
    texts = [*own, *_texts(path, extra), *_texts(path, later)]
    listed, said_by = _listed(path, config, {*special.values(), *_texts(path, marked)})
    known = {t.content: t for t in inner.get_added_tokens_decoder().values()}
    missing = [t for _, t in sorted(listed.items()) if repr(known.get(t.content)) != repr(t)]
    for token in missing:
        token.special = token.special or token.content in {*special.values(), *own}
    inner.add_tokens(missing)
    for id, token in listed.items():
        held = inner.token_to_id(token.content)
        if held != id and token.content not in known:
            raise TokenizerError(
                f"{path / said_by}: token {token.content!r} has id {id}, but comes to {held} after the tokens of "
                "tokenizer.json; the files belong to different versions of the model: download them again"
            )
    added = {t.content for t in inner.get_added_tokens_decoder().values()}
    rest = dict.fromkeys([*special.values(), *texts])
    inner.add_tokens([tokenizers.AddedToken(t, special=True) for t in rest if t not in added])


def _texts(path: Path, tokens: Any) -> list[str]:
    """Returns a list of the texts of extra special tokens.

    Args:
        path: the file that has the tokens, for the error.
        tokens: a list of tokens, or an object {name: token}. A token is a string or an object with the key `content`.

    Raises TokenizerError for any other token.
    """
    held = tokens.values() if isinstance(tokens, Mapping) else tokens
    return [_text(path, "extra_special_tokens", t) for t in held]


def _listed(path: Path, config: Mapping[str, Any], special: set[str]) -> tuple[dict[int, tokenizers.AddedToken], str]:
    """Returns a folder's added tokens and the name of the file that lists them.

    The tokens are a dict {id: added token}. The file is tokenizer_config.json if it has the key added_tokens_decoder,
    else added_tokens.json. If added_tokens.json is missing, the result is ({}, "added_tokens.json").

    Args:
        path: the folder.
        config: contents of tokenizer_config.json.
        special: texts that become special tokens if added_tokens.json lists them.

    Raises TokenizerError for an entry without id or text.
    """
    if "added_tokens_decoder" in config:
        out = {}
        for id, token in (config["added_tokens_decoder"] or {}).items():
            if not isinstance(token, Mapping) or not isinstance(token.get("content"), str) or not str(id).isdigit():
                raise TokenizerError(
                    f"{path / 'tokenizer_config.json'}: added_tokens_decoder has {id!r}: {token!r}; wanted an id and "
                    "an object with `content`"
                )
            how = {
                k: bool(token[k]) for k in ("lstrip", "rstrip", "normalized", "single_word", "special") if k in token
            }
            out[int(id)] = tokenizers.AddedToken(token["content"], **how)
        return out, "tokenizer_config.json"
    older = _optional(path / "added_tokens.json")
    for text, id in older.items():
        if isinstance(id, bool) or not isinstance(id, int):
            raise TokenizerError(f"{path / 'added_tokens.json'}: token {text!r} has id {id!r}; wanted a whole number")
    return {
        id: tokenizers.AddedToken(text, normalized=text not in special, special=text in special)
        for text, id in older.items()
    }, "added_tokens.json"


def _templates(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Returns {name: chat template} of a checkpoint folder; {} if it has none.

    The templates are read from the first of these places that has any:

    - chat_template.jinja and the files of additional_chat_templates;
    - tokenizer_config.json (one template, or a list with names);
    - chat_template.json, which processors of older versions have.

    Raises TokenizerError for a template without a name or a text.

    path: the folder. config: contents of tokenizer_config.json.
    """
    files = {f.stem: f for f in sorted((path / TEMPLATES).glob("*.jinja"))}
    if (path / "chat_template.jinja").exists():
        files[DEFAULT] = path / "chat_template.jinja"
    if files:
        return {name: f.read_text(encoding="utf-8") for name, f in files.items()}
    file, held = path / "tokenizer_config.json", config.get("chat_template")
    if not held:
        file = path / "chat_template.json"
        held = _optional(file).get("chat_template")
    if isinstance(held, str):
        return {DEFAULT: held} if held else {}
    listed = isinstance(held, list) and all(isinstance(t, Mapping) for t in held)
    if held and not listed and not isinstance(held, Mapping):
        raise TokenizerError(
            f"{file}: chat_template is {held!r}; wanted a text, an object {{name: text}} or a list of objects with "
            "`name` and `template`: correct it, or download the file again"
        )
    entries = held.items() if isinstance(held, Mapping) else [(t.get("name"), t.get("template")) for t in held or []]
    for name, text in entries:
        if not isinstance(name, str) or not isinstance(text, str):
            raise TokenizerError(f"{file}: chat_template has an entry {name!r}; wanted a name and a template")
    return {str(name): str(text) for name, text in entries}
