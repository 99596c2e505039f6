"""The scheduler: chooses the sequences and tokens of the next step.

Decodes come first, then prefill chunks, then waiting sequences by priority and arrival. The scheduler owns the queues
and allocates K/V blocks; it calls no device and reads no clock.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, replace

from intaglio.devices import DeviceLost
from intaglio.runtime.checkpoints import CHECKPOINT_BLOCKS, Checkpoints
from intaglio.runtime.kv import BlockPool
from intaglio.runtime.offload import Offload
from intaglio.runtime.sequence import Sequence
from intaglio.runtime.slots import SlotPool
from intaglio.runtime.windows import Windows


@dataclass(frozen=True)
class ScheduledSequence:
    """One sequence in a step: its next `num_tokens` tokens are computed, and the tokens `drafts` after them verified.

    decodes: True if the step is a decode of this sequence; False if it computes a part of its prompt.
    """

    sequence: Sequence
    num_tokens: int
    drafts: tuple[int, ...] = ()
    decodes: bool = False

    @property
    def samples(self) -> bool:
        """True if the step reaches the end of the sequence's known tokens, so that it also samples the next token."""
        return self.num_tokens == self.sequence.remaining and not self.sequence.request.scored


class Scheduler:
    """Queues of waiting and running sequences, both in order of (priority, arrival), and the choice of the next step.

    A running sequence holds blocks for all of its tokens; a waiting sequence holds none. When no block is available, or
    no block of the separate pool for sliding windows, the last running sequence is preempted: it goes back to waiting
    and is recomputed later. Running sequences are also preempted for a waiting one of better priority. A sequence never
    preempts one before it, and admission checks that the pools can hold any single sequence. So the first running
    sequence always finishes.

    If the model has recurrent state, each running sequence also holds two slots for its state, from the SlotPool
    `slots`. So the number of running sequences is limited by slots as well as by blocks. Sequences
    share blocks only up to a position at which the recurrent state was saved (see Checkpoints). If a draft is rejected,
    the state stays as it was before that step, and the next step computes the accepted tokens again.
    """

    def __init__(
        self, pool: BlockPool, slots: SlotPool, *, context: int, max_batch_tokens: int, max_sequences: int,
        max_drafts: int, offload: Offload, windows: Windows, checkpoint_blocks: int = CHECKPOINT_BLOCKS,
    ) -> None:  # fmt: skip
        self.windows = windows
        self.pool, self.slots, self.offload, self.context = pool, slots, offload, context
        self.max_batch_tokens, self.max_drafts = max_batch_tokens, max_drafts
        self.checkpoints = Checkpoints(pool, slots, checkpoint_blocks)
        self.shares_blocks = self.checkpoints.on or not slots.total
        self.max_sequences = min(max_sequences, slots.sequences) if slots.total else max_sequences
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence as waiting."""
        sequence.state = "waiting"
        insort(self.waiting, sequence, key=lambda s: s.order)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out of its queue and free its blocks and state slots."""
        (self.running if sequence.state == "running" else self.waiting).remove(sequence)
        self.offload.touch(sequence.blocks)
        self.pool.release(sequence.blocks)
        self.windows.remove(sequence)
        self.slots.release(sequence.state_slot)
        self.slots.release(sequence.next_state_slot)
        sequence.blocks, sequence.indexed_blocks, sequence.prefix_name = [], 0, None
        sequence.state_slot = sequence.next_state_slot = -1

    def preempt(self, sequence: Sequence) -> None:
        """Move a running sequence back to waiting, to be recomputed from its first token."""
        self.remove(sequence)
        sequence.computed = sequence.rerun = 0
        sequence.preemptions += 1
        self.preemptions += 1
        self.add(sequence)

    def preempt_all(self) -> None:
        """Preempt every running sequence and drop the prefix cache: the device has lost all K/V."""
        self.pool.reset_prefix_cache()
        self.windows.pool.reset_prefix_cache()
        for sequence in reversed(self.running.copy()):
            self.preempt(sequence)

    def spare_block(self) -> int:
        """Number of a K/V block whose content nobody needs; for the step that tests a replaced device.

        The block stays available: it is not allocated to the caller. To find one, the blocks of rejected drafts are
        freed, and while none is available the last running sequence is preempted.
        """
        for sequence in self.running:
            self.update_blocks(sequence)
        while not self.pool.available:
            self.preempt(self.running[-1])
        [block] = self.pool.allocate(1)
        self.pool.release([block])
        return block

    def spare_slot(self) -> int:
        """Number of a slot of recurrent state that a test step on a replaced device may overwrite.

        The slot is not allocated. It is an available slot if there is one. Otherwise it is the slot that the last
        running sequence writes in its next step: its content is not needed before that. -1 if the model has no
        recurrent state. Call it only while no step runs.
        """
        if self.slots.free or self.slots.evictable:
            slot = self.slots.allocate()
            self.slots.release(slot)
            return slot
        return self.running[-1].next_state_slot if self.slots.total else -1

    def schedule(self, parts: int = 1) -> list[ScheduledSequence]:
        """The sequences of the next step, as a list of ScheduledSequence, with at most `max_batch_tokens` tokens.

        Sequences in flight are left out. K/V blocks are allocated for the step; for that, waiting sequences may be
        started and running ones preempted. Returns [] only if every sequence is in flight or waits to start. Raises
        DeviceLost if the device is lost.

        parts: number of steps (micro-batches) over which all sequences are divided evenly.
        """
        scheduled: list[ScheduledSequence] = []
        self._preempt_for_priority()
        most = -(-min(len(self.running) + len(self.waiting), self.max_sequences) // parts)
        budget = self.max_batch_tokens
        for sequence in [s for s in self.running if s.decoding and not s.in_flight]:
            n = sequence.remaining
            if n <= budget and len(scheduled) < most and sequence.state == "running" and self.allocate(sequence):
                scheduled.append(ScheduledSequence(sequence, n, decodes=True))
                budget -= n
        done = {one.sequence.arrival for one in scheduled}
        for sequence in [s for s in self.running if s.remaining > 1 and not s.in_flight and s.arrival not in done]:
            if len(scheduled) < most:
                budget = self._schedule_chunk(scheduled, sequence, budget)
        while budget and len(scheduled) < most and (started := self.start_next()):
            budget = self._schedule_chunk(scheduled, started, budget)
        if self.max_drafts:
            scheduled = self._add_drafts(scheduled, budget)
        for one in scheduled:
            self.windows.extend(one.sequence, one.sequence.computed + one.num_tokens + len(one.drafts))
        return scheduled

    def start_next(self) -> Sequence | None:
        """Move the first waiting sequence to running, with blocks for all its tokens. Returns the sequence.

        Returns None if no sequence waits or the first cannot start yet. Later sequences never overtake it. It cannot
        start in these cases:

        - `max_sequences` are running, or too few blocks are available.
        - Blocks for it are being loaded from a tier.
        - Another choice of its request is computing the prompt, whose blocks it will share.
        - A running sequence is computing most of the tokens that this one would have to compute.

        Blocks found in the prefix cache are shared; of a model with recurrent state, only those up to a saved state.
        The blocks after them are loaded from a tier if it has them. If logits of the prompt are wanted, the whole
        prompt is computed instead. The last token is always computed, because its logits are needed. Raises DeviceLost
        if the device is lost while loaded blocks are written to it.
        """
        if not self.waiting or len(self.running) >= self.max_sequences:
            return None
        sequence = self.waiting[0]
        siblings = (s for s in self.running if s.request is sequence.request)
        if self.shares_blocks and sequence.index and any(s.remaining > 1 and not s.decoding for s in siblings):
            return None
        whole = sequence.prompt_rows_read < sequence.prompt_rows_wanted  # needs logits of the prompt: compute all of it
        tokens = sequence.tokens(0, sequence.length - 1) if self.shares_blocks and not whole else []
        found = self.pool.find_prefix(tokens, sequence.salt)
        known = self._usable(found)
        if self._computed_by_another(sequence, tokens, len(known)):
            return None
        self.pool.share(known)
        fresh = self.pool.blocks_for(sequence.length) - len(known)
        may_load = bool(tokens)
        if (
            fresh > self.pool.available
            or not self.windows.fits(sequence)
            or (may_load and not self.offload.ready(sequence, len(known), wait=not self.running))
        ):
            self.pool.release(known)
            return None
        blocks = known + self.pool.allocate(fresh)
        try:
            loaded = self.offload.fill(sequence, len(known), blocks) if may_load else 0
        except DeviceLost:
            self.pool.release(blocks)
            raise
        self.waiting.pop(0)
        insort(self.running, sequence, key=lambda s: s.order)
        sequence.state = "running"
        sequence.blocks = blocks
        sequence.computed = (len(known) + loaded) * self.pool.block_size
        sequence.indexed_blocks = len(known)
        sequence.prefix_name = self.pool.name(known[-1]) if known else None
        self.windows.start(sequence, [self.pool.name(block) for block in known])
        self.checkpoints.start(sequence, len(found))
        self.update_blocks(sequence)
        self.offload.started(blocks[: len(known) + loaded])
        return sequence

    def _computed_by_another(self, sequence: Sequence, tokens: list[int], known: int) -> bool:
        """True if a waiting sequence should wait, as a running one is about to compute K/V blocks that both can share.

        That is so if the running sequence has yet to compute the first missing block and has the same tokens for at
        least half of the missing blocks. Waiting takes a step or a few; starting now would compute these tokens twice.
        Always False for models with recurrent state.

        Args:
            sequence: the waiting sequence.
            tokens: its tokens whose blocks may be shared.
            known: number of its leading blocks that are in the prefix cache.
        """
        size, full = self.pool.block_size, len(tokens) // self.pool.block_size
        half = (known + full + 1) // 2 * size  # tokens up to the middle of the missing blocks
        if full == known or self.slots.total:
            return False
        return any(
            s.computed < (known + 1) * size and half <= s.length and s.salt == sequence.salt
            and s.order < sequence.order and s.tokens(0, half) == tokens[:half]
            for s in self.running
        )  # fmt: skip

    def _usable(self, found: list[int]) -> list[int]:
        """The leading blocks of `found` that a new sequence can reuse, as a list; [] if there are none.

        If the model has recurrent state, the state at the end of the last block must be cached. If it has sliding
        windows, the window blocks that the next token sees must be cached. Blocks are left out at the end until the
        rest meets both conditions.

        found: numbers of the sequence's leading blocks that are in the prefix cache.
        """
        while True:
            known = found[: self.windows.usable([self.pool.name(block) for block in found])]
            found = known[: self.checkpoints.usable(known)]
            if len(found) == len(known):
                return known

    def allocate(self, sequence: Sequence) -> bool:
        """Give a running sequence blocks for all its tokens; if there are too few, preempt the last running sequences.

        Sequences in flight are not preempted. Returns True if the sequence has the blocks. Returns False if it was
        itself preempted, or has to wait because all sequences after it in `running` are in flight.
        """
        while (
            missing := self.pool.blocks_for(sequence.length) - len(sequence.blocks)
        ) > self.pool.available or not self.windows.grow(sequence):
            last = next(s for s in reversed(self.running) if not s.in_flight)
            if last is sequence and last is not self.running[-1]:
                return False
            self.preempt(last)
            if last is sequence:
                return False
        sequence.blocks += self.pool.allocate(max(0, missing))
        return True

    def move_state(self, sequence: Sequence) -> None:
        """Replace the sequence's recurrent state by the state that its last step has written. Returns nothing.

        It is called after each step. The slot of the old state is released, the slot that the step has written becomes
        the sequence's, and a new slot is allocated for the next step to write. Without recurrent state nothing changes.
        """
        self.slots.release(sequence.state_slot)
        sequence.state_slot, sequence.next_state_slot = sequence.next_state_slot, self.slots.allocate()

    def update_blocks(self, sequence: Sequence) -> None:
        """Add the sequence's blocks that became full in the last step to the prefix cache.

        If a block of the same name is cached already, the sequence shares that one, which has the same bits, and its
        own is freed. A sequence that holds a cached block therefore holds all cached blocks before it too, so none of
        these is evicted first. Without a prefix cache none is added. Blocks that only rejected drafts needed are freed.
        """
        size, pool = self.pool.block_size, self.pool
        while self.shares_blocks and (sequence.indexed_blocks + 1) * size <= sequence.computed:
            at = sequence.indexed_blocks * size
            parent = sequence.prefix_name or pool.names.root(sequence.salt)
            block, tokens = sequence.blocks[sequence.indexed_blocks], sequence.tokens(at, at + size)
            self.windows.add_to_prefix_cache(sequence, sequence.indexed_blocks, parent, tokens)
            sequence.prefix_name = pool.add_to_prefix_cache(block, parent, tokens)
            if (cached := pool.index[sequence.prefix_name]) != block:
                pool.share([cached])
                pool.release([block])
                sequence.blocks[sequence.indexed_blocks] = cached
            sequence.indexed_blocks += 1
            self.offload.stored(cached)
        needed = pool.blocks_for(sequence.length)
        pool.release(sequence.blocks[needed:])
        del sequence.blocks[needed:]
        self.windows.give_back(sequence)

    def _schedule_chunk(self, scheduled: list[ScheduledSequence], sequence: Sequence, budget: int) -> int:
        """Append a ScheduledSequence with the sequence's next tokens, as many as the budget allows, to `scheduled`.

        A model with recurrent state gets fewer tokens if its state is to be saved for the prefix cache at an earlier
        position (see Checkpoints.cut()). Returns the number of tokens left of the budget.
        """
        num_tokens = self.checkpoints.cut(sequence, min(budget, sequence.remaining))
        if num_tokens:
            scheduled.append(ScheduledSequence(sequence, num_tokens, decodes=sequence.decoding))
        return budget - num_tokens

    def _preempt_for_priority(self) -> None:
        """Preempt running sequences of worse priority than the first waiting one, last ones first, until it can start.

        Sequences of a launch under way are not touched. Nothing is preempted if that would not free enough blocks for
        the waiting sequence.
        """
        if not self.waiting:
            return
        pool, first = self.pool, self.waiting[0]
        needed = pool.blocks_for(first.length)
        worse = [s for s in self.running if not s.in_flight and s.request.priority > first.request.priority]
        freeable = sum(pool.refcounts[b] == 1 for s in worse for b in s.blocks)
        if needed <= pool.available + freeable and self.windows.fits(first, sum(s.window_reserved for s in worse)):
            while worse and (
                needed > pool.available or len(self.running) >= self.max_sequences or not self.windows.fits(first)
            ):
                self.preempt(worse.pop())

    def _add_drafts(self, scheduled: list[ScheduledSequence], budget: int) -> list[ScheduledSequence]:
        """Add draft tokens (speculative decoding) to the sequences of a step. Returns a new list of ScheduledSequence.

        All drafts together are at most `budget` tokens, and need no preemption: a sequence gets only drafts for which
        blocks are available. A sequence gets no drafts if it samples no token in this step, or if it is suspected of
        having made the device fail.

        A step whose drafts are rejected does not advance a recurrent state: the sequence's next step computes the
        accepted tokens again. If these are more than `max_drafts`, the sequence gets no drafts in that step, so that
        nothing can be rejected and the state advances.
        """
        drafted = []
        for one in scheduled:
            sequence, drafts = one.sequence, tuple[int, ...]()
            bounded = not self.slots.total or one.num_tokens - 1 <= self.max_drafts
            if one.samples and bounded and not sequence.suspect:
                room = (len(sequence.blocks) + self.pool.available) * self.pool.block_size
                free = min(room, sequence.max_kv_tokens(self.context)) - sequence.length
                most = min(self.max_drafts, budget, free)
                drafts = tuple(sequence.propose_drafts(most)) if most > 0 else ()
                missing = self.pool.blocks_for(sequence.length + len(drafts)) - len(sequence.blocks)
                sequence.blocks += self.pool.allocate(max(0, missing))
                budget -= len(drafts)
            drafted.append(replace(one, drafts=drafts))
        return drafted
