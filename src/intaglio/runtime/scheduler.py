"""What runs in the next step: decodes first, then chunks of prefill, then whoever waits, first come first served.

Keeps the queues and the blocks; does not look at tokens and never calls a device.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

from intaglio.runtime.kv import BlockPool
from intaglio.runtime.request import Request


@dataclass(frozen=True)
class Piece:
    """A request's share of a step: its next `n` tokens."""

    request: Request
    n: int

    @property
    def last(self) -> bool:
        """Nothing is left to compute after this piece, so the next token is drawn."""
        return self.n == self.request.remaining


class Scheduler:
    """Two queues in order of arrival. A running request holds blocks for all its tokens; a waiting one holds none.

    When the pool runs dry the youngest running request goes back to waiting and is recomputed later. The oldest never
    makes room for another, and a request fits the pool alone (the engine sees to that), so something always ends.
    """

    def __init__(self, pool: BlockPool, block_tokens: int, max_batch_tokens: int, max_sequences: int) -> None:
        self.pool, self.block_tokens = pool, block_tokens
        self.max_batch_tokens, self.max_sequences = max_batch_tokens, max_sequences
        self.waiting: list[Request] = []
        self.running: list[Request] = []

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)

    def add(self, request: Request) -> None:
        request.state = "waiting"
        insort(self.waiting, request, key=lambda r: r.arrival)

    def remove(self, request: Request) -> None:
        """Take a request out of its queue and give its blocks back."""
        (self.running if request.state == "running" else self.waiting).remove(request)
        self.pool.release(request.blocks)
        request.blocks = []

    def schedule(self) -> list[Piece]:
        """The pieces of the next step, at most `max_batch_tokens` tokens; empty only if nothing is left to do."""
        plan: list[Piece] = []
        for request in [r for r in self.running if r.remaining == 1]:
            if len(plan) < self.max_batch_tokens and request.state == "running" and self._grow(request):
                plan.append(Piece(request, 1))
        budget = self.max_batch_tokens - len(plan)
        for request in [r for r in self.running if r.remaining > 1]:
            budget = self._take(plan, request, budget)
        while budget and (admitted := self._admit()):
            budget = self._take(plan, admitted, budget)
        return plan

    def _take(self, plan: list[Piece], request: Request, budget: int) -> int:
        n = min(budget, request.remaining)
        if n:
            plan.append(Piece(request, n))
        return budget - n

    def _admit(self) -> Request | None:
        """Start the request that has waited longest, if there are blocks for all its tokens; nobody overtakes it."""
        if not self.waiting or len(self.running) >= self.max_sequences:
            return None
        request = self.waiting[0]
        if self.blocks_for(request.length) > len(self.pool.free):
            return None
        request.blocks = self.pool.allocate(self.blocks_for(request.length))
        request.state = "running"
        self.waiting.pop(0)
        insort(self.running, request, key=lambda r: r.arrival)
        return request

    def _grow(self, request: Request) -> bool:
        """Blocks for all of the request's tokens, preempting from the youngest on; False if it was itself preempted."""
        while (wanted := self.blocks_for(request.length) - len(request.blocks)) > len(self.pool.free):
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is request:
                return False
        request.blocks += self.pool.allocate(wanted)
        return True

    def _preempt(self, request: Request) -> None:
        self.remove(request)
        request.computed = 0
        request.logits = []
        request.preemptions += 1
        self.add(request)
