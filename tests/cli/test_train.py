from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from loci.cli import main, train


def test_without_a_name_the_trained_parts_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--json"]) == 0
    assert "reader" in json.loads(capsys.readouterr().out)
    assert main(["train"]) == 0
    assert "reader" in capsys.readouterr().out


def test_an_unknown_part_is_answered_with_its_nearest_neighbour(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "readr"]) == 2
    assert "'reader'" in capsys.readouterr().err


def test_options_reach_the_recipe_and_what_it_made_is_printed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = ModuleType("loci.bench.nothing_recipe")

    def make(*, folder: Path | None, resume: bool, minutes: float | None) -> dict[str, Any]:
        return {"folder": folder, "resume": resume, "minutes": minutes}

    module.train = make  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "loci.bench.nothing_recipe", module)
    monkeypatch.setattr(train, "RECIPES", {"nothing": "loci.bench.nothing_recipe:train"})
    assert main(["train", "nothing", "--folder", str(tmp_path), "--resume", "--minutes", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"folder": str(tmp_path), "resume": True, "minutes": 2.0}
