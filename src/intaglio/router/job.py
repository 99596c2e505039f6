"""Job: a request as the router sees it, and Refusal: the error of a job that is not admitted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Job:
    """A request to place on a replica.

    Times are in seconds, on the clock of the argument `now` of the Router's methods.

    Attributes:
        id: a text that is unique among live requests.
        keys: prefix keys of the prompt (see prefix_keys()).
        prompt_tokens: tokens of the prompt, estimated from its length.
        output_tokens: expected tokens of one choice's output, at most max_tokens.
        choices: number of sequences that the request runs.
        tenant: name of the tenant that is charged for the request.
        priority: a lower number is placed first.
        deadline: time by which the request must have ended; None: no limit.
        start_by: time by which the request must have been placed; None: no limit.
        stage: "all": the request runs on the replica it is placed on; "prefill": only its prompt is computed there.
        handed: prompt tokens whose K/V another replica has computed, and which every replica can load.
    """

    id: str
    keys: tuple[bytes, ...] = ()
    prompt_tokens: int = 1
    output_tokens: int = 16
    choices: int = 1
    tenant: str = ""
    priority: int = 0
    deadline: float | None = None
    start_by: float | None = None
    stage: Literal["all", "prefill"] = "all"
    handed: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that the tenant is charged for the job: its prompt, and the expected output of all choices."""
        return self.prompt_tokens + self.output_tokens * self.choices


class Refusal(Exception):
    """Raised for a job that is not admitted, or not placed on a replica in its time.

    reason: full (too many jobs wait), late (it would miss its deadline), unavailable (no replica serves). retry_after:
    seconds after which to retry.
    """

    def __init__(self, reason: Literal["full", "late", "unavailable"], message: str, retry_after: float) -> None:
        super().__init__(message)
        self.reason, self.retry_after = reason, retry_after
