"""KernelRecord: one kernel of a library, with the fields in which it differs from the library's other kernels.

A library has one value a field, but vendors have several kernels for an op, by format and head width. A record names
such a kernel, the calls it is chosen for, and its own values of the library's fields.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# `attend` has one record for each of its two phases
OPS = ("products", "prefill", "decode", "experts", "collectives", "recurrent")
WIDEST = 1_000_000


@dataclass(frozen=True, kw_only=True)
class KernelRecord:
    """A kernel of a library: the uses of an op for which it is chosen, and its own values of fields of KernelLibrary.

    Attributes:
        op: one of OPS.
        kernel: its name, as profilers and measured tables give it.
        why: source of the values, or the reason for them.
        changes: the values, as (field of KernelLibrary, value).
        formats: formats of weights, or of keys and values, that it takes; (): every format.
        head_dims: (least, largest) head width that it takes.
        default: True if it is chosen for every use of the op that fits it; False: only if asked for by name.
    """

    op: str
    kernel: str
    why: str
    changes: tuple[tuple[str, Any], ...]
    formats: tuple[str, ...] = ()
    head_dims: tuple[int, int] = (0, WIDEST)
    default: bool = True

    def serves(self, op: str, format: str, head_dim: int, kernel: str) -> bool:
        """True if this kernel computes `op` for operands in `format` and heads of `head_dim` columns.

        kernel: name of the kernel to use, which must be this one's; "": no name is asked for, and the result is False
        unless `default` is set.
        """
        least, most = self.head_dims
        fits = self.op == op and (not self.formats or format in self.formats) and least <= head_dim <= most
        return fits and (self.kernel == kernel if kernel else self.default)
