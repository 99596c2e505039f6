"""Sharding: from one Program, as ported, to one a rank. Layers are shared out among lanes, then cut into stages.

A plan says which columns of which results a lane computes; a rule for each op then carries that through the Program, so
that an op whose operands are cut gets its share, or the whole again by a collective. An op without a rule is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from intaglio import formats
from intaglio.compiler.layout import Layout, LayoutError
from intaglio.compiler.stages import cut_stages
from intaglio.ops import (
    AllGather,
    AllReduce,
    AllToAll,
    Attend,
    Embed,
    Experts,
    HeadLinear,
    KvWrite,
    Linear,
    Map,
    Norm,
    Op,
    Permute,
    ReduceScatter,
    Rope,
    Route,
    Sample,
    Select,
    Tensor,
)  # fmt: skip
from intaglio.program import Program
from intaglio.program.source import is_run, narrowed

Share = tuple[range, ...]  # the columns of a result (or rows of a weight) that a lane has, side by side in this order
Plan = dict[str, list[Share]]  # by tensor: the share of each lane; for a cache, of its heads
BLOCKS = (128, 64, 32)  # columns that stay together where there are enough: the groups of grouped formats


def shard(program: Program, layout: str | Layout, wire: str = "f32") -> tuple[Program, ...]:
    """The Programs of all ranks, in order of rank, for a Program as ported (no op fused with another).

    Attention is cut by heads; kv heads are held more than once where there are more lanes than kv heads. An MLP is cut
    by its inner columns, the head by the vocabulary, the embedding by its width. `wire` is what values are rounded to
    before they travel between ranks. Raises LayoutError for heads or layers that cannot be dealt out.
    """
    layout = Layout.parse(layout) if isinstance(layout, str) else layout
    lanes = [program]
    if layout.lanes > 1:
        plan = make_plan(program, layout)
        lanes = [Lane(program, plan, layout, i, wire).run() for i in range(layout.lanes)]
    places = [(stage, lane) for stage in range(layout.pp) for lane in range(layout.lanes)]
    return tuple(cut_stages(lanes[lane], layout, lane, stage, wire) for stage, lane in places)


def cut(width: int, lanes: int, blocks: Sequence[int] = BLOCKS) -> list[Share]:
    """0..width - 1 as a near-equal run for each lane, in whole blocks where there is a block for every lane."""
    block = next((b for b in blocks if width % b == 0 and width // b >= lanes), 1)
    ends = [width // block * i // lanes * block for i in range(lanes + 1)]
    return [(range(a, b),) for a, b in pairwise(ends)]


def cut_columns(weight: Tensor, lanes: int) -> list[Share]:
    """The columns of a weight dealt out so that blocks its format would keep larger stay whole too: a lane may have one
    more than another."""
    block = formats.get(weight.format).block
    return cut(int(weight.shape[-1]), lanes, (block, *BLOCKS) if block > BLOCKS[0] else BLOCKS)


def scaled(shares: Sequence[Share], by: int) -> list[Share]:
    """The columns of heads, each `by` wide."""
    return [tuple(range(r.start * by, r.stop * by) for r in share) for share in shares]


def heads_of(share: Share, head_dim: int) -> Share:
    """The heads whose columns a share is."""
    return tuple(range(r.start // head_dim, r.stop // head_dim) for r in share)


def width_of(share: Share) -> int:
    return sum(map(len, share))


# The plan


def make_plan(p: Program, layout: Layout) -> Plan:
    """What is cut where it is first computed: by heads, by inner columns, by vocabulary, by the embedding's width."""
    plan: Plan = {}
    for op in p.ops:
        if isinstance(op, Attend) and layout.tp > 1:
            plan_heads(p, op, layout, plan)
    for op in p.ops:
        if isinstance(op, Linear):
            plan_columns(p, op.x, cut_columns(p.tensors[op.w], layout.lanes), plan)
        elif isinstance(op, Sample):
            plan_columns(p, op.logits, cut(int(p.tensors[op.logits].shape[1]), layout.lanes), plan)
        elif isinstance(op, Embed):
            plan[op.out] = cut_columns(p.tensors[op.w], layout.lanes)
    for op in p.ops:
        if isinstance(op, Linear):
            plan_joint(p, op.out, plan)
    return plan


def plan_heads(p: Program, op: Attend, layout: Layout, plan: Plan) -> None:
    """Query heads dealt out evenly tp ways, each lane with the kv heads they read."""
    lanes, kv = layout.tp, int(p.tensors[op.k_cache].shape[2])
    if not (kv % lanes == 0 or (lanes % kv == 0 and op.heads % lanes == 0)):
        fit = [str(n) for n in range(1, op.heads + 1) if kv % n == 0 or (n % kv == 0 and op.heads % n == 0)]
        raise LayoutError(
            f"{op.site} has {op.heads} heads over {kv} kv heads; tp={lanes} fits not, tp={', '.join(fit)} do"
        )
    heads = [(range(op.heads * i // lanes, op.heads * (i + 1) // lanes),) for i in range(lanes)]
    shared: list[Share] = [
        (range(kv * i // lanes, max(kv * (i + 1) // lanes, kv * i // lanes + 1)),) for i in range(lanes)
    ]
    queries = roots(p, op.q, (Rope, Norm, Map, HeadLinear))
    if queries is None:
        raise LayoutError(f"{op.site} reads {op.q}, which is no projection that could be dealt out by heads")
    heads, shared = heads * layout.ep, shared * layout.ep  # the ways of experts do the same
    plan |= {q: scaled(heads, int(p.tensors[q].shape[1]) // op.heads) for q in queries}
    if kv == 1:
        return  # every lane has the one
    for write in (w for w in p.ops if isinstance(w, KvWrite) and w.k_cache == op.k_cache):
        for x, cache in ((write.k, write.k_cache), (write.v, write.v_cache)):
            found = roots(p, x, (Rope, Norm, Map))
            if found is None:
                raise LayoutError(f"{write.site} writes {x}, which is no projection that could be dealt out by heads")
            plan[cache] = shared
            plan |= {root: scaled(shared, int(p.tensors[root].shape[1]) // kv) for root in found}


def plan_columns(p: Program, x: str, shares: list[Share], plan: Plan) -> None:
    """Cut the projections that x is made of, element by element, if it is made of nothing else."""
    found, width = roots(p, x, (Map, Permute)), int(p.tensors[x].shape[1])
    if found and width >= len(shares) and all(root not in plan and p.tensors[root].shape[1] == width for root in found):
        plan |= dict.fromkeys(found, shares)


def roots(p: Program, name: str, through: tuple[type[Op], ...]) -> set[str] | None:
    """The results of linears, or views of them, that `name` is made of by ops of these kinds; None if of others too."""
    op = p.producer(name)
    if isinstance(op, Linear):
        return {name}
    if op is None or not isinstance(op, through) or p.tensors[name].view:
        return None
    parts = [roots(p, x, through) for x in op.inputs if p.tensors[x].role in ("temp", "output")]
    return set[str]().union(*parts) if all(part is not None for part in parts) else None  # type: ignore[arg-type]


def plan_joint(p: Program, out: str, plan: Plan) -> None:
    """A linear whose result is read by views: cut if they all are, and lie side by side; else neither it nor any of
    them is, for a lane might be left with nothing of one."""
    views = sorted((t.view[1], t.name) for t in p.tensors.values() if t.view and t.view[0] == out)
    if not views:
        return
    ends = [start + int(p.tensors[name].shape[1]) for start, name in views]
    whole = [0, *ends[:-1]] == [start for start, _ in views] and ends[-1] == p.tensors[out].shape[1]
    if whole and not p.uses(out) and all(name in plan for _, name in views):
        lanes = range(len(plan[views[0][1]]))
        plan[out] = [
            tuple(range(start + r.start, start + r.stop) for start, name in views for r in plan[name][lane])
            for lane in lanes
        ]
    else:
        for name in (out, *(name for _, name in views)):
            plan.pop(name, None)


# The rules


class Lane:
    """One lane's Program under way. `shares` says what each lane has of the tensors that are cut; others are whole."""

    def __init__(self, p: Program, plan: Plan, layout: Layout, lane: int, wire: str) -> None:
        self.p, self.plan, self.layout, self.lane, self.wire = p, plan, layout, lane, wire
        self.ops: list[Op] = []
        self.tensors: dict[str, Tensor] = {t.name: t for t in p.tensors.values() if t.role in ("input", "const")}
        self.shares: dict[str, list[Share]] = {}
        self.views: dict[str, list[Tensor]] = {}  # by their base
        for t in p.tensors.values():
            if t.view:
                self.views.setdefault(t.view[0], []).append(t)
        self.wholes: dict[str, str] = {}  # what a cut result is called where it is whole
        self.split: set[str] = set()  # results of which each lane has a run of the token rows

    def run(self) -> Program:
        for t in self.p.of_role("state"):
            self.keep(t.name, self.plan.get(t.name), axis=2)
        for op in self.p.ops:
            if type(op) not in RULES:
                raise LayoutError(f"{op.site}: op {op.kind} has no rule of sharding; give it one in compiler/shard.py")
            RULES[type(op)](self, op)
        return self.p.with_ops(self.ops, self.tensors)

    def add(self, op: Op, shares: list[Share] | None = None) -> None:
        """An op, its results whole, or its one result cut as `shares` say; with the views of its results."""
        self.ops.append(op)
        for name, (shape, format) in op.shapes(self.tensors).items():
            like = self.p.tensors.get(name)
            self.tensors[name] = Tensor(name, shape, format, like.role if like else "temp")
            if shares:
                self.shares[name] = shares
            self.split |= {name} if str(shape[0]).startswith("T:") else set()
            for t in self.views.get(name, []):
                self.add_view(t)

    def add_view(self, t: Tensor) -> None:
        """A view has what its base has of its columns."""
        assert t.view
        base, start = t.view
        if base in self.split:
            self.split.add(t.name)
            t = replace(t, shape=(self.tensors[base].shape[0], t.shape[1]))
        if base in self.shares:
            columns = range(start, start + int(t.shape[1]))
            self.shares[t.name] = [
                tuple(range(r.start - start, r.stop - start) for r in share if r.start in columns)
                for share in self.shares[base]
            ]
            before = sum(len(r) for r in self.shares[base][self.lane] if r.start < start)
            t = replace(t, shape=(t.shape[0], width_of(self.shares[t.name][self.lane])), view=(base, before))
        self.tensors[t.name] = t

    def keep(self, name: str, shares: list[Share] | None = None, axis: int = 0, as_: str = "") -> str:
        """A weight or state in the table: whole, or this lane's share of it along `axis`. Returns its name."""
        t = self.p.tensors[name]
        if shares:
            share, length = shares[self.lane], int(t.shape[axis])
            shape = (*t.shape[:axis], width_of(share), *t.shape[axis + 1 :])
            t = replace(t, shape=shape, source=cut_source(t, share, axis, length))
        self.tensors[as_ or name] = replace(t, name=as_ or name)
        return as_ or name

    def slab(self, name: str, stacks: Share, inners: Share = (), axis: int = 0) -> None:
        """Some matrices of a stack in the table, and of each some rows or columns along `axis`."""
        t = self.p.tensors[name]
        for which, share in ((0, stacks), (axis, inners)):
            if share:
                shape = (*t.shape[:which], width_of(share), *t.shape[which + 1 :])
                t = replace(t, shape=shape, source=cut_source(t, share, which, int(t.shape[which])))
        self.tensors[name] = t

    def own(self, op: Op, name: str, shares: list[Share], axis: int) -> str:
        """This lane's share of a weight of `op`, under a name of the op's own if other ops read the weight too."""
        own = f"{op.site}.{name.rpartition('.')[2]}.{('rows', 'columns')[axis]}"
        return self.keep(name, shares, axis, own if len(self.p.uses(name)) > 1 else "")

    def whole(self, name: str) -> str:
        """The name under which an operand is to be had whole, gathered from the lanes if need be."""
        t = self.p.tensors[name]
        if t.role == "weight":
            return self.keep(name)
        if name in self.split and name not in self.wholes:
            self.wholes[name] = f"{name}.whole"
            group, width = tuple(range(self.layout.lanes)), int(t.shape[1])
            self.add(
                AllGather(
                    site=f"{name}.all_gather",
                    x=name,
                    out=self.wholes[name],
                    group=group,
                    width=width,
                    tokens=True,
                    wire=self.wire,
                )
            )
        if name in self.shares and name not in self.wholes:
            self.wholes[name] = f"{name}.whole"
            self.gather(f"{name}.all_gather", name, self.wholes[name], self.shares[name], int(t.shape[1]))
        return self.wholes.get(name, name)

    def total(self, site: str, x: str, out: str, group: tuple[int, ...]) -> None:
        """The sum of the lanes' parts of a result: all of it, or with `sp` this lane's token rows."""
        t = self.p.tensors[out]
        if self.layout.sp and t.shape[0] == "T" and t.role == "temp" and len(group) == self.layout.lanes:
            self.add(
                ReduceScatter(site=f"{site}.reduce_scatter", x=x, out=out, group=group, share=self.lane, wire=self.wire)
            )
        else:
            self.add(AllReduce(site=f"{site}.all_reduce", x=x, out=out, group=group, wire=self.wire))

    def gather(self, site: str, x: str, out: str, shares: Sequence[Share], width: int) -> None:
        group = partners(shares, self.lane)
        self.add(AllGather(site=site, x=x, out=out, group=group, width=width, wire=self.wire))


def partners(shares: Sequence[Share], lane: int) -> tuple[int, ...]:
    """Lanes that together have all columns, in order, `lane` among them. Where kv heads are held more than once, the
    n-th holders of each gather among themselves."""
    holders: dict[Share, list[int]] = {}
    for i, share in enumerate(shares):
        holders.setdefault(share, []).append(i)
    place = holders[shares[lane]].index(lane)
    return tuple(holders[share][place] for share in sorted(holders, key=lambda share: share[0].start))


def cut_source(t: Tensor, share: Share, axis: int, length: int) -> tuple[str, ...]:
    """The sources of a share of a weight: a cut for each run of it. State has none."""
    if len(t.source) > 1:
        raise LayoutError(
            f"weight {t.name} is joined from {len(t.source)} tensors; shard a Program before it is merged"
        )
    if share == (range(length),):
        return t.source
    fmt = formats.get(t.format)
    if axis == len(t.shape) - 1 and fmt.block != fmt.group:  # groups alone can be padded
        torn = next((end for r in share for end in (r.start, r.stop) if end % fmt.block), None)
        if torn is not None:
            raise LayoutError(
                f"weight {t.name} is {t.type}, and a cut at column {torn} would tear a block of {fmt.block}; "
                "share it out fewer ways, or run it as weights int8 or int4"
            )
    way = "crs"[len(t.shape) - 1 - axis]
    return tuple(
        narrowed(source, r) if axis == 0 and is_run(source) else f"{source}|{way}{r.start}:{r.stop}/{length}"
        for source in t.source
        for r in share
    )


def entire(lane: Lane, op: Op) -> None:
    """Every lane does all of it."""
    lane.add(op.rename({name: lane.whole(name) for name in op.inputs}))


def columns(lane: Lane, op: Op, shares: list[Share]) -> None:
    """An op on cut operands whose result is cut; gathered at once if it is an output."""
    (out,) = op.outputs
    if lane.p.tensors[out].role == "output":
        return gathered(lane, op, shares)
    return lane.add(op, shares)


def gathered(lane: Lane, op: Op, shares: list[Share]) -> None:
    """An op whose result is cut, and gathered under its own name."""
    (out,) = op.outputs
    lane.add(op.rename({out: f"{out}.part"}), shares)
    lane.gather(f"{op.site}.all_gather", f"{out}.part", out, shares, int(lane.p.tensors[out].shape[1]))


def linear(lane: Lane, op: Linear) -> None:
    """By columns where the plan says so. Of a cut x every lane makes a part of each sum, and an all_reduce the sum."""
    if op.glu:
        raise LayoutError(f"{op.site} is fused with its activation; shard a Program before it is fused")
    cut_x, cut_out = lane.shares.get(op.x), lane.plan.get(op.out)
    if cut_x and not op.activation:
        w, part = lane.own(op, op.w, cut_x, axis=1), f"{op.out}.part"
        group = partners(cut_x, lane.lane)
        first = lane.lane == group[0]  # which alone brings what is to be added once
        bias = lane.keep(op.bias) if op.bias and first else None
        residual = lane.whole(op.residual) if op.residual and first else None
        lane.add(replace(op, w=w, bias=bias, residual=residual, out=part))
        lane.total(op.site, part, op.out, group)
    elif cut_out and not op.residual:
        bias = lane.own(op, op.bias, cut_out, axis=0) if op.bias else None
        columns(lane, replace(op, x=lane.whole(op.x), w=lane.own(op, op.w, cut_out, axis=0), bias=bias), cut_out)
    else:
        entire(lane, op)


def embed(lane: Lane, op: Embed) -> None:
    """By columns of the table: gathering rows costs half of what summing rows from a cut vocabulary would. With `sp`
    each lane hands its columns of others' rows on to them, which moves 1 / tp of that."""
    shares = lane.plan[op.out]
    own = replace(op, w=lane.own(op, op.w, shares, axis=1))
    if not lane.layout.sp or lane.p.tensors[op.out].role != "temp":
        return gathered(lane, own, shares)
    lane.add(replace(own, out=f"{op.out}.part"), shares)
    group, width = tuple(range(lane.layout.lanes)), int(lane.p.tensors[op.out].shape[1])
    site, x = f"{op.site}.all_to_all", f"{op.out}.part"
    return lane.add(AllToAll(site=site, x=x, out=op.out, group=group, share=lane.lane, width=width, wire=lane.wire))


def by_rows(lane: Lane, op: Op) -> bool:
    """Whether each lane can do its own token rows: all operands but weights are split, and the result may be."""
    rows = [name for name in op.inputs if lane.p.tensors[name].role != "weight"]
    return set(rows) <= lane.split and lane.p.tensors[op.outputs[0]].role == "temp"


def elementwise(lane: Lane, op: Map) -> None:
    """By columns if all operands are cut alike, but for those of one column, which each lane has, and no view reads the
    result; or all by rows."""
    if by_rows(lane, op):
        return lane.add(op)
    wide = [name for name in op.inputs if lane.p.tensors[name].shape[1:] != (1,) or name == op.a]
    shares = [lane.shares.get(name) for name in wide]
    if shares[0] and all(s == shares[0] for s in shares) and op.out not in lane.views:
        return columns(lane, op, shares[0])
    return entire(lane, op)


def permute(lane: Lane, op: Permute) -> None:
    """Of whole rows: columns come from anywhere."""
    if not by_rows(lane, op):
        return entire(lane, op)
    lane.keep(op.order)
    return lane.add(op)


def norm(lane: Lane, op: Norm) -> None:
    """By columns where each head is normed by itself; a norm over all of them wants them all, and gives a view back.
    One that views read is whole."""
    if by_rows(lane, op):
        for name in (op.weight, op.bias):
            if name:
                lane.keep(name)
        return lane.add(op)
    shares = lane.shares.get(op.x)
    if not shares or op.residual or op.out in lane.views:
        return entire(lane, op)
    names = {name: lane.keep(name) for name in (op.weight, op.bias) if name}
    if op.group:
        return columns(lane, op.rename(names), shares)
    lane.wholes[op.out] = f"{op.out}.whole"
    lane.add(op.rename({op.x: lane.whole(op.x), op.out: lane.wholes[op.out]}))
    ((own,),) = (shares[lane.lane],)
    view = (lane.wholes[op.out], own.start)
    lane.tensors[op.out] = replace(lane.p.tensors[op.out], shape=(lane.p.tensors[op.x].shape[0], len(own)), view=view)
    lane.shares[op.out] = shares
    return None


def experts(lane: Lane, op: Experts) -> None:
    """Whole experts, `ep` ways, and of each the inner columns, `tp` ways: a part of the sum, and an all_reduce."""
    layout, at = lane.layout, divmod(lane.lane, lane.layout.tp)
    count, inner, _ = map(int, lane.p.tensors[op.gate].shape)
    if count < layout.ep or inner < layout.tp:
        raise LayoutError(f"{op.site} has {count} experts of {inner} columns, too few for layout {layout}")
    if op.down_order and layout.tp > 1:
        raise LayoutError(
            f"{op.site}: the columns of each down stand in an order of its own, which tp={layout.tp} would tear; "
            "share out whole experts, by ep"
        )
    own, part = cut(count, layout.ep, ())[at[0]], cut_columns(lane.p.tensors[op.down], layout.tp)[at[1]]
    stacks = {op.gate: 1, op.up: 1, op.down: 2, op.gate_bias: 1, op.up_bias: 1}
    for name, axis in stacks.items():
        if name:
            lane.slab(name, own, part, axis)
    for name in (op.order, op.down_order):
        if name:
            lane.slab(name, own)
    if op.down_bias and at[1] == 0:  # it is added once an expert
        lane.slab(op.down_bias, own)
    share = replace(
        op,
        x=lane.whole(op.x),
        weights=lane.whole(op.weights),
        ids=lane.whole(op.ids),
        down_bias=op.down_bias if at[1] == 0 else None,
        residual=lane.whole(op.residual) if op.residual and lane.lane == 0 else None,
        out=f"{op.out}.part",
        first=own[0].start,
        of=count,
    )
    lane.add(share)
    lane.total(op.site, share.out, op.out, tuple(range(layout.lanes)))


def head_linear(lane: Lane, op: HeadLinear) -> None:
    """By heads."""
    shares, heads = lane.shares.get(op.x), int(lane.p.tensors[op.w].shape[0])
    if not shares:
        return entire(lane, op)
    own = [heads_of(share, int(lane.p.tensors[op.x].shape[1]) // heads) for share in shares]
    width = int(lane.p.tensors[op.out].shape[1]) // heads
    return columns(lane, replace(op, w=lane.own(op, op.w, own, axis=0)), scaled(own, width))


def rope(lane: Lane, op: Rope) -> None:
    shares = lane.shares.get(op.x)
    return columns(lane, op, shares) if shares else entire(lane, op)


def kv_write(lane: Lane, op: KvWrite) -> None:
    """Keys and values as their caches are: cut by heads, or whole."""
    names = {x: x if c in lane.plan else lane.whole(x) for x, c in ((op.k, op.k_cache), (op.v, op.v_cache))}
    lane.add(op.rename(names))


def attend(lane: Lane, op: Attend) -> None:
    """By heads."""
    shares, whole = lane.shares.get(op.q), lane.p.tensors
    if not shares:
        return entire(lane, op)
    head_dim, v_dim = int(whole[op.q].shape[1]) // op.heads, int(whole[op.out].shape[1]) // op.heads
    heads = [heads_of(share, head_dim) for share in shares]
    sinks = lane.own(op, op.sinks, heads, axis=0) if op.sinks else None
    return columns(lane, replace(op, heads=width_of(heads[lane.lane]), sinks=sinks), scaled(heads, v_dim))


RULES: dict[type[Op], Callable[[Lane, Any], None]] = {
    Attend: attend,
    Embed: embed,
    Experts: experts,
    HeadLinear: head_linear,
    KvWrite: kv_write,
    Linear: linear,
    Map: elementwise,
    Norm: norm,
    Permute: permute,
    Rope: rope,
    Route: entire,
    Sample: entire,
    Select: entire,
}
