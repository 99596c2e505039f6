"""llama.cpp's block formats: the number format that each becomes, and how its bytes are read (ggml-quants.c).

Most are kept exactly, as codes and scales: in a format of their own (q4_k, q5_k, q6_k, mxfp4), or in a wider one that
holds their codes (int8g32f16 for Q5_0 and IQ4_NL, int8g32f32 for IQ4_XS and most of IQ1 to IQ3, q6_k for Q3_K,
affine8g32f16 for Q5_1). Types with minima of 16 values, or with scales of 16 values beside codes of more than 6 bits,
become bf16, rounded to nearest: within 2^-8 of each value.

Functions named after a type decode its blocks, uint8 [rows, blocks, bytes of a block].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from intaglio.formats import Quantised
from intaglio.models.config import PortError
from intaglio.models.files.coded import TWICE_E2M1
from intaglio.ops import Value

PLAIN = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
BF16 = np.dtype(ml_dtypes.bfloat16)
RUN = 1 << 20  # values dequantised at a time
IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)  # kvalues_iq4nl


def _halves(blocks: np.ndarray, at: int) -> np.ndarray:
    """The f16 number that each block has at byte `at`, as float32 [rows, blocks, 1]."""
    return np.ascontiguousarray(blocks[..., at : at + 2]).view(np.float16).astype(np.float32)


def _words(blocks: np.ndarray, dtype: type) -> np.ndarray:
    return np.ascontiguousarray(blocks).view(dtype)


def _joined(blocks: np.ndarray) -> np.ndarray:
    return blocks.reshape(len(blocks), -1)


def _nibbles(bytes: np.ndarray) -> np.ndarray:
    """The two 4-bit codes of each byte in `bytes` [..., n], as an array [..., 2 n].

    First come the low nibbles of all bytes, then the high nibbles.
    """
    return np.concatenate([bytes & 15, bytes >> 4], axis=-1)


def _q8_0(b: np.ndarray) -> Quantised:
    """The matrix of Q8_0 blocks, as a Quantised.

    b: uint8 [rows, blocks, bytes of a block]; a block has 32 values. Its bytes: an f16 scale; 32 codes, signed bytes.
    """
    return Quantised(_joined(_words(b[..., 2:], np.int8)), _joined(_halves(b, 0)), 32)


def _q4_0(b: np.ndarray) -> Quantised:
    """The matrix of Q4_0 blocks, as a Quantised.

    b: uint8 [rows, blocks, bytes of a block]; a block has 32 values. Its bytes: an f16 scale; 16 bytes with two 4-bit
    codes each. A code is stored as code + 8.
    """
    return Quantised(_joined(_nibbles(b[..., 2:]).astype(np.int8) - np.int8(8)), _joined(_halves(b, 0)), 32)


def _q5_0(b: np.ndarray) -> Quantised:
    """The matrix of Q5_0 blocks, as a Quantised.

    b: uint8 [rows, blocks, bytes of a block]; a block has 32 values. Its bytes: an f16 scale; 4 bytes with the fifth
    bits of the codes; 16 bytes with their low 4 bits. A code is stored as code + 16.
    """
    fifth = np.unpackbits(b[..., 2:6], axis=-1, bitorder="little")
    codes = (_nibbles(b[..., 6:]) | fifth << 4).astype(np.int8) - np.int8(16)
    return Quantised(_joined(codes), _joined(_halves(b, 0)), 32)


def _q4_1(b: np.ndarray) -> Quantised:
    """The matrix of Q4_1 blocks, as a Quantised.

    b: uint8 [rows, blocks, bytes of a block]; a block has 32 values. Its bytes: an f16 scale; an f16 bias; 16 bytes
    with two 4-bit codes each. A value is code * scale + bias.
    """
    codes = _joined(_nibbles(b[..., 4:])).view(np.int8)
    return Quantised(codes, _joined(_halves(b, 0)), 32, minima=-_joined(_halves(b, 2)))


def _q5_1(b: np.ndarray) -> Quantised:
    """The matrix of Q5_1 blocks, as a Quantised.

    b: uint8 [rows, blocks, bytes of a block]; a block has 32 values. Its bytes: an f16 scale; an f16 bias; 4 bytes with
    the fifth bits of the codes; 16 bytes with their low 4 bits. A value is code * scale + bias.
    """
    fifth = np.unpackbits(b[..., 4:8], axis=-1, bitorder="little")
    codes = _joined(_nibbles(b[..., 8:]) | fifth << 4)
    return Quantised(codes, _joined(_halves(b, 0)), 32, minima=-_joined(_halves(b, 2)))


def _iq4_nl(b: np.ndarray) -> Quantised:
    """The matrix of IQ4_NL blocks, as a Quantised.

    b: uint8 [rows, blocks, bytes of a block]; a block has 32 values. Its bytes: an f16 scale; 16 bytes with two 4-bit
    indices each. A value is scale * IQ4[index], where IQ4 is a codebook.
    """
    return Quantised(_joined(IQ4[_nibbles(b[..., 2:])]), _joined(_halves(b, 0)), 32)


def _mxfp4(b: np.ndarray) -> Quantised:
    """The matrix of MXFP4 blocks, as a Quantised.

    b: uint8 [rows, blocks, bytes of a block]; a block has 32 values. Its bytes: the scale, a power of two, as an
    exponent with bias 127; 16 bytes with two E2M1 codes each.
    """
    scales = np.ldexp(np.float32(0.5), b[..., :1].astype(np.int32) - 127).astype(np.float32)
    return Quantised(_joined(TWICE_E2M1[_nibbles(b[..., 1:])]), _joined(scales), 32)


def _iq4_xs(b: np.ndarray) -> Quantised:
    """The matrix of IQ4_XS blocks, as a Quantised.

    b: uint8 [rows, blocks, bytes of a block]; a block has 256 values, in 8 runs of 32. A value is d * (s - 32) *
    IQ4[index], where s is the 6-bit scale of its run and IQ4 a codebook. The bytes of a block: d in f16; 2 bytes with
    the high 2 bits of the 8 scales; 4 bytes with their low 4 bits; 128 bytes with two 4-bit indices each, run by run.
    """
    high = _words(b[..., 2:4], np.uint16) >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    low = np.stack([b[..., 4:8] & 15, b[..., 4:8] >> 4], axis=-1).reshape(*b.shape[:-1], 8)
    sizes = (low | high << 4).astype(np.float32) - np.float32(32)
    codes = IQ4[_nibbles(b[..., 8:].reshape(*b.shape[:-1], 8, 16))]
    return Quantised(_joined(codes), _joined(_halves(b, 0) * sizes), 32)


def _q4_k(b: np.ndarray) -> Quantised:
    """The matrix of Q4_K blocks, as a Quantised.

    b: uint8 [rows, blocks, bytes of a block]; a block has 256 values, in 8 runs of 32. A value is d * scale * code -
    dmin * minimum. The bytes of a block: d and dmin in f16; 12 bytes with a 6-bit scale and a 6-bit minimum for each
    run; 128 bytes with two 4-bit codes each.
    """
    low, mid, high = (b[..., 4 + 4 * i : 8 + 4 * i] for i in range(3))
    scales = np.concatenate([low & 63, (high & 15) | ((low >> 2) & 48)], axis=-1).astype(np.float32)
    minima = np.concatenate([mid & 63, (high >> 4) | ((mid >> 2) & 48)], axis=-1).astype(np.float32)
    bytes = b[..., 16:].reshape(*b.shape[:-1], 4, 1, 32)
    codes = np.concatenate([bytes & 15, bytes >> 4], axis=-2).astype(np.int8)
    d, least = _halves(b, 0), _halves(b, 2)
    return Quantised(
        _joined(codes), _joined(d * scales), 32, minima=_joined(least * minima), units=_joined(d),
        low_units=_joined(least)
    )  # fmt: skip


def _q5_k(b: np.ndarray) -> Quantised:
    """The matrix of Q5_K blocks, as a Quantised.

    b: uint8 [rows, blocks, bytes of a block]; a block has 256 values, in 8 runs of 32. The bytes of a block are those
    of Q4_K, with 32 more bytes before the 4-bit codes: the fifth bits of the codes. Bit i of each of these bytes
    belongs to run i.
    """
    lines = _q4_k(np.concatenate([b[..., :16], b[..., 48:]], axis=-1))
    fifth = b[..., None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return replace(lines, codes=lines.codes | _joined(fifth << 4).view(np.int8))


def _q6_k(b: np.ndarray) -> Quantised:
    """The matrix of Q6_K blocks, as a Quantised.

    b: uint8 [rows, blocks, bytes of a block]; a block has 256 values, in 16 runs of 16. A value is d * scale * code.
    The bytes of a block: 128 bytes with the low 4 bits of the codes; 64 bytes with their high 2 bits; 16 scales, signed
    bytes; d in f16. A code is stored as code + 32.
    """
    low = b[..., :128].reshape(*b.shape[:-1], 2, 1, 64) >> np.array([[0], [4]], np.uint8) & 15
    high = b[..., 128:192].reshape(*b.shape[:-1], 2, 1, 32) >> np.array([[0], [2], [4], [6]], np.uint8) & 3
    codes = (low.reshape(*b.shape[:-1], 8, 32) | high.reshape(*b.shape[:-1], 8, 32) << 4).astype(np.int8) - np.int8(32)
    scales = _words(b[..., 192:208], np.int8).astype(np.float32)
    d = _halves(b, 208)
    return Quantised(_joined(codes), _joined(d * scales), 16, units=_joined(d))


def _q3_k(b: np.ndarray) -> Quantised:
    """The matrix of Q3_K blocks, as a Quantised.

    b: uint8 [rows, blocks, bytes of a block]; a block has 256 values, in 16 runs of 16. A value is d * scale * code.
    The bytes of a block: 32 bytes with the high bits of the 3-bit codes, where bit i belongs to the i-th 32 values; 64
    bytes with their low 2 bits; 12 bytes with the 6-bit scales; d in f16. A code is stored as code + 4, a scale as
    scale + 32.
    """
    bits = b[..., None, :32] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    pairs = b[..., 32:96].reshape(*b.shape[:-1], 2, 1, 32) >> np.array([[0], [2], [4], [6]], np.uint8) & 3
    codes = (pairs.reshape(*b.shape[:-1], 8, 32) | bits << 2).astype(np.int8) - np.int8(4)
    low = np.concatenate([b[..., 96:104] & 15, b[..., 96:104] >> 4], axis=-1)
    high = (b[..., None, 104:108] >> np.array([[0], [2], [4], [6]], np.uint8) & 3).reshape(*b.shape[:-1], 16)
    d = _halves(b, 108)
    scales = d * ((low | high << 4).astype(np.float32) - np.float32(32))
    return Quantised(_joined(codes), _joined(scales), 16, units=_joined(d))


def _by_scales(kind: str, scales: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], Quantised]:
    """Make the function that decodes blocks of a codebook type, such as IQ3_S, to a Quantised [rows, values].

    The function takes blocks, uint8 [rows, blocks, bytes of a block]. It raises PortError if the gguf library is not
    installed.

    A value is a whole-number code times a scale; each run of 32 values has one scale. The gguf library computes the
    values. Dividing these by the scales gives the codes. Both steps are exact in float32, because a scale has up to 16
    significant bits and a code up to 6.

    Args:
        kind: the GGUF type.
        scales: function from blocks to the scales of their runs, [rows, blocks, runs].
    """

    def decode(b: np.ndarray) -> Quantised:
        own = _joined(scales(b))
        values = _dequantised(kind, b)
        each = np.repeat(own, 32, axis=1)
        codes = np.divide(values, each, out=np.zeros_like(values), where=each != 0)
        return Quantised(np.rint(codes).astype(np.int8), own, 32)

    return decode


def _iq2_xxs(b: np.ndarray) -> np.ndarray:
    """The scales in IQ2_XXS blocks, one for each run of 32 values: float32 [rows, blocks, 8].

    A scale is d * (1/2 + s) / 4. d is the f16 number at the beginning of a block. s is the top 4 bits of the second
    32-bit word of a run. b: blocks, uint8 [rows, blocks, bytes of a block].
    """
    s = _words(b[..., 2:], np.uint32)[..., 1::2] >> 28
    return _halves(b, 0) * (np.float32(0.5) + s.astype(np.float32)) * np.float32(0.25)


def _iq3_xxs(b: np.ndarray) -> np.ndarray:
    """The scales in IQ3_XXS blocks, one for each run of 32 values: float32 [rows, blocks, 8].

    A scale is d * (1/2 + s) / 2. d is the f16 number at the beginning of a block. s is the top 4 bits of a run's 32-bit
    word; these words follow the 64 bytes of indices. b: blocks, uint8 [rows, blocks, bytes of a block].
    """
    s = _words(b[..., 66:], np.uint32) >> 28
    return _halves(b, 0) * (np.float32(0.5) + s.astype(np.float32)) * np.float32(0.5)


def _iq3_s(b: np.ndarray) -> np.ndarray:
    """The scales in IQ3_S blocks, one for each run of 32 values: float32 [rows, blocks, 8].

    A scale is d * (1 + 2 s). d is the f16 number at the beginning of a block. s is a run's 4 bits in the last 4 bytes
    of the block. b: blocks, uint8 [rows, blocks, bytes of a block].
    """
    s = np.stack([b[..., 106:110] & 15, b[..., 106:110] >> 4], axis=-1).reshape(*b.shape[:-1], 8)
    return _halves(b, 0) * (1 + 2 * s.astype(np.float32))


def _iq1_s(b: np.ndarray) -> np.ndarray:
    """The scales in IQ1_S blocks, one for each run of 32 values: float32 [rows, blocks, 8].

    A scale is d * (1 + 2 s) / 8. d is the f16 number at the beginning of a block. s is bits 12 to 14 of a run's 16-bit
    word. All values of a run are whole multiples of its scale. b: blocks, uint8 [rows, blocks, bytes of a block].
    """
    s = _words(b[..., 34:], np.uint16) >> 12 & 7
    return _halves(b, 0) * (1 + 2 * s.astype(np.float32)) * np.float32(0.125)


def _dequantised(kind: str, b: np.ndarray) -> np.ndarray:
    """The values of GGUF blocks, decoded by the gguf library: float32 [rows, columns].

    kind: the GGUF type. b: blocks, uint8 [rows, blocks, bytes of a block]. Raises PortError if the library is not
    installed.
    """
    try:
        import gguf
    except ImportError:
        raise PortError(f"matrices of type {kind} need the gguf library: pip install 'intaglio[gguf]'") from None
    return np.asarray(gguf.quants.dequantize(_joined(b), gguf.GGMLQuantizationType[kind]), np.float32)


def _rounded(kind: str) -> Callable[[np.ndarray], np.ndarray]:
    """Make the function that decodes blocks of a GGUF type, such as Q2_K, to bf16 [rows, columns].

    The function takes blocks, uint8 [rows, blocks, bytes of a block]. It decodes a few rows at a time to save memory.
    It raises PortError if the gguf library is not installed. kind: the GGUF type.
    """

    def decode(b: np.ndarray) -> np.ndarray:
        size = BLOCKS[kind].values * b.shape[1]
        out, step = np.empty((len(b), size), BF16), max(1, RUN // size)
        for at in range(0, len(b), step):
            out[at : at + step] = _dequantised(kind, b[at : at + step])
        return out

    return decode


@dataclass(frozen=True)
class Blocks:
    """Description of a GGUF block format, with the function that decodes its blocks.

    Attributes:
        format: number format of decoded matrices. bf16 rounds the values; all other formats keep them exactly.
        values: number of values in a block.
        bytes: number of bytes in a block.
        decode: function that decodes blocks, uint8 [rows, blocks, bytes of a block], to a matrix: a Quantised, or a
            bf16 array.
    """

    format: str
    values: int
    bytes: int
    decode: Callable[[np.ndarray], Value]


BLOCKS: dict[str, Blocks] = {
    "Q8_0": Blocks("int8g32f16", 32, 34, _q8_0),
    "Q4_0": Blocks("int4g32f16", 32, 18, _q4_0),
    "Q5_0": Blocks("int8g32f16", 32, 22, _q5_0),
    "Q4_1": Blocks("affine4g32f16", 32, 20, _q4_1),
    "Q5_1": Blocks("affine8g32f16", 32, 24, _q5_1),
    "Q2_K": Blocks("bf16", 256, 84, _rounded("Q2_K")),
    "Q3_K": Blocks("q6_k", 256, 110, _q3_k),
    "Q4_K": Blocks("q4_k", 256, 144, _q4_k),
    "Q5_K": Blocks("q5_k", 256, 176, _q5_k),
    "Q6_K": Blocks("q6_k", 256, 210, _q6_k),
    "IQ4_NL": Blocks("int8g32f16", 32, 18, _iq4_nl),
    "IQ4_XS": Blocks("int8g32f32", 256, 136, _iq4_xs),
    "IQ3_S": Blocks("int8g32f32", 256, 110, _by_scales("IQ3_S", _iq3_s)),
    "IQ3_XXS": Blocks("int8g32f32", 256, 98, _by_scales("IQ3_XXS", _iq3_xxs)),
    "IQ2_XXS": Blocks("int8g32f32", 256, 66, _by_scales("IQ2_XXS", _iq2_xxs)),
    "IQ2_XS": Blocks("bf16", 256, 74, _rounded("IQ2_XS")),
    "IQ2_S": Blocks("bf16", 256, 82, _rounded("IQ2_S")),
    "IQ1_S": Blocks("int8g32f32", 256, 50, _by_scales("IQ1_S", _iq1_s)),
    "IQ1_M": Blocks("bf16", 256, 56, _rounded("IQ1_M")),
    "MXFP4": Blocks("mxfp4", 32, 17, _mxfp4),
}


def known_types() -> str:
    """The names of all GGUF types that can be read, as text for error messages."""
    return ", ".join((*PLAIN, *BLOCKS))


def decode_rows(kind: str, raw: np.ndarray) -> Value:
    """Decode rows of a block-quantised GGUF matrix. Returns a Quantised, or a bf16 array [rows, values].

    The result is an array for the types that BLOCKS lists with the format bf16, such as Q2_K, because no quantised
    format here can hold their values. Raises KeyError for a type that is not in BLOCKS.

    Args:
        kind: the GGUF type.
        raw: uint8 [rows, bytes of a row].
    """
    own = BLOCKS[kind]
    return own.decode(raw.reshape(len(raw), -1, own.bytes))


def as_float(x: Any) -> np.ndarray:
    """The values of an array, or of a Quantised, as a float32 array."""
    return x.rows(slice(None)) if isinstance(x, Quantised) else np.asarray(x, np.float32)
