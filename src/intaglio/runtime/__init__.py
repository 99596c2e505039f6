"""The runtime: requests, K/V block pool, scheduler, and the engine that runs them on a device step by step."""

from intaglio.runtime.admission import Admission, EngineLoad
from intaglio.runtime.block_events import BlockEvent, BlockEvents, BlockSnapshot
from intaglio.runtime.block_names import BlockNames, BlockScope
from intaglio.runtime.checkpoints import CHECKPOINT_BLOCKS
from intaglio.runtime.connector import BlockKey, Connector, Load, TierCounts
from intaglio.runtime.engine import Engine
from intaglio.runtime.invariants import check_invariants
from intaglio.runtime.kv import BlockPool, KvError
from intaglio.runtime.latency import StepFit
from intaglio.runtime.record import JournalError, RecordedEngine, Replayed, replay
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
from intaglio.runtime.resumption import Resumption, SuspendedChoice
from intaglio.runtime.scheduler import ScheduledSequence, Scheduler
from intaglio.runtime.sequence import Sequence
from intaglio.runtime.stats import Counts, Gauges, StepRecord

__all__ = [
    "CHECKPOINT_BLOCKS", "Admission", "BlockEvent", "BlockEvents", "BlockKey", "BlockNames", "BlockPool", "BlockScope",
    "BlockSnapshot", "Connector", "Counts", "Engine", "EngineLoad", "Event", "Fault", "Gauges", "Grammar",
    "JournalError", "KvError", "Load", "Matcher", "ParamsError", "RecordedEngine", "Refused", "Replayed", "Request",
    "RequestError", "Resumption", "SamplingParams", "ScheduledSequence", "Scheduler", "Scored", "Sequence",
    "StepFit", "StepRecord", "SuspendedChoice", "TierCounts", "Usage",
    "check_invariants", "replay",
]  # fmt: skip
