"""Call: the modelled time of one kernel call, what bounds it, and why it may be far from a measured time."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from intaglio.chips import Target
from intaglio.silicon.timing import Timing

REGIMES = ("launch-bound", "memory-bound", "compute-bound", "link-bound", "tail")
MEMORIES = ("HBM", "L2")
LAUNCH_SHARE = 0.5  # of the modelled time, from which a call is launch-bound
BUSY_SHARE = 0.5  # of the rest: if no engine and no memory is busy for so long, the call is in the regime `tail`
MOST_WAVES = 4  # a last wave that is not full matters in calls of at most so many
CAUSES = {
    "bandwidth": "measured faster than the peak of HBM allows for the bytes that the model counts",
    "flops": "measured faster than the chip's peak FLOP/s allow",
    "launch": "half of the modelled time or more is launch overhead",
    "waves": "fewer jobs than cores, or a last wave that leaves half of the cores idle",
    "memory-bound": "bound by memory, and none of the above",
    "compute-bound": "bound by computation, and none of the above",
    "link-bound": "bound by links, and none of the above",
    "tail": "latency of loads and results, and none of the above",
}  # cause of an error -> what it means


@dataclass(frozen=True)
class Call:
    """One kernel call with its modelled time, and how much of the time is launch overhead.

    Attributes:
        on: chip and kernel library that the call runs on.
        timing: the call's modelled Timing: seconds, bytes, FLOPs and how long each engine is busy.
        launch_s: seconds of `timing` that are launch overhead.
    """

    on: Target
    timing: Timing
    launch_s: float

    @property
    def busiest(self) -> tuple[str, float]:
        """(name, share) of the engine or memory that is busy longest in this call.

        The share is its busy time divided by the time after the launch, at most 1. The result is ("", 0) if nothing is
        busy, or if all of the time is launch overhead.
        """
        rest = self.timing.seconds - self.launch_s
        name = max(self.timing.busy, key=lambda e: self.timing.busy[e], default="")
        return (name, min(1.0, self.timing.busy[name] / rest)) if name and rest > 0 else ("", 0.0)

    @property
    def regime(self) -> str:
        """The name of what limits the modelled time, one of REGIMES, such as "memory-bound"."""
        if self.launch_s >= LAUNCH_SHARE * self.timing.seconds:
            return "launch-bound"
        name, share = self.busiest
        if share < BUSY_SHARE:
            return "tail"
        return "memory-bound" if name in MEMORIES else "link-bound" if name == "NET" else "compute-bound"

    @property
    def last_wave(self) -> tuple[int, int]:
        """Number of waves of the kernel and number of jobs in its last wave, as a tuple.

        The tuple is (0, 0) if the model of the kernel does not count its jobs. A wave is a set of jobs that run at the
        same time, one on each core of the chip.
        """
        jobs, cores = ceil(self.timing.jobs), self.on.chip.cores
        waves = -(-jobs // cores)
        return waves, jobs - max(0, waves - 1) * cores

    def cause(self, measured_s: float) -> str:
        """The likeliest cause of the difference between modelled and measured time, as a key of CAUSES.

        measured_s: measured seconds of the call. A key is returned for any difference, even if the modelled time is
        exact.
        """
        chip, t = self.on.chip, self.timing
        if t.hbm_bytes > measured_s * chip.hbm_bytes_per_s:
            return "bandwidth"
        if t.flops and t.flops > measured_s * chip.peak_flops(t.format):
            return "flops"
        if self.regime == "launch-bound":
            return "launch"
        waves, last = self.last_wave
        if 0 < waves <= MOST_WAVES and last < chip.cores / 2:
            return "waves"
        return self.regime

    def reason(self, measured_s: float) -> str:
        """A clause in English, with numbers, that says why the modelled time may differ from the measured time.

        It explains the cause that cause() returns, for example "launch is 62% of the modelled time". measured_s:
        measured seconds of the call.
        """
        chip, t = self.on.chip, self.timing
        name, share = self.busiest
        waves, last = self.last_wave
        match self.cause(measured_s):
            case "bandwidth":
                least = t.hbm_bytes / chip.hbm_bytes_per_s * 1e6
                return (
                    f"reads its operands from HBM where the measured time is faster than HBM's peak "
                    f"({t.hbm_bytes / 1e6:,.1f} MB take {least:,.1f} us)"
                )
            case "flops":
                least = t.flops / chip.peak_flops(t.format) * 1e6
                return f"the measured time is faster than the chip's peak in {t.format}, which takes {least:,.1f} us"
            case "launch":
                return f"launch is {self.launch_s / t.seconds:.0%} of the modelled time"
            case "waves" if waves == 1:
                return f"its jobs fill {last:,} of {chip.cores:,} cores{self._reached(measured_s)}"
            case "waves":
                return f"the last of {waves} waves fills {last:,} of {chip.cores:,} cores{self._reached(measured_s)}"
            case "tail":
                busy = f"{name} is busy for {share:.0%} of it" if name else "no engine is counted"
                return f"the modelled time is mostly latency: after the launch, {busy}{self._reached(measured_s)}"
        return f"{name} is busy for {share:.0%} of the modelled time after the launch{self._reached(measured_s)}"

    def _reached(self, measured_s: float) -> str:
        """The share of a peak rate that the measured call reached, as text.

        An example is "; measured at 63% of HBM's peak". The rate is HBM's bandwidth if HBM or the L2 is the busiest
        part of the chip. Otherwise it is the chip's FLOP/s in the call's number format; the text is "" if the call has
        no FLOPs. measured_s: measured seconds of the call.
        """
        chip, t = self.on.chip, self.timing
        if self.busiest[0] in MEMORIES:
            return f"; measured at {t.hbm_bytes / measured_s / chip.hbm_bytes_per_s:.0%} of HBM's peak"
        if t.flops:
            return f"; measured at {t.flops / measured_s / chip.peak_flops(t.format):.0%} of peak FLOP/s"
        return ""
