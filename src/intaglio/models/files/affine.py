"""Reads quantised matrices whose zero points are not whole numbers: those of MLX (Metal) and HQQ.

value = code * scale + bias in MLX, (code - zero) * scale in HQQ. Both become affine4gN or affine8gN, which hold codes,
scales and minima (-bias, or zero * scale) without rounding. Matrices of HQQ whose groups are not runs of a row become
bf16, rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import ml_dtypes
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
    fields,
    in_rows,
    run_within,
    scaled_format,
)  # fmt: skip
from intaglio.ops import Value

MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}  # names of Mixtral's projections
MODES = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}  # MLX's: bits and group size
HQQ_PACKING = {  # by the name of the packing: bits, type of a word, codes a word
    "8bit_u8": (8, np.uint8, 1), "4bit_u8": (4, np.uint8, 2), "2bit_u8": (2, np.uint8, 4), "1bit_u8": (1, np.uint8, 8),
    "3bit_32": (3, np.int32, 10),
}  # fmt: skip
HQQ_STATE = (
    "W_q", "scale", "zero", "nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype", "view_as_float",
    "quant_scale", "quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config",
    "channel_wise", "optimize", "round_zero",
)  # fmt: skip


def mlx(stored: Stored, q: Mapping[str, Any]) -> dict[str, Coded]:
    """The quantised matrices of an MLX checkpoint, including embedding tables, as {name of the weight: Coded}.

    A matrix is stored as three tensors: weight, U32 [N, K bits / 32], scales and biases, [N, K / group]. In the modes
    mxfp4, nvfp4 and mxfp8, scales are U8 and there are no biases. All matrices keep their codes; in memory, codes of 2
    and 3 bits take 4 bits, codes of 5 and 6 bits take 8.

    stored: contents of the checkpoint's files. q: the quantisation settings; the settings of a single module are in a
    table under the module's name. Raises PortError for other types or sizes, and for an unknown mode.
    """
    bias = "qbiases" if any(n.endswith(".qbiases") for n in stored.dtypes) else "biases"
    out: dict[str, Coded] = {}
    for base in bases(stored, ".scales"):
        own = q.get(base)
        own = own if isinstance(own, Mapping) else {}
        mode = str(own.get("mode") or q.get("mode") or "affine")
        usual = MODES.get(mode, (4, 64))
        bits, group = (int(own.get(k) or q.get(k) or u) for k, u in zip(("bits", "group_size"), usual, strict=True))
        if mode != "affine" and mode not in MODES:
            raise PortError(f"config.json: quantization.mode={mode!r}; known are affine, {', '.join(MODES)}")
        if stored.dtypes.get(base + ".weight") != "U32":
            raise PortError(f"{base}.weight is {stored.dtypes.get(base + '.weight', 'missing')}; MLX has it in U32")
        *lead, n, words = stored.shapes[base + ".weight"]
        k = words * 32 // bits
        held = stored.shapes[base + ".scales"]
        if held != (*lead, n, k // group) or len(lead) > 1:
            raise PortError(
                f"{base}.scales is {list(held)} beside {base}.weight {list(stored.shapes[base + '.weight'])}; codes of "
                f"{bits} bits in groups of {group} make it {[*lead, n, k // group]}"
            )
        make = _affine_rows if mode == "affine" else _mlx_floats
        whole = make(stored, base, (n, k), bits, group, f"{base}.{bias}")
        out |= _experts(base, lead[0], whole) if lead else {base + ".weight": whole}
    return out


def _experts(base: str, count: int, whole: Coded) -> dict[str, Coded]:
    """The matrices of a stack of experts in an MLX checkpoint, one per expert, as {name in transformers: Coded}.

    base: name of the stack's module, which must be in `switch_mlp`. count: number of experts. whole: a Coded that
    decodes the matrix of one expert. Raises PortError for a stack that is not in `switch_mlp`.
    """
    block, _, own = base.partition(".switch_mlp.")
    if not own:
        raise PortError(f"{base}.weight is a stack of {count} matrices; only those of switch_mlp are read")
    own = MIXTRAL.get(own, own) if block.endswith("block_sparse_moe") else own
    parts = dict.fromkeys(whole.parts, Part(None))

    def of(e: int) -> Coded:
        def decode(read: Reader) -> Value:
            return whole.decode(lambda name: read(name)[e])

        return Coded(whole.format, whole.shape, parts, decode, whole=whole.shape[0])

    return {f"{block}.experts.{e}.{own}.weight": of(e) for e in range(count)}


def _affine_rows(stored: Stored, base: str, shape: tuple[int, int], bits: int, group: int, bias: str) -> Coded:
    codes, scale = base + ".weight", base + ".scales"
    if stored.shapes.get(bias) != stored.shapes[scale]:
        raise PortError(f"{bias} is {list(stored.shapes.get(bias, ()))}; its scales are {list(stored.shapes[scale])}")

    if group % 32 or group > formats.CHUNK:
        raise PortError(f"{scale}: groups of {group}; a multiple of 32 up to {formats.CHUNK} is read")
    format = scaled_format(_family(bits), group, stored.dtypes[scale])

    def decode(read: Reader) -> Quantised:
        own = fields(read(codes), bits, shape[1]).view(formats.get(format).dtype)
        return Quantised(own, read(scale).astype(np.float32), group, minima=-read(bias).astype(np.float32))

    return Coded(format, shape, {codes: Part(), scale: Part(), bias: Part()}, decode)


def _family(bits: int) -> str:
    """The family of affine formats that holds codes of `bits` bits (1 to 8): "affine4" or "affine8"."""
    return "affine4" if bits <= 4 else "affine8"


def _mlx_floats(stored: Stored, base: str, shape: tuple[int, int], bits: int, group: int, bias: str) -> Coded:
    """The matrix of one MLX module with floating-point codes, as a Coded.

    The format is MXFP4, MXFP8, or NVFP4 without a scale for the whole tensor. The tensor BASE.weight has the codes
    packed in 32-bit words, BASE.scales the scales in U8.

    Args:
        stored: contents of the checkpoint's files.
        base: name of the module.
        shape: (rows, columns) of the matrix.
        bits: bits of a code: 8 for MXFP8, else 4.
        group: number of codes that share a scale: 16 for NVFP4, else 32.
        bias: not used; functions for other formats have the same arguments.
    """
    codes, scale = base + ".weight", base + ".scales"
    parts, e4m3 = {codes: Part(), scale: Part()}, ml_dtypes.float8_e4m3fn
    if bits == 8:
        return Coded(
            "fp8g32", shape, parts,
            lambda read: Quantised(fields(read(codes), 8).view(e4m3), as_scales(read(scale)), group),
        )  # fmt: skip
    if group == 16:
        one = np.ones(1, np.float32)
        return Coded("nvfp4", shape, parts, lambda read: e2m1_factored(read(codes), read(scale).view(e4m3), one))
    return Coded("mxfp4", shape, parts, lambda read: e2m1(read(codes), read(scale)))


def hqq(stored: Stored, q: Mapping[str, Any]) -> dict[str, Coded]:
    """The quantised matrices of an HQQ checkpoint, as {name of the weight: Coded}; {} if there are none.

    A value is (code - zero) * scale. With HQQ's axis 1, the values that share a scale (a group) lie along a row. A
    matrix of axis 1 stays quantised if it can be read in groups of 32 or more values that divide its columns evenly;
    HQQ's own groups may be divided for that. All other matrices become bf16 when read.

    HQQ packs the codes into the words of the tensor W_q. It divides the rows of its table of codes into n equal runs,
    where n is the number of codes in a word. A word has one code from each run; the code from the first run has the
    highest bits.

    stored: contents of the checkpoint's files. q: the quantisation settings; not read. Raises PortError for scales that
    are quantised too, for missing tensors, and for an unknown packing.
    """
    out = {}
    for base in bases(stored, ".W_q"):
        at = {name: f"{base}.{name}" for name in HQQ_STATE if f"{base}.{name}" in stored.dtypes}
        lacking = [name for name in ("scale", "zero", "shape", "packing") if name not in at]
        if lacking:
            why = "its scales are quantised too, or the state is not complete"
            raise PortError(f"{base}.W_q has no {lacking[0]} beside it: {why}; save it with quant_scale=False")
        packing = "".join(map(chr, stored.read(at["packing"]).reshape(-1)))
        if packing not in HQQ_PACKING:
            raise PortError(f"{at['packing']} is {packing!r}; known are {', '.join(HQQ_PACKING)}")
        shape = tuple(int(d) for d in stored.read(at["shape"]).reshape(-1))
        out[base + ".weight"] = _hqq_matrix(stored, shape, packing, at)
    return out


def _hqq_matrix(stored: Stored, shape: tuple[int, ...], packing: str, at: Mapping[str, str]) -> Coded:
    bits, word, each = HQQ_PACKING[packing]
    held = stored.shapes[at["scale"]]
    block = prod(shape) // max(1, held[0]) if len(held) == 2 and held[1] == 1 else 0  # codes with one scale, in a row
    group = run_within(shape[-1], block)
    # In f32 the product of a zero and a scale, of 11 bits each, is exact.
    format = f"{_family(bits)}g{group}f32" if group and len(shape) == 2 else "bf16"

    def decode(read: Reader) -> Value:
        words = np.ascontiguousarray(read(at["W_q"]))
        words = words.view(word) if words.dtype != word else words
        runs = [words >> (bits * (each - 1 - i)) & ((1 << bits) - 1) for i in range(each)]
        codes = np.concatenate(runs)[: prod(shape) // words.shape[1]]
        zeros, scales = (read(at[name]).astype(np.float32) for name in ("zero", "scale"))
        if format == "bf16":
            return ((codes.astype(np.float32) - zeros) * scales).reshape(shape).astype(ml_dtypes.bfloat16)
        own = codes.astype(np.uint8).reshape(shape).view(formats.get(format).dtype)
        scales, minima = (in_rows(x, block, group, shape) for x in (scales, zeros * scales))
        return Quantised(own, scales, group, minima=minima)

    return Coded(format, shape, dict.fromkeys(at.values(), Part(None)), decode, whole=shape[0])
