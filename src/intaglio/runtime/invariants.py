"""What is true of an engine between any two steps. Tests check it after every one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from intaglio.runtime.engine import Engine


def blocks_conserved(e: Engine) -> Iterator[str]:
    """Every block is free, cached or held, and only one of them; a refcount is the number of sequences that hold it."""
    pool, free = e.pool, set(e.pool.free)
    holders = Counter(b for choices in e.requests.values() for s in choices for b in s.blocks)
    held = {b for b, count in enumerate(pool.refcounts) if count}
    if len(free) != len(pool.free) or len(free) + len(pool.cached) + len(held) != pool.total:
        yield f"{len(pool.free)} free + {len(pool.cached)} cached + {len(held)} held blocks are not {pool.total}"
    for block, count in enumerate(pool.refcounts):
        if count != holders[block]:
            yield f"block {block} has refcount {count} and {holders[block]} holders"
        if (block in free) + (block in pool.cached) + (count > 0) != 1:
            yield f"block {block} is not one of free, cached and held"


def cache_sound(e: Engine) -> Iterator[str]:
    """The index and the blocks' names agree, no free block is known, and a block holds the tokens it is filed under."""
    pool = e.pool
    if {name: block for block, (_, name) in pool.filed.items()} != pool.index:
        yield "the prefix index and the blocks' names disagree"
    if known := set(pool.free) & pool.filed.keys():
        yield f"free blocks {sorted(known)} are in the prefix index"
    if unknown := pool.cached.keys() - pool.filed.keys():
        yield f"cached blocks {sorted(unknown)} are not in the prefix index"
    for choices in e.requests.values():
        for s in choices:
            for at, block in enumerate(s.blocks):
                tokens = s.tokens(at * pool.block_tokens, (at + 1) * pool.block_tokens)
                if block in pool.filed and pool.filed[block][1][1] != tuple(tokens):
                    yield f"block {block} of request {s.request.id} is filed under other tokens"


def sequences_conserved(e: Engine) -> Iterator[str]:
    """Every choice asked for was refused or admitted; every one admitted has ended, or stands in the queue it names."""
    scheduler, counts = e.scheduler, e.counts
    live = [s for choices in e.requests.values() for s in choices if s.state != "ended"]
    if counts.received != counts.refused.total() + counts.admitted:
        yield f"{counts.received} choices were asked for, {counts.refused} refused, {counts.admitted} admitted"
    if counts.admitted != counts.finished.total() + len(live):
        yield f"{counts.admitted} choices were admitted, {counts.finished} finished, {len(live)} are live"
    for state, queue in (("waiting", scheduler.waiting), ("running", scheduler.running)):
        if sorted(s.order for s in queue) != sorted(s.order for s in live if s.state == state):
            yield f"the {state} queue is not those that are {state}"
        if [s.order for s in queue] != sorted(s.order for s in queue):
            yield f"the {state} queue is out of order"


def bounded(e: Engine) -> Iterator[str]:
    """Queues are within their limits; those preempted wait beside the new ones."""
    scheduler = e.scheduler
    if len(scheduler.running) > scheduler.max_sequences:
        yield f"{len(scheduler.running)} run, max_sequences is {scheduler.max_sequences}"
    if len(scheduler.waiting) > e.max_waiting + scheduler.max_sequences:
        yield f"{len(scheduler.waiting)} wait, max_waiting is {e.max_waiting}"


def progress_sound(e: Engine) -> Iterator[str]:
    """Waiting sequences hold nothing; running ones have a token left to compute and blocks for what is computed."""
    for choices in e.requests.values():
        for s in choices:
            if s.state != "running" and (s.blocks or (s.computed and s.state == "waiting")):
                yield f"{s.request.id} is {s.state} with {len(s.blocks)} blocks and {s.computed} tokens computed"
            if s.state != "ended" and (s.remaining < 1 or s.computed > len(s.blocks) * e.state.page_tokens):
                yield f"{s.request.id}: {s.computed} of {s.length} tokens computed in {len(s.blocks)} blocks"


RULES = (blocks_conserved, cache_sound, sequences_conserved, bounded, progress_sound)


def check_invariants(engine: Engine) -> None:
    """Raise AssertionError naming everything that is wrong."""
    wrong = [w for rule in RULES for w in rule(engine)]
    if wrong:
        raise AssertionError("engine invariants broken:\n  " + "\n  ".join(wrong))
