"""Sources of weights: the checkpoint tensors that a weight is read from, and the steps that reshape and cut them.

    model.layers.0.mlp.experts.{0..7}.w1.weight    a run of eight tensors, joined along the first dimension
    model.layers.0.mlp.experts.gate_up_proj|T      transposed: the last two dimensions exchanged
    ...gate_up_proj|T|r0:1/2                       then row 0 of every 2 rows
    ...gate_up_proj_bias|c1:2/2                    column 1 of every 2 columns
    ...moe_statics.e_score_correction_bias|v       a matrix of one row, as a vector
    ...input_gate_bias|f                           all values of a matrix, as a vector
    ...conv1d.weight|m                             a tensor [a, b, columns], as a matrix [a * b, columns]
    ...kv_b_proj.weight|h16                        a matrix's rows divided into a stack of 16 matrices
    ...kv_b_proj.weight|h16|s4:8/16                then matrices 4 to 7 of every 16
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
    """Parse a source, such as "experts.{0..7}.w1|T|r0:1/2". Yields (tensor name, steps) for each tensor that it names.

    {0..7} stands for eight tensors, numbered 0 to 7. The steps say how to change a tensor after it is read; all tensors
    of a source have the same steps. Steps are a tuple of texts, in the order to apply: here ("T", "r0:1/2"), which
    means transpose, then keep row 0 of every 2 rows. () means no change.
    """
    name, *steps = source.split("|")
    run = RUN.search(name)
    numbers = range(int(run[1]), int(run[2]) + 1) if run else [None]
    for i in numbers:
        yield (name if run is None else f"{name[: run.start()]}{i}{name[run.end() :]}"), tuple(steps)


def is_run(source: str) -> bool:
    """True if the source names a run of numbered tensors, such as "experts.{0..7}.w1".

    Each tensor of a run is one matrix of a stack.
    """
    return RUN.search(source) is not None


def narrowed(source: str, numbers: range) -> str:
    """Returns the text `source` with a smaller range of tensor numbers, such as {5..6} instead of {4..7}.

    For example, "experts.{4..7}.w1" with range(1, 3) becomes "experts.{5..6}.w1".

    numbers: the tensors to keep, counted from 0 at the first tensor of the old range.
    """
    run = RUN.search(source)
    assert run, f"{source} is no run"
    first = int(run[1])
    return f"{source[: run.start()]}{{{first + numbers.start}..{first + numbers.stop - 1}}}{source[run.end() :]}"


def restacked(
    sources: Sequence[str], held: Sequence[int], wanted: Sequence[int], total: int, axis: str = "s"
) -> tuple[str, ...]:
    """Returns a tuple of source texts that read the matrices `wanted` of a stack.

    It is called when a rank gets other experts than before: the stack is a weight with one matrix for each expert. A
    source text names checkpoint tensors, and says how to cut or transpose them. The tuple has one text for each run
    of consecutive numbers in `wanted`. Each text makes the same transpositions, and cuts the same rows or columns, as
    sources[0].

    Args:
        sources: source texts that read the matrices `held`. Only the first text is used.
        held: numbers of the matrices that `sources` read, ascending.
        wanted: numbers of the matrices that the result is to read, ascending.
        total: number of matrices in the whole stack.
        axis: "s" for a stack of matrices; "r" for a stack of vectors, which is one matrix with a vector in each row.
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
    """Returns a list of source texts for consecutive parts of a checkpoint tensor, one text for each item of `sizes`.

    For example, parts_of("qkv.weight", [4, 8]) returns ["qkv.weight|r0:4/12", "qkv.weight|r4:12/12"]: rows 0 to 3 of
    every 12, and rows 4 to 11 of every 12. If the tensor is longer than the sum of `sizes`, its length must be a
    multiple of this sum. Each part then takes its rows from each of the equal blocks of the tensor.

    Args:
        source: name of the tensor, perhaps followed by steps that reshape it (see this file's docstring).
        sizes: number of rows or columns of each part.
        axis: "r" to divide rows, "c" to divide columns.
    """
    starts, of = [sum(sizes[:i]) for i in range(len(sizes))], sum(sizes)
    return [f"{source}|{axis}{start}:{start + size}/{of}" for start, size in zip(starts, sizes, strict=True)]


def part_sizes(sources: Sequence[str], length: int, axis: str = "r") -> list[int] | None:
    """Returns the number of rows of a weight that each of its sources provides, as a list.

    The result is None if the sources do not determine the numbers. A source is a text that names a checkpoint tensor.
    If it takes only some rows of the tensor, it ends with |rA:B/N, which means rows A to B - 1 of every N rows. The row
    counts are known in two cases:

    - All sources have this ending, and their numbers B - A add up to `length`. The result is then these numbers.
    - All sources take rows of the same tensor with the same N, and `length` is k times the sum of their numbers B - A.
      The tensor then has k blocks of N rows, and each source provides k * (B - A) rows.

    Args:
        sources: the source texts of the weight, in order.
        length: number of rows of the weight.
        axis: "r" for rows; "c" for a vector, whose cuts are written |cA:B/N.
    """
    cuts = [re.fullmatch(rf"(.+)\|{axis}(\d+):(\d+)/(\d+)", source) for source in sources]
    sizes = [int(cut[3]) - int(cut[2]) for cut in cuts if cut]
    if len(sizes) == len(sources) and sum(sizes) == length:
        return sizes
    if len(sizes) < len(sources) or len({(cut[1], cut[4]) for cut in cuts if cut}) > 1 or length % sum(sizes):
        return None
    return [length // sum(sizes) * size for size in sizes]


def names(source: str) -> list[str]:
    """Returns the names of the checkpoint tensors that a source reads, as a list.

    source: text such as "experts.{0..7}.w1|T", which names checkpoint tensors and the changes to make to them.
    """
    return [name for name, _ in expand(source)]


def _cut(step: str, length: int) -> tuple[int, int, int, int]:
    """Parse a cut, a text such as "r0:1/2", which keeps row 0 of every 2 rows.

    Returns four ints: (axis, first, last, of). The axis is divided into runs of `of` indices. In each run, the indices
    `first` to `last` - 1 are kept. axis: -2 for rows ("r"), -1 for columns ("c"), -3 for the matrices of a stack ("s").

    `length` is the size of that axis, which must be a multiple of `of`. Raises ProgramError for a text that is not a
    cut or does not fit `length`.
    """
    match = CUT.fullmatch(step)
    if not match:
        raise ProgramError(f"{step!r} is no step of a source; known are T, v, f, m, hN, gN, sA:B/N, rA:B/N and cA:B/N")
    first, last, of = int(match[2]), int(match[3]), int(match[4])
    if not 0 <= first < last <= of or length % of:
        raise ProgramError(f"step {step} of a source cannot cut {length}; wanted 0 <= A < B <= N, N dividing {length}")
    return AXES[match[1]], first, last, of


def shape_after(shape: tuple[int, ...], steps: tuple[str, ...]) -> tuple[int, ...]:
    """Returns the shape of a tensor after the steps of a source are applied, as a tuple.

    shape: the shape before. steps: texts such as "T" (transpose), "r0:1/2" (keep row 0 of every 2) or "h16" (divide the
    rows into a stack of 16 matrices). Raises ProgramError for a cut that does not fit.
    """
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
            shape = (shape[0] * shape[1], shape[2]) if len(shape) == 3 else shape
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
    """Returns the tensor `x` after applying the steps of a source to it, such as cuts and transpositions.

    The result shares memory with `x` where possible. A quantised `x` stays quantised, except in these cases, in which
    the result is a float32 array:

    - A step would divide a group (values that share a scale).
    - A step divides the rows into a stack of matrices ("h16").
    - The steps transpose ("T") but `x` is not stored transposed (x.turned), or the reverse.

    steps: texts, applied in order. "T" transposes; "r0:1/2" keeps row 0 of every 2 rows; "h16" divides the rows into a
    stack of 16 matrices of consecutive rows. This file's docstring lists the others. Raises ProgramError for a step
    that does not fit.
    """
    if isinstance(x, Quantised):
        coded = _coded(x, steps)
        if coded is not None:
            return coded
        dense = x.rows(slice(None))
        x = dense.swapaxes(-1, -2) if x.turned else dense
    return _moved(x, steps)


def _coded(x: Quantised, steps: tuple[str, ...]) -> Quantised | None:
    """Returns the quantised tensor `x` after applying the steps of a source, still quantised; None if impossible.

    The steps are applied to the codes and to the scales. That is impossible in these cases:

    - A step would divide a group (values that share a scale).
    - A step divides the rows into a stack of matrices ("h16").
    - The steps transpose ("T") but `x` is not stored transposed (x.turned), or the reverse.

    steps: texts such as "r0:1/2", see take(). Raises ProgramError for a step that does not fit.
    """
    if steps.count("T") != x.turned or any(s.startswith("h") for s in steps):
        return None
    x = replace(x, turned=False)
    for step in (s for s in steps if s != "T"):
        if step[0] == "g" or (step[0] == "c" and x.format and formats.get(x.format).group == formats.ROW):
            x = _regrouped(x, int(step[1:])) if step[0] == "g" else _cut_columns(x, step)
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
    """Returns how many neighbouring columns of the quantised tensor `x` share one second-level scale (x.units).

    It is 256 for the formats q4_k, q5_k and q6_k, and the length of a whole row for other formats.
    """
    return formats.BLOCK if formats.get(x.format).block == formats.BLOCK else x.codes.shape[-1]


def _regrouped(x: Quantised, group: int) -> Quantised:
    """Returns a copy of the quantised tensor `x` in which each scale is shared by only `group` columns.

    The scales are repeated, so the codes and the values stay the same. Raises ProgramError if `group` does not divide
    the size of x's groups, or if the scales of x are multiples of a second-level scale (x.units), as in q4_k.
    """
    if x.group % group or x.units is not None:
        raise ProgramError(f"groups of {x.group} cannot become groups of {group}; wanted a divisor of {x.group}")
    count = -(-x.codes.shape[-1] // group)
    arrays = {
        name: array if name == "codes" else np.repeat(array, x.group // group, axis=-1)[..., :count]
        for name, array in x.arrays.items()
    }
    return replace(x.holding(arrays), group=group, format=re.sub(r"g\d+", f"g{group}", x.format))


def _cut_columns(x: Quantised, step: str) -> Quantised:
    """Returns the quantised tensor `x` with only some of its columns.

    `x` must have one scale for each row, which is kept.

    step: text that says which columns to keep, such as "c96:192/384" (columns 96 to 191 of every 384). Raises
    ProgramError if the step does not fit.
    """
    codes = _moved(x.codes, (step,))
    group = formats.get(x.format).group_of(codes.shape[-1])
    count = -(-codes.shape[-1] // group)
    arrays = {
        name: codes if name == "codes" else np.repeat(array[..., :1], count, axis=-1)
        for name, array in x.arrays.items()
    }
    return replace(x.holding(arrays), group=group)


def _of_groups(step: str, length: int, group: int) -> tuple[str, ...] | None:
    """Turn a cut of a quantised matrix's columns into the cut of its scales that goes with it.

    `step` is a text "cA:B/N", which keeps columns A to B - 1 of every N. Each scale is shared by `group` columns. The
    result is one of these:

    - A tuple with one text of the same form, which keeps columns of the matrix of scales. With `group` 32,
      "c96:192/384" gives ("c3:6/12",).
    - (): a group is the whole row, so all scales are kept.
    - None: the kept range begins or ends inside a group.

    Args:
        step: the cut of columns, as text.
        length: number of columns of the matrix.
        group: number of neighbouring columns that share a scale.

    Raises ProgramError for a step that does not fit.
    """
    _, first, last, of = _cut(step, length)
    if group >= length:
        return ()
    if first % group or (last % group and last != length) or (of % group and of != length):
        return None
    return (f"c{first // group}:{-(-last // group)}/{-(-of // group)}",)


def _moved(x: np.ndarray, steps: tuple[str, ...]) -> np.ndarray:
    """Returns the array `x` after the steps of a source are applied. `x` is not quantised.

    steps: texts such as "T" (transpose) or "r0:1/2" (keep row 0 of every 2), see take(). Raises ProgramError for a cut
    that does not fit.
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
            x = x.reshape(-1, x.shape[-1])
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
    """Read the tensors of a source piece by piece, to save memory. Yields (tensor name, values) for each piece.

    A piece has some consecutive rows of a tensor, after the source's steps (cuts, transposition) were applied to it. A
    piece is left out if the cuts keep none of its rows. A quantised tensor is yielded as one piece if a step divides
    its rows into several matrices (such as "h16"), or if it is a matrix and a step transposes it.

    Args:
        source: text that names checkpoint tensors and steps (see this file's docstring).
        read: function from a tensor's name to the whole tensor.
        runs: function from a tensor's name to an iterator over its pieces.
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
    """Returns a boolean mask over the indices `ids` of an axis: True for each index that the cuts `steps` keep.

    steps: cuts of that axis as texts, such as "r0:1/2". Raises ProgramError for a step that is not a cut.
    """
    kept = np.ones(len(ids), bool)
    for step in steps:
        _, first, last, of = _cut(step, int(step.rpartition("/")[2]))
        kept &= (first <= ids % of) & (ids % of < last)
        ids = ids // of * (last - first) + ids % of - first  # indices after this cut
    return kept


def read(source: str, reader: Reader) -> Iterator[tuple[str, Value]]:
    """Read the checkpoint tensors that a source names. Yields (tensor name, values) for each of them.

    The steps of the source, such as cuts and transpositions, have been applied to the values.

    Args:
        source: text such as "experts.{0..7}.w1.weight|T", see this file's docstring.
        reader: function from a tensor's name to its values. An error that it raises is passed on.

    Raises ProgramError for a step of the source that does not fit the tensor.
    """
    for name, steps in expand(source):
        yield name, take(reader(name), steps)
