"""Intaglio, llama.cpp and PyTorch behind one interface (load, prefill, decode, logits), each in a process of its own.

Used by bench/host.py, recurrent.py and quality.py. Batches are laid out and caches filled before the clock starts, and
results are waited for.
"""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import os
import random
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from checkpoints import FILES, PEER_FORMATS, gguf_path, llama_api, opened

from intaglio.batch import Batch, Chunk, bind
from intaglio.compiler import build
from intaglio.devices import StateSpec, StepRequest
from intaglio.models import port
from intaglio.ops import Experts, Route
from intaglio.program import Program

STEP_TOKENS = 512  # Intaglio's default budget of a step, and llama.cpp's default n_ubatch
PAGE_TOKENS = 32
PACKED = "packed"  # where Intaglio keeps packed weights, inside the checkpoint's folder
PEER_BATCH = 2048  # llama.cpp's default n_batch: longer prompts are handed over in such pieces
ENGINES = ("intaglio", "llama.cpp", "torch")
STATELESS = StateSpec(0, PAGE_TOKENS)  # no recurrent state


class Engine(Protocol):
    """A model loaded for `steps` decode steps after contexts of some lengths, the largest of them named beforehand."""

    def load(self) -> None: ...

    def settle(self) -> None:
        """Wait for what loading still does in the background."""

    def weight_bytes(self) -> int:
        """As they lie in memory."""

    def prefill(self, tokens: int) -> float:
        """Seconds for a prompt of so many tokens, to the logits of its last."""

    def fill(self, lengths: Sequence[int], steps: int) -> None:
        """Hold one context of each length, with room for `steps` more tokens each."""

    def decode(self) -> float:
        """Seconds of one decode step, all contexts together: the mean over the steps there is room for, less the
        first, which finds the caches of another process. Leaves the contexts as they were."""

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Float32 logits [tokens, vocabulary] after every token of a prompt."""


def prompt(tokens: int, vocabulary: int) -> list[int]:
    rng = random.Random(tokens)
    return [rng.randrange(vocabulary) for _ in range(tokens)]


def pages_each(length: int) -> int:
    return -(-length // PAGE_TOKENS)


def prefill_batches(
    ids: Sequence[int], first_page: int = 0, every: bool = False, state: StateSpec = STATELESS, sequence: int = 0
) -> Iterator[Batch]:
    """The steps of one prompt; the logits of its last token are wanted, or those of every token."""
    pages = range(first_page, first_page + pages_each(len(ids)))
    for step, at in enumerate(range(0, len(ids), STEP_TOKENS)):
        part = ids[at : at + STEP_TOKENS]
        last = range(len(part) - 1, len(part)) if at + len(part) == len(ids) else range(0)
        rows, slots = range(len(part)) if every else last, state.pair(sequence, step)
        yield bind([Chunk(part, at, pages, rows, state=slots)], PAGE_TOKENS)


def decode_token(step: int, sequence: int, sequences: int) -> int:
    """No two sequences get the same token, which routers would send to the same experts."""
    return step * sequences + sequence


def decode_batches(lengths: Sequence[int], steps: int, state: StateSpec = STATELESS) -> Iterator[Batch]:
    """`steps` steps of all contexts together, each in pages of its own.

    Each step reads the recurrent state after the prompt, which it leaves as it was, and writes the other slot.
    """
    each = [pages_each(n + steps) for n in lengths]
    firsts = np.cumsum([0, *each])
    for k in range(steps):
        yield bind(
            [
                Chunk(
                    [decode_token(k, s, len(lengths))],
                    n + k,
                    range(first, first + count),
                    (0,),
                    state=state.pair(s, -(-n // STEP_TOKENS)),
                )
                for s, (n, first, count) in enumerate(zip(lengths, firsts, each, strict=False))
            ],
            PAGE_TOKENS,
        )


def compiled(folder: Path, format: str) -> Program:
    return build(port(opened(folder, format)), "auto" if format in FILES else format)


class Intaglio:
    """This project: the host device, driven step by step."""

    def __init__(self, folder: Path, format: str, threads: int, room: Sequence[int]) -> None:
        self.folder, self.format, self.threads = folder, format, threads
        self.pages, self.sequences = sum(map(pages_each, room)), len(room)

    def load(self) -> None:
        from intaglio.devices.host import HostDevice

        os.environ["INTAGLIO_CACHE"] = str(self.folder / PACKED)
        program = compiled(self.folder, self.format)
        self.state = StateSpec(self.pages, PAGE_TOKENS, 2 * self.sequences if program.recurrent else 0)
        self.executable = HostDevice(self.threads).load(program, opened(self.folder, self.format), self.state)

    def settle(self) -> None:
        image = getattr(self.executable, "image", None)
        if image:
            image.wait()

    def weight_bytes(self) -> int:
        return int(self.executable.packed_bytes)

    def prefill(self, tokens: int) -> float:
        ids = prompt(tokens, self.executable.program.vocabulary)
        return self._seconds(list(prefill_batches(ids, state=self.state)))

    def fill(self, lengths: Sequence[int], steps: int) -> None:
        page = 0
        for sequence, n in enumerate(lengths):
            ids = prompt(n, self.executable.program.vocabulary)
            for batch in prefill_batches(ids, page, state=self.state, sequence=sequence):
                self.executable.step(StepRequest(batch))
            page += pages_each(n + steps)
        self.steps = list(decode_batches(lengths, steps, self.state))

    def decode(self) -> float:
        self.executable.step(StepRequest(self.steps[0]))
        return self._seconds(self.steps[1:]) / (len(self.steps) - 1)

    def touched(self) -> dict[str, float]:
        """By site of the experts: the share of them that a decode step touches, the mean over the steps."""
        routes = [op for op in self.executable.program.ops if isinstance(op, Route)]
        found: dict[str, list[float]] = {op.ids: [] for op in routes}
        for batch in self.steps[1:] if routes else ():
            taps = self.executable.step(StepRequest(batch, taps=[op.logits for op in routes])).taps
            for op in routes:
                chosen = np.argsort(-taps[op.logits], axis=1, kind="stable")[:, : op.top]
                found[op.ids].append(len(np.unique(chosen)) / taps[op.logits].shape[1])
        sites = {op.site: op.ids for op in self.executable.program.ops if isinstance(op, Experts)}
        return {site: float(np.mean(found[ids])) for site, ids in sites.items()}

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        batches = prefill_batches(ids, every=True, state=self.state)
        steps = [self.executable.step(StepRequest(batch, logits=True)) for batch in batches]
        return np.concatenate([step.logits for step in steps if step.logits is not None])

    def _seconds(self, steps: Sequence[Batch]) -> float:
        start = time.perf_counter()
        for batch in steps:
            self.executable.step(StepRequest(batch))
        return time.perf_counter() - start


class LlamaCpp:
    """llama.cpp by its C functions: its defaults, and a stream of KV a sequence, as its batched benchmark has it."""

    def __init__(self, folder: Path, format: str, threads: int, room: Sequence[int]) -> None:
        self.api, self.threads = llama_api(), threads
        self.path = gguf_path(folder, PEER_FORMATS.get(format, format))
        self.shape: tuple[int, int] | None = None
        self.context = None

    def load(self) -> None:
        self.model = self.api.llama_model_load_from_file(str(self.path).encode(), self.api.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load {self.path}")
        self.vocabulary = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.model))

    def settle(self) -> None:
        pass

    def weight_bytes(self) -> int:
        return int(self.api.llama_model_size(self.model))

    def prefill(self, tokens: int) -> float:
        self._open(1, tokens)
        batches = self._prompt_batches(prompt(tokens, self.vocabulary))
        self.api.llama_memory_clear(self.memory, False)
        seconds = self._seconds(batches)
        self._free(batches)
        return seconds

    def fill(self, lengths: Sequence[int], steps: int) -> None:
        """The same prompts as Intaglio's, for after copies of one most sequences would go to the same experts."""
        self.lengths = lengths
        self._open(len(lengths), max(lengths) + steps)
        self._read_prompts()
        self.steps = [
            self._batch([(decode_token(k, s, len(lengths)), n + k, s, True) for s, n in enumerate(lengths)])
            for k in range(steps)
        ]

    def _read_prompts(self) -> None:
        """Clear the memory and decode each sequence's prompt."""
        self.api.llama_memory_clear(self.memory, False)
        for s, n in enumerate(self.lengths):
            batches = self._prompt_batches(prompt(n, self.vocabulary), s)
            self._seconds(batches)
            self._free(batches)

    def decode(self) -> float:
        self._seconds(self.steps[:1])
        seconds = self._seconds(self.steps[1:]) / (len(self.steps) - 1)
        self._rewind()
        return seconds

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        self._open(1, len(ids))
        self.api.llama_memory_clear(self.memory, False)
        found = []
        for batch in self._prompt_batches(ids, every=True):
            self._seconds([batch])
            rows = self.api.llama_get_logits(self.context)
            found.append(np.ctypeslib.as_array(rows, (batch.n_tokens, self.vocabulary)).copy())
            self._free([batch])
        return np.concatenate(found)

    def _open(self, sequences: int, length: int) -> None:
        """A context for so many sequences, of whole 256 cells each, as llama.cpp rounds them anyway."""
        shape = (sequences, -(-length // 256) * 256)
        if shape == self.shape:
            return
        if self.context:
            self.api.llama_free(self.context)
        params = self.api.llama_context_default_params()
        params.n_ctx, params.n_seq_max = shape[0] * shape[1], sequences
        params.n_batch, params.n_ubatch = PEER_BATCH, STEP_TOKENS
        params.n_threads = params.n_threads_batch = self.threads
        self.context, self.shape = self.api.llama_init_from_model(self.model, params), shape
        if not self.context:
            raise RuntimeError(f"llama.cpp could not make a context of {shape}")
        self.memory = self.api.llama_get_memory(self.context)

    def _rewind(self) -> None:
        """Forget the decode steps. A recurrent state cannot lose its last tokens; then the prompts are read again."""
        if not all(self.api.llama_memory_seq_rm(self.memory, s, n, -1) for s, n in enumerate(self.lengths)):
            self._read_prompts()

    def _prompt_batches(self, ids: Sequence[int], sequence: int = 0, every: bool = False) -> list[Any]:
        rows = [(t, i, sequence, every or i == len(ids) - 1) for i, t in enumerate(ids)]
        return [self._batch(rows[at : at + PEER_BATCH]) for at in range(0, len(rows), PEER_BATCH)]

    def _batch(self, rows: Sequence[tuple[int, int, int, bool]]) -> Any:
        """Of (token, position, sequence, are logits wanted)."""
        batch = self.api.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        return batch

    def _free(self, batches: Sequence[Any]) -> None:
        for batch in batches:
            self.api.llama_batch_free(batch)

    def _seconds(self, batches: Sequence[Any]) -> float:
        start = time.perf_counter()
        for batch in batches:
            if code := self.api.llama_decode(self.context, batch):
                raise RuntimeError(f"llama_decode returned {code}")
        self.api.llama_synchronize(self.context)
        return time.perf_counter() - start


class Torch:
    """transformers on PyTorch, eager mode, in bfloat16; contexts of different length are padded on the left."""

    def __init__(self, folder: Path, format: str, threads: int, room: Sequence[int]) -> None:
        import torch
        import transformers

        assert format == "bf16"
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.torch, self.folder = torch, folder
        self.classes = transformers.AutoModelForCausalLM

    def load(self) -> None:
        self.model = self.classes.from_pretrained(self.folder, dtype=self.torch.bfloat16).eval()
        self.vocabulary = self.model.config.vocab_size

    def settle(self) -> None:
        pass

    def weight_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def prefill(self, tokens: int) -> float:
        ids = self.torch.tensor([prompt(tokens, self.vocabulary)])
        start = time.perf_counter()
        self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - start

    def fill(self, lengths: Sequence[int], steps: int) -> None:
        torch, longest = self.torch, max(lengths)
        held = torch.arange(longest + steps)[None] >= longest - torch.tensor(lengths)[:, None]
        self.cache = self.model(
            input_ids=torch.tensor([[0] * (longest - n) + prompt(n, self.vocabulary) for n in lengths]),
            position_ids=(torch.arange(longest)[None] - longest + torch.tensor(lengths)[:, None]).clamp(0),
            attention_mask=held[:, :longest].long(), use_cache=True, logits_to_keep=1,
        ).past_key_values  # fmt: skip
        self.steps = [
            {
                "input_ids": torch.tensor([[decode_token(k, s, len(lengths))] for s in range(len(lengths))]),
                "position_ids": torch.tensor(lengths)[:, None] + k,
                "attention_mask": held[:, : longest + k + 1].long(),
            }
            for k in range(steps)
        ]

    def decode(self) -> float:
        cache = copy.deepcopy(self.cache)
        for k, step in enumerate(self.steps):
            if k == 1:
                start = time.perf_counter()
            self.model(**step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return (time.perf_counter() - start) / (len(self.steps) - 1)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        return self.model(input_ids=self.torch.tensor([list(ids)])).logits[0].float().numpy()


CLASSES: dict[str, Callable[..., Engine]] = {"intaglio": Intaglio, "llama.cpp": LlamaCpp, "torch": Torch}


def missing(engine: str) -> str | None:
    """What has to be installed before this engine can run, or None."""
    needs = {"intaglio": (), "llama.cpp": ("llama-cpp-python", "gguf"), "torch": ("torch", "transformers")}[engine]
    for package in needs:
        try:
            version(package)
        except Exception:  # whatever it is, the package is of no use
            return package
    return None


def peak_bytes() -> int:
    """The most memory this process has held. ru_maxrss would count what the parent held before exec."""
    try:
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10  # type: ignore[index]
    except (OSError, TypeError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak << 10


def serve(pipe: Any, name: str, folder: Path, format: str, threads: int, room: Sequence[int]) -> None:
    """The life of a worker: make the engine, then answer (method, arguments) until None comes."""
    try:
        engine = CLASSES[name](folder, format, threads, room)
        pipe.send(peak_bytes())
        while (call := pipe.recv()) is not None:
            method, arguments = call
            pipe.send(peak_bytes() if method == "peak_bytes" else getattr(engine, method)(*arguments))
    except Exception as e:
        pipe.send(RuntimeError(f"{name} on {folder.name} in {format}: {type(e).__name__}: {e}"))
        raise


class Worker:
    """An engine in a fresh process, so that its memory and threads are its own. Close it, or use it in a `with`."""

    def __init__(self, name: str, folder: Path, format: str, threads: int, room: Sequence[int]) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, name, folder, format, threads, room), daemon=True)
        self.process.start()
        other.close()
        self.bytes_before_load = self._answer()

    def __call__(self, method: str, *arguments: Any) -> Any:
        self.pipe.send((method, arguments))
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer = self.pipe.recv()
        except EOFError:
            raise RuntimeError(f"the process of {self.name} ended without an answer (out of memory?)") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.is_alive():
            with contextlib.suppress(OSError):
                self.pipe.send(None)
        self.process.join(20)
        if self.process.is_alive():
            self.process.kill()
