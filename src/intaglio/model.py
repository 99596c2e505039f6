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
    """A checkpoint compiled to a Program, with its tokenizer. The same Model runs on any device.

    Any thread may use a Model: its attributes do not change, and the cache of compiled grammars has a lock.

    Attributes:
        path: the checkpoint folder or GGUF file.
        name: the hub id, or else the name of the folder or file.
        checkpoint: the tensors and the configuration of the model.
        ported: the Program made from the checkpoint's configuration, before compilation.
        program: the Program compiled for a single rank.
        weights: the weight format requested.
        kv_format: the K/V cache format requested.
        tokenizer: the tokenizer; None if the checkpoint has none. Prompts must then be token ids.
        eos_ids: ids of the tokens that end a sequence.
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

        Raises ValueError (HubError, CheckpointError, PortError, TokenizerError, ...); the message says what is wrong.

        Args:
            path: a folder in Hugging Face's layout, a GGUF file or a hub id (owner/name, owner/name:Q4_K_M); None is
                the bundled model.
            weights: auto (as stored), f32, bf16, fp8, int8, int4 or a full name such as q4_k.
            kv_format: f32, bf16, int8, fp8 or auto. auto is f32 if the weights are f32, else the format that the
                checkpoint asks for, else bf16.
            context: maximum tokens of a sequence; by default the model's own limit.
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
        """The MeshProgram for a layout such as tp4pp2: the Programs of all its ranks.

        If `layout` is None, it has one rank with the whole Program. Raises LayoutError if the layout does not fit the
        model, and ProgramError if a compiled Program breaks a rule.
        """
        if layout is None:
            return MeshProgram((self.program,))
        return build_mesh(self.ported, layout, self.weights, self.kv_format)

    def stages(self, layout: Layout) -> tuple[Program, ...]:
        """The Program of the first rank of each pipeline stage, as a tuple.

        () for a layout of one rank. Simulated chips compute their time from these Programs. The first rank is enough:
        no rank of a stage has larger tensors, and ranks wait for each other. Values that ranks send to each other are
        rounded to bf16.
        """
        if layout.ranks == 1:
            return ()
        return build_stages(self.ported, layout, self.weights, self.kv_format, wire="bf16")

    def request(
        self, prompt: Prompt, params: SamplingParams, id: str, name: str = "the prompt",
        special: Container[str] = (), **options: Any,
    ) -> tuple[Request, list[Transcript]]:  # fmt: skip
        """Make an engine request from a prompt. Returns (the Request, a list of Transcripts).

        There is one Transcript for each of the `params.n` choices; it turns the tokens of that choice into text.

        id: id of the Request. special: special tokens that stay in the text. options: attributes of the Request by
        name, such as priority and timeout. Raises RequestError, TokenizerError or GrammarError for a prompt, stop
        string, bad word or grammar that cannot be served. The message calls the prompt `name`.
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
        """The token ids of a prompt, as a list of ints. A prompt is a text, or already a sequence of token ids.

        Raises RequestError for an empty text, and for ids that are not whole numbers. Raises TokenizerError for a text
        if there is no tokenizer, or if the text has tokens that the model lacks. The message calls the prompt `name`.
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
        """The token ids of `word` in two spellings: without and with a space before it.

        Returns a list of tuples of token ids. A spelling without tokens is left out; so is the second if it equals the
        first. Raises TokenizerError without a tokenizer.
        """
        encode = self.needed_tokenizer().encode
        found = [tuple(encode(text, special=False)) for text in (word, f" {word.lstrip()}")]
        return [ids for ids in dict.fromkeys(found) if ids]

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The token ids of a conversation, formatted by the chat template, as a list.

        They end where the assistant's answer begins. messages: dicts with "role" and "content". Raises TokenizerError
        without a tokenizer or chat template, if `messages` is empty, and for messages that the template refuses.
        """
        tokenizer = self.needed_tokenizer()
        ids = tokenizer.encode(tokenizer.chat(messages), special=False)
        tokenizer.check_ids(ids, self.program.vocabulary, "the conversation")
        return ids

    def with_chat_template(self, source: str) -> Model:
        """A copy of the model that uses the chat template `source` (Jinja).

        Raises TokenizerError if the template does not parse, or if the model has no tokenizer.
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
        """A function that makes a new grammar matcher for a choice; None if `params` has no grammar.

        The function takes the index of the choice. Raises TokenizerError without a tokenizer, GrammarError for a
        grammar that cannot be used.
        """
        if params.grammar is None:
            return None
        self.needed_tokenizer()
        assert self.grammars
        first = self.grammars.matcher(params.grammar.kind, params.grammar.text, params.grammar.before)
        return lambda index: first.copy()


def _open_tokenizer(path: Path, vocabulary: int) -> Tokenizer | None:
    """The Tokenizer of a checkpoint folder or GGUF file; None if the checkpoint has none.

    vocabulary: number of the model's logits. Raises TokenizerError if the tokenizer cannot be read, or if it has more
    tokens than the model has logits.
    """
    if not has_tokenizer(path):
        return None
    tokenizer = Tokenizer.open(path)
    tokenizer.fits(vocabulary)
    return tokenizer
