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
    """The work of one sequence in a step.

    The step computes the sequence's next `num_tokens` tokens, then verifies the draft tokens `drafts`.

    decodes: True if the step is a decode of this sequence; False if it computes a part of its prompt.
    """

    sequence: Sequence
    num_tokens: int
    drafts: tuple[int, ...] = ()
    decodes: bool = False

    @property
    def samples(self) -> bool:
        """True if the step samples the sequence's next token.

        A step does so if it computes the last of the tokens that the sequence has so far. Always False for a request
        with `scored` set, which generates nothing.
        """
        return self.num_tokens == self.sequence.remaining and not self.sequence.request.scored


class Scheduler:
    """Chooses the sequences of each step, from its queues of waiting and running sequences.

    Both queues are in order of (priority, arrival). A running sequence holds K/V blocks for all its tokens; a waiting
    sequence holds none. If a sequence needs a block and none is available, the last running sequence is preempted: it
    goes back to waiting and is recomputed later. Running sequences are also preempted for a waiting sequence of better
    priority. A sequence never preempts a sequence before it, and a request is admitted only if there are enough
    blocks for each of its sequences alone. So the first running sequence always finishes.

    If the model has recurrent state, each running sequence also holds two slots for its state, from the SlotPool
    `slots`. So the slots limit the number of running sequences, too. Sequences share blocks only up to a position at
    which the recurrent state was saved (see Checkpoints). If a draft is rejected, the state stays as it was before the
    step, and the next step computes the accepted tokens again.
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
        """Add a sequence to the waiting queue. Returns nothing."""
        sequence.state = "waiting"
        insort(self.waiting, sequence, key=lambda s: s.order)

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence from its queue, and free its blocks and state slots. Returns nothing."""
        (self.running if sequence.state == "running" else self.waiting).remove(sequence)
        self.offload.touch(sequence.blocks)
        self.pool.release(sequence.blocks)
        self.windows.remove(sequence)
        self.slots.release(sequence.state_slot)
        self.slots.release(sequence.next_state_slot)
        sequence.blocks, sequence.indexed_blocks, sequence.prefix_name = [], 0, None
        sequence.state_slot = sequence.next_state_slot = -1

    def preempt(self, sequence: Sequence) -> None:
        """Move a running sequence back to the waiting queue and free its blocks.

        It will be recomputed from its first token.
        """
        self.remove(sequence)
        sequence.computed = sequence.rerun = 0
        sequence.preemptions += 1
        self.preemptions += 1
        self.add(sequence)

    def preempt_all(self) -> None:
        """Preempt all running sequences and empty the prefix cache, because the device has lost all K/V.

        Returns nothing.
        """
        self.pool.reset_prefix_cache()
        self.windows.pool.reset_prefix_cache()
        for sequence in reversed(self.running.copy()):
            self.preempt(sequence)

    def spare_block(self) -> int:
        """Returns the number of a K/V block that the test step on a replaced device may overwrite.

        The block is not allocated. First the blocks of rejected drafts are freed. Then running sequences are preempted,
        the last one first, until a block is available.
        """
        for sequence in self.running:
            self.update_blocks(sequence)
        while not self.pool.available:
            self.preempt(self.running[-1])
        [block] = self.pool.allocate(1)
        self.pool.release([block])
        return block

    def spare_slot(self) -> int:
        """Returns the number of a recurrent-state slot that may be overwritten, for the test step on a new device.

        After a device was lost, the new one runs a step of one token as a test. The slot is one that no sequence uses.
        If all are in use, it is the slot into which the last running sequence will write its next state: until then
        nothing reads the slot. The slot is not allocated. Returns -1 if the model has no recurrent state. Call this
        only while no step runs.
        """
        if self.slots.free or self.slots.evictable:
            slot = self.slots.allocate()
            self.slots.release(slot)
            return slot
        return self.running[-1].next_state_slot if self.slots.total else -1

    def schedule(self, parts: int = 1) -> list[ScheduledSequence]:
        """Returns a list of the ScheduledSequences of the next step.

        Together they have at most `max_batch_tokens` tokens. Sequences in flight (in a launch that has not been
        completed) are left out. The method allocates the K/V blocks for the step. It may start waiting sequences and
        preempt running ones. Returns [] only if every sequence is in flight or has to wait.

        parts: number of steps (micro-batches) over which all sequences are evenly divided. Raises DeviceLost if the
        device is lost.
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
        """Start the first waiting sequence, with blocks for all its tokens.

        Returns the sequence, or None if none was started. Later sequences never overtake the first one. It cannot start
        yet in these cases:

        - `max_sequences` sequences are running, or too few blocks are available.
        - Blocks for it are being loaded from a tier.
        - Another choice of its request is computing the prompt, whose blocks it will share.
        - A running sequence is computing most of the tokens that it would have to compute.

        Blocks that are in the prefix cache are shared; with recurrent state, only those up to a saved state. The blocks
        after them are loaded from the tier, if it has them. If logits of the prompt are wanted, the whole prompt is
        computed instead. The last token is always computed, because its logits are needed. Raises DeviceLost if the
        device is lost while blocks are written to it.
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
        """True if a waiting sequence should not start yet, since a running one is about to compute K/V blocks for both.

        The waiting sequence lacks the K/V blocks after the first `known` ones. The result is True if a running sequence
        has the same tokens up to the middle of these blocks or further, and has not yet computed the first of them. If
        the waiting sequence started now, these tokens would be computed twice. Always False for models with recurrent
        state.

        Args:
            sequence: the waiting sequence.
            tokens: its tokens whose blocks may be shared.
            known: number of blocks at its beginning that are in the prefix cache.
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
        """Returns the numbers of the cached blocks that a new sequence can reuse, as a list.

        It is the longest usable beginning of `found`; [] if no block is usable. If the model has recurrent state, the
        state at the end of the last block must be saved. If the model has sliding windows, the window blocks that the
        next token sees must be cached.

        found: numbers of the blocks at the sequence's beginning that are in the prefix cache, in order.
        """
        while True:
            known = found[: self.windows.usable([self.pool.name(block) for block in found])]
            found = known[: self.checkpoints.usable(known)]
            if len(found) == len(known):
                return known

    def allocate(self, sequence: Sequence) -> bool:
        """Give a running sequence blocks for all its tokens. Returns True if it has them.

        If too few blocks are available, the last running sequences are preempted. Sequences in flight (in a launch that
        has not been completed) are not preempted. Returns False if the sequence was itself preempted, or if it has to
        wait because all sequences after it are in flight.
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
        """Replace a sequence's recurrent state by the state that its last step has written. Returns nothing.

        The slot of the old state is released. The slot that the step has written becomes the sequence's `state_slot`. A
        new slot is allocated for the next step to write. Called after each step; without recurrent state nothing
        changes.
        """
        self.slots.release(sequence.state_slot)
        sequence.state_slot, sequence.next_state_slot = sequence.next_state_slot, self.slots.allocate()

    def update_blocks(self, sequence: Sequence) -> None:
        """Add a sequence's newly full K/V blocks to the prefix cache. Returns nothing.

        If a block with the same name is in the cache already, the sequence uses that block, which has the same bits,
        and frees its own. So a sequence that holds a cached block also holds all cached blocks before it, and none of
        them is evicted earlier. If the model has no prefix cache, no block is added. Blocks that only rejected drafts
        needed are freed.
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
        """Append the next tokens of a sequence to the step `scheduled`. Returns how many tokens of `budget` are left.

        The tokens are appended as one ScheduledSequence, as many as `budget` allows. With recurrent state they are
        fewer, if the state is to be saved for the prefix cache at an earlier position (see Checkpoints.cut()).

        budget: maximum number of tokens to append.
        """
        num_tokens = self.checkpoints.cut(sequence, min(budget, sequence.remaining))
        if num_tokens:
            scheduled.append(ScheduledSequence(sequence, num_tokens, decodes=sequence.decoding))
        return budget - num_tokens

    def _preempt_for_priority(self) -> None:
        """Preempt running sequences that have a worse priority than the first waiting sequence, until it can start.

        The last running sequences are preempted first. Sequences in flight (in a launch that has not been completed)
        are not preempted. No sequence is preempted if that would not free enough blocks. Returns nothing.
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
        """Add draft tokens (speculative decoding) to the sequences of a step. Returns a new list of ScheduledSequences.

        All drafts together are at most `budget` tokens. No sequence is preempted for drafts: a sequence gets drafts
        only as far as blocks are available. A sequence gets none if it samples no token in this step, or if it is
        suspected of having made the device fail.

        With recurrent state, a step whose drafts are rejected does not advance the state, so the next step computes the
        accepted tokens again. If these are more than `max_drafts`, the next step gets no drafts, so that it advances
        the state.
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
