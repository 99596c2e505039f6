"""The file of one K/V block: a header with everything that the block's name is made of, the contents, a checksum.

Layout: MAGIC, the header's length (4 bytes, little-endian), the header (JSON), the contents, and a SHA-256 over all
before it. A reader knows what the header has to be, byte for byte, so a file of another model, format, instruction
set, version or place in a prompt is never taken for its own.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np

from intaglio.runtime import BlockKey, BlockScope

MAGIC = b"intaglio K/V 1\n\n"
CHECKSUM = hashlib.sha256().digest_size


class BlockFileError(ValueError):
    """Raised if a file is damaged, or is not the file of the K/V block that was asked for."""


def head_of(scope: BlockScope, key: BlockKey, block_bytes: int) -> bytes:
    """Returns the first bytes of a K/V block's file: magic number, length of the header, and the header as JSON.

    The block's contents follow them in the file.
    """
    facts = {"scope": asdict(scope), "name": key.name, "parent": key.parent, "tokens": key.tokens, "bytes": block_bytes}
    header = json.dumps(facts, sort_keys=True).encode()
    return MAGIC + len(header).to_bytes(4, "little") + header


def file_size(scope: BlockScope, key: BlockKey, block_bytes: int) -> int:
    """Returns the size in bytes of the file of a K/V block whose contents have `block_bytes` bytes."""
    return len(head_of(scope, key, block_bytes)) + block_bytes + CHECKSUM


def file_bytes(scope: BlockScope, key: BlockKey, content: np.ndarray) -> list[bytes | memoryview]:
    """Returns the bytes of a K/V block's file as a list of three parts: head, contents, checksum.

    content: the block's contents, uint8 [block_bytes].
    """
    head, body = head_of(scope, key, content.nbytes), np.ascontiguousarray(content).data
    checksum = hashlib.sha256(head)
    checksum.update(body)
    return [head, body, checksum.digest()]


def read_block(file: Path, scope: BlockScope, key: BlockKey, block_bytes: int) -> np.ndarray:
    """Read a K/V block's file and check it. Returns the block's contents, uint8 [block_bytes].

    Raises BlockFileError, which says what is wrong, if the file is not exactly the one that file_bytes() makes for this
    block. Raises OSError if the file cannot be read.
    """
    with file.open("rb", buffering=0) as f:
        size, wanted = os.fstat(f.fileno()).st_size, file_size(scope, key, block_bytes)
        held = np.empty(min(size, wanted), np.uint8)
        at = 0
        while at < len(held) and (got := f.readinto(held[at:].data)):
            at += got
    return check_block(held[:at], size, str(file), scope, key, block_bytes)


def check_block(
    held: np.ndarray, size: int, where: str, scope: BlockScope, key: BlockKey, block_bytes: int
) -> np.ndarray:
    """Check the bytes of a K/V block's file. Returns the block's contents, uint8 [block_bytes].

    Args:
        held: the file's bytes, uint8 [n]. If the file is longer than a file of this block must be, only its first bytes
            are needed, as many as a file of this block has.
        size: number of bytes of the whole file.
        where: name of the file for error messages.
        scope: BlockScope of the engine's blocks.
        key: the block that the file must hold.
        block_bytes: bytes of the contents.

    Raises BlockFileError if the file is not exactly the one that file_bytes() makes for this block.
    """
    head = head_of(scope, key, block_bytes)
    wanted = len(head) + block_bytes + CHECKSUM
    if len(held) < len(MAGIC) or held[: len(MAGIC)].tobytes() != MAGIC:
        raise BlockFileError(f"{where} does not begin as a K/V block of this version")
    if size != wanted or len(held) != wanted:
        raise BlockFileError(f"{where} has {size} bytes; this block has {wanted}")
    if hashlib.sha256(held[:-CHECKSUM].data).digest() != held[-CHECKSUM:].tobytes():
        raise BlockFileError(f"the checksum of {where} is wrong")
    if held[: len(head)].tobytes() != head:
        raise BlockFileError(f"{where} is another block, or of another model, format, instruction set or version")
    return held[len(head) : -CHECKSUM]
