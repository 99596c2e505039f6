"""Programs: ops over a table of tensors, their text form and verifier, and the builder that ports write them with."""

from intaglio.program.builder import Builder
from intaglio.program.expert_placement import ExpertPlacement, PlacementError
from intaglio.program.file import load, save
from intaglio.program.mesh import MeshProgram, verify_mesh
from intaglio.program.parse import parse_program
from intaglio.program.program import INPUTS, Program, ProgramError
from intaglio.program.verify import verify

__all__ = [
    "INPUTS", "Builder", "ExpertPlacement", "MeshProgram", "PlacementError", "Program", "ProgramError", "load",
    "parse_program", "save", "verify", "verify_mesh",
]  # fmt: skip
