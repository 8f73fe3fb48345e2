"""Notes as files: JSON lines that `importers` reads back whole, and Markdown for people.

Both are iterators of text over iterators of notes, so a space of any size is written in constant memory. Neither
writes links, older versions or vectors: the first two belong to the store's own backup, and vectors are made again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import fields
from datetime import date
from typing import Any

from loci.text.importers import HEADER
from loci.text.organizer import Note, TimeSpan
from loci.text.times import say_day


def note_to_json(note: Note) -> dict[str, Any]:
    """A note as JSON values; `importers.note_from_json` is its inverse."""
    values = {field.name: getattr(note, field.name) for field in fields(Note)}
    for name in ("keywords", "tags", "entities"):
        values[name] = list(values[name])
    values["said_at"], values["written_at"] = note.said_at.isoformat(), note.written_at.isoformat()
    values["times"] = [_span_to_json(span) for span in note.times]
    values["meta"] = dict(note.meta)
    return values


def _span_to_json(span: TimeSpan) -> dict[str, Any]:
    values = {field.name: getattr(span, field.name) for field in fields(TimeSpan)}
    return values | {"start": span.start.isoformat(), "end": span.end.isoformat()}


def to_jsonl(notes: Iterable[Note]) -> Iterator[str]:
    """Lines, each with its line end: a header that names the format, then one note a line."""
    yield json.dumps(HEADER) + "\n"
    for note in notes:
        yield json.dumps(note_to_json(note), ensure_ascii=False, separators=(",", ":")) + "\n"


def to_markdown(notes: Iterable[Note], *, title: str = "Notes") -> Iterator[str]:
    """Pieces of a Markdown file: a heading for each day on which something was said, then who, when and what.

    Notes come in the order given; sort them by `said_at` first. Lines that would be headings, quotes or fences of the
    file are escaped, so that what was said cannot change its structure.
    """
    yield f"# {title}\n"
    day: date | None = None
    for note in notes:
        if note.said_at.date() != day:
            day = note.said_at.date()
            yield f"\n## {say_day(note.said_at)}\n"
        who = f"**{_escaped(note.source)}**, " if note.source else ""
        yield f"\n{who}{note.said_at:%H:%M}\n\n{_escaped(note.content)}\n"
        about = [*note.keywords, *(f"#{tag.replace(' ', '-')}" for tag in note.tags)]
        details = [line for line in (_escaped(", ".join(about)), _escaped(note.context)) if line]
        if details:
            yield "\n" + "".join(f"> {line}  \n" for line in "\n".join(details).splitlines())


_STRUCTURE = re.compile(r"^(\s*)([#>`~=-])", re.MULTILINE)


def _escaped(text: str) -> str:
    return _STRUCTURE.sub(r"\1\\\2", text.replace("\r\n", "\n").replace("\r", "\n"))
