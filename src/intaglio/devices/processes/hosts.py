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
    """The coordinator's end of the connection to one host's agent.

    cores: number of CPU cores of the agent's host. address: (host, port) where the host's ranks take connections from
    other ranks. handler: function (agent, kind, epoch, message) called with each frame from the agent. Raises LinkLost
    if the agent's first frame is not its greeting.
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
        """Call the handler with each frame from the agent until the connection is lost, then once with kind LOST."""
        try:
            while True:
                self.take(*self.link.receive())
        except LinkLost as e:
            self.lose(e)

    def take(self, kind: int, message: bytes) -> None:
        """Call the handler, if there is one, with a frame of this `kind` from the agent. Returns nothing.

        message: the epoch in the first 8 bytes (big-endian), then the content; the handler gets both.
        """
        if self.handler:
            self.handler(self, kind, int.from_bytes(message[:8], "big"), message[8:])

    def lose(self, why: LinkLost) -> None:
        """Call the handler with a frame of kind LOST. why: the error that ended the connection."""
        if self.handler:
            self.handler(self, membership.LOST, None, f"its connection is lost: {why}".encode())


class Rendezvous:
    """The listening socket of the coordinator, and the agents that have connected to it.

    token: the shared secret; None is allowed only on loopback. silence: seconds without a byte after which an agent
    counts as lost. Raises ValueError for an address outside loopback without a token.
    """

    def __init__(self, host: str, port: int, token: bytes | None, silence: float = frames.SILENCE) -> None:
        self.token, self.silence = check_binding(socket.gethostbyname(host), token), silence
        self.listener = listen(host, port)
        self.roster: Roster[HostAgent] = Roster()
        self.news = threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    @property
    def address(self) -> tuple[str, int]:
        """The (host, port) at which the coordinator listens."""
        host, port = self.listener.getsockname()[:2]
        return host, port

    def wait(self, hosts: int, seconds: float) -> list[HostAgent]:
        """The `hosts` agents that connected first, as a list in that order. Waits up to `seconds` for them.

        Raises DeviceError if fewer are connected by then.
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
    """Raise ConnectionRefused for a peer that asked for a rank instead of the coordinator. Returns nothing."""
    if peer.to != COORDINATOR:
        raise ConnectionRefused(f"rank {peer.rank} wants rank {peer.to}; this is the coordinator")


class HostsExecutable(PostedExecutable):
    """A Program loaded in the ranks of several hosts, the same number of consecutive ranks on each.

    Args:
        agents: one for each host.
        mesh: the Programs of all ranks.
        jobs: for each host, the Jobs (what a rank loads) of its ranks.
        state: sizes of the K/V cache and the recurrent state.
        step_timeout: maximum seconds that a step may take.
        silence: seconds without a heartbeat after which a rank that a signal has suspended (SIGSTOP) counts as hung.
        replaces: the lost group that this one replaces; None: none.
        news: condition that is notified of answers; None: a new one.
        epoch: number of this group; None: the next number.

    Raises DeviceError with the message of the error that loading raised, DeviceLost if a host or a rank is lost
    meanwhile, and ReplacementRefused if results would have other bits than those of the group `replaces`.
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
        """Handle a frame from an agent: store its answer to a step, or end the group if ranks are lost."""
        with self.news:
            if kind == membership.LOST:
                self.fail(f"host {agent.name}: {message.decode(errors='replace')}")
            elif kind in (membership.LOADED, membership.RESULT):
                number = int.from_bytes(message[:8], "big")
                self.epoch.answer(agent, number, unpack_messages(message[8:]))
            self.news.notify_all()

    def send(self, agent: HostAgent, kind: int, message: bytes) -> None:
        """Send a frame to an agent; if that fails, end the group. Returns nothing."""
        try:
            agent.link.send(kind, message)
        except LinkLost as e:
            self.fail(f"host {agent.name}: {e}")

    def fail(self, why: str) -> None:
        """End the group on all hosts for the reason `why`, which later steps raise as DeviceLost. Returns nothing."""
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
        """End the ranks on all hosts; the agents stay connected. Returns nothing."""
        self.fail("the group is closed")

    def _wait(self, number: int, seconds: float) -> list[memoryview]:
        """A list of all ranks' answers to request `number`, as bytes in order of rank. Waits up to `seconds`.

        Raises DeviceLost if the group has ended or not all ranks answer in time.
        """
        with self.news:
            if not self.news.wait_for(lambda: self.answered(number), seconds):
                self.fail(f"no answer in {seconds:g} s")
            self.check_alive()
            return [message for messages in self.epoch.take(number) for message in messages]


def release(agents: Sequence[HostAgent], handle: Handler) -> None:
    """Tell agents to end the ranks of one group. Returns nothing.

    agents: those that took part in the group; one that serves another group by now is left alone. handle: the group's
    handler of messages, by which an agent knows the group.
    """
    for agent in agents:
        if agent.handler is handle:
            agent.handler = None
            with suppress(LinkLost):
                agent.link.send(membership.STOP)
