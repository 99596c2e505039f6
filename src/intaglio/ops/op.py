"""What an op is: named operands and results, plain attributes, a site, and its faces.

Also Tensor, the thing an op names. The ops themselves stand in their family's file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any, ClassVar

import numpy as np

from intaglio import formats
from intaglio.batch import SHARE, Batch
from intaglio.formats import Quantised

Dim = int | str
Shape = tuple[Dim, ...]
Value = np.ndarray | Quantised
SYMBOLS = ("T", "S", "R", "P", "B")  # tokens, sequences, rows to sample; pages in the pool, tokens a page

ROLES = ("input", "const", "weight", "state", "temp", "output")


def dim_known(dim: Dim) -> bool:
    """Whether it is a number above 0, a symbol, or a share of the tokens, such as T:1/4."""
    if isinstance(dim, int):
        return dim > 0
    match = SHARE.fullmatch(dim)
    return dim in SYMBOLS or (match is not None and int(match[1]) < int(match[2]))


class OpError(ValueError):
    """An op whose operands or attributes do not fit; the message names site, thing, value and what is allowed."""


@dataclass(frozen=True)
class Tensor:
    """A named array of a Program.

    `source`: checkpoint tensors that make up a weight, joined along dim 0. `view`: (base, first column) when this temp
    is a range of another's columns. `values`: the numbers of a const. `buffer`: the memory a temp was planned into.
    """

    name: str
    shape: Shape
    format: str
    role: str
    source: tuple[str, ...] = ()
    view: tuple[str, int] | None = None
    values: tuple[float, ...] = ()
    buffer: int | None = None

    @property
    def type(self) -> str:
        return f"{self.format}[{', '.join(map(str, self.shape))}]"

    def nbytes(self, sizes: Mapping[str, int]) -> int:
        """Bytes with symbolic dims bound by `sizes`."""
        dims = [sizes[d] if isinstance(d, str) else d for d in self.shape]
        cols = dims[-1] if dims else 1
        return formats.get(self.format).nbytes(int(np.prod(dims[:-1], dtype=np.int64)), cols)


Tensors = Mapping[str, Tensor]
Results = dict[str, tuple[Shape, str]]  # result name -> shape and format


@dataclass(frozen=True)
class Work:
    """What an op must do in one step: floating-point operations, bytes by the memory they live in, and bytes that other
    ranks must send it (or, for a send, that it must send them)."""

    flops: int = 0
    weight_bytes: int = 0
    state_bytes: int = 0
    temp_bytes: int = 0
    link_bytes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def bytes(self) -> int:
        """Bytes of memory."""
        return self.weight_bytes + self.state_bytes + self.temp_bytes


def operand(optional: bool = False) -> Any:
    """A field that names a tensor the op reads (or, for state, reads and writes)."""
    return field(default=None, metadata={"is": "optional"}) if optional else field(metadata={"is": "operand"})


def result(optional: bool = False) -> Any:
    """A field that names a tensor the op writes."""
    return field(default=None, metadata={"is": "result"}) if optional else field(metadata={"is": "result"})


REGISTRY: dict[str, type[Op]] = {}
FACES = ("shapes", "reference", "work")


@dataclass(frozen=True, kw_only=True)
class Op:
    """Base of all ops. A subclass with a kind is a frozen dataclass and must define every face, or it fails at import;
    one without is a base of others."""

    site: str
    kind: ClassVar[str]
    faces: ClassVar[tuple[str, ...]] = FACES
    stateful: ClassVar[bool] = False  # may touch tensors of role `state`
    lasting: ClassVar[bool] = False  # is done even if nothing reads its results: others wait for it

    def __init_subclass__(cls, kind: str = "") -> None:
        if not kind:
            return
        missing = [face for face in cls.faces if face not in cls.__dict__]
        if missing:
            raise TypeError(f"op {kind}: missing {', '.join(missing)}(); every op defines {', '.join(cls.faces)}")
        if kind in REGISTRY:
            raise TypeError(f"op {kind} is defined twice: {REGISTRY[kind].__module__} and {cls.__module__}")
        cls.kind = kind
        REGISTRY[kind] = cls

    def shapes(self, t: Tensors) -> Results:
        """The shape rule: checks the operands, returns each result's shape and format. Raises OpError."""
        raise NotImplementedError

    def reference(self, v: Mapping[str, Value], batch: Batch) -> dict[str, np.ndarray]:
        """What the op means: results by name, from operand values `v`; state arrays are updated in place."""
        raise NotImplementedError

    def work(self, t: Tensors, batch: Batch) -> Work:
        """FLOPs and bytes of one step with this batch."""
        raise NotImplementedError

    @classmethod
    @cache
    def named(cls, *kinds: str) -> tuple[str, ...]:
        """Names of the fields of these kinds: operand, optional, result, or attribute."""
        return tuple(f.name for f in fields(cls) if f.name != "site" and f.metadata.get("is", "attribute") in kinds)

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(v for n in self.named("operand", "optional") if (v := getattr(self, n)) is not None)

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(v for n in self.named("result") if (v := getattr(self, n)) is not None)

    def rename(self, names: Mapping[str, str]) -> Op:
        """The same op with tensor names replaced by `names` where they occur."""
        change = {
            n: names[v]
            for n in self.named("operand", "optional", "result")
            if (v := getattr(self, n)) is not None and v in names
        }
        return replace(self, **change) if change else self

    def check(self, ok: bool, what: str) -> None:
        """Raise OpError naming this op's site unless `ok`."""
        if not ok:
            raise OpError(f"{self.site} ({self.kind}): {what}")

    def rows_cols(self, t: Tensors, name: str) -> tuple[Dim, int]:
        """(rows, columns) of a float matrix operand; its columns must be a number."""
        x = t[name]
        ok = len(x.shape) == 2 and isinstance(x.shape[1], int)
        self.check(ok, f"{name} is {x.type}; wanted a matrix [rows, columns] with a fixed number of columns")
        return x.shape[0], int(x.shape[1])

    def token_columns(self, t: Tensors, name: str) -> int:
        """Columns of a matrix that has a row for every token of the step, as positions and slots do."""
        rows, columns = self.rows_cols(t, name)
        self.check(rows == "T", f"{name} is {t[name].type}; wanted a row for every token, [T, {columns}]")
        return columns

    def same_shape(self, t: Tensors, a: str, b: str) -> None:
        self.check(t[a].shape == t[b].shape, f"{a} is {t[a].type} but {b} is {t[b].type}; they must have one shape")

    def vector(self, t: Tensors, name: str | None, length: int) -> None:
        """Check that an optional operand is a plain vector of `length`."""
        if name is not None:
            self.check(t[name].shape == (length,), f"{name} is {t[name].type}; wanted [{length}]")
            plain = not formats.get(t[name].format).grouped
            self.check(plain, f"{name} is {t[name].format}; vectors stay in a plain format (f32, bf16, f16)")

    def moved(self, t: Tensors, batch: Batch, flops: int, *, leave: tuple[str, ...] = ()) -> Work:
        """Work of `flops` with every operand and result moved once, by role; `leave` names are not counted."""
        total = {"weight": 0, "temp": 0}
        for name in (*self.inputs, *self.outputs):
            if name not in leave and t[name].role != "state":
                role = "weight" if t[name].role == "weight" else "temp"
                total[role] += t[name].nbytes(batch.sizes)
        return Work(flops, total["weight"], 0, total["temp"])


def array(v: Mapping[str, Value], name: str) -> np.ndarray:
    """A plain value as float32."""
    x = v[name]
    assert isinstance(x, np.ndarray), f"{name} is quantised where a plain array is wanted"
    return x.astype(np.float32, copy=False)
