"""Checkpoints published with quantised matrices, read as they are: which tensors make one matrix, and its codes.

FP8 (E4M3 with scales by block, row or tensor), MXFP4, compressed-tensors, GPTQ and AWQ. Nothing is rounded here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import lcm
from typing import Any

import ml_dtypes
import numpy as np

from intaglio import formats
from intaglio.formats import ROW, Quantised
from intaglio.models.config import PortError
from intaglio.ops import Value

Reader = Callable[[str], np.ndarray]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column that each nibble of a word holds
ACTIVATION_SCALES = ("input_scale", "k_scale", "v_scale", "output_scale", "weight_shape", "input_zero_point")
TWICE_E2M1 = (np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32) * 2).astype(np.int8)


@dataclass(frozen=True)
class Part:
    """How a tensor of a file lies along a matrix's first dimension: each index of its `axis` is `each` rows there. No
    axis: it is the same for all of them."""

    axis: int | None = 0
    each: int = 1

    def cut(self, x: np.ndarray, rows: slice) -> np.ndarray:
        """What it has of these rows, whose ends are multiples of `each` or the matrix's own."""
        if self.axis is None:
            return x
        return x[(slice(None),) * self.axis + (slice(rows.start // self.each, -(-rows.stop // self.each)),)]


@dataclass(frozen=True)
class Coded:
    """A matrix made of tensors of a file that are not simply its values. `shape` is the matrix's; `decode` makes it, or
    a run of its rows, of the same run of its `parts`; `whole` rows stay together; `turned` as in Quantised. Where its
    columns stand in another order than those of what it multiplies, `order` names the tensor that says which."""

    format: str
    shape: tuple[int, ...]
    parts: Mapping[str, Part]
    decode: Callable[[Reader], Value]
    turned: bool = False
    whole: int = 1
    order: str = ""

    @property
    def step(self) -> int:
        """Runs of rows begin at its multiples."""
        return lcm(self.whole, *(part.each for part in self.parts.values()))

    def read(self, reader: Reader, rows: slice | None = None) -> Value:
        """All of it, or rows of the first dimension: start and stop are multiples of `step`, or the end."""
        run = rows or slice(0, self.shape[0])
        value = self.decode(lambda name: self.parts[name].cut(reader(name), run))
        return replace(value, format=self.format, turned=self.turned) if isinstance(value, Quantised) else value


@dataclass(frozen=True)
class Stored:
    """What a file holds: dtypes and shapes by name, and any tensor, read."""

    dtypes: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    read: Reader


def find_coded(stored: Stored, config: Mapping[str, Any]) -> tuple[dict[str, Coded], set[str]]:
    """The coded matrices by the name they have without quantisation, and the tensors they and their kin take up."""
    q = quantisation(config)
    method = q.get("quant_method", "")
    finder = {"fp8": _fp8, "mxfp4": _mxfp4, "compressed-tensors": _compressed, "gptq": _gptq, "awq": _awq}.get(method)
    if finder is None:
        if q:
            raise PortError(
                f"config.json: quant_method {method!r} is not read; known are fp8, mxfp4, compressed-tensors, gptq, awq"
            )
        return {}, set()
    coded = finder(stored, q)
    taken = {part for c in coded.values() for part in c.parts}
    taken |= {n for n in stored.dtypes if n.rpartition(".")[2] in ACTIVATION_SCALES}
    return coded, taken


def quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """The quantisation settings, wherever a config keeps them."""
    inner = config.get("text_config") or {}
    return dict(
        config.get("quantization_config") or inner.get("quantization_config") or config.get("compression_config") or {}
    )


def _bases(stored: Stored, suffix: str) -> list[str]:
    return [n.removesuffix(suffix) for n in stored.dtypes if n.endswith(suffix)]


def _spread(scales: np.ndarray, shape: tuple[int, ...], format: str) -> tuple[np.ndarray, int]:
    """Scales or zeros of a row format, one a row or one for all, as [..., N, groups], and the group."""
    group = formats.get(format).group_of(shape[-1])
    by_row = (
        scales.astype(np.float32).reshape(*shape[:-1], 1) if scales.size > 1 else scales.astype(np.float32).reshape(1)
    )
    return np.broadcast_to(by_row, (*shape[:-1], -(-shape[-1] // group))).copy(), group


def _fp8(stored: Stored, q: Mapping[str, Any]) -> dict[str, Coded]:
    """weight E4M3 with weight_scale_inv [N / a, K / b] for blocks of a x b, or with weight_scale by row or tensor."""
    rows, columns = q.get("weight_block_size") or (0, 0)
    out = {}
    for name, dtype in stored.dtypes.items():
        if dtype != "F8_E4M3":
            continue
        scale = next((s for s in (name + "_scale_inv", name + "_scale") if s in stored.dtypes), None)
        if scale is None:
            raise PortError(f"{name} is F8_E4M3, but neither {name}_scale_inv nor {name}_scale is there")
        shape = stored.shapes[name]
        blocks = (
            columns > 0
            and len(stored.shapes[scale]) == len(shape)
            and stored.shapes[scale][-1] == -(-shape[-1] // columns)
        )
        if blocks and (columns % 32 or not 32 <= columns <= formats.CHUNK):
            raise PortError(
                f"config.json: weight_block_size={[rows, columns]}; columns are a multiple of 32 in 32..1024"
            )
        format = f"fp8g{columns}" if blocks else "fp8row"

        def decode(read: Reader, name: str = name, scale: str = scale, format: str = format) -> Quantised:
            codes = read(name)
            if format == "fp8row":
                scales, group = _spread(read(scale), codes.shape, format)
                return Quantised(codes, scales, group)
            by_block = read(scale).astype(np.float32)
            scales = np.repeat(by_block, rows, axis=-2)[..., : codes.shape[-2], :]
            return Quantised(codes, scales, columns)

        each = 1 if len(shape) > 2 else rows if blocks else 1
        by = Part(0 if np.prod(stored.shapes[scale]) > 1 else None, each)
        out[name] = Coded(format, shape, {name: Part(), scale: by}, decode)
    return out


def _mxfp4(stored: Stored, q: Mapping[str, Any]) -> dict[str, Coded]:
    """name_blocks U8 [E, N, K / 32, 16], two E2M1 codes a byte, low first; name_scales U8 [E, N, K / 32], powers of
    two with a bias of 127. The matrices they make are published turned: [E, K, N] without quantisation (gpt-oss)."""
    out = {}
    for base in _bases(stored, "_blocks"):
        *lead, groups, _ = stored.shapes[base + "_blocks"]
        if len(lead) != 2:
            raise PortError(f"{base}_blocks is {stored.shapes[base + '_blocks']}; wanted experts, rows, groups, 16")

        def decode(read: Reader, base: str = base) -> Quantised:
            blocks = read(base + "_blocks")
            return _e2m1(blocks.reshape(*blocks.shape[:-2], -1), read(base + "_scales"))

        shape = (*lead[:-1], groups * 32, lead[-1])
        parts = {base + "_blocks": Part(), base + "_scales": Part()}
        out[base] = Coded("mxfp4", shape, parts, decode, turned=True)
    return out


def _mxfp4_rows(stored: Stored) -> dict[str, Coded]:
    """The same of single matrices, not turned: weight_packed U8 [N, K / 2], weight_scale U8 [N, K / 32]."""
    out = {}
    for base in _bases(stored, ".weight_packed"):
        packed, scale = base + ".weight_packed", base + ".weight_scale"
        n, half = stored.shapes[packed]

        def decode(read: Reader, packed: str = packed, scale: str = scale) -> Quantised:
            return _e2m1(read(packed), read(scale))

        out[base + ".weight"] = Coded("mxfp4", (n, half * 2), {packed: Part(), scale: Part()}, decode)
    return out


def _e2m1(bytes: np.ndarray, exponents: np.ndarray) -> Quantised:
    """[.., N, K / 2] pairs of E2M1 codes and [.., N, K / 32] powers of two: whole codes, twice the value."""
    scales = np.ldexp(np.float32(0.5), exponents.astype(np.int32) - 127).astype(np.float32)
    return Quantised(TWICE_E2M1[_nibbles(bytes)], scales, 32)


def _nibbles(x: np.ndarray) -> np.ndarray:
    """[.., n] bytes or words as [.., n * nibbles a word], the lowest first."""
    bytes = np.ascontiguousarray(x).view(np.uint8)
    return np.stack([bytes & 15, bytes >> 4], axis=-1).reshape(*bytes.shape[:-1], -1)


def _fields(x: np.ndarray, bits: int) -> np.ndarray:
    """[.., n] words as [.., n * codes a word] codes of 4 or 8 bits, the lowest first."""
    return _nibbles(x) if bits == 4 else np.ascontiguousarray(x).view(np.uint8)


def _above(x: np.ndarray, bits: int) -> np.ndarray:
    """Codes of compressed-tensors, uint8 from the lowest of so many bits on: fields of words, or signed bytes."""
    return _fields(x, bits) if x.dtype == np.int32 else x.view(np.uint8) + np.uint8(1 << (bits - 1))


def _scaled(kind: str, group: int, dtype: str) -> str:
    """The name of an integer format with scales stored as `dtype`."""
    run = "row" if group == ROW else f"g{group}"
    return kind + run + {"BF16": "", "F16": "f16"}.get(dtype, "f32")


def _compressed(stored: Stored, q: Mapping[str, Any]) -> dict[str, Coded]:
    """compressed-tensors: pack-quantized (words of codes above their offset), int-quantized, float-quantized (as FP8
    otherwise), mxfp4-pack-quantized."""
    out: dict[str, Coded] = {}
    known: dict[bytes, str] = {}
    groups = list((q.get("config_groups") or {}).values())
    settings = [g.get("weights") or {} for g in groups]
    if len({repr(sorted(s.items(), key=str)) for s in settings}) > 1:
        raise PortError("config.json: config_groups quantise weights in several ways; one way for all is read")
    s = settings[0] if settings else {}
    bits, group = int(s.get("num_bits", 8)), int(s.get("group_size") or ROW)
    if s.get("type") == "float" and (bits == 8 or (bits, group) == (4, 32)):
        blocks = {"block": s.get("block_structure"), "group": (1, group)}.get(s.get("strategy", ""))
        return _mxfp4_rows(stored) if bits == 4 else _fp8(stored, {"weight_block_size": blocks})
    if bits not in (4, 8) or s.get("type") == "float" or s.get("strategy") not in ("tensor", "channel", "group"):
        raise PortError(
            f"config.json: weights of {bits} bits, type {s.get('type')!r}, strategy {s.get('strategy')!r} are not read"
        )
    for base in _bases(stored, ".weight_scale"):
        packed = base + ".weight_packed" in stored.dtypes
        codes = base + (".weight_packed" if packed else ".weight")
        zero = base + ".weight_zero_point" if base + ".weight_zero_point" in stored.dtypes else ""
        index = base + ".weight_g_idx"
        order = _order(stored, index, base + ".order", group, known, out)
        n, k = stored.shapes[codes]
        shape = (n, k * 32 // bits) if packed else (n, k)
        if packed and base + ".weight_shape" not in stored.dtypes:
            raise PortError(f"{base}.weight_packed has no weight_shape beside it")
        dtype = stored.dtypes[base + ".weight_scale"]
        uneven = bool(zero) and not s.get("symmetric", True)
        format = _scaled(f"uint{bits}" if uneven else f"int{bits}", group, dtype)

        def decode(read: Reader, base: str = base, codes: str = codes, format: str = format,
                   zero: str = zero if uneven else "", groups: str = index if order else "") -> Quantised:  # fmt: skip
            fmt = formats.get(format)
            own = (_above(read(codes), bits) - np.uint8(-fmt.lowest)).view(fmt.dtype)
            own = np.ascontiguousarray(own[:, by_group(read(groups))]) if groups else own

            def table(x: np.ndarray) -> np.ndarray:
                return _spread(x, own.shape, format)[0] if group == ROW else x.astype(np.float32).reshape(len(own), -1)

            scales, size = table(read(base + ".weight_scale")), fmt.group_of(own.shape[1])
            if not zero:
                return Quantised(own, scales, size)
            held = read(zero)
            zeros = _above(held.T, bits).T[: len(own)] if held.dtype == np.int32 else _above(held, bits)
            return Quantised(own, scales, size, table(zeros))

        lie = {base + ".weight_scale": 1, zero: 32 // bits if zero and stored.dtypes[zero] == "I32" else 1}
        parts = {n: Part(0 if np.prod(stored.shapes[n]) > 1 else None, each) for n, each in lie.items() if n}
        parts |= {codes: Part()} | ({index: Part(None)} if index in stored.dtypes else {})
        out[base + ".weight"] = Coded(format, shape, parts, decode, order=order)
    return out


def _gptq(stored: Stored, q: Mapping[str, Any]) -> dict[str, Coded]:
    """qweight I32 [K / 8, N], codes of 4 bits down K, or [K / 4, N] of 8; qzeros I32 [G, N / 8 or 4], whole words less
    what is one in each field, but in v2; scales F16 [G, N]; g_idx I32 [K], the group of each column: any, with
    act-order."""
    bits = q.get("bits")
    if bits not in (4, 8):
        raise PortError(f"config.json: GPTQ with bits={bits}; 4 and 8 are read")
    each = 32 // bits
    ones = np.uint32(0 if q.get("checkpoint_format") == "gptq_v2" else 0xFFFFFFFF // ((1 << bits) - 1))

    def codes(read: Reader, base: str) -> np.ndarray:
        return _fields(read(base + ".qweight").T, bits)

    def zeros(read: Reader, base: str) -> np.ndarray:
        return _fields(read(base + ".qzeros").view(np.uint32) + ones, bits).T  # a zero of 0 had borrowed from the next

    shapes = {
        b: (stored.shapes[b + ".qweight"][1], stored.shapes[b + ".qweight"][0] * each)
        for b in _bases(stored, ".qweight")
    }
    return _with_zeros(stored, q, bits, shapes, codes, zeros, {".qweight": Part(1), ".qzeros": Part(1, each)})


def _awq(stored: Stored, q: Mapping[str, Any]) -> dict[str, Coded]:
    """qweight I32 [K, N / 8] and qzeros I32 [G, N / 8], whose nibbles hold columns in AWQ_ORDER; scales F16 [G, N]."""
    if q.get("bits", q.get("w_bit")) != 4 or q.get("version", "gemm").lower() != "gemm":
        raise PortError(
            f"config.json: AWQ with bits={q.get('bits')}, version={q.get('version')!r}; 4 and 'gemm' are read"
        )

    def columns(words: np.ndarray) -> np.ndarray:
        nibbles = _nibbles(words).reshape(len(words), -1, 8)
        out = np.empty_like(nibbles)
        out[:, :, list(AWQ_ORDER)] = nibbles
        return out.reshape(len(words), -1).T

    def codes(read: Reader, base: str) -> np.ndarray:
        return columns(read(base + ".qweight"))

    def zeros(read: Reader, base: str) -> np.ndarray:
        return columns(read(base + ".qzeros"))

    shapes = {
        b: (stored.shapes[b + ".qweight"][1] * 8, stored.shapes[b + ".qweight"][0]) for b in _bases(stored, ".qweight")
    }
    return _with_zeros(stored, q, 4, shapes, codes, zeros, {".qweight": Part(1, 8), ".qzeros": Part(1, 8)})


def _with_zeros(
    stored: Stored, q: Mapping[str, Any], bits: int, shapes: Mapping[str, tuple[int, int]],
    codes: Callable[[Reader, str], np.ndarray], zeros: Callable[[Reader, str], np.ndarray], parts: Mapping[str, Part],
) -> dict[str, Coded]:  # fmt: skip
    """Codes from 0 on less a zero, times a scale, in groups along K; group_size=-1: one of each a row."""
    out: dict[str, Coded] = {}
    known: dict[bytes, str] = {}
    for base, shape in shapes.items():
        group = ROW if q.get("group_size") == -1 else -(-shape[1] // stored.shapes[base + ".scales"][0])
        if group != ROW and (group % 32 or group > formats.CHUNK):
            raise PortError(f"{base}.scales: groups of {group}; a multiple of 32 up to {formats.CHUNK} is read")

        order = _order(stored, base + ".g_idx", base + ".order", group, known, out)
        format = _scaled(f"uint{bits}", group, stored.dtypes[base + ".scales"])

        def decode(read: Reader, base: str = base, format: str = format, order: str = order) -> Quantised:
            fmt, own = formats.get(format), codes(read, base)
            own = np.ascontiguousarray(own[:, by_group(read(base + ".g_idx"))] if order else own).view(fmt.dtype)
            tables = [x.astype(np.float32, "C") for x in (read(base + ".scales").T, zeros(read, base))]
            if fmt.group == ROW:
                tables = [_spread(x, own.shape, format)[0] for x in tables]
            return Quantised(own, tables[0], fmt.group_of(own.shape[1]), tables[1])

        lie = {**parts, ".scales": Part(1), ".g_idx": Part(None)}
        held = {base + s: part for s, part in lie.items() if base + s in stored.dtypes}
        out[base + ".weight"] = Coded(format, shape, held, decode, order=order)
    return out


def by_group(groups: np.ndarray) -> np.ndarray:
    """The columns group by group, int32 [K]; within a group as they come."""
    return np.argsort(groups, kind="stable").astype(np.int32)


def _order(stored: Stored, index: str, name: str, group: int, known: dict[bytes, str], out: dict[str, Coded]) -> str:
    """The tensor by which a matrix's columns come together by group, `name` or its like; "" if they are. Matrices of
    equal orders share one: those of one input have been ordered by the same activations. Each has its own, `name`, in
    `out` all the same, for a stack to take one by one."""
    if index not in stored.dtypes:
        return ""
    groups = stored.read(index)
    out[name] = Coded("i32", (len(groups),), {index: Part(None)}, lambda read: by_group(read(index)))
    if not (np.diff(groups) < 0).any():
        return ""
    if not np.array_equal(np.sort(groups), np.arange(len(groups)) // group):
        raise PortError(
            f"{index}: groups of other sizes than {group}, which is what its scales make them, are not read"
        )
    return known.setdefault(groups.tobytes(), name)
