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
    """The hash of some bytes, as 64 hexadecimal digits."""
    return blake2b(content, digest_size=NAME_BYTES).hexdigest()


@dataclass(frozen=True)
class BlockScope:
    """Everything that decides the bits of the K/V blocks of an engine, apart from their tokens and salt.

    Attributes:
        program: hash of the Program; with several ranks, of the whole model's.
        weights: identity of the weights (see devices.Weights); "" if unknown.
        kv_format: formats of the K/V cache, such as "bf16".
        numerics: device, instruction set and what decides bits of the layout, such as "host avx2 tp2".
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
        """The BlockScope of the K/V blocks of a Program. Its kv_format is taken from the Program's K/V tensors.

        The other arguments are described at the attributes of the class.
        """
        formats = sorted({t.format for t in program.of_role("state") if t.shape[0] == "P"})
        return cls(program.hash, weights, " ".join(formats), numerics, block_size, version)

    @cached_property
    def digest(self) -> str:
        """The hash of all fields of this BlockScope, as 64 hexadecimal digits.

        Every block name includes this hash. So two engines give a block the same name only if their model, weights, K/V
        format, numerics, block size and version are the same.
        """
        return digest(json.dumps(asdict(self), sort_keys=True).encode())


@dataclass(frozen=True)
class BlockNames:
    """Computes names of K/V blocks. A name is a hash, 64 hexadecimal digits, over all tokens up to the block's end.

    Attributes:
        scope: digest of the BlockScope.
        block_size: tokens in a block.
    """

    scope: str
    block_size: int

    def root(self, salt: str | None = None) -> str:
        """The name that stands for the parent of a sequence's first block: a hash over the scope and the salt.

        salt: the request's cache salt; None: none. None and "" give different names.
        """
        end = b"" if salt is None else b"salt " + salt.encode("utf-8", "surrogatepass")
        return digest(b"root " + self.scope.encode() + b" " + end)

    def child(self, parent: str, tokens: Sequence[int]) -> str:
        """The name of the block of `tokens` (`block_size` token ids) that follows the block named `parent`."""
        return digest(parent.encode() + b" " + np.asarray(tokens, "<i8").tobytes())

    def chain(self, tokens: Sequence[int], salt: str | None = None) -> Iterator[str]:
        """Yield the names of a sequence's full K/V blocks one by one, in order; of() returns the same names as a list.

        Args:
            tokens: token ids of the sequence.
            salt: the request's cache salt; None: none.
        """
        name = self.root(salt)
        for at in range(0, len(tokens) - self.block_size + 1, self.block_size):
            name = self.child(name, tokens[at : at + self.block_size])
            yield name

    def of(self, tokens: Sequence[int], salt: str | None = None) -> list[str]:
        """The names of a sequence's full K/V blocks, in order, as a list of strings; [] if no block is full.

        A name is a hash, 64 hexadecimal digits, over all tokens from the sequence's start to the block's end.

        Args:
            tokens: token ids of the sequence.
            salt: the request's cache salt; None: none. Other salts give other names.
        """
        return list(self.chain(tokens, salt))
