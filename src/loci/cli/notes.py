"""`loci notes`: look at notes, take changes back, forget, keep within bounds, prove the store whole."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loci.cli import memories, output
from loci.cli.app import Row, group
from loci.errors import BadInput

if TYPE_CHECKING:
    from loci.text.memory import Memory
    from loci.text.organizer import Note

ROWS = {
    "show": Row("loci.cli.notes:show", "List the newest notes, or show one whole."),
    "history": Row("loci.cli.notes:history", "Show how a note's description changed, and because of which note."),
    "links": Row("loci.cli.notes:links", "List a note's links, strongest first."),
    "journal": Row("loci.cli.notes:journal", "List what was done, newest first."),
    "undo": Row("loci.cli.notes:undo", "Take back one change that the journal lists."),
    "pin": Row("loci.cli.notes:pin", "Protect a note from `loci notes keep`."),
    "forget": Row("loci.cli.notes:forget", "Remove notes for good, with every trace."),
    "keep": Row("loci.cli.notes:keep", "Forget the least useful notes until the rest fits."),
    "check": Row("loci.cli.notes:check", "Prove the store whole."),
    "reembed": Row("loci.cli.notes:reembed", "Index all notes again, with another embedder where one is named."),
    "export": Row("loci.cli.importing:export", "Write notes to a file, or to standard output."),
    "spaces": Row("loci.cli.notes:spaces", "List the spaces of a store."),
}

notes = group(
    """Look at notes, take changes back, forget.

    \b
    Examples:
      loci notes show
      loci notes history 2ddedcff
      loci notes forget --query "the old address" --why "moved"
    """,
    ROWS,
)

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(B|KB|MB|GB|)\s*", re.IGNORECASE)
_UNITS = {"": 1, "B": 1, "KB": 1_000, "MB": 1_000_000, "GB": 1_000_000_000}


def show(
    id: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="A note's id, or its beginning or end.", show_default=False)
    ] = None,
    last: Annotated[int, typer.Option(min=1, help="How many of the newest notes to list.")] = 20,
    everything: Annotated[bool, typer.Option("--all", help="List every note, superseded ones too.")] = False,
    db: memories.Database = None,
    space: memories.Space = "default",
    as_json: output.Json = False,
) -> None:
    """List the newest notes, or show one whole.

    \b
    Examples:
      loci notes show
      loci notes show --last 5 --json
      loci notes show 2ddedcff
    """
    with memories.opened(db, space) as memory:
        if id is not None:
            _show_one(memory, memory.note(memory.find_id(id)), as_json=as_json)
            return
        held = memory.notes(status=None if everything else "live")
    chosen = held if everything else held[-last:]
    if as_json:
        output.print_json(chosen)
        return
    _table(chosen)
    output.say(f"{len(chosen)} of {len(held)} notes")
    if chosen:
        output.next_command(f"loci notes show {memories.short(chosen[-1].id)}", "shows one whole")
    else:
        output.next_command('loci remember "..."', "keeps the first")


def _table(chosen: Sequence[Note]) -> None:
    rows = [
        (
            memories.short(note.id),
            memories.day(note.said_at),
            note.source,
            note.version,
            note.uses,
            note.status,
            memories.fitted(memories.said(note), taken=56),
        )
        for note in chosen
    ]
    output.table(["note", "date", "who", "version", "uses", "status", "words"], rows, right=["version", "uses"])


def _show_one(memory: Memory, note: Note, *, as_json: bool) -> None:
    linked = memory.links(note.id)
    if as_json:
        output.print_json({**output.as_plain(note), "links": output.as_plain(linked)})
        return
    output.data(note.content)
    others = [f"{link.kind} {memories.short(link.dst)}" for link in linked[:6]]
    more = f", and {len(linked) - 6} more" if len(linked) > 6 else ""
    facts: dict[str, object] = {
        "id": note.id,
        "said": f"{note.said_at:%Y-%m-%d %H:%M %z}" + (f" by {note.source}" if note.source else ""),
        "written": f"{note.written_at:%Y-%m-%d %H:%M %z}",
        "kind": f"{note.kind}, {note.status}" + (f", by {note.superseded_by}" if note.superseded_by else ""),
        "times": "; ".join(memories.resolved(note.content, note.times)),
        "keywords": ", ".join(note.keywords),
        "tags": ", ".join(note.tags),
        "context": note.context,
        "names": ", ".join(note.entities),
        "answers": memories.short(note.reply_to) if note.reply_to else "",
        "links": ", ".join(others) + more,
        "version": f"{note.version}, used {note.uses} times, {note.tokens} tokens",
        "origin": note.meta.get("origin", ""),
    }
    for fact, value in facts.items():
        if value:
            output.data(f"  {fact:9} {value}")
    short = memories.short(note.id)
    if note.version > 1:
        output.next_command(f"loci notes history {short}", "shows what it said of itself before")
    else:
        output.next_command(f"loci notes links {short}", "shows what it is linked to")


def history(
    id: memories.NoteId,
    db: memories.Database = None,
    space: memories.Space = "default",
    as_json: output.Json = False,
) -> None:
    """Show how a note's description changed, and because of which note.

    \b
    Examples:
      loci notes history 2ddedcff
      loci notes history 2ddedcff --json
    """
    with memories.opened(db, space) as memory:
        note = memory.note(memory.find_id(id))
        versions = memory.history(note.id)
        causes = {id: memory.note(id) for id in {version.cause for version in versions} if id is not None}
    if as_json:
        output.print_json({"id": note.id, "content": note.content, "versions": versions})
        return
    output.data(memories.line(note))
    for version in versions:
        by = f"version {version.version}, {version.written_at:%Y-%m-%d %H:%M}, by {version.made_by}: {version.reason}"
        output.data(output.coloured(by, "bold", to="stdout"))
        if version.cause is not None:
            output.data(f"  because   {memories.short(version.cause)}  {memories.line(causes[version.cause])}")
        output.data(f"  context   {version.context or '-'}")
        output.data(f"  keywords  {', '.join(version.keywords) or '-'}")
        output.data(f"  tags      {', '.join(version.tags) or '-'}")
    output.next_command("loci notes journal", "lists the changes that can be taken back")


def links(
    id: memories.NoteId,
    db: memories.Database = None,
    space: memories.Space = "default",
    as_json: output.Json = False,
) -> None:
    """List a note's links, strongest first.

    \b
    Examples:
      loci notes links 2ddedcff
      loci notes links 2ddedcff --json
    """
    with memories.opened(db, space) as memory:
        note = memory.note(memory.find_id(id))
        linked = memory.links(note.id)
        others = {id: memory.note(id) for id in {link.dst for link in linked}}
    if as_json:
        output.print_json({"id": note.id, "links": linked})
        return
    output.say(memories.line(note))
    output.table(
        ["note", "kind", "weight", "because", "date", "who", "words"],
        [
            (
                memories.short(link.dst),
                link.kind,
                link.weight,
                link.reason,
                memories.day(others[link.dst].said_at),
                others[link.dst].source,
                memories.fitted(memories.said(others[link.dst]), taken=80),
            )
            for link in linked
        ],
        right=["weight"],
    )
    if linked:
        output.next_command(f"loci notes show {memories.short(linked[0].dst)}", "shows the other end")
    else:
        output.next_command(f"loci notes show {memories.short(note.id)}", "shows the note itself")


def journal(
    last: Annotated[int, typer.Option(min=1, help="How many entries.")] = 20,
    db: memories.Database = None,
    space: memories.Space = "default",
    as_json: output.Json = False,
) -> None:
    """List what was done, newest first.

    The journal holds numbers and states, never words.

    \b
    Examples:
      loci notes journal
      loci notes journal --last 100 --json
    """
    with memories.opened_store(db) as store:
        entries = store.journal(store.space(space), limit=last)
    if as_json:
        output.print_json(entries)
        return
    show_journal(entries)
    undoable = next((entry["seq"] for entry in entries if entry["op"] in ("evolve", "status")), None)
    if undoable is not None:
        output.next_command(f"loci notes undo {undoable}", "takes that change back")
    else:
        output.next_command("loci notes show", "lists the notes themselves")


def show_journal(entries: Sequence[Mapping[str, Any]]) -> None:
    """Journal entries as a table."""
    rows = [
        (
            entry["seq"],
            str(entry["at"])[:19],
            entry["op"],
            memories.short(entry["note"]) if entry["note"] else None,
            entry["actor"],
            _states(entry["before"]),
            _states(entry["after"]),
        )
        for entry in entries
    ]
    output.table(["entry", "at", "what", "note", "by", "before", "after"], rows, right=["entry"])


def _states(values: Mapping[str, Any] | None) -> str | None:
    return ", ".join(f"{name} {value}" for name, value in values.items()) if values else None


def undo(
    entry: Annotated[int, typer.Argument(metavar="SEQ", help="The number of a journal entry.")],
    db: memories.Database = None,
    space: memories.Space = "default",
    embedder: memories.EmbedderName = "auto",
    as_json: output.Json = False,
) -> None:
    """Take back one change that the journal lists.

    A changed description or state comes back as a new version; nothing is lost by it, and it can be undone too.

    \b
    Examples:
      loci notes undo 17
      loci notes undo 17 --json
    """
    with memories.opened(db, space, embedder=embedder) as memory:
        memory.undo(entry)
        newest = memory.journal(limit=1)[0]
    if as_json:
        output.print_json({"undone": entry, "entry": newest})
        return
    output.data(f"took back entry {entry}; that is entry {newest['seq']} now")
    if newest["note"]:
        output.next_command(f"loci notes history {memories.short(newest['note'])}", "shows the note's versions")
    else:
        output.next_command("loci notes journal", "lists what was done")


def pin(
    id: memories.NoteId,
    off: Annotated[bool, typer.Option("--off", help="Let it be chosen again.")] = False,
    db: memories.Database = None,
    space: memories.Space = "default",
    as_json: output.Json = False,
) -> None:
    """Protect a note from `loci notes keep`.

    \b
    Examples:
      loci notes pin 2ddedcff
      loci notes pin 2ddedcff --off
    """
    with memories.opened(db, space) as memory:
        note = memory.note(memory.find_id(id))
        memory.pin(note.id, pinned=not off)
    if as_json:
        output.print_json({"id": note.id, "pinned": not off})
        return
    output.data(f"{'no longer pinned' if off else 'pinned'}: {memories.short(note.id)}  {memories.line(note)}")
    output.next_command("loci notes keep --max-notes 1000", "forgets what is neither pinned nor useful")


def forget(
    id: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="A note's id, or its beginning or end.", show_default=False)
    ] = None,
    query: Annotated[str | None, typer.Option(help="The one note that answers this best.", show_default=False)] = None,
    source: Annotated[str | None, typer.Option(help="Everything that this speaker said.", show_default=False)] = None,
    between: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="FROM TO",
            help="Everything that was said from the first date to the end of the second.",
            show_default=False,
        ),
    ] = None,
    why: Annotated[str, typer.Option("--why", help="Kept in the journal; do not repeat the words.")] = "asked to",
    yes: output.Yes = False,
    db: memories.Database = None,
    space: memories.Space = "default",
    embedder: memories.EmbedderName = "auto",
    as_json: output.Json = False,
) -> None:
    """Remove notes for good, with every trace.

    Their words leave the file's bytes, every index, and the descriptions of other notes. It cannot be undone. With
    both --source and --between, only notes that meet both go.

    \b
    Examples:
      loci notes forget 2ddedcff
      loci notes forget --query "the old address" --why "moved"
      loci notes forget --source Ada --between "May 2026" "June 2026" --yes
    """
    if sum(value is not None for value in (id, query)) + (source is not None or between is not None) != 1:
        raise BadInput("name what to forget in one way: an ID, --query, or --source and/or --between.")
    with memories.opened(db, space, embedder=embedder) as memory:
        chosen = _chosen(memory, id, query, source, between)
        counts: Mapping[str, int] = {"notes": 0}
        if chosen:
            for note in chosen[:10]:
                output.say(f"  {memories.short(note.id)}  {memories.line(note)}")
            if len(chosen) > 10:
                output.say(f"  and {len(chosen) - 10} more")
            what = "this note" if len(chosen) == 1 else f"these {len(chosen)} notes"
            if not output.confirm(f"Forget {what} for good?", yes=yes):
                output.say("nothing was forgotten")
                return
            if len(chosen) == 1:
                counts = memory.forget(chosen[0].id, why=why)
            else:
                counts = memory.forget(source=source, between=memories.interval(between), why=why)
    if as_json:
        output.print_json(counts)
        return
    output.data(_told(counts) if chosen else "no note fits: nothing was forgotten")
    output.next_command("loci notes check", "proves the store whole")


def _chosen(
    memory: Memory, id: str | None, query: str | None, source: str | None, between: tuple[str, str] | None
) -> list[Note]:
    """The notes that `forget` would remove, as `AMem.forget` chooses them."""
    if id is not None:
        return [memory.note(memory.find_id(id))]
    if query is not None:
        return [memory.note(found.id) for found in memory.read(query, k=1)]
    times = memories.interval(between)
    return [
        note
        for note in memory.notes(status=None)
        if (source is None or note.source == source) and (times is None or times[0] <= note.said_at < times[1])
    ]


def _told(counts: Mapping[str, int]) -> str:
    """What a forgetting removed: "forgot 2 notes (5 links, 3 versions)"."""
    others = ", ".join(
        f"{count} {name.replace('_', ' ')}" for name, count in counts.items() if count and name != "notes"
    )
    return f"forgot {memories.counted(counts.get('notes', 0), 'note')}" + (f" ({others})" if others else "")


def keep(
    max_bytes: Annotated[
        str | None, typer.Option("--max-bytes", help="What may be held: 5000000, 5MB, 1GB.", show_default=False)
    ] = None,
    max_notes: Annotated[
        int | None, typer.Option("--max-notes", min=0, help="How many notes may stay.", show_default=False)
    ] = None,
    yes: output.Yes = False,
    db: memories.Database = None,
    space: memories.Space = "default",
    embedder: memories.EmbedderName = "auto",
    as_json: output.Json = False,
) -> None:
    """Forget the least useful notes until the rest fits.

    Useful is what was used lately and often and has many links; pinned notes stay in any case.

    \b
    Examples:
      loci notes keep --max-notes 10000
      loci notes keep --max-bytes 50MB --yes
    """
    if (max_bytes is None) == (max_notes is None):
        raise BadInput("keep needs one bound: --max-bytes or --max-notes.")
    size = _bytes(max_bytes) if max_bytes is not None else None
    with memories.opened(db, space, embedder=embedder) as memory:
        live, held = len(memory.notes()), memory.nbytes
        fits = held <= size if size is not None else max_notes is not None and live <= max_notes
        counts: Mapping[str, int] = {"notes": 0}
        if not fits:
            bound = output.human_bytes(size) if size is not None else f"{max_notes} notes"
            now = f"{live} notes, {output.human_bytes(held)}"
            if not output.confirm(
                f"Forget the least useful notes for good until {bound} are held ({now} now)?", yes=yes
            ):
                output.say("nothing was forgotten")
                return
            counts = memory.keep(max_bytes=size, max_notes=max_notes)
        live, held = len(memory.notes()), memory.nbytes
    if as_json:
        output.print_json({"forgotten": counts, "notes": live, "bytes": held})
        return
    output.data(f"{_told(counts)}; {live} notes, {output.human_bytes(held)} are held")
    output.next_command("loci audit", "shows what the store holds")


def _bytes(words: str) -> int:
    found = _SIZE.fullmatch(words)
    if found is None:
        raise BadInput(f"{words!r} is no size; write 5000000, 5MB or 1GB.")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def check(db: memories.Database = None, as_json: output.Json = False) -> None:
    """Prove the store whole.

    Every note has its words, vectors and versions, every link its way back, and the file passes the database's own
    test. Erased words that another process kept in the log are removed too. Exit code 1 where a fault is found.

    \b
    Examples:
      loci notes check
      loci notes check --db trip.db --json
    """
    with memories.opened_store(db) as store:
        faults = store.check()
        store.shrink()
        held, where = sum(info.notes for info in store.spaces()), store.where
    if as_json:
        output.print_json({"where": where, "notes": held, "faults": faults})
    else:
        for fault in faults:
            output.data(fault)
        output.say(f"{where}: {held} notes, " + (f"{len(faults)} faults" if faults else "sound"))
        if faults:
            output.next_command("loci notes reembed", "makes vectors and the word index again")
        else:
            output.next_command("loci audit", "shows what the store holds")
    if faults:
        raise typer.Exit(1)


def reembed(
    embedder: Annotated[
        str, typer.Option("--embedder", help="'default', 'none' for words alone, or https://host/v1#model.")
    ] = "default",
    db: memories.Database = None,
    space: memories.Space = "default",
    as_json: output.Json = False,
) -> None:
    """Index all notes again, with another embedder where one is named.

    \b
    Examples:
      loci notes reembed
      loci notes reembed --embedder "http://127.0.0.1:11434/v1#nomic-embed-text" --db trip.db
    """
    from loci import settings
    from loci.lm.embed import load_embedder
    from loci.text.amem import AMem

    made = load_embedder(embedder, api_key=settings.api_key())
    with memories.opened_store(db) as store, output.steps() as step:
        count = AMem.reembedding(store, made, space=space).rebuild(
            progress=lambda done, total: step("indexing notes", done, total)
        )
    name = made.name if made is not None else "words alone"
    if as_json:
        output.print_json({"space": space, "notes": count, "embedder": made.name if made is not None else None})
        return
    output.data(f"indexed {count} notes of space {space!r} with {name}")
    output.next_command("loci notes check", "proves the store whole")


def spaces(db: memories.Database = None, as_json: output.Json = False) -> None:
    """List the spaces of a store.

    \b
    Examples:
      loci notes spaces
      loci notes spaces --db trip.db --json
    """
    with memories.opened_store(db) as store:
        held = store.spaces()
    if as_json:
        output.print_json(held)
        return
    output.table(
        ["space", "notes", "embedder", "numbers a note", "since"],
        [(info.name, info.notes, info.embedder, info.dimension, memories.day(info.created_at)) for info in held],
        right=["notes", "numbers a note"],
    )
    output.next_command(f"loci notes show --space {held[0].name if held else 'default'}", "lists its newest notes")
