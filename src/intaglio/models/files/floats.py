"""Published FP8 matrices (E4M3, with scales per block, row or tensor) and FP4 matrices (E2M1: MXFP4 and NVFP4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from intaglio import formats
from intaglio.formats import Quantised
from intaglio.models.config import PortError
from intaglio.models.files.coded import (
    Coded,
    Part,
    Reader,
    Stored,
    as_scales,
    bases,
    e2m1,
    e2m1_factored,
    with_row_scales,
)  # fmt: skip


def fp8(stored: Stored, q: Mapping[str, Any]) -> dict[str, Coded]:
    """The FP8 matrices of a checkpoint, as {name of the weight: Coded}.

    A matrix is stored as codes, E4M3 [N, K], and scales: weight_scale_inv [N / a, K / b] with one scale per block of a
    x b values, or weight_scale with one scale per row or one in all. q: the quantisation settings. Raises PortError if
    scales are missing or have another shape.
    """
    return {
        name: fp8_matrix(stored, name, q.get("weight_block_size") or (0, 0))
        for name, dtype in stored.dtypes.items()
        if dtype == "F8_E4M3" and not name.endswith(("_scale", "_scale_inv"))
    }


def fp8_matrix(stored: Stored, name: str, block: Sequence[int]) -> Coded:
    """The E4M3 matrix called `name`, as a Coded.

    It has one scale per block, one per row, or one in all; the shape of the stored scales decides. Scales in U8 or
    F8_E8M0 are powers of two. block: (rows, columns) of a block; (0, 0) if there are none. Raises PortError if there
    are no scales, or if their shape fits none of the three cases.
    """
    rows, columns = block
    scale = next((s for s in (name + "_scale_inv", name + "_scale") if s in stored.dtypes), None)
    if scale is None:
        raise PortError(f"{name} is F8_E4M3, but neither {name}_scale_inv nor {name}_scale is there")
    shape, held = stored.shapes[name], stored.shapes[scale]
    if len(shape) == 2 and len(held) == 4 and held[1] == held[3] == 1:  # Model Optimizer's blocks
        held = (held[0], held[2])
    blocks = columns > 0 and len(held) == len(shape) and held[-1] == -(-shape[-1] // columns)
    if blocks and (columns % 32 or not 32 <= columns <= formats.CHUNK):
        raise PortError(f"config.json: weight_block_size={[rows, columns]}; columns are a multiple of 32 in 32..1024")
    by_row = prod(shape[:-1])
    if (blocks and held[-2] != -(-shape[-2] // rows)) or (not blocks and prod(held) not in (1, by_row)):
        raise PortError(
            f"{scale} is {list(held)} beside {name} {list(shape)}; wanted one scale, one a row, or one for each block "
            f"of weight_block_size ({list(block) if columns else 'not given'})"
        )
    format = f"fp8g{columns}" if blocks else "fp8row"

    def decode(read: Reader) -> Quantised:
        codes = read(name)
        if format == "fp8row":
            return with_row_scales(codes, as_scales(read(scale)), format)
        by_block = as_scales(read(scale)).reshape(-1, held[-1]) if len(shape) == 2 else as_scales(read(scale))
        scales = np.repeat(by_block, rows, axis=-2)[..., : codes.shape[-2], :]
        return Quantised(codes, scales, columns)

    each = 1 if len(shape) > 2 else rows if blocks else 1
    return Coded(format, shape, {name: Part(), scale: Part(0 if prod(held) > 1 else None, each)}, decode)


def nvfp4_matrix(stored: Stored, codes: str, scale: str, factor: str, divides: bool) -> Coded:
    """A Coded for the NVFP4 matrix in the tensors named `codes`, `scale` and `factor`.

    codes: U8 [N, K / 2], two E2M1 codes per byte, the first in the low nibble. scale: E4M3 [N, K / 16]. factor: one F32
    value, by which scales are multiplied or, if `divides` is True, divided. Raises PortError for other types or shapes.
    """
    for part, dtype in ((codes, "U8"), (scale, "F8_E4M3"), (factor, "F32")):
        if stored.dtypes.get(part) != dtype:
            raise PortError(f"{part} is {stored.dtypes.get(part, 'missing')}; NVFP4 has it in {dtype}")
    n, half = stored.shapes[codes]
    if stored.shapes[scale] != (n, -(-half // 8)) or prod(stored.shapes[factor]) != 1:
        raise PortError(
            f"{scale} is {list(stored.shapes[scale])} and {factor} {list(stored.shapes[factor])}; NVFP4 of {n} rows of "
            f"{half * 2} columns has {[n, -(-half // 8)]} and one value"
        )

    def decode(read: Reader) -> Quantised:
        held = read(factor).astype(np.float32)
        return e2m1_factored(read(codes), read(scale), np.float32(1) / held if divides else held)

    return Coded("nvfp4", (n, half * 2), {codes: Part(), scale: Part(), factor: Part(None)}, decode)


def mxfp4_matrix(stored: Stored, codes: str, scale: str) -> Coded:
    """A Coded for the MXFP4 matrix in the tensors named `codes` and `scale`.

    codes: U8 [N, K / 2], two E2M1 codes per byte. scale: [N, K / 32], powers of two. Raises PortError for scales of
    another shape.
    """
    n, half = stored.shapes[codes]
    if stored.shapes[scale] != (n, -(-half // 16)):
        raise PortError(f"{scale} is {list(stored.shapes[scale])}; MXFP4 of {n} rows has {[n, -(-half // 16)]}")
    return Coded("mxfp4", (n, half * 2), {codes: Part(), scale: Part()}, lambda read: e2m1(read(codes), read(scale)))


def mxfp4(stored: Stored, q: Mapping[str, Any]) -> dict[str, Coded]:
    """The MXFP4 matrices of a checkpoint in the form of gpt-oss, as {name of the weight: Coded}.

    NAME_blocks, U8 [E, N, K / 32, 16], has two E2M1 codes per byte, the first in the low nibble. NAME_scales, U8 [E, N,
    K / 32], has powers of two as exponents with a bias of 127. E is the number of experts. Each Coded has the shape [E,
    K, N] that the weight has in checkpoints without quantisation. Its `turned` is True, because codes and scales are
    stored for the transposed matrices [E, N, K].

    Args:
        stored: contents of the checkpoint's files.
        q: the quantisation settings; not read.

    Raises PortError for NAME_blocks of another shape.
    """
    out = {}
    for base in bases(stored, "_blocks"):
        *lead, groups, _ = stored.shapes[base + "_blocks"]
        if len(lead) != 2:
            raise PortError(f"{base}_blocks is {stored.shapes[base + '_blocks']}; wanted experts, rows, groups, 16")

        def decode(read: Reader, base: str = base) -> Quantised:
            blocks = read(base + "_blocks")
            return e2m1(blocks.reshape(*blocks.shape[:-2], -1), read(base + "_scales"))

        shape = (*lead[:-1], groups * 32, lead[-1])
        parts = {base + "_blocks": Part(), base + "_scales": Part()}
        out[base] = Coded("mxfp4", shape, parts, decode, turned=True)
    return out
