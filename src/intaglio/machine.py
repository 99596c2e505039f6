"""Machine: the CPU threads and memory of this process, which all models in it share."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from intaglio.devices import (
    BlockingExecutable,
    DeviceError,
    Executable,
    StateSpec,
    StepRequest,
    StepResult,
    usable_cores,
)
from intaglio.program import MeshProgram
from intaglio.runtime import RequestError

T = TypeVar("T")
KV_TOKENS = 32768  # tokens of K/V cache by default, if the context is no longer than that
STATE_CHECKPOINTS = 1024  # recurrent states kept for the prefix cache by default, if there is memory for them
KV_SHARE = 0.25  # of the memory, for the K/V caches of all models together


class Machine:
    """The CPU threads and memory of this process, shared by its models.

    The models take turns: one model at a time runs a step, on all threads. (Two teams of threads on the same cores
    would slow each other down.) A quarter of the memory is for K/V caches; each model gets an equal part of it.

    Args:
        threads: CPU threads of a step; by default usable_cores(): one per core, within the container's CPU limit.
        memory: bytes that the models may use; by default all memory of the computer.
        models: how many models share the machine.

    Raises DeviceError if `memory` or `models` is below 1.
    """

    def __init__(self, threads: int | None = None, memory: int | None = None, models: int = 1) -> None:
        self.threads = usable_cores() if threads is None else threads
        self.memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if memory is None else memory
        self.models = models
        if self.memory < 1 or models < 1:
            raise DeviceError(f"memory is {self.memory} bytes for {models} models; allowed: 1 or more of each")
        self.turn = threading.Lock()

    @property
    def kv_bytes(self) -> int:
        """The maximum number of bytes of K/V cache that one model may hold."""
        return int(self.memory * KV_SHARE) // self.models

    def shared(self, executable: Executable) -> Executable:
        """A wrapper around `executable` that waits for its turn before each step, because models share the CPU threads.

        If the machine has only one model, the result is `executable` itself.
        """
        return executable if self.models == 1 else SharedExecutable(executable, self.turn)


class SharedExecutable(BlockingExecutable):
    """A wrapper of an Executable whose steps take turns with those of other models on the same machine.

    It holds the lock `turn` while the wrapped Executable `inner` runs a step or copies K/V blocks. All models of a
    machine share the lock, so only one model at a time runs a step or copies K/V blocks.
    """

    def __init__(self, inner: Executable, turn: threading.Lock) -> None:
        self.inner, self.turn = inner, turn
        self.program, self.state, self.state_kept = inner.program, inner.state, inner.state_kept

    def run(self, request: StepRequest) -> StepResult:
        with self.turn:
            return self.inner.step(request)

    @property
    def block_parts(self) -> tuple[int, ...]:
        return self.inner.block_parts

    def read_blocks(self, blocks: Sequence[int]) -> np.ndarray:
        with self.turn:
            return self.inner.read_blocks(blocks)

    def write_blocks(self, blocks: Sequence[int], contents: np.ndarray) -> None:
        with self.turn:
            self.inner.write_blocks(blocks, contents)

    def unwrapped(self) -> Executable:
        return self.inner.unwrapped()

    def between_steps(self, call: Callable[[Executable], T]) -> T:
        with self.turn:
            return self.inner.between_steps(call)

    def close(self) -> None:
        self.inner.close()


def state_spec(
    mesh: MeshProgram,
    kv_tokens: int | None,
    max_sequences: int,
    state_cache_bytes: int | None,
    machine: Machine,
    page_tokens: int,
) -> tuple[StateSpec, int]:
    """Divide the memory of one model. Returns (the StateSpec to allocate, number of sequences that may run at once).

    One model may use `machine.kv_bytes` bytes. They are divided into three parts:

    - The recurrent state of running sequences gets two states for each of `max_sequences` sequences, but at most half
      of the bytes. If half of the bytes is too little, fewer sequences may run.
    - Recurrent states kept for the prefix cache get `state_cache_bytes` bytes. If it is None, they get room for
      STATE_CHECKPOINTS states, but at most an eighth of the bytes.
    - The K/V cache gets room for `kv_tokens` tokens, even if that is more than `machine.kv_bytes`. If it is None, the
      K/V cache gets room for KV_TOKENS tokens or for one whole context, whichever is more, but at most all bytes that
      recurrent state leaves.

    mesh: the Programs of all ranks. page_tokens: tokens per K/V page. Raises RequestError if `kv_tokens` is below 1 or
    `state_cache_bytes` below 0.
    """
    for name, value, least in (("kv_tokens", kv_tokens, 1), ("state_cache_bytes", state_cache_bytes, 0)):
        if value is not None and value < least:
            raise RequestError(f"{name} is {value}; allowed: {least} or more")
    state = [t for program in mesh.programs for t in program.of_role("state")]
    slot, page = (
        sum(t.nbytes({"P": 1, "B": page_tokens, "N": 1}) for t in state if (t.shape[0] == "N") == recurrent)
        for recurrent in (True, False)
    )
    granted, slots = machine.kv_bytes, 0
    if slot:
        running = max(2, min(2 * max_sequences, granted // 2 // slot))
        kept = min(STATE_CHECKPOINTS, granted // 8 // slot) if state_cache_bytes is None else state_cache_bytes // slot
        granted = max(0, granted - (running + kept) * slot)
        slots = running + kept
        max_sequences = running // 2
    tokens = (
        min(max(mesh.last.context, KV_TOKENS), granted * page_tokens // max(1, page))
        if kv_tokens is None
        else kv_tokens
    )
    pages = tokens // page_tokens if kv_tokens is None else -(-tokens // page_tokens)
    return StateSpec(max(1, pages), page_tokens, slots), max_sequences
