"""Programs: the table of tensors and ops, its text form, its rules, and the builder that ports write with."""

from intaglio.program.builder import Builder
from intaglio.program.mesh import verify_mesh
from intaglio.program.program import INPUTS, Program, ProgramError, load, save
from intaglio.program.text import parse_program, print_program
from intaglio.program.verify import verify

__all__ = [
    "INPUTS", "Builder", "Program", "ProgramError", "load", "parse_program", "print_program", "save", "verify",
    "verify_mesh",
]  # fmt: skip
