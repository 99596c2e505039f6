"""Main loop of a rank's child process: load the job, then run each step that the parent posts.

The process ends when its parent does, which closes the other end of a pipe.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from intaglio import _native
from intaglio.devices.device import DeviceError, Executable
from intaglio.devices.processes.board import Board
from intaglio.devices.processes.job import RankFacts, read_job
from intaglio.devices.processes.messages import (
    RequestReader,
    contents_parts,
    error_parts,
    read_blocks_request,
    read_experts_request,
    result_parts,
    value_parts,
)
from intaglio.plugins import load_plugins
from intaglio.program.expert_placement import Ranks

BEAT = 0.05  # seconds between two signs of life
POST_WAIT = 3600.0  # seconds; then it waits again


class SwitchError(DeviceError):
    """Raised if a rank could not switch from its present experts to those that were loaded for it.

    The error ends the process, since some of its layers may have switched and others not.
    """


class Rank:
    """The rank that a child process runs: run() loads its job and runs the steps.

    Args:
        rank: number of the rank.
        joins: True if the rank's device takes part in collectives.
        timeout: seconds that a collective may take.
        files: descriptors of the shared segment, the pipe to the parent, the K/V cache, the packed weights, and the
            boards. A board is a memory file that holds one message. The first board is for the job; half of the others
            are for requests, and the last half for their results.
        sockets: descriptors of connections to ranks of other hosts, by rank.
    """

    def __init__(
        self, rank: int, joins: bool, timeout: float, files: Sequence[int], sockets: Mapping[int, int]
    ) -> None:
        segment, pipe, self.state_file, self.image_file, job, *boards = files
        self.rank, self.joins, self.timeout, self.sockets = rank, joins, timeout, dict(sockets)
        self.segment = _native.Segment(segment)
        self.alone = self.segment.ranks == 1
        self.job = Board(job)
        slots = len(boards) // 2
        self.requests, self.results = [Board(f) for f in boards[:slots]], [Board(f) for f in boards[slots:]]
        self.heartbeat = _native.Heartbeat(self.segment, rank, BEAT)
        threading.Thread(target=end_with, args=(pipe,), daemon=True).start()

    def run(self) -> None:
        """Load the job, then run posted steps until the group is aborted. Returns nothing."""
        try:
            executable, facts = self.load()
        except Exception as e:  # whatever loading can raise is an answer
            self.results[0].write(error_parts(e))
            self.segment.complete(self.rank, 1)
            threading.Event().wait()  # until the parent has read it and ends this process
            return
        self.results[0].write(facts.parts())
        self.segment.complete(self.rank, 1)
        reader, done = RequestReader(), 1
        while True:
            if not self.segment.wait_posted(self.rank, done, POST_WAIT):
                continue
            if self.segment.aborted:
                return
            self.step(executable, reader, done)
            done += 1
            self.segment.complete(self.rank, done)

    def load(self) -> tuple[Executable, RankFacts]:
        """Open the device and load the Program of this rank. Returns (executable, RankFacts for the parent)."""
        options: dict[str, object] = {}
        if self.joins:
            communicator = _native.Communicator(self.segment, self.rank, self.sockets)
            communicator.timeout = self.timeout
            if self.sockets:  # every host has as many ranks as this one
                communicator.ranks_per_host = self.segment.ranks - len(self.sockets)
            options |= {"communicator": communicator, "state_file": self.state_file, "image_file": self.image_file}
        load_plugins()
        job = read_job(self.job.read(), **options)
        executable = job.device.load(job.program, job.weights, job.state)
        in_file = getattr(executable, "state_in_file", False)
        os.close(self.state_file)
        os.close(self.image_file)
        return executable, RankFacts(
            job.device.facts().isa or "", executable.program.hash, in_file, executable.block_parts
        )

    def step(self, executable: Executable, reader: RequestReader, number: int) -> None:
        """Run request `number` and write its answer where the parent reads it. Returns nothing.

        If this is the only process, an error becomes the answer. In a group of several ranks an error aborts the group
        and ends this process, because the other ranks would wait for this one forever. A SwitchError (a failed exchange
        of experts, after which the weights are not consistent) ends this process in both cases.
        """
        slot = number % len(self.requests)
        try:
            parts = self.answer(executable, reader, self.requests[slot].read())
        except Exception as e:  # whatever a device can raise
            if not self.alone or isinstance(e, SwitchError):
                if not isinstance(e, _native.CommunicatorError):
                    self.segment.abort(self.rank, "", f"{type(e).__name__}: {e}")
                os._exit(1)
            parts = error_parts(e)
        self.results[slot].write(parts)

    def answer(self, executable: Executable, reader: RequestReader, message: memoryview) -> list[np.ndarray]:
        """Carry out a request from the parent. Returns the answer as a list of arrays, to be written as one message.

        A step's answer is its StepResult, with logits only from the last rank. A read of K/V blocks answers with their
        contents, a write with none. A request about experts answers as answer_about_experts() says.
        """
        if asked := read_experts_request(message):
            return answer_about_experts(executable, *asked)
        if moved := read_blocks_request(message, self.rank):
            if moved.contents is None:
                return contents_parts(executable.read_blocks(moved.blocks))
            executable.write_blocks(moved.blocks, moved.contents)
            return contents_parts(None)
        request, last = reader.read(message), self.rank == self.segment.ranks - 1
        return result_parts(executable.step(request if last else replace(request, logits=False)))


def answer_about_experts(executable: Executable, action: str, layers: Mapping[str, Ranks]) -> list[np.ndarray]:
    """Carry out a request about a model's experts. Returns the answer: a list of arrays, to be written as one message.

    Args:
        executable: the rank's executable.
        action: "loads": count of tokens by expert, as {site: ExpertLoad.facts()}. "load": start to load other experts.
            "loaded": only ask whether they are loaded; "load" and "loaded" answer True or False. "switch": use them;
            answers True.
        layers: for "load", the experts of each rank, by site (name of the layer's op).

    A DeviceError becomes the answer, since the ranks can go on with the experts that they have. Raises SwitchError if
    "switch" fails, since other layers and ranks may have switched.
    """
    if action == "switch":
        try:
            executable.switch_experts()
        except Exception as e:  # whatever a device can raise
            raise SwitchError(f"experts could not be switched: {type(e).__name__}: {e}") from e
        return value_parts(True)
    try:
        if action == "loads":
            return value_parts({site: load.facts() for site, load in executable.expert_loads().items()})
        if action == "load":
            executable.load_experts(layers)
        return value_parts(executable.experts_loaded())
    except DeviceError as e:
        return error_parts(e)


def end_with(pipe: int) -> None:
    """Wait until the parent's end of `pipe` is closed, then end this process at once. Does not return.

    The parent's end closes when the parent dies. Runs in a thread of its own.
    """
    os.read(pipe, 1)
    os._exit(0)


def run(argument: str, files: Sequence[int]) -> None:
    """Run a rank, and end this process. Does not return.

    argument: a JSON list of the rank's number, whether it takes part in collectives, their timeout in seconds, the core
    numbers it may use ([]: all) and the ranks of other hosts. files: the descriptors that the class Rank takes, then
    those of the connections to ranks of other hosts.
    """
    rank, joins, timeout, cores, peers = json.loads(argument)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # it ends with its parent, which may still have streams to finish
    if cores:
        os.sched_setaffinity(0, cores)
    own = len(files) - len(peers)
    Rank(rank, joins, timeout, files[:own], dict(zip(peers, files[own:], strict=True))).run()
    os._exit(0)  # without the destructors, which would wait for threads


def main() -> None:
    """Run a rank in a process that was started for it. Does not return.

    The command line has the two arguments of run(): the first as it is, and the numbers of the file descriptors
    separated by commas.
    """
    argument, files = sys.argv[1:]
    run(argument, [int(f) for f in files.split(",")])
