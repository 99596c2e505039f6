"""Where a weight's values come from: checkpoint tensors by name, a run of them, and how each is turned and cut.

    model.layers.0.mlp.experts.{0..7}.w1.weight    eight tensors, one after the other
    model.layers.0.mlp.experts.gate_up_proj|T      the last two dimensions exchanged
    ...gate_up_proj|T|r0:1/2                       then, of every 2 rows, rows 0 to 1 (not included)
    ...gate_up_proj_bias|c1:2/2                    of every 2 columns, the second
    ...kv_b_proj.weight|h16                        its rows as a stack of 16 matrices
    ...kv_b_proj.weight|h16|s4:8/16                of every 16 matrices, the second four

Knows nothing of files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from operator import itemgetter

import numpy as np

from intaglio import formats
from intaglio.formats import Quantised
from intaglio.ops import Value
from intaglio.program.program import ProgramError

RUN = re.compile(r"\{(\d+)\.\.(\d+)\}")
CUT = re.compile(r"([rcs])(\d+):(\d+)/(\d+)")
Reader = Callable[[str], Value]
AXES = {"r": -2, "c": -1, "s": -3}


def expand(source: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(tensor name, steps) of each tensor a source stands for."""
    name, *steps = source.split("|")
    run = RUN.search(name)
    numbers = range(int(run[1]), int(run[2]) + 1) if run else [None]
    for i in numbers:
        yield (name if run is None else f"{name[: run.start()]}{i}{name[run.end() :]}"), tuple(steps)


def is_run(source: str) -> bool:
    """Whether a source is a run of tensors, each of them one matrix of a stack."""
    return RUN.search(source) is not None


def narrowed(source: str, numbers: range) -> str:
    """A run's tensors of these numbers alone, counted from its first."""
    run = RUN.search(source)
    assert run, f"{source} is no run"
    first = int(run[1])
    return f"{source[: run.start()]}{{{first + numbers.start}..{first + numbers.stop - 1}}}{source[run.end() :]}"


def names(source: str) -> list[str]:
    return [name for name, _ in expand(source)]


def _cut(step: str, length: int) -> tuple[int, int, int, int]:
    """(axis, first, last, of) of a cut of an axis that is `length` long."""
    match = CUT.fullmatch(step)
    if not match:
        raise ProgramError(f"{step!r} is no step of a source; known are T, hN, sA:B/N, rA:B/N and cA:B/N")
    first, last, of = int(match[2]), int(match[3]), int(match[4])
    if not 0 <= first < last <= of or length % of:
        raise ProgramError(f"step {step} of a source cannot cut {length}; wanted 0 <= A < B <= N, N dividing {length}")
    return AXES[match[1]], first, last, of


def shape_after(shape: tuple[int, ...], steps: tuple[str, ...]) -> tuple[int, ...]:
    """The shape of a tensor after the steps."""
    for step in steps:
        if step == "T":
            shape = (*shape[:-2], shape[-1], shape[-2])
        elif step[0] == "h":
            shape = (int(step[1:]), shape[0] // int(step[1:]), *shape[1:])
        else:
            axis = AXES.get(step[0], -1)
            axis, first, last, of = _cut(step, shape[axis])
            cut = list(shape)
            cut[axis] = cut[axis] // of * (last - first)
            shape = tuple(cut)
    return shape


def take(x: Value, steps: tuple[str, ...]) -> Value:
    """The steps done to an array; without a copy where they need none. Codes stay codes where their groups stay whole;
    where a step would tear them, they become float32 first."""
    if isinstance(x, Quantised):
        coded = _coded(x, steps)
        if coded is not None:
            return coded
        dense = x.rows(slice(None))
        x = dense.swapaxes(-1, -2) if x.turned else dense
    return _moved(x, steps)


def _coded(x: Quantised, steps: tuple[str, ...]) -> Quantised | None:
    """The steps done to codes and scales; None if one of them would tear groups, or turn what is not turned."""
    if steps.count("T") != x.turned or any(s.startswith("h") for s in steps):
        return None
    x = replace(x, turned=False)
    for step in (s for s in steps if s != "T"):
        cuts: dict[str, tuple[str, ...]] = {}
        for name in x.arrays:
            run = 1 if name == "codes" else formats.BLOCK if name in ("units", "low_units") else x.group
            alike = _of_groups(step, x.codes.shape[-1], run) if step.startswith("c") and run > 1 else (step,)
            if alike is None:
                return None
            cuts[name] = alike
        x = x.holding({name: _moved(array, cuts[name]) for name, array in x.arrays.items()})
    return x


def _of_groups(step: str, length: int, group: int) -> tuple[str, ...] | None:
    """A cut of columns, as one of their groups: none if a group is the whole row; None if it would tear one."""
    _, first, last, of = _cut(step, length)
    if group >= length:
        return ()
    if first % group or (last % group and last != length) or (of % group and of != length):
        return None
    return (f"c{first // group}:{-(-last // group)}/{-(-of // group)}",)


def _moved(x: np.ndarray, steps: tuple[str, ...]) -> np.ndarray:
    for step in steps:
        if step == "T":
            x = x.swapaxes(-1, -2)
            continue
        if step[0] == "h":
            x = x.reshape(int(step[1:]), -1, *x.shape[1:])
            continue
        axis, first, last, of = _cut(step, x.shape[AXES.get(step[0], -1)])
        axis %= x.ndim
        runs = x.reshape(*x.shape[:axis], x.shape[axis] // of, of, *x.shape[axis + 1 :])
        kept = runs[(slice(None),) * (axis + 1) + (slice(first, last),)]
        x = kept.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])
    return x


def strips(source: str, read: Reader, runs: Callable[[str], Iterator[Value]]) -> Iterator[tuple[str, Value]]:
    """As read(), but codes come in the `runs` along its first dimension that a tensor has by its name; whole, if a step
    turns that dimension or splits it."""
    for name, steps in expand(source):
        at = 0
        for x in runs(name):
            cut = "s" if len(x.shape) > 2 else "r"  # what moves the first dimension
            if not isinstance(x, Quantised):
                yield name, take(x, steps)
                continue
            if any(s[0] == "h" or (s == "T" and cut == "r") for s in steps):
                yield name, take(read(name), steps)
                break
            ids = np.arange(at, at + x.shape[0])
            at += len(ids)
            kept = _kept(ids, [s for s in steps if s[0] == cut])
            if kept.any():
                rows = x if kept.all() else x.each(itemgetter(kept))
                yield name, take(rows, tuple(s for s in steps if s[0] != cut))


def _kept(ids: np.ndarray, steps: Sequence[str]) -> np.ndarray:
    """Which of these indices of an axis are left when it has been cut."""
    kept = np.ones(len(ids), bool)
    for step in steps:
        _, first, last, of = _cut(step, int(step.rpartition("/")[2]))
        kept &= (first <= ids % of) & (ids % of < last)
        ids = ids // of * (last - first) + ids % of - first  # where those that are left stand now
    return kept


def read(source: str, reader: Reader) -> Iterator[tuple[str, Value]]:
    """(tensor name, values) of each tensor of a source, its steps done; `reader` gives a tensor by name."""
    for name, steps in expand(source):
        yield name, take(reader(name), steps)
