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
    """What is known of a prefix of prompt text: its length in tokens, and the name of the last whole K/V block in it.

    PromptMemory keeps one Prefix for each prefix key, which is a hash of the prefix (see prefix_keys()).

    Attributes:
        tokens: tokens of the prefix, estimated.
        name: name of the block; None if the prefix is shorter than a block, or the replica gave no names.
    """

    tokens: int
    name: str | None


class PromptMemory:
    """For prefixes of prompt texts: how many tokens they have and which K/V block they end in, learnt from replicas.

    A prefix is looked up by its key, a hash of the text up to that point (see prefix_keys()). A replica reports a
    prompt's token count and the names of its whole K/V blocks. Tokens are taken to be spread evenly over the text, so
    the place in the text where a block ends is an estimate; the block's name is exact.

    limit: number of keys that are kept; the oldest are dropped.
    """

    def __init__(self, limit: int = MEMORY_MAX) -> None:
        self.limit, self.tokens_per_chunk = limit, TOKENS_PER_CHUNK
        self._prefixes: OrderedDict[bytes, Prefix] = OrderedDict()

    def learn(self, keys: Sequence[bytes], tokens: int, names: Sequence[str], block_size: int) -> None:
        """Record the length in tokens and the last whole K/V block of each prefix of a prompt's text. Returns nothing.

        With this record the router can tell which blocks a later prompt with the same beginning needs. The length of a
        prefix is an estimate: the prompt's tokens count as spread evenly over its text.

        Args:
            keys: the prefix keys of the prompt's text, shortest first (see prefix_keys()). Nothing is recorded without
                keys.
            tokens: tokens of the whole prompt.
            names: names of the prompt's whole blocks, in order.
            block_size: tokens of a block.
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
        """The Prefix recorded under a prefix key; None if none was recorded or it has been dropped.

        key: hash of the first chunks of a prompt's text (see prefix_keys()).
        """
        return self._prefixes.get(key)

    def estimate_tokens(self, keys: Sequence[bytes]) -> int:
        """Estimated number of tokens of a prompt, an int, from its prefix keys.

        The longest prefix that is recorded counts with its recorded tokens, each further chunk of text with the mean
        number of tokens of a chunk.

        keys: all prefix keys of the prompt's text, shortest prefix first (see prefix_keys()); 0 tokens for no keys.
        """
        n = bisect_left(keys, True, key=lambda key: self.find(key) is None)  # leading keys that are known
        known = self.find(keys[n - 1]) if n else None
        return (known.tokens if known else 0) + int((len(keys) - n) * self.tokens_per_chunk)


class CacheIndex:
    """The router's record of one replica's K/V cache: blocks that it reported, and prompts that were sent to it.

    Attributes:
        incarnation: text that names the replica's cache since its last restart; None before the first report.
        stale: True if the router needs a snapshot of the cache: there was none yet, or events were missed.
        events: True once an event or snapshot has come. Before, the prefixes of prompts that were sent to the replica
            count as cached without a time limit; after, for ASSUMED_SECONDS.
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
        """Forget everything if the replica has restarted, which a new `incarnation` shows. Returns nothing.

        Nothing counts as cached then, and `stale` is True: a snapshot of the cache is needed. If `incarnation` is the
        same, nothing changes.

        incarnation: text that is different for each start of the replica's engine.
        """
        if incarnation != self.incarnation:
            self.incarnation, self.sequence, self.stale = incarnation, 0, True
            self.names.clear()
            self._assumed.clear()

    def apply(self, incarnation: str, sequence: int, event: CacheEvent) -> None:
        """Update the record of a replica's cache with one event from the replica. Returns nothing.

        An event with the number of an earlier one is ignored. If a number is missing, all blocks known from events are
        forgotten, and `stale` stays True until a snapshot comes.

        Args:
            incarnation: text that is different for each start of the replica's engine. If it is a new one, all that was
                recorded is forgotten first.
            sequence: number of the event in its incarnation, from 1.
            event: blocks that were stored or removed, or that the cache was emptied.
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
        """Replace the blocks that the replica has reported by those in a snapshot of its cache. Returns nothing.

        A snapshot is ignored if an event or snapshot with a higher number of the same incarnation was already applied.

        Args:
            incarnation: text that is different for each start of the replica's engine. If it is a new one, all that was
                recorded is forgotten first. Else the prefixes recorded by assume() stay.
            sequence: number of the last event before the snapshot.
            names: names of all blocks in the cache.
        """
        self.restarted(incarnation)
        if sequence < self.sequence:
            return
        self.names, self.sequence, self.stale, self.events = set(names), sequence, False, True

    def assume(self, keys: Sequence[bytes], now: float) -> None:
        """Record that a prompt was sent to the replica, so that its prefixes count as cached. Returns nothing.

        A prefix counts until CONFIRMED_SECONDS after computed(), at most for ASSUMED_SECONDS. It counts without a time
        limit while the replica reports nothing, or `stale` is True. At most ASSUMED_MAX prefixes are kept; the oldest
        are dropped.

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
        """Record that a prompt has been computed. Its assumed prefixes stay in the index for CONFIRMED_SECONDS more.

        A prefix is assumed if the index has it because the prompt was sent to this replica, and not because the replica
        reported it. After CONFIRMED_SECONDS only the replica's events say whether blocks are cached: otherwise the
        index would still show blocks that a small K/V cache has evicted.

        Args:
            keys: the prefix keys of the prompt's text.
            now: the time in seconds.
        """
        for key in keys:
            if key in self._assumed:
                self._assumed[key] = min(self._assumed[key], now + CONFIRMED_SECONDS)

    def cached_tokens(self, keys: Sequence[bytes], memory: PromptMemory, now: float) -> int:
        """Estimated number of a prompt's leading tokens whose K/V this replica has cached, an int; 0 if it has none.

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
        """Ask whether the replica has cached one prefix of a prompt.

        Returns the prefix's number of tokens if it is cached, and None if it is not. 0 means unknown, because no name
        of a K/V block is known for the prefix: it is shorter than a block, or replicas gave no names. A longer prefix
        may still be cached.

        Args:
            key: prefix key of the prefix (see prefix_keys()).
            number: number of text chunks in the prefix.
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
