"""Compares two models of the time of a matrix product: the closed form of `linear`, and the simulator.

The simulator executes the chip kernel's instructions without values. `intaglio simulate` times ops by closed forms;
this module measures how far each is from the streams of instructions that compute the values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from intaglio import formats
from intaglio.batch import Chunk, bind
from intaglio.chips import Target
from intaglio.ops import Linear, Tensor
from intaglio.silicon.kernels import ChipMemory
from intaglio.silicon.kernels.linear import LinearKernel
from intaglio.silicon.sizes import BLOCK, sizes_of


@dataclass(frozen=True)
class Product:
    """The matrix product x [m, k] @ w.T [k, n]. x is rounded to x_format; w is in w_format, plain or fp8row."""

    m: int
    n: int
    k: int
    x_format: str = "bf16"
    w_format: str = "bf16"


@dataclass(frozen=True)
class Agreement:
    """Modelled seconds of one product, launch overhead included: by the simulated machine, and by the closed form."""

    product: Product
    machine: float
    closed: float

    @property
    def ratio(self) -> float:
        """The machine's seconds divided by those of the closed form; 1.0 if they agree."""
        return self.machine / self.closed


def compare(on: Target, p: Product) -> Agreement:
    """Time one product by the simulated machine and by the closed form. Returns an Agreement with the seconds of each.

    Rounding x is not counted: it is a launch of its own that the closed form does not model.
    """
    memory = ChipMemory(on, values=False)
    memory.allocate("x", p.m, p.k, "f32")
    memory.allocate("y", p.m, p.n, "f32")
    if formats.get(p.w_format).grouped:
        group = formats.get(p.w_format).group_of(p.k)
        codes, scales = np.empty((p.n, p.k), formats.E4M3), np.empty((p.n, -(-p.k // group)), np.float32)
        memory.put("w", formats.Quantised(codes, scales, group))  # only its shapes are used
    else:
        memory.allocate("w", p.n, p.k, p.w_format)
    tensors = {
        "x": Tensor("x", ("T", p.k), "f32", "temp"), "w": Tensor("w", (p.n, p.k), p.w_format, "weight"),
        "y": Tensor("y", ("T", p.n), "f32", "temp"),
    }  # fmt: skip
    op = Linear(site="product", x="x", w="w", out="y", x_format=p.x_format)
    batch = bind([Chunk([0] * p.m, 0, range(-(-p.m // BLOCK)), range(p.m - 1, p.m))], BLOCK)
    run = memory.run(LinearKernel.streams(memory, op, tensors, batch))
    closed = LinearKernel.of(op, tensors).time(on, sizes_of(batch), resident=False)
    return Agreement(p, run.seconds + on.library.launch_s, closed.seconds)


def random_products(rng: np.random.Generator, on: Target, count: int) -> list[Product]:
    """A list of `count` random Products: m 1 to 2,048, n 128 to 8,192 and k 256 to 8,192, log-uniform.

    n is a multiple of 16, k of 64. Formats are bf16 or, if the chip has it, FP8.
    """
    kinds = [("bf16", "bf16"), *([("fp8row", "fp8row")] if "e4m3" in dict(on.chip.macs) else [])]
    out = []
    for _ in range(count):
        m, n, k = (2 ** rng.uniform(low, high) for low, high in ((0, 11), (7, 13), (8, 13)))
        out.append(Product(int(m), int(n) // 16 * 16, int(k) // 64 * 64, *kinds[rng.integers(len(kinds))]))
    return out
