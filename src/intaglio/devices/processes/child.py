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
    """Raised if a rank could not switch to the new experts that were loaded for it.

    The error ends the process, because some of its layers may have switched and others not.
    """


class Rank:
    """The main loop of a rank's child process: run() loads the rank's job and runs the steps.

    Args:
        rank: number of the rank.
        joins: True if the rank's device takes part in collectives.
        timeout: seconds after which a collective is given up.
        files: file descriptors of the shared segment, of the pipe to the parent, of memory files for the K/V cache and
            for the packed weights, and of the boards (memory files that hold one message). The first board has the job.
            Of the other boards, the first half is for requests, the second half for results.
        sockets: {rank of another host: descriptor of the connection to it}.
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
        """Load the job, then run the steps that the parent requests, until the group is aborted. Returns None."""
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
        """Open the device and load the Program of this rank. Returns a tuple (executable, RankFacts).

        The RankFacts hold the properties that this rank reports to the parent.
        """
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
        """Run request `number` and write its answer to the board that the parent reads. Returns None.

        If this is the only process of the group, an error becomes the answer. In a group of several ranks, an error
        aborts the group and ends this process, because the other ranks would wait for this one forever. A SwitchError
        ends this process in both cases, because the weights are then not consistent.
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

        The answer to a step is its StepResult; only the last rank returns logits. The answer to a read of K/V blocks is
        their contents, the answer to a write has no contents. Requests about experts are answered by
        answer_about_experts().
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
    """Carry out a request about a model's experts.

    Returns the answer as a list of arrays, to be written as one message. The answer depends on `action`. For "loads" it
    is {name of a layer's experts op: the list of ExpertLoad.facts()}. For "load", which starts loading other experts,
    and for "loaded", which starts nothing, it is True if all experts are loaded, otherwise False. For "switch", which
    puts the loaded experts to use, it is True.

    If a DeviceError is raised, the error becomes the answer, because the ranks can continue with their present experts.
    Raises SwitchError if "switch" fails, because other layers and ranks may have switched already.

    Args:
        executable: the rank's executable.
        action: "loads", "load", "loaded" or "switch".
        layers: for "load", {name of a layer's experts op: for each rank, the numbers of its experts}.
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

    The parent's end is closed when the parent dies. Run this function in a separate thread.
    """
    os.read(pipe, 1)
    os._exit(0)


def run(argument: str, files: Sequence[int]) -> None:
    """Run a rank, then end this process. Does not return.

    Args:
        argument: a JSON list: the rank's number; whether it takes part in collectives; their timeout in seconds;
            numbers of the CPU cores that it may use ([]: all); numbers of the ranks on other hosts.
        files: the file descriptors that the class Rank takes, then those of the connections to the ranks on other
            hosts.
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
    """Run a rank in a process that was started for it, then end the process. Does not return.

    The command line has the two arguments of run(): the JSON text, and the file descriptors separated by commas.
    """
    argument, files = sys.argv[1:]
    run(argument, [int(f) for f in files.split(",")])
