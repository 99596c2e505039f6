"""Reads matrices in the formats of compressed-tensors, which may differ between groups of modules.

pack-quantized (codes with an offset, packed into words), int-quantized, float-quantized (stored as other FP8),
mxfp4-pack-quantized, nvfp4-pack-quantized and mxfp8-quantized.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import ml_dtypes
import numpy as np

from intaglio import formats
from intaglio.formats import ROW, Quantised
from intaglio.models.config import PortError
from intaglio.models.files.coded import (
    Coded,
    Part,
    Reader,
    Stored,
    as_scales,
    bases,
    by_group,
    fields,
    find_order,
    scaled_format,
    spread_rows,
    words_of,
)  # fmt: skip
from intaglio.models.files.floats import fp8_matrix, mxfp4_matrix, nvfp4_matrix

E2M3 = np.arange(64, dtype=np.uint8).view(ml_dtypes.float6_e2m3fn).astype(np.float32).astype(formats.E4M3)
SETTINGS = {  # of a config group and of its weights; activations are rounded here by their own values
    "targets", "weights", "input_activations", "output_activations", "format", "num_bits", "type", "symmetric",
    "group_size", "strategy", "block_structure", "dynamic", "actorder", "scale_dtype", "zp_dtype", "observer",
    "observer_kwargs",
}  # fmt: skip
UNREAD_FORMATS = ("sparse", "marlin")  # beginnings of names


@dataclass(frozen=True)
class Scheme:
    """How the weights of some modules are quantised: an entry of config_groups in a compressed-tensors checkpoint.

    Attributes:
        bits: bits of a code.
        type: "int" or "float".
        strategy: which values share a scale: those of a "tensor", a "channel" (row), a "group" or a "block".
        group: number of columns that share a scale; -1: the whole row.
        symmetric: True if codes have no zero points.
        block: (rows, columns) of a block; () without blocks.
    """

    bits: int
    type: str
    strategy: str
    group: int
    symmetric: bool
    block: tuple[int, ...]

    @classmethod
    def read(cls, name: str, group: Mapping[str, Any]) -> Scheme | None:
        """Returns the Scheme of one entry of config_groups; None if the entry does not quantise weights.

        name: name of the entry, for error messages. group: settings of the entry. Raises PortError if the settings are
        not supported.
        """
        at = f"config.json: quantization_config.config_groups.{name}"
        if not isinstance(group, Mapping):
            raise PortError(
                f"{at}: {name} is the name of a preset; save the model again, which writes its settings out"
            )
        w = group.get("weights")
        if not w:
            return None
        odd = [k for k, v in (*group.items(), *w.items()) if k not in SETTINGS and v not in (None, False, {}, [])]
        if odd:
            raise PortError(f"{at}: {odd[0]!r} is a setting that is not known here; it may change what codes mean")
        symmetric = w.get("symmetric")
        s = cls(
            int(w.get("num_bits") or 8), str(w.get("type") or "int"), str(w.get("strategy") or _usual_strategy(w)),
            int(w.get("group_size") or ROW), symmetric is None or bool(symmetric),
            tuple(w.get("block_structure") or ()),
        )  # fmt: skip
        ints = s.type == "int" and 1 <= s.bits <= 8 and s.strategy in ("tensor", "channel", "group")
        floats = s.type == "float" and (
            (s.bits == 8 and s.strategy in ("tensor", "channel", "group", "block"))
            or (s.bits, s.group) in ((4, 32), (4, 16), (6, 32))
        )
        if floats and not s.symmetric:
            raise PortError(f"{at}: floats with zero points (symmetric=false) are not read")
        if not ints and not floats:
            raise PortError(
                f"{at}: weights of {s.bits} bits, type {s.type!r}, strategy {s.strategy!r} are not read; read are "
                "int of up to 8 bits (tensor, channel, group), float of 8 bits (tensor, channel, group, block), MXFP4, "
                "MXFP6 and NVFP4"
            )
        return s


def _usual_strategy(w: Mapping[str, Any]) -> str:
    """Returns the strategy that compressed-tensors uses for an entry of config_groups without the key `strategy`.

    - "block" if the entry has a block_structure.
    - Otherwise "tensor" if it has no group_size, "group" for a group_size above 0, and "channel" for group_size -1.

    w: the entry's settings for weights.
    """
    group = w.get("group_size")
    return "block" if w.get("block_structure") else "tensor" if group is None else "group" if group > 0 else "channel"


def compressed(stored: Stored, q: Mapping[str, Any]) -> dict[str, Coded]:
    """The quantised matrices of a compressed-tensors checkpoint, as {name of the weight: Coded}.

    An entry of config_groups has settings and the modules for which they hold. A module's matrix is decoded by the
    settings of its entry. q: the quantisation settings, of which config_groups is a part. Raises PortError for settings
    that are not supported, and for tensors that do not match the settings.
    """
    _check(q)
    groups = [
        (tuple((isinstance(g, Mapping) and g.get("targets")) or ("Linear",)), Scheme.read(str(name), g))
        for name, g in (q.get("config_groups") or {}).items()
    ]
    out: dict[str, Coded] = {}
    known: dict[bytes, str] = {}
    packed = set(bases(stored, ".weight_packed"))
    for base in sorted({*bases(stored, ".weight_scale"), *packed}):
        s = _scheme_of(base, groups)
        if s is None:
            raise PortError(f"{base}.weight_scale is there, but no entry of config_groups has {base} among its targets")
        name = base + ".weight"
        if s.type == "float" and s.bits == 8:
            block = {"block": s.block, "group": (1, s.group)}.get(s.strategy) or (0, 0)
            if stored.dtypes.get(name) != "F8_E4M3":
                raise PortError(f"{name} is {stored.dtypes.get(name)}; its config group makes it F8_E4M3")
            out[name] = fp8_matrix(stored, name, block)
        elif s.type == "float" and s.group == 16:
            parts = (f"{base}.weight_packed", f"{base}.weight_scale", f"{base}.weight_global_scale")
            out[name] = nvfp4_matrix(stored, *parts, divides=True)
        elif s.type == "float" and s.bits == 6:
            out[name] = _mxfp6_rows(stored, base)
        elif s.type == "float":
            out[name] = _mxfp4_rows(stored, base)
        else:
            out[name] = _ints(stored, base, s, known, out)
    return out


def _check(q: Mapping[str, Any]) -> None:
    """Raise PortError if the quantisation settings `q` change the meaning of codes in a way that is not supported."""
    named = str(q.get("format") or "")
    if named.startswith(UNREAD_FORMATS):
        raise PortError(
            f"config.json: quantization_config.format={named!r} is not read; read are pack-quantized, int-quantized, "
            "float-quantized, mxfp4-pack-quantized, nvfp4-pack-quantized and mxfp8-quantized"
        )
    sparsity = q.get("sparsity_config") or {}
    if (sparsity.get("format") or "dense") != "dense":
        raise PortError(
            f"config.json: quantization_config.sparsity_config.format={sparsity.get('format')!r}: sparse weights are "
            "not read; take the version without sparsity"
        )
    if q.get("transform_config"):
        raise PortError(
            "config.json: quantization_config.transform_config: rotations of activations (QuIP, SpinQuant) are not "
            "computed"
        )


def _scheme_of(base: str, groups: Sequence[tuple[tuple[str, ...], Scheme | None]]) -> Scheme | None:
    """Find the Scheme of the module `base`; None if no entry of `groups` quantises the module.

    An entry that names the module itself comes first, then an entry with a pattern (re:...) that fits the module, then
    an entry that names a class such as Linear.

    groups: a pair (targets, Scheme) for each entry. Targets are names, patterns or classes. The Scheme is None if the
    entry quantises nothing.
    """

    def fits(target: str, rank: int) -> bool:
        if target.startswith("re:"):
            return rank == 1 and re.match(target.removeprefix("re:"), base) is not None
        return target == base if rank == 0 else rank == 2 and "." not in target and target[:1].isupper()

    ranked = (s for rank in range(3) for targets, s in groups for t in targets if s and fits(t, rank))
    return next(ranked, None)


def _mxfp4_rows(stored: Stored, base: str) -> Coded:
    packed, scale = base + ".weight_packed", base + ".weight_scale"
    if packed not in stored.dtypes or scale not in stored.dtypes:
        raise PortError(f"{base}: wanted weight_packed and weight_scale, as MXFP4 has them")
    return mxfp4_matrix(stored, packed, scale)


def _mxfp6_rows(stored: Stored, base: str) -> Coded:
    """Returns a Coded that decodes the MXFP6 matrix of the module `base` to FP8 (E4M3), with 32 values per scale.

    The conversion is exact, because E4M3 can represent every E2M3 value. The checkpoint stores the matrix as two
    tensors. weight_packed, U8 [N, 3 K / 4], has four E2M3 codes in each three bytes. weight_scale, U8 [N, K / 32], has
    the scales as exponents of 2.
    """
    packed, scale = base + ".weight_packed", base + ".weight_scale"
    n, bytes = stored.shapes[packed]

    def decode(read: Reader) -> Quantised:
        return Quantised(E2M3[fields(read(packed), 6)], as_scales(read(scale)), 32)

    return Coded("fp8g32", (n, bytes * 4 // 3), {packed: Part(), scale: Part()}, decode)


def _above(x: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Returns integer codes as unsigned numbers: signed code + 2^(bits - 1), uint8 [..., count].

    Args:
        x: the stored codes. Either signed bytes, to which 2^(bits - 1) is added here; or 32-bit words with packed codes
            to which it was added before they were stored.
        bits: bits of a code.
        count: number of codes in a row; not used for bytes.
    """
    return fields(x, bits, count) if x.dtype == np.int32 else x.view(np.uint8) + np.uint8(1 << (bits - 1))


def _ints(stored: Stored, base: str, s: Scheme, known: dict[bytes, str], out: dict[str, Coded]) -> Coded:
    """The integer matrix of the module `base`, as a Coded.

    Its codes are stored as packed words (weight_packed) or signed bytes (weight). In memory, codes of up to 4 bits take
    4 bits, others 8. Raises PortError if the tensors do not fit the scheme.

    Args:
        stored: contents of the checkpoint's files.
        base: name of the module.
        s: how the matrix is quantised: bits, group size and symmetry.
        known: {bytes of a tensor g_idx: name of the column order made from it} of all matrices so far. A new column
            order of this matrix is added.
        out: {name: Coded} of all matrices and column orders of the checkpoint so far. If this matrix has a tensor
            g_idx, its column order is added.
    """
    bits, group = s.bits, s.group
    packed = base + ".weight_packed" in stored.dtypes
    codes = base + (".weight_packed" if packed else ".weight")
    if stored.dtypes.get(codes) != ("I32" if packed else "I8"):
        raise PortError(
            f"{codes} is {stored.dtypes.get(codes, 'missing')}; its config group makes it {'I32' if packed else 'I8'}. "
            "A checkpoint whose weights are not compressed yet is to be saved with save_compressed=True"
        )
    zero = base + ".weight_zero_point" if base + ".weight_zero_point" in stored.dtypes else ""
    index, scale = base + ".weight_g_idx", base + ".weight_scale"
    n, k = shape = stored.shapes[codes]
    if packed:
        if base + ".weight_shape" not in stored.dtypes:
            raise PortError(f"{base}.weight_packed has no weight_shape beside it")
        n, k = shape = tuple(int(d) for d in stored.read(base + ".weight_shape").reshape(-1))
        if stored.shapes[codes] not in [(n, words) for words in words_of(k, bits)]:
            raise PortError(f"{codes} is {list(stored.shapes[codes])}; {list(shape)} codes of {bits} bits do not fit")
    wanted = -(-shape[1] // group) if group != ROW else 1
    held = stored.shapes[scale]
    if prod(held) not in ((n * wanted,) if group != ROW else (1, n)):
        raise PortError(f"{scale} is {list(held)}; {n} rows in groups of {group} make it {[n, wanted]}")
    order = find_order(stored, index, base + ".order", group, known, out)
    uneven = bool(zero) and not s.symmetric
    format = scaled_format(f"{'u' if uneven else ''}int{4 if bits <= 4 else 8}", group, stored.dtypes[scale])

    def decode(read: Reader) -> Quantised:
        fmt = formats.get(format)
        own = (_above(read(codes), bits, k) - np.uint8(0 if uneven else 1 << (bits - 1))).view(fmt.dtype)
        own = np.ascontiguousarray(own[:, by_group(read(index))]) if order else own

        def table(x: np.ndarray) -> np.ndarray:
            return spread_rows(x, own.shape, format)[0] if group == ROW else x.astype(np.float32).reshape(len(own), -1)

        scales, size = table(read(scale)), fmt.group_of(own.shape[1])
        if not uneven:
            return Quantised(own, scales, size)
        held = read(zero)
        zeros = _above(held.T, bits, len(own)).T if held.dtype == np.int32 else _above(held, bits, held.shape[-1])
        return Quantised(own, scales, size, table(zeros))

    words = bool(zero) and stored.dtypes[zero] == "I32"  # which hold zeros of whole runs of rows
    lie = {scale: 1, zero: 32 // bits if words else 1}
    parts = {n: Part(0 if prod(stored.shapes[n]) > 1 else None, each) for n, each in lie.items() if n}
    parts |= {codes: Part()} | ({index: Part(None)} if index in stored.dtypes else {})
    return Coded(format, shape, parts, decode, whole=n if words and 32 % bits else 1, order=order)
