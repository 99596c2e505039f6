"""SimulatedTier: a tier of K/V blocks in memory with injected faults and virtual time, for the simulation."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from intaglio.runtime import BlockKey, TierCounts

if TYPE_CHECKING:
    from simulation.world import World

SALTS = (None, "a", "b")


@dataclass
class SimulatedLoad:
    """Blocks that arrive one after the other, the last at a virtual time."""

    world: World
    until: float
    contents: list[np.ndarray]

    def __post_init__(self) -> None:
        """Note when the load began."""
        self.began = self.world.now
        self.cancelled: float | None = None

    def wait(self, seconds: float) -> bool:
        """Let virtual time pass, if the engine has nothing else to do: more than it says, to save steps."""
        self.world.now += min(20 * seconds, max(0.0, self.until - self.world.now))
        return self.cancelled is None and self.world.now >= self.until

    def blocks(self) -> list[np.ndarray]:
        """What has arrived."""
        now = self.world.now if self.cancelled is None else self.cancelled
        share = 1.0 if now >= self.until else (now - self.began) / (self.until - self.began)
        return self.contents[: int(share * len(self.contents))]

    def cancel(self) -> None:
        """No further blocks are wanted: they never arrive."""
        if self.cancelled is None:
            self.cancelled = self.world.now


class SimulatedTier:
    """A Connector that keeps blocks by name, and loses, damages, delays and drops some of them."""

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.rng, self.counts = world, random.Random(f"tier {seed}"), TierCounts()
        self.forgets = self.rng.choice(
            (0.1, 0.3, 0.5)
        )  # chance, in each step, that all blocks that nobody holds are evicted
        self.slow, self.loss = self.rng.choice((0.0, 0.5, 1.0)), self.rng.choice((0.0, 0.1, 0.4))
        self.held: dict[str, tuple[BlockKey, np.ndarray]] = {}
        self.salts: dict[str, str | None] = {}  # by name of a block, or of a root
        self.loaded: dict[bytes, str | None] = {}  # by content of the last load: its salt

    def heal(self) -> None:
        """Fail no more."""
        self.forgets = self.slow = self.loss = 0.0

    def lookup(self, names: Sequence[str]) -> int:
        """How many leading blocks are there."""
        return next((at for at, name in enumerate(names) if name not in self.held), len(names))

    def stored(self, names: Sequence[str]) -> int:
        """The same: nothing is fetched from elsewhere."""
        return self.lookup(names)

    def load(self, keys: Sequence[BlockKey], block_bytes: int) -> SimulatedLoad:
        """Begin a load; the first block that was lost or damaged meanwhile ends it."""
        contents: list[np.ndarray] = []
        self.loaded = {}
        for key in keys:
            if self.rng.random() < self.loss:
                self.counts.corrupt += self.rng.random() < 0.8
                del self.held[key.name]
                break
            own, content = self.held[key.name]
            assert own == key and content.nbytes == block_bytes, "a block under the name of another"
            contents.append(content)
            self.loaded[content.tobytes()] = self.salts[key.name]
        delay = self.rng.choice((0.5, 1.5, 1.9, 10.0)) if self.rng.random() < self.slow else 0.0
        return SimulatedLoad(self.world, self.world.now + delay, contents)

    def save(self, key: BlockKey, content: np.ndarray) -> bool:
        """Keep a block, most of the time."""
        pool, first = self.world.engine.pool, key.parent
        while first in pool.index:
            first = pool.cached[pool.index[first]].parent
        roots = {pool.names.root(salt): salt for salt in SALTS}
        if first not in roots and first not in self.salts:
            return True  # its salt is not known any more
        self.salts[key.name] = roots[first] if first in roots else self.salts[first]
        if self.rng.random() >= self.loss:
            self.held[key.name] = (key, content)
            self.counts.saved += 1
        return self.rng.random() >= self.loss / 4

    def touch(self, names: Sequence[str]) -> None:
        """Delete some blocks that are not in use."""
        for name in [n for n in self.held if n not in names]:
            if self.rng.random() < self.loss / 4:
                del self.held[name]

    def say(self, kind: str, what: str) -> None:
        """Log it."""
        self.world.log(f"tier: {kind}: {what}")
