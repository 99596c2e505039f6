"""What is true of an engine between any two steps. Tests check it after every one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from intaglio.runtime.engine import Engine


def blocks_conserved(e: Engine) -> Iterator[str]:
    """Every block is free or held, never both; a refcount is the number of requests that hold the block."""
    pool, free = e.pool, set(e.pool.free)
    holders = Counter(b for r in e.requests.values() for b in r.blocks)
    if len(pool.free) + pool.held != pool.total or len(free) != len(pool.free):
        yield f"{len(pool.free)} free + {pool.held} held blocks are not {pool.total}"
    for block, count in enumerate(pool.refcounts):
        if count != holders[block]:
            yield f"block {block} has refcount {count} and {holders[block]} holders"
        if (count == 0) != (block in free):
            yield f"block {block} with refcount {count} is {'' if block in free else 'not '}free"


def requests_conserved(e: Engine) -> Iterator[str]:
    """Every request added has ended or stands in the one queue its state names."""
    s = e.scheduler
    if e.added != e.ended + len(e.requests):
        yield f"{e.added} requests were added, {e.ended} ended, {len(e.requests)} are live"
    for state, queue in (("waiting", s.waiting), ("running", s.running)):
        ids = sorted(r.id for r in queue)
        live = sorted(r.id for r in e.requests.values() if r.state == state)
        if ids != live:
            yield f"the {state} queue holds {ids}, but {live} are {state}"
        if [r.arrival for r in queue] != sorted(r.arrival for r in queue):
            yield f"the {state} queue is not in order of arrival"


def progress_sound(e: Engine) -> Iterator[str]:
    """Waiting requests hold nothing; running ones have a token left to compute and blocks for what is computed."""
    for r in e.requests.values():
        if r.state == "waiting" and (r.blocks or r.computed):
            yield f"request {r.id} waits with {len(r.blocks)} blocks and {r.computed} tokens computed"
        if r.remaining < 1 or r.computed > len(r.blocks) * e.state.page_tokens:
            yield f"request {r.id}: {r.computed} of {r.length} tokens computed in {len(r.blocks)} blocks"


def check_invariants(engine: Engine) -> None:
    """Raise AssertionError naming everything that is wrong."""
    wrong = [w for rule in (blocks_conserved, requests_conserved, progress_sound) for w in rule(engine)]
    if wrong:
        raise AssertionError("engine invariants broken:\n  " + "\n  ".join(wrong))
