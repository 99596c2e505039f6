"""Layout of the messages that carry requests (steps, experts, K/V blocks) and their results. Nothing is pickled.

A message is 8-byte integers, then arrays one after another, each at a multiple of 8 bytes. Texts (sites of taps and
timings, errors) are JSON in UTF-8.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from intaglio.batch import Batch, Edits, Sampling, numbers_size
from intaglio.devices.device import StepRequest, StepResult
from intaglio.program.expert_placement import Ranks

PARAMETERS = np.dtype(
    [
        ("temperature", "f8"),
        ("top_p", "f8"),
        ("min_p", "f8"),
        ("top_k", "i8"),
        ("seed", "u8"),
        ("edits", "i8"),
        ("mask", "i8"),
    ]
)  # of a row; edits: how many, -1 for none. mask: 1 if there is one
NONE = np.empty(0, np.uint8)


class MessageError(ValueError):
    """Raised for bytes that are not a message in this module's binary format, such as a truncated message."""


class Reader:
    """Reads the arrays of a message one after another, without copying them."""

    def __init__(self, message: memoryview) -> None:
        self.message, self.at = message, 0

    def array(self, dtype: np.dtype | type, count: int) -> np.ndarray:
        """Read the next array of the message, which has `count` values. Returns a view of the message's bytes.

        Raises MessageError if the message is too short.
        """
        size = np.dtype(dtype).itemsize * count
        if count < 0 or self.at + size > len(self.message):
            raise MessageError(f"a message of {len(self.message)} bytes ends before {count} values at {self.at}")
        found = np.frombuffer(self.message, dtype, count, self.at)
        self.at += -(-size // 8) * 8
        return found

    def text(self, size: int) -> object:
        """Read the next `size` bytes of the message as JSON. Returns the decoded value; None if `size` is 0.

        Raises MessageError if the message is too short.
        """
        return json.loads(self.array(np.uint8, size).tobytes()) if size else None


def text(value: object) -> np.ndarray:
    """Return `value` as JSON text in UTF-8, in a uint8 array."""
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def request_parts(request: StepRequest) -> list[np.ndarray]:
    """Return a step request as a list of arrays, to be written as one message. RequestReader reads it."""
    batch = request.batch
    taps = text(list(request.taps)) if request.taps else NONE
    parameters = np.empty(len(batch.sampling), PARAMETERS)
    edits, masks = list[Edits](), list[np.ndarray]()
    for i, s in enumerate(batch.sampling):
        seed, changes = s.seed & 0xFFFFFFFFFFFFFFFF, -1 if s.edits is None else len(s.edits.ids)
        parameters[i] = (s.temperature, s.top_p, s.min_p, s.top_k, seed, changes, s.mask is not None)
        if s.edits is not None:
            edits.append(s.edits)
        if s.mask is not None:
            masks.append(s.mask)
    words = len(masks[0]) if masks else 0
    flags = int(request.logits) | int(request.timed) << 1
    head = np.array([*batch.counts, batch.block_size, len(parameters), words, flags, len(taps)], np.int64)
    parts = [head, batch.numbers, parameters, taps]
    for e in edits:
        parts += [e.ids.astype(np.int32), e.scale.astype(np.float32), e.add.astype(np.float32)]
    return [*parts, *(mask.astype(np.uint32) for mask in masks)]


READ, WRITE, EXPERTS = 4, 8, 16  # in the flags of a request: it moves K/V blocks or experts, and runs no step


def experts_parts(action: str, layers: Mapping[str, Ranks] | None = None) -> list[np.ndarray]:
    """Return a request about experts as a list of arrays, to be written as one message.

    read_experts_request() reads the message.

    Args:
        action: "loads", "load", "loaded" or "switch". They stand for the methods expert_loads(), load_experts(),
            experts_loaded() and switch_experts() of Executable.
        layers: for "load", the argument of load_experts(); None for the other actions.
    """
    content = text([action, layers or {}])
    return [np.array([len(content), 0, 0, 0, 0, 0, 0, 0, EXPERTS, 0], np.int64), content]


def read_experts_request(message: memoryview) -> tuple[str, dict[str, Ranks]] | None:
    """Read a request about experts. Returns a tuple (action, layers); None if the message is another kind of request.

    `action` is "loads" (report how many tokens each expert got), "load" (start loading other experts), "loaded" (report
    whether they are loaded) or "switch" (use them). For "load", `layers` is {name of a layer's experts op: for each
    rank, the numbers of its experts}. For the other actions it is {}.
    """
    r = Reader(message)
    size, _, _, _, _, _, _, _, flags, _ = r.array(np.int64, 10).tolist()
    if not flags & EXPERTS:
        return None
    content: Any = r.text(size)
    return content[0], {site: tuple(map(tuple, ranks)) for site, ranks in content[1].items()}


def value_parts(value: object) -> list[np.ndarray]:
    """Return an answer that holds `value` (as JSON). The answer is a list of arrays, to be written as one message.

    read_value() reads the message.
    """
    content = text(value)
    return [np.array([0, len(content), 0, 0, 0], np.int64), content]


def read_value(message: memoryview) -> tuple[str, object]:
    """Read an answer with one value. Returns ("", value), or (the error's text, None) if the request had failed."""
    r = Reader(message)
    failed, size, _, _, _ = r.array(np.int64, 5).tolist()
    content = r.text(size)
    return (str(content), None) if failed else ("", content)


@dataclass(frozen=True)
class BlocksRequest:
    """A request to a rank to read or write K/V blocks.

    Attributes:
        blocks: numbers of the blocks.
        contents: the bytes to write, uint8 [blocks, bytes of a block on this rank]; None to read.
    """

    blocks: list[int]
    contents: np.ndarray | None


def blocks_parts(
    blocks: Sequence[int], contents: np.ndarray | None = None, rank_bytes: Sequence[int] = ()
) -> list[np.ndarray]:
    """Return a request to read or write K/V blocks as a list of arrays, to be written as one message.

    Args:
        blocks: numbers of the blocks.
        contents: the bytes to write, uint8 [blocks, bytes]. Each row has the bytes of all ranks, one after another.
            None to read.
        rank_bytes: for a write, how many bytes of a row belong to each rank, in order of rank; () to read.
    """
    flags = READ if contents is None else WRITE
    head = np.array([len(blocks), len(rank_bytes), 0, 0, 0, 0, 0, 0, flags, 0], np.int64)
    parts = [head, np.array(blocks, np.int64), np.array(rank_bytes, np.int64)]
    if contents is not None:
        ends = np.cumsum(rank_bytes)[:-1]
        parts += [np.ascontiguousarray(part) for part in np.split(contents, ends, axis=1)]
    return parts


def read_blocks_request(message: memoryview, rank: int) -> BlocksRequest | None:
    """Read a request about K/V blocks. Returns a BlocksRequest; None if the message is another kind of request.

    For a write, the BlocksRequest has only the bytes for the rank `rank`, uint8 [blocks, bytes]. Raises MessageError if
    the message is too short.
    """
    r = Reader(message)
    blocks, ranks, _, _, _, _, _, _, flags, _ = r.array(np.int64, 10).tolist()
    if not flags & (READ | WRITE):
        return None
    numbers, sizes = r.array(np.int64, blocks).tolist(), r.array(np.int64, ranks).tolist()
    if flags & READ:
        return BlocksRequest(numbers, None)
    parts = [r.array(np.uint8, blocks * size) for size in sizes]
    return BlocksRequest(numbers, parts[rank].reshape(blocks, sizes[rank]))


def contents_parts(contents: np.ndarray | None) -> list[np.ndarray]:
    """Return the answer to a request that reads or writes K/V blocks, as a list of arrays.

    The arrays are to be written as one message. `contents` is the contents of the blocks that were read, uint8 [blocks,
    bytes]. After a write it is None, and the answer is a header without contents.
    """
    rows, width = (0, 0) if contents is None else contents.shape
    head = np.array([0, 0, rows, width, 0], np.int64)
    return [head] if contents is None else [head, contents]


def read_contents(message: memoryview) -> np.ndarray | str:
    """Read the answer to a request for K/V blocks. Returns a copy of their contents, uint8 [blocks, bytes].

    If the request had failed, the result is the error's text, a str.
    """
    r = Reader(message)
    failed, _, rows, width, _ = r.array(np.int64, 5).tolist()
    return str(read_result(message)) if failed else r.array(np.uint8, rows * width).reshape(rows, width).copy()


class RequestReader:
    """Reads step requests from messages.

    If all sampling parameters equal those of the request before, and no row has logit edits or a mask, read() returns
    the same Sampling objects again. A device then need not convert them a second time.
    """

    def __init__(self) -> None:
        self.bytes, self.sampling = b"", tuple[Sampling, ...]()

    def read(self, message: memoryview) -> StepRequest:
        """Read a step request from a message. Returns a StepRequest, whose batch uses the message's memory."""
        r = Reader(message)
        t, s, rows, columns, windows, block_size, several, words, flags, taps = r.array(np.int64, 10).tolist()
        numbers = r.array(np.int32, numbers_size(t, s, rows, columns, windows))
        parameters = r.array(PARAMETERS, several)
        named = r.text(taps)
        assert named is None or isinstance(named, list)
        if (given := parameters.tobytes()) != self.bytes:
            self.bytes, self.sampling = given, tuple(_plain(p) for p in parameters)
        sampling = self.sampling
        if (parameters["edits"] >= 0).any() or parameters["mask"].any():
            edits = [_edits(r, int(n)) if n >= 0 else None for n in parameters["edits"]]
            masks = [r.array(np.uint32, words).copy() if has else None for has in parameters["mask"]]
            sampling = tuple(
                Sampling(s.temperature, s.top_k, s.top_p, s.min_p, s.seed, e, m)
                for s, e, m in zip(sampling, edits, masks, strict=True)
            )
        batch = Batch(numbers, (t, s, rows, columns, windows), block_size, sampling)
        return StepRequest(batch, bool(flags & 1), tuple(named or ()), bool(flags & 2))


def _plain(p: np.void) -> Sampling:
    temperature, top_p, min_p, top_k, seed, _, _ = p.tolist()
    return Sampling(temperature, top_k, top_p, min_p, seed)


def _edits(r: Reader, n: int) -> Edits:
    return Edits(r.array(np.int32, n).copy(), r.array(np.float32, n).copy(), r.array(np.float32, n).copy())


def result_parts(result: StepResult) -> list[np.ndarray]:
    """Return a step's result as a list of arrays, to be written as one message. read_result() reads it."""
    wide = result.logits
    facts = NONE
    if result.taps or result.timings:
        facts = text([[[site, x.shape] for site, x in result.taps.items()], list(result.timings)])
    rows, width = (-1, 0) if wide is None else wide.shape
    head = np.array([0, len(facts), len(result.tokens), rows, width], np.int64)
    parts: list[np.ndarray] = [head, facts, result.tokens, result.logprobs, *([] if wide is None else [wide])]
    seconds = np.fromiter(result.timings.values(), np.float64, len(result.timings))
    return [*parts, *result.taps.values(), seconds]


def error_parts(error: Exception) -> list[np.ndarray]:
    """Return the answer to a failed request as a list of arrays, to be written as one message.

    It has the error's text.
    """
    content = text(f"{type(error).__name__}: {error}")
    return [np.array([1, len(content), 0, 0, 0], np.int64), content]


def read_result(message: memoryview) -> StepResult | str:
    """Read a rank's answer to a step.

    Returns a StepResult with copied arrays, or the error's text if the step failed.
    """
    r = Reader(message)
    failed, size, drawn, rows, width = r.array(np.int64, 5).tolist()
    facts = r.text(size)
    if failed:
        return str(facts)
    tokens, logprobs = r.array(np.int32, drawn).copy(), r.array(np.float32, drawn).copy()
    logits = r.array(np.float32, rows * width).reshape(rows, width).copy() if rows >= 0 else None
    assert facts is None or isinstance(facts, list)
    shapes, sites = facts or ([], [])
    taps = {site: r.array(np.float32, int(np.prod(shape))).reshape(shape).copy() for site, shape in shapes}
    timings = dict(zip(sites, r.array(np.float64, len(sites)).tolist(), strict=True))
    return StepResult(tokens, logprobs, logits, taps, timings)


def size_of(parts: Sequence[np.ndarray]) -> int:
    """Return the number of bytes of a message that consists of the arrays `parts`, padding included."""
    return sum(-(-x.nbytes // 8) * 8 for x in parts)


def pack(parts: Sequence[np.ndarray]) -> bytes:
    """Return the message that consists of the arrays `parts`, as bytes."""
    raw = [np.ascontiguousarray(x).reshape(-1).view(np.uint8).tobytes() for x in parts]
    return b"".join(x + bytes(-len(x) % 8) for x in raw)
