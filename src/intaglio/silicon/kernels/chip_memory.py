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
    """A quantised matrix in HBM: its codes and its scales.

    The codes are [N, K]. The scales are stored in two copies: [N, G] and transposed [G, N]. `group` neighbouring
    columns of a row of codes share one scale, so G = K / group.
    """

    codes: Region
    scales: Region  # [N, G]
    scales_t: Region  # [G, N]
    group: int


def codes_of(w: Region | QuantisedRegion) -> Region:
    """Returns the region that holds the numbers of a matrix: `w.codes` if the matrix is quantised, else `w` itself."""
    return w.codes if isinstance(w, QuantisedRegion) else w


def group_of(w: Region | QuantisedRegion) -> int:
    """Returns how many neighbouring columns in a row of `w` share a scale; 0 if `w` is not quantised."""
    return w.group if isinstance(w, QuantisedRegion) else 0


class ChipMemory:
    """The HBM of one simulated chip, with tensors that are stored by name.

    Each tensor is a matrix: a vector is stored as one row, a K/V cache with one row for each slot and head.

    values: False to assign addresses without storing data. Instruction streams are then timed, but they compute nothing
    and are not checked for faults.
    """

    def __init__(self, target: Target, values: bool = True) -> None:
        self.target, self.chip, self.values = target, target.chip, values
        self.hbm, self.heap, self.l2 = Memory("hbm", None), Heap(), l2_of(target)
        self.regions: dict[str, Region | QuantisedRegion] = {}
        self.launches: list[RunResult] = []  # of each run so far

    def put(self, name: str, value: Value, bits: int = 8) -> None:
        """Store a tensor in HBM under a name. Returns nothing.

        A quantised tensor is stored as three matrices: codes, scales, and transposed scales. In the format fp8row all
        groups of a row have the same scale, so that only one scale is stored for each row.

        bits: number of bits of a code, if `value` is quantised to integers.
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
        """Allocate a matrix [rows, cols] in HBM under a name, for a result. Returns its region, still unwritten."""
        region = self.heap.allocate(rows, cols, format)
        self.regions[name] = region
        return region

    def region(self, name: str) -> Region:
        """Returns the HBM region of the tensor `name`, which must not be quantised.

        Raises MachineError if the tensor is quantised, and KeyError if there is no tensor with this name.
        """
        region = self.regions[name]
        if isinstance(region, QuantisedRegion):
            raise MachineError(f"{name} is quantised; this kernel takes an unquantised tensor")
        return region

    def codes(self, name: str) -> Region:
        """Returns the HBM region with the values of the tensor `name`, or with its codes if it is quantised."""
        return codes_of(self.regions[name])

    def scales(self, name: str) -> Region | None:
        """Returns the HBM region of the scales of the tensor `name`; None if the tensor is not quantised.

        The region has one row of scales for each row of codes.
        """
        region = self.regions[name]
        return region.scales if isinstance(region, QuantisedRegion) else None

    def optional_region(self, name: str | None) -> Region | None:
        """Returns the HBM region of the tensor `name`, or None if `name` is None.

        `name` is None for an optional operand that the op does not have. Raises MachineError if the tensor is
        quantised.
        """
        return None if name is None else self.region(name)

    def read(self, name: str) -> np.ndarray:
        """Returns the values of the tensor `name` as an array [rows, cols]. Raises MachineError if it is quantised."""
        return self.hbm.read(self.region(name))

    def put_indices(self, values: Sequence[int] | np.ndarray) -> Region:
        """Store row numbers for Gather or Scatter in HBM. Returns their region, i32 [1, n].

        The region begins on a new L2 line. If other data were on the same line, and a kernel read this data first, the
        numbers would count as already in the L2. On hardware they are uploaded with the batch and must be fetched.
        """
        self.heap.top = -(-self.heap.top // LINE) * LINE
        return self._write(np.asarray(values, np.int32).reshape(1, -1), "i32")

    def put_floats(self, values: np.ndarray) -> Region:
        """Store numbers in HBM. Returns their region, f32 [1, n]."""
        return self._write(values.astype(np.float32).reshape(1, -1), "f32")

    def run(self, streams: Sequence[Stream], on: Target | None = None, label: str = "") -> RunResult:
        """Execute instruction streams on this chip alone. Returns the RunResult, and appends it to self.launches.

        on: the target with which the run is timed; None: self.target. Give another target for a kernel for which the
        kernel library has its own values, such as its own launch overhead; see Target.kernel(). label: label of the
        RunResult.

        Raises the errors that Machine.run() raises.
        """
        hbm = {0: self.hbm} if self.values else None
        machine = Machine(on or self.target, hbm, l2={0: self.l2}, checks=self.values)
        self.launches.append(machine.run(streams))
        self.launches[-1].label = label
        return self.launches[-1]


def as_matrix(value: np.ndarray) -> np.ndarray:
    """Returns a two-dimensional view of an array.

    A vector becomes one row. Of an array with more than two dimensions, all but the last dimension are merged.
    """
    return value.reshape(1, -1) if value.ndim == 1 else value.reshape(-1, value.shape[-1])


def deal_jobs(chip: ChipSpec, jobs: Sequence[Job], site: str) -> Iterator[tuple[StreamBuilder, list[Job]]]:
    """Distributes jobs to the chip's cores in turn. Yields (StreamBuilder, list of jobs) for each core that has a job.

    site: name of the op, for the instruction streams.
    """
    for core in range(min(len(jobs), chip.cores)):
        yield StreamBuilder(site), list(jobs[core :: chip.cores])


def slices(n: int, step: int) -> list[slice]:
    """Returns a list of slices of length `step` that together cover 0 .. n - 1. The last slice may be shorter."""
    return [slice(i, min(n, i + step)) for i in range(0, n, step)]


def rows_of(cache: Region, slots: np.ndarray, heads: int, head: int) -> Iterator[tuple[slice, Region]]:
    """Yield (slice of `slots`, region of HBM) for each run of consecutive slot numbers in `slots`.

    The region has the cache rows of these slots for the K/V head `head`. Its rows are at equal distances, so that one
    Load can read it.

    cache: region [cache slots * heads, width]. slots: slot numbers, at least one. heads: number of K/V heads.
    """
    cuts = [0, *(np.flatnonzero(np.diff(slots) != 1) + 1).tolist(), len(slots)]
    for a, b in pairwise(cuts):
        row = int(slots[a]) * heads + head
        yield (
            slice(a, b),
            replace(cache, address=cache.address + row * cache.stride, rows=b - a, stride=heads * cache.stride),
        )


def shifted(part: slice, by: int) -> slice:
    """Returns a slice whose start and stop are those of `part` plus `by`."""
    return slice(part.start + by, part.stop + by)


def load(k: StreamBuilder, tile: Region, src: Region, rows: int = 0, columns: int = 0) -> Region:
    """Emit a Load of `src` to the beginning of the memory of `tile`. Returns the region that the Load fills.

    This region has no gaps between its rows, and the size of `src`. If `rows` or `columns` is larger than the size of
    `src`, the region has this many rows or columns, and the additional elements are set to zero.
    """
    part = tile.shaped(max(rows, src.rows), max(columns, src.cols))
    padded = (part.rows, part.cols) != (src.rows, src.cols)
    k.emit(isa.Load(dst=part, src=src, padded=padded))
    return part
