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
    """Yield the common porting mistakes that involve several ops of a layer, as triples (site, text, changes).

    `site` is the name of an op that the mistake affects. `text` describes the mistake. `changes` is a dict {op's name:
    corrected op}. Running the corrected ops instead of the present ones shows whether the port made this mistake.

    Args:
        p: the Program.
        values: all values of the step, by name; corrected weights are added to it.
        chain: the ops that compute the wrong result. Only mistakes that can change these ops are yielded.
    """
    yield from _joined(p, values, chain)
    yield from _residual(p, chain)


def _layer(site: str) -> str:
    """Return the layer's part of an op's name `site`, such as "layers.3."; "" if the op is in no layer."""
    return ".".join(site.split(".")[:2]) + "." if site.startswith("layers.") else ""


def _joined(p: Program, values: dict[str, Value], chain: list[Op]) -> Iterator[Variant]:
    """Yield a triple (site, text, changes) for each way to split the joined q, k, v matrix of an attention op.

    A checkpoint may store this matrix in two ways: by head (the query heads of a K/V head, then its key, then its
    value), or in three blocks (all of q, then all of k, then all of v). The port may have split the matrix in the wrong
    way, so both ways are tried, but only for attention ops whose q, k or v is computed by an op of `chain`.

    `site` is the name of the first of the three linear ops that compute q, k and v. `text` says how the checkpoint may
    store the matrix. `changes` is {name of a linear op: copy of the op with weights that are split in this way}.
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
    """True if the rows of q, k and v can be reordered by head, K/V head after K/V head.

    For each K/V head, such an order has the rows of its query heads, then its key rows, then its value rows. This
    requires the same number of rows for every head, and a number of query heads that is a multiple of the K/V heads.

    Args:
        parts: weights or biases of q, k and v.
        heads: number of query heads.
        kv_heads: number of K/V heads.
    """
    rows = [len(x) for x in parts]
    return rows[0] % heads == 0 and rows[1] == rows[2] == rows[0] // heads * kv_heads and heads % kv_heads == 0


def _by_head(parts: list[np.ndarray], share: int, groups: int) -> list[np.ndarray]:
    """Split a joined q, k, v matrix by head instead of in three blocks. Returns the new list [q, k, v].

    The old split took the matrix's rows as all of q, then all of k, then all of v. The new split takes the rows K/V
    head by K/V head: first the rows of its query heads, then its key rows, then its value rows.

    Args:
        parts: [q, k, v] of the old split. Concatenated, they are the matrix.
        share: number of query heads of each K/V head.
        groups: number of K/V heads.
    """
    whole = np.concatenate(parts)
    each = whole.reshape(groups, share + 2, -1, *whole.shape[1:])
    cut = (each[:, :share], each[:, share], each[:, share + 1])
    return [x.reshape(-1, *whole.shape[1:]) for x in cut]


def _in_turn(parts: list[np.ndarray], share: int, groups: int) -> list[np.ndarray]:
    """Split a joined q, k, v matrix in three blocks instead of by head. Returns the new list [q, k, v].

    The old split took the matrix's rows K/V head by K/V head. The new split takes the rows as all of q, then all of k,
    then all of v.

    Args:
        parts: [q, k, v] of the old split.
        share: number of query heads of each K/V head.
        groups: number of K/V heads.
    """
    d, rest = len(parts[1]) // groups, parts[0].shape[1:]
    each = [x.reshape(groups, n, d, *rest) for x, n in zip(parts, (share, 1, 1), strict=True)]
    return np.split(np.concatenate(each, axis=1).reshape(-1, *rest), np.cumsum([len(x) for x in parts])[:2])


def _residual(p: Program, chain: list[Op]) -> Iterator[Variant]:
    """Yield the ops of `chain` that may read the wrong residual, as triples (site, text, {site: changed op}).

    `site` is the op's name. `text` describes the mistake. In a sequential layer, the MLP reads the sum of the layer's
    input and the result of attention. In a parallel layer, it reads only the layer's input. The changed op reads the
    sum instead of the input, or the input instead of the sum.
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
