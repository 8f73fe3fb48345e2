"""Splitting: nothing is lost, nothing is too long, cuts lie at seams."""

from hypothesis import given, settings
from hypothesis import strategies as st

from loci.text.split import split
from loci.text.words import count_tokens


@given(st.text(max_size=3_000), st.integers(min_value=5, max_value=200))
@settings(max_examples=150, deadline=None)
def test_parts_hold_every_word_in_order_and_fit(text, longest):
    parts = split(text, longest=longest)
    assert "".join("".join(parts).split()) == "".join(text.split())
    if len(parts) > 1:
        assert all(count_tokens(part) <= longest + 2 for part in parts)


def test_paragraphs_are_kept_together_where_they_fit():
    paragraphs = [f"Paragraph {i} has a few words of its own." for i in range(20)]
    parts = split("\n\n".join(paragraphs), longest=60)
    for part in parts:
        assert all(piece in paragraphs for piece in part.split("\n\n"))


def test_a_short_text_is_left_as_it_is():
    assert split("  One.  Two. ", longest=100) == ["  One.  Two. "]
