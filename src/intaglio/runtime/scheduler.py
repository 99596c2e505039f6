"""What runs in the next step: decodes first, then chunks of prompts, then whoever waits, by priority and arrival.

Keeps the queues and the blocks; never calls a device and reads no clock.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, replace

from intaglio.runtime.kv import BlockPool
from intaglio.runtime.sequence import Sequence


@dataclass(frozen=True)
class Piece:
    """A sequence's share of a step: its next `n` tokens, and guesses of what follows them."""

    sequence: Sequence
    n: int
    drafts: tuple[int, ...] = ()

    @property
    def last(self) -> bool:
        """Nothing is left to compute after this piece, so the next token is drawn."""
        return self.n == self.sequence.remaining


class Scheduler:
    """Two queues in order of (priority, arrival). A running sequence holds blocks for all of its tokens; a waiting one
    holds none.

    When the pool runs dry the last of the running goes back to waiting and is computed again later; the same makes room
    for one that waits with a better priority. The first never makes room for another, and a sequence fits the pool
    alone (the engine sees to that), so something always ends.
    """

    def __init__(
        self, pool: BlockPool, *, context: int, max_batch_tokens: int, max_sequences: int, max_drafts: int
    ) -> None:
        self.pool, self.context = pool, context
        self.max_batch_tokens, self.max_sequences, self.max_drafts = max_batch_tokens, max_sequences, max_drafts
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        sequence.state = "waiting"
        insort(self.waiting, sequence, key=lambda s: s.order)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out of its queue and give its blocks back."""
        (self.running if sequence.state == "running" else self.waiting).remove(sequence)
        self.pool.release(sequence.blocks)
        sequence.blocks, sequence.filed, sequence.node = [], 0, None

    def preempt(self, sequence: Sequence) -> None:
        """Back to waiting, with nothing computed."""
        self.remove(sequence)
        sequence.computed = 0
        sequence.preemptions += 1
        self.preemptions += 1
        self.add(sequence)

    def schedule(self) -> list[Piece]:
        """The pieces of the next step, at most `max_batch_tokens` tokens; empty only if nothing is left to do."""
        plan: list[Piece] = []
        self._make_way()
        for sequence in [s for s in self.running if s.remaining == 1]:
            if len(plan) < self.max_batch_tokens and sequence.state == "running" and self._grow(sequence):
                plan.append(Piece(sequence, 1))
        budget = self.max_batch_tokens - len(plan)
        for sequence in [s for s in self.running if s.remaining > 1]:
            budget = self._take(plan, sequence, budget)
        while budget and (admitted := self._admit()):
            budget = self._take(plan, admitted, budget)
        return self._speculate(plan, budget) if self.max_drafts else plan

    def settle(self, sequence: Sequence) -> None:
        """After its share of a step: file the blocks that are now full, give back those that no token is in."""
        size, pool = self.pool.block_tokens, self.pool
        while (sequence.filed + 1) * size <= sequence.computed:
            at = sequence.filed * size
            parent = sequence.node if sequence.filed else sequence.salt
            sequence.node = pool.file(sequence.blocks[sequence.filed], parent, sequence.tokens(at, at + size))
            sequence.filed += 1
        needed = pool.blocks_for(sequence.length)
        pool.release(sequence.blocks[needed:])
        del sequence.blocks[needed:]

    def _take(self, plan: list[Piece], sequence: Sequence, budget: int) -> int:
        n = min(budget, sequence.remaining)
        if n:
            plan.append(Piece(sequence, n))
        return budget - n

    def _make_way(self) -> None:
        """Preempt those of worse priority than the first who waits, from the last on, if that is what gives it room."""
        if not self.waiting:
            return
        pool, first = self.pool, self.waiting[0]
        needed = pool.blocks_for(first.length)
        worse = [s for s in self.running if s.request.priority > first.request.priority]
        theirs = sum(pool.refcounts[b] == 1 for s in worse for b in s.blocks)
        if needed <= pool.available + theirs:
            while worse and (needed > pool.available or len(self.running) >= self.max_sequences):
                self.preempt(worse.pop())

    def _admit(self) -> Sequence | None:
        """Start the sequence that waits first, if there are blocks for all of its tokens; nobody overtakes it.

        What the prefix cache holds of it is taken from there, but its last token is always computed, for its logits. A
        request's other choices wait until the first has computed the prompt, and find it there.
        """
        if not self.waiting or len(self.running) >= self.max_sequences:
            return None
        sequence = self.waiting[0]
        if sequence.index and any(s.request is sequence.request and s.remaining > 1 for s in self.running):
            return None
        every = sequence.read < sequence.to_read  # logits of the whole prompt are wanted, so it is computed
        known = [] if every else self.pool.find(sequence.tokens(0, sequence.length - 1), sequence.salt)
        self.pool.share(known)
        fresh = self.pool.blocks_for(sequence.length) - len(known)
        if fresh > self.pool.available:
            self.pool.release(known)
            return None
        self.waiting.pop(0)
        insort(self.running, sequence, key=lambda s: s.order)
        sequence.state = "running"
        sequence.blocks = known + self.pool.allocate(fresh)
        sequence.computed = len(known) * self.pool.block_tokens
        sequence.filed = len(known)
        sequence.node = self.pool.node(known[-1]) if known else None
        return sequence

    def _grow(self, sequence: Sequence) -> bool:
        """Blocks for all of its tokens, preempting from the last of the running on; False if that came to be itself."""
        while (wanted := self.pool.blocks_for(sequence.length) - len(sequence.blocks)) > self.pool.available:
            last = self.running[-1]
            self.preempt(last)
            if last is sequence:
                return False
        sequence.blocks += self.pool.allocate(max(0, wanted))
        return True

    def _speculate(self, plan: list[Piece], budget: int) -> list[Piece]:
        """Spend what is left of the budget on guesses, where blocks are to be had without preempting anyone."""
        drafted = []
        for piece in plan:
            sequence, drafts = piece.sequence, tuple[int, ...]()
            if piece.last and not sequence.request.scored and not sequence.suspect:
                room = (len(sequence.blocks) + self.pool.available) * self.pool.block_tokens
                most = min(self.max_drafts, budget, min(room, sequence.longest(self.context)) - sequence.length)
                drafts = tuple(sequence.propose(most)) if most > 0 else ()
                wanted = self.pool.blocks_for(sequence.length + len(drafts)) - len(sequence.blocks)
                sequence.blocks += self.pool.allocate(max(0, wanted))
                budget -= len(drafts)
            drafted.append(replace(piece, drafts=drafts))
        return drafted
