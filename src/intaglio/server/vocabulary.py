"""Single tokens as clients see them in log-probabilities: a text and its bytes. Not how text is decoded."""

from __future__ import annotations

import re
from functools import lru_cache

from intaglio.models import Tokenizer
from intaglio.models.tokenizer import REPLACEMENT


def _byte_letters() -> dict[str, int]:
    """GPT-2's alphabet of byte-level tokens: printable bytes stand for themselves, the others from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(0x100 + i): b for i, b in enumerate(others)}


BYTES = _byte_letters()


class Vocabulary:
    """Texts of one tokenizer's tokens; without a tokenizer, ids stand for them."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer
        self.piece = lru_cache(1 << 16)(self._piece)

    def _piece(self, id: int) -> tuple[str, bytes]:
        """A token's text, U+FFFD where it has only a part of a character, and its bytes."""
        name = self.tokenizer.inner.id_to_token(id) if self.tokenizer else None
        if self.tokenizer is None or name is None:
            return f"token_id:{id}", b""
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", name):
            raw = bytes([int(byte[1], 16)])
            return raw.decode(errors="replace"), raw
        text = self.tokenizer.decode([id], skip_special=False)
        if REPLACEMENT in text and all(letter in BYTES for letter in name):
            return text, bytes(BYTES[letter] for letter in name)
        if name.startswith("\u2581") and not text.startswith(" "):
            text = " " + text  # SentencePiece's mark of a space, which decoders drop at the beginning
        return text, text.encode()
