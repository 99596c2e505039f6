"""Closed forms of collectives over several nodes, which are joined by one adapter a chip.

A collective runs in stages: inside each node over the chips' links, and between chips with the same number in all nodes
over their adapters, each with its own part of the tensor (a rail). NCCL and serving engines do so too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import ceil, log2

from intaglio.chips import ChipError, ChipSpec, Target
from intaglio.silicon.timing import Timing

Inside = Callable[[Target, str, int, int], Timing]  # (target, collective, chips, bytes) -> its time in one node
STAGES = {  # collective -> (stages before the network of nodes, stages after it)
    "all_reduce": (("reduce_scatter",), ("all_gather",)),
    "all_gather": ((), ("all_gather",)),
    "reduce_scatter": (("reduce_scatter",), ()),
    "all_to_all": (("all_to_all",), ()),
}


def nodes_of(chip: ChipSpec, chips: int, what: str) -> int:
    """Returns the number of nodes that `chips` chips fill: chips / chip.links.max_chips.

    Raises ChipError if the chip has no network between nodes (links.node_bytes_per_s is 0), or if `chips` is not a
    multiple of links.max_chips, the number of chips in a node.

    what: name of the collective, for error messages.
    """
    most = chip.links.max_chips
    if not chip.links.node_bytes_per_s:
        raise ChipError(
            f"{what} over {chips} chips: one network of {chip.name} connects at most {most}, and none joins several "
            "(links.node_bytes_per_s is 0)"
        )
    if chips % most:
        raise ChipError(f"{what} over {chips} chips of {chip.name}: nodes have {most} chips; use a multiple of {most}")
    return chips // most


def nodes_timing(target: Target, op: str, chips: int, moved: int, inside: Inside) -> Timing:
    """Returns the Timing of a collective over `chips` chips that fill several nodes.

    It is the sum of collectives inside each node (see STAGES) and of one exchange between the nodes. With k nodes of n
    chips, each chip sends over the network between nodes:

    - all_gather, reduce_scatter: (k - 1) / k * moved / n bytes, in ceil(log2(k)) steps (recursive doubling, or Bruck's
      algorithm);
    - all_reduce: twice these bytes, in twice as many steps;
    - all_to_all: (k - 1) / k * moved bytes, in 1 step.

    moved: bytes of the whole tensor. inside: function called as inside(target, collective, chips, bytes), which returns
    the Timing of a collective in one node.

    Raises ChipError for a collective that cannot span nodes (send), and if the chips do not fill their nodes, see
    nodes_of().
    """
    chip = target.chip
    if op not in STAGES:
        raise ChipError(f"{op} over {chips} chips: only {', '.join(STAGES)} run over several nodes")
    k, size = nodes_of(chip, chips, op), chip.links.max_chips
    before, after = STAGES[op]
    stages = [inside(target, kind, size, moved) for kind in (*before, *after)] if size > 1 else []
    part = moved if op == "all_to_all" else moved / size
    times = 2 if op == "all_reduce" else 1
    steps = 1 if op == "all_to_all" else times * ceil(log2(k))
    sent = times * part * (k - 1) / k
    rate = chip.links.node_bytes_per_s * target.library.link_efficiency
    between = Timing(
        steps * chip.links.node_latency_s + sent / rate, {"NET": sent / chip.links.node_bytes_per_s}, link_bytes=sent,
        choice=f"{k} nodes, {steps} steps between them", steps=steps,
    )  # fmt: skip
    whole = sum(stages, between)
    # One kernel runs all stages: its ranks meet once. Nodes of one chip have no stage that counts it.
    return replace(whole, seconds=whole.seconds + (1 - len(stages)) * target.library.barrier_s)
