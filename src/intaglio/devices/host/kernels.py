"""Host kernels by op class: which ops the native module runs, and how another package registers a Python kernel.

The ops of this package are run by C++ kernels (csrc/ops/, one file per family). The native module names its kernels by
the op's kind; this module registers each for the op class of that kind. Another package gives its op a Python function
with the signature of `Op.reference`:

    @host_kernel(MyOp)
    def my_op(op: MyOp, values: Mapping[str, Value], batch: Batch) -> dict[str, np.ndarray]:
        return {op.out: np.sin(values[op.x])}

`values` has each operand by its tensor's name: rows and vectors as arrays, weights in their declared format, state as
arrays [P, B, ...] that the function updates in place. The function returns each result by its tensor's name. The step
stops before the op, copies its operands out, calls the function while holding Python's GIL, copies the results in, and
continues: expect tens of microseconds per call beside the function's own time. To keep results batch-invariant, a row
of the result must depend only on its own sequence. `host_kernel(MyOp)(MyOp.reference)` runs the op's reference
implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from intaglio import _native
from intaglio.batch import Batch
from intaglio.devices.device import DeviceError
from intaglio.ops import (
    REGISTRY,
    AllGather,
    AllReduce,
    AllToAll,
    Collective,
    Embed,
    Map,
    Op,
    Recv,
    ReduceScatter,
    Send,
    Value,
)
from intaglio.ops.elementwise import postfix

Attributes = dict[str, object]
PythonFunction = Callable[[Any, Mapping[str, Value], Batch], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class NativeKernel:
    """Registry entry of an op class whose host kernel is C++ code.

    `attributes` is a function that takes an op and returns the attributes for its kernel as a dict {attribute's name:
    value}. The values have the form that the kernel takes.
    """

    attributes: Callable[[Any], Attributes]


@dataclass(frozen=True)
class PythonKernel:
    """Registry entry of an op class whose host kernel is a Python function.

    The native code of a step stops before such an op and continues after it.
    """

    function: PythonFunction


KERNELS: dict[type[Op], NativeKernel | PythonKernel] = {}


def plain_attributes(op: Op) -> Attributes:
    """Return all fields of `op` except its site and the names of tensors, as a dict {field's name: value}."""
    return {name: getattr(op, name) for name in op.named("attribute")}


def native_kernel(op_class: type[Op], attributes: Callable[[Any], Attributes] = plain_attributes) -> None:
    """Register an op class whose host kernel is C++ code of the native module. Returns None.

    The kernel is the native kernel with the name `op_class.kind`. Raises TypeError if there is no such kernel, or if
    the class already has a kernel.

    Args:
        op_class: the op class.
        attributes: function that takes an op and returns {attribute's name: value} for the kernel. By default these are
            all fields of the op except its site and the names of tensors.
    """
    if op_class.kind not in _native.op_kinds():
        raise TypeError(f"the native module has no kernel {op_class.kind!r}; it has {', '.join(_native.op_kinds())}")
    _register(op_class, NativeKernel(attributes))


def host_kernel(op_class: type[Op]) -> Callable[[PythonFunction], PythonFunction]:
    """Return a decorator that registers a Python function as the host kernel of an op class.

    The decorated function stays unchanged. It takes (op, {operand's name: value}, batch) and returns {result's name:
    array}. The module's docstring has an example. Raises TypeError if the class already has a kernel.
    """

    def register(function: PythonFunction) -> PythonFunction:
        _register(op_class, PythonKernel(function))
        return function

    return register


def _register(op_class: type[Op], kernel: NativeKernel | PythonKernel) -> None:
    if op_class in KERNELS:
        raise TypeError(f"op {op_class.kind} has a host kernel already")
    KERNELS[op_class] = kernel


def kernel_of(op: Op) -> NativeKernel | PythonKernel:
    """Return the host kernel that is registered for the class of `op`: a NativeKernel or a PythonKernel.

    Raises DeviceError with the op's name if there is none.
    """
    if type(op) not in KERNELS:
        raise DeviceError(
            f"{op.site}: the host has no kernel for op {op.kind}; rebuild the native module if csrc/ops/ has one, or "
            "register one with intaglio.devices.host.host_kernel"
        )
    return KERNELS[type(op)]


def map_attributes(op: Map) -> Attributes:
    """Return the attributes that the native kernel of an elementwise op takes: a dict {"expr": list}.

    The list is the op's expression in postfix order. Its items are numbers, and names of operands, operators and
    functions.
    """
    return {"expr": [value for _, value in postfix(op.expr)]}


def collective_attributes(op: Collective) -> Attributes:
    """Return the attributes that the native kernel of a collective op takes: a dict {attribute's name: value}.

    They are the op's own attributes, and "site", the op's name for error messages.
    """
    return {"site": op.site, **plain_attributes(op)}


def embed_attributes(op: Embed) -> Attributes:
    """Return the attributes that the native kernel of an embedding op takes: {"scale": number, "index": text}.

    "index" names the batch array that selects the rows of the table. Raises DeviceError if this is another array than
    tokens or positions.
    """
    if op.tokens not in ("tokens", "positions"):
        raise DeviceError(f"{op.site}: the host's embed takes tokens or positions, not {op.tokens}")
    return {"scale": op.scale, "index": op.tokens}


native_kernel(Embed, embed_attributes)
native_kernel(Map, map_attributes)
for _collective in (AllGather, AllReduce, AllToAll, Recv, ReduceScatter, Send):
    native_kernel(_collective, collective_attributes)
for _op_class in REGISTRY.values():
    if _op_class.kind in _native.op_kinds() and _op_class not in KERNELS:
        native_kernel(_op_class)
