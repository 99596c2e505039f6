"""Budget of the K/V blocks that a replica keeps in memory to hand them over by TCP."""

from __future__ import annotations

from collections.abc import Sequence

from intaglio.router import Role
from intaglio.tiers.peer import default_budget

DECODE_BYTES = 256 << 20  # the maximum of a decode replica, because nobody fetches its blocks


def peer_budget(role: Role, replicas: int, memory: int) -> int:
    """Returns the default limit, in bytes, on the K/V blocks that a replica keeps for other replicas.

    The blocks are kept in memory. 1/8 of the node's memory is divided equally among its replicas. Each replica gets at
    most 8 GiB. A decode replica gets at most 256 MiB, because no other replica fetches its blocks.

    Args:
        role: the replica's role.
        replicas: maximum number of replicas on the node.
        memory: bytes of the node's memory.
    """
    budget = default_budget(memory, replicas)
    return min(budget, DECODE_BYTES) if role == "decode" else budget


def size_words(given: Sequence[str], size: int) -> list[str]:
    """Returns the arguments of `intaglio serve` that set --kv-cache-size to `size` bytes, as a list of words.

    The list is empty if `given`, the user's own arguments, already has that option.
    """
    return [] if gives(given, "--kv-cache-size") else ["--kv-cache-size", str(size)]


def gives(words: Sequence[str], option: str) -> bool:
    """True if `words`, a command line, has the option `option`, as a word of its own or as OPTION=VALUE."""
    return any(word.split("=")[0] == option for word in words)
