"""Text to token ids and back: tokenizer.json with its special tokens, a streaming decoder, and the chat template.

A wrapper of the `tokenizers` library; needs no transformers. Settings of the template's sandbox are transformers' own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers

from intaglio.models.checkpoint import CheckpointError, read_json

REPLACEMENT = "\ufffd"
HELD = 16  # ids held back at most: a character has 4 bytes, so that many without an end are not UTF-8 at all
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TokenizerError(ValueError):
    """A tokenizer that cannot be read, does not fit its model, or a chat its template refuses."""


@dataclass
class Stream:
    """Text of one sequence, token by token. `push` returns what is certain; `end` the rest.

    Text is the difference of decoding a short tail of ids with and without the new ones, for tokens may only make
    sense with their neighbours; it is held back while it ends inside a character.
    """

    tokenizer: Tokenizer
    ids: list[int] = field(default_factory=list)
    shown: int = 0  # ids before this are in text already returned
    start: int = 0  # the tail decoded begins here, some ids before `shown`

    def push(self, token: int) -> str:
        self.ids.append(token)
        return self._new(final=False)

    def end(self) -> str:
        return self._new(final=True)

    def _new(self, final: bool) -> str:
        before = self.tokenizer.decode(self.ids[self.start : self.shown])
        after = self.tokenizer.decode(self.ids[self.start :])
        broken = after.endswith(REPLACEMENT) and len(self.ids) - self.shown < HELD
        if len(after) <= len(before) or (broken and not final):
            return ""
        self.start, self.shown = self.shown, len(self.ids)
        return after[len(before) :]


@dataclass(frozen=True)
class Tokenizer:
    """`eos_ids` end a sequence (the configs may name several). `special` maps bos_token and its like to text."""

    path: Path
    inner: tokenizers.Tokenizer
    special: Mapping[str, str]
    bos_id: int | None
    eos_ids: tuple[int, ...]
    template: str | None

    @classmethod
    def open(cls, path: str | Path) -> Tokenizer:
        """Read a checkpoint folder's tokenizer. Raises TokenizerError naming the file that is missing or damaged."""
        path = Path(path)
        if not (path / "tokenizer.json").exists():
            other = sorted(f.name for f in path.glob("*token*")) if path.is_dir() else []
            hint = f"; {path} has {', '.join(other)}: convert with transformers' AutoTokenizer" if other else ""
            raise TokenizerError(f"{path / 'tokenizer.json'} is missing: download it{hint}")
        try:
            inner = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
            config, model, generation = (
                read_json(path / f) if (path / f).exists() else {}
                for f in ("tokenizer_config.json", "config.json", "generation_config.json")
            )
        except CheckpointError as e:
            raise TokenizerError(str(e)) from None
        except Exception as e:  # the library raises bare Exception
            raise TokenizerError(f"{path / 'tokenizer.json'} cannot be read: {e}; download it again") from None
        special = {k: _text(config[k]) for k in NAMED if config.get(k)}
        model = {**model, **generation}
        bos = _first(inner.token_to_id(special.get("bos_token", "")), model.get("bos_token_id"))
        eos = _eos(model.get("eos_token_id"), inner.token_to_id(special.get("eos_token", "")))
        return cls(path, inner, special, bos, eos, _template_source(path, config))

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids; with `special`, the bos token and its like that the tokenizer adds by itself. Text that has the
        form of a special token becomes that token."""
        return list(self.inner.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of the ids, special tokens left out."""
        return str(self.inner.decode(list(ids), skip_special_tokens=skip_special))

    def stream(self, ids: Iterable[int] = ()) -> Stream:
        """A streaming decoder that has already seen `ids` (the prompt): their text is not returned again."""
        seen = list(ids)
        return Stream(self, seen, len(seen), max(0, len(seen) - 6))

    def fits(self, vocabulary: int) -> None:
        """Raise TokenizerError if an id of this tokenizer has no row in a model of `vocabulary` tokens."""
        token, top = max(self.inner.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
        if top >= vocabulary:
            raise TokenizerError(
                f"{self.path}: token {token!r} has id {top}, but the model's vocabulary is 0..{vocabulary - 1}; "
                "the tokenizer belongs to another model"
            )

    def chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **extra: Any) -> str:
        """The prompt text of a chat by the checkpoint's template. Encode it with special=False: templates write their
        own bos. Raises TokenizerError if there is no template, or it refuses these messages."""
        if self.template is None:
            raise TokenizerError(f"{self.path} has no chat_template; use plain completion, or a chat-tuned model")
        if not messages:
            raise TokenizerError("a chat needs at least one message")
        plain = [{k: v for k, v in m.items() if v is not None} for m in messages]
        known = {"tools": None, "documents": None, **self.special, **extra}
        try:
            return _compiled(self.template).render(messages=plain, add_generation_prompt=add_generation_prompt, **known)
        except Exception as e:  # a template is foreign code: whatever it raises is an answer to this request alone
            reason = str(e) if isinstance(e, jinja2.TemplateError) else repr(e)
            raise TokenizerError(f"the chat template of {self.path} refuses these messages: {reason}") from None


def _text(token: Any) -> str:
    """A special token as text: tokenizer_config.json writes a string, or a table with `content`."""
    return str(token["content"] if isinstance(token, Mapping) else token)


def _first(*ids: Any) -> int | None:
    return next((int(i) for i in ids if i is not None), None)


def _eos(named: Any, usual: int | None) -> tuple[int, ...]:
    """All ids that end a sequence: those generation_config.json lists, and the tokenizer's own."""
    listed = named if isinstance(named, list) else [] if named is None else [named]
    return tuple(dict.fromkeys([*(int(i) for i in listed), *([] if usual is None else [usual])]))


def _template_source(path: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja if there is one, else what tokenizer_config.json holds: a template, or a list with names."""
    if (path / "chat_template.jinja").exists():
        return (path / "chat_template.jinja").read_text(encoding="utf-8")
    held = config.get("chat_template")
    if isinstance(held, list):
        held = next((t["template"] for t in held if t.get("name") == "default"), None)
    return held or None


@cache
def _compiled(source: str) -> jinja2.Template:
    """A chat template in the sandbox transformers renders it in: same settings, filters and functions."""
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )

    def tojson(
        x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    env.filters["tojson"] = tojson  # jinja's own escapes HTML
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return env.from_string(source)


class _Generation(jinja2.ext.Extension):
    """{% generation %} marks an assistant's turn for training; here it is passed through."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
