"""Merging of projections: linears of one block (attention, MLP) with the same input become one wider linear."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace

from intaglio.ops import Linear, Op, Tensor
from intaglio.program import Program

ORDER = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # gate before up, as linear's glu expects [gate; up]


def merge_projections(p: Program) -> Program:
    """A copy of the Program in which linears with the same input are merged into one wider linear.

    Linears are merged if they are in the same block and have the same input, formats and scale. Their results become
    views (ranges of columns) of the wider linear's result.
    """
    reads = Counter(name for op in p.ops for name in op.inputs)
    groups: dict[Hashable, list[Linear]] = {}
    for op in p.ops:
        if isinstance(op, Linear) and _can_merge(p, op, reads):
            groups.setdefault(_key(p, op), []).append(op)
    tensors = dict(p.tensors)
    instead: dict[str, list[Op]] = {}
    for group in (g for g in groups.values() if len(g) > 1):
        instead |= {op.site: [] for op in group}
        instead[group[0].site] = [_merge(group, tensors, {op.site for op in p.ops})]
    ops = [new for op in p.ops for new in instead.get(op.site, [op])]
    return p.with_ops(ops, {t.name: t for t in tensors.values()})


def _can_merge(p: Program, op: Linear, reads: Counter[str]) -> bool:
    """True if the linear `op` may be merged with other linears.

    It may if no other op reads its weight and bias, if nothing is fused into it, and if its result is no output of the
    Program. reads: {name of a tensor: how often the Program's ops read it}.
    """
    own = all(reads[n] == 1 and p.tensors[n].role == "weight" for n in (op.w, op.bias) if n is not None)
    bare = op.residual is None and not op.activation and not op.glu
    return own and bare and p.tensors[op.out].role == "temp"


def _key(p: Program, op: Linear) -> Hashable:
    """A hashable key that is equal for linears that may be merged: same block, input, formats and scale."""
    block = op.site.rpartition(".")[0]
    bias = op.bias and p.tensors[op.bias].format
    return block, op.x, p.tensors[op.w].format, bias, op.x_format, op.scale


def _merge(group: Sequence[Linear], tensors: dict[str, Tensor], sites: set[str]) -> Linear:
    """Merge several linears into one. Returns the new Linear, and updates the table `tensors` in place.

    In `tensors`, one joined weight replaces the weights of all these linears, and one joined bias their biases, if they
    have any. Their results become views (ranges of columns) of the new linear's result.

    Args:
        group: the linears, which have equal keys, see _key().
        tensors: the Program's tensors by name.
        sites: sites (names) of all ops of the Program; the new op gets another site.
    """
    first = group[0]
    leaves = {op.site.rpartition(".")[2]: op for op in group}
    if all(leaf in ORDER for leaf in leaves):
        group = [leaves[leaf] for leaf in ORDER if leaf in leaves]
    site = _joint(first.site.rpartition(".")[0], [op.site.rpartition(".")[2] for op in group], {*tensors, *sites})
    out = tensors[first.out]
    width = 0
    for op in group:
        own = tensors[op.out]
        for t in [own, *(t for t in tensors.values() if t.view and t.view[0] == own.name)]:
            tensors[t.name] = replace(t, view=(site, width + (t.view[1] if t.view else 0)))
        width += int(own.shape[1])
    tensors[site] = replace(out, name=site, shape=(out.shape[0], width))
    names = {first.w: site + ".weight", first.out: site}
    _join(tensors, [op.w for op in group], first.w, names[first.w], width)
    if first.bias is not None:
        names[first.bias] = site + ".bias"
        _join(tensors, [op.bias for op in group if op.bias], first.bias, names[first.bias], width)
    merged = replace(first, site=site).rename(names)
    assert isinstance(merged, Linear)
    return merged


def _join(tensors: dict[str, Tensor], parts: Sequence[str], place: str, name: str, rows: int) -> None:
    """Join several weights into one in the table `tensors`. Returns nothing.

    The rows of the new weight are the rows of all the weights, one weight after the other, and it is read from the
    checkpoint tensors of all. It keeps the key of one of the weights, so that the order of the dict stays; the caller
    renames keys afterwards.

    Args:
        tensors: {name: Tensor}; changed in place.
        parts: names of the weights, in the order in which their rows are joined.
        place: the name in `parts` that is kept as the key of the new weight. The other keys are deleted.
        name: name of the new weight.
        rows: number of rows of the new weight.
    """
    sources = tuple(s for part in parts for s in tensors[part].source)
    whole = replace(tensors[place], name=name, shape=(rows, *tensors[place].shape[1:]), source=sources)
    for part in parts:
        if part != place:
            del tensors[part]
    tensors[place] = whole


def _joint(block: str, leaves: Sequence[str], taken: set[str]) -> str:
    """The site (name) of the linear that results from merging several linears.

    For q_proj, k_proj and v_proj of a block it is BLOCK.qkv_proj. "_merged" is appended until no tensor or op has the
    name of the site, its weight or its bias.

    Args:
        block: site of the block, with which the sites of the linears begin; "": none.
        leaves: last parts of the linears' sites, such as q_proj.
        taken: names that are in use.
    """
    stems = [leaf.removesuffix("_proj") for leaf in leaves]
    tail = "_proj" if all(leaf.endswith("_proj") for leaf in leaves) else ""
    glue = "" if tail and all(len(stem) == 1 for stem in stems) else "_"
    name = glue.join(stems) + tail
    site = f"{block}.{name}" if block else name
    while {site, site + ".weight", site + ".bias"} & taken:
        site += "_merged"
    return site
