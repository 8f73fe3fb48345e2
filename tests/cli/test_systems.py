from __future__ import annotations

import json

import pytest

from loci import catalog
from loci.cli import main


def test_all_systems_are_listed_as_data_with_prose_beside_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["systems"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 62
    assert "61 of 61 systems" in err
    assert "next: loci systems " in err


def test_a_room_and_a_state_narrow_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["systems", "--room", "decoding", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in rows} == {system.name for system in catalog.systems(room="decoding")}
    assert main(["systems", "--room", "text", "--state", "planned", "--json"]) == 0
    assert all(row["state"] == "planned" for row in json.loads(capsys.readouterr().out))


def test_one_system_is_shown_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["systems", "amem"]) == 0
    out, err = capsys.readouterr()
    assert "arXiv:2502.12110" in out
    assert "loci.text.amem" in out
    assert "next: loci claim amem" in err
    assert main(["systems", "amem", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(catalog.find("amem").as_row()))


def test_a_name_and_a_filter_together_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["systems", "amem", "--room", "text"]) == 2
    assert "leave --room and --state out" in capsys.readouterr().err


def test_a_reference_can_be_piped_into_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cite", "amem"]) == 0
    assert capsys.readouterr().out == catalog.cite("amem") + "\n"
    assert main(["cite", "amem", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bibtex"] == catalog.cite("amem")
