"""Bugs to be found: each breaks the engine of a world in one small way that has happened to somebody.

A mutant says where it strikes; if the simulation lets one live, it is the simulation that is wanting.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from intaglio.runtime import Event, Fault, Piece, Refused, Request, Scheduler, Sequence
from intaglio.runtime.sampling import edits
from simulation.world import World

Mutant = Callable[[World], None]


def skips_a_decrement(w: World) -> None:
    """The last block of whatever ends stays held."""
    release = w.engine.pool.release
    w.engine.pool.release = lambda blocks: release(blocks[:-1])  # type: ignore[method-assign]


def frees_a_block_twice_over(w: World) -> None:
    """A shared block is free as soon as its first holder lets go."""
    pool, release = w.engine.pool, w.engine.pool.release

    def broken(blocks: list[int]) -> None:
        for block in blocks:
            pool.refcounts[block] = 1
        release(blocks)

    pool.release = broken  # type: ignore[method-assign,assignment]


def reuses_a_block_early(w: World) -> None:
    """What is allocated may still be held by another."""
    pool, allocate = w.engine.pool, w.engine.pool.allocate

    def broken(n: int) -> list[int]:
        blocks = allocate(n)
        held = [b for s in w.engine.scheduler.running for b in s.blocks if pool.refcounts[b]]
        return [held[0], *blocks[1:]] if held and blocks else blocks

    pool.allocate = broken  # type: ignore[method-assign]


def shares_across_salts(w: World) -> None:
    find, file = w.engine.pool.find, w.engine.pool.file
    w.engine.pool.find = lambda tokens, salt: find(tokens, None)  # type: ignore[method-assign]
    w.engine.pool.file = lambda block, parent, tokens: file(  # type: ignore[method-assign]
        block, None if isinstance(parent, str) else parent, tokens
    )


def trusts_a_hash(w: World) -> None:
    """Blocks are found by 5 bits of hash, not by their tokens."""
    find, file = w.engine.pool.find, w.engine.pool.file
    size = w.engine.pool.block_tokens

    def blurred(tokens: Any) -> list[int]:
        hashes = [sum(tokens[at : at + size]) % 32 for at in range(0, len(tokens) - size + 1, size)]
        return [h for h in hashes for _ in range(size)]

    w.engine.pool.find = lambda tokens, salt: find(blurred(tokens), salt)  # type: ignore[method-assign]
    w.engine.pool.file = lambda block, parent, tokens: file(block, parent, blurred(tokens))  # type: ignore[method-assign]


def ignores_what_came_before(w: World) -> None:
    """A block is found by its own tokens alone, wherever they stood."""
    find, file = w.engine.pool.find, w.engine.pool.file
    pool = w.engine.pool

    def broken(tokens: Any, salt: Any) -> list[int]:
        size, blocks = pool.block_tokens, []
        for at in range(0, len(tokens) - size + 1, size):
            found = find(tokens[at : at + size], salt)
            if not found:
                break
            blocks += found
        return blocks

    pool.find = broken  # type: ignore[method-assign]
    pool.file = lambda block, parent, tokens: file(block, None, tokens)  # type: ignore[method-assign]


def files_a_block_before_it_is_full(w: World) -> None:
    settle = w.engine.scheduler.settle

    def broken(s: Sequence) -> None:
        computed = s.computed
        s.computed = min(s.length, computed + 1, len(s.blocks) * w.engine.pool.block_tokens)
        settle(s)
        s.computed = computed

    w.engine.scheduler.settle = broken  # type: ignore[method-assign]


def keeps_the_cache_of_a_lost_device(w: World) -> None:
    w.engine.pool.forget = lambda: None  # type: ignore[method-assign]


def goes_on_with_a_lost_device(w: World) -> None:
    w.engine._replaced = lambda: True  # type: ignore[method-assign]


def skips_recomputing(w: World) -> None:
    admit = w.engine.scheduler._admit

    def broken() -> Sequence | None:
        s = admit()
        if s is not None and s.preemptions:
            s.computed = max(s.computed, s.length - 2)
        return s

    w.engine.scheduler._admit = broken  # type: ignore[method-assign]


def drops_an_abort(w: World) -> None:
    abort = w.engine.abort
    w.engine.abort = lambda id: [] if id.endswith("3") else abort(id)  # type: ignore[method-assign]


def emits_twice(w: World) -> None:
    emit = w.engine._emit

    def broken(event: Event) -> None:
        emit(event)
        if event.token is not None and event.token % 16 == 0:
            emit(event)

    w.engine._emit = broken  # type: ignore[method-assign]


def loses_a_token(w: World) -> None:
    emit = w.engine._emit

    def broken(event: Event) -> None:
        if event.token is None or event.token % 32 or event.finish_reason:
            emit(event)

    w.engine._emit = broken  # type: ignore[method-assign]


def speaks_after_the_end(w: World) -> None:
    report, late = w.engine._report, list[Event]()

    def broken(plan: list[Piece], began: float) -> list[Event]:
        events = [*late, *report(plan, began)]
        late[:] = [replace(e, finish_reason=None, usage=None) for e in events if e.finish_reason and e.scored]
        return events

    w.engine._report = broken  # type: ignore[method-assign]


def believes_every_guess(w: World) -> None:
    """What comes after a wrong guess is kept."""
    account = w.engine._account

    def broken(piece: Piece, chunk: Any, result: Any, row: int) -> None:
        drawn = result.tokens[row : row + len(piece.drafts)].tolist() if piece.last else []
        account(replace(piece, drafts=tuple(drawn)), chunk, result, row)

    w.engine._account = broken  # type: ignore[method-assign]


def blames_for_a_guess(w: World) -> None:
    """A launch that failed is tried again with its guesses."""
    launch, last = w.engine._launch, list[list[Piece]]()

    def broken(plan: list[Piece], again: bool = True) -> None:
        last[:] = [plan] if again else last
        launch(plan if again else last[0], again)

    w.engine._launch = broken  # type: ignore[method-assign]


def forgets_to_roll_the_grammar_back(w: World) -> None:
    add = w.engine.add

    def broken(request: Request) -> list[Sequence]:
        choices = add(request)
        for s in choices:
            if s.matcher:
                s.matcher.rollback = lambda n: None  # type: ignore[method-assign]
        return choices

    w.engine.add = broken  # type: ignore[method-assign]


def never_looks_at_the_clock(w: World) -> None:
    w.engine._expire = lambda now: None  # type: ignore[method-assign]


def counts_the_queue_deadline_for_ever(w: World) -> None:
    """A request that has started is still ended by its queue_timeout."""
    add = w.engine.add

    def broken(request: Request) -> list[Sequence]:
        timeouts = [t for t in (request.timeout, request.queue_timeout) if t is not None]
        return add(replace(request, timeout=min(timeouts, default=None)))

    w.engine.add = broken  # type: ignore[method-assign]


def admits_while_draining(w: World) -> None:
    admit = w.engine._admit

    def broken(request: Request) -> float:
        try:
            return admit(request)
        except Refused as e:
            if e.reason != "draining":
                raise
        return 0.0

    w.engine._admit = broken  # type: ignore[method-assign]


def takes_everyone_to_be_in_a_hurry(w: World) -> None:
    """A request without a deadline is refused as late when it would take long."""
    admit = w.engine._admit
    w.engine._admit = lambda request: admit(replace(request, timeout=request.timeout or 3.0))  # type: ignore[method-assign]


def admits_without_end(w: World) -> None:
    w.engine.max_waiting = 10**9


def takes_an_id_twice(w: World) -> None:
    add = w.engine.add

    def broken(request: Request) -> list[Sequence]:
        w.engine.requests.pop(request.id, None)
        return add(request)

    w.engine.add = broken  # type: ignore[method-assign]


def ignores_priority(w: World) -> None:
    scheduler = w.engine.scheduler

    def broken() -> Sequence | None:
        scheduler.waiting.sort(key=lambda s: s.arrival)
        admitted = Scheduler._admit(scheduler)
        scheduler.waiting.sort(key=lambda s: s.order)
        return admitted

    scheduler._admit = broken  # type: ignore[method-assign]


def blames_everyone(w: World) -> None:
    """A step that fails ends all who were in it."""
    launch = w.engine._launch

    def broken(plan: list[Piece], again: bool = True) -> None:
        before = w.engine.counts.faults["step"]
        launch(plan, again)
        if w.engine.counts.faults["step"] > before:
            for piece in plan:
                if piece.sequence.state != "ended":
                    w.engine._emit(w.engine._end(piece.sequence, "error", Fault("step", "planted")))

    w.engine._launch = broken  # type: ignore[method-assign]


def blames_the_last_to_run(w: World) -> None:
    """Whoever was in the step that lost the device ends."""
    recover = w.engine._recover

    def broken(lost: Any) -> None:
        for s in w.engine._launched:
            s.losses = 1
        w.engine._launched = w.engine._launched[:1]
        recover(lost)

    w.engine._recover = broken  # type: ignore[method-assign]


def overruns_the_budget(w: World) -> None:
    w.engine.scheduler.max_batch_tokens += 1


def starves_what_was_preempted(w: World) -> None:
    """Preempted requests are put aside, and nobody comes back for them."""
    preempt = w.engine.scheduler.preempt

    def broken(s: Sequence) -> None:
        preempt(s)
        w.engine.scheduler.waiting.remove(s)

    w.engine.scheduler.preempt = broken  # type: ignore[method-assign]


def draws_a_new_seed_when_preempted(w: World) -> None:
    preempt = w.engine.scheduler.preempt

    def broken(s: Sequence) -> None:
        preempt(s)
        s.seed += 1
        s.plain = replace(s.plain, seed=s.seed)

    w.engine.scheduler.preempt = broken  # type: ignore[method-assign]


def forgets_penalties_of_the_last_token(w: World) -> None:
    """Penalties lag one token behind."""
    chunk = w.engine._chunk

    def broken(piece: Piece) -> Any:
        s = piece.sequence
        kept = s.output
        made = chunk(piece)
        if made and len(kept) > 1 and piece.last and not piece.drafts and s.request.params.edits_logits:
            late = edits(s.request.params, s.prompt, kept[:-1])
            made = replace(made, sampling=[replace(d, edits=late) for d in made.sampling])
        return made

    w.engine._chunk = broken  # type: ignore[method-assign]


MUTANTS: tuple[Mutant, ...] = (
    skips_a_decrement, frees_a_block_twice_over, reuses_a_block_early, shares_across_salts, trusts_a_hash,
    ignores_what_came_before, files_a_block_before_it_is_full, keeps_the_cache_of_a_lost_device,
    goes_on_with_a_lost_device, skips_recomputing, drops_an_abort, emits_twice, loses_a_token, speaks_after_the_end,
    believes_every_guess, blames_for_a_guess, forgets_to_roll_the_grammar_back, never_looks_at_the_clock,
    counts_the_queue_deadline_for_ever, admits_while_draining, takes_everyone_to_be_in_a_hurry,
    admits_without_end, takes_an_id_twice, ignores_priority,
    blames_everyone, blames_the_last_to_run, overruns_the_budget, starves_what_was_preempted,
    draws_a_new_seed_when_preempted, forgets_penalties_of_the_last_token,
)  # fmt: skip
