"""Job: the message with what a child process is to load: Programs as text, device and weights as recipes or arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

import ml_dtypes  # noqa: F401 (names of number formats for np.dtype)
import numpy as np

from intaglio.devices.device import Device, DeviceError, ReplacementRefused, StateSpec, Weights
from intaglio.devices.processes.messages import NONE, Reader, read_result, text
from intaglio.devices.recipe import HasRecipe, Recipe, make
from intaglio.devices.weights import ArrayWeights
from intaglio.formats import Quantised
from intaglio.ops import Value
from intaglio.program import MeshProgram, Program, parse_program


@dataclass(frozen=True)
class Job:
    """A description of what a child process must load: a device, Programs, weights and the size of the state.

    Attributes:
        device: Recipe of the device: (name of a function, its arguments).
        programs: the Program of one rank, or the Programs of all ranks of a mesh.
        layout: how the model is sharded, such as tp4; "" for a single Program.
        weights: source of the weights.
        state: size of the K/V cache and of recurrent state.
    """

    device: Recipe
    programs: tuple[Program, ...]
    layout: str
    weights: Weights
    state: StateSpec

    def parts(self) -> list[np.ndarray]:
        """Return this job as a list of arrays, to be written as one message. The child reads it with read_job().

        The message contains the weights as arrays if they are an ArrayWeights. Otherwise it contains a Recipe, (name of
        a function, its arguments), with which the child opens the weights. Raises DeviceError for weights that have no
        Recipe.
        """
        arrays: list[np.ndarray] = []
        held: object
        if isinstance(self.weights, ArrayWeights):
            held = {name: _described(value, arrays) for name, value in self.weights.arrays.items()}
        elif isinstance(self.weights, HasRecipe):
            held = list(self.weights.recipe())
        else:
            raise DeviceError(f"weights of type {type(self.weights).__name__} have no recipe() for another process")
        content = text({
            "device": list(self.device), "programs": [p.text() for p in self.programs], "layout": self.layout,
            "weights": held, "state": list(astuple(self.state)),
        })  # fmt: skip
        return [np.array([len(content)], np.int64), content, *(arrays or [NONE])]

    def modules(self) -> list[str]:
        """Return the names of the modules that the child imports to make its device and weights, as a list of str.

        A fork server imports these modules beforehand, so that a new child starts at once.
        """
        recipes = [self.device, *([self.weights.recipe()] if isinstance(self.weights, HasRecipe) else [])]
        return [where.partition(":")[0] for where, _ in recipes]


@dataclass(frozen=True)
class RankFacts:
    """Properties that a rank reports after it has loaded its job.

    Attributes:
        isa: name of the instruction set, on which the bits of results depend; "" if the device has none.
        program: hash of the rank's Program.
        state_in_file: True if the whole K/V cache is in the memory file that the parent keeps.
        block_parts: size in bytes of one K/V block in each K/V cache of this rank; () if blocks cannot be read or
            written.
    """

    isa: str
    program: str
    state_in_file: bool = False
    block_parts: tuple[int, ...] = ()

    def parts(self) -> list[np.ndarray]:
        """Return this object as a list of arrays, to be written as one message. read_facts() reads the message."""
        content = text([self.isa, self.program, self.state_in_file, self.block_parts])
        return [np.array([0, len(content)], np.int64), content]


def read_facts(message: memoryview) -> RankFacts | str:
    """Read a rank's answer after loading its job. Returns its RankFacts, or the error's text if loading failed."""
    r = Reader(message)
    failed, size = r.array(np.int64, 2).tolist()
    if failed:
        return str(read_result(message))
    content: Any = r.text(size)
    return RankFacts(content[0], content[1], content[2], tuple(content[3]))


def check_facts(ranks: Sequence[RankFacts], earlier: Sequence[RankFacts] | None) -> None:
    """Raise an error if the results of a group of ranks would not be bitwise reproducible. Returns None.

    Raises DeviceError if the ranks have different instruction sets. Raises ReplacementRefused if the number of ranks,
    an instruction set or a Program differs from the group that this one replaces.

    Args:
        ranks: what each rank has reported.
        earlier: what each rank of the replaced group had reported; None if no group is replaced.
    """
    for rank, facts in enumerate(ranks):
        if facts.isa != ranks[0].isa:
            raise DeviceError(
                f"rank {rank} runs instruction set {facts.isa}, rank 0 {ranks[0].isa}; results would depend on the "
                "rank: give all the same by INTAGLIO_ISA"
            )
    if earlier is None:
        return
    if len(ranks) != len(earlier):
        raise ReplacementRefused(f"{len(ranks)} ranks are to replace {len(earlier)}; streams would go on differently")
    for rank, (now, then) in enumerate(zip(ranks, earlier, strict=True)):
        if now.isa != then.isa:
            raise ReplacementRefused(
                f"the replacement of rank {rank} runs instruction set {now.isa}, the group had {then.isa}: streams "
                f"would go on with other bits; start it with INTAGLIO_ISA={then.isa}, or all anew"
            )
        if now.program != then.program:
            raise ReplacementRefused(f"the replacement of rank {rank} has another Program: another layout or model")


@dataclass(frozen=True)
class OpenJob:
    """A child process's job, after its device and its weights have been opened.

    Attributes:
        device: the open device.
        program: the Program to load; a MeshProgram for all ranks of a mesh.
        weights: the open source of weights.
        state: size of the K/V cache and of recurrent state.
    """

    device: Device
    program: Program | MeshProgram
    weights: Weights
    state: StateSpec


def read_job(message: memoryview, **options: object) -> OpenJob:
    """Read a Job from a message, and open its device and its weights. Returns an OpenJob.

    `options` are further arguments for the device. Raises ProgramError if the text of a Program is invalid, and the
    errors of the functions that make the device and the weights.
    """
    r = Reader(message)
    content: Any = r.text(int(r.array(np.int64, 1)[0]))
    programs = tuple(parse_program(p) for p in content["programs"])
    weights = content["weights"]
    opened: Any = make(tuple(weights)) if isinstance(weights, list) else ArrayWeights(
        {name: _value(r, facts) for name, facts in weights.items()}
    )  # fmt: skip
    where, arguments = content["device"]
    device = make((where, {**arguments, **options}))
    assert isinstance(device, Device)
    program = programs[0] if len(programs) == 1 else MeshProgram(programs, content["layout"])
    return OpenJob(device, program, opened, StateSpec(*content["state"]))


def _described(value: Value, arrays: list[np.ndarray]) -> object:
    """Return a description of the weight `value` for JSON, and append its arrays to the list `arrays`.

    An array is described as [type, shape]. A quantised matrix is described as a dict {field: value}, whose array fields
    are described in the same way.
    """
    if isinstance(value, np.ndarray):
        arrays.append(value)
        return [value.dtype.name, value.shape]
    given = {f.name: getattr(value, f.name) for f in fields(value)}
    return {name: _described(x, arrays) if isinstance(x, np.ndarray) else x for name, x in given.items()}


def _value(r: Reader, facts: Any) -> Value:
    if isinstance(facts, list):
        name, shape = facts
        return r.array(np.dtype(name), int(np.prod(shape))).reshape(shape)
    held: dict[str, Any] = {name: _value(r, x) if isinstance(x, list) else x for name, x in facts.items()}
    return Quantised(**held)
