"""The Timeline: what a step of a Program did on a chip, when, and what it waited for. Modelled time, never measured."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from intaglio.chips import ChipSpec
from intaglio.silicon.instructions import formats_bits
from intaglio.silicon.timing import Timing

ENGINE_NAMES = {
    "MXU": "the matrix array", "VEC": "the vector lanes", "ATT": "the attention engine", "HBM": "HBM",
    "shared": "the shared level", "NET": "the links", "OUT": "scattered stores",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One op: its site and kind, start and end in seconds, the bare cost of its kernel, and what the rest of the time
    went into ("" if nothing: weights, links)."""

    site: str
    kind: str
    start: float
    end: float
    timing: Timing
    waits: str = ""

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class Timeline:
    """The entries of one step on one chip, in order."""

    spec: ChipSpec
    entries: tuple[Entry, ...]

    @property
    def seconds(self) -> float:
        return max((e.end for e in self.entries), default=0.0)

    def busy(self) -> dict[str, float]:
        """Seconds that each engine or memory was in use."""
        out: dict[str, float] = defaultdict(float)
        for e in self.entries:
            for engine, seconds in e.timing.busy.items():
                out[engine] += seconds
        return dict(out)

    def stalls(self) -> dict[str, float]:
        """Seconds of the step by what they were spent on, summing to the whole: the engine each op is bound by, what
        it waited for beyond its own cost, and launches."""
        out: dict[str, float] = defaultdict(float)
        for e in self.entries:
            own = max(e.timing.busy.values(), default=0.0)
            out[e.waits or e.timing.bound] += min(own, e.seconds)
            out["launch, ramps and tails"] += max(0.0, e.seconds - own)
        return dict(out)

    @property
    def limit(self) -> tuple[str, float]:
        """What most of the time is spent on, in words, and the seconds of it."""
        engine, seconds = max(self.stalls().items(), key=lambda item: item[1])
        return ENGINE_NAMES.get(engine, engine), seconds

    def totals(self) -> Timing:
        """All entries as one."""
        return sum((e.timing for e in self.entries), Timing(0.0))

    def flops_share(self, format: str) -> float:
        """FLOPs done over those that the chip's peak in `format` allows in this time."""
        return self.totals().flops / (self.seconds * self.spec.peak_flops(format)) if self.seconds else 0.0

    def hbm_share(self) -> float:
        """HBM bytes moved over those of the data sheet's rate."""
        return self.totals().hbm_bytes / (self.seconds * self.spec.hbm_bytes_per_s) if self.seconds else 0.0

    def link_share(self) -> float:
        """Bytes sent over those that all links of the chip carry in this time."""
        rate = self.spec.links.chip_bytes_per_s
        return self.totals().link_bytes / (self.seconds * rate) if self.seconds and rate else 0.0

    def joules(self) -> dict[str, float]:
        """An estimate of the energy: arithmetic by format, bytes by memory, and what an idle chip draws."""
        energy, total = self.spec.energy, self.totals()
        macs: dict[str, float] = defaultdict(float)
        for e in self.entries:
            macs[e.timing.format] += e.timing.flops / 2
        arithmetic = sum(n * energy.mac * formats_bits(f) / 16 for f, n in macs.items())
        return {
            "arithmetic": arithmetic,
            "HBM": total.hbm_bytes * energy.hbm_byte,
            "shared": total.shared_bytes * energy.shared_byte,
            "links": total.link_bytes * energy.link_byte,
            "idle": energy.idle_w * self.seconds,
        }

    def by_kind(self) -> dict[str, float]:
        """Seconds by kind of op."""
        out: dict[str, float] = defaultdict(float)
        for e in self.entries:
            out[e.kind] += e.seconds
        return dict(sorted(out.items(), key=lambda item: -item[1]))

    def report(self, format: str) -> str:
        """The bottleneck in words."""
        if not self.entries:
            return "nothing ran"
        total, seconds = self.totals(), self.seconds
        stalls = sorted(self.stalls().items(), key=lambda item: -item[1])
        first, share = stalls[0][0], stalls[0][1] / seconds
        name = ENGINE_NAMES.get(first, first)
        parts = [f"bound by {name}: {share:.0%} of {seconds * 1e3:,.3f} ms"]
        for engine, spent in stalls[1:3]:
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
        """For JSON: totals, shares, and a line a site."""
        total = self.totals()
        return {
            "seconds": self.seconds, "flops": total.flops, "hbm_bytes": total.hbm_bytes, "link_bytes": total.link_bytes,
            "flops_share": self.flops_share(format), "hbm_share": self.hbm_share(), "link_share": self.link_share(),
            "busy_seconds": self.busy(), "spent_on": self.stalls(), "joules": self.joules(),
            "seconds_by_op": self.by_kind(), "report": self.report(format),
        }  # fmt: skip


def chrome_trace(chips: Sequence[Timeline]) -> str:
    """Chrome's trace event format (JSON), which Perfetto and chrome://tracing open: a process a chip, a row for ops and
    one for each engine."""
    events: list[dict[str, Any]] = []
    for pid, timeline in enumerate(chips):
        events.append(meta("process_name", pid, 0, f"{timeline.spec.name} {pid} (modelled)"))
        rows = ["ops", *sorted(timeline.busy())]
        events += [meta("thread_name", pid, tid, row) for tid, row in enumerate(rows)]
        for e in timeline.entries:
            args = {"bound": e.timing.bound, "choice": e.timing.why, "waits": e.waits, "flops": e.timing.flops}
            events.append(span(e.site, e.kind, pid, 0, e.start, e.seconds, args))
            for engine, seconds in e.timing.busy.items():
                if seconds > 0:
                    events.append(span(e.site, e.kind, pid, rows.index(engine), e.start, min(seconds, e.seconds), {}))
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ns"})


def meta(name: str, pid: int, tid: int, value: str) -> dict[str, Any]:
    return {"ph": "M", "name": name, "pid": pid, "tid": tid, "args": {"name": value}}


def span(
    name: str, kind: str, pid: int, tid: int, start: float, seconds: float, args: dict[str, Any]
) -> dict[str, Any]:
    return {
        "ph": "X", "name": name, "cat": kind, "pid": pid, "tid": tid, "ts": start * 1e6, "dur": seconds * 1e6,
        "args": args,
    }  # fmt: skip
