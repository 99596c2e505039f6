"""Resumption: a suspended request, with all that another engine needs to continue it with the same tokens.

The K/V cache is not part of it: the engine that resumes a request computes the K/V of its tokens again. As results do
not depend on how tokens are batched, the tokens that follow are those that would have followed, bit for bit, if both
engines run the same Program with the same `numerics`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from intaglio.runtime.request import Request, RequestError
from intaglio.runtime.request_fields import read_request, write_request
from intaglio.runtime.sequence import Sequence


@dataclass(frozen=True)
class SuspendedChoice:
    """The output so far of one unfinished choice of a suspended request.

    Attributes:
        index: number of the choice.
        output: token ids generated so far.
        logprobs: natural log-probability of each token in `output`.
    """

    index: int
    output: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True)
class Resumption:
    """A suspended request with its output so far. Engine.resume() continues it on any engine that gives the same bits.

    Attributes:
        request: the request. Its seed is the seed in use, and its timeouts are the seconds that are left.
        choices: output so far of each choice that has not ended.
        program: hash of the Program of the engine that suspended the request.
        numerics: device, instruction set and layout of that engine, such as "host avx2 tp2" (see Engine).
    """

    request: Request
    choices: tuple[SuspendedChoice, ...]
    program: str
    numerics: str

    @classmethod
    def of(cls, sequences: list[Sequence], now: float, program: str, numerics: str) -> Resumption:
        """Returns the Resumption of a request: all that another engine needs to continue it with the same tokens.

        Args:
            sequences: the request's choices that have not ended; at least one.
            now: time of the suspension, in seconds by the engine's clock.
            program: hash of the Program that the engine runs.
            numerics: device, instruction set and layout of the engine, such as "host avx2 tp2".
        """
        s = sequences[0]
        params = replace(s.request.params, seed=(s.seed - s.index) % 2**63)
        waited = now - s.arrived
        started = any(s.started is not None for s in sequences)
        request = replace(
            s.request, params=params, timeout=_left(s.request.timeout, waited),
            queue_timeout=None if started else _left(s.request.queue_timeout, waited),
        )  # fmt: skip
        choices = tuple(SuspendedChoice(s.index, tuple(s.output), tuple(s.logprobs)) for s in sequences)
        return cls(request, choices, program, numerics)

    def check(self, program: str, numerics: str) -> None:
        """Raise RequestError if an engine would not give the same bits as the engine that suspended the request.

        Returns nothing.

        program: hash of the engine's Program. numerics: device, instruction set and layout of the engine, as text.
        """
        id = self.request.id
        if self.program != program:
            raise RequestError(
                f"request {id!r} was suspended with Program {self.program[:12]}, this engine has {program[:12]}; "
                "resume it on an engine of the same model, weight format and context"
            )
        if self.numerics != numerics:
            raise RequestError(
                f"request {id!r} was suspended on {self.numerics!r}, this engine is {numerics!r}, whose results differ "
                "in bits; resume it on an engine of the same device, instruction set and layout"
            )

    def apply(self, sequence: Sequence) -> None:
        """Append the output so far to a new sequence, which continues one choice of the request. Returns nothing.

        The tokens are also passed to the sequence's stop checker and matcher. Raises RequestError if one of these does
        not accept the tokens, because it was made for another request.

        sequence: the new sequence.
        """
        choice = next(c for c in self.choices if c.index == sequence.index)
        for token in choice.output:
            sequence.output.append(token)
            if sequence.penalties:
                sequence.penalties.push(token)
            at = f"output token {len(sequence.output)}"
            try:
                ends = sequence.stop_checker is not None and sequence.stop_checker(token)
                allowed = sequence.matcher is None or sequence.matcher.advance(token)
            except Exception as e:  # both are functions of the caller
                raise self._unfit(f"reading {at} failed: {e}") from e
            if ends:
                raise self._unfit(f"its stop checker ends it at {at}, where it went on")
            if not allowed:
                raise self._unfit(f"its grammar does not allow {at}")
        sequence.logprobs = list(choice.logprobs)
        if choice.output:  # the scores of the prompt were sent before the first token
            sequence.prompt_rows_read = sequence.prompt_rows_wanted

    def as_dict(self) -> dict[str, Any]:
        """Returns the Resumption as a dict that can be written as JSON. from_dict() reads it.

        The functions `stop_checker` and `matcher` of the request are left out; only the caller can create these again.
        """
        request = write_request(self.request, self.request.params.seed or 0)
        choices = [{"index": c.index, "output": [*c.output], "logprobs": [*c.logprobs]} for c in self.choices]
        return {"request": request, "choices": choices, "program": self.program, "numerics": self.numerics}

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Resumption:
        """Returns the Resumption in `table`, a dict that as_dict() returned.

        The `stop_checker` and `matcher` of its request are None; only the caller can create these again.
        """
        choices = tuple(SuspendedChoice(c["index"], tuple(c["output"]), tuple(c["logprobs"])) for c in table["choices"])
        return cls(read_request(table["request"]), choices, table["program"], table["numerics"])

    def _unfit(self, why: str) -> RequestError:
        return RequestError(f"request {self.request.id!r} cannot be resumed: {why}; make both anew from its parameters")


def _left(seconds: float | None, waited: float) -> float | None:
    """Returns how many seconds are left of a timeout of `seconds` seconds after `waited` seconds; None for no timeout.

    The result is at least 1e-9, because a timeout of 0 is invalid. A request whose time is up is thus resumed, and ends
    in the next step.
    """
    return None if seconds is None else max(seconds - waited, 1e-9)
