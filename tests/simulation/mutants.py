"""Planted bugs (mutants): each replaces one stage or public method of an engine by one that is wrong in one way.

The simulation must find every one; if one goes unnoticed, a rule is missing. Long because it is a list of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

from intaglio.devices import DeviceError, DeviceLost
from intaglio.runtime import (
    Admission,
    BlockKey,
    BlockNames,
    Engine,
    EngineLoad,
    Event,
    Fault,
    Request,
    Resumption,
    ScheduledSequence,
    Scheduler,
    Scored,
    Sequence,
    SuspendedChoice,
)
from intaglio.runtime.launcher import Completed, Launch
from intaglio.runtime.sampling import edits

Mutant = Callable[[Engine], None]


def skip_refcount_decrement(engine: Engine) -> None:
    """The last block of an ended sequence stays held."""
    release = engine.pool.release
    engine.pool.release = lambda blocks: release(blocks[:-1])  # type: ignore[method-assign]


def free_shared_block_at_first_release(engine: Engine) -> None:
    """A shared block becomes free when its first holder releases it."""
    pool, release = engine.pool, engine.pool.release

    def broken(blocks: list[int]) -> None:
        for block in blocks:
            pool.refcounts[block] = 1
        release(blocks)

    pool.release = broken  # type: ignore[method-assign,assignment]


def evict_parents_before_children(engine: Engine) -> None:
    """The blocks of an ended sequence are evicted from its beginning on, so that none leads to the others any more."""
    release = engine.pool.release
    engine.pool.release = lambda blocks: release(blocks[::-1])  # type: ignore[method-assign]


def allocate_held_block(engine: Engine) -> None:
    """An allocated block may still be held by another sequence."""
    pool, allocate = engine.pool, engine.pool.allocate

    def broken(n: int) -> list[int]:
        blocks = allocate(n)
        held = [b for s in engine.scheduler.running for b in s.blocks if pool.refcounts[b]]
        return [held[0], *blocks[1:]] if held and blocks else blocks

    pool.allocate = broken  # type: ignore[method-assign]


def share_blocks_across_salts(engine: Engine) -> None:
    """Salts are left out of the names of blocks."""

    class Unsalted(BlockNames):
        def root(self, salt: str | None = None) -> str:
            return super().root()

    engine.pool.names = Unsalted(**vars(engine.pool.names))


def match_blocks_by_hash_only(engine: Engine) -> None:
    """Blocks are found by 5 bits of hash instead of their tokens."""
    find, add = engine.pool.find_prefix, engine.pool.add_to_prefix_cache
    size = engine.pool.block_size

    def blurred(tokens: Any) -> list[int]:
        hashes = [sum(tokens[at : at + size]) % 32 for at in range(0, len(tokens) - size + 1, size)]
        return [h for h in hashes for _ in range(size)]

    engine.pool.find_prefix = lambda tokens, salt: find(blurred(tokens), salt)  # type: ignore[method-assign]
    engine.pool.add_to_prefix_cache = lambda block, parent, tokens: add(block, parent, blurred(tokens))  # type: ignore[method-assign]


def match_blocks_without_prefix(engine: Engine) -> None:
    """A block is found by its own tokens, whatever tokens precede it."""
    find, add = engine.pool.find_prefix, engine.pool.add_to_prefix_cache
    pool = engine.pool

    def broken(tokens: Any, salt: Any) -> list[int]:
        size, blocks = pool.block_size, []
        for at in range(0, len(tokens) - size + 1, size):
            found = find(tokens[at : at + size], salt)
            if not found:
                break
            blocks += found
        return blocks

    pool.find_prefix = broken  # type: ignore[method-assign]
    pool.add_to_prefix_cache = lambda block, parent, tokens: add(block, pool.names.root(), tokens)  # type: ignore[method-assign]


def cache_partial_block(engine: Engine) -> None:
    update = engine.scheduler.update_blocks

    def broken(s: Sequence) -> None:
        computed = s.computed
        s.computed = min(s.length, computed + 1, len(s.blocks) * engine.pool.block_size)
        update(s)
        s.computed = computed

    engine.scheduler.update_blocks = broken  # type: ignore[method-assign]


def keep_prefix_cache_of_lost_device(engine: Engine) -> None:
    engine.pool.reset_prefix_cache = lambda: None  # type: ignore[method-assign]


def continue_on_lost_device(engine: Engine) -> None:
    engine.recovery.replace_device = lambda: True  # type: ignore[method-assign]


def schedule_sequences_in_flight(engine: Engine) -> None:
    """A sequence may be in several launches at a time."""
    launch = engine.launcher.launch

    def broken(scheduled: list[ScheduledSequence], retried: bool = False) -> Launch | None:
        launched = launch(scheduled, retried)
        for one in scheduled:
            one.sequence.in_flight = False
        return launched

    engine.launcher.launch = broken  # type: ignore[method-assign]


def preempt_sequences_in_flight(engine: Engine) -> None:
    """Sequences in flight are preempted too, and the result of their launch is applied to them."""
    allocate, running = engine.scheduler.allocate, engine.scheduler.running

    def broken(sequence: Sequence) -> bool:
        flying = [s for s in running if s.in_flight]
        for s in flying:
            s.in_flight = False
        allocated = allocate(sequence)
        for s in flying:
            s.in_flight = True
        return allocated

    engine.scheduler.allocate = broken  # type: ignore[method-assign]


def account_for_ended_sequences(engine: Engine) -> None:
    """Tokens of a launch are given to sequences that were aborted while it was under way."""
    account = engine.accounting.account

    def broken(done: Completed) -> None:
        for one in done.scheduled:
            if one.sequence.state == "ended":
                engine.live.emit(Event(one.sequence.request.id, one.sequence.index, Scored(1, 0.0)))
        account(done)

    engine.accounting.account = broken  # type: ignore[method-assign]


def count_losses_in_company(engine: Engine) -> None:
    """Sequences pay for losses of the device in launches with others, and are not launched alone after them."""
    blame, launcher = engine.recovery.blame, engine.launcher

    def broken(why: str) -> None:
        blame(why)
        for s in launcher.in_flight:
            s.suspect = False
            s.device_losses += len(launcher.in_flight) > 1

    engine.recovery.blame = broken  # type: ignore[method-assign]


def trust_forgotten_state(engine: Engine) -> None:
    """A device that replaces a lost one is taken to have its K/V, whether it has or not."""
    engine.scheduler.preempt_all = lambda: None  # type: ignore[method-assign]


def count_lost_step_as_computed(engine: Engine) -> None:
    """Sequences in the launch that lost the device go on as if it had been completed."""
    blame, launcher = engine.recovery.blame, engine.launcher

    def broken(why: str) -> None:
        blame(why)
        for s in launcher.in_flight:
            s.computed = max(s.computed, s.length - 1) if s.state == "running" else s.computed

    engine.recovery.blame = broken  # type: ignore[method-assign]


def try_new_device_on_held_block(engine: Engine) -> None:
    """The first step of a new device overwrites a block that a sequence holds."""
    scheduler, spare = engine.scheduler, engine.scheduler.spare_block
    scheduler.spare_block = lambda: next((s.blocks[0] for s in scheduler.running), spare())  # type: ignore[method-assign]


def skip_recomputation_after_preemption(engine: Engine) -> None:
    start = engine.scheduler.start_next

    def broken() -> Sequence | None:
        s = start()
        if s is not None and s.preemptions:
            s.computed = max(s.computed, s.length - 2)
        return s

    engine.scheduler.start_next = broken  # type: ignore[method-assign]


def drop_abort(engine: Engine) -> None:
    abort = engine.abort
    engine.abort = lambda id: [] if id.endswith("3") else abort(id)  # type: ignore[method-assign]


def emit_token_twice(engine: Engine) -> None:
    emit = engine.live.emit

    def broken(event: Event) -> None:
        emit(event)
        if event.token is not None and event.token % 16 == 0:
            emit(event)

    engine.live.emit = broken  # type: ignore[method-assign]


def lose_token(engine: Engine) -> None:
    emit = engine.live.emit

    def broken(event: Event) -> None:
        if event.token is None or event.token % 32 or event.finish_reason:
            emit(event)

    engine.live.emit = broken  # type: ignore[method-assign]


def emit_after_end(engine: Engine) -> None:
    step, late = engine.step, list[Event]()

    def broken() -> list[Event]:
        events = [*late, *step()]
        late[:] = [replace(e, finish_reason=None, usage=None) for e in events if e.finish_reason and e.scored]
        return events

    engine.step = broken  # type: ignore[method-assign]


def accept_every_draft(engine: Engine) -> None:
    """Tokens after a rejected draft are kept."""
    account = engine.accounting.account_sequence

    def broken(one: ScheduledSequence, chunk: Any, result: Any, row: int) -> None:
        sampled = result.tokens[row : row + len(one.drafts)].tolist() if one.samples else []
        account(replace(one, drafts=tuple(sampled)), chunk, result, row)

    engine.accounting.account_sequence = broken  # type: ignore[method-assign]


def retry_with_drafts(engine: Engine) -> None:
    """A failed launch is retried with its drafts."""
    launch, last = engine.launcher.launch, list[list[ScheduledSequence]]()

    def broken(scheduled: list[ScheduledSequence], retried: bool = False) -> Launch | None:
        last[:] = last if retried else [scheduled]
        return launch(last[0], retried)

    engine.launcher.launch = broken  # type: ignore[method-assign]


def skip_grammar_rollback(engine: Engine) -> None:
    add = engine.add

    def broken(request: Request) -> list[Sequence]:
        choices = add(request)
        for s in choices:
            if s.matcher:
                s.matcher.rollback = lambda n: None  # type: ignore[method-assign]
        return choices

    engine.add = broken  # type: ignore[method-assign]


def ignore_deadlines(engine: Engine) -> None:
    engine.live.expire = lambda now: None  # type: ignore[method-assign]


def apply_queue_timeout_after_start(engine: Engine) -> None:
    """A request that has started is still ended by its queue_timeout."""
    add = engine.add

    def broken(request: Request) -> list[Sequence]:
        timeouts = [t for t in (request.timeout, request.queue_timeout) if t is not None]
        return add(replace(request, timeout=min(timeouts, default=None)))

    engine.add = broken  # type: ignore[method-assign]


def admit_while_draining(engine: Engine) -> None:

    class Admits(Admission):
        def admit(self, request: Request, load: EngineLoad) -> float:
            return super().admit(request, replace(load, draining=False))

    engine.admission = Admits(**vars(engine.admission))


def assume_timeout(engine: Engine) -> None:
    """A request without a timeout is refused as late if it would take long."""

    class Hurries(Admission):
        def admit(self, request: Request, load: EngineLoad) -> float:
            return super().admit(replace(request, timeout=request.timeout or 3.0), load)

    engine.admission = Hurries(**vars(engine.admission))


def admit_without_limit(engine: Engine) -> None:
    engine.admission = replace(engine.admission, max_waiting=10**9)


def admit_duplicate_id(engine: Engine) -> None:
    add = engine.add

    def broken(request: Request) -> list[Sequence]:
        engine.requests.pop(request.id, None)
        return add(request)

    engine.add = broken  # type: ignore[method-assign]


def ignore_priority(engine: Engine) -> None:
    scheduler = engine.scheduler

    def broken() -> Sequence | None:
        scheduler.waiting.sort(key=lambda s: s.arrival)
        started = Scheduler.start_next(scheduler)
        scheduler.waiting.sort(key=lambda s: s.order)
        return started

    scheduler.start_next = broken  # type: ignore[method-assign]


def end_all_after_failed_step(engine: Engine) -> None:
    """A failed step ends all of its sequences."""
    live, complete = engine.live, engine.launcher.complete

    def broken(launch: Launch) -> Iterator[Completed]:
        before = engine.counts.faults["step"]
        yield from complete(launch)
        if engine.counts.faults["step"] > before:
            for s in (one.sequence for one in launch.scheduled):
                if s.state != "ended":
                    live.emit(live.end(s, "error", Fault("step", "planted")))

    engine.launcher.complete = broken  # type: ignore[method-assign]


def end_all_after_device_loss(engine: Engine) -> None:
    """The sequences in a step that lost the device end."""
    blame, launcher = engine.recovery.blame, engine.launcher

    def broken(why: str) -> None:
        for s in launcher.in_flight:
            s.device_losses = 1
        launcher.in_flight = launcher.in_flight[:1]
        blame(why)

    engine.recovery.blame = broken  # type: ignore[method-assign]


def exceed_token_budget(engine: Engine) -> None:
    engine.scheduler.max_batch_tokens += 1


def forget_preempted_sequence(engine: Engine) -> None:
    """Preempted sequences are removed from the queue."""
    preempt = engine.scheduler.preempt

    def broken(s: Sequence) -> None:
        preempt(s)
        engine.scheduler.waiting.remove(s)

    engine.scheduler.preempt = broken  # type: ignore[method-assign]


def change_seed_on_preemption(engine: Engine) -> None:
    preempt = engine.scheduler.preempt

    def broken(s: Sequence) -> None:
        preempt(s)
        s.seed += 1
        s.base_sampling = replace(s.base_sampling, seed=s.seed)

    engine.scheduler.preempt = broken  # type: ignore[method-assign]


def lag_penalties_by_one_token(engine: Engine) -> None:
    """Penalties do not count the last token."""
    chunk = engine.launcher.chunk

    def broken(one: ScheduledSequence) -> Any:
        s, made = one.sequence, chunk(one)
        if made and len(s.output) > 1 and one.samples and not one.drafts and s.request.params.edits_logits:
            late = edits(s.request.params, s.prompt, s.output[:-1])
            made = replace(made, sampling=[replace(d, edits=late) for d in made.sampling])
        return made

    engine.launcher.chunk = broken  # type: ignore[method-assign]


def advance_state_of_failed_step(engine: Engine) -> None:
    """A step that failed has moved the recurrent states of its sequences: a retry steps them twice."""
    launch, account, failed = engine.launcher.launch, engine.accounting.account, set[Sequence]()

    def launch_broken(scheduled: list[ScheduledSequence], retried: bool = False) -> Launch | None:
        for s in (one.sequence for one in scheduled):
            if s in failed and s.computed and s.state_slot >= 0:
                s.state_slot, s.next_state_slot = s.next_state_slot, s.state_slot
        failed.update(one.sequence for one in scheduled)
        return launch(scheduled, retried)

    def account_broken(done: Completed) -> None:
        failed.difference_update(one.sequence for one in done.scheduled)
        account(done)

    engine.launcher.launch = launch_broken  # type: ignore[method-assign]
    engine.accounting.account = account_broken  # type: ignore[method-assign]


def leave_state_after_step(engine: Engine) -> None:
    """After its second step a sequence goes on from the state after its first."""
    move = engine.scheduler.move_state
    engine.scheduler.move_state = lambda s: move(s) if s.state_slot < 0 else None  # type: ignore[method-assign]


def keep_state_on_preemption(engine: Engine) -> None:
    """A preempted sequence is recomputed from the state it had."""
    preempt, start, kept = engine.scheduler.preempt, engine.scheduler.start_next, set[Sequence]()

    def preempt_broken(s: Sequence) -> None:
        preempt(s)
        kept.add(s)

    def start_broken() -> Sequence | None:
        s = start()
        if s in kept and s is not None and s.next_state_slot >= 0 and not s.computed:
            s.state_slot, s.next_state_slot, s.computed = s.next_state_slot, engine.slots.allocate(), 1
        return s

    engine.scheduler.preempt = preempt_broken  # type: ignore[method-assign]
    engine.scheduler.start_next = start_broken  # type: ignore[method-assign]


def share_state_slots(engine: Engine) -> None:
    """Sequences that run at once may write the same slot."""
    pool, allocate, running = engine.slots, engine.slots.allocate, engine.scheduler.running

    def broken() -> int:
        if len(running) > 1 and running[0].next_state_slot >= 0:
            pool.share(running[0].next_state_slot)
            return running[0].next_state_slot
        return allocate()

    pool.allocate = broken  # type: ignore[method-assign]


def keep_state_of_rejected_drafts(engine: Engine) -> None:
    """After a rejected draft a sequence goes on from the state that has read it."""
    settle = engine.accounting.settle_state
    engine.accounting.settle_state = lambda s, start, rejected: settle(s, start, False)  # type: ignore[method-assign]


def step_accepted_drafts_twice(engine: Engine) -> None:
    """After a rejected draft the accepted tokens are computed again from the state that has read them."""
    settle = engine.accounting.settle_state

    def broken(s: Sequence, start: int, rejected: bool) -> None:
        settle(s, start, rejected)
        if rejected and start:
            engine.scheduler.move_state(s)

    engine.accounting.settle_state = broken  # type: ignore[method-assign]


def keep_state_after_border(engine: Engine) -> None:
    """The state of a step that ends after a border is kept as the one at the border."""
    keep, checkpoints = engine.scheduler.checkpoints.keep, engine.scheduler.checkpoints

    def broken(s: Sequence) -> None:
        if checkpoints.on and s.computed % engine.pool.block_size and s.prefix_name in engine.pool.index:
            engine.slots.drop(str(s.prefix_name))
            engine.slots.keep(s.state_slot, str(s.prefix_name))
        keep(s)

    checkpoints.keep = broken  # type: ignore[method-assign]


def skip_blocks_after_checkpoint(engine: Engine) -> None:
    """A sequence starts after all of its cached blocks, with the state of an earlier border."""
    checkpoints, usable = engine.scheduler.checkpoints, engine.scheduler.checkpoints.usable
    start, deepest = checkpoints.start, [""]

    def broken_usable(known: list[int]) -> int:
        n = usable(known)
        deepest[0] = engine.pool.name(known[n - 1]) if n else ""
        return len(known) if n else 0

    def broken_start(s: Sequence, found: int) -> None:
        name = s.prefix_name
        s.prefix_name = name and (deepest[0] or name)
        start(s, found)
        s.prefix_name = name

    checkpoints.usable, checkpoints.start = broken_usable, broken_start  # type: ignore[method-assign,assignment]


def overwrite_checkpoints(engine: Engine) -> None:
    """The slot of an evicted checkpoint is written, but the checkpoint is still found."""
    pool, allocate = engine.slots, engine.slots.allocate

    def broken() -> int:
        before = dict(pool.checkpoints)
        slot = allocate()
        for name in before.keys() - pool.checkpoints.keys():
            pool.checkpoints[name] = slot
        return slot

    pool.allocate = broken  # type: ignore[method-assign]


def free_shared_state_at_first_release(engine: Engine) -> None:
    """A state from which several sequences start becomes free when the first of them has moved on."""
    pool, release = engine.slots, engine.slots.release

    def broken(slot: int) -> None:
        if slot >= 0:
            pool.refcounts[slot] = 1
        release(slot)

    pool.release = broken  # type: ignore[method-assign]


def leak_state_of_started_sequence(engine: Engine) -> None:
    """The checkpoint from which a sequence started stays held."""
    move, release, slots = engine.scheduler.move_state, engine.slots.release, engine.slots

    def broken(s: Sequence) -> None:
        slots.release = lambda slot: None if slot in slots.named else release(slot)  # type: ignore[method-assign]
        move(s)
        slots.release = release  # type: ignore[method-assign]

    engine.scheduler.move_state = broken  # type: ignore[method-assign]


def keep_checkpoint_of_evicted_block(engine: Engine) -> None:
    """A checkpoint stays when the block before its border leaves the prefix cache."""
    engine.pool.dropped = lambda name: None


def share_checkpoints_across_salts(engine: Engine) -> None:
    """A sequence starts from any state at its border, whatever the salt of the tokens that made it."""
    checkpoints, keep, start = engine.scheduler.checkpoints, engine.slots.keep, engine.scheduler.checkpoints.start
    seen: dict[tuple[int, ...], int] = {}

    def broken_keep(slot: int, name: str) -> bool:
        for s in engine.scheduler.running:
            if s.state_slot == slot:
                seen[tuple(s.tokens(0, s.computed))] = slot
        return keep(slot, name)

    def broken_start(s: Sequence, found: int) -> None:
        start(s, found)
        other = seen.get(tuple(s.tokens(0, s.computed)))
        if s.state_slot >= 0 and other in engine.slots.named and other != s.state_slot:
            engine.slots.share(other)
            engine.slots.release(s.state_slot)
            s.state_slot = other

    engine.slots.keep, checkpoints.start = broken_keep, broken_start  # type: ignore[method-assign]


def give_window_blocks_back_too_early(engine: Engine) -> None:
    """A window block is given back while the next token still sees its last position."""
    first = engine.windows.first_block
    engine.windows.first_block = lambda position: first(position + 1)  # type: ignore[method-assign]


def keep_window_prefixes_of_lost_device(engine: Engine) -> None:
    engine.windows.pool.reset_prefix_cache = lambda: None  # type: ignore[method-assign]


def reserve_no_window_blocks(engine: Engine) -> None:
    engine.windows.fits = lambda sequence, freed=0: True  # type: ignore[method-assign]


def reserve_window_blocks_only_at_the_start(engine: Engine) -> None:
    engine.windows.grow = lambda sequence: True  # type: ignore[method-assign]


def share_prefix_without_its_window(engine: Engine) -> None:
    """A sequence starts after a prefix whose window blocks are gone; others stand in for them."""
    windows = engine.windows

    def broken(s: Sequence, names: list[str]) -> None:
        known = [name if name in windows.pool.index else next(iter(windows.pool.index), "") for name in names]
        start(s, [name for name in known if name])

    if windows.on:
        start, windows.start = windows.start, broken  # type: ignore[method-assign, assignment]
        windows.usable = lambda names: len(names) if windows.pool.index else 0  # type: ignore[method-assign]


def change_seed_on_resumption(engine: Engine) -> None:
    resume = engine.resume

    def broken(r: Resumption) -> list[Sequence]:
        return resume(replace(r, request=replace(r.request, params=replace(r.request.params, seed=5))))

    engine.resume = broken  # type: ignore[method-assign]


def forget_last_token_on_suspension(engine: Engine) -> None:
    suspend = engine.suspend

    def broken(id: str) -> Resumption | None:
        r = suspend(id)
        choices = [replace(c, output=c.output[:-1], logprobs=c.logprobs[:-1]) for c in r.choices] if r else []
        return r and replace(r, choices=tuple(choices))

    engine.suspend = broken  # type: ignore[method-assign]


def restart_timeouts_on_resumption(engine: Engine) -> None:
    suspend = engine.suspend

    def broken(id: str) -> Resumption | None:
        whole = engine.requests[id][0].request.timeout
        r = suspend(id)
        return r and replace(r, request=replace(r.request, timeout=whole))

    engine.suspend = broken  # type: ignore[method-assign]


def keep_blocks_on_suspension(engine: Engine) -> None:
    suspend = engine.suspend

    def broken(id: str) -> Resumption | None:
        for s in engine.live.of(id):
            s.blocks = s.blocks[:-1]
        return suspend(id)

    engine.suspend = broken  # type: ignore[method-assign]


def resume_ended_choices(engine: Engine) -> None:
    suspend = engine.suspend

    def broken(id: str) -> Resumption | None:
        ended = [SuspendedChoice(s.index) for s in engine.requests[id] if s.state == "ended"]
        r = suspend(id)
        return r and replace(r, choices=(*r.choices, *ended))

    engine.suspend = broken  # type: ignore[method-assign]


def load_blocks_in_reverse(engine: Engine) -> None:
    """Loaded contents are written to their sequence's blocks in the wrong order."""
    device = engine.offload.device
    assert device
    write = device.write_blocks
    device.write_blocks = lambda blocks, contents: write(blocks, contents[::-1])  # type: ignore[method-assign]


def count_more_blocks_than_were_loaded(engine: Engine) -> None:
    """A sequence goes on as if one more block had been loaded."""
    fill = engine.offload.fill

    def broken(sequence: Sequence, cached: int, blocks: list[int]) -> int:
        loaded = fill(sequence, cached, blocks)
        most = (sequence.length - 1) // engine.pool.block_size - cached
        return min(loaded + 1, most) if loaded else 0

    engine.offload.fill = broken  # type: ignore[method-assign]


def ignore_refusal_of_loaded_blocks(engine: Engine) -> None:
    """Blocks count as loaded though the device refused them."""
    device = engine.offload.device
    assert device
    write = device.write_blocks

    def broken(blocks: list[int], contents: Any) -> None:
        with suppress(DeviceError):
            write(blocks, contents)

    device.write_blocks = broken  # type: ignore[method-assign]


def give_load_to_another_sequence(engine: Engine) -> None:
    """A load that was begun for one sequence is used for the next that starts."""
    ready = engine.offload.ready

    def broken(sequence: Sequence, cached: int, wait: bool) -> bool:
        if engine.offload.loading:
            engine.offload.loading = replace(engine.offload.loading, sequence=sequence)
        return ready(sequence, cached, wait)

    engine.offload.ready = broken  # type: ignore[method-assign]


def save_blocks_before_they_are_computed(engine: Engine) -> None:
    """A block is saved with the contents it has when its sequence starts."""
    start = engine.scheduler.start_next

    def broken() -> Sequence | None:
        s, connector = start(), engine.offload.connector
        if s and connector and len(s.blocks) > 1:
            size, names = engine.pool.block_size, engine.pool.names
            tokens = s.tokens(0, size)
            root = names.root(s.salt)
            key = BlockKey(names.child(root, tokens), root, tuple(tokens))
            connector.save(key, engine.launcher.read_blocks(s.blocks[:1])[0])
        return s

    engine.scheduler.start_next = broken  # type: ignore[method-assign]


def forget_blocks_after_failed_load(engine: Engine) -> None:
    """The blocks of a sequence for which the device was lost while it took loaded blocks stay held."""
    release, device = engine.pool.release, engine.offload.device
    assert device
    write, lost = device.write_blocks, [False]

    def broken_write(blocks: list[int], contents: Any) -> None:
        try:
            write(blocks, contents)
        except DeviceLost:
            lost[0] = True
            raise

    def broken_release(blocks: list[int]) -> None:
        if not lost[0]:
            release(blocks)
        lost[0] = False

    device.write_blocks = broken_write  # type: ignore[method-assign]
    engine.pool.release = broken_release  # type: ignore[method-assign]


def wait_for_a_load_for_ever(engine: Engine) -> None:
    """A load that never comes keeps its sequence waiting."""
    engine.offload.timeout = 1e9
    connector = engine.offload.connector
    if connector:
        load = connector.load

        def broken(keys: Any, block_bytes: int) -> Any:
            began = load(keys, block_bytes)
            began.until = 1e12  # type: ignore[attr-defined]
            return began

        connector.load = broken  # type: ignore[method-assign]


MUTANTS: tuple[Mutant, ...] = (
    skip_refcount_decrement,
    free_shared_block_at_first_release,
    evict_parents_before_children,
    allocate_held_block,
    share_blocks_across_salts,
    match_blocks_by_hash_only,
    match_blocks_without_prefix,
    cache_partial_block,
    keep_prefix_cache_of_lost_device,
    continue_on_lost_device,
    schedule_sequences_in_flight,
    preempt_sequences_in_flight,
    account_for_ended_sequences,
    count_losses_in_company,
    trust_forgotten_state,
    count_lost_step_as_computed,
    try_new_device_on_held_block,
    skip_recomputation_after_preemption,
    drop_abort,
    emit_token_twice,
    lose_token,
    emit_after_end,
    accept_every_draft,
    retry_with_drafts,
    skip_grammar_rollback,
    ignore_deadlines,
    apply_queue_timeout_after_start,
    admit_while_draining,
    assume_timeout,
    admit_without_limit,
    admit_duplicate_id,
    ignore_priority,
    end_all_after_failed_step,
    end_all_after_device_loss,
    exceed_token_budget,
    forget_preempted_sequence,
    change_seed_on_preemption,
    lag_penalties_by_one_token,
    advance_state_of_failed_step,
    leave_state_after_step,
    keep_state_on_preemption,
    share_state_slots,
    keep_state_of_rejected_drafts,
    step_accepted_drafts_twice,
    keep_state_after_border,
    skip_blocks_after_checkpoint,
    overwrite_checkpoints,
    free_shared_state_at_first_release,
    leak_state_of_started_sequence,
    keep_checkpoint_of_evicted_block,
    share_checkpoints_across_salts,
    give_window_blocks_back_too_early,
    keep_window_prefixes_of_lost_device,
    reserve_no_window_blocks,
    reserve_window_blocks_only_at_the_start,
    share_prefix_without_its_window,
    change_seed_on_resumption,
    forget_last_token_on_suspension,
    restart_timeouts_on_resumption,
    keep_blocks_on_suspension,
    resume_ended_choices,
    load_blocks_in_reverse,
    count_more_blocks_than_were_loaded,
    ignore_refusal_of_loaded_blocks,
    give_load_to_another_sequence,
    save_blocks_before_they_are_computed,
    forget_blocks_after_failed_load,
    wait_for_a_load_for_ever,
)
