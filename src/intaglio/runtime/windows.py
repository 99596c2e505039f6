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
    """Returns how many window blocks to provide, as (blocks for each sequence, blocks that all steps share).

    Window blocks are the K/V blocks of layers with a sliding window. If a sequence has r rows in a step, the step reads
    and writes `window` - 1 + r of its positions. These touch at most window // block_size + 3 + r // block_size blocks.

    - Each sequence reserves window // block_size + 3 blocks: the part that does not depend on r.
    - The steps share depth * (max_batch_tokens // block_size) blocks for the other part, because all sequences of a
      step together have at most `max_batch_tokens` rows.

    If the whole context needs no more blocks than a sequence would reserve, the result is (blocks of the context, 0).

    Args:
        window: number of positions that a query sees.
        block_size: tokens in a block.
        context: context length in tokens.
        max_batch_tokens: maximum number of token rows in a step.
        depth: number of steps under way at once.
    """
    most, blocks = window // block_size + 3, -(-context // block_size)
    return (most, depth * (max_batch_tokens // block_size)) if most < blocks else (blocks, 0)


def first_block(position: int, window: int, block_size: int) -> int:
    """Returns the index of the first block of a sequence that a query at `position` sees, counted from 0.

    window: number of positions that a query sees. block_size: tokens in a block.
    """
    return max(0, position - window + 1) // block_size


def blocks_of_step(rows: int, keys: int, window: int, block_size: int) -> int:
    """Returns the number of K/V blocks that the rows of a sequence read and write in a step.

    Only the K/V blocks of layers with a sliding window (window blocks) are counted.

    Args:
        rows: number of token rows of the sequence in the step.
        keys: number of tokens of the sequence up to the end of these rows.
        window: number of positions that a query sees.
        block_size: tokens in a block.
    """
    return -(-keys // block_size) - first_block(keys - rows, window, block_size)


def longest_window(programs: Iterable[Program]) -> int:
    """Returns the length in tokens of the longest sliding window or chunk of all layers; 0 if no layer has one.

    programs: the Programs of all ranks (see Program.windows).
    """
    return max((n for p in programs for n in p.windows.values()), default=0)


def with_windows(
    state: StateSpec, programs: Iterable[Program], window_tokens: int | None, *, context: int, max_batch_tokens: int,
    max_sequences: int, depth: int = 1,
) -> StateSpec:  # fmt: skip
    """Returns a copy of `state`, a StateSpec, in which layers with a sliding window have K/V pages of their own.

    If there are no window pages (see `window_tokens`), it returns `state` itself, and all layers share the same pages.
    A page is the room of a K/V block in the device's memory.

    Args:
        state: sizes of the K/V cache.
        programs: the Programs of all ranks, which say which layers have a window.
        window_tokens: number of tokens in all window pages together, rounded up to whole pages. 0: no window pages.
            None: enough pages that `max_sequences` sequences never wait for one. But there are no window pages if they
            save less than a quarter of the pages, or if a sequence would keep its whole context anyway.
        context: context length in tokens.
        max_batch_tokens: maximum number of token rows in a step.
        max_sequences: maximum number of sequences that run at the same time.
        depth: number of steps under way at once.

    Raises RequestError if `window_tokens` is above 0 and is less than one sequence needs, or no layer has a window.
    """
    window, size = longest_window(programs), state.page_tokens
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
    """Allocator of the window blocks of all sequences, with a prefix cache of its own.

    Window blocks are the K/V blocks of layers with a sliding window. Each is kept in a page, its room in the device's
    memory. If `state.window_pages` is 0, these layers share the pages of other layers, and the methods here do nothing.

    Each running sequence reserves window blocks for its tokens so far and its next drafts, but no more than a window
    needs (see reservations()). Another `step_blocks` blocks are kept for the rows of the steps under way. So a step
    never lacks a window block. If a reservation cannot grow, the scheduler preempts the last running sequence.

    A sequence can reuse a cached prefix only if the window blocks that the next token sees are cached, too. Released
    blocks that are in the prefix cache stay there until their room is needed; the block released first is evicted
    first.

    Args:
        state: sizes of the K/V cache, with the window length and the number of window pages. The last page is used only
            to test a replaced device.
        scope: digest of the engine's BlockScope, which is part of every block's name.
        context: context length in tokens.
        max_batch_tokens: maximum number of token rows in a step.
        max_drafts: maximum number of draft tokens of a sequence in a step.
        depth: number of steps under way at once.

    Attributes:
        limit: number of blocks that all sequences together can reserve.
        step_blocks: number of blocks kept for the rows of the steps under way, which no sequence reserves.

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
        """True if a waiting sequence could reserve its window blocks, after others have given up `freed` blocks."""
        return not self.on or self.reserved - freed + self._needed(sequence) <= self.limit

    def usable(self, names: Many[str]) -> int:
        """Returns how many cached K/V blocks a new sequence can reuse, as far as layers with sliding windows allow.

        The next token after the reused blocks sees some of them through its window. These must also be cached as window
        blocks. The result is the largest number of blocks that meets this condition. It is len(names) if layers with
        windows have no blocks of their own.

        names: names of the blocks at the sequence's beginning that are in the prefix cache of the other layers, in
        order.
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
        """Reserve window blocks for a sequence that starts, and share the cached blocks that its next token sees.

        Returns nothing. Call it only if fits() is True.

        names: names of the cached blocks at the sequence's beginning that it reuses, in order; at most usable() of
        them.
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
        """Increase a running sequence's reservation of window blocks to cover its newest tokens.

        Returns True if it covers them. Returns False, and changes nothing, if all reservations together would then
        exceed `limit`.
        """
        more = self._needed(sequence) - sequence.window_reserved if self.on else 0
        if more > 0 and self.reserved + more > self.limit:
            return False
        sequence.window_reserved += max(0, more)
        self.reserved += max(0, more)
        return True

    def extend(self, sequence: Sequence, stop: int) -> None:
        """Allocate the window blocks that a sequence lacks for its positions below `stop`.

        Called before a step; returns nothing. There are always enough blocks, because of the reservations and the
        `step_blocks`.
        """
        if self.on:
            missing = self.pool.blocks_for(stop) - len(sequence.window_blocks)
            sequence.window_blocks += self.pool.allocate(max(0, missing))

    def add_to_prefix_cache(self, sequence: Sequence, at: int, parent: str, tokens: Many[int]) -> None:
        """Add one of a sequence's full window blocks to the prefix cache. Returns nothing.

        Does nothing if the sequence no longer holds the block.

        Args:
            sequence: the sequence.
            at: index of the block among the sequence's blocks.
            parent: name of the block before it.
            tokens: token ids of the block.
        """
        if self.on and sequence.window_blocks[at] >= 0:
            self.pool.add_to_prefix_cache(sequence.window_blocks[at], parent, tokens)

    def give_back(self, sequence: Sequence) -> None:
        """Release the window blocks that a sequence no longer needs. Called after a step; returns nothing.

        These are the blocks that no later query of the sequence sees, and blocks at the end without computed tokens,
        which rejected drafts had used.
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
        """Release all window blocks of a sequence and its reservation. Returns nothing."""
        self.pool.release([block for block in sequence.window_blocks if block >= 0])
        self.reserved -= sequence.window_reserved
        sequence.window_blocks, sequence.window_reserved = [], 0

    def _needed(self, sequence: Sequence) -> int:
        """Returns the number of window blocks to reserve for a sequence's tokens so far and its next drafts, an int.

        It is at most `self.most`, the largest number of blocks that a window can touch (see reservations()).
        """
        tokens = min(sequence.length + self.max_drafts, sequence.max_kv_tokens(self.context))
        return min(self.most, self.pool.blocks_for(tokens))

    def first_block(self, position: int) -> int:
        """Returns which of a sequence's blocks is the first that a query at `position` sees, as an index from 0."""
        return first_block(position, self.window, self.size)
