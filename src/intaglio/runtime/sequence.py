"""One choice of a request on its way through the engine: its tokens, its blocks, how far it has come.

The engine and the scheduler own every field; all else may read them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Literal

import numpy as np

from intaglio.batch import Sampling
from intaglio.runtime.draft import Lookup
from intaglio.runtime.request import Fault, FinishReason, Matcher, Request, Scored, Usage
from intaglio.runtime.tally import Tally


@dataclass(eq=False)
class Sequence:
    """Choice `index` of `request`. Waiting, it holds nothing; running, it holds blocks for all of its tokens."""

    request: Request
    index: int
    seed: int
    arrival: int  # order of arrival in the engine
    arrived: float  # by the engine's clock, as every time here
    expected: float  # seconds to its end, before the pace's slip
    stopped: Callable[[int], bool] | None = None
    matcher: Matcher | None = None

    state: Literal["waiting", "running", "ended"] = "waiting"
    prompt: list[int] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)  # scored requests only, a piece a step
    read: int = 0  # positions of the prompt whose logits were looked at, of `to_read`
    prompt_scores: list[Scored] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    computed: int = 0  # tokens whose K/V is in the blocks
    filed: int = 0  # blocks known to the prefix cache, and the cache's name for the last of them
    node: int | None = None
    cached: int = 0
    preemptions: int = 0
    suspect: bool = False  # it was in a step that lost the device, and has drawn no token since
    losses: int = 0  # of the device by it alone, since its last token
    started: float | None = None
    first_token: float | None = None
    ended: float | None = None
    finish_reason: FinishReason | None = None
    fault: Fault | None = None
    lookup: Lookup = field(default_factory=Lookup)
    tally: Tally | None = field(init=False)  # of the output so far, if penalties or biases ask for it
    plain: Sampling = field(init=False)  # how a row is drawn but for edits and grammar

    def __post_init__(self) -> None:
        p = self.request.params
        self.prompt = [int(t) for t in self.request.prompt]
        self.tally = Tally(p, self.prompt) if p.edits_logits else None
        self.plain = Sampling(p.temperature, p.top_k, p.top_p, p.min_p, self.seed)

    @property
    def salt(self) -> str | None:
        return self.request.salt

    @property
    def order(self) -> tuple[int, int]:
        """Its place in every queue: by priority, then by arrival."""
        return self.request.priority, self.arrival

    @property
    def length(self) -> int:
        """Tokens so far, prompt and output."""
        return len(self.prompt) + len(self.output)

    @property
    def remaining(self) -> int:
        """Tokens whose K/V is still to be computed before the next one can be drawn."""
        return self.length - self.computed

    @property
    def to_read(self) -> int:
        """Positions of the prompt whose logits are wanted, from the first on."""
        if self.request.scored:
            return len(self.prompt)
        return 0 if self.request.params.prompt_logprobs is None else len(self.prompt) - 1

    @property
    def wants_logits(self) -> bool:
        """Whether a step must hand out logits for it."""
        return self.read < self.to_read or self.request.params.logprobs > 0

    def longest(self, context: int) -> int:
        """K/V slots it may come to need: the last token of an output is never fed back."""
        return longest(self.request, context)

    def tokens(self, start: int, stop: int) -> list[int]:
        """Its tokens at positions start..stop-1."""
        split = len(self.prompt)
        if start >= split:
            return self.output[start - split : stop - split]
        return [*self.prompt[start:stop], *self.output[: max(0, stop - split)]]

    def due(self) -> float:
        """When its next deadline is: the whole one, or the queue's as long as it has not started."""
        r = self.request
        queue = r.queue_timeout if self.started is None else None
        return self.arrived + min((t for t in (queue, r.timeout) if t is not None), default=float("inf"))

    def propose(self, most: int) -> list[int]:
        """Up to `most` guesses of what comes next, all of them allowed by the grammar."""
        drafts = self.lookup.propose(self.tokens(0, self.length), most)
        if self.matcher:
            allowed = list(takewhile(self.matcher.advance, drafts))
            self.matcher.rollback(len(allowed))
            return allowed
        return drafts

    def usage(self, now: float) -> Usage:
        return Usage(
            len(self.prompt), self.cached, len(self.output), self.preemptions, self.arrived, self.started,
            self.first_token, now,
        )  # fmt: skip


def longest(request: Request, context: int) -> int:
    """K/V slots a choice of the request may come to need."""
    return min(context, len(request.prompt) + (0 if request.scored else request.params.max_tokens - 1))
