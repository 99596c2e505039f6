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
    """A well mixed 64-bit integer for the 64-bit integer x: the finaliser of murmur3 (Appleby 2011), a bijection.

    Every bit of the result depends on every bit of x.
    """
    x = ((x ^ (x >> 33)) * 0xFF51AFD7ED558CCD) & MASK
    x = ((x ^ (x >> 33)) * 0xC4CEB9FE1A85EC53) & MASK
    return x ^ (x >> 33)


def link(previous: int, token: int) -> int:
    """Content of a K/V slot: a 64-bit hash of the previous slot's content and of the token id."""
    return mix((previous * 31 + token + 1) & MASK)


def draw(links: Sequence[int], vocabulary: int, sampling: Sampling) -> int:
    """The next token id of a sequence on the oracle, a fake device for tests; -1 if the mask allows no token id.

    A link is the content of one K/V slot: a hash of the sequence's tokens up to there, see link(). The token id is a
    hash of all links in their order, of the row's logit edits and mask, and of the seed if the temperature is above 0.

    links: those of all tokens of the sequence, in order. vocabulary: number of token ids. sampling: parameters of the
    row.
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
    """The token id that the oracle, a fake device for tests, gives after the token ids `ids`; -1 if none is allowed.

    It is computed from `ids` alone, without a K/V cache, so that tests can compare it with the device's token.

    vocabulary: number of token ids. sampling: temperature, seed, logit edits and mask; they change the hash.
    """
    links, previous = [], START
    for token in ids:
        previous = link(previous, token)
        links.append(previous)
    return draw(links, vocabulary, sampling)


class OracleExecutable(BlockingExecutable):
    """A fake model for tests of the runtime: the next token is a hash of the sequence's token ids.

    It reads the ids' hashes (links) back from the K/V cache, so that any mistake in block tables or slots becomes a
    wrong token. Each K/V slot holds one 64-bit link: the hash of its token and of the link before. Each slot of
    recurrent state holds the link of a sequence's last token.
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
        """K/V slots of all tokens of sequence `s` in order of position, looked up in the block table, as an array."""
        at = np.arange(int(batch.context_len[s]))
        return batch.block_table[s, at // batch.block_size] * batch.block_size + at % batch.block_size

    def run(self, request: StepRequest) -> StepResult:
        """Run one step. Returns a StepResult: the sampled tokens, and logits if requested. Log-probabilities are all 0.

        Taps and timings are ignored. As on a real device, the K/V of all tokens of the batch is written before any
        token is sampled. Raises DeviceError for a batch that does not fit.
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
        """True if a sequence's window blocks hold the expected links of all tokens that a query may attend to.

        A link is the hash of a token and of the link before it. The query belongs to the last token of `held`, and
        attends to the last `state.window` tokens of it.

        s: the sequence's index in the batch. held: the expected links of all tokens up to the query's own.
        """
        at = np.arange(max(0, len(held) - self.state.window), len(held))
        blocks = batch.window_table[s, at // batch.block_size]
        links = self.window_links[blocks * batch.block_size + at % batch.block_size]
        return bool((blocks >= 0).all()) and links.tolist() == [held[i] for i in at]

    def _states(self, batch: Batch) -> list[int]:
        """What this fake device has in place of recurrent state: a hash after each token row, as a list of ints.

        The hash is of the sequence's tokens so far, so a state that was kept or passed on wrongly shows in later
        tokens. Each sequence's last hash is written to its slot. [] if there are no slots, as for models without
        recurrence.
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
        """Logits f32 [R, vocabulary] that make the given tokens certain: 0 for the token, -inf for all others."""
        out = np.full((len(tokens), self.program.vocabulary), -np.inf, np.float32)
        drawn = tokens >= 0
        out[np.flatnonzero(drawn), tokens[drawn]] = 0
        return out


class OracleDevice(Device):
    """A fake device for tests of the runtime. It computes no model: a next token is a hash of the tokens before it.

    So a test can say which tokens are right, without weights (see expected()). Of the Program, only the vocabulary and
    the context length are used.
    """

    name = "oracle"

    def load_program(self, program: Program, weights: Weights, state: StateSpec) -> Executable:
        return OracleExecutable(program, state)
