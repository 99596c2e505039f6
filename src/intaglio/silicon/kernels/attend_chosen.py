"""Streams of `attend` over chosen positions (sparse attention), and their closed form. A part of attend.py's kernel.

A job is one token and some of its query heads; see gathered.py. Its list of positions comes from HBM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from intaglio.batch import Batch
from intaglio.chips import Target
from intaglio.ops import Attend
from intaglio.ops.elementwise import postfix
from intaglio.silicon import isa
from intaglio.silicon.isa.cycles import vector_cycles
from intaglio.silicon.isa.vector import map_cycles
from intaglio.silicon.kernels.attend_tiles import deal
from intaglio.silicon.kernels.chip_memory import ChipMemory, load, slices
from intaglio.silicon.kernels.gathered import AHEAD, GatherJob, GatherPlan, GatherTiles, gathered_seconds
from intaglio.silicon.kernels.kv_write import Heads
from intaglio.silicon.memory import Region
from intaglio.silicon.sizes import BLOCK, ChunkCounts
from intaglio.silicon.stream import Stream, StreamBuilder

HIDDEN = postfix("(relu(0.0 - a) + relu(a - 1.0)) * -1e30")  # the second number is the query's position


@dataclass(frozen=True)
class ChosenJob:
    """One job of a core: attention of one token, for some query heads, to the positions in the token's list.

    The list (the op's tensor `chosen`) names the positions to which the token attends.

    Attributes:
        sequence: number of the token's sequence.
        row: number of the token among the sequence's new tokens, from 0.
        head: the first query head of the job.
        position: position of the token in its sequence.
        listed: slice of the list that may hold positions. All places before it are empty (-1).
    """

    sequence: int
    row: int
    head: int
    position: int
    listed: slice


def chosen_plan(target: Target, h: Heads, chosen: int) -> GatherPlan:
    """Returns the tile sizes of the kernel, as a GatherPlan. chosen: length of the list of positions of each token."""
    gathered = (h.v_dim, h.head_dim - h.v_dim, h.v_dim) if h.values_in_keys else (h.head_dim, h.v_dim)
    return GatherPlan.of(target, h.group, h.head_dim, h.v_dim, gathered, h.bits, chosen)


def chosen_jobs(
    target: Target, h: Heads, plan: GatherPlan, chosen: int, sequences: list[tuple[int, int]]
) -> list[list[ChosenJob]]:
    """Distributes the jobs of a batch to the cores. Returns a list of ChosenJobs for each core with work.

    chosen: length of the list of positions of each token. sequences: (number of new tokens, context length) of each
    sequence.
    """
    jobs = [
        ChosenJob(s, row, head, keys - q + row, slice(max(0, chosen - (keys - q + row + 1)), chosen))
        for s, (q, keys) in enumerate(sequences) for row in range(q) for head in range(0, h.heads, plan.rows)
    ]  # fmt: skip
    places = [job.listed.stop - job.listed.start + 1.0 for job in jobs]
    return [[jobs[i] for i in mine] for mine in deal(places, target.chip.cores)]


def chosen_seconds(target: Target, h: Heads, chosen: int, batch: ChunkCounts) -> float:
    """Returns the modelled seconds of attention to chosen positions, until the last result is stored.

    The launch overhead is not included. chosen: length of the list of positions of each token. batch: (new tokens,
    context length, number of such sequences) for each distinct pair of the first two.
    """
    plan = chosen_plan(target, h, chosen)
    dealt = chosen_jobs(target, h, plan, chosen, [(q, keys) for q, keys, n in batch for _ in range(n)])
    held = {("list", job.sequence, job.row): 4.0 * chosen for mine in dealt for job in mine}

    def made(job: ChosenJob) -> GatherJob:
        places = job.listed.stop - job.listed.start
        lists = (4.0 * places, ("list", job.sequence, job.row)), (4.0 * (job.position // BLOCK + 1), None)
        prepare = float(vector_cycles(target.chip, 4 * places)) + map_cycles(target.chip, HIDDEN, places)
        tiles = tuple((tile.stop - tile.start, True) for tile in slices(places, plan.keys))
        return GatherJob((job.sequence, job.row, job.head), lists, prepare, tiles)

    return gathered_seconds(target, plan, [[made(job) for job in mine] for mine in dealt], sorted(held.items()))


class ListTiles:
    """Tile buffers of one core for attention to listed positions: lists, cache row numbers and masks.

    Each token has a list of the positions to which it attends. From the list, locate() computes which cache rows hold
    the positions, and a mask for the scores. There are AHEAD buffers of each kind, so that the next job's list is
    prepared while a job is computed.
    """

    def __init__(self, mem: ChipMemory, k: StreamBuilder, chosen: Region, blocks: int) -> None:
        self.mem, self.k, self.chosen = mem, k, chosen
        self.lists, self.places = (k.ring(AHEAD, 1, chosen.cols, "i32") for _ in range(2))
        self.hidden, self.tables = k.ring(AHEAD, 1, chosen.cols), k.ring(AHEAD, 1, blocks, "i32")

    def locate(
        self, row: int, listed: slice, position: int, blocks: list[int], size: int, heads: int, head: int
    ) -> tuple[Region, Region]:
        """Emit the load of one token's list of positions. Returns two regions [1, n], for the n listed positions.

        The first region, i32, holds the numbers of the cache rows that belong to the positions. The second, f32, is a
        mask to add to the scores: it is 0 for a valid position. If a place of the list is empty, or if its position is
        after `position`, the mask is so low that the softmax weight becomes 0.

        Args:
            row: row of the token in the step's tensors.
            listed: the part of the token's list to load.
            position: position of the token.
            blocks: block table of the token's sequence.
            size: number of cache rows that a block has for each K/V head.
            heads: number of K/V heads.
            head: the K/V head whose rows are wanted.
        """
        k = self.k
        ids = load(k, self.lists.next(), self.chosen.part(slice(row, row + 1), listed))
        table = load(k, self.tables.next(), self.mem.put_indices(blocks))
        index, mask = self.places.next().shaped(1, ids.cols), self.hidden.next().shaped(1, ids.cols)
        k.emit(isa.Locate(dst=index, positions=ids, table=table, size=size, heads=heads, head=head))
        steps = postfix(f"(relu(0.0 - a) + relu(a - {position}.0)) * -1e30")
        k.emit(isa.Map(dst=mask, a=ids, steps=steps))
        return index, mask


def chosen_streams(mem: ChipMemory, on: Target, op: Attend, h: Heads, batch: Batch) -> list[Stream]:
    """Returns a list of Streams (instruction sequences), one for each core with work, for sparse attention.

    Each token attends only to the positions that the op's tensor `chosen` lists for it.
    """
    assert op.chosen is not None
    names = [op.k_cache, *([op.rope_cache] if op.rope_cache else []), op.v_cache]
    q, out, chosen, caches = mem.region(op.q), mem.region(op.out), mem.region(op.chosen), [mem.region(n) for n in names]
    sequences = list(zip(batch.q_len.tolist(), batch.context_len.tolist(), strict=True))
    plan, streams, size = chosen_plan(on, h, chosen.cols), list[Stream](), batch.block_size
    rows, d, dv = plan.rows, plan.d, plan.dv
    for mine in chosen_jobs(on, h, plan, chosen.cols, sequences):
        k = StreamBuilder(op.site)
        tiles, lists = GatherTiles(k, plan, caches[0].format), ListTiles(mem, k, chosen, batch.block_table.shape[1])
        ready = list[tuple[Region, Region, Region]]()  # of the jobs so far: queries, rows of the cache, mask
        for number in range(-1, len(mine)):
            for job in mine[number + 1 : number + 2]:  # the next job is prepared
                row = int(batch.first_row[job.sequence]) + job.row
                blocks = batch.block_table[job.sequence, : job.position // size + 1].tolist()
                found = lists.locate(row, job.listed, job.position, blocks, size, h.kv_heads, job.head // h.group)
                a = tiles.queries.next()
                source = q.part(slice(row, row + 1), slice(job.head * d, (job.head + rows) * d))
                load(k, a.shaped(1, rows * d), source)
                ready.append((a, *found))
            if number < 0:
                continue
            job, (a, index, mask) = mine[number], ready[number]
            how: dict[str, Any] = {"scale": op.scale, "query": job.position, "temper": op.temper}
            how |= {"every": op.temper_every, "from_zero": not op.temper_from}
            y = tiles.attend(a, [(caches, index, mask)], None, how)
            row = int(batch.first_row[job.sequence]) + job.row
            to = out.part(slice(row, row + 1), slice(job.head * dv, (job.head + rows) * dv))
            k.emit(isa.Store(dst=to, src=y.shaped(1, rows * dv)))
        streams.append(k.stream())
    return streams
