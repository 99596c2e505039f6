"""An op of another package: refused on a chip until its chip kernel is registered, then timed and executed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from support.silicon import SMALL, normal, run_kernel, some_batch

from intaglio.batch import Batch
from intaglio.chips import CHIPS, DEFAULT_LIBRARY, LIBRARIES, ChipError, register_chip, target
from intaglio.ops import REGISTRY, Embed, Linear, Op, Sample, Select, Tensor, Value, Work
from intaglio.ops.op import array, operand, result
from intaglio.program import Builder, Program
from intaglio.silicon import ChipKernel, WorkKernel, chip_kernel, isa
from intaglio.silicon.kernels import CHIP_KERNELS, ChipMemory, kernel_class, unsupported_reason
from intaglio.silicon.kernels.chip_memory import load
from intaglio.silicon.kernels.rows import by_rows
from intaglio.silicon.memory import MachineError
from intaglio.silicon.plan import Plan
from intaglio.silicon.sizes import BatchSizes
from intaglio.silicon.stream import Ring, Stream, StreamBuilder

Tensors = Mapping[str, Tensor]
SIZES = BatchSizes(67, 4, ((1, 300, 3), (64, 64, 1)))


@pytest.fixture
def square() -> Iterator[type[Op]]:
    """The op out = x * x, registered for one test."""

    @dataclass(frozen=True, kw_only=True)
    class Square(Op, kind="square"):
        """out = x * x, element by element. x, out f32 [rows, width]."""

        x: str = operand()
        out: str = result()

        def shapes(self, t: Tensors) -> dict[str, Any]:
            return {self.out: (t[self.x].shape, "f32")}

        def reference(self, v: Mapping[str, Value], batch: Batch) -> dict[str, np.ndarray]:
            return {self.out: array(v, self.x) ** 2}

        def work(self, t: Tensors, batch: Batch) -> Work:
            return self.moved(t, batch, t[self.x].nbytes(batch.sizes) // 4)

    yield Square
    REGISTRY.pop("square")
    CHIP_KERNELS.pop(Square, None)


def program(op: type[Op], times: int) -> Program:
    """A Program with the op `times` times between embedding and logits."""
    b = Builder("squares", 64)
    x = b.op(Embed, "embed", "tokens", b.weight("e", (256, 48), "e"))
    for i in range(times):
        x = b.op(op, f"square.{i}", x)
    r = b.op(Select, "select", x, "rows")
    b.op(Linear, "head", r, b.weight("h", (256, 48), "h"), out="logits", role="output")
    b.op(Sample, "sample", "logits", tokens="next_tokens", logprobs="logprobs", role="output")
    return b.done()


def tensors(*names: str) -> dict[str, Tensor]:
    return {n: Tensor(n, ("T", 48), "f32", "temp") for n in names}


def test_the_error_for_an_op_without_a_kernel_says_what_to_register(square: type[Op]) -> None:
    op: Any = square(site="layers.0.square", x="x", out="y")  # type: ignore[call-arg]
    why = (
        r"op square at layers.0.square has no chip kernel; .* register one with @intaglio.silicon.chip_kernel\(Square\)"
    )
    with pytest.raises(ChipError, match=why):
        kernel_class(op)
    with pytest.raises(ChipError, match="op square at square.0 has no chip kernel"):
        Plan(program(square, 1), target("sohu"))
    with pytest.raises(MachineError, match=why):
        run_kernel(SMALL, op, tensors("x", "y"), {}, some_batch(np.random.default_rng()))


def test_a_work_kernel_is_timed_by_the_ops_work(square: type[Op]) -> None:
    """Bytes at HBM's rate, FLOPs at the lanes' rate, like ops are equal; without streams() it cannot be executed."""

    @chip_kernel(square)
    @dataclass(frozen=True)
    class SquareKernel(WorkKernel):
        pass

    first, second = (square(site=s, x=x, out=y) for s, x, y in (("a", "x", "y"), ("b", "y", "z")))  # type: ignore[call-arg]
    t, on = tensors("x", "y", "z"), target("h100_sxm")
    kernel = kernel_class(first).of(first, t)
    assert kernel == kernel_class(second).of(second, t)
    took = kernel.time(on, SIZES, prefetched=False)
    moved = 2 * 67 * 48 * 4
    wanted = on.library.launch_s + on.chip.constants.hbm_latency_s + moved / on.chip.hbm_rate
    assert took.seconds == pytest.approx(wanted) and took.hbm_bytes == moved
    two, four = (Plan(program(square, n), on).run(SIZES) for n in (2, 4))
    assert two.by_kind()["square"] * 2 == pytest.approx(four.by_kind()["square"])
    assert "op square at a: SquareKernel does not define streams()" in str(unsupported_reason(first, t))
    with pytest.raises(TypeError, match="op square has a chip kernel already: SquareKernel"):
        chip_kernel(square)(ChipKernel)


def test_a_kernel_with_streams_runs_on_the_simulator(square: type[Op]) -> None:
    @chip_kernel(square)
    @dataclass(frozen=True)
    class SquareKernel(WorkKernel):
        @classmethod
        def streams(cls, mem: ChipMemory, op: Any, t: Tensors, batch: Batch) -> list[Stream]:
            x, out = mem.region(op.x), mem.region(op.out)

            def body(k: StreamBuilder, rings: list[Ring], rows: slice) -> None:
                a = load(k, rings[0].next(), x.part(rows))
                y = rings[1].next().shaped(a.rows, a.cols)
                k.emit(isa.Map(dst=y, a=a, steps=(("operand", "a"), ("operand", "a"), ("binary", "*"))))
                k.emit(isa.Store(dst=out.part(rows), src=y))

            return by_rows(mem, op.site, x.rows, [x.cols, x.cols], body)

    rng = np.random.default_rng()
    op: Any = square(site="s", x="x", out="y")  # type: ignore[call-arg]
    batch = some_batch(rng)
    values: dict[str, Value] = {"x": normal(rng, len(batch.tokens), 48)}
    got, _ = run_kernel(SMALL, op, tensors("x", "y"), values, batch)
    np.testing.assert_array_equal(got["y"], op.reference(values, batch)["y"])


def test_batch_sizes_make_a_batch_for_work() -> None:
    batch = SIZES.batch()
    assert batch.sizes == SIZES.sizes
    assert sorted(zip(batch.q_len.tolist(), batch.context_len.tolist(), strict=True)) == [(1, 300)] * 3 + [(64, 64)]


def test_a_registered_chip_is_known_by_name() -> None:
    mine = target("sohu").with_chip(name="mine", cores=32).with_library(name="mine", launch_s=0.0)
    try:
        assert register_chip(mine) == target("mine") == register_chip(mine)
        with pytest.raises(ChipError, match="another chip is called 'mine'"):
            register_chip(mine.with_chip(cores=8))
        with pytest.raises(ChipError, match="another kernel library is called 'mine'"):
            register_chip(mine.with_library(launch_s=1e-6))
    finally:
        for table in (CHIPS, LIBRARIES, DEFAULT_LIBRARY):
            table.pop("mine", None)
