"""Model: a checkpoint compiled to a Program, with its tokenizer, ends of sequence and grammars."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from intaglio.compiler import Layout, build, build_mesh, build_stages
from intaglio.models import Checkpoint, Grammars, Tokenizer, TokenizerError, Transcript, has_tokenizer, port
from intaglio.models.hub import hub_id, locate
from intaglio.models.text.files import end_ids
from intaglio.program import MeshProgram, Program
from intaglio.progress import Progress, silent
from intaglio.runtime import Matcher, Request, RequestError, SamplingParams
from intaglio.runtime.request import TokenIds

BUNDLED = Path(__file__).parent / "data" / "stdlib-5m"

Prompt = str | TokenIds


@dataclass(frozen=True)
class Model:
    """A checkpoint compiled to a Program, with its tokenizer and grammars; independent of the device it runs on.

    Immutable except for compiled grammars, which are cached behind a lock, so any thread may use it.

    Attributes:
        path: the checkpoint folder or GGUF file.
        name: the name of the folder or file, or the hub id.
        checkpoint: tensors and configuration.
        ported: the Program as ported, before compilation.
        program: the Program compiled for one rank.
        weights: the weight format requested.
        kv_format: the K/V cache format requested.
        tokenizer: None if the checkpoint has none; then prompts are token ids.
        eos_ids: tokens that end a sequence.
        grammars: compiler of grammars for structured output; None without a tokenizer.
    """

    path: Path
    name: str
    checkpoint: Checkpoint
    ported: Program
    program: Program
    weights: str
    kv_format: str
    tokenizer: Tokenizer | None
    eos_ids: frozenset[int]
    grammars: Grammars | None

    @classmethod
    def open(
        cls, path: str | Path | None = None, weights: str = "auto", kv_format: str = "auto",
        context: int | None = None, revision: str | None = None, progress: Progress = silent,
    ) -> Model:  # fmt: skip
        """Open and compile a checkpoint, and return the Model. A hub id is downloaded first.

        Raises ValueError (HubError, CheckpointError, PortError, TokenizerError, ...) saying what is wrong.

        Args:
            path: a folder in Hugging Face's layout, a GGUF file or a hub id (owner/name, owner/name:Q4_K_M); None is
                the bundled model.
            weights: auto (as stored), f32, bf16, fp8, int8, int4 or a full name such as q4_k.
            kv_format: f32, bf16, int8, fp8, or auto: f32 for f32 weights, else what the checkpoint asks for, else bf16.
            context: positions to compile for; by default the model's own.
            revision: branch, tag or commit of the hub id's repository.
            progress: called as progress(bytes done, bytes in all, what) during a download.
        """
        named = BUNDLED if path is None else path
        path = locate(named, revision, progress)
        checkpoint = Checkpoint.open(path)
        ported = port(checkpoint, context)
        program = build(ported, weights, kv_format)
        tokenizer = _open_tokenizer(path, program.vocabulary)
        own = path / "config.json" if path.is_dir() else path
        eos_ids = frozenset(tokenizer.eos_ids if tokenizer else end_ids(own, checkpoint.config))
        grammars = Grammars(tokenizer, program.vocabulary) if tokenizer else None
        name = hub_id(named) or path.resolve().name
        return cls(path, name, checkpoint, ported, program, weights, kv_format, tokenizer, eos_ids, grammars)

    def sharded(self, layout: str | Layout | None) -> MeshProgram:
        """The MeshProgram of all ranks of a layout such as tp4pp2. layout None: one rank with the whole Program.

        Raises the errors of build_mesh().
        """
        if layout is None:
            return MeshProgram((self.program,))
        return build_mesh(self.ported, layout, self.weights, self.kv_format)

    def stages(self, layout: Layout) -> tuple[Program, ...]:
        """The Program of one rank of each pipeline stage, as a tuple; () for a layout of one rank.

        Used for simulated chips. Values that ranks send to each other are rounded to bf16.
        """
        if layout.ranks == 1:
            return ()
        return build_stages(self.ported, layout, self.weights, self.kv_format, wire="bf16")

    def request(
        self, prompt: Prompt, params: SamplingParams, id: str, name: str = "the prompt",
        special: Container[str] = (), **options: Any,
    ) -> tuple[Request, list[Transcript]]:  # fmt: skip
        """(the Request for an engine, a list of Transcripts, one per choice).

        id: id of the Request. special: special tokens that stay in the text. options: fields of Request, such as
        priority and timeout. Raises RequestError, TokenizerError or GrammarError for a prompt, stop string, bad word or
        grammar that cannot be served; the message calls the prompt `name`.
        """
        ids = self.encode(prompt, name)
        tokenizer = self.needed_tokenizer() if params.stop or params.bad_words else self.tokenizer
        how: dict[str, Any] = {
            "kept": special if params.skip_special_tokens else None,
            "include_stop": params.include_stop_str_in_output, "min_tokens": params.min_tokens,
        }  # fmt: skip
        try:
            transcripts = [Transcript(tokenizer, ids, tuple(params.stop), **how) for _ in range(params.n)]
        except ValueError as e:
            raise RequestError(f"{name}: {e}") from None
        words = tuple(ids for word in params.bad_words for ids in self.spellings(word))
        fields = {"eos_ids": self.eos_ids, "matcher": self._matcher(params), "bad_words": words, **options}
        return Request(id, ids, params, stop_checker=lambda index: transcripts[index].push, **fields), transcripts

    def encode(self, prompt: Prompt, name: str = "the prompt") -> list[int]:
        """The token ids of a prompt, as a list; token ids are returned as ints.

        Raises RequestError for an empty text and for ids that are not whole numbers, TokenizerError for text without a
        tokenizer, or with tokens that the model lacks. The message calls the prompt `name`.
        """
        if isinstance(prompt, str):
            if not prompt:
                raise RequestError(f"{name} is empty; give at least one character, or token ids")
            tokenizer = self.needed_tokenizer()
            ids = tokenizer.encode(prompt)
            tokenizer.check_ids(ids, self.program.vocabulary, name)
            return ids
        bad = next((t for t in prompt if isinstance(t, bool) or not isinstance(t, int | np.integer)), None)
        if bad is not None:
            raise RequestError(f"{name}: token ids are whole numbers, {bad!r} is not")
        return [int(t) for t in prompt]

    def spellings(self, word: str) -> list[tuple[int, ...]]:
        """The token ids of a word at the beginning of a text, and after a space, as a list of tuples.

        A spelling equal to the first, or without tokens, is left out. Raises TokenizerError without a tokenizer.
        """
        encode = self.needed_tokenizer().encode
        found = [tuple(encode(text, special=False)) for text in (word, f" {word.lstrip()}")]
        return [ids for ids in dict.fromkeys(found) if ids]

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The token ids of a conversation in the chat template, up to where the assistant's answer begins, as a list.

        messages: dicts with `role` and `content`. Raises TokenizerError without a tokenizer or chat template, for no
        messages, and for messages that the template refuses.
        """
        tokenizer = self.needed_tokenizer()
        ids = tokenizer.encode(tokenizer.chat(messages), special=False)
        tokenizer.check_ids(ids, self.program.vocabulary, "the conversation")
        return ids

    def with_chat_template(self, source: str) -> Model:
        """A copy of the model with another chat template (Jinja source).

        Raises TokenizerError if the template does not parse, or if there is no tokenizer.
        """
        tokenizer = self.needed_tokenizer().with_template(source)
        return replace(self, tokenizer=tokenizer)

    def needed_tokenizer(self) -> Tokenizer:
        """The model's Tokenizer. Raises TokenizerError if the checkpoint has none."""
        if self.tokenizer is None:
            raise TokenizerError(
                f"{self.path} has no tokenizer (tokenizer.json): add it, or give token ids and no stop strings"
            )
        return self.tokenizer

    def _matcher(self, params: SamplingParams) -> Callable[[int], Matcher] | None:
        """A function from a choice's index to a new grammar matcher; None if `params` has no grammar.

        Raises TokenizerError without a tokenizer, GrammarError for a grammar that cannot be used.
        """
        if params.grammar is None:
            return None
        self.needed_tokenizer()
        assert self.grammars
        first = self.grammars.matcher(params.grammar.kind, params.grammar.text, params.grammar.before)
        return lambda index: first.copy()


def _open_tokenizer(path: Path, vocabulary: int) -> Tokenizer | None:
    """The Tokenizer of a checkpoint folder or GGUF file; None if it has none.

    vocabulary: number of the model's logits. Raises TokenizerError if the tokenizer cannot be read, or has more tokens.
    """
    if not has_tokenizer(path):
        return None
    tokenizer = Tokenizer.open(path)
    tokenizer.fits(vocabulary)
    return tokenizer
