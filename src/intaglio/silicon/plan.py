"""Plan: models the time of a Program's steps on a target, as a Timeline.

Ops run one after the other, each timed by its kernel's closed form. Where the kernel library does so, weights are
prefetched during earlier ops, and collectives of one half of the batch overlap with compute of the other half.

The time of an op depends only on its shapes and on the sizes of the batch, so equal ops (such as those of a model's
layers) are timed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from intaglio import _native, formats
from intaglio.chips import ChipError, Target
from intaglio.program import Program
from intaglio.silicon.isa.rules import check_extra_instructions
from intaglio.silicon.kernels import kernel_class, timing
from intaglio.silicon.sizes import BatchSizes
from intaglio.silicon.timeline import OpSpan, Timeline, joules
from intaglio.silicon.timing import Timing


def exposed_seconds(seconds: Sequence[tuple[float, float]], is_collective: Sequence[bool]) -> dict[int, float]:
    """Returns the exposed seconds of each collective with dual-batch overlap: the time that no computation hides.

    The result is a dict {index of the collective in the list of ops: seconds} with all collectives; a collective that
    is hidden completely has 0.

    With dual-batch overlap, two halves of the batch alternate: one computes while the other communicates. Each half
    runs its ops in order, and the second half is never ahead of the first. If both halves could compute, the one that
    is closer to its next collective does, which keeps the links busy. Seconds in which neither half computes are
    exposed. They are counted for the latest collective of the half that computes next. At the end of the step they are
    counted for the latest collective of the second half.

    seconds: for each op, (seconds for the first half, seconds for the second half). is_collective: for each op, True if
    it is a collective.
    """
    found = _native.exposed_seconds(
        range(len(seconds)), [a for a, _ in seconds], [b for _, b in seconds], list(is_collective)
    )
    return {i: found[i] for i, collective in enumerate(is_collective) if collective}


@dataclass(frozen=True)
class Schedule:
    """The modelled end time of each op of one step.

    Attributes:
        timings: the Timing of each distinct kernel of the Plan. If weights are prefetched, its `seconds` do not include
            the transfer of the weights.
        ends: for each op, seconds from the start of the step to the end of the op.
        stalled: for each op, True if the op waited for its weights.
    """

    timings: tuple[Timing, ...]
    ends: tuple[float, ...]
    stalled: tuple[bool, ...]

    @property
    def seconds(self) -> float:
        """The modelled time of the step in seconds."""
        return self.ends[-1] if self.ends else 0.0


class Plan:
    """A Program prepared for timing on one target, with a chip kernel for each op. Equal kernels are one object.

    Raises ChipError if an op has no chip kernel, or if the chip's matrix array does not multiply the format of a
    weight.
    """

    def __init__(self, program: Program, target: Target) -> None:
        self.program, self.target = program, target
        kernels = [kernel_class(op).of(op, program.tensors) for op in program.ops]
        numbers = {kernel: i for i, kernel in enumerate(dict.fromkeys(kernels))}
        self.kernels = tuple(numbers)  # distinct kernels
        self.numbers = [numbers[kernel] for kernel in kernels]  # of each op: the index of its kernel
        self.counts = [self.numbers.count(n) for n in range(len(self.kernels))]  # of each kernel: the ops that have it
        self.weight_bytes = sum(w.nbytes({}) for w in program.of_role("weight"))
        for w in program.of_role("weight"):
            if len(w.shape) > 1 and w.format != "i32":  # indices are not multiplied
                target.chip.runs_as(formats.element(w.format))  # raises ChipError if the arrays do not take the format

    @classmethod
    def of(cls, stages: Sequence[Program], target: Target) -> tuple[Plan, ...]:
        """Returns a tuple with one Plan for each pipeline stage.

        Raises ChipError if an op has no chip kernel, if the matrix array does not multiply a weight's format, if a
        rank's weights exceed a chip's HBM, and if the chip lists an unknown extra instruction.

        stages: for each pipeline stage, the Program of one of its ranks.
        """
        check_extra_instructions(target.chip)
        plans, chip = tuple(cls(p, target) for p in stages), target.chip
        most = max(plan.weight_bytes for plan in plans)
        if most > chip.hbm_bytes:
            held = f"{chip.name} has {chip.hbm_bytes / 1e9:,.3g} GB of HBM"
            raise ChipError(f"{most / 1e9:,.1f} GB of weights a chip; {held}; use more chips or fewer bits")
        return plans

    def run(self, sizes: BatchSizes) -> Timeline:
        """Returns the Timeline of one step whose batch has the sizes `sizes`."""
        done, spans, start = self.fastest(sizes), list[OpSpan](), 0.0
        for op, number, end, stalled in zip(self.program.ops, self.numbers, done.ends, done.stalled, strict=True):
            spans.append(OpSpan(op.site, op.kind, start, end, done.timings[number], "HBM" if stalled else ""))
            start = end
        return Timeline(self.target.chip, tuple(spans))

    def cost(self, sizes: BatchSizes) -> tuple[float, float]:
        """Returns (modelled seconds, estimated joules) of one step on this chip, without making a Timeline."""
        done = self.fastest(sizes)
        kernels = list(zip(done.timings, self.counts, strict=True))
        return done.seconds, sum(joules(self.target.chip, kernels, done.seconds).values())

    def fastest(self, sizes: BatchSizes) -> Schedule:
        """Returns the faster of two Schedules of one step.

        One has the whole batch, the other has two halves of the batch that overlap. Halves are tried only if the
        library has dual-batch overlap, the step has collectives, and the step has at least 2 tokens.
        """
        whole = self.schedule(sizes)
        communicates = any(t.link_bytes for t in whole.timings)
        if not self.target.library.dual_batch_overlap or not communicates or sizes.tokens < 2:
            return whole
        return min(whole, self.schedule(sizes, sizes.halves()), key=lambda s: s.seconds)

    def schedule(self, sizes: BatchSizes, halves: Sequence[BatchSizes] = ()) -> Schedule:
        """Returns the Schedule of one step in which the ops run one after the other.

        With `halves`, dual-batch overlap is modelled. An op then takes the time of both halves together. A collective
        takes only its exposed seconds, in which neither half computes. HBM delivers the weights once for both halves.

        sizes: sizes of the whole batch. halves: sizes of the two halves of the batch; (): the batch is not divided.
        """
        chip, library = self.target.chip, self.target.library
        whole = tuple(self.timings(sizes))
        parts = [self.timings(part) for part in halves] or [list(whole)]
        by_kernel = [sum(t.seconds for t in each) for each in zip(*parts, strict=True)]
        seconds = [by_kernel[n] for n in self.numbers]
        if halves:
            first, second = ([t.seconds for t in part] for part in parts)
            collective = [t.link_bytes > 0 for t in whole]
            exposed = _native.exposed_seconds(self.numbers, first, second, collective)
            seconds = [
                exposed[i] if collective[n] else taken
                for i, (n, taken) in enumerate(zip(self.numbers, seconds, strict=True))
            ]
        if not library.prefetches_weights:
            return Schedule(whole, tuple(accumulate(seconds)), (False,) * len(seconds))
        # Weights are prefetched at most this many seconds ahead: as many as the L2 can hold.
        ahead = chip.l2_bytes * library.l2_usable / chip.hbm_rate
        # HBM also moves the rows of an op with weights, before the next op's weights.
        weights_s = [t.hbm_bytes / chip.hbm_rate if t.weight_bytes else 0.0 for t in whole]
        other_s = [0.0 if t.weight_bytes else t.hbm_bytes / chip.hbm_rate for t in whole]
        ends, stalled = _native.prefetched_ends(self.numbers, seconds, weights_s, other_s, ahead)
        return Schedule(whole, tuple(ends), tuple(stalled))

    def timings(self, sizes: BatchSizes) -> list[Timing]:
        """Returns a list with the Timing of each distinct kernel in a step, in the order of self.kernels.

        Overlap between kernels is not modelled. If the library prefetches weights, `seconds` do not include their
        transfer.
        """
        prefetched = self.target.library.prefetches_weights
        return [timing(k, self.target, sizes if k.by_sequence else sizes.counts, prefetched) for k in self.kernels]
