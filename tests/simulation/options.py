"""The random choices of a seed: sizes, limits, probabilities of faults, and the clients' requests.

Swarm testing (Groce 2012): in any one run most faults are off, so that the others are reached often.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, fields, replace
from typing import Any

from support.serving import CONTEXT, VOCABULARY

from intaglio.runtime import Grammar, SamplingParams
from intaglio.runtime.windows import reservations

POISON, KILLER = VOCABULARY - 1, VOCABULARY - 2  # a step with POISON fails; one with KILLER loses the device
PLAIN = VOCABULARY - 2  # token ids below this have no effect on the device


@dataclass(frozen=True)
class Faults:
    """Probabilities, per step unless said otherwise."""

    fail: float = 0.0  # the device raises, before or after its work
    scarce: float = 0.0  # the device is out of memory for more than a few rows
    lost: float = 0.0  # the device is lost, before or after its work
    no_restart: float = 0.0  # per restart: it fails
    forgets: float = 0.0  # per restart, where K/V can outlive a device: it did not
    nan: float = 0.0  # per row: no finite logits
    slow: float = 0.0  # the step is ten times slower
    jump: float = 0.0  # the clock jumps forward or back
    poison: float = 0.0  # per request: has a token with which every step fails
    killer: float = 0.0  # per request: has a token that loses the device
    broken: float = 0.0  # per request: its stop checker or grammar raises


@dataclass(frozen=True)
class Options:
    pages: int
    page_tokens: int
    slots: int  # of recurrent state; 0: the model has none
    max_batch_tokens: int
    max_sequences: int
    max_waiting: int
    max_drafts: int
    checkpoint_blocks: int  # of recurrent state; 0: no prefix cache beside it
    max_restarts: int
    keeps: bool  # K/V can outlive a device
    depth: int  # stages of the device's pipeline
    requests: int
    spread: float  # virtual seconds over which requests arrive; a step takes about 1
    drain_at: float | None
    moves: float  # chance, in each step, that a request is suspended and resumed
    heal_at: float | None  # liveness: from then on there are no faults, and all requests must end well
    faults: Faults


@dataclass(frozen=True)
class ClientRequest:
    """One request of a client, and what the client does later."""

    at: float
    id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    eos: frozenset[int]
    priority: int
    salt: str | None
    queue_timeout: float | None
    timeout: float | None
    scored: bool
    stop_at: int | None  # its stop checker returns True for multiples of this
    breaks_at: int | None  # its stop checker or grammar raises at the token of this number
    abort_at: float | None
    leaves_after: int | None  # the client disconnects after so many tokens


def draw_options(rng: random.Random) -> Options:
    faults = Faults(**{f.name: rng.choice((0.0, 0.0, 0.02, 0.15)) for f in fields(Faults)})
    if rng.random() < 0.2:
        faults = Faults()
    page_tokens = rng.choice((1, 2, 4, 8))
    heal = rng.uniform(0, 40) if rng.random() < 0.5 else None
    slots = rng.choice((0, 0, 0, 0, 2, 5, 9, 128))
    return Options(
        pages=rng.randint(max(2, 12 // page_tokens), 12 + 24 // page_tokens),
        page_tokens=page_tokens,
        slots=slots,
        max_batch_tokens=rng.choice((1, 2, 3, 5, 8, 16, 64)),
        max_sequences=rng.choice((1, 2, 3, 8, 64)),
        max_waiting=rng.choice((3, 6, 64)),
        max_drafts=rng.choice((0, 0, 1, 3)),
        checkpoint_blocks=rng.choice((0, 1, 2, 5)) if slots else 32,
        max_restarts=rng.choice((3, 5)),
        keeps=rng.random() < 0.5,
        depth=rng.choice((1, 1, 2, 3)),
        requests=rng.randint(1, 14),
        spread=rng.choice((0.0, 5.0, 30.0)),
        drain_at=rng.uniform(0, 40) if rng.random() < 0.15 else None,
        moves=rng.choice((0.0, 0.0, 0.05, 0.2)),
        heal_at=heal,
        faults=replace(faults, no_restart=min(faults.no_restart * 3, 0.4)),
    )


def draw_windows(rng: random.Random, o: Options) -> tuple[int, int]:
    """(window pages, window in tokens) of a model whose layers have a window; (0, 0) in eleven of twenty cases."""
    window = rng.randint(1, 12)
    most, steps = reservations(
        window, o.page_tokens, context=CONTEXT, max_batch_tokens=o.max_batch_tokens, depth=o.depth
    )
    return (most + steps + 1 + rng.choice((0, 1, 9, 60)), window) if rng.random() < 0.45 else (0, 0)


def draw_request(rng: random.Random, number: int, o: Options, families: list[list[int]], at: float) -> ClientRequest:
    """A client's request: mostly valid, from a few groups that share prefixes, sometimes invalid."""
    room = min(CONTEXT, o.pages * o.page_tokens)
    family = rng.choice(families)
    own = [rng.randrange(PLAIN) for _ in range(rng.randint(0, 6))]
    prompt = [*family[: rng.randint(1, len(family))], *own][: rng.randint(1, room)]
    if rng.random() < o.faults.poison:
        prompt[rng.randrange(len(prompt))] = POISON
    if rng.random() < o.faults.killer:
        prompt[rng.randrange(len(prompt))] = KILLER
    if rng.random() < 0.05:  # hostile
        prompt = rng.choice(([], [1] * (CONTEXT + 1), [VOCABULARY], [-1], [2] * (room + 1)))
    most = max(1, room - len(prompt) + 1)
    max_tokens = rng.randint(1, min(20, most)) if rng.random() < 0.97 else 1000
    broken = rng.random() < o.faults.broken
    return ClientRequest(
        at=at,
        id=f"r{number}" if rng.random() < 0.95 else "r0",
        prompt=tuple(prompt),
        params=draw_params(rng, max_tokens),
        eos=frozenset(range(rng.choice((0, 0, 2, 8)))),
        priority=rng.choice((0, 0, 0, -1, 1)),
        salt=rng.choice((None, None, "a", "b")),
        queue_timeout=rng.choice((None, None, None, 6.0)),
        timeout=rng.choice((None, None, 3.0, 10.0, 15.0, 30.0)),
        scored=rng.random() < 0.05,
        stop_at=rng.choice((None, None, None, 13)),
        breaks_at=rng.randint(1, 4) if broken else None,
        abort_at=at + rng.uniform(0, 20) if rng.random() < 0.15 else None,
        leaves_after=rng.randint(0, 5) if rng.random() < 0.1 else None,
    )


def draw_params(rng: random.Random, max_tokens: int) -> SamplingParams:
    options: dict[str, Any] = {"max_tokens": max_tokens}
    if rng.random() < 0.6:
        options |= {"temperature": 1.0, "seed": rng.choice((None, 7, rng.getrandbits(40)))}
    if rng.random() < 0.15:
        options["n"] = rng.randint(2, 3)
    if rng.random() < 0.1:
        options |= {"presence_penalty": 0.5, "frequency_penalty": -1.0, "logit_bias": {3: 5.0}}
    if rng.random() < 0.1:
        options["repetition_penalty"] = 1.3
    if rng.random() < 0.1:
        options["prompt_logprobs"] = rng.randint(0, 2)
    if rng.random() < 0.1:
        options["logprobs"] = rng.randint(1, 3)
    if rng.random() < 0.1:
        options["stop_token_ids"] = [rng.randrange(PLAIN) for _ in range(9)]
    if rng.random() < 0.2:
        options["grammar"] = Grammar("regex", str(rng.choice((1, 2, 5))))
    return SamplingParams(**options)
