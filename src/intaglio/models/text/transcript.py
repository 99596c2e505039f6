"""The text of one output as its tokens arrive, up to the first stop string."""

from __future__ import annotations

from collections.abc import Container, Sequence

from intaglio.models.text.tokenizer import Tokenizer


class Transcript:
    """Decodes the tokens of one output to text, up to the first stop string.

    Attributes:
        text: the output so far; "" without a tokenizer.
        matched: the stop string that ended the output; None if no stop string has ended it.

    Args:
        tokenizer: decodes the tokens; None: there is no text.
        prompt: token ids before the output.
        stops: stop strings. If a stop string is a hidden special token (see `kept`), this token ends the output.
        kept: special tokens whose text stays in the output. All other special tokens are hidden: they leave no text.
            None: all stay.
        include_stop: True if the text ends after the stop string, False if it ends before it.
        min_tokens: a stop string does not end the output while the output has at most this number of tokens.

    Raises ValueError for a stop string that contains a hidden special token and other text, since it could never match.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        prompt: Sequence[int],
        stops: Sequence[str],
        *,
        kept: Container[str] | None = (),
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        special = tokenizer.special_ids if tokenizer else {}
        hidden = {text: id for text, id in special.items() if kept is not None and text not in kept}
        for stop in stops:
            if inside := next((text for text in hidden if text in stop and text != stop), None):
                raise ValueError(
                    f"stop is {stop!r}, which contains the special token {inside!r}, and special tokens leave no text; "
                    f"give {inside!r} alone, or skip_special_tokens=false"
                )
        self.decoder = tokenizer.stream(prompt, frozenset(hidden.values())) if tokenizer else None
        self.stop_ids = {hidden[stop]: stop for stop in stops if stop in hidden}
        self.stops = [stop for stop in stops if stop not in hidden]
        self.include_stop, self.min_tokens = include_stop, min_tokens
        self.text = ""
        self.tokens = 0
        self.sent = 0  # characters that settled() has returned
        self.matched: str | None = None

    @property
    def stopped(self) -> bool:
        """True if a stop string has ended the output."""
        return self.matched is not None

    def push(self, token: int) -> bool:
        """Decode one more token. Returns True if a stop string has ended the output."""
        self.tokens += 1
        if self.decoder:
            self._append(self.decoder.push(token))
        if token in self.stop_ids and self.tokens > self.min_tokens and not self.stopped:
            self.finish()
            if not self.stopped:
                self.matched = self.stop_ids[token]
                self.text += self.matched if self.include_stop else ""
        return self.stopped

    def finish(self) -> None:
        """End the decoding: add the text that was held back to `text`, such as an incomplete character.

        Returns nothing.
        """
        if self.decoder and not self.stopped:
            self._append(self.decoder.end())

    def settled(self, ended: bool) -> str:
        """Returns the part of `text` that can no longer change and that earlier calls did not return.

        Characters at the end that may be the beginning of a stop string are held back, unless stop strings stay in the
        text.

        ended: True if the output has ended; then all remaining text is returned.
        """
        tails = (n for stop in self.stops for n in range(1, len(stop)) if self.text.endswith(stop[:n]))
        end = len(self.text) - (0 if ended or self.include_stop else max(tails, default=0))
        new, self.sent = self.text[self.sent : max(end, self.sent)], max(end, self.sent)
        return new

    def _append(self, text: str) -> None:
        seen = len(self.text)  # a stop string that ends before this was looked for, or is within min_tokens
        self.text += text
        if self.stopped or self.tokens <= self.min_tokens:
            return
        places = ((self.text.find(stop, max(0, seen + 1 - len(stop))), stop) for stop in self.stops)
        found = [(at, stop) for at, stop in places if at >= 0]
        if found:
            at, self.matched = min(found)
            self.text = self.text[: at + (len(self.matched) if self.include_stop else 0)]
