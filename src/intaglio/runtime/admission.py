"""Admission control: refuses requests that an engine can never serve, or cannot serve in time under its load.

All methods are pure functions of their arguments, so any thread may call them.
"""

from __future__ import annotations

from dataclasses import dataclass

from intaglio.runtime.latency import LatencyEstimator
from intaglio.runtime.request import Refused, Request, RequestError
from intaglio.runtime.sequence import max_kv_tokens

RETRY_AFTER_MIN_S, RETRY_AFTER_MAX_S = 1.0, 60.0  # bounds of the Retry-After sent to a refused client


@dataclass(frozen=True)
class EngineLoad:
    """The work that is queued and running in an engine at one moment.

    Admission.admit() uses it to decide whether a request is admitted.

    Attributes:
        waiting: number of waiting sequences.
        waiting_tokens: number of tokens that the waiting sequences must compute before they can sample.
        live: number of sequences that have not ended, waiting or running.
        prefill_tokens: number of tokens still to prefill, over all live sequences.
        latency: estimator of step times, from recent steps.
        draining: True if the engine refuses new requests.
        failed: why the engine cannot serve; None while it can.
    """

    waiting: int
    waiting_tokens: int
    live: int
    prefill_tokens: int
    latency: LatencyEstimator
    draining: bool = False
    failed: str | None = None


@dataclass(frozen=True)
class Admission:
    """Admission control: decides which requests an engine accepts, from the engine's limits and its load.

    Attributes:
        context: context length in tokens.
        vocabulary: number of token ids.
        num_blocks: number of K/V blocks.
        block_size: tokens in a K/V block.
        max_waiting: maximum number of sequences that may wait.
        max_batch_tokens: maximum number of token rows in a step.
    """

    context: int
    vocabulary: int
    num_blocks: int
    block_size: int
    max_waiting: int
    max_batch_tokens: int

    def check(self, request: Request) -> None:
        """Raise RequestError if the engine can never serve the request, whatever its load. Returns nothing.

        The error names the value that is wrong and the allowed range.
        """
        n, context, p = len(request.prompt), self.context, request.params
        if n == 0:
            raise RequestError("the prompt is empty; give at least one token")
        if n > context:
            raise RequestError(f"the prompt has {n} tokens, the context holds {context}; shorten it by {n - context}")
        named = (
            ("", request.prompt), ("stop ", p.stop_token_ids), ("biased ", p.logit_bias),
            ("allowed ", p.allowed_token_ids), ("scored ", p.logprob_token_ids),
            *(("forbidden ", word) for word in request.bad_words),
        )  # fmt: skip
        for what, ids in named:
            if ids and not 0 <= min(ids) <= max(ids) < self.vocabulary:
                bad = next(t for t in ids if not 0 <= t < self.vocabulary)
                raise RequestError(f"{what}token id {bad} is outside 0..{self.vocabulary - 1}")
        blocks, size = -(-max_kv_tokens(request, context) // self.block_size), self.block_size
        if blocks > self.num_blocks:
            raise RequestError(
                f"{n} prompt tokens and max_tokens={p.max_tokens} can need {blocks * size} tokens of K/V cache, "
                f"which holds {self.num_blocks * size}; lower max_tokens or give the cache more memory"
            )
        if p.n > self.max_waiting:
            raise RequestError(f"n is {p.n}, max_waiting is {self.max_waiting}; ask for fewer choices at a time")
        if (p.grammar is None) != (request.matcher is None):
            raise RequestError("`params.grammar` and `matcher` go together; give both or neither")
        for name, value in (("queue_timeout", request.queue_timeout), ("timeout", request.timeout)):
            if value is not None and not value > 0:
                raise RequestError(f"{name} is {value}; allowed: seconds above 0, or None")

    def max_tokens(self, prompt_tokens: int) -> int:
        """Returns the largest possible `max_tokens` of a request whose prompt has `prompt_tokens` tokens.

        Prompt and output must fit into the context and into the K/V cache. A result below 1 means that the prompt is
        too long.
        """
        return min(self.context, self.num_blocks * self.block_size) - prompt_tokens + 1

    def admit(self, request: Request, load: EngineLoad) -> float:
        """Admit a request under the given load, or raise Refused. Returns the estimated seconds until the request ends.

        The estimate is not multiplied by the slowdown that was observed for earlier requests. Raises Refused in these
        cases:

        - The engine is draining or has failed.
        - The engine's queue is full.
        - The request would meet its `timeout` on an idle engine, but not under this load.
        """
        n = request.params.n
        if load.failed is not None:
            raise Refused("failed", load.failed, None)
        if load.draining:
            raise Refused("draining", "the engine is draining and admits no more requests", None)
        if load.waiting + n > self.max_waiting:
            why = f"{load.waiting} sequences are waiting, max_waiting is {self.max_waiting}; retry later"
            raise Refused("full", why, _retry_after(self._seconds_to_prefill(load)))
        estimate, idle_estimate = self._estimates(request, load)
        likely, likely_idle = (load.latency.percentile_90(seconds) for seconds in (estimate, idle_estimate))
        if load.live and request.timeout is not None and likely_idle <= request.timeout < likely:
            why = f"with {load.live} others it would take about {likely:.3g} s, its timeout is {request.timeout:g} s"
            raise Refused("late", f"{why}; retry later or ask for less", _retry_after(likely - request.timeout))
        return estimate

    def _seconds_to_prefill(self, load: EngineLoad) -> float:
        """Returns the estimated seconds to prefill all waiting sequences. Running sequences are not included."""
        tokens = load.waiting_tokens
        return load.latency.estimate(tokens, -(-tokens // self.max_batch_tokens), 0)

    @staticmethod
    def _estimates(request: Request, load: EngineLoad) -> tuple[float, float]:
        """Returns two estimates of the seconds until the request ends: (under the given load, on an idle engine)."""
        prompt, n = len(request.prompt), request.params.n
        outputs = 0.0 if request.scored else load.latency.output_tokens(request.params.max_tokens)
        beside = load.latency.estimate(load.prefill_tokens + prompt, outputs, load.live + n)
        return beside, load.latency.estimate(prompt, outputs, n)


def _retry_after(seconds: float) -> float:
    return min(max(seconds, RETRY_AFTER_MIN_S), RETRY_AFTER_MAX_S)
