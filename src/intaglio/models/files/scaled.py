"""FP8, MXFP8, MXFP4, NVFP4 and INT8 matrices as Model Optimizer, AMD Quark and AutoRound write them.

The format is recognised by the types and shapes of the tensors: the codes, and the scales beside them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np

from intaglio.formats import ROW, Quantised
from intaglio.models.config import PortError
from intaglio.models.files.coded import Coded, Part, Reader, Stored, scaled_format, with_row_scales
from intaglio.models.files.floats import fp8_matrix, mxfp4_matrix, nvfp4_matrix

ALGORITHMS = (  # of Model Optimizer
    "FP8", "FP8_PB_WO", "FP8_PB_REAL", "FP8_PER_CHANNEL_PER_TOKEN", "MXFP8", "NVFP4", "NVFP4_AWQ", "W4A16_NVFP4",
    "W4A8_NVFP4_FP8", "W4A8_MXFP4_FP8", "MXFP4", "MIXED_PRECISION",
)  # fmt: skip
BLOCK = (128, 128)  # rows and columns that share a scale, if blocks have one and no setting says which
POWERS = ("U8", "F8_E8M0")  # types of scales that are powers of two
REORDERED = ("I32", "U32")  # Quark's words of integers


def scaled(stored: Stored, q: Mapping[str, Any]) -> dict[str, Coded]:
    """Returns the quantised matrices that have a tensor `weight_scale` beside their weight, as {name: Coded}.

    A Coded decodes a matrix [N, K] from its stored tensors. The formats and their stored tensors are:

    - FP8: weight E4M3 [N, K]; one scale, one scale per row, or one per 128 x 128 values.
    - MXFP8: weight E4M3 [N, K]; scales U8 [N, K / 32], which are exponents of 2.
    - MXFP4: weight U8 [N, K / 2], two codes per byte; scales as in MXFP8.
    - NVFP4: weight U8 [N, K / 2]; scales E4M3 [N, K / 16], times weight_scale_2 or divided by weight_global_scale
      (F32).
    - INT8: weight I8 [N, K]; one scale, or one scale per row.

    Raises PortError for a matrix in another format, and for methods that rotate or scale activations.

    stored: contents of the checkpoint's files. q: the quantisation settings.
    """
    if "rotation" in json.dumps(q.get("algo_config") or ""):
        raise PortError("config.json: quantization_config.algo_config: rotations of activations are not computed here")
    for name in stored.dtypes:
        if name.endswith((".pre_quant_scale", ".smooth_scale")):
            raise PortError(
                f"{name}: activations are to be multiplied by it (AWQ or SmoothQuant), which is not computed here; "
                "take a version that was quantised without"
            )
    names = sorted(n.removesuffix("_scale") for n in stored.dtypes if n.endswith("weight_scale"))
    return {name: _matrix(stored, name, q) for name in names}


def _matrix(stored: Stored, name: str, q: Mapping[str, Any]) -> Coded:
    scale = name + "_scale"
    codes = name if name in stored.dtypes else name + "_packed"
    dtype, kept = stored.dtypes.get(codes, "missing"), stored.dtypes[scale]
    if dtype == "F8_E4M3":
        groups = kept in POWERS and len(stored.shapes[scale]) == 2
        return fp8_matrix(stored, codes, (1, 32) if groups else q.get("weight_block_size") or BLOCK)
    if dtype == "U8" and name + "_scale_2" in stored.dtypes:
        return nvfp4_matrix(stored, codes, scale, name + "_scale_2", divides=False)
    if dtype == "U8" and name + "_global_scale" in stored.dtypes:
        return nvfp4_matrix(stored, codes, scale, name + "_global_scale", divides=True)
    if dtype == "U8" and kept in POWERS:
        return mxfp4_matrix(stored, codes, scale)
    if dtype == "I8":
        return _int8(stored, codes, scale)
    words = "; integers packed in words are not, export it with GPTQ's or AWQ's packing" if dtype in REORDERED else ""
    raise PortError(
        f"{codes} is {dtype} with scales in {kept}; FP8, MXFP8, MXFP4, NVFP4 and INT8 by row are read{words}"
    )


def _int8(stored: Stored, codes: str, scale: str) -> Coded:
    """Returns the Coded of an INT8 matrix, which has one scale, or one scale per row.

    Raises PortError for another number of scales, and for zero points other than 0.

    stored: contents of the checkpoint's files. codes: name of the tensor of codes. scale: name of the tensor of scales.
    """
    shape, held, zero = stored.shapes[codes], stored.shapes[scale], codes + "_zero_point"
    if prod(held) not in (1, shape[0]):
        raise PortError(f"{scale} is {list(held)}; INT8 of {shape[0]} rows has one scale, or one a row")
    if zero in stored.dtypes and np.any(stored.read(zero) != 0):
        raise PortError(f"{zero} is not 0; INT8 with zero points is read as compressed-tensors has it")
    format = scaled_format("int8", ROW, stored.dtypes[scale])

    def decode(read: Reader) -> Quantised:
        return with_row_scales(read(codes), read(scale), format)

    extra = {zero: Part(None)} if zero in stored.dtypes else {}
    return Coded(format, shape, {codes: Part(), scale: Part(0 if prod(held) > 1 else None), **extra}, decode)
