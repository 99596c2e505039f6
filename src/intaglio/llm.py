"""LLM, the main class of the Python API: a model on a device that generates text and computes logits.

Long because the options of an LLM are explained in one place.
"""

from __future__ import annotations

import itertools
import json
import random
import secrets
import warnings
from collections import abc, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from intaglio import __version__
from intaglio.compiler import Layout, LayoutError
from intaglio.devices import (
    Device,
    DeviceError,
    Executable,
    HostsDevice,
    MeshDevice,
    RanksDevice,
    ReportedWeights,
    Weights,
    WorkerDevice,
    open_device,
)
from intaglio.devices.processes.address import TcpAddress
from intaglio.machine import Machine, state_spec
from intaglio.model import Model, Prompt
from intaglio.models import Transcript
from intaglio.program.expert_placement import ExpertPlacement, check_writable
from intaglio.progress import Progress, silent
from intaglio.runtime import (
    CHECKPOINT_BLOCKS,
    BlockScope,
    Engine,
    RecordedEngine,
    Refused,
    Request,
    RequestError,
    SamplingParams,
    Sequence,
)
from intaglio.runtime.expert_balance import MOVE_EVERY
from intaglio.runtime.request import TokenIds
from intaglio.runtime.windows import with_windows
from intaglio.tiers import BlockOrder, DiskTier, PeerTier, StoreTier

PAGE_TOKENS = 32
KV_CACHE_BYTES = 8 << 30  # of the directory of K/V blocks

Params = SamplingParams | abc.Sequence[SamplingParams] | None


@dataclass(frozen=True)
class RequestOutput:
    """The complete output for one prompt.

    If SamplingParams.n is above 1, the prompt has several outputs, one for each choice.

    Attributes:
        prompt_token_ids: token ids of the prompt.
        text: the generated text; "" without a tokenizer.
        token_ids: ids of the generated tokens.
        logprobs: natural log-probability of each generated token, from the softmax of the logits before any sampling
            option changes them.
        finish_reason: "stop" (an end-of-sequence token, or a stop string, before which `text` ends), "length", "error",
            "abort" or "deadline".
        error: what failed, if finish_reason is "error"; else None.
    """

    prompt_token_ids: list[int]
    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    error: str | None = None


@dataclass(frozen=True)
class Delta:
    """The part of a streamed output that is new since the last Delta.

    Attributes:
        text: new text that can no longer change. A partial character, or text that may be the beginning of a stop
            string, is held back.
        token_ids: ids of the new tokens.
        finish_reason: in the last Delta, why the output ended, see RequestOutput; None in all others.
        error: what failed, if finish_reason is "error"; else None.
    """

    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    error: str | None = None


class LLM:
    """A model on a device, ready to generate. Combines a Model, a Machine, a device and an Engine.

    Only one thread at a time may use the attribute `engine`. Any thread may use `admission` and `prepare()`. Raises
    ValueError (CheckpointError, PortError, LayoutError, ...) or DeviceError; the message says what is wrong.

    Args:
        path: a checkpoint folder in Hugging Face's layout, a GGUF file or a hub id; None is the bundled model.
        device: host, reference, oracle or silicon.
        weights: number format of the weights, see Model.open().
        threads: CPU threads of the host device; by default those of `machine`, or one per core within the container's
            CPU limit.
        context: maximum tokens of a sequence; by default the model's own limit.
        kv_tokens: size of the K/V cache, in tokens of all sequences together. None: 32,768 or one whole context,
            whichever is more, but no more than the memory holds.
        kv_format: number format of the K/V cache, see Model.open().
        max_batch_tokens: maximum tokens of one step, of all sequences together.
        max_sequences: maximum sequences that run at once. Fewer run if the memory for recurrent state does not hold
            them.
        max_waiting: maximum sequences in the waiting queue.
        max_drafts: maximum draft tokens per sequence and step; 0 switches speculative decoding off.
        state_cache_bytes: only for a model with recurrent state: bytes for the states that the prefix cache keeps. The
            states of running sequences are not counted. None: an eighth of the memory for K/V caches, but no more than
            STATE_CHECKPOINTS states. 0: such a model has no prefix cache.
        window_tokens: only for a model with sliding-window layers: tokens of K/V cache that these layers keep for all
            sequences together. Each running sequence takes as many tokens as its window and one step. If there are too
            few for all running sequences, the last of them are preempted. 0: these layers keep all tokens, like other
            layers; `kv_cache_dir` and `kv_peer` allow only 0. None: enough for `max_sequences` sequences if that saves
            a quarter of the K/V pages, else 0; with `kv_cache_dir`, `kv_peer` or device="silicon" always 0.
        cache: where the host keeps packed weights for the next start: a folder, "auto" or None (see HostDevice).
        worker: True to run the device in a child process, which is started again when it dies.
        journal: a file that records all requests and device outcomes, for `intaglio replay`.
        layout: how ranks share the model, such as tp2 or tp4pp2. On the host each rank is a process with an equal share
            of the threads, and is started again when it dies. On other devices all ranks run in this process.
        hosts: other hosts, each of which runs an equal number of the ranks.
        expert_placement: for a layout with redundant experts (ep4r8): a JSON file that says which experts each rank
            holds in each layer. The file is read at the start if it exists, and rewritten whenever experts have moved.
            Each engine needs a file of its own, in a writable folder unless experts never move. Not for device silicon.
        rebalance_every: only for a layout with redundant experts: seconds between two attempts to find a better
            placement of the experts. 0: experts are never moved. None: MOVE_EVERY. Not for device silicon.
        in_process: True to run all ranks of a layout in this process, one after the other.
        chip: name of the chip whose times are modelled, for device silicon only. The values are computed on the host.
        chips: number of chips that share the model, for device silicon only. `layout` says how they share it; without
            `layout` they run tensor parallel.
        machine: CPU threads and memory that this model shares with others; None: this model has them to itself.
        kv_cache_dir: a directory for K/V blocks that outlive this process; it is created if it does not exist. A later
            engine of the same model loads these blocks instead of computing them. Several engines may use one
            directory.
        kv_peer: an address to listen on, instead of `kv_cache_dir`. This engine keeps K/V blocks in memory, and other
            engines of the model that know the address's token can fetch them from it. An engine fetches only the blocks
            that were announced to it: by the router of `intaglio cluster up --prefill`, or by `llm.tier.announce()`.
        kv_cache_bytes: maximum bytes of all K/V blocks kept by `kv_cache_dir` or `kv_peer`. The least recently used
            blocks are deleted to make room for new ones.
        revision: branch, tag or commit of the hub id's repository; by default main.
        progress: called as progress(done, total, what) while the model loads (see `intaglio.progress`).
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
        state_cache_bytes: int | None = None,
        window_tokens: int | None = None,
        cache: str | Path | None = "auto",
        worker: bool = False,
        journal: str | Path | None = None,
        layout: str | None = None,
        expert_placement: str | Path | None = None,
        rebalance_every: float | None = None,
        in_process: bool = False,
        hosts: HostsDevice | None = None,
        chip: str | None = None,
        chips: int | None = None,
        machine: Machine | None = None,
        kv_cache_dir: str | Path | None = None,
        kv_peer: TcpAddress | None = None,
        kv_cache_bytes: int = KV_CACHE_BYTES,
        revision: str | None = None,
        progress: Progress = silent,
    ) -> None:
        if device != "silicon" and (chip or chips):
            raise DeviceError(f"chip and chips are for device silicon, not {device!r}; leave them out or use silicon")
        if device == "silicon" and (expert_placement or rebalance_every is not None):
            raise DeviceError(
                "device 'silicon' moves no experts; leave out expert_placement and rebalance_every, or use device host"
            )
        shared = Layout.parse(layout or "tp1")
        if rebalance_every:
            shared.check_moves_experts()
        if threads is not None and (device != "host" or machine):
            why = "takes its threads from the machine" if machine else "takes no number of threads"
            raise DeviceError(f"device {device!r} {why}; leave threads out")
        progress(0, 0, "compiling the model")
        self.model = Model.open(path, weights, kv_format, context, revision, progress)
        self.machine = machine or Machine(threads)
        placed = shared.placed(Path(expert_placement)) if expert_placement else layout
        if expert_placement and rebalance_every != 0:
            check_writable(Path(expert_placement))
        try:  # the ranks that run in this process
            self.mesh = self.model.sharded(None if device == "silicon" else placed)
        except LayoutError as e:
            if isinstance(placed, Layout) and placed.placement:
                raise LayoutError(f"{e} (expert placement: {expert_placement})") from None
            raise
        self.modelled: str | None = None  # chips and layout if times are modelled, else None
        options: dict[str, Any] = {"threads": self.machine.threads, "cache": cache} if device == "host" else {}
        if device == "silicon":
            on = _layout(layout, chips)
            options = {"chip": chip or "sohu", "stages": self.model.stages(on)}
            self.modelled = f"{on.ranks} x {chip or 'sohu'}, {on}"
        inner = MeshDevice(open_device(device, **options))
        self.device: Device = WorkerDevice(inner) if worker else inner
        if device == "host" and len(self.mesh.programs) > 1 and not in_process:
            self.device = hosts or RanksDevice(self.machine.threads, cache=cache)
        elif hosts:
            raise DeviceError("several hosts need device host and a layout of several ranks, such as tp2 or pp2")
        self.clock = inner.clock
        self.state, max_sequences = state_spec(
            self.mesh, kv_tokens, max_sequences, state_cache_bytes, self.machine, PAGE_TOKENS
        )
        if (kv_cache_dir or kv_peer) and window_tokens:
            raise RequestError(
                "kv_cache_dir and kv_peer keep all K/V, and window_tokens gives some back; leave out one of them"
            )
        if kv_cache_dir or kv_peer or device == "silicon":
            window_tokens = window_tokens or 0
        self.state = with_windows(
            self.state, self.mesh.programs, window_tokens, context=self.mesh.last.context,
            max_batch_tokens=max_batch_tokens, max_sequences=max_sequences, depth=self.mesh.stages,
        )  # fmt: skip
        opened = {
            "device": device, "weights": weights, "context": context, "kv_tokens": self.state.pages * PAGE_TOKENS,
            "kv_format": kv_format, "layout": layout, "chip": chip, "chips": chips, "max_sequences": max_sequences,
            "state_cache_bytes": state_cache_bytes, "window_tokens": self.state.window_pages * PAGE_TOKENS,
            "max_batch_tokens": max_batch_tokens, "max_drafts": max_drafts,
        }  # fmt: skip
        facts = inner.facts()
        numerics = " ".join(filter(None, (device, facts.isa, shared.numerics)))
        scope = BlockScope.of(
            self.model.program, PAGE_TOKENS, numerics, self.model.checkpoint.identity(),
            " ".join(filter(None, (__version__, facts.build))),
        )  # fmt: skip
        self.tier = _tier(kv_cache_dir, kv_peer, kv_cache_bytes, scope, journal)
        executable = self.load(progress)
        if self.tier and len(self.mesh.programs) > 1 and executable.block_parts:
            self.tier.order = BlockOrder(self.model.program, self.mesh.programs, shared.tp, executable.block_parts)
        engine = partial(RecordedEngine, journal=_journal(journal, self.model.path, opened)) if journal else Engine
        self.engine: Engine = engine(
            executable, clock=self.clock, rng=random.Random(), max_batch_tokens=max_batch_tokens,
            max_sequences=max_sequences, max_waiting=max_waiting, max_drafts=max_drafts,
            checkpoint_blocks=0 if state_cache_bytes == 0 else CHECKPOINT_BLOCKS, numerics=numerics,
            scope=scope, connector=self.tier, incarnation=secrets.token_hex(8),
            rebalance_every=MOVE_EVERY if rebalance_every is None else rebalance_every,
            restart=self.reload if isinstance(self.device, WorkerDevice | RanksDevice | HostsDevice) else None,
        )  # fmt: skip
        if expert_placement:
            self.engine.experts.moved = lambda layers: ExpertPlacement(layers).keep(Path(expert_placement))
        self.admission = self.engine.admission
        self._numbers = itertools.count(1)

    def load(self, progress: Progress = silent) -> Executable:
        """Load the model on its device, or on all ranks of its layout. Returns the new Executable."""
        progress(0, 0, "loading the weights")
        weights: Weights = self.model.checkpoint
        if not isinstance(self.device, WorkerDevice | RanksDevice | HostsDevice):  # else a callback cannot follow
            weights = ReportedWeights(weights, self.mesh, self.model.checkpoint.shape, progress)
        return self.machine.shared(self.device.load(self.mesh, weights, self.state))

    def reload(self) -> Executable:
        """Load the model again after its executable was lost. Returns the new executable."""
        lost = self.engine.executable
        return self.machine.shared(self.device.reload(lost, self.mesh, self.model.checkpoint, self.state))

    def close(self) -> None:
        """Write the K/V blocks that are still to be written to `kv_cache_dir`, and end the device's processes."""
        if self.tier:
            self.tier.close()
        self.engine.executable.close()

    def generate(
        self, prompts: Prompt | abc.Sequence[Prompt], params: Params = None, progress: Progress = silent
    ) -> list[RequestOutput]:
        """Generate a continuation of each prompt. Returns RequestOutputs in the order of the prompts.

        Each prompt has `params.n` RequestOutputs in the list. Prompts run in one batch as far as max_sequences
        and the K/V cache allow.

        Args:
            prompts: one prompt or a list of prompts, each a text or token ids. Without a tokenizer only token ids are
                allowed, and the texts of the outputs are empty.
            params: one SamplingParams for all prompts, or a list with one per prompt; None is SamplingParams().
            progress: called after each step as progress(tokens generated so far, max_tokens of all choices together,
                text).

        Raises RequestError if a list of params is not as long as the list of prompts, and the errors of prepare(),
        whose message names the prompt by its index. These are raised before anything runs. Raises Refused if the engine
        has failed.
        """
        several = _as_list(prompts)
        each = _params_each(params, len(several))
        pairs = [self.prepare(p, s, name=f"prompt {i}") for i, (p, s) in enumerate(zip(several, each, strict=True))]
        made = self._finish([request for request, _ in pairs], progress)
        transcripts = [t for _, of_one in pairs for t in of_one]
        return [self._output(s, t) for s, t in zip(made, transcripts, strict=True)]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Delta]:
        """Generate a continuation of one prompt. Yields a Delta for each new part of its text.

        params: None is SamplingParams(). Closing the iterator aborts the request. Raises RequestError if params.n is
        not 1, and the errors of prepare().
        """
        request, transcripts = self.prepare(prompt, params or SamplingParams(), name="prompt 0")
        if len(transcripts) > 1:
            raise RequestError(f"n is {len(transcripts)}; a stream has one choice")
        return self._stream(request, transcripts[0])

    def prepare(
        self, prompt: Prompt, params: SamplingParams, name: str = "the prompt", **options: Any
    ) -> tuple[Request, list[Transcript]]:
        """Make an engine request from a prompt. Returns (the Request for `engine.add()`, a list of Transcripts).

        There is one Transcript for each of the `params.n` choices; it turns the tokens of that choice into text. Any
        thread may call prepare().

        options: attributes of the Request by name (id, priority, timeout, ...), and `special`, the special tokens that
        stay in the text. Raises RequestError, TokenizerError or GrammarError for a prompt, stop string, bad word or
        grammar that cannot be served. The message calls the prompt `name`.
        """
        id = options.pop("id", None) or f"r{next(self._numbers)}"
        request, transcripts = self.model.request(prompt, params, id, name, **options)
        try:
            self.admission.check(request)
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

    def chat(self, messages: abc.Sequence[Mapping[str, str]], params: SamplingParams | None = None) -> RequestOutput:
        """Answer the messages [{"role": "user", "content": ...}, ...] with the model's chat template.

        Returns a RequestOutput. Raises the errors of chat_prompt() and generate().
        """
        return self.generate([self.chat_prompt(messages)], params)[0]

    def chat_prompt(self, messages: abc.Sequence[Mapping[str, str]]) -> list[int]:
        """The token ids of a conversation, formatted by the chat template.

        They end where the assistant's answer begins. messages: dicts with "role" and "content". Raises TokenizerError
        without a tokenizer or chat template, and for messages that the template refuses.
        """
        return self.model.chat_prompt(messages)

    def use_chat_template(self, source: str) -> None:
        """Use the chat template `source` (Jinja) for all later conversations.

        Raises TokenizerError if the template does not parse, or if the model has no tokenizer.
        """
        self.model = self.model.with_chat_template(source)

    def logits(self, sequences: abc.Sequence[TokenIds]) -> list[np.ndarray]:
        """The logits at every position of each sequence, as a list with one array per sequence.

        sequences: lists of token ids. An array is float32 [tokens of the sequence, vocabulary]; row i predicts the
        token that follows token i. Raises RequestError for a sequence that does not fit, DeviceError if the device
        fails.
        """
        named = [(f"sequence {i}", ids) for i, ids in enumerate(sequences)]
        requests = [self.prepare(ids, SamplingParams(), name=name, scored=True)[0] for name, ids in named]
        made = self._finish(requests)
        failed = next((s.fault for s in made if s.fault), None)
        if failed:
            raise DeviceError(failed.message)
        return [np.concatenate(s.logits) for s in made]

    def _finish(self, requests: abc.Sequence[Request], progress: Progress = silent) -> list[Sequence]:
        """Run all requests until they have ended. Returns their Sequences, in the order of the requests.

        As many requests run at a time as the engine admits. progress: called after each step. Raises Refused if the
        engine refuses a request for another reason than a full queue. On any exception the requests that still run are
        aborted.
        """
        made: list[Sequence] = []
        pending = deque(requests)
        total = sum(r.params.max_tokens * r.params.n for r in requests)
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
                progress(sum(len(s.output) for s in made), total, f"generating, {len(requests)} prompts")
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


def _tier(
    folder: str | Path | None, address: TcpAddress | None, budget: int, scope: BlockScope, journal: str | Path | None
) -> StoreTier | None:
    """The StoreTier that keeps K/V blocks outside the engine; None if `folder` and `address` are both None.

    With `folder` the blocks are files; with `address` they are in memory, and other engines can fetch them.

    Args:
        folder: value of the option kv_cache_dir.
        address: value of the option kv_peer: where to listen, and the token.
        budget: maximum bytes of all blocks.
        scope: BlockScope of the engine's blocks.
        journal: value of the option journal.

    Raises RequestError if `budget` is below 1, if both `folder` and `address` are given, and if `journal` is given,
    because a journal does not record which blocks were loaded. Raises OSError if the address cannot be bound.
    """
    if folder is None and address is None:
        return None
    if budget < 1:
        raise RequestError(f"kv_cache_bytes is {budget}; allowed: 1 or more")
    if journal:
        given = "kv_cache_dir" if address is None else "kv_peer"
        raise RequestError(f"a journal does not record which K/V blocks were loaded; leave out journal or {given}")
    if folder is not None and address is not None:
        raise RequestError("kv_cache_dir keeps K/V blocks in files, kv_peer in memory; leave out one of them")
    return PeerTier(address, budget, scope) if address else DiskTier(Path(folder or ""), budget, scope)


def _layout(layout: str | None, chips: int | None) -> Layout:
    """The Layout that the text `layout` names, or tensor parallelism if `layout` is None or "".

    Tensor parallelism is over `chips` chips; None: one chip. Raises LayoutError if `layout` is no layout's name, and
    DeviceError if its number of ranks is not `chips`.
    """
    found = Layout.parse(layout or f"tp{chips or 1}")
    if chips not in (None, found.ranks):
        raise DeviceError(f"chips is {chips} but layout {found} has {found.ranks} ranks; leave one of the two out")
    return found


def _journal(path: str | Path, model: Path, options: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    """Create a journal file. Returns a function that appends one entry (a dict) to the file as a line of JSON.

    The first entry, with the path `model` and the LLM's `options`, is written at once. If a write fails, such as on a
    full disk, the function warns and writes nothing more. Raises OSError if the file cannot be created.
    """
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


def _as_list(prompts: Any) -> list[Prompt]:
    """A list of prompts, made from a list of prompts or from one prompt (a text, or token ids)."""
    if isinstance(prompts, str):
        return [prompts]
    several = list(prompts)
    return [several] if several and all(isinstance(p, int | np.integer) for p in several) else several


def _params_each(params: Params, n: int) -> list[SamplingParams]:
    """A list with one SamplingParams for each of `n` prompts.

    params: one SamplingParams for all prompts, a list with one per prompt, or None for the defaults. Raises
    RequestError if the list does not have `n` elements.
    """
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * n
    if len(params) != n:
        raise RequestError(f"{len(params)} SamplingParams for {n} prompts; give one for all, or one each")
    return list(params)
