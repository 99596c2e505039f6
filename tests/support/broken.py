"""Programs with a planted fault, for tests that a comparison notices it."""

from __future__ import annotations


def broken(p, change):
    """The Program with `change` applied to each op; None if it changes nothing."""
    ops = tuple(change(op) or op for op in p.ops)
    return None if ops == p.ops else p.with_ops(ops, p.tensors)
