"""What the commands of a memory share: their options, how a memory is opened, and how notes are shown.

A note's id is shown by its last eight letters: ids begin with the time, so notes of one import begin alike and end
differently. Wherever an id is asked for, its beginning or its end is enough.
"""

from __future__ import annotations

import getpass
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loci import settings
from loci.cli import output
from loci.errors import BadInput

if TYPE_CHECKING:
    from loci.lm.chat import ChatModel
    from loci.text.memory import Answer, Memory
    from loci.text.organizer import Found, Note, TimeSpan
    from loci.text.store import Store

Database = Annotated[
    str | None,
    typer.Option(
        "--db", help="A file or a database URL; else the memory that `loci doctor` names.", show_default=False
    ),
]
Space = Annotated[str, typer.Option("--space", help="Whose memory; spaces of one file never see each other.")]
EmbedderName = Annotated[
    str,
    typer.Option(
        "--embedder", help="'auto', 'default', 'none' for words alone, or an endpoint: https://host/v1#model."
    ),
]
Between = Annotated[
    tuple[str, str] | None,
    typer.Option(
        "--between",
        metavar="FROM TO",
        help="Only what was said, or speaks of a time, from the first date to the end of the second.",
        show_default=False,
    ),
]
At = Annotated[
    str | None,
    typer.Option("--at", help="A date or words for one, from which 'yesterday' counts; else now.", show_default=False),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model", help="A chat model: a folder, a hub name or an endpoint's; else LOCI_MODEL.", show_default=False
    ),
]
BaseUrl = Annotated[
    str | None,
    typer.Option(
        "--base-url", help="An OpenAI-compatible endpoint for --model; else LOCI_BASE_URL.", show_default=False
    ),
]
NoteId = Annotated[str, typer.Argument(metavar="ID", help="A note's id, or its beginning or end.")]


@contextmanager
def opened(
    db: str | None,
    space: str,
    *,
    embedder: str = "auto",
    model: ChatModel | None = None,
    create: bool = False,
) -> Iterator[Memory]:
    """The memory that the options name, closed at the end; only a command that writes creates one."""
    from loci.text.memory import Memory

    chosen = None if embedder == "none" else embedder
    with Memory(db, space=space, embedder=chosen, model=model, create=create) as memory:
        yield memory


@contextmanager
def opened_store(db: str | None) -> Iterator[Store]:
    """The store alone, whatever its spaces were indexed with."""
    from loci.text.memory import open_store

    with open_store(db, create=False) as store:
        yield store


def chat_model(name: str | None, base_url: str | None) -> ChatModel | None:
    """The chat model that options or environment name; None means the bundled reader answers.

    An address in the environment is used only where a model is named too, so that no note goes anywhere unasked.
    """
    wanted = name or settings.model()
    if wanted == "default":
        if base_url is not None:
            raise BadInput("--base-url needs --model: the name of the model that answers there.")
        return None
    from loci.lm.chat import load_chat

    address = base_url or (None if Path(wanted).expanduser().exists() else settings.base_url())
    return load_chat(wanted, base_url=address, api_key=settings.api_key())


def user_name() -> str:
    """The login of who sits here, or "you" where the system tells none."""
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return "you"


def interval(between: tuple[str, str] | None) -> tuple[datetime, datetime] | None:
    """From the beginning of the first date to the end of the second: "May 2026" ends with May."""
    if between is None:
        return None
    from loci.text.times import parse_span

    start, end = parse_span(between[0])[0], parse_span(between[1])[1]
    if start >= end:
        raise BadInput(f"--between needs an earlier and a later date; found {between[0]!r} and {between[1]!r}.")
    return start, end


def given_words(text: str, what: str) -> str:
    """The text, or standard input where it is "-". Raises `BadInput` where neither holds a word."""
    words = sys.stdin.read() if text == "-" else text
    if not words.strip():
        raise BadInput(f"{what} holds no words; give some, or '-' to read them from standard input.")
    return words.strip()


def counted(number: int, thing: str) -> str:
    """A number and its thing: "1 note", "2 notes"."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def short(id: str) -> str:
    """The end of an id, by which notes differ."""
    return id[-8:]


def day(moment: datetime) -> str:
    """A date for a column, in figures."""
    return f"{moment:%Y-%m-%d}"


def said(note: Note | Found) -> str:
    """A note's words on one line, each relative time followed by the date it means."""
    from loci.text.times import annotate

    return " ".join(annotate(note.content, note.times).split())


def line(note: Note | Found) -> str:
    """Date, speaker and words of a note on one line."""
    from loci.text.times import say_day

    who = f"{note.source}: " if note.source else ""
    return f"{say_day(note.said_at)}  {who}{said(note)}"


def resolved(content: str, times: Iterable[TimeSpan]) -> list[str]:
    """What each relative time of a text means: "tomorrow = 9 May 2026"; dates that say it themselves are left out."""
    from loci.text.times import annotate

    return [f"{span.text} = {span.phrase}" for span in times if annotate(content, [span]) != content]


def fitted(words: str, *, taken: int) -> str:
    """The words cut to what is left of a terminal's line; whole where nobody looks at a terminal."""
    if not sys.stdout.isatty():
        return words
    room = max(shutil.get_terminal_size().columns - taken, 30)
    if output.width(words) <= room:
        return words
    while output.width(words) > room - 1:
        words = words[:-1]
    return words.rstrip() + "…"


def found_table(found: Sequence[Found], *, why: bool) -> None:
    """Found notes as a table, best first. With `why`, every part of the score has its column."""
    parts = list(dict.fromkeys(name for note in found for name, value in note.parts.items() if value)) if why else []
    # Parts of the score take whole columns; where they are shown, words are cut more.
    taken = 40 + sum(max(len(name), 5) + 2 for name in parts)
    rows = [
        (
            short(note.id),
            note.score,
            *(note.parts.get(name, 0.0) for name in parts),
            day(note.said_at),
            note.source,
            short(note.via) if note.via else "-",
            fitted(said(note), taken=taken),
        )
        for note in found
    ]
    output.table(["note", "score", *parts, "date", "who", "via", "words"], rows, right=["score", *parts])


def show_sources(notes: Iterable[Note | Found]) -> None:
    """The notes that an answer rests on, numbered, in grey."""
    for number, note in enumerate(notes, start=1):
        output.data(output.coloured(f"  [{number}] {line(note)}", "dim", to="stdout"))


NOT_TOLD = "Nothing that was said tells it."


def show_answer(answer: Answer) -> None:
    """An answer and its sources, or that there is none."""
    output.data(answer.text if answer.found else NOT_TOLD)
    show_sources(answer.notes)
