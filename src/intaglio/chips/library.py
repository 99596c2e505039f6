"""KernelLibrary: properties of a vendor's kernels on one generation of chips, as data and apart from the hardware.

Launch overhead, tile sizes, heuristics by which a kernel chooses, protocols of collectives. intaglio.silicon computes
times from these fields. The libraries that ship are data/libraries/*.toml.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from intaglio.chips import ranges
from intaglio.chips.kernel_record import OPS, KernelRecord
from intaglio.chips.spec import ChipError


@dataclass(frozen=True)
class Protocol:
    """A protocol of a collective library, such as NCCL's LL, LL128 and Simple.

    Attributes:
        name: name of the protocol.
        barrier_factor: start-up time of a collective, in multiples of KernelLibrary.barrier_s.
        latency_factor: latency of one step, in multiples of KernelLibrary.link_latency_s.
        bandwidth_fraction: fraction of the links' bandwidth that the protocol reaches.
        max_bytes_per_chip: largest payload for which the protocol is used, in bytes; 0: any.
    """

    name: str
    barrier_factor: float
    latency_factor: float
    bandwidth_fraction: float
    max_bytes_per_chip: int = 0


EXPERT_TILES = ("best", "by_experts", "by_tokens")
ALGORITHMS = ("ring", "all")


@dataclass(frozen=True, kw_only=True)
class KernelLibrary:
    """Numbers that describe a vendor's kernels on one generation of chips, such as overheads, tiles and efficiencies.

    The modelled times follow from these numbers and from the hardware (ChipSpec). Efficiencies are fractions, above 0
    and at most 1. Fields that end in `_s` are seconds. Raises ChipError for a value outside its range.
    """

    name: str
    description: str  # one line, for listings
    generation: str = ""  # of chips that it was written for, such as hopper
    engine: str = ""  # serving engine whose kernels they are, such as vllm; "": no particular one

    # All kernels
    launch_s: float  # launch overhead: from the end of a kernel to the first instruction of the next
    persistent: bool = False  # persistent kernels: a core loads its next tile's operands while it stores this one
    prefetches_weights: bool = False  # weights of later ops are loaded during earlier ones
    dual_batch_overlap: bool = False  # a batch may run as two halves that overlap compute and links, if that is faster
    # Multiple of the chip's hbm_efficiency and l2_efficiency that kernels reach; at most peak.
    memory_factor: float = 1.0
    # Bytes that a core moves a cycle at most, in kernels without products that are bound by their instructions; 0: any
    core_bytes_per_cycle: float = 0.0
    activation_bytes: int = 2  # bytes of a value between ops; kernels keep it in bf16
    l2_usable: float = 0.8  # fraction of the L2 that can hold an op's operands
    l2_multicast: float = 1.0  # cores that get a line for each read of the L2, if they need the same; part of its rate
    burst_bytes: int = 128  # bytes of one HBM access; also the bytes of K loaded in one step
    half_burst_cost: float = 1.3  # bytes moved for each byte of rows that are half a burst long

    # Products
    mxu_efficiency: float  # fraction of the peak matrix rate that a stream of matmuls reaches
    tiles: tuple[tuple[int, int], ...]  # result tiles (rows, columns) from which kernels choose
    split_k: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 16, 32)  # numbers of parts into which K may be split
    matmul_stages: int = 8  # operand tiles in flight, at most
    quantise_launches: int = 3  # kernels that quantise bf16 activations before an 8-bit product: maximum, scale, round
    quantise_bytes: float = 8.0  # bytes that they move for each value of the activations
    row_cycles: float = 0.0  # cycles that a core takes at least for a row, if they (or convolutions) work row by row

    # Recurrent state
    scan_kernels: int = 6  # of the chunked delta rule: decays, keys, inverse, two for states, outputs; 1: all in one

    # Attention
    key_tile: int = 64  # keys in a tile
    whole_key_tiles: bool = True  # the last tile of a context is loaded whole, if the kernel is not persistent
    query_tiles: tuple[int, ...] = (64, 128)  # query rows of a tile, from which kernels choose
    fused_query_tiles: tuple[int, ...] = (64, 128, 256, 512)  # the same, on a fused attention engine
    min_query_rows: int = 16  # query rows that the matrix array processes at least
    softmax_overlap: float = 0.0  # fraction of the softmax that overlaps with products of other rows
    key_tile_cycles: float = 0.0  # core cycles of a tile of keys besides products and softmax: waits between them
    pack_gqa: bool = False  # query heads that share a K/V head share a tile of queries
    pack_most: int = 1_000_000  # query heads of a K/V head that decode kernels pack at most; of more they pack none
    pack_windowed: bool = True  # decode kernels pack query heads also with a sliding window; False: one head a job
    # Numbers of parts into which a decode context may be split.
    kv_splits: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    split_mha: bool = False  # contexts are also split if each query head has its own K/V head
    merge_launch: bool = True  # a separate kernel merges the parts of a context
    decode_jobs: int = 2  # decode jobs that run on a core at a time
    decode_waits: int = 1  # loads that a decode job waits for in turn before its first product: indices, then keys
    decode_stages: int = 2  # tiles of keys and values in flight, at most
    window_min_keys: int = 256  # keys that a decode kernel reads at least, with a sliding window
    prefill_window_keys: int = 1  # keys that a prefill kernel processes at least for a query, with a sliding window
    kv_native: bool = False  # 8-bit keys and values are multiplied as such; otherwise they are converted to bf16 first
    kv_dequant_ops: int = 8  # operations to convert an 8-bit value to bf16: unpack, convert twice, scale, pack, move
    kv_cast_bytes: float = 0.0  # bytes that a kernel moves beforehand to convert an 8-bit value; 0: none does
    kv_row_cycles: int = 40  # core cycles to store one row of one head in the cache: address, wait, store
    fused_rotation: bool = False  # one kernel rotates queries and keys and writes the cache, in tables of attention
    attention_launches: int = 3  # kernels of a call measured alone: cache write, preparation, attention
    kv_quant_cycles: float = 0.7  # core cycles to quantise a value to 8 bits; 0: the vector lanes do it

    # Experts
    grouped_mxu_efficiency: float  # fraction of the peak matrix rate that grouped products of experts reach
    expert_tiles: str = "best"  # best: the fastest of those below; by_experts, by_tokens: a heuristic of vLLM
    expert_rows: tuple[int, ...] = (16, 32, 64, 128, 256)  # rows of a tile
    expert_columns: tuple[int, ...] = (64, 128, 256)  # columns of a tile
    expert_stages: int = 4  # operand tiles in flight, at most
    vector_load_values: int = 16  # rows of expert weights must be a multiple of it to be read by vector loads
    unaligned_row_cost: float = 4.0  # bytes moved for each byte of other rows
    experts_native: bool = True  # 8-bit experts with 8-bit activations are multiplied as such; False: in bf16
    expert_permute: bool = False  # a kernel copies the rows of x into the order of experts before the products
    w4_dequant_ops: float = 0.0  # operations to convert a 4-bit expert weight to BF16; 0: hidden behind the products
    fp8_dequant_ops: int = 3  # operations to convert an FP8 expert weight to BF16, if the product is in BF16
    fp8_load_bytes_per_cycle: float = 0.0  # of such weights, that a core loads at most; 0: as fast as they arrive
    fp8_overfetch: float = 1.0  # bytes moved from the L2 for each byte of such weights
    expert_all_rows: bool = False  # activation and combination process all routed rows, also those of other ranks
    expert_fused_activation: bool = False  # the gate/up product applies the activation before it stores its result
    routing_launches: int = 3  # kernels of routing: scores and top-k; counting; sorting
    routing_ops: int = 8  # operations for each routing score: softmax, top-k, counting

    # Collectives
    barrier_s: float  # start-up of a collective: a barrier among all its chips
    link_latency_s: float  # latency of one step of a collective: signal, wait, and copy of zero bytes
    link_efficiency: float = 1.0  # fraction of the links' bandwidth that long transfers reach
    protocols: tuple[Protocol, ...]
    algorithms: str = "ring"  # ring: rings, and direct all_to_all; all: the fastest schedule that fits the chips
    through_hbm: bool = True  # each step copies through HBM, not overlapped with the links
    peer_handshakes: bool = True  # an all_to_all makes a handshake with each peer in turn
    switch_reduce_min_chips: int = 8  # chips from which a switch that can reduce does so
    small_reduce_s: float = 0.0  # start-up of a serving engine's own one- and two-shot all_reduce; 0: it has none
    small_reduce_efficiency: float = 1.0  # fraction of the links' bandwidth that it reaches

    kernels: tuple[KernelRecord, ...] = ()  # kernels that differ from the fields above; the first that fits is used
    reasons: tuple[tuple[str, str], ...] = field(default=(), repr=False)  # (field, source of its value)

    def __post_init__(self) -> None:
        check(self)

    def record(self, op: str, format: str = "", head_dim: int = 0, kernel: str = "") -> KernelRecord | None:
        """Returns the first KernelRecord (description of one kernel) in `kernels` that fits a call.

        None if no record fits; the library's own fields then describe the kernel.

        Args:
            op: kind of call, such as "products" or "prefill", one of OPS.
            format: number format of the weights, or of the keys and values; "": fits only records for all formats.
            head_dim: columns of an attention head; 0 for other calls.
            kernel: name that the record must have; "": any name, but only records whose field `default` is True.

        Raises ChipError if `kernel` is a name that no record of the library has.
        """
        if kernel and not any(r.kernel == kernel for r in self.kernels):
            known = ", ".join(dict.fromkeys(r.kernel for r in self.kernels)) or "none"
            raise ChipError(f"library {self.name!r} has no kernel {kernel!r}; it has {known}")
        return next((r for r in self.kernels if r.serves(op, format, head_dim, kernel)), None)

    def with_record(self, record: KernelRecord | None) -> KernelLibrary:
        """Returns a copy of the library that describes only one kernel, with the field values that `record` sets.

        In the copy, `kernels` is empty. record: the kernel's record; None: all other fields keep their values.
        """
        return dataclasses.replace(self, kernels=(), **dict(record.changes if record else ()))


def check(library: KernelLibrary) -> None:
    """Raise ChipError, naming the field, if a value of a library is outside its range; return nothing otherwise."""

    def refuse(bad: bool, why: str) -> None:
        if bad:
            raise ChipError(f"library {library.name!r}: {why}")

    for name in ("mxu_efficiency", "grouped_mxu_efficiency", "l2_usable", "link_efficiency", "small_reduce_efficiency"):
        value = getattr(library, name)
        refuse(not 0 < value <= 1, f"{name}={value}; it must be above 0 and at most 1")
    refuse(not library.tiles, "tiles is empty; give at least one (rows, columns)")
    why = ranges.outside(vars(library), ranges.LIBRARY)
    refuse(bool(why), why)
    refuse(not library.protocols, "protocols is empty; give at least one")
    for name, allowed in (("expert_tiles", EXPERT_TILES), ("algorithms", ALGORITHMS)):
        value = getattr(library, name)
        refuse(value not in allowed, f"{name}={value!r}; use one of {', '.join(allowed)}")
    for record in library.kernels:
        refuse(record.op not in OPS, f"kernels.op={record.op!r}; use one of {', '.join(OPS)}")
        library.with_record(record)


def replace_library(library: KernelLibrary, **changes: Any) -> KernelLibrary:
    """Returns a copy of `library` with some fields changed. changes: the new values, by the fields' names.

    The new values hold for all kernels of the library: a kernel record's own value of such a field is dropped. Raises
    ChipError for an unknown field or a value outside its range.
    """
    fields = [f.name for f in dataclasses.fields(KernelLibrary)]
    for name in changes:
        if name not in fields:
            raise ChipError(f"a kernel library has no field {name!r}; it has {', '.join(fields)}")
    kept = tuple(
        dataclasses.replace(r, changes=tuple((f, v) for f, v in r.changes if f not in changes)) for r in library.kernels
    )
    return dataclasses.replace(library, **{"kernels": kept, **changes})
