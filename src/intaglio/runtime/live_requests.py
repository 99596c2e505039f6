"""LiveRequests: the requests an engine is serving. Ends their sequences, counts them, collects the step's events."""

from __future__ import annotations

import math

from intaglio.runtime.clock import MonotonicClock
from intaglio.runtime.latency import LatencyEstimator
from intaglio.runtime.request import Event, Fault, FinishReason, Scored
from intaglio.runtime.scheduler import Scheduler
from intaglio.runtime.sequence import Sequence
from intaglio.runtime.stats import Counts


class LiveRequests:
    """The requests that an engine is serving.

    A request is one of them as long as at least one of its sequences has not ended. Every sequence ends through end(),
    which frees its blocks and returns its last Event. emit() collects the events of a step, and take_events() returns
    them at the end of the step.

    by_id: dict from request id to the sequences of all the request's choices.
    """

    def __init__(self, scheduler: Scheduler, clock: MonotonicClock, latency: LatencyEstimator, counts: Counts) -> None:
        self.scheduler, self.clock, self.latency, self.counts = scheduler, clock, latency, counts
        self.by_id: dict[str, list[Sequence]] = {}
        self.next_deadline = math.inf  # no live sequence has an earlier one; it may be too early, never too late
        self.events: list[Event] = []

    def add(self, sequences: list[Sequence]) -> None:
        """Add the sequences of one request and queue them in the scheduler. Returns nothing."""
        self.by_id[sequences[0].request.id] = sequences
        self.counts.admitted += len(sequences)
        for s in sequences:
            self.scheduler.add(s)
            self.next_deadline = min(self.next_deadline, s.deadline())

    def sequences(self) -> list[Sequence]:
        """Returns a list of all sequences that have not ended.

        Sequences of one request are together, requests are in order of arrival.
        """
        return [s for choices in self.by_id.values() for s in choices if s.state != "ended"]

    def of(self, id: str) -> list[Sequence]:
        """Returns a list of the sequences of request `id` that have not ended; [] if there is no such request."""
        return [s for s in self.by_id.get(id, []) if s.state != "ended"]

    def expire(self, now: float) -> None:
        """End every sequence whose deadline has passed, and emit its last event. Returns nothing.

        now: the time in seconds.
        """
        if now >= self.next_deadline:
            for s in [s for s in self.sequences() if s.deadline() <= now]:
                self.emit(self.end(s, "deadline"))
            self.next_deadline = min((s.deadline() for s in self.sequences()), default=math.inf)

    def end(self, s: Sequence, reason: FinishReason, fault: Fault | None = None, scored: Scored | None = None) -> Event:
        """End a sequence and free its blocks. Returns its last Event.

        reason: the finish_reason. fault: the error that ended the sequence; None if none did. scored: the token to put
        into the event; None if the event has no token.
        """
        now = self.clock.now
        if reason in ("stop", "length"):
            self.scheduler.update_blocks(s)
        self.scheduler.remove(s)
        s.state, s.finish_reason, s.fault, s.ended = "ended", reason, fault, now
        if all(c.state == "ended" for c in self.by_id[s.request.id]):
            del self.by_id[s.request.id]
        self.counts.finished[reason] += 1
        if reason in ("stop", "length", "deadline"):
            self._observe(s, now - s.arrived, cut=reason == "deadline")
        if fault and fault.kind == "request":
            self.counts.faults["request"] += 1
        return Event(s.request.id, s.index, scored, reason, fault, s.usage(now))

    def release(self, id: str) -> list[Sequence]:
        """Take the request `id` out without an event, and free its blocks.

        Returns a list of its sequences that had not ended. Returns [] if no request with this id is live.
        """
        left = self.of(id)
        for s in left:
            self.scheduler.update_blocks(s)
            self.scheduler.remove(s)
            s.state = "ended"
        self.by_id.pop(id, None)
        self.counts.suspended += len(left)
        return left

    def emit(self, event: Event) -> None:
        """Add an event to the list that take_events() returns. Returns nothing."""
        self.events.append(event)

    def take_events(self) -> list[Event]:
        """Returns a list of the Events that were emitted since the last call, in order."""
        events, self.events = self.events, []
        return events

    def _observe(self, s: Sequence, seconds: float, cut: bool) -> None:
        """Update the latency estimator with a sequence that has ended after `seconds` seconds. Returns nothing.

        cut: True if the sequence's deadline ended it. Its time is then extrapolated to the expected output length.
        """
        expected = max(1.0, self.latency.output_tokens(s.request.params.max_tokens))
        whole = seconds * max(1.0, expected / max(1, len(s.output))) if cut else seconds
        self.latency.observe_request(s.estimate, whole)
        if s.output and (not cut or len(s.output) > self.latency.output_length):
            self.latency.observe_output(len(s.output))
