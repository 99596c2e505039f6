"""Sharding plan of blocks with recurrent state: which tensors are split among lanes (ranks), by heads or channels."""

from __future__ import annotations

from intaglio.compiler.layout import Layout, LayoutError
from intaglio.compiler.shard.shares import (
    Plan,
    Share,
    cut,
    heads_of,
    is_partition,
    joint,
    keeps_whole,
    scaled,
)
from intaglio.ops import Decay, HeadLinear, Linear, LinearAttention, Norm, Op, RgLru, SelectiveScan, ShortConv
from intaglio.program import Program

Recurrence = LinearAttention | SelectiveScan | RgLru


def plan_recurrence(p: Program, op: Recurrence, layout: Layout, plan: Plan) -> None:
    """Divide the block around a recurrent op among tp lanes (ranks): add its tensors to `plan`. Returns nothing.

    Linear attention is divided by heads, other recurrent ops by channels. The block is all ops between the projections
    into it and the projection out of it. Each of their results is added with the columns of each lane, and each state
    with its heads or channels.

    Nothing is added, and every lane runs the whole block, in three cases:

    - An op of the block cannot run on a part of its operands.
    - Two ops of the block need different parts of one tensor.
    - `plan` already has a tensor of the block.

    plan: {name: columns or heads of each lane}; changed in place. Raises LayoutError if tp does not fit the number of
    heads or channels.
    """
    t = p.tensors
    if isinstance(op, LinearAttention):
        keys, values = map(int, t[op.state].shape[2:])
        heads, groups = divide_heads(op.site, op.heads, int(t[op.k].shape[1]) // keys, layout.tp)
        starts = {op.q: scaled(groups, keys), op.k: scaled(groups, keys), op.state: heads}
        starts |= {name: scaled(heads, values) for name in (op.v, op.out)}
        starts |= {x: scaled(heads, int(t[x].shape[1]) // op.heads) for x in (op.decay, op.beta) if x}
    else:
        width, blocks = int(t[op.x].shape[1]), 0
        split = [op.x, op.out, op.state]
        if isinstance(op, RgLru):
            split += [op.input_gate, op.decay_gate]
            gate = p.producer(op.input_gate)  # a product per block of columns, which stays whole
            blocks = int(t[gate.w].shape[0]) if isinstance(gate, HeadLinear) else 0
        else:
            split += [op.step]
        starts = dict.fromkeys(split, divide_channels(op.site, width, blocks, layout.tp))
    found = spread(p, op, {name: shares * layout.ep for name, shares in starts.items()})
    if found and not found.keys() & plan.keys():
        plan |= found


def divide_heads(site: str, heads: int, groups: int, lanes: int) -> tuple[list[Share], list[Share]]:
    """Divide the heads of linear attention among `lanes` ranks. Returns (heads of each rank, q/k groups of each rank).

    Both are lists with one Share for each rank. A Share here is a tuple of one range of head or group numbers. A group
    is a q/k head that several heads read. Each rank gets a near-equal number of groups, with all heads that read them.
    If there are more ranks than groups, several ranks have the same group and divide its heads.

    Args:
        site: the op's site (name), for errors.
        heads: number of heads, a multiple of `groups`.
        groups: number of groups.
        lanes: number of ranks.

    Raises LayoutError if the ranks can divide neither groups nor heads evenly.
    """
    each = heads // groups
    if lanes <= groups:
        own = cut(groups, lanes, ())
        return scaled(own, each), own
    fits = [n for n in range(1, heads + 1) if n <= groups or (n % groups == 0 and n // groups <= each)]
    if lanes not in fits:
        raise LayoutError(
            f"{site} has {heads} heads in {groups} groups, which tp={lanes} does not divide; "
            f"use tp={', '.join(map(str, fits))}"
        )
    within = [(g, r) for g in range(groups) for (r,) in cut(each, lanes // groups, ())]
    return [(range(g * each + r.start, g * each + r.stop),) for g, r in within], [(range(g, g + 1),) for g, _ in within]


def divide_channels(site: str, width: int, blocks: int, lanes: int) -> list[Share]:
    """Divide `width` channels among `lanes` ranks as equally as possible. Returns a list with one Share for each rank.

    A Share is a tuple of one range of channel numbers. `blocks` says at which channels a range may end:

    - If `blocks` is above 0, the channels consist of this many blocks of equal size. A rank gets only whole blocks.
    - If `blocks` is 0, a range ends at a multiple of n channels. n is the largest of 128, 64 and 32 that divides
      `width` and lets every rank have at least n channels. If none of them does, a range may end at any channel.

    site: the op's site (name), for the error. Raises LayoutError if there are more ranks than blocks. If `blocks` is 0,
    raises LayoutError if there are more ranks than channels.
    """
    if lanes > (blocks or width):
        what = f"{blocks} blocks of {width // blocks}" if blocks else f"{width}"
        raise LayoutError(f"{site} has {what} channels, too few for tp={lanes}; use tp={blocks or width} or less")
    return scaled(cut(blocks, lanes, ()), width // blocks) if blocks else cut(width, lanes)


def spread(p: Program, op: Recurrence, starts: Plan) -> Plan | None:
    """Find how the tensors of the block around a recurrent op are divided. Returns {tensor: columns of each rank}.

    The search starts at the tensors of `op`. It continues through ops that compute each column from the same column,
    and ends at the linears before and after the block. A tensor that is read through views is divided as all its views
    are.

    Returns None if the block cannot be divided. One reason is that two ops need a tensor divided in different ways.
    Another is that an op needs a whole operand that cannot be gathered.

    starts: {tensor of `op` that is divided: columns or heads of each rank}.
    """
    found: Plan = {}
    todo = list(starts.items())
    while todo:
        name, shares = todo.pop()
        t = p.tensors[name]
        if name in found:
            if found[name] != shares:
                return None
            continue
        found[name] = shares
        if t.role == "output" or (p.views(name) and joint(p, name, found) != shares):
            return None
        if t.view and (base := joint(p, t.view[0], found)):
            todo.append((t.view[0], base))
        for other in [*p.uses(name)] if t.view else [p.producer(name), *p.uses(name)]:
            if other is op and name not in starts:
                return None
            wanted = {} if other is op or other is None else demands(p, other, name, shares)
            if wanted is None:
                return None
            todo += wanted.items()
    return found if all(p.base(name) in found for name in found) else None


def demands(p: Program, op: Op, name: str, shares: list[Share]) -> Plan | None:
    """Find how the operands and results of `op` must be divided if the tensor `name` is divided in a given way.

    Returns a dict {tensor: list with the columns of each rank}. The result is {} if the block ends at this op, because
    the op is a linear or because `name` can be gathered before it. The result is None if the op cannot run with a
    divided `name`; the block is then not divided at all.

    Args:
        p: the Program before it is divided.
        op: an op of the block.
        name: an operand or result of `op`.
        shares: for each rank, the columns of `name` that it has.
    """
    width = int(p.tensors[name].shape[1])
    match op:
        case Linear() if name == op.out and not op.residual:
            return {}
        case ShortConv():
            return dict.fromkeys((op.x, op.out, op.state), shares)
        case Norm() if (
            not op.residual and not p.views(op.out) and (keeps_whole(shares, op.group) or is_partition(shares, width))
        ):
            return dict.fromkeys((op.x, op.out), shares)
        case Decay() if keeps_whole(shares, width // int(p.tensors[op.rate].shape[0])):
            return dict.fromkeys((op.x, op.step, op.decay), shares)
        case HeadLinear() if keeps_whole(shares, width // (heads := int(p.tensors[op.w].shape[0]))):
            own = [heads_of(share, width // heads) for share in shares]
            return {x: scaled(own, int(p.tensors[x].shape[1]) // heads) for x in (op.x, op.out)}
        case Linear() if name == op.x and not op.activation and op.residual != name:
            return {}
    alike = [x for x in (*op.inputs, *op.outputs) if p.tensors[x].shape[1:] == (width,)]
    if op.elementwise and op.inputs == op.operands("rows") and name in alike and op.outputs[0] in alike:
        return dict.fromkeys(alike, shares)
    return {} if name in op.inputs and is_partition(shares, width) else None
