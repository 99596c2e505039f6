"""Chip kernel of the op `route`: the experts of each token, and their weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

from intaglio.batch import Batch
from intaglio.chips import ChipSpec, KernelLibrary, Target
from intaglio.ops import Route
from intaglio.silicon import isa
from intaglio.silicon.isa.cycles import vector_cycles
from intaglio.silicon.isa.routing import rounds_cycles
from intaglio.silicon.kernels.chip_memory import ChipMemory, load
from intaglio.silicon.kernels.kernel import Tensors, chip_kernel
from intaglio.silicon.kernels.rows import RowsKernel, by_jobs, load_indices, load_once, vector_bytes
from intaglio.silicon.memory import Region
from intaglio.silicon.sizes import BatchSizes
from intaglio.silicon.stream import Ring, Stream, StreamBuilder
from intaglio.silicon.timing import Timing


@chip_kernel(Route)
@dataclass(frozen=True)
class RouteKernel(RowsKernel):
    """Chip kernel of `route`. For each row of logits it computes the top-k experts and their weights.

    Attributes:
        searches: how many times a row is searched for its largest value. It is `top`, or `top` + op.group_best if
            experts are in groups, since groups are rated by op.group_best searches of the row.
        top, score, groups, kept_groups, normalise: the fields of the same names of the op.
        biased: True if the op adds a bias to the scores by which experts are chosen.
        factored: True if the op multiplies the weight of each chosen expert by a factor of the expert (op.factors).
        listed: True if a table lists the experts of each token. Then no row is searched.
    """

    top: int = 1
    score: str = "softmax"
    searches: int = 1
    groups: int = 0
    kept_groups: int = 0
    normalise: bool = False
    biased: bool = False
    factored: bool = False
    listed: bool = False

    @classmethod
    def of(cls, op: Route, t: Tensors) -> Self:  # type: ignore[override]
        rows, width = t[op.logits].shape
        vectors = sum(vector_bytes(t[name]) for name in (op.bias, op.factors) if name)
        searches = op.top + op.group_best * (op.groups > 0)
        how = op.top, op.score, searches, op.groups, op.kept_groups, op.normalise, bool(op.bias), bool(op.factors)
        return cls(rows, int(width), 2, float(vectors), *how, bool(op.table))

    def columns(self) -> tuple[int, ...]:
        return self.width, self.width, self.top, self.top, self.top

    def in_runs(self) -> bool:
        return self.listed

    def held_bytes(self) -> float:
        return super().held_bytes() + 4.0 * self.top * self.listed

    def cycles(self, chip: ChipSpec, n: int) -> float:
        weigh = float(vector_cycles(chip, (1 + 2 * self.normalise + self.factored) * self.top))
        if self.listed:
            return weigh + float(vector_cycles(chip, 4 * n + 2 * self.top, n))
        if self.score == "sparsemixer":
            return weigh + float(rounds_cycles(chip, n, self.top, 1) + self.top * vector_cycles(chip, 5 * n, n))
        scored = self.top if self.score == "chosen" else n
        found = rounds_cycles(chip, n, self.searches, 1)
        if self.groups:
            found += rounds_cycles(chip, self.groups, self.kept_groups, 1)
        biased = n * self.biased
        return weigh + float(found + vector_cycles(chip, 4 * scored + biased, scored))

    def load_bytes(self, library: KernelLibrary) -> float:
        return float(self.width * library.activation_bytes) + 4.0 * self.top * self.listed

    def store_bytes(self, library: KernelLibrary) -> float:
        return 8.0 * self.top  # ids and weights, four bytes each

    def wait_s(self, target: Target) -> float:
        return target.chip.constants.hbm_latency_s * self.listed

    def time(self, target: Target, sizes: BatchSizes, prefetched: bool) -> Timing:
        """Returns the Timing (modelled time and HBM bytes) of the op in a step.

        It is the time of a kernel that processes independent rows (RowsKernel). If a table lists the experts of each
        token (`listed`), these are added:

        - seconds: HBM's latency, since a core needs the ids of its tokens before it can load their rows of the table.
        - HBM bytes: the table's rows, on a chip with an L2. Without an L2 they are counted already.
        """
        timing, chip = super().time(target, sizes, prefetched), target.chip
        if not (self.listed and timing.seconds):
            return timing
        hbm = timing.hbm_bytes + 4.0 * self.top * sizes.rows_of(self.rows) * (chip.l2_bytes > 0)
        seconds = timing.seconds + chip.constants.hbm_latency_s
        return replace(timing, seconds=seconds, hbm_bytes=hbm, busy={**timing.busy, "HBM": hbm / chip.hbm_rate})

    @classmethod
    def streams(cls, mem: ChipMemory, op: Route, t: Tensors, batch: Batch) -> list[Stream]:
        logits, weights, ids = mem.region(op.logits), mem.region(op.weights), mem.region(op.ids)
        kernel = cls.of(op, t)
        held: dict[StreamBuilder, list[Region | None]] = {}
        ones: dict[StreamBuilder, Region] = {}
        indices: dict[StreamBuilder, tuple[Region, int]] = {}
        tokens = mem.put_indices(batch.tokens) if op.table else None

        def body(k: StreamBuilder, rings: list[Ring], rows: slice, columns: slice) -> None:
            bias, factors = load_once(k, mem, held, (op.bias, op.factors))
            if tokens is not None and op.table:
                if k not in ones:
                    ones[k] = k.tile(1, op.top)
                    k.emit(isa.Fill(dst=ones[k], value=1.0))
                token = load_indices(k, mem, indices, tokens, rows.start)
            x = load(k, rings[0].next(), logits.part(rows))
            scores = rings[1].next().shaped(x.rows, x.cols)
            taken, out = (ring.next().shaped(x.rows, op.top) for ring in rings[2:4])
            chosen = replace(rings[4].next().shaped(x.rows, op.top), format="i32")
            if tokens is not None and op.table:
                k.emit(isa.Gather(dst=chosen, table=mem.region(op.table), index=token))
                k.emit(isa.Score(dst=scores, x=x, score=op.score))  # type: ignore[arg-type]
                k.emit(isa.Weigh(dst=taken, x=ones[k], factors=scores, ids=chosen))  # 1 times the score
            elif op.score == "sparsemixer":
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
            by = chosen if factors else None
            k.emit(isa.Weigh(dst=out, x=taken, normalise=op.normalise, scale=op.scale, factors=factors, ids=by))
            k.emit(isa.Store(dst=weights.part(rows), src=out))
            k.emit(isa.Store(dst=ids.part(rows), src=chosen))

        return by_jobs(mem, op, kernel, logits.rows, kernel.columns(), body)
