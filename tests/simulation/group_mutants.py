"""Planted bugs (mutants) in what coordinators and agents decide: each replaces one method of a shipped class.

The simulation of groups must find every one; if one goes unnoticed, a rule is missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from intaglio.devices.processes import hosts
from intaglio.devices.processes.hosts import HostAgent, HostsExecutable
from intaglio.devices.processes.membership import (
    START,
    STEP,
    STOP,
    BeatWatch,
    Epoch,
    FrameOrder,
    Roster,
    Session,
    Silence,
)
from intaglio.devices.processes.posted import PostedExecutable


@dataclass(frozen=True)
class GroupMutant:
    """One bug: `owner.name` is replaced by `broken`."""

    title: str
    owner: Any
    name: str
    broken: Any

    @contextmanager
    def planted(self) -> Iterator[None]:
        with patch.object(self.owner, self.name, self.broken):
            yield


def accept_any_frame(self: FrameOrder, number: int) -> None:
    self.received = number + 1


def look_without_patience(self: BeatWatch, beats: Any, stopped: Any) -> dict[int, float]:
    return {
        rank: 0.0 for rank, count in beats.items() if count == self.seen.get(rank) or self.seen.update({rank: count})
    }


def answer_of_anyone(self: Epoch[Any, Any], member: Any, step: int, answer: Any) -> None:
    for m in self.members:
        self.answers.setdefault(step, {}).setdefault(m, answer)


def take_in_order_of_arrival(self: Epoch[Any, Any], step: int) -> list[Any]:
    return list(self.answers.pop(step).values())


def take_the_last_step(self: Epoch[Any, Any], step: int) -> list[Any]:
    found = self.answers[max(s for s in self.answers if len(self.answers[s]) == len(self.members))]
    return [found[m] for m in self.members]


def start_beside_the_old(self: Session, kind: int, message: bytes) -> None:
    if kind == STEP and self.ranks:
        self.ranks.post(message)
    elif kind == START:
        self.ranks = self.start(message)


def ignore_stop(self: Session, kind: int, message: bytes) -> None:
    if kind != STOP:
        shipped_take(self, kind, message)


def post_twice(self: Session, kind: int, message: bytes) -> None:
    shipped_take(self, kind, message)
    if kind == STEP and self.ranks:
        self.ranks.post((int.from_bytes(message[:8], "big") + 1).to_bytes(8, "big") + message[8:])


def fail_in_silence(self: HostsExecutable, why: str) -> None:
    self.epoch.fail(why)


def stop_the_first_only(agents: Any, handle: Any) -> None:
    shipped_release(agents[:1], handle)


def receive_out_of_order(self: PostedExecutable, step: Any) -> None:
    if len(self.pending) > 1:
        self.pending[0].number, self.pending[1].number = self.pending[1].number, self.pending[0].number
    shipped_receive_until(self, step)


shipped_take, shipped_release, shipped_receive_until = Session.take, hosts.release, PostedExecutable.receive_until

GROUP_MUTANTS = [
    GroupMutant("a frame that comes twice is taken twice", FrameOrder, "check", accept_any_frame),
    GroupMutant("silence is never noticed", Silence, "left", lambda self, now: 1.0),
    GroupMutant(
        "silence is noticed after four times as long", Silence, "left", lambda self, now: self.last + 3.2 - now
    ),
    GroupMutant("a host that is slow counts as gone", Silence, "left", lambda self, now: self.last + 0.15 - now),
    GroupMutant("a stopped rank is never noticed", BeatWatch, "look", lambda self, beats, stopped: {}),
    GroupMutant("a rank that misses a beat counts as hung", BeatWatch, "look", look_without_patience),
    GroupMutant("frames of other epochs are taken", Epoch, "concerns", lambda self, epoch: True),
    GroupMutant("frames about the link are dropped", Epoch, "concerns", lambda self, epoch: epoch == self.number),
    GroupMutant("one host's answer counts for all", Epoch, "answer", answer_of_anyone),
    GroupMutant("answers come in the order of arrival", Epoch, "take", take_in_order_of_arrival),
    GroupMutant("the newest complete step answers any", Epoch, "take", take_the_last_step),
    GroupMutant("a failure is forgotten", Epoch, "fail", lambda self, why: True),
    GroupMutant(
        "a step counts as complete at its first answer", Epoch, "complete", lambda self, step: step in self.answers
    ),
    GroupMutant("agents that are gone are chosen", Roster, "alive", lambda self: self.members),
    GroupMutant("fewer hosts than wanted are chosen", Roster, "choose", lambda self, count: self.alive()[:1]),
    GroupMutant("ranks start beside those of another epoch", Session, "take", start_beside_the_old),
    GroupMutant("an agent ignores that it is to stop", Session, "take", ignore_stop),
    GroupMutant("an agent posts a step twice", Session, "take", post_twice),
    GroupMutant("ranks outlive the link to their coordinator", Session, "end", lambda self: None),
    GroupMutant("a failure is not told to the agents", HostsExecutable, "fail", fail_in_silence),
    GroupMutant("a failure is told to one agent only", hosts, "release", stop_the_first_only),
    GroupMutant("a lost link is not told to the group", HostAgent, "lose", lambda self, why: None),
    GroupMutant(
        "results of two steps under way are exchanged", PostedExecutable, "receive_until", receive_out_of_order
    ),
]
