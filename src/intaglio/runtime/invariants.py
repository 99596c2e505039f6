"""Engine invariants, which hold between any two steps. Tests check them after every step.

Each invariant is a function that yields one line of text for each violation; check_invariants() runs them all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from intaglio.runtime.engine import Engine


def blocks_conserved(e: Engine) -> Iterator[str]:
    """Yield an error message for each K/V block in a wrong state or with a wrong reference count.

    A block must be in exactly one of three states: free, evictable or held. Its reference count must be the number of
    sequences that hold it.
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
    """Yield an error message for each fault in the window blocks (K/V blocks of layers with a sliding window).

    These rules must hold:

    - A block is in exactly one of three states: free, evictable or held. Its reference count is the number of sequences
      that hold it.
    - A running sequence holds the blocks that its next token sees. Between its steps it holds no more blocks than it
      has reserved.
    - If a held block is in the prefix cache, its name there follows from the sequence's tokens up to the block's end.
    - The reservations of the running sequences add up to `windows.reserved`, which is at most `windows.limit`.
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
    """Yield an error message for each fault in the slots of recurrent state and their reference counts.

    A slot must be in exactly one of three states: free, evictable or held. A running sequence must hold the slot that
    its next step writes, and no other sequence may hold that slot. Once the sequence has computed tokens, it must also
    hold a slot with its own state.
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
    """Yield an error message for each inconsistency of the checkpoints: recurrent states saved for the prefix cache.

    The two maps between block names and slots must agree. Every evictable slot must have a checkpoint; no free slot may
    have one. The block at whose end a checkpoint was saved must be in the prefix cache.
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
    """Yield an error message for each inconsistency of the prefix cache.

    Its map from names to blocks and its map from blocks to names must agree. Every evictable block must be in the
    prefix cache; no free block may be in it. If a sequence holds a block that is in the prefix cache, the block's name
    must follow from the tokens of the sequence.
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
    """Yield an error message for each cached K/V block that would be evicted after the block before it.

    A block may be evictable only if all cached blocks that follow it in a prefix are evictable, too, and are evicted
    earlier. Otherwise the following blocks could not be reached any more, but routers would take the prefix for cached:
    they know only the names of cached blocks.
    """
    pool = e.pool
    order = {block: at for at, block in enumerate(pool.evictable)}
    for block, entry in pool.cached.items():
        parent = pool.index.get(entry.parent)
        if parent in order and order.get(block, len(order)) > order[parent]:
            yield f"block {parent} of the prefix cache is evicted before block {block}, which follows it in a prefix"


def sequences_conserved(e: Engine) -> Iterator[str]:
    """Yield an error message if the counts of choices do not add up, and for each fault in the queues.

    These equations must hold: received = refused + admitted; admitted = finished + suspended + live. Each live sequence
    must be in the queue of its state, and each queue must be in order.
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
    """Yield an error message for each queue that is longer than allowed.

    At most max_sequences sequences may run. At most max_waiting + max_sequences may wait, because preempted sequences
    wait, too.
    """
    scheduler, most = e.scheduler, e.admission.max_waiting
    if len(scheduler.running) > scheduler.max_sequences:
        yield f"{len(scheduler.running)} run, max_sequences is {scheduler.max_sequences}"
    if len(scheduler.waiting) > most + scheduler.max_sequences:
        yield f"{len(scheduler.waiting)} wait, max_waiting is {most}"


def progress_sound(e: Engine) -> Iterator[str]:
    """Yield an error message for each sequence whose progress is inconsistent.

    A sequence that does not run must hold no blocks, and a waiting sequence must have no computed tokens. The computed
    tokens of a running sequence must fit into its blocks. A live sequence must have at least one token left to compute.
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
    """Raise AssertionError if the engine violates an invariant, with one line for each violation. Returns nothing."""
    wrong = [w for invariant in INVARIANTS for w in invariant(engine)]
    if wrong:
        raise AssertionError("engine invariants broken:\n  " + "\n  ".join(wrong))
