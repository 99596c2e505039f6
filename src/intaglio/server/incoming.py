"""What a server does with a request before it looks at the content: name it, check the API key, receive the body."""

from __future__ import annotations

import asyncio
import hmac
import re
import secrets
from collections.abc import Sequence

from starlette.types import Receive

from intaglio.server.delivery import ClientDisconnected
from intaglio.server.problem import Problem

CLOSE = {"connection": "close"}
REQUEST_ID = re.compile(r"[\w.-]{1,128}", re.ASCII)


def request_id(given: str) -> str:
    """Returns the id of a request: `given` if it is a valid id, else 32 random hexadecimal digits.

    given: value of the header x-request-id. A valid id has 1 to 128 characters: ASCII letters, digits, `_`, `-` and
    `.`.
    """
    return given if REQUEST_ID.fullmatch(given) else secrets.token_hex(16)


def check_key(keys: Sequence[str], authorization: str) -> int:
    """Returns the index in `keys` of the API key that a request has sent. Raises Problem 401 for any other key.

    All keys are compared, so that the time taken does not tell which key matched. authorization: the Authorization
    header.
    """
    scheme, _, key = authorization.partition(" ")
    given = key.strip().encode() if scheme.lower() == "bearer" else b""
    matches = [hmac.compare_digest(given, k.encode()) for k in keys]
    if not any(matches):
        why = "a valid API key is needed: Authorization: Bearer KEY"
        raise Problem(401, why, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
    return matches.index(True)


async def read_body(receive: Receive, most: int, seconds: float, announced: int = 0) -> bytes:
    """Receive the body of a request. Returns the body as bytes.

    most: largest allowed size in bytes. seconds: longest time that the body may take. announced: the size that the
    Content-Length header states, 0 if unknown; if it is larger than `most`, nothing is read.

    Raises Problem 408 if the body comes too slowly, 413 if it is too large, and ClientDisconnected if the client
    disconnects.
    """
    raw = bytearray()
    try:
        async with asyncio.timeout(seconds):
            while announced <= most and len(raw) <= most:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnected
                raw += message.get("body", b"")
                if not message.get("more_body", False) and len(raw) <= most:
                    return bytes(raw)
    except TimeoutError:
        raise Problem(408, f"the body was not received in {seconds:g} s", headers=CLOSE) from None
    raise Problem(413, f"the body has more than {most} bytes, which is the limit", headers=CLOSE)
