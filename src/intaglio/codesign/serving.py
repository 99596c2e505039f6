"""Serving in virtual time: the engine and scheduler that serve real requests, on the modelled clock of chips.

No values are computed, so a model of any size runs. What a step takes is what `Simulation` says; what happens between
steps (arrivals, queues, chunked prefill, preemption) is the engine itself.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any

import numpy as np

from intaglio.chips import ChipError, Target
from intaglio.codesign.memory import KvRoom, free_bytes, memory_use, page_bytes
from intaglio.compiler import Layout
from intaglio.devices import StateSpec
from intaglio.devices.silicon import NONE, SiliconDevice, SiliconExecutable
from intaglio.measure.load import Outcome, Summary, summarise
from intaglio.measure.modelled import run_load
from intaglio.measure.workload import LoadRequest
from intaglio.program import Program
from intaglio.progress import Progress, silent
from intaglio.runtime import Engine, Request, SamplingParams
from intaglio.runtime.windows import longest_window, reservations
from intaglio.silicon.plan import Plan
from intaglio.silicon.sizes import BLOCK, BatchSizes

MOMENTS = 60  # times of a run at which queue and cache are shown


@dataclass(frozen=True)
class EngineSettings:
    """Settings of the engine in a serving simulation.

    Attributes:
        max_batch_tokens: maximum number of tokens in a step; a longer prompt is prefilled in chunks.
        max_sequences: maximum number of sequences that run at once.
        memory_share: fraction of a chip's HBM that weights, activations and K/V cache may fill.
        step_overhead_s: seconds between one step and the next in which the chips wait for the host.
        request_overhead_s: seconds that the host spends on each request outside the engine, such as HTTP and tokenizer.
            They are added to the time to first token.

    Raises ValueError for a memory_share that is not above 0 and at most 1, and for a negative or infinite overhead.
    """

    max_batch_tokens: int = 2048
    max_sequences: int = 256
    memory_share: float = 0.9
    step_overhead_s: float = 0.0
    request_overhead_s: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.memory_share <= 1:
            raise ValueError(f"memory_share is {self.memory_share:g}; allowed: above 0, up to 1")
        for name in ("step_overhead_s", "request_overhead_s"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name):g}; allowed: 0 or more seconds")


@dataclass(frozen=True)
class Limits:
    """The largest acceptable latencies of a request, in seconds; inf: no limit.

    Attributes:
        ttft: limit of the time to the first token.
        tpot: limit of the mean time per token after the first.
    """

    ttft: float = float("inf")
    tpot: float = float("inf")

    def met_by(self, outcome: Outcome) -> bool:
        """True if a request ended without an error and both of its latencies, `ttft` and `tpot`, are within the limits.

        A response of one token has no time per token: only its time to first token is checked.
        """
        if outcome.error is not None or outcome.first is None:
            return False
        return outcome.first <= self.ttft and (outcome.each or 0.0) <= self.tpot


@dataclass(frozen=True)
class Moment:
    """The state of a served load at one time: waiting and decoding requests, and use of the K/V caches.

    Attributes:
        at: time in seconds since the beginning of the load.
        waiting: number of requests that were sent and have no token yet: their prompts are queued or being computed.
        decoding: number of requests that have their first token and not their last.
        kv_share: used fraction of all servers' K/V caches. Only decoding requests count, with their prompts and the
            tokens generated so far. If layers with a sliding window have a cache of their own, the value is the larger
            of the two caches' fractions.
    """

    at: float
    waiting: int
    decoding: int
    kv_share: float


def moments(
    outcomes: Sequence[Outcome], room: KvRoom, servers: int = 1, count: int = MOMENTS
) -> tuple[Moment, ...]:  # fmt: skip
    """The state of a served load at `count` equally spaced times, as a tuple of Moments; () without outcomes.

    The first Moment is at the beginning of the load, the last at the end of the last response. The tokens of a response
    are assumed to come at equal intervals. A request that failed before its first token counts as waiting until it
    failed.

    outcomes: results of all requests. room: K/V capacity of each server. servers: number of servers that served the
    load together. count: number of Moments.
    """
    if not outcomes:
        return ()
    times = [(o.start, o.end if o.first is None else o.first, o.end, o.prompt, o.output) for o in outcomes]
    start, first, end, prompt, output = np.array(times).T
    first, end = start + first, start + end
    found = []
    for at in np.linspace(0.0, end.max(), count):
        decodes = (first <= at) & (at < end)
        part = (at - first[decodes]) / np.maximum(1e-9, end[decodes] - first[decodes])
        held = prompt[decodes] + part * output[decodes]
        kept = np.minimum(held, room.window) if room.window else held
        share = room.used(float(held.sum()), float(kept.sum())) / servers
        waiting = int((start <= at).sum() - (first <= at).sum())
        found.append(Moment(float(at), waiting, int(decodes.sum()), share))
    return tuple(found)


@dataclass(frozen=True)
class ServingResult:
    """Results of serving a load in virtual time.

    Attributes:
        summary: latencies and rates.
        chips: number of chips that served the load.
        within_limits: fraction of all requests whose time to first token and time per token met the given limits.
        goodput: number of requests that met these limits, per second of the load.
        joules: estimated energy of all chips during steps and between them.
        steps: number of engine steps.
        preemptions: times that a sequence was preempted because the K/V cache was full.
        kv_tokens: number of tokens that the K/V cache of one server can hold if all requests have the load's mean
            length.
        moments: waiting and decoding requests, and use of the K/V caches, at equally spaced times; see moments().
    """

    summary: Summary
    chips: int
    within_limits: float
    goodput: float
    joules: float
    steps: int
    preemptions: int
    kv_tokens: int
    moments: tuple[Moment, ...] = ()

    @property
    def output_tokens_per_s_per_chip(self) -> float:
        """Output tokens per second of the whole load, divided by the number of chips."""
        return self.summary.output_tokens_per_s / self.chips

    @property
    def watts_per_chip(self) -> float:
        """Estimated mean power of a chip over the whole load, in watts."""
        return self.joules / self.summary.seconds / self.chips

    @property
    def output_tokens_per_joule(self) -> float:
        """Output tokens of the whole load, divided by the joules that all chips together take."""
        return self.summary.output_tokens_per_s * self.summary.seconds / self.joules

    def as_dict(self) -> dict[str, Any]:
        """A dict for JSON: all fields, output tokens/s and watts per chip, and output tokens per joule."""
        figures = asdict(self)
        figures["summary"]["deadline"] = None  # JSON has no infinity
        return {
            **figures, "output_tokens_per_s_per_chip": self.output_tokens_per_s_per_chip,
            "watts_per_chip": self.watts_per_chip, "output_tokens_per_joule": self.output_tokens_per_joule,
        }  # fmt: skip


def state_of(
    stages: Sequence[Program], target: Target, settings: EngineSettings, length: int | None = None
) -> StateSpec:  # fmt: skip
    """The StateSpec of the largest K/V cache that fits on every chip beside weights and activations.

    A StateSpec says how many K/V blocks and slots of recurrent state a chip has. The number of blocks is at most the
    number that settings.max_sequences sequences of the model's full context need. If the model has recurrent state,
    there are two slots for each sequence, otherwise none. Raises ChipError if no block fits.

    Layers with a sliding window get blocks of their own if more requests fit this way. The memory is then divided so
    that both kinds of blocks are enough for the same number of requests.

    Args:
        stages: one rank's Program of each pipeline stage.
        target: chip and kernel library.
        settings: settings of the engine.
        length: tokens of one request of the load, prompt and response; None: the model's context length.
    """
    hbm, tokens, context = (
        int(target.chip.hbm_bytes * settings.memory_share),
        settings.max_batch_tokens,
        stages[0].context,
    )
    slots = 2 * settings.max_sequences if any(p.recurrent for p in stages) else 0
    step = BatchSizes(tokens, min(tokens, settings.max_sequences), ())
    most = settings.max_sequences * -(-context // BLOCK)  # more are never used
    uses = [memory_use(p, step, 1, hbm) for p in stages]
    sizes = [(free_bytes(p, use, slots), *page_bytes(p)) for p, use in zip(stages, uses, strict=True)]
    pages = min(most, *(free // max(1, full + windowed) for free, full, windowed in sizes))
    if pages < 1:
        worst = max(uses, key=lambda use: use.total)
        raise ChipError(
            f"{target.chip.name}: no room for a K/V cache: {worst}, of which {settings.memory_share:.0%} may be used. "
            "Use more chips, a smaller format or fewer tokens a step"
        )
    plain, window, blocks = StateSpec(pages, BLOCK, slots), longest_window(stages), -(-(length or context) // BLOCK)
    reserved, shared = reservations(window, BLOCK, context=context, max_batch_tokens=tokens, depth=len(stages))
    shared += 1  # the engine keeps one back
    kept = min(reserved, blocks)
    if not window or kept == blocks:
        return plain
    fit = min(settings.max_sequences, *(
        (free - shared * windowed) / (blocks * full + kept * windowed) for free, full, windowed in sizes
    ))  # fmt: skip
    own = max(reserved, int(fit * kept)) + shared
    pages = min(most, *((free - own * windowed) // max(1, full) for free, full, windowed in sizes))
    return StateSpec(pages, BLOCK, slots, own, window) if pages > 0 and fit * blocks > plain.pages else plain


def ramped(requests: Sequence[LoadRequest], concurrency: int, seconds: float) -> list[LoadRequest]:
    """The requests with new arrival times, as a list in the same order.

    The first `concurrency` requests arrive at equal intervals, from 0 s to just before `seconds`. All others arrive at
    `seconds`. Without this, requests of equal length would all start at once and then stay in step with each other.
    """
    return [replace(r, at=seconds * min(1.0, i / concurrency)) for i, r in enumerate(requests)]


def request_seconds(stages: Sequence[Program], target: Target, request: LoadRequest, concurrency: int) -> float:
    """Estimated seconds from the start to the end of a request, while `concurrency` equal requests are open.

    The estimate is the time of the request's prefill, plus one decode step for each token after the first. The prefill
    is timed as one step. A decode step processes one token of each open request, and each request has `prompt + output
    // 2` tokens in the K/V cache. Waiting and the prefills of other requests are not counted.

    stages: one rank's Program of each pipeline stage. target: chip and kernel library.
    """
    n, keys = concurrency, request.prompt + request.output // 2
    prefill = BatchSizes(request.prompt, 1, ((request.prompt, request.prompt, 1),))
    decode = BatchSizes(n, n, ((1, keys, n),))
    once, step = (sum(plan.cost(s)[0] for plan in Plan.of(stages, target)) for s in (prefill, decode))
    return once + (request.output - 1) * step


def check_context(program: Program, longest: LoadRequest) -> None:
    """Raise ValueError if a request's prompt and response are longer than the model's context."""
    if longest.prompt + longest.output > program.context:
        raise ValueError(
            f"a request of {longest.prompt:,} + {longest.output:,} tokens; the context of {program.name} is "
            f"{program.context:,}; scale the lengths down"
        )


def simulate_serving(
    program: Program, stages: Sequence[Program], target: Target, layout: str, requests: Sequence[LoadRequest],
    settings: EngineSettings, limits: Limits, concurrency: int | None = None, seed: int = 0,
    progress: Progress = silent,
) -> ServingResult:  # fmt: skip
    """Simulate the engine under a load: it schedules as for real requests, and steps take the modelled time of chips.

    Returns the ServingResult.

    Args:
        program: the whole model, as `ported()` returns it.
        stages: one rank's compiled Program of each pipeline stage, as simulate.stages() returns them.
        target: chip and kernel library.
        layout: how the chips share the model, such as tp8 or tp4pp2.
        requests: arrival times and lengths of the requests.
        settings: settings of the engine.
        limits: latency limits. The result counts the requests that keep them.
        concurrency: maximum number of requests open at once; None: any number.
        seed: seed of the prompts' token ids, which are random so that no two prompts share a prefix.
        progress: called as requests end.

    Raises ChipError if weights and K/V cache do not fit, ValueError for a request longer than the context, and
    LayoutError for a wrong layout.
    """
    check_context(program, max(requests, key=lambda r: r.prompt + r.output))
    device = SiliconDevice(target, values=NONE, stages=stages, overhead_s=settings.step_overhead_s)
    state = state_of(stages, target, settings, ceil(statistics.fmean(r.prompt + r.output for r in requests)))
    executable = device.load_program(program, NoWeights(), state)
    assert isinstance(executable, SiliconExecutable)
    engine = Engine(
        executable, clock=device.clock, rng=random.Random(seed), max_batch_tokens=settings.max_batch_tokens,
        max_sequences=settings.max_sequences, max_waiting=len(requests), checkpoint_blocks=0,
    )  # fmt: skip
    rng, vocabulary = np.random.default_rng(seed), program.vocabulary

    def request_of(planned: LoadRequest) -> Request:
        ids = rng.integers(0, vocabulary, planned.prompt).tolist()
        return Request(str(engine.counts.received), ids, SamplingParams(max_tokens=planned.output))

    outcomes = run_load(engine, device.clock, requests, request_of, concurrency, progress)
    return result(outcomes, engine, executable, target, Layout.parse(layout), settings, limits)


class NoWeights:
    """A placeholder source of weights, for simulations that compute no values and read no weights.

    read(), strips() and release() raise AssertionError; identity() returns None.
    """

    def read(self, name: str) -> Any:
        """Raise AssertionError, because a simulation that computes no values must not read a weight."""
        raise AssertionError(f"{name} is read, though no values are computed")

    strips = release = read

    def identity(self) -> str | None:
        """Return None. A real source of weights returns a text that identifies its weights' values."""
        return None


def result(
    outcomes: Sequence[Outcome], engine: Engine, executable: SiliconExecutable, target: Target, layout: Layout,
    settings: EngineSettings, limits: Limits,
) -> ServingResult:  # fmt: skip
    """The ServingResult of a load that the engine has served.

    Args:
        outcomes: Outcomes of the requests. settings.request_overhead_s is added to their latencies here.
        engine: the Engine that ran them, for its counts.
        executable: the engine's executable, for the seconds and joules of its steps.
        target: chip and kernel library.
        layout: how the chips share the model.
        settings: settings of the engine.
        limits: latency limits. The result counts the requests that keep them.
    """
    added = settings.request_overhead_s
    later = [replace(o, end=o.end + added, first=None if o.first is None else o.first + added) for o in outcomes]
    summary = summarise(later, float("inf"))
    good = sum(map(limits.met_by, later))
    stages = len(executable.plans)
    ranks_per_stage = layout.ranks // stages
    idle_s = summary.seconds * stages - executable.busy_s
    joules = ranks_per_stage * (executable.joules + max(0.0, idle_s) * target.chip.energy.idle_w)
    lengths = [o.request.prompt + o.request.output for o in later]
    room = KvRoom.of_state(
        executable.state, executable.program.context, settings.max_batch_tokens, executable.depth
    )  # fmt: skip
    return ServingResult(
        summary, layout.ranks, good / len(later), good / summary.seconds, joules, engine.counts.steps,
        engine.counts.preemptions, room.tokens(statistics.fmean(lengths)), moments(later, room),
    )  # fmt: skip
