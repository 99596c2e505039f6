"""How the field `logprobs` of a response shows single tokens: their text, bytes and text_offset.

Output text is decoded elsewhere (Transcript).
"""

from __future__ import annotations

import re
from collections.abc import Sequence, Set
from functools import lru_cache

from intaglio.models import Tokenizer
from intaglio.models.text.tokenizer import REPLACEMENT


def _byte_alphabet() -> dict[str, int]:
    """Returns GPT-2's byte-level alphabet as a dict from character to byte.

    Printable bytes have the character of the same number. The other bytes, in ascending order, have the characters from
    U+0100 on.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(0x100 + i): b for i, b in enumerate(others)}


BYTES = _byte_alphabet()


class Vocabulary:
    """Looks up the text and the bytes of single tokens, with a cache.

    tokenizer: the model's tokenizer. If it is None, the text of the token with the id N is "token_id:N".
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer
        self.piece = lru_cache(1 << 16)(self._piece)

    def name(self, id: int) -> str:
        r"""Returns the text of a token.

        If the token's bytes are not whole UTF-8 characters, the text shows the bytes in OpenAI's form, such as
        bytes:\xf0\x9f.
        """
        text, raw = self.piece(id)
        try:
            raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in raw)
        return text

    def _piece(self, id: int) -> tuple[str, bytes]:
        """Returns (text, bytes) of the token `id`.

        Returns ("token_id:N", b"") if there is no tokenizer, or if it has no token with the id N. In the text, U+FFFD
        stands for bytes that are only part of a character.
        """
        name = self.tokenizer.inner.id_to_token(id) if self.tokenizer else None
        if self.tokenizer is None or name is None:
            return f"token_id:{id}", b""
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", name):
            raw = bytes([int(byte[1], 16)])
            return raw.decode(errors="replace"), raw
        text = self.tokenizer.decode([id], skip_special=False)
        if REPLACEMENT in text and all(c in BYTES for c in name):
            return text, bytes(BYTES[c] for c in name)
        if name.startswith("\u2581") and not text.startswith(" "):
            text = " " + text  # SentencePiece marks a space so; decoders drop it at the beginning of a text
        return text, text.encode()


class Offsets:
    """Computes text_offset: the position in the choice's text at which each token begins.

    Positions are in characters from 0. All tokens that make up one character have the same position.

    Args:
        tokenizer: the model's tokenizer; None: all positions are 0.
        prompt: the prompt's token ids.
        echo: True if the choice's text begins with the prompt's text.
        hidden: ids of tokens that leave no text in the output; None: all special tokens.
        prefix: number of tokens at the prompt's beginning, such as BOS, that have no text in the echoed prompt.
        suffix: number of tokens at the prompt's end, such as EOS, that have no text in the echoed prompt.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, prompt: Sequence[int], echo: bool, hidden: Set[int] | None, prefix: int = 0,
        suffix: int = 0,
    ) -> None:  # fmt: skip
        self.at, self.count, self.shown = 0, 0, range(prefix, len(prompt) - suffix)
        self.prompt = tokenizer.stream((), frozenset()) if tokenizer and echo else None
        self.output = tokenizer.stream(prompt, hidden) if tokenizer else None

    def of_prompt(self, id: int) -> int:
        """Returns the position in the choice's text, in characters from 0, at which prompt token `id` begins.

        Call it once for each token of the prompt, in order. All positions are 0 unless the text begins with the prompt
        (`echo`).
        """
        at = self.at
        if self.prompt and self.count in self.shown:
            self.at += len(self.prompt.push(id))
        self.count += 1
        return at

    def of_output(self, id: int) -> int:
        """Returns the position in the choice's text, in characters from 0, at which output token `id` begins.

        Call it once for each output token, in order, after the tokens of the prompt.
        """
        if self.prompt:
            self.at, self.prompt = self.at + len(self.prompt.end()), None
        at = self.at
        if self.output:
            self.at += len(self.output.push(id))
        return at
