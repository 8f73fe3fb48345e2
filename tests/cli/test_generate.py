"""With the real default model, a few tokens at a time."""

from __future__ import annotations

import io
import json

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
