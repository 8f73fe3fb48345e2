from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loci.lm.text import TextFlow


def of_bytes(tokens: Sequence[int]) -> str:
    return bytes(tokens).decode("utf-8", errors="replace")


def flow(text: str | bytes, *, stops: Sequence[str] = (), before: bytes = b"") -> tuple[str, list[str], bool]:
    """The whole text, what was taken after each byte, and whether a stop string was found."""
    made = TextFlow(of_bytes, before=list(before), stops=stops)
    pieces, stopped = [], False
    for byte in text.encode() if isinstance(text, str) else text:
        stopped = made.push(byte)
        if stopped:
            break
        pieces.append(made.take())
    stopped = made.flush() or stopped
    pieces.append(made.take())
    return made.text, pieces, stopped


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=40))
def test_pieces_are_whole_characters_and_make_the_text(text):
    whole, pieces, stopped = flow(text)
    assert whole == text == "".join(pieces)
    assert not stopped
    assert "\ufffd" not in whole


@given(st.text("abé€𝄞", max_size=30), st.lists(st.text("abé€𝄞", min_size=1, max_size=4), min_size=1, max_size=3))
def test_the_text_ends_before_the_first_stop_string_and_nothing_of_it_was_given_out(text, stops):
    whole, pieces, stopped = flow(text, stops=stops)
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    assert stopped == bool(ends)
    if not ends:
        assert whole == text
    else:
        seen = text[: min(ends)]  # the first string to be complete ends the text
        assert whole == seen[: min(seen.find(stop) for stop in stops if stop in seen)]
    assert "".join(pieces) == whole


def test_a_beginning_of_a_stop_string_is_held_until_it_is_none():
    _, pieces, _ = flow("an endless end.", stops=["end."])
    assert pieces[:9] == ["a", "n", " ", "", "", "", "endl", "", "es"]
    assert pieces[-1] == ""


def test_broken_characters_are_shown_when_nothing_can_mend_them():
    assert flow("é".encode()[:1])[0] == "\ufffd"
    whole, pieces, _ = flow(b"a\xff\xfe\xff\xff\xffb")
    assert whole[0] == "a"
    assert whole[-1] == "b"
    assert "".join(pieces) == whole


def test_a_tokenizer_that_drops_the_first_space_keeps_it_inside_a_text():
    words = ["▁The", "▁cat", "▁sat"]

    def decode(tokens: Sequence[int]) -> str:
        return "".join(words[token] for token in tokens).replace("▁", " ").removeprefix(" ")

    made = TextFlow(decode, before=[0], stops=())
    for token in (1, 2):
        made.push(token)
    assert made.text == " cat sat"


@pytest.mark.parametrize("before", [b"", b"abc", "é".encode()])
def test_the_prompt_is_not_part_of_the_text(before):
    assert flow("xyz", before=before)[0] == "xyz"
