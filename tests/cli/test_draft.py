"""On the tiny model, whose answers are noise: what is checked is that the parts work together."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from loci.cli import main
from loci.decoding.token_recycling import warm_file
from loci.lm.model import LanguageModel


@pytest.fixture
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOCI_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "instructions"
    folder.mkdir()
    rows = [{"id": str(n), "source": "x", "instruction": f"say {n}", "input": ""} for n in range(20)]
    text = "\n".join(map(json.dumps, rows))
    (folder / "instructions.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return folder


def test_texts_are_written_a_drafter_is_trained_on_them_and_fitted_to_the_machine(
    tiny_model: LanguageModel, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", str(tiny_model.folder)]
    texts, out = str(tmp_path / "texts"), str(tmp_path / "ppd")
    words = ["--out", texts, "--data", str(prompts), "--tokens", "500", "--kept-out", "200", "--engine", "hf"]
    assert main(["draft", "distill", *model, *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["texts"] > 0
    assert found["kept_out"] > 0
    assert main(["draft", "train", "ppd", *model, "--texts", texts, "--out", out, "--minutes", "0.01"]) == 0
    assert capsys.readouterr().out.strip() == f"{out}/ppd.safetensors"
    assert main(["draft", "tune", f"ppd:{out}", *model, "--engine", "hf", "--json"]) == 0
    tuned = json.loads(capsys.readouterr().out)
    assert tuned["engine"] == "hf"
    assert tuned["rows"] >= 4
    assert tuned["step_ms"]["16"] > 0


def test_recycling_is_counted_and_its_matrix_is_filled(
    tiny_model: LanguageModel, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["draft", "tune", "recycle", "--model", str(tiny_model.folder), "--engine", "hf", "--data", str(prompts)]
    assert main([*words, "--limit", "2", "--max-new-tokens", "24", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] > 0
    assert set(found["templates"]) == {"15", "31"}
    assert Path(found["warm"]) == warm_file(tiny_model)
    assert warm_file(tiny_model).is_file()


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (["train", "medsa", "--out", "x"], "'medusa'"),
        (["tran"], "'train'"),
    ],
)
def test_unknown_words_are_answered_with_their_neighbours(
    words: list[str], near: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["draft", *words]) == 2
    assert near in capsys.readouterr().err


def test_training_without_texts_says_how_to_get_them(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["draft", "train", "ppd", "--out", str(tmp_path / "out"), "--texts", str(tmp_path / "none")]) == 2
    assert "loci draft distill" in capsys.readouterr().err
