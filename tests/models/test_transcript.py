"""Transcript: stop strings, special tokens and characters split between tokens, as an output's tokens become text."""

from __future__ import annotations

import random

import pytest
from support.tiny import tokenizer

from intaglio.models import Tokenizer, Transcript

EOS, USER = 258, 259  # <eos>, <user>


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.open(tokenizer(tmp_path_factory.mktemp("tokenizer")))


def decoded(t: Transcript, ids: list[int]) -> str:
    """The text of ids, in the pieces that settled() hands out."""
    pieces = []
    for id in ids:
        stopped = t.push(id)
        pieces.append(t.settled(stopped))
        if stopped:
            break
    t.finish()
    pieces.append(t.settled(True))
    assert "".join(pieces) == t.text
    return t.text


@pytest.mark.parametrize("text", ["é", "€", "😀", "é€😀é"])
def test_a_prompt_may_end_inside_a_character(plain: Tokenizer, text: str) -> None:
    ids = plain.encode("caf" + text + "x", special=False)
    for cut in range(3, len(ids)):
        whole = "caf" + text + "x"
        complete = bytes(plain.decode(ids[:cut], skip_special=False), "utf-8").count(b"\xef\xbf\xbd") == 0
        before = plain.decode(ids[:cut]) if complete else plain.decode(ids[:cut]).rstrip("\ufffd")
        assert before + decoded(Transcript(plain, ids[:cut], ()), ids[cut:]) == whole


def test_a_character_that_is_never_completed_belongs_to_the_prompt(plain: Tokenizer) -> None:
    half = plain.encode("é", special=False)[:1]
    rest = plain.encode("xyz", special=False)
    assert decoded(Transcript(plain, [*plain.encode("caf", special=False), *half], ()), rest) == "xyz"
    assert decoded(Transcript(plain, half, ()), half) == "\ufffd"


def test_a_stop_string_may_be_a_special_token(plain: Tokenizer) -> None:
    ids = [*plain.encode("ab", special=False), USER, *plain.encode("cd", special=False)]
    for include, text in ((False, "ab"), (True, "ab<user>")):
        t = Transcript(plain, [], ("<user>", "zz"), include_stop=include)
        assert decoded(t, ids) == text and t.matched == "<user>"
    shown = Transcript(plain, [], ("b<user>c",), kept=None)
    assert decoded(shown, ids) == "a" and shown.matched == "b<user>c"
    assert decoded(Transcript(plain, [], (), kept=("<user>",)), [*ids, EOS]) == "ab<user>cd"
    with pytest.raises(ValueError, match="contains the special token '<user>'"):
        Transcript(plain, [], ("b<user>",))


def test_the_stop_string_may_stay_in_the_text(plain: Tokenizer) -> None:
    ids = plain.encode("hello there", special=False)
    t = Transcript(plain, [], ("lo", "there"), include_stop=True)
    assert decoded(t, ids) == "hello" and t.matched == "lo"
    assert decoded(Transcript(plain, [], ("lo",)), ids) == "hel"


def test_no_stop_string_counts_within_min_tokens(plain: Tokenizer) -> None:
    rng = random.Random()
    ids = plain.encode("abababab", special=False)
    for _ in range(20):
        least = rng.randrange(9)
        t = Transcript(plain, [], ("ab",), min_tokens=least)
        end = next((n for n in range(max(2, least + 1), 9) if n % 2 == 0), None)
        assert decoded(t, ids) == ("abababab" if end is None else "abababab"[: end - 2])
