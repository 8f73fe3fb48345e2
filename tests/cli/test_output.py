from __future__ import annotations

import io
import json
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loci.cli import output
from loci.errors import BadInput


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@dataclass(frozen=True)
class Pair:
    left: int
    right: Path


def test_every_kind_of_value_becomes_plain() -> None:
    value = {
        "pair": Pair(left=1, right=Path("a/b")),
        "when": datetime(2026, 5, 7, 12, tzinfo=UTC),
        "day": date(2026, 5, 7),
        "number": np.float32(0.5),
        "row": np.arange(3),
        4: (True, None),
    }
    assert output.as_plain(value) == {
        "pair": {"left": 1, "right": "a/b"},
        "when": "2026-05-07T12:00:00+00:00",
        "day": "2026-05-07",
        "number": 0.5,
        "row": [0, 1, 2],
        "4": [True, None],
    }


def test_what_json_has_no_words_for_is_refused() -> None:
    with pytest.raises(TypeError, match="object"):
        output.as_plain(object())
    with pytest.raises(ValueError, match="JSON"):
        output.print_json(float("nan"))


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=4)))
def test_plain_values_stay_what_they_are(value: object) -> None:
    assert json.loads(json.dumps(output.as_plain(value))) == value


@pytest.mark.parametrize(("variable", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_colour_is_left_out_where_it_is_not_wanted(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", Terminal())
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert output.coloured("word", "red", to="stderr") == "\x1b[31mword\x1b[0m"
    assert output.coloured("word", "red", to="stdout") == "word"
    monkeypatch.setenv(variable, value)
    assert output.coloured("word", "red", to="stderr") == "word"


def test_columns_line_up_for_wide_and_combining_signs(capsys: pytest.CaptureFixture[str]) -> None:
    output.table(["name", "n"], [("日本", 1), ("e\u0301", 22), ("plain", 333)], right=["n"])
    lines = capsys.readouterr().out.splitlines()
    assert {output.width(line) for line in lines} == {10}
    assert lines[1] == "日本     1"


def test_a_table_shows_absence_rounds_numbers_and_keeps_a_row_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    output.table(["a", "b", "c"], [(None, 0.12345, "two\nlines")])
    assert capsys.readouterr().out.splitlines()[1].split("  ") == ["-", "0.123", "two lines"]


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 B"), (999, "999 B"), (23_600_000, "23.6 MB"), (188.7e9, "188.7 GB"), (2e15, "2000.0 TB")],
)
def test_bytes_are_said_in_the_unit_that_keeps_them_short(count: float, words: str) -> None:
    assert output.human_bytes(count) == words


@pytest.mark.parametrize(("seconds", "words"), [(0.041, "41 ms"), (3.21, "3.2 s"), (245, "4 min 5 s")])
def test_durations_are_said_as_people_say_them(seconds: float, words: str) -> None:
    assert output.human_seconds(seconds) == words


def test_prose_and_data_go_their_own_ways(capsys: pytest.CaptureFixture[str]) -> None:
    output.data("data")
    output.say("prose")
    output.next_command("loci doctor", "tells more")
    assert capsys.readouterr() == ("data\n", "prose\nnext: loci doctor   tells more\n")


def test_progress_without_a_terminal_says_once_what_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    with output.progress("reading", total=3) as forward:
        forward(2)
    with output.steps() as step:
        step("writing", 1, 2)
        step("writing", 2, 2)
        step("asking", 1, 1)
    assert capsys.readouterr() == ("", "reading ...\nwriting ...\nasking ...\n")


def test_progress_on_a_terminal_draws_a_bar_on_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with output.progress("reading", total=3) as forward:
        forward(3)
    with output.steps() as step:
        step("writing", 1, 2)
    assert "reading" in terminal.getvalue()
    assert "writing" in terminal.getvalue()


def test_nothing_is_destroyed_when_nobody_can_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert output.confirm("Forget it?", yes=True)
    with pytest.raises(BadInput, match="--yes"):
        output.confirm("Forget it?", yes=False)


def test_the_same_figures_keep_the_same_file(tmp_path: Path) -> None:
    first = output.save({"recall": 0.5}, kind="locomo", folder=tmp_path)
    assert first == output.save({"recall": 0.5}, kind="locomo", folder=tmp_path)
    assert first != output.save({"recall": 0.6}, kind="locomo", folder=tmp_path)
    assert json.loads(first.read_text()) == {"recall": 0.5}


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "results"
    blocked.write_text("a file")
    with pytest.raises(BadInput, match="results"):
        output.save({}, kind="locomo", folder=blocked)
