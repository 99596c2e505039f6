"""Agent: the process on a host that starts the ranks of this host for a coordinator on another.

It connects to the coordinator and follows its frames: start a group of ranks, run a step, stop the group. If the
connection is lost, it ends the ranks and connects again. The agent also listens on a port of its own, which takes only
connections from ranks of other hosts that know the token.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from intaglio.devices.cores import usable_cores
from intaglio.devices.processes import link as frames
from intaglio.devices.processes import membership
from intaglio.devices.processes.connections import (
    ConnectionRefused,
    Peer,
    accepted,
    check_binding,
    connect,
    introduce,
    listen,
    meet,
    stop_accepting,
)
from intaglio.devices.processes.forkserver import ForkServer
from intaglio.devices.processes.group import LOAD_TIMEOUT, Place, Processes, RankStart
from intaglio.devices.processes.job import Job
from intaglio.devices.processes.kept import KeptImages, KeptState
from intaglio.devices.processes.link import Link, LinkLost
from intaglio.devices.processes.membership import Session
from intaglio.devices.processes.messages import Reader, pack, text
from intaglio.devices.ranks import share_cores

COORDINATOR = 0xFFFF  # the number by which an agent asks for the coordinator
RETRY = 0.5  # seconds between two attempts to reach the coordinator
TRIES = 3  # refusals, one after another, after which an agent gives up
MEET_TIMEOUT = 20.0  # seconds for the ranks of a group to connect
GREETING = 32  # connections that may introduce themselves at a time
WAIT = 3600.0  # seconds; then it waits again


class PackedJob(Job):
    """A Job in serialised form, as the coordinator sent it. It is passed to a child process without being parsed."""

    def __init__(self, message: np.ndarray, modules: list[str]) -> None:
        object.__setattr__(self, "message", message)
        object.__setattr__(self, "needed", modules)

    def parts(self) -> list[np.ndarray]:
        """Return a list with one uint8 array: the bytes of the job as the coordinator sent them."""
        return [vars(self)["message"]]

    def modules(self) -> list[str]:
        """Return a list of the names of the Python modules that the job needs, as the coordinator sent them."""
        return list(vars(self)["needed"])


class Port:
    """A listening TCP socket for ranks of other hosts. It keeps each accepted connection until take() asks for it."""

    def __init__(self, host: str, token: bytes) -> None:
        self.token, self.listener = token, listen(host)
        self.epoch = 0  # connections of earlier ones are refused
        self.arrived: dict[tuple[int, int, int], socket.socket] = {}  # by (epoch, to, from)
        self.news, self.room = threading.Condition(), threading.Semaphore(GREETING)
        threading.Thread(target=self._run, daemon=True).start()

    @property
    def address(self) -> tuple[str, int]:
        """The (host, port) at which ranks of other hosts connect."""
        host, port = self.listener.getsockname()[:2]
        return host, port

    def begin(self, epoch: int) -> None:
        """Close connections for groups of ranks older than `epoch`, and refuse such connections from now on.

        Returns None. `epoch` is the number of the group that now runs on this host. A group that replaces another has a
        higher number.
        """
        with self.news:
            self.epoch = epoch
            for key in [key for key in self.arrived if key[0] != epoch]:
                if key[0] < epoch:
                    self.arrived.pop(key).close()

    def take(self, epoch: int, rank: int, peer: int, stopped: threading.Event | None = None) -> socket.socket:
        """Wait for the connection from rank `peer` of another host to this host's rank `rank`. Returns its socket.

        `epoch` is the number of the ranks' group. `stopped` is an event that ends the wait; after setting it, call
        wake(). Raises ConnectionRefused if `stopped` is set, or if no connection comes within MEET_TIMEOUT seconds.
        """
        ended = stopped.is_set if stopped else bool
        key = (epoch, rank, peer)
        with self.news:
            if not self.news.wait_for(lambda: key in self.arrived or ended(), MEET_TIMEOUT):
                raise ConnectionRefused(f"rank {peer} did not connect to rank {rank} in {MEET_TIMEOUT:g} s")
            if ended():
                raise ConnectionRefused("the group has ended")
            return self.arrived.pop(key)

    def wake(self) -> None:
        """Wake the threads that wait in take(). Each then checks whether its group has ended. Returns None."""
        with self.news:
            self.news.notify_all()

    def close(self) -> None:
        """Stop listening, and close all connections that take() has not returned yet."""
        stop_accepting(self.listener)
        self.begin(1 << 33)

    def _run(self) -> None:
        for s, where in accepted(self.listener):
            if self.room.acquire(blocking=False):
                threading.Thread(target=self._greet, args=(s, where), daemon=True).start()
            else:
                s.close()

    def _greet(self, s: socket.socket, where: str) -> None:
        try:
            with suppress(ConnectionError):
                peer = meet(s, where, self.token, self._check)
                with self.news:
                    if old := self.arrived.pop((peer.epoch, peer.to, peer.rank), None):
                        old.close()
                    self.arrived[peer.epoch, peer.to, peer.rank] = s
                    self.news.notify_all()
        finally:
            self.room.release()

    def _check(self, peer: Peer) -> None:
        if peer.epoch < self.epoch:
            raise ConnectionRefused(f"rank {peer.rank} is of epoch {peer.epoch}; this host is in epoch {self.epoch}")


class HostGroup:
    """The ranks of a group that run on this host.

    A thread starts them and sends their results to the coordinator.

    Args:
        link: the connection to the coordinator.
        port: the listening socket to which ranks of other hosts connect.
        server: forks the processes.
        message: the coordinator's START frame. It holds the ranks' jobs and the group's epoch, a number that is higher
            for a group that replaces another.
        images: packed weights of an earlier group on this host; None if there was none. They are used again if the
            earlier group had as many ranks on this host as the new one.
    """

    def __init__(
        self, link: Link, port: Port, server: ForkServer, message: bytes, images: KeptImages | None = None
    ) -> None:
        self.link, self.port, self.server = link, port, server
        self.processes: Processes | None = None
        self.stopped = threading.Event()
        r = Reader(memoryview(message))
        facts: Any = r.text(int(r.array(np.int64, 1)[0]))
        self.facts = facts
        self.jobs = [PackedJob(r.array(np.uint8, size), facts["modules"]) for size in facts["sizes"]]
        alike = images and len(images.files) == len(self.jobs)
        self.images = images if images and alike else KeptImages(len(self.jobs))
        port.begin(self.facts["epoch"])
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def post(self, message: bytes) -> None:
        """Start a step on this host's ranks.

        Returns None. `message` is the step's number (8 bytes), then the request.
        """
        if self.processes:
            number = int.from_bytes(message[:8], "big")
            board = self.processes.requests[number % self.facts["slots"]]
            board.write([np.frombuffer(message, np.uint8, offset=8)])
            self.processes.segment.post(number + 1)

    def stop(self) -> None:
        """Abort the ranks' group and wait until their processes have ended."""
        self.stopped.set()
        self.port.wake()
        if self.processes:
            self.processes.segment.abort(-1, "", "the coordinator ended the group")
        self.thread.join()

    def send(self, kind: int, message: bytes) -> None:
        """Send a frame to the coordinator. Returns None.

        The frame holds this group's epoch (its number, 8 bytes), then `message`. With the epoch, the coordinator
        recognises frames of a group that has been replaced, and drops them. `kind` is the kind of the frame, such as
        membership.RESULT. Raises LinkLost if the frame cannot be sent.
        """
        self.link.send(kind, int(self.facts["epoch"]).to_bytes(8, "big") + message)

    def _run(self) -> None:
        with suppress(LinkLost):
            try:
                self._serve()
            except Exception as e:  # whatever starting ranks can raise
                self.send(membership.LOST, f"{type(e).__name__}: {e}".encode())
            finally:
                if self.processes:
                    self.processes.close()

    def _serve(self) -> None:
        f = self.facts
        sockets = self._connect({int(rank): (host, port) for rank, (host, port) in f["addresses"].items()})
        place = Place(tuple(f["ranks"]), f["of"], f["epoch"], {r: ends_of(own) for r, own in sockets.items()})
        cores = share_cores(sorted(os.sched_getaffinity(0)), len(self.jobs), f["threads"])
        starts = [RankStart(job, own) for job, own in zip(self.jobs, cores, strict=True)]
        try:
            processes = Processes(
                starts, True, f["step_timeout"], f["silence"], "process", KeptState(len(starts)), self.images,
                f["slots"], place, self.server,
            )  # fmt: skip
        finally:
            for own in sockets.values():
                for s in own.values():
                    s.close()
        self.processes = processes
        if self.stopped.is_set():
            return
        segment, number = processes.segment, 0
        segment.post(1)
        while not self.stopped.is_set():
            done = segment.wait_completed(number + 1, LOAD_TIMEOUT if number == 0 else WAIT)
            if segment.aborted:
                if not self.stopped.is_set():
                    self.send(membership.LOST, segment.abort_reason().encode())
                return
            if done:
                messages = [bytes(boards[number % f["slots"]].read()) for boards in processes.results]
                kind = membership.RESULT if number else membership.LOADED
                self.send(kind, number.to_bytes(8, "big") + pack_messages(messages))
                number += 1

    def _connect(self, addresses: Mapping[int, tuple[str, int]]) -> dict[int, dict[int, socket.socket]]:
        """Connect each rank of this host with each rank of other hosts.

        Returns {rank of this host: {rank of another host: socket}}. `addresses` is {rank of another host: (host,
        port)}. The lower rank of a pair connects, the higher rank accepts. Raises OSError if a connection cannot be
        made.
        """
        made: dict[int, dict[int, socket.socket]] = {rank: {} for rank in self.facts["ranks"]}
        pairs = [(rank, peer) for rank in made for peer in addresses]
        try:
            for rank, peer in sorted(pairs, key=lambda pair: pair[0] > pair[1]):
                if rank < peer:
                    made[rank][peer] = connect(addresses[peer], self.port.token, self.facts["epoch"], rank, peer)
                else:
                    made[rank][peer] = self.port.take(self.facts["epoch"], rank, peer, self.stopped)
        except BaseException:
            for own in made.values():
                for s in own.values():
                    s.close()
            raise
        return made


def ends_of(sockets: Mapping[int, socket.socket]) -> dict[int, int]:
    """Return {rank: file descriptor of its socket}. `sockets` is {rank: socket}."""
    return {rank: s.fileno() for rank, s in sockets.items()}


def pack_messages(messages: list[bytes]) -> bytes:
    """Join several messages to one message, as bytes. unpack_messages() splits it again."""
    sizes = np.array([len(messages), *map(len, messages)], np.int64)
    return pack([sizes, *(np.frombuffer(m, np.uint8) for m in messages)])


def unpack_messages(message: bytes) -> list[memoryview]:
    """Split a message made by pack_messages() into the original messages. Returns copies as a list of memoryviews."""
    r = Reader(memoryview(message))
    count = int(r.array(np.int64, 1)[0])
    sizes = np.frombuffer(message, np.int64, count, 8).tolist()
    r = Reader(memoryview(message)[8 * (1 + count) :])
    return [memoryview(r.array(np.uint8, size).tobytes()) for size in sizes]


class Agent:
    """The agent of this host: connects to the coordinator and runs ranks for it, until stop() is called.

    Args:
        rendezvous: (host, port) at which the coordinator listens.
        token: the shared secret; None is allowed only if the coordinator is on this machine (loopback).
        name: name of this host in messages; "": its host name.
        silence: seconds without a received byte after which the connection counts as lost.
    """

    def __init__(
        self, rendezvous: tuple[str, int], token: bytes | None, name: str = "", silence: float = frames.SILENCE
    ) -> None:
        self.rendezvous, self.given, self.silence = rendezvous, token, silence
        self.name = name or socket.gethostname()
        self.stopping, self.server = threading.Event(), ForkServer()
        self.link: Link | None = None

    def serve(self, once: bool = False) -> None:
        """Serve the coordinator until stop() is called. If the connection is lost, connect again. Returns None.

        If `once` is True, return when the first connection is lost. Raises ConnectionRefused if the coordinator refuses
        this agent TRIES times in a row, and ValueError for a missing or too short token.
        """
        refused = 0
        while not self.stopping.is_set():
            try:
                s, key = introduce(self.rendezvous, self._token(), 0, 0, COORDINATOR)
                refused = 0
            except OSError as e:
                refused = refused + 1 if isinstance(e, ConnectionRefused) else 0
                if refused == TRIES:  # fewer may come from a coordinator that is about to end, or too busy
                    raise
                self.stopping.wait(RETRY)
                continue
            self._session(s, key)
            if once:
                break
        self.server.close()

    def stop(self) -> None:
        """Close the connection, which ends this host's ranks, and make serve() return."""
        self.stopping.set()
        if self.link:
            self.link.close()

    def _token(self) -> bytes:
        host = socket.gethostbyname(self.rendezvous[0])
        return check_binding(host, self.given)

    def _session(self, s: socket.socket, key: bytes) -> None:
        """Serve the coordinator over one connection until it is lost, then end this host's ranks. Returns None.

        The coordinator sends frames: start ranks, run a step, stop the ranks. `s` is the connection's socket. `key` is
        its session key.
        """
        host = s.getsockname()[0]
        port = Port(host, check_binding(host, self.given))
        try:
            link = self.link = Link(s, key, True, self.silence)
        except OSError:  # the connection was lost already
            s.close()
            port.close()
            return
        images: KeptImages | None = None

        def start(message: bytes) -> HostGroup:
            nonlocal images
            group = HostGroup(link, port, self.server, message, images)
            images = group.images
            return group

        session = Session(start)
        try:
            cores = usable_cores()
            link.send(membership.HELLO, text({"name": self.name, "cores": cores, "address": port.address}).tobytes())
            while True:
                session.take(*link.receive())
        except LinkLost:
            pass
        finally:
            link.close()
            session.end()
            port.close()
