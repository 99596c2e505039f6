"""What an engine counts. Names and formats of metrics are the server's affair."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Counts:
    """Totals since the engine was made; they only grow."""

    steps: int = 0
    received: int = 0  # choices asked for: refused + admitted
    refused: Counter[str] = field(default_factory=Counter)  # choices by reason: full, late, draining, failed, invalid
    admitted: int = 0  # choices taken in
    finished: Counter[str] = field(default_factory=Counter)  # choices by finish_reason
    faults: Counter[str] = field(default_factory=Counter)  # by kind: request, step (launches that failed), worker
    restarts: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0  # of choices started
    cached_tokens: int = 0  # of them, found in the prefix cache: hits
    computed_tokens: int = 0  # token rows taken through the device, drafts and recomputation included
    output_tokens: int = 0
    drafts: int = 0  # rounds of speculation
    draft_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True)
class Gauges:
    """How things stand now."""

    running: int
    waiting: int
    waiting_tokens: int
    blocks: int
    blocks_held: int
    blocks_cached: int  # held by nobody, their content kept for whoever begins alike
    draining: bool
    failed: str | None

    @property
    def kv_usage(self) -> float:
        """The share of blocks that somebody holds."""
        return self.blocks_held / self.blocks


@dataclass(frozen=True)
class StepRecord:
    """The last step that ran: when, how long by the engine's clock, and what was in it."""

    number: int
    began: float
    seconds: float
    prefill_tokens: int
    decode_tokens: int  # drafts included
    sequences: int
    output_tokens: int
