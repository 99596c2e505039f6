"""Chip kernel of the op `sample`: the next token of each row of logits, and its log-probability."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from intaglio.batch import Batch, Sampling
from intaglio.chips import Target
from intaglio.ops import Sample
from intaglio.silicon import isa
from intaglio.silicon.isa.cycles import sample_cycles
from intaglio.silicon.kernels.chip_memory import ChipMemory, deal_jobs, load
from intaglio.silicon.kernels.kernel import ChipKernel, Tensors, chip_kernel
from intaglio.silicon.kernels.rows import loop_timing, ring_depth
from intaglio.silicon.memory import Region
from intaglio.silicon.sizes import BatchSizes
from intaglio.silicon.stream import Stream, StreamBuilder
from intaglio.silicon.tile_loop import TileLoop
from intaglio.silicon.timing import Timing

FIELDS = ("temperature", "top_k", "top_p", "min_p", "seed")  # fields of Sampling that the instruction also has

RESULT_BYTES = 8.0  # of a token id and its log-probability


@chip_kernel(Sample)
@dataclass(frozen=True)
class SampleKernel(ChipKernel):
    """Chip kernel of `sample`, which draws a token for each row of logits [rows, vocabulary], row by row."""

    by_sequence: ClassVar[bool] = False
    rows: int | str
    vocabulary: int

    @classmethod
    def of(cls, op: Sample, t: Tensors) -> SampleKernel:
        rows, vocabulary = t[op.logits].shape
        return cls(rows, int(vocabulary))

    def time(self, target: Target, sizes: BatchSizes, prefetched: bool) -> Timing:
        rows = sizes.rows_of(self.rows)
        if not rows:
            return Timing(0.0)
        cycles = float(sample_cycles(target.chip, self.vocabulary, sizes.filtered))
        logits = float(self.vocabulary * target.library.activation_bytes)
        loop = TileLoop(
            jobs=rows, load=logits, work_s=cycles / target.chip.clock_hz, store=RESULT_BYTES,
            depth=ring_depth(target, [self.vocabulary], logits),
        )  # fmt: skip
        return loop_timing(target, loop)

    @classmethod
    def streams(cls, mem: ChipMemory, op: Sample, t: Tensors, batch: Batch) -> list[Stream]:
        logits, tokens, logprobs = mem.region(op.logits), mem.region(op.tokens), mem.region(op.logprobs)
        position = (batch.positions[batch.rows] + 1).tolist()
        depth, streams = (
            ring_depth(mem.target, [logits.cols], float(logits.cols * mem.target.library.activation_bytes)),
            [],
        )
        for k, mine in deal_jobs(mem.chip, range(logits.rows), op.site):
            row, token, logprob = k.ring(depth, 1, logits.cols), k.ring(2, 1, 1, "i32"), k.ring(2, 1, 1)
            load_edits = edit_loader(mem, k, [batch.sampling[r] for r in mine])
            for r in mine:
                sampling, x, y, z = batch.sampling[r], row.next(), token.next(), logprob.next()
                load(k, x, logits.part(slice(r, r + 1)))
                fields: dict[str, Any] = {n: getattr(sampling, n) for n in FIELDS}
                fields |= load_edits(sampling)
                k.emit(isa.Sample(token=y, logprob=z, logits=x, position=position[r], **fields))
                k.emit(isa.Store(dst=tokens.part(cols=slice(r, r + 1)), src=y))
                k.emit(isa.Store(dst=logprobs.part(cols=slice(r, r + 1)), src=z))
            streams.append(k.stream())
        return streams


def edit_loader(mem: ChipMemory, k: StreamBuilder, rows: Sequence[Sampling]) -> Callable[[Sampling], dict[str, Region]]:
    """Returns a function that loads the logit edits and the grammar mask of a row from HBM, for one core.

    The function takes the row's Sampling. It emits the loads and returns a dict of SRAM tiles, which are arguments of
    the instruction isa.Sample: "ids", "factors" and "terms" if the row has edits, "mask" if it has a mask; {} if it has
    neither.

    rows: the Sampling of each row of the core. SRAM tiles are allocated for the largest edits and mask among them.
    """
    widest = max((len(s.edits.ids) for s in rows if s.edits), default=0)
    rings = {n: k.ring(2, 1, widest, f) for n, f in (("ids", "i32"), ("factors", "f32"), ("terms", "f32")) if widest}
    words = max((len(s.mask) for s in rows if s.mask is not None), default=0)
    mask = k.ring(2, 1, words, "i32") if words else None

    def load_edits(sampling: Sampling) -> dict[str, Region]:
        out = {}
        if sampling.edits is not None and len(sampling.edits.ids):
            edits = sampling.edits
            values = (mem.put_indices(edits.ids), mem.put_floats(edits.scale), mem.put_floats(edits.add))
            out = {n: load(k, ring.next(), v) for (n, ring), v in zip(rings.items(), values, strict=True)}
        if sampling.mask is not None and mask is not None:
            out["mask"] = load(k, mask.next(), mem.put_indices(sampling.mask.view(np.int32)))
        return out

    return load_edits
