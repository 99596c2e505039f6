"""The oracle device, for tests of the runtime: the next token is a hash of all token ids of the sequence.

Its K/V cache holds a hash chain, one link per slot. To sample a token it reads all links of the sequence through the
block table, so a wrong block, an early reuse or a missing write becomes a wrong token. If the state has slots, each
slot holds the chain of one sequence as recurrent state, which must end in the same link as the K/V: a state that is
stepped twice, stale, or of another sequence becomes a wrong token too. With window pages, each window slot holds a
copy of the link, and a query must find in them the links of all tokens in its window.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from intaglio.batch import GREEDY, Batch, Sampling
from intaglio.devices.device import (
    BlockingExecutable,
    Device,
    Executable,
    StateSpec,
    StepRequest,
    StepResult,
    Weights,
    check_batch,
    check_blocks,
)
from intaglio.ops.sample import uniform
from intaglio.program import Program

MASK = (1 << 64) - 1
START = 0x243F6A8885A308D3  # the link before a sequence's first token: digits of pi
STALE = 0xA4093822299F31D0  # the content of a slot before the first write


def mix(x: int) -> int:
    """Return a 64-bit hash of the 64-bit integer `x`: the finaliser of murmur3 (Appleby 2011), a bijection.

    Every bit of the result depends on every bit of `x`.
    """
    x = ((x ^ (x >> 33)) * 0xFF51AFD7ED558CCD) & MASK
    x = ((x ^ (x >> 33)) * 0xC4CEB9FE1A85EC53) & MASK
    return x ^ (x >> 33)


def link(previous: int, token: int) -> int:
    """Return a 64-bit hash of the integer `previous` and the token id `token`: the content of the token's K/V slot.

    `previous` is the content of the K/V slot of the token before.
    """
    return mix((previous * 31 + token + 1) & MASK)


def draw(links: Sequence[int], vocabulary: int, sampling: Sampling) -> int:
    """Return the next token id of the oracle; -1 if the mask allows no token id.

    The oracle is a fake device for tests. Its token id is a hash of all `links` in their order, of the row's logit
    edits and mask, and of the seed if the temperature is above 0.

    Args:
        links: the contents of the K/V slots of all tokens of the sequence, in order: hashes made by link().
        vocabulary: number of token ids.
        sampling: sampling parameters of the row.
    """
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
    """Return the token id that the oracle device must give after the token ids `ids`; -1 if the mask allows none.

    The oracle is a fake device for tests. This function needs no K/V cache: tests compare its result with the device's
    token.

    Args:
        ids: all token ids of the sequence.
        vocabulary: number of token ids.
        sampling: temperature, seed, logit edits and mask, on which the token id depends.
    """
    links, previous = [], START
    for token in ids:
        previous = link(previous, token)
        links.append(previous)
    return draw(links, vocabulary, sampling)


class OracleExecutable(BlockingExecutable):
    """A fake model for tests of the runtime: the next token is a hash of the sequence's token ids.

    Each K/V slot holds a 64-bit integer called a link: the hash of the slot's token and of the link before. To sample,
    the executable reads the links of the sequence back through the block table. A mistake in block tables or slots
    therefore becomes a wrong token. Each slot of recurrent state holds the link of a sequence's last token.
    """

    def __init__(self, program: Program, state: StateSpec) -> None:
        self.program, self.state = program, state
        self.links = np.full(state.pages * state.page_tokens, STALE, np.uint64)
        self.window_links = np.full(state.window_pages * state.page_tokens, STALE, np.uint64)
        self.states = np.full(state.slots, STALE, np.uint64)

    @property
    def block_parts(self) -> tuple[int, ...]:
        return () if self.state.window_pages else (self.state.page_tokens * self.links.itemsize,)

    def read_blocks(self, blocks: Sequence[int]) -> np.ndarray:
        check_blocks(self.state, self.block_bytes, blocks)
        return self.links.reshape(self.state.pages, -1)[list(blocks)].view(np.uint8)

    def write_blocks(self, blocks: Sequence[int], contents: np.ndarray) -> None:
        check_blocks(self.state, self.block_bytes, blocks, contents)
        self.links.reshape(self.state.pages, -1)[list(blocks)] = np.ascontiguousarray(contents).view(np.uint64)

    def _slots(self, batch: Batch, s: int) -> np.ndarray:
        """Return the numbers of the K/V slots of all tokens of sequence `s`, in order of position, as an array.

        They are looked up in the batch's block table.
        """
        at = np.arange(int(batch.context_len[s]))
        return batch.block_table[s, at // batch.block_size] * batch.block_size + at % batch.block_size

    def run(self, request: StepRequest) -> StepResult:
        """Run one step. Returns a StepResult with the sampled tokens, log-probabilities of 0, and logits if requested.

        Results of ops (taps) and timings are not returned. As on a real device, the K/V of all tokens of the batch is
        written before any token is sampled. Raises DeviceError for a batch that does not fit.
        """
        batch = request.batch
        check_batch(self.program, self.state, batch)
        owner = np.repeat(np.arange(len(batch.q_len)), batch.q_len)
        where = [self._slots(batch, s) for s in range(len(batch.q_len))]
        for t, token in enumerate(batch.tokens.tolist()):
            at = int(batch.positions[t])
            previous = int(self.links[where[owner[t]][at - 1]]) if at else START
            self.links[batch.slots[t]] = link(previous, token)
            if self.state.window_pages:
                self.window_links[batch.window_slots[t]] = self.links[batch.slots[t]]
        chain = self._states(batch)
        tokens = np.empty(len(batch.rows), np.int32)
        for r, row in enumerate(batch.rows.tolist()):
            held = self.links[where[owner[row]][: int(batch.positions[row]) + 1]].tolist()
            if chain and chain[row] != held[-1]:
                held[-1] = mix(held[-1] ^ chain[row])
            if self.state.window_pages and not self._sees(batch, int(owner[row]), held):
                held[-1] = mix(held[-1] ^ STALE)
            tokens[r] = draw(held, self.program.vocabulary, batch.sampling[r])
        return StepResult(tokens, np.zeros(len(tokens), np.float32), self._logits(tokens) if request.logits else None)

    def _sees(self, batch: Batch, s: int, held: list[int]) -> bool:
        """True if the K/V slots of a sequence's last `state.window` tokens hold the right contents (sliding window).

        Args:
            batch: the step's batch.
            s: the sequence's index in the batch.
            held: the right contents of the slots of all tokens of the sequence up to the token that is sampled from:
                hashes made by link(). The last `state.window` items are compared with the slots.
        """
        at = np.arange(max(0, len(held) - self.state.window), len(held))
        blocks = batch.window_table[s, at // batch.block_size]
        links = self.window_links[blocks * batch.block_size + at % batch.block_size]
        return bool((blocks >= 0).all()) and links.tolist() == [held[i] for i in at]

    def _states(self, batch: Batch) -> list[int]:
        """Run this fake device's recurrence over the batch. Returns the state after each token row, as a list of ints.

        The state after a token is a hash of the sequence's tokens up to there, so that a state that was kept or passed
        on wrongly changes later tokens. The last state of each sequence is written to its slot. The list is empty if
        there are no slots (a model without recurrent state).
        """
        if not len(self.states):
            return []
        rows = []
        for s, (before, after) in enumerate(zip(batch.state_from.tolist(), batch.state_to.tolist(), strict=True)):
            state = START if before < 0 else int(self.states[before])
            first = int(batch.first_row[s])
            for token in batch.tokens[first : first + int(batch.q_len[s])].tolist():
                state = link(state, token)
                rows.append(state)
            self.states[after] = state
        return rows

    def _logits(self, tokens: np.ndarray) -> np.ndarray:
        """Return logits f32 [R, vocabulary] that make the tokens certain: a token's logit is 0, all others are -inf.

        A token of -1 has only logits of -inf.
        """
        out = np.full((len(tokens), self.program.vocabulary), -np.inf, np.float32)
        drawn = tokens >= 0
        out[np.flatnonzero(drawn), tokens[drawn]] = 0
        return out


class OracleDevice(Device):
    """A fake device for tests of the runtime.

    The next token of a sequence is a hash of its tokens, not computed by a model. A test can therefore compute the
    right tokens without weights (see expected()). Only the vocabulary and the context length of the Program are used.
    """

    name = "oracle"

    def load_program(self, program: Program, weights: Weights, state: StateSpec) -> Executable:
        return OracleExecutable(program, state)
