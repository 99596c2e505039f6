"""CacheIndex: the K/V blocks that a replica has cached. PromptMemory: from prompt text to the names of its blocks.

The index has two sources, both bounded:

- Confirmed: block names from the replica's events (stored, removed, cleared), which carry the incarnation of the
  replica's cache and a sequence number. After a gap the confirmed set is discarded until a snapshot arrives.
- Assumed: prefixes of the prompts that the router itself sent to the replica. They cover the time until the events
  arrive, and are the only source while the index is stale. They expire, soon after the prompt has been computed, since
  from then on the events also tell which of its blocks have been evicted.

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

ASSUMED_SECONDS = 60.0  # how long the prefixes of a prompt count as cached that waits or is being computed
CONFIRMED_SECONDS = 1.0  # the same once the prompt has been computed: events arrive with the next load reports
ASSUMED_MAX = 1 << 14  # prefix keys that are assumed for one replica; the oldest are dropped
MEMORY_MAX = 1 << 17  # prefix keys whose block names are known
TOKENS_PER_CHUNK = CHUNK_BYTES / 4.0  # until the first prompt's true length is known


@dataclass(frozen=True)
class BlocksStored:
    """Event from a replica: the K/V blocks `names` were added to its prefix cache and can be reused from now on."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class BlocksRemoved:
    """Event from a replica: the K/V blocks `names` were evicted from its prefix cache."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class BlocksCleared:
    """Event from a replica: its prefix cache was emptied."""


CacheEvent = BlocksStored | BlocksRemoved | BlocksCleared


@dataclass(frozen=True)
class Prefix:
    """Entry of the router's table of prompt prefixes: a prefix's length in tokens and its last whole K/V block.

    PromptMemory keeps one Prefix for each prefix key, which is a hash of the prefix (see prefix_keys()).

    Attributes:
        tokens: estimated number of tokens of the prefix.
        name: name of the last whole K/V block that lies in the prefix. None if the prefix is shorter than a block, or
            if the replica reported no block names.
    """

    tokens: int
    name: str | None


class PromptMemory:
    """Table of prompt prefixes that replicas have computed, with the length and the last K/V block of each prefix.

    The router looks a prefix up by its key, a hash of the text up to that point (see prefix_keys()). A replica reports
    a prompt's number of tokens and the names of its whole K/V blocks. The tokens are assumed to be spread evenly over
    the text. So the place in the text where a block ends is an estimate, and the block's name is exact.

    limit: maximum number of prefixes; the oldest are dropped.
    """

    def __init__(self, limit: int = MEMORY_MAX) -> None:
        self.limit, self.tokens_per_chunk = limit, TOKENS_PER_CHUNK
        self._prefixes: OrderedDict[bytes, Prefix] = OrderedDict()

    def learn(self, keys: Sequence[bytes], tokens: int, names: Sequence[str], block_size: int) -> None:
        """Record, for each prefix of a prompt's text, its length in tokens and its last whole K/V block.

        Returns nothing. The router needs this to tell which blocks a later prompt with the same beginning can reuse.
        The lengths are estimates: the prompt's tokens are assumed to be spread evenly over its text.

        Args:
            keys: the prefix keys of the prompt's text, shortest prefix first (see prefix_keys()). If there are none,
                nothing is recorded.
            tokens: number of tokens of the whole prompt.
            names: names of the prompt's whole K/V blocks, in order.
            block_size: tokens in a block.
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
        """Returns the Prefix that is recorded under a prefix key; None if there is none.

        key: hash of the beginning of a prompt's text (see prefix_keys()).
        """
        return self._prefixes.get(key)

    def estimate_tokens(self, keys: Sequence[bytes]) -> int:
        """Returns the estimated number of tokens of a prompt, an int, from the prefix keys of its text.

        The estimate is the recorded length of the longest known prefix, plus the mean number of tokens per chunk of
        text for each further chunk. Without keys it is 0.

        keys: all prefix keys of the prompt's text, shortest prefix first; there is one for each chunk (see
        prefix_keys()).
        """
        n = bisect_left(keys, True, key=lambda key: self.find(key) is None)  # leading keys that are known
        known = self.find(keys[n - 1]) if n else None
        return (known.tokens if known else 0) + int((len(keys) - n) * self.tokens_per_chunk)


class CacheIndex:
    """The router's record of what one replica has in its K/V cache.

    It has two sources: K/V blocks that the replica reported, and prompts that the router has sent to the replica, whose
    prefixes are assumed to be cached for a time.

    Attributes:
        incarnation: text that identifies the latest start of the replica's engine; None before the first report.
        stale: True if the router needs a snapshot of the replica's cache, because it has had none yet or has missed
            events.
        events: True once the replica has sent an event or a snapshot. Until then, assumed prefixes have no time limit.
        names: names of the blocks that the replica reported.
    """

    def __init__(self) -> None:
        self.incarnation: str | None = None
        self.sequence = 0  # of the last event applied
        self.stale = True
        self.events = False
        self.names: set[str] = set()
        self._assumed: OrderedDict[bytes, float] = OrderedDict()  # prefix key: until when it counts, seconds

    def restarted(self, incarnation: str) -> None:
        """Empty the record if the replica has restarted. Returns nothing.

        A restart shows in a new `incarnation`. Nothing counts as cached then, and `stale` becomes True, because a
        snapshot of the cache is needed. If `incarnation` is the same as before, nothing changes.

        incarnation: text that is different for each start of the replica's engine.
        """
        if incarnation != self.incarnation:
            self.incarnation, self.sequence, self.stale = incarnation, 0, True
            self.names.clear()
            self._assumed.clear()

    def apply(self, incarnation: str, sequence: int, event: CacheEvent) -> None:
        """Update the record of the replica's cache with one event that the replica has sent. Returns nothing.

        An event is ignored if its number is not above the last applied number. If numbers in between are missing, the
        block names are forgotten, and `stale` is True until a snapshot comes.

        Args:
            incarnation: text that is different for each start of the replica's engine. If it is new, the record is
                emptied first.
            sequence: number of the event, counted from 1 since the engine's start.
            event: says that blocks were stored or removed, or that the cache was emptied.
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
        """Replace the names of the replica's blocks by those in a snapshot of its cache. Returns nothing.

        A snapshot is ignored if a later event or snapshot of the same incarnation was already applied.

        Args:
            incarnation: text that is different for each start of the replica's engine. If it is new, the record is
                emptied first. Else the prefixes recorded by assume() stay.
            sequence: number of the last event before the snapshot.
            names: names of all blocks in the cache.
        """
        self.restarted(incarnation)
        if sequence < self.sequence:
            return
        self.names, self.sequence, self.stale, self.events = set(names), sequence, False, True

    def assume(self, keys: Sequence[bytes], now: float) -> None:
        """Record that a prompt was sent to the replica, so that its prefixes count as cached from now on.

        Returns nothing. A prefix counts as cached for ASSUMED_SECONDS. Once the prompt has been computed, this is
        shortened to CONFIRMED_SECONDS from then (see computed()). There is no time limit while `stale` is True or the
        replica has sent no events. At most ASSUMED_MAX prefixes are kept; the oldest are dropped.

        Args:
            keys: the prefix keys of the prompt's text, shortest prefix first (see prefix_keys()).
            now: time at which the prompt was sent, in seconds.
        """
        for key in reversed(keys):  # the longest prefix first, so that it is dropped first
            self._assumed[key] = now + ASSUMED_SECONDS
            self._assumed.move_to_end(key)
        while len(self._assumed) > ASSUMED_MAX:
            self._assumed.popitem(last=False)

    def computed(self, keys: Sequence[bytes], now: float) -> None:
        """Record that the replica has computed a prompt. Returns nothing.

        The prompt's prefixes, recorded by assume(), count as cached for only CONFIRMED_SECONDS more. After that time,
        only the replica's events say which blocks are cached. Otherwise, the index would still show blocks that a small
        K/V cache has evicted.

        Args:
            keys: the prefix keys of the prompt's text (see prefix_keys()).
            now: the time in seconds.
        """
        for key in keys:
            if key in self._assumed:
                self._assumed[key] = min(self._assumed[key], now + CONFIRMED_SECONDS)

    def cached_tokens(self, keys: Sequence[bytes], memory: PromptMemory, now: float) -> int:
        """Returns how many tokens at the beginning of a prompt the replica has in its K/V cache, an estimate.

        Args:
            keys: the prefix keys of the prompt's text, shortest prefix first (see prefix_keys()).
            memory: token counts and block names of the prefixes that replicas have reported.
            now: the time in seconds.
        """
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
        """Returns the number of tokens of a prompt's prefix, or None if the replica does not have the prefix cached.

        The result is 0 if the prefix is recorded without a K/V block, and nothing else shows that it is cached. Such a
        prefix is shorter than a block, or the replicas reported no block names. A longer prefix may still be cached.

        Args:
            key: prefix key of the prefix (see prefix_keys()).
            number: number of chunks of text in the prefix.
            memory: token counts and block names of the prefixes that replicas have reported.
            now: the time in seconds.
        """
        known = memory.find(key)
        until = self._assumed.get(key)
        if until is not None and (self.stale or not self.events or now <= until):
            return known.tokens if known else int(number * memory.tokens_per_chunk)
        if known is None or self.stale:
            return None
        if known.name is None:
            return 0
        return known.tokens if known.name in self.names else None
