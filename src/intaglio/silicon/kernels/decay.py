"""Chip kernel of the op `decay`: step sizes and log decays of a recurrence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from intaglio.batch import Batch
from intaglio.chips import ChipSpec, KernelLibrary
from intaglio.ops import Decay
from intaglio.ops.elementwise import postfix
from intaglio.silicon import isa
from intaglio.silicon.isa.instruction import Steps
from intaglio.silicon.isa.vector import SCALED, map_cycles
from intaglio.silicon.kernels.chip_memory import ChipMemory, load
from intaglio.silicon.kernels.kernel import Tensors, chip_kernel
from intaglio.silicon.kernels.rows import RowsKernel, by_jobs, load_once, vector_bytes
from intaglio.silicon.memory import Region
from intaglio.silicon.stream import Ring, Stream, StreamBuilder

COLUMNS = 2048  # of a job, at most, if a head has no more
RATE, POSITIVE_RATE = postfix("exp(a) * -1.0"), postfix("exp(a)")


@chip_kernel(Decay)
@dataclass(frozen=True)
class DecayKernel(RowsKernel):
    """Chip kernel of the op `decay`.

    A core processes one row of x at a time, or some whole heads of it. It loads the rates and the bias once.

    Attributes:
        heads: number of rates, one for each head.
        bias: True if the op has a bias.
        low, high, floor: the fields of the same names of the op.
    """

    heads: int = 1
    bias: bool = False
    low: float = 0.0
    high: float = 0.0
    floor: float = 0.0

    @classmethod
    def of(cls, op: Decay, t: Tensors) -> Self:  # type: ignore[override]
        rows, width = t[op.x].shape
        vectors = [t[name] for name in (op.rate, op.bias) if name is not None]
        held, heads = sum(map(vector_bytes, vectors)), int(t[op.rate].shape[0])
        return cls(rows, int(width), 3, held, heads, op.bias is not None, op.low, op.high, op.floor)

    def parts(self) -> int:
        most = max(1, COLUMNS * self.heads // self.width)  # heads of a job
        return next(n for n in range(1, self.heads + 1) if self.heads % n == 0 and self.heads // n <= most)

    def held_bytes(self) -> float:
        return super().held_bytes() + 4.0 * self.heads + 256  # with exp(rate), and alignment

    def steps(self) -> tuple[Steps, ...]:
        """Returns one or two postfix expressions. Map instructions evaluate them in turn to compute the step size.

        The operands of the first expression are x (named a) and the bias (named b). The operand of the second is the
        result of the first (named a).
        """
        x = f"softplus({self.biased()})"
        first = f"relu({x} - {self.low!r}) + {self.low!r}" if self.low else x
        return postfix(first), *((postfix(f"{self.high!r} - relu({self.high!r} - a)"),) if self.high else ())

    def decay(self) -> Steps:
        """Returns the expression, in postfix form, that a Map instruction evaluates to compute the log decay.

        Its operands are the step size (named a) and the rate (named b). If the op has a floor, they are x (a), the bias
        (b) and the rate (c).
        """
        return postfix(f"sigmoid(({self.biased()}) * c) * {self.floor!r}") if self.floor else SCALED

    def biased(self) -> str:
        """Returns the expression of x plus bias as text: "a + b", or "a" if the op has no bias."""
        return "a + b" if self.bias else "a"

    def cycles(self, chip: ChipSpec, n: int) -> float:
        return sum(map_cycles(chip, steps, n) for steps in (*self.steps(), self.decay()))

    def pieces(self) -> tuple[float, ...]:
        return 0.5, 0.5  # step sizes, then log decays

    def loaded(self) -> tuple[float, ...]:
        return 1.0, 0.0

    def worked(self, chip: ChipSpec) -> tuple[float, ...]:
        first = sum(map_cycles(chip, steps, 1) for steps in self.steps()) / self.cycles(chip, 1)
        return first, 1 - first

    def load_bytes(self, library: KernelLibrary) -> float:
        return float(self.width * library.activation_bytes)

    def store_bytes(self, library: KernelLibrary) -> float:
        return float(2 * self.width * library.activation_bytes)

    @classmethod
    def streams(cls, mem: ChipMemory, op: Decay, t: Tensors, batch: Batch) -> list[Stream]:
        kernel, x, results = cls.of(op, t), mem.region(op.x), (mem.region(op.step), mem.region(op.decay))
        held: dict[StreamBuilder, list[Region | None]] = {}
        rates: dict[StreamBuilder, Region] = {}
        per = x.cols // kernel.heads

        def body(k: StreamBuilder, rings: list[Ring], rows: slice, columns: slice) -> None:
            rate, bias = load_once(k, mem, held, (op.rate, op.bias))
            assert rate is not None
            if k not in rates:
                rates[k] = k.tile(kernel.heads, 1)
                steps = POSITIVE_RATE if op.floor else RATE
                k.emit(isa.Map(dst=rates[k].shaped(1, kernel.heads), a=rate, steps=steps))
            a = load(k, rings[0].next(), x.part(rows, columns))
            b = None if bias is None else bias.part(cols=columns)
            step, decay = (ring.next().shaped(1, a.cols) for ring in rings[1:])
            first, *others = kernel.steps()
            k.emit(isa.Map(dst=step, a=a, b=b, steps=first))
            for steps in others:
                k.emit(isa.Map(dst=step, a=step, steps=steps))
            heads = slice(columns.start // per, columns.stop // per)
            shape, rate = (heads.stop - heads.start, per), rates[k].part(heads)  # a row for each head
            if op.floor:
                c = None if b is None else b.shaped(*shape)
                k.emit(isa.Map(dst=decay.shaped(*shape), a=a.shaped(*shape), b=c, c=rate, steps=kernel.decay()))
            else:
                k.emit(isa.Map(dst=decay.shaped(*shape), a=step.shaped(*shape), b=rate, steps=kernel.decay()))
            for out, y in zip(results, (step, decay), strict=True):
                k.emit(isa.Store(dst=out.part(rows, columns), src=y))

        return by_jobs(mem, op, kernel, x.rows, (x.cols,) * 3, body)
