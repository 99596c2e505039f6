"""Sharding: from one Program, as ported, to the Programs of all ranks.

plan.py decides which results are split among lanes (a lane is one tensor- or expert-parallel rank of a pipeline stage).
The rule of each op (rules/) rewrites the op on each lane and adds collectives where a split operand is needed whole.
compiler/stages.py then cuts each lane into pipeline stages.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace

from intaglio import formats
from intaglio.compiler.layout import Layout, LayoutError
from intaglio.compiler.shard import rules  # noqa: F401 (importing it registers the rules)
from intaglio.compiler.shard.lane import Lane, sharding_rule
from intaglio.compiler.shard.plan import make_plan
from intaglio.compiler.shard.shares import Share, joined
from intaglio.compiler.stages import cut_stages
from intaglio.ops import Experts
from intaglio.program import Program

__all__ = ["Lane", "Share", "shard", "sharding_rule"]


def shard(
    program: Program, layout: str | Layout, wire: str = "f32", coded: Set[str] | None = None
) -> tuple[Program, ...]:
    """Divide a Program among the ranks of a layout. Returns the Programs of all ranks, as a tuple in order of rank.

    Attention is divided by heads; K/V heads are copied if there are fewer of them than tensor-parallel ranks. An MLP is
    divided by its intermediate columns, the output head by vocabulary, and the embedding by its columns.

    Args:
        program: the Program of the whole model, with no ops fused.
        layout: how ranks share the model.
        wire: number format to which values are rounded before they travel between ranks.
        coded: names of the quantised weights whose codes come from a checkpoint. They keep these codes. Where a rank's
            part would split a group (values that share a scale), their groups are made smaller. None: all quantised
            weights.

    Raises LayoutError in these cases: heads, experts or layers cannot be divided this way; an op has no sharding rule;
    a group would be split; the layout's `sums` (see Layout) is above its `tp`, and the Program adds results of routed
    experts.
    """
    layout = Layout.parse(layout) if isinstance(layout, str) else layout
    sites = {op.site for op in program.ops if isinstance(op, Experts)}
    if layout.placement and (unknown := sorted(layout.placement.layers.keys() - sites)):
        found = f"the sites of its experts are {', '.join(sorted(sites))}" if sites else "it has no experts"
        raise LayoutError(f"the placement names {unknown[0]}, which {program.name} lacks; {found}")
    lanes = [program]
    if max(layout.lanes, layout.sums) > 1:
        finer = make_plan(program, replace(layout, tp=max(layout.tp, layout.sums))) if layout.lanes > 1 else {}
        plan = {name: joined(shares, layout.lanes) for name, shares in finer.items()}
        coded = {t.name for t in program.of_role("weight") if formats.get(t.format).grouped} if coded is None else coded
        parts = _parts(program, layout.sums, coded) if layout.sums > layout.tp else {}
        lanes = [Lane(program, plan, layout, i, wire, coded, parts).run() for i in range(layout.lanes)]
    places = [(stage, lane) for stage in range(layout.pp) for lane in range(layout.lanes)]
    return tuple(cut_stages(lanes[lane], layout, lane, stage, wire) for stage, lane in places)


def _parts(program: Program, tp: int, coded: Set[str]) -> dict[str, list[Share]]:
    """Find the ops whose results with `tp` lanes may differ in bits from those with one lane.

    Returns {site of the op: list with the columns of each lane}. There are two kinds of these ops:

    - A linear, if each lane computes a partial sum over its columns of x. The partial sums are added in the order of
      the lanes in the list.
    - An embed, if each lane quantises its columns of the table.

    coded: names of the weights whose codes come from a checkpoint.

    Raises LayoutError if the lanes also divide sums of routed experts, or if the Program cannot be divided among `tp`
    lanes.
    """
    layout = Layout(tp)
    lane = Lane(program, make_plan(program, layout), layout, 0, "f32", coded)
    lane.run()
    if other := next((op.site for op in program.ops if op.site in lane.totals - lane.divided.keys()), None):
        raise LayoutError(
            f"{other}: its sums cannot be computed in the parts of tp{tp} on fewer ranks, because they are those of "
            f"routed experts; use tp{tp} itself"
        )
    return lane.divided
