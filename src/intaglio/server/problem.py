"""Problem: an error as an HTTP response in OpenAI's format; the mapping of exceptions to it; and JSON responses."""

from __future__ import annotations

import json
import math
from typing import Any

from starlette.responses import Response

from intaglio.models import TokenizerError
from intaglio.models.text.grammar import GrammarError
from intaglio.runtime import Fault, ParamsError, Refused, RequestError

KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 405: "invalid_request_error",
    408: "timeout_error", 413: "invalid_request_error", 415: "invalid_request_error", 429: "rate_limit_error",
    500: "internal_error", 503: "unavailable_error",
}  # fmt: skip
ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


class Problem(Exception):
    """An error to send as an HTTP response in OpenAI's format.

    Args:
        status: the HTTP status.
        message: text for the user.
        param: name of the invalid field.
        code: short name of the error, such as queue_full, which client programs can test.
        retry_after: seconds for the header Retry-After, rounded up to at least 1.
        headers: further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}
        if retry_after is not None:
            self.headers["retry-after"] = str(max(1, math.ceil(retry_after)))

    def as_dict(self) -> dict[str, Any]:
        """Returns the response body as a dict in OpenAI's error format."""
        kind = KINDS[self.status]
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code or kind}}

    def response(self) -> Response:
        """Returns the HTTP response for this error, with its JSON body, status and headers."""
        return Json(self.as_dict(), self.status, self.headers)


def as_problem(error: Exception) -> Problem | None:
    """Returns the Problem (HTTP error response) for an exception; None if it is an internal error.

    A Problem is returned unchanged. An invalid request becomes status 400. A full queue, or a deadline that cannot be
    met, becomes status 429. Any other refusal, such as that of a server that shuts down, becomes status 503.
    """
    match error:
        case Problem():
            return error
        case ParamsError():
            return Problem(400, str(error), param=str(error).split(" ", 1)[0])
        case RequestError() | TokenizerError() | GrammarError():
            return Problem(400, str(error))
        case Refused(reason="full" | "late"):
            code = "queue_full" if error.reason == "full" else "late"
            return Problem(429, str(error), code=code, retry_after=error.retry_after or 1)
        case Refused():
            return Problem(503, str(error), code=error.reason, retry_after=error.retry_after or 1)
    return None


def fault_problem(fault: Fault) -> Problem:
    """Returns the Problem (HTTP error response) for a request that ended with an error.

    The status is 400 if the request caused the error, else 500.
    """
    return Problem(400 if fault.kind == "request" else 500, fault.message, code=f"{fault.kind}_fault")


def dumps(value: Any) -> bytes:
    """Returns `value` as compact JSON, in UTF-8 bytes.

    Raises ValueError for NaN and infinities, which JSON does not have.
    """
    return ENCODER.encode(value).encode()


class Json(Response):
    """A response whose body is `content` as JSON, serialised by dumps()."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Returns the response body: `content` as JSON, in bytes."""
        return dumps(content)

    def __init__(self, content: Any, status_code: int = 200, headers: dict[str, str] | None = None) -> None:
        super().__init__(content, status_code, headers)
