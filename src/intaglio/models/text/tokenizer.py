"""Tokenizer: converts text to token ids and back, one token at a time if needed, and renders chat templates.

A wrapper of the `tokenizers` library; needs no transformers. Settings of the template's sandbox are transformers' own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cache, cached_property
from itertools import takewhile
from operator import eq
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers

from intaglio.models.config import CheckpointError
from intaglio.models.files.gguf import find_gguf, open_gguf
from intaglio.models.text.embedded import Embedded, read_tokenizer
from intaglio.models.text.files import DEFAULT, SENTENCEPIECE, TOOLS, TokenizerError, read_files

REPLACEMENT = "\ufffd"
HELD = 16  # ids held back at most: a character has 4 bytes, so that many without an end are not UTF-8 at all


@dataclass
class Stream:
    """Streaming decoder: turns the tokens of one sequence into text while they arrive.

    push(token) adds a token and returns the new text that later tokens cannot change. end() returns the rest. A token's
    text may depend on its neighbours, so each call decodes the last few tokens with and without the new token and
    returns the difference. Text that ends inside a character is held back. `hidden`: ids of tokens that leave no text;
    None: all special tokens.
    """

    tokenizer: Tokenizer
    ids: list[int] = field(default_factory=list)
    shown: int = 0  # ids before this are in text already returned
    start: int = 0  # the tail decoded begins here, some ids before `shown`
    hidden: Set[int] | None = None

    def push(self, token: int) -> str:
        self.ids.append(token)
        return self._new(final=False)

    def end(self) -> str:
        return self._new(final=True)

    def _new(self, final: bool) -> str:
        before = self._decode(self.ids[self.start : self.shown])
        after = self._decode(self.ids[self.start :])
        broken = after.endswith(REPLACEMENT) and len(self.ids) - self.shown < HELD
        known = len(before)
        if before.endswith(REPLACEMENT):  # a prompt that ends inside a character: the new ids may complete it
            known = sum(1 for _ in takewhile(bool, map(eq, before, after)))
        if len(after) <= known or (broken and not final):
            return ""
        self.start, self.shown = self.shown, len(self.ids)
        return after[known:]

    def _decode(self, ids: list[int]) -> str:
        if self.hidden is None:
            return self.tokenizer.decode(ids)
        return self.tokenizer.decode([id for id in ids if id not in self.hidden], skip_special=False)


@dataclass(frozen=True)
class Tokenizer:
    """A checkpoint's tokenizer with its special tokens and chat templates.

    Attributes:
        path: checkpoint folder or GGUF file.
        inner: tokenizer of the `tokenizers` library.
        special: {name of a special token, such as bos_token: its text}.
        bos_id: id of the beginning-of-sequence token, or None.
        eos_ids: ids of the tokens that end a sequence; there may be several.
        templates: {name: chat template}.
    """

    path: Path
    inner: tokenizers.Tokenizer
    special: Mapping[str, str]
    bos_id: int | None
    eos_ids: tuple[int, ...]
    templates: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | Path) -> Tokenizer:
        """Returns the Tokenizer of a checkpoint folder or of a GGUF file.

        Raises TokenizerError if a file is missing or damaged. The message names the file.
        """
        if found := _embedded(Path(path)):
            return cls(Path(path), found.inner, found.special, found.bos_id, found.eos_ids, found.templates)
        files = read_files(Path(path))
        inner, special, model = files.inner, files.special, files.model
        bos = _first(inner.token_to_id(special.get("bos_token", "")), model.get("bos_token_id"))
        usual = inner.token_to_id(special.get("eos_token", ""))
        eos = tuple(dict.fromkeys([*files.ends, *([] if usual is None else [usual])]))
        return cls(Path(path), inner, special, bos, eos, files.templates)

    @property
    def template(self) -> str | None:
        """The chat template (Jinja source) for messages without tools; None if the checkpoint has none."""
        return self.template_for(tools=False)

    def template_for(self, tools: bool) -> str | None:
        """Returns the chat template (Jinja source) for messages with or without tools; None if the checkpoint has none.

        If `tools` is True, the template named tool_use is preferred, as in transformers.
        """
        return (self.templates.get(TOOLS) if tools else None) or self.templates.get(DEFAULT) or None

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Returns a list of the token ids of a text.

        Where the text of a special token occurs in `text`, it becomes that token.

        special: True to add the special tokens that the tokenizer puts before or after a text, such as bos.
        """
        return list(self.inner.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Returns the text of the token ids `ids`. skip_special: True to leave special tokens out."""
        return str(self.inner.decode(list(ids), skip_special_tokens=skip_special))

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """A dict {text: id} of the special tokens. decode() leaves these tokens out by default."""
        return {t.content: id for id, t in self.inner.get_added_tokens_decoder().items() if t.special}

    def stream(self, ids: Iterable[int] = (), hidden: Set[int] | None = None) -> Stream:
        """Returns a Stream that decodes the tokens after a prompt. The prompt's own text is not returned.

        A character that begins in the prompt and ends after it is returned whole.

        ids: token ids of the prompt. hidden: ids of tokens that leave no text; None: all special tokens.
        """
        seen = list(ids)
        return Stream(self, seen, len(seen), max(0, len(seen) - 6), hidden)

    def with_template(self, source: str) -> Tokenizer:
        """Returns a copy of the tokenizer with `source` (Jinja) as its only chat template.

        Raises TokenizerError if the template cannot be parsed.
        """
        try:
            _compiled(source)
        except jinja2.TemplateError as e:
            raise TokenizerError(f"the chat template does not parse: {e}") from None
        return replace(self, templates={DEFAULT: source})

    def fits(self, vocabulary: int) -> None:
        """Raise TokenizerError if a token of the base vocabulary has an id of `vocabulary` or above. Returns nothing.

        Added tokens, such as image tokens, may have higher ids. check_ids() rejects a prompt that uses such a token.

        vocabulary: number of token ids of the model.
        """
        added = {t.content for t in self.inner.get_added_tokens_decoder().values()}
        plain = ((id, t) for t, id in self.inner.get_vocab(with_added_tokens=False).items() if t not in added)
        top, token = max(plain, default=(-1, ""))
        if top >= vocabulary:
            raise TokenizerError(
                f"{self.path}: token {token!r} has id {top}, but the model's vocabulary is 0..{vocabulary - 1}; "
                "the tokenizer belongs to another model"
            )

    def check_ids(self, ids: Sequence[int], vocabulary: int, name: str = "the prompt") -> None:
        """Raise TokenizerError if one of `ids` is not below `vocabulary`. Returns nothing.

        Args:
            ids: token ids of a text.
            vocabulary: number of token ids of the model.
            name: what the error message calls the text, such as "the prompt".
        """
        bad = next((i for i in ids if i >= vocabulary), None)
        if bad is not None:
            raise TokenizerError(
                f"{name} has the token {self.inner.id_to_token(bad)!r} (id {bad}), which the model's vocabulary of "
                f"0..{vocabulary - 1} does not have; leave it out"
            )

    def chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **extra: Any) -> str:
        """Returns the text of a prompt: the messages of a chat, rendered with the checkpoint's chat template.

        Encode the text with special=False, since templates write bos themselves. Raises TokenizerError if there is no
        template or no message, or if the template rejects the messages.

        Args:
            messages: the messages, each with keys such as role and content.
            add_generation_prompt: True to end the text where the assistant's answer begins.
            extra: further variables of the template, such as tools.
        """
        template = self.template_for(tools=extra.get("tools") is not None)
        if template is None and self.templates:
            raise TokenizerError(
                f"{self.path} has chat templates named {', '.join(sorted(self.templates))}, and none named {DEFAULT}; "
                "add one, or use plain completion"
            )
        if template is None:
            raise TokenizerError(f"{self.path} has no chat_template; use plain completion, or a chat-tuned model")
        if not messages:
            raise TokenizerError("a chat needs at least one message")
        plain = [{k: v for k, v in m.items() if v is not None} for m in messages]
        known = {"tools": None, "documents": None, **self.special, **extra}
        try:
            return _compiled(template).render(messages=plain, add_generation_prompt=add_generation_prompt, **known)
        except Exception as e:  # a template is foreign code: whatever it raises is an answer to this request alone
            reason = str(e) if isinstance(e, jinja2.TemplateError) else repr(e)
            raise TokenizerError(f"the chat template of {self.path} refuses these messages: {reason}") from None


def has_tokenizer(path: Path) -> bool:
    """True if a checkpoint has a tokenizer.

    This is tokenizer.json or tokenizer.model in the checkpoint's folder, or a tokenizer in its GGUF file. A GGUF file
    is read only if the folder has neither file. Then TokenizerError is raised if the GGUF file or its tokenizer cannot
    be read, if a part of a split file is missing, or if there are several GGUF models.

    path: the folder or GGUF file.
    """
    beside = any((path / name).exists() for name in ("tokenizer.json", SENTENCEPIECE))
    return beside or _embedded(path) is not None


def _embedded(path: Path) -> Embedded | None:
    """Returns the tokenizer in a GGUF file as an Embedded; None if the file has none.

    Returns None, too, for a folder with tokenizer.json or without a GGUF file. Raises TokenizerError if the file or its
    tokenizer cannot be read.

    path: the GGUF file, or a folder that may have one.
    """
    if (path / "tokenizer.json").exists():
        return None
    try:
        file = find_gguf(path)
        return read_tokenizer(open_gguf(file)) if file else None
    except CheckpointError as e:
        raise TokenizerError(str(e)) from None


def _first(*ids: Any) -> int | None:
    return next((int(i) for i in ids if i is not None), None)


@cache
def _compiled(source: str) -> jinja2.Template:
    """Returns a chat template compiled by Jinja, with the same sandbox, filters and functions as in transformers.

    Raises jinja2.TemplateError if the template cannot be parsed.

    source: the template's text.
    """
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
    """Jinja tag {% generation %}, which marks an assistant's turn for training. Its content is rendered unchanged."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
