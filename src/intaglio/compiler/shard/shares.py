"""Share: the columns (or heads, or experts) of a tensor that one lane holds. Plan: the shares of all tensors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from intaglio import formats
from intaglio.ops import Tensor
from intaglio.program import Program

Share = tuple[range, ...]  # the runs of columns of a result (or of rows of a weight) that a lane holds, in order
Plan = dict[str, list[Share]]  # by tensor name: the share of each lane; of a K/V cache, its heads
BLOCKS = (128, 64, 32)  # columns kept together where there are enough of them: the groups of grouped formats


def cut(width: int, lanes: int, blocks: Sequence[int] = BLOCKS) -> list[Share]:
    """Divide `width` columns among `lanes` ranks. Returns a list with a Share, a tuple of one range, for each rank.

    The ranges are as equal as possible, and rank 0 has a longest one. They end at multiples of a block size: the first
    in `blocks` that divides `width` and gives every rank at least one block. If there is none, they end at any column.
    """
    block = next((b for b in blocks if width % b == 0 and width // b >= lanes), 1)
    ends = [-(-(width // block) * i // lanes) * block for i in range(lanes + 1)]
    return [(range(a, b),) for a, b in pairwise(ends)]


def cut_columns(weight: Tensor, lanes: int) -> list[Share]:
    """Divide a weight's columns among `lanes` ranks. Returns a list with a Share, a tuple of one range, for each rank.

    The ranges are as equal as possible. They end at multiples of a block size: the first of 128, 64 and 32 columns that
    divides the number of columns and gives every rank at least one block. If there is none, they end at any column. For
    number formats with blocks of more than 128 values (K-quants: 256), this block size is tried first.
    """
    block = formats.get(weight.format).block
    return cut(int(weight.shape[-1]), lanes, (block, *BLOCKS) if block > BLOCKS[0] else BLOCKS)


def scaled(shares: Sequence[Share], by: int) -> list[Share]:
    """Convert shares of heads to shares of columns. Returns a list with a Share of columns for each item of `shares`.

    by: number of columns per head.
    """
    return [tuple(range(r.start * by, r.stop * by) for r in share) for share in shares]


def joined(shares: Sequence[Share], lanes: int) -> list[Share]:
    """Merge the shares of neighbouring lanes (ranks). Returns a list with a Share for each of `lanes` new lanes.

    Each new lane has the shares of equally many old lanes, so `lanes` must divide the number of shares.
    """
    each = len(shares) // lanes
    runs = [zip(*shares[i * each : (i + 1) * each], strict=True) for i in range(lanes)]
    return [tuple(range(run[0].start, run[-1].stop) for run in lane) for lane in runs]


def parts_within(parts: Sequence[Share], held: Share) -> list[int]:
    """Find the parts that make up the share `held`. Returns a list of their indices.

    The list is [] if `held` is not made up of whole parts. parts: the columns of each part, as a Share. held: the
    columns that a rank has.
    """
    columns = {i for r in held for i in r}
    found = [i for i, part in enumerate(parts) if all(c in columns for r in part for c in r)]
    return found if sum(width_of(parts[i]) for i in found) == len(columns) else []


def heads_of(share: Share, head_dim: int) -> Share:
    """Convert a share of columns to a share of heads. Returns a tuple with a range of heads for each range of columns.

    head_dim: number of columns per head. `share` must consist of whole heads.
    """
    return tuple(range(r.start // head_dim, r.stop // head_dim) for r in share)


def width_of(share: Share) -> int:
    """Number of columns (or of heads) in a Share, which is a tuple of ranges."""
    return sum(map(len, share))


def keeps_whole(shares: Sequence[Share], group: int) -> bool:
    """True if every range of the shares begins and ends at a multiple of `group` columns, so that no group is split.

    False if `group` is 0 or less.
    """
    return group > 0 and all(end % group == 0 for share in shares for r in share for end in (r.start, r.stop))


def is_partition(shares: Sequence[Share], width: int) -> bool:
    """True if the lanes (ranks) have one run of columns each and together columns 0 to width - 1.

    The runs must not overlap, but several lanes may have the same run. shares: for each lane (rank), its columns.
    """
    runs = sorted({run for share in shares for run in share}, key=lambda r: r.start)
    ends = [0, *(r.stop for r in runs)]
    return all(len(share) == 1 for share in shares) and [r.start for r in runs] == ends[:-1] and ends[-1] == width


def joint(p: Program, base: str, plan: Plan) -> list[Share] | None:
    """Derive each lane's (rank's) columns of tensor `base` from the columns of its views.

    Returns a list with a Share (tuple of ranges) for each lane. Returns None if `base` has no views, if the views do
    not cover `base` without gaps, or if a view is not in `plan`. plan: {name of a view: its columns on each lane}.
    """
    views = p.views(base)
    ends = [start + int(p.tensors[name].shape[1]) for start, name in views]
    whole = [0, *ends[:-1]] == [start for start, _ in views] and ends[-1:] == [p.tensors[base].shape[1]]
    if not whole or any(name not in plan for _, name in views):
        return None
    return [
        tuple(range(start + r.start, start + r.stop) for start, name in views for r in plan[name][lane])
        for lane in range(len(plan[views[0][1]]))
    ]


def partners(shares: Sequence[Share], lane: int) -> tuple[int, ...]:
    """The lanes (ranks) in the same all_gather as lane number `lane`, as a tuple ordered by columns.

    Together these lanes have every column exactly once. Several lanes may have the same columns, for example if K/V
    heads are copied. Then there are several groups: the first group has the first lane with each distinct share, the
    second group the second lane with each share, and so on.

    shares: for each lane, its columns.
    """
    holders: dict[Share, list[int]] = {}
    for i, share in enumerate(shares):
        holders.setdefault(share, []).append(i)
    place = holders[shares[lane]].index(lane)
    return tuple(holders[share][place] for share in sorted(holders, key=lambda share: share[0].start))
