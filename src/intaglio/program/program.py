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
    """A model as a list of ops and a table of tensors. It may be only the part of a model that one rank computes.

    Attributes:
        name: the model's name.
        ops: the ops, in the order in which they run.
        tensors: the tensors by name.
        context: number of token positions for which the Program is valid.
        mesh: number of ranks that share the model; 1 if one rank computes the whole model.
        rank: number of the rank that runs this Program, from 0.
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
        """Returns the Program in its text form, which parse_program() can read.

        fold: True to print layers with equal text only once. The result is then for people, and cannot be parsed.
        """
        head = f"program {self.name} context={self.context} mesh={self.mesh} rank={self.rank}"
        return print_text(head, self.ops, self.tensors, fold)

    @cached_property
    def hash(self) -> str:
        """Returns the SHA-256 hash of the Program's text form, as hexadecimal digits.

        It is computed once and then kept.
        """
        return hashlib.sha256(str(self).encode()).hexdigest()

    @property
    def vocabulary(self) -> int:
        """Number of columns of the logits; 0 in a pipeline stage without logits."""
        return int(self.tensors["logits"].shape[-1]) if "logits" in self.tensors else 0

    @cached_property
    def windows(self) -> dict[str, int]:
        """Returns the K/V caches that are read through a sliding window, as {name of the cache: window size in tokens}.

        The window size is the largest number of tokens that a query reads, its own token included. A cache has a window
        only if every op that reads the cache does so through a window or chunk (see Op.reach).

        A cache is left out if it shares a block table with a cache that has no window. All caches of one op share a
        block table, unless the op's `two_tables` is True.
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
        """True if the op has K/V caches, and all of its caches have a sliding window (see `windows`)."""
        caches = op.operands("pages")
        return bool(caches) and all(name in self.windows for name in caches)

    @property
    def recurrent(self) -> bool:
        """True if the Program has recurrent state (a state tensor [N, ...])."""
        return any(t.shape[0] == "N" for t in self.of_role("state"))

    def of_role(self, role: str) -> list[Tensor]:
        """Returns a list of all tensors of one role.

        `role` is "weight", "const", "state", "input", "output" or "temp".
        """
        return [t for t in self.tensors.values() if t.role == role]

    def with_ops(self, ops: Iterable[Op], tensors: Mapping[str, Tensor]) -> Program:
        """Returns a copy of the Program in which `ops` and `tensors` replace the Program's own ops and tensors."""
        return replace(self, ops=tuple(ops), tensors=dict(tensors))

    def base(self, name: str) -> str:
        """Returns the name of the tensor whose memory holds tensor `name`.

        If `name` is a view (a column range of another tensor), this is the other tensor; else it is `name` itself.
        """
        view = self.tensors[name].view
        return view[0] if view else name

    def uses(self, name: str) -> list[Op]:
        """Returns a list of the ops that have the tensor `name` itself as an input.

        Ops that read a view of it are not included.
        """
        return self._readers.get(name, [])

    def producer(self, name: str) -> Op | None:
        """Returns the op that writes the tensor `name`; None if no op writes it.

        If `name` is a view (a column range of another tensor), this is the op that writes the other tensor.
        """
        return self._writers.get(self.base(name))

    def views(self, base: str) -> list[tuple[int, str]]:
        """Returns the views (column ranges) of the tensor `base`, as a list of (first column, name of the view).

        The list is in ascending order of column; [] if `base` has no views.
        """
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
        """Returns the Work (FLOPs and bytes) of each op in a step, as a dict {site: Work}.

        An op's site is the name of its place in the model. batch: the batch of the step.
        """
        return {op.site: op.work(self.tensors, batch) for op in self.ops}
