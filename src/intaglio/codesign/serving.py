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
    """How the simulated engine is run.

    Attributes:
        max_batch_tokens: maximum token rows of a step; a longer prompt is prefilled in chunks.
        max_sequences: maximum sequences that run at once.
        memory_share: fraction of a chip's HBM that weights, activations and K/V cache may fill.
        step_overhead_s: seconds between one step and the next in which the chips wait for the host.
        request_overhead_s: the host's seconds for each request outside the engine, such as HTTP and tokenizer. They are
            added to the time to first token.

    Raises ValueError for a memory_share outside 0..1 or a negative overhead.
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
    """Largest acceptable latencies of a request, in seconds.

    Attributes:
        ttft: time to the first token.
        tpot: mean time per token after the first.
    """

    ttft: float = float("inf")
    tpot: float = float("inf")

    def met_by(self, outcome: Outcome) -> bool:
        """True if a request ended without an error and both its latencies, `ttft` and `tpot`, are within these limits.

        A response of one token has no time per token and needs only `ttft`.
        """
        if outcome.error is not None or outcome.first is None:
            return False
        return outcome.first <= self.ttft and (outcome.each or 0.0) <= self.tpot


@dataclass(frozen=True)
class Moment:
    """The load at one time of a run.

    Attributes:
        at: seconds since the beginning of the load.
        waiting: requests that were sent and have no token yet: in the queue, or with a prompt that is being computed.
        decoding: requests that have their first token, and not their last.
        kv_share: fraction of all servers' K/V caches that holds the prompts and tokens so far of decoding requests. If
            layers with a sliding window have a cache of their own, it is that of the fuller cache.
    """

    at: float
    waiting: int
    decoding: int
    kv_share: float


def moments(
    outcomes: Sequence[Outcome], room: KvRoom, servers: int = 1, count: int = MOMENTS
) -> tuple[Moment, ...]:  # fmt: skip
    """The state of a served load at `count` equally spaced times, as a tuple of Moments; () without outcomes.

    A Moment has the numbers of waiting and of decoding requests, and the used share of the K/V caches. The first is at
    the beginning of the load, the last at the end of the last response. The tokens of a response are assumed to come at
    equal intervals. Requests that failed before their first token count as waiting until their end.

    outcomes: results of all requests. room: room for K/V on each of `servers` servers, which serve them together.
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
        goodput: requests per second that met these limits.
        joules: estimated energy of all chips during steps and between them.
        steps: number of engine steps.
        preemptions: times that a sequence was preempted because the K/V cache was full.
        kv_tokens: number of tokens that the K/V cache of one server can hold, in requests of the load's mean length.
        moments: waiting and decoding requests, and use of the K/V caches, over the time of the load; see moments().
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
        """Output tokens for each joule that all chips together take."""
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
    """The StateSpec of the largest K/V cache that fits beside weights and activations on every chip.

    The StateSpec says how many K/V blocks and slots of recurrent state a chip has. There are at most as many blocks as
    settings.max_sequences sequences of the model's full context need. There are two slots for each sequence if the
    model has recurrent state, and otherwise none. Raises ChipError if no block fits.

    Layers with a sliding window get blocks of their own if more requests fit that way. The memory is then divided so
    that both kinds of blocks are enough for the same number of requests.

    stages: one rank's Program of each pipeline stage. length: tokens of a request of the load, prompt and response;
    None: the model's context.
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
    """Copies of the requests with other arrival times, as a list in the same order.

    The first `concurrency` requests arrive at 0 s and then at equal intervals before `seconds`; all others arrive at
    `seconds`. Requests of one length that all started at once would stay in step with each other.
    """
    return [replace(r, at=seconds * min(1.0, i / concurrency)) for i, r in enumerate(requests)]


def request_seconds(stages: Sequence[Program], target: Target, request: LoadRequest, concurrency: int) -> float:
    """Estimated seconds from the start to the end of a request, while `concurrency` such requests are open.

    The estimate is the time of the request's prefill, plus one decode step of all open requests for each token after
    the first. The prefill is timed as one step, each decode step with `prompt + output // 2` tokens of K/V for each
    request. Waiting and the prefills of other requests are not counted.

    stages: one rank's Program of each pipeline stage.
    """
    n, keys = concurrency, request.prompt + request.output // 2
    prefill = BatchSizes(request.prompt, 1, ((request.prompt, request.prompt, 1),))
    decode = BatchSizes(n, n, ((1, keys, n),))
    once, step = (sum(plan.cost(s)[0] for plan in Plan.of(stages, target)) for s in (prefill, decode))
    return once + (request.output - 1) * step


def check_context(program: Program, longest: LoadRequest) -> None:
    """Raise ValueError if a request is longer than the model's context."""
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
    """Run a load on the engine with the modelled times of chips. Returns the ServingResult.

    Args:
        program: the whole model, as `ported()` returns it.
        stages: one rank's compiled Program of each pipeline stage, as `stages()` returns them.
        target: chip and kernel library.
        layout: how the chips share the model, such as tp8 or tp4pp2.
        requests: arrival times and lengths.
        settings: settings of the engine.
        limits: latencies that a good response keeps.
        concurrency: maximum requests open at once; None: any number.
        seed: seed of the prompts' token ids. They are random, so that no prompt shares a prefix with another.
        progress: called as requests end.

    Raises ChipError if weights and K/V cache do not fit, ValueError for a request longer than the context, LayoutError
    for a wrong layout.
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
    """A source of weights for an executable that reads none.

    read(), strips() and release() raise AssertionError; identity() is None.
    """

    def read(self, name: str) -> Any:
        """Raise AssertionError: no weight may be read where no values are computed."""
        raise AssertionError(f"{name} is read, though no values are computed")

    strips = release = read

    def identity(self) -> str | None:
        """None. A real source of weights returns a text that identifies their values; this one has no values."""
        return None


def result(
    outcomes: Sequence[Outcome], engine: Engine, executable: SiliconExecutable, target: Target, layout: Layout,
    settings: EngineSettings, limits: Limits,
) -> ServingResult:  # fmt: skip
    """The ServingResult of a finished load.

    Args:
        outcomes: Outcomes of the requests, without the overhead outside the engine, which is added here.
        engine: the Engine that ran them, for its counts.
        executable: the engine's executable, for the seconds and joules of its steps.
        target: chip and kernel library.
        layout: how the chips share the model.
        settings: settings of the engine.
        limits: latencies that a good response keeps.
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
