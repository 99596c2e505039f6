"""GroupExecutable: a process for each rank, which together are one Executable.

The parent writes each request once, to memory that all ranks map; each rank's results come back the same way. A thread
of the parent watches the processes: one that exits, or shows no sign of life for `silence` seconds, aborts the group,
which ends every rank's step. Whatever ends a group is raised as DeviceLost; the engine then loads another.
"""

from __future__ import annotations

import itertools
import json
import os
import select
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from intaglio.devices.device import DeviceError, DeviceLost
from intaglio.devices.processes.board import Board
from intaglio.devices.processes.forkserver import ChildProcess, ForkServer, ForkServerError, child_environment
from intaglio.devices.processes.job import Job, RankFacts, check_facts, read_facts
from intaglio.devices.processes.kept import KeptImages, KeptState, spoils_memory
from intaglio.devices.processes.membership import BeatWatch
from intaglio.devices.processes.posted import PostedExecutable
from intaglio.program import MeshProgram

if TYPE_CHECKING:
    from intaglio import _native

LOAD_TIMEOUT = 3600.0  # seconds; a load may read and pack hundreds of gigabytes
RING_BYTES = 1 << 19  # of each ring: half of what a core's second-level cache holds, more than most messages
TICK = 0.05  # seconds between two looks at the signs of life
CHILD = "intaglio.devices.processes.child"
TARGET = f"{CHILD}:run"
START = f"from {CHILD} import main; main()"
EPOCHS = itertools.count(1)
ELSEWHERE = 1 << 62  # steps that ranks of other hosts count as having completed here


def start_child(argument: str, files: Sequence[int], server: ForkServer | None, modules: Iterable[str]) -> ChildProcess:
    """Start a child process that calls child.run(argument, files). Returns an object that stands for the process.

    The object is a ForkedProcess if `server` is given and can fork, otherwise a subprocess.Popen. `modules` are the
    names of modules that the server imports before it forks.
    """
    if server:
        with suppress(ForkServerError):
            return server.fork(TARGET, argument, files, modules)
    return subprocess.Popen(
        [sys.executable, "-c", START, argument, ",".join(map(str, files))],
        env=child_environment(), pass_fds=files, stdin=subprocess.DEVNULL,
        start_new_session=True,  # a Ctrl-C is for the parent, which drains first
    )  # fmt: skip


@dataclass(frozen=True)
class RankStart:
    """The job of one rank's process, and the CPU cores that the process may use.

    `cores` has the numbers of the cores. (): all cores.
    """

    job: Job
    cores: tuple[int, ...] = ()


@dataclass(frozen=True)
class Place:
    """The part of a group of ranks that runs on this host, and its connections to the ranks on other hosts.

    Attributes:
        ranks: numbers of the ranks that run here.
        of: number of ranks of the whole group.
        epoch: number of the group. A group that replaces another has a higher number.
        sockets: connections to ranks on other hosts: {rank here: {rank on another host: file descriptor}}.
    """

    ranks: tuple[int, ...]
    of: int
    epoch: int
    sockets: Mapping[int, Mapping[int, int]]


class Processes:
    """The child processes that run this host's ranks of a group, and the memory that they share.

    This class carries messages between this process and the ranks, without reading them.

    Args:
        ranks: the job and CPU cores of each process.
        joins: True if the ranks take part in collectives together.
        step_timeout: seconds after which waiting for an answer is given up.
        silence: seconds without a sign of life after which a process that a signal has suspended counts as hung.
        what: noun for a process in error messages.
        kept: memory files for the K/V caches.
        images: memory files for the packed weights.
        slots: number of requests that the shared memory holds at once; it holds as many results of each rank.
        place: which ranks of the group run on this host; None if all do.
        server: fork server that starts the processes; None: they are started without one.
    """

    def __init__(
        self, ranks: Sequence[RankStart], joins: bool, step_timeout: float, silence: float, what: str, kept: KeptState,
        images: KeptImages, slots: int, place: Place | None = None, server: ForkServer | None = None,
    ) -> None:  # fmt: skip
        from intaglio import _native  # only a process with a group needs the compiled part

        place = place or Place(tuple(range(len(ranks))), len(ranks), next(EPOCHS), {})

        self.what = what
        self.ring_bytes = RING_BYTES if joins else 4096
        segment_file = os.memfd_create("intaglio-segment")
        os.ftruncate(segment_file, _native.Segment.bytes_for(place.of, self.ring_bytes))
        _native.Segment.format(segment_file, place.of, self.ring_bytes, place.epoch)
        self.segment = _native.Segment(segment_file)
        for rank in set(range(place.of)) - set(place.ranks):
            self.segment.complete(rank, ELSEWHERE)
        self.requests = [Board() for _ in range(slots)]
        self.results = [[Board() for _ in range(slots)] for _ in ranks]
        jobs = [Board() for _ in ranks]
        theirs, mine = os.pipe()
        self.pipe, self.processes = mine, list[ChildProcess]()
        self.wake = os.eventfd(0)
        self.closed = False
        self.watcher: threading.Thread | None = None
        try:
            for i, (rank, start) in enumerate(zip(place.ranks, ranks, strict=True)):
                jobs[i].write(start.job.parts())
                sockets = place.sockets.get(rank, {})
                boards = (jobs[i], *self.requests, *self.results[i])
                files = [segment_file, theirs, kept.files[i], images.files[i], *(b.file for b in boards)]
                argument = json.dumps([rank, joins, step_timeout, start.cores, list(sockets)])
                modules = {CHILD, *start.job.modules()}
                self.processes.append(start_child(argument, [*files, *sockets.values()], server, modules))
        except BaseException:
            self.close()
            raise
        finally:
            for file in (segment_file, theirs):
                os.close(file)
            for board in jobs:
                board.close()
        pids = {rank: p.pid for rank, p in zip(place.ranks, self.processes, strict=True)}
        self.watcher = threading.Thread(target=watch, args=(self.segment, pids, self.wake, silence, what), daemon=True)
        self.watcher.start()

    def close(self) -> None:
        """Kill all processes and close all files and pipes."""
        if self.closed:
            return
        self.closed = True
        os.eventfd_write(self.wake, 1)
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
        if self.watcher:
            self.watcher.join()
        for file in (self.pipe, self.wake):
            os.close(file)
        for board in (*self.requests, *itertools.chain(*self.results)):
            board.close()

    def spoilt(self) -> bool:
        """True if a process may have damaged the shared memory, because it crashed or its exit status is unknown."""
        return any(p.returncode is None or spoils_memory(p.returncode) for p in self.processes)

    def lost(self, cause: str) -> DeviceLost:
        """Kill all processes. Returns a DeviceLost error for the caller to raise.

        The error's message has the text `cause` and the exit statuses of the processes.
        """
        pids = [p.pid for p in self.processes]
        self.close()
        codes = ", ".join(f"{self.what} {pid}: {p.returncode}" for pid, p in zip(pids, self.processes, strict=True))
        return DeviceLost(f"{cause} (exit statuses: {codes})")


def watch(segment: _native.Segment, pids: Mapping[int, int], wake: int, silence: float, what: str) -> None:
    """Abort the group when one of its processes exits or hangs. Returns None when `wake` is written to.

    Every process has a thread that counts up a heartbeat, even during a long step. A process that a signal has
    suspended (SIGSTOP) counts as hung when its heartbeat has stood still for `silence` seconds. Any other process
    counts as hung after PATIENCE times as long, because other processes may use the CPU cores.

    A process that has not yet made its first heartbeat is starting, and does not count as hung. Time is measured in
    ticks of this thread (TICK seconds), not by a clock. If the whole machine pauses, this thread pauses too, and at
    most one tick is added.

    Args:
        segment: memory of the group, with the heartbeats and the abort flag.
        pids: {rank: process id}.
        wake: an eventfd. Writing to it ends the watch.
        silence: seconds without a heartbeat after which a suspended process counts as hung.
        what: noun for a process in the abort message.
    """
    poll, names = select.poll(), dict[int, str]()
    poll.register(wake, select.POLLIN)
    for rank, pid in pids.items():
        try:
            file = os.pidfd_open(pid)
        except ProcessLookupError:
            segment.abort(-1, "", f"{what} {pid} of rank {rank} exited")
            continue
        names[file] = f"{what} {pid} of rank {rank}"
        poll.register(file, select.POLLIN)
    beats = BeatWatch(tuple(pids), silence, TICK)
    try:
        while True:
            ready = [file for file, _ in poll.poll(int(TICK * 1000))]
            if wake in ready:
                return
            for file in ready:
                segment.abort(-1, "", f"{names[file]} exited")
                poll.unregister(file)
            if not ready:
                counts = {rank: segment.beats(rank) for rank in pids}
                for rank, quiet in beats.look(counts, lambda rank: is_stopped(pids[rank])).items():
                    why = f"{what} {pids[rank]} of rank {rank} hangs: no sign of life in {quiet:.2g} s"
                    segment.abort(-1, "", why)
    finally:
        for file in names:
            os.close(file)


def is_stopped(pid: int) -> bool:
    """True if a signal or a debugger has stopped the process; False if it runs or does not exist."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "Tt"
    except OSError:
        return False


class GroupExecutable(PostedExecutable):
    """A Program loaded in the processes of a group, one process for each rank.

    The attribute `pids` has the process ids in order of rank.

    Args:
        ranks: the job and CPU cores of each process.
        joins: True if the ranks are one mesh, with a communicator each. False if there is one process, which loads all
            Programs of its job.
        step_timeout: seconds after which a step is given up.
        silence: seconds without a heartbeat after which a process that a signal has suspended (SIGSTOP) counts as hung.
            Other processes are given longer, see watch().
        what: noun for a process in error messages.
        replaces: the lost group that this group replaces; None: none.
        server: fork server that starts the processes; None: they are started without one.

    Raises DeviceError with the error's message if loading fails. Raises DeviceLost if a process ends while it loads.
    Raises ReplacementRefused if results would not be bitwise identical to those of the group replaced.
    """

    def __init__(
        self, ranks: Sequence[RankStart], joins: bool, step_timeout: float, silence: float, what: str = "process",
        replaces: GroupExecutable | None = None, server: ForkServer | None = None,
    ) -> None:  # fmt: skip
        job = ranks[-1].job
        self.program, self.state, self.step_timeout = job.programs[-1], job.state, step_timeout
        self.programs = [program for start in ranks for program in start.job.programs]
        depth = MeshProgram(tuple(start.job.programs[0] for start in ranks)).stages if joins else 1
        super().__init__(depth, joins)
        self.processes: Processes
        kept = replaces.kept if replaces and not replaces.processes.spoilt() else None
        self.state_kept = kept is not None
        self.kept: KeptState | None = kept or KeptState(len(ranks))
        if replaces and not kept:
            replaces.kept = None  # its memory is free before this group has its own
        images = replaces.images if replaces else None
        images = images if images and len(images.files) == len(ranks) else KeptImages(len(ranks))
        self.images: KeptImages | None = images
        self.processes = Processes(
            ranks, joins, step_timeout, silence, what, self.kept, images, self.slots, None, server
        )
        self.pids = [p.pid for p in self.processes.processes]
        weakref.finalize(self, self.processes.close)
        self.processes.segment.post(1)
        self._wait(1, LOAD_TIMEOUT)
        self.facts = list[RankFacts]()
        for rank, boards in enumerate(self.processes.results):
            facts = read_facts(boards[0].read())
            if isinstance(facts, str):
                self.close()
                raise DeviceError(f"rank {rank}: {facts}" if len(ranks) > 1 else facts)
            self.facts.append(facts)
        try:
            check_facts(self.facts, replaces.facts if replaces else None)
        except DeviceError:
            self.close()
            raise
        if not all(facts.state_in_file for facts in self.facts):
            self.kept, self.state_kept = None, False

    def post(self, request: Sequence[np.ndarray], number: int) -> None:
        self.processes.requests[number % self.slots].write(request)
        self.processes.segment.post(number + 1)

    def answered(self, number: int) -> bool:
        p = self.processes
        return p.closed or p.segment.aborted or all(p.segment.completed(r) > number for r in range(len(self.pids)))

    def check_alive(self) -> None:
        if self.processes.closed:
            raise DeviceLost(f"the {self.processes.what} is gone")

    def close(self) -> None:
        """Kill the processes, and release this group's K/V cache and packed weights. Returns None.

        Their memory is freed unless a group that replaces this one uses it already.
        """
        self.processes.close()
        self.kept = self.images = None

    def _wait(self, steps: int, timeout: float) -> None:
        """Wait until every rank has answered the first `steps` requests. Returns None.

        The first request is to load the Program. Raises DeviceLost after `timeout` seconds, and if a process ends.
        """
        p = self.processes
        if p.closed:
            raise DeviceLost(f"the {p.what} is gone")
        if not p.segment.wait_completed(steps, timeout):
            p.segment.abort(-1, "", f"no answer in {timeout:g} s")
        if p.segment.aborted:
            raise p.lost(p.segment.abort_reason())

    def replies(self, number: int) -> list[memoryview]:
        self._wait(number + 1, self.step_timeout)
        return [boards[number % self.slots].read() for boards in self.processes.results]
