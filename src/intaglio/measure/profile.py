"""Profile of a step: seconds per site with layers folded together, each beside its bound, and the time outside sites.

Timed steps wait at the end of each op, so they may take a little longer than others; both times are reported.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from intaglio.batch import Batch
from intaglio.devices import Executable, StepRequest
from intaglio.measure.bench import (
    DECODE_STEPS,
    Bound,
    Roofs,
    Stopwatch,
    check_size,
    decode_steps,
    prefill_steps,
    site_bounds,
)
from intaglio.progress import Progress, silent

PROMPT_TOKENS = 256
WORST = 5


@dataclass(frozen=True)
class Site:
    """Timing of one op of the Program, summed over all layers.

    Attributes:
        site: the op's name, with * in place of the layer's number, such as layers.*.mlp.down_proj.
        count: number of ops with this name.
        seconds: sum of the ops' median seconds.
        bound_seconds: sum of the ops' roofline bounds; None without roofs.
        bound_by: "memory" or "matrix", which sets the bound; None without roofs.
    """

    site: str
    count: int
    seconds: float
    bound_seconds: float | None = None
    bound_by: str | None = None

    @property
    def lost(self) -> float:
        """Seconds above the roofline bound, `seconds` - `bound_seconds`; all of `seconds` if there is no bound.

        Negative if the measured time is below the bound.
        """
        return self.seconds - (self.bound_seconds or 0.0)

    @property
    def share(self) -> float | None:
        """Roofline bound divided by measured seconds: 1 if the op is as fast as the machine allows.

        None without a bound, and for an op that took 0 seconds.
        """
        return None if self.bound_seconds is None or not self.seconds else self.bound_seconds / self.seconds

    @property
    def label(self) -> str:
        """The op's name, with the number of layers that have it if there are several: "layers.*.mlp.down_proj ×16"."""
        return f"{self.site} ×{self.count}" if self.count > 1 else self.site


@dataclass(frozen=True)
class Profile:
    """Timings of one phase: a whole prefill of `steps` steps, or one decode step. Times are medians in seconds.

    Attributes:
        phase: "prefill" or "decode".
        sequences: number of sequences run together.
        prompt_tokens: prompt length.
        steps: number of steps in the phase.
        seconds: wall time when each op is timed.
        untimed_seconds: wall time when ops are not timed, which is less.
        outside_seconds: `seconds` minus the time of all ops.
        sites: the time of each op, summed over layers, in the order of the Program.
    """

    phase: str
    sequences: int
    prompt_tokens: int
    steps: int
    seconds: float
    untimed_seconds: float
    outside_seconds: float
    sites: tuple[Site, ...]

    @property
    def outside_share(self) -> float:
        """Fraction of `seconds` that is spent outside the ops of the Program, such as in Python and between kernels."""
        return self.outside_seconds / self.seconds

    @property
    def worst(self) -> list[Site]:
        """The ops with the largest Site.lost (seconds above the roofline bound), as a list of at most WORST (5) Sites.

        The largest comes first. An op without a bound counts with all its seconds.
        """
        return sorted(self.sites, key=lambda s: -s.lost)[:WORST]

    def gap(self, s: Site) -> str:
        """A sentence that compares the time of op `s` with its roofline bound: how many milliseconds are lost.

        Without a bound the sentence says which share of the phase's time the op takes.
        """
        takes = f"{s.label} takes {s.seconds * 1e3:,.2f} ms"
        if s.bound_seconds is None:
            return f"{takes}, {s.seconds / self.seconds:.1%} of {self.phase}"
        why = "reading its bytes" if s.bound_by == "memory" else "its arithmetic"
        if s.lost <= 0:
            return f"{takes} and {why} {s.bound_seconds * 1e3:,.2f} ms: it is at its roof"
        return (
            f"{takes} where {why} needs {s.bound_seconds * 1e3:,.2f} ms: {s.lost * 1e3:,.2f} ms lost, "
            f"{s.lost / self.seconds:.1%} of {self.phase}"
        )

    def as_dict(self) -> dict[str, Any]:
        """A dict for JSON of the fields of this Profile, and of what is computed from them.

        - "outside_share": fraction of the measured seconds that is spent outside the ops.
        - "sites": a list with a dict for each op: the fields of its Site, "lost" (measured seconds minus roofline
          bound) and "share" (roofline bound divided by measured seconds; None without a bound).
        - "worst": the ops of self.worst, as a list of {"site": name of the op, "lost": seconds, "text": sentence that
          compares its time with its bound}.
        """
        sites = [{**asdict(s), "lost": s.lost, "share": s.share} for s in self.sites]
        worst = [{"site": s.site, "lost": s.lost, "text": self.gap(s)} for s in self.worst]
        return {**asdict(self), "sites": sites, "outside_share": self.outside_share, "worst": worst}


@dataclass(frozen=True)
class Sample:
    """Timings of one run of a phase: of a whole prefill, or of one decode step.

    Attributes:
        wall: seconds in all.
        sites: seconds by op, summed over layers: {name of the op with * for the layer's number: seconds}. Empty if ops
            were not timed.
    """

    wall: float
    sites: Counter[str]


def fold(site: str) -> str:
    """An op's name with its layer number replaced by *: layers.3.mlp.down_proj becomes layers.*.mlp.down_proj."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", site)


def profile(
    executable: Executable,
    roofs: Roofs | None = None,
    *,
    sequences: int = 1,
    prompt_tokens: int | None = None,
    runs: int = 5,
    max_batch_tokens: int = 512,
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress = silent,
) -> list[Profile]:
    """Profile prefill, then decode. Returns a list of the two Profiles in this order.

    Arguments have the same meaning as in bench(). sequences: number of sequences run together. prompt_tokens: prompt
    length; None: PROMPT_TOKENS, or as many as fit. Overwrites the executable's K/V cache. Raises BenchError if a size
    does not fit.
    """
    if prompt_tokens is None:
        prompt_tokens = max(1, min(PROMPT_TOKENS, executable.program.context - DECODE_STEPS))
    check_size(executable, sequences, prompt_tokens, runs)
    prefill = list(prefill_steps(executable, sequences, prompt_tokens, max_batch_tokens))
    decode = [[batch] for batch in decode_steps(executable, sequences, prompt_tokens)]
    profiles = []
    watch = Stopwatch(executable, clock, progress)
    phases = (("prefill", [prefill]), ("decode", decode))
    for _, passes in phases:
        watch.expect(passes[0], 1)
        for steps in passes:
            watch.expect(steps, 2 * runs)
    for phase, passes in phases:
        watch.what = f"{phase} of {sequences} x {prompt_tokens} tokens"
        _sample(watch, passes[0], True)  # warms up
        timed, untimed = ([_sample(watch, steps, on) for _ in range(runs) for steps in passes] for on in (True, False))
        watch.report("roofs of this machine")
        sites = _sites(executable, passes[0], timed, roofs)
        outside = median(s.wall - s.sites.total() for s in timed)
        wall, bare = (median(s.wall for s in samples) for samples in (timed, untimed))
        profiles.append(Profile(phase, sequences, prompt_tokens, len(passes[0]), wall, bare, outside, sites))
    return profiles


def _sample(watch: Stopwatch, steps: Sequence[Batch], timed: bool) -> Sample:
    """Run the steps of a phase (a whole prefill, or one decode step) once. Returns its timings as a Sample.

    timed: True to measure the seconds of each op too; False: the Sample has the wall time alone.
    """
    wall, sites = 0.0, Counter[str]()
    for batch in steps:
        seconds, result = watch.step(StepRequest(batch, timed=timed))
        wall += seconds
        for site, taken in result.timings.items():
            sites[fold(site)] += taken  # type: ignore[assignment]  # a Counter of seconds
    return Sample(wall, sites)


def _sites(
    executable: Executable, steps: Sequence[Batch], samples: Sequence[Sample], roofs: Roofs | None
) -> tuple[Site, ...]:
    """The timings of all ops as a tuple of Sites, in the order of the Program; ops of all layers are summed.

    Args:
        executable: the loaded Program.
        steps: the Batches of the phase; their work gives the roofline bounds.
        samples: timings of several runs; a Site has their median.
        roofs: measured limits of the machine; None: the Sites have no bounds.
    """
    count = Counter(fold(op.site) for op in executable.program.ops)
    bounds = dict.fromkeys(count, Bound())
    for batch in steps if roofs else ():
        assert roofs
        for site, bound in site_bounds(executable.program, batch, roofs).items():
            bounds[fold(site)] += bound
    sites = []
    for site, n in count.items():
        seconds, at = median(s.sites[site] for s in samples), bounds[site]
        sites.append(Site(site, n, seconds, at.seconds, at.by) if roofs else Site(site, n, seconds))
    return tuple(sites)
