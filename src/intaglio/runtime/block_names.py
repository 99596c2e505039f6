"""Names of K/V blocks: a hash over everything that decides the bits of a block's keys and values.

A block has the same name in every engine, process and run that would compute the same bits for it. So a router can
tell which blocks an engine has, and a block that was kept on disk can be used again. Nothing here needs an engine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import blake2b

import numpy as np

from intaglio.program import Program

NAME_BYTES = 32  # 256 bits: nobody finds two blocks of one name, not even on purpose


def digest(content: bytes) -> str:
    """Returns a hash of the bytes `content`, as text of 64 hexadecimal digits."""
    return blake2b(content, digest_size=NAME_BYTES).hexdigest()


@dataclass(frozen=True)
class BlockScope:
    """Model, weights and settings on which the bits of an engine's K/V blocks depend, besides their tokens.

    Attributes:
        program: hash of the whole model's Program, also if several ranks share the model.
        weights: identity of the weights (see devices.Weights); "" if unknown.
        kv_format: number formats of the K/V cache, such as "bf16".
        numerics: device, instruction set and layout, such as "host avx2 tp2".
        block_size: tokens in a block.
        version: version of this package and its compiled part.
    """

    program: str = ""
    weights: str = ""
    kv_format: str = ""
    numerics: str = ""
    block_size: int = 0
    version: str = ""

    @classmethod
    def of(
        cls, program: Program, block_size: int, numerics: str = "", weights: str = "", version: str = ""
    ) -> BlockScope:
        """Returns the BlockScope of the K/V blocks of a Program.

        Its fields `program` and `kv_format` are taken from the Program. The arguments `block_size`, `numerics`,
        `weights` and `version` become the fields of the same names.
        """
        formats = sorted({t.format for t in program.of_role("state") if t.shape[0] == "P"})
        return cls(program.hash, weights, " ".join(formats), numerics, block_size, version)

    @cached_property
    def digest(self) -> str:
        """Returns a hash of all fields of this BlockScope, as text of 64 hexadecimal digits.

        The hash is part of every block name. So two engines give a block the same name only if their model, weights,
        K/V format, numerics, block size and version are the same.
        """
        return digest(json.dumps(asdict(self), sort_keys=True).encode())


@dataclass(frozen=True)
class BlockNames:
    """Computes the names of K/V blocks from token ids.

    A block's name is a hash of all tokens from the sequence's start to the block's end, as text of 64 hexadecimal
    digits. The BlockScope and the request's cache salt are also hashed.

    Attributes:
        scope: digest of the BlockScope (model, weights and settings on which the bits of K/V blocks depend).
        block_size: tokens in a block.
    """

    scope: str
    block_size: int

    def root(self, salt: str | None = None) -> str:
        """Returns the name that is used as the parent of a sequence's first block.

        It is a hash of the scope and the salt.

        salt: the request's cache salt; None if it has none. None and "" give different names.
        """
        end = b"" if salt is None else b"salt " + salt.encode("utf-8", "surrogatepass")
        return digest(b"root " + self.scope.encode() + b" " + end)

    def child(self, parent: str, tokens: Sequence[int]) -> str:
        """Returns the name of the block that follows the block named `parent` and contains the token ids `tokens`.

        `tokens` must have `block_size` items.
        """
        return digest(parent.encode() + b" " + np.asarray(tokens, "<i8").tobytes())

    def chain(self, tokens: Sequence[int], salt: str | None = None) -> Iterator[str]:
        """Yield the names of a sequence's full K/V blocks, in order.

        of() returns the same names as a list.

        tokens: token ids of the sequence. salt: the request's cache salt; None if it has none.
        """
        name = self.root(salt)
        for at in range(0, len(tokens) - self.block_size + 1, self.block_size):
            name = self.child(name, tokens[at : at + self.block_size])
            yield name

    def of(self, tokens: Sequence[int], salt: str | None = None) -> list[str]:
        """Returns the names of a sequence's full K/V blocks as a list of strings, in order; [] if no block is full.

        A name is a hash of all tokens from the sequence's start to the block's end, as 64 hexadecimal digits.

        tokens: token ids of the sequence. salt: the request's cache salt; None if it has none. A different salt gives
        different names.
        """
        return list(self.chain(tokens, salt))
