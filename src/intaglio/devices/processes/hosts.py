"""The coordinator's side of ranks on several hosts: the agents that have connected, and the executable they run."""

from __future__ import annotations

import json
import socket
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np

from intaglio.devices.device import DeviceError, DeviceLost, StateSpec
from intaglio.devices.processes import link as frames
from intaglio.devices.processes import membership
from intaglio.devices.processes.agent import COORDINATOR, unpack_messages
from intaglio.devices.processes.connections import (
    ConnectionRefused,
    Peer,
    accepted,
    check_binding,
    listen,
    meet,
    stop_accepting,
)
from intaglio.devices.processes.group import EPOCHS, LOAD_TIMEOUT
from intaglio.devices.processes.job import Job, RankFacts, check_facts, read_facts
from intaglio.devices.processes.link import Link, LinkLost
from intaglio.devices.processes.membership import Epoch, Roster
from intaglio.devices.processes.messages import pack, text
from intaglio.devices.processes.posted import PostedExecutable
from intaglio.program import MeshProgram

Handler = Callable[["HostAgent", int, int | None, bytes], None]  # agent, kind of frame, epoch, message


class HostAgent:
    """The coordinator's end of the connection to the agent of one host.

    Attributes:
        link: the connection.
        name: the host's name in messages.
        cores: number of CPU cores of the host.
        address: (host, port) at which the host's ranks accept connections from ranks of other hosts.
        handler: function (agent, kind, epoch, message) that is called with each frame from the agent; None: none.

    Raises LinkLost if the agent's first frame is not its greeting.
    """

    def __init__(self, link: Link) -> None:
        kind, message = link.receive()
        if kind != membership.HELLO:
            raise LinkLost(f"a frame of kind {kind} came before the greeting")
        facts = json.loads(message)
        self.link, self.name, self.cores = link, str(facts["name"]), int(facts["cores"])
        self.address: tuple[str, int] = (str(facts["address"][0]), int(facts["address"][1]))
        self.handler: Handler | None = None

    @property
    def alive(self) -> bool:
        """True until the connection to the agent is lost."""
        return not self.link.closed.is_set()

    def run(self) -> None:
        """Receive frames from the agent and call the handler with each, until the connection is lost. Returns None.

        The last call of the handler has the kind LOST.
        """
        try:
            while True:
                self.take(*self.link.receive())
        except LinkLost as e:
            self.lose(e)

    def take(self, kind: int, message: bytes) -> None:
        """Call the handler with one frame from the agent; do nothing if there is no handler. Returns None.

        `kind` is the frame's kind. `message` is the epoch (8 bytes, big-endian), then the content. The handler gets
        these two as separate arguments.
        """
        if self.handler:
            self.handler(self, kind, int.from_bytes(message[:8], "big"), message[8:])

    def lose(self, why: LinkLost) -> None:
        """Call the handler with a frame of the kind LOST. `why` is the error that ended the connection."""
        if self.handler:
            self.handler(self, membership.LOST, None, f"its connection is lost: {why}".encode())


class Rendezvous:
    """The coordinator's listening socket, and the agents that have connected to it.

    Args:
        host: address at which the coordinator listens.
        port: port at which it listens; 0: any free port.
        token: the shared secret; None is allowed only for an address on this machine (loopback).
        silence: seconds without a received byte after which an agent counts as lost.

    Raises ValueError for any other address without a token.
    """

    def __init__(self, host: str, port: int, token: bytes | None, silence: float = frames.SILENCE) -> None:
        self.token, self.silence = check_binding(socket.gethostbyname(host), token), silence
        self.listener = listen(host, port)
        self.roster: Roster[HostAgent] = Roster()
        self.news = threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    @property
    def address(self) -> tuple[str, int]:
        """The address at which the coordinator listens, a tuple (host, port)."""
        host, port = self.listener.getsockname()[:2]
        return host, port

    def wait(self, hosts: int, seconds: float) -> list[HostAgent]:
        """Wait until `hosts` agents are connected, at most `seconds`. Returns a list of them.

        They are the agents that connected first, in that order. Raises DeviceError if there are fewer after `seconds`.
        """
        with self.news:
            if not self.news.wait_for(lambda: bool(self.roster.choose(hosts)), seconds):
                names = ", ".join(a.name for a in self.roster.alive()) or "none"
                raise DeviceError(
                    f"{hosts} hosts are wanted, there are after {seconds:g} s: {names}; run on each other host: "
                    f"intaglio agent --rendezvous HOST:{self.address[1]} --token-file FILE"
                )
            return self.roster.choose(hosts)

    def close(self) -> None:
        """Stop listening and close the connections to all agents."""
        stop_accepting(self.listener)
        for agent in self.roster.members:
            agent.link.close()

    def _run(self) -> None:
        for s, where in accepted(self.listener):
            threading.Thread(target=self._greet, args=(s, where), daemon=True).start()

    def _greet(self, s: socket.socket, where: str) -> None:
        with suppress(OSError, ValueError, KeyError):
            peer = meet(s, where, self.token, check_wants_coordinator)
            agent = HostAgent(Link(s, peer.key, False, self.silence))
            with self.news:
                self.roster.add(agent)
                self.news.notify_all()
            agent.run()


def check_wants_coordinator(peer: Peer) -> None:
    """Raise ConnectionRefused if a peer asked for a rank instead of the coordinator. Returns None."""
    if peer.to != COORDINATOR:
        raise ConnectionRefused(f"rank {peer.rank} wants rank {peer.to}; this is the coordinator")


class HostsExecutable(PostedExecutable):
    """A Program loaded in ranks on several hosts. Each host has the same number of consecutive ranks.

    Args:
        agents: one agent for each host.
        mesh: the Programs of all ranks.
        jobs: for each host, the Job of each of its ranks. A Job says what a rank loads.
        state: sizes of the K/V cache and the recurrent state.
        step_timeout: seconds after which a step is given up.
        silence: seconds without a heartbeat after which a rank that a signal has suspended (SIGSTOP) counts as hung.
        replaces: the lost group of ranks that this one replaces; None: none.
        news: condition that is notified of answers; None: a new one.
        epoch: number of this group of ranks; None: the next number.

    Raises DeviceError with the error's message if loading fails. Raises DeviceLost if a host or a rank is lost while it
    loads. Raises ReplacementRefused if results would not be bitwise identical to those of the group `replaces`.
    """

    def __init__(
        self, agents: Sequence[HostAgent], mesh: MeshProgram, jobs: Sequence[Sequence[Job]], state: StateSpec,
        step_timeout: float, silence: float,
        replaces: HostsExecutable | None = None, news: threading.Condition | None = None, epoch: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(mesh.stages, True)
        self.agents, self.program, self.state, self.step_timeout = list(agents), mesh.last, state, step_timeout
        self.programs = mesh.programs
        self.news = news or threading.Condition()
        self.epoch: Epoch[HostAgent, list[memoryview]] = Epoch(next(EPOCHS) if epoch is None else epoch, agents)
        each = len(mesh.programs) // len(agents)
        runs = [tuple(range(i * each, (i + 1) * each)) for i in range(len(agents))]
        me = weakref.ref(self)

        def handle(agent: HostAgent, kind: int, of: int | None, message: bytes) -> None:
            if (group := me()) and group.epoch.concerns(of):  # others come from a group that has ended
                group.take(agent, kind, message)

        self.handle = handle
        weakref.finalize(self, release, self.agents, handle)
        for agent in agents:
            agent.handler = handle
        for agent, ranks, own in zip(agents, runs, jobs, strict=True):
            messages = [pack(job.parts()) for job in own]
            others = {r: a.address for a, run in zip(agents, runs, strict=True) if a is not agent for r in run}
            facts = text({
                "epoch": self.epoch.number, "of": len(mesh.programs), "ranks": ranks, "addresses": others,
                "sizes": [len(m) for m in messages], "slots": self.slots, "threads": max(1, agent.cores // each),
                "step_timeout": step_timeout,
                "silence": silence, "modules": sorted({m for job in own for m in job.modules()}),
            })  # fmt: skip
            parts = [np.array([len(facts)], np.int64), facts, *(np.frombuffer(m, np.uint8) for m in messages)]
            if not self.epoch.failed:  # those that had started were told to stop
                self.send(agent, membership.START, pack(parts))
        self.facts = list[RankFacts]()
        for rank, message in enumerate(self._wait(0, LOAD_TIMEOUT)):
            found = read_facts(message)
            if isinstance(found, str):
                self.close()
                raise DeviceError(f"rank {rank}: {found}")
            self.facts.append(found)
        try:
            check_facts(self.facts, replaces.facts if replaces else None)
        except DeviceError:
            self.close()
            raise

    def take(self, agent: HostAgent, kind: int, message: bytes) -> None:
        """Handle a frame from an agent. Returns None.

        An answer to a step is stored. A report of lost ranks ends the group. Frames of other kinds are ignored.
        """
        with self.news:
            if kind == membership.LOST:
                self.fail(f"host {agent.name}: {message.decode(errors='replace')}")
            elif kind in (membership.LOADED, membership.RESULT):
                number = int.from_bytes(message[:8], "big")
                self.epoch.answer(agent, number, unpack_messages(message[8:]))
            self.news.notify_all()

    def send(self, agent: HostAgent, kind: int, message: bytes) -> None:
        """Send a frame to an agent. If it cannot be sent, end the group. Returns None."""
        try:
            agent.link.send(kind, message)
        except LinkLost as e:
            self.fail(f"host {agent.name}: {e}")

    def fail(self, why: str) -> None:
        """End the ranks on all hosts. Later steps raise DeviceLost with the reason `why`. Returns None."""
        with self.news:
            if self.epoch.fail(why):
                release(self.agents, self.handle)
            self.news.notify_all()

    def post(self, request: Sequence[np.ndarray], number: int) -> None:
        message = number.to_bytes(8, "big") + pack(request)
        for agent in self.agents:
            self.send(agent, membership.STEP, message)

    def answered(self, number: int) -> bool:
        return bool(self.epoch.failed) or self.epoch.complete(number)

    def check_alive(self) -> None:
        if self.epoch.failed:
            raise DeviceLost(self.epoch.failed)

    def replies(self, number: int) -> list[memoryview]:
        return self._wait(number, self.step_timeout)

    def close(self) -> None:
        """End the ranks on all hosts. The agents stay connected. Returns None."""
        self.fail("the group is closed")

    def _wait(self, number: int, seconds: float) -> list[memoryview]:
        """Wait up to `seconds` for the ranks' answers to request `number`.

        Returns a list of memoryviews in order of rank.

        Raises DeviceLost if the group has ended, or if not all ranks answer in time.
        """
        with self.news:
            if not self.news.wait_for(lambda: self.answered(number), seconds):
                self.fail(f"no answer in {seconds:g} s")
            self.check_alive()
            return [message for messages in self.epoch.take(number) for message in messages]


def release(agents: Sequence[HostAgent], handle: Handler) -> None:
    """Tell the agents of a group of ranks to end their ranks. Returns None.

    An agent that serves another group by now is left alone.

    Args:
        agents: the agents that took part in the group.
        handle: the group's message handler. An agent whose `handler` is another function serves another group.
    """
    for agent in agents:
        if agent.handler is handle:
            agent.handler = None
            with suppress(LinkLost):
                agent.link.send(membership.STOP)
