"""Lane: builds the Program of one lane of a sharded Program, by sharding rules, which are registered here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from itertools import accumulate
from math import gcd
from typing import Any

from intaglio import formats
from intaglio.compiler.layout import Layout, LayoutError
from intaglio.compiler.shard.shares import Plan, Share, is_partition, partners, width_of
from intaglio.ops import AllGather, AllReduce, Map, Op, ReduceScatter, Tensor
from intaglio.program import Program
from intaglio.program.source import is_run, narrowed, part_sizes


class Lane:
    """Builds the Program of one lane (one rank of a pipeline stage).

    A stage has tp * ep lanes, which all have the same layers. run() calls the sharding rule of each op. A rule is a
    function that adds the lane's part of the op by calling the other methods. A lane's share of a tensor is the part
    that the lane has: runs of columns, heads or experts.

    Attributes:
        p: the whole Program.
        plan: {name of a result that is divided: the share of each lane}; see make_plan().
        layout: degrees of parallelism.
        lane: number of this lane.
        wire: number format to which values are rounded before they travel between ranks.
        coded: names of the weights whose codes come from a checkpoint.
        parts: {site of an op: columns of each part}, for the ops that are computed in parts to give the bits of a
            larger tp (Layout.sums). A linear has one partial sum for each part of the columns of x. An embed quantises
            its table part by part.
        divided: {site of an op: columns of each lane}, for linears whose partial sums are divided among the lanes, and
            for embeds whose table each lane quantises in part. Filled by the sharding rules.
        totals: sites of all ops whose results are summed over lanes.
        shares: {name of a result that is divided by columns: the share of each lane}, for the results added so far.
        split: names of the results of which each lane has only a run of token rows (sequence parallelism).
        wholes: {name of a divided result: name of its gathered copy, which is whole}.
        views: {name of a tensor: list of its views in the whole Program}.
    """

    def __init__(
        self, p: Program, plan: Plan, layout: Layout, lane: int, wire: str, coded: Set[str] = frozenset(),
        parts: Mapping[str, list[Share]] | None = None,
    ) -> None:  # fmt: skip
        self.p, self.plan, self.layout, self.lane, self.wire, self.coded = p, plan, layout, lane, wire, coded
        self.parts, self.divided, self.totals = parts or {}, dict[str, list[Share]](), set[str]()
        self.ops: list[Op] = []
        self.tensors: dict[str, Tensor] = {t.name: t for t in p.tensors.values() if t.role in ("input", "const")}
        self.shares: dict[str, list[Share]] = {}
        self.views: dict[str, list[Tensor]] = {}  # by their base
        for t in p.tensors.values():
            if t.view:
                self.views.setdefault(t.view[0], []).append(t)
        self.wholes: dict[str, str] = {}  # by split result: the name of its gathered copy
        self.split: set[str] = set()

    def run(self) -> Program:
        """Build the Program of this lane (one rank), by applying the sharding rule of each op. Returns the Program.

        If there is only one lane, only the ops in `parts` change. Raises LayoutError for an op without a rule, and for
        an op or a weight that the layout cannot divide.
        """
        if self.layout.lanes == 1:
            self.tensors = dict(self.p.tensors)
            for op in self.p.ops:
                rule_of(op)(self, op) if op.site in self.parts else self.ops.append(op)
            return self.p.with_ops(self.ops, self.tensors)
        for t in self.p.of_role("state"):
            if t.shape[0] == "P":  # the rules of ops with recurrent state keep theirs
                self.keep(t.name, self.plan.get(t.name), axis=2)
        for op in self.p.ops:
            rule_of(op)(self, op)
        return self.p.with_ops(self.ops, self.tensors)

    def add(self, op: Op, shares: list[Share] | None = None) -> None:
        """Append an op to the Program of this lane (one rank), with its results and their views. Returns nothing.

        shares: None if this lane computes all columns of the results. Otherwise the op has one result, and the list
        has, for each lane, the columns of the result that the lane computes.
        """
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
        """Add a view of the whole Program to the Program of this lane (one rank). Returns nothing.

        A view is a range of columns of another tensor, its base. If the base is divided by columns, the view is
        narrowed to the columns that this lane has; its width is 0 if the lane has none of them. If the base is divided
        by token rows, the view has the lane's rows too. t: the view.
        """
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

    def keep(
        self, name: str, shares: list[Share] | None = None, axis: int = 0, as_: str = "", part: int | None = None
    ) -> str:
        """Add a tensor of the whole Program, or a part of it, to this lane's Program. Returns its name there.

        Args:
            name: name of the tensor in the whole Program: a weight, a constant or a state.
            shares: for each lane, the indices along `axis` of its part; this lane's part is added. None: the whole
                tensor is added.
            axis: the axis that is divided.
            as_: name of the tensor in this lane's Program; "": the same name.
            part: index of the item of `shares` to add in place of this lane's; None: this lane's.

        Raises LayoutError if the cut would split a group of a quantised weight.
        """
        t = self.p.tensors[name]
        if shares:
            t = self.fitted(t, shares, axis)
            share, length = shares[self.lane if part is None else part], int(t.shape[axis])
            shape = (*t.shape[:axis], width_of(share), *t.shape[axis + 1 :])
            if t.role == "const":
                t = replace(t, shape=shape, values=tuple(t.values[i] for r in share for i in r))
            else:
                t = replace(t, shape=shape, source=cut_source(t, share, axis, length, axis > 0))
        self.tensors[as_ or name] = replace(t, name=as_ or name)
        return as_ or name

    def tears(self, name: str, shares: Sequence[Share]) -> bool:
        """True if a cut between lanes (ranks) splits a group of a quantised weight.

        Then each lane quantises its part anew. A group is a run of values that share a scale. The result is False for a
        weight whose codes come from a checkpoint, because it keeps the checkpoint's scales. name: the weight. shares:
        for each lane (rank), its columns.
        """
        t = self.p.tensors[name]
        fmt, width = formats.get(t.format), int(t.shape[-1])
        ends = {end for share in shares for r in share for end in (r.start, r.stop)} - {0, width}
        return fmt.grouped and name not in self.coded and any(fmt.group < 0 or end % fmt.block for end in ends)

    def slab(self, name: str, stacks: Share, parts: Sequence[Share] = (), part: int = 0, axis: int = 0) -> None:
        """Add part of a stack of matrices [E, ...], such as the weights of experts, to this lane's Program.

        The new tensor has the name of the stack. Returns nothing.

        Args:
            name: name of the stack.
            stacks: numbers of the matrices that this lane takes; empty: all.
            parts: how each matrix is divided along `axis`: for each part, its rows or columns. Empty: matrices are
                whole.
            part: index in `parts` of the part that this lane takes.
            axis: the axis of the stack along which its matrices are divided: 1 for rows, 2 for columns. Not used if
                `parts` is empty.

        Raises LayoutError if a cut would split a group of a quantised weight.
        """
        t = self.p.tensors[name]
        t = self.fitted(t, parts, axis) if parts else t
        for which, share in ((0, stacks), (axis, parts[part] if parts else ())):
            if share:
                shape = (*t.shape[:which], width_of(share), *t.shape[which + 1 :])
                t = replace(t, shape=shape, source=cut_source(t, share, which, int(t.shape[which]), which > 0))
        self.tensors[name] = t

    def fitted(self, t: Tensor, shares: Sequence[Share], axis: int) -> Tensor:
        """Returns the weight `t`, with smaller groups if a cut along `axis` would split a group.

        A group is a run of values that share a scale. Only a weight in self.coded, whose codes come from a checkpoint,
        is changed, and only if the cut splits one of its groups: with smaller groups it keeps the checkpoint's codes,
        while a split group would have to be quantised anew. In all other cases `t` is returned unchanged.

        shares: for each lane, its indices along `axis`. Raises LayoutError if the weight's format allows no group size
        that the cut does not split.
        """
        fmt = formats.get(t.format)
        if t.name not in self.coded or axis != len(t.shape) - 1 or fmt.group <= 0:
            return t
        length = int(t.shape[axis])
        ends = [end for share in shares for r in share for end in (r.start, r.stop) if end != length]
        group = gcd(fmt.block, *ends)
        if group == fmt.block:
            return t
        if fmt.block != fmt.group or group % 32 or f"g{fmt.group}" not in t.format:
            torn = next(end for end in ends if end % fmt.block)
            fits = [n for n in range(1, len(shares)) if length % (32 * n) == 0]
            raise LayoutError(
                f"weight {t.name} is {t.type} in the checkpoint, and a cut at column {torn} would split a group of "
                f"{fmt.block}, whose codes share a scale; "
                f"{f'use tp={fits[-1]}' if fits else 'use pp'}, or weights int8 or int4, which quantise it anew"
            )
        source = tuple(f"{s}|g{group}" for s in t.source)
        return replace(t, format=t.format.replace(f"g{fmt.group}", f"g{group}"), source=source)

    def own(self, op: Op, name: str, shares: list[Share], axis: int) -> str:
        """Add this lane's part of a weight of `op` to the lane's Program. Returns the name of the part in that Program.

        If only this op reads the weight, the part is called `name`. If several ops read it, they may need different
        parts, so the name of the part begins with the op's site. shares: for each lane (rank), its indices along
        `axis`. Raises LayoutError if the cut would split a group of a quantised weight.
        """
        own = f"{op.site}.{name.rpartition('.')[2]}.{('rows', 'columns')[axis]}"
        return self.keep(name, shares, axis, own if len(self.p.uses(name)) > 1 else "")

    def whole(self, name: str) -> str:
        """Make the whole tensor `name` available in this lane's Program. Returns the name of the whole tensor there.

        There are three cases:

        - A tensor that is divided among the lanes: an all_gather into the new tensor NAME.whole is added, at the first
          call only. The result is NAME.whole.
        - A weight: it is added to this lane's Program. The result is `name`.
        - Any other tensor is whole on every lane already. The result is `name`.
        """
        t = self.p.tensors[name]
        if t.role == "weight":
            return self.keep(name)
        if name in self.split and name not in self.wholes:
            self.wholes[name] = f"{name}.whole"
            site, out, group = f"{name}.all_gather", self.wholes[name], tuple(range(self.layout.lanes))
            width = int(t.shape[1])
            self.add(AllGather(site=site, x=name, out=out, group=group, width=width, tokens=True, wire=self.wire))
        if name in self.shares and name not in self.wholes:
            self.wholes[name] = f"{name}.whole"
            self.gather(f"{name}.all_gather", name, self.wholes[name], self.shares[name], int(t.shape[1]))
        return self.wholes.get(name, name)

    def total(self, site: str, x: str, out: str, group: tuple[int, ...], slots: int = 1) -> None:
        """Append a collective that sums the partial results `x` of the lanes in `group` into `out`. Returns nothing.

        The collective is an all_reduce. With sequence parallelism it is a reduce_scatter, which gives this lane its own
        token rows of the sum, if all lanes are in `group` and `out` is an intermediate result with a row per token.

        Args:
            site: site (name) of the op whose result is summed; the collective's site begins with it.
            x: name of the partial result.
            out: name of the sum.
            group: numbers of the lanes.
            slots: number of blocks of columns in `x`, each as wide as `out`. After the sum over lanes, the all_reduce
                adds these blocks to each other. 1: `x` is as wide as `out`.
        """
        t = self.p.tensors[out]
        self.totals.add(site)
        if self.layout.sp and t.shape[0] == "T" and t.role == "temp" and len(group) == self.layout.lanes:
            self.add(
                ReduceScatter(site=f"{site}.reduce_scatter", x=x, out=out, group=group, share=self.lane, wire=self.wire)
            )
        else:
            self.add(AllReduce(site=f"{site}.all_reduce", x=x, out=out, group=group, wire=self.wire, slots=slots))

    def gather(self, site: str, x: str, out: str, shares: Sequence[Share], width: int) -> None:
        """Append an all_gather that joins the columns of `x` from all lanes into `out`. Returns nothing.

        Args:
            site: site (name) of the new op.
            x: name of the tensor of which each lane (rank) has some columns.
            out: name of the joined tensor.
            shares: for each lane, the columns that it has.
            width: number of columns of `out`.
        """
        group = partners(shares, self.lane)
        assert is_partition(shares, width), f"{x} cannot be gathered from {shares}"
        self.add(AllGather(site=site, x=x, out=out, group=group, width=width, wire=self.wire))

    def add_whole(self, op: Op) -> None:
        """Append an op to the Program of this lane (one rank) so that the lane computes all of it. Returns nothing.

        Operands that are divided among the lanes are gathered first.
        """
        self.add(op.rename({name: self.whole(name) for name in op.inputs}))

    def add_split(self, op: Op, shares: list[Share]) -> None:
        """Append an op of which this lane (one rank) computes some columns of the result. Returns nothing.

        If the result is an output of the Program, an all_gather of the whole result follows. shares: for each lane, the
        columns that it computes.
        """
        if self.p.tensors[op.outputs[0]].role == "output":
            self.add_gathered(op, shares)
        else:
            self.add(op, shares)

    def add_gathered(self, op: Op, shares: list[Share]) -> None:
        """Append an op of which this lane computes some columns of the result, then an all_gather of the whole result.

        The gathered result has the name of the op's result. The lane's columns have this name with ".part" appended.
        Returns nothing. shares: for each lane (rank), the columns that it computes.
        """
        (out,) = op.outputs
        self.add(op.rename({out: f"{out}.part"}), shares)
        self.gather(f"{op.site}.all_gather", f"{out}.part", out, shares, int(self.p.tensors[out].shape[1]))

    def has_token_rows(self, op: Op) -> bool:
        """True if this lane (one rank) can compute the op for its own token rows alone (sequence parallelism).

        It can if all operands except weights are divided by token rows, and the result is no output of the Program.
        """
        rows = [name for name in op.inputs if self.p.tensors[name].role != "weight"]
        return set(rows) <= self.split and self.p.tensors[op.outputs[0]].role == "temp"


Rule = Callable[[Lane, Any], None]  # rewrites one op of the whole Program on a lane
RULES: dict[type[Op], Rule] = {}


def sharding_rule(*types: type[Op]) -> Callable[[Rule], Rule]:
    """A decorator that registers a function (lane, op) as the sharding rule of the given op classes.

    The decorator returns the function unchanged. A later registration for a class replaces the earlier one.
    """

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(types, rule))
        return rule

    return register


def rule_of(op: Op) -> Rule:
    """The sharding rule of an op, as a function (lane, op).

    The function adds the lane's part of the op to the Program of the lane (one rank). An elementwise op whose class has
    no rule has the rule of Map, if all its operands are activations. Raises LayoutError for any other op without a
    rule.
    """
    if type(op) not in RULES and op.elementwise and op.inputs == op.operands("rows"):
        return RULES[Map]
    if type(op) not in RULES:
        raise LayoutError(
            f"{op.site}: op {op.kind} has no sharding rule; register one with intaglio.compiler.sharding_rule, or run "
            "the Program unsharded"
        )
    return RULES[type(op)]


def cut_source(t: Tensor, share: Share, axis: int, length: int, each: bool = False) -> tuple[str, ...]:
    """The checkpoint sources of one lane's (rank's) part of the weight `t`, as a tuple of texts.

    A source names a checkpoint tensor and the part of it to read. There is at least one for each run of indices in
    `share`. The tuple is () for a tensor that is not read from a checkpoint, such as a state.

    Args:
        t: the weight.
        share: the runs of indices along `axis` that the lane has.
        axis: the axis that is divided.
        length: size of this axis.
        each: used only for a weight that is joined from several sources. True: the sources are joined along another
            axis, so every source is cut. False: they are joined along `axis`.

    Raises LayoutError if the cut splits a block of the weight's format, or if the weight is joined along `axis` from
    sources that are not ranges of rows (see part_sizes()), which cannot be divided.
    """
    letter = "r" if len(t.shape) > 1 else "c"
    if len(t.source) > 1 and axis == 0 and (rows := part_sizes(t.source, length, letter)):
        ends, found = list(accumulate(rows)), list[str]()
        for source, n, end in zip(t.source, rows, ends, strict=True):
            own = [range(max(r.start - end + n, 0), min(r.stop - end + n, n)) for r in share]
            found += [source if len(r) == n else f"{source}|{letter}{r.start}:{r.stop}/{n}" for r in own if r]
        return tuple(found)
    if len(t.source) > 1 and not each:
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
                f"weight {t.name} is {t.type}, and a cut at column {torn} would split a block of {fmt.block}; "
                "use fewer lanes, or weights int8 or int4"
            )
    way = "crs"[len(t.shape) - 1 - axis]
    return tuple(
        narrowed(source, r) if axis == 0 and is_run(source) else f"{source}|{way}{r.start}:{r.stop}/{length}"
        for source in t.source
        for r in share
    )
