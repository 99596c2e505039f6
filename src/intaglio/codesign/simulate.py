"""Simulates the steps of a serving load on chips that need not exist: modelled times, bottlenecks, effect of changes.

The model is given as a checkpoint, a config.json, or the name of a config that ships with the package; no weights are
read.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from intaglio.chips import ChipError, Target
from intaglio.codesign.memory import MemoryUse, memory_use
from intaglio.compiler import Layout, build_stages, set_activation_format
from intaglio.models import Checkpoint, port, port_config
from intaglio.models.files.header import read_json
from intaglio.program import Program
from intaglio.progress import Progress, counted, prefixed, silent
from intaglio.runtime.windows import longest_window
from intaglio.silicon.plan import Plan
from intaglio.silicon.sizes import BatchSizes
from intaglio.silicon.timeline import Timeline

CARDS = Path(__file__).resolve().parent.parent / "data" / "cards"
SAME = {"deepseek-r1": "deepseek-v3"}  # other names of shipped configs: models with the same architecture
CHANGES: dict[str, dict[str, float]] = {  # changes that what_helps() tries: fields of a target, and factors for them
    "array rate x2": {"chip.macs": 2},
    "HBM bytes/s x2": {"chip.hbm_bytes_per_s": 2},
    "SRAM bytes/cycle x2": {
        "chip.sram_bytes_per_cycle": 2, "chip.port_bytes_per_cycle": 2, "chip.l2_bytes_per_cycle": 2,
    },
    "L2 size x2": {"chip.l2_bytes": 2},
    "vector lanes x2": {"chip.vec_lanes": 2, "chip.exp_lanes": 2, "chip.att_lanes": 2},
    "link bytes/s x2": {"chip.bytes_per_s": 2},
    "step of a collective / 2": {"library.link_latency_s": 0.5, "library.barrier_s": 0.5},
    "launch / 2": {"library.launch_s": 0.5},
}  # fmt: skip


def cards() -> dict[str, Path]:
    """{name: path} of the model configs (config.json) that ship with the package."""
    return {path.stem: path for path in sorted(CARDS.glob("*.json"))}


def ported(model: str, context: int | None) -> Program:
    """The Program (list of ops and tensors) of a whole model, not yet compiled for chips.

    model: a checkpoint folder, a config.json, the name of a config that ships with the package, or a key of SAME
    (another name of such a config). context: largest context length in tokens; None: the model's own. Raises ValueError
    (CheckpointError, PortError, ...) if there is no such model, if the file is not a JSON object, or if the package
    does not support the model.
    """
    path = Path(model)
    if path.is_dir():
        return port(Checkpoint.open(path), context)
    if not path.is_file():
        card = SAME.get(model, model)
        if card not in cards():
            raise ValueError(f"{model} is no checkpoint folder or config.json; shipped configs: {', '.join(cards())}")
        path = cards()[card]
    return port_config(read_json(path), context, name=path.stem)


def stages(program: Program, layout: str, weights: str, kv_format: str, activations: str) -> tuple[Program, ...]:
    """The compiled Programs of a layout: a tuple with one rank's Program for each pipeline stage.

    It is the Program of a rank whose tensors are the largest of the stage. layout: such as tp4pp2. weights, kv_format,
    activations: names of number formats, such as auto or fp8. Raises LayoutError if the layout does not fit the model,
    FormatError for an unknown format.
    """
    built = build_stages(program, layout, weights, kv_format, wire="bf16")
    return tuple(set_activation_format(p, activations) for p in built)


@dataclass(frozen=True)
class Serving:
    """A steady serving load: `batch` new requests start in every engine step.

    Each request has `input` prompt tokens and generates `output` tokens. A request runs for `output` steps, so batch *
    output requests run at a time.
    """

    input: int
    output: int
    batch: int = 1

    def prefill(self) -> BatchSizes:
        """The BatchSizes (sequences and numbers of tokens) of a step that only computes prompts.

        They are the prompts of `batch` requests.
        """
        return BatchSizes(self.input * self.batch, self.batch, ((self.input, self.input, self.batch),))

    def decode(self) -> BatchSizes:
        """The BatchSizes (sequences and numbers of tokens) of a step that only decodes.

        It decodes one token for each of batch * (output - 1) sequences. This is the number of decoding sequences of the
        steady load: `batch` requests start in every step, and each decodes for output - 1 steps. Each sequence is given
        the average number of keys (tokens in the K/V cache), input + output // 2.
        """
        n = self.batch * (self.output - 1)
        return BatchSizes(n, n, ((1, self.input + self.output // 2, n),))

    def mixed(self) -> BatchSizes:
        """The BatchSizes (sequences and numbers of tokens) of a step that computes prompts and decodes.

        It computes `batch` prompts and decodes one token for each of batch * (output - 1) sequences. This is the number
        of decoding sequences because `batch` requests start in every step, and each decodes for output - 1 steps.
        """
        a, b = self.prefill(), self.decode()
        return BatchSizes(a.tokens + b.tokens, a.rows + b.rows, (*a.sequences, *b.sequences))


@dataclass(frozen=True)
class Phase:
    """One simulated step of a kind (prefill, decode or mixed), with its times and rates.

    Attributes:
        name: prefill, decode or mixed.
        stages: for each pipeline stage, the Timeline (modelled times of the ops) of one rank.
        tokens: number of prompt tokens and new tokens of the step.
        new: number of new tokens of the step.
        format: number format in which most FLOPs are done.
        chips: number of chips.
    """

    name: str
    stages: tuple[Timeline, ...]
    tokens: int
    new: int
    format: str
    chips: int

    @property
    def period(self) -> float:
        """Seconds from the start of one step to the start of the next: the time of the slowest pipeline stage.

        Pipeline stages work on different steps in parallel.
        """
        return max(t.seconds for t in self.stages)

    @property
    def latency(self) -> float:
        """Seconds from a step's start in the first pipeline stage to its end in the last: the sum over the stages."""
        return sum(t.seconds for t in self.stages)

    @property
    def slowest(self) -> Timeline:
        """The Timeline (modelled times of the ops) of the slowest pipeline stage."""
        return max(self.stages, key=lambda t: t.seconds)

    @property
    def flops_share(self) -> float:
        """MFU (model FLOPs utilisation) of the step, as a fraction.

        It is the FLOPs of one step, divided by the FLOPs that all chips could do in `period` seconds at the peak rate
        of `format`.
        """
        done = sum(t.totals().flops for t in self.stages) / len(self.stages)
        return done / (self.period * self.slowest.chip.peak_flops(self.format))

    @property
    def watts(self) -> float:
        """Estimated power of one chip in watts: the mean over all chips and over the time of the step."""
        return sum(sum(t.joules().values()) for t in self.stages) / len(self.stages) / self.period

    def as_dict(self) -> dict[str, Any]:
        """A dict for JSON: the step's times, rates, fractions of peak rates and watts, and a report of one stage.

        The report is that of the slowest pipeline stage.
        """
        return {
            "phase": self.name, "step_seconds": self.period, "latency_seconds": self.latency,
            "tokens_per_s": self.tokens / self.period, "new_tokens_per_s": self.new / self.period,
            "flops_share": self.flops_share, "hbm_share": self.slowest.hbm_share(),
            "link_share": self.slowest.link_share(), "watts_per_chip": self.watts,
            "report": self.slowest.report(self.format), "slowest_stage": self.slowest.as_dict(self.format),
        }  # fmt: skip


@dataclass(frozen=True)
class Simulation:
    """A model that is distributed over chips and compiled, ready to simulate its steps.

    Attributes:
        target: chip and kernel library.
        plans: the Plan of each pipeline stage, an object that times the stage's ops.
        chips: number of chips.
        format: name of the number format in which most FLOPs are done, see main_format().
        programs: for each pipeline stage, the Program of one rank.
    """

    target: Target
    plans: tuple[Plan, ...]
    chips: int
    format: str
    programs: tuple[Program, ...] = field(repr=False)

    @classmethod
    def of(cls, programs: Sequence[Program], target: Target, layout: str) -> Simulation:
        """The Simulation of a compiled model on chips.

        programs: for each pipeline stage, the Program of one rank. target: chip and kernel library. layout: how the
        chips share the model, such as tp4pp2. Raises ChipError if a chip's weights exceed its HBM, LayoutError for a
        wrong layout.
        """
        plans = Plan.of(programs, target)
        return cls(target, plans, Layout.parse(layout).ranks, main_format(plans), tuple(programs))

    def memory(self, s: Serving) -> MemoryUse:
        """The MemoryUse of the chip that needs the most memory under the load `s`.

        A MemoryUse gives bytes of HBM. A pipeline of N stages has N steps in flight, each with its own requests.
        """
        step = s.mixed() if s.output > 1 else s.prefill()
        n, hbm, window = len(self.plans), self.target.chip.hbm_bytes, longest_window(self.programs)
        return max((memory_use(p, step, n, hbm, window) for p in self.programs), key=lambda use: use.total)

    def largest_batch(self, s: Serving) -> int:
        """The largest `batch` below `s.batch` for which the chips have enough memory; 0 if there is none.

        s: a load that does not fit. The search is a bisection, since memory grows with the batch.
        """
        return bisect_left(range(1, s.batch), True, key=lambda b: not self.memory(replace(s, batch=b)).fits)

    def shorter(self, s: Serving) -> str:
        """Returns the part of an error message that says how much shorter requests must be.

        The message is for chips that cannot hold even one request of `s`. The text names the longest prompt with which
        the chips could hold one request. If no prompt is short enough, it names the longest response with which they
        could. If no response is short enough either, it says that neither shorter prompts nor shorter responses help.
        """

        def most(limit: int, change: Callable[[int], Serving]) -> int:
            return bisect_left(range(1, limit + 1), True, key=lambda n: not self.memory(change(n)).fits)

        if n := most(s.input, lambda n: replace(s, batch=1, input=n)):
            return f"prompts of up to {n:,} tokens would"
        if n := most(s.output, lambda n: replace(s, batch=1, output=n)):
            return f"responses of up to {n:,} tokens would"
        return "nor would shorter prompts, or shorter responses"

    def check(self, s: Serving) -> None:
        """Check that the chips can hold the load `s`. Returns nothing if they can.

        Raises ChipError, with the largest batch that fits, if they cannot. Raises ValueError for requests longer than
        the model's context.
        """
        context, asked = self.programs[0].context, s.input + s.output
        if asked > context:
            raise ValueError(
                f"requests of {s.input:,} + {s.output:,} tokens; the context of {self.programs[0].name} is {context:,}"
            )
        use = self.memory(s)
        if use.fits:
            return
        most = self.largest_batch(s)
        advice = f"the largest batch that fits is {most}" if most else f"not even a batch of 1 fits; {self.shorter(s)}"
        requests = s.batch * s.output * len(self.plans)
        raise ChipError(
            f"{self.target.chip.name}: {use} a chip, with {requests:,} requests in flight (batch {s.batch}, "
            f"{s.input:,} + {s.output:,} tokens); {advice}. Use more chips, shorter outputs or a smaller K/V format"
        )

    def phase(self, name: str, sizes: BatchSizes, new: int) -> Phase:
        """Simulate one step. Returns it as a Phase with the name `name`.

        sizes: sizes of the step's batch. new: number of new tokens that the step generates.
        """
        timelines = tuple(plan.run(sizes) for plan in self.plans)
        return Phase(name, timelines, sizes.tokens + new, new, self.format, self.chips)

    def phases(self, s: Serving, progress: Progress = silent) -> list[Phase]:
        """Simulate three steps of the load `s`: prefill alone, decode alone, and both mixed. Returns a list of Phases.

        With one output token per request the list has only the prefill. `tokens` of a Phase counts each prompt token
        and each new token once. Raises ChipError if the chips cannot hold the load, ValueError for requests longer than
        the model's context.
        """
        self.check(s)
        progress(0, 3, "timing prefill")
        out = [self.phase("prefill", s.prefill(), s.batch)]
        out[0] = replace(out[0], tokens=s.input * s.batch)
        if s.output > 1:
            progress(1, 3, "timing decode")
            out.append(replace(self.phase("decode", s.decode(), s.decode().rows), tokens=s.decode().rows))
            progress(2, 3, "timing the mixed step")
            mixed = self.phase("mixed", s.mixed(), s.batch * s.output)
            out.append(replace(mixed, tokens=s.batch * (s.input + s.output)))
        return out


def main_format(plans: Sequence[Plan]) -> str:
    """Name of the number format in which most FLOPs are done in a step that decodes one token.

    Reports compare a step's FLOP/s with the chip's peak rate in this format. plans: for each pipeline stage, the Plan,
    which gives the FLOPs and seconds of each op of a step.
    """
    total: dict[str, float] = {}
    for plan in plans:
        for e in plan.run(BatchSizes(1, 1, ((1, 1, 1),))).ops:
            total[e.timing.format] = total.get(e.timing.format, 0.0) + e.timing.flops
    return max(total, key=lambda f: total[f])


def what_helps(
    programs: Sequence[Program], target: Target, layout: str, s: Serving, progress: Progress = silent
) -> list[tuple[str, float]]:
    """Find the speed-up of each change in CHANGES. Returns a list of (change, speed-up), the largest first.

    Each change is made on its own. A change is an improvement of the hardware or its software, given by its name. The
    speed-up is the period of steps (from the start of one step to the start of the next) without the change, divided by
    the period with it. 1.0 means no effect. The steps have prompts and decoding sequences, or only prompts if each
    request has one output token. Raises ChipError if the chips cannot hold the load, ValueError for requests longer
    than the model's context.

    Args:
        programs: for each pipeline stage, the Program of one rank.
        target: chip and kernel library.
        layout: how the chips share the model, such as tp4pp2.
        s: the load.
        progress: called before each change.
    """
    progress(0, 0, "timing the chip as it is")
    base = Simulation.of(programs, target, layout).phases(s)[-1].period
    out = []
    for what, factors in counted(list(CHANGES.items()), progress, lambda change: f"timing {change[0]}"):
        changed = target.changed({name: scaled(target.get(name), by) for name, by in factors.items()})
        out.append((what, base / Simulation.of(programs, changed, layout).phases(s)[-1].period))
    return sorted(out, key=lambda item: -item[1])


@dataclass(frozen=True)
class LayoutResult:
    """The simulated step of a load with one layout, and the one change that would speed up the step most.

    Attributes:
        layout: how the chips share the model, as text.
        mixed: the mixed Phase (prompts and decoding); the prefill Phase for a load with one output token.
        change: name of the change of hardware or software, a key of CHANGES, that speeds up the step most when it is
            made alone.
        gain: seconds without the change divided by seconds with it; 1.0 means no effect.
    """

    layout: str
    mixed: Phase
    change: str
    gain: float  # speed-up by the change

    def as_dict(self) -> dict[str, Any]:
        """A dict for JSON with `layout`, `gain`, `helps_most` (the field `change`), and the entries of `mixed`.

        The entries of `mixed` are those of Phase.as_dict().
        """
        return {"layout": self.layout, **self.mixed.as_dict(), "helps_most": self.change, "gain": self.gain}


def compare_layouts(
    model: str, target: Target, layouts: Sequence[str], s: Serving, weights: str, kv_format: str, activations: str,
    progress: Progress = silent,
) -> list[LayoutResult]:  # fmt: skip
    """Simulate a serving load with each layout. Returns a list with one LayoutResult for each, in the order given.

    model: a checkpoint folder, a config.json, or the name of a shipped config. weights, kv_format, activations: names
    of number formats, such as auto or fp8. Raises ValueError for an unknown model or format, a layout that does not fit
    the model, requests longer than the context, and (ChipError) chips that cannot hold the load.
    """
    program, out = ported(model, None), []
    for layout in layouts:
        progress(0, 0, f"{layout}: compiling {program.name}")
        programs = stages(program, layout, weights, kv_format, activations)
        change, gain = what_helps(programs, target, layout, s, prefixed(progress, layout))[0]
        out.append(LayoutResult(layout, Simulation.of(programs, target, layout).phases(s)[-1], change, gain))
    return out


def scaled(value: Any, by: float) -> Any:
    """The value of a chip's field, multiplied by `by`. `value` is a number, or a tuple of pairs (format, rate).

    In pairs, each rate is multiplied. Integers and rates are rounded towards 0.
    """
    if isinstance(value, tuple):
        return tuple((f, int(rate * by)) for f, rate in value)
    return type(value)(value * by)
