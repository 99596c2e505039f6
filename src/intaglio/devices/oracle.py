"""The oracle device: no weights, no arithmetic; the next token is a hash of every token id so far.

What stands for K/V is a hash chain, one link a physical slot, and a token is drawn by reading all of a sequence's links
back through its block table. A wrong block, an early reuse or a missing write becomes a wrong token.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from intaglio.batch import GREEDY, Batch, Sampling
from intaglio.devices.device import Executable, StateSpec, StepResult, Weights, check_batch
from intaglio.ops.sample import uniform
from intaglio.program import Program

MASK = (1 << 64) - 1
START = 0x243F6A8885A308D3  # the link before a sequence's first; pi's digits
STALE = 0xA4093822299F31D0  # what a slot holds before anything is written to it


def mix(x: int) -> int:
    """A bijection of 64-bit integers that looks random: murmur3's finaliser (Appleby 2011)."""
    x = ((x ^ (x >> 33)) * 0xFF51AFD7ED558CCD) & MASK
    x = ((x ^ (x >> 33)) * 0xC4CEB9FE1A85EC53) & MASK
    return x ^ (x >> 33)


def link(previous: int, token: int) -> int:
    """What a slot holds: the link before it and its own token."""
    return mix((previous * 31 + token + 1) & MASK)


def verdict(links: Sequence[int], vocabulary: int, sampling: Sampling) -> int:
    """The token that follows a sequence whose slots hold `links`; every link counts, each at its own place, and so does
    every edit. Of the ids that a mask allows one is drawn; -1 if it allows none."""
    total = sum(h * (2 * i + 1) for i, h in enumerate(links)) & MASK
    if sampling.temperature > 0:
        total ^= int(uniform(sampling.seed, len(links)) * 2.0**53)
    if sampling.edits is not None:
        for part in (sampling.edits.ids, sampling.edits.scale, sampling.edits.add):
            total = mix(total ^ int.from_bytes(part.tobytes(), "little") % 0xFFFFFFFFFFFFFFC5)
    if sampling.mask is not None:
        allowed = np.flatnonzero(np.unpackbits(sampling.mask.view(np.uint8), bitorder="little")[:vocabulary])
        return int(allowed[mix(total) % len(allowed)]) if len(allowed) else -1
    return mix(total) % vocabulary


def expected(ids: Sequence[int], vocabulary: int, sampling: Sampling = GREEDY) -> int:
    """The next token by definition: from token ids alone, whatever blocks, chunks or batches they went through."""
    links, previous = [], START
    for token in ids:
        previous = link(previous, token)
        links.append(previous)
    return verdict(links, vocabulary, sampling)


class OracleExecutable:
    """A pool of links where a real device holds K/V."""

    def __init__(self, program: Program, state: StateSpec) -> None:
        self.program, self.state = program, state
        self.links = np.full(state.pages * state.page_tokens, STALE, np.uint64)

    def _slots(self, batch: Batch, s: int) -> np.ndarray:
        """Where the block table says sequence `s` keeps its context, in order of position."""
        at = np.arange(int(batch.context_len[s]))
        return batch.block_table[s, at // batch.block_size] * batch.block_size + at % batch.block_size

    def step(
        self, batch: Batch, *, logits: bool = False, taps: Collection[str] = (), timed: bool = False
    ) -> StepResult:
        """One step: every chunk is written before any row is drawn. Taps and timings are empty."""
        check_batch(self.program, self.state, batch)
        owner = np.repeat(np.arange(len(batch.q_len)), batch.q_len)
        where = [self._slots(batch, s) for s in range(len(batch.q_len))]
        for t, token in enumerate(batch.tokens.tolist()):
            at = int(batch.positions[t])
            previous = int(self.links[where[owner[t]][at - 1]]) if at else START
            self.links[batch.slots[t]] = link(previous, token)
        tokens = np.empty(len(batch.rows), np.int32)
        for r, row in enumerate(batch.rows.tolist()):
            held = self.links[where[owner[row]][: int(batch.positions[row]) + 1]].tolist()
            tokens[r] = verdict(held, self.program.vocabulary, batch.sampling[r])
        return StepResult(tokens, np.zeros(len(tokens), np.float32), self._logits(tokens) if logits else None)

    def _logits(self, tokens: np.ndarray) -> np.ndarray:
        """Certainty: 0 for the token drawn, -inf for all others."""
        out = np.full((len(tokens), self.program.vocabulary), -np.inf, np.float32)
        drawn = tokens >= 0
        out[np.flatnonzero(drawn), tokens[drawn]] = 0
        return out


class OracleDevice:
    """Serves any Program's vocabulary and context; for tests of what schedules and serves."""

    name = "oracle"

    def load(self, program: Program, weights: Weights, state: StateSpec) -> Executable:
        return OracleExecutable(program, state)
