"""With the real default model, a few tokens at a time."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from loci.cli import main

PROMPT = "The capital of France is"


def test_a_prompt_is_continued_and_the_figures_come_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", PROMPT, "--plain", "--max-new-tokens", "2", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["text"].startswith(" Paris")
    assert row["finish_reason"] == "length"
    assert row["stats"]["new_tokens"] == 2
    assert row["stats"]["kv_bytes_peak"] > 0


def test_the_prompt_may_come_from_standard_input_and_words_go_out_as_data(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT + "\n"))
    assert main(["generate", "-", "--plain", "--max-new-tokens", "2", "--stats"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(" Paris")
    assert "2 tokens in" in err


def test_guessing_ahead_changes_no_word_and_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "One two three. One two three. One two", "--plain", "--max-new-tokens", "12"]
    found = {}
    for drafter in ("none", "lookup", "auto"):
        assert main([*words, "--drafter", drafter, "--stats"]) == 0
        out, err = capsys.readouterr()
        found[drafter] = out
        assert "exact yes" in err
        assert ("tokens a step" in err) is (drafter != "none")
    assert found["none"] == found["lookup"] == found["auto"]


def test_the_options_of_drawing_and_running_reach_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", PROMPT, "--plain", "--max-new-tokens", "3", "--json", "--temperature", "1.5", "--seed", "1"]
    assert main([*words, "--top-k", "1", "--engine", "hf", "--max-nodes", "4"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert one["text"].startswith(" Paris")  # of one token nothing is left to draw
    assert one["stats"]["engine"] == "hf"
    assert one["stats"]["proposed_nodes"] <= 3 * one["stats"]["steps"]
    assert main([*words, "--min-p", "1.0", "--drafter", "none"]) == 0
    assert json.loads(capsys.readouterr().out)["text"].startswith(" Paris")


@pytest.mark.parametrize(
    ("options", "near"),
    [(["--drafter", "lokup"], "'lookup'"), (["--engine", "natve"], "'native'"), (["--accept", "typicl"], "'typical'")],
)
def test_unknown_names_are_answered_with_their_nearest_neighbour(
    options: list[str], near: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", PROMPT, *options]) == 2
    assert near in capsys.readouterr().err


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_a_prompt_without_words_is_refused_before_a_model_is_loaded(
    prompt: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", prompt]) == 2
    assert "no words" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--temperature", "-1"], "--temperature"), (["--top-p", "2"], "--top-p"), (["--max-new-tokens", "0"], "--max")],
)
def test_an_option_out_of_range_is_named(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", PROMPT, *options]) == 2
    assert words in capsys.readouterr().err


def test_a_model_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", PROMPT, "--model", "./no-such-folder"]) == 1
    err = capsys.readouterr().err
    assert "no-such-folder" in err
    assert "Traceback" not in err


BOOK = "The harbour was quiet and the boats lay still. " * 32


def test_a_context_is_read_by_passages_and_what_was_read_is_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "book.txt"
    file.write_text(f"{BOOK} The code of Rosa Norton is 2444. {BOOK}", encoding="utf-8")
    words = ["generate", "What is the code of Rosa Norton?", "--context", str(file), "--max-new-tokens", "4", "--json"]
    assert main([*words, "--drafter", "rapid", "--eta", "5"]) == 0
    moved = json.loads(capsys.readouterr().out)["stats"]
    assert moved["rule"] == "shifted, eta 5"
    assert not moved["exact"]
    assert any("the drafter reads" in note for note in moved["notes"])
    assert main([*words, "--drafter", "rapid", "--accept", "exact"]) == 0
    drafted = json.loads(capsys.readouterr().out)
    assert drafted["stats"]["exact"]
    assert main([*words, "--drafter", "none"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["stats"]["prompt_tokens"] == drafted["stats"]["prompt_tokens"] > 600


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--drafter", "rapid"], "--context FILE"),
        (["--context", "no-such-file.txt"], "no-such-file.txt"),
        (["--drafter", "rapid", "--context", __file__, "--accept", "typical"], "way of rapid"),
    ],
)
def test_a_context_that_is_missing_is_named(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", PROMPT, *options]) == 2
    assert says in capsys.readouterr().err
