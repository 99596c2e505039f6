"""K/V blocks of layers with a sliding window: kept while a query can see them, then given back.

The caches of these layers have blocks of their own (`StateSpec.window_pages`), so that a long sequence holds them only
for its last tokens. Full attention layers keep all blocks, in the pool of kv.py. Cf. the hybrid K/V cache manager of
vLLM. Handles block numbers only; the K/V data is on the device.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Many
from dataclasses import replace

from intaglio.devices import StateSpec
from intaglio.program import Program
from intaglio.runtime.kv import BlockPool, KvError
from intaglio.runtime.request import RequestError
from intaglio.runtime.sequence import Sequence


def most_blocks(window: int, rows: int, block_size: int) -> int:
    """Most window blocks that a sequence holds in a step of `rows` rows: of all positions that the rows see."""
    return (window + rows) // block_size + 2


def decode_rows(max_drafts: int) -> int:
    """Most rows of one sequence in a step once it decodes: drafts, and rows that are repeated after rejected ones."""
    return 2 + 3 * max_drafts


def with_windows(
    state: StateSpec, programs: Iterable[Program], window_tokens: int | None, *, context: int, max_batch_tokens: int,
    max_drafts: int,
) -> StateSpec:  # fmt: skip
    """The state with window pages for the caches of `Program.windows`.

    window_tokens: tokens of all these pages; 0: these caches have the pages of the others. None: enough for as many
    decoding sequences as fit the other pages with 2,048 tokens (or four windows) each, and for one prompt; 0 if that
    would save less than a quarter, or if a context is not longer than what a prompt needs.

    Raises RequestError for fewer tokens than one prompt needs, and if no layer has a window.
    """
    window, size = max((n for p in programs for n in p.windows.values()), default=0), state.page_tokens
    if window_tokens == 0 or (not window and window_tokens is None):
        return state
    blocks = -(-context // size)
    least = min(most_blocks(window, max_batch_tokens, size), blocks) + 1
    if window_tokens is None:
        sequences = max(2, state.pages * size // max(2048, 4 * window))
        pages = sequences * most_blocks(window, decode_rows(max_drafts), size) + least
        return (
            replace(state, window_pages=pages, window=window)
            if pages < 3 * state.pages / 4 and least < blocks
            else state
        )
    if not window:
        raise RequestError(f"window_tokens is {window_tokens}, and no layer of the model has a window; leave it out")
    if window_tokens < least * size:
        raise RequestError(
            f"window_tokens is {window_tokens}; a window of {window} tokens in steps of {max_batch_tokens} needs "
            f"{least * size} or more, or 0 to keep the K/V of all tokens"
        )
    return replace(state, window_pages=-(-window_tokens // size), window=window)


class Windows:
    """Window blocks of all sequences, with a prefix cache of their own. Does nothing if `state.window_pages` is 0.

    A running sequence reserves as many blocks as it may hold at once: first for steps of `max_batch_tokens` rows, and
    once it decodes for decode_rows(). So a step never lacks a window block, and none is preempted for one.

    A prefix of n blocks is found only if the window blocks that its next token sees are found too. Blocks that were
    given back are evicted in the order in which they were given back.

    Args:
        state: with the number of window pages, of which the last is for the probe of a new device, and the window.
        scope: digest of the BlockScope for the names of blocks.
        context: positions of the model.
        max_batch_tokens: rows of a step.
        max_drafts: draft tokens of a sequence in a step.
    """

    def __init__(
        self, state: StateSpec, scope: str, *, context: int, max_batch_tokens: int, max_drafts: int
    ) -> None:  # fmt: skip
        self.on, self.window, self.size, self.context = state.window_pages > 0, state.window, state.page_tokens, context
        self.prefill_blocks = most_blocks(state.window, max_batch_tokens, self.size)
        self.decode_blocks = min(self.prefill_blocks, most_blocks(state.window, decode_rows(max_drafts), self.size))
        largest = min(self.prefill_blocks, -(-context // self.size))
        if self.on and state.window_pages < largest + 1:
            raise KvError(
                f"{state.window_pages} window pages; a sequence with a window of {state.window} tokens in steps of "
                f"{max_batch_tokens} needs {largest + 1}. Give more, or 0 for the same pages as other layers"
            )
        self.spare = state.window_pages - 1
        self.pool = BlockPool(max(1, self.spare), self.size, scope)
        self.reserved = 0

    def fits(self, sequence: Sequence, freed: int = 0) -> bool:
        """True if a waiting sequence can reserve its blocks, once others have freed reservations of `freed` blocks."""
        return not self.on or self.reserved - freed + self._needed(sequence) <= self.pool.total

    def usable(self, names: Many[str]) -> int:
        """How many of the leading blocks of these names a sequence can start after.

        They are in the pool of the other layers; the window blocks that the next token sees must be here.
        """
        if not self.on:
            return len(names)
        deepest = run = 0
        for n, name in enumerate(names, 1):
            run = run + 1 if name in self.pool.index else 0
            if run >= n - self.first_block(n * self.size):
                deepest = n
        return deepest

    def start(self, sequence: Sequence, names: Many[str]) -> None:
        """Reserve a sequence's blocks, and share those of its prefix, whose blocks have these names."""
        if not self.on:
            return
        sequence.window_reserved = self._needed(sequence)
        self.reserved += sequence.window_reserved
        first = self.first_block(len(names) * self.size)
        shared = [self.pool.index[name] for name in names[first:]]
        self.pool.share(shared)
        sequence.window_blocks = [-1] * first + shared

    def extend(self, sequence: Sequence, stop: int) -> None:
        """Before a step: give a sequence window blocks for its positions below `stop`."""
        if self.on:
            missing = self.pool.blocks_for(stop) - len(sequence.window_blocks)
            sequence.window_blocks += self.pool.allocate(max(0, missing))

    def add_to_prefix_cache(self, sequence: Sequence, at: int, parent: str, tokens: Many[int]) -> None:
        """Add a sequence's full block number `at`, a child of the block named `parent`, to the prefix cache."""
        if self.on and sequence.window_blocks[at] >= 0:
            self.pool.add_to_prefix_cache(sequence.window_blocks[at], parent, tokens)

    def give_back(self, sequence: Sequence) -> None:
        """After a step: release the blocks that no later query of the sequence sees, and those of rejected drafts."""
        if not self.on:
            return
        held, needed = sequence.window_blocks, self.pool.blocks_for(sequence.length)
        self.pool.release(held[needed:])
        del held[needed:]
        at = min(self.first_block(sequence.computed), len(held)) - 1
        while at >= 0 and held[at] >= 0:
            at -= 1
        for i in range(at + 1, min(self.first_block(sequence.computed), len(held))):
            self.pool.release([held[i]])
            held[i] = -1
        if sequence.decoding and sequence.window_reserved > self.decode_blocks:
            self.reserved -= sequence.window_reserved - self.decode_blocks
            sequence.window_reserved = self.decode_blocks

    def remove(self, sequence: Sequence) -> None:
        """Release all blocks of a sequence and its reservation."""
        self.pool.release([block for block in sequence.window_blocks if block >= 0])
        self.reserved -= sequence.window_reserved
        sequence.window_blocks, sequence.window_reserved = [], 0

    def _needed(self, sequence: Sequence) -> int:
        """Most blocks that a sequence that starts now can hold at once."""
        return min(self.prefill_blocks, self.pool.blocks_for(sequence.max_kv_tokens(self.context)))

    def first_block(self, position: int) -> int:
        """The number of the first block that a query at `position` sees."""
        return max(0, position - self.window + 1) // self.size
