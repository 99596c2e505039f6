"""The account stage of a step: applies the result of a launch to its sequences, token by token."""

from __future__ import annotations

from intaglio.batch import Chunk
from intaglio.devices import StepResult
from intaglio.runtime import sampling
from intaglio.runtime.clock import MonotonicClock
from intaglio.runtime.launcher import Completed
from intaglio.runtime.live_requests import LiveRequests
from intaglio.runtime.request import Event, Fault, FinishReason, Scored
from intaglio.runtime.scheduler import ScheduledSequence, Scheduler
from intaglio.runtime.sequence import Sequence
from intaglio.runtime.stats import Counts


class Accounting:
    """Applies the results of steps to sequences.

    It appends sampled tokens, accepts or rejects draft tokens, keeps the scores of prompt tokens, and ends finished
    sequences.

    context: context length of the model in tokens; a sequence that is longer ends.
    """

    def __init__(
        self, live: LiveRequests, scheduler: Scheduler, clock: MonotonicClock, counts: Counts, context: int
    ) -> None:
        self.live, self.scheduler, self.clock, self.counts, self.context = live, scheduler, clock, counts, context

    def account(self, done: Completed) -> None:
        """Apply the result of a completed launch to all sequences of the launch. Returns nothing.

        A launch is one step on the device. The clock is read once at the beginning, and all events of the launch get
        this time.
        """
        self.clock.read()
        row = 0
        for scheduled, chunk in zip(done.scheduled, done.chunks, strict=True):
            if scheduled.sequence.state != "ended":  # else aborted, or at its deadline, while the launch was under way
                self.account_sequence(scheduled, chunk, done.result, row)
            row += len(chunk.rows)

    def account_sequence(self, scheduled: ScheduledSequence, chunk: Chunk, result: StepResult, row: int) -> None:
        """Apply the result of a step to one sequence. Returns nothing.

        The sequence's sampled tokens are appended to it, and its events are emitted.

        `row` is the index of the sequence's first row in the result. The sequence's rows are, in this order:

        - one row for each prompt position in `chunk` whose logits the request wants;
        - if the sequence samples in this step: one row for the next token and one row for each draft token.

        Sampled tokens are appended one after another, up to the first token that differs from its draft or ends the
        sequence; this token is still appended. Proposed and accepted drafts are counted.
        """
        s, drafts, start = scheduled.sequence, scheduled.drafts, scheduled.sequence.computed
        sampled, accepted = 1 + len(drafts) if scheduled.samples else 0, 0
        s.computed += scheduled.num_tokens
        row = self._read_prompt_rows(s, result, row, len(chunk.rows) - sampled)
        if sampled and s.request.params.prompt_logprobs is not None and not s.output:
            self.live.emit(Event(s.request.id, s.index, prompt=tuple(s.prompt_scores)))
        for i in range(sampled):
            s.computed += i > 0  # the draft before this row was accepted, so its K/V is valid
            self._append(s, result, row + i)
            if s.state == "ended" or i == len(drafts) or s.output[-1] != drafts[i]:
                break
            accepted += 1
        self.counts.accepted_tokens += accepted
        self.counts.drafts += bool(drafts)
        self.counts.draft_tokens += len(drafts)
        if s.state != "ended":
            self.settle_state(s, start, rejected=accepted < len(drafts))
            self.scheduler.update_blocks(s)
            self.scheduler.checkpoints.keep(s)
            if s.request.scored and s.remaining == 0:
                self.live.emit(self.live.end(s, "length"))

    def settle_state(self, s: Sequence, start: int, rejected: bool) -> None:
        """Keep or discard the recurrent state that a step wrote for a sequence. Returns nothing.

        The step began at position `start`. Does nothing if the model has no recurrent state. If `rejected` is False,
        the state that the step wrote becomes the sequence's state. If `rejected` is True, at least one draft token was
        rejected, and the state that the step wrote is not used because it includes rejected tokens. The sequence then
        keeps the state of position `start`, and its next step computes the tokens from `start` on again.
        """
        if s.next_state_slot < 0:
            return
        if rejected:
            s.computed, s.rerun = start, s.computed - start
        else:
            s.rerun = max(0, s.rerun - (s.computed - start))
            self.scheduler.move_state(s)

    @staticmethod
    def _read_prompt_rows(s: Sequence, result: StepResult, row: int, n: int) -> int:
        """Store a step's results for the prompt in the sequence `s`. Returns the index of the next row to read.

        If the request has `scored` set (evaluation of a text, without generation), the logits of the prompt rows are
        added to `s.logits`. If prompt_logprobs is set, a Scored is added to `s.prompt_scores` for each row: the
        log-probability of the prompt token that follows the row's position.

        Args:
            s: the sequence.
            result: the step's result.
            row: index of the first row to read in the result.
            n: number of rows, one for each prompt position; 0 if there is nothing to read.
        """
        if n:
            assert result.logits is not None, "the device was asked for logits and gave none"
            if s.request.scored:
                s.logits.append(result.logits[row : row + n])
            else:
                top = s.request.params.prompt_logprobs or 0
                following = s.prompt[s.prompt_rows_read + 1 : s.prompt_rows_read + 1 + n]
                s.prompt_scores += [sampling.score(result.logits[row + i], t, top) for i, t in enumerate(following)]
            s.prompt_rows_read += n
        return row + n

    def _append(self, s: Sequence, result: StepResult, row: int) -> None:
        """Append the token sampled from row `row` of the result to the sequence `s`, and emit an event.

        Returns nothing. The sequence is ended if this token finishes it, if the row has no valid token, or if the
        sequence's stop checker or grammar fails.
        """
        token, logprob = int(result.tokens[row]), float(result.logprobs[row])
        if token < 0:
            why = f"the logits after {s.length} tokens hold no finite value that may be drawn, or NaN"
            return self.live.emit(self.live.end(s, "error", Fault("request", why)))
        scored, p = Scored(token, logprob), s.request.params
        if (p.logprobs or p.logprob_token_ids) and result.logits is not None:
            scored = sampling.score(result.logits[row], token, p.logprobs, p.logprob_token_ids)
        s.suspect, s.device_losses = False, 0
        s.first_token = self.clock.now if s.first_token is None else s.first_token
        s.output.append(token)
        if s.penalties:
            s.penalties.push(token)
        s.logprobs.append(logprob)
        self.counts.output_tokens += 1
        try:
            reason = self._finish_reason(s, token)
        except Exception as e:  # the stop checker or matcher of this request failed; no other request is affected
            fault = Fault("request", f"reading token {token} failed: {e}")
            return self.live.emit(self.live.end(s, "error", fault, scored))
        self.live.emit(self.live.end(s, reason, None, scored) if reason else Event(s.request.id, s.index, scored))

    def _finish_reason(self, s: Sequence, token: int) -> FinishReason | None:
        """Returns why the sequence `s` ends with `token`, its latest token: "stop" or "length".

        Returns None if it does not end. Raises ValueError if the grammar does not allow the token.
        """
        p = s.request.params
        if token in s.request.eos_ids and not p.ignore_eos:
            return "stop"
        if token in p.stop_token_ids or (s.stop_checker is not None and s.stop_checker(token)):
            return "stop"
        if s.matcher is not None and not s.matcher.advance(token):
            raise ValueError("the grammar does not allow it")
        full = s.length > self.context  # the token has no position at which to compute the next one
        return "length" if full or len(s.output) == p.max_tokens else None
