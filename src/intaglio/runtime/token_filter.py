"""TokenFilter: mask of the token ids that min_tokens, allowed_token_ids and bad_words allow.

mask() intersects it with the grammar's mask, if there is one.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from intaglio.runtime.request import Request, TokenIds


class TokenFilter:
    """Computes the token ids that a request's min_tokens, allowed_token_ids and bad_words allow as the next token.

    A mask is uint32 [(vocabulary + 31) // 32], lowest bit first; a bit of 1 means allowed. The filter keeps no state,
    so all choices of a request share one filter.
    """

    def __init__(self, request: Request, vocabulary: int) -> None:
        p = request.params
        self.min_tokens, self.bad_words = p.min_tokens, request.bad_words
        self.context = max((len(word) - 1 for word in self.bad_words), default=0)
        everything = np.zeros(-(-vocabulary // 32) * 32, bool)
        everything[:vocabulary] = True
        self.allowed = pack(everything)
        if p.allowed_token_ids is not None:
            self.allowed = pack(_flags(p.allowed_token_ids, len(everything)))
        ends = {*p.stop_token_ids, *(() if p.ignore_eos else request.eos_ids)}
        self.unfinished = self.allowed & ~pack(_flags((id for id in ends if id < vocabulary), len(everything)))

    @classmethod
    def of(cls, request: Request, vocabulary: int) -> TokenFilter | None:
        """Returns the TokenFilter of a request; None if the request does not restrict token ids.

        vocabulary: number of token ids.
        """
        p = request.params
        needed = p.min_tokens or p.allowed_token_ids is not None or request.bad_words
        return cls(request, vocabulary) if needed else None

    def mask(self, output: TokenIds, drafts: TokenIds, grammar: np.ndarray | None) -> np.ndarray:
        """Returns the bit mask of the token ids that may come after `output` and `drafts`.

        It is uint32 [(vocabulary + 31) // 32], lowest bit first; a bit of 1 means allowed. Before min_tokens tokens,
        end-of-sequence tokens and stop_token_ids are not allowed, unless the grammar allows nothing else. An id that
        would complete one of the request's bad words is never allowed.

        output: ids of the tokens generated so far. drafts: ids of the draft tokens after them. grammar: the grammar's
        mask, with which the result is intersected; None if there is no grammar.
        """
        early = len(output) + len(drafts) < self.min_tokens
        mask = (self.unfinished if early else self.allowed).copy()
        if grammar is not None:
            mask &= grammar
            if early and not mask.any():
                mask = self.allowed & grammar
        tail = [*output[max(0, len(output) + len(drafts) - self.context) :], *drafts] if self.context else []
        for *before, last in self.bad_words:
            if not before or tail[-len(before) :] == before:
                mask[last // 32] &= ~np.uint32(1 << last % 32)
        return mask


def pack(flags: np.ndarray) -> np.ndarray:
    """Returns boolean flags packed into a bit mask, uint32 [len(flags) / 32].

    The first flag is the lowest bit of the first number.

    flags: bool array whose length is a multiple of 32.
    """
    return np.packbits(flags, bitorder="little").view(np.uint32)


def _flags(ids: Iterable[int], size: int) -> np.ndarray:
    flags = np.zeros(size, bool)
    flags[list(ids)] = True
    return flags
