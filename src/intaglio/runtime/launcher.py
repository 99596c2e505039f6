"""The launch stage: starts device steps for scheduled sequences; finds the sequence that makes a step fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from intaglio.batch import GREEDY, Chunk, bind
from intaglio.devices import CompletedStep, DeviceLost, Executable, PendingStep, StepRequest, StepResult
from intaglio.runtime import sampling
from intaglio.runtime.live_requests import LiveRequests
from intaglio.runtime.request import Fault
from intaglio.runtime.scheduler import ScheduledSequence
from intaglio.runtime.sequence import Sequence
from intaglio.runtime.stats import Counts

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Launch:
    """A step that was started on the device and has not been completed.

    Attributes:
        scheduled: the sequences in the step.
        chunks: for each of the sequences, its token rows in the step (Chunk).
        pending: the step's future result.
        retried: True if the step is the second attempt for a single sequence whose step failed.
    """

    scheduled: list[ScheduledSequence]
    chunks: list[Chunk]
    pending: PendingStep
    retried: bool = False


@dataclass(frozen=True)
class Completed:
    """A step that the device has completed.

    Attributes:
        scheduled: the sequences in the step.
        chunks: for each of the sequences, its token rows in the step (Chunk).
        result: the step's result.
    """

    scheduled: list[ScheduledSequence]
    chunks: list[Chunk]
    result: StepResult


class Launcher:
    """Runs the steps of scheduled sequences on the device, and retries failed steps.

    Attributes:
        before_launch: function that is called before each launch, or None.
        under_way: launches that have not been completed, oldest first.
        in_flight: the sequences of all launches that were under way when the device was lost.
        lost_in_step: True if the last loss of the device was noticed in a step; False if it was noticed in another
            call, such as a copy of K/V blocks.
    """

    def __init__(self, executable: Executable, live: LiveRequests, counts: Counts) -> None:
        self.executable, self.live, self.counts = executable, live, counts
        self.before_launch: Callable[[], None] | None = None
        self.under_way: list[Launch] = []
        self.in_flight: list[Sequence] = []
        self.lost_in_step = True

    def forget(self) -> None:
        """Drop all launches under way, because their device is lost."""
        for launch in self.under_way.copy():
            self._remove(launch)

    def run(self, scheduled: list[ScheduledSequence], retried: bool = False) -> Iterator[Completed]:
        """Launch a step, wait for it, and yield it as a Completed.

        If the step fails, it is split and retried, so that several Completed may be yielded. Nothing is yielded if
        every sequence's grammar fails or if every retry fails. Raises DeviceLost if the device is lost.

        scheduled: the sequences of the step. retried: True for the second attempt to run a single sequence whose step
        failed.
        """
        if launch := self.launch(scheduled, retried):
            yield from self.complete(launch)

    def launch(self, scheduled: list[ScheduledSequence], retried: bool = False) -> Launch | None:
        """Start one step with the sequences `scheduled`. Returns its Launch; None if no sequence is left.

        A sequence whose grammar fails is ended with a fault and left out of the step.

        retried: True for the second attempt for a single sequence whose step failed. The Launch records it.
        """
        ready = [(one, chunk) for one in scheduled if (chunk := self.chunk(one))]
        if not ready:
            return None
        chunks = [chunk for _, chunk in ready]
        logits = any(one.sequence.wants_logits for one, _ in ready)
        launch = Launch([one for one, _ in ready], chunks, self.start(chunks, logits), retried)
        self.under_way.append(launch)
        for one in launch.scheduled:
            one.sequence.in_flight = True
        return launch

    def complete(self, launch: Launch) -> Iterator[Completed]:
        """Wait for a launch, and yield it as a Completed.

        If its step failed, retry the sequences and yield each success. A failed step has changed no state. Its
        sequences are launched again in two halves; a half that fails is halved again, and so on down to single
        sequences. A single sequence that fails is launched once more without drafts, since a draft may be the cause. If
        it fails again, it ends with a fault. Raises DeviceLost if the device is lost.
        """
        try:
            with self._noting_loss(in_step=True):
                result = launch.pending.result()
        except DeviceLost:
            raise
        except Exception as e:  # whatever the device raised
            self.counts.faults["step"] += 1
            self._remove(launch)
            yield from self._retry(launch, e)
        else:
            self._remove(launch)
            yield Completed(launch.scheduled, launch.chunks, result)

    def _remove(self, launch: Launch) -> None:
        """Remove a launch from `under_way`, and mark its sequences as not in flight. Returns nothing."""
        self.under_way.remove(launch)
        for one in launch.scheduled:
            one.sequence.in_flight = False

    def _retry(self, launch: Launch, error: Exception) -> Iterator[Completed]:
        """Launch the sequences of a failed step again. Yields a Completed for each launch that succeeds.

        Several sequences are launched in two halves. A single sequence is launched once more without drafts; if that
        was already done, it ends with a fault. If some sequences of the step have been aborted, the others are launched
        together.

        launch: the launch that failed. error: what the device raised.
        """
        scheduled = [one for one in launch.scheduled if one.sequence.state != "ended"]  # others were aborted meanwhile
        half = len(scheduled) // 2
        if not scheduled:
            return
        if len(scheduled) < len(launch.scheduled):
            yield from self.run(scheduled)
        elif half:
            yield from self.run(scheduled[:half])
            yield from self.run(scheduled[half:])
        elif not launch.retried:
            yield from self.run([replace(scheduled[0], drafts=())], retried=True)
        else:
            fault = Fault("step", f"the step failed: {type(error).__name__}: {error}")
            self.live.emit(self.live.end(scheduled[0].sequence, "error", fault))

    @property
    def block_bytes(self) -> int:
        """Returns the number of bytes of a K/V block on the device; 0 if the device cannot read or write blocks."""
        return self.executable.block_bytes

    def read_blocks(self, blocks: list[int]) -> np.ndarray:
        """Returns the contents of K/V blocks, read from the device: uint8 [number of blocks, block_bytes].

        blocks: numbers of the blocks. Raises DeviceError if the device fails, DeviceLost if it is lost.
        """
        with self._noting_loss():
            return self.executable.read_blocks(blocks)

    def write_blocks(self, blocks: list[int], contents: np.ndarray) -> None:
        """Write `contents` to K/V blocks on the device. Returns nothing.

        blocks: numbers of the blocks. contents: uint8 [number of blocks, block_bytes]. Raises DeviceError if the device
        fails, DeviceLost if it is lost.
        """
        with self._noting_loss():
            self.executable.write_blocks(blocks, contents)

    def between_steps(self, call: Callable[[Executable], T]) -> T:
        """Call `call(executable)` while no step runs on the device. Returns what `call` returns.

        This is for work on the device that is not a step, such as reading how many tokens each expert got. The argument
        is the innermost executable, inside all wrappers. Raises what `call` raises. If that is DeviceLost, the
        sequences in flight are recorded in `in_flight`.
        """
        with self._noting_loss():
            return self.executable.between_steps(call)

    @contextmanager
    def _noting_loss(self, in_step: bool = False) -> Iterator[None]:
        """Context manager for a call of the device: if the call raises DeviceLost, set `in_flight` and `lost_in_step`.

        `in_flight` becomes the sequences of all launches under way, and `lost_in_step` becomes `in_step`. The error is
        passed on.

        in_step: True if the call waits for a step; False if it does anything else, such as copying K/V blocks.
        """
        try:
            yield
        except DeviceLost:
            self.in_flight = [one.sequence for other in self.under_way for one in other.scheduled]
            self.lost_in_step = in_step
            raise

    def start(self, chunks: list[Chunk], logits: bool = False) -> PendingStep:
        """Combine chunks into one batch and launch a step with it.

        Returns the PendingStep, whose result() waits for the result. If launching raises an error, result() raises it.
        chunks: token rows of each sequence. logits: True if the step must return the logits of its rows.
        """
        try:
            batch = bind(chunks, self.executable.state.page_tokens)
            if self.before_launch:
                self.before_launch()
            return self.executable.launch(StepRequest(batch, logits=logits))
        except Exception as e:
            return CompletedStep(e)

    def step(self, chunks: list[Chunk]) -> StepResult:
        """Run one step with the chunks `chunks` and wait for it. Returns its StepResult.

        Raises what the device raises.
        """
        return self.start(chunks).result()

    def chunk(self, scheduled: ScheduledSequence) -> Chunk | None:
        """Returns the Chunk of a scheduled sequence: its token rows in the step, with their sampling parameters.

        Returns None if the sequence's grammar fails; the sequence is then ended with a fault.
        """
        s, start = scheduled.sequence, scheduled.sequence.computed
        stop = start + scheduled.num_tokens
        try:
            tokens = [*s.tokens(start, stop), *scheduled.drafts]
            scores = range(max(start, s.prompt_rows_read), min(stop, s.prompt_rows_wanted))
            samplings = sampling.sampling_rows(s, scheduled.drafts) if scheduled.samples else []
        except Exception as e:  # a matcher is the caller's code
            self.live.emit(self.live.end(s, "error", Fault("request", f"the grammar failed: {e}")))
            return None
        rows = [*(at - start for at in scores), *range(len(tokens) - len(samplings), len(tokens))]
        return Chunk(
            tokens, start, s.blocks, rows, [GREEDY] * len(scores) + samplings, (s.state_slot, s.next_state_slot),
            s.window_blocks,
        )  # fmt: skip


def launch_groups(scheduled: list[ScheduledSequence]) -> list[list[ScheduledSequence]]:
    """Divide the sequences of a step into launches. Returns a list of lists of sequences; [] if there are no sequences.

    Each suspect has a launch of its own; all other sequences are in one launch. A suspect is a sequence that was in
    flight when the device was lost, and that may be the cause.
    """
    batched = [s for s in scheduled if not s.sequence.suspect]
    suspects = [[s] for s in scheduled if s.sequence.suspect]
    return [batched, *suspects] if batched else suspects
