"""KernelRecord: one kernel of a library, with the fields in which it differs from the library's other kernels.

A KernelLibrary has one value for each field, but vendors have several kernels for an op, by format and head width. A
record names one of these kernels, the calls for which it is chosen, and its own values of the library's fields.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# `attend` has one record for each of its two phases
OPS = ("products", "prefill", "decode", "experts", "collectives", "recurrent")
WIDEST = 1_000_000


@dataclass(frozen=True, kw_only=True)
class KernelRecord:
    """Description of one kernel: the calls it computes, and its own values for fields of a KernelLibrary.

    Attributes:
        op: kind of the calls, one of OPS.
        kernel: name of the kernel, as in profilers and measured tables.
        why: source of the values, or the reason for them.
        changes: pairs (name of a field of KernelLibrary, value for this kernel). For a field that is not listed, the
            library's value holds.
        formats: number formats of weights, or of keys and values, that the kernel takes; (): every format.
        head_dims: (smallest, largest) width of an attention head that the kernel takes.
        default: True if the kernel may be chosen for every call that it can compute. False if it is chosen only when
            the caller of KernelLibrary.record() or Target.kernel() gives its name.
    """

    op: str
    kernel: str
    why: str
    changes: tuple[tuple[str, Any], ...]
    formats: tuple[str, ...] = ()
    head_dims: tuple[int, int] = (0, WIDEST)
    default: bool = True

    def serves(self, op: str, format: str, head_dim: int, kernel: str) -> bool:
        """True if this kernel may be chosen to compute a given call.

        Args:
            op: kind of the call.
            format: number format of the call's weights, or of its keys and values.
            head_dim: columns of an attention head.
            kernel: name of the wanted kernel; the result is False if this kernel has another name. "": no particular
                kernel is wanted; the result is False if this kernel's `default` is False.
        """
        least, most = self.head_dims
        fits = self.op == op and (not self.formats or format in self.formats) and least <= head_dim <= most
        return fits and (self.kernel == kernel if kernel else self.default)
