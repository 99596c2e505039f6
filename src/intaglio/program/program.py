"""The Program: the one thing that goes from port to compiler to device. A tuple of ops over a table of tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from intaglio.batch import Batch
from intaglio.ops import Op, Tensor, Work

INPUTS = {"tokens": "T", "positions": "T", "rows": "R"}  # int32 arrays bound from the Batch at each step


class ProgramError(ValueError):
    """A Program that breaks a rule, or text that is not one."""


@dataclass(frozen=True, eq=True)
class Program:
    """Ops in the order they run, tensors by name. `context` is the number of positions it is valid for; `mesh` and
    `rank` place it among the ranks of a sharded model (1 and 0 when whole)."""

    name: str
    ops: tuple[Op, ...]
    tensors: Mapping[str, Tensor]
    context: int
    mesh: int = 1
    rank: int = 0

    def __str__(self) -> str:
        from intaglio.program.text import print_program

        return print_program(self)

    @property
    def hash(self) -> str:
        """SHA-256 of the text form, in hex."""
        return hashlib.sha256(str(self).encode()).hexdigest()

    @property
    def vocabulary(self) -> int:
        """Columns of the logits; 0 in a stage of a pipeline that has none."""
        return int(self.tensors["logits"].shape[-1]) if "logits" in self.tensors else 0

    def of_role(self, role: str) -> list[Tensor]:
        return [t for t in self.tensors.values() if t.role == role]

    def with_ops(self, ops: Iterable[Op], tensors: Mapping[str, Tensor]) -> Program:
        return replace(self, ops=tuple(ops), tensors=dict(tensors))

    def base(self, name: str) -> str:
        """The tensor whose memory holds `name`: itself, or the base of its view."""
        view = self.tensors[name].view
        return view[0] if view else name

    def uses(self, name: str) -> list[Op]:
        """The ops that read `name`."""
        return self._readers.get(name, [])

    def producer(self, name: str) -> Op | None:
        """The op that writes `name`, or the base of which it is a view."""
        return self._writers.get(self.base(name))

    @cached_property
    def _readers(self) -> dict[str, list[Op]]:
        found: dict[str, list[Op]] = {}
        for op in self.ops:
            for name in dict.fromkeys(op.inputs):
                found.setdefault(name, []).append(op)
        return found

    @cached_property
    def _writers(self) -> dict[str, Op]:
        return {name: op for op in reversed(self.ops) for name in op.outputs}

    def work(self, batch: Batch) -> dict[str, Work]:
        """FLOPs and bytes of one step, by site."""
        return {op.site: op.work(self.tensors, batch) for op in self.ops}


def save(program: Program, path: str | Path) -> None:
    """Verify, then write the text form."""
    from intaglio.program.verify import verify

    verify(program)
    Path(path).write_text(str(program))


def load(path: str | Path) -> Program:
    """Read a text form back and verify it. Raises ProgramError naming the line that fails to parse, or the rule."""
    from intaglio.program.text import parse_program
    from intaglio.program.verify import verify

    program = parse_program(Path(path).read_text())
    verify(program)
    return program
