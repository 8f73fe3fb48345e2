"""`loci import`, `loci export`: files in, files out, nothing lost on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loci.text.memory import Memory

NONE = ("--embedder", "none")


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    file = tmp_path / "chat.jsonl"
    lines = [
        {"role": "user", "name": f"P{n % 3}", "content": f"Message {n} of all.", "timestamp": 1.7e9 + 60 * n}
        for n in range(70)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_each_file_is_reported_and_a_second_import_finds_all_known(loci: Any, chat: Path, tmp_path: Path) -> None:
    other = tmp_path / "notes.md"
    other.write_text("# Roof\n\nIt leaks.\n")
    rows = loci("import", str(chat), str(other), "--json", *NONE).data
    assert [(row["read"], row["new"], row["known"]) for row in rows] == [(70, 70, 0), (1, 1, 0)]
    again = loci("import", str(chat), *NONE)
    assert again.out.splitlines()[1].split()[1:5] == ["70", "0", "70", "0"]
    assert "next: loci ask" in again.err


def test_ctrl_c_keeps_what_is_stored_and_the_same_command_goes_on(
    loci: Any, chat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = 0
    write_many = Memory.import_notes

    def stopped(self: Memory, path: Path, **options: Any) -> Any:
        def progress(steps: int) -> None:
            nonlocal batches
            batches += 1
            if batches == 1:
                raise KeyboardInterrupt

        return write_many(self, path, format=options["format"], progress=progress)

    with monkeypatch.context() as patched:
        patched.setattr(Memory, "import_notes", stopped)
        patched.setattr("loci.text.memory._AT_ONCE", 64)
        ended = loci("import", str(chat), *NONE)
    assert ended.code == 130
    assert "run the same command again" in ended.err
    row = loci("import", str(chat), "--json", *NONE).data[0]
    assert (row["new"], row["known"]) == (6, 64)
    assert loci("notes", "check").code == 0


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.txt", None, "does not exist"),
        ("empty.md", "", "empty"),
        ("odd.json", '{"foo": 1}', "Known: "),
        ("prose.txt", "just a line\nand another\n", "--format"),
    ],
)
def test_a_file_that_cannot_be_read_is_a_sentence(
    name: str, content: str | None, words: str, loci: Any, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    ended = loci("import", str(tmp_path / name), *NONE)
    assert ended.code == 2
    assert ended.err.splitlines()[-1].startswith("BadImport: ")
    assert words in ended.err


def test_an_unknown_format_names_its_neighbour(loci: Any, chat: Path) -> None:
    assert "'chatgpt'" in loci("import", str(chat), "--format", "chatgtp", *NONE).err


def test_an_export_is_whole_never_overwrites_unasked_and_can_be_imported(loci: Any, chat: Path, tmp_path: Path) -> None:
    loci("import", str(chat), *NONE)
    out = tmp_path / "memory.jsonl"
    row = loci("export", "--out", str(out), "--json").data
    assert (row["notes"], row["bytes"]) == (70, out.stat().st_size)
    refused = loci("export", "--out", str(out))
    assert (refused.code, "--yes" in refused.err) == (2, True)
    assert loci("export", "--out", str(out), "--yes").code == 0
    assert list(tmp_path.glob(".*.part")) == []

    elsewhere = ("--db", str(tmp_path / "other.db"))
    assert loci("import", str(out), "--json", *elsewhere, *NONE).data[0]["new"] == 70
    assert loci("export", *elsewhere).out.count("\n") == 71
    assert "# default" in loci("export", "--format", "markdown").out


def test_an_export_to_where_nobody_may_write_is_a_sentence(loci: Any, tmp_path: Path) -> None:
    loci("remember", "x", *NONE)
    ended = loci("export", "--out", str(tmp_path / "none" / "memory.jsonl"))
    assert (ended.code, "cannot be written" in ended.err) == (2, True)
    assert "'markdown'" in loci("export", "--format", "markdwon").err
    assert "--out" in loci("export", "--json").err
