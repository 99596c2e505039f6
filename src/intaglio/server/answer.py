"""From the pieces of an output to OpenAI's answers: what is new of a choice, for a stream, and all of it at the end."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from intaglio.runtime import Scored
from intaglio.server.driver import Job, Piece, Ticket
from intaglio.server.markup import Call, Reader, Said
from intaglio.server.prepare import Style
from intaglio.server.problem import Problem, of_fault
from intaglio.server.protocol import ChatRequest, CompletionRequest
from intaglio.server.vocabulary import Vocabulary

LEAST = -9999.0  # stands for a log-probability of minus infinity, which JSON cannot write; vLLM's value


class Choice(Protocol):
    """One choice as it grows."""

    def feed(self, piece: Piece) -> dict[str, Any] | None:
        """Take one more piece; what a stream says of it, if anything."""

    def whole(self) -> dict[str, Any]:
        """All of it."""


def reason(piece: Piece) -> str | None:
    """OpenAI's finish_reason. Raises Problem for an end that is no answer. `deadline` is ours: what had been generated
    when the time was over stands."""
    match piece.finish_reason:
        case "error":
            assert piece.fault
            raise of_fault(piece.fault)
        case "abort":
            raise Problem(503, "the server is shutting down", code="shutdown", retry_after=1)
        case "deadline" if piece.usage is None or piece.usage.first_token is None:
            raise Problem(503, "the deadline passed before the first token", code="deadline", retry_after=1)
    return piece.finish_reason


class CompletionChoice:
    def __init__(self, index: int, job: Job, body: CompletionRequest, text: str, vocabulary: Vocabulary) -> None:
        self.index, self.job, self.body, self.vocabulary = index, job, body, vocabulary
        self.echo = text if body.echo else ""
        self.begun = not body.echo
        self.text, self.offset = "", 0
        self.scores: dict[str, list[Any]] = _no_scores()
        self.reason: str | None = None

    def feed(self, piece: Piece) -> dict[str, Any] | None:
        self.reason = reason(piece)
        text, scores = piece.text, _no_scores()
        if piece.prompt is not None:
            self._score_prompt(scores, piece.prompt)
        elif not self.begun and self.body.logprobs is not None and len(self.job.request.prompt) == 1:
            self._score_prompt(scores, ())  # of one token the engine has nothing to say
        if self.body.max_tokens == 0:  # the one token that the engine cannot do without
            text = ""
        elif piece.scored and self.body.logprobs is not None:
            self._score(scores, piece.scored)
        if not self.begun:
            text, self.begun = self.echo + text, True
        self.text += text
        for name, values in scores.items():
            self.scores[name] += values
        if not text and not self.reason and not scores["tokens"]:
            return None
        return self._as_dict(text, scores)

    def whole(self) -> dict[str, Any]:
        return self._as_dict(self.text, self.scores)

    def _as_dict(self, text: str, scores: dict[str, list[Any]]) -> dict[str, Any]:
        told = scores if self.body.logprobs is not None else None
        return {"index": self.index, "text": text, "logprobs": told, "finish_reason": self.reason}

    def _score_prompt(self, scores: dict[str, list[Any]], rest: Sequence[Scored]) -> None:
        self._place(scores, self.vocabulary.piece(self.job.request.prompt[0])[0], None, None)
        for scored in rest:
            self._score(scores, scored)

    def _score(self, scores: dict[str, list[Any]], scored: Scored) -> None:
        top = {self.vocabulary.piece(id)[0]: finite(lp) for id, lp in reversed(scored.top)}
        token = self.vocabulary.piece(scored.token)[0]
        top.setdefault(token, finite(scored.logprob))  # the token drawn is always among them, as in OpenAI's answers
        self._place(scores, token, finite(scored.logprob), top if self.body.logprobs else None)

    def _place(self, scores: dict[str, list[Any]], token: str, logprob: float | None, top: Any) -> None:
        for name, value in zip(scores, (token, logprob, top, self.offset), strict=True):
            scores[name].append(value)
        self.offset += len(token)


def _no_scores() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


class ChatChoice:
    def __init__(self, index: int, body: ChatRequest, style: Style, vocabulary: Vocabulary) -> None:
        self.index, self.body, self.vocabulary = index, body, vocabulary
        self.reader = Reader(style.form, style.reasons, style.inside)
        self.said = {"content": "", "reasoning": ""}
        self.calls: list[dict[str, Any]] = []
        self.scores: list[dict[str, Any]] = []
        self.begun = False
        self.reason: str | None = None

    def feed(self, piece: Piece) -> dict[str, Any] | None:
        self.reason = reason(piece)
        delta: dict[str, Any] = {} if self.begun else {"role": "assistant", "content": ""}
        for part in self.reader.feed(piece.text, last=self.reason is not None):
            self._take(part, delta)
        if self.reason == "stop" and self.calls:
            self.reason = "tool_calls"
        scores = [self._scored(piece.scored)] if piece.scored and self.body.logprobs else []
        self.scores += scores
        if not any(value for name, value in delta.items() if name != "role") and not self.reason and not scores:
            return None
        self.begun = True
        return {"index": self.index, "delta": delta, "logprobs": self._told(scores), "finish_reason": self.reason}

    def whole(self) -> dict[str, Any]:
        content = self.said["content"]
        message: dict[str, Any] = {"role": "assistant", "content": content if content or not self.calls else None}
        if self.said["reasoning"]:
            message["reasoning_content"] = self.said["reasoning"]
        if self.calls:
            message["tool_calls"] = [{k: v for k, v in call.items() if k != "index"} for call in self.calls]
        told = self._told(self.scores)
        return {"index": self.index, "message": message, "logprobs": told, "finish_reason": self.reason}

    def _take(self, part: Said | Call, delta: dict[str, Any]) -> None:
        if isinstance(part, Call):
            function = {"name": part.name, "arguments": part.arguments}
            id = f"call_{uuid.uuid4().hex[:24]}"
            call = {"index": len(self.calls), "id": id, "type": "function", "function": function}
            self.calls.append(call)
            delta.setdefault("tool_calls", []).append(call)
            return
        self.said[part.role] += part.text
        name = "content" if part.role == "content" else "reasoning_content"
        delta[name] = delta.get(name, "") + part.text

    def _told(self, scores: list[dict[str, Any]]) -> dict[str, Any] | None:
        return {"content": scores, "refusal": None} if self.body.logprobs else None

    def _scored(self, scored: Scored) -> dict[str, Any]:
        top = [self._token(id, logprob) for id, logprob in scored.top[: self.body.top_logprobs or 0]]
        return {**self._token(scored.token, scored.logprob), "top_logprobs": top}

    def _token(self, id: int, logprob: float) -> dict[str, Any]:
        text, raw = self.vocabulary.piece(id)
        return {"token": text, "logprob": finite(logprob), "bytes": list(raw)}


def finite(logprob: float) -> float:
    return logprob if logprob > LEAST else LEAST


class Envelope:
    """What stands around choices: the same id, time and model in each chunk of a stream and in a whole answer."""

    def __init__(self, kind: str, id: str, model: str) -> None:
        self.kind = kind
        self.head: dict[str, Any] = {"id": id, "object": kind, "created": int(time.time()), "model": model}

    def chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None, tell_usage: bool) -> dict[str, Any]:
        name = "chat.completion.chunk" if self.kind == "chat.completion" else self.kind
        body = {**self.head, "object": name, "choices": choices}
        return {**body, "usage": usage} if tell_usage else body

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return {**self.head, "choices": choices, "usage": usage}


def usage_so_far(ticket: Ticket, output: int) -> dict[str, Any]:
    """Tokens of a request that has not ended."""
    prompt = sum(len(job.request.prompt) for job in ticket.jobs)
    return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}


def usage(ticket: Ticket, generated: bool) -> dict[str, Any]:
    """Tokens of a whole request: each prompt counts once, however many its choices."""
    all = [u for u in ticket.usages if u]
    prompt = sum(len(job.request.prompt) for job in ticket.jobs)
    output = sum(u.output_tokens for u in all) if generated else 0
    cached = sum(u.cached_tokens for u in ticket.usages[:: ticket.n] if u)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def modelled(ticket: Ticket, by: str) -> dict[str, Any]:
    """The times of a whole request on chips that need not exist: seconds from its arrival to its first token, between
    tokens of a choice after that on average, and to its end."""
    all = [u for u in ticket.usages if u]
    begun = [(u, u.first_token) for u in all if u.first_token is not None]
    after = sum(u.output_tokens - 1 for u, _ in begun)
    return {
        "by": by,
        "time_to_first_token_seconds": min((first - u.arrived for u, first in begun), default=None),
        "time_per_output_token_seconds": sum(u.ended - first for u, first in begun) / after if after else None,
        "seconds": max((u.ended - u.arrived for u in all), default=None),
    }
