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
    """Table that lists the experts that each expert-parallel rank holds, for all layers.

    `layers` maps a layer, by the site (name) of its op `experts`, to one tuple per rank: the numbers of the experts
    that the rank holds, ascending. Several ranks may hold the same expert. If n ranks hold it, they share its tokens:
    each of them computes the expert for every n-th token of a step.
    """

    layers: Mapping[str, Ranks]

    @classmethod
    def even(cls, sites: Sequence[str], experts: int, ranks: int, redundant: int) -> ExpertPlacement:
        """Returns an ExpertPlacement that assumes equal loads of all experts. It is used until tokens are counted.

        Each rank holds ceil((experts + redundant) / ranks) experts in each layer. Experts are dealt to the ranks in
        turn: with 8 experts and 4 ranks, rank 1 holds experts 1 and 5. If the ranks have room for more than `experts`
        experts together, they hold second copies of experts 0, 1, 2 and so on.

        Args:
            sites: for each layer, the site (name) of its op `experts`.
            experts: number of different experts of a layer.
            ranks: number of expert-parallel ranks.
            redundant: number of additional copies of experts in a layer, on all ranks together.

        Raises PlacementError if a rank would hold more than `experts` experts.
        """
        return cls(dict.fromkeys(sites, balance(np.ones(experts), ranks, slots_of(experts, ranks, redundant))))

    @classmethod
    def parse(cls, text: str) -> ExpertPlacement:
        """Returns the ExpertPlacement that is written in a JSON text, such as {"layers.0.experts": [[0, 1], [2, 3]]}.

        The JSON object maps the site (name) of each layer's op `experts` to one list per rank, with the numbers of the
        experts that this rank holds. Raises PlacementError if the text has another form, if an expert is not an integer
        of 0 or more, or if a site is written twice.
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
        """Returns the ExpertPlacement read from a file that keep() wrote; None if the file does not exist.

        Raises PlacementError if the file cannot be read or does not contain a placement.
        """
        try:
            return cls.parse(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError, PlacementError) as e:
            raise PlacementError(f"{path}: {e}") from None

    def keep(self, path: Path) -> None:
        """Write the placement to the file `path` as JSON, replacing the whole file at once. Returns nothing.

        The text is written to a temporary file in the same folder, which is then renamed to `path`. So another process
        that reads `path` gets either the old placement or the new one, never a mixture. If writing fails, a warning is
        logged and `path` stays as it was.
        """
        try:
            replace_file(path, self.text())
        except OSError as e:
            log.warning("the expert placement is not kept in %s: %s", path, e)

    def text(self) -> str:
        """Returns the placement as JSON text with one line for each layer. parse() reads this text."""
        return "{\n" + ",\n".join(f"{json.dumps(s)}: {json.dumps(ranks)}" for s, ranks in self.layers.items()) + "\n}\n"

    def check(self, experts: int, ranks: int) -> None:
        """Raise PlacementError if the placement does not fit a model of `experts` experts on `ranks` ranks.

        Returns nothing. The placement fits if, in each layer:

        - all ranks hold the same number of experts, at least one;
        - each rank lists its experts in ascending order, without duplicates;
        - every expert is on at least one rank.
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
    """Write `text` to the file `path` in UTF-8, replacing the whole file at once. Returns nothing.

    The text goes to a temporary file in the same folder, which is then renamed to `path`. Raises OSError if that fails;
    the temporary file is then deleted.
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
    """Raise PlacementError if no file can be created in the folder of `path`.

    Returns nothing; the file itself is not written.
    """
    try:
        with tempfile.NamedTemporaryFile(prefix=path.name + ".", suffix=".new", dir=path.parent) as file:
            file.write(b"{}")
    except OSError as e:
        raise PlacementError(
            f"expert placement {path}: no file can be written to the folder {path.parent}: {e}; "
            "use a file in a folder that this process may write to, or let no experts move (rebalance_every 0)"
        ) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the key-value pairs of a JSON object as a dict. Raises PlacementError if a key occurs twice."""
    found = dict[str, Any]()
    for key, value in pairs:
        if key in found:
            raise PlacementError(f"{key!r} is written twice; write each site once")
        found[key] = value
    return found


def _ranks(site: str, found: Any) -> Ranks:
    """Returns the experts that each rank holds in one layer, read from JSON.

    The result is a tuple that has for each rank a tuple of expert numbers. `found` is the layer's JSON value. `site` is
    the name of the layer's op, for the error message. Raises PlacementError unless `found` is a list of lists of
    integers of 0 or more.
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
    """Returns the placement attributes of one rank's op `experts`, as a dict of keyword arguments for Experts.

    If several ranks hold copies of an expert, they take turns at its tokens; the attributes say whose turn it is. Keys:

    - "held": numbers of the experts that this rank holds.
    - "copies": for each expert in "held", the number of ranks that hold it.
    - "copy": for each expert in "held", which of its copies this rank has, counted from 0 in the order of the ranks.
    - "rank": number of this rank, which is the argument `rank`.
    - "ranks": number of ranks.

    `held`: for each rank, the numbers of the experts that it holds.
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
    """Returns the number of experts of a layer that each rank holds, copies included.

    The number is ceil((experts + redundant) / ranks).

    Args:
        experts: number of different experts of the layer.
        ranks: number of expert-parallel ranks.
        redundant: number of additional copies of experts, on all ranks together.

    Raises PlacementError if the result is above `experts`, since a rank would then hold an expert twice.
    """
    each = -(-(experts + redundant) // ranks)
    if each > experts:
        raise PlacementError(
            f"{redundant} redundant experts: {each} on each of {ranks} ranks, but there are {experts}; use fewer"
        )
    return each


def replicate(load: np.ndarray, slots: int, most: int) -> np.ndarray:
    """Choose the number of copies of each expert, so that all copies have nearly equal loads. Returns i64 [experts].

    Every expert gets one copy. Each further copy goes to the expert with the highest load per copy at that point.

    Args:
        load: tokens of each expert, f64 [experts].
        slots: total number of copies, over all experts.
        most: maximum number of copies of one expert.
    """
    copies = np.ones(len(load), np.int64)
    for _ in range(slots - len(load)):
        each = np.where(copies < most, load / copies, -1.0)
        copies[int(each.argmax())] += 1
    return copies


def balance(load: np.ndarray, ranks: int, each: int) -> Ranks:
    """Distribute experts over ranks so that the loads of the ranks are nearly equal.

    Returns one tuple per rank: the numbers of its experts, ascending. Several ranks may hold copies of one expert, and
    then share the expert's load equally. A rank never holds an expert twice.

    The method starts like EPLB: copies are dealt out in descending order of load, each to the least loaded rank that
    has room. Then the most and the least loaded rank exchange experts as long as that makes their loads more equal. In
    the result, the loads of any two ranks differ by no more than the load of the heaviest copy.

    Args:
        load: tokens of each expert, f64 [experts].
        ranks: number of ranks. `ranks` * `each` must be at least the number of experts.
        each: number of experts on a rank, at most the number of experts.
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
    """Returns the load of each rank, f64 [ranks].

    A rank's load is the sum of the loads of the expert copies that it holds.

    held: for each rank, the numbers of its experts. share: load of one copy of each expert, f64 [experts].
    """
    return np.array([_rank_load(own, share) for own in held])


def _rank_load(own: Sequence[int] | set[int], share: np.ndarray) -> float:
    """Returns the load of the rank that holds the experts `own`.

    The load is the sum of share[e] over these experts e. `share` is the load of one copy of each expert, f64 [experts].
    The terms are added in ascending order of expert, so that the same set of experts always gives the same bits.
    """
    return float(share[sorted(own)].sum())


def _deal(e: int, held: list[set[int]], share: np.ndarray, each: int, loads: np.ndarray) -> None:
    """Give a copy of expert `e` to the least loaded rank that has room and does not hold `e` yet. Returns nothing.

    If every rank with room already holds `e`, an expert is first moved from a full rank without `e` to a rank with
    room. The full rank then gets `e`.

    Args:
        e: number of the expert.
        held: set of the experts of each rank; changed in place.
        share: load of one copy of each expert, f64 [experts].
        each: maximum number of experts on a rank.
        loads: load of each rank, f64 [ranks]; changed in place.
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
    """Swap experts between the most and the least loaded rank until no swap makes these two loads more equal.

    Changes `held` and `loads` in place and returns nothing.

    Args:
        held: set of the experts of each rank.
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
