"""Cutting a text that is too long for one note at its own seams: paragraphs, then sentences, then words."""

from __future__ import annotations

from collections.abc import Iterator

import regex

from loci.text.words import count_tokens

_SEAMS = (
    regex.compile(r"\n\s*\n"),  # paragraphs
    regex.compile(r"(?<=[.!?。！？])\s+"),  # sentences
    regex.compile(r"\s+"),  # words
)


def split(text: str, *, longest: int) -> list[str]:
    """Parts of at most about `longest` tokens that together hold every word of the text, in order.

    >>> split("One. Two.", longest=100)
    ['One. Two.']
    """
    if count_tokens(text) <= longest:
        return [text]
    parts: list[str] = []
    held: list[str] = []
    size = 0
    for piece, tokens in _pieces(text, longest):
        if held and size + tokens > longest:
            parts.append("".join(held).strip())
            held, size = [], 0
        held.append(piece)
        size += tokens
    parts.append("".join(held).strip())
    return [part for part in parts if part]


def _pieces(text: str, longest: int, seams: tuple[regex.Pattern[str], ...] = _SEAMS) -> Iterator[tuple[str, int]]:
    """Pieces with the white space behind them, each cut at the coarsest seam that makes it small enough."""
    tokens = count_tokens(text)
    if tokens <= longest:
        yield text, tokens
    elif seams:
        start = 0
        for end in [*(match.end() for match in seams[0].finditer(text)), len(text)]:
            if end > start:
                yield from _pieces(text[start:end], longest, seams[1:])
                start = end
    else:
        # A run without any seam, such as a hash or a base64 block; a character is at most 2.5 tokens by count_tokens.
        step = max(1, int(longest / 2.5))
        for start in range(0, len(text), step):
            yield text[start : start + step], count_tokens(text[start : start + step])
