"""Collective ops between the ranks of a mesh: all_reduce, all_gather, reduce_scatter, all_to_all, send, recv.

Each rank's Program has its own op; `exchange()` defines all of them at once. The algorithm that moves the bytes is
chosen elsewhere: see the package `collectives`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from intaglio import formats
from intaglio.batch import Batch, shared_rows
from intaglio.ops.op import Op, OpError, Results, Tensors, Value, Work, dim_known, operand, result

WIRES = ("f32", "bf16", "f16")  # formats that values may be rounded to before they travel


class Collective(Op):
    """Base class of collectives: ops that exchange tensors between ranks.

    A collective defines exchange(), which takes the values of all ranks. Other ops define reference(), which takes the
    values of one rank.

    Attributes:
        wire: number format to which values are rounded before they are sent.
    """

    faces: ClassVar[tuple[str, ...]] = ("shapes", "exchange", "work")
    has_effect: ClassVar[bool] = True
    wire: str = "f32"

    def exchange(self, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Compute the collective for all ranks of the group.

        Returns a list with the output of each rank, in the group's order. parts: the input of each rank, in the same
        order.
        """
        raise NotImplementedError

    def reference(self, v: Mapping[str, Value], batch: Batch) -> dict[str, np.ndarray]:
        raise OpError(f"{self.site} ({self.kind}): a single rank cannot compute it; run all ranks of the mesh")

    def check_wire(self) -> None:
        """Raise OpError unless `wire` is a number format in which values can be sent. Returns nothing."""
        self.check(self.wire in WIRES, f"wire={self.wire!r}; use one of {', '.join(WIRES)}")

    def carried(self, x: np.ndarray) -> np.ndarray:
        """Returns the values that a receiver gets if `x` is sent: `x` rounded to the number format `wire`."""
        return formats.round_to(x, self.wire)

    def link_bytes(self, t: Tensors, name: str, batch: Batch) -> int:
        """Returns the number of bytes to send over a link for the tensor `name`.

        Values are sent in the number format `wire`. t: the Program's tensors by name. batch: the batch, which gives the
        tensor's number of rows.
        """
        return t[name].nbytes(batch.sizes) * formats.get(self.wire).bits // formats.get(t[name].format).bits


def check_group(op: Op, group: tuple[int, ...]) -> None:
    """Raise OpError unless `group` is a non-empty tuple of different rank numbers in ascending order.

    Returns nothing.
    """
    fits = len(group) > 0 and tuple(sorted(set(group))) == group and group[0] >= 0
    op.check(fits, f"group={group}; wanted ranks in ascending order, each once")


@dataclass(frozen=True, kw_only=True)
class AllReduce(Collective, kind="all_reduce"):
    """Op that sums a tensor over ranks: every rank of `group` gets the sum.

    Each rank has a tensor x. The sum is ((x0 + x1) + x2) + ... in the order of `group`, in float32. x is f32 [rows,
    width * slots] and out is f32 [rows, width]. If `slots` is 1, x is as wide as out. If `slots` is above 1, x consists
    of `slots` blocks of `width` columns. After the sum over ranks, its blocks are then added to each other in their
    order: (s0 + s1) + s2 ...

    Attributes:
        group: numbers of the ranks.
        wire: number format in which values are sent between ranks. Each x is rounded to it before the sum over ranks,
            and this sum is rounded to it. If `slots` is above 1, the sum of the blocks is rounded to it, too.
        slots: number of blocks of columns in x. It is above 1 for experts that may move between ranks: one rank has the
            values of a block and the others have zeros there. So `out` has the same bits whichever rank computes the
            block.
    """

    x: str = operand()
    out: str = result()
    group: tuple[int, ...]
    wire: str = "f32"
    slots: int = 1

    def shapes(self, t: Tensors) -> Results:
        check_group(self, self.group)
        self.check_wire()
        rows, width = self.rows_cols(t, self.x)
        fits = self.slots >= 1 and width % self.slots == 0
        self.check(fits, f"slots={self.slots}, but {self.x} has {width} columns; wanted 1 or more that divides them")
        return {self.out: ((rows, width // self.slots), "f32")}

    def exchange(self, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
        total = self.carried(parts[0])
        for part in parts[1:]:
            total = total + self.carried(part)
        return [self.carried(add_slots(self.carried(total), self.slots))] * len(parts)

    def work(self, t: Tensors, batch: Batch) -> Work:
        """Returns the Work (FLOPs and bytes) of one rank.

        link_bytes counts what the rank receives in a reduce-scatter and an all-gather: 2 (p - 1) / p times the bytes of
        x, for p ranks.
        """
        n, p = self.link_bytes(t, self.x, batch), len(self.group)
        sums = (p - 1) * (t[self.x].nbytes(batch.sizes) // 4) // p
        sums += (self.slots - 1) * (t[self.out].nbytes(batch.sizes) // 4)
        moved = t[self.x].nbytes(batch.sizes) + t[self.out].nbytes(batch.sizes)
        return Work(sums, 0, 0, moved, 2 * n * (p - 1) // p)


def add_slots(x: np.ndarray, slots: int) -> np.ndarray:
    """Divide the columns of x into `slots` blocks and return the sum of the blocks: f32 [rows, width].

    x: f32 [rows, slots * width]. Block i is columns i * width .. (i + 1) * width - 1. Blocks are added in their order.
    """
    first, *others = np.split(x, slots, axis=1)
    for other in others:
        first = first + other
    return first


@dataclass(frozen=True, kw_only=True)
class AllGather(Collective, kind="all_gather"):
    """Op that joins the ranks' columns: every rank of `group` gets the columns of all ranks side by side.

    The columns are in the order of `group`. Each rank has a tensor x, f32 [rows, c], where c may differ between ranks.
    out is f32 [rows, width], where `width` is the sum of c over the ranks. `wire` is the number format to which values
    are rounded before they are sent: f32, bf16 or f16.

    If `tokens` is True, the op joins token rows instead of columns. Rank i of n then has x f32 [T:i/n, width], where
    T:i/n stands for the number of token rows of rank i. Every rank gets out f32 [T, width], the rows of all ranks in
    order.
    """

    x: str = operand()
    out: str = result()
    group: tuple[int, ...]
    width: int
    tokens: bool = False
    wire: str = "f32"

    def shapes(self, t: Tensors) -> Results:
        check_group(self, self.group)
        self.check_wire()
        rows, own = self.rows_cols(t, self.x)
        if self.tokens:
            fits = own == self.width and str(rows) in shares_of(len(self.group))
            self.check(fits, f"{self.x} is {t[self.x].type}; wanted [T:i/{len(self.group)}, {self.width}]")
            return {self.out: (("T", self.width), "f32")}
        self.check(own <= self.width, f"{self.x} is {t[self.x].type}, which is more than width={self.width}")
        return {self.out: ((rows, self.width), "f32")}

    def exchange(self, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [np.concatenate([self.carried(part) for part in parts], axis=0 if self.tokens else 1)] * len(parts)

    def work(self, t: Tensors, batch: Batch) -> Work:
        whole, own = self.link_bytes(t, self.out, batch), self.link_bytes(t, self.x, batch)
        return Work(0, 0, 0, 2 * t[self.out].nbytes(batch.sizes), whole - own)


@dataclass(frozen=True, kw_only=True)
class ReduceScatter(Collective, kind="reduce_scatter"):
    """Op that sums a tensor over ranks and gives each rank of `group` some rows of the sum.

    The tensor x is f32 [T, width] on every rank. The T rows are divided into n consecutive runs of nearly equal length
    for n ranks (batch.shared_rows()). `share` is this rank's place in `group`, and out is f32 [T:share/n, width], the
    rank's run; T:share/n stands for the number of its rows. Values are summed in the order of `group`. `wire` is a
    number format: f32, bf16 or f16. Each x is rounded to it before it is sent, and the sum is rounded to it, too.
    """

    x: str = operand()
    out: str = result()
    group: tuple[int, ...]
    share: int
    wire: str = "f32"

    def shapes(self, t: Tensors) -> Results:
        check_group(self, self.group)
        check_share(self, self.share, self.group)
        self.check_wire()
        return {self.out: ((f"T:{self.share}/{len(self.group)}", self.token_columns(t, self.x)), "f32")}

    def exchange(self, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
        total = self.carried(parts[0])
        for part in parts[1:]:
            total = total + self.carried(part)
        return [self.carried(rows) for rows in split_rows(total, len(parts))]

    def work(self, t: Tensors, batch: Batch) -> Work:
        """Returns the Work (FLOPs and bytes) of one of the p ranks.

        link_bytes counts what the rank receives: from each of the p - 1 other ranks, the token rows of x whose sum this
        rank computes. Together that is (p - 1) / p of the bytes of x.
        """
        own, p = self.link_bytes(t, self.out, batch), len(self.group)
        sums = (p - 1) * (t[self.out].nbytes(batch.sizes) // 4)
        return Work(sums, 0, 0, t[self.x].nbytes(batch.sizes) + t[self.out].nbytes(batch.sizes), own * (p - 1))


@dataclass(frozen=True, kw_only=True)
class AllToAll(Collective, kind="all_to_all"):
    """Op that redistributes a tensor over ranks: from some columns of all rows to all columns of some rows.

    x is f32 [T, c] on every rank of `group`, where c may differ between ranks. The T token rows are divided into n
    consecutive runs for n ranks (batch.shared_rows()). `share` is this rank's place in `group`, and out is f32
    [T:share/n, width]: the rows of this rank's run, with the columns of all ranks' x side by side. T:share/n stands for
    the number of rows in the run, and `width` for the number of columns of all ranks. `wire` is the number format to
    which values are rounded before they are sent.
    """

    x: str = operand()
    out: str = result()
    group: tuple[int, ...]
    share: int
    width: int
    wire: str = "f32"

    def shapes(self, t: Tensors) -> Results:
        check_group(self, self.group)
        check_share(self, self.share, self.group)
        self.check_wire()
        own = self.token_columns(t, self.x)
        self.check(own <= self.width, f"{self.x} is {t[self.x].type}, which is more than width={self.width}")
        return {self.out: ((f"T:{self.share}/{len(self.group)}", self.width), "f32")}

    def exchange(self, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
        pieces = [split_rows(self.carried(part), len(parts)) for part in parts]
        return [np.concatenate(mine, axis=1) for mine in zip(*pieces, strict=True)]

    def work(self, t: Tensors, batch: Batch) -> Work:
        whole, own = self.link_bytes(t, self.out, batch), int(t[self.x].shape[1])
        moved = t[self.x].nbytes(batch.sizes) + t[self.out].nbytes(batch.sizes)
        return Work(0, 0, 0, moved, whole - whole * own // self.width)


Grouped = AllReduce | AllGather | ReduceScatter | AllToAll  # collectives in which all ranks of a group take part


def shares_of(ranks: int) -> list[str]:
    """Returns the symbols for the ranks' numbers of token rows, as a list: for 2 ranks ["T:0/2", "T:1/2"]."""
    return [f"T:{i}/{ranks}" for i in range(ranks)]


def check_share(op: Op, share: int, group: tuple[int, ...]) -> None:
    """Raise OpError unless `share` is an index into `group`. Returns nothing."""
    op.check(0 <= share < len(group), f"share={share} is outside 0..{len(group) - 1}, the places in group={group}")


def split_rows(x: np.ndarray, ranks: int) -> list[np.ndarray]:
    """Divide the rows of x among ranks. Returns a list with a view of x for each rank, in the order of the ranks.

    Each rank gets consecutive rows, as batch.shared_rows() divides them. The numbers of rows differ by at most one; if
    there are more ranks than rows, some ranks get none.
    """
    runs = [shared_rows(len(x), i, ranks) for i in range(ranks)]
    return [x[run.start : run.stop] for run in runs]


@dataclass(frozen=True, kw_only=True)
class Send(Collective, kind="send"):
    """Op that sends the tensor x, f32 [rows, width], to rank `peer`. Values are rounded to the number format `wire`.

    The n-th send of a rank to a peer is received by the peer's n-th recv from this rank.
    """

    x: str = operand()
    peer: int
    wire: str = "f32"

    def shapes(self, t: Tensors) -> Results:
        self.check_wire()
        self.rows_cols(t, self.x)
        return {}

    def exchange(self, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [self.carried(part) for part in parts]

    def work(self, t: Tensors, batch: Batch) -> Work:
        return Work(0, 0, 0, t[self.x].nbytes(batch.sizes), self.link_bytes(t, self.x, batch))


@dataclass(frozen=True, kw_only=True)
class Recv(Collective, kind="recv"):
    """Op that receives the tensor that rank `peer` sends: out, f32 [rows, width].

    `rows` is "T" (all tokens), text such as "T:1/4" (the token rows of rank 1 of 4), or "R" (rows to sample). `wire` is
    the number format to which the sender rounds values.
    """

    out: str = result()
    peer: int
    width: int
    rows: str = "T"
    wire: str = "f32"

    def shapes(self, t: Tensors) -> Results:
        self.check_wire()
        known = self.rows in ("T", "R") or (self.rows.startswith("T:") and dim_known(self.rows))
        self.check(known, f"rows={self.rows!r}; use T, R or a share such as T:1/4")
        return {self.out: ((self.rows, self.width), "f32")}

    def exchange(self, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
        return list(parts)

    def work(self, t: Tensors, batch: Batch) -> Work:
        return Work(0, 0, 0, t[self.out].nbytes(batch.sizes), self.link_bytes(t, self.out, batch))
