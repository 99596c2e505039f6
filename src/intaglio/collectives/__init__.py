"""Collectives: algorithms written once as schedules of copy, send, recv and reduce steps; topologies; a clock.

A schedule is plain data. It is run with values by the interpreter, checked by rules, and timed over a topology.
"""

from intaglio.collectives.algorithms import algorithms, schedule
from intaglio.collectives.clock import choose, seconds
from intaglio.collectives.interpreter import all_gather, all_reduce, all_to_all, execute, reduce_scatter
from intaglio.collectives.rules import check, order
from intaglio.collectives.schedule import COLLECTIVES, Schedule, ScheduleError, Slot, Step, Writer
from intaglio.collectives.topology import Link, Topology, TopologyError, bipartite, full, nodes, ring, switch, torus

__all__ = [
    "COLLECTIVES", "Link", "Schedule", "ScheduleError", "Slot", "Step", "Topology", "TopologyError",
    "Writer", "algorithms", "all_gather", "all_reduce", "all_to_all", "bipartite", "check", "choose", "execute", "full",
    "nodes", "order", "reduce_scatter", "ring", "schedule", "seconds", "switch", "torus",
]  # fmt: skip
