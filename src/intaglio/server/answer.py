"""OpenAI response bodies, built from the engine's deltas (ChoiceDelta): stream chunks, whole choices, usage."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from intaglio.runtime import Scored
from intaglio.server.driver import ChoiceDelta, Prepared, Submission
from intaglio.server.markup import CallStart, Part, Reader, TextDelta
from intaglio.server.prepare import Reading
from intaglio.server.problem import Problem, fault_problem
from intaglio.server.protocol import ChatRequest, CompletionRequest
from intaglio.server.vocabulary import Offsets, Vocabulary

MIN_LOGPROB = -9999.0  # replaces minus infinity, which JSON cannot represent; vLLM's value


class Choice(Protocol):
    """Interface of an object that builds the response for one choice.

    A choice is one output of a prompt. feed() takes the engine's events and returns chunks to stream. whole() returns
    the complete choice at the end. `rank` is the Rank by which best_of compares choices.
    """

    rank: Rank

    def feed(self, update: ChoiceDelta) -> dict[str, Any] | None:
        """Add one ChoiceDelta, an event of the engine.

        Returns the chunk to stream, a dict; None if there is nothing new to send. Raises Problem if the choice failed,
        was aborted, or missed its deadline before its first token (see reason()).
        """

    def whole(self) -> dict[str, Any]:
        """Returns the complete choice as a dict of JSON fields, for a response that is not streamed."""


def reason(update: ChoiceDelta) -> str | None:
    """Returns the finish_reason to show in the response, a string; None while the choice is still being generated.

    It may be "deadline", in addition to OpenAI's values: the output up to the deadline is then returned. Raises Problem
    if the choice ended in an error, if it was aborted, or if its deadline passed before its first token.

    update: the latest ChoiceDelta (event) of the choice.
    """
    match update.finish_reason:
        case "error":
            assert update.fault
            raise fault_problem(update.fault)
        case "abort":
            raise Problem(503, "the server is shutting down", code="shutdown", retry_after=1)
        case "deadline" if update.usage is None or update.usage.first_token is None:
            raise Problem(503, "the deadline passed before the first token", code="deadline", retry_after=1)
    return update.finish_reason


class CompletionChoice:
    """Builds the response for one choice of /v1/completions.

    It contains the text, log-probabilities if requested, and the prompt if `echo` is set.
    """

    def __init__(
        self, index: int, prepared: Prepared, body: CompletionRequest, reading: Reading, vocabulary: Vocabulary
    ) -> None:
        self.index, self.prepared, self.body, self.vocabulary = index, prepared, body, vocabulary
        self.echo = reading.echo
        self.begun = not body.echo
        self.text = ""
        self.ids: list[int] = []
        self.prompt_scores: list[Any] | None = None
        hidden = frozenset[int]() if body.skip_special_tokens is False else None
        prompt = prepared.request.prompt
        self.offsets = Offsets(vocabulary.tokenizer, prompt, bool(body.echo), hidden, reading.prefix, reading.suffix)
        self.scores: dict[str, list[Any]] = _no_scores()
        self.reason: str | None = None
        self.stop_reason: str | int | None = None
        self.rank = Rank()

    def feed(self, update: ChoiceDelta) -> dict[str, Any] | None:
        """Add one ChoiceDelta, an event of the engine.

        Returns the chunk to stream, a dict; None if there is nothing new to send. Raises Problem if the choice failed,
        was aborted, or missed its deadline before its first token (see reason()).
        """
        self.reason, self.stop_reason = reason(update), update.stop_reason
        first = not self.ids
        self.rank.add(update.scored)
        text, scores, ids = update.text, _no_scores(), list[int]()
        if update.prompt is not None:
            self._score_prompt(scores, update.prompt)
        elif not self.begun and self.body.logprobs is not None and len(self.prepared.request.prompt) == 1:
            self._score_prompt(scores, ())  # the engine sends no scores for a prompt of one token
        if self.body.max_tokens == 0:  # the engine generates at least one token; drop it
            text = ""
        elif update.scored:
            ids = [update.scored.token]
            if self.body.logprobs is not None:
                self._score(scores, update.scored, self.offsets.of_output(update.scored.token))
        if not self.begun:
            text, self.begun = self.echo + text, True
        self.text += text
        self.ids += ids
        for name, values in scores.items():
            self.scores[name] += values
        if not text and not self.reason and not scores["tokens"] and not (ids and self.body.return_token_ids):
            return None
        chunk = self._as_dict(text, scores)
        if self.body.return_token_ids:
            chunk["token_ids"] = ids
            if first:
                chunk["prompt_token_ids"] = list(self.prepared.request.prompt)
        return chunk

    def whole(self) -> dict[str, Any]:
        """Returns the complete choice as a dict of JSON fields, for a response that is not streamed.

        It includes log-probabilities of the prompt and token ids, if the client has asked for them.
        """
        asked = bool(self.body.return_token_ids)
        return {
            **self._as_dict(self.text, self.scores),
            "prompt_logprobs": self.prompt_scores,
            "token_ids": self.ids if asked else None,
            "prompt_token_ids": list(self.prepared.request.prompt) if asked else None,
        }

    def _as_dict(self, text: str, scores: dict[str, list[Any]]) -> dict[str, Any]:
        logprobs = scores if self.body.logprobs is not None else None
        ends = {"finish_reason": self.reason, "stop_reason": self.stop_reason}
        return {"index": self.index, "text": text, "logprobs": logprobs, **ends}

    def _score_prompt(self, scores: dict[str, list[Any]], rest: Sequence[Scored]) -> None:
        if self.body.prompt_logprobs is not None:
            self.prompt_scores = prompt_scores(rest, self.body.prompt_logprobs, self.vocabulary)
        if not self.body.echo or self.body.logprobs is None:
            return
        token = self.prepared.request.prompt[0]
        self._place(scores, self._name(token), None, None, self.offsets.of_prompt(token))
        for scored in rest:
            self._score(scores, scored, self.offsets.of_prompt(scored.token))

    def _score(self, scores: dict[str, list[Any]], scored: Scored, offset: int) -> None:
        """Append the entry of one token to each list in `scores`, the lists of OpenAI's logprobs object.

        Returns nothing. In the list top_logprobs, an entry is a dict from the texts of tokens to log-probabilities. If
        several tokens have the same text, only one of them is entered under it: the token of `scored`, or else the
        likeliest. The others are entered as "token_id:N".

        scored: the token with log-probabilities. offset: position of the token in the text, in characters.
        """
        likely = scored.top if self.body.logprob_token_ids else scored.top[: self.body.logprobs]
        pairs = dict(likely)
        pairs.setdefault(scored.token, scored.logprob)  # OpenAI always includes the sampled token
        token = self._name(scored.token)
        top = dict[str, float]()
        for id, logprob in pairs.items():
            name = self._name(id)
            taken = name in top or (name == token and id != scored.token)
            top[f"token_id:{id}" if taken else name] = finite(logprob)
        self._place(scores, token, finite(scored.logprob), top, offset)

    def _name(self, id: int) -> str:
        return f"token_id:{id}" if self.body.return_tokens_as_token_ids else self.vocabulary.name(id)

    @staticmethod
    def _place(scores: dict[str, list[Any]], token: str, logprob: float | None, top: Any, offset: int) -> None:
        for name, value in zip(scores, (token, logprob, top, offset), strict=True):
            scores[name].append(value)


def _no_scores() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


class Rank:
    """Mean log-probability of a choice's tokens, by which best_of compares choices.

    `sum` is the sum of the log-probabilities so far, `tokens` the number of tokens so far.
    """

    def __init__(self) -> None:
        self.sum, self.tokens = 0.0, 0

    def add(self, scored: Scored | None) -> None:
        """Include a token's log-probability in the mean.

        Does nothing for None, which stands for an event without a token.
        """
        if scored:
            self.sum, self.tokens = self.sum + finite(scored.logprob), self.tokens + 1

    @property
    def mean(self) -> float:
        """Returns the mean log-probability of the tokens so far; MIN_LOGPROB if there are none."""
        return self.sum / self.tokens if self.tokens else MIN_LOGPROB


def best(choices: Sequence[Choice], n: int, of: int) -> list[dict[str, Any]]:
    """Returns the choices to send to the client, as a list of dicts of JSON fields, numbered from 0.

    For each prompt these are the `n` choices with the highest mean log-probability, best first. If `n` equals `of`, all
    choices are returned in the given order.

    choices: `of` choices for each prompt, in the order of the prompts.
    """
    kept: list[Choice] = []
    for i in range(0, len(choices), of):
        group = list(choices[i : i + of])
        kept += group if n == of else sorted(group, key=lambda c: -c.rank.mean)[:n]
    return [{**choice.whole(), "index": i} for i, choice in enumerate(kept)]


def prompt_scores(scores: Sequence[Scored], n: int, vocabulary: Vocabulary) -> list[Any]:
    """Returns the log-probabilities of a prompt's tokens in the form of vLLM's prompt_logprobs, a list.

    It has one entry per token. The first entry is None, because the first token has no log-probability. Each other
    entry is a dict for the `n` likeliest tokens and the prompt's own token. Its keys are token ids as text; its values
    are dicts with "logprob", "rank" and "decoded_token" (the text).

    scores: log-probabilities of the prompt's tokens from the second on. vocabulary: gives the texts of tokens.
    """

    def entry(id: int, logprob: float, rank: int | None) -> dict[str, Any]:
        return {"logprob": finite(logprob), "rank": rank, "decoded_token": vocabulary.piece(id)[0]}

    out: list[Any] = [None]
    for s in scores:
        top = {str(id): entry(id, logprob, i) for i, (id, logprob) in enumerate(s.top[:n], 1)}
        out.append({**top, str(s.token): entry(s.token, s.logprob, s.rank)})
    return out


class ChatChoice:
    """Builds the response for one choice of /v1/chat/completions.

    It contains the content, reasoning, tool calls, and log-probabilities if requested.
    """

    def __init__(
        self, index: int, prepared: Prepared, body: ChatRequest, reading: Reading, vocabulary: Vocabulary
    ) -> None:
        self.index, self.prepared, self.body, self.vocabulary = index, prepared, body, vocabulary
        self.style, self.echo = reading.style, reading.echo
        self.reader = Reader(reading.style)
        self.said = {"content": "", "reasoning": ""}
        self.calls: list[dict[str, Any]] = []
        self.begun_calls = 0  # those left out because of parallel_tool_calls=false included
        self.scores: list[dict[str, Any]] = []
        self.prompt_scores: list[Any] | None = None
        self.ids: list[int] = []
        self.reasoning_tokens = 0
        self.begun = False
        self.reason: str | None = None
        self.stop_reason: str | int | None = None
        self.rank = Rank()

    def feed(self, update: ChoiceDelta) -> dict[str, Any] | None:
        """Add one ChoiceDelta, an event of the engine.

        Returns the chunk to stream, a dict; None if there is nothing new to send. Raises Problem if the choice failed,
        was aborted, or missed its deadline before its first token (see reason()).
        """
        self.reason, self.stop_reason = reason(update), update.stop_reason
        self.rank.add(update.scored)
        if update.prompt is not None and self.body.prompt_logprobs is not None:
            self.prompt_scores = prompt_scores(update.prompt, self.body.prompt_logprobs, self.vocabulary)
        delta: dict[str, Any] = {} if self.begun else {"role": "assistant", "content": ""}
        if not self.begun and self.echo:
            self._take(TextDelta("content", self.echo), delta)
        role = self.reader.role
        for part in self.reader.feed(update.text, last=self.reason is not None):
            self._take(part, delta)
        if self.reason == "stop" and self.calls:
            self.reason = "tool_calls"
        scores = [self._scored(update.scored)] if update.scored and self.body.logprobs else []
        self.scores += scores
        ids = [update.scored.token] if update.scored else []
        self.ids += ids
        self.reasoning_tokens += len(ids) * ("reasoning" in (role, self.reader.role))
        said = any(value for name, value in delta.items() if name != "role")
        if not said and not self.reason and not scores and not (ids and self.body.return_token_ids):
            return None
        self.begun = True
        ends = {"finish_reason": self.reason, "stop_reason": self.stop_reason}
        chunk = {"index": self.index, "delta": delta, "logprobs": self._logprobs(scores), **ends}
        return {**chunk, "token_ids": ids} if self.body.return_token_ids else chunk

    def whole(self) -> dict[str, Any]:
        """Returns the complete choice as a dict of JSON fields, for a response that is not streamed.

        Its fields are the message, the finish reason, log-probabilities and token ids.
        """
        content = self.said["content"]
        message: dict[str, Any] = {"role": "assistant", "content": content if content or not self.calls else None}
        if self.said["reasoning"]:
            message |= {"reasoning_content": self.said["reasoning"], "reasoning": self.said["reasoning"]}
        if self.calls:
            message["tool_calls"] = [{k: v for k, v in call.items() if k != "index"} for call in self.calls]
        ends = {"finish_reason": self.reason, "stop_reason": self.stop_reason}
        ids = self.ids if self.body.return_token_ids else None
        scores = self._logprobs(self.scores)
        return {"index": self.index, "message": message, "logprobs": scores, **ends, "token_ids": ids}

    def _take(self, part: Part, delta: dict[str, Any]) -> None:
        """Add one parsed part of the output to the whole message, and to `delta`, the message in the next stream chunk.

        Reasoning is dropped if include_reasoning is false. Tool calls after the first are dropped if
        parallel_tool_calls is false. Returns nothing.
        """
        if isinstance(part, TextDelta):
            if part.role == "reasoning" and self.body.include_reasoning is False:
                return
            self.said[part.role] += part.text
            for name in ("content",) if part.role == "content" else ("reasoning_content", "reasoning"):
                delta[name] = delta.get(name, "") + part.text
            return
        self.begun_calls += isinstance(part, CallStart)
        if self.begun_calls > 1 and self.body.parallel_tool_calls is False:
            return
        deltas = delta.setdefault("tool_calls", [])
        if isinstance(part, CallStart):
            call = {"index": len(self.calls), "id": self._call_id(part), "type": "function"}
            self.calls.append({**call, "function": {"name": part.name, "arguments": ""}})
            deltas.append({**call, "function": {"name": part.name, "arguments": ""}})
            return
        self.calls[-1]["function"]["arguments"] += part.text
        if not deltas or deltas[-1]["index"] != len(self.calls) - 1:
            deltas.append({"index": len(self.calls) - 1, "function": {"arguments": ""}})
        deltas[-1]["function"]["arguments"] += part.text

    def _call_id(self, start: CallStart) -> str:
        short = self.style.form is not None and self.style.form.short_ids
        return start.id or (uuid.uuid4().hex[:9] if short else f"call_{uuid.uuid4().hex[:24]}")

    def _logprobs(self, scores: list[dict[str, Any]]) -> dict[str, Any] | None:
        return {"content": scores, "refusal": None} if self.body.logprobs else None

    def _scored(self, scored: Scored) -> dict[str, Any]:
        likely = scored.top if self.body.logprob_token_ids else scored.top[: self.body.top_logprobs or 0]
        top = [self._token(id, logprob) for id, logprob in likely]
        return {**self._token(scored.token, scored.logprob), "top_logprobs": top}

    def _token(self, id: int, logprob: float) -> dict[str, Any]:
        text, raw = self.vocabulary.piece(id)
        name = f"token_id:{id}" if self.body.return_tokens_as_token_ids else text
        return {"token": name, "logprob": finite(logprob), "bytes": list(raw)}


def finite(logprob: float) -> float:
    """Returns `logprob`, or MIN_LOGPROB if `logprob` is lower than that or NaN.

    JSON can represent neither infinity nor NaN.
    """
    return logprob if logprob > MIN_LOGPROB else MIN_LOGPROB


class Envelope:
    """Builds response bodies from choices: adds the fields id, object, created and model.

    All chunks of a streamed response have the same values of these fields.

    Args:
        kind: name of the response's object, such as "chat.completion"; without ".chunk".
        id: id of the response.
        model: name of the model.
        first: additional fields of the first chunk.
        created: Unix time in seconds; None for now.
    """

    def __init__(
        self, kind: str, id: str, model: str, first: dict[str, Any] | None = None, created: int | None = None
    ) -> None:
        self.kind, self.first = kind, first or {}
        when = int(time.time()) if created is None else created
        self.head: dict[str, Any] = {"id": id, "object": kind, "created": when, "model": model}

    def chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None, with_usage: bool) -> dict[str, Any]:
        """Returns one chunk of a streamed response, as a dict of JSON fields.

        The first chunk also has the fields that the constructor got as `first`.

        Args:
            choices: the choices in the chunk.
            usage: OpenAI's `usage` object; None for null.
            with_usage: True to include the field `usage`.
        """
        name = "chat.completion.chunk" if self.kind == "chat.completion" else self.kind
        body = {**self.head, "object": name, "choices": choices, **self.first}
        self.first = {}
        return {**body, "usage": usage} if with_usage else body

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, Any], **more: Any) -> dict[str, Any]:
        """Returns the body of a response that is not streamed, as a dict of JSON fields.

        choices: the complete choices. usage: OpenAI's `usage` object. more: additional fields.
        """
        return {**self.head, "choices": choices, "usage": usage, **more}


def usage_so_far(submission: Submission, output: int) -> dict[str, Any]:
    """Returns OpenAI's `usage` object, a dict of token counts, for a request that is still running.

    submission: the request. output: number of tokens generated so far.
    """
    prompt = sum(len(p.request.prompt) for p in submission.prompts)
    return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}


def usage(submission: Submission, generated: bool, reasoning: int | None = None) -> dict[str, Any]:
    """Returns OpenAI's `usage` object, a dict of token counts, for a finished request.

    The tokens of a prompt count once, even if several choices are generated from it.

    Args:
        submission: the request.
        generated: False if the request only scored its prompt; completion_tokens is then 0.
        reasoning: number of output tokens that are reasoning. None leaves out completion_tokens_details, for a model
            that does not reason.
    """
    all = [u for u in submission.usages if u]
    prompt = sum(len(p.request.prompt) for p in submission.prompts)
    output = sum(u.output_tokens for u in all) if generated else 0
    cached = sum(u.cached_tokens for u in submission.usages[:: submission.n] if u)
    counts: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    return counts if reasoning is None else {**counts, "completion_tokens_details": {"reasoning_tokens": reasoning}}


def modelled(submission: Submission, by: str) -> dict[str, Any]:
    """Returns a dict with the modelled times of a finished request on simulated chips.

    The dict has these keys:

    - "by": the argument `by`, the name of the chips.
    - "time_to_first_token_seconds": time from arrival to the first token of any choice.
    - "time_per_output_token_seconds": mean time per token, over all tokens except the first token of each choice.
    - "seconds": time from arrival until the last choice ended.

    A time is None if too few tokens were generated.
    """
    all = [u for u in submission.usages if u]
    begun = [(u, u.first_token) for u in all if u.first_token is not None]
    after = sum(u.output_tokens - 1 for u, _ in begun)
    return {
        "by": by,
        "time_to_first_token_seconds": min((first - u.arrived for u, first in begun), default=None),
        "time_per_output_token_seconds": sum(u.ended - first for u, first in begun) / after if after else None,
        "seconds": max((u.ended - u.arrived for u in all), default=None),
    }
