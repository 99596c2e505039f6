"""Routing of requests to replicas: cost estimates, prefix index, fair queue. Pure: callers pass the time in."""

from intaglio.router.autoscale import Autoscaler
from intaglio.router.fairness import FairQueue
from intaglio.router.index import BlocksCleared, BlocksRemoved, BlocksStored, CacheEvent, CacheIndex, PromptMemory
from intaglio.router.job import Job, Refusal
from intaglio.router.pace import Pace, paces
from intaglio.router.placement import POLICIES, Estimate, Policy, estimate
from intaglio.router.prefix import CHUNK_BYTES, prefix_keys
from intaglio.router.replica import LoadReport, Replica, ReplicaState, Role
from intaglio.router.router import PREFILL_MIN, Limits, Placement, Router

__all__ = [
    "CHUNK_BYTES", "POLICIES", "PREFILL_MIN", "Autoscaler", "BlocksCleared", "BlocksRemoved",
    "BlocksStored", "CacheEvent", "CacheIndex", "Estimate", "FairQueue", "Job", "Limits", "LoadReport", "Pace",
    "Placement", "Policy", "PromptMemory", "Refusal", "Replica", "ReplicaState", "Role", "Router", "estimate",
    "paces", "prefix_keys",
]  # fmt: skip
