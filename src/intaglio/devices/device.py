"""The device interface: load a Program with its weights, run one step of a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np

from intaglio.batch import NO_STATE, Batch
from intaglio.devices.clock import Clock, WallClock
from intaglio.devices.expert_load import ExpertLoad
from intaglio.devices.recipe import Recipe
from intaglio.ops import Collective, Value
from intaglio.program import MeshProgram, Program
from intaglio.program.expert_placement import Ranks

T = TypeVar("T")


class DeviceError(RuntimeError):
    """Raised if a device cannot load or run a Program; base class of DeviceLost."""


class ReplacementRefused(DeviceError):
    """Raised if the replacement of a lost executable would give results that differ in bits. Do not try again."""


class DeviceLost(DeviceError):
    """Raised if the device's process died, hung or sent an unreadable answer.

    The executable's state is lost; the Program must be loaded again.
    """


class Weights(Protocol):
    """Interface of weight sources, which hold the tensors of a checkpoint by name.

    A tensor is an array in its stored type (perhaps a view of a mapped file), or a Quantised (codes and scales).
    """

    def read(self, name: str) -> Value:
        """The values of a checkpoint tensor: an array in its stored type, or a Quantised (codes and scales).

        Raises CheckpointError if the checkpoint has no such tensor.
        """

    def strips(self, name: str) -> Iterator[Value]:
        """Yield the values of a checkpoint tensor in parts, so that not all of it need be in memory at a time.

        Each part holds consecutive rows (first dimension) and is an array or Quantised, as from read(). The source
        chooses how many rows a part has; it may yield the whole tensor as one part.
        """

    def release(self, name: str) -> None:
        """Tell the source that the device has copied a tensor, so that its memory pages may be dropped."""

    def identity(self) -> str | None:
        """A text that identifies all the source's values; other processes get the same text for the same values.

        None if the source cannot give one, as for random weights. A device may use the text as the key under which it
        caches packed weights on disk.
        """


@dataclass(frozen=True)
class StateSpec:
    """Size of the state that outlives a step: K/V cache and recurrent state.

    A page holds one K/V block of a sequence.

    Attributes:
        pages: pages of each K/V cache (the symbolic dim P).
        page_tokens: tokens per page (the symbolic dim B).
        slots: slots of recurrent state (the symbolic dim N), two for each sequence that runs at once; 0 for a model
            without recurrent state.
        window_pages: pages of each cache that only layers with a window or chunk read (`Program.windows`); fewer are
            enough, since a page is free again once no later query can see it. 0: such a cache has `pages` pages.
        window: the longest of these windows in tokens; 0 if window_pages is 0.
    """

    pages: int
    page_tokens: int = 32
    slots: int = 0
    window_pages: int = 0
    window: int = 0

    def pages_of(self, program: Program, cache: str) -> int:
        """Number of pages of one K/V cache: `window_pages` if only layers with a window read it, else `pages`.

        cache: name of the cache's tensor. If `window_pages` is 0, every cache has `pages`. Raises DeviceError if a
        window layer that reads the cache sees more tokens than the attribute `window` of this StateSpec allows.
        """
        reach = program.windows.get(cache)
        if not self.window_pages or reach is None:
            return self.pages
        if reach > self.window:
            raise DeviceError(f"{cache} has a window of {reach} tokens; the StateSpec keeps blocks for {self.window}")
        return self.window_pages

    def pair(self, sequence: int, steps: int) -> tuple[int, int]:
        """(slot to read, slot to write) of a sequence in its step number `steps`, as `Chunk.state` takes them.

        For callers that use slots without an engine. Sequence i alternates between slots 2 i and 2 i + 1; in
        step 0 the slot to read is -1, for none. (-1, -1) if there are no slots.
        """
        if not self.slots:
            return NO_STATE
        before, after = 2 * sequence + (steps + 1) % 2, 2 * sequence + steps % 2
        return (before if steps else -1), after


@dataclass(frozen=True)
class StepRequest:
    """A request to an executable: the batch of one step, and the values to return.

    Attributes:
        batch: the arrays of the step.
        logits: True to return logits f32 [R, vocabulary].
        taps: sites (names of ops, or of views of a result) whose first result is returned, for debugging.
        timed: True to return the seconds of each op.
    """

    batch: Batch
    logits: bool = False
    taps: Collection[str] = ()
    timed: bool = False


@dataclass(frozen=True)
class StepResult:
    """The result of a step.

    Attributes:
        tokens: int32 [R]; -1: the row has NaN, or no finite logit that may be drawn.
        logprobs: f32 [R], the log-probabilities of `tokens`.
        logits: f32 [R, vocabulary] if requested, else None.
        taps: the results that StepRequest.taps asked for, by site (name of the op or view).
        timings: seconds of each op by site if requested, else empty; the sum over ranks for a mesh.
        rank_timings: for each rank of a mesh, seconds by site, if requested; else ().
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    logits: np.ndarray | None = None
    taps: dict[str, np.ndarray] = field(default_factory=dict)
    timings: Mapping[str, float] = field(default_factory=dict)
    rank_timings: tuple[Mapping[str, float], ...] = ()


def merge_ranks(results: Sequence[StepResult]) -> StepResult:
    """One StepResult for all ranks of a mesh: the last rank's tokens, log-probabilities and logits, all ranks' taps.

    Taps are the op results that the caller asked for. Here a tap of rank r is named `site@r` (site: the op's name). The
    seconds of each op (timings) are summed over ranks; rank_timings keeps them by rank. results: at least one, in order
    of rank.
    """
    last, timings = results[-1], dict[str, float]()
    for result in results:
        for site, seconds in result.timings.items():
            timings[site] = timings.get(site, 0.0) + seconds
    taken = {f"{site}@{r}": x for r, result in enumerate(results) for site, x in result.taps.items()}
    by_rank = tuple(r.timings for r in results if r.timings)
    return StepResult(last.tokens, last.logprobs, last.logits, taken, timings, by_rank)


class PendingStep(Protocol):
    """Interface of a step (one forward pass of a batch) that launch() has started and that may still be running."""

    def done(self) -> bool:
        """True if the step has ended, so that result() does not wait."""

    def result(self) -> StepResult:
        """Wait for the step to end and return its StepResult, or raise the error that ended it."""


@dataclass(frozen=True)
class CompletedStep:
    """The PendingStep of a device whose launch() runs the whole step before it returns.

    outcome: the step's StepResult, or the error that ended it, which result() raises.
    """

    outcome: StepResult | Exception

    def done(self) -> bool:
        """Always True: the step has ended."""
        return True

    def result(self) -> StepResult:
        """Return the StepResult, or raise the error that ended the step. Never waits: the step has ended already."""
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


class Executable(ABC):
    """A Program loaded on a device, with packed weights and K/V cache. Steps run in the order of their launches.

    `depth`: number of steps to keep under way at once; it is the number of pipeline stages, 1 without a pipeline.
    `state_kept`: True if this executable replaces a lost one and has kept the lost executable's K/V cache.
    """

    program: Program
    state: StateSpec
    depth: int = 1  # steps that are worth having under way: the stages of a pipeline
    state_kept: bool = False  # it has the K/V cache of the lost executable in whose place it was loaded

    @abstractmethod
    def launch(self, request: StepRequest) -> PendingStep:
        """Start a step and return it as a PendingStep. Errors are raised by its result()."""

    @property
    def block_parts(self) -> tuple[int, ...]:
        """Bytes of one K/V block in each K/V cache; () if this executable cannot read or write blocks.

        The caches are in the order of the Program; in a mesh, those of rank 0 come first, then those of rank 1, and so
        on. The bytes of a block in a cache are those of the first head, then of the second, and so on.
        """
        return ()

    @property
    def block_bytes(self) -> int:
        """Bytes of one K/V block over all layers; 0 if this executable cannot read or write blocks."""
        return sum(self.block_parts)

    def read_blocks(self, blocks: Sequence[int]) -> np.ndarray:
        """The contents of K/V blocks, uint8 [blocks, block_bytes], after all steps launched so far.

        Another executable can take these bytes in write_blocks() if it has an equal Program, device, instruction set
        and build of Intaglio. Raises DeviceError for a block number that the K/V cache does not have, or if block_bytes
        is 0 (this executable cannot read blocks).

        blocks: numbers of the blocks.
        """
        raise DeviceError(f"{type(self).__name__} cannot read K/V blocks")

    def write_blocks(self, blocks: Sequence[int], contents: np.ndarray) -> None:
        """Replace the contents of K/V blocks before all steps launched later.

        contents: uint8 [blocks, block_bytes], as read_blocks() returned them. Raises DeviceError for a block that is
        not there, contents of another type or shape, or if block_bytes is 0.
        """
        raise DeviceError(f"{type(self).__name__} cannot write K/V blocks")

    def has_experts(self) -> bool:
        """True if a layer on any rank has routed experts (op `experts`)."""
        return any(op.kind == "experts" for op in self.program.ops)

    def expert_loads(self) -> dict[str, ExpertLoad]:
        """How many tokens each expert has computed in all steps so far, as {site (name of an op): ExpertLoad}.

        There is one item for each layer with experts; none if this executable does not count tokens. Raises DeviceLost
        if the device is lost.
        """
        return {}

    def load_experts(self, layers: Mapping[str, Ranks]) -> None:
        """Start to load the experts that another placement of some layers needs. Returns at once; steps go on.

        layers: the expert numbers of each rank, by site (name of the layer's op). Raises DeviceError if they do not fit
        or cannot be moved, and DeviceLost if the device is lost.
        """
        raise DeviceError(f"{type(self).__name__} cannot move experts")

    def experts_loaded(self) -> bool:
        """True once load_experts() has loaded everything, and if it was not called; False while it loads.

        Raises DeviceError if loading failed; the experts then stay where they are. Raises DeviceLost if the device is
        lost.
        """
        return True

    def switch_experts(self) -> None:
        """Use the experts that load_experts() has loaded, in all steps launched later. Returns nothing.

        Waits if they are still being loaded. Nothing changes if load_experts() was not called since the last switch.
        Raises DeviceError if the executable cannot move experts or loading failed, DeviceLost if the device is lost.
        """
        raise DeviceError(f"{type(self).__name__} cannot move experts")

    def step(self, request: StepRequest) -> StepResult:
        """Run a step to its end and return its StepResult, or raise the error that ended it."""
        return self.launch(request).result()

    def unwrapped(self) -> Executable:
        """The executable inside all wrappers; this one if it wraps none."""
        return self

    def between_steps(self, call: Callable[[Executable], T]) -> T:
        """Return call(executable), for work that is not a step, such as moving experts. It raises what `call` raises.

        An executable may be wrapped in others; `call` gets the innermost one. It must run no step itself. If several
        models take turns on one machine, the call waits for this model's turn.
        """
        return call(self)

    def close(self) -> None:  # noqa: B027 (most hold nothing)
        """Release what the executable holds outside this process, such as child processes; most hold nothing."""


class BlockingExecutable(Executable):
    """Base class of executables that compute in the calling thread: a step has ended when launch() returns."""

    @abstractmethod
    def run(self, request: StepRequest) -> StepResult:
        """Compute a step and return its StepResult."""

    def launch(self, request: StepRequest) -> PendingStep:
        try:
            return CompletedStep(self.run(request))
        except Exception as e:
            return CompletedStep(e)

    def step(self, request: StepRequest) -> StepResult:
        return self.run(request)


# A step of one rank of a mesh. At each collective it yields (collective, this rank's input or None for a recv), is sent
# this rank's output (None for a send), and at its end returns the result of the step.
CollectiveSteps = Generator[tuple[Collective, np.ndarray | None], np.ndarray | None, StepResult]


class RankExecutable(BlockingExecutable):
    """Base class of executables that each run one rank of a mesh. Several can run in one process.

    A step is a generator. At each collective it yields this rank's input and waits for its output: the caller
    exchanges the data of all ranks. At the end it returns the StepResult.
    """

    @abstractmethod
    def run_until_collective(self, request: StepRequest) -> CollectiveSteps:
        """Generator of one step that yields at each collective and returns the StepResult.

        It yields (collective op, this rank's input) and is resumed with this rank's output, which the caller
        has computed from the inputs of all ranks. Raises DeviceError for a batch that does not fit.
        """

    def run(self, request: StepRequest) -> StepResult:
        return run_single_rank(self.program, self.run_until_collective(request))


def run_single_rank(program: Program, steps: CollectiveSteps) -> StepResult:
    """Run the step of a Program without collectives to its end and return its StepResult.

    Raises DeviceError if it reaches a collective.
    """
    try:
        op, _ = next(steps)
    except StopIteration as end:
        result: StepResult = end.value
        return result
    raise DeviceError(
        f"{op.site} ({op.kind}): rank {program.rank} of {program.mesh} waits for the others; load all of them into a "
        "MeshDevice"
    )


@dataclass(frozen=True)
class DeviceFacts:
    """Properties of a device, for reports and for choosing sizes. None: the device has no such property.

    Attributes:
        isa: name of the CPU instruction set.
        threads: number of CPU threads.
        memory: size of its memory in bytes.
        build: hash of the compiled code that computes results.
    """

    isa: str | None = None
    threads: int | None = None
    memory: int | None = None
    build: str | None = None


class Device(ABC):
    """Base class of devices. load() takes a Program and its weights and returns an Executable, which runs steps.

    A device may pack weights, fuse ops and use threads, if results stay equal bit for bit. `name`: its name in
    open_device(). `clock`: the clock that times its steps, measured or modelled.
    """

    name: str
    clock: Clock = WallClock()

    def load(self, program: Program | MeshProgram, weights: Weights, state: StateSpec) -> Executable:
        """Load a Program, or the Programs of all ranks of a mesh, with its weights. Returns the Executable.

        Raises ProgramError for a Program that breaks a rule, DeviceError if the device cannot run it.
        """
        if isinstance(program, Program):
            return self.load_program(program, weights, state)
        if len(program.programs) > 1:
            raise DeviceError(f"device {self.name!r} runs one rank; load {program.layout or 'a mesh'} by a MeshDevice")
        return self.load_program(program.last, weights, state)

    def reload(
        self, lost: Executable, program: Program | MeshProgram, weights: Weights, state: StateSpec
    ) -> Executable:
        """Load a replacement for the executable `lost`, whose device is gone. Returns the new Executable.

        Programs and weights are those of `lost`. The replacement's `state_kept` is True if it has the K/V cache
        of `lost`. Raises ReplacementRefused if its results would have other bits, ProgramError for a Program that
        breaks a rule, and DeviceError if the device cannot run it.
        """
        return self.load(program, weights, state)

    @abstractmethod
    def load_program(self, program: Program, weights: Weights, state: StateSpec) -> Executable:
        """Load one Program, a whole model or one rank of a mesh. Returns the Executable."""

    def recipe(self) -> Recipe:
        """The Recipe, (name of a function, its arguments), by which another process makes an equal device.

        Classes whose constructor has arguments override it.
        """
        return f"{type(self).__module__}:{type(self).__qualname__}", {}

    def facts(self) -> DeviceFacts:
        """The DeviceFacts of this device, for reports and for choosing sizes."""
        return DeviceFacts()


def check_blocks(state: StateSpec, block_bytes: int, blocks: Sequence[int], contents: np.ndarray | None = None) -> None:
    """Raise DeviceError for a block number outside the pool, or contents that are not uint8 [blocks, block_bytes]."""
    if blocks and not 0 <= min(blocks) <= max(blocks) < state.pages:
        bad = next(b for b in blocks if not 0 <= b < state.pages)
        raise DeviceError(f"block {bad} is outside 0..{state.pages - 1}")
    if contents is not None and (contents.dtype != np.uint8 or contents.shape != (len(blocks), block_bytes)):
        raise DeviceError(
            f"contents of {len(blocks)} blocks are {contents.dtype} {list(contents.shape)}; they must be uint8 "
            f"[{len(blocks)}, {block_bytes}]"
        )


def limits(program: Program, state: StateSpec) -> dict[str, int]:
    """The limits of the numbers in a batch, as {words for a kind of number: limit}. A number must be below its limit.

    The keys are "token id", "position", "slot", "block", "state slot", "window slot" and "window block", in this order.
    A Program without a vocabulary has the largest int32 as limit of token ids. The limit is 0 for what the Program does
    not have: state slots without recurrent state, window slots and blocks if windows have no pages of their own.
    """
    return {
        "token id": program.vocabulary or np.iinfo(np.int32).max,
        "position": program.context,
        "slot": state.pages * state.page_tokens,
        "block": state.pages,
        "state slot": state.slots,
        "window slot": state.window_pages * state.page_tokens,
        "window block": state.window_pages,
    }


def check_batch(program: Program, state: StateSpec, batch: Batch) -> None:
    """Raise DeviceError naming the value out of range if a batch does not fit the Program or the K/V cache.

    Returns nothing.
    """
    if batch.block_size != state.page_tokens:
        raise DeviceError(f"the batch has {batch.block_size} tokens per page, the state {state.page_tokens}")
    below = limits(program, state) | {"row": len(batch.tokens)}
    states = np.concatenate([batch.state_from, batch.state_to])
    windows = batch.window_slots, batch.window_table
    given = (batch.tokens, batch.positions, batch.slots, batch.block_table, states, *windows, batch.rows)
    if bool(state.window_pages) != bool(batch.counts[4]):
        raise DeviceError(
            f"the state has {state.window_pages} window pages and the batch has {'a' if batch.counts[4] else 'no'} "
            "window table; give each Chunk window_blocks if, and only if, there are window pages"
        )
    if state.slots and int(batch.state_to.min()) < 0:
        raise DeviceError("the state has slots but a chunk has none; give each Chunk state=(slot before, slot after)")
    for (what, limit), values in zip(below.items(), given, strict=True):
        low = -1 if what in ("block", "state slot", "window block") else 0
        if values.size and (int(values.min()) < low or int(values.max()) >= limit):
            bad = int(values.min()) if int(values.min()) < low else int(values.max())
            raise DeviceError(f"{what} {bad} is outside 0..{limit - 1}")
