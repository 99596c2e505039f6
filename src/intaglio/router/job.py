"""Job: a request as the router sees it, and Refusal: the error of a job that is not admitted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Job:
    """A request as the router sees it.

    A Job has the facts about a request that the router needs to place it on a replica. All times are in seconds. They
    are by the same clock as the argument `now` of the Router's methods.

    Attributes:
        id: text that is unique among live requests.
        keys: prefix keys of the prompt (see prefix_keys()).
        prompt_tokens: number of tokens of the prompt, estimated from the length of its text.
        output_tokens: expected number of output tokens of one choice, at most the request's max_tokens.
        choices: number of choices (alternative outputs) that the request asks for.
        tenant: name of the tenant that is charged for the request.
        priority: jobs with a lower number are placed first.
        deadline: time by which the request must have ended; None: no limit.
        start_by: time by which the request must have been placed; None: no limit.
        stage: "all" to run the whole request on the replica; "prefill" to compute only its prompt there.
        handed: number of prompt tokens whose K/V another replica has computed, and which every replica can load.
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
        """Returns the number of tokens that the tenant is charged for the job.

        It is the length of the prompt plus the expected output of all choices.
        """
        return self.prompt_tokens + self.output_tokens * self.choices


class Refusal(Exception):
    """Raised if the router does not admit a job, or could not place it on a replica in time.

    reason: "full" (too many jobs wait), "late" (the job would miss, or has missed, its time limit) or "unavailable" (no
    replica serves). retry_after: number of seconds after which the client should try again.
    """

    def __init__(self, reason: Literal["full", "late", "unavailable"], message: str, retry_after: float) -> None:
        super().__init__(message)
        self.reason, self.retry_after = reason, retry_after
