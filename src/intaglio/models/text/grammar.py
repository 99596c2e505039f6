"""Grammar masks: the token ids that a JSON schema, a regular expression or a Lark grammar allows next.

A wrapper of the `llguidance` library, which is an extra.
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from intaglio.models.text.tokenizer import Tokenizer

MAX_CACHED_GRAMMARS = 64
LONGEST = 200  # characters that an error quotes of the library's report
# Fixed white space, as in most training text: if it were free, a small model might write white space without end.
JSON_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class GrammarError(ValueError):
    """Raised if a grammar cannot be parsed, if llguidance fails on it later, or if llguidance is not installed."""


@dataclass
class Grammars:
    """Compiles grammars for one tokenizer and a model of `vocabulary` token ids. Thread-safe.

    Up to MAX_CACHED_GRAMMARS compiled grammars are kept for reuse. A new grammar replaces the grammar that was compiled
    first.
    """

    tokenizer: Tokenizer
    vocabulary: int
    compiled: dict[tuple[str, str, str], Any] = field(default_factory=dict)
    inner: Any = None
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def matcher(self, kind: str, source: str, before: str = "") -> GrammarMatcher:
        """Returns a GrammarMatcher for a grammar, in its initial state.

        Raises GrammarError if the grammar cannot be used.

        Args:
            kind: language of `source`: json_schema, regex or lark.
            source: the grammar.
            before: "" if `source` describes the whole output. If the output has other parts too, such as reasoning
                before the answer, `before` is a Lark grammar of the whole output. In it, `@answer` stands for `source`.
        """
        key = (kind, source, before)
        with self.lock:
            if key not in self.compiled:
                compiled = self._compile(*key)
                while len(self.compiled) >= MAX_CACHED_GRAMMARS:
                    del self.compiled[next(iter(self.compiled))]
                self.compiled[key] = compiled
            return GrammarMatcher(self.compiled[key].deep_copy(), self.vocabulary)

    def _compile(self, kind: str, source: str, before: str) -> Any:
        try:
            from llguidance import LLMatcher, LLTokenizer
        except ImportError:
            raise GrammarError("grammars need llguidance: pip install 'intaglio[grammar]'") from None
        if not self.tokenizer.eos_ids:
            raise GrammarError(
                f"{self.tokenizer.path} names no end-of-sequence token, so no grammar could come to an end"
            )
        if self.inner is None:
            eos, text = list(self.tokenizer.eos_ids), self.tokenizer.inner.to_str()
            self.inner = LLTokenizer(text, n_vocab=self.tokenizer.inner.get_vocab_size(), eos_token=eos)
        try:
            if kind == "json_schema":
                grammar = LLMatcher.grammar_from_json_schema(source, defaults=JSON_STYLE)
            else:
                grammar = {"regex": LLMatcher.grammar_from_regex, "lark": LLMatcher.grammar_from_lark}[kind](source)
        except ValueError as e:
            raise GrammarError(f"the {kind} does not parse: {_brief(str(e))}") from None
        if before:
            grammar = _nested(before, grammar)
        matcher = LLMatcher(self.inner, grammar, log_level=0)
        if matcher.is_error():
            raise GrammarError(f"the {kind} cannot be used: {_brief(matcher.get_error())}")
        return matcher


def _brief(report: str) -> str:
    """Returns a short form of llguidance's error report, on one line.

    It consists of the report's first line and, if there is one, the line that begins with `error:`. The other lines
    show the library's state and are left out. The result has at most LONGEST characters; the first line is cut if
    necessary.
    """
    first, *more = report.strip().splitlines() or [""]
    reason = next((f" {line}" for line in more if line.startswith("error:")), "")[:LONGEST]
    return first[: LONGEST - len(reason)] + reason


def _nested(before: str, answer: str) -> str:
    """Joins the grammars `before` and `answer`. Returns the joined grammar in llguidance's JSON form, as text.

    before: a Lark grammar, in which the name @answer stands for the grammar `answer`. answer: a grammar in llguidance's
    JSON form or in Lark.
    """
    inner = json.loads(answer)["grammars"] if answer.lstrip().startswith("{") else [{"lark_grammar": answer}]
    return json.dumps({"grammars": [{"lark_grammar": before}, {**inner[0], "name": "answer"}, *inner[1:]]})


@dataclass
class GrammarMatcher:
    """State of a grammar after the tokens of one output so far.

    It says which tokens may come next (llguidance matcher). An end-of-sequence token is allowed where the grammar may
    end.
    """

    inner: Any
    vocabulary: int

    def mask(self) -> np.ndarray:
        """Returns a bit mask of the token ids allowed next, uint32 [(vocabulary + 31) // 32].

        Token id i has bit i % 32 (0 is the lowest bit) of word i // 32. Raises GrammarError if llguidance fails, which
        happens with very ambiguous grammars.
        """
        known = np.frombuffer(self.inner.compute_bitmask(), np.uint32)
        if self.inner.is_error():
            raise GrammarError(f"the grammar cannot be followed: {_brief(self.inner.get_error())}; simplify it")
        words = np.zeros(-(-self.vocabulary // 32), np.uint32)
        words[: min(len(words), len(known))] = known[: len(words)]  # a model may have rows that no token names
        if self.vocabulary % 32:
            words[-1] &= np.uint32((1 << self.vocabulary % 32) - 1)
        return words

    def copy(self) -> GrammarMatcher:
        """Returns a copy of the matcher in the same state."""
        return GrammarMatcher(self.inner.deep_copy(), self.vocabulary)

    def advance(self, token: int) -> bool:
        """Accept one token.

        Returns True if the grammar allows the token; otherwise False, and the state does not change.
        """
        return bool(self.inner.try_consume_tokens([token]) == 1)

    def rollback(self, n: int) -> None:
        """Undo the last `n` tokens. Raises GrammarError if that is not possible."""
        if n and not self.inner.rollback(n):
            raise GrammarError(f"{n} tokens cannot be taken back: {_brief(self.inner.get_error())}")
