"""Membership of a group of ranks on several hosts: what its coordinator and agents decide, without any I/O.

Members (Roster, Epoch, Session), lost or repeated frames (FrameOrder), silent links and hangs (Silence, BeatWatch).
There are no threads, sockets or clocks here: the callers pass in what happened and what time it is. hosts.py, agent.py,
link.py and group.py act on the decisions; tests/simulation drives the same classes with simulated networks and clocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

BEAT, HELLO, START, LOADED, STEP, RESULT, LOST, STOP = range(8)  # kinds of frames
PATIENCE = 10  # times the allowed silence has a process that is not stopped: other processes may have the cores


class OutOfOrder(ValueError):
    """Error for a received frame that does not have the next number: frames were lost, or one came twice."""


class FrameOrder:
    """Numbers the frames of one link, in order to notice lost, repeated and forged frames.

    Sent frames are numbered from 0, and so are received frames.
    """

    def __init__(self) -> None:
        self.sent = self.received = 0

    def next_number(self) -> int:
        """Return the number of the next frame to send, and count the frame as sent."""
        self.sent += 1
        return self.sent - 1

    def check(self, number: int) -> None:
        """Count a received frame. Returns None. Raises OutOfOrder if its number is not the next one."""
        if number != self.received:
            raise OutOfOrder(f"frame {number} came, {self.received} was due")
        self.received += 1


class Silence:
    """Timeout for the other end of a link. It restarts whenever something is received.

    Args:
        allowed: seconds of silence after which the other end counts as gone.
        now: the time in seconds at which the timer starts.
    """

    def __init__(self, allowed: float, now: float) -> None:
        self.allowed, self.last = allowed, now

    def heard(self, now: float) -> None:
        """Restart the timer, because bytes were received at the time `now`, in seconds. Returns None."""
        self.last = now

    def left(self, now: float) -> float:
        """Return the seconds of silence that are left until the other end counts as gone.

        0 or less: it counts as gone already. `now` is the current time in seconds.
        """
        return self.last + self.allowed - now


class BeatWatch:
    """Finds ranks that hang.

    Each rank counts up a heartbeat in shared memory; a rank whose count stands still is silent. Silence is measured in
    calls of look(), one every `tick` seconds, and not by a clock. If the whole machine pauses, look() is not called
    either, so that a pause adds at most one tick. A rank that has not yet made its first heartbeat is starting and does
    not count as silent.

    Args:
        ranks: numbers of the ranks.
        silence: seconds of silence after which a rank whose process is suspended (by SIGSTOP or a debugger) counts as
            hung. The limit for any other rank is PATIENCE times as long.
        tick: seconds between two calls of look().
    """

    def __init__(self, ranks: Sequence[int], silence: float, tick: float) -> None:
        self.silence, self.tick = silence, tick
        self.seen, self.ticks = dict.fromkeys(ranks, 0), dict.fromkeys(ranks, 0)

    def look(self, beats: Mapping[int, int], stopped: Callable[[int], bool]) -> dict[int, float]:
        """Record the ranks' heartbeats. Returns the ranks that hang: {rank: seconds of silence}, or {} if none hangs.

        Args:
            beats: {rank: number of its heartbeats so far}.
            stopped: function that takes a rank and returns True if its process is suspended by a signal or a debugger.
        """
        found = dict[int, float]()
        for rank, count in beats.items():
            self.ticks[rank] = self.ticks[rank] + 1 if count == self.seen[rank] and count else 0
            self.seen[rank] = count
            quiet = self.ticks[rank] * self.tick
            if quiet >= self.silence and (quiet >= PATIENCE * self.silence or stopped(rank)):
                found[rank] = quiet
        return found


class HasLife(Protocol):
    """Interface of the members of a Roster. A member says whether its connection is alive."""

    @property
    def alive(self) -> bool:
        """True as long as the connection to this member is not lost."""


Member = TypeVar("Member", bound=HasLife)
Answer = TypeVar("Answer")


class Roster(Generic[Member]):
    """The agents that are connected to a coordinator, in the order in which they connected."""

    def __init__(self) -> None:
        self.members: list[Member] = []

    def add(self, member: Member) -> None:
        """Append a newly connected agent to `members`. Returns None."""
        self.members.append(member)

    def alive(self) -> list[Member]:
        """Return a list of the agents that are still connected, and remove all others from `members`."""
        self.members = [m for m in self.members if m.alive]
        return self.members

    def choose(self, count: int) -> list[Member]:
        """Return a list of the `count` agents for the next group of ranks; [] if fewer agents are connected.

        They are the agents that connected first.
        """
        there = self.alive()
        return there[:count] if len(there) >= count else []


class Epoch(Generic[Member, Answer]):
    """The coordinator's record of one group of ranks: the answers of the hosts' agents, and why the group ended.

    Each group has a number, its epoch. A group that replaces another has a higher number. A step is complete when all
    agents have answered it. The first failure ends the group for good. Answers that arrive later, and answers that
    belong to another group, are dropped.

    Args:
        number: the group's number.
        members: the hosts' agents, in the order of their ranks.
    """

    def __init__(self, number: int, members: Sequence[Member]) -> None:
        self.number, self.members = number, list(members)
        self.failed = ""
        self.answers: dict[int, dict[Member, Answer]] = {}  # by step; step 0 is the load

    def concerns(self, epoch: int | None) -> bool:
        """True if a frame with the number `epoch` concerns this group.

        An `epoch` of None means that the frame is about the connection itself, which concerns every group.
        """
        return epoch is None or epoch == self.number

    def answer(self, member: Member, step: int, answer: Answer) -> None:
        """Store an agent's answer to a step. Returns None.

        The answer is dropped if the group has ended or the agent does not belong to it. Step 0 is the loading of the
        Program.
        """
        if not self.failed and member in self.members:
            self.answers.setdefault(step, {})[member] = answer

    def fail(self, why: str) -> bool:
        """End this group of ranks because of a failure. Returns True; False if the group had ended already.

        Answers that come later are dropped. `why` is the reason, as text. The reason of the first failure is stored in
        the attribute `failed`.
        """
        first = not self.failed
        self.failed = self.failed or why
        return first

    def complete(self, step: int) -> bool:
        """True if all agents of this group have answered the step with number `step`."""
        return len(self.answers.get(step, ())) == len(self.members)

    def take(self, step: int) -> list[Answer]:
        """Remove the answers to a complete step, and return them as a list in the order of the hosts' ranks."""
        found = self.answers.pop(step)
        return [found[member] for member in self.members]


class HostRanks(Protocol):
    """Interface to the running ranks of one host, through which the host's agent starts steps and ends the ranks."""

    def post(self, message: bytes) -> None:
        """Give a step to the ranks, without waiting for its end. Returns None.

        `message` is the step's number (8 bytes), then the request.
        """

    def stop(self) -> None:
        """End the ranks, and wait until they have ended. Returns nothing."""


class Session:
    """Runs ranks on an agent's host for one coordinator. take() carries out the coordinator's messages.

    Only one group of ranks runs at a time. The ranks of a new group start after the ranks of the previous group have
    ended.

    `start` is a function that takes a START message, starts the ranks that it describes and returns them as HostRanks.
    """

    def __init__(self, start: Callable[[bytes], HostRanks]) -> None:
        self.start = start
        self.ranks: HostRanks | None = None

    def take(self, kind: int, message: bytes) -> None:
        """Carry out a frame from the coordinator: start ranks, give them a step, or end them. Returns None.

        `kind` is the frame's kind: START, STEP or STOP. Frames of other kinds are ignored. `message` is the frame's
        content.
        """
        if kind == STEP and self.ranks:
            self.ranks.post(message)
        elif kind in (START, STOP):
            self.end()
            if kind == START:
                self.ranks = self.start(message)

    def end(self) -> None:
        """End the ranks if there are any. Returns None.

        Call this when the coordinator asks for it or the link to the coordinator is lost.
        """
        if self.ranks:
            ranks, self.ranks = self.ranks, None
            ranks.stop()
