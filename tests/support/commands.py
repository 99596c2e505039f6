"""parse_options(): parses a command line without running it. For tests of the commands that documents mention."""

from __future__ import annotations

import typer.core
import typer.main

import intaglio.cli
from intaglio.cli.group import Bench


def parse_options(words: list[str]) -> None:
    """Parse a command's words without running it. Raises a UsageError for an unknown command or option."""
    command = typer.main.get_command(intaglio.cli.app)
    while words and isinstance(command, typer.core.TyperGroup) and words[0] in command.commands:
        command, words = command.commands[words[0]], words[1:]
    if isinstance(command, Bench):  # `bench MODEL` is `bench model MODEL`
        command = command.commands["model"]
    assert not isinstance(command, typer.core.TyperGroup) or command.invoke_without_command, f"no command {words[0]}"
    command.make_context("intaglio", words)
