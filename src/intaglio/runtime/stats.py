"""Counters and gauges of an engine. The server turns them into metrics."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Counts:
    """Totals of an engine since its creation.

    Attributes:
        steps: steps run.
        received: choices, refused or admitted.
        refused: choices by reason: full, late, draining, failed, invalid.
        admitted: choices.
        finished: choices by finish_reason.
        suspended: choices taken out by suspend(); if they come back, they are received and admitted again.
        faults: by kind: request, step (failed launches), worker (lost devices).
        restarts: replacements of the device.
        preemptions: of sequences.
        prompt_tokens: prompt tokens of started choices.
        cached_tokens: those of them found in the prefix cache.
        computed_tokens: token rows computed, drafts and recomputation included.
        output_tokens: tokens generated.
        drafts: times a sequence was given draft tokens.
        draft_tokens, accepted_tokens: draft tokens proposed, and those accepted.
    """

    steps: int = 0
    received: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    admitted: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    suspended: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    restarts: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    output_tokens: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True)
class Gauges:
    """Current numbers of an engine: sequences, K/V blocks, slots of recurrent state and window blocks.

    `waiting_tokens`: tokens of the waiting sequences. `blocks`, `slots`: all; `blocks_held`, `slots_held`: by
    sequences; `blocks_cached`, `checkpoints`: evictable, held by none. `draining`: no request is admitted.
    `failed`: why the engine cannot serve, or None. `window_blocks`: blocks of layers with a window that sequences can
    reserve (see Windows); `window_blocks_reserved`, `window_blocks_held`: by sequences.
    """

    running: int
    waiting: int
    waiting_tokens: int
    blocks: int
    blocks_held: int
    blocks_cached: int  # evictable: held by no sequence, kept in the prefix cache
    slots: int  # of recurrent state; 0 for a model without
    slots_held: int
    checkpoints: int  # evictable slots, kept for the prefix cache
    draining: bool
    failed: str | None
    window_blocks: int = 0  # 0 for a model whose layers all have the same blocks
    window_blocks_reserved: int = 0
    window_blocks_held: int = 0

    @property
    def kv_usage(self) -> float:
        """Fraction of the K/V blocks that sequences hold, or of the window blocks that they reserve if that is larger.

        From 0 to 1. At 1 a sequence that needs another block waits or is preempted.
        """
        return max(self.blocks_held / self.blocks, self.window_blocks_reserved / max(1, self.window_blocks))


@dataclass(frozen=True)
class StepRecord:
    """One step: its number, start time and duration in seconds by the engine's clock, and its numbers of tokens.

    `decode_tokens` includes drafts; `sequences`: how many were in the step; `output_tokens`: tokens sampled and kept.
    """

    number: int
    began: float
    seconds: float
    prefill_tokens: int
    decode_tokens: int  # drafts included
    sequences: int
    output_tokens: int
