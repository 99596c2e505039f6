"""The elementwise op `map`: a small expression over its operands, such as "silu(a) * b"."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from math import erf
from typing import ClassVar

import numpy as np

from intaglio.batch import Batch
from intaglio.ops.op import Op, OpError, Results, Tensors, Value, Work, array, operand, result


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Returns 1 / (1 + e^-x) for each element of x, as float32. It is computed in float64 without overflow."""
    wide = x.astype(np.float64)
    return (1 / (1 + np.exp(-np.abs(wide))) * np.where(wide >= 0, 1, np.exp(-np.abs(wide)))).astype(np.float32)


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """Returns GELU in its tanh form for each element of x, as float32.

    The formula is x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))) (Hendrycks & Gimpel 2016).
    """
    wide = x.astype(np.float64)
    return (0.5 * wide * (1 + np.tanh(np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)))).astype(np.float32)


def gelu(x: np.ndarray) -> np.ndarray:
    """Returns GELU of each element of x, as float32.

    It is x * Phi(x), where Phi is the cumulative distribution function of the standard normal distribution.
    """
    wide = x.astype(np.float64)
    return (0.5 * wide * (1 + np.vectorize(erf, otypes=[np.float64])(wide / np.sqrt(2)))).astype(np.float32)


FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": lambda x: x * sigmoid(x),
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": lambda x: np.maximum(x, np.float32(0)),
    "relu2": lambda x: np.maximum(x, np.float32(0)) ** 2,
    "sigmoid": sigmoid,
    "tanh": np.tanh,
    "exp": np.exp,
    "softplus": lambda x: np.logaddexp(0, x.astype(np.float64)).astype(np.float32),
}
ARITHMETIC = {"+": np.add, "-": np.subtract, "*": np.multiply, "/": np.divide}
BINARY = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
OPERANDS = ("a", "b", "c")
Steps = tuple[tuple[str, float | str], ...]  # an expression in postfix order, see postfix()


@cache
def postfix(expr: str) -> Steps:
    """Parse an expression such as "silu(a) * b". Returns its steps in postfix order, as a tuple of pairs (kind, value).

    The pairs are ("operand", "a"), ("number", 0.5), ("call", "silu") and ("binary", "+"). Operands are a, b and c,
    operators are + - * /, and functions are the keys of FUNCTIONS. Raises OpError for any other expression.
    """

    def walk(node: ast.expr) -> list[tuple[str, float | str]]:
        match node:
            case ast.Name(id=name) if name in OPERANDS:
                return [("operand", name)]
            case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
                return [("number", float(number))]
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
                return [("number", -float(number))]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in BINARY:
                return [*walk(left), *walk(right), ("binary", BINARY[type(op)])]
            case ast.Call(func=ast.Name(id=name), args=[arg], keywords=[]) if name in FUNCTIONS:
                return [*walk(arg), ("call", name)]
        raise OpError(
            f"expression {expr!r}: {ast.unparse(node)!r} is not understood; use {', '.join(OPERANDS)}, numbers, "
            f"+ - * / and {', '.join(FUNCTIONS)}"
        )

    try:
        tree = ast.parse(expr, mode="eval")
    except SyntaxError as e:
        raise OpError(f"expression {expr!r} does not parse: {e.msg}") from None
    return tuple(walk(tree.body))


def evaluate(steps: Steps, operand: Callable[[str], np.ndarray]) -> np.ndarray:
    """Returns the value of an expression, as a float32 array.

    An expression without operands gives a float32 number instead. steps: the expression, parsed by postfix(). operand:
    function from the name a, b or c to that operand's value.
    """
    stack: list[np.ndarray] = []
    for step, value in steps:
        if step == "operand":
            stack.append(operand(str(value)))
        elif step == "number":
            stack.append(np.float32(value))  # type: ignore[arg-type]
        elif step == "call":
            stack.append(FUNCTIONS[str(value)](stack.pop()))
        else:
            right, left = stack.pop(), stack.pop()
            stack.append(ARITHMETIC[str(value)](left, right))
    return stack.pop()


@dataclass(frozen=True, kw_only=True)
class Map(Op, kind="map"):
    """Op that evaluates an expression for each element: out = expr(a, b, c). Example: "silu(a) * b".

    The computation is in float32. out has the shape of a. b and c each have the shape of a, or as many rows as a and
    fewer columns. If b or c has n columns, fewer than a, the columns of a are divided into n runs of equal length, such
    as heads. Column i of b or c is then used for all columns of run i. n = 1: the single column is used for all columns
    of a.
    """

    elementwise: ClassVar[bool] = True
    a: str = operand()
    b: str | None = operand(optional=True)
    c: str | None = operand(optional=True)
    out: str = result()
    expr: str = "a"

    def shapes(self, t: Tensors) -> Results:
        given = {n for n in OPERANDS if getattr(self, n) is not None}
        used = {value for step, value in postfix(self.expr) if step == "operand"}
        self.check(used == given, f"expr={self.expr!r} uses {sorted(map(str, used))} but operands are {sorted(given)}")
        for name in self.inputs[1:]:
            width, columns = self.rows_cols(t, self.a)[1], self.rows_cols(t, name)[1]
            if not columns or width % columns or t[name].shape[0] != t[self.a].shape[0]:
                self.same_shape(t, self.a, name)
        return {self.out: (t[self.a].shape, "f32")}

    def reference(self, v: Mapping[str, Value], batch: Batch) -> dict[str, np.ndarray]:
        width = array(v, self.a).shape[1]

        def spread(name: str) -> np.ndarray:
            x = array(v, getattr(self, name))
            return x if x.shape[1] in (1, width) else np.repeat(x, width // x.shape[1], axis=1)

        y = evaluate(postfix(self.expr), spread)
        return {self.out: np.broadcast_to(y, array(v, self.a).shape).astype(np.float32)}

    def work(self, t: Tensors, batch: Batch) -> Work:
        steps = sum(step in ("call", "binary") for step, _ in postfix(self.expr))
        return self.moved(t, batch, steps * (t[self.out].nbytes(batch.sizes) // 4))

    def other_of_sum(self, x: str) -> str | None:
        """Returns the name of the operand that the op adds to operand `x`; None if the op does not add two operands."""
        others = [name for name in self.inputs if name != x]
        steps = postfix(self.expr)
        sums = len(steps) == 3 and steps[0][0] == steps[1][0] == "operand" and steps[2] == ("binary", "+")
        return others[0] if sums and len(others) == 1 else None
