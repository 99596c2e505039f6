"""Sources of weights: the checkpoint tensors that a weight is read from, and the steps that reshape and cut them.

    model.layers.0.mlp.experts.{0..7}.w1.weight    a run of eight tensors, joined along the first dimension
    model.layers.0.mlp.experts.gate_up_proj|T      transposed: the last two dimensions exchanged
    ...gate_up_proj|T|r0:1/2                       then of every 2 rows the first (rows 0 to 1, 1 not included)
    ...gate_up_proj_bias|c1:2/2                    of every 2 columns the second
    ...moe_statics.e_score_correction_bias|v       a matrix of one row, as a vector
    ...input_gate_bias|f                           all values of a matrix, as a vector
    ...conv1d.weight|m                             a tensor [rows, 1, columns], as a matrix
    ...kv_b_proj.weight|h16                        a matrix's rows divided into a stack of 16 matrices
    ...kv_b_proj.weight|h16|s4:8/16                then of every 16 matrices numbers 4 to 7
    ...down_proj.weight|g32|c96:192/384            scales repeated for groups of 32 (no value changes), then a cut

The functions here read no files: a `reader` passed in returns a tensor's values by its name.
"""

from __future__ import annotations

import math
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
    """Yield (name, steps) of each checkpoint tensor in a source. steps: a tuple such as ("T", "r0:1/2")."""
    name, *steps = source.split("|")
    run = RUN.search(name)
    numbers = range(int(run[1]), int(run[2]) + 1) if run else [None]
    for i in numbers:
        yield (name if run is None else f"{name[: run.start()]}{i}{name[run.end() :]}"), tuple(steps)


def is_run(source: str) -> bool:
    """True if a source names a run of tensors such as experts.{0..7}, each one matrix of a stack."""
    return RUN.search(source) is not None


def narrowed(source: str, numbers: range) -> str:
    """The source of the tensors `numbers` of a run of tensors, counted from 0 at the run's first tensor.

    Example: experts.{4..7} with range(1, 3) becomes experts.{5..6}.
    """
    run = RUN.search(source)
    assert run, f"{source} is no run"
    first = int(run[1])
    return f"{source[: run.start()]}{{{first + numbers.start}..{first + numbers.stop - 1}}}{source[run.end() :]}"


def restacked(
    sources: Sequence[str], held: Sequence[int], wanted: Sequence[int], total: int, axis: str = "s"
) -> tuple[str, ...]:
    """The sources of other matrices of the stack that `sources` are from, as a tuple: one for each run of numbers.

    held: numbers, in the stack of `total` matrices, of those that `sources` name, ascending. wanted: numbers of those
    to name, ascending; each run of consecutive numbers gets one source. Other cuts of `sources` are kept. axis: s for a
    stack of matrices; r for a stack of vectors, which are the rows of one matrix.
    """
    template, found = sources[0], list[str]()
    ends = [n + 1 for n in wanted if n + 1 not in wanted]
    for n, end in zip((n for n in wanted if n - 1 not in wanted), ends, strict=True):
        if run := RUN.search(template):
            first = int(run[1]) - held[0]  # number of the stack's first tensor
            found.append(f"{template[: run.start()]}{{{first + n}..{first + end - 1}}}{template[run.end() :]}")
            continue
        cut = rf"|{axis}{n}:{end}/{total}"
        changed, several = re.subn(rf"\|{axis}\d+:\d+/{total}(?=\||$)", cut, template)
        found.append(changed if several else template + cut)
    return tuple(found)


def parts_of(source: str, sizes: Sequence[int], axis: str = "r") -> list[str]:
    """A list of the sources of consecutive parts of `source`, with these sizes along its rows or columns.

    axis: "r" for rows, "c" for columns. If the axis is n times as long as the sum of the sizes, it consists of n
    blocks. All blocks are divided alike, and each source has its part of every block.
    """
    starts, of = [sum(sizes[:i]) for i in range(len(sizes))], sum(sizes)
    return [f"{source}|{axis}{start}:{start + size}/{of}" for start, size in zip(starts, sizes, strict=True)]


def part_sizes(sources: Sequence[str], length: int) -> list[int] | None:
    """Rows of each of `sources`, which have `length` rows together, if parts_of() one tensor; None for other sources.

    The sources need not be all parts of the tensor.
    """
    cuts = [re.fullmatch(r"(.+)\|r(\d+):(\d+)/(\d+)", source) for source in sources]
    sizes = [int(cut[3]) - int(cut[2]) for cut in cuts if cut]
    if len(sizes) < len(sources) or len({(cut[1], cut[4]) for cut in cuts if cut}) > 1 or length % sum(sizes):
        return None
    return [length // sum(sizes) * size for size in sizes]


def names(source: str) -> list[str]:
    """A list of the names of the checkpoint tensors in a source."""
    return [name for name, _ in expand(source)]


def _cut(step: str, length: int) -> tuple[int, int, int, int]:
    """Parse a cut such as r0:1/2, which keeps every second row, from row 0 on. Returns (axis, first, last, of).

    The axis is divided into runs of `of` indices, and of each run indices first to last - 1 are kept. axis: -2 for
    rows, -1 for columns, -3 for matrices of a stack. length: size of the axis, which `of` must divide. Raises
    ProgramError for a step that is no cut or does not fit the length.
    """
    match = CUT.fullmatch(step)
    if not match:
        raise ProgramError(f"{step!r} is no step of a source; known are T, v, f, m, hN, gN, sA:B/N, rA:B/N and cA:B/N")
    first, last, of = int(match[2]), int(match[3]), int(match[4])
    if not 0 <= first < last <= of or length % of:
        raise ProgramError(f"step {step} of a source cannot cut {length}; wanted 0 <= A < B <= N, N dividing {length}")
    return AXES[match[1]], first, last, of


def shape_after(shape: tuple[int, ...], steps: tuple[str, ...]) -> tuple[int, ...]:
    """The shape (tuple) of a tensor of this shape after the steps. Raises ProgramError for a step that does not fit."""
    for step in steps:
        if step[0] == "g":
            continue
        if step == "T":
            shape = (*shape[:-2], shape[-1], shape[-2])
        elif step == "v":
            shape = shape[1:] if shape[:-1] == (1,) else shape
        elif step == "f":
            shape = (math.prod(shape),)
        elif step == "m":
            shape = (shape[0], *shape[2:]) if len(shape) == 3 and shape[1] == 1 else shape
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
    """The tensor x after the steps that a weight's source lists (see this module), without a copy where possible.

    Quantised values stay quantised if they can. They become float32 if a step would split a group, divides rows into a
    stack (hN), or transposes otherwise than the tensor is stored. Raises ProgramError for a step that does not fit.
    """
    if isinstance(x, Quantised):
        coded = _coded(x, steps)
        if coded is not None:
            return coded
        dense = x.rows(slice(None))
        x = dense.swapaxes(-1, -2) if x.turned else dense
    return _moved(x, steps)


def _coded(x: Quantised, steps: tuple[str, ...]) -> Quantised | None:
    """The quantised tensor x after the steps, as a Quantised; None if the steps cannot be applied to codes and scales.

    That is so if a step splits a group or divides rows into a stack (hN), or if the steps transpose otherwise than the
    tensor is stored. Raises ProgramError for a step that does not fit.
    """
    if steps.count("T") != x.turned or any(s.startswith("h") for s in steps):
        return None
    x = replace(x, turned=False)
    for step in (s for s in steps if s != "T"):
        if step[0] == "g" or (step[0] == "c" and x.format and formats.get(x.format).group == formats.ROW):
            x = _regrouped(x, int(step[1:])) if step[0] == "g" else _cut_rows(x, step)
            continue
        cuts: dict[str, tuple[str, ...]] = {}
        for name in x.arrays:
            run = 1 if name == "codes" else _unit_run(x) if name in ("units", "low_units") else x.group
            alike = _of_groups(step, x.codes.shape[-1], run) if step.startswith("c") and run > 1 else (step,)
            if alike is None:
                return None
            cuts[name] = alike
        x = x.holding({name: _moved(array, cuts[name]) for name, array in x.arrays.items()})
    return x


def _unit_run(x: Quantised) -> int:
    """The number of columns whose scales share a unit (Quantised.units): a block of 256, or the whole row."""
    return formats.BLOCK if formats.get(x.format).block == formats.BLOCK else x.codes.shape[-1]


def _regrouped(x: Quantised, group: int) -> Quantised:
    """The tensor in smaller groups of `group` columns, with each scale repeated. Codes and values do not change.

    Raises ProgramError unless `group` divides the tensor's group and its scales have no units.
    """
    if x.group % group or x.units is not None:
        raise ProgramError(f"groups of {x.group} cannot become groups of {group}; wanted a divisor of {x.group}")
    count = -(-x.codes.shape[-1] // group)
    arrays = {
        name: array if name == "codes" else np.repeat(array, x.group // group, axis=-1)[..., :count]
        for name, array in x.arrays.items()
    }
    return replace(x.holding(arrays), group=group, format=re.sub(r"g\d+", f"g{group}", x.format))


def _cut_rows(x: Quantised, step: str) -> Quantised:
    """A copy of `x`, which has one scale per row, with its columns cut by `step`. Each row keeps its scale."""
    codes = _moved(x.codes, (step,))
    group = formats.get(x.format).group_of(codes.shape[-1])
    count = -(-codes.shape[-1] // group)
    arrays = {
        name: codes if name == "codes" else np.repeat(array[..., :1], count, axis=-1)
        for name, array in x.arrays.items()
    }
    return replace(x.holding(arrays), group=group)


def _of_groups(step: str, length: int, group: int) -> tuple[str, ...] | None:
    """A cut of columns rewritten as the same cut of the groups' scales, in a tuple; None if it would split a group.

    () if one group is the whole row, so that its scales stay as they are. length: columns. group: columns of a group.
    Raises ProgramError for a step that does not fit.
    """
    _, first, last, of = _cut(step, length)
    if group >= length:
        return ()
    if first % group or (last % group and last != length) or (of % group and of != length):
        return None
    return (f"c{first // group}:{-(-last // group)}/{-(-of // group)}",)


def _moved(x: np.ndarray, steps: tuple[str, ...]) -> np.ndarray:
    """The array x after a source's steps (transposition, cuts, stacking), for an array that is not quantised.

    Raises ProgramError for a step that does not fit.
    """
    for step in steps:
        if step[0] == "g":
            continue
        if step == "T":
            x = x.swapaxes(-1, -2)
            continue
        if step == "v":
            x = x.reshape(x.shape[-1])
            continue
        if step == "f":
            x = x.reshape(-1)
            continue
        if step == "m":
            x = x.reshape(x.shape[0], x.shape[-1])
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
    """Yield (tensor name, values) of the tensors of a source, after its steps, a run of consecutive rows at a time.

    A tensor's name is yielded once for each of its runs, which need less memory than the whole tensor. A quantised
    tensor is yielded whole if a step divides its rows into a stack (hN); so is a quantised matrix if a step transposes
    it. read: function from a name to the whole tensor. runs: function from a name to the runs of the tensor.
    """
    for name, steps in expand(source):
        at = 0
        for x in runs(name):
            cut = "s" if len(x.shape) > 2 else "r"  # the step that cuts the first dimension
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
    """Boolean mask of the indices `ids` of an axis that remain after the cuts `steps`.

    Raises ProgramError for a step that is no cut.
    """
    kept = np.ones(len(ids), bool)
    for step in steps:
        _, first, last, of = _cut(step, int(step.rpartition("/")[2]))
        kept &= (first <= ids % of) & (ids % of < last)
        ids = ids // of * (last - first) + ids % of - first  # indices after this cut
    return kept


def read(source: str, reader: Reader) -> Iterator[tuple[str, Value]]:
    """Yield (tensor name, values) of each checkpoint tensor in a source, with the source's steps applied.

    reader: function from a name to a tensor.
    """
    for name, steps in expand(source):
        yield name, take(reader(name), steps)
