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
    """Raised if a lost executable cannot be replaced by one that computes bitwise identical results.

    Trying again does not help.
    """


class DeviceLost(DeviceError):
    """Raised if the device's process died, hung or sent an unreadable answer.

    The executable can no longer be used. The Program must be loaded again.
    """


class Weights(Protocol):
    """Interface of a source of weights: the tensors of a checkpoint, read by name.

    A tensor is an array in its stored type (perhaps a view of a mapped file), or a Quantised (codes and scales).
    """

    def read(self, name: str) -> Value:
        """Return the checkpoint tensor `name`: an array in its stored type, or a Quantised (codes and scales).

        Raises CheckpointError if the checkpoint has no such tensor.
        """

    def strips(self, name: str) -> Iterator[Value]:
        """Yield the values of a checkpoint tensor in parts, so that the whole tensor need not be in memory at once.

        Each part holds consecutive rows (first dimension). It is an array in the stored type, or a Quantised (codes and
        scales). The source chooses how many rows a part has, and may yield the whole tensor as one part.
        """

    def release(self, name: str) -> None:
        """Tell the source that the device has copied the tensor `name`.

        The source may then drop the tensor's memory pages.
        """

    def identity(self) -> str | None:
        """Return a text that identifies the values of all tensors, or None if the source has no such text.

        For example, a source of random weights returns None. Sources with the same values give the same text, in other
        processes too. A device may use the text as the key under which it caches packed weights on disk.
        """


@dataclass(frozen=True)
class StateSpec:
    """Size of the state that a device keeps between steps: K/V caches and recurrent state.

    A page is the memory of one K/V block: the keys and values of `page_tokens` tokens of a sequence.

    Attributes:
        pages: number of pages of each K/V cache (the symbolic dim P).
        page_tokens: tokens per page (the symbolic dim B).
        slots: number of slots for recurrent state (the symbolic dim N): two for each sequence that runs at once. 0 for
            a model without recurrent state.
        window_pages: number of pages of each windowed cache, a K/V cache that is read only by layers with a window or
            chunk (`Program.windows`). It needs fewer pages, because a page becomes free when no later query can see it.
            0: a windowed cache has `pages` pages, too.
        window: longest window, in tokens, of the layers that read windowed caches; 0 if window_pages is 0.
    """

    pages: int
    page_tokens: int = 32
    slots: int = 0
    window_pages: int = 0
    window: int = 0

    def pages_of(self, program: Program, cache: str) -> int:
        """Return the number of pages of the K/V cache named `cache`.

        It is `window_pages` if only layers with a window read the cache. It is `pages` for all other caches, and for
        every cache if `window_pages` is 0. Raises DeviceError if a layer that reads the cache has a window longer than
        `self.window` tokens.
        """
        reach = program.windows.get(cache)
        if not self.window_pages or reach is None:
            return self.pages
        if reach > self.window:
            raise DeviceError(f"{cache} has a window of {reach} tokens; the StateSpec keeps blocks for {self.window}")
        return self.window_pages

    def pair(self, sequence: int, steps: int) -> tuple[int, int]:
        """Return the tuple (slot to read, slot to write) of a sequence's recurrent state in its step number `steps`.

        It is a value for `Chunk.state`, for callers that run steps without an engine. Sequence number i alternates
        between the slots 2 i and 2 i + 1. In step 0 there is no state to read, and the slot to read is -1. Returns (-1,
        -1) if there are no slots.
        """
        if not self.slots:
            return NO_STATE
        before, after = 2 * sequence + (steps + 1) % 2, 2 * sequence + steps % 2
        return (before if steps else -1), after


@dataclass(frozen=True)
class StepRequest:
    """A request to run one step: the batch, and which values to return.

    Attributes:
        batch: the arrays of the step.
        logits: True to return the logits, f32 [R, vocabulary], where R is the number of rows that are sampled.
        taps: names of ops (or of views, slices of an op's result) whose result is returned, for debugging.
        timed: True to return the seconds of each op.
    """

    batch: Batch
    logits: bool = False
    taps: Collection[str] = ()
    timed: bool = False


@dataclass(frozen=True)
class StepResult:
    """The result of a step, in which R rows of the batch are sampled.

    Attributes:
        tokens: sampled token ids, int32 [R]. -1 if the row's logits have a NaN, or no finite value that may be drawn.
        logprobs: log-probabilities of `tokens`, f32 [R].
        logits: f32 [R, vocabulary] if requested, else None.
        taps: results of the ops named in StepRequest.taps: {name of the op or view: value}.
        timings: {op's name: seconds} if requested, else empty. For a mesh, the seconds are summed over the ranks.
        rank_timings: a dict {op's name: seconds} for each rank of a mesh, if requested; else ().
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    logits: np.ndarray | None = None
    taps: dict[str, np.ndarray] = field(default_factory=dict)
    timings: Mapping[str, float] = field(default_factory=dict)
    rank_timings: tuple[Mapping[str, float], ...] = ()


def merge_ranks(results: Sequence[StepResult]) -> StepResult:
    """Merge the StepResults of all ranks of a mesh into one StepResult.

    Tokens, log-probabilities and logits are taken from the last rank. The results of ops that the caller asked for
    (taps) are taken from all ranks. The tap of an op on rank r is stored under the op's name followed by `@r`.
    `timings` has the seconds of each op summed over the ranks. `rank_timings` has the seconds of each rank.

    `results` has one result per rank, in order of rank, and must not be empty.
    """
    last, timings = results[-1], dict[str, float]()
    for result in results:
        for site, seconds in result.timings.items():
            timings[site] = timings.get(site, 0.0) + seconds
    taken = {f"{site}@{r}": x for r, result in enumerate(results) for site, x in result.taps.items()}
    by_rank = tuple(r.timings for r in results if r.timings)
    return StepResult(last.tokens, last.logprobs, last.logits, taken, timings, by_rank)


class PendingStep(Protocol):
    """Interface of a started step, which may still be running. launch() returns it.

    A step is one forward pass of a batch.
    """

    def done(self) -> bool:
        """True if the step has ended, so that result() returns at once."""

    def result(self) -> StepResult:
        """Wait for the step to end and return its StepResult, or raise the error that ended it."""


@dataclass(frozen=True)
class CompletedStep:
    """A step that had already ended when launch() returned. It implements the interface PendingStep.

    `outcome` is the step's StepResult, or the error that ended the step, which result() raises.
    """

    outcome: StepResult | Exception

    def done(self) -> bool:
        """Always True: the step has ended."""
        return True

    def result(self) -> StepResult:
        """Return the StepResult, or raise the error that ended the step. Never waits, because the step has ended."""
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


class Executable(ABC):
    """A Program loaded on a device, with packed weights and K/V cache. Steps run in the order of their launches.

    `depth` is the number of steps to launch before waiting for the first: the number of pipeline stages, or 1 without a
    pipeline. `state_kept` is True if this executable replaces a lost one and still has the lost executable's K/V cache.
    """

    program: Program
    state: StateSpec
    depth: int = 1  # steps that are worth having under way: the stages of a pipeline
    state_kept: bool = False  # it has the K/V cache of the lost executable in whose place it was loaded

    @abstractmethod
    def launch(self, request: StepRequest) -> PendingStep:
        """Start a step and return it as a PendingStep. Errors of the step are raised by PendingStep.result()."""

    @property
    def block_parts(self) -> tuple[int, ...]:
        """Size in bytes of one K/V block in each K/V cache, as a tuple.

        The tuple is empty if this executable cannot read or write blocks. The caches are in the order of the Program.
        In a mesh, the caches of rank 0 come first, then those of rank 1, and so on. Within a block, the bytes of the
        first head come first, then those of the second head, and so on.
        """
        return ()

    @property
    def block_bytes(self) -> int:
        """Size in bytes of one K/V block, summed over all layers; 0 if this executable cannot read or write blocks."""
        return sum(self.block_parts)

    def read_blocks(self, blocks: Sequence[int]) -> np.ndarray:
        """Return the contents of K/V blocks, uint8 [blocks, block_bytes], as they are after all steps launched so far.

        `blocks` has the numbers of the blocks. The bytes can be given to write_blocks() of another executable if it has
        an equal Program, device, instruction set and build of Intaglio. Raises DeviceError for a block number that the
        K/V cache does not have, and if block_bytes is 0 (this executable cannot read blocks).
        """
        raise DeviceError(f"{type(self).__name__} cannot read K/V blocks")

    def write_blocks(self, blocks: Sequence[int], contents: np.ndarray) -> None:
        """Replace the contents of K/V blocks. Steps launched later read the new contents.

        `blocks` has the numbers of the blocks. `contents` is uint8 [blocks, block_bytes], as returned by read_blocks().
        Raises DeviceError for a block number that the K/V cache does not have, for contents of another type or shape,
        and if block_bytes is 0 (this executable cannot write blocks).
        """
        raise DeviceError(f"{type(self).__name__} cannot write K/V blocks")

    def has_experts(self) -> bool:
        """True if the model has routed experts (mixture of experts) in a layer of any rank."""
        return any(op.kind == "experts" for op in self.program.ops)

    def expert_loads(self) -> dict[str, ExpertLoad]:
        """Return the number of tokens that each expert has computed so far: {name of an experts op: ExpertLoad}.

        The numbers count all steps since the Program was loaded. There is one item for each layer with experts. The
        dict is empty if this executable does not count tokens. Raises DeviceLost if the device is lost.
        """
        return {}

    def load_experts(self, layers: Mapping[str, Ranks]) -> None:
        """Start loading the experts that a new placement assigns to each rank.

        Returns None at once, while steps continue. `layers` is {name of a layer's experts op: for each rank, the
        numbers of its experts}. Raises DeviceError if the numbers do not fit the layer or the experts cannot be moved,
        and DeviceLost if the device is lost.
        """
        raise DeviceError(f"{type(self).__name__} cannot move experts")

    def experts_loaded(self) -> bool:
        """False while load_experts() is still loading experts in the background; otherwise True.

        Raises DeviceError if loading failed; each rank then keeps its present experts. Raises DeviceLost if the device
        is lost.
        """
        return True

    def switch_experts(self) -> None:
        """Make all steps launched from now on use the experts that load_experts() has loaded. Returns None.

        Waits until loading has ended. Nothing changes if load_experts() was not called since the last switch. Raises
        DeviceError if the executable cannot move experts or loading failed, and DeviceLost if the device is lost.
        """
        raise DeviceError(f"{type(self).__name__} cannot move experts")

    def step(self, request: StepRequest) -> StepResult:
        """Run a step to its end and return its StepResult. If the step fails, its error is raised."""
        return self.launch(request).result()

    def unwrapped(self) -> Executable:
        """Return the executable inside all wrappers; this executable itself if it wraps none."""
        return self

    def between_steps(self, call: Callable[[Executable], T]) -> T:
        """Return the result of `call(executable)`.

        Use this for work that must not overlap a step, such as moving experts. The argument of `call` is the innermost
        executable, without those that wrap it. `call` must not run a step. If several models take turns on one machine,
        this waits for the model's turn. Raises the errors of `call`.
        """
        return call(self)

    def close(self) -> None:  # noqa: B027 (most hold nothing)
        """Release resources outside this process, such as child processes. Most executables have none."""


class BlockingExecutable(Executable):
    """Base class of executables that compute in the calling thread: a step has ended when launch() returns."""

    @abstractmethod
    def run(self, request: StepRequest) -> StepResult:
        """Compute a step in the calling thread and return its StepResult."""

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
    """Base class of executables for one rank of a mesh. The executables of several ranks can run in one process.

    A step is a generator. At each collective it yields this rank's input and is sent this rank's output; the caller
    computes the outputs from the inputs of all ranks. At its end the generator returns the StepResult.
    """

    @abstractmethod
    def run_until_collective(self, request: StepRequest) -> CollectiveSteps:
        """Run a step as a generator, which yields at each collective. The generator's return value is the StepResult.

        It yields a tuple (collective op, this rank's input). It must be sent this rank's output, which the caller
        computes from the inputs of all ranks. Raises DeviceError for a batch that does not fit the Program.
        """

    def run(self, request: StepRequest) -> StepResult:
        return run_single_rank(self.program, self.run_until_collective(request))


def run_single_rank(program: Program, steps: CollectiveSteps) -> StepResult:
    """Run a step of a Program without collectives to its end and return the StepResult.

    `steps` is the generator that run_until_collective() returned for this step. Raises DeviceError if the step reaches
    a collective.
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
    """Properties of a device, for reports and for choosing sizes. None stands for a property that the device lacks.

    Attributes:
        isa: name of the CPU instruction set.
        threads: number of CPU threads.
        memory: size of the device's memory in bytes.
        build: hash of the compiled code that computes results.
    """

    isa: str | None = None
    threads: int | None = None
    memory: int | None = None
    build: str | None = None


class Device(ABC):
    """Base class of devices. load() takes a Program and its weights and returns an Executable, which runs steps.

    A device may pack weights, fuse ops and use threads, as long as all results stay bitwise identical. `name` is the
    device's name for open_device(). `clock` is the clock that times its steps, measured or modelled.
    """

    name: str
    clock: Clock = WallClock()

    def load(self, program: Program | MeshProgram, weights: Weights, state: StateSpec) -> Executable:
        """Load a Program, or the Programs of all ranks of a mesh, with its weights. Returns an Executable.

        Raises ProgramError for an invalid Program, and DeviceError if the device cannot run it.
        """
        if isinstance(program, Program):
            return self.load_program(program, weights, state)
        if len(program.programs) > 1:
            raise DeviceError(f"device {self.name!r} runs one rank; load {program.layout or 'a mesh'} by a MeshDevice")
        return self.load_program(program.last, weights, state)

    def reload(
        self, lost: Executable, program: Program | MeshProgram, weights: Weights, state: StateSpec
    ) -> Executable:
        """Load a replacement for the executable `lost`, whose device has failed. Returns the new Executable.

        `program` and `weights` must be those of `lost`. The new executable's `state_kept` is True if it has the K/V
        cache of `lost`. Raises ReplacementRefused if the results would not be bitwise identical, ProgramError for an
        invalid Program, and DeviceError if the device cannot run it.
        """
        return self.load(program, weights, state)

    @abstractmethod
    def load_program(self, program: Program, weights: Weights, state: StateSpec) -> Executable:
        """Load one Program (a whole model, or one rank of a mesh) with its weights. Returns an Executable."""

    def recipe(self) -> Recipe:
        """Return the Recipe that makes an equal device in another process: (name of a function, its arguments).

        Subclasses whose constructor has arguments override this method.
        """
        return f"{type(self).__module__}:{type(self).__qualname__}", {}

    def facts(self) -> DeviceFacts:
        """The DeviceFacts of this device, for reports and for choosing sizes."""
        return DeviceFacts()


def check_blocks(state: StateSpec, block_bytes: int, blocks: Sequence[int], contents: np.ndarray | None = None) -> None:
    """Raise DeviceError if a block number is not in 0 .. state.pages - 1 or the block contents do not fit.

    Returns None. `contents` must be uint8 [number of blocks, block_bytes]. None: only the block numbers are checked.
    """
    if blocks and not 0 <= min(blocks) <= max(blocks) < state.pages:
        bad = next(b for b in blocks if not 0 <= b < state.pages)
        raise DeviceError(f"block {bad} is outside 0..{state.pages - 1}")
    if contents is not None and (contents.dtype != np.uint8 or contents.shape != (len(blocks), block_bytes)):
        raise DeviceError(
            f"contents of {len(blocks)} blocks are {contents.dtype} {list(contents.shape)}; they must be uint8 "
            f"[{len(blocks)}, {block_bytes}]"
        )


def limits(program: Program, state: StateSpec) -> dict[str, int]:
    """Return the upper limits of the numbers in a batch: {kind of number: limit}. A number must be less than its limit.

    The keys are "token id", "position", "slot", "block", "state slot", "window slot" and "window block", in this order.
    The limit of token ids is the largest int32 if the Program has no vocabulary. The limit of state slots is 0 for a
    model without recurrent state. The limits of window slots and window blocks are 0 if layers with a window have no
    separate pages.
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
    """Raise DeviceError if a batch does not fit the Program or the K/V cache. Returns None.

    The message names the value that is out of range.
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
