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
    """Raised for a frame whose number is not the next one: frames were left out, or one came twice."""


class FrameOrder:
    """Numbers the frames of one link, so that a frame left out, repeated or sent again by a stranger is noticed.

    Sent and received frames are each counted from 0.
    """

    def __init__(self) -> None:
        self.sent = self.received = 0

    def next_number(self) -> int:
        """Take the number of the next frame to send, and return it."""
        self.sent += 1
        return self.sent - 1

    def check(self, number: int) -> None:
        """Count a frame that has come. Returns nothing. Raises OutOfOrder if its number is not the next one."""
        if number != self.received:
            raise OutOfOrder(f"frame {number} came, {self.received} was due")
        self.received += 1


class Silence:
    """Timer of the silence of a link's other end: each time that something is heard, the silence starts anew.

    Args:
        allowed: seconds of silence after which the other end counts as gone.
        now: the time in seconds at which the first silence starts.
    """

    def __init__(self, allowed: float, now: float) -> None:
        self.allowed, self.last = allowed, now

    def heard(self, now: float) -> None:
        """Note that bytes came at the time `now`, in seconds. Returns nothing."""
        self.last = now

    def left(self, now: float) -> float:
        """Seconds until the other end counts as gone; 0 or less if it does already. now: the current time, in s."""
        return self.last + self.allowed - now


class BeatWatch:
    """Finds ranks that hang, from their heartbeats, which ranks count up in shared memory.

    Silence is counted in looks, not by a clock: a pause of the whole machine, in which nobody looks, adds at most one.
    Looks count from the first beat on, so a rank that is still starting is not silent.

    Args:
        ranks: numbers of the ranks.
        silence: seconds of silence after which a rank whose process is suspended (by SIGSTOP or a debugger) counts as
            hung. Any other rank has PATIENCE times as long.
        tick: seconds between two looks.
    """

    def __init__(self, ranks: Sequence[int], silence: float, tick: float) -> None:
        self.silence, self.tick = silence, tick
        self.seen, self.ticks = dict.fromkeys(ranks, 0), dict.fromkeys(ranks, 0)

    def look(self, beats: Mapping[int, int], stopped: Callable[[int], bool]) -> dict[int, float]:
        """Note the ranks' heartbeats. Returns the ranks that hang, as {rank: seconds of silence}; {} if none hangs.

        Args:
            beats: heartbeats so far, by rank.
            stopped: function from a rank to True if its process is suspended by a signal or a debugger.
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
    """Interface of a member of a Roster: tells whether its connection is alive."""

    @property
    def alive(self) -> bool:
        """True until the connection to the member is lost."""


Member = TypeVar("Member", bound=HasLife)
Answer = TypeVar("Answer")


class Roster(Generic[Member]):
    """The agents that are connected to a coordinator, in the order in which they came."""

    def __init__(self) -> None:
        self.members: list[Member] = []

    def add(self, member: Member) -> None:
        """Add an agent that has connected. Returns nothing."""
        self.members.append(member)

    def alive(self) -> list[Member]:
        """A list of the agents that are still connected. This call removes all others from `members`."""
        self.members = [m for m in self.members if m.alive]
        return self.members

    def choose(self, count: int) -> list[Member]:
        """A list of the `count` agents that form the next group, the first that came; [] if there are fewer."""
        there = self.alive()
        return there[:count] if len(there) >= count else []


class Epoch(Generic[Member, Answer]):
    """The coordinator's record of one group of ranks: the answers of its agents, and why the group ended.

    Each group has a number, its epoch. A group that replaces another has a higher number. A step is complete when all
    agents have answered it. The first failure ends the group for good: later answers, and answers of another group, are
    dropped.

    Args:
        number: the group's number.
        members: agents of the hosts in the order of their ranks.
    """

    def __init__(self, number: int, members: Sequence[Member]) -> None:
        self.number, self.members = number, list(members)
        self.failed = ""
        self.answers: dict[int, dict[Member, Answer]] = {}  # by step; step 0 is the load

    def concerns(self, epoch: int | None) -> bool:
        """True if a frame is for this group.

        epoch: the frame's epoch; None: the frame is about the link itself and concerns any group.
        """
        return epoch is None or epoch == self.number

    def answer(self, member: Member, step: int, answer: Answer) -> None:
        """Store an agent's answer to a step. It is dropped if the group has ended or the agent is not of this group.

        step: number of the step; 0 is the load.
        """
        if not self.failed and member in self.members:
            self.answers.setdefault(step, {})[member] = answer

    def fail(self, why: str) -> bool:
        """End this group of ranks because of a failure. Returns True the first time, False if it had ended already.

        Answers that come later are dropped. why: the reason, as text; only the first is kept, in `failed`.
        """
        first = not self.failed
        self.failed = self.failed or why
        return first

    def complete(self, step: int) -> bool:
        """True if all members have answered a step."""
        return len(self.answers.get(step, ())) == len(self.members)

    def take(self, step: int) -> list[Answer]:
        """Remove the answers to a complete step and return them, as a list in the order of the ranks."""
        found = self.answers.pop(step)
        return [found[member] for member in self.members]


class HostRanks(Protocol):
    """Interface to the running ranks of one host, by which its agent gives them steps and ends them."""

    def post(self, message: bytes) -> None:
        """Hand a step to the ranks, and do not wait for its end. Returns nothing.

        message: 8 bytes with the step's number, then the request.
        """

    def stop(self) -> None:
        """End the ranks, and wait until they have ended. Returns nothing."""


class Session:
    """The ranks that an agent runs on its host for one coordinator. take() carries out the coordinator's messages.

    The ranks of one group run at a time: a new group's ranks start when those of the group before have ended.

    start: function from a START message to the HostRanks that it started.
    """

    def __init__(self, start: Callable[[bytes], HostRanks]) -> None:
        self.start = start
        self.ranks: HostRanks | None = None

    def take(self, kind: int, message: bytes) -> None:
        """Carry out a frame from the coordinator: start ranks, give them a step, or end them. Returns nothing.

        kind: kind of the frame; other kinds than START, STEP and STOP are ignored. message: its content.
        """
        if kind == STEP and self.ranks:
            self.ranks.post(message)
        elif kind in (START, STOP):
            self.end()
            if kind == START:
                self.ranks = self.start(message)

    def end(self) -> None:
        """End the ranks, because the coordinator says so or the link to it is lost. Returns nothing."""
        if self.ranks:
            ranks, self.ranks = self.ranks, None
            ranks.stop()
