"""Type stubs of the native module, csrc/binding.cpp. Methods that add a buffer, tensor or op return its number."""

from collections.abc import Mapping, Sequence
from typing import overload

import numpy as np

PANEL_ROWS: int  # weight rows in a packed panel; each matrix of a stack begins at a new panel
PAGE_MULTIPLE: int  # tokens of a K/V page are a multiple of it

def isas() -> list[str]:
    """Names of the usable instruction sets, fastest first."""

def op_kinds() -> list[str]:
    """Kinds of op that have a native kernel."""

def exposed_seconds(
    numbers: Sequence[int], first: Sequence[float], second: Sequence[float], collective: Sequence[bool]
) -> list[float]:
    """Exposed seconds of each op of a modelled step with dual-batch overlap; 0 for ops that compute.

    numbers: the kernel of each op. first, second: seconds of each kernel in both halves of the batch. collective:
    whether each kernel is a collective. Raises ValueError if the lists do not fit together.
    """

def prefetched_ends(
    numbers: Sequence[int], seconds: Sequence[float], weights: Sequence[float], others: Sequence[float], ahead: float
) -> tuple[list[float], list[bool]]:
    """(end of each op in seconds, whether it waited for its weights) if weights are prefetched.

    numbers: the kernel of each op. seconds: of each op. weights, others: seconds in which HBM delivers each kernel's
    weights, or its other bytes. ahead: weights arrive at most so many seconds before their op. Raises ValueError if
    the lists do not fit together.
    """

def read_bandwidth(threads: int, megabytes: int = 512, runs: int = 5, isa: str = ...) -> float:
    """Measured bytes/s of a streaming read of `megabytes` MiB; the best of `runs` passes."""

def matrix_peak(threads: int, format: str, group: int = 0, runs: int = 20, isa: str = ...) -> float:
    """Measured FLOP/s of the linear kernel on operands that stay in cache; the best of `runs` passes."""

class Region:
    """Anonymous memory of `bytes` bytes, or a mapped file."""

    @overload
    def __init__(self, bytes: int) -> None: ...
    @overload
    def __init__(self, file: int, bytes: int, writable: bool) -> None: ...

class Weight:
    """A weight [n, k] packed for the native kernels."""

    def __init__(self, format: str, n: int, k: int, group: int, glu: bool) -> None: ...
    def fill(self, rows: np.ndarray, type: str, first: int, count: int, threads: int) -> None: ...
    def fill_codes(
        self,
        codes: np.ndarray,
        scales: np.ndarray,
        lows: np.ndarray | None,
        units: np.ndarray | None,
        low_units: np.ndarray | None,
        first: int,
        threads: int,
    ) -> None: ...
    def place(self, region: Region, offset: int) -> None: ...
    def take(self, other: Weight) -> None:
        """Take the image of another weight of the same shape and format. Raises ValueError for another shape."""

    def unpack(self, row: int, out: np.ndarray) -> None: ...
    def image(self) -> bytes: ...
    @property
    def bits(self) -> int: ...
    @property
    def quantises(self) -> bool: ...
    @property
    def nbytes(self) -> int: ...

class Edits:
    """Logit edits and grammar masks of the rows of a step. Row r has the edits first[r] to first[r + 1] - 1."""

    def __init__(
        self,
        first: np.ndarray,
        ids: np.ndarray,
        scale: np.ndarray,
        add: np.ndarray,
        mask_of: np.ndarray,
        masks: np.ndarray,
    ) -> None: ...

class SamplingParams:
    """Sampling parameters of the rows of a step. numbers f32 [rows, 4]: temperature, top_p, min_p, top_k."""

    def __init__(self, numbers: np.ndarray, seeds: np.ndarray) -> None: ...

Attribute = bool | int | float | str | list[float | str]

class CommunicatorError(RuntimeError):
    """A collective that failed, or whose group was aborted: names rank, site and cause."""

class Segment:
    """The memory that the ranks of a group on one host share: rings, bells, the abort word, counters of steps."""

    ranks: int
    epoch: int
    aborted: bool
    def __init__(self, file: int) -> None:
        """Map a formatted file. Raises ValueError if it is none."""

    @staticmethod
    def bytes_for(ranks: int, ring_bytes: int) -> int: ...
    @staticmethod
    def format(file: int, ranks: int, ring_bytes: int, epoch: int) -> None: ...
    def abort(self, rank: int, site: str, cause: str) -> None: ...
    def abort_reason(self) -> str: ...
    def post(self, steps: int) -> None: ...
    def complete(self, rank: int, steps: int) -> None: ...
    def completed(self, rank: int) -> int: ...
    def wait_posted(self, rank: int, steps: int, seconds: float) -> bool:
        """Wait for more than `steps` posts. False after so many seconds; true at once if the group is aborted."""

    def wait_completed(self, steps: int, seconds: float) -> bool: ...
    def beats(self, rank: int) -> int: ...

class Heartbeat:
    def __init__(self, segment: Segment, rank: int, seconds: float) -> None: ...

class Datagrams:
    """Sends datagrams at an interval in seconds, in a thread that does not need Python's lock."""

    def __init__(self, socket: int, seconds: float) -> None: ...
    def add(self, datagram: bytes) -> None: ...
    def waiting(self) -> int:
        """Number of datagrams that are not sent yet."""

class Communicator:
    """One rank's end of a group. Arrays are float32 [rows, columns]; results go to `out`.

    Belongs to one thread at a time. Raises CommunicatorError.
    """

    rank: int
    ranks: int
    timeout: float
    ranks_per_host: int  # if host h has the ranks h * ranks_per_host and following; 0: not known
    @overload
    def __init__(self, segment: Segment, rank: int) -> None: ...
    @overload
    def __init__(self, segment: Segment, rank: int, sockets: Mapping[int, int]) -> None:
        """sockets: descriptors of connections to ranks of other hosts, by rank; the communicator owns them."""

    def all_reduce(
        self, site: str, group: Sequence[int], x: np.ndarray, out: np.ndarray, wire: str = "f32",
        algorithm: str = "automatic",
    ) -> None: ...  # fmt: skip
    def all_gather(
        self, site: str, group: Sequence[int], x: np.ndarray, out: np.ndarray, tokens: bool = False, wire: str = "f32"
    ) -> None: ...
    def reduce_scatter(
        self, site: str, group: Sequence[int], x: np.ndarray, out: np.ndarray, wire: str = "f32"
    ) -> None: ...
    def all_to_all(
        self, site: str, group: Sequence[int], x: np.ndarray, out: np.ndarray, wire: str = "f32"
    ) -> None: ...
    def barrier(self, site: str) -> None: ...

class Executable:
    """A Program as native ops, run by a thread pool; see csrc/run/executable.h."""

    def __init__(self, isa: str, threads: int, page: int, limits: tuple[int, ...]) -> None: ...
    def buffer(self, row_bytes: int, sampled: bool, share: int, shares: int) -> int: ...
    def columns(self, buffer: int, cols: int, ld: int, column: int) -> int: ...
    def vector(self, values: np.ndarray) -> int: ...
    def weight(self, weight: Weight, shape: list[int]) -> int: ...
    def keep_caches_in(self, file: int) -> None:
        """Put the caches that are added from now on into a memory file; the caller closes it."""

    def cache(
        self, pages: int, heads: int, head_dim: int, format: str, keys: bool, windowed: bool = ..., rows: int = ...
    ) -> int: ...
    def states(self, slots: int, floats: int) -> int: ...
    def op(self, kind: str, operands: Mapping[str, int], attributes: Mapping[str, object]) -> int:
        """Add an op; attributes are of type Attribute. Raises ValueError for an unknown kind, operand or attribute."""

    def join(self, communicator: Communicator) -> None:
        """Make this one rank of a group, before its collectives are added."""

    def stop(self) -> int:
        """Add an op that the caller executes; advance() returns before it."""

    def begin(
        self,
        numbers: np.ndarray,
        counts: tuple[int, int, int, int, int],
        draws: SamplingParams,
        edits: Edits | None,
        taps: list[tuple[int, int, np.ndarray]],
        seconds: np.ndarray | None,
    ) -> None:
        """Begin a step. Raises IndexError for a batch beyond the limits."""

    def advance(self, outs: list[tuple[int, np.ndarray]]) -> int:
        """Run the ops up to the next stop and return its number, or the number of ops; then copy tensors out."""

    def expert_tokens(self, op: int) -> list[int]:
        """Tokens routed to each expert of op number `op` so far. Raises ValueError for an op without experts."""

    def place_experts(self, op: int, held: list[int], copy: list[int], copies: list[int]) -> None:
        """Replace these attributes of an op `experts`."""

    def set_vector(self, tensor: int, values: np.ndarray) -> None: ...
    def copy_out(self, tensor: int, out: np.ndarray) -> None: ...
    def copy_in(self, tensor: int, values: np.ndarray) -> None: ...
    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all K/V caches."""

    @property
    def page_parts(self) -> list[int]:
        """Bytes of one page of each K/V cache, in the order in which they were added."""

    def read_page(self, page: int, out: np.ndarray) -> None:
        """Copy a page to a uint8 array [page_bytes]. Raises IndexError for a page that is not there."""

    def write_page(self, page: int, values: np.ndarray) -> None:
        """Copy a uint8 array [page_bytes] to a page. Raises IndexError for a page that is not there."""

    @property
    def plans(self) -> int: ...
    @property
    def planning_seconds(self) -> float: ...
