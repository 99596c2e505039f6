"""Where a kernel finds its operands: tensors placed in HBM by name, and the batch's tables beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from intaglio import formats
from intaglio.batch import Batch
from intaglio.chips import ChipSpec
from intaglio.formats import E4M3, Quantised
from intaglio.ops import Experts, Op, Tensor, Value
from intaglio.silicon.kernel import Heap, Kernel, Stream
from intaglio.silicon.machine import Machine, Run
from intaglio.silicon.memory import MachineError, Memory, Region

FORMAT_OF = {np.dtype(np.float32): "f32", np.dtype(np.int32): "i32", np.dtype(np.float16): "f16"}
Job = TypeVar("Job")


@dataclass(frozen=True)
class Coded:
    """A grouped weight in HBM: codes [N, K], scales by row [N, G] and by group [G, N]."""

    codes: Region
    scales: Region
    turned: Region
    group: int


class Board:
    """HBM of one chip with named tensors in it. Vectors are matrices of one row; caches have a row for each head of
    each slot."""

    def __init__(self, spec: ChipSpec) -> None:
        self.spec = spec
        self.memory, self.heap = Memory("hbm", None), Heap()
        self.places: dict[str, Region | Coded] = {}

    def put(self, name: str, value: Value, bits: int = 8) -> None:
        """Place a value under a name; whole-number codes of a weight with scales in `bits`."""
        if isinstance(value, Quantised):
            value = Quantised(flat(value.codes), flat(value.scales), value.group)
            codes = self._write(value.codes, "e4m3" if value.codes.dtype == E4M3 else f"int{bits}")
            scales, turned = (self._write(v, "f32") for v in (value.scales, value.scales.T))
            self.places[name] = Coded(codes, scales, turned, value.group)
            return
        self.places[name] = self._write(
            flat(value), FORMAT_OF.get(value.dtype, str(value.dtype).replace("bfloat16", "bf16"))
        )

    def _write(self, matrix: np.ndarray, format: str) -> Region:
        rows, cols = matrix.shape
        region = self.heap.place(rows, cols, format)
        self.memory.write(region, matrix)
        return region

    def room(self, name: str, rows: int, cols: int, format: str) -> Region:
        """Space for a result, of which nothing is written yet."""
        region = self.heap.place(rows, cols, format)
        self.places[name] = region
        return region

    def at(self, name: str) -> Region:
        """Where a plain tensor stands."""
        place = self.places[name]
        if isinstance(place, Coded):
            raise MachineError(f"{name} is a grouped weight where a plain tensor is wanted")
        return place

    def codes(self, name: str) -> Region:
        """Where a tensor's values stand, or its codes."""
        place = self.places[name]
        return place.codes if isinstance(place, Coded) else place

    def scales(self, name: str) -> Region | None:
        """Where its scales stand, a row for each row of codes; None for a plain tensor."""
        place = self.places[name]
        return place.scales if isinstance(place, Coded) else None

    def maybe(self, name: str | None) -> Region | None:
        return None if name is None else self.at(name)

    def get(self, name: str) -> np.ndarray:
        return self.memory.read(self.at(name))

    def table(self, values: Sequence[int] | np.ndarray) -> Region:
        """A list of numbers for gathers and scatters, as the runtime would write it beside the batch."""
        return self._write(np.asarray(values, np.int32).reshape(1, -1), "i32")

    def numbers(self, values: np.ndarray) -> Region:
        """The same of real numbers."""
        return self._write(values.astype(np.float32).reshape(1, -1), "f32")

    def run(self, streams: Sequence[Stream]) -> Run:
        return Machine(self.spec, {0: self.memory}).run(streams)


def flat(value: np.ndarray) -> np.ndarray:
    """As a matrix: a vector is one row, further dimensions join the rows."""
    return value.reshape(1, -1) if value.ndim == 1 else value.reshape(-1, value.shape[-1])


KernelFunction = Callable[[Board, Any, Mapping[str, Tensor], Batch], list[Stream]]
KERNELS: dict[str, KernelFunction] = {}


def kernel(kind: str) -> Callable[[KernelFunction], KernelFunction]:
    """Declare the kernel of an op."""

    def add(function: KernelFunction) -> KernelFunction:
        KERNELS[kind] = function
        return function

    return add


def deal(spec: ChipSpec, jobs: Sequence[Job], site: str) -> Iterator[tuple[Kernel, list[Job]]]:
    """Jobs in turn to cores: a kernel to be written for each core that has any."""
    for core in range(min(len(jobs), spec.cores)):
        yield Kernel(spec, site), list(jobs[core :: spec.cores])


def pieces(n: int, step: int) -> list[slice]:
    """0..n in runs of `step`."""
    return [slice(i, min(n, i + step)) for i in range(0, n, step)]


def refusal(op: Op, tensors: Mapping[str, Tensor]) -> str | None:
    """Why no kernel does this op; None if one does."""
    if op.kind not in KERNELS:
        return f"op {op.kind} at {op.site} has no kernel; there are kernels for {', '.join(sorted(KERNELS))}"
    for name in op.inputs:
        t = tensors[name]
        minima = t.format == "q4_k"  # no instruction takes them off
        if t.role == "weight" and (minima or formats.get(t.format).published):
            taken = ", ".join((*formats.PLAIN, formats.SCALED))
            return f"weight {name} of {op.site} is {t.format}; kernels take {taken}"
    if isinstance(op, Experts) and (op.order or op.down_order):
        return f"{op.site}: experts whose columns stand in orders of their own have no kernel; run them on the host"
    return None


def execute(board: Board, op: Op, tensors: Mapping[str, Tensor], batch: Batch) -> dict[str, np.ndarray]:
    """Run one op's kernel on the machine: operands are on the board, results come back by name."""
    if why := refusal(op, tensors):
        raise MachineError(why)
    for name in op.outputs:
        t = tensors[name]
        dims = [batch.sizes[d] if isinstance(d, str) else d for d in t.shape]
        board.room(name, dims[0] if len(dims) > 1 else 1, dims[-1], t.format)
    streams = KERNELS[op.kind](board, op, tensors, batch)
    board.run(streams)
    out = {}
    for name in op.outputs:
        t = tensors[name]
        dims = [batch.sizes[d] if isinstance(d, str) else d for d in t.shape]
        out[name] = board.get(name).reshape(dims)
    return out
