"""Grammars over a tokenizer's vocabulary: which token ids may come next for a text to match a JSON schema, a regular
expression or a Lark grammar. A wrapper of the `llguidance` library, which is an extra.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from intaglio.models.tokenizer import Tokenizer

KEPT = 64  # compiled grammars remembered


class GrammarError(ValueError):
    """A grammar that cannot be compiled, or not for this model."""


@dataclass
class Grammars:
    """Compiles grammars for one tokenizer and a model of `vocabulary` tokens, and remembers the last ones. Any thread
    may ask."""

    tokenizer: Tokenizer
    vocabulary: int
    compiled: dict[tuple[str, str], Any] = field(default_factory=dict)
    inner: Any = None
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def matcher(self, kind: str, source: str) -> GrammarMatcher:
        """A fresh matcher. kind: json_schema, regex or lark. Raises GrammarError saying what is wrong with it."""
        key = (kind, source)
        with self.lock:
            if key not in self.compiled:
                compiled = self._compile(kind, source)
                while len(self.compiled) >= KEPT:
                    del self.compiled[next(iter(self.compiled))]
                self.compiled[key] = compiled
            return GrammarMatcher(self.compiled[key].deep_copy(), self.vocabulary)

    def _compile(self, kind: str, source: str) -> Any:
        try:
            from llguidance import LLMatcher, LLTokenizer
        except ImportError:
            raise GrammarError("grammars need llguidance: pip install 'intaglio[grammar]'") from None
        if not self.tokenizer.eos_ids:
            raise GrammarError(
                f"{self.tokenizer.path} names no end-of-sequence token, so no grammar could come to an end"
            )
        if self.inner is None:
            eos, path = list(self.tokenizer.eos_ids), str(self.tokenizer.path / "tokenizer.json")
            self.inner = LLTokenizer(path, n_vocab=self.tokenizer.inner.get_vocab_size(), eos_token=eos)
        try:
            if kind == "json_schema":  # one way to write white space, or a small model may write nothing else
                grammar = LLMatcher.grammar_from_json_schema(source, defaults={"whitespace_flexible": False})
            else:
                grammar = {"regex": LLMatcher.grammar_from_regex, "lark": LLMatcher.grammar_from_lark}[kind](source)
        except ValueError as e:
            raise GrammarError(f"the {kind} does not parse: {e}") from None
        matcher = LLMatcher(self.inner, grammar, log_level=0)
        if matcher.is_error():
            raise GrammarError(f"the {kind} cannot be used: {matcher.get_error().strip()}")
        return matcher


@dataclass
class GrammarMatcher:
    """Where one text stands in its grammar. Ends of sequence count as tokens: allowed where the text may end."""

    inner: Any
    vocabulary: int

    def mask(self) -> np.ndarray:
        """The ids allowed next, uint32 [(vocabulary + 31) // 32], the lowest bit first. Raises GrammarError if the
        library gives up on the text, as it may on a grammar with too many ways."""
        known = np.frombuffer(self.inner.compute_bitmask(), np.uint32)
        if self.inner.is_error():
            raise GrammarError(self.inner.get_error().strip())
        words = np.zeros(-(-self.vocabulary // 32), np.uint32)
        words[: min(len(words), len(known))] = known[: len(words)]  # a model may have rows that no token names
        if self.vocabulary % 32:
            words[-1] &= np.uint32((1 << self.vocabulary % 32) - 1)
        return words

    def copy(self) -> GrammarMatcher:
        """Another, that stands where this one stands."""
        return GrammarMatcher(self.inner.deep_copy(), self.vocabulary)

    def advance(self, token: int) -> bool:
        """Take one more token; False, changing nothing, if it is not allowed."""
        return bool(self.inner.try_consume_tokens([token]) == 1)

    def rollback(self, n: int) -> None:
        """Forget the last `n` tokens."""
        if n and not self.inner.rollback(n):
            raise GrammarError(f"{n} tokens cannot be taken back: {self.inner.get_error().strip()}")
