"""The front door of the Python API: a checkpoint, compiled for a device, that generates text and gives logits."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import intaglio.silicon.device  # noqa: F401  makes the silicon device known
from intaglio import formats
from intaglio.compiler import build
from intaglio.devices import DeviceError, StateSpec, open_device
from intaglio.models import Checkpoint, Tokenizer, TokenizerError, port
from intaglio.program import Program
from intaglio.runtime import Engine, Request, RequestError, SamplingParams

BUNDLED = Path(__file__).parent / "data" / "stdlib-5m"
PAGE_TOKENS = 32
POOL_TOKENS = 32768  # KV held by default, if the context is no longer than that
POOL_SHARE = 0.25  # of the machine's memory, at most

Prompt = str | Sequence[int]
Params = SamplingParams | Sequence[SamplingParams] | None


@dataclass(frozen=True)
class RequestOutput:
    """What came of one prompt. `logprobs` has one natural log-probability a token, under the unfiltered distribution.

    finish_reason: stop (end of sequence, or a stop string: `text` ends before it), length, error (see `error`), abort.
    """

    prompt_token_ids: list[int]
    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    error: str | None = None


@dataclass(frozen=True)
class Delta:
    """What is new in a stream: text that nothing can take back any more, and tokens. The last has a finish_reason."""

    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    error: str | None = None


class Transcript:
    """The text of one output as its tokens come, ended before the first of the stop strings."""

    def __init__(self, tokenizer: Tokenizer | None, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self.decoder = tokenizer.stream(prompt) if tokenizer else None
        self.stops = stops
        self.text = ""
        self.sent = 0
        self.stopped = False

    def push(self, token: int) -> bool:
        """Read one more token; True if a stop string is now complete."""
        if self.decoder:
            self._append(self.decoder.push(token))
        return self.stopped

    def _append(self, text: str) -> None:
        first = max(0, len(self.text) + 1 - max(map(len, self.stops), default=0))  # no stop string ends before this
        self.text += text
        found = [at for stop in self.stops if (at := self.text.find(stop, first)) >= 0]
        if found and not self.stopped:
            self.text, self.stopped = self.text[: min(found)], True

    def finish(self) -> None:
        """No more tokens come: read the bytes of a character cut short."""
        if self.decoder and not self.stopped:
            self._append(self.decoder.end())

    def settled(self, ended: bool) -> str:
        """Text not handed out yet, less a tail that may turn out to begin a stop string."""
        tails = (n for stop in self.stops for n in range(1, len(stop)) if self.text.endswith(stop[:n]))
        end = len(self.text) - (0 if ended else max(tails, default=0))
        new, self.sent = self.text[self.sent : max(end, self.sent)], max(end, self.sent)
        return new


def pool_pages(program: Program, kv_tokens: int | None) -> int:
    """Pages of KV to hold: for `kv_tokens`, or by default for POOL_TOKENS or one whole context, whichever is more, or
    as many as a quarter of the machine's memory takes."""
    if kv_tokens is not None:
        if kv_tokens < 1:
            raise RequestError(f"kv_tokens is {kv_tokens}; allowed: 1 or more")
        return -(-kv_tokens // PAGE_TOKENS)
    per_token = sum(formats.get(t.format).nbytes(int(t.shape[2]), int(t.shape[3])) for t in program.of_role("state"))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fits = int(memory * POOL_SHARE) // max(1, per_token)
    return max(1, min(max(program.context, POOL_TOKENS), fits) // PAGE_TOKENS)


class LLM:
    """A model ready to run. `path` is a checkpoint folder in Hugging Face's layout; None is the bundled model.

    device: host, reference, ...; weights: auto (as stored), f32, bf16, fp8, int8 or int4; threads: for devices that
    take it. kv_format: auto (to go with the weights), f32, bf16 or int8.
    context: positions to compile for, by default the model's own; kv_tokens: how many tokens of KV to hold for all
    sequences together; max_batch_tokens: tokens in one step; cache: where the host keeps packed weights for the next
    start, a folder, "auto" or None (see HostDevice). Raises ValueError (CheckpointError, PortError, ...) or
    DeviceError, saying what is wrong.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        device: str = "host",
        weights: str = "auto",
        threads: int | None = None,
        *,
        context: int | None = None,
        kv_tokens: int | None = None,
        kv_format: str = "auto",
        max_batch_tokens: int = 512,
        cache: str | Path | None = "auto",
    ) -> None:
        self.path = BUNDLED if path is None else Path(path)
        checkpoint = Checkpoint.open(self.path)
        self.program = build(port(checkpoint, context), weights, kv_format)
        self.tokenizer = _open_tokenizer(self.path, self.program.vocabulary)
        named = self.tokenizer.eos_ids if self.tokenizer else checkpoint.config.get("eos_token_id")
        self.eos_ids = frozenset([named] if isinstance(named, int) else named or ())
        if threads is not None and device != "host":
            raise DeviceError(f"device {device!r} takes no number of threads; leave threads out")
        options = {"threads": threads, "cache": cache} if device == "host" else {}
        self.device = open_device(device, **options)
        state = StateSpec(pool_pages(self.program, kv_tokens), PAGE_TOKENS)
        executable = self.device.load(self.program, checkpoint, state)
        clock = getattr(self.device, "clock", time.monotonic)  # that of a modelled device is virtual
        self.engine = Engine(executable, rng=random.Random(), clock=clock, max_batch_tokens=max_batch_tokens)
        self._made = 0

    def generate(self, prompts: Prompt | Sequence[Prompt], params: Params = None) -> list[RequestOutput]:
        """Continue each prompt (text or token ids; one or a list of them), all in one batch; outputs in their order.

        `params` is one for all, or one each; None is SamplingParams(). Raises RequestError or ParamsError, naming the
        prompt's index, before anything runs. Without a tokenizer, prompts are ids and texts are empty.
        """
        several = _as_list(prompts)
        requests = self._requests(several, _params_each(params, len(several)))
        self._finish([r for r, _ in requests])
        return [self._output(r, t) for r, t in requests]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Delta]:
        """Continue one prompt, handing out text as it comes. Closing the iterator ends the request."""
        [(request, transcript)] = self._requests([prompt], [params or SamplingParams()])
        return self._stream(request, transcript)

    def _stream(self, request: Request, transcript: Transcript) -> Iterator[Delta]:
        self.engine.add(request)
        seen, ended = 0, False
        try:
            while not ended:
                if request.state != "ended":  # it may have ended in steps taken for others since the last delta
                    self.engine.step()
                if ended := request.state == "ended":
                    transcript.finish()
                text, new = transcript.settled(ended), request.output[seen:]
                seen += len(new)
                if text or new or ended:
                    yield Delta(text, new, request.finish_reason, request.error)
        finally:
            self.engine.abort(request.id)

    def chat(self, messages: Sequence[Mapping[str, str]], params: SamplingParams | None = None) -> RequestOutput:
        """The model's answer to messages [{"role": "user", "content": ...}, ...], through its chat template."""
        return self.generate([self.chat_prompt(messages)], params)[0]

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The token ids of a conversation, ready for the assistant's turn."""
        tokenizer = self._text()
        return tokenizer.encode(tokenizer.chat(messages), special=False)

    def logits(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Float32 logits [tokens, vocabulary] after each token of each sequence of ids."""
        requests = [self._request(ids, SamplingParams(), f"sequence {i}")[0] for i, ids in enumerate(sequences)]
        for request in requests:
            request.scored = True
        self._checked(requests, "sequence")
        self._finish(requests)
        failed = next((r for r in requests if r.error), None)
        if failed:
            raise DeviceError(failed.error)
        return [np.concatenate(r.logits) for r in requests]

    def _text(self) -> Tokenizer:
        if self.tokenizer is None:
            raise TokenizerError(f"{self.path} has no tokenizer.json: add it, or give token ids and no stop strings")
        return self.tokenizer

    def _requests(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams]
    ) -> list[tuple[Request, Transcript]]:
        """One request a prompt, each checked."""
        pairs = [self._request(p, s, f"prompt {i}") for i, (p, s) in enumerate(zip(prompts, params, strict=True))]
        self._checked([r for r, _ in pairs], "prompt")
        return pairs

    def _request(self, prompt: Prompt, params: SamplingParams, name: str) -> tuple[Request, Transcript]:
        ids = self._ids(prompt, name)
        tokenizer = self._text() if params.stop else self.tokenizer
        transcript = Transcript(tokenizer, ids, tuple(params.stop))
        self._made += 1
        return Request(f"r{self._made}", ids, params, self.eos_ids, transcript.push), transcript

    def _ids(self, prompt: Prompt, name: str) -> list[int]:
        if isinstance(prompt, str):
            if not prompt:
                raise RequestError(f"{name} is empty; give at least one character, or token ids")
            return self._text().encode(prompt)
        bad = next((t for t in prompt if isinstance(t, bool) or not isinstance(t, int | np.integer)), None)
        if bad is not None:
            raise RequestError(f"{name}: token ids are whole numbers, {bad!r} is not")
        return [int(t) for t in prompt]

    def _checked(self, requests: Sequence[Request], what: str) -> None:
        for i, request in enumerate(requests):
            try:
                self.engine.check(request)
            except RequestError as e:
                raise RequestError(f"{what} {i}: {e}") from None

    def _finish(self, requests: Sequence[Request]) -> None:
        """Run all of these to their end; whatever interrupts leaves nothing behind."""
        try:
            for request in requests:
                self.engine.add(request)
            while any(r.state != "ended" for r in requests):
                self.engine.step()
        finally:
            for request in requests:
                self.engine.abort(request.id)

    @staticmethod
    def _output(r: Request, transcript: Transcript) -> RequestOutput:
        transcript.finish()
        assert r.finish_reason
        return RequestOutput(list(r.prompt), transcript.text, r.output, r.logprobs, r.finish_reason, r.error)


def _open_tokenizer(path: Path, vocabulary: int) -> Tokenizer | None:
    """The folder's tokenizer, if it has one: token ids work without. Raises TokenizerError if it does not fit."""
    if not (path / "tokenizer.json").exists():
        return None
    tokenizer = Tokenizer.open(path)
    tokenizer.fits(vocabulary)
    return tokenizer


def _as_list(prompts: Any) -> list[Prompt]:
    """One prompt, text or ids, as a list of one."""
    if isinstance(prompts, str):
        return [prompts]
    several = list(prompts)
    return [several] if several and all(isinstance(p, int | np.integer) for p in several) else several


def _params_each(params: Params, n: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * n
    if len(params) != n:
        raise RequestError(f"{len(params)} SamplingParams for {n} prompts; give one for all, or one each")
    return list(params)
