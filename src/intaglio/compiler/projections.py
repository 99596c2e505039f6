"""Merging of projections: linears of one block (attention, MLP) with the same input become one wider linear."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace

from intaglio.ops import Linear, Op, Tensor
from intaglio.program import Program

ORDER = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # gate before up, as linear's glu expects [gate; up]


def merge_projections(p: Program) -> Program:
    """The Program in which linears of one block with the same input and equal attributes are one wider linear.

    Their results become views of the wider linear's result.
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
    """True if the linear `op` may be merged with others.

    That is so if no other op reads its weight and bias, nothing is fused into it, and its result is a temp (no output
    of the Program). reads: {tensor's name: number of operands of the Program's ops that are this tensor}.
    """
    own = all(reads[n] == 1 and p.tensors[n].role == "weight" for n in (op.w, op.bias) if n is not None)
    bare = op.residual is None and not op.activation and not op.glu
    return own and bare and p.tensors[op.out].role == "temp"


def _key(p: Program, op: Linear) -> Hashable:
    """A hashable key. Linears with equal keys (same block, input, formats and scale) may be merged into one."""
    block = op.site.rpartition(".")[0]
    bias = op.bias and p.tensors[op.bias].format
    return block, op.x, p.tensors[op.w].format, bias, op.x_format, op.scale


def _merge(group: Sequence[Linear], tensors: dict[str, Tensor], sites: set[str]) -> Linear:
    """Merge the linears of `group` into one, which is returned. Updates `tensors` accordingly.

    In `tensors`, one joined weight replaces the group's weights, and one bias its biases, if there are any. The group's
    results become views (ranges of columns) of the new linear's result.

    tensors: the Program's tensors by name; changed in place. sites: sites (names) of all ops; the new op's site differs
    from them.
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
    """Replace the weights `parts` in `tensors` by one weight `name`, which joins their rows. Returns nothing.

    The new weight is read from the checkpoint tensors of all parts. It takes the place of one part in the dict, so that
    tensors keep their order; the caller renames the dict's keys afterwards.

    Args:
        tensors: {name: Tensor}; changed in place.
        parts: names of the weights, in the order in which their rows are joined.
        place: the name in `parts` that stays as the key of the new weight; the other keys are deleted.
        name: name of the new weight.
        rows: number of its rows.
    """
    sources = tuple(s for part in parts for s in tensors[part].source)
    whole = replace(tensors[place], name=name, shape=(rows, *tensors[place].shape[1:]), source=sources)
    for part in parts:
        if part != place:
            del tensors[part]
    tensors[place] = whole


def _joint(block: str, leaves: Sequence[str], taken: set[str]) -> str:
    """A site (name of the op's place in the model) for merged linears: BLOCK.qkv_proj for q_proj, k_proj and v_proj.

    "_merged" is appended until the names of site, weight and bias are free.

    Args:
        block: site of the block, which the linears' sites begin with; "": none.
        leaves: last parts of the linears' sites, such as q_proj.
        taken: names in use.
    """
    stems = [leaf.removesuffix("_proj") for leaf in leaves]
    tail = "_proj" if all(leaf.endswith("_proj") for leaf in leaves) else ""
    glue = "" if tail and all(len(stem) == 1 for stem in stems) else "_"
    name = glue.join(stems) + tail
    site = f"{block}.{name}" if block else name
    while {site, site + ".weight", site + ".bias"} & taken:
        site += "_merged"
    return site
