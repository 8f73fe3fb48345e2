"""`loci.Memory`: the product object, asynchronous twin, imports that can be stopped, answers."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

import loci
from loci.errors import BadImport, NotAStore, RecalledText, UnknownName, UnknownNote, UnknownSpace
from loci.lm.scripted import ScriptedModel
from loci.text.amem import AMem
from loci.text.memory import AsyncMemory, Memory
from loci.text.recall import block


@pytest.fixture
def memory(tmp_path: Path) -> Any:
    with Memory(tmp_path / "memory.db", embedder=None) as opened:
        yield opened


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    """140 turns: three transactions of an import."""
    file = tmp_path / "chat.jsonl"
    with file.open("w") as out:
        for n in range(140):
            turn = {
                "role": "user",
                "name": f"P{n % 2}",
                "content": f"Turn {n}: box {n % 7}",
                "timestamp": 1.7e9 + 60 * n,
            }
            out.write(json.dumps(turn) + "\n")
    return file


def methods(kind: type) -> dict[str, Any]:
    return {name: value for name, value in vars(kind).items() if callable(value) and not name.startswith("_")}


def test_the_asynchronous_memory_has_the_same_methods_with_the_same_parameters() -> None:
    ours, theirs = methods(Memory), methods(AsyncMemory)
    assert set(ours) == set(theirs) - {"nbytes"}
    for name, method in ours.items():
        assert inspect.signature(method).parameters == inspect.signature(theirs[name]).parameters, name
        assert inspect.iscoroutinefunction(theirs[name]), name


async def test_the_asynchronous_memory_does_the_same(tmp_path: Path) -> None:
    async with AsyncMemory(Memory(tmp_path / "memory.db", embedder=None)) as memory:
        written = await memory.write("The heron nests on the lighthouse.", source="Ada")
        assert [found.id for found in await memory.read("heron")] == [written.id]
        assert (await memory.note(written.id)).source == "Ada"
        assert await memory.nbytes() == memory.memory.nbytes
        assert (await memory.forget(written.id))["notes"] == 1
        assert "".join(await memory.export()).count("\n") == 1
        assert await memory.check() == []


def said(memory: Memory) -> list[tuple[Any, ...]]:
    return [(note.content, note.source, note.said_at, note.kind) for note in memory.notes()]


def test_an_import_is_the_same_twice(memory: Memory, chat: Path) -> None:
    report = memory.import_notes(chat)
    assert (report.read, report.written, report.known) == (140, 140, 0)
    before = said(memory)
    report = memory.import_notes(chat)
    assert (report.read, report.written, report.known) == (140, 0, 140)
    assert said(memory) == before
    assert memory.check() == []


@pytest.mark.parametrize("batch", range(3))
def test_an_import_goes_on_after_an_interruption_in_any_batch(
    batch: int, memory: Memory, chat: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_many = AMem.write_many
    calls = 0

    def interrupted(self: AMem, items: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == batch + 1:
            raise KeyboardInterrupt
        return write_many(self, items)

    with monkeypatch.context() as patched:
        patched.setattr(AMem, "write_many", interrupted)
        patched.setattr("loci.text.memory._AT_ONCE", 64)
        with pytest.raises(KeyboardInterrupt):
            memory.import_notes(chat)
    stored = len(memory.notes())
    assert stored == 64 * batch
    report = memory.import_notes(chat)
    assert (report.known, report.written) == (stored, 140 - stored)
    with Memory(tmp_path / "whole.db", embedder=None) as whole:
        whole.import_notes(chat)
        assert said(memory) == said(whole)
        replies = [[note.reply_to is None for note in each.notes()] for each in (memory, whole)]
    assert replies[0] == replies[1]
    assert memory.check() == []


def test_what_came_before_a_broken_line_is_stored(memory: Memory, tmp_path: Path) -> None:
    file = tmp_path / "broken.jsonl"
    file.write_text('{"role": "user", "content": "whole"}\n{"role": "user", "content": \n')
    with pytest.raises(BadImport):
        memory.import_notes(file)
    assert [note.content for note in memory.notes()] == ["whole"]


def test_an_export_that_is_imported_keeps_words_speakers_dates_and_kinds(memory: Memory, tmp_path: Path) -> None:
    memory.write("The heron nests on the lighthouse.", source="Ada", at="2026-05-08T10:00:00+02:00")
    memory.write("Herons eat eels.", kind="fact", at="2026-05-09T10:00:00+00:00")
    memory.write("\u05e9\u05dc\u05d5\u05dd 🐟\nsecond line", source="Ivo", kind="user", at="2026-05-10T10:00:00-05:00")
    file = tmp_path / "export.jsonl"
    file.write_text("".join(memory.export()))
    with Memory(tmp_path / "other.db", embedder=None) as other:
        assert other.import_notes(file).written == 3
        assert said(other) == said(memory)
        assert other.import_notes(file).known == 3
    with pytest.raises(UnknownName, match="'markdown'"):
        memory.export(format="markdwon")


def test_a_recalled_block_is_refused_as_news(memory: Memory) -> None:
    memory.write("The heron nests on the lighthouse.")
    with pytest.raises(RecalledText):
        memory.write(f"I was told: {block(memory.read('heron'))}")
    assert len(memory.notes()) == 1


def test_an_empty_memory_answers_that_it_was_not_told_and_loads_no_model(memory: Memory) -> None:
    answer = memory.ask("Where does the heron nest?")
    assert (answer.found, answer.text, answer.notes, answer.tokens_in) == (False, "", (), 0)


def test_a_capable_model_answers_from_a_marked_block_and_names_its_notes(tmp_path: Path) -> None:
    model = ScriptedModel(
        ['{"found": true, "answer": "lighthouse", "notes": [2, 2]}', '{"found": false, "answer": "x", "notes": [1]}']
    )
    with Memory(tmp_path / "memory.db", embedder=None, model=model) as memory:
        memory.write("Herons eat eels.", at="1 May 2026")
        told = memory.write("The heron nests on the lighthouse.", at="2 May 2026")
        answer = memory.ask("Where does the heron nest?", why=True)
        assert (answer.text, [note.id for note in answer.notes]) == ("lighthouse", [told.id])
        assert all(note.parts for note in answer.considered)
        refused = memory.ask("Where does the heron sleep?")
        assert (refused.found, refused.text, refused.notes) == (False, "", ())


def test_without_a_path_the_users_own_memory_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCI_HOME", str(tmp_path / "home"))
    with loci.Memory(embedder=None) as memory:
        memory.write("kept")
        assert memory.store.where == str(tmp_path / "home" / "memory.db")
    assert (tmp_path / "home" / "memory.db").is_file()


def test_an_unknown_organizer_names_its_neighbour(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="'amem'"):
        Memory(tmp_path / "memory.db", organizer="amen")


def test_nothing_is_created_where_that_is_not_wanted(tmp_path: Path) -> None:
    file = tmp_path / "memory.db"
    with pytest.raises(NotAStore, match="does not exist yet"):
        Memory(file, create=False)
    assert not file.exists()
    Memory(file, embedder=None).close()
    with pytest.raises(UnknownSpace):
        Memory(file, space="wrok", create=False)
    Memory(file, create=False).close()


def test_the_usual_embedder_follows_the_space(tmp_path: Path) -> None:
    with Memory(tmp_path / "memory.db", embedder=None) as memory:
        memory.write("words alone")
    with Memory(tmp_path / "memory.db") as memory:
        assert memory.amem.embedder is None
        assert memory.read("words")
    with Memory(tmp_path / "memory.db", space="new") as memory:
        assert memory.amem.embedder is not None


def test_an_id_is_known_by_its_beginning_or_its_end(memory: Memory) -> None:
    ids = [memory.write(f"note {n}").id for n in range(3)]
    for id in ids:
        assert memory.find_id(id) == memory.find_id(id[-8:]) == id
    for part in ("", ids[0][:6], "%", "zzzz"):
        with pytest.raises(UnknownNote):
            memory.find_id(part)
