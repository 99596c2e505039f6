"""TcpAddress: an address and the token with which both ends of a connection prove who they are."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_address

from intaglio.devices.processes.connections import check_token

SCHEME = "tcp://"


@dataclass(frozen=True)
class TcpAddress:
    """A TCP address at which a process listens, and the secret token that both ends of a connection must know.

    Port 0 stands for any free port. Raises ValueError for a token of less than 16 bytes.
    """

    host: str
    port: int
    token: bytes = field(repr=False)

    def __post_init__(self) -> None:
        check_token(self.token)

    def __str__(self) -> str:
        return f"{SCHEME}{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    @property
    def unspecified(self) -> bool:
        """True if the host is 0.0.0.0 or ::, which stand for all addresses of a host.

        A process can listen at such an address, but nobody can connect to it.
        """
        try:
            return ip_address(self.host).is_unspecified
        except ValueError:
            return False  # a host's name

    @classmethod
    def parse(cls, text: str, token: str) -> TcpAddress:
        """Return the TcpAddress for a text such as "tcp://10.0.0.5:8001" and the secret `token`.

        Raises ValueError if `text` has another form or `token` is too short.
        """
        host, colon, port = text.removeprefix(SCHEME).rpartition(":")
        if not (text.startswith(SCHEME) and colon and host and port.isdecimal() and int(port) < 1 << 16):
            raise ValueError(f"{text!r} is no address; write tcp://HOST:PORT, such as tcp://10.0.0.5:8001")
        return cls(host.removeprefix("[").removesuffix("]"), int(port), token.encode())
