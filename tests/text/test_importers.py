"""Reading what others have kept. The files here have the shape of the real exports, written by hand."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import tracemalloc
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loci.errors import BadImport, UnknownName
from loci.text.importers import FORMATS, detect, read_notes


def write(folder: Path, name: str, content: object) -> Path:
    path = folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def said(path: Path, **options: str) -> list[tuple[str | None, str]]:
    return [(note.source, note.text) for note in read_notes(path, **options)]


CHATGPT = [
    {
        "title": "Trip",
        "create_time": 1683554160.5,
        "conversation_id": "c1",
        "current_node": "n5",
        "mapping": {
            "n0": {"id": "n0", "message": None, "parent": None, "children": ["n1"]},
            "n1": {
                "id": "n1",
                "parent": "n0",
                "children": ["n2"],
                "message": {
                    "id": "m1",
                    "author": {"role": "system"},
                    "create_time": None,
                    "content": {"content_type": "text", "parts": [""]},
                },
            },
            "n2": {
                "id": "n2",
                "parent": "n1",
                "children": ["n3", "n4"],
                "message": {
                    "id": "m2",
                    "author": {"role": "user"},
                    "create_time": 1683554161.0,
                    "content": {"content_type": "multimodal_text", "parts": [{"asset_pointer": "x"}, "Plan a trip"]},
                },
            },
            "n3": {
                "id": "n3",
                "parent": "n2",
                "children": [],
                "message": {
                    "id": "m3",
                    "author": {"role": "assistant"},
                    "create_time": 1683554170.0,
                    "content": {"content_type": "text", "parts": ["Abandoned answer"]},
                },
            },
            "n4": {
                "id": "n4",
                "parent": "n2",
                "children": ["n5"],
                "message": {
                    "id": "m4",
                    "author": {"role": "tool", "name": "browser"},
                    "create_time": 1683554171.0,
                    "content": {"content_type": "text", "parts": ["a page"]},
                },
            },
            "n5": {
                "id": "n5",
                "parent": "n4",
                "children": [],
                "message": {
                    "id": "m5",
                    "author": {"role": "assistant"},
                    "create_time": 1683554180.0,
                    "content": {"content_type": "text", "parts": ["Go to Rome."]},
                },
            },
        },
    }
]
CLAUDE = [
    {
        "uuid": "u1",
        "name": "Dogs",
        "created_at": "2024-01-05T10:00:00.000000Z",
        "chat_messages": [
            {
                "uuid": "a",
                "sender": "human",
                "text": "old text",
                "created_at": "2024-01-05T10:00:01.000000Z",
                "content": [{"type": "text", "text": "My dog is Max."}],
                "attachments": [{"file_name": "max.txt", "extracted_content": "All about Max"}],
            },
            {
                "uuid": "b",
                "sender": "assistant",
                "text": "Nice name!",
                "created_at": "2024-01-05T10:00:09.000000Z",
                "content": [{"type": "thinking", "thinking": "hm"}, {"type": "tool_use", "input": {}}],
            },
        ],
    }
]
MEM0 = {
    "results": [
        {"id": "1", "memory": "Likes tea", "created_at": "2024-07-26T10:29:36.630547-07:00", "user_id": "alex"},
        {"id": "2", "memory": "Lives in Rome", "created_at": None, "metadata": {"category": "home"}},
    ]
}
LETTA = {
    "agents": [
        {
            "messages": [
                {"id": "m0", "role": "system", "content": [{"type": "text", "text": "You are ..."}]},
                {
                    "id": "m1",
                    "role": "user",
                    "created_at": "2025-01-01T00:00:00+00:00",
                    "content": [{"type": "text", "text": json.dumps({"type": "user_message", "message": "Hi there"})}],
                },
                {
                    "id": "m2",
                    "role": "assistant",
                    "created_at": "2025-01-01T00:00:05+00:00",
                    "content": [{"type": "text", "text": "the user greets me"}],
                    "tool_calls": [{"function": {"name": "send_message", "arguments": '{"message": "Hello!"}'}}],
                },
                {
                    "id": "m3",
                    "role": "user",
                    "content": [{"type": "text", "text": json.dumps({"type": "heartbeat", "reason": "x"})}],
                },
            ]
        }
    ],
    "blocks": [{"id": "b1", "label": "human", "value": "Name: Sarah"}],
}
LOCOMO = [
    {
        "sample_id": "conv-1",
        "conversation": {
            "speaker_a": "Ann",
            "speaker_b": "Bob",
            "session_10": [{"speaker": "Bob", "dia_id": "D10:1", "text": "Later"}],
            "session_10_date_time": "9:00 am on 1 June, 2023",
            "session_2": [
                {"speaker": "Ann", "dia_id": "D2:1", "text": "Look!", "blip_caption": "a photo of a dog"},
                {"speaker": "Bob", "dia_id": "D2:2", "text": "Nice."},
            ],
            "session_2_date_time": "1:56 pm on 8 May, 2023",
        },
    }
]
CHAT_LINES = (
    '{"role": "system", "content": "Be kind"}\n'
    '{"role": "user", "name": "Ann", "content": "Hi", "timestamp": 1683554160}\n'
    "\n"
    '{"role": "assistant", "content": [{"type": "text", "text": "Hello"}], "created_at": "2023-05-08T14:00:00Z"}'
)
TRANSCRIPT = """8 May 2023

Ann: I went there
with my dog.

Bob (10:02): Nice!
=== 2023-05-09 ===
Ann: Back again
"""
WHATSAPP = (
    "[08.05.23, 14:12:05] Ann: \u200eMessages and calls are end-to-end encrypted.\n"
    "[08.05.23, 14:12:09] Ann: Hallo Bob: wie geht's?\r\n"
    "zweite Zeile: mit Doppelpunkt\r\n"
    "\u200e[13.05.23, 09:00:00] Bob M.: \u200eBild weggelassen <Medien weggelassen>\r\n"
)
MARKDOWN = """---
title: Diary
date: 2023-05-08
---
Before any heading.

# Trips
## Rome
It was warm.
```
# no heading
```
## 9 May 2023
A dated section.

Other
=====
Last words.
"""
FILES = {
    "chatgpt": ("conversations.json", CHATGPT),
    "claude": ("conversations.json", CLAUDE),
    "mem0": ("memories.json", MEM0),
    "letta": ("agent.af", LETTA),
    "locomo": ("locomo.json", LOCOMO),
    "chat": ("chat.jsonl", CHAT_LINES),
    "transcript": ("talk.txt", TRANSCRIPT),
    "markdown": ("notes.md", MARKDOWN),
}


@pytest.fixture(params=sorted(FILES))
def example(request, tmp_path):
    return request.param, write(tmp_path, *FILES[request.param])


def test_the_format_is_recognised(example):
    name, path = example
    assert detect(path) == name


def test_every_note_has_words_a_place_and_a_key_of_its_own(example):
    _, path = example
    notes = list(read_notes(path))
    assert notes
    assert len({note.key for note in notes}) == len(notes)
    for note in notes:
        assert note.text.strip()
        assert note.origin.startswith(path.name)
        assert note.at is None or note.at.tzinfo is not None
        assert note.reply_to is None or note.reply_to in {other.key for other in notes}


def test_keys_do_not_depend_on_where_the_file_lies_or_what_it_is_called(example, tmp_path):
    name, path = example
    (tmp_path / "elsewhere").mkdir()
    copy = write(tmp_path / "elsewhere", f"renamed{path.suffix}", path.read_bytes())
    assert [note.key for note in read_notes(copy)] == [note.key for note in read_notes(path, format=name)]


@pytest.mark.parametrize("change", ["mark", "windows", "utf16", "gzip"])
def test_marks_line_ends_utf16_and_gzip_change_nothing(example, tmp_path, change):
    name, path = example
    text = path.read_bytes().decode().replace("\r\n", "\n")
    made = {
        "mark": codecs.BOM_UTF8 + text.encode(),
        "windows": text.replace("\n", "\r\n").encode(),
        "utf16": text.encode("utf-16"),
        "gzip": gzip.compress(text.encode()),
    }[change]
    (tmp_path / "changed").mkdir()
    changed = write(tmp_path / "changed", path.name + (".gz" if change == "gzip" else ""), made)
    assert detect(changed) == name
    assert [(note.key, note.text) for note in read_notes(changed)] == [
        (note.key, note.text) for note in read_notes(path)
    ]


def test_chatgpt_follows_the_branch_that_was_seen_last(tmp_path):
    notes = list(read_notes(write(tmp_path, *FILES["chatgpt"])))
    assert [(note.source, note.text) for note in notes] == [("user", "Plan a trip"), ("assistant", "Go to Rome.")]
    assert notes[1].reply_to == notes[0].key
    assert notes[0].at == datetime(2023, 5, 8, 13, 56, 1, tzinfo=UTC)
    assert notes[0].meta == {"conversation": "Trip"}


def test_chatgpt_without_a_current_node_takes_the_newest_leaf_and_a_circle_ends(tmp_path):
    chat = json.loads(json.dumps(CHATGPT))
    del chat[0]["current_node"]
    assert said(write(tmp_path, "a.json", chat))[-1] == ("assistant", "Go to Rome.")
    chat[0]["mapping"]["n0"]["parent"] = "n5"
    chat[0]["mapping"]["n5"]["children"] = ["n0"]
    chat[0]["current_node"] = "n5"
    assert len(said(write(tmp_path, "b.json", chat))) == 2


def test_claude_reads_blocks_before_text_and_attachments_as_documents(tmp_path):
    notes = list(read_notes(write(tmp_path, *FILES["claude"])))
    assert [(note.source, note.text, note.kind) for note in notes] == [
        ("user", "My dog is Max.", "turn"),
        ("max.txt", "All about Max", "document"),
        ("assistant", "Nice name!", "turn"),
    ]
    assert notes[2].reply_to == notes[0].key


def test_mem0_memories_are_facts(tmp_path):
    notes = list(read_notes(write(tmp_path, *FILES["mem0"])))
    assert [(note.source, note.text, note.kind) for note in notes] == [
        ("alex", "Likes tea", "fact"),
        (None, "Lives in Rome", "fact"),
    ]
    assert notes[0].at is not None
    assert notes[1].at is None
    as_list = list(read_notes(write(tmp_path, "list.json", MEM0["results"])))
    assert [note.key for note in as_list] == [note.key for note in notes]


def test_letta_reads_blocks_and_what_was_spoken(tmp_path):
    assert said(write(tmp_path, *FILES["letta"])) == [
        ("human", "Name: Sarah"),
        ("user", "Hi there"),
        ("assistant", "Hello!"),
    ]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([{"id": "p1", "text": "A passage", "created_at": "2025-01-01T00:00:00Z"}], [(None, "A passage")]),
        ({"passages": [{"id": "p1", "text": "A passage"}]}, [(None, "A passage")]),
        ([{"id": "x", "message_type": "user_message", "content": "Hi", "date": "2025-01-01"}], [("user", "Hi")]),
        ([{"id": "x", "message_type": "reasoning_message", "reasoning": "hm"}], []),
    ],
)  # fmt: skip
def test_letta_lists_are_read_too(tmp_path, content, expected):
    path = write(tmp_path, "dump.json", content)
    assert detect(path) == "letta"
    assert said(path) == expected


def test_locomo_sessions_come_in_order_with_captions(tmp_path):
    notes = list(read_notes(write(tmp_path, *FILES["locomo"])))
    assert [(note.source, note.text) for note in notes] == [
        ("Ann", "Look! [picture: a photo of a dog]"),
        ("Bob", "Nice."),
        ("Bob", "Later"),
    ]
    assert [note.at.replace(tzinfo=None).isoformat() for note in notes if note.at] == [
        "2023-05-08T13:56:00",
        "2023-05-08T13:56:00",
        "2023-06-01T09:00:00",
    ]
    assert notes[2].reply_to is None


def test_chat_lines_take_names_roles_and_any_time_field(tmp_path):
    notes = list(read_notes(write(tmp_path, *FILES["chat"])))
    assert [(note.source, note.text) for note in notes] == [("Ann", "Hi"), ("assistant", "Hello")]
    assert notes[0].at == datetime(2023, 5, 8, 13, 56, tzinfo=UTC)
    assert said(write(tmp_path, "list.json", [{"role": "user", "content": "Hi"}])) == [("user", "Hi")]
    nested = write(tmp_path, "nested.jsonl", {"messages": [{"role": "user", "content": "Hi"}]})
    assert said(nested) == [("user", "Hi")]


def test_a_chat_that_went_on_keeps_its_keys(tmp_path):
    before = list(read_notes(write(tmp_path, "a.jsonl", CHAT_LINES)))
    after = list(read_notes(write(tmp_path, "b.jsonl", CHAT_LINES + '\n{"role": "user", "content": "Hi"}')))
    assert [note.key for note in after][: len(before)] == [note.key for note in before]
    talk = list(read_notes(write(tmp_path, "a.txt", TRANSCRIPT)))
    more = list(read_notes(write(tmp_path, "b.txt", TRANSCRIPT + "Bob: Hi\nBob: Hi\n")))
    assert [note.key for note in more][: len(talk)] == [note.key for note in talk]
    assert len({note.key for note in more}) == 5


def test_transcript_joins_lines_and_reads_dates(tmp_path):
    notes = list(read_notes(write(tmp_path, *FILES["transcript"])))
    assert [(note.source, note.text) for note in notes] == [
        ("Ann", "I went there\nwith my dog."),
        ("Bob", "Nice!"),
        ("Ann", "Back again"),
    ]
    assert [f"{note.at:%Y-%m-%d %H:%M}" for note in notes] == [
        "2023-05-08 00:00",
        "2023-05-08 10:02",
        "2023-05-09 00:00",
    ]
    assert notes[1].reply_to == notes[0].key


@pytest.mark.parametrize(
    ("line", "speaker", "words", "at"),
    [
        ("[2024-01-05 10:00] Ann: Hi", "Ann", "Hi", "2024-01-05 10:00"),
        ("2024-01-05 10:00 Ann B.: Hi: you", "Ann B.", "Hi: you", "2024-01-05 10:00"),
        ("2024-01-05T10:00:00Z Ann: Hi", "Ann", "Hi", "2024-01-05 10:00"),
        ("Ann [2024-01-05 10:00]: Hi", "Ann", "Hi", "2024-01-05 10:00"),
        ("05/01/2024, 22:00 - Ann: Hi", "Ann", "Hi", "2024-01-05 22:00"),
        ("1/5/24, 10:00 PM - +49 170 1234567: Hi", "+49 170 1234567", "Hi", "2024-01-05 22:00"),
        ("25/01/2024, 22:00 - Ann: Hi", "Ann", "Hi", "2024-01-25 22:00"),
        ("**Ann:** Hi", "Ann", "Hi", None),
        ("- Ann: Hi", "Ann", "Hi", None),
        ("(10:02) Ann: Hi", "Ann", "Hi", None),
        ("李雷: 你好", "李雷", "你好", None),
        ("Zoë 🎉 Müller: Hi", None, None, None),
    ],
)
def test_lines_of_a_transcript_may_look_like_this(tmp_path, line, speaker, words, at):
    path = write(tmp_path, "talk.txt", line + "\n")
    if speaker is None:
        with pytest.raises(BadImport):
            list(read_notes(path, format="transcript"))
        return
    (note,) = read_notes(path)
    assert (note.source, note.text) == (speaker, words)
    assert (f"{note.at:%Y-%m-%d %H:%M}" if note.at else None) == at


def test_whatsapp_takes_the_order_of_day_and_month_from_the_whole_file(tmp_path):
    notes = list(read_notes(write(tmp_path, "_chat.txt", WHATSAPP)))
    assert [(note.source, note.text) for note in notes] == [
        ("Ann", "Messages and calls are end-to-end encrypted."),
        ("Ann", "Hallo Bob: wie geht's?\nzweite Zeile: mit Doppelpunkt"),
        ("Bob M.", "Bild weggelassen"),
    ]
    assert [f"{note.at:%m-%d %H:%M}" for note in notes] == ["05-08 14:12", "05-08 14:12", "05-13 09:00"]
    slashes = "5/6/23, 9:00 - Ann: A\n13/6/23, 9:00 - Ann: B\n"
    assert [f"{note.at:%m-%d}" for note in read_notes(write(tmp_path, "s.txt", slashes))] == ["06-05", "06-13"]


def test_markdown_sections_keep_their_path_and_dates(tmp_path):
    notes = list(read_notes(write(tmp_path, *FILES["markdown"])))
    assert [(note.source, note.text) for note in notes] == [
        ("notes.md", "Before any heading."),
        ("notes.md # Trips > Rome", "Rome\n\nIt was warm.\n```\n# no heading\n```"),
        ("notes.md # Trips > 9 May 2023", "9 May 2023\n\nA dated section."),
        ("notes.md # Other", "Other\n\nLast words."),
    ]
    assert [f"{note.at:%m-%d}" for note in notes] == ["05-08", "05-08", "05-09", "05-08"]


def test_markdown_without_headings_or_with_a_rule_on_top_is_one_note(tmp_path):
    assert said(write(tmp_path, "a.md", "Just text.\n\n- a\n- b\n")) == [("a.md", "Just text.\n\n- a\n- b")]
    assert said(write(tmp_path, "b.md", "---\nno end\n")) == [("b.md", "---\nno end")]
    (note,) = read_notes(write(tmp_path, "2023-05-08.md", "Text"))
    assert f"{note.at:%Y-%m-%d}" == "2023-05-08"


def test_zip_files_of_exports_are_opened(tmp_path):
    for name, file, content in (
        ("chatgpt", "conversations.json", json.dumps(CHATGPT)),
        ("claude", "data-1/conversations.json", json.dumps(CLAUDE)),
        ("transcript", "_chat.txt", WHATSAPP),
    ):
        path = tmp_path / f"{name}.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(file, content)
            archive.writestr("users.json", "[]")
        assert detect(path) == name
        assert next(read_notes(path)).text


GOOD = '[{"id": "1", "memory": "one"}, '


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.md", "", "empty.md is empty"),
        ("empty.json", " \n ", "empty.json is empty"),
        ("headings.md", "# A\n## B\n", "no text under any heading"),
        ("cut.json", GOOD, "ends inside its list, after 1 entries"),
        ("cut.json", GOOD + '{"id": "2", "mem', "entry 2 is no valid JSON"),
        ("tail.json", GOOD[:-2] + "] extra", "goes on after the end"),
        ("number.json", GOOD + "3]", "entry 2 is int, expected an object"),
        ("missing.json", GOOD + '{"id": "2"}]', "entry 2 has no 'memory'"),
        ("when.json", GOOD + '{"memory": "x", "created_at": "soon"}]', "entry 2: 'soon' cannot be read as a time"),
        ("when.json", GOOD + '{"memory": "x", "created_at": 1e300}]', "cannot be read as a time"),
        ("strange.json", '{"a": 1}', "JSON of a kind that no importer knows"),
        ("strange.json", "3", "entry 1 is int"),
        ("latin.txt", "Ann: caf\xe9".encode("latin-1"), "is not UTF-8"),
        ("prose.txt", "Nothing like a talk here.", 'no line like "Name: text"'),
        ("bad.zip", b"PK\x03\x04 and then nothing", "damaged zip"),
        ("bad.json.gz", gzip.compress(b'[{"memory": "x"}]')[:-6], "damaged or cut short"),
        ("deep.json", "[" * 100_000, "nested too deeply|no valid JSON"),
        ("role.jsonl", '{"role": "user", "content": "x"}\n{"content": "y"}', "entry 2 has no 'role'"),
        ("version.jsonl", '{"format": "loci notes", "version": 99}', "another version of Loci"),
        ("note.jsonl", '{"format": "loci notes", "version": 1}\n{"id": "1"}', "entry 2 is no whole note"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_with_its_name_and_place(tmp_path, name, content, message):
    path = write(tmp_path, name, content)
    with pytest.raises(BadImport, match=message) as caught:
        list(read_notes(path))
    assert name in str(caught.value)


def test_missing_files_folders_empty_zips_and_unknown_formats_are_named(tmp_path):
    with pytest.raises(BadImport, match="does not exist"):
        list(read_notes(tmp_path / "none.md"))
    with pytest.raises(BadImport, match="is a folder"):
        list(read_notes(tmp_path))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("picture.png", b"x")
    with pytest.raises(BadImport, match=r"holds no conversations\.json"):
        detect(tmp_path / "a.zip")
    with pytest.raises(UnknownName, match="markdown"):
        list(read_notes(write(tmp_path, "a.md", "x"), format="markdwon"))


def test_notes_before_a_damaged_entry_are_given_first(tmp_path):
    reading = read_notes(write(tmp_path, "cut.json", GOOD + "x]"))
    assert next(reading).text == "one"
    with pytest.raises(BadImport):
        next(reading)


def test_ten_megabytes_in_one_message_pass(tmp_path):
    words = "word " * 2_000_000
    path = write(tmp_path, "big.jsonl", json.dumps({"role": "user", "content": words}))
    assert said(path) == [("user", words.strip())]
    path = write(tmp_path, "big.txt", f"Ann: {words}\nBob: ok\n")
    assert said(path) == [("Ann", words.strip()), ("Bob", "ok")]


def test_a_long_list_is_read_in_little_memory(tmp_path):
    path = write(tmp_path, "long.json", [{"id": str(i), "memory": f"number {i} " + "x" * 400} for i in range(20_000)])
    tracemalloc.start()
    count = sum(1 for _ in read_notes(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 20_000
    assert peak < 2_000_000 < path.stat().st_size


def test_characters_that_no_store_takes_are_replaced(tmp_path):
    path = write(tmp_path, "odd.jsonl", '{"role": "user", "content": "a\\u0000b \\ud83d c \\ud83d\\ude00 \\u202e"}')
    assert said(path) == [("user", "ab ? c 😀 \u202e")]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(st.sampled_from(FORMATS), st.one_of(st.text(), st.binary(), st.builds(str, st.integers())))
def test_any_bytes_give_notes_or_a_bad_import(tmp_path, format, content):
    path = write(tmp_path, "any.dat", content.encode("utf-8", "replace") if isinstance(content, str) else content)
    try:
        notes = list(read_notes(path, format=format))
    except BadImport:
        return
    assert all(note.text.strip() and note.key for note in notes)


any_json = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from(
                [
                    *("mapping", "current_node", "message", "author", "role", "content", "parts", "parent", "children"),
                    *("chat_messages", "sender", "text", "memory", "results", "agents", "messages", "blocks", "value"),
                    *("session_1", "conversation", "created_at", "id", "attachments", "tool_calls", "function", "name"),
                ]
            ),
            inner,
            max_size=6,
        ),
    ),
    max_leaves=20,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(st.sampled_from([name for name in FORMATS if name not in ("transcript", "markdown")]), any_json)
def test_json_of_any_shape_gives_notes_or_a_bad_import(tmp_path, format, content):
    path = write(tmp_path, "any.json", content)
    try:
        notes = list(read_notes(path, format=format))
    except BadImport:
        return
    assert all(note.text.strip() and note.key for note in notes)


DATA = Path(os.environ.get("LOCI_DATA", Path(__file__).parents[3] / "shared" / "data")) / "locomo" / "locomo3.json.gz"


@pytest.mark.skipif(not DATA.exists(), reason=f"needs the LoCoMo conversations at {DATA}")
def test_the_whole_benchmark_is_read():
    notes = list(read_notes(DATA))
    assert len(notes) == len({note.key for note in notes}) == 1451
    assert sum("[picture: " in note.text for note in notes) == 319
    assert {note.source for note in notes} == {"Caroline", "Melanie", "Jon", "Gina", "John", "Maria"}
