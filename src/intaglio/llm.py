"""The front door of the Python API: a checkpoint, compiled for a device, that generates text and gives logits."""

from __future__ import annotations

import json
import os
import random
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from intaglio import formats
from intaglio.compiler import Layout, build, build_mesh, build_stages
from intaglio.devices import DEVICES, Device, DeviceError, Executable, MeshDevice, StateSpec, WorkerDevice, open_device
from intaglio.models import Checkpoint, Grammars, Tokenizer, TokenizerError, port
from intaglio.program import Program
from intaglio.runtime import Engine, Matcher, Refused, Request, RequestError, SamplingParams, Sequence


def _silicon(**options: Any) -> Device:
    """Loaded when asked for, because it takes a quarter of the time that all else takes to load."""
    from intaglio.silicon.device import SiliconDevice

    return SiliconDevice(**options)


DEVICES["silicon"] = _silicon

BUNDLED = Path(__file__).parent / "data" / "stdlib-5m"
PAGE_TOKENS = 32
POOL_TOKENS = 32768  # KV held by default, if the context is no longer than that
POOL_SHARE = 0.25  # of the machine's memory, at most

Prompt = str | Many[int]
Params = SamplingParams | Many[SamplingParams] | None


@dataclass(frozen=True)
class RequestOutput:
    """What came of one prompt. `logprobs` has one natural log-probability a token, under the unfiltered distribution.

    finish_reason: stop (end of sequence, or a stop string: `text` ends before it), length, error (see `error`), abort,
    deadline.
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

    def __init__(self, tokenizer: Tokenizer | None, prompt: Many[int], stops: Many[str]) -> None:
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
        if not self.stops:
            self.text += text
            return
        first = max(0, len(self.text) + 1 - max(map(len, self.stops)))  # no stop string ends before this
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


def pool_pages(programs: Many[Program], kv_tokens: int | None) -> int:
    """Pages of KV to hold: for `kv_tokens`, or by default for POOL_TOKENS or one whole context, whichever is more, or
    as many as a quarter of the machine's memory takes."""
    if kv_tokens is not None:
        if kv_tokens < 1:
            raise RequestError(f"kv_tokens is {kv_tokens}; allowed: 1 or more")
        return -(-kv_tokens // PAGE_TOKENS)
    state = [t for program in programs for t in program.of_role("state")]
    per_token = sum(formats.get(t.format).nbytes(int(t.shape[2]), int(t.shape[3])) for t in state)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fits = int(memory * POOL_SHARE) // max(1, per_token)
    return max(1, min(max(programs[0].context, POOL_TOKENS), fits) // PAGE_TOKENS)


class LLM:
    """A model ready to run. `path` is a checkpoint folder in Hugging Face's layout; None is the bundled model.

    device: host, reference, ...; weights: auto (as stored), f32, bf16, fp8, int8, int4 or a full name such as q4_k;
    threads: for devices that take it. kv_format: auto (to go with the weights), f32, bf16 or int8.
    context: positions to compile for, by default the model's own; kv_tokens: how many tokens of KV to hold for all
    sequences together; max_batch_tokens, max_sequences, max_waiting, max_drafts: as Engine's; cache: where the host
    keeps packed weights for the next start, a folder, "auto" or None (see HostDevice); worker: the
    device in a process of its own, replaced when it dies; journal: a file for all that happens, which `intaglio replay`
    runs again. layout: how ranks share the model, such as tp2 or tp4pp2; all of them run here, to see and test what
    each would do, and none as a worker. chip, chips: with device silicon, which chip is modelled and how many share the
    model, by `layout` or tensor parallel; values are those of one host, times those of the chips. Raises ValueError
    (CheckpointError, PortError, LayoutError, ...) or DeviceError, saying what is wrong.
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
        max_sequences: int = 256,
        max_waiting: int = 1024,
        max_drafts: int = 0,
        cache: str | Path | None = "auto",
        worker: bool = False,
        journal: str | Path | None = None,
        layout: str | None = None,
        chip: str | None = None,
        chips: int | None = None,
    ) -> None:
        if layout and worker:
            raise DeviceError(f"layout {layout!r} with worker: ranks run in this process; leave one of the two out")
        if device != "silicon" and (chip or chips):
            raise DeviceError(f"device {device!r} is no chip; leave chip and chips out, or use device silicon")
        self.path = BUNDLED if path is None else Path(path)
        self.checkpoint = checkpoint = Checkpoint.open(self.path)
        ported = port(checkpoint, context)
        self.program = build(ported, weights, kv_format)
        self.modelled: str | None = None  # whose times those of the engine are, if they are not measured
        self.tokenizer = _open_tokenizer(self.path, self.program.vocabulary)
        named = self.tokenizer.eos_ids if self.tokenizer else checkpoint.config.get("eos_token_id")
        self.eos_ids = frozenset([named] if isinstance(named, int) else named or ())
        if threads is not None and device != "host":
            raise DeviceError(f"device {device!r} takes no number of threads; leave threads out")
        options: dict[str, Any] = {"threads": threads, "cache": cache} if device == "host" else {}
        self.programs: Many[Program] = (self.program,)  # of each rank that runs here
        if device == "silicon":
            on = _layout(layout, chips)
            stages = build_stages(ported, on, weights, kv_format, wire="bf16") if on.ranks > 1 else ()
            options = {"chip_name": chip or "sohu", "stages": stages}
            self.modelled = f"{on.ranks} x {chip or 'sohu'}, {on}"
        elif layout:
            self.programs = build_mesh(ported, layout, weights, kv_format)
        inner = open_device(device, **options)
        self.device = WorkerDevice(inner) if worker else inner
        self.state = StateSpec(pool_pages(self.programs, kv_tokens), PAGE_TOKENS)
        opened = {
            "device": device, "weights": weights, "context": context, "kv_tokens": self.state.pages * PAGE_TOKENS,
            "kv_format": kv_format, "layout": layout, "chip": chip, "chips": chips,
        }  # fmt: skip
        clock = getattr(inner, "clock", time.monotonic)  # that of a modelled device is virtual
        self.engine = Engine(
            self.load(), clock=clock, rng=random.Random(), max_batch_tokens=max_batch_tokens,
            max_sequences=max_sequences, max_waiting=max_waiting, max_drafts=max_drafts,
            restart=self.load if worker else None, journal=_journal(journal, self.path, opened) if journal else None,
        )  # fmt: skip
        self.grammars: Grammars | None = None
        self._made = 0

    def load(self) -> Executable:
        """One more executable of this model on its device, of all ranks if there is a layout."""
        if len(self.programs) > 1:
            return MeshDevice(self.device).load(self.programs, self.checkpoint, self.state)
        return self.device.load(self.program, self.checkpoint, self.state)

    def generate(self, prompts: Prompt | Many[Prompt], params: Params = None) -> list[RequestOutput]:
        """Continue each prompt (text or token ids; one or a list of them), all in one batch; outputs in their order,
        `n` of them a prompt.

        `params` is one for all, or one each; None is SamplingParams(). Raises RequestError or ParamsError, naming the
        prompt's index, before anything runs. Without a tokenizer, prompts are ids and texts are empty.
        """
        several = _as_list(prompts)
        each = _params_each(params, len(several))
        pairs = [self.prepare(p, s, name=f"prompt {i}") for i, (p, s) in enumerate(zip(several, each, strict=True))]
        made = self._finish([request for request, _ in pairs])
        transcripts = [t for _, of_one in pairs for t in of_one]
        return [self._output(s, t) for s, t in zip(made, transcripts, strict=True)]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Delta]:
        """Continue one prompt, handing out text as it comes. Closing the iterator ends the request."""
        request, transcripts = self.prepare(prompt, params or SamplingParams(), name="prompt 0")
        if len(transcripts) > 1:
            raise RequestError(f"n is {len(transcripts)}; a stream has one choice")
        return self._stream(request, transcripts[0])

    def prepare(
        self, prompt: Prompt, params: SamplingParams, name: str = "the prompt", **options: Any
    ) -> tuple[Request, list[Transcript]]:
        """A request ready for `engine.add()`, and where the text of each of its choices will be. `options` are fields
        of Request: id, priority, timeout, ... Raises RequestError or TokenizerError, calling the prompt `name`."""
        ids = self._ids(prompt, name)
        tokenizer = self._text() if params.stop else self.tokenizer
        transcripts = [Transcript(tokenizer, ids, tuple(params.stop)) for _ in range(params.n)]
        self._made += 1
        named = {"id": f"r{self._made}", "eos_ids": self.eos_ids, "matcher": self._matcher(params), **options}
        request = Request(prompt=ids, params=params, stopped=lambda index: transcripts[index].push, **named)
        try:
            self.engine.check(request)
        except RequestError as e:
            raise RequestError(f"{name}: {e}") from None
        return request, transcripts

    def _stream(self, request: Request, transcript: Transcript) -> Iterator[Delta]:
        [sequence] = self.engine.add(request)
        seen, ended = 0, False
        try:
            while not ended:
                if sequence.state != "ended":  # it may have ended in steps taken for others since the last delta
                    self.engine.step()
                if ended := sequence.state == "ended":
                    transcript.finish()
                text, new = transcript.settled(ended), sequence.output[seen:]
                seen += len(new)
                if text or new or ended:
                    fault = sequence.fault.message if sequence.fault else None
                    yield Delta(text, new, sequence.finish_reason, fault)
        finally:
            self.engine.abort(request.id)

    def chat(self, messages: Many[Mapping[str, str]], params: SamplingParams | None = None) -> RequestOutput:
        """The model's answer to messages [{"role": "user", "content": ...}, ...], through its chat template."""
        return self.generate([self.chat_prompt(messages)], params)[0]

    def chat_prompt(self, messages: Many[Mapping[str, str]]) -> list[int]:
        """The token ids of a conversation, ready for the assistant's turn."""
        tokenizer = self._text()
        return tokenizer.encode(tokenizer.chat(messages), special=False)

    def logits(self, sequences: Many[Many[int]]) -> list[np.ndarray]:
        """Float32 logits [tokens, vocabulary] after each token of each sequence of ids."""
        named = [(f"sequence {i}", ids) for i, ids in enumerate(sequences)]
        requests = [self.prepare(ids, SamplingParams(), name=name, scored=True)[0] for name, ids in named]
        made = self._finish(requests)
        failed = next((s.fault for s in made if s.fault), None)
        if failed:
            raise DeviceError(failed.message)
        return [np.concatenate(s.logits) for s in made]

    def _text(self) -> Tokenizer:
        if self.tokenizer is None:
            raise TokenizerError(f"{self.path} has no tokenizer.json: add it, or give token ids and no stop strings")
        return self.tokenizer

    def _matcher(self, params: SamplingParams) -> Callable[[int], Matcher] | None:
        """How to begin a choice's grammar, if there is one."""
        if params.grammar is None:
            return None
        if self.grammars is None:
            self.grammars = Grammars(self._text(), self.program.vocabulary)
        first = self.grammars.matcher(params.grammar.kind, params.grammar.text)
        return lambda index: first.copy()

    def _ids(self, prompt: Prompt, name: str) -> list[int]:
        if isinstance(prompt, str):
            if not prompt:
                raise RequestError(f"{name} is empty; give at least one character, or token ids")
            return self._text().encode(prompt)
        bad = next((t for t in prompt if isinstance(t, bool) or not isinstance(t, int | np.integer)), None)
        if bad is not None:
            raise RequestError(f"{name}: token ids are whole numbers, {bad!r} is not")
        return [int(t) for t in prompt]

    def _finish(self, requests: Many[Request]) -> list[Sequence]:
        """Run all of these to their end, as many at a time as the engine takes in; whatever interrupts leaves nothing
        behind. Their choices, in order."""
        made: list[Sequence] = []
        pending = deque(requests)
        try:
            while pending or any(s.state != "ended" for s in made):
                while pending:
                    try:
                        made += self.engine.add(pending[0])
                    except Refused as e:
                        if e.reason != "full":
                            raise
                        break
                    pending.popleft()
                self.engine.step()
        finally:
            for request in requests:
                self.engine.abort(request.id)
        return made

    @staticmethod
    def _output(s: Sequence, transcript: Transcript) -> RequestOutput:
        transcript.finish()
        assert s.finish_reason
        error = s.fault.message if s.fault else None
        return RequestOutput(s.prompt, transcript.text, s.output, s.logprobs, s.finish_reason, error)


def _layout(layout: str | None, chips: int | None) -> Layout:
    """How so many chips share a model: by default tensor parallel. Raises DeviceError if the layout has other ranks."""
    found = Layout.parse(layout or f"tp{chips or 1}")
    if chips not in (None, found.ranks):
        raise DeviceError(f"chips is {chips} but layout {found} has {found.ranks} ranks; leave one of the two out")
    return found


def _journal(path: str | Path, model: Path, options: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    """What writes a journal, a line an entry, as they come. A disk that is full ends the record, not the service."""
    file: TextIO | None = Path(path).open("w", encoding="utf-8")  # noqa: SIM115 (open as long as the engine lives)

    def write(entry: dict[str, Any]) -> None:
        nonlocal file
        if file is not None:
            try:
                file.write(json.dumps(entry) + "\n")
                file.flush()  # each line: what was written before a crash is what the record is for
            except OSError as e:
                warnings.warn(f"the journal {path} ends here: {e}", stacklevel=2)
                file = None

    write({"do": "model", "path": str(model.absolute()), "options": options})
    return write


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
