"""Base class of the ops, and the types they use: Tensor (a named array of a Program), Work (FLOPs and bytes of a step).

The ops are defined in the files of their families.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from math import prod
from typing import Any, ClassVar

import numpy as np

from intaglio import formats
from intaglio.batch import SHARE, Batch
from intaglio.formats import Quantised

Dim = int | str
Shape = tuple[Dim, ...]
Value = np.ndarray | Quantised
SYMBOLS = ("T", "S", "R", "P", "B", "N")  # tokens, sequences, rows; pages of the pool, tokens per page, state slots
RUNS = re.compile(r"B/([1-9]\d*)")  # rows of a page with one row for each run of so many tokens

ROLES = ("input", "const", "weight", "state", "temp", "output")


def dim_known(dim: Dim) -> bool:
    """True if a dimension of a shape is valid.

    Valid are numbers above 0, the texts in SYMBOLS, and texts such as "T:1/4" and "B/4". "T:1/4" is the number of token
    rows of rank 1 of 4. "B/4" is the number of rows of a page with one row for each run of 4 tokens.
    """
    if isinstance(dim, int):
        return dim > 0
    match = SHARE.fullmatch(dim)
    known = dim in SYMBOLS or RUNS.fullmatch(dim) is not None
    return known or (match is not None and int(match[1]) < int(match[2]))


def dim_size(dim: Dim, sizes: Mapping[str, int]) -> int:
    """Returns the size of a dimension of a shape, a number.

    The size is found in one of three ways:

    - `dim` is a number: the number itself.
    - `dim` is a symbol such as "T": its value in `sizes`.
    - `dim` is a text such as "B/4": sizes["B"] / 4, rounded up.

    Raises KeyError if `sizes` lacks the symbol.
    """
    if isinstance(dim, int):
        return dim
    match = RUNS.fullmatch(dim)
    return -(-sizes["B"] // int(match[1])) if match else sizes[dim]


class OpError(ValueError):
    """Raised for an op with an operand or attribute that is not allowed, such as an operand of a wrong shape.

    The message has the op's site (name), the wrong value and what is allowed.
    """


@dataclass(frozen=True)
class Tensor:
    """Description of a named array of a Program: shape, number format and role, without its values (except constants).

    Attributes:
        name: unique in the Program.
        shape: each dimension is a number, or a text whose value each step's batch gives: one of SYMBOLS, such as "T"
            (tokens), "T:1/4" (the token rows of rank 1 of 4) or "B/4" (a row for each 4 tokens of a page).
        format: name of the number format, such as "f32" or "int8g128".
        role: one of ROLES.
        source: sources of a weight (see program/source.py), joined along dimension 0; () for other roles.
        view: (base, first column) of a temp that is a range of columns of the temp `base`; else None.
        values: the numbers of a const; () for other roles.
        buffer: number of the memory buffer that a temp uses; None if memory is not planned for it.
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
        """Format and shape as text, such as f32[T, 256]."""
        return f"{self.format}[{', '.join(map(str, self.shape))}]"

    def nbytes(self, sizes: Mapping[str, int]) -> int:
        """Returns the number of bytes of the array.

        sizes: the value of each symbolic dimension of its shape, such as "T".
        """
        dims = [dim_size(d, sizes) for d in self.shape]
        cols = dims[-1] if dims else 1
        return formats.get(self.format).nbytes(prod(dims[:-1]), cols)


Tensors = Mapping[str, Tensor]
Results = dict[str, tuple[Shape, str]]  # result name -> shape and format


@dataclass(frozen=True)
class Work:
    """Numbers of arithmetic operations and of moved bytes of an op in one step.

    Attributes:
        flops: number of floating-point or integer operations; a multiply-add counts as two.
        weight_bytes: bytes of weights read.
        state_bytes: bytes of K/V cache and recurrent state read or written.
        temp_bytes: bytes of activations read and written.
        link_bytes: bytes that this rank receives from other ranks (for the op send: that it sends).
    """

    flops: int = 0
    weight_bytes: int = 0
    state_bytes: int = 0
    temp_bytes: int = 0
    link_bytes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def bytes(self) -> int:
        """Bytes of memory traffic: weights, state and activations together. Traffic between ranks is not included."""
        return self.weight_bytes + self.state_bytes + self.temp_bytes


USES = {
    "rows": "a matrix with one row per token, sequence or sampled row",
    "index": "integers that select: token ids, positions, row numbers, expert ids, column orders",
    "table": "a weight [rows, width] of which the op copies rows by id",
    "matrix": "a weight [N, K] of a product, in any weight format; the op's x_format says how x is rounded for it",
    "stack": "weights [experts, N, K] of products, in any weight format, as `matrix`",
    "heads": "a weight [heads, N, K], one matrix per head, in a plain format",
    "vector": "a small array in a plain format: norm weights, biases, sinks, frequencies",
    "pages": "paged state [P, B, heads, head_dim]: a K/V cache; [P, B/n, ...] has a row for each run of n tokens",
    "slots": "recurrent state [N, ...], an item per slot: the op reads a sequence's slot and writes another one",
}
WEIGHT_MATRICES = ("table", "matrix", "stack", "heads")  # uses whose tensors a device packs for its products
STATE = ("pages", "slots")  # uses whose tensors outlive a step
ACCESS = ("read", "write", "update")


def operand(
    use: str = "rows",
    *,
    optional: bool = False,
    access: str = "read",
    exact: bool = False,
    keys: bool = False,
    up: str = "",
) -> Any:
    """Declare a field of an op's class that names an operand.

    An operand is a tensor that the op reads, or a state tensor. Returns a dataclasses.field(). Raises TypeError for an
    unknown use or access, or an access that the use does not allow.

    Args:
        use: what the op does with the tensor, one of USES. Compiler passes and devices derive packing, formats, cache
            layout and state tracking from it.
        optional: True if the field may be None.
        access: "read" if the op only reads the tensor; "write" if the op writes state in pages (K/V caches); "update"
            for every state in slots (recurrent state).
        exact: True if the product that computes this operand must keep its stored weight format and read x unrounded,
            because a rounding error would change a choice (expert routing).
        keys: True if attention reads this cache as keys, so a device may store it transposed.
        up: for the gate matrix of activation(gate @ x) * (up @ x), the name of the field with the up matrix. The two
            are packed side by side. "" for any other tensor.
    """
    if use not in USES or access not in ACCESS:
        known = f"use one of {', '.join(USES)} and {' or '.join(ACCESS)}"
        raise TypeError(f"operand(use={use!r}, access={access!r}); {known}")
    if access == "write" and use != "pages":
        raise TypeError(f"operand(use={use!r}, access='write'); only pages are written")
    if (access == "update") != (use == "slots"):
        raise TypeError(f"operand(use={use!r}, access={access!r}); state in slots is updated, and nothing else is")
    kind = "optional" if optional else "operand"
    facts = {"is": kind, "use": use, "access": access, "exact": exact, "keys": keys, "up": up}
    return field(default=None, metadata=facts) if optional else field(metadata=facts)


def result(optional: bool = False) -> Any:
    """Declare a field of an op's class for a tensor that the op writes. Returns a dataclasses.field().

    optional: True if the field may be None.
    """
    return field(default=None, metadata={"is": "result"}) if optional else field(metadata={"is": "result"})


REGISTRY: dict[str, type[Op]] = {}
FACES = ("shapes", "reference", "work")


@dataclass(frozen=True, kw_only=True)
class Op:
    """Base class of all ops. An op is a frozen dataclass: a site, names of operand and result tensors, attributes.

    Attributes:
        site: the op's name in the Program, which is its place in the model, such as layers.3.attn.q_proj.
        kind: the name of the class of ops, such as linear. A subclass without a kind is a base class.
        faces: names of the methods that every subclass with a kind must define itself. The declaration of a subclass
            that lacks one raises TypeError.
        elementwise: True if each column of the result depends only on the same column of the operands.
        has_effect: True if the op must run even if no op reads its results, because other ranks wait for it.
        two_tables: True if the op reads some caches through a window (see reach()) and others without a window. For the
            caches with a window it uses the batch's window table, if there is one; for the others it uses the block
            table.
    """

    site: str
    kind: ClassVar[str]
    faces: ClassVar[tuple[str, ...]] = FACES
    elementwise: ClassVar[bool] = False
    has_effect: ClassVar[bool] = False
    two_tables: ClassVar[bool] = False

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
        """Check the op's operands. Returns {name of a result: (shape, number format)}.

        Raises OpError if operands do not fit. t: the Program's tensors by name.
        """
        raise NotImplementedError

    def reference(self, v: Mapping[str, Value], batch: Batch) -> dict[str, np.ndarray]:
        """Compute the op in NumPy. Returns {name of a result: array}. This function is the definition of the op.

        v: operand values by name; state arrays are updated in place. batch: the batch of the step.
        """
        raise NotImplementedError

    def work(self, t: Tensors, batch: Batch) -> Work:
        """Returns the Work (FLOPs and bytes) of the op in one step with this batch.

        t: the Program's tensors by name.
        """
        raise NotImplementedError

    def reach(self, cache: str) -> int:
        """Returns the largest number of tokens in a K/V cache that a query of this op attends to.

        The query's own token counts. For an op with a sliding window it is the window, for example. 0: there is no
        limit.

        cache: name of one of the op's K/V caches.
        """
        return 0

    @classmethod
    @cache
    def named(cls, *kinds: str) -> tuple[str, ...]:
        """Returns the names of the dataclass fields of the given kinds, as a tuple. The field `site` has no kind.

        kinds: any of operand, optional (an optional operand), result and attribute.
        """
        return tuple(f.name for f in fields(cls) if f.name != "site" and f.metadata.get("is", "attribute") in kinds)

    @property
    def inputs(self) -> tuple[str, ...]:
        """A tuple of the names of all operand tensors of the op."""
        return tuple(v for n in self.named("operand", "optional") if (v := getattr(self, n)) is not None)

    @property
    def outputs(self) -> tuple[str, ...]:
        """A tuple of the names of all result tensors of the op."""
        return tuple(v for n in self.named("result") if (v := getattr(self, n)) is not None)

    @classmethod
    @cache
    def fields_where(cls, **facts: Any) -> tuple[str, ...]:
        """Returns the names of the class's operand fields that have the properties `facts`, as a tuple.

        facts: the properties, as keyword arguments of operand(), the function that declares a field. Example:
        use="matrix". The result has the fields that were declared with all of them.
        """
        return tuple(
            f.name for f in fields(cls) if "use" in f.metadata and all(f.metadata[k] == v for k, v in facts.items())
        )

    def operands(self, *uses: str, **facts: Any) -> tuple[str, ...]:
        """Returns the names of the op's operand tensors that are used in one of the ways `uses`, as a tuple.

        Tensors come in the order of `uses`, then of the op's fields. An optional operand that is None is left out.

        Args:
            uses: keys of USES, such as "matrix" (a weight that is multiplied). If no use is given, operands of every
                use are returned.
            facts: arguments of operand(), such as access="read". An operand is returned only if its field was declared
                with all of them.
        """
        names = [n for use in uses or USES for n in self.fields_where(use=use, **facts)]
        return tuple(v for n in names if (v := getattr(self, n)) is not None)

    @property
    def reads_state(self) -> tuple[str, ...]:
        """A tuple of the names of the K/V caches that this op reads.

        Recurrent state is not among them: the op updates it, so it is in writes_state.
        """
        return self.operands(*STATE, access="read")

    @property
    def writes_state(self) -> tuple[str, ...]:
        """A tuple of the names of the state tensors that this op writes: K/V caches and recurrent state."""
        return (*self.operands("pages", access="write"), *self.operands("slots"))

    @property
    def rounds_x(self) -> bool:
        """True if the op has the attribute x_format: the number format to which x is rounded before a product."""
        return "x_format" in self.named("attribute")

    @property
    def gates(self) -> dict[str, str]:
        """The op's gate and up tensors, as a dict {name of a gate tensor: name of its up tensor}.

        Gate and up are the weights of a gated product, activation(gate @ x) * (up @ x). The dict has an item for the
        two weights and, if the op has biases, an item for the two biases. {} for an op without a gated product.
        """
        pairs = [(n, f.metadata["up"]) for f in fields(self) if (n := f.name) and f.metadata.get("up")]
        return {gate: up for a, b in pairs if (gate := getattr(self, a)) and (up := getattr(self, b))}

    @property
    def interleaved(self) -> tuple[str, ...]:
        """A tuple of the names of the op's gate and up matrices; () for an op without a gated product.

        In the memory of a device, rows of the gate matrix alternate with rows of the up matrix, so that both products
        are computed in one pass. The matrices are those of the property `gates`; biases are left out. The class Linear
        overrides this property, because its ops have one weight that holds both the gate and the up matrix.
        """
        packed = self.operands(*WEIGHT_MATRICES)
        return tuple(n for pair in self.gates.items() for n in pair if n in packed)

    def rename(self, names: Mapping[str, str]) -> Op:
        """Returns a copy of the op with other tensor names.

        names: {old name: new name}; names that are not in it stay.
        """
        change = {
            n: names[v]
            for n in self.named("operand", "optional", "result")
            if (v := getattr(self, n)) is not None and v in names
        }
        return replace(self, **change) if change else self

    def check(self, ok: bool, what: str) -> None:
        """Raise OpError unless `ok` is True. Returns nothing.

        The message has this op's site (name) and the text `what`.
        """
        if not ok:
            raise OpError(f"{self.site} ({self.kind}): {what}")

    def rows_cols(self, t: Tensors, name: str) -> tuple[Dim, int]:
        """Returns (number of rows, number of columns) of the operand tensor `name`.

        The number of rows may be a symbol such as "T". Raises OpError unless the tensor is a matrix with a fixed number
        of columns.

        t: the Program's tensors by name.
        """
        x = t[name]
        ok = len(x.shape) == 2 and isinstance(x.shape[1], int)
        self.check(ok, f"{name} is {x.type}; wanted a matrix [rows, columns] with a fixed number of columns")
        return x.shape[0], int(x.shape[1])

    def token_columns(self, t: Tensors, name: str) -> int:
        """Returns the number of columns of the operand tensor `name`, which must be [T, columns] with a row per token.

        Raises OpError for another shape. t: the Program's tensors by name.
        """
        rows, columns = self.rows_cols(t, name)
        self.check(rows == "T", f"{name} is {t[name].type}; wanted a row for every token, [T, {columns}]")
        return columns

    def same_shape(self, t: Tensors, a: str, b: str) -> None:
        """Raise OpError unless the tensors named `a` and `b` have equal shapes. Returns nothing."""
        self.check(t[a].shape == t[b].shape, f"{a} is {t[a].type} but {b} is {t[b].type}; they must have one shape")

    def vector(self, t: Tensors, name: str | None, length: int) -> None:
        """Raise OpError unless tensor `name` has the shape [length] and a format without scales (f32, bf16, f16, ...).

        Returns nothing. `name` may be None, for an optional operand that is not given.
        """
        if name is not None:
            self.check(t[name].shape == (length,), f"{name} is {t[name].type}; wanted [{length}]")
            plain = not formats.get(t[name].format).grouped
            self.check(plain, f"{name} is {t[name].format}; vectors stay in a plain format (f32, bf16, f16)")

    def moved(self, t: Tensors, batch: Batch, flops: int, *, leave: tuple[str, ...] = ()) -> Work:
        """Returns the op's Work: `flops` operations, and the bytes of all its operands and results.

        Use it for an op that reads each operand once and writes each result once. Bytes of state tensors, and of the
        tensors named in `leave`, are not counted.
        """
        total = {"weight": 0, "temp": 0}
        for name in (*self.inputs, *self.outputs):
            if name not in leave and t[name].role != "state":
                role = "weight" if t[name].role == "weight" else "temp"
                total[role] += t[name].nbytes(batch.sizes)
        return Work(flops, total["weight"], 0, total["temp"])


def array(v: Mapping[str, Value], name: str) -> np.ndarray:
    """Returns the value `v[name]` as a float32 array. Raises AssertionError if the value is quantised."""
    x = v[name]
    assert isinstance(x, np.ndarray), f"{name} is quantised where a plain array is wanted"
    return x.astype(np.float32, copy=False)
