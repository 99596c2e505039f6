"""Kernels of mixtures of experts: the router's choice, and the grouped products of the experts it chose.

What a core does for the experts hangs on the router's ids. They are put together by expert on the chip; its sequencer
then reads how many rows each expert has, and writes the streams of the products from that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from intaglio.batch import Batch
from intaglio.ops import Experts, Route
from intaglio.silicon import instructions as do
from intaglio.silicon.kernel import Kernel, Ring, Stream
from intaglio.silicon.kernels.board import Board, Coded, deal, kernel, pieces
from intaglio.silicon.kernels.dense import ROWS, Operands, Tensors, by_rows, load, once, tile_of
from intaglio.silicon.memory import Region
from intaglio.silicon.routing import Combine, Group, Score, SparseMix, TopK, Weigh

WIDTH = 512  # columns of a tile of sums
SCALED = (("operand", "a"), ("operand", "b"), ("binary", "*"))


@kernel("route")
def route(b: Board, op: Route, t: Tensors, batch: Batch) -> list[Stream]:
    """Rows of logits in tiles: scores, the best of each row, their weights."""
    logits, weights, ids = b.at(op.logits), b.at(op.weights), b.at(op.ids)
    held: dict[Kernel, list[Region | None]] = {}

    def body(k: Kernel, rings: list[Ring], rows: slice) -> None:
        (bias,) = once(k, b, held, (op.bias,))
        x = load(k, rings[0].next(), logits.part(rows))
        scores = rings[1].next().shaped(x.rows, x.cols)
        taken, out = (ring.next().shaped(x.rows, op.top) for ring in rings[2:4])
        chosen = replace(rings[4].next().shaped(x.rows, op.top), format="i32")
        if op.score == "sparsemixer":
            k.do(SparseMix(ids=chosen, weights=taken, x=x, jitter=op.jitter))
        elif op.score == "chosen":
            k.do(TopK(ids=chosen, taken=scores.shaped(x.rows, op.top), key=x, of=x))
            k.do(Score(dst=taken, x=scores.shaped(x.rows, op.top)))
        else:
            k.do(Score(dst=scores, x=x, score=op.score))  # type: ignore[arg-type]
            key = scores if op.bias or op.group_best > 1 else x  # without a bias logits rank alike
            how: dict[str, Any] = {"groups": op.groups, "kept": op.kept_groups, "group_best": op.group_best}
            k.do(TopK(ids=chosen, taken=taken, key=key, of=scores, bias=bias, **how))
        k.do(Weigh(dst=out, x=taken, normalise=op.normalise, scale=op.scale))
        k.do(do.Store(dst=weights.part(rows), src=out))
        k.do(do.Store(dst=ids.part(rows), src=chosen))

    return by_rows(b, op.site, logits.rows, [logits.cols, logits.cols, op.top, op.top, op.top], body)


class Gathered(Operands):
    """Operands whose rows of x are gathered by number, and may be weighed before they are rounded."""

    def __init__(self, k: Kernel, x: Region, w: Region | Coded, x_format: str, tile: tuple[int, int, int]) -> None:
        super().__init__(k, x, w, x_format, tile)
        self.index, self.places = k.ring(2, 1, tile[0], "i32"), k.ring(2, 1, tile[0], "i32")
        self.weight, self.weighed = k.ring(2, tile[0], 1), k.ring(2, tile[0], self.raw.tiles[0].cols)
        self.rows_of: Region | None = None
        self.times: Region | None = None

    def take(self, numbers: Region, weights: Region | None, places: Region) -> None:
        """Rows `numbers` [1, n] of x are meant from here on, times weights[places] if there are weights [N, 1]."""
        self.rows_of, self.times = load(self.k, self.index.next(), numbers), None
        if weights is not None:
            self.times = self.weight.next().shaped(numbers.cols, 1)
            at = load(self.k, self.places.next(), places)
            self.k.do(do.Gather(dst=self.times, table=weights, index=at))

    def bring(self, rows: slice, depth: slice) -> Region:
        assert self.rows_of is not None
        raw = self.raw.next().shaped(self.rows_of.cols, depth.stop - depth.start)
        self.k.do(do.Gather(dst=raw, table=self.x.part(cols=depth), index=self.rows_of))
        if self.times is None:
            return raw
        out = self.weighed.next().shaped(raw.rows, raw.cols)
        self.k.do(do.Map(dst=out, a=raw, b=self.times, steps=SCALED))
        return out


Block = tuple[int, slice]  # an expert, and rows of the order by expert


def blocks(counts: np.ndarray, rows: int) -> list[Block]:
    """Rows of each expert that has any, `rows` at a time."""
    ends = np.cumsum(counts).tolist()
    return [
        (e, slice(end - n + piece.start, end - n + piece.stop))
        for e, (n, end) in enumerate(zip(counts.tolist(), ends, strict=True))
        for piece in pieces(n, rows)
    ]


def of_expert(e: int, n: int, columns: slice) -> slice:
    """Rows of a stack [E * n, K]: columns of expert e's result."""
    return slice(e * n + columns.start, e * n + columns.stop)


@kernel("experts")
def experts(b: Board, op: Experts, t: Tensors, batch: Batch) -> list[Stream]:
    """Launches, since all rows of one must be there before the next: rows put together by expert; gate and up over
    gathered tokens; down, scattered back to where its rows were routed from, beside zeros where other chips hold the
    expert; and the sums of each token."""
    ids = b.at(op.ids)
    n, (count, inner, _) = ids.rows * ids.cols, map(int, t[op.gate].shape)
    order, tokens = (b.heap.place(1, n, "i32") for _ in range(2))
    counts = b.heap.place(1, count, "i32")
    b.run(grouped(b, op, ids.shaped(1, n), (order, tokens, counts)))
    sizes = b.memory.read(counts)[0]
    middle = b.heap.place(n, inner, "f32")
    b.run(gate_up(b, op, sizes, order, tokens, middle))
    parts = b.heap.place(n, b.at(op.out).cols, "f32")
    b.run(cleared(b, op, order.part(cols=slice(int(sizes.sum()), n)), parts))
    b.run(down(b, op, sizes, order, middle, parts))
    return combine(b, op, parts)


def grouped(b: Board, op: Experts, ids: Region, out: tuple[Region, Region, Region]) -> list[Stream]:
    """Where each expert's rows are."""
    k = Kernel(b.spec, op.site)
    held = [k.tile(r.rows, r.cols, "i32") for r in out]
    mine = load(k, k.tile(1, ids.cols, "i32"), ids)
    order, tokens, counts = held
    of = op.of or counts.cols
    k.do(Group(order=order, tokens=tokens, counts=counts, ids=mine, top=b.at(op.ids).cols, first=op.first, of=of))
    for dst, src in zip(out, held, strict=True):
        k.do(do.Store(dst=dst, src=src))
    return [k.stream()]


def gate_up(b: Board, op: Experts, sizes: np.ndarray, order: Region, tokens: Region, out: Region) -> list[Stream]:
    """out [rows by expert, I] = the gated rows of each expert."""
    x, gate, up = b.at(op.x), b.places[op.gate], b.places[op.up]
    tm, tn, tk = tile_of(b.spec, int(sizes.max()), out.cols, x.cols, op.x_format, gate, True)
    weights = b.at(op.weights).shaped(order.cols, 1) if op.scale_input else None
    how: dict[str, Any] = {n: getattr(op, n) for n in ("activation", "alpha", "limit", "shift")}
    streams = []
    jobs = [(*block, c) for block in blocks(sizes, tm) for c in pieces(out.cols, tn)]
    for k, mine in deal(b.spec, jobs, op.site):
        side, result = Gathered(k, x, gate, op.x_format, (tm, tn, tk)), k.ring(2, tm, tn)
        accs, extra = [k.tile(tm, tn, "f32", "acc") for _ in range(2)], biases(b, k, (op.gate_bias, op.up_bias), tn)
        for e, rows, columns in mine:
            shape, of = (rows.stop - rows.start, columns.stop - columns.start), of_expert(e, out.cols, columns)
            side.take(tokens.part(cols=rows), weights, order.part(cols=rows))
            g, u = (acc.shaped(*shape) for acc in accs)
            side.multiply(rows, [(g, gate, of), (u, up, of)])
            y = result.next().shaped(*shape)
            first, second = (bias_of(b, k, *pair, e, columns) for pair in extra)
            k.do(do.Drain(dst=y, acc=g, up=u, bias=first, up_bias=second, **how))
            k.do(do.Store(dst=out.part(rows, columns), src=y))
        streams.append(k.stream())
    return streams


def cleared(b: Board, op: Experts, places: Region, out: Region) -> list[Stream]:
    """out [places, N] = zeros where experts that other chips hold would add."""
    step = max(1, min(ROWS, b.spec.sram_bytes // (8 * out.cols)))
    streams = []
    for k, mine in deal(b.spec, pieces(places.cols, step), op.site):
        zeros, index = k.tile(step, out.cols), k.ring(2, 1, step, "i32")
        k.do(do.Fill(dst=zeros))
        for piece in mine:
            at = load(k, index.next(), places.part(cols=piece))
            k.do(do.Scatter(table=out, src=zeros.part(slice(0, at.cols)), index=at))
        streams.append(k.stream())
    return streams


def down(b: Board, op: Experts, sizes: np.ndarray, order: Region, x: Region, out: Region) -> list[Stream]:
    """out [places, N] = each row's share of its token's result."""
    w = b.places[op.down]
    tm, tn, tk = tile_of(b.spec, int(sizes.max()), out.cols, x.cols, op.x_format, w, False)
    streams = []
    jobs = [(*block, c) for block in blocks(sizes, tm) for c in pieces(out.cols, tn)]
    for k, mine in deal(b.spec, jobs, op.site):
        side, acc = Operands(k, x, w, op.x_format, (tm, tn, tk)), k.tile(tm, tn, "f32", "acc")
        result, index = k.ring(2, tm, tn), k.ring(2, 1, tm, "i32")
        (extra,) = biases(b, k, (op.down_bias,), tn)
        for e, rows, columns in mine:
            part = acc.shaped(rows.stop - rows.start, columns.stop - columns.start)
            side.multiply(rows, [(part, w, of_expert(e, out.cols, columns))])
            y = result.next().shaped(part.rows, part.cols)
            k.do(do.Drain(dst=y, acc=part, bias=bias_of(b, k, *extra, e, columns)))
            at = load(k, index.next(), order.part(cols=rows))
            k.do(do.Scatter(table=out.part(cols=columns), src=y, index=at))
        streams.append(k.stream())
    return streams


Bias = tuple[Region | None, Region | None]  # [E, n] in HBM, and a tile for a piece of a row


def biases(b: Board, k: Kernel, names: Sequence[str | None], tn: int) -> list[Bias]:
    """Biases by name, each with a tile."""
    return [(r, k.tile(1, tn, r.format) if r else None) for r in map(b.maybe, names)]


def bias_of(b: Board, k: Kernel, bias: Region | None, tile: Region | None, e: int, columns: slice) -> Region | None:
    """Expert e's piece of a bias, loaded."""
    return load(k, tile, bias.part(slice(e, e + 1), columns)) if bias and tile else None


def combine(b: Board, op: Experts, parts: Region) -> list[Stream]:
    """Each token's rows weighed and summed."""
    out, top, residual = b.at(op.out), b.at(op.ids).cols, b.maybe(op.residual)
    width = min(WIDTH, out.cols)
    step = max(1, min(ROWS, b.spec.sram_bytes // (3 * 4 * width * (top + 2))))
    streams = []
    for k, mine in deal(b.spec, [(r, c) for r in pieces(out.rows, step) for c in pieces(out.cols, width)], op.site):
        rows_in, weight, added, result = (k.ring(2, *shape) for shape in (
            (step * top, width), (step, top), (step, width), (step, width)))  # fmt: skip
        for rows, columns in mine:
            n = rows.stop - rows.start
            x = load(k, rows_in.next(), parts.part(slice(rows.start * top, rows.stop * top), columns))
            w = None if op.scale_input else load(k, weight.next(), b.at(op.weights).part(rows))
            r = load(k, added.next(), residual.part(rows, columns)) if residual else None
            y = result.next().shaped(n, x.cols)
            k.do(Combine(dst=y, parts=x, weights=w, residual=r))
            k.do(do.Store(dst=out.part(rows, columns), src=y))
        streams.append(k.stream())
    return streams
