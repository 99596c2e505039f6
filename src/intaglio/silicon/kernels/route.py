"""Chip kernel of the op `route`: the experts of each token, and their weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from intaglio.batch import Batch
from intaglio.ops import Route
from intaglio.silicon import isa
from intaglio.silicon.kernels.chip_memory import ChipMemory, load
from intaglio.silicon.kernels.kernel import Tensors, chip_kernel
from intaglio.silicon.kernels.rows import RowsKernel, by_rows, load_once
from intaglio.silicon.memory import Region
from intaglio.silicon.stream import Ring, Stream, StreamBuilder


@chip_kernel(Route)
@dataclass(frozen=True)
class RouteKernel(RowsKernel):
    """Chip kernel of `route`: for each row of logits the scores, the top-k experts, and their weights."""

    @classmethod
    def streams(cls, mem: ChipMemory, op: Route, t: Tensors, batch: Batch) -> list[Stream]:
        logits, weights, ids = mem.region(op.logits), mem.region(op.weights), mem.region(op.ids)
        held: dict[StreamBuilder, list[Region | None]] = {}

        def body(k: StreamBuilder, rings: list[Ring], rows: slice) -> None:
            (bias,) = load_once(k, mem, held, (op.bias,))
            x = load(k, rings[0].next(), logits.part(rows))
            scores = rings[1].next().shaped(x.rows, x.cols)
            taken, out = (ring.next().shaped(x.rows, op.top) for ring in rings[2:4])
            chosen = replace(rings[4].next().shaped(x.rows, op.top), format="i32")
            if op.score == "sparsemixer":
                k.emit(isa.SparseMix(ids=chosen, weights=taken, x=x, jitter=op.jitter))
            elif op.score == "chosen":
                k.emit(isa.TopK(ids=chosen, selected=scores.shaped(x.rows, op.top), key=x, values=x))
                k.emit(isa.Score(dst=taken, x=scores.shaped(x.rows, op.top)))
            else:
                k.emit(isa.Score(dst=scores, x=x, score=op.score))  # type: ignore[arg-type]
                # Scores are monotonic in the logits, so without a bias or group sums the logits give the same ranking.
                key = scores if op.bias or op.group_best > 1 else x
                how: dict[str, Any] = {"groups": op.groups, "kept_groups": op.kept_groups, "group_best": op.group_best}
                k.emit(isa.TopK(ids=chosen, selected=taken, key=key, values=scores, bias=bias, **how))
            k.emit(isa.Weigh(dst=out, x=taken, normalise=op.normalise, scale=op.scale))
            k.emit(isa.Store(dst=weights.part(rows), src=out))
            k.emit(isa.Store(dst=ids.part(rows), src=chosen))

        return by_rows(mem, op.site, logits.rows, [logits.cols, logits.cols, op.top, op.top, op.top], body)
