"""CacheIndex: the K/V blocks that a replica has cached. PromptMemory: from prompt text to the names of its blocks.

The index has two sources, both bounded:

- Confirmed: block names from the replica's events (stored, removed, cleared), which carry the incarnation of the
  replica's cache and a sequence number. After a gap the confirmed set is discarded until a snapshot arrives.
- Assumed: prefixes of the prompts that the router itself sent to the replica. They cover the time until the events
  arrive, and are the only source while the index is stale. They expire.

If a prefix is known or cached, so are the shorter ones: a replica evicts a block before its parent, and what is dropped
here is dropped from the longest prefix on. So the longest cached prefix is found by bisection, not by a walk over all
keys of the prompt.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from intaglio.router.prefix import CHUNK_BYTES

ASSUMED_SECONDS = 10.0  # how long an assumed prefix counts where events confirm what is cached
ASSUMED_MAX = 1 << 14  # prefix keys that are assumed for one replica; the oldest are dropped
MEMORY_MAX = 1 << 17  # prefix keys whose block names are known
TOKENS_PER_CHUNK = CHUNK_BYTES / 4.0  # until the first prompt's true length is known


@dataclass(frozen=True)
class BlocksStored:
    """Event: these blocks were added to a replica's prefix cache and can be reused from now on."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class BlocksRemoved:
    """Event: these blocks were evicted from a replica's prefix cache."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class BlocksCleared:
    """Event: a replica's prefix cache was emptied."""


CacheEvent = BlocksStored | BlocksRemoved | BlocksCleared


@dataclass(frozen=True)
class Prefix:
    """Record about the text up to a prefix key: its number of tokens, and the name of its last whole block.

    name: None if the text is shorter than a block, or the replica gave no names.
    """

    tokens: int
    name: str | None


class PromptMemory:
    """Maps prefix keys of prompt text to token counts and K/V block names, as replicas reported them.

    A replica reports a prompt's token count and the names of its whole blocks. The blocks are spread over the prompt's
    keys in proportion to the text. So the position of a block in the text is an estimate; its name is exact.

    limit: number of keys that are kept; the oldest are dropped.
    """

    def __init__(self, limit: int = MEMORY_MAX) -> None:
        self.limit, self.tokens_per_chunk = limit, TOKENS_PER_CHUNK
        self._prefixes: OrderedDict[bytes, Prefix] = OrderedDict()

    def learn(self, keys: Sequence[bytes], tokens: int, names: Sequence[str], block_size: int) -> None:
        """Record a prompt's length in tokens and the names of its whole blocks of `block_size` tokens.

        keys: the prefix keys of the prompt's text, shortest first (see prefix_keys()).
        """
        if not keys:
            return
        per_chunk = tokens / len(keys)
        self.tokens_per_chunk += 0.1 * (per_chunk - self.tokens_per_chunk)
        for i in range(len(keys), 0, -1):  # the longest prefix first, so that it is dropped first
            upto = min(tokens, int(i * per_chunk))
            block = min(len(names), upto // block_size) - 1
            self._prefixes[keys[i - 1]] = Prefix(upto, names[block] if block >= 0 else None)
            self._prefixes.move_to_end(keys[i - 1])
        while len(self._prefixes) > self.limit:
            self._prefixes.popitem(last=False)

    def find(self, key: bytes) -> Prefix | None:
        """The Prefix recorded for the text up to this key; None if none was recorded or it has been dropped."""
        return self._prefixes.get(key)

    def estimate_tokens(self, keys: Sequence[bytes]) -> int:
        """Estimated number of tokens of a prompt with these keys."""
        n = bisect_left(keys, True, key=lambda key: self.find(key) is None)  # leading keys that are known
        known = self.find(keys[n - 1]) if n else None
        return (known.tokens if known else 0) + int((len(keys) - n) * self.tokens_per_chunk)


class CacheIndex:
    """The router's record of one replica's cache: blocks known from events, and prefixes of prompts sent to it.

    `stale` is True if a snapshot is needed: there was none yet, or events were missed. `events` becomes True with the
    first event or snapshot; until then assumed prefixes do not expire by time.
    """

    def __init__(self) -> None:
        self.incarnation: str | None = None
        self.sequence = 0  # of the last event applied
        self.stale = True
        self.events = False
        self.names: set[str] = set()
        self._assumed: OrderedDict[bytes, float] = OrderedDict()  # prefix key: when it was sent, seconds

    def restarted(self, incarnation: str) -> None:
        """Note the incarnation of the replica's cache. If it is new, nothing is cached and the index is stale."""
        if incarnation != self.incarnation:
            self.incarnation, self.sequence, self.stale = incarnation, 0, True
            self.names.clear()
            self._assumed.clear()

    def apply(self, incarnation: str, sequence: int, event: CacheEvent) -> None:
        """Apply event number `sequence` of the cache's incarnation.

        A repeated event is ignored; after a gap the index is stale. The first event of an incarnation has
        number 1.
        """
        self.restarted(incarnation)
        if self.events and sequence <= self.sequence:
            return
        if sequence != self.sequence + 1:
            self.stale = True
            self.names.clear()
        elif sequence == 1:
            self.stale = False
        self.events, self.sequence = True, sequence
        if self.stale:
            return
        match event:
            case BlocksStored(names):
                self.names.update(names)
            case BlocksRemoved(names):
                self.names.difference_update(names)
            case BlocksCleared():
                self.names.clear()
                self._assumed.clear()

    def snapshot(self, incarnation: str, sequence: int, names: Iterable[str]) -> None:
        """Replace the confirmed blocks by `names`, a snapshot taken after event number `sequence` of `incarnation`.

        A snapshot is ignored if a higher number of the same incarnation was already applied. incarnation: names the
        replica's cache since its last restart.
        """
        self.restarted(incarnation)
        if sequence < self.sequence:
            return
        self.names, self.sequence, self.stale, self.events = set(names), sequence, False, True

    def assume(self, keys: Sequence[bytes], now: float) -> None:
        """Record that a prompt with these keys was sent to the replica at time `now` (seconds), which will cache it."""
        for key in reversed(keys):  # the longest prefix first, so that it is dropped first
            self._assumed[key] = now
            self._assumed.move_to_end(key)
        while len(self._assumed) > ASSUMED_MAX:
            self._assumed.popitem(last=False)

    def cached_tokens(self, keys: Sequence[bytes], memory: PromptMemory, now: float) -> int:
        """Estimated number of tokens of the longest cached prefix of a prompt with these keys; 0 if none is cached."""
        low, high, tokens = 0, len(keys), 0  # keys[:low] are cached, and have `tokens` tokens
        while low < high:
            middle = (low + high) // 2
            found = self._tokens_at(keys[middle], middle + 1, memory, now)
            if found is None:
                high = middle
            else:
                low, tokens = middle + 1, found
        return tokens

    def _tokens_at(self, key: bytes, number: int, memory: PromptMemory, now: float) -> int | None:
        """Tokens of the prefix that ends with this key; None if it is not cached.

        number: position of the key in the prompt, from 1. The result is 0 for a prefix shorter than a block; it does
        not tell whether longer prefixes are cached.
        """
        known = memory.find(key)
        sent = self._assumed.get(key)
        if sent is not None and (self.stale or not self.events or now - sent <= ASSUMED_SECONDS):
            return known.tokens if known else int(number * memory.tokens_per_chunk)
        if known is None or self.stale:
            return None
        if known.name is None:
            return 0
        return known.tokens if known.name in self.names else None
