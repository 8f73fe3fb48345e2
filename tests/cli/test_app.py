"""How commands are found, and how they end."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import pytest

from loci import __version__
from loci.cli import app, main
from loci.errors import BadInput, LociError, MissingExtra, StoreBusy


def every_row(rows: Mapping[str, app.Row] = app.COMMANDS, path: tuple[str, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for name, row in rows.items():
        found = app.load(row.target, name=name)
        yield (*path, name), row, found
        if isinstance(found, app.LazyGroup):
            yield from every_row(found.rows, (*path, name))


ROWS = list(every_row())
NAMES = [" ".join(path) for path, _, _ in ROWS]


@pytest.mark.parametrize(("path", "row", "command"), ROWS, ids=NAMES)
def test_a_row_repeats_its_commands_summary(path: tuple[str, ...], row: app.Row, command: Any) -> None:
    assert command.help.splitlines()[0] == row.summary


@pytest.mark.parametrize(("path", "row", "command"), ROWS, ids=NAMES)
def test_a_help_page_shows_examples_that_call_the_command(path: tuple[str, ...], row: app.Row, command: Any) -> None:
    page = inspect.cleandoc(command.help)
    assert "\b\nExamples:\n" in page
    assert f"loci {' '.join(path)}" in page.partition("Examples:")[2]


@pytest.mark.parametrize(("path", "row", "command"), ROWS, ids=NAMES)
def test_a_command_takes_json_and_explains_every_option(path: tuple[str, ...], row: app.Row, command: Any) -> None:
    if isinstance(command, app.LazyGroup):
        return
    assert any("--json" in parameter.opts for parameter in command.params)
    assert all(parameter.help for parameter in command.params)


@pytest.fixture
def ends_with(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put a command `end` into the table that raises what it is given, and run it."""

    def run(ending: BaseException, *options: str) -> int:
        def end() -> None:
            """End."""
            raise ending

        module = ModuleType("loci.cli.end")
        module.end = end  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "loci.cli.end", module)
        monkeypatch.setitem(app.COMMANDS, "end", app.Row("loci.cli.end:end", "End."))
        return main([*options, "end"])

    return run


@pytest.mark.parametrize(("ending", "code"), [(StoreBusy("locked.\nway out"), 1), (BadInput("bad."), 2)])
def test_an_expected_error_is_a_sentence_and_its_exit_code(
    ending: LociError, code: int, ends_with: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ends_with(ending) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"{type(ending).__name__}: {ending}\n"


@pytest.mark.parametrize("how", ["option", "variable"])
def test_debugging_shows_the_traceback_too(
    how: str, ends_with: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "variable":
        monkeypatch.setenv("LOCI_DEBUG", "1")
    assert ends_with(BadInput("bad."), *(["--debug"] if how == "option" else [])) == 2
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_says_that_nothing_is_lost(ends_with: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert ends_with(KeyboardInterrupt()) == 130
    assert "Nothing that was already stored is lost" in capsys.readouterr().err


def test_a_missing_package_of_an_extra_is_named_with_the_command_that_installs_it(
    ends_with: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    code = ends_with(ModuleNotFoundError("No module named 'torch.nn'", name="torch.nn"))
    assert code == MissingExtra.exit_code
    assert "pip install 'loci-lm[local]'" in capsys.readouterr().err


def test_any_other_error_is_ours_and_is_not_hidden(ends_with: Any) -> None:
    with pytest.raises(ZeroDivisionError):
        ends_with(ZeroDivisionError())


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (["sistems"], "'systems'"),
        (["bench", "locom"], "'locomo'"),
        (["systems", "--jsn"], "--json"),
        (["systems", "--roon", "text"], "--room"),
        (["cite", "ame"], "'amem'"),
    ],
)
def test_a_misspelt_word_is_answered_with_its_nearest_neighbour(
    words: list[str], near: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert near in err
    assert "Traceback" not in err


def test_a_missing_argument_names_itself_and_the_help_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cite"]) == 2
    err = capsys.readouterr().err
    assert "'name'" in err
    assert "help: loci cite --help" in err


@pytest.mark.parametrize("words", [[], ["--help"], ["bench"], ["bench", "-h"], ["systems", "--help"]])
def test_help_goes_to_standard_output(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Usage: loci")
    assert err == ""


@pytest.mark.parametrize("words", [["--version"], ["--debug", "--version"]])
def test_the_version_is_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    assert capsys.readouterr().out == f"loci {__version__}\n"


def shell(line: str, **variables: str) -> subprocess.CompletedProcess[str]:
    program = line.replace("loci", f"{sys.executable} -m loci")
    environment = {**os.environ, **variables}
    return subprocess.run(
        ["bash", "-c", program], capture_output=True, text=True, check=False, timeout=240, env=environment
    )


def test_a_reader_that_goes_away_is_no_error() -> None:
    done = shell("loci systems --json | head -n 1; echo ${PIPESTATUS[0]}")
    assert done.stdout == "[\n0\n"
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_words_are_completed_without_importing_a_command() -> None:
    done = shell("loci", _LOCI_COMPLETE="complete_bash", COMP_WORDS="loci sys", COMP_CWORD="1")
    assert done.stdout.split() == ["systems"]


def test_an_imported_frame_imports_no_command() -> None:
    program = "import sys, loci.cli.app; print(*(m for m in sys.modules if m.startswith('loci.')))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=240)
    assert set(done.stdout.split()) == {"loci.cli", "loci.cli.app", "loci.cli.output", "loci.errors", "loci.settings"}
