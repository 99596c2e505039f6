"""Control channels over TCP: both ends prove that they know the token; addresses, idle connections, retries."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.served import TEST_TIMEOUT_S
from typer.testing import CliRunner

from intaglio.cli import app
from intaglio.cluster.link import Link
from intaglio.devices.processes.address import TcpAddress
from intaglio.server import control_tcp
from intaglio.server.control_tcp import NotAuthenticated, tcp_server


def listening(use: Callable[[TcpAddress, list[str]], Awaitable[None]]) -> None:
    """Run `use` with the address of a server that answers each frame with one byte, and the refusals it has noted."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(100):
            writer.write(b"!")
        writer.close()

    async def main() -> None:
        refused: list[str] = []
        given = TcpAddress("127.0.0.1", 0, secrets.token_bytes(16))
        async with tcp_server(given, connected, refused.append) as address:
            await use(address, refused)

    asyncio.run(main())


def test_who_knows_the_token_is_connected_and_nobody_else() -> None:
    async def use(address: TcpAddress, refused: list[str]) -> None:
        reader, writer = await control_tcp.connect(address)
        writer.write(b"x")
        assert await reader.readexactly(1) == b"!"
        writer.close()
        assert not refused
        with pytest.raises(NotAuthenticated, match="another token"):
            await control_tcp.connect(TcpAddress(address.host, address.port, secrets.token_bytes(16)))
        assert "does not know the token" in refused[0]

    listening(use)


def test_what_is_not_an_introduction_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(address: TcpAddress, refused: list[str]) -> None:
        for sent in (secrets.token_bytes(200), b"GET / HTTP/1.1\r\n\r\n", b""):  # the last two: too short, and in time
            reader, writer = await asyncio.open_connection(address.host, address.port)
            assert len(await reader.readexactly(control_tcp.NONCE)) == control_tcp.NONCE
            writer.write(sent)
            with suppress(ConnectionError):
                assert await reader.read(1) == b""  # closed, without an answer
            writer.close()
        assert len(refused) == 3

    monkeypatch.setattr(control_tcp, "TIMEOUT", 0.1)
    listening(use)


def test_idle_connections_keep_nobody_out() -> None:
    async def use(address: TcpAddress, refused: list[str]) -> None:
        idle = []
        for _ in range(control_tcp.GREETING_MAX):
            idle.append(await asyncio.open_connection(address.host, address.port))
            await idle[-1][0].readexactly(control_tcp.NONCE)  # so that it is counted
        reader, writer = await control_tcp.connect(address)
        writer.write(b"x")
        assert await reader.readexactly(1) == b"!"
        with suppress(ConnectionError):
            assert await idle[0][0].read(1) == b""  # the oldest had to go
        for _, one in [*idle, (reader, writer)]:
            one.close()

    listening(use)


def test_a_link_is_tried_again_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    connect, failures = control_tcp.connect, 3

    async def failing(address: TcpAddress) -> Any:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise NotAuthenticated("planted")
        return await connect(address)

    async def use(address: TcpAddress, refused: list[str]) -> None:
        nonlocal failures
        await (await Link.connect(address, TEST_TIMEOUT_S)).close()
        failures = 1
        with pytest.raises(NotAuthenticated, match="planted"):
            await Link.connect(address)

    monkeypatch.setattr(control_tcp, "connect", failing)
    monkeypatch.setattr("intaglio.cluster.link.RETRY", 0.0)
    listening(use)


def test_a_server_that_does_not_know_the_token_is_given_nothing() -> None:
    async def main() -> None:
        async def pretend(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(bytes(control_tcp.NONCE))
            await reader.readexactly(len(control_tcp.MAGIC) + control_tcp.NONCE + control_tcp.PROOF)
            writer.write(bytes(control_tcp.PROOF))

        async with await asyncio.start_server(pretend, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            with pytest.raises(NotAuthenticated, match="does not know the token"):
                await Link.connect(TcpAddress("127.0.0.1", port, secrets.token_bytes(16)))

    asyncio.run(main())


def test_a_replica_answers_over_tcp(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from intaglio.server.control import control_channel

    async def report(*_: Any) -> dict[str, Any]:
        return {"running": 3}

    async def main() -> None:
        service: Any = SimpleNamespace(models={"a": None}, options=SimpleNamespace(step_timeout=1.0))
        application: Any = None
        token = secrets.token_hex(16)
        async with control_channel(application, service, TcpAddress("127.0.0.1", 0, token.encode())):
            found = next(r.getMessage() for r in caplog.records if "control channel at" in r.getMessage())
            link = await Link.connect(TcpAddress.parse(found.rsplit(" ", 1)[1], token))
            load = await link.ask({"do": "load", "incarnation": None, "after": -1}, TEST_TIMEOUT_S)
            assert load["running"] == 3
            await link.close()

    monkeypatch.setattr("intaglio.server.control.load_report", report)
    with caplog.at_level("INFO"):
        asyncio.run(main())


@pytest.mark.parametrize("text", ["tcp://", "tcp://host", "tcp://:80", "tcp://host:x", "tcp://host:70000", "host:80"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="write tcp://HOST:PORT"):
        TcpAddress.parse(text, "x" * 16)


def test_addresses_are_read_and_written() -> None:
    for text in ("tcp://10.0.0.5:8001", "tcp://[::1]:0", "tcp://a.host:65535"):
        assert str(TcpAddress.parse(text, "x" * 16)) == text
    with pytest.raises(ValueError, match="16 or more"):
        TcpAddress.parse("tcp://a:1", "short")


def test_serve_refuses_an_address_without_a_token_and_a_folder_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(control_tcp.TOKEN_VARIABLE, raising=False)
    for control, why in (
        ("tcp://127.0.0.1:0", "set INTAGLIO_CONTROL_TOKEN"),
        (str(tmp_path / "nothing" / "s"), "there is no folder"),
    ):
        result = CliRunner().invoke(app, ["serve", "/no/such/model", "--control", control])
        assert result.exit_code != 0 and why in str(result.exception) + result.output
