"""Integer matrices of GPTQ, AWQ and AutoRound: codes packed into words.

Value = (code - zero) * scale, groups along K. auto_round() also reads AutoRound's other layouts: as MLX's, or floats
with scales.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from intaglio import formats
from intaglio.formats import ROW, Quantised
from intaglio.models.config import PortError, Settings
from intaglio.models.files.affine import mlx
from intaglio.models.files.coded import (
    Coded,
    Part,
    Reader,
    Stored,
    bases,
    by_group,
    fields,
    find_order,
    scaled_format,
    spread_rows,
)  # fmt: skip
from intaglio.models.files.scaled import scaled

AWQ_ORDERS = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}  # by bits: the column that each code of a word has
GPTQ_BITS = (2, 3, 4, 8)
THREES = (0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D)  # words of zeros of 3 bits, each of them 3: one less than 4
FOURS = (0x24924924, 0x49249249, 0x92492492)  # the same with 4
GPTQMODEL_ONES = (0x24924924, 0x92492492, 0x49249249)  # what GPTQModel takes off the words of zeros
GPTQ_FORMATS = ("gptq", "gptq_v2")
AWQ_VERSIONS = ("gemm", "exllama", "ipex")  # those whose files lie as gemm's

Codes = Callable[[Reader], np.ndarray]


def gptq(stored: Stored, q: Mapping[str, Any], extra: Mapping[str, Any] | None = None) -> dict[str, Coded]:
    """Returns the GPTQ matrices of a checkpoint as {name: Coded}. A Coded decodes a matrix from its stored tensors.

    Each matrix [N, K] has codes of 2, 3, 4 or 8 bits and groups of columns that share scales, G groups in all:

    - qweight I32 [K * bits / 32, N]: the codes, packed along K.
    - qzeros I32 [G, N * bits / 32]: the zero points. Version 1 of the format stores each zero point minus 1, version 2
      stores it unchanged.
    - scales F16 [G, N].
    - g_idx I32 [K]: the group of each column. With act-order the groups are in any order.

    In memory, codes of 2 and 3 bits are stored in 4 bits.

    Args:
        stored: contents of the checkpoint's files.
        q: the quantisation settings; its key `dynamic` overrides bits and group_size for modules whose names match a
            pattern.
        extra: settings of single modules, as in AutoRound's extra_config; None: none.

    Raises PortError for another layout of the stored tensors.
    """
    version = q.get("checkpoint_format") or q.get("format") or "gptq"
    version = "marlin" if q.get("is_marlin_format") else version
    if version not in GPTQ_FORMATS:
        raise PortError(
            f"config.json: GPTQ with checkpoint_format={version!r} is packed for a kernel; "
            f"{' and '.join(GPTQ_FORMATS)} are read: export it again as one of them"
        )
    if (q.get("pack_dtype") or "int32") not in ("int32", "torch.int32"):
        raise PortError(f"config.json: GPTQ with pack_dtype={q.get('pack_dtype')!r}; int32 is read")
    out: dict[str, Coded] = {}
    known: dict[bytes, str] = {}
    for base in bases(stored, ".qweight"):
        own = _override(q.get("dynamic") or {}, base) or _extra(extra or {}, base)
        bits = own.get("bits", q.get("bits"))
        if bits not in GPTQ_BITS:
            raise PortError(f"config.json: GPTQ with bits={bits} for {base}; {', '.join(map(str, GPTQ_BITS))} are read")
        if bits == 3 and version != "gptq_v2":
            _check_three_bits(stored, base, own.get("sym", q.get("sym")))
        ones = np.uint32(0 if version == "gptq_v2" else 0xFFFFFFFF // ((1 << bits) - 1))
        words, n = stored.shapes[base + ".qweight"]
        k = words * 32 // bits

        def codes(read: Reader, base: str = base, bits: int = bits) -> np.ndarray:
            return fields(read(base + ".qweight").T, bits)

        def zeros(read: Reader, base: str = base, bits: int = bits, n: int = n, ones: np.uint32 = ones) -> np.ndarray:
            held = read(base + ".qzeros").view(np.uint32)
            if bits == 3 and ones:
                return np.full((n, len(held)), 4, np.uint8)  # as _check_three_bits() has found
            return fields(held + ones, bits).T if bits != 3 else fields(held, bits, n).T  # a zero of 0 had borrowed

        group = _group(stored, base, k, own.get("group_size", q.get("group_size")))
        parts = {".qweight": Part(1), ".qzeros": Part(1, 32 // bits)}
        _add(stored, base, (n, k), group, bits, codes, zeros, parts, known, out)
    return out


def _check_three_bits(stored: Stored, base: str, symmetric: Any) -> None:
    """Raise PortError unless all zero points of a GPTQ matrix with 3-bit codes are 4, as in symmetric quantisation.

    In the first version of GPTQ's format, programs store changed zero points: AutoGPTQ subtracts 1 from each zero
    point, GPTQModel subtracts constants from whole 32-bit words. With 3 bits these results differ, and a file does not
    say which program wrote it. So this check accepts what either program stores for zero points of 4.

    Args:
        stored: contents of the checkpoint's files.
        base: name of the matrix's module.
        symmetric: the quantisation setting `sym`; False raises PortError.
    """
    words = stored.read(base + ".qzeros").view(np.uint32)
    kinds = [np.resize(np.array(w, np.uint32), words.shape[1]) for w in (THREES, np.subtract(FOURS, GPTQMODEL_ONES))]
    if symmetric is False or not any(np.array_equal(words, np.broadcast_to(kind, words.shape)) for kind in kinds):
        raise PortError(
            f"{base}.qzeros: zeros of 3 bits in the first version of GPTQ's format were saved in two ways, which the "
            "file does not tell apart; save the model again with checkpoint_format='gptq_v2', or quantise with sym=True"
        )


def auto_round(stored: Stored, q: Mapping[str, Any]) -> dict[str, Coded]:
    """Returns the matrices of an AutoRound checkpoint as {name: Coded}.

    A Coded decodes a matrix from its stored tensors. The settings say how codes are packed: as in GPTQ, AWQ or MLX. A
    checkpoint may have floats with scales instead. Raises PortError for another packing.

    Args:
        stored: contents of the checkpoint's files.
        q: the quantisation settings. Its key `extra_config` overrides bits and group_size for a module's name or for
            names that match a pattern.
    """
    named = str(q.get("packing_format") or q.get("backend") or "auto_round:auto_gptq")
    packing = named.removeprefix("auto_round:").removeprefix("auto_")
    extra = q.get("extra_config") or {}
    if any(n.endswith("weight_scale") for n in stored.dtypes):
        return scaled(stored, q)
    if packing.startswith("awq"):
        return awq(stored, q, extra)
    if packing == "mlx":
        return mlx(stored, _with(q, extra))
    if packing not in ("gptq", "gptqmodel", "auto", "gptq_v2"):
        raise PortError(
            f"config.json: quantization_config.packing_format={named!r} (AutoRound) is packed for its own kernels; "
            "export it again with format='auto_gptq' or 'auto_awq', which are read"
        )
    version = "gptq" if packing in ("gptq", "auto") else "gptq_v2"
    return gptq(stored, _with(q, {"checkpoint_format": version, "format": None, "dynamic": None}), extra)


def _with(q: Mapping[str, Any], more: Mapping[str, Any]) -> Settings:
    """Returns a copy of the settings `q` with `more` added; keys of `more` replace keys of `q`.

    Settings record which keys are read. Keys read from the copy are recorded as read from `q`.
    """
    out = Settings({**q, **more})
    out.seen = q.seen if isinstance(q, Settings) else out.seen
    return out


def _override(dynamic: Mapping[str, Any], base: str) -> Mapping[str, Any]:
    """Returns the settings of the first pattern in `dynamic` that matches a module's name; {} if no pattern does.

    Raises PortError if this pattern has the prefix "-:", which says that the module is not quantised. Call it only for
    a module with quantised tensors.

    dynamic: {pattern: settings}, from the quantisation settings. base: the module's name.
    """
    for pattern, settings in dynamic.items():
        if re.match(re.sub(r"^[+-]:", "", pattern), base):
            if pattern.startswith("-:"):
                raise PortError(f"{base}.qweight is there, but dynamic {pattern!r} says that {base} is not quantised")
            return settings or {}
    return {}


def _extra(extra: Mapping[str, Any], base: str) -> Mapping[str, Any]:
    """Returns the settings of one module from AutoRound's extra_config; {} if extra_config has none for the module.

    An entry for the module's name is used first, then the first entry whose pattern matches the name.

    extra: {name or pattern: settings}. base: the module's name.
    """
    if isinstance(extra.get(base), Mapping):
        return extra[base]
    return next((s for pattern, s in extra.items() if isinstance(s, Mapping) and re.search(pattern, base)), {})


def awq(stored: Stored, q: Mapping[str, Any], extra: Mapping[str, Any] | None = None) -> dict[str, Coded]:
    """Returns the AWQ matrices of a checkpoint as {name: Coded}. A Coded decodes a matrix from its stored tensors.

    Each matrix [N, K] has codes of 4 or 8 bits and G groups of columns that share scales. The stored tensors are
    qweight I32 [K, N * bits / 32], qzeros I32 [G, N * bits / 32] and scales F16 [G, N]. AWQ_ORDERS has the order of the
    codes within an int32 word.

    Args:
        stored: contents of the checkpoint's files.
        q: the quantisation settings.
        extra: settings of single modules, as in AutoRound's extra_config; None: none.

    Raises PortError for another layout of the stored tensors.
    """
    usual, version = q.get("bits") or q.get("w_bit"), str(q.get("version") or "gemm")
    if version.lower() not in AWQ_VERSIONS or q.get("zero_point") is False:
        raise PortError(
            f"config.json: AWQ with bits={usual}, version={version!r}, zero_point={q.get('zero_point', True)}; 4 and 8 "
            f"bits, {', '.join(AWQ_VERSIONS)} and zero points are read"
        )

    def columns(words: np.ndarray, bits: int) -> np.ndarray:
        held = fields(words, bits).reshape(len(words), -1, 32 // bits)
        out = np.empty_like(held)
        out[:, :, list(AWQ_ORDERS[bits])] = held
        return out.reshape(len(words), -1).T

    out: dict[str, Coded] = {}
    for base in bases(stored, ".qweight"):
        own = _extra(extra or {}, base)
        bits = own.get("bits", usual)
        if bits not in AWQ_ORDERS:
            raise PortError(f"config.json: AWQ with bits={bits} for {base}; 4 and 8 are read")

        def codes(read: Reader, base: str = base, bits: int = bits) -> np.ndarray:
            return columns(read(base + ".qweight"), bits)

        def zeros(read: Reader, base: str = base, bits: int = bits) -> np.ndarray:
            return columns(read(base + ".qzeros"), bits)

        k, words = stored.shapes[base + ".qweight"]
        group = _group(stored, base, k, own.get("group_size") or q.get("group_size") or q.get("q_group_size"))
        parts = {".qweight": Part(1, 32 // bits), ".qzeros": Part(1, 32 // bits)}
        _add(stored, base, (words * 32 // bits, k), group, bits, codes, zeros, parts, {}, out)
    return out


def _group(stored: Stored, base: str, k: int, named: Any) -> int:
    """Returns the number of columns that share a scale, an int; -1 if each row has a single scale.

    Consecutive columns that share a scale are a group. The number of columns in a group is found in this order:

    1. group_size of the config, if the file has as many scales in a row as this number makes groups.
    2. The size of the largest group in the tensor g_idx, if the file has this tensor.
    3. If there is no g_idx and the config has no group_size: `k` divided by the number of scales in a row.

    Args:
        stored: contents of the checkpoint's files.
        base: the module's name.
        k: number of columns.
        named: group_size of the config; None if it has none.

    Raises PortError in these cases:

    - The file has no scales or no zero points for the module.
    - `named` is neither -1 nor a whole number above 0.
    - The number of groups is not the number of scales in a row.
    - A row has several groups, and their size is above CHUNK or not a multiple of 32.
    """
    for part in (".scales", ".qzeros"):
        if base + part not in stored.shapes:
            raise PortError(f"{base}.qweight has no {part[1:]} beside it; the file is not complete, download it again")
    held = stored.shapes[base + ".scales"][0]
    if named is not None and (isinstance(named, bool) or not isinstance(named, int) or named == 0 or named < -1):
        raise PortError(f"config.json: group_size={named!r}; wanted -1 or a number above 0")
    group: int | None = named
    if group is None and base + ".g_idx" in stored.dtypes:
        group = int(np.bincount(stored.read(base + ".g_idx")).max())
    if group is None:
        group = -(-k // held) if k % held == 0 else 0
    wanted = 1 if group == ROW else -(-k // group) if group else -1
    if wanted != held and base + ".g_idx" in stored.dtypes:
        sizes = np.bincount(stored.read(base + ".g_idx"))
        group, wanted = int(sizes.max()), len(sizes)
    if wanted != held:
        raise PortError(
            f"{base}.scales has {held} groups, but config.json's group_size={named} makes {wanted} of {k} columns; the "
            "config belongs to another version of the model"
        )
    if group != ROW and held == 1 and group >= k:
        return ROW
    if group != ROW and (group % 32 or group > formats.CHUNK):
        raise PortError(f"{base}.scales: groups of {group}; a multiple of 32 up to {formats.CHUNK} is read")
    return group


def _add(
    stored: Stored, base: str, shape: tuple[int, int], group: int, bits: int, codes: Codes, zeros: Codes,
    parts: Mapping[str, Part], known: dict[bytes, str], out: dict[str, Coded],
) -> None:  # fmt: skip
    """Add the Coded of one packed integer matrix to `out`. Decoded values are scale * (code - zero). Returns nothing.

    Codes are unsigned. Groups of columns share a scale and a zero.

    Args:
        stored: contents of the checkpoint's files.
        base: name of the matrix's module.
        shape: shape of the matrix.
        group: number of columns that share a scale and a zero; -1: the whole row.
        bits: bits of a code.
        codes: function that returns the codes. Its argument, a Reader, returns the values of a stored tensor by name.
        zeros: function that returns the zeros, with the same argument.
        parts: the stored tensors that these two functions read. A key is the end of a tensor's name, such as .qweight.
        known: {bytes of a tensor g_idx: name of the column order made from it} of earlier matrices. A new column order
            is added.
        out: {name: Coded} of all matrices and column orders so far. This matrix and its column order are added.

    Raises PortError if groups of a column order have different sizes.
    """
    order = find_order(stored, base + ".g_idx", base + ".order", group, known, out)
    format = scaled_format(f"uint{4 if bits <= 4 else 8}", group, stored.dtypes[base + ".scales"])

    def decode(read: Reader) -> Quantised:
        fmt, own = formats.get(format), codes(read)
        own = np.ascontiguousarray(own[:, by_group(read(base + ".g_idx"))] if order else own).view(fmt.dtype)
        tables = [x.astype(np.float32, "C") for x in (read(base + ".scales").T, zeros(read))]
        if fmt.group == ROW:
            tables = [spread_rows(x, own.shape, format)[0] for x in tables]
        return Quantised(own, tables[0], fmt.group_of(own.shape[1]), tables[1])

    lie = {**parts, ".scales": Part(1), ".g_idx": Part(None)}
    held = {base + s: part for s, part in lie.items() if base + s in stored.dtypes}
    out[base + ".weight"] = Coded(format, shape, held, decode, whole=shape[0] if 32 % bits else 1, order=order)
