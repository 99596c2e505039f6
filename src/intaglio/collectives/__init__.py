"""Collectives: algorithms as schedules of copy, send, recv and reduce steps, and models of topologies.

A schedule is plain data. interpreter.py executes it with values, rules.py verifies it, clock.py estimates its time on a
topology.
"""

from intaglio.collectives.algorithms import algorithms, schedule
from intaglio.collectives.clock import choose, seconds
from intaglio.collectives.interpreter import all_gather, all_reduce, all_to_all, execute, reduce_scatter
from intaglio.collectives.rules import check, order
from intaglio.collectives.schedule import COLLECTIVES, Schedule, ScheduleBuilder, ScheduleError, Slot, Step
from intaglio.collectives.topology import Link, Topology, TopologyError, bipartite, full, nodes, ring, switch, torus

__all__ = [
    "COLLECTIVES", "Link", "Schedule", "ScheduleBuilder", "ScheduleError", "Slot", "Step", "Topology", "TopologyError",
    "algorithms", "all_gather", "all_reduce", "all_to_all", "bipartite", "check", "choose", "execute", "full", "nodes",
    "order", "reduce_scatter", "ring", "schedule", "seconds", "switch", "torus",
]  # fmt: skip
