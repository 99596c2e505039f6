"""Engine invariants, which hold between any two steps. Tests check them after every step.

Each invariant is a function that yields one line of text for each violation; check_invariants() runs them all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from intaglio.runtime.engine import Engine


def blocks_conserved(e: Engine) -> Iterator[str]:
    """Yield a text for each K/V block that is not exactly one of free, evictable and held, or has a wrong refcount.

    The refcount must be the number of sequences that hold the block.
    """
    pool, free = e.pool, set(e.pool.free)
    holders = Counter(b for choices in e.requests.values() for s in choices for b in s.blocks)
    held = {b for b, count in enumerate(pool.refcounts) if count}
    if len(free) != len(pool.free) or len(free) + len(pool.evictable) + len(held) != pool.total:
        yield f"{len(pool.free)} free + {len(pool.evictable)} evictable + {len(held)} held blocks are not {pool.total}"
    for block, count in enumerate(pool.refcounts):
        if count != holders[block]:
            yield f"block {block} has refcount {count} and {holders[block]} holders"
        if (block in free) + (block in pool.evictable) + (count > 0) != 1:
            yield f"block {block} is not one of free, evictable and held"


def windows_conserved(e: Engine) -> Iterator[str]:
    """Yield a text for each error in the window blocks (K/V of layers with a sliding window) and their reservations.

    A block must be exactly one of free, evictable and held. Its refcount must be the number of sequences that hold it.
    A running sequence must hold the blocks that its next token sees and, between its steps, no more than it reserved.
    The prefix cache's key of a held block must be the hash of the sequence's tokens up to the block's end. The
    reservations of all running sequences must add up to `e.windows.reserved`, which is at most
    `e.windows.limit`.
    """
    windows, holders = e.windows, Counter[int]()
    pool, running = windows.pool, e.scheduler.running
    if not windows.on:
        return
    for s in (s for choices in e.requests.values() for s in choices):
        held = [b for b in s.window_blocks if b >= 0]
        holders.update(held)
        most = s.window_reserved + (windows.step_blocks if s.in_flight else 0)
        if (s.window_reserved > 0) != (s.state == "running") or len(held) > most:
            yield f"{s.request.id} is {s.state}, reserves {s.window_reserved} window blocks and holds {len(held)}"
        seen = range(max(0, s.computed - windows.window + 1), s.computed)
        if s.state == "running" and any(s.window_blocks[at // pool.block_size] < 0 for at in seen):
            yield f"{s.request.id} has computed {s.computed} tokens and lacks a block of its window {s.window_blocks}"
        for block, name in zip(s.window_blocks, pool.names.chain(s.tokens(0, s.length), s.salt), strict=False):
            if block in pool.cached and pool.cached[block].name != name:
                yield f"window block {block} of {s.request.id} is in the prefix cache with other tokens"
    if windows.reserved != sum(s.window_reserved for s in running) or windows.reserved > windows.limit:
        yield f"{windows.reserved} of {windows.limit} window blocks are reserved, not as many as sequences reserve"
    for block, count in enumerate(pool.refcounts):
        if count != holders[block]:
            yield f"window block {block} has refcount {count} and {holders[block]} holders"
        if (block in pool.free) + (block in pool.evictable) + (count > 0) != 1:
            yield f"window block {block} is not one of free, evictable and held"


def slots_conserved(e: Engine) -> Iterator[str]:
    """Yield a text for each error in the slots of recurrent state and their refcounts.

    A slot must be exactly one of free, evictable and held. A running sequence must hold the slot that its next step
    writes, alone. Once it has computed tokens, it must also hold a slot with its state.
    """
    pool, held = e.slots, Counter[int]()
    for s in (s for choices in e.requests.values() for s in choices):
        running = s.state == "running" and pool.total > 0
        if (s.next_state_slot >= 0) != running or (s.state_slot >= 0) != (running and s.computed > 0):
            slots = s.state_slot, s.next_state_slot
            yield f"{s.request.id} is {s.state}, has computed {s.computed} tokens and holds slots {slots}"
        if running and (pool.refcounts[s.next_state_slot] != 1 or s.next_state_slot in pool.named):
            yield f"{s.request.id} writes slot {s.next_state_slot}, which others need"
        held.update(slot for slot in (s.state_slot, s.next_state_slot) if slot >= 0)
    free = set(pool.free)
    for slot, count in enumerate(pool.refcounts):
        if count != held[slot]:
            yield f"slot {slot} has refcount {count} and {held[slot]} holders"
        if (slot in free) + (slot in pool.evictable) + (count > 0) != 1 or len(free) != len(pool.free):
            yield f"slot {slot} is not one of free, evictable and held"


def checkpoints_sound(e: Engine) -> Iterator[str]:
    """Yield a text for each inconsistency of the recurrent states that are saved for the prefix cache (checkpoints).

    The map from block names to slots and the map from slots to block names must agree. Evictable slots must have a
    saved state, free ones must not. Each saved state must stand at the end of a block in the prefix cache.
    """
    slots = e.slots
    if {name: slot for slot, name in slots.named.items()} != slots.checkpoints:
        yield "the checkpoints by name and by slot disagree"
    if known := set(slots.free) & slots.named.keys():
        yield f"free slots {sorted(known)} are checkpoints"
    if unknown := slots.evictable.keys() - slots.named.keys():
        yield f"evictable slots {sorted(unknown)} are no checkpoints"
    if lost := slots.checkpoints.keys() - e.pool.index.keys():
        yield f"{len(lost)} checkpoints stand at the end of blocks that are not in the prefix cache"


def prefix_cache_sound(e: Engine) -> Iterator[str]:
    """Yield a text for each inconsistency of the prefix cache.

    Its index and its table of blocks must agree. Evictable blocks must be in the prefix cache, free blocks must not. A
    held block in the prefix cache must have the name that follows from the tokens of its sequence.
    """
    pool = e.pool
    if {cached.name: block for block, cached in pool.cached.items()} != pool.index:
        yield "the prefix index and the cached blocks disagree"
    if known := set(pool.free) & pool.cached.keys():
        yield f"free blocks {sorted(known)} are in the prefix index"
    if unknown := pool.evictable.keys() - pool.cached.keys():
        yield f"evictable blocks {sorted(unknown)} are not in the prefix index"
    for choices in e.requests.values():
        for s in choices:
            for block, name in zip(s.blocks, pool.names.chain(s.tokens(0, s.length), s.salt), strict=False):
                if block in pool.cached and pool.cached[block].name != name:
                    yield f"block {block} of request {s.request.id} is in the prefix index under other tokens"


def parents_kept(e: Engine) -> Iterator[str]:
    """Yield a text for each K/V block that would leave the prefix cache before a block that follows it in a prefix.

    A block in the cache may be evictable only if all cached blocks that follow it are evictable, too, and are evicted
    earlier. Otherwise, blocks would stay in the cache although no cached prefix leads to them. Routers know only the
    names of cached blocks, and would take a prefix for cached because its last block is.
    """
    pool = e.pool
    order = {block: at for at, block in enumerate(pool.evictable)}
    for block, entry in pool.cached.items():
        parent = pool.index.get(entry.parent)
        if parent in order and order.get(block, len(order)) > order[parent]:
            yield f"block {parent} of the prefix cache is evicted before block {block}, which follows it in a prefix"


def sequences_conserved(e: Engine) -> Iterator[str]:
    """Yield a text for each of these sums that does not hold, and for each error in the queues.

    Choices received = refused + admitted. Choices admitted = finished + suspended + live. Each live sequence must be in
    the queue of its state, and each queue must be in order.
    """
    scheduler, counts = e.scheduler, e.counts
    live = e.live.sequences()
    if counts.received != counts.refused.total() + counts.admitted:
        yield f"{counts.received} choices were received, {counts.refused} refused, {counts.admitted} admitted"
    if counts.admitted != counts.finished.total() + counts.suspended + len(live):
        ended = f"{counts.finished} finished, {counts.suspended} suspended"
        yield f"{counts.admitted} choices were admitted, {ended}, {len(live)} are live"
    for state, queue in (("waiting", scheduler.waiting), ("running", scheduler.running)):
        if sorted(s.order for s in queue) != sorted(s.order for s in live if s.state == state):
            yield f"the {state} queue does not hold exactly the {state} sequences"
        if [s.order for s in queue] != sorted(s.order for s in queue):
            yield f"the {state} queue is out of order"


def queues_bounded(e: Engine) -> Iterator[str]:
    """Yield a text for each queue that is over its limit.

    At most max_sequences run. At most max_waiting + max_sequences wait, because preempted sequences wait too.
    """
    scheduler, most = e.scheduler, e.admission.max_waiting
    if len(scheduler.running) > scheduler.max_sequences:
        yield f"{len(scheduler.running)} run, max_sequences is {scheduler.max_sequences}"
    if len(scheduler.waiting) > most + scheduler.max_sequences:
        yield f"{len(scheduler.waiting)} wait, max_waiting is {most}"


def progress_sound(e: Engine) -> Iterator[str]:
    """Yield a text for each sequence with inconsistent progress.

    Only a running sequence may hold blocks or have computed tokens. Its blocks must have room for the tokens computed.
    A live sequence must have at least one token left to compute.
    """
    for choices in e.requests.values():
        for s in choices:
            if s.state != "running" and (s.blocks or (s.computed and s.state == "waiting")):
                yield f"{s.request.id} is {s.state} with {len(s.blocks)} blocks and {s.computed} tokens computed"
            if s.state != "ended" and (s.remaining < 1 or s.computed > len(s.blocks) * e.pool.block_size):
                yield f"{s.request.id}: {s.computed} of {s.length} tokens computed in {len(s.blocks)} blocks"


INVARIANTS = (
    blocks_conserved,
    windows_conserved,
    slots_conserved,
    prefix_cache_sound,
    parents_kept,
    checkpoints_sound,
    sequences_conserved,
    queues_bounded,
    progress_sound,
)


def check_invariants(engine: Engine) -> None:
    """Raise AssertionError with a line for each violation of the invariants; return nothing if there is none."""
    wrong = [w for invariant in INVARIANTS for w in invariant(engine)]
    if wrong:
        raise AssertionError("engine invariants broken:\n  " + "\n  ".join(wrong))
