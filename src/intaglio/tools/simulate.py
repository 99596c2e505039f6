"""A model on a chip that may not exist: steps of a serving load, timed by the machine, and what limits them.

The model is a checkpoint, a config.json alone, or a card that ships with the package; no weights are read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from intaglio import formats
from intaglio.chips import ChipError, ChipSpec
from intaglio.chips import replace as other_chip
from intaglio.compiler import Layout, build_stages
from intaglio.models import Checkpoint, port, port_config
from intaglio.ops import Linear
from intaglio.program import Program
from intaglio.silicon.step import Load, Plan
from intaglio.silicon.timeline import Timeline

CARDS = Path(__file__).resolve().parent.parent / "data" / "cards"
CHANGES: dict[
    str, dict[str, float]
] = {  # what co-design may turn, by name: fields of a chip, and what they are multiplied by
    "array rate x2": {"macs": 2},
    "HBM bytes/s x2": {"hbm_bytes_per_s": 2},
    "SRAM bytes/cycle x2": {"sram_bytes_per_cycle": 2, "port_bytes_per_cycle": 2, "shared_bytes_per_cycle": 2},
    "shared level x2": {"shared_bytes": 2},
    "vector lanes x2": {"vec_lanes": 2, "exp_lanes": 2, "att_lanes": 2},
    "link bytes/s x2": {"bytes_per_s": 2},
    "step of a collective / 2": {"hop_s": 0.5, "meet_s": 0.5},
    "launch / 2": {"launch_s": 0.5},
}


def cards() -> dict[str, Path]:
    """The configs that ship, by name."""
    return {path.stem: path for path in sorted(CARDS.glob("*.json"))}


def ported(model: str, context: int | None) -> Program:
    """The Program of a checkpoint folder, a config.json, or a card's name. Raises ValueError naming the cards."""
    path = Path(model)
    if path.is_dir():
        return port(Checkpoint.open(path), context)
    if not path.is_file():
        if model not in cards():
            raise ValueError(f"{model} is no folder, no config.json and no card; cards are {', '.join(cards())}")
        path = cards()[model]
    return port_config(json.loads(path.read_text()), context, name=path.stem)


def stages(program: Program, layout: str, weights: str, kv_format: str, activations: str) -> tuple[Program, ...]:
    """One compiled Program a stage of the layout: its ranks are alike, so the first stands for all. `activations` fp8
    rounds x of every FP8 product to FP8 rows."""
    built = build_stages(program, layout, weights, kv_format, wire="bf16")
    return tuple(rounded(p) if activations == "fp8" else p for p in built)


def rounded(p: Program) -> Program:
    """Products of FP8 weights take FP8 rows. Raises ValueError if there is no such product."""
    eight = [
        op for op in p.ops if isinstance(op, Linear) and formats.get(p.tensors[op.w].format).family.startswith("fp8")
    ]
    if not eight:
        raise ValueError("--activations fp8 goes with FP8 weights: --weights fp8 or fp8row")
    change = {op: replace(op, x_format="fp8row") for op in eight}
    return p.with_ops([change.get(op, op) if isinstance(op, Linear) else op for op in p.ops], p.tensors)


@dataclass(frozen=True)
class Serving:
    """Requests of `input` prompt tokens that ask for `output` each; `batch` of them start in every step."""

    input: int
    output: int
    batch: int = 1

    def prefill(self) -> Load:
        """The prompts of one step."""
        return Load(self.input * self.batch, self.batch, ((self.input, self.input, self.batch),))

    def decode(self) -> Load:
        """All that decode in one step of the steady state, contexts as far along as they are on average."""
        n = self.batch * (self.output - 1)
        return Load(n, n, ((1, self.input + self.output // 2, n),))

    def mixed(self) -> Load:
        """A step of the steady state: the prompts that start, and every request that decodes."""
        a, b = self.prefill(), self.decode()
        return Load(a.tokens + b.tokens, a.rows + b.rows, (*a.sequences, *b.sequences))


@dataclass(frozen=True)
class Phase:
    """One kind of step on all chips: a Timeline a stage (its ranks are alike), and tokens that pass in one."""

    name: str
    stages: tuple[Timeline, ...]
    tokens: int  # prompt and new tokens
    new: int
    format: str
    chips: int

    @property
    def period(self) -> float:
        """Seconds between steps: stages work on different steps at once, so the slowest sets the pace."""
        return max(t.seconds for t in self.stages)

    @property
    def latency(self) -> float:
        """Seconds through all stages."""
        return sum(t.seconds for t in self.stages)

    @property
    def slowest(self) -> Timeline:
        return max(self.stages, key=lambda t: t.seconds)

    @property
    def flops_share(self) -> float:
        """FLOPs of a step over the peak of all chips in a period."""
        done = sum(t.totals().flops for t in self.stages) / len(self.stages)
        return done / (self.period * self.slowest.spec.peak_flops(self.format))

    @property
    def watts(self) -> float:
        """Of one chip, on average: an estimate."""
        return sum(sum(t.joules().values()) for t in self.stages) / len(self.stages) / self.period

    def as_dict(self) -> dict[str, Any]:
        return {
            "phase": self.name, "step_seconds": self.period, "latency_seconds": self.latency,
            "tokens_per_s": self.tokens / self.period, "new_tokens_per_s": self.new / self.period,
            "flops_share": self.flops_share, "hbm_share": self.slowest.hbm_share(),
            "link_share": self.slowest.link_share(), "watts_per_chip": self.watts,
            "report": self.slowest.report(self.format), "slowest_stage": self.slowest.as_dict(self.format),
        }  # fmt: skip


@dataclass(frozen=True)
class Simulation:
    """A model laid out on chips, ready to be asked: one Plan for each stage."""

    spec: ChipSpec
    plans: tuple[Plan, ...]
    chips: int
    format: str

    @classmethod
    def of(cls, programs: Sequence[Program], spec: ChipSpec, layout: str) -> Simulation:
        """`programs`: one a stage, as stages() gives them. Raises ChipError if weights exceed HBM."""
        plans = Plan.of(programs, spec)
        return cls(spec, plans, Layout.parse(layout).ranks, widest(plans))

    def phase(self, name: str, load: Load, new: int) -> Phase:
        timelines = tuple(plan.run(load) for plan in self.plans)
        return Phase(name, timelines, load.tokens + new, new, self.format, self.chips)

    def phases(self, s: Serving) -> list[Phase]:
        """Prefill alone, decode alone, and the mixed step of the steady state. Tokens counted: those of the prompts,
        and one new for each row sampled."""
        out = [self.phase("prefill", s.prefill(), s.batch)]
        out[0] = replace(out[0], tokens=s.input * s.batch)
        if s.output > 1:
            out.append(replace(self.phase("decode", s.decode(), s.decode().rows), tokens=s.decode().rows))
            mixed = self.phase("mixed", s.mixed(), s.batch * s.output)
            out.append(replace(mixed, tokens=s.batch * (s.input + s.output)))
        return out


def widest(plans: Sequence[Plan]) -> str:
    """The format in which most products are computed: shares of peak are of its peak."""
    total: dict[str, float] = {}
    for plan in plans:
        for e in plan.run(Load(1, 1, ((1, 1, 1),))).entries:
            total[e.timing.format] = total.get(e.timing.format, 0.0) + e.timing.flops
    return max(total, key=lambda f: total[f])


def what_helps(programs: Sequence[Program], spec: ChipSpec, layout: str, s: Serving) -> list[tuple[str, float]]:
    """Each single change of the spec, and by how much it shortens the mixed step (1.0: not at all), best first."""
    base = Simulation.of(programs, spec, layout).phases(s)[-1].period
    out = []
    for name, factors in CHANGES.items():
        changed = other_chip(spec, **{field: scaled(spec, field, by) for field, by in factors.items()})
        out.append((name, base / Simulation.of(programs, changed, layout).phases(s)[-1].period))
    return sorted(out, key=lambda item: -item[1])


@dataclass(frozen=True)
class Answer:
    """A layout's mixed step, and the single change of the chip that shortens it most, by how much."""

    layout: str
    mixed: Phase
    change: str
    gain: float

    def as_dict(self) -> dict[str, Any]:
        return {"layout": self.layout, **self.mixed.as_dict(), "helps_most": self.change, "gain": self.gain}


def answers(
    model: str, spec: ChipSpec, layouts: Sequence[str], s: Serving, weights: str, kv_format: str, activations: str
) -> list[Answer]:
    """One question put to each layout."""
    program, out = ported(model, None), []
    for layout in layouts:
        programs = stages(program, layout, weights, kv_format, activations)
        change, gain = what_helps(programs, spec, layout, s)[0]
        out.append(Answer(layout, Simulation.of(programs, spec, layout).phases(s)[-1], change, gain))
    return out


def scaled(spec: ChipSpec, field: str, by: float) -> Any:
    """The field times `by`, wherever in the spec it stands."""
    for part in (spec, spec.constants, spec.links):
        if hasattr(part, field):
            value = getattr(part, field)
            if isinstance(value, tuple):
                return tuple((f, int(rate * by)) for f, rate in value)
            return type(value)(value * by)
    raise ChipError(f"a chip has no field {field!r}")
