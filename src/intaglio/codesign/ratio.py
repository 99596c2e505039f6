"""Search for the best numbers of prefill and decode servers, and for their load, for a number of chips.

The rates of one server of each kind, in closed form, give the best ratio; the two queues in virtual time confirm it,
with fewer open requests if their mean latencies break a limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from intaglio.chips import ChipError, Target
from intaglio.codesign.disaggregated import Apart, ApartResult, serve_apart
from intaglio.codesign.placement import Placement
from intaglio.codesign.queue import QueueSettings
from intaglio.codesign.steady import Question
from intaglio.codesign.steps import Server, StepTimes
from intaglio.compiler import LayoutError
from intaglio.measure.workload import LoadRequest
from intaglio.progress import Progress, silent

# Part of the prefill servers' rate that a ratio uses. A prompt's wait grows with load / (1 - load) (the formula of
# Pollaczek and Khinchine): 5.7 at 85 %, 19 at 95 %. Chosen below that rise; the queues that confirm a ratio decide.
PREFILL_LOAD = 0.85
TRIES = 8  # of the queues for one ratio, each with 15 % fewer requests
FEWER = 0.85


@dataclass(frozen=True)
class Kind:
    """One kind of server of a disaggregated deployment: the prefill servers, or the decode servers.

    Attributes:
        times: gives the seconds and joules of the steps of one server; times.server describes the server.
        settings: settings of the server's engine.
    """

    times: StepTimes
    settings: QueueSettings

    @property
    def chips(self) -> int:
        """Number of chips of one server."""
        return self.times.server.placement.chips_per_server

    def of(self, replicas: int) -> StepTimes:
        """The StepTimes of `replicas` servers of this kind: a new object that knows the number of servers.

        A server's steps take equally long with any number of servers. The new object therefore shares the cache of step
        times (`tables`) with `self.times`.
        """
        server = self.times.server
        many = replace(server, placement=replace(server.placement, replicas=replicas))
        times = StepTimes(many, self.times.target, self.times.fusions)
        times.tables = self.times.tables
        return times


@dataclass(frozen=True)
class Ratio:
    """Numbers of prefill servers and decode servers of a deployment, with its load and its expected rate.

    Attributes:
        prefill: number of prefill servers.
        decode: number of decode servers.
        concurrency: number of requests open at once.
        rate: requests per second expected of all servers together.
    """

    prefill: int
    decode: int
    concurrency: int
    rate: float


def prompt_seconds(kind: Kind, input: int, count: int = 1) -> float:
    """Seconds that one prefill server needs to compute `count` prompts of `input` tokens together.

    Prompts longer than a step are computed in chunks. With count=1 the result is the shortest possible time to the
    first token.
    """
    budget = kind.settings.max_batch_tokens
    ends = [*range(budget, input, budget), input]
    starts = [0, *ends[:-1]]
    return sum(kind.times.cost(0, 1, [(b - a, b, count)])[0] for a, b in zip(starts, ends, strict=True))


def prompt_rate(kind: Kind, input: int) -> tuple[float, float]:
    """(prompts per second, seconds per round) of one prefill server that always has prompts waiting.

    In a round, each data-parallel copy of the attention layers (DP rank) computes as many whole prompts as fit into
    settings.max_batch_tokens. If a prompt is longer than that, each DP rank computes one prompt in chunks.

    kind: the server. input: tokens of each prompt.
    """
    count = kind.times.copies * max(1, kind.settings.max_batch_tokens // input)
    seconds = prompt_seconds(kind, input, count)
    return count / seconds, seconds


def most_decoding(kind: Kind, input: int, output: int, tpot: float) -> int:
    """The largest number of requests that one decode server can decode at once with steps of at most `tpot` seconds.

    It is also limited by the engine's maximum number of sequences and by the size of the K/V cache. It is 0 if a step
    with one request takes longer. A step is timed with half of each response in the cache.

    kind: the server. input, output: numbers of tokens of each request's prompt and response.
    """
    high = min(kind.settings.max_sequences, kind.settings.room.sequences(input + output))
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        if kind.times.cost(middle, input + output / 2)[0] <= tpot:
            low = middle
        else:
            high = middle - 1
    return low


def best_ratio(prefill: Kind, decode: Kind, question: Question, chips: int) -> Ratio | None:
    """Divide chips into prefill and decode servers. Returns the Ratio with the highest estimated requests per second.

    In the estimate, prefill servers work at the fraction PREFILL_LOAD of their full rate. Each decode server decodes
    the largest number of requests at once that the limit of the time per token, the engine's settings and the K/V cache
    allow. Half of each response is in the cache.

    Returns None in three cases: no numbers of servers use exactly `chips` chips; one prompt takes longer than the limit
    of the time to first token; a decode server cannot decode even one request within the limits.

    Args:
        prefill: step times and settings of one prefill server.
        decode: step times and settings of one decode server.
        question: lengths of the requests, and limits of their latencies.
        chips: number of chips that all servers together have, exactly.
    """
    rate, full_s = prompt_rate(prefill, question.input)
    n = most_decoding(decode, question.input, question.output, question.limits.tpot)
    if not n or prompt_seconds(prefill, question.input) > question.limits.ttft:
        return None
    prompt_s = min(full_s, question.limits.ttft)  # that a prompt may wait and be computed
    step = decode.times.cost(n, question.input + question.output / 2)[0]
    each = n / (max(1, question.output - 1) * step)  # requests/s of a decode server with n open
    best: Ratio | None = None
    for a in range(1, chips // prefill.chips + 1):
        b, rest = divmod(chips - a * prefill.chips, decode.chips)
        if rest or b < 1:
            continue
        reached = min(PREFILL_LOAD * a * rate, b * each)
        if best is None or reached > best.rate:
            open_ = round(reached / (b * each) * b * n + reached * prompt_s)
            best = Ratio(a, b, max(1, open_), reached)
    return best


def kinds(
    question: Question, on: Target, layouts: Sequence[str], budget: int, sequences: int
) -> tuple[dict[str, Kind], list[tuple[str, str]]]:
    """Compile the model for one server of each layout. Returns ({layout: Kind}, [(layout, reason)]).

    A Kind has the step times and settings of the server. The list has the refused layouts, each with the reason as
    text. A layout is refused if the model and one prompt do not fit the chips, if the model cannot be divided this way,
    or if the chip's links do not connect so many chips.

    Args:
        question: the model, its number formats and its load.
        on: chip and kernel library.
        layouts: texts such as tp8 or dp8/ep8.
        budget: maximum tokens of a step on one data-parallel copy of the attention layers (DP rank).
        sequences: maximum sequences of a step on one DP rank.

    Raises LayoutError for a text that is no layout, and ValueError for a layout of more than one server.
    """
    found: dict[str, Kind] = {}
    refused: list[tuple[str, str]] = []
    for text in dict.fromkeys(layouts):
        placement = Placement.parse(text)
        if placement.replicas > 1:
            raise ValueError(f"{text} has {placement.replicas} replicas; with --find give the layout of one server")
        try:
            times = StepTimes(Server.of(question.program, placement, question.formats), on)
            kv = times.server.kv_room(on, question.memory_share, budget, sequences, gives_back=False)
            if kv.tokens() <= question.input:
                raise ChipError(
                    f"{on.chip.name} has room for K/V of {kv.tokens():,} tokens; a prompt has {question.input:,}"
                )
            times.cost(1, question.input)  # raises ChipError for ranks that no network joins
        except (ChipError, LayoutError) as e:
            refused.append((text, str(e)))
            continue
        found[text] = Kind(times, QueueSettings(kv, budget, sequences * times.copies))
    return found, refused


def search(
    question: Question, prefill: dict[str, Kind], decode: dict[str, Kind], chips: int, progress: Progress = silent
) -> list[tuple[str, str, ApartResult]]:
    """Find the best numbers of prefill and decode servers, for each pair of a prefill layout and a decode layout.

    Returns a list of (prefill placement, decode placement, ApartResult), ordered by output tokens/s per chip, the
    highest first. A placement is text: 2x(dp8/ep8) means two servers of layout dp8/ep8. The ApartResult has the
    simulated figures.

    Args:
        question: the load and its limits.
        prefill: {layout: step times and settings of one prefill server}, see kinds().
        decode: {layout: step times and settings of one decode server}.
        chips: number of chips that all servers together have, exactly.
        progress: called before each pair.

    A pair of layouts is left out if no numbers of servers use exactly `chips` chips and keep the latency limits. Raises
    ValueError for responses of fewer than two tokens.
    """
    out: list[tuple[str, str, ApartResult]] = []
    pairs = [(a, b) for a in prefill for b in decode]
    for i, (a, b) in enumerate(pairs):
        progress(i, len(pairs), f"{a} and {b}: searching")
        found = best_ratio(prefill[a], decode[b], question, chips)
        if found and (done := confirmed(prefill[a], decode[b], found, question)):
            first, second = prefill[a].of(found.prefill), decode[b].of(found.decode)
            out.append((str(first.server.placement), str(second.server.placement), done))
    return sorted(out, key=lambda row: -row[2].tokens_per_s / row[2].chips)


def confirmed(first: Kind, second: Kind, found: Ratio, question: Question) -> ApartResult | None:
    """Simulate prefill and decode servers. Returns the ApartResult of the first run that keeps the latency limits.

    The first run has found.concurrency requests open at once. Each further run has 15 % fewer than the run before it.
    Returns None if none of TRIES runs keeps the limits, or if a run with only one open request does not keep them.

    Args:
        first: step times and settings of one prefill server.
        second: step times and settings of one decode server.
        found: numbers of prefill and decode servers, and of open requests.
        question: lengths of the requests, and limits of their mean latencies (time to first token, time per token).

    Raises ValueError for a request that a K/V cache cannot hold, or with fewer than two output tokens.
    """
    apart = Apart(first.of(found.prefill), second.of(found.decode), first.settings, second.settings)
    open_ = found.concurrency
    for _ in range(TRIES):
        done = serve_apart(apart, LoadRequest(0.0, question.input, question.output), open_)
        if done.ttft <= question.limits.ttft and done.tpot <= question.limits.tpot:
            return done
        if open_ == 1:
            return None
        open_ = max(1, int(FEWER * open_))
    return None
