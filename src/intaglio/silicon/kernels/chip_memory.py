"""ChipMemory: the HBM of one simulated chip, with tensors in it by name, which kernels read and write.

Also helpers with which kernels write streams: dealing jobs to cores, slicing ranges, loading tiles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

import numpy as np

from intaglio import formats
from intaglio.chips import ChipSpec, Target
from intaglio.formats import E4M3, Quantised
from intaglio.ops import Value
from intaglio.silicon import isa
from intaglio.silicon.cache import LINE
from intaglio.silicon.machine import Machine, RunResult, l2_of
from intaglio.silicon.memory import MachineError, Memory, Region
from intaglio.silicon.stream import Heap, Stream, StreamBuilder

FORMAT_OF = {dtype: name for name, dtype in formats.PLAIN.items()} | {E4M3: "e4m3"}
Job = TypeVar("Job")


@dataclass(frozen=True)
class QuantisedRegion:
    """A quantised tensor in HBM: its codes [N, K], and two copies of its scales, [N, G] and [G, N]; G = K / group."""

    codes: Region
    scales: Region  # [N, G]
    scales_t: Region  # [G, N]
    group: int


def codes_of(w: Region | QuantisedRegion) -> Region:
    """The region with a tensor's numbers: `w.codes` if `w` is a QuantisedRegion, else `w` itself."""
    return w.codes if isinstance(w, QuantisedRegion) else w


def group_of(w: Region | QuantisedRegion) -> int:
    """Number of columns of a row of `w` that share a scale; 0 if `w` is not quantised."""
    return w.group if isinstance(w, QuantisedRegion) else 0


class ChipMemory:
    """HBM of one chip with tensors by name. A vector is stored as one row, a K/V cache as one row per slot and head.

    values: False to assign addresses and store no data; streams are then timed without check(), and compute nothing.
    """

    def __init__(self, target: Target, values: bool = True) -> None:
        self.target, self.chip, self.values = target, target.chip, values
        self.hbm, self.heap, self.l2 = Memory("hbm", None), Heap(), l2_of(target)
        self.regions: dict[str, Region | QuantisedRegion] = {}
        self.launches: list[RunResult] = []  # of each run so far

    def put(self, name: str, value: Value, bits: int = 8) -> None:
        """Store a tensor's values in HBM under a name. Returns nothing.

        A quantised value is stored as codes, scales and transposed scales; of format fp8row, whose groups of a row
        have copies of one scale, with this scale alone. bits: bits of a code, if `value` is quantised to integers.
        """
        if isinstance(value, Quantised):
            one = value.format == "fp8row"
            value = Quantised(as_matrix(value.codes), as_matrix(value.scales), value.group)
            if one:
                value = Quantised(value.codes, value.scales[:, :1], value.codes.shape[1])
            codes = self._write(value.codes, "e4m3" if value.codes.dtype == E4M3 else f"int{bits}")
            scales, scales_t = (self._write(v, "f32") for v in (value.scales, value.scales.T))
            self.regions[name] = QuantisedRegion(codes, scales, scales_t, value.group)
            return
        self.regions[name] = self._write(as_matrix(value), FORMAT_OF[value.dtype])

    def _write(self, matrix: np.ndarray, format: str) -> Region:
        rows, cols = matrix.shape
        region = self.heap.allocate(rows, cols, format)
        if self.values:
            self.hbm.write(region, matrix)
        return region

    def allocate(self, name: str, rows: int, cols: int, format: str) -> Region:
        """Allocate an unwritten [rows, cols] matrix for a result under a name, and return its region."""
        region = self.heap.allocate(rows, cols, format)
        self.regions[name] = region
        return region

    def region(self, name: str) -> Region:
        """The HBM region of the unquantised tensor `name`. Raises MachineError for a quantised tensor.

        Raises KeyError for an unknown name.
        """
        region = self.regions[name]
        if isinstance(region, QuantisedRegion):
            raise MachineError(f"{name} is quantised; this kernel takes an unquantised tensor")
        return region

    def codes(self, name: str) -> Region:
        """The region of tensor `name`: its codes if it is quantised, else its values."""
        return codes_of(self.regions[name])

    def scales(self, name: str) -> Region | None:
        """The region of a quantised tensor's scales, one row per row of codes; None if the tensor is not quantised."""
        region = self.regions[name]
        return region.scales if isinstance(region, QuantisedRegion) else None

    def optional_region(self, name: str | None) -> Region | None:
        """The HBM region of the unquantised tensor `name`; None if `name` is None, for an operand that the op lacks.

        Raises MachineError for a quantised tensor.
        """
        return None if name is None else self.region(name)

    def read(self, name: str) -> np.ndarray:
        """The values of an unquantised tensor, as an array [rows, cols]. Raises MachineError for a quantised one."""
        return self.hbm.read(self.region(name))

    def put_indices(self, values: Sequence[int] | np.ndarray) -> Region:
        """Store indices for Gather or Scatter and return their region, i32 [1, n].

        On hardware they would come with the batch. They start on a new L2 line: if they shared a line with data that is
        read before, they would count as already in the L2.
        """
        self.heap.top = -(-self.heap.top // LINE) * LINE
        return self._write(np.asarray(values, np.int32).reshape(1, -1), "i32")

    def put_floats(self, values: np.ndarray) -> Region:
        """Store numbers and return their region, f32 [1, n]."""
        return self._write(values.astype(np.float32).reshape(1, -1), "f32")

    def run(self, streams: Sequence[Stream], on: Target | None = None, label: str = "") -> RunResult:
        """Execute instruction streams on this chip alone and return the RunResult. Raises what Machine.run() does.

        on: target with which the run is timed; None: self.target. Another target is given for kernels to which the
        kernel library gives values of their own, such as a launch overhead; see Target.kernel(). label: RunResult.label
        of the result. The result is also appended to self.launches.
        """
        hbm = {0: self.hbm} if self.values else None
        machine = Machine(on or self.target, hbm, l2={0: self.l2}, checks=self.values)
        self.launches.append(machine.run(streams))
        self.launches[-1].label = label
        return self.launches[-1]


def as_matrix(value: np.ndarray) -> np.ndarray:
    """A two-dimensional view of an array: a vector becomes one row; leading dimensions are merged into the rows."""
    return value.reshape(1, -1) if value.ndim == 1 else value.reshape(-1, value.shape[-1])


def deal_jobs(chip: ChipSpec, jobs: Sequence[Job], site: str) -> Iterator[tuple[StreamBuilder, list[Job]]]:
    """Deal jobs round-robin to the chip's cores. Yields (StreamBuilder, jobs) for each core that has any."""
    for core in range(min(len(jobs), chip.cores)):
        yield StreamBuilder(site), list(jobs[core :: chip.cores])


def slices(n: int, step: int) -> list[slice]:
    """A list of slices of length `step` that cover 0 .. n - 1; the last may be shorter."""
    return [slice(i, min(n, i + step)) for i in range(0, n, step)]


def rows_of(cache: Region, slots: np.ndarray, heads: int, head: int) -> Iterator[tuple[slice, Region]]:
    """Yield (slice of `slots`, HBM region of their rows of one K/V head) for each run of consecutive slot numbers.

    Each region has rows at equal distances, so that one Load instruction can read it. cache: region
    [cache slots * heads, width]. slots: slot numbers, not empty. heads: number of K/V heads. head: the wanted head.
    """
    cuts = [0, *(np.flatnonzero(np.diff(slots) != 1) + 1).tolist(), len(slots)]
    for a, b in pairwise(cuts):
        row = int(slots[a]) * heads + head
        yield (
            slice(a, b),
            replace(cache, address=cache.address + row * cache.stride, rows=b - a, stride=heads * cache.stride),
        )


def shifted(part: slice, by: int) -> slice:
    """The slice that starts and stops `by` later than `part`."""
    return slice(part.start + by, part.stop + by)


def load(k: StreamBuilder, tile: Region, src: Region, rows: int = 0, columns: int = 0) -> Region:
    """Emit a Load of `src` into the front of `tile`; returns the part of the tile that it fills.

    rows, columns: size of that part, if larger than `src`; the rest is set to zeros. 0: the size of `src`.
    """
    part = tile.shaped(max(rows, src.rows), max(columns, src.cols))
    padded = (part.rows, part.cols) != (src.rows, src.cols)
    k.emit(isa.Load(dst=part, src=src, padded=padded))
    return part
