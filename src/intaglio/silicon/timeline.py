"""Timeline of one modelled step of a Program on a chip: start, end and bottleneck of each op, totals, and energy.

All times are modelled, never measured. chrome_trace() writes timelines as a Perfetto trace.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from intaglio import formats
from intaglio.chips import ChipSpec
from intaglio.silicon.timing import Timing

ENGINE_NAMES = {
    "MXU": "the matrix array", "VEC": "the vector lanes", "ATT": "the attention engine", "HBM": "HBM",
    "L2": "the L2", "NET": "the links", "OUT": "scattered stores",
}  # fmt: skip


@dataclass(frozen=True)
class OpSpan:
    """One op of a step, with its modelled start and end in seconds since the start of the step.

    Attributes:
        site: name of the op's place in the model, such as layers.3.mlp.down_proj.
        kind: kind of the op, such as "linear".
        start, end: seconds since the start of the step.
        timing: the Timing of the op's kernel by itself.
        stalled_on: "HBM" if the op took longer than its kernel because its weights arrived late from HBM; else "".
    """

    site: str
    kind: str
    start: float
    end: float
    timing: Timing
    stalled_on: str = ""

    @property
    def seconds(self) -> float:
        """Duration of the op in seconds."""
        return self.end - self.start


@dataclass(frozen=True)
class Timeline:
    """The ops of one step on one chip, with their times.

    Attributes:
        chip: the chip's specification.
        ops: the OpSpan of each op, in the order in which they ran.
    """

    chip: ChipSpec
    ops: tuple[OpSpan, ...]

    @property
    def seconds(self) -> float:
        """The modelled time of the step in seconds."""
        return max((e.end for e in self.ops), default=0.0)

    def busy(self) -> dict[str, float]:
        """Returns a dict with the seconds in which each engine and each memory was in use, summed over all ops.

        A key is the name of an engine or memory, such as "MXU".
        """
        out: dict[str, float] = defaultdict(float)
        for e in self.ops:
            for engine, seconds in e.timing.busy.items():
                out[engine] += seconds
        return dict(out)

    def spent_on(self) -> dict[str, float]:
        """Divide the step's seconds among its bottlenecks. Returns a dict {name of an engine or memory: seconds}.

        The bottleneck of an op is the engine or memory that is busy longest during the op. Its busy seconds are added
        to the dict under its name; if the op stalled on HBM, they are added under "HBM" instead. The op's other seconds
        are added under "launch, ramps and tails". The values of the dict sum to the time of the step.
        """
        out: dict[str, float] = defaultdict(float)
        for e in self.ops:
            own = max(e.timing.busy.values(), default=0.0)
            out[e.stalled_on or e.timing.bound] += min(own, e.seconds)
            out["launch, ramps and tails"] += max(0.0, e.seconds - own)
        return dict(out)

    @property
    def bottleneck(self) -> tuple[str, float]:
        """The largest item of spent_on(), as a pair (name, seconds).

        The name is a readable one, such as "the matrix array". Raises ValueError if the step has no ops.
        """
        engine, seconds = max(self.spent_on().items(), key=lambda item: item[1])
        return ENGINE_NAMES.get(engine, engine), seconds

    def totals(self) -> Timing:
        """Returns one Timing with the sums of all ops: seconds, busy times, bytes, FLOPs and steps."""
        return sum((e.timing for e in self.ops), Timing(0.0))

    def flops_share(self, format: str) -> float:
        """Returns the model FLOPs utilization (MFU): the step's FLOPs / (peak FLOP/s in `format` * the step's seconds).

        Returns 0 if the step takes no time. Raises ChipError for a format that the chip's matrix array does not
        multiply.
        """
        return self.totals().flops / (self.seconds * self.chip.peak_flops(format)) if self.seconds else 0.0

    def hbm_share(self) -> float:
        """Returns the HBM utilization: bytes that HBM moves / (bytes/s of the data sheet * the step's seconds).

        Returns 0 if the step takes no time.
        """
        return self.totals().hbm_bytes / (self.seconds * self.chip.hbm_bytes_per_s) if self.seconds else 0.0

    def link_share(self) -> float:
        """Returns the link utilization: the fraction of the chip's total link bandwidth that the step uses.

        It is the bytes that the chip sends / (bytes/s of all its links * the step's seconds). Returns 0 if the step
        takes no time, or if the chip has no links.
        """
        rate = self.chip.links.chip_bytes_per_s
        return self.totals().link_bytes / (self.seconds * rate) if self.seconds and rate else 0.0

    def joules(self) -> dict[str, float]:
        """Returns the estimated joules of the step, a dict with the keys "arithmetic", "HBM", "L2", "links", "idle"."""
        return joules(self.chip, [(e.timing, 1) for e in self.ops], self.seconds)

    def by_kind(self) -> dict[str, float]:
        """Returns a dict {kind of op: its seconds in the step}, largest first."""
        out: dict[str, float] = defaultdict(float)
        for e in self.ops:
            out[e.kind] += e.seconds
        return dict(sorted(out.items(), key=lambda item: -item[1]))

    def report(self, format: str) -> str:
        """Returns one line of text for a user, with the bottlenecks and the utilization of FLOP/s, HBM and links.

        The line also has the bytes moved, and for each kind of op its fraction of the time. Without ops the text is
        "the step has no ops". Raises ChipError if the chip's matrix array does not multiply `format`.

        format: number format, such as "e4m3", whose peak FLOP/s are taken as 100 %.
        """
        if not self.ops:
            return "the step has no ops"
        total, seconds = self.totals(), self.seconds
        spent_on = sorted(self.spent_on().items(), key=lambda item: -item[1])
        first, share = spent_on[0][0], spent_on[0][1] / seconds
        name = ENGINE_NAMES.get(first, first)
        parts = [f"bound by {name}: {share:.0%} of {seconds * 1e3:,.3f} ms"]
        for engine, spent in spent_on[1:3]:
            if spent > 0.05 * seconds:
                parts.append(f"then {ENGINE_NAMES.get(engine, engine)} {spent / seconds:.0%}")
        parts.append(f"{self.flops_share(format):.0%} of peak FLOP/s ({format}), {self.hbm_share():.0%} of HBM bytes/s")
        if total.hbm_bytes:
            parts.append(
                f"weights {total.weight_bytes / total.hbm_bytes:.0%} of {total.hbm_bytes / 1e9:,.2f} GB from HBM"
            )
        if total.link_bytes:
            parts.append(f"{total.link_bytes / 1e6:,.1f} MB over links, {self.link_share():.0%} of what they carry")
        kinds = ", ".join(f"{k} {v / seconds:.0%}" for k, v in list(self.by_kind().items())[:4])
        return "; ".join([*parts, f"time by op: {kinds}"])

    def as_dict(self, format: str) -> dict[str, Any]:
        """Returns a dict of the step's figures for JSON: seconds, FLOPs, bytes, shares, joules, and text of report().

        Each share is the fraction of a peak rate that the step reaches: "flops_share" of the chip's FLOP/s, "hbm_share"
        of HBM's bytes/s, "link_share" of the links' bytes/s. Raises ChipError if the chip's matrix array does not
        multiply `format`.

        format: number format, such as "e4m3", whose peak FLOP/s are taken.
        """
        total = self.totals()
        return {
            "seconds": self.seconds, "flops": total.flops, "hbm_bytes": total.hbm_bytes, "link_bytes": total.link_bytes,
            "flops_share": self.flops_share(format), "hbm_share": self.hbm_share(), "link_share": self.link_share(),
            "busy_seconds": self.busy(), "spent_on": self.spent_on(), "joules": self.joules(),
            "seconds_by_op": self.by_kind(), "report": self.report(format),
        }  # fmt: skip


def joules(chip: ChipSpec, kernels: Sequence[tuple[Timing, int]], seconds: float) -> dict[str, float]:
    """Returns the estimated joules of a step that takes `seconds` seconds on one chip, as a dict by consumer.

    Its keys are "arithmetic"; "HBM", "L2" and "links" for the bytes that each of them moves; and "idle" for idle power
    over all seconds. kernels: pairs (Timing of a kernel, how often it runs in the step).
    """
    energy = chip.energy
    return {
        "arithmetic": sum(n * t.flops / 2 * energy.mac * formats.bits(t.format) / 16 for t, n in kernels),
        "HBM": sum(n * t.hbm_bytes for t, n in kernels) * energy.hbm_byte,
        "L2": sum(n * t.l2_bytes for t, n in kernels) * energy.l2_byte,
        "links": sum(n * t.link_bytes for t, n in kernels) * energy.link_byte,
        "idle": energy.idle_w * seconds,
    }


def chrome_trace(chips: Sequence[Timeline]) -> str:
    """Returns the timelines as JSON text in Chrome's trace event format, which Perfetto and chrome://tracing open.

    Each chip is shown as a process, with one row for its ops and one for each engine.
    """
    events: list[dict[str, Any]] = []
    for pid, timeline in enumerate(chips):
        events.append(metadata_event("process_name", pid, 0, f"{timeline.chip.name} {pid} (modelled)"))
        rows = ["ops", *sorted(timeline.busy())]
        events += [metadata_event("thread_name", pid, tid, row) for tid, row in enumerate(rows)]
        for e in timeline.ops:
            t = e.timing
            args = {"bound": t.bound, "choice": t.choice, "stalled_on": e.stalled_on, "flops": t.flops}
            events.append(duration_event(e.site, e.kind, pid, 0, e.start, e.seconds, args))
            for engine, seconds in t.busy.items():
                if seconds > 0:
                    row, busy = rows.index(engine), min(seconds, e.seconds)
                    events.append(duration_event(e.site, e.kind, pid, row, e.start, busy, {}))
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ns"})


def metadata_event(name: str, pid: int, tid: int, value: str) -> dict[str, Any]:
    """Returns a metadata event of Chrome's trace format as a dict. It names a process, or a thread (row of the viewer).

    name: "process_name" to name process `pid`, or "thread_name" to name thread `tid` of this process. value: the new
    name.
    """
    return {"ph": "M", "name": name, "pid": pid, "tid": tid, "args": {"name": value}}


def duration_event(
    name: str, kind: str, pid: int, tid: int, start: float, seconds: float, args: dict[str, Any]
) -> dict[str, Any]:
    """Returns a complete event of Chrome's trace format as a dict: a block called `name` in row `tid` of process `pid`.

    Args:
        name: text that the block shows.
        kind: the event's category.
        pid: number of the process.
        tid: number of the row.
        start: start in seconds; the dict has microseconds.
        seconds: duration in seconds; the dict has microseconds.
        args: further values that the viewer shows.
    """
    return {
        "ph": "X", "name": name, "cat": kind, "pid": pid, "tid": tid, "ts": start * 1e6, "dur": seconds * 1e6,
        "args": args,
    }  # fmt: skip
