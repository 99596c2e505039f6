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
    """Add the tensor A_log of a Mamba layer to `tables`. A GGUF file stores A, so A_log is computed as log(-A).

    A is [channels, states] in Mamba. In Mamba-2 it is [heads, 1], and A_log is [heads]. Returns nothing.

    Args:
        tables: the file's tensors by their names in transformers; changed in place.
        m: the metadata; not used.
        name: the tensor's name in transformers.
        p: where the file has A.
    """
    shape = p.shape[:1] if p.shape[1:] == (1,) else p.shape

    def logarithm(parts: list[np.ndarray]) -> np.ndarray:
        with np.errstate(divide="ignore"):  # exp(A_log) may have become 0
            return np.log(-parts[0]).reshape(shape)

    tables.add_joined(name, (p,), shape, logarithm)


def vector(tables: Tables, m: Metadata, name: str, p: Place) -> None:
    """Add a vector to `tables`, which the file stores as a matrix. Returns nothing.

    The vector is D, which the file stores as [heads, 1], or the weights of a norm, which it stores as [groups,
    columns].

    Args:
        tables: the file's tensors by their names in transformers; changed in place.
        m: the metadata; not used.
        name: the tensor's name in transformers.
        p: where the file has the matrix.
    """
    tables.add(name, p.cut(0, (prod(p.shape),)))


def delta_sizes(m: Metadata) -> tuple[int, int, int, int]:
    """Returns the sizes of a gated delta net: (key heads, value heads, width of a key head, width of a value head).

    All four are ints. Raises CheckpointError unless the number of value heads is a multiple of the number of key heads,
    and the inner size is a multiple of the number of value heads.
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
    """Add several matrices to `tables`. The file stores them as one tensor, grouped by key head. Returns nothing.

    The stored tensor has the rows that belong to key head 0, one matrix after another; then the rows that belong to key
    head 1; and so on.

    Args:
        tables: the file's tensors by their names in transformers; changed in place.
        names: {name of a matrix: its number of rows for one key head}, in the order that the stored tensor has.
        heads: number of key heads.
        p: where the file has the stored tensor.
    """
    each, first = sum(names.values()), 0
    for name, count in names.items():
        tables.add_rows(name, p, (np.arange(heads)[:, None] * each + first + np.arange(count)).ravel())
        first += count


def beta_and_step(tables: Tables, m: Metadata, name: str, p: Place) -> None:
    """Add in_proj_b and in_proj_a of Qwen3-Next to `tables`. The file has both in one matrix, grouped by key head.

    Returns nothing.

    Args:
        tables: the file's tensors by their names in transformers; changed in place.
        m: the metadata, which has the numbers of heads.
        name: name of the file's matrix in transformers, which ends with in_proj_ba.weight.
        p: where the file has the matrix.

    Raises CheckpointError if the sizes in the metadata do not fit together (see delta_sizes()).
    """
    keys, heads, _, _ = delta_sizes(m)
    at, each = name.removesuffix("in_proj_ba.weight"), heads // keys
    parts_by_head(tables, {f"{at}in_proj_b.weight": each, f"{at}in_proj_a.weight": each}, keys, p)


def queries_to_gate(tables: Tables, m: Metadata, name: str, p: Place) -> None:
    """Add the matrices in_proj_qkv and in_proj_z of Qwen3-Next to `tables`. An older file has both in one matrix.

    The file's matrix, in_proj_qkvz of transformers, has the rows of q, k, v and z of key head 0, then those of key head
    1, and so on. in_proj_qkv gets all rows of q, then all rows of k, then all rows of v. in_proj_z gets the rows of z.
    Returns nothing.

    Args:
        tables: the file's tensors by their names in transformers; changed in place.
        m: the metadata, which has the numbers and sizes of heads.
        name: name of the file's matrix in transformers, which ends with in_proj_qkvz.weight.
        p: where the file has the matrix.

    Raises CheckpointError if the sizes in the metadata do not fit together (see delta_sizes()).
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
    """Returns the order of a Qwen3.5 matrix's rows in a GGUF file, as an int array of row numbers.

    Row i of the matrix in transformers is row result[i] in the file. The matrix has `width` rows for each value head.
    In transformers, value heads are ordered by key head: first all value heads of key head 0, then all of key head 1.
    The file has the first value head of every key head, then the second value head of every key head, and so on.

    Args:
        m: the metadata, which has the numbers of heads.
        width: rows of the matrix for each value head.

    Raises CheckpointError if the sizes in the metadata do not fit together (see delta_sizes()).
    """
    keys, heads, _, _ = delta_sizes(m)
    h = np.arange(heads)
    each = heads // keys
    return (((h % each) * keys + h // each)[:, None] * width + np.arange(width)).ravel()


def by_value_head(tables: Tables, m: Metadata, name: str, p: Place) -> None:
    """Add a tensor of Qwen3.5 to `tables`, with its value heads in transformers' order. Returns nothing.

    In transformers, value heads are ordered by key head. The file has the first value head of every key head, then the
    second value head of every key head, and so on. The tensor is a matrix whose last rows belong to value heads, or a
    vector with one value per value head. Rows of queries and keys come before and keep their order. If the tensor is
    A_log, the file stores A, and log(-A) is added.

    Args:
        tables: the file's tensors by their names in transformers; changed in place.
        m: the metadata, which has the numbers and sizes of heads.
        name: the tensor's name in transformers.
        p: where the file has the tensor.

    Raises CheckpointError if the sizes in the metadata do not fit together (see delta_sizes()).
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
    """Add the matrix out_proj of Qwen3.5 to `tables`, with its columns in transformers' order. Returns nothing.

    In transformers, the columns are ordered by key head: all value heads of key head 0, then all of key head 1. The
    file has the first value head of every key head, then the second value head of every key head, and so on.

    Args:
        tables: the file's tensors by their names in transformers; changed in place.
        m: the metadata, which has the numbers and sizes of heads.
        name: the matrix's name in transformers.
        p: where the file has the matrix.

    Raises CheckpointError if the sizes in the metadata do not fit together (see delta_sizes()).
    """
    tables.add_columns(name, p, np.argsort(tiled(m, delta_sizes(m)[3])))
