"""Program: ops in order over a table of tensors. Ports write Programs, the compiler rewrites them, devices run them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from intaglio.batch import Batch
from intaglio.ops import Op, Tensor, Work
from intaglio.program.text import print_text

INPUTS = {"tokens": "T", "positions": "T", "rows": "R"}  # int32 arrays bound from the Batch at each step


class ProgramError(ValueError):
    """Raised for a Program that breaks a rule, and for text that cannot be parsed as a Program."""


@dataclass(frozen=True, eq=True)
class Program:
    """A model, or one rank's part of it: ops in the order they run, over a table of tensors.

    Attributes:
        name: the model's name.
        ops: the ops, in the order they run.
        tensors: the table of tensors, by name.
        context: number of positions the Program is valid for.
        mesh: number of ranks that share the model; 1 if it is whole.
        rank: this Program's rank in the mesh.
    """

    name: str
    ops: tuple[Op, ...]
    tensors: Mapping[str, Tensor]
    context: int
    mesh: int = 1
    rank: int = 0

    def __str__(self) -> str:
        return self.text()

    def text(self, fold: bool = False) -> str:
        """The text form of the Program, which parse_program() reads back.

        fold: True to print equal layers only once. Such text is for people and cannot be parsed.
        """
        head = f"program {self.name} context={self.context} mesh={self.mesh} rank={self.rank}"
        return print_text(head, self.ops, self.tensors, fold)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the text form, as hex digits. Computed once, since a server needs it for each relayed request."""
        return hashlib.sha256(str(self).encode()).hexdigest()

    @property
    def vocabulary(self) -> int:
        """Number of columns of the logits; 0 in a pipeline stage without logits."""
        return int(self.tensors["logits"].shape[-1]) if "logits" in self.tensors else 0

    @cached_property
    def windows(self) -> dict[str, int]:
        """The K/V caches with a sliding window, as {cache: largest number of tokens that a query reads}.

        The number includes the query's own token. A cache has a window if every op that reads it does so through a
        window or chunk (Op.reach).

        A cache that shares a block table with a cache without a window is left out. All caches of one op share a table,
        unless the op has `two_tables`.
        """
        ops = [op for op in self.ops if op.reads_state or op.writes_state]
        found = {t.name: 0 for t in self.of_role("state") if t.shape[0] == "P"}
        reads = [(name, op.reach(name)) for op in ops for name in op.reads_state]
        for name, reach in reads:
            found[name] = max(found.get(name, 0), reach)
        whole = {name for name, reach in reads if not reach} | {name for name, n in found.items() if not n}
        while True:  # the caches of one op have their blocks in one table
            touched = [{*op.reads_state, *op.operands("pages", access="write")} for op in ops if not op.two_tables]
            more = {name for names in touched if names & whole for name in names if name in found} - whole
            if not more:
                return {name: n for name, n in found.items() if name not in whole}
            whole |= more

    def has_window(self, op: Op) -> bool:
        """True if the op has K/V caches, and all of them have a sliding window (are keys of self.windows)."""
        caches = op.operands("pages")
        return bool(caches) and all(name in self.windows for name in caches)

    @property
    def recurrent(self) -> bool:
        """True if the Program has recurrent state (a state tensor [N, ...])."""
        return any(t.shape[0] == "N" for t in self.of_role("state"))

    def of_role(self, role: str) -> list[Tensor]:
        """A list of all tensors of a role: weight, const, state, input, output or temp."""
        return [t for t in self.tensors.values() if t.role == role]

    def with_ops(self, ops: Iterable[Op], tensors: Mapping[str, Tensor]) -> Program:
        """A copy of the Program with these ops and tensors instead of its own."""
        return replace(self, ops=tuple(ops), tensors=dict(tensors))

    def base(self, name: str) -> str:
        """Name of the tensor whose memory holds `name`: the base if `name` is a view, else `name` itself."""
        view = self.tensors[name].view
        return view[0] if view else name

    def uses(self, name: str) -> list[Op]:
        """A list of the ops that read tensor `name` itself. Ops that read it through a view are not included."""
        return self._readers.get(name, [])

    def producer(self, name: str) -> Op | None:
        """The op that writes `name`, or its base if it is a view; None if no op does."""
        return self._writers.get(self.base(name))

    def views(self, base: str) -> list[tuple[int, str]]:
        """A list of (first column, name) of the views (column ranges) of `base`, ascending; [] if there are none."""
        return self._views.get(base, [])

    @cached_property
    def _views(self) -> dict[str, list[tuple[int, str]]]:
        found: dict[str, list[tuple[int, str]]] = {}
        for t in self.tensors.values():
            if t.view:
                found.setdefault(t.view[0], []).append((t.view[1], t.name))
        return {base: sorted(views) for base, views in found.items()}

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
        """{site: Work} of every op for one step: its FLOPs and bytes. A site is the name of the op."""
        return {op.site: op.work(self.tensors, batch) for op in self.ops}
