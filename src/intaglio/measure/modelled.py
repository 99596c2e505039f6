"""Runs a load on an engine whose clock is advanced by the modelled times of simulated chips.

This is only the loop that sends requests and records latencies. codesign/serving.py makes the engine and calls it.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from intaglio.devices.clock import Clock
from intaglio.measure.load import Outcome
from intaglio.measure.workload import LoadRequest
from intaglio.progress import Progress, silent
from intaglio.runtime import Engine, Event, Refused, Request, SamplingParams

if TYPE_CHECKING:
    from intaglio.llm import LLM

FAILED = ("error", "abort", "deadline")  # finish reasons of a response that is not complete


@dataclass
class Running:
    """A request of a load test that the engine is working on.

    Attributes:
        planned: the request as planned.
        start: seconds from the beginning of the load to the moment from which the request's times count: its planned
            arrival or, if concurrency is limited, the moment when the engine got it.
        stamps: seconds from `start` to each output token.
    """

    planned: LoadRequest
    start: float
    stamps: list[float] = field(default_factory=list)

    def ended(self, event: Event, end: float) -> Outcome:
        """The Outcome of this request, which has ended.

        event: the last event of the request. end: seconds from the request's `start` to its end.
        """
        assert event.usage
        error = event.finish_reason if event.finish_reason in FAILED else None
        gaps = tuple(b - a for a, b in itertools.pairwise(self.stamps))
        first, used = self.stamps[0] if self.stamps else None, event.usage
        return Outcome(self.planned, self.start, end, first, gaps, used.prompt_tokens, used.output_tokens, error)


def run_load(
    engine: Engine,
    clock: Clock,
    requests: Sequence[LoadRequest],
    request_of: Callable[[LoadRequest], Request],
    concurrency: int | None = None,
    progress: Progress = silent,
) -> list[Outcome]:
    """Run a load test on an engine whose steps advance `clock`. Returns Outcomes in the order in which requests ended.

    A request is given to the engine when the clock reaches its planned arrival. While the engine has nothing to do, the
    clock jumps to the next arrival. If the engine refuses a request, Outcome.error has the reason.

    concurrency: largest number of open requests; None: no limit. With a limit a request waits until fewer are open, and
    its times count from the moment when the engine gets it.

    request_of: function that makes the engine's Request from a LoadRequest. Each Request must have an id of its own.
    """
    began, pending, most = clock(), deque(requests), concurrency or math.inf
    running: dict[str, Running] = {}
    done: list[Outcome] = []
    while pending or running:
        what = f"{len(done)} of {len(requests)} requests ended, {clock() - began:,.1f} s modelled"
        progress(len(done), len(requests), what)
        if not running:
            clock.wait_until(began + pending[0].at)
        while pending and len(running) < most and began + pending[0].at <= clock():
            planned = pending.popleft()
            request, start = request_of(planned), planned.at if concurrency is None else clock() - began
            try:
                engine.add(request)
                running[request.id] = Running(planned, start)
            except Refused as e:
                done.append(Outcome(planned, start, 0.0, error=e.reason))
        for event in engine.step():
            one = running[event.request]
            if event.scored:
                one.stamps.append(clock() - began - one.start)
            if event.usage:
                del running[event.request]
                done.append(one.ended(event, clock() - began - one.start))
    return done


def load_modelled(
    llm: LLM,
    requests: Sequence[LoadRequest],
    seed: int = 0,
    concurrency: int | None = None,
    progress: Progress = silent,
) -> list[Outcome]:
    """Run a load test in the modelled time of the simulated chips. Returns one Outcome per request.

    The Outcomes are in the order in which requests ended.

    Args:
        llm: a model on the device "silicon".
        requests: arrival time, prompt length and output length of each request.
        seed: random seed of the prompts, which are random token ids.
        concurrency: largest number of open requests; None: no limit.
        progress: called before each step as progress(requests ended, requests in all, text for the display).
    """
    rng, vocabulary = random.Random(seed), llm.model.program.vocabulary

    def request_of(planned: LoadRequest) -> Request:
        ids = [rng.randrange(vocabulary) for _ in range(planned.prompt)]
        return llm.prepare(ids, SamplingParams(max_tokens=planned.output, ignore_eos=True))[0]

    return run_load(llm.engine, llm.clock, requests, request_of, concurrency, progress)
