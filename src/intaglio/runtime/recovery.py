"""The recovery stage of a step: replaces a lost device, and ends a sequence that loses it again and again."""

from __future__ import annotations

from collections.abc import Callable

from intaglio.batch import Chunk
from intaglio.devices import DeviceLost, Executable, ReplacementRefused
from intaglio.runtime.launcher import Launcher
from intaglio.runtime.live_requests import LiveRequests
from intaglio.runtime.request import Fault
from intaglio.runtime.scheduler import Scheduler
from intaglio.runtime.stats import Counts

MAX_DEVICE_LOSSES_PER_SEQUENCE = 2  # steps with only this sequence, no token between


class Recovery:
    """Replaces a lost device, and ends a sequence whose steps make the device fail again and again.

    A sequence ends in error if the device is lost MAX_DEVICE_LOSSES_PER_SEQUENCE times in steps that contain only this
    sequence, and the sequence samples no token in between.

    `restart` is the function that loads the same Program again on another device. After a loss, it is tried up to
    `max_restarts` times. If all attempts fail, every sequence ends in error, and `failed` has the reason.
    """

    def __init__(
        self, launcher: Launcher, live: LiveRequests, scheduler: Scheduler, counts: Counts,
        restart: Callable[[], Executable] | None, max_restarts: int,
    ) -> None:  # fmt: skip
        self.launcher, self.live, self.scheduler, self.counts = launcher, live, scheduler, counts
        self.restart, self.max_restarts = restart, max_restarts
        self.failed: str | None = None
        self.attempts = ""  # what became of the last attempts

    def recover(self, lost: DeviceLost) -> None:
        """Replace the lost device. If that is impossible, end all sequences in error. Returns nothing.

        If the new device has the K/V of the lost device, running sequences go on. (A step writes K/V only at new
        positions, so earlier K/V is intact.) Otherwise all running sequences are preempted and recomputed from their
        token ids.

        The sequences that were in flight at the loss become suspects: each runs in a step of its own, without drafts,
        until it has sampled a token. A sequence ends in error if it loses the device MAX_DEVICE_LOSSES_PER_SEQUENCE
        times in this way.

        lost: the error that the device raised.
        """
        self.counts.faults["worker"] += 1
        why = f"the device was lost: {lost}"
        self.blame(why)
        self.launcher.forget()
        if not self.replace_device():
            why = self.failed = f"{why}; {self.attempts}"
            self.scheduler.preempt_all()
            for s in self.live.sequences():
                self.live.emit(self.live.end(s, "error", Fault("worker", why)))

    def blame(self, why: str) -> None:
        """Mark as suspects all sequences that were in flight when the device was lost. Returns nothing.

        A suspect runs in steps of its own until it has sampled a token. If the step contained only one sequence, the
        loss is counted for this sequence. After MAX_DEVICE_LOSSES_PER_SEQUENCE such losses without a sampled token, the
        sequence ends in error.

        why: reason for the loss, which becomes part of the error's text.
        """
        in_flight = self.launcher.in_flight
        alone = len(in_flight) == 1 and self.launcher.lost_in_step
        for s in in_flight:
            s.suspect = True
            s.device_losses += alone
            if alone and s.device_losses == MAX_DEVICE_LOSSES_PER_SEQUENCE and s.state != "ended":
                self.live.emit(self.live.end(s, "error", Fault("worker", f"{why}, in a step with this request only")))

    def probe(self) -> Chunk:
        """Returns the Chunk for the step that tests a replaced device before sequences run on it. It has one token.

        The step writes only to a K/V block and a state slot whose contents nobody needs. If no block is available, the
        last running sequence is preempted.
        """
        slot = self.scheduler.spare_slot()
        windows = self.scheduler.windows
        spare = (windows.spare,) if windows.on else ()
        return Chunk([0], 0, [self.scheduler.spare_block()], [0], state=(-1, slot), window_blocks=spare)

    def replace_device(self) -> bool:
        """Start another device and test it with a step of one token.

        Returns True on success, False if no attempt succeeds. There are at most `max_restarts` attempts, and none after
        the error ReplacementRefused. Errors are not passed on.
        """
        self.attempts = "nothing replaces it"
        for attempt in range(self.max_restarts if self.restart else 0):
            try:
                assert self.restart
                self.launcher.executable = executable = self.restart()
                if not executable.state_kept:
                    self.scheduler.preempt_all()
                self.launcher.step([self.probe()])
            except Exception as e:  # whatever starting a device, or its first step, can raise
                self.attempts = f"attempt {attempt + 1} of {self.max_restarts} to replace it failed too: {e}"
                if isinstance(e, ReplacementRefused):
                    return False
                continue
            self.counts.restarts += 1
            return True
        return False
