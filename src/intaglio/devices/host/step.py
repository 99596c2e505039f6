"""Inputs and outputs of a host step in native form: sampling parameters, logit edits, taps, timings."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from intaglio import _native
from intaglio.batch import Batch, Sampling
from intaglio.devices.device import DeviceError
from intaglio.devices.host.layout import columns_of
from intaglio.program import Program


@dataclass(frozen=True)
class Draws:
    """Sampling parameters of all rows that a step samples, converted to native form.

    A step whose parameters equal those of the step before uses the same Draws again. This saves 40 us per step: the
    conversion is slow because the weights read by a step have evicted everything else from the CPU caches.
    """

    ways: tuple[Sampling, ...]
    native: _native.SamplingParams

    @classmethod
    def of(cls, ways: tuple[Sampling, ...]) -> Draws:
        """Convert sampling parameters to native arrays. Returns a Draws, which many steps can use.

        `ways` has a Sampling (temperature, top_k, top_p, min_p, seed) for each row to sample, in order. It may be
        empty.
        """
        numbers = [(s.temperature, s.top_p, s.min_p, s.top_k) for s in ways]
        seeds = [s.seed & 0xFFFFFFFFFFFFFFFF for s in ways]
        return cls(
            ways, _native.SamplingParams(np.array(numbers, np.float32).reshape(-1, 4), np.array(seeds, np.uint64))
        )


class Timings(Mapping[str, float]):
    """Seconds of each op of a step: a read-only mapping {op's name: seconds}.

    Internally, a dict is built when a value is first read. Building it at the end of every step would make small steps
    measurably slower.

    Args:
        sites: the ops' names.
        seconds: array with the seconds of each op, in the order of `sites`.
    """

    def __init__(self, sites: Sequence[str], seconds: np.ndarray) -> None:
        self._sites, self._seconds = sites, seconds

    @cached_property
    def _held(self) -> dict[str, float]:
        return dict(zip(self._sites, self._seconds.tolist(), strict=True))

    def __getitem__(self, site: str) -> float:
        return self._held[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)


def edits_of(sampling: Sequence[Sampling], vocabulary: int) -> _native.Edits | None:
    """Convert the logit edits and grammar masks of all rows to native form. Returns None if no row has any.

    The result is a _native.Edits. `sampling` has the Sampling of each row to sample, in order. Raises DeviceError if an
    edited token id is not less than `vocabulary`, or if a mask is not uint32 [ceil(vocabulary / 32)].
    """
    if all(s.edits is None and s.mask is None for s in sampling):
        return None
    edits = [s.edits for s in sampling]
    masks = [s.mask for s in sampling if s.mask is not None]
    words = -(-vocabulary // 32)
    for mask in masks:
        if mask.shape != (words,) or mask.dtype != np.uint32:
            raise DeviceError(f"a mask is {mask.dtype} {list(mask.shape)}; the vocabulary takes uint32 [{words}]")
    there = [e for e in edits if e is not None]
    ids = np.concatenate([np.empty(0, np.int32), *(e.ids for e in there)])
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocabulary:
        raise DeviceError(f"edits touch ids {ids.min()}..{ids.max()}, outside 0..{vocabulary - 1}")
    scale, add = (np.concatenate([np.empty(0, np.float32), *parts]) for parts in (
        [e.scale for e in there], [e.add for e in there]
    ))  # fmt: skip
    first = np.cumsum([0, *(0 if e is None else len(e.ids) for e in edits)], dtype=np.int32)
    has = np.array([s.mask is not None for s in sampling])
    mask_of = np.where(has, np.cumsum(has) - 1, -1).astype(np.int32)
    packed = np.stack(masks) if masks else np.empty((0, words), np.uint32)
    return _native.Edits(first, ids, scale, add, mask_of, packed)


def taps_of(
    program: Program, ids: Mapping[str, int], batch: Batch, sites: Collection[str]
) -> tuple[dict[str, np.ndarray], list[tuple[int, int, np.ndarray]]]:
    """Allocate arrays for the op results that a caller asked for (taps). Returns a tuple (arrays, copies).

    `arrays` is {name of the op or view: f32 array [rows, columns]}. `copies` has a tuple for each array: (number of the
    op after which native code fills the array, number of the native tensor to copy, the array). Results that are not
    f32 are left out.

    Args:
        program: the Program.
        ids: {name of a tensor: its number in the native executable}.
        batch: the step's batch.
        sites: names of the ops, or of views of their results, that the caller asked for.
    """
    taken, wanted = {}, []
    for i, op in enumerate(program.ops):
        views = [t.name for t in program.tensors.values() if t.view and t.view[0] in op.outputs]
        for site, name in [(op.site, op.outputs[0] if op.outputs else None), *((v, v) for v in views)]:
            if site in sites and name is not None and program.tensors[name].format == "f32":
                t = program.tensors[name]
                taken[site] = np.empty((batch.sizes[str(t.shape[0])], columns_of(t)), np.float32)
                wanted.append((i, ids[name], taken[site]))
    return taken, wanted
