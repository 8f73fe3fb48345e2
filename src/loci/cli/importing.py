"""`loci import` and `loci export`: notes from files, and notes to files."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loci.cli import memories, output
from loci.errors import BadInput

if TYPE_CHECKING:
    from loci.text.memory import ImportReport


@dataclass(frozen=True, kw_only=True)
class Imported:
    """One file that was read to its end."""

    file: Path
    report: ImportReport
    seconds: float


def import_files(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Files of notes or chats.")],
    format: Annotated[
        str | None,
        typer.Option(
            help="loci, chatgpt, claude, mem0, letta, locomo, chat, transcript or markdown; else the file tells.",
            show_default=False,
        ),
    ] = None,
    db: memories.Database = None,
    space: memories.Space = "default",
    embedder: memories.EmbedderName = "auto",
    as_json: output.Json = False,
) -> None:
    """Take in files of notes or chats.

    Markdown, transcripts with "Name: text" lines, WhatsApp, JSONL chat messages, the exports of ChatGPT and Claude,
    dumps of mem0 and Letta, and Loci's own exports. What an earlier import has stored is left alone, so an import that
    was stopped goes on when it is run again.

    \b
    Examples:
      loci import conversations.json
      loci import notes/*.md --space work
      loci import chat.txt --format transcript --json
    """
    done: list[Imported] = []
    try:
        with memories.opened(db, space, embedder=embedder, create=True) as memory:
            for file in files:
                began = time.perf_counter()
                with output.progress(f"importing {file.name}") as advance:
                    report = memory.import_notes(file, format=format, progress=advance)
                done.append(Imported(file=file, report=report, seconds=time.perf_counter() - began))
    except KeyboardInterrupt:
        output.say("\nStopped. What was read so far is stored; run the same command again and it goes on from there.")
        raise typer.Exit(130) from None
    finally:
        # Files before one that cannot be read are in: that must be told before the error is.
        _show(done, as_json=as_json)
    if not as_json:
        output.next_command('loci ask "..."', "asks about it")


def _show(done: Iterable[Imported], *, as_json: bool) -> None:
    rows = [
        {"file": one.file, "read": one.report.read, "new": one.report.written, "known": one.report.known,
         "duplicates": one.report.duplicates, "seconds": one.seconds}
        for one in done
    ]  # fmt: skip
    if as_json:
        output.print_json(rows)
    elif rows:
        output.table(
            list(rows[0]),
            [(*list(row.values())[:-1], output.human_seconds(float(str(row["seconds"])))) for row in rows],
            right=["read", "new", "known", "duplicates", "seconds"],
        )


def export(
    format: Annotated[str, typer.Option(help="jsonl (complete, can be imported) or markdown (to read).")] = "jsonl",
    out: Annotated[
        Path | None, typer.Option("--out", help="The file to write; else standard output.", show_default=False)
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Write over a file that is there already.")] = False,
    db: memories.Database = None,
    space: memories.Space = "default",
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written where as JSON; needs --out.")] = False,
) -> None:
    """Write notes to a file, or to standard output.

    A file appears whole or not at all, and one that is there already is not touched without --yes.

    \b
    Examples:
      loci export --out memory.jsonl
      loci export --format markdown > memory.md
      loci notes export --space work --out work.jsonl --yes
    """
    if as_json and out is None:
        raise BadInput("--json tells where a file was written; name it with --out. The export itself is JSON lines.")
    with memories.opened(db, space) as memory:
        pieces = memory.export(format=format)
        if out is None:
            for piece in pieces:
                output.data(piece, end="")
            output.next_command("loci export --out FILE", "writes it to a file")
            return
        if out.exists() and not out.is_file():
            raise BadInput(f"{out} is no file that can be written over; name another with --out.")
        if out.exists() and not output.confirm(f"{out} is there already. Write over it?", yes=yes):
            output.say("nothing was written")
            return
        count = len(memory.notes(status=None if format == "jsonl" else "live"))
        size = _write_whole(out, pieces)
    if as_json:
        output.print_json({"file": out, "format": format, "notes": count, "bytes": size})
        return
    output.data(f"{out}: {count} notes, {output.human_bytes(size)}")
    output.next_command(f"loci import {out} --db other.db", "takes it in elsewhere")


def _write_whole(out: Path, pieces: Iterable[str]) -> int:
    """Write the pieces so that the file is there whole or not at all; returns its bytes."""
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        part.replace(out)
        return out.stat().st_size
    except OSError as problem:
        raise BadInput(f"{out} cannot be written ({problem.strerror}); name another file with --out.") from problem
    finally:
        part.unlink(missing_ok=True)
