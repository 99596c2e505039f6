"""Reads matrices saved by bitsandbytes: NF4 and FP4 (codebook levels times the maximum of a block), and LLM.int8."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from typing import Any

import ml_dtypes
import numpy as np

from intaglio import formats
from intaglio.formats import Quantised
from intaglio.models.config import PortError
from intaglio.models.files.coded import (
    RUN,
    Coded,
    Part,
    Reader,
    Stored,
    bases,
    in_rows,
    run_within,
    with_row_scales,
)  # fmt: skip
from intaglio.ops import Value

STATE = ".quant_state.bitsandbytes__"  # then nf4 or fp4: a JSON object in bytes
SCB = ".SCB"  # LLM.int8: the largest value of each row
KINDS = ("nf4", "fp4")


def bitsandbytes(stored: Stored, q: Mapping[str, Any]) -> dict[str, Coded]:
    """The quantised matrices of a bitsandbytes checkpoint, as {name of the weight: Coded}.

    LLM.int8 matrices are I8 codes [N, K] and one number SCB per row; a value is code * SCB / 127. They are kept as
    int8rowf32. NF4 and FP4 matrices keep their codes, in the format nf4gN or fp4gN with groups of N values. They become
    bf16, rounded to nearest, in two cases: the codebook is not the usual one, or no group length of 32 or more divides
    both the number of columns and the number of values that share a scale.

    Args:
        stored: contents of the checkpoint's files.
        q: the quantisation settings; not read, because the tensors say everything.

    Raises PortError for missing tensors, for codes tiled for a GPU, and for a checkpoint without quantised matrices.
    """
    out: dict[str, Coded] = {}
    for kind in KINDS:
        for name in bases(stored, STATE + kind):
            out[name] = _four_bits(stored, name, kind)
    for base in bases(stored, SCB):
        out[base + ".weight"] = _eight_bits(stored, base)
    if not out:
        raise PortError(
            "quant_method bitsandbytes, but no tensor has a quant_state or SCB beside it: the weights are not "
            "quantised in the file; remove quantization_config from config.json, and use weights=int4 or int8 here"
        )
    return out


def _eight_bits(stored: Stored, base: str) -> Coded:
    codes, scale, layout = base + ".weight", base + SCB, base + ".weight_format"
    shape = stored.shapes.get(codes, ())
    if stored.dtypes.get(codes) != "I8" or len(shape) != 2 or prod(stored.shapes[scale]) != shape[0]:
        raise PortError(f"{codes} is {stored.dtypes.get(codes, 'missing')}{list(shape)}; I8 [N, K] is read")
    if layout in stored.dtypes and np.any(stored.read(layout) != 0):
        raise PortError(f"{layout} is not 0: codes are tiled for a GPU; load the model with bitsandbytes 0.45 or later "
                        "and save it again")  # fmt: skip

    def decode(read: Reader) -> Quantised:
        return with_row_scales(read(codes), read(scale) / np.float32(127), "int8rowf32")

    parts = {codes: Part(), scale: Part()} | ({layout: Part(None)} if layout in stored.dtypes else {})
    return Coded("int8rowf32", shape, parts, decode)


def _four_bits(stored: Stored, name: str, kind: str) -> Coded:
    """The NF4 or FP4 matrix `name` of a bitsandbytes checkpoint, as a Coded.

    The tensor `name` has the codes row by row, two in each byte, the first in the high nibble. quant_map, F32 [16], has
    the value of each code. absmax, F32, has a factor for each block of codes. If the factors are quantised too, absmax
    is U8, and a factor is nested_quant_map[absmax] * nested_absmax + nested_offset, with one nested_absmax per block of
    factors. The block sizes and nested_offset are in the quant_state, a JSON object stored as a tensor.

    Raises PortError if a tensor is missing, or if absmax does not have the size that follows from the quant_state.

    Args:
        stored: contents of the checkpoint's files.
        name: name of the weight.
        kind: "nf4" or "fp4".
    """
    at = name + STATE + kind
    state = json.loads(bytes(stored.read(at)))
    shape, block = tuple(int(d) for d in state.get("shape") or ()), int(state.get("blocksize") or 0)
    nested = [name + ".nested_absmax", name + ".nested_quant_map"] if "nested_blocksize" in state else []
    parts = [name, name + ".absmax", name + ".quant_map", *nested]
    for part in parts:
        if part not in stored.dtypes:
            raise PortError(f"{at} is there, but {part} is not; the file is not complete, download it again")
    blocks = -(-prod(shape) // block) if block else -1
    if len(shape) != 2 or prod(stored.shapes[name + ".absmax"]) != blocks:
        raise PortError(f"{at}: shape {list(shape)} in blocks of {block} does not fit {name}.absmax")
    levels = stored.read(name + ".quant_map").reshape(-1).astype(np.float32)
    group = run_within(shape[1], block) if np.array_equal(levels, np.array(formats.LEVELS[kind], np.float32)) else 0

    def maxima(read: Reader) -> np.ndarray:
        most = read(name + ".absmax").reshape(-1)
        if not nested:
            return most.astype(np.float32)
        each = np.repeat(read(nested[0]).reshape(-1), int(state["nested_blocksize"]))[: len(most)]
        return read(nested[1]).reshape(-1)[most] * each + np.float32(state["nested_offset"])

    def decode(read: Reader) -> Value:
        bytes, most = np.ascontiguousarray(read(name)).view(np.uint8).reshape(-1), maxima(read)
        if group:
            codes = np.stack([bytes >> 4, bytes & 15], axis=1).reshape(shape)  # a multiple of 32, so no half byte
            return Quantised(codes, in_rows(most, block, group, shape), group, levels=formats.LEVELS[kind])
        out: np.ndarray = np.empty(prod(shape), ml_dtypes.bfloat16)
        run = RUN // block * block
        for first in range(0, len(out), run):
            last = min(first + run, len(out))
            own = bytes[first // 2 : -(-last // 2)]
            values = levels[np.stack([own >> 4, own & 15], axis=1).reshape(-1)][: last - first]
            out[first:last] = values * np.repeat(most[first // block : -(-last // block)], block)[: last - first]
        return out.reshape(shape)

    format = f"{kind}g{group}" if group else "bf16"
    return Coded(format, shape, dict.fromkeys([*parts, at], Part(None)), decode, whole=shape[0])
