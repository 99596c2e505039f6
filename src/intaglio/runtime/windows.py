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


def reservations(
    window: int, block_size: int, *, context: int, max_batch_tokens: int, depth: int
) -> tuple[int, int]:  # fmt: skip
    """The tuple (most window blocks that a sequence reserves, window blocks that steps need besides all reservations).

    A step of r rows reads and writes window - 1 + r positions of a sequence. These lie in at most window // block_size
    + 3 + r // block_size blocks. A sequence reserves the blocks without the last term. All sequences in a step together
    have at most `max_batch_tokens` rows, so the last term is added once for each of the `depth` steps under way. If a
    whole context has no more blocks than that, a sequence reserves those of the context, and steps need none besides.

    window: positions that a query sees. block_size: tokens in a block. context: context length in tokens.
    """
    most, blocks = window // block_size + 3, -(-context // block_size)
    return (most, depth * (max_batch_tokens // block_size)) if most < blocks else (blocks, 0)


def with_windows(
    state: StateSpec, programs: Iterable[Program], window_tokens: int | None, *, context: int, max_batch_tokens: int,
    max_sequences: int, depth: int = 1,
) -> StateSpec:  # fmt: skip
    """`state` with window pages for the caches of `Program.windows` added, as a StateSpec; unchanged if there are none.

    window_tokens: tokens of all window pages together, rounded up to whole pages. 0: none; layers with a window then
    have the same pages as the others. None: enough for `max_sequences` sequences of any length, so that no sequence
    waits for a window block; but none if that would save less than a quarter of the pages, or if a context is not
    longer than what a sequence keeps. depth: number of steps under way at once.

    Raises RequestError if `window_tokens` is above 0 and less than one sequence needs, or no layer has a window.
    """
    window, size = max((n for p in programs for n in p.windows.values()), default=0), state.page_tokens
    if window_tokens == 0 or (not window and window_tokens is None):
        return state
    most, steps = reservations(window, size, context=context, max_batch_tokens=max_batch_tokens, depth=depth)
    if window_tokens is None:
        pages = max_sequences * most + steps + 1
        saves = pages <= 3 * state.pages / 4 and most * size < context
        return replace(state, window_pages=pages, window=window) if saves else state
    if not window:
        raise RequestError(f"window_tokens is {window_tokens}, and no layer of the model has a window; leave it out")
    least = most + steps + 1
    if window_tokens < least * size:
        raise RequestError(
            f"window_tokens is {window_tokens}; a window of {window} tokens in steps of {max_batch_tokens} needs "
            f"{least * size} or more, or 0 to keep the K/V of all tokens"
        )
    return replace(state, window_pages=-(-window_tokens // size), window=window)


class Windows:
    """Window blocks (K/V of layers with a sliding window) of all sequences, with a prefix cache of their own.

    Does nothing if `state.window_pages` is 0.

    A running sequence reserves the blocks of its tokens so far and of its next drafts, up to those of reservations().
    So a step never lacks a window block. When a reservation cannot grow, the scheduler preempts the last sequence.
    A prefix of n blocks is found only if the window blocks that its next token sees are found too. Blocks that were
    given back are evicted in the order in which they were given back.

    Args:
        state: gives the window and the number of window pages, of which the last is for the probe of a new device.
        scope: digest of the BlockScope for the names of blocks.
        context: context length in tokens.
        max_batch_tokens: most token rows in a step.
        max_drafts: most draft tokens of a sequence in a step.
        depth: number of steps under way at once.

    Attributes:
        limit: blocks that all sequences together can reserve.
        step_blocks: blocks that steps need besides all reservations.

    Raises KvError if there are fewer window pages than one sequence needs.
    """

    def __init__(
        self, state: StateSpec, scope: str, *, context: int, max_batch_tokens: int, max_drafts: int, depth: int = 1
    ) -> None:  # fmt: skip
        self.on, self.window, self.size, self.context = state.window_pages > 0, state.window, state.page_tokens, context
        self.max_drafts = max_drafts
        self.most, self.step_blocks = reservations(
            state.window, self.size, context=context, max_batch_tokens=max_batch_tokens, depth=depth
        )
        least = self.most + self.step_blocks + 1
        if self.on and state.window_pages < least:
            raise KvError(
                f"{state.window_pages} window pages; a sequence with a window of {state.window} tokens in steps of "
                f"{max_batch_tokens} needs {least}. Give more, or 0 for the same pages as other layers"
            )
        self.spare = state.window_pages - 1
        self.pool = BlockPool(max(1, self.spare), self.size, scope)
        self.reserved, self.limit = 0, self.spare - self.step_blocks if self.on else 0

    def fits(self, sequence: Sequence, freed: int = 0) -> bool:
        """True if a waiting sequence can reserve its blocks, once others have freed reservations of `freed` blocks."""
        return not self.on or self.reserved - freed + self._needed(sequence) <= self.limit

    def usable(self, names: Many[str]) -> int:
        """How many of the blocks `names`, from the first on, a new sequence can reuse.

        names: names of its leading blocks, which are in the prefix cache of the other layers. After the blocks that it
        reuses, the window blocks that its next token sees must be in this prefix cache.
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
        """Reserve the window blocks of a sequence that starts, and share those of its prefix that its next token sees.

        names: names of the blocks of the prefix.
        """
        if not self.on:
            return
        sequence.window_reserved = self._needed(sequence)
        self.reserved += sequence.window_reserved
        first = self.first_block(len(names) * self.size)
        shared = [self.pool.index[name] for name in names[first:]]
        self.pool.share(shared)
        sequence.window_blocks = [-1] * first + shared

    def grow(self, sequence: Sequence) -> bool:
        """Reserve the blocks of a sequence's newest tokens. Returns True.

        Returns False, and reserves none, if other sequences have reserved the rest.
        """
        more = self._needed(sequence) - sequence.window_reserved if self.on else 0
        if more > 0 and self.reserved + more > self.limit:
            return False
        sequence.window_reserved += max(0, more)
        self.reserved += max(0, more)
        return True

    def extend(self, sequence: Sequence, stop: int) -> None:
        """Before a step: give a sequence window blocks for its positions below `stop`."""
        if self.on:
            missing = self.pool.blocks_for(stop) - len(sequence.window_blocks)
            sequence.window_blocks += self.pool.allocate(max(0, missing))

    def add_to_prefix_cache(self, sequence: Sequence, at: int, parent: str, tokens: Many[int]) -> None:
        """Add a sequence's full block at index `at`, a child of the block named `parent`, to the prefix cache.

        tokens: the block's token ids. Does nothing if the block was given back.
        """
        if self.on and sequence.window_blocks[at] >= 0:
            self.pool.add_to_prefix_cache(sequence.window_blocks[at], parent, tokens)

    def give_back(self, sequence: Sequence) -> None:
        """After a step: release the blocks that no later query of the sequence sees.

        The sequence's last blocks are released too if no computed token is in them, as after rejected drafts.
        """
        if not self.on:
            return
        held, needed = sequence.window_blocks, self.pool.blocks_for(sequence.computed)
        self.pool.release(held[needed:])
        del held[needed:]
        at = min(self.first_block(sequence.computed), len(held)) - 1
        while at >= 0 and held[at] >= 0:
            at -= 1
        for i in range(at + 1, min(self.first_block(sequence.computed), len(held))):
            self.pool.release([held[i]])
            held[i] = -1

    def remove(self, sequence: Sequence) -> None:
        """Release all blocks of a sequence and its reservation."""
        self.pool.release([block for block in sequence.window_blocks if block >= 0])
        self.reserved -= sequence.window_reserved
        sequence.window_blocks, sequence.window_reserved = [], 0

    def _needed(self, sequence: Sequence) -> int:
        """Number of blocks to reserve for a sequence's tokens so far and its next drafts; at most `most`."""
        tokens = min(sequence.length + self.max_drafts, sequence.max_kv_tokens(self.context))
        return min(self.most, self.pool.blocks_for(tokens))

    def first_block(self, position: int) -> int:
        """The index, among a sequence's blocks, of the first block that a query at `position` sees."""
        return max(0, position - self.window + 1) // self.size
