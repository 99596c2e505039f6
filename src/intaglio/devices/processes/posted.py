"""PostedExecutable: base class of the executables whose steps run in other processes (group.py, hosts.py).

To post a request is to send it without waiting for its result. Results arrive in the order in which requests were sent.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np

from intaglio.devices.device import (
    CompletedStep,
    DeviceError,
    Executable,
    PendingStep,
    StepRequest,
    StepResult,
    check_batch,
    check_blocks,
    merge_ranks,
)
from intaglio.devices.expert_load import ExpertLoad, merge_loads
from intaglio.devices.processes.job import RankFacts
from intaglio.devices.processes.messages import (
    blocks_parts,
    experts_parts,
    read_contents,
    read_result,
    read_value,
    request_parts,
)
from intaglio.program import Program
from intaglio.program.expert_placement import Ranks

MESSAGE_BYTES = 16 << 20  # of K/V blocks in one message
SLOTS = 4  # one more than the steps that may be under way; a longer pipeline has more


@dataclass
class PostedStep:
    """A step that runs in other processes. It implements the interface PendingStep.

    Attributes:
        executable: the executable that sent the request. It receives results in the order of the requests.
        number: number of the request.
        completed: a CompletedStep with the result or the error; None until the result has been received.
    """

    executable: PostedExecutable
    number: int
    completed: CompletedStep | None = None

    def done(self) -> bool:
        """True if the step has ended, so that result() does not wait for it."""
        return self.completed is not None or self.executable.answered(self.number)

    def result(self) -> StepResult:
        """Wait for the step to end and return its StepResult, or raise the error that ended it."""
        self.executable.receive_until(self)
        assert self.completed
        return self.completed.result()


class PostedExecutable(Executable):
    """Base class of executables that send ("post") requests to ranks in other processes and receive their results.

    Requests are numbered in the order in which they are sent. Request 0 loads the Program. Every other request runs a
    step, moves K/V blocks, or concerns the placement of experts.

    Args:
        depth: number of pipeline stages.
        checks: True to check each step's batch in this process before it is sent, because an error on only one rank
            would end the whole group.
    """

    facts: list[RankFacts]
    programs: Sequence[Program]  # of all ranks

    def __init__(self, depth: int, checks: bool) -> None:
        self.depth, self.checks = depth, checks
        self.slots = max(SLOTS, depth + 1)
        self.pending: deque[PostedStep] = deque()  # posted, not received
        self.posted = 1

    @abstractmethod
    def post(self, request: Sequence[np.ndarray], number: int) -> None:
        """Send request `number`, a list of arrays, to all ranks without waiting for the results. Returns None."""

    @abstractmethod
    def answered(self, number: int) -> bool:
        """True if all ranks have answered request `number`, or if the group has ended and no more answers will come."""

    @abstractmethod
    def replies(self, number: int) -> list[memoryview]:
        """Wait until all ranks have answered request `number`. Returns a list of their answers in order of rank.

        An answer is a message as a memoryview. It may say that the request failed on its rank. Raises DeviceLost if the
        group ends before all ranks have answered.
        """

    @abstractmethod
    def check_alive(self) -> None:
        """Raise DeviceLost if the group of ranks has ended. Returns None."""

    def launch(self, request: StepRequest) -> PendingStep:
        """Send a step to all ranks and return it as a PendingStep, without waiting for its end.

        PendingStep.result() raises DeviceError for a batch that does not fit, and DeviceLost if the group has ended.
        """
        try:
            if self.checks:
                check_batch(self.program, self.state, request.batch)
                check_sampling(self.program.vocabulary, request)
            self.check_alive()
            while len(self.pending) >= self.slots - 1:  # its slot holds a result that nobody has read
                self.receive_until(self.pending[0])
            step = PostedStep(self, self.posted)
            self.post(request_parts(replace(request, taps=tuple(request.taps))), self.posted)
        except Exception as e:
            return CompletedStep(e)
        self.pending.append(step)
        self.posted += 1
        return step

    @property
    def block_parts(self) -> tuple[int, ...]:
        parts = [facts.block_parts for facts in self.facts]
        return tuple(chain(*parts)) if all(parts) else ()

    def read_blocks(self, blocks: Sequence[int]) -> np.ndarray:
        if not self.block_bytes:
            return super().read_blocks(blocks)
        check_blocks(self.state, self.block_bytes, blocks)
        each = max(1, MESSAGE_BYTES // self.block_bytes)
        runs = [self._move(blocks_parts(blocks[i : i + each])) for i in range(0, len(blocks), each)]
        found = [np.concatenate(ranks, axis=1) for ranks in runs]
        return np.concatenate(found) if found else np.empty((0, self.block_bytes), np.uint8)

    def write_blocks(self, blocks: Sequence[int], contents: np.ndarray) -> None:
        if not self.block_bytes:
            return super().write_blocks(blocks, contents)
        check_blocks(self.state, self.block_bytes, blocks, contents)
        sizes, each = [sum(facts.block_parts) for facts in self.facts], max(1, MESSAGE_BYTES // self.block_bytes)
        for i in range(0, len(blocks), each):
            self._move(blocks_parts(blocks[i : i + each], contents[i : i + each], sizes))

    def _move(self, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Wait until all steps have ended, then let all ranks read or write K/V blocks.

        Returns a list with one array per rank: uint8 [blocks, bytes] for a read, [0, 0] for a write. `parts` is the
        request, made by blocks_parts(). Raises DeviceError if a rank fails, and DeviceLost if the group has ended.
        """
        found = [read_contents(message) for message in self._ask(parts)]
        for contents in found:
            if isinstance(contents, str):
                raise DeviceError(contents)
        return [contents for contents in found if isinstance(contents, np.ndarray)]

    def _ask(self, parts: Sequence[np.ndarray]) -> list[memoryview]:
        """Wait until all steps have ended, then send a request that is no step. Returns a list of the ranks' answers.

        An answer is a message as a memoryview. `parts` is the request as a list of arrays. Raises DeviceLost if the
        group ends.
        """
        while self.pending:
            self.receive_until(self.pending[0])
        self.check_alive()
        number, self.posted = self.posted, self.posted + 1
        self.post(parts, number)
        return self.replies(number)

    def _ask_about_experts(self, action: str, layers: Mapping[str, Ranks] | None = None) -> list[Any]:
        """Send a request about experts to all ranks. Returns a list of their answers, in order of rank.

        For "loads", an answer is {name of a layer's experts op: the list of ExpertLoad.facts()}. For "load" and
        "loaded" it is True if the rank has loaded all its experts, otherwise False. For "switch" it is True. Raises
        DeviceError if a rank fails.

        Args:
            action: "loads", "load", "loaded" or "switch", see experts_parts().
            layers: for "load", {name of a layer's experts op: for each rank, the numbers of its experts}; None for
                other actions.
        """
        found = [read_value(message) for message in self._ask(experts_parts(action, layers))]
        for error, _ in found:
            if error:
                raise DeviceError(error)
        return [value for _, value in found]

    def has_experts(self) -> bool:
        return any(op.kind == "experts" for program in self.programs for op in program.ops)

    def expert_loads(self) -> dict[str, ExpertLoad]:
        found = self._ask_about_experts("loads")
        return merge_loads([{site: ExpertLoad.of_facts(facts) for site, facts in one.items()} for one in found])

    def load_experts(self, layers: Mapping[str, Ranks]) -> None:
        self._ask_about_experts("load", layers)

    def experts_loaded(self) -> bool:
        return all(self._ask_about_experts("loaded"))

    def switch_experts(self) -> None:
        self._ask_about_experts("switch")

    def receive_until(self, step: PostedStep) -> None:
        """Wait for the results of `step` and of all steps that were sent before it. Returns None.

        The result or error of each step is stored in the step's attribute `completed`.
        """
        while step.completed is None:
            first = self.pending.popleft()
            try:
                answers = self.replies(first.number)
                first.completed = CompletedStep(merged([read_result(message) for message in answers]))
            except Exception as e:
                first.completed = CompletedStep(e)


def merged(results: Sequence[StepResult | str]) -> StepResult:
    """Merge the results of all ranks into one StepResult, with merge_ranks(). A single result is returned unchanged.

    If a rank failed, its item in `results` is the error's text. The first such text is raised as a DeviceError.
    """
    for result in results:
        if isinstance(result, str):
            raise DeviceError(result)
    done = [result for result in results if isinstance(result, StepResult)]
    return done[0] if len(done) == 1 else merge_ranks(done)


def check_sampling(vocabulary: int, request: StepRequest) -> None:
    """Raise DeviceError if logit edits or grammar masks of the request do not fit the vocabulary. Returns None."""
    words = -(-vocabulary // 32)
    for s in request.batch.sampling:
        if s.mask is not None and (s.mask.shape != (words,) or s.mask.dtype.name != "uint32"):
            raise DeviceError(f"a mask is {s.mask.dtype} {list(s.mask.shape)}; the vocabulary takes uint32 [{words}]")
        if s.edits is not None and len(s.edits.ids) and not 0 <= s.edits.ids.min() <= s.edits.ids.max() < vocabulary:
            raise DeviceError(f"edits touch ids {s.edits.ids.min()}..{s.edits.ids.max()}, outside 0..{vocabulary - 1}")
