"""Plan: models the time of a Program's steps on a target, as a Timeline.

Ops run one after the other, each timed by its kernel's closed form. Where the kernel library does so, weights are
prefetched during earlier ops, and collectives of one half of the batch overlap with compute of the other half.

The time of an op depends only on its shapes and on the sizes of the batch, so equal ops (such as those of a model's
layers) are timed once.
"""

from __future__ import annotations

from collections.abc import Sequence

from intaglio import formats
from intaglio.chips import ChipError, Target
from intaglio.program import Program
from intaglio.silicon.isa.rules import check_extra_instructions
from intaglio.silicon.kernels import kernel_class, timing
from intaglio.silicon.sizes import BatchSizes
from intaglio.silicon.timeline import OpSpan, Timeline


def exposed_seconds(seconds: Sequence[tuple[float, float]], is_collective: Sequence[bool]) -> dict[int, float]:
    """A dict from each collective's index to its exposed time with dual-batch overlap.

    Exposed time is the seconds in which no compute hides the collective. Two halves of the batch alternate: one
    computes while the other communicates. `seconds` (of the first and of the second half) and `is_collective` have
    an item for each op. Each half runs its ops in order, and the second half is never ahead of the first. If both
    could compute, the one closer to its next collective does, which keeps the links busy. Time in which neither
    half computes counts for the collective that is waited for.
    """
    to_collective = [(0.0, 0.0)] * (len(seconds) + 1)  # of each half, seconds of compute from an op to the next one
    for i in reversed(range(len(seconds))):
        first, second = (a + b for a, b in zip(seconds[i], to_collective[i + 1], strict=True))
        to_collective[i] = (0.0, 0.0) if is_collective[i] else (first, second)
    n, next_op, ready = len(seconds), [0, 0], [0.0, 0.0]  # of each half: its next op, and when that can start
    last_collective = [-1, -1]  # of each half
    free_at = [0.0, 0.0]  # [compute, links]
    exposed = {i: 0.0 for i, collective in enumerate(is_collective) if collective}
    while next_op[1] < n:
        half, (i, j) = 0, next_op
        if i == n:
            half = 1
        elif j < i:
            first, second = max(ready[0], free_at[is_collective[i]]), max(ready[1], free_at[is_collective[j]])
            half = 1 if second < first or (second == first and to_collective[j][1] < to_collective[i][0]) else 0
        i = next_op[half]
        collective = is_collective[i]
        start = max(ready[half], free_at[collective])
        if collective:
            last_collective[half] = i
        elif last_collective[half] >= 0:
            exposed[last_collective[half]] += start - free_at[0]
        ready[half] = free_at[collective] = start + seconds[i][half]
        next_op[half] = i + 1
    if last_collective[1] >= 0:
        exposed[last_collective[1]] += max(0.0, ready[1] - free_at[0])
    return exposed


class Plan:
    """A Program prepared for timing on one target: a kernel for each op, where equal kernels are one object."""

    def __init__(self, program: Program, target: Target) -> None:
        self.program, self.target = program, target
        kernels = [kernel_class(op).of(op, program.tensors) for op in program.ops]
        numbers = {kernel: i for i, kernel in enumerate(dict.fromkeys(kernels))}
        self.kernels = tuple(numbers)  # distinct kernels
        self.numbers = [numbers[kernel] for kernel in kernels]  # of each op: the index of its kernel
        self.weight_bytes = sum(w.nbytes({}) for w in program.of_role("weight"))
        for w in program.of_role("weight"):
            if len(w.shape) > 1:
                target.chip.runs_as(formats.element(w.format))  # raises ChipError if the arrays do not take the format

    @classmethod
    def of(cls, stages: Sequence[Program], target: Target) -> tuple[Plan, ...]:
        """A tuple with one Plan for each pipeline stage, from the Program of one rank of each stage.

        Raises ChipError if a rank's weights exceed a chip's HBM, or if the chip lists an unknown extra
        instruction.
        """
        check_extra_instructions(target.chip)
        plans, chip = tuple(cls(p, target) for p in stages), target.chip
        most = max(plan.weight_bytes for plan in plans)
        if most > chip.hbm_bytes:
            held = f"{chip.name} has {chip.hbm_bytes / 1e9:,.3g} GB of HBM"
            raise ChipError(f"{most / 1e9:,.1f} GB of weights a chip; {held}; use more chips or fewer bits")
        return plans

    def run(self, sizes: BatchSizes) -> Timeline:
        """The Timeline of one step with a batch of these sizes.

        With a library that has dual-batch overlap, it is the timeline of the batch in two halves if that is
        faster.
        """
        whole = self.schedule(sizes)
        communicates = any(span.timing.link_bytes for span in whole.ops)
        if not self.target.library.dual_batch_overlap or not communicates or sizes.tokens < 2:
            return whole
        return min(whole, self.schedule(sizes, sizes.halves()), key=lambda t: t.seconds)

    def schedule(self, sizes: BatchSizes, halves: Sequence[BatchSizes] = ()) -> Timeline:
        """The Timeline of a step, op after op, of the whole batch or of its two `halves`.

        With halves, an op takes the seconds of both and a collective its exposed seconds; HBM delivers the weights once
        for both.
        """
        spans: list[OpSpan] = []
        chip, library = self.target.chip, self.target.library
        now, fetched_at = 0.0, 0.0  # fetched_at: when HBM has delivered all weights requested so far
        prefetches = library.prefetches_weights
        # Weights are prefetched at most this many seconds ahead: as many as the L2 can hold.
        ahead = chip.l2_bytes * library.l2_usable / chip.hbm_rate if prefetches else 0.0
        alone = [timing(kernel, self.target, sizes) for kernel in self.kernels]
        parts = [
            [timing(kernel, self.target, part, prefetches) for kernel in self.kernels] for part in halves or (sizes,)
        ]
        seconds = [sum(t.seconds for t in each) for each in zip(*parts, strict=True)]
        exposed: dict[int, float] = {}
        if halves:
            first, second = parts
            pairs = [(first[n].seconds, second[n].seconds) for n in self.numbers]
            exposed = exposed_seconds(pairs, [alone[n].link_bytes > 0 for n in self.numbers])
        for i, (op, number) in enumerate(zip(self.program.ops, self.numbers, strict=True)):
            t = alone[number]
            end, stalled_on = now + exposed.get(i, seconds[number]), ""
            if prefetches and t.weight_bytes:
                fetched_at = max(fetched_at, now - ahead) + t.weight_bytes / chip.hbm_rate
                if fetched_at > end:
                    end, stalled_on = fetched_at, "HBM"
            elif prefetches and t.hbm_bytes:
                fetched_at = max(fetched_at, now) + t.hbm_bytes / chip.hbm_rate
            spans.append(OpSpan(op.site, op.kind, now, end, t, stalled_on))
            now = end
        return Timeline(chip, tuple(spans))
