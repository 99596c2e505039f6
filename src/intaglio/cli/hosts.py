"""`intaglio agent` and `intaglio launch`: the ranks of a model on several hosts."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from intaglio.cli.load import HOSTS

PORT = 29500
TokenFile = Annotated[
    Path | None, typer.Option(help="File with 16 or more random bytes, the same on all hosts. Needed beyond loopback.")
]


def read_token(file: Path | None) -> bytes | None:
    """Returns the token in a file, as bytes without white space around it; None if `file` is None.

    Raises ValueError if it has fewer than 16 bytes, OSError if the file cannot be read.
    """
    if file is None:
        return None
    token = file.read_bytes().strip()
    if len(token) < 16:
        raise ValueError(f"{file} holds {len(token)} bytes; put 16 or more random ones there: openssl rand -hex 32")
    return token


def read_address(text: str) -> tuple[str, int]:
    """Returns (host, port) of a text HOST:PORT. Raises ValueError for any other text."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"--rendezvous {text}: wanted HOST:PORT, such as 10.0.0.1:{PORT}")
    return host.strip("[]"), int(port)


def agent(
    rendezvous: Annotated[str, typer.Option(help="HOST:PORT where `intaglio launch` waits.")],
    token_file: TokenFile = None,
    once: Annotated[bool, typer.Option("--once", help="End when the launcher is gone, instead of waiting.")] = False,
) -> None:
    """Run this host's ranks for an `intaglio launch` that was started on another host.

    It runs until it is stopped, and serves one launch after another; with --once it ends with the first.
    """
    from intaglio.devices.processes.agent import Agent

    Agent(read_address(rendezvous), read_token(token_file)).serve(once)


def launch(
    context: typer.Context,
    hosts: Annotated[
        str, typer.Option(help="Hosts on which to start agents over SSH, with commas; or how many agents you start.")
    ],
    rendezvous: Annotated[str, typer.Option(help="HOST:PORT of this host, where the agents connect.")],
    token_file: TokenFile = None,
) -> None:
    """Run another command, such as serve MODEL --layout tp2pp2, with its ranks on several hosts."""
    from intaglio.devices import HostsDevice
    from intaglio.devices.processes.hosts import Rendezvous

    if not context.args:
        raise ValueError("there is no command to launch: add one, such as serve MODEL --layout tp2")
    host, port = read_address(rendezvous)
    names = [] if hosts.isdigit() else [name for name in hosts.split(",") if name]
    count = int(hosts) if hosts.isdigit() else len(names)
    meeting = Rendezvous(host, port, read_token(token_file))
    where = f"{host}:{meeting.address[1]}"
    agents = [subprocess.Popen(agent_command(name, where, token_file), stdin=subprocess.DEVNULL) for name in names]
    try:
        HOSTS.set(HostsDevice(meeting, count))
        context.find_root().command.main(context.args, standalone_mode=False)
    finally:
        meeting.close()
        for process in agents:
            process.terminate()


def agent_command(name: str, rendezvous: str, token_file: Path | None) -> list[str]:
    """Returns the command that starts an agent on the host `name`, as a list of words.

    The command goes over SSH, except for localhost. rendezvous: HOST:PORT to which the agent connects. token_file: path
    of the file with the token, the same on every host; None: no token.
    """
    options = ["agent", "--rendezvous", rendezvous, "--once"]
    options += [] if token_file is None else ["--token-file", str(token_file.absolute())]
    if name in ("localhost", "127.0.0.1"):
        return [sys.executable, "-m", "intaglio", *options]
    return ["ssh", "-o", "BatchMode=yes", name, shlex.join(["intaglio", *options])]
