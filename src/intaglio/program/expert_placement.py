"""Placement of experts with expert parallelism: which rank holds which experts of each layer, and a balancer.

Expert parallelism waits for the rank with the most routed tokens. Copies of experts that many tokens choose (redundant
experts), and experts dealt out by load, make the ranks' loads more equal. The method is the greedy one that DeepSeek
published as EPLB (github.com/deepseek-ai/EPLB, global policy): first replicate, then pack.
"""

from __future__ import annotations

import json
import logging
import os
import reprlib
import secrets
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Ranks = tuple[tuple[int, ...], ...]  # the experts of each rank of one layer, ascending

log = logging.getLogger("intaglio.experts")


class PlacementError(ValueError):
    """Raised for a placement that is malformed or does not fit the model or the layout."""


@dataclass(frozen=True)
class ExpertPlacement:
    """The experts that each expert-parallel rank holds, layer by layer.

    layers: {site (name) of a layer's op `experts`: for each rank, the numbers of its experts, ascending}. If n ranks
    hold an expert, each of them computes the expert for every n-th token of a step.
    """

    layers: Mapping[str, Ranks]

    @classmethod
    def even(cls, sites: Sequence[str], experts: int, ranks: int, redundant: int) -> ExpertPlacement:
        """The placement used before any tokens are counted: the result of balance() for equal loads, in each layer.

        Experts are dealt to the ranks in turn, so that with 8 experts and 4 ranks rank 1 holds (1, 5). Each rank holds
        ceil((experts + redundant) / ranks) experts; the places left over get further copies of the experts from 0 on.

        Args:
            sites: sites (names) of the layers' ops `experts`.
            experts: number of different experts of a layer.
            ranks: number of expert-parallel ranks.
            redundant: number of further copies of experts in a layer.

        Raises PlacementError if a rank would hold more than `experts`.
        """
        return cls(dict.fromkeys(sites, balance(np.ones(experts), ranks, slots_of(experts, ranks, redundant))))

    @classmethod
    def parse(cls, text: str) -> ExpertPlacement:
        """The placement of a JSON text {site: [[expert, ...] of each rank]}.

        A site is the name of a layer's op `experts`. Raises PlacementError for any other text, for an expert that is
        not an integer of 0 or more, and for a site that is written twice.
        """
        form = "an expert placement is JSON such as {site: [[0, 1], [1, 2]]}"
        try:
            found = json.loads(text, object_pairs_hook=_unique)
        except PlacementError:
            raise
        except (ValueError, RecursionError) as e:
            raise PlacementError(f"{form}; this is not: {e}") from None
        if not isinstance(found, dict):
            raise PlacementError(f"{form}; this is {reprlib.repr(found)}")
        return cls({site: _ranks(site, ranks) for site, ranks in found.items()})

    @classmethod
    def read(cls, path: Path) -> ExpertPlacement | None:
        """The placement in a file that keep() wrote; None if there is no file.

        Raises PlacementError if the file cannot be read or holds anything but a placement.
        """
        try:
            return cls.parse(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError, PlacementError) as e:
            raise PlacementError(f"{path}: {e}") from None

    def keep(self, path: Path) -> None:
        """Replace the file `path` by this placement's text, in one step. Returns nothing.

        The text goes to a temporary file in the same folder, which is renamed to `path` once it is on the disk. So a
        reader finds the old placement or the new one, even if several processes write. A failure is logged, and leaves
        `path` as it was.
        """
        try:
            replace_file(path, self.text())
        except OSError as e:
            log.warning("the expert placement is not kept in %s: %s", path, e)

    def text(self) -> str:
        """The placement as JSON, with a line for each layer; parse() reads it."""
        return "{\n" + ",\n".join(f"{json.dumps(s)}: {json.dumps(ranks)}" for s, ranks in self.layers.items()) + "\n}\n"

    def check(self, experts: int, ranks: int) -> None:
        """Raise PlacementError unless the placement fits a model of `experts` experts on `ranks` ranks; return nothing.

        In each layer, all ranks must hold equally many experts, at least one; a rank must list its experts in ascending
        order and none twice; and every expert must be on at least one rank. Several ranks may hold the same expert.
        """
        for site, held in self.layers.items():
            sizes = {len(own) for own in held}
            if len(held) != ranks or len(sizes) != 1 or sizes == {0}:
                counts = [len(own) for own in held]
                raise PlacementError(f"{site} places {counts} experts; wanted equal numbers on {ranks} ranks")
            for rank, own in enumerate(held):
                if tuple(sorted(set(own))) != own or not 0 <= own[0] <= own[-1] < experts:
                    wanted = f"different numbers of 0..{experts - 1}, ascending"
                    raise PlacementError(f"{site}: rank {rank} holds experts {own}; wanted {wanted}")
            if missing := set(range(experts)) - {e for own in held for e in own}:
                raise PlacementError(f"{site}: no rank holds experts {sorted(missing)}")


def replace_file(path: Path, text: str) -> None:
    """Write a UTF-8 text to a temporary file beside `path`, and rename it to `path`. Returns nothing.

    Raises OSError if that fails; the temporary file is then deleted.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.new")
    file = open(temporary, "x", encoding="utf-8")  # noqa: SIM115, closed below; tempfile's mode is 0600, not the umask's
    try:
        with file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def check_writable(path: Path) -> None:
    """Raise PlacementError, naming `path`, if no temporary file can be written to its folder; return nothing."""
    try:
        with tempfile.NamedTemporaryFile(prefix=path.name + ".", suffix=".new", dir=path.parent) as file:
            file.write(b"{}")
    except OSError as e:
        raise PlacementError(
            f"expert placement {path}: no file can be written to the folder {path.parent}: {e}; "
            "use a file in a folder that this process may write to, or let no experts move (rebalance_every 0)"
        ) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The dict of a JSON object's pairs. Raises PlacementError for a key that is written twice."""
    found = dict[str, Any]()
    for key, value in pairs:
        if key in found:
            raise PlacementError(f"{key!r} is written twice; write each site once")
        found[key] = value
    return found


def _ranks(site: str, found: Any) -> Ranks:
    """The expert numbers of each rank, as a tuple of tuples of ints, from a layer's JSON value `found`.

    site: name of the layer's op, for the error. Raises PlacementError if it is not a list of lists of integers from 0.
    """
    if not isinstance(found, list) or not all(isinstance(own, list) for own in found):
        raise PlacementError(
            f"{site} is {reprlib.repr(found)}; wanted a list with a list of experts for each rank, such as "
            "[[0, 1], [1, 2]]"
        )
    for rank, own in enumerate(found):
        for e in own:
            if type(e) is not int or e < 0:  # bool is a kind of int
                raise PlacementError(f"{site}: rank {rank} holds {reprlib.repr(e)}; allowed: integers from 0")
    return tuple(map(tuple, found))


def turns(held: Ranks, rank: int) -> dict[str, Any]:
    """The placement attributes of the op `experts` on one rank, as a dict of keyword arguments for Experts.

    Ranks that hold copies of one expert take turns at its tokens. Keys: "held" (numbers of this rank's experts),
    "copies" (for each of these experts, the number of ranks that hold it), "copy" (for each, the number of this rank
    among its holders, from 0), "rank" and "ranks" (this rank's number, and the number of ranks).

    held: the experts of each rank. rank: number of the rank.
    """
    holders = [[r for r, own in enumerate(held) if e in own] for e in held[rank]]
    return {
        "held": held[rank],
        "copy": tuple(ranks.index(rank) for ranks in holders),
        "copies": tuple(map(len, holders)),
        "rank": rank,
        "ranks": len(held),
    }


def slots_of(experts: int, ranks: int, redundant: int) -> int:
    """Number of experts of a layer that each rank holds, copies included: ceil((experts + redundant) / ranks).

    Args:
        experts: number of different experts.
        ranks: number of expert-parallel ranks.
        redundant: number of further copies of experts, on all ranks together.

    Raises PlacementError if the result is above `experts`.
    """
    each = -(-(experts + redundant) // ranks)
    if each > experts:
        raise PlacementError(
            f"{redundant} redundant experts: {each} on each of {ranks} ranks, but there are {experts}; use fewer"
        )
    return each


def replicate(load: np.ndarray, slots: int, most: int) -> np.ndarray:
    """Choose how many copies each expert gets, so that all copies have near-equal loads. Returns i64 [experts].

    Every expert has at least one copy. Each further copy goes to the expert whose copies have the largest load each.

    Args:
        load: tokens of each expert, f64 [experts].
        slots: number of copies of all experts together.
        most: maximum number of copies of one expert.
    """
    copies = np.ones(len(load), np.int64)
    for _ in range(slots - len(load)):
        each = np.where(copies < most, load / copies, -1.0)
        copies[int(each.argmax())] += 1
    return copies


def balance(load: np.ndarray, ranks: int, each: int) -> Ranks:
    """Distribute experts over ranks so that the ranks' loads are nearly equal.

    Returns a tuple with a tuple for each rank: the numbers of its `each` experts, ascending. An expert may be on
    several ranks, which share its load equally, but only once on a rank.

    Copies are dealt out in order of load, each to the least loaded rank with room, as in EPLB. Then experts of the most
    and of the least loaded rank are exchanged as long as that makes the two more equal. In the result, the loads of any
    two ranks differ by no more than the load of the heaviest copy.

    load: tokens of each expert, f64 [experts]; experts <= ranks * each, each <= experts.
    """
    # While the two ranks' loads differ by more, there is a pair of experts, each on only one of the two, to exchange.
    load = np.asarray(load, np.float64)
    copies = replicate(load, ranks * each, ranks)
    share = load / copies
    held: list[set[int]] = [set() for _ in range(ranks)]
    loads = np.zeros(ranks)
    for e in sorted(range(len(load)), key=lambda e: (-share[e], e)):
        for _ in range(int(copies[e])):
            _deal(e, held, share, each, loads)
    _exchange(held, share, loads)
    return tuple(tuple(sorted(own)) for own in held)


def rank_loads(held: Sequence[Sequence[int] | set[int]], share: np.ndarray) -> np.ndarray:
    """The load of each rank: the sum over the experts that it holds, f64 [ranks].

    held: the experts of each rank. share: load of one copy of each expert, f64 [experts].
    """
    return np.array([_rank_load(own, share) for own in held])


def _rank_load(own: Sequence[int] | set[int], share: np.ndarray) -> float:
    """The load of one rank, which holds the experts `own`: the sum of their items in `share`, f64 [experts].

    It is summed in ascending order of expert, so that the same experts always give the same bits.
    """
    return float(share[sorted(own)].sum())


def _deal(e: int, held: list[set[int]], share: np.ndarray, each: int, loads: np.ndarray) -> None:
    """Give a copy of expert e to the least loaded rank that has room and no copy of it. Returns nothing.

    If every rank with room has a copy of e already, another expert first moves from a full rank to one with room, and
    the full rank gets e.

    held: experts of each rank; changed. share: load of one copy of each expert. each: number of experts that a rank has
    room for. loads: load of each rank, f64 [ranks]; changed.
    """
    # There is an expert to move: the full rank holds `each` experts and not e, the one with room fewer, e among them.
    order: list[int] = np.argsort(loads, kind="stable").tolist()
    to = next((r for r in order if len(held[r]) < each and e not in held[r]), None)
    if to is None:
        room = next(r for r in order if len(held[r]) < each)
        full = next(r for r in order if e not in held[r])
        moved = min(held[full] - held[room], key=lambda f: (share[f], f))
        held[full].remove(moved)
        held[room].add(moved)
        loads[room] = _rank_load(held[room], share)
        to = full
    held[to].add(e)
    loads[to] = _rank_load(held[to], share)


def _exchange(held: list[set[int]], share: np.ndarray, loads: np.ndarray) -> None:
    """Swap pairs of experts between the most and the least loaded rank, until no swap makes the two loads more equal.

    Changes `held` and `loads` in place and returns nothing.

    Args:
        held: set of experts of each rank.
        share: load of one copy of each expert, f64 [experts].
        loads: load of each rank, f64 [ranks].
    """
    while True:
        high, low = int(loads.argmax()), int(loads.argmin())
        gap = loads[high] - loads[low]
        pairs = [(share[a] - share[b], a, b) for a in held[high] - held[low] for b in held[low] - held[high]]
        better = [pair for pair in pairs if gap * 1e-9 < pair[0] < gap * (1 - 1e-9)]
        if not better:
            return
        _, a, b = min(better, key=lambda pair: (abs(pair[0] - gap / 2), pair[1:]))
        held[high].remove(a)
        held[low].remove(b)
        held[high].add(b)
        held[low].add(a)
        loads[high], loads[low] = _rank_load(held[high], share), _rank_load(held[low], share)
