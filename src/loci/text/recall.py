"""How recalled notes are shown to a model: as quoted data in a marked block, with source and date, never as orders.

The mark is also how memory knows its own words: a text that holds the block is refused as a new note, so that a model
which repeats what it was shown cannot plant it again.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

from loci.errors import RecalledText
from loci.text.organizer import Found
from loci.text.times import annotate, say_day

OPEN, CLOSE = "<recalled-notes>", "</recalled-notes>"


def line(found: Found) -> str:
    """One note as "[8 May 2023] Caroline: I went there yesterday (7 May 2023)."."""
    who = f"{found.source}: " if found.source else ""
    return f"[{say_day(found.said_at)}] {who}{' '.join(annotate(found.content, found.times).split())}"


def block(found: Sequence[Found]) -> str:
    """The notes in the order in which they were said, numbered, inside the marks.

    Angle brackets inside a note are escaped, so that no note can close the block.
    """
    ordered = sorted(found, key=lambda note: note.said_at)
    lines = [f"{place}. {html.escape(line(note), quote=False)}" for place, note in enumerate(ordered, start=1)]
    return "\n".join([OPEN, *lines, CLOSE])


def refuse_recalled(text: str) -> None:
    """Raises `RecalledText` for a text that holds a block of recalled notes."""
    if OPEN in text or CLOSE in text:
        raise RecalledText(
            f"the text holds a block of recalled notes ({OPEN}): memory does not store its own words as news. "
            "Take the block out and write the rest."
        )
