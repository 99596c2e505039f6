"""Where a step's time goes: seconds by site, layers folded, each site beside its own roof, and the time between sites.

Timed steps wait at the end of each op, so they may be a little slower than others: that time stands beside.
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
from intaglio.devices import Executable
from intaglio.tools.bench import DECODE_STEPS, Bound, Roofs, check_size, decode_steps, prefill_steps, site_bounds

PROMPT_TOKENS = 256
WORST = 5


@dataclass(frozen=True)
class Site:
    """One op of every layer that has it: their median seconds together, and the least that the roofs allow."""

    site: str
    count: int
    seconds: float
    bound_seconds: float | None = None
    bound_by: str | None = None

    @property
    def lost(self) -> float:
        """Seconds above the roof; all of them if there is none."""
        return self.seconds - (self.bound_seconds or 0.0)

    @property
    def share(self) -> float | None:
        """Of the roof that bounds it."""
        return None if self.bound_seconds is None or not self.seconds else self.bound_seconds / self.seconds

    @property
    def label(self) -> str:
        return f"{self.site} ×{self.count}" if self.count > 1 else self.site


@dataclass(frozen=True)
class Profile:
    """One phase: a whole prefill of `steps` steps, or one decode step. `seconds` is its wall time while timed,
    `untimed_seconds` without; `outside_seconds` is what is left of the former beside the sites."""

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
        return self.outside_seconds / self.seconds

    @property
    def worst(self) -> list[Site]:
        """The sites that lose most, the worst first."""
        return sorted(self.sites, key=lambda s: -s.lost)[:WORST]

    def gap(self, s: Site) -> str:
        """What one site loses, in words."""
        takes = f"{s.label} takes {s.seconds * 1e3:,.2f} ms"
        if s.bound_seconds is None:
            return f"{takes}, {s.seconds / self.seconds:.1%} of {self.phase}"
        why = "reading its bytes" if s.bound_by == "memory" else "its arithmetic"
        if s.lost <= 0:
            return f"{takes} and {why} {s.bound_seconds * 1e3:,.2f} ms: it stands at its roof"
        return (
            f"{takes} where {why} needs {s.bound_seconds * 1e3:,.2f} ms: {s.lost * 1e3:,.2f} ms lost, "
            f"{s.lost / self.seconds:.1%} of {self.phase}"
        )

    def as_dict(self) -> dict[str, Any]:
        sites = [{**asdict(s), "lost": s.lost, "share": s.share} for s in self.sites]
        worst = [{"site": s.site, "lost": s.lost, "text": self.gap(s)} for s in self.worst]
        return {**asdict(self), "sites": sites, "outside_share": self.outside_share, "worst": worst}


@dataclass(frozen=True)
class Sample:
    """The steps of one run, timed."""

    wall: float
    sites: Counter[str]


def fold(site: str) -> str:
    """layers.3.mlp.down_proj is layers.*.mlp.down_proj."""
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
    progress: Callable[[str], object] = lambda what: None,
) -> list[Profile]:
    """Prefill, then decode; overwrites the executable's state. Raises BenchError if a size does not fit."""
    if prompt_tokens is None:
        prompt_tokens = max(1, min(PROMPT_TOKENS, executable.program.context - DECODE_STEPS))
    check_size(executable, sequences, prompt_tokens, runs)
    prefill = list(prefill_steps(executable, sequences, prompt_tokens, max_batch_tokens))
    decode = [[batch] for batch in decode_steps(executable, sequences, prompt_tokens)]
    profiles = []
    for phase, passes in (("prefill", [prefill]), ("decode", decode)):
        progress(f"{phase} of {sequences} x {prompt_tokens} tokens")
        _sample(executable, passes[0], True, clock)  # warms up
        timed, untimed = (
            [_sample(executable, steps, on, clock) for _ in range(runs) for steps in passes] for on in (True, False)
        )
        sites = _sites(executable, passes[0], timed, roofs)
        outside = median(s.wall - s.sites.total() for s in timed)
        wall, bare = (median(s.wall for s in samples) for samples in (timed, untimed))
        profiles.append(Profile(phase, sequences, prompt_tokens, len(passes[0]), wall, bare, outside, sites))
    return profiles


def _sample(executable: Executable, steps: Sequence[Batch], timed: bool, clock: Callable[[], float]) -> Sample:
    wall, sites = 0.0, Counter[str]()
    for batch in steps:
        start = clock()
        result = executable.step(batch, timed=timed)
        wall += clock() - start
        for site, seconds in result.timings.items():
            sites[fold(site)] += seconds  # type: ignore[assignment]  # a Counter of seconds
    return Sample(wall, sites)


def _sites(
    executable: Executable, steps: Sequence[Batch], samples: Sequence[Sample], roofs: Roofs | None
) -> tuple[Site, ...]:
    """In the order of the Program."""
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
