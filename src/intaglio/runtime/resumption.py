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
    """One unfinished choice of a suspended request: its output so far.

    Attributes:
        index: number of the choice.
        output: token ids.
        logprobs: one natural log-probability per output token.
    """

    index: int
    output: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True)
class Resumption:
    """A suspended request, which Engine.resume() continues on any engine that gives the same bits.

    Attributes:
        request: the request, with the seed in use and with timeouts shortened to the seconds that are left.
        choices: its choices that have not ended.
        program: hash of the Program.
        numerics: what else decides the bits of results (see Engine).
    """

    request: Request
    choices: tuple[SuspendedChoice, ...]
    program: str
    numerics: str

    @classmethod
    def of(cls, sequences: list[Sequence], now: float, program: str, numerics: str) -> Resumption:
        """The Resumption of a request: what Engine.resume() needs to continue it with the same tokens elsewhere.

        Args:
            sequences: the request's choices that have not ended, at least one.
            now: time of the suspension, in seconds by the engine's clock.
            program: hash of the Program that the engine runs.
            numerics: what else decides the bits of results, such as "host avx2 tp2".
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
        """Raise RequestError if an engine could give other bits than the engine that began the request.

        program: hash of the engine's Program. numerics: its device, instruction set and layout, as text.
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
        """Append the tokens that were generated earlier to a new sequence, after a request has moved. Returns nothing.

        The tokens are also passed to the sequence's stop checker and grammar. Raises RequestError if one of these does
        not accept the tokens, because it belongs to another request.

        sequence: the new sequence, for one choice (output) of the request.
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
        """The Resumption as a dict that JSON can hold, for from_dict().

        The request's callables, `stop_checker` and `matcher`, are left out. The caller makes them again.
        """
        request = write_request(self.request, self.request.params.seed or 0)
        choices = [{"index": c.index, "output": [*c.output], "logprobs": [*c.logprobs]} for c in self.choices]
        return {"request": request, "choices": choices, "program": self.program, "numerics": self.numerics}

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Resumption:
        """The Resumption that as_dict() wrote. The caller has to make its stop checker and matcher again."""
        choices = tuple(SuspendedChoice(c["index"], tuple(c["output"]), tuple(c["logprobs"])) for c in table["choices"])
        return cls(read_request(table["request"]), choices, table["program"], table["numerics"])

    def _unfit(self, why: str) -> RequestError:
        return RequestError(f"request {self.request.id!r} cannot be resumed: {why}; make both anew from its parameters")


def _left(seconds: float | None, waited: float) -> float | None:
    """Seconds left of a timeout of `seconds` after `waited` seconds; None if there is no timeout.

    At least 1e-9, since a timeout of 0 is invalid: a request whose time is up is resumed and ends in the next step.
    """
    return None if seconds is None else max(seconds - waited, 1e-9)
