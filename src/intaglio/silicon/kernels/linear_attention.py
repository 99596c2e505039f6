"""Chip kernel of the op `linear_attention`: a matrix of state for each head, which each token updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from intaglio.batch import Batch
from intaglio.chips import ChipSpec, Target
from intaglio.ops import LinearAttention
from intaglio.ops.elementwise import postfix
from intaglio.silicon import isa
from intaglio.silicon.isa.cycles import vector_cycles
from intaglio.silicon.isa.instruction import Steps
from intaglio.silicon.isa.vector import SCALED, map_cycles
from intaglio.silicon.kernels.chip_memory import ChipMemory, load
from intaglio.silicon.kernels.kernel import Tensors, chip_kernel
from intaglio.silicon.kernels.sequences import BLOCK, SequenceKernel
from intaglio.silicon.stream import Stream

EXP, ERROR, ADDED = postfix("exp(a)"), postfix("(a - b) * c"), postfix("a + b * c")
DIFFERENCE = postfix("a - b")


@chip_kernel(LinearAttention)
@dataclass(frozen=True)
class LinearAttentionKernel(SequenceKernel):
    """Chip kernel of `linear_attention`. A core processes some value columns of one head of a sequence at a time.

    The core needs the same columns of the head's state, which has one row for each column of the keys. For each token,
    Map instructions decay and update the state, and Combine instructions multiply it by k and q.

    Attributes:
        values: number of columns of a head's values.
        delta: True if the op uses the delta rule.
        beta: True if the op has step sizes.
        skip: True if the op has skip factors.
        scale: the field `scale` of the op.
    """

    values: int = 1
    delta: bool = False
    beta: bool = False
    skip: bool = False
    scale: float = 1.0

    @classmethod
    def of(cls, op: LinearAttention, t: Tensors) -> Self:  # type: ignore[override]
        keys, values = (int(d) for d in t[op.state].shape[2:])
        decays = int(t[op.decay].shape[1]) // op.heads if op.decay is not None else 0
        beta, skip = op.beta is not None, op.skip is not None
        return cls.made(
            op, t, width=op.heads * values, operands=1, vectors=0, state_rows=keys, shared=2 * keys + decays + beta,
            values=values, delta=op.delta, beta=beta, skip=skip, scale=op.scale,
        )  # fmt: skip

    def columns(self, target: Target, sequences: int) -> int:
        most = super().columns(target, sequences)
        return max(n for n in range(1, self.values + 1) if self.values % n == 0 and (n <= most or n == 1))

    def state_starts(self, columns: slice, sequence: int) -> list[int]:
        head, at = divmod(columns.start, self.values)
        first = (sequence * self.width // self.values + head) * self.state_rows
        return [4 * (row * self.values + at) for row in range(first, first + self.state_rows)]

    def result(self) -> Steps:
        """Returns the expression, in postfix form, that a Map instruction evaluates to compute the op's result.

        Its operands are the sum over the state (named a), the value (b) and the skip factor (c).
        """
        return postfix(f"a * {self.scale!r} + b * c" if self.skip else f"a * {self.scale!r}")

    def cycles(self, chip: ChipSpec, rows: float, columns: float) -> float:
        values, states = rows * columns, rows * columns * self.state_rows
        kept = map_cycles(chip, SCALED, states) + map_cycles(chip, ADDED, states)
        combines = float(vector_cycles(chip, 2 * states)) * (1 + self.delta)
        error = (ERROR if self.beta else DIFFERENCE) if self.delta else SCALED
        updates = map_cycles(chip, error, values) if self.delta or self.beta else 0.0
        decays = map_cycles(chip, EXP, rows * max(0, self.shared - 2 * self.state_rows - self.beta))
        return kept + combines + updates + decays + map_cycles(chip, self.result(), values)

    @classmethod
    def streams(cls, mem: ChipMemory, op: LinearAttention, t: Tensors, batch: Batch) -> list[Stream]:
        kernel, longest, streams = cls.of(op, t), max(batch.q_len.tolist()), []
        q, k_, v, state, out = (mem.region(name) for name in (op.q, op.k, op.v, op.state, op.out))
        decay, rates, beta, skip = (mem.optional_region(n) for n in (op.decay, op.rates, op.beta, op.skip))
        keys, per = kernel.state_rows, op.heads // (k_.cols // kernel.state_rows)
        decays = decay.cols // op.heads if decay is not None else 1  # values of a token and head
        for k, jobs in kernel.jobs(mem, op.site, batch):
            columns = max(job.columns.stop - job.columns.start for job in jobs)
            most, depth = min(BLOCK, max(len(job.rows) for job in jobs)), kernel.depth(mem.target, columns, longest)
            held = min(depth, len(jobs))
            states = k.ring(held, keys, columns)
            queries, heads, values, results, updates = (
                k.ring(depth, most, width) for width in (keys, keys, columns, columns, columns)
            )
            gates, steps = k.ring(depth, most, decays), k.ring(depth, most, 1)
            fixed = k.ring(held, 1, 1, rates.format if rates is not None else "f32"), k.ring(held, 1, 1)
            skips = k.ring(held, 1, 1, skip.format if skip is not None else "f32")
            for job in jobs:
                width, head = job.columns.stop - job.columns.start, job.columns.start // kernel.values
                group, own = slice(head // per * keys, (head // per + 1) * keys), slice(head, head + 1)
                at = slice(*(n - head * kernel.values for n in (job.columns.start, job.columns.stop)))
                h = states.next().shaped(keys, width)
                if job.before >= 0:
                    load(k, h, state.part(state_rows(job.before * op.heads + head, keys), at))
                else:
                    k.emit(isa.Fill(dst=h, value=0.0))
                if rates is not None:
                    kept = fixed[1].next()
                    k.emit(isa.Map(dst=kept, a=load(k, fixed[0].next(), rates.part(cols=own)), steps=EXP))
                skipped = None if skip is None else load(k, skips.next(), skip.part(cols=own))
                for block in job.blocks():
                    m = block.stop - block.start
                    qs, ks = (load(k, r.next(), x.part(block, group)) for r, x in ((queries, q), (heads, k_)))
                    vs, y, u = load(k, values.next(), v.part(block, job.columns)), results.next(), updates.next()
                    y, u = y.shaped(m, width), u.shaped(m, width)
                    if decay is not None:
                        gate = load(k, gates.next(), decay.part(block, slice(head * decays, (head + 1) * decays)))
                        k.emit(isa.Map(dst=gate, a=gate, steps=EXP))
                    b = None if beta is None else load(k, steps.next(), beta.part(block, own))
                    if not op.delta and b is not None:
                        k.emit(isa.Map(dst=u, a=vs, b=b, steps=SCALED))
                    for i in range(m):
                        row = slice(i, i + 1)
                        factor = kept if decay is None else gate.part(row).shaped(decays, 1)
                        k.emit(isa.Map(dst=h, a=h, b=factor, steps=SCALED))
                        update = u.part(row) if op.delta or b is not None else vs.part(row)
                        if op.delta:
                            k.emit(isa.Combine(dst=update, parts=h, weights=ks.part(row)))
                            error: dict[str, Any] = {
                                "c": None if b is None else b.part(row),
                                "steps": DIFFERENCE if b is None else ERROR,
                            }
                            k.emit(isa.Map(dst=update, a=vs.part(row), b=update, **error))
                        k.emit(isa.Map(dst=h, a=h, b=ks.part(row).shaped(keys, 1), c=update, steps=ADDED))
                        k.emit(isa.Combine(dst=y.part(row), parts=h, weights=qs.part(row)))
                    extra: dict[str, Any] = {"b": vs, "c": skipped} if skip is not None else {}
                    k.emit(isa.Map(dst=y, a=y, **extra, steps=kernel.result()))
                    k.emit(isa.Store(dst=out.part(block, job.columns), src=y))
                k.emit(isa.Store(dst=state.part(state_rows(job.after * op.heads + head, keys), at), src=h))
            streams.append(k.stream())
        return streams


def state_rows(number: int, keys: int) -> slice:
    """Returns a slice of the rows that hold one head's state.

    They are rows of the state tensor, viewed as a matrix.

    number: number of the head, counted over all slots. keys: rows of one head's state.
    """
    return slice(number * keys, (number + 1) * keys)
