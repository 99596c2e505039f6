"""Kernels of the dense ops: products, norms, rope, maps, and rows in and out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from intaglio import formats
from intaglio.batch import Batch, Sampling
from intaglio.chips import ChipSpec
from intaglio.ops import Embed, HeadLinear, Linear, Map, Norm, Permute, Rope, Sample, Select, Tensor
from intaglio.ops.elementwise import postfix
from intaglio.silicon import instructions as do
from intaglio.silicon.kernel import Kernel, Ring, Stream
from intaglio.silicon.kernels.board import Board, Coded, deal, kernel, pieces
from intaglio.silicon.kernels.linear import best_tile, step_depth
from intaglio.silicon.memory import Region

ROWS = 16  # of an elementwise tile; fewer where a row is long
Tensors = Mapping[str, Tensor]


def load(k: Kernel, tile: Region, src: Region) -> Region:
    """Load `src` into the front of `tile`; returns that part of it."""
    part = tile.shaped(src.rows, src.cols)
    k.do(do.Load(dst=part, src=src))
    return part


class Operands:
    """The two sides of a product on one core: rings of tiles of x and of w, and how a step brings them in."""

    def __init__(self, k: Kernel, x: Region, w: Region | Coded, x_format: str, tile: tuple[int, int, int]) -> None:
        tm, tn, tk = tile
        self.k, self.x, self.tk = k, x, tk
        self.whole = x_format == "fp8row"  # one scale a row: the row must be there before it is rounded
        depth = x.cols if self.whole else tk
        self.raw = k.ring(2, tm, depth, "f32")
        self.rounded = k.ring(2, tm, depth, ARRAY_FORMAT.get(x_format, x_format)) if x_format != "f32" else None
        self.columns = k.ring(4, tn, tk, codes_of(w).format)
        self.scales = k.ring(2, tm, 1, "f32") if x_format in ARRAY_FORMAT else None
        self.column_scales = k.ring(4, 1, tn, w.turned.format) if isinstance(w, Coded) else None

    def bring(self, rows: slice, depth: slice) -> Region:
        """A piece of x as it stands."""
        return load(self.k, self.raw.next(), self.x.part(rows, depth))

    def rows(self, rows: slice, depth: slice) -> tuple[Region, Region | None]:
        """A piece of x, rounded as the op says, and its scales."""
        raw = self.bring(rows, depth)
        if self.rounded is None:
            return raw, None
        part = self.rounded.next().shaped(raw.rows, raw.cols)
        if self.scales is None:
            self.k.do(do.Convert(dst=part, src=raw))
            return part, None
        scale = self.scales.next().shaped(raw.rows, 1)
        self.k.do(do.Quantise(codes=part, scale=scale, x=raw))
        return part, scale

    def weights(self, w: Region | Coded, columns: slice, depth: slice) -> tuple[Region, Region | None]:
        """This step's piece of w, and its scales."""
        if not isinstance(w, Coded):
            return load(self.k, self.columns.next(), w.part(columns, depth)), None
        assert self.column_scales is not None
        codes = load(self.k, self.columns.next(), w.codes.part(columns, depth))
        group = depth.start // w.group
        return codes, load(self.k, self.column_scales.next(), w.turned.part(slice(group, group + 1), columns))

    def multiply(self, rows: slice, sides: Sequence[tuple[Region, Region | Coded, slice]]) -> None:
        """acc = x[rows] times w[columns] for each (acc, w, columns): all of K, in steps."""
        for depth, groups in depths(sides[0][1], self.x.cols, self.tk, self.whole):
            a, row_scale = self.rows(rows, depth)
            for group in groups:
                part = a.part(cols=slice(group.start - depth.start, group.stop - depth.start))
                for acc, w, columns in sides:
                    v, col_scale = self.weights(w, columns, group)
                    how: dict[str, Any] = {
                        "row_scale": row_scale,
                        "col_scale": col_scale,
                        "accumulate": group.start > 0,
                    }
                    self.k.do(do.Matmul(acc=acc, a=part, b=v, **how))


ARRAY_FORMAT = {"int8": "int8", "fp8row": "e4m3"}  # what x with scales is multiplied as


def codes_of(w: Region | Coded) -> Region:
    return w.codes if isinstance(w, Coded) else w


def depths(w: Region | Coded, k: int, tk: int, whole: bool) -> list[tuple[slice, list[slice]]]:
    """K in steps: the piece of x that comes in, and the pieces of it that are multiplied, one for each group of w.
    Groups below SPAN share scales of x, so as many as make SPAN come in together."""
    if not isinstance(w, Coded):
        inner = [slice(d.start, d.stop) for d in pieces(k, tk)]
        return [(slice(0, k), inner)] if whole else [(d, [d]) for d in inner]
    outer = [slice(0, k)] if whole else pieces(k, w.group * -(-formats.SPAN // w.group))
    return [(d, [slice(d.start + g.start, d.start + g.stop) for g in pieces(d.stop - d.start, w.group)]) for d in outer]


def tile_of(
    spec: ChipSpec, m: int, n: int, k: int, x_format: str, w: Region | Coded, glu: bool
) -> tuple[int, int, int]:
    """Rows and columns of a tile of the result, and the depth of a step, for which SRAM has room beside all rings."""
    tm, tn = best_tile(spec, max(1, m), n, k, ARRAY_FORMAT.get(x_format, x_format), codes_of(w).format, glu)
    tk = w.group * -(-formats.SPAN // w.group) if isinstance(w, Coded) else min(k, step_depth(spec, 32))
    while tm > 1 and tm * 10 * (k if x_format == "fp8row" else tk) + tn * 16 * tk > spec.sram_bytes // 2:
        tm //= 2
    return tm, tn, tk


@kernel("linear")
def linear(b: Board, op: Linear, t: Tensors, batch: Batch) -> list[Stream]:
    """Tiles of the result dealt to cores; each runs over K through rings of both operands, then drains with everything
    that is to be done to it. A GLU pair keeps two accumulators."""
    x, out, w = b.at(op.x), b.at(op.out), b.places[op.w]
    half = out.cols if op.glu else 0
    tm, tn, tk = tile_of(b.spec, x.rows, out.cols, x.cols, op.x_format, w, op.glu)
    jobs = [(r, c) for r in pieces(x.rows, tm) for c in pieces(out.cols, tn)]
    streams = []
    for k, mine in deal(b.spec, jobs, op.site):
        side = Operands(k, x, w, op.x_format, (tm, tn, tk))
        gate, up = k.tile(tm, tn, "f32", "acc"), k.tile(tm, tn, "f32", "acc") if half else None
        extra = [k.tile(1, tn, b.at(op.bias).format) if op.bias else None for _ in range(2)]
        residual, result = k.tile(tm, tn, "f32") if op.residual else None, k.ring(2, tm, tn, "f32")
        for rows, columns in mine:
            shape = (rows.stop - rows.start, columns.stop - columns.start)
            accs = [gate.shaped(*shape), *([up.shaped(*shape)] if up else [])]
            side.multiply(
                rows,
                [(acc, w, slice(columns.start + j * half, columns.stop + j * half)) for j, acc in enumerate(accs)],
            )
            drain(k, b, op, rows, columns, accs, extra, residual, result.next().shaped(*shape), half)
        streams.append(k.stream())
    return streams


def drain(
    k: Kernel, b: Board, op: Linear, rows: slice, columns: slice, accs: list[Region], extra: Sequence[Region | None],
    residual: Region | None, result: Region, half: int,
) -> None:  # fmt: skip
    """What stands after the product, and the store."""
    biases: list[Region | None] = [None, None]
    for j, tile in enumerate(extra[: len(accs)]):
        if tile is not None and op.bias is not None:
            of = slice(columns.start + j * half, columns.stop + j * half)
            raw = load(k, tile, b.at(op.bias).part(slice(0, 1), of))
            biases[j] = raw
    added = None
    if residual is not None and op.residual is not None:
        added = load(k, residual, b.at(op.residual).part(rows, columns))
    k.do(
        do.Drain(
            dst=result, acc=accs[0], up=accs[1] if half else None, bias=biases[0], up_bias=biases[1], residual=added,
            scale=op.scale, activation=op.activation,  # type: ignore[arg-type]
        )
    )  # fmt: skip
    k.do(do.Store(dst=b.at(op.out).part(rows, columns), src=result))


@kernel("head_linear")
def head_linear(b: Board, op: HeadLinear, t: Tensors, batch: Batch) -> list[Stream]:
    """Tiles of each head's own product, as in linear; the columns of a head beyond K pass through SRAM."""
    x, out, w = b.at(op.x), b.at(op.out), b.at(op.w)
    heads, n, depth = (int(d) for d in t[op.w].shape)
    wide, narrow = x.cols // heads, out.cols // heads
    tm, tn = best_tile(b.spec, max(1, x.rows), n, depth, "f32", w.format, False)
    tk = min(depth, step_depth(b.spec, 32))
    jobs = [(h, r, c) for h in range(heads) for r in pieces(x.rows, tm) for c in [*pieces(n, tn), None]]
    streams = []
    for k, mine in deal(b.spec, jobs if wide > depth else [j for j in jobs if j[2]], op.site):
        a, v = k.ring(2, tm, tk), k.ring(4, tn, tk, w.format)
        acc, result, rest = k.tile(tm, tn, "f32", "acc"), k.ring(2, tm, tn), k.ring(2, tm, max(1, wide - depth))
        for h, rows, columns in mine:
            if columns is None:
                passed = load(k, rest.next(), x.part(rows, slice(h * wide + depth, (h + 1) * wide)))
                k.do(do.Store(dst=out.part(rows, slice(h * narrow + n, (h + 1) * narrow)), src=passed))
                continue
            shape = (rows.stop - rows.start, columns.stop - columns.start)
            for d in pieces(depth, tk):
                left = load(k, a.next(), x.part(rows, slice(h * wide + d.start, h * wide + d.stop)))
                right = load(k, v.next(), w.part(slice(h * n + columns.start, h * n + columns.stop), d))
                k.do(do.Matmul(acc=acc.shaped(*shape), a=left, b=right, accumulate=d.start > 0))
            y = result.next().shaped(*shape)
            k.do(do.Drain(dst=y, acc=acc.shaped(*shape)))
            k.do(do.Store(dst=out.part(rows, slice(h * narrow + columns.start, h * narrow + columns.stop)), src=y))
        streams.append(k.stream())
    return streams


def by_rows(b: Board, site: str, rows: int, widths: Sequence[int], body: Any) -> list[Stream]:
    """Rows dealt to cores in tiles; `body(kernel, rings, rows)` does one, with a ring of f32 tiles for each width."""
    step = max(1, min(ROWS, b.spec.sram_bytes // (3 * 4 * max(1, sum(widths)))))
    streams = []
    for k, mine in deal(b.spec, pieces(rows, step), site):
        rings = [k.ring(2, step, width) for width in widths]
        for piece in mine:
            body(k, rings, piece)
        streams.append(k.stream())
    return streams


def once(
    k: Kernel, b: Board, held: dict[Kernel, list[Region | None]], names: Sequence[str | None]
) -> list[Region | None]:
    """Small operands that a core loads once for all its tiles."""
    if k not in held:
        regions = [b.maybe(name) for name in names]
        held[k] = [r and load(k, k.tile(r.rows, r.cols, r.format), r) for r in regions]
    return held[k]


@kernel("norm")
def norm(b: Board, op: Norm, t: Tensors, batch: Batch) -> list[Stream]:
    x, out = b.at(op.x), b.at(op.out)
    held: dict[Kernel, list[Region | None]] = {}

    def body(k: Kernel, rings: list[Ring], rows: slice) -> None:
        weight, bias = once(k, b, held, (op.weight, op.bias))
        a = load(k, rings[0].next(), x.part(rows))
        residual = load(k, rings[2].next(), b.at(op.residual).part(rows)) if op.residual else None
        y = rings[1].next().shaped(a.rows, a.cols)
        how: dict[str, Any] = {"norm": op.norm, "eps": op.eps, "offset": op.offset, "span": op.group or x.cols}
        k.do(do.Norm(dst=y, x=a, weight=weight, bias=bias, residual=residual, **how))
        k.do(do.Store(dst=out.part(rows), src=y))

    return by_rows(b, op.site, x.rows, [x.cols, x.cols, x.cols if op.residual else 1], body)


@kernel("rope")
def rope(b: Board, op: Rope, t: Tensors, batch: Batch) -> list[Stream]:
    x, out = b.at(op.x), b.at(op.out)
    held: dict[Kernel, list[Region | None]] = {}

    def body(k: Kernel, rings: list[Ring], rows: slice) -> None:
        positions, frequencies = once(k, b, held, (op.positions, op.frequencies))
        assert positions is not None and frequencies is not None
        a = load(k, rings[0].next(), x.part(rows))
        y = rings[1].next().shaped(a.rows, a.cols)
        how: dict[str, Any] = {"head_dim": op.head_dim, "style": op.style, "factor": op.factor, "trailing": op.trailing}
        k.do(do.Rope(dst=y, x=a, positions=positions.part(cols=rows), frequencies=frequencies, **how))
        k.do(do.Store(dst=out.part(rows), src=y))

    return by_rows(b, op.site, x.rows, [x.cols, x.cols], body)


@kernel("map")
def elementwise(b: Board, op: Map, t: Tensors, batch: Batch) -> list[Stream]:
    out = b.at(op.out)
    given = [name for name in ("a", "b", "c") if getattr(op, name) is not None]
    widths = [*(b.at(getattr(op, name)).cols for name in given), out.cols]

    def body(k: Kernel, rings: list[Ring], rows: slice) -> None:
        parts: dict[str, Any] = {
            n: load(k, ring.next(), b.at(getattr(op, n)).part(rows)) for n, ring in zip(given, rings, strict=False)
        }
        y = rings[-1].next().shaped(rows.stop - rows.start, out.cols)
        k.do(do.Map(dst=y, steps=postfix(op.expr), **parts))
        k.do(do.Store(dst=out.part(rows), src=y))

    return by_rows(b, op.site, out.rows, widths, body)


@kernel("embed")
def embed(b: Board, op: Embed, t: Tensors, batch: Batch) -> list[Stream]:
    """Rows gathered in their own format, widened, scaled."""
    ids, out, w = b.at(op.tokens), b.at(op.out), b.places[op.w]
    codes = w.codes if isinstance(w, Coded) else w
    held: dict[Kernel, list[Region]] = {}

    def body(k: Kernel, rings: list[Ring], rows: slice) -> None:
        n = rows.stop - rows.start
        if k not in held:
            scales = w.scales.cols if isinstance(w, Coded) else 1
            held[k] = [
                k.tile(1, ROWS, "i32"),
                k.tile(ROWS, codes.cols, codes.format),
                k.tile(ROWS, scales, w.scales.format if isinstance(w, Coded) else "f32"),
            ]
        index, raw, scale = held[k]
        index = load(k, index, ids.part(cols=rows))
        raw, y, z = (r.shaped(n, codes.cols) for r in (raw, rings[0].next(), rings[1].next()))
        k.do(do.Gather(dst=raw, table=codes, index=index))
        if isinstance(w, Coded):
            scale = scale.shaped(n, w.scales.cols)
            k.do(do.Gather(dst=scale, table=w.scales, index=index))
            k.do(do.Dequantise(dst=y, codes=raw, scales=scale, group=w.group))
        else:
            k.do(do.Convert(dst=y, src=raw))
        k.do(do.Map(dst=z, a=y, steps=(("operand", "a"), ("number", float(np.float32(op.scale))), ("binary", "*"))))
        k.do(do.Store(dst=out.part(rows), src=z))

    return by_rows(b, op.site, out.rows, [out.cols, out.cols], body)


@kernel("select")
def select(b: Board, op: Select, t: Tensors, batch: Batch) -> list[Stream]:
    x, ids, out = b.at(op.x), b.at(op.rows), b.at(op.out)
    held: dict[Kernel, Region] = {}

    def body(k: Kernel, rings: list[Ring], rows: slice) -> None:
        index = load(k, held.setdefault(k, k.tile(1, ROWS, "i32")), ids.part(cols=rows))
        y = rings[0].next().shaped(rows.stop - rows.start, x.cols)
        k.do(do.Gather(dst=y, table=x, index=index))
        k.do(do.Store(dst=out.part(rows), src=y))

    return by_rows(b, op.site, out.rows, [out.cols], body)


@kernel("permute")
def permute(b: Board, op: Permute, t: Tensors, batch: Batch) -> list[Stream]:
    x, out = b.at(op.x), b.at(op.out)
    held: dict[Kernel, list[Region | None]] = {}

    def body(k: Kernel, rings: list[Ring], rows: slice) -> None:
        (order,) = once(k, b, held, (op.order,))
        assert order
        a = load(k, rings[0].next(), x.part(rows))
        y = rings[1].next().shaped(a.rows, a.cols)
        k.do(do.Permute(dst=y, src=a, order=order))
        k.do(do.Store(dst=out.part(rows), src=y))

    return by_rows(b, op.site, out.rows, [x.cols, x.cols], body)


def tables(b: Board, k: Kernel, rows: Sequence[Sampling]) -> Callable[[Sampling], dict[str, Region]]:
    """What loads a row's edits and mask, which the runtime writes beside the batch, into tiles for the largest."""
    widest = max((len(s.edits.ids) for s in rows if s.edits), default=0)
    rings = {n: k.ring(2, 1, widest, f) for n, f in (("ids", "i32"), ("factors", "f32"), ("terms", "f32")) if widest}
    words = max((len(s.mask) for s in rows if s.mask is not None), default=0)
    mask = k.ring(2, 1, words, "i32") if words else None

    def changed(how: Sampling) -> dict[str, Region]:
        out = {}
        if how.edits is not None and len(how.edits.ids):
            values = (b.table(how.edits.ids), b.numbers(how.edits.scale), b.numbers(how.edits.add))
            out = {n: load(k, ring.next(), v) for (n, ring), v in zip(rings.items(), values, strict=True)}
        if how.mask is not None and mask is not None:
            out["mask"] = load(k, mask.next(), b.table(how.mask.view(np.int32)))
        return out

    return changed


@kernel("sample")
def sample(b: Board, op: Sample, t: Tensors, batch: Batch) -> list[Stream]:
    logits, tokens, logprobs = b.at(op.logits), b.at(op.tokens), b.at(op.logprobs)
    position = (batch.positions[batch.rows] + 1).tolist()
    streams = []
    for k, mine in deal(b.spec, range(logits.rows), op.site):
        row, token, logprob = k.ring(2, 1, logits.cols), k.ring(2, 1, 1, "i32"), k.ring(2, 1, 1)
        changed = tables(b, k, [batch.sampling[r] for r in mine])
        for r in mine:
            how, x, y, z = batch.sampling[r], row.next(), token.next(), logprob.next()
            load(k, x, logits.part(slice(r, r + 1)))
            fields: dict[str, Any] = {n: getattr(how, n) for n in ("temperature", "top_k", "top_p", "min_p", "seed")}
            k.do(do.Sample(token=y, logprob=z, logits=x, position=position[r], **(fields | changed(how))))
            k.do(do.Store(dst=tokens.part(cols=slice(r, r + 1)), src=y))
            k.do(do.Store(dst=logprobs.part(cols=slice(r, r + 1)), src=z))
        streams.append(k.stream())
    return streams
