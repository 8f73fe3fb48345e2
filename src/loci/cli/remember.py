"""`loci remember` and `loci recall`: one thing in, the best notes out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, get_args

import typer

from loci.cli import memories, output
from loci.errors import UnknownName

if TYPE_CHECKING:
    from loci.text.memory import Memory
    from loci.text.organizer import Note, NoteKind, Written


def remember(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What to keep; '-' reads it from standard input.")],
    source: Annotated[str | None, typer.Option(help="Who said it, or where it stands.", show_default=False)] = None,
    at: Annotated[
        str | None, typer.Option(help="When it was said: a date or words for one; else now.", show_default=False)
    ] = None,
    kind: Annotated[str, typer.Option(help="turn, thought, fact, structure, document or user.")] = "turn",
    db: memories.Database = None,
    space: memories.Space = "default",
    embedder: memories.EmbedderName = "auto",
    as_json: output.Json = False,
) -> None:
    """Keep something that was said.

    It is stored before anything is derived from it. Relative times become dates, and the note is linked to others.

    \b
    Examples:
      loci remember "The ferry to Gozo leaves at nine tomorrow." --source Ada
      loci remember "The roof was mended." --at "last Friday" --kind fact
      cat minutes.txt | loci remember - --source "board meeting" --kind document
    """
    words = memories.given_words(text, "the note")
    with memories.opened(db, space, embedder=embedder, create=True) as memory:
        written = memory.write(words, source=source, at=at, kind=_kind(kind))
        note = memory.note(written.id)
        linked = newest_linked(memory, written)
    meant = memories.resolved(note.content, note.times)
    if as_json:
        output.print_json(
            {
                "id": note.id,
                "known": written.duplicate_of is not None,
                "said_at": note.said_at,
                "times": note.times,
                "links": written.links,
                "evolved": written.evolved,
                "bytes_added": written.bytes_added,
                "derived": written.derived,
            }
        )
        return
    if written.duplicate_of is not None:
        output.data(f"known already: {memories.short(note.id)}  {memories.line(note)}")
    else:
        output.data(f"kept {memories.short(note.id)}  {memories.line(note)}")
        for each in meant:
            output.data(f"  {each}")
        if linked is not None:
            output.data(f"  {_links(written)}, the newest: {memories.line(linked)}")
        if written.evolved:
            output.data(f"  evolved {memories.counted(len(written.evolved), 'note')}")
    output.next_command(
        'loci recall "..."' if source is None else f'loci ask "What did {source} say?"', "finds it again"
    )


def newest_linked(memory: Memory, written: Written) -> Note | None:
    """Of the notes that a new one was linked to, the one that was said last."""
    linked = [memory.note(id) for id in {link.dst for link in written.links}]
    return max(linked, key=lambda note: (note.said_at, note.id), default=None)


def recall(
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to look for; '-' reads standard input.")],
    k: Annotated[int, typer.Option("-k", min=1, help="At most so many notes.")] = 10,
    why: Annotated[bool, typer.Option("--why", help="Show every part of each note's score.")] = False,
    between: memories.Between = None,
    source: Annotated[str | None, typer.Option(help="Only what this speaker said.", show_default=False)] = None,
    at: memories.At = None,
    db: memories.Database = None,
    space: memories.Space = "default",
    embedder: memories.EmbedderName = "auto",
    as_json: output.Json = False,
) -> None:
    """Find the notes that answer a question, best first.

    A note that came in by a link names the note that led to it under `via`.

    \b
    Examples:
      loci recall "When does the ferry leave?"
      loci recall "the roof" -k 3 --why
      loci recall "holidays" --between "May 2026" "June 2026" --source Ada --json
    """
    words = memories.given_words(question, "the question")
    with memories.opened(db, space, embedder=embedder) as memory:
        found = memory.read(words, k=k, at=at, between=memories.interval(between), source=source, why=why)
    if as_json:
        output.print_json({"question": words, "notes": found})
        return
    if not found:
        output.say("no note was found")
        output.next_command("loci notes spaces", "lists what this memory holds")
        return
    memories.found_table(found, why=why)
    if why:
        output.next_command(f"loci notes show {memories.short(found[0].id)}", "shows the whole note")
    else:
        output.next_command('loci recall "..." --why', "shows why each was found")


def _kind(name: str) -> NoteKind:
    from loci.text.organizer import NoteKind

    kinds: tuple[NoteKind, ...] = get_args(NoteKind)
    found = next((kind for kind in kinds if kind == name), None)
    if found is None:
        raise UnknownName.among("kind of note", name, kinds)
    return found


def _links(written: Written) -> str:
    return f"linked to {memories.counted(len({link.dst for link in written.links}), 'note')}"
