"""On a conversation of four turns, with the real embedder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loci.cli import main
from loci.lm.model import LanguageModel

CONVERSATION = {
    "sample_id": "kiln",
    "conversation": {
        "speaker_a": "Mara",
        "speaker_b": "Ivo",
        "session_1_date_time": "1:56 pm on 8 May, 2023",
        "session_1": [
            {"speaker": "Mara", "dia_id": "D1:1", "text": "My new kiln arrives next Friday."},
            {"speaker": "Ivo", "dia_id": "D1:2", "text": "I walked the dog along the river."},
        ],
        "session_2_date_time": "6:10 pm on 22 May, 2023",
        "session_2": [
            {"speaker": "Mara", "dia_id": "D2:1", "text": "The kiln is here and the first bowls are fired."},
            {"speaker": "Ivo", "dia_id": "D2:2", "text": "We had lentils for dinner."},
        ],
    },
    "qa": [
        {"question": "What did Mara fire first?", "answer": "bowls", "evidence": ["D2:1"], "category": 4},
        {"question": "When did the kiln come?", "answer": "19 May 2023", "evidence": ["D1:1"], "category": 2},
        {"question": "What is the dog called?", "adversarial_answer": "Rex", "evidence": ["D1:2"], "category": 5},
    ],
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "locomo"
    folder.mkdir()
    (folder / "kiln.json").write_text(json.dumps([CONVERSATION]))
    return folder


def test_arms_are_measured_and_printed_with_the_whole_recipe(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data", str(data), "--arm", "none", "--arm", "plain", "--no-answers", "--json"]
    assert main(["bench", "locomo", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["arm"] for row in found["arms"]] == ["none", "plain"]
    none, plain = found["arms"]
    assert none["recall@10"] == 0
    assert plain["recall@10"] == 1
    assert {"recall@20", "all@20", "f1", "f1_by_category", "refusal", "tokens_per_answer", "seconds"} <= set(plain)
    assert {"seed", "data", "machine", "packages", "config"} <= set(found["recipe"])


def test_without_json_a_table_goes_out_and_a_saved_file_is_named(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data.parent)
    assert main(["bench", "locomo", "--data", "locomo", "--arm", "plain", "--no-answers", "--save"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0].split() == "arm recall@10 recall@20 all@20 F1 refusal tokens read held".split()
    assert out.splitlines()[1].startswith("plain")
    (file,) = (data.parent / "results").glob("locomo-*.json")
    assert f"results/{file.name}" in err
    assert json.loads(file.read_text())["complete"] is True


def test_an_unknown_arm_is_answered_with_its_nearest_neighbour(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "locomo", "--data", str(data), "--arm", "plan", "--no-answers"]) == 2
    assert "'plain'" in capsys.readouterr().err


def test_data_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "locomo", "--data", str(tmp_path / "nothing"), "--no-answers"]) == 2
    err = capsys.readouterr().err
    assert "nothing" in err
    assert err.startswith("DataNotFound: ")


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    row = {"question_id": 2, "task": "qa", "category": "qa", "turns": ["xyz xyz xyz"]}
    (tmp_path / "question.jsonl").write_text(json.dumps(row))
    return tmp_path


def test_drafters_are_measured_beside_plain_decoding_and_told_as_json(
    tiny_model: LanguageModel, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", str(questions), "--model", str(tiny_model.folder), "--dtype", "float32", "--engine", "hf"]
    options = ["--drafter", "lookup", "--drafter", "auto", "--max-new-tokens", "8", "--no-timings", "--json"]
    assert main(["bench", "decode", *words, *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found["rows"]] == ["plain", "lookup", "auto"]
    wanted = {"name", "engine", "tokens_per_step", "tokens_per_second", "ratio_to_plain", "identical", "bytes", "exact"}
    assert all(wanted <= set(row) for row in found["rows"])
    assert found["rows"][2]["identical"] == 1


def test_decoding_is_shown_as_a_table_and_a_missing_peer_is_explained(
    tiny_model: LanguageModel, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", str(questions), "--model", str(tiny_model.folder), "--engine", "hf", "--peers", "llama.cpp"]
    assert main(["bench", "decode", *words, "--drafter", "lookup", "--max-new-tokens", "8", "--limit", "1"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0].startswith("name")
    assert out.splitlines()[2].startswith("lookup")
    assert "llama.cpp was left out" in err
    assert "a step on hf behind" in err


def test_a_drafter_that_does_not_exist_is_answered_with_its_neighbour(
    tiny_model: LanguageModel, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", str(questions), "--model", str(tiny_model.folder), "--engine", "hf"]
    assert main(["bench", "decode", *words, "--drafter", "lokup"]) == 2
    assert "'lookup'" in capsys.readouterr().err
