"""The store: opening, refusing, transactions, crashes, two processes, spaces, the proof of wholeness."""

import os
import sqlite3
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import event, text

from loci import errors
from loci.text import schema
from loci.text.amem import AMem
from loci.text.store import Store


def test_a_new_file_has_the_newest_schema_and_migrations_give_the_same_tables(store):
    with store.reading() as connection:
        found = MigrationContext.configure(connection).get_current_revision()
        differences = compare_metadata(MigrationContext.configure(connection), schema.metadata)
    assert found == schema.HEAD
    assert differences == []


def test_every_table_is_keyed_by_space_first():
    for table in schema.metadata.tables.values():
        assert next(iter(table.primary_key)).name == "space", table.name


def test_what_was_written_is_there_after_reopening(tmp_path, embedder):
    path = tmp_path / "memory.db"
    with Store.open(path) as store:
        id = AMem(store, embedder).write("The spare key lies under the blue pot.", source="Ada").id
    with Store.open(path) as store:
        memory = AMem(store, embedder)
        assert memory.note(id).content == "The spare key lies under the blue pot."
        assert memory.read("where is the spare key?", k=1)[0].id == id
        assert store.check() == []


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "letter.txt"
    path.write_text("Dear diary, " * 100)
    with pytest.raises(errors.NotAStore, match="no Loci store"):
        Store.open(path)
    assert path.read_text() == "Dear diary, " * 100


def test_a_database_of_something_else_is_refused(tmp_path):
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE birds (name TEXT)")
    connection.close()
    with pytest.raises(errors.NotAStore, match="birds"):
        Store.open(path)


def test_a_store_of_a_newer_version_is_refused_with_the_way_out(tmp_path):
    path = tmp_path / "memory.db"
    Store.open(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    with pytest.raises(errors.NewerStore, match="pip install -U"):
        Store.open(path)


def test_a_folder_in_place_of_a_file_is_refused(tmp_path):
    with pytest.raises(errors.NotAStore, match="is a folder"):
        Store.open(tmp_path)


def test_a_file_that_cannot_be_written_says_so_and_can_still_be_read(tmp_path, embedder):
    path = tmp_path / "memory.db"
    with Store.open(path) as store:
        AMem(store, embedder).write("The spare key lies under the blue pot.")
    with Store.open(path) as store:
        memory = AMem(store, embedder)
        store._connection.exec_driver_sql(
            "PRAGMA query_only=ON"
        )  # root may write any file, so permissions prove nothing
        store._connection.rollback()
        with pytest.raises(errors.StoreReadOnly, match="permission"):
            memory.write("something else")
        assert memory.read("where is the key?", k=1)[0].content.startswith("The spare key")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write every file")
def test_a_folder_without_write_permission_says_so(tmp_path):
    folder = tmp_path / "closed"
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(errors.StoreReadOnly):
        Store.open(folder / "memory.db")


def test_a_full_disk_loses_nothing_that_was_there(tmp_path, embedder):
    path = tmp_path / "memory.db"
    with Store.open(path) as store:
        memory = AMem(store, embedder)
        kept = memory.write("The spare key lies under the blue pot.").id
        pages = store._connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        store._connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")
        store._connection.rollback()
        with pytest.raises(errors.StoreFull, match="Free some space"):
            memory.write(" ".join(f"item{i}" for i in range(1_500)))
        assert [note.id for note in store.notes(memory.space)] == [kept]
        assert store.check() == []


def test_an_exception_at_any_statement_of_a_write_leaves_the_note_whole_or_absent(tmp_path, embedder):
    """Every statement of a write in turn is the one that fails, for a write that also changes an older note."""
    path = tmp_path / "memory.db"
    with Store.open(path) as store:
        memory = AMem(store, embedder)
        question = memory.write("Which colour did you paint the shed?", source="Ada").id
        before = store.history(memory.space, 1)
        failed = 0
        for place in range(200):
            seen = 0

            def fail(*_: object, place: int = place) -> None:
                nonlocal seen
                seen += 1
                if seen > place:
                    raise ConnectionError("pulled the plug")

            event.listen(store._engine, "before_cursor_execute", fail)
            try:
                memory.write("Green, like the door.", source="Bob", reply_to=question)
                break
            except ConnectionError:
                failed += 1
            finally:
                event.remove(store._engine, "before_cursor_execute", fail)
            assert store.check() == []
            if len(store.notes(memory.space)) == 2:  # it failed after the commit: the note is whole
                break
            assert [note.id for note in store.notes(memory.space)] == [question]
            assert store.history(memory.space, 1) == before
        assert failed > 10
        assert len(store.notes(memory.space)) == 2
        assert len(store.history(memory.space, 1)) == 2
        assert store.check() == []


_WRITER = """
    import sys
    from loci.lm.embed import load_embedder
    from loci.text.amem import AMem
    from loci.text.store import Store
    path, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    memory = AMem(Store.open(path), load_embedder("default"))
    print("ready", flush=True)
    sys.stdin.readline()
    for i in range(count):
        memory.write(f"{name} counted {i} birds near the lake on walk {i}.", source=name)
        print(i, flush=True)
"""


def _writer(path: Path, name: str, count: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_WRITER), str(path), name, str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # two processes of two threads each would wait for each other
    )


def test_a_killed_process_leaves_only_whole_notes(tmp_path):
    path = tmp_path / "memory.db"
    Store.open(path).close()
    writer = _writer(path, "Ada", 400)
    with writer:
        assert writer.stdout is not None
        assert writer.stdin is not None
        writer.stdout.readline()
        writer.stdin.write("\n")
        writer.stdin.flush()
        done = [writer.stdout.readline() for _ in range(60)]
        writer.kill()
    assert done[-1].strip() == "59"
    with Store.open(path) as store:
        space = store.space("default")
        assert 60 <= len(store.notes(space)) < 400
        assert store.check() == []


@pytest.mark.timeout(280)
def test_two_processes_write_a_thousand_notes_into_one_file(tmp_path):
    path = tmp_path / "memory.db"
    Store.open(path).close()
    writers = [_writer(path, name, 500) for name in ("Ada", "Bob")]
    for writer in writers:
        assert writer.stdout is not None
        writer.stdout.readline()
    for writer in writers:
        writer.communicate("\n")
    assert [writer.returncode for writer in writers] == [0, 0]
    with Store.open(path) as store:
        space = store.space("default")
        found = [note.source for note in store.notes(space)]
        assert (found.count("Ada"), found.count("Bob")) == (500, 500)
        assert "Ada" in found[:900]  # they took turns
        assert store.check() == []


def test_an_index_sees_what_another_connection_wrote(tmp_path, embedder):
    path = tmp_path / "memory.db"
    with Store.open(path) as one, Store.open(path) as two:
        first, second = AMem(one, embedder), AMem(two, embedder)
        id = first.write("The spare key lies under the blue pot.").id
        assert [hit.id for hit in second.read("spare key")] == [id]
        second.forget(id, why="test")
        assert first.read("spare key") == []


def test_a_space_never_sees_another(store, embedder):
    one, two = AMem(store, embedder, space="one"), AMem(store, embedder, space="two")
    id = one.write("The spare key lies under the blue pot.", source="Ada").id
    two.write("The boat is moored at the third jetty.", source="Ada")
    assert [hit.content for hit in two.read("Where did Ada put the spare key under the pot?")] == [
        "The boat is moored at the third jetty."
    ]
    with pytest.raises(errors.UnknownNote):
        two.note(id)
    assert store.delete_space("one") == 1
    assert [info.name for info in store.spaces()] == ["two"]
    assert store.check() == []


def test_an_unknown_space_is_named_with_those_that_exist(store):
    store.space("work", create=True)
    with pytest.raises(errors.UnknownSpace, match="'work'"):
        store.space("wrok")


def test_an_address_that_is_none_is_explained():
    with pytest.raises(errors.BadInput, match="sqlite:///"):
        Store.open("not a url://")


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        ("DELETE FROM words WHERE term = (SELECT min(term) FROM words)", "words"),
        ("DELETE FROM vectors WHERE note = 1", "vectors"),
        ("DELETE FROM versions WHERE note = 1", "versions"),
        ("DELETE FROM links WHERE src = 1", "links"),
        ("UPDATE notes SET reply_to = 77 WHERE note = 2", "notes"),
        ("UPDATE spaces SET next_note = 1", "spaces"),
    ],
)
def test_check_names_every_kind_of_damage(store, embedder, damage, fault):
    memory = AMem(store, embedder)
    first = memory.write("Which colour did you paint the shed?", source="Ada").id
    memory.write("Green, like the shed door.", source="Bob", reply_to=first)
    assert store.check() == []
    with store._connection.begin():
        store._connection.execute(text(damage))
    assert any(line.startswith(f"{fault}:") for line in store.check())
