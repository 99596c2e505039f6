"""The runtime: requests, the pool of KV blocks, the scheduler and the engine that steps them through a device."""

from intaglio.runtime.engine import Engine
from intaglio.runtime.invariants import check_invariants
from intaglio.runtime.kv import BlockPool, KvError
from intaglio.runtime.replay import JournalError, Replayed, replay
from intaglio.runtime.request import (
    Event,
    Fault,
    Grammar,
    Matcher,
    ParamsError,
    Refused,
    Request,
    RequestError,
    SamplingParams,
    Scored,
    Usage,
)
from intaglio.runtime.scheduler import Piece, Scheduler
from intaglio.runtime.sequence import Sequence
from intaglio.runtime.stats import Counts, Gauges, StepRecord

__all__ = [
    "BlockPool", "Counts", "Engine", "Event", "Fault", "Gauges", "Grammar", "JournalError", "KvError", "Matcher",
    "ParamsError", "Piece", "Refused", "Replayed", "Request", "RequestError", "SamplingParams", "Scheduler", "Scored",
    "Sequence", "StepRecord", "Usage", "check_invariants", "replay",
]  # fmt: skip
