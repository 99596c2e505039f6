"""Tensors of recurrent blocks (Mamba, Mamba-2, gated delta nets), as llama.cpp's converters change them, changed back.

Each public function of the form change(tables, m, name, p) adds the tensor at the Place `p` under transformers' `name`.
"""

from __future__ import annotations

from itertools import pairwise
from math import prod

import numpy as np

from intaglio.models.config import CheckpointError
from intaglio.models.files.gguf.metadata import Metadata
from intaglio.models.files.gguf.tensors import Place, Tables


def rates(tables: Tables, m: Metadata, name: str, p: Place) -> None:
    """Add A_log = log(-A): files have A = -exp(A_log), [channels, states] of Mamba, [heads, 1] of Mamba-2."""
    shape = p.shape[:1] if p.shape[1:] == (1,) else p.shape

    def logarithm(parts: list[np.ndarray]) -> np.ndarray:
        with np.errstate(divide="ignore"):  # exp(A_log) may have become 0
            return np.log(-parts[0]).reshape(shape)

    tables.add_joined(name, (p,), shape, logarithm)


def vector(tables: Tables, m: Metadata, name: str, p: Place) -> None:
    """Add a vector that files have as a matrix: D [heads, 1], and the norm's weight [groups, columns of a group]."""
    tables.add(name, p.cut(0, (prod(p.shape),)))


def delta_sizes(m: Metadata) -> tuple[int, int, int, int]:
    """(key heads, value heads, columns of a key head, columns of a value head) of a gated delta net.

    Raises CheckpointError if value heads do not divide.
    """
    key_heads, heads = m.whole("ssm.group_count"), m.whole("ssm.time_step_rank")
    inner = m.whole("ssm.inner_size")
    if heads % key_heads or inner % heads:
        raise CheckpointError(
            f"{m.file.path}: ssm.inner_size={inner}, ssm.time_step_rank={heads} and ssm.group_count={key_heads} "
            "have to be multiples of each other"
        )
    return key_heads, heads, m.whole("ssm.state_size"), inner // heads


def parts_by_head(tables: Tables, names: dict[str, int], heads: int, p: Place) -> None:
    """Add several matrices that are stored as one, at the Place `p`, with rows that alternate by key head.

    names: {name of a matrix: its rows for one key head}, in the order in which a key head has them. heads: number of
    key heads.
    """
    each, first = sum(names.values()), 0
    for name, count in names.items():
        tables.add_rows(name, p, (np.arange(heads)[:, None] * each + first + np.arange(count)).ravel())
        first += count


def beta_and_step(tables: Tables, m: Metadata, name: str, p: Place) -> None:
    """Add in_proj_b and in_proj_a of Qwen3-Next, whose rows a file has in one matrix, grouped by key head.

    Raises CheckpointError if value heads do not divide.
    """
    keys, heads, _, _ = delta_sizes(m)
    at, each = name.removesuffix("in_proj_ba.weight"), heads // keys
    parts_by_head(tables, {f"{at}in_proj_b.weight": each, f"{at}in_proj_a.weight": each}, keys, p)


def queries_to_gate(tables: Tables, m: Metadata, name: str, p: Place) -> None:
    """Add in_proj_qkv and in_proj_z of Qwen3-Next from one matrix with the rows of both.

    transformers and older files have this matrix. Raises CheckpointError if value heads do not divide.
    """
    keys, heads, key, value = delta_sizes(m)
    at, each = name.removesuffix("in_proj_qkvz.weight"), heads // keys * value
    widths = (key, key, each, each)
    block = np.arange(keys)[:, None] * sum(widths)
    starts = np.cumsum((0, *widths))
    rows = [(block + np.arange(a, b)).ravel() for a, b in pairwise(starts)]
    tables.add_rows(f"{at}in_proj_qkv.weight", p, np.concatenate(rows[:3]))
    tables.add_rows(f"{at}in_proj_z.weight", p, rows[3])


def tiled(m: Metadata, width: int) -> np.ndarray:
    """The file's row number (int array) of each row of a matrix of Qwen3.5 with `width` rows per value head.

    transformers has the value heads of the first key head first. Files have the first value head of each key head
    first, then the second of each. Raises CheckpointError if value heads do not divide.
    """
    keys, heads, _, _ = delta_sizes(m)
    h = np.arange(heads)
    each = heads // keys
    return (((h % each) * keys + h // each)[:, None] * width + np.arange(width)).ravel()


def by_value_head(tables: Tables, m: Metadata, name: str, p: Place) -> None:
    """Add a matrix of Qwen3.5 with rows for each value head, or a vector with a value for each, in transformers' order.

    Rows before those of the value heads, of queries and keys, stay in their places. Raises CheckpointError if value
    heads do not divide.
    """
    _, heads, _, value = delta_sizes(m)
    count = p.shape[0]
    own = heads if count == heads else heads * value
    order = np.concatenate([np.arange(count - own), count - own + tiled(m, own // heads)])
    if name.endswith("A_log"):
        tables.add_joined(name, (p,), p.shape, lambda parts: np.log(-parts[0])[order])
    elif len(p.shape) == 1:
        tables.add_joined(name, (p,), p.shape, lambda parts: parts[0][order])
    else:
        tables.add_rows(name, p, order)


def columns_by_value_head(tables: Tables, m: Metadata, name: str, p: Place) -> None:
    """Add out_proj of Qwen3.5 with its columns in transformers' order; files have them in the order of tiled().

    Raises CheckpointError if value heads do not divide.
    """
    tables.add_columns(name, p, np.argsort(tiled(m, delta_sizes(m)[3])))
