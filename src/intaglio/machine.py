"""Machine: the CPU threads and memory of this process, which all models in it share."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from intaglio.devices import BlockingExecutable, DeviceError, Executable, StepRequest, StepResult, usable_cores

T = TypeVar("T")
KV_SHARE = 0.25  # of the memory, for the K/V caches of all models together


class Machine:
    """The CPU threads and memory of this process, shared by its models.

    Models take turns, one step at a time, each with all threads, because two thread teams on the same cores would slow
    each other down. A quarter of the memory is for K/V caches, in equal parts for the models.

    Args:
        threads: CPU threads of a step; by default usable_cores(): one per core, within the container's CPU limit.
        memory: bytes; by default all of this machine's.
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
        """Most bytes of K/V cache that one model may hold."""
        return int(self.memory * KV_SHARE) // self.models

    def shared(self, executable: Executable) -> Executable:
        """An executable that runs `executable` in turns with other models; for one model `executable` itself."""
        return executable if self.models == 1 else SharedExecutable(executable, self.turn)


class SharedExecutable(BlockingExecutable):
    """An executable that runs `inner` only while it holds `turn`, a lock that the models of a machine share.

    So no two models run a step, or copy K/V blocks, at the same time.
    """

    def __init__(self, inner: Executable, turn: threading.Lock) -> None:
        self.inner, self.turn = inner, turn
        self.program, self.state, self.state_kept = inner.program, inner.state, inner.state_kept

    def run(self, request: StepRequest) -> StepResult:
        with self.turn:
            return self.inner.step(request)

    @property
    def block_bytes(self) -> int:
        return self.inner.block_bytes

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
