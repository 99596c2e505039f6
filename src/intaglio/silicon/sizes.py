"""BatchSizes: the sizes of a batch on which modelled time depends: tokens, rows, and queries and keys of sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from intaglio.batch import Batch, Chunk, Sizes, bind

BLOCK = 32  # tokens a K/V block in the batch that batch() makes
ChunkCounts = tuple[tuple[int, int, int], ...]  # (queries, keys up to and including them, number of such sequences)


def count_chunks(q_len: Sequence[int], context_len: Sequence[int]) -> ChunkCounts:
    """Returns a tuple with one item (q_len, context_len, n) for each distinct pair of lengths.

    n is the number of sequences of the batch that have both lengths. q_len, context_len: lengths of each sequence.
    """
    pairs, counts = np.unique(np.stack([q_len, context_len], axis=1), axis=0, return_counts=True)
    return tuple((int(q), int(c), int(n)) for (q, c), n in zip(pairs, counts, strict=True))


@dataclass(frozen=True)
class BatchSizes:
    """Sizes of a batch that determine the modelled time of a step.

    Attributes:
        tokens: number of tokens that the step computes, one row of activations each.
        rows: number of tokens whose logits are needed.
        sequences: a tuple of (queries, keys, n): n sequences have this number of queries and of keys.
        filtered: True if any row is sampled with top-k or top-p.
    """

    tokens: int
    rows: int
    sequences: ChunkCounts
    filtered: bool = False

    @cached_property
    def sizes(self) -> Sizes:
        """The values of the symbolic dimensions of tensor shapes, a dict {"T": ..., "S": ..., "R": ...}.

        T is the number of tokens, S the number of sequences, R the number of tokens whose logits are needed.
        """
        return Sizes(T=self.tokens, S=sum(n for *_, n in self.sequences), R=self.rows)

    @cached_property
    def counts(self) -> BatchSizes:
        """A copy of these sizes in which every sequence has one query and one key.

        The numbers of tokens, rows and sequences are unchanged. The copy is a cache key for the times of ops other than
        attention: steps that differ only in the queries and keys of their sequences share one Timing.
        """
        return BatchSizes(self.tokens, self.rows, ((1, 1, self.sizes["S"]),), self.filtered)

    def halves(self) -> tuple[BatchSizes, BatchSizes]:
        """Divide the batch into two halves of nearly equal size. Returns the BatchSizes of the first and second half.

        The halves differ by at most one token, and by at most one row (token whose logits are needed). Each group of
        sequences with equal numbers of queries and keys is divided equally. If a group has an odd number of sequences,
        one of them is cut in the middle of its queries; the first half gets the earlier queries. A sequence with a
        single query is not cut. It goes to the half that has fewer tokens so far, or to the first half if both have
        equally many.
        """
        parts: tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]] = ([], [])
        surplus = 0  # tokens of the first half beyond those of the second: -1, 0 or 1
        for q, keys, n in self.sequences:
            early = (q + 1) // 2 if surplus <= 0 else q // 2
            halves = (
                ((q, keys, n // 2), (early, keys - (q - early), n % 2)),
                ((q, keys, n // 2), (q - early, keys, n % 2)),
            )
            for part, added in zip(parts, halves, strict=True):
                part.extend(p for p in added if p[0] and p[2])
            surplus += n % 2 * (2 * early - q)
        tokens = [sum(q * n for q, _, n in part) for part in parts]
        more = int(tokens[1] > tokens[0])  # the half with more tokens takes the odd row
        rows = ((self.rows + 1 - more) // 2, (self.rows + more) // 2)
        a, b = (BatchSizes(t, r, tuple(part), self.filtered) for t, r, part in zip(tokens, rows, parts, strict=True))
        return a, b

    def rows_of(self, dim: int | str) -> int:
        """Returns the size of a tensor dimension in this step.

        dim: a number, which is returned, or the name of a symbolic dimension, such as "T". Raises KeyError for an
        unknown name.
        """
        return self.sizes[dim] if isinstance(dim, str) else dim

    def batch(self) -> Batch:
        """Returns a Batch that has these sizes; all token ids are 0. Op.work() needs it to count FLOPs and bytes."""
        rows_left, used, chunks = self.rows, 0, list[Chunk]()
        for q, keys, n in self.sequences:
            for _ in range(n):
                rows, blocks = min(q, rows_left), -(-keys // BLOCK)
                chunks.append(Chunk([0] * q, keys - q, range(used, used + blocks), range(q - rows, q)))
                rows_left, used = rows_left - rows, used + blocks
        return bind(chunks, BLOCK)


def sizes_of(batch: Batch) -> BatchSizes:
    """Returns the BatchSizes of a Batch: its numbers of tokens, rows and sequences.

    Its `filtered` is True if any row is sampled at a temperature above 0 with top-k, or with top-p below 1.
    """
    filtered = any(s.temperature > 0 and (s.top_k or s.top_p < 1) for s in batch.sampling)
    counts = count_chunks(batch.q_len.tolist(), batch.context_len.tolist())
    return BatchSizes(len(batch.tokens), len(batch.rows), counts, filtered)
