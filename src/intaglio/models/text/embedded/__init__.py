"""Tokenizers rebuilt from the metadata of a GGUF file."""

from intaglio.models.text.embedded.tokenizer import Embedded, read_tokenizer

__all__ = ["Embedded", "read_tokenizer"]
