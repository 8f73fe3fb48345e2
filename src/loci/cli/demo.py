"""`loci demo`: the first five minutes on one screen: a conversation is remembered, linked, and asked about.

Three friends' chat of ten weeks, written for Loci, is imported into a store of its own; then ten questions are put to
it: who, when, what changed, why, several turns at once, and two about what was never said. Nothing is prepared: what is
answered wrongly is shown as wrong.
"""

from __future__ import annotations

import itertools
import json
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loci.cli import memories, output
from loci.errors import BadInput

if TYPE_CHECKING:
    from datetime import datetime

    from loci.text.memory import Answer, Memory
    from loci.text.organizer import Link, Note, Version

_EXACT = re.compile(r"\d+|january|february|march|april|may|june|july|august|september|october|november|december")
RIGHT_FROM = 0.5  # stemmed F1 against the reference from which an answer counts as right; ours


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One question of the demo, what was answered, and whether that is right. No reference: it was never said."""

    kind: str
    question: str
    reference: str | None
    answer: Answer
    right: bool


def demo(
    keep: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep the memory in this new file.", show_default=False)
    ] = None,
    as_json: output.Json = False,
) -> None:
    """See a conversation remembered, and ten questions answered from it.

    It runs on this machine, without a key, a server or the network, and leaves nothing behind unless --keep names a
    file.

    \b
    Examples:
      loci demo
      loci demo --keep demo.db
      loci demo --json
    """
    from loci.text.memory import Memory

    if keep is not None and keep.exists():
        raise BadInput(f'{keep} is there already; name a new file, or ask it:  loci ask --db {keep} "..."')
    began = time.perf_counter()
    with _place(keep) as path, Memory(path) as memory:
        imported = _import(memory, as_json=as_json)
        pairs = linked(memory)
        change = evolved(memory)
        if not as_json:
            _show_links(memory, pairs)
            _show_change(memory, change)
        now = max(note.said_at for note in memory.notes())
        asked, loading = _ask_all(memory, now, as_json=as_json)
        held = memory.nbytes
    seconds = time.perf_counter() - began
    right = sum(each.right for each in asked)
    answering = [each.answer.seconds for each in asked]
    timings = {
        "import_seconds": imported["seconds"],
        "loading_seconds": loading,
        "seconds_per_answer": sum(answering) / len(answering),
        "seconds": seconds,
    }
    if as_json:
        output.print_json(
            {
                "imported": imported,
                "links": pairs,
                "evolved": None if change is None else {"note": change[0], "before": change[1], "after": change[2]},
                "asked_at": now,
                "questions": asked,
                "right": right,
                "of": len(asked),
                "bytes": held,
                **timings,
            }
        )
        return
    output.say("")
    output.data(f"{right} of {len(asked)} questions answered rightly")
    output.say(
        f"{imported['written']} notes in {output.human_seconds(imported['seconds'])}; embedder and reader loaded in "
        f"{output.human_seconds(loading)}; {output.human_seconds(timings['seconds_per_answer'])} an answer; "
        f"{output.human_bytes(held)} held; {output.human_seconds(seconds)} in all"
    )
    if keep is not None:
        output.next_command(f'loci ask --db {keep} "Who is allergic to hazelnuts?"', "asks it more")
    output.next_command('loci remember "The ferry leaves at nine tomorrow."', "begins a memory of your own")
    output.next_command("loci chat", "talks with it")
    output.next_command("loci import FILE", "takes in chats you have: ChatGPT, Claude, WhatsApp, Markdown, ...")


@contextmanager
def _place(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="loci-demo-") as folder:
        yield Path(folder) / "demo.db"


def _import(memory: Memory, *, as_json: bool) -> dict[str, Any]:
    with as_file(files("loci.cli") / "demo_conversation.jsonl") as file:
        turns = len(file.read_text(encoding="utf-8").splitlines())
        if memory.amem.embedder is not None:
            memory.amem.embedder.embed(["warm"])  # so that the time below is the import's own
        began = time.perf_counter()
        with output.progress("remembering a conversation of three friends", total=turns) as advance:
            report = memory.import_notes(file, progress=advance)
        seconds = time.perf_counter() - began
    notes = memory.notes()
    first, last = notes[0].said_at, notes[-1].said_at
    if not as_json:
        people = ", ".join(sorted({note.source or "" for note in notes}))
        output.say(
            f"remembered {report.written} turns of {people}, {memories.day(first)} to {memories.day(last)}, in "
            f"{output.human_seconds(seconds)} ({report.written / seconds:.0f} a second); no language model was needed"
        )
    return {"turns": report.read, "written": report.written, "seconds": seconds, "first": first, "last": last}


def linked(memory: Memory) -> list[tuple[Note, Link, Note]]:
    """For each way in which notes get linked, the strongest example: a note, its link, and the note at its end."""
    best: dict[str, tuple[Note, Link, Note]] = {}
    by_id = {note.id: note for note in memory.notes()}
    for note in by_id.values():
        for link in memory.links(note.id):
            other = by_id[link.dst]
            # A link across days says more than one between neighbours, except a reply.
            far = (note.said_at - other.said_at).days > 0 or link.kind == "reply"
            taken = any(note.id == subject.id for subject, _, _ in best.values())
            if far and note.said_at > other.said_at and not taken:
                known = best.get(link.kind)
                if known is None or link.weight > known[1].weight:
                    best[link.kind] = (note, link, other)
    return list(best.values())[:3]


def evolved(memory: Memory) -> tuple[Note, Version, Version] | None:
    """The note that another note taught most: the note, and its versions before and after; None where none changed."""
    changes = [
        (note, before, after)
        for note in memory.notes()
        if note.version > 1
        for before, after in itertools.pairwise(memory.history(note.id))
        if after.cause is not None and after.context != before.context
    ]
    return max(changes, key=lambda change: len(change[2].context) - len(change[1].context), default=None)


def _show_links(memory: Memory, pairs: Sequence[tuple[Note, Link, Note]]) -> None:
    output.data(output.coloured("\nNotes link themselves", "bold", to="stdout"))
    for note, link, other in pairs:
        output.data(f"  {memories.line(note)}")
        output.data(output.coloured(f"    {link.kind}, {link.weight:.2f}: {link.reason}", "dim", to="stdout"))
        output.data(f"    {memories.line(other)}")


def _show_change(memory: Memory, change: tuple[Note, Version, Version] | None) -> None:
    if change is None:
        return
    note, before, after = change
    output.data(output.coloured("\nand rewrite what older notes say of themselves", "bold", to="stdout"))
    output.data(f"  {memories.line(note)}")
    output.data(f"    before   {before.context}")
    output.data(f"    after    {after.context}")
    if after.cause is not None:
        output.data(f"    because  {memories.line(memory.note(after.cause))}")


def _ask_all(memory: Memory, now: datetime, *, as_json: bool) -> tuple[list[Asked], float]:
    """Put every question; returns what came of it, and how long the models took to load."""
    questions = json.loads((files("loci.cli") / "demo_questions.json").read_text(encoding="utf-8"))["questions"]
    began = time.perf_counter()
    memory.warm()
    loading = time.perf_counter() - began
    if not as_json:
        heading = f"\nTen questions, asked on {memories.day(now)}"
        output.data(output.coloured(heading, "bold", to="stdout"))
    asked = []
    for number, entry in enumerate(questions, start=1):
        each = _judged(entry, memory.ask(entry["question"], at=now))
        asked.append(each)
        if not as_json:
            _show_asked(number, each)
    return asked, loading


def _judged(entry: Mapping[str, Any], answer: Answer) -> Asked:
    reference = entry["answer"]
    return Asked(
        kind=entry["kind"],
        question=entry["question"],
        reference=reference,
        answer=answer,
        right=agrees(answer.text if answer.found else None, reference),
    )


def agrees(answer: str | None, reference: str | None) -> bool:
    """Whether an answer is right: half of the words shared, and every number and month of the reference; or no answer
    where it was never said."""
    from loci.bench.scoring import stemmed_f1

    if answer is None or reference is None:
        return answer is reference
    exact = set(_EXACT.findall(reference.lower())) <= set(_EXACT.findall(answer.lower()))
    return exact and stemmed_f1(answer, reference) >= RIGHT_FROM


def _show_asked(number: int, each: Asked) -> None:
    answer = each.answer
    output.data(f"{number:2}. {each.question}")
    verdict = output.coloured("right", "green", to="stdout") if each.right else output.coloured(
        f"wrong, expected: {each.reference or 'that it was never said'}", "red", to="stdout"
    )  # fmt: skip
    said = answer.text if answer.found else memories.NOT_TOLD
    output.data(f"    {said}   ({answer.confidence:.2f}, {verdict})")
    for note in answer.notes:
        output.data(output.coloured(f"    {memories.line(note)}", "dim", to="stdout"))
