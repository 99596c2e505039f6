"""Counters and gauges of an engine, and the record of one step. The server turns them into metrics."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Counts:
    """Counts of what an engine has done since its creation: steps, choices, faults, tokens.

    A choice is one output of a request.

    Attributes:
        steps: steps run.
        received: choices received, both refused and admitted.
        refused: choices refused, by reason: "full", "late", "draining", "failed" or "invalid".
        admitted: choices admitted.
        finished: choices finished, by finish_reason.
        suspended: choices taken out by suspend(). If they come back, they are received and admitted again.
        faults: faults by kind: "request" (choices that failed), "step" (launches that failed), "worker" (devices that
            were lost).
        restarts: replacements of the device.
        preemptions: preemptions of sequences.
        prompt_tokens: prompt tokens of started choices.
        cached_tokens: prompt tokens of started choices that were found in the prefix cache.
        computed_tokens: token rows computed, including draft tokens and recomputed tokens.
        output_tokens: tokens generated.
        drafts: number of times that a sequence got draft tokens in a step.
        draft_tokens: draft tokens proposed.
        accepted_tokens: draft tokens accepted.
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
    """Current numbers of sequences, K/V blocks, slots of recurrent state and window blocks in an engine.

    Window blocks are the K/V blocks of layers with a sliding window, if these layers have a pool of their own.

    Attributes:
        running: sequences that run.
        waiting: sequences that wait.
        waiting_tokens: tokens of the waiting sequences.
        blocks: K/V blocks in all.
        blocks_held: K/V blocks that sequences hold.
        blocks_cached: K/V blocks that no sequence holds and that are kept in the prefix cache.
        slots: slots of recurrent state in all; 0 for a model without recurrent state.
        slots_held: slots that sequences hold.
        checkpoints: slots that no sequence holds and that are kept for the prefix cache.
        draining: True if the engine admits no more requests.
        failed: why the engine cannot serve; None while it can.
        window_blocks: window blocks that all sequences together can reserve; 0 without a pool of window blocks.
        window_blocks_reserved: window blocks that running sequences have reserved.
        window_blocks_held: window blocks that sequences hold.
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
        """Returns the fraction of the K/V cache in use, a float from 0 to 1.

        It is the fraction of the K/V blocks that sequences hold, or the fraction of the window blocks that sequences
        have reserved, whichever is larger. At 1, a sequence that needs another block waits or is preempted.
        """
        return max(self.blocks_held / self.blocks, self.window_blocks_reserved / max(1, self.window_blocks))


@dataclass(frozen=True)
class StepRecord:
    """Time and size of one step.

    Attributes:
        number: number of the step, from 1.
        began: start of the step, in seconds by the engine's clock.
        seconds: duration of the step.
        prefill_tokens: number of prompt tokens computed.
        decode_tokens: number of token rows of decodes, including draft tokens.
        sequences: number of sequences in the step.
        output_tokens: number of tokens generated.
    """

    number: int
    began: float
    seconds: float
    prefill_tokens: int
    decode_tokens: int
    sequences: int
    output_tokens: int
