"""The steady state of a server under a constant number of open requests, in closed form; and a search over designs.

An estimate needs the times of only a few steps, so the search compares many designs by estimates. It then simulates the
best designs request by request (`codesign.queue`) and reports the figures of this simulation.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from intaglio.chips import ChipError, Target
from intaglio.codesign.placement import Placement
from intaglio.codesign.queue import QueueSettings, check_room, serve
from intaglio.codesign.serving import Limits, ramped
from intaglio.codesign.steps import Costs, Formats, Server, StepTimes
from intaglio.compiler import LayoutError
from intaglio.measure.workload import LoadRequest
from intaglio.program import Program
from intaglio.progress import Progress, silent

MOST = 4096  # requests of one server that the search keeps open, at most
TURNS = 4  # requests for each that is open, in the queue that confirms
ROUNDS = 40  # of the fixed point for the number of sequences that decode
KEEP = 3  # of the best estimates, that the queue confirms
BUDGETS = (512, 2048, 8192)  # tokens of a step that the search tries


@dataclass(frozen=True)
class Estimate:
    """Estimated latencies and rates of one server with a constant number of open requests. Times are in seconds.

    Attributes:
        ttft: mean time to the first token, waiting included.
        tpot: mean time per token after the first; 0 for responses of one token.
        tokens_per_s: output tokens per second.
        joules_per_s: energy per second of all chips of the server.
        decoding: mean number of sequences that decode at a time.
    """

    ttft: float
    tpot: float
    tokens_per_s: float
    joules_per_s: float
    decoding: float


def estimate(times: Costs, s: QueueSettings, input: int, output: int, concurrency: int) -> Estimate:
    """The Estimate (latencies and rates, by a formula) of a server that always has `concurrency` requests open.

    At most s.max_sequences requests are prefilled or decoded at a time, and no more than fit the K/V cache. The others
    wait, and Little's law gives their waiting time. Each decoding request is assumed to have half of its response in
    the cache. Steps with prompts take longer than steps that only decode; if `s.mixed` is False, a step with prompts
    decodes nothing. The fraction of steps with prompts follows from the steady state, in which as many prompts start as
    responses end. If even prompts in every step would start too few, the estimate has fewer decoding requests.

    Args:
        times: gives the seconds and joules of each step of the server.
        s: settings of the server's engine.
        input: number of prompt tokens of each request.
        output: number of new tokens of each request.
        concurrency: number of open requests.

    Raises ValueError if not even one request fits the K/V cache.
    """
    check_room(s.room, input, output)
    slots = min(concurrency, s.max_sequences, s.room.sequences(input + output))
    copies, context = times.copies, input + output / 2
    rounds = max(1.0, (output - 1) / s.tokens_per_step)  # decode steps of a request
    decoding = float(slots)
    for _ in range(ROUNDS):
        n = max(1, round(decoding))
        overhead = s.step_s + s.sequence_s * n / copies
        plain, plain_j = times.cost(n, context) if output > 1 else (0.0, 0.0)
        budget = max(1, s.max_batch_tokens - (-(-n // copies) if s.mixed and output > 1 else 0)) * copies
        wanted = n * input / rounds  # prompt tokens for each step that decodes
        whole = budget // input
        if wanted >= 0.9 * budget and input > budget // copies:  # every step is full, of a chunk for each copy
            chunks, parts = [(budget // copies, (input + budget // copies) // 2, copies)], input / budget
        elif wanted >= 0.9 * budget:  # every step is full
            rest = budget - whole * input
            chunks = [(input, input, whole)] if whole else []
            chunks += [(min(rest, input), (input + rest) // 2, 1)] if rest else []
            parts = input / budget  # steps of a prompt
        else:
            cut = -(-input // (budget // copies))
            together = max(1, min(whole, round(wanted / input))) if cut == 1 else 1
            chunk = -(-input // cut)
            chunks = [(chunk, min(input, (chunk * (cut + 1)) // 2), together)]
            parts = cut / together
        prompts = sum(m for *_, m in chunks)
        mixed, mixed_j = times.cost(n if s.mixed and output > 1 else 0, context, chunks)
        mixed_s, plain_s = mixed + overhead + s.sequence_s * prompts / copies, plain + overhead
        share = n * parts / rounds  # steps with prompts for each step that decodes
        if s.mixed and output > 1:
            limit = rounds / parts  # sequences that decode if every step has prompts
            busy = min(1.0, share)
            step, step_j = (1 - busy) * plain_s + busy * mixed_s, (1 - busy) * plain_j + busy * mixed_j
            tpot, ready = step, min(slots, limit)
        else:
            busy = share * mixed_s / (share * mixed_s + (plain_s if output > 1 else 0.0))
            tpot, step_j, ready = plain_s + share * mixed_s, plain_j + share * mixed_j, slots
        prefill = max(1.0, parts) * mixed_s * (1 + busy / 2) + (1 - busy) * plain_s / 2
        most = 1 / (parts * mixed_s)  # requests per second if every step computes prompts
        rate = min(n / (rounds * tpot), most) if output > 1 else most
        decoding = 0.5 * decoding + 0.5 * max(1.0, min(ready, slots - rate * prefill))
    waiting = concurrency - decoding if output > 1 else concurrency
    ttft = max(prefill, waiting / rate) + s.request_s + s.prompt_token_s * input + s.admission_steps * tpot
    watts = step_j / tpot if output > 1 else mixed_j / mixed_s
    return Estimate(ttft, tpot * rounds / (output - 1) if output > 1 else 0.0, rate * output, watts, decoding)


@dataclass(frozen=True)
class Design:
    """A serving system (chips, layout and load) with its latencies, rates and memory. Times are in seconds.

    Attributes:
        chip: name of the chip.
        library: name of its kernel library.
        placement: how the chips share the model.
        concurrency: number of requests open at once, on all replicas together.
        max_batch_tokens: maximum tokens of a step, on each data-parallel copy of the attention layers (DP rank).
        ttft: mean time to the first token.
        tpot: mean time per token after the first.
        tokens_per_s: output tokens per second of all replicas.
        watts: mean power of all chips.
        weight_bytes: bytes of weights on the chip that has the most.
        kv_bytes: bytes of K/V on the chip that has the most, when every open request has half of its response.
        kv_tokens: number of tokens whose K/V one server can hold if all requests have the load's length.
        confirmed: True if the figures come from a simulation of the requests; False if they come from the formula
            estimate().
        within: True if `ttft` and `tpot` are within the latency limits for which the design was made.
    """

    chip: str
    library: str
    placement: Placement
    concurrency: int
    max_batch_tokens: int
    ttft: float
    tpot: float
    tokens_per_s: float
    watts: float
    weight_bytes: float
    kv_bytes: float
    kv_tokens: int
    confirmed: bool = False
    within: bool = True

    @property
    def per_chip(self) -> float:
        """Output tokens per second of all replicas, divided by the number of chips."""
        return self.tokens_per_s / self.placement.chips

    @property
    def per_watt(self) -> float:
        """Output tokens per second, divided by the power of all chips in watts; 0 if `watts` is 0.

        This equals output tokens per joule.
        """
        return self.tokens_per_s / self.watts if self.watts else 0.0

    @property
    def per_user(self) -> float:
        """Tokens per second of one response after its first token; 0 for responses of one token.

        This is the rate that one user gets.
        """
        return 1 / self.tpot if self.tpot else 0.0

    def as_dict(self) -> dict[str, Any]:
        """A dict for JSON: the fields, and rates derived from them. `layout` is the placement as text.

        The derived values are the number of chips, output tokens/s per chip, tokens/s per user (per response, after its
        first token), tokens per joule, and watts per chip.
        """
        own = {name: value for name, value in vars(self).items() if name != "placement"}
        return {
            **own, "layout": str(self.placement), "chips": self.placement.chips,
            "tokens_per_s_per_chip": self.per_chip, "tokens_per_s_per_user": self.per_user,
            "tokens_per_joule": self.per_watt, "watts_per_chip": self.watts / self.placement.chips,
        }  # fmt: skip


@dataclass(frozen=True)
class Question:
    """The input of a search for designs: the model, its load, the latency limits, and the engine's overheads.

    Attributes:
        program: the whole model.
        formats: number formats of weights, K/V and activations.
        input: number of prompt tokens of a request.
        output: number of new tokens of a request.
        limits: largest acceptable mean latencies.
        memory_share: fraction of a chip's HBM that may be filled.
        max_sequences: maximum number of sequences of a server that run at once.
        settings: the engine's overheads. Its fields kv, max_batch_tokens and max_sequences are not used: each design
            has its own values.

    Raises ValueError if a request is longer than the model's context.
    """

    program: Program
    formats: Formats
    input: int
    output: int
    limits: Limits = field(default_factory=Limits)
    memory_share: float = 0.9
    max_sequences: int = MOST
    settings: QueueSettings = field(default_factory=lambda: QueueSettings(0))

    def __post_init__(self) -> None:
        if self.input + self.output > self.program.context:
            raise ValueError(
                f"requests of {self.input:,} + {self.output:,} tokens; the context of {self.program.name} is "
                f"{self.program.context:,}; ask for shorter ones"
            )


class Candidate:
    """A candidate in a search for designs: a kind of chip, and a placement of the model on chips of this kind.

    Attributes:
        question: the model, its load and the latency limits.
        server: one server of the placement, compiled.
        on: chip and kernel library.
        times: gives the seconds and joules of the server's steps.
    """

    def __init__(self, question: Question, server: Server, on: Target) -> None:
        self.question, self.server, self.on = question, server, on
        self.times = StepTimes(server, on)

    def settings(self, budget: int) -> QueueSettings:
        """The QueueSettings (settings of the serving engine) of one server. Raises ChipError if no K/V block fits.

        budget: maximum tokens of a step, on each data-parallel copy of the attention layers (DP rank).
        """
        q = self.question
        kv = self.server.kv_room(self.on, q.memory_share, budget, min(q.max_sequences, 256), q.max_sequences)
        return replace(q.settings, kv=kv, max_batch_tokens=budget, max_sequences=q.max_sequences)

    def design(self, concurrency: int, settings: QueueSettings, seen: Estimate, confirmed: bool) -> Design:
        """The Design (serving system with its figures) of all replicas, made from the figures of one server.

        Open requests, tokens/s and watts are multiplied by the number of replicas. Latencies are the same as for one
        server.

        Args:
            concurrency: number of requests open on one server.
            settings: settings of the server's engine.
            seen: latencies, rate and power of one server.
            confirmed: True if `seen` comes from a simulation of the requests, False if it comes from estimate().
        """
        p, q = self.server.placement, self.question
        length = q.input + q.output / 2
        held = min(concurrency, settings.room.tokens(length) / length)
        within = seen.ttft <= q.limits.ttft and seen.tpot <= q.limits.tpot
        return Design(
            self.on.chip.name, self.on.library.name, p, concurrency * p.replicas, settings.max_batch_tokens, seen.ttft,
            seen.tpot, seen.tokens_per_s * p.replicas, seen.joules_per_s * p.replicas, self.server.weight_bytes,
            held * self.server.kv_bytes(length, settings.room) / p.copies, settings.room.tokens(q.input + q.output),
            confirmed, within,
        )  # fmt: skip

    def estimated(self, concurrency: int, budget: int) -> Design:
        """The Design for one concurrency and token budget, with figures from the formula estimate().

        A Design is a serving system with its figures. concurrency: number of requests open on each server. budget:
        maximum tokens of a step on each DP rank (data-parallel copy of attention). Raises ValueError if not even one
        request fits the K/V cache, ChipError if no K/V block fits.
        """
        q, settings = self.question, self.settings(budget)
        seen = estimate(self.times, settings, q.input, q.output, concurrency)
        return self.design(concurrency, settings, seen, confirmed=False)

    def queued(self, concurrency: int, budget: int, turns: int = TURNS) -> Design:
        """The Design for one concurrency and token budget, with figures from a simulation of one server.

        A Design is a serving system with its figures. The simulation runs the server's requests event by event, in
        virtual time.

        Args:
            concurrency: number of requests open on each server.
            budget: maximum tokens of a step on each DP rank (data-parallel copy of attention).
            turns: the simulation serves turns * concurrency requests.

        Raises ValueError if a request does not fit the K/V cache, ChipError if no K/V block fits.
        """
        q, settings = self.question, self.settings(budget)
        check_room(settings.room, q.input, q.output)
        one = estimate(self.times, settings, q.input, q.output, concurrency)
        spread = one.ttft + one.tpot * (q.output - 1)
        load = ramped([LoadRequest(0.0, q.input, q.output)] * (turns * concurrency), concurrency, spread)
        done = serve(self.times, settings, load, concurrency)
        # The rate is that of the middle of the load, without the ramp at its start and the thinning at its end.
        ended = sorted(done.outcomes, key=lambda o: o.start + o.end)
        ends = [o.start + o.end for o in ended]
        low, high = len(ends) // turns, max(len(ends) // turns + 1, len(ends) - len(ends) // turns)
        rate = (high - low) / (ends[high - 1] - ends[low - 1 if low else 0] or 1e-9)
        middle, total = ended[low:high], ends[-1]
        idle = max(0.0, total - done.busy_s) * self.on.chip.energy.idle_w * self.server.placement.chips_per_server
        seen = Estimate(
            statistics.fmean(o.first or 0.0 for o in middle),
            statistics.fmean(o.each or 0.0 for o in middle),
            rate * q.output, (done.joules + idle) / total, one.decoding,
        )  # fmt: skip
        return self.design(concurrency, settings, seen, confirmed=True)

    def largest(self, budget: int, most: int) -> Design | None:
        """The estimated Design with the most open requests that keeps the latency limits of `question`.

        Returns None if one open request alone breaks a limit. The search is a bisection, since latencies grow with the
        number of open requests. It stops where more open requests add less than 1 % to the output rate, because they
        would only wait.

        Args:
            budget: maximum tokens of a step on each DP rank (data-parallel copy of attention).
            most: largest number of open requests to try on one server.

        Raises ValueError if not one request fits the K/V cache, ChipError if no K/V block fits.
        """
        best, low, high = None, 0, 1
        while high <= most:
            found = self.estimated(high, budget)
            if not found.within:
                break
            if best and found.tokens_per_s < 1.01 * best.tokens_per_s:
                break
            best, low, high = found, high, high * 2
        high = min(high, most + 1)
        while best is not None and high - low > max(1, low // 16):
            middle = (low + high) // 2
            found = self.estimated(middle, budget)
            if found.within and found.tokens_per_s > 1.005 * best.tokens_per_s:
                best, low = found, middle
            else:
                high = middle
        return best


def candidates(
    question: Question, targets: Sequence[Target], layouts: Sequence[str], progress: Progress = silent
) -> tuple[list[Candidate], list[tuple[str, str, str]]]:
    """Compile the model for each layout, and pair each layout with each chip. Returns (candidates, refusals).

    Both are lists. A pair whose steps can be timed becomes a Candidate. A pair that cannot hold or run the model
    becomes a refusal: (name of the chip, layout, reason). Raises LayoutError for a text that is no layout, FormatError
    for an unknown format.

    Args:
        question: the model, its number formats and its load.
        targets: chips with kernel libraries.
        layouts: texts such as tp8.
        progress: called before each layout.
    """
    out: list[Candidate] = []
    refused: list[tuple[str, str, str]] = []
    for layout in layouts:
        placement = Placement.parse(layout)
        progress(len(out) + len(refused), len(targets) * len(layouts), f"{layout}: compiling {question.program.name}")
        try:
            server = Server.of(question.program, placement, question.formats)
        except (LayoutError, ChipError) as e:
            refused += [(on.chip.name, layout, str(e)) for on in targets]
            continue
        for on in targets:
            try:
                one = Candidate(question, server, on)
                one.settings(min(BUDGETS))
                out.append(one)
            except (LayoutError, ChipError) as e:
                refused.append((on.chip.name, layout, str(e)))
    return out, refused


def find(
    asked: Sequence[Candidate], budgets: Iterable[int] = BUDGETS, by: str = "watt", keep: int = KEEP,
    progress: Progress = silent,
) -> list[Design]:  # fmt: skip
    """Find the best Design of each candidate (a chip and a placement of the model). Returns a list of Designs.

    The search chooses the maximum number of tokens per step and the number of open requests that give the most output
    per watt or per chip. It uses the formula estimate(), and only designs that keep the latency limits count. The best
    `keep` designs are then simulated, see confirm(). The list has three parts, each with the best design first:
    simulated designs that keep the limits; designs that were not simulated; simulated designs that break a limit.

    Args:
        asked: the candidates. A candidate has no Design in the list if one open request does not fit or breaks a limit.
        budgets: values to try for the maximum number of tokens of a step on a DP rank (data-parallel copy of
            attention).
        by: what is maximised: "watt" for output tokens per second per watt, "chip" for output tokens per second per
            chip.
        keep: number of the best designs to simulate.
        progress: called before each candidate.
    """
    value: Callable[[Design], float] = lambda d: d.per_watt if by == "watt" else d.per_chip  # noqa: E731
    best: list[tuple[Design, Candidate]] = []
    for i, one in enumerate(asked):
        progress(i, len(asked), f"{one.on.chip.name} {one.server.placement}: searching")
        tried: list[Design] = []
        for budget in budgets:
            try:
                found = one.largest(budget, MOST)
            except (ChipError, ValueError):  # no room for steps of so many tokens
                continue
            if found:
                tried.append(found)
        if tried:
            best.append((max(tried, key=value), one))
    best.sort(key=lambda pair: -value(pair[0]))
    out = []
    for i, (design, one) in enumerate(best):
        if i < keep:
            progress(i, keep, f"{design.chip} {design.placement}: the queue of {design.concurrency} requests")
            design = confirm(one, design)
        out.append(design)
    first = sorted((d for d in out[:keep] if d.within), key=lambda d: -value(d))
    return [*first, *out[keep:], *(d for d in out[:keep] if not d.within)]


def confirm(one: Candidate, design: Design) -> Design:
    """Simulate the requests of a design whose figures were estimated. Returns a Design with the simulated figures.

    While a latency limit is broken, the simulation is repeated with 10 % fewer open requests, up to 12 runs or until
    one request is open. The result of the last run is returned even if it breaks a limit.

    one: the candidate that the design belongs to. design: the estimated design; the first run has its number of open
    requests, and all runs have its step size. Raises ValueError if a request does not fit the K/V cache, ChipError if
    no K/V block fits.
    """
    concurrency = design.concurrency // design.placement.replicas
    for _ in range(12):
        seen = one.queued(concurrency, design.max_batch_tokens)
        if seen.within or concurrency == 1:
            return seen
        concurrency = max(1, int(concurrency * 0.9))
    return seen
