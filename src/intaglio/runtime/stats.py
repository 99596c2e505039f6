"""Counters and gauges of an engine, and the record of one step. The server turns them into metrics."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Counts:
    """Totals of an engine since its creation.

    Attributes:
        steps: steps run.
        received: choices received, whether refused or admitted.
        refused: choices refused, by reason: full, late, draining, failed, invalid.
        admitted: choices admitted.
        finished: choices finished, by finish_reason.
        suspended: choices taken out by suspend(); if they come back, they are received and admitted again.
        faults: faults by kind: request, step (failed launches), worker (lost devices).
        restarts: replacements of the device.
        preemptions: preemptions of sequences.
        prompt_tokens: prompt tokens of started choices.
        cached_tokens: prompt tokens of started choices that were found in the prefix cache.
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

    Attributes:
        running, waiting: numbers of sequences.
        waiting_tokens: tokens of the waiting sequences.
        blocks, blocks_held: K/V blocks in all, and those that sequences hold.
        blocks_cached: evictable K/V blocks: held by no sequence, kept in the prefix cache.
        slots, slots_held: slots of recurrent state in all, and those that sequences hold; 0 for a model without.
        checkpoints: evictable slots: held by no sequence, kept for the prefix cache.
        draining: True if no request is admitted.
        failed: why the engine cannot serve; None while it can.
        window_blocks: K/V blocks in all of the separate pool for layers with a sliding window; 0 without such a pool.
        window_blocks_reserved: window blocks that are promised to running sequences.
        window_blocks_held: window blocks that hold K/V of sequences now.
    """

    running: int
    waiting: int
    waiting_tokens: int
    blocks: int
    blocks_held: int
    blocks_cached: int
    slots: int
    slots_held: int
    checkpoints: int
    draining: bool
    failed: str | None
    window_blocks: int = 0
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
    """One step: its time and its numbers of tokens and sequences.

    Attributes:
        number: number of the step, from 1.
        began, seconds: start time and duration, in seconds by the engine's clock.
        prefill_tokens: prompt tokens computed.
        decode_tokens: token rows of decodes, drafts included.
        sequences: number of sequences in the step.
        output_tokens: tokens sampled and kept.
    """

    number: int
    began: float
    seconds: float
    prefill_tokens: int
    decode_tokens: int
    sequences: int
    output_tokens: int
