"""Builder, with which ports write Programs: each call adds one op and returns the name of its result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from intaglio.ops import Op, Tensor
from intaglio.ops.op import Shape
from intaglio.program.program import INPUTS, Program
from intaglio.program.verify import verify


class Builder:
    """Builds a Program op by op. The result of an op has the op's site as its name, unless `out=` gives another name.

    A site is the name of an op's place in the model, such as layers.0.attn.q_proj.
    """

    def __init__(self, name: str, context: int) -> None:
        self.name, self.context = name, context
        self.ops: list[Op] = []
        self.tensors: dict[str, Tensor] = {n: Tensor(n, (d,), "i32", "input") for n, d in INPUTS.items()}

    def _add(self, tensor: Tensor) -> str:
        self.tensors[tensor.name] = tensor
        return tensor.name

    def weight(self, name: str, shape: Shape, source: str | Sequence[str], format: str = "f32") -> str:
        """Declare a weight. Returns its name.

        Args:
            name: the weight's name.
            shape: its shape.
            source: the checkpoint tensors from which it is read (see program/source.py); if there are several sources,
                they are joined along dimension 0.
            format: name of its number format.
        """
        names = (source,) if isinstance(source, str) else tuple(source)
        return self._add(Tensor(name, tuple(shape), format, "weight", source=names))

    def const(self, name: str, values: Sequence[float]) -> str:
        """Declare a small float32 vector whose values are part of the Program. Returns its name."""
        rounded = tuple(float(np.float32(x)) for x in values)
        return self._add(Tensor(name, (len(values),), "f32", "const", values=rounded))

    def cache(self, name: str, heads: int, head_dim: int, format: str, every: int = 1) -> str:
        """Declare a K or V cache: state [P pages, B tokens per page, heads, head_dim]. Returns its name.

        format: name of its number format, such as bf16.
        every: above 1, a page has a row for each run of so many tokens (see ops/pooled.py).
        """
        rows = "B" if every == 1 else f"B/{every}"
        return self._add(Tensor(name, ("P", rows, heads, head_dim), format, "state"))

    def state(self, name: str, *shape: int) -> str:
        """Declare recurrent state f32 [N, *shape], an array of `shape` for each of N slots. Returns its name."""
        return self._add(Tensor(name, ("N", *shape), "f32", "state"))

    def view(self, name: str, base: str, start: int, stop: int) -> str:
        """Declare a view of columns start..stop - 1 of the intermediate result `base`, without a copy.

        Returns the view's name.
        """
        of = self.tensors[base]
        return self._add(replace(of, name=name, shape=(of.shape[0], stop - start), view=(base, start)))

    def op(self, cls: type[Op], site: str, *operands: str | None, role: str = "temp", **fields: Any) -> str:
        """Append an op of class `cls`. Returns the name of its first result, or "" if it has none.

        Args:
            cls: class of the op.
            site: name of the op's place in the model, such as layers.0.attn.q_proj. Its first result gets the same
                name.
            operands: names of the required operands, in order.
            role: role of the results' tensors, temp or output.
            fields: optional operands, attributes, and names of results.

        Raises OpError if the operands do not fit.
        """
        results = cls.named("result")
        names = {r: fields.pop(r, site if i == 0 else f"{site}.{r}") for i, r in enumerate(results)}
        given = dict(zip(cls.named("operand"), operands, strict=True))
        op = cls(site=site, **given, **names, **fields)
        for name, (shape, format) in op.shapes(self.tensors).items():
            self._add(Tensor(name, shape, format, role))
        self.ops.append(op)
        return op.outputs[0] if results else ""

    def done(self) -> Program:
        """The Program built so far, verified. Raises ProgramError naming the rule that it breaks."""
        program = Program(self.name, tuple(self.ops), self.tensors, self.context)
        verify(program)
        return program
