"""The sharding rule of the op Experts, and which experts each expert-parallel group holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from intaglio.compiler.layout import Layout, LayoutError
from intaglio.compiler.shard.lane import Lane, sharding_rule
from intaglio.compiler.shard.shares import Share, cut, cut_columns
from intaglio.ops import Experts
from intaglio.program.expert_placement import ExpertPlacement, PlacementError, turns


@sharding_rule(Experts)
def experts(lane: Lane, op: Experts) -> None:
    """Append to a rank's Program an Experts op for the rank's part of the experts, and an all_reduce of the results.

    The ranks with the same layers form ep groups of tp ranks. Experts are divided among the groups, and the
    intermediate columns of each expert among the ranks of a group. If the layout has redundant experts, its placement
    says which group has which experts. The all_reduce then adds the results of a token's experts in the order in which
    the token chose them, so that results do not depend on the placement. Returns nothing.

    Raises LayoutError for fewer experts than ep, for fewer columns than tp, for a placement that does not fit, and for
    tp above 1 if the down matrices have a column order (act-order), which tp would split.
    """
    layout, at = lane.layout, divmod(lane.lane, lane.layout.tp)
    count, inner, _ = map(int, lane.p.tensors[op.up].shape)
    if count < layout.ep or inner < layout.tp:
        raise LayoutError(f"{op.site} has {count} experts of {inner} columns, too few for layout {layout}")
    if op.down_order and layout.tp > 1:
        raise LayoutError(
            f"{op.site}: the down matrix of each expert has its own column order, which tp={layout.tp} would split; "
            "divide whole experts instead, with ep"
        )
    placed = experts_of(op.site, layout, count)
    held = placed[at[0]] if placed else ()
    own = runs_of(held) if placed else cut(count, layout.ep, ())[at[0]]
    parts = cut_columns(lane.p.tensors[op.down], layout.tp)
    stacks = {op.gate: 1, op.up: 1, op.down: 2, op.gate_bias: 1, op.up_bias: 1}
    for name, axis in stacks.items():
        if name:
            lane.slab(name, own, parts, at[1], axis)
    for name in (op.order, op.down_order):
        if name:
            lane.slab(name, own)
    if op.down_bias and at[1] == 0:  # it is added once for each expert
        lane.slab(op.down_bias, own)
    share = replace(
        op,
        x=lane.whole(op.x),
        weights=lane.whole(op.weights),
        ids=lane.whole(op.ids),
        down_bias=op.down_bias if at[1] == 0 else None,
        residual=lane.whole(op.residual) if op.residual and lane.lane == 0 else None,
        out=f"{op.out}.part",
        of=count,
        **(turns(placed, at[0]) if placed else {"first": own[0].start}),
        slots=(int(lane.p.tensors[op.ids].shape[1]) + (op.residual is not None)) * bool(placed),
    )
    lane.add(share)
    lane.total(op.site, share.out, op.out, tuple(range(layout.lanes)), max(1, share.slots))


def experts_of(site: str, layout: Layout, count: int) -> tuple[tuple[int, ...], ...]:
    """The experts of each expert-parallel group: a tuple with a tuple of expert numbers per group.

    - If layout.placement has the op's site (its name in the model), it gives the numbers.
    - Otherwise, if the layout has redundant experts or a placement, ExpertPlacement.even() gives the numbers.
    - Otherwise the result is (): each group holds consecutive experts.

    site: the op's site. count: number of experts of the op. Raises LayoutError for a placement that does not fit
    `count` and the layout.
    """
    if layout.redundant is None and layout.placement is None:
        return ()
    try:
        even = ExpertPlacement.even([site], count, layout.ep, layout.redundant or 0)
        placed = (layout.placement or even).layers.get(site, even.layers[site])
        ExpertPlacement({site: placed}).check(count, layout.ep)
    except PlacementError as e:
        raise LayoutError(f"layout {layout}: {e}") from None
    if len(placed[0]) != len(even.layers[site][0]):
        raise LayoutError(
            f"layout {layout}: {site} places {len(placed[0])} experts on each rank; with {count} experts and "
            f"{layout.redundant or 0} redundant ones wanted are {len(even.layers[site][0])}"
        )
    return placed


def runs_of(numbers: Sequence[int]) -> Share:
    """The ascending `numbers` as a Share: a tuple with a range for each run of consecutive numbers."""
    runs: list[range] = []
    for n in numbers:
        if runs and runs[-1].stop == n:
            runs[-1] = range(runs[-1].start, n + 1)
        else:
            runs.append(range(n, n + 1))
    return tuple(runs)
