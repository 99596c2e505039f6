"""Porting mistakes that involve several ops of a layer: how q, k and v are joined; sequential or parallel residual.

Each function yields (site, description of a mistake, {site: op without it}). causes.py tries them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from intaglio.ops import Attend, Linear, Map, Norm, Op, Value
from intaglio.program import Program

Variant = tuple[str, str, dict[str, Op]]


def layer_variants(p: Program, values: dict[str, Value], chain: list[Op]) -> Iterator[Variant]:
    """Yield a triple (site, text, changes) for each porting mistake that involves several ops of a layer.

    The text describes a mistake that the port may have made at the site. `changes` is {site: op to run there in place
    of the present op}. causes.explain() runs the ops again with them.

    Args:
        p: the Program.
        values: all values of the step, by name; corrected weights are added to it.
        chain: the ops that compute the wrong result. Only mistakes that can change them are yielded.
    """
    yield from _joined(p, values, chain)
    yield from _residual(p, chain)


def _layer(site: str) -> str:
    """The layer that a site belongs to, such as `layers.3.`; "" for a site outside the layers."""
    return ".".join(site.split(".")[:2]) + "." if site.startswith("layers.") else ""


def _joined(p: Program, values: dict[str, Value], chain: list[Op]) -> Iterator[Variant]:
    """Yield a triple (site, text, changes) for each other way to split a joined q, k, v matrix; see layer_variants().

    site: name of the op of the first of the three products. text: the way in words, for the report. changes: {site: op
    that replaces the port's op}.

    A checkpoint may hold the matrix by head (each K/V head after its query heads), or q, k and v one after another. The
    port may have split it in the wrong way. Only attention whose q, k or v is computed in `chain` is tried.
    """
    for attend in (op for op in p.ops if isinstance(op, Attend)):
        heads, kv_heads = attend.heads, int(p.tensors[attend.k_cache].shape[2])
        own = [op for op in p.ops if isinstance(op, Linear) and _layer(op.site) == _layer(attend.site)]
        trio = next((own[i : i + 3] for i in range(len(own) - 2) if len({op.x for op in own[i : i + 3]}) == 1), [])
        if not {op.site for op in trio} & {op.site for op in chain}:
            continue
        for words, order in (
            ("by head, not one after another", _by_head),
            ("one after another, not by head", _in_turn),
        ):
            changed = dict[str, Op]()
            for field in ("w", "bias"):
                parts = [values.get(getattr(op, field) or "") for op in trio]
                arrays = [x for x in parts if isinstance(x, np.ndarray)]
                if len(arrays) == 3 and _fit(arrays, heads, kv_heads):
                    for op, x in zip(trio, order(arrays, heads // kv_heads, kv_heads), strict=True):
                        name = f"{getattr(op, field)}.{order.__name__}"
                        values[name] = x
                        changed[op.site] = replace(changed.get(op.site, op), **{field: name})
            if changed:
                yield trio[0].site, f"q, k and v are joined {words}", changed


def _fit(parts: list[np.ndarray], heads: int, kv_heads: int) -> bool:
    """True if q, k and v can be joined by head: their heads have equally many rows, and heads % kv_heads is 0.

    Args:
        parts: weights or biases of q, k and v.
        heads: number of query heads.
        kv_heads: number of K/V heads.
    """
    rows = [len(x) for x in parts]
    return rows[0] % heads == 0 and rows[1] == rows[2] == rows[0] // heads * kv_heads and heads % kv_heads == 0


def _by_head(parts: list[np.ndarray], share: int, groups: int) -> list[np.ndarray]:
    """Split a joined q, k, v matrix in another way. Returns the new list [q, k, v].

    The old split took the matrix's rows as all of q, then all of k, then all of v. The new split takes them as ordered
    by K/V head: the rows of the head's query heads, then its key rows, then its value rows, then those of the next.

    Args:
        parts: [q, k, v] of the old split; one below the other they are the matrix.
        share: query heads of each K/V head.
        groups: number of K/V heads.
    """
    whole = np.concatenate(parts)
    each = whole.reshape(groups, share + 2, -1, *whole.shape[1:])
    cut = (each[:, :share], each[:, share], each[:, share + 1])
    return [x.reshape(-1, *whole.shape[1:]) for x in cut]


def _in_turn(parts: list[np.ndarray], share: int, groups: int) -> list[np.ndarray]:
    """Undo a split by head of a joined q, k, v matrix (see _by_head()), and split it as all of q, all of k, all of v.

    Returns the new list [q, k, v].

    Args:
        parts: q, k and v of the wrong split.
        share: query heads of each K/V head.
        groups: number of K/V heads.
    """
    d, rest = len(parts[1]) // groups, parts[0].shape[1:]
    each = [x.reshape(groups, n, d, *rest) for x, n in zip(parts, (share, 1, 1), strict=True)]
    return np.split(np.concatenate(each, axis=1).reshape(-1, *rest), np.cumsum([len(x) for x in parts])[:2])


def _residual(p: Program, chain: list[Op]) -> Iterator[Variant]:
    """Yield a Variant (site, text, {site: changed op}) for each op of `chain` that may read the wrong residual.

    A site is the name of an op's place in the model. In a sequential layer the MLP reads the layer's input plus the
    result of attention, in a parallel layer the layer's input alone. The changed op reads what it would read in the
    other kind of layer.
    """
    sums: Mapping[str, Map] = {
        op.out: op for op in p.ops if isinstance(op, Map) and op.b and op.expr.startswith("a + b")
    }
    for op in chain:
        if isinstance(op, Map) and op.out in sums and _layer(op.site):
            words = f"the residual: parallel, not sequential; what follows reads the layer's input {op.a}"
            yield op.site, words, {op.site: replace(op, expr="a", b=None)}
    for op in (op for op in chain if isinstance(op, Norm)):
        for add in sums.values():
            if add.a == op.x and _layer(add.site) == _layer(op.site):
                words = f"the residual: sequential, not parallel; it reads the sum {add.out}"
                yield op.site, words, {op.site: replace(op, x=add.out)}
