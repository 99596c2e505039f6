"""A model that outputs the tokens a test gives it, whatever its weights. Not a test: tests import it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from intaglio.llm import LLM
from intaglio.runtime import Grammar, Request, SamplingParams

ANY_OBJECT = {"type": "object"}
SCRIPTED = Grammar("regex", "")  # only the matcher counts


@dataclass
class Script:
    """A Matcher that allows one token at each place."""

    ids: list[int]
    vocabulary: int
    at: int = 0

    def mask(self) -> np.ndarray:
        words = np.zeros(-(-self.vocabulary // 32), np.uint32)
        id = self.ids[self.at]
        words[id // 32] = np.uint32(1 << id % 32)
        return words

    def advance(self, token: int) -> bool:
        good = self.at < len(self.ids) and token == self.ids[self.at]
        self.at += good
        return good

    def rollback(self, n: int) -> None:
        self.at -= n


@contextmanager
def scripted(llm: LLM, say: Callable[[str], str | None]) -> Iterator[list[str]]:
    """Make an LLM answer a prompt with `say(prompt)`, special tokens included, and then end; None: as it likes.
    Requests with a grammar keep to it, unless it allows any JSON object. Yields the list of prompts."""
    prepare, prompts = llm.prepare, list[str]()
    tokenizer = llm.model.needed_tokenizer()

    def prepared(prompt: Any, params: SamplingParams, *names: Any, **options: Any) -> tuple[Request, list[Any]]:
        request, transcripts = prepare(prompt, params, *names, **options)
        text = tokenizer.decode(request.prompt, skip_special=False)
        prompts.append(text)
        fixed = params.grammar is not None and params.grammar.source != ANY_OBJECT
        if fixed or (answer := say(text)) is None:
            return request, transcripts
        ids = [*tokenizer.encode(answer, special=False), tokenizer.eos_ids[0]]
        params = replace(request.params, grammar=SCRIPTED)
        script = Script(ids, llm.model.program.vocabulary)
        return replace(request, params=params, matcher=lambda index: replace(script)), transcripts

    llm.prepare = prepared  # type: ignore[method-assign]
    try:
        yield prompts
    finally:
        llm.prepare = prepare  # type: ignore[method-assign]
