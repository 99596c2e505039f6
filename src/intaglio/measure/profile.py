"""Profile of a step: the measured time of each op beside its roofline bound, and the step's time outside all ops.

An op that every layer has is one Site, with the sum of its times in all layers. A step whose ops are timed waits at the
end of each op, so it may take longer than other steps: the profile has the time of such a step and of a usual one.
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
    """Measured time of one op, summed over all layers that have it.

    Attributes:
        site: the op's name, with * in place of the layer's number, such as layers.*.mlp.down_proj.
        count: number of layers that have the op.
        seconds: time of the op in all these layers together, the median of several runs.
        bound_seconds: roofline bound of the op in all these layers together; None if the computer's limits were not
            measured.
        bound_by: the limit that sets the bound, "memory" or "matrix"; None if there is no bound.
    """

    site: str
    count: int
    seconds: float
    bound_seconds: float | None = None
    bound_by: str | None = None

    @property
    def lost(self) -> float:
        """Seconds that the op takes beyond its roofline bound.

        All its seconds if there is no bound. Negative if the measured time is below the bound.
        """
        return self.seconds - (self.bound_seconds or 0.0)

    @property
    def share(self) -> float | None:
        """The roofline bound divided by the measured seconds: 1 if the op is as fast as the computer allows.

        None if there is no bound, or if the op took 0 seconds.
        """
        return None if self.bound_seconds is None or not self.seconds else self.bound_seconds / self.seconds

    @property
    def label(self) -> str:
        """The op's name and, if several layers have the op, their number: "layers.*.mlp.down_proj ×16"."""
        return f"{self.site} ×{self.count}" if self.count > 1 else self.site


@dataclass(frozen=True)
class Profile:
    """Measured times of one phase and of each op in it. Times are medians of several runs, in seconds.

    A phase is a whole prefill of `steps` steps, or one decode step.

    Attributes:
        phase: "prefill" or "decode".
        sequences: number of sequences that ran together.
        prompt_tokens: prompt length of each sequence.
        steps: number of steps in the phase.
        seconds: wall time of the phase in runs that also timed each op.
        untimed_seconds: wall time of the phase in runs that did not time ops, usually shorter.
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
        """The fraction of `seconds` that is spent outside ops, such as in Python and between kernels."""
        return self.outside_seconds / self.seconds

    @property
    def worst(self) -> list[Site]:
        """The ops that lose most time, as a list of at most WORST (5) Sites. The largest loss comes first.

        The loss is Site.lost, the seconds above the roofline bound. For an op without a bound it is all its seconds.
        """
        return sorted(self.sites, key=lambda s: -s.lost)[:WORST]

    def gap(self, s: Site) -> str:
        """A sentence that compares the time of op `s` with its roofline bound.

        It says how many milliseconds are lost, or that the op is as fast as its bound. Without a bound the sentence
        says how long the op takes, and its share of the phase's time.
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
        """This Profile as a dict that can be written as JSON.

        The dict has the attributes of the Profile, and values computed from them:

        - "outside_share": fraction of the measured seconds that is spent outside ops.
        - "sites": a list with one dict per op. Each has the attributes of the op's Site, "lost" (measured seconds minus
          roofline bound) and "share" (roofline bound divided by measured seconds; None without a bound).
        - "worst": a list with one dict per op of self.worst: {"site": name of the op, "lost": seconds, "text": sentence
          that compares the time of the op with its bound}.
        """
        sites = [{**asdict(s), "lost": s.lost, "share": s.share} for s in self.sites]
        worst = [{"site": s.site, "lost": s.lost, "text": self.gap(s)} for s in self.worst]
        return {**asdict(self), "sites": sites, "outside_share": self.outside_share, "worst": worst}


@dataclass(frozen=True)
class Sample:
    """Measured times of one run of a phase: a whole prefill, or one decode step.

    Attributes:
        wall: wall time of the run in seconds.
        sites: {name of the op, with * in place of the layer's number: seconds, summed over layers}. Empty if ops were
            not timed.
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
    """Measure the time of each op in prefill and in decode. Returns two Profiles: prefill, then decode.

    Overwrites the executable's K/V cache. Raises BenchError if the prompts do not fit the executable.

    Args:
        executable: the loaded Program.
        roofs: the computer's limits, from which roofline bounds are computed; None: the Profiles have no bounds.
        sequences: number of sequences that run together.
        prompt_tokens: prompt length of each sequence; None: PROMPT_TOKENS, or fewer if the context is too short.
        runs: number of times that each phase is measured.
        max_batch_tokens: largest number of tokens of a prefill step.
        clock: function that returns the time in seconds.
        progress: called before each step as progress(done, total, text that says what is measured).
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
    """Run the steps of a phase once. Returns their times as a Sample.

    timed: True to measure the seconds of each op too; False: the Sample has only the wall time.
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
    """The time of each op, as Sites in the order of the Program. An op's time is summed over all layers.

    Args:
        executable: the loaded Program.
        steps: the Batches of the phase; the roofline bounds are computed for them.
        samples: measured times of several runs; a Site has their median.
        roofs: measured limits of the computer; None: the Sites have no bounds.
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
