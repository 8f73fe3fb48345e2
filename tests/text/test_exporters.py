"""Notes written to files and read back."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loci.text.exporters import to_jsonl, to_markdown
from loci.text.importers import detect, read_notes
from loci.text.organizer import Note, TimeSpan

NOTE = Note(
    id="0198",
    kind="turn",
    content="I ran yesterday.\n# not a heading",
    source="Ann",
    said_at=datetime(2023, 5, 8, 13, 56, tzinfo=timezone(timedelta(hours=2))),
    written_at=datetime(2026, 1, 1, tzinfo=UTC),
    status="live",
    reply_to="0197",
    superseded_by=None,
    keywords=("running", "charity race"),
    tags=("sport & health",),
    context="Ann to Bob on 8 May 2023",
    version=2,
    uses=3,
    tokens=7,
    entities=("Ann",),
    times=(
        TimeSpan(
            text="yesterday",
            start=datetime(2023, 5, 7, tzinfo=UTC),
            end=datetime(2023, 5, 8, tzinfo=UTC),
            phrase="7 May 2023",
            begin=6,
            finish=15,
        ),
    ),
    meta={"turn": "D1:3", "nested": {"a": [1, None]}},
)
words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1)
moments = st.datetimes(timezones=st.just(UTC))
# fields, not notes: the type checks of the tests draw random numbers, which hypothesis forbids inside strategies
span_fields = st.fixed_dictionaries({"text": words, "start": moments, "end": moments, "phrase": words})
note_fields = st.fixed_dictionaries(
    {
        "id": words,
        "kind": st.sampled_from(["turn", "thought", "fact", "structure", "document", "user"]),
        "content": words.filter(str.strip),
        "source": st.none() | words,
        "said_at": moments,
        "written_at": moments,
        "status": st.sampled_from(["live", "superseded"]),
        "reply_to": st.none() | words,
        "superseded_by": st.none() | words,
        "keywords": st.lists(words, max_size=3).map(tuple),
        "tags": st.lists(words, max_size=3).map(tuple),
        "context": words,
        "version": st.integers(1, 9),
        "uses": st.integers(0, 9),
        "tokens": st.integers(0, 9),
        "entities": st.lists(words, max_size=3).map(tuple),
        "meta": st.dictionaries(words, st.none() | st.integers() | words, max_size=3),
    }
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(st.lists(st.tuples(note_fields, st.lists(span_fields, max_size=2)), max_size=4))
def test_json_lines_are_read_back_whole(tmp_path, drawn):
    notes = [Note(times=tuple(TimeSpan(**span) for span in spans), **fields) for fields, spans in drawn]
    path = tmp_path / "notes.jsonl"
    path.write_text("".join(to_jsonl(notes)), encoding="utf-8", newline="")
    assert detect(path) == "loci"
    assert [found.note for found in read_notes(path)] == notes


def test_a_note_read_back_can_be_written_like_any_other(tmp_path):
    path = tmp_path / "notes.jsonl"
    path.write_text("".join(to_jsonl([NOTE])), encoding="utf-8")
    (found,) = read_notes(path)
    assert (found.text, found.source, found.at, found.kind, found.meta) == (
        NOTE.content,
        "Ann",
        NOTE.said_at,
        "turn",
        NOTE.meta,
    )
    assert found.reply_to is not None
    assert found.key != found.reply_to


def test_markdown_groups_notes_by_day_and_keeps_their_words_from_becoming_structure():
    assert "".join(to_markdown([NOTE, NOTE], title="Mine")) == (
        "# Mine\n"
        "\n## 8 May 2023\n"
        + (
            "\n**Ann**, 13:56\n\nI ran yesterday.\n\\# not a heading\n"
            "\n> running, charity race, #sport-&-health  \n> Ann to Bob on 8 May 2023  \n"
        )
        * 2
    )


def test_an_exported_markdown_file_is_a_markdown_file(tmp_path):
    path = tmp_path / "notes.md"
    path.write_text("".join(to_markdown([NOTE])), encoding="utf-8")
    (note,) = read_notes(path)
    assert note.source == "notes.md # Notes > 8 May 2023"
    assert note.at is not None
    assert note.at.date() == NOTE.said_at.date()


def test_nothing_to_export_is_a_header_and_nothing_more():
    assert len(list(to_jsonl([]))) == 1
    assert list(to_markdown([])) == ["# Notes\n"]
