"""Control channels over TCP, for a router on another host. Both ends prove that they know a token.

The proof is that of connections between ranks (see devices/processes/connections.py): HMAC-SHA256 over each other's
random numbers; the token itself does not travel. What travels afterwards is neither encrypted nor signed: use a
network of your own, or a tunnel.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from intaglio.devices.processes.address import TcpAddress
from intaglio.devices.processes.connections import PROOF, TIMEOUT, listen, proof

TOKEN_VARIABLE = "INTAGLIO_CONTROL_TOKEN"  # environment variable with the token of --control tcp://HOST:PORT
MAGIC = b"intaglio control 1"
NONCE = 32  # bytes
GREETING_MAX = 32  # connections that may introduce themselves at a time; one more ends the oldest of them
Connected = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class NotAuthenticated(ConnectionError):
    """Raised if the other end of a connection does not know the token, has another version, or does not answer."""


async def connect(address: TcpAddress) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to a control channel and authenticate both ends with the token. Returns (reader, writer).

    Raises NotAuthenticated if the other end does not answer in time or does not know the token. Raises OSError if
    nothing listens at the address.
    """
    try:
        async with asyncio.timeout(TIMEOUT):
            reader, writer = await asyncio.open_connection(address.host, address.port)
    except TimeoutError:
        raise NotAuthenticated(f"{address} did not answer within {TIMEOUT:g} s") from None
    try:
        async with asyncio.timeout(TIMEOUT):
            challenge = await reader.readexactly(NONCE)
            hello = MAGIC + secrets.token_bytes(NONCE)
            writer.write(hello + proof(address.token, b"connects", challenge, hello))
            answer = await reader.readexactly(PROOF)
        if not hmac.compare_digest(answer, proof(address.token, b"accepts", challenge, hello)):
            raise NotAuthenticated(f"{address} does not know the token")
    except (TimeoutError, asyncio.IncompleteReadError):
        writer.transport.abort()
        raise NotAuthenticated(f"{address} refused the connection: another token or version") from None
    except BaseException:
        writer.transport.abort()
        raise
    return reader, writer


async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, token: bytes) -> None:
    """Authenticate both ends of a connection that this server has accepted. Returns nothing.

    Raises NotAuthenticated if the client does not prove within TIMEOUT seconds that it knows the token, or if the
    client has another version. The caller must then close the connection.
    """
    try:
        async with asyncio.timeout(TIMEOUT):
            challenge = secrets.token_bytes(NONCE)
            writer.write(challenge)
            hello = await reader.readexactly(len(MAGIC) + NONCE)
            answer = await reader.readexactly(PROOF)
    except (TimeoutError, asyncio.IncompleteReadError, ConnectionError) as e:
        raise NotAuthenticated(f"it did not introduce itself: {type(e).__name__}") from None
    if not hmac.compare_digest(answer, proof(token, b"connects", challenge, hello)):
        raise NotAuthenticated("it does not know the token")
    if not hello.startswith(MAGIC):
        raise NotAuthenticated("it is of another version")
    writer.write(proof(token, b"accepts", challenge, hello))


@asynccontextmanager
async def tcp_server(
    address: TcpAddress, connected: Connected, refused: Callable[[str], None]
) -> AsyncIterator[TcpAddress]:
    """Async context manager that listens at `address` until the block ends, and authenticates each client.

    It yields the address with the port that was bound. Raises OSError, with the address in its message, if the address
    cannot be bound.

    connected: called with (reader, writer) of each authenticated connection. refused: called for each client that fails
    to authenticate, with a text that gives the reason.
    """
    greeting: dict[asyncio.StreamWriter, None] = {}  # the oldest first

    async def arrived(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(greeting) >= GREETING_MAX:
            oldest = next(iter(greeting))
            del greeting[oldest]
            oldest.transport.abort()
        greeting[writer] = None
        try:
            await greet(reader, writer, address.token)
        except NotAuthenticated as e:
            refused(f"a connection from {writer.get_extra_info('peername')} is refused: {e}")
            writer.transport.abort()
            return
        finally:
            greeting.pop(writer, None)
        await connected(reader, writer)

    try:
        listener = listen(address.host, address.port)
    except OSError as e:
        raise OSError(f"{address} cannot be bound: {e.strerror or e}; choose another address") from None
    bound = TcpAddress(address.host, listener.getsockname()[1], address.token)
    server = await asyncio.start_server(arrived, sock=listener)
    try:
        yield bound
    finally:
        server.close()
