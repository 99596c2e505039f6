"""Command groups: turn errors into one line and an exit code."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from intaglio.cli.progress import interrupted
from intaglio.devices import DeviceError

UsageError: Any = typer.BadParameter.__base__  # of click, or of the copy of click in newer versions of typer


class Group(TyperGroup):
    """Command group that prints a user's error as one line on stderr, instead of a traceback, and exits with code 2.

    A user's error is a ValueError, DeviceError or OSError, or a wrong option or argument. With --debug, the three
    exceptions are raised instead. Ctrl-C exits with code 130, a closed pipe with 141.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the options that precede the name of the command. Returns the remaining words, as a list.

        A wrong option is printed as one line, and raises typer.Exit with code 2.
        """
        try:
            return super().parse_args(ctx, args)
        except UsageError as e:
            raise _refused(e, ctx) from None

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            interrupted()
            raise typer.Exit(130) from None
        except BrokenPipeError:
            raise typer.Exit(141) from None  # __main__ takes care of what stdout still holds
        except UsageError as e:
            raise _refused(e, ctx) from None
        except (ValueError, DeviceError, OSError) as e:
            if ctx.params.get("debug"):
                raise
            typer.echo(f"error: {_text(e)}", err=True)
            raise typer.Exit(2) from None


def _refused(error: Any, ctx: Any) -> Exception:
    """Print a UsageError as one line that also names the help to read. Returns typer.Exit, for the caller to raise.

    If the user gave no arguments to a command that then shows its help (NoArgsIsHelpError), nothing is printed, and
    `error` itself is returned. ctx: the command group's context, used if `error` has no context.
    """
    if type(error).__name__ == "NoArgsIsHelpError":
        return error
    command = (error.ctx or ctx).command_path.removeprefix("python -m ")
    typer.echo(f"error: {' '.join(error.format_message().split()).rstrip('.')}; see {command} --help", err=True)
    return typer.Exit(2)


def _text(error: Exception) -> str:
    """Returns the message of an error as text.

    For a failed file operation, the message is the path and the reason, without the error number.
    """
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


class Bench(TyperGroup):
    """Command group of `bench`. `bench MODEL` means `bench model MODEL`: measure the model itself, without a server."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert the command `model` if the arguments begin with neither a command nor --help, then parse them.

        Returns a list of the arguments left for the command.
        """
        named = args[:1] == ["--help"] or (args and args[0] in self.commands)
        return super().parse_args(ctx, args if named else ["model", *args])
