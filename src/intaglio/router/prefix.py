"""Prefix keys of a prompt: chained hashes over chunks of its text, before it is tokenized.

The router does not tokenize. Tokenizing 16 kB takes about as long as a decode step, and the replica does it
anyway. Two prompts share their first i keys exactly if they share the salt and their first i chunks of text.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

CHUNK_BYTES = 128  # about one K/V block of 32 tokens of English text
KEY_BYTES = 8


def prefix_keys(salt: bytes, pieces: Iterable[bytes]) -> tuple[bytes, ...]:
    """Returns the prefix keys of a prompt's text, as a tuple of hashes.

    There is one key for each whole chunk of CHUNK_BYTES bytes; () if the text is shorter than a chunk. Key i is a hash
    of `salt` and of chunks 0 to i, as bytes of length KEY_BYTES. So two prompts with the same key i have the same first
    i + 1 chunks.

    Args:
        salt: bytes such as the model's name and the request's cache salt. Prompts with different salts share no keys.
        pieces: the prompt's text as bytes, in one or more pieces that are joined.
    """
    text = b"".join(pieces)
    keys, parent = [], blake2b(salt, digest_size=KEY_BYTES).digest()
    for at in range(0, len(text) - CHUNK_BYTES + 1, CHUNK_BYTES):
        parent = blake2b(parent + text[at : at + CHUNK_BYTES], digest_size=KEY_BYTES).digest()
        keys.append(parent)
    return tuple(keys)
