"""Sequence: one output of a request in the engine, with its tokens, its K/V blocks and its progress.

Only the stages of the engine write to it; other code may read it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Literal

import numpy as np

from intaglio.batch import Sampling
from intaglio.runtime.draft import PromptLookup
from intaglio.runtime.penalties import Penalties
from intaglio.runtime.request import Fault, FinishReason, Matcher, Request, Scored, Usage
from intaglio.runtime.token_filter import TokenFilter


@dataclass(eq=False)
class Sequence:
    """One output (choice) of a request in the engine, with its tokens, K/V blocks, state slots and progress.

    A waiting sequence holds no blocks; a running sequence holds blocks for all its tokens. Times are in seconds by the
    engine's clock, and None for what has not happened yet. The comments at the fields explain each field.
    """

    request: Request
    index: int
    seed: int  # of the random numbers by which its tokens are sampled
    arrival: int  # number in order of arrival in the engine
    arrived: float  # when the engine received it
    estimate: float  # seconds until it ends, from LatencyEstimator.estimate()
    stop_checker: Callable[[int], bool] | None = None  # True for a token that ends the output
    matcher: Matcher | None = None  # the state of its grammar; None without a grammar
    token_filter: TokenFilter | None = None  # None if the request restricts no ids

    state: Literal["waiting", "running", "ended"] = "waiting"
    prompt: list[int] = field(default_factory=list)  # token ids
    output: list[int] = field(default_factory=list)  # token ids
    logprobs: list[float] = field(default_factory=list)  # one an output token
    logits: list[np.ndarray] = field(default_factory=list)  # scored requests only: f32 [tokens, vocabulary] a step
    prompt_rows_read: int = 0  # prompt positions whose logits were used, of `prompt_rows_wanted`
    prompt_scores: list[Scored] = field(default_factory=list)  # of its prompt tokens, if they are wanted
    blocks: list[int] = field(default_factory=list)  # numbers of its K/V blocks, in order
    window_blocks: list[int] = field(default_factory=list)  # of layers with a window; -1: given back (see Windows)
    window_reserved: int = 0  # most window blocks that it may hold at once
    computed: int = 0  # tokens whose K/V is in the blocks, and which the recurrent state has read
    state_slot: int = -1  # the slot that holds its recurrent state; -1: none yet
    next_state_slot: int = -1  # the slot to which its next step writes it; -1: the model has none
    rerun: int = 0  # tokens after `computed` that are computed again, as drafts after them were rejected
    borders: set[int] = field(default_factory=set)  # positions in its prompt at which its recurrent state is kept
    prefill_end: int = 0  # number of its tokens when it started; from there on its steps are not cut at borders
    checkpoint: str | None = None  # name of the block at whose end its state was last kept while it decoded
    indexed_blocks: int = 0  # leading blocks that are in the prefix cache
    prefix_name: str | None = None  # name of the last of them
    cached_tokens: int = 0  # prompt tokens found in the prefix cache at the first step
    preemptions: int = 0  # how often it was preempted
    in_flight: bool = False  # it is in a launch that has not been completed
    suspect: bool = False  # it was in a launch that lost the device, and has sampled no token since
    device_losses: int = 0  # launches with only this sequence that lost the device since its last token
    started: float | None = None  # start of its first step
    first_token: float | None = None  # when its first token was sampled
    ended: float | None = None
    finish_reason: FinishReason | None = None
    fault: Fault | None = None  # the error, if it ended with one
    lookup: PromptLookup = field(default_factory=PromptLookup)  # proposes its draft tokens
    penalties: Penalties | None = field(init=False)  # None if the request has no penalties and no biases
    base_sampling: Sampling = field(init=False)  # sampling parameters of every row, without edits and grammar mask

    def __post_init__(self) -> None:
        p = self.request.params
        self.prompt = [int(t) for t in self.request.prompt]
        self.penalties = Penalties(p, self.prompt) if p.edits_logits else None
        self.base_sampling = Sampling(p.temperature, p.top_k, p.top_p, p.min_p, self.seed)

    @property
    def salt(self) -> str | None:
        """Returns the request's cache salt; None if it has none."""
        return self.request.salt

    @property
    def order(self) -> tuple[int, int]:
        """Returns the key by which queues of sequences are sorted: (priority, arrival number)."""
        return self.request.priority, self.arrival

    @property
    def length(self) -> int:
        """Returns the number of tokens so far, of prompt and output."""
        return len(self.prompt) + len(self.output)

    @property
    def remaining(self) -> int:
        """Returns the number of tokens that must still be computed before the next token can be sampled."""
        return self.length - self.computed

    @property
    def decoding(self) -> bool:
        """True if the sequence's next step is a decode: exactly one of its tokens has never been computed.

        False while more tokens of the prompt are left to compute. Tokens that must be computed again, because a draft
        after them was rejected, are not counted.
        """
        return self.remaining - self.rerun == 1

    @property
    def prompt_rows_wanted(self) -> int:
        """Returns the number of prompt positions whose logits the request needs, counted from the first position."""
        if self.request.scored:
            return len(self.prompt)
        return 0 if self.request.params.prompt_logprobs is None else len(self.prompt) - 1

    @property
    def wants_logits(self) -> bool:
        """True if the next step must return logits for this sequence."""
        p = self.request.params
        return self.prompt_rows_read < self.prompt_rows_wanted or p.logprobs > 0 or bool(p.logprob_token_ids)

    def max_kv_tokens(self, context: int) -> int:
        """Returns the largest number of tokens whose K/V this sequence can ever need, an int.

        context: context length of the model in tokens.
        """
        return max_kv_tokens(self.request, context)

    def tokens(self, start: int, stop: int) -> list[int]:
        """Returns the token ids at positions `start` to `stop` - 1 of the prompt and the output after it, as a list."""
        split = len(self.prompt)
        if start >= split:
            return self.output[start - split : stop - split]
        return [*self.prompt[start:stop], *self.output[: max(0, stop - split)]]

    def deadline(self) -> float:
        """Returns the time at which the engine ends the sequence, in seconds by the engine's clock.

        It is infinity if the request has no time limit. Otherwise it is the arrival time plus the request's `timeout`.
        Before the sequence's first step, it is the arrival time plus `queue_timeout`, if that is earlier.
        """
        r = self.request
        queue = r.queue_timeout if self.started is None else None
        return self.arrived + min((t for t in (queue, r.timeout) if t is not None), default=float("inf"))

    def propose_drafts(self, max_drafts: int) -> list[int]:
        """Returns up to `max_drafts` draft tokens as a list of ids, found by prompt lookup (see PromptLookup).

        The list ends before the first token that the grammar does not allow.
        """
        drafts = self.lookup.propose(self.tokens(0, self.length), max_drafts)
        if self.matcher:
            allowed = list(takewhile(self.matcher.advance, drafts))
            self.matcher.rollback(len(allowed))
            return allowed
        return drafts

    def usage(self, now: float) -> Usage:
        """Returns the Usage (token counts and times) of a sequence that ends now. now: the time in seconds."""
        return Usage(
            len(self.prompt), self.cached_tokens, len(self.output), self.preemptions, self.arrived, self.started,
            self.first_token, now,
        )  # fmt: skip


def max_kv_tokens(request: Request, context: int) -> int:
    """Returns the largest number of tokens whose K/V one choice of the request can need, an int.

    The last output token needs no K/V. context: context length of the model in tokens.
    """
    return min(context, len(request.prompt) + (0 if request.scored else request.params.max_tokens - 1))
