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
    """Builds a Program op by op.

    Each op has a site: the name of its place in the model, such as layers.0.attn.q_proj. An op's first result is a
    tensor with the site as its name, unless the caller gives another name.
    """

    def __init__(self, name: str, context: int) -> None:
        self.name, self.context = name, context
        self.ops: list[Op] = []
        self.tensors: dict[str, Tensor] = {n: Tensor(n, (d,), "i32", "input") for n, d in INPUTS.items()}

    def _add(self, tensor: Tensor) -> str:
        self.tensors[tensor.name] = tensor
        return tensor.name

    def weight(self, name: str, shape: Shape, source: str | Sequence[str], format: str = "f32") -> str:
        """Declare a weight tensor. Returns its name.

        Args:
            name: the weight's name.
            shape: the weight's shape.
            source: text that names the checkpoint tensor to read the weight from (see program/source.py). If it is a
                list of several texts, their tensors are joined along dimension 0.
            format: name of the weight's number format, such as bf16.
        """
        names = (source,) if isinstance(source, str) else tuple(source)
        return self._add(Tensor(name, tuple(shape), format, "weight", source=names))

    def const(self, name: str, values: Sequence[float]) -> str:
        """Declare a small float32 vector whose values are part of the Program. Returns its name."""
        rounded = tuple(float(np.float32(x)) for x in values)
        return self._add(Tensor(name, (len(values),), "f32", "const", values=rounded))

    def cache(self, name: str, heads: int, head_dim: int, format: str, every: int = 1) -> str:
        """Declare a K or V cache, which is a state tensor [P pages, B tokens per page, heads, head_dim].

        Returns its name.

        Args:
            name: the cache's name.
            heads: number of K/V heads.
            head_dim: columns of a head.
            format: name of the cache's number format, such as bf16.
            every: 1 to keep one row for each token. A larger number keeps one row for each group of `every` consecutive
                tokens, so that a page has B / `every` rows (see ops/pooled.py).
        """
        rows = "B" if every == 1 else f"B/{every}"
        return self._add(Tensor(name, ("P", rows, heads, head_dim), format, "state"))

    def state(self, name: str, *shape: int) -> str:
        """Declare a recurrent-state tensor, f32 [N, *shape]: N slots with an array of the given shape each.

        Returns its name.
        """
        return self._add(Tensor(name, ("N", *shape), "f32", "state"))

    def view(self, name: str, base: str, start: int, stop: int) -> str:
        """Declare a view of columns `start` to `stop` - 1 of the intermediate result `base`. Returns the view's name.

        A view is a tensor that shares the memory of its base; nothing is copied.
        """
        of = self.tensors[base]
        return self._add(replace(of, name=name, shape=(of.shape[0], stop - start), view=(base, start)))

    def op(self, cls: type[Op], site: str, *operands: str | None, role: str = "temp", **fields: Any) -> str:
        """Append an op of class `cls`. Returns the name of the op's first result, or "" if the op has no result.

        Args:
            cls: class of the op.
            site: name of the op's place in the model, such as layers.0.attn.q_proj. It also becomes the name of the
                op's first result, unless `fields` gives another.
            operands: names of the tensors for the op's required operands, in order.
            role: role of the result tensors, "temp" or "output".
            fields: further fields of the op by name: optional operands, attributes, and names for its results.

        Raises OpError if an operand or attribute of the op is not allowed, for example an operand of a wrong shape.
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
        """Returns the Program built so far, after verifying it.

        Raises ProgramError, naming a rule that the Program breaks.
        """
        program = Program(self.name, tuple(self.ops), self.tensors, self.context)
        verify(program)
        return program
