"""Claims are run with a claim of our own about arithmetic, put where a system's claim would be."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from loci.claims import base
from loci.cli import main


@pytest.fixture
def arithmetic(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make the claim of `titans` say that one and one are `answer`."""

    def put(answer: int) -> None:
        module = ModuleType("loci.claims.titans")

        def measure(*, progress: base.Progress | None = None) -> Mapping[str, Any]:
            if progress is not None:
                progress("adding", 1, 1)
            return {"sum": 1 + 1, "parts": {"left": 1, "share": 0.5}}

        claim = base.Claim(
            system="titans",
            paper="a primer, page 1",
            says=f"one and one are {answer}",
            here="integers",
            differs="apples in the primer",
            minutes=0.01,
        )
        vars(module).update(CLAIM=claim, measure=measure, holds=lambda measured: measured["sum"] == answer)
        monkeypatch.setitem(sys.modules, "loci.claims.titans", module)
        monkeypatch.setattr(base, "written", lambda: ["titans"])

    return put


@pytest.mark.parametrize(("answer", "verdict"), [(2, "holds"), (3, "does not hold")])
def test_a_claim_may_hold_or_not_and_shows_its_numbers_either_way(
    answer: int, verdict: str, arithmetic: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    arithmetic(answer)
    assert main(["claim", "titans"]) == 0
    out, err = capsys.readouterr()
    for words in ("a primer, page 1", f"one and one are {answer}", "integers", "apples in the primer"):
        assert words in out
    assert "  sum    2\n" in out
    assert "    share  0.5\n" in out
    assert out.splitlines()[-1].startswith(f"{verdict} (")
    assert "adding ..." in err


def test_an_outcome_as_json_carries_claim_figures_verdict_and_machine(
    arithmetic: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    arithmetic(2)
    assert main(["claim", "titans", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["measured"] == {"sum": 2, "parts": {"left": 1, "share": 0.5}}
    assert row["holds"] is True
    assert row["verdict"] == "holds"
    assert row["says"] == "one and one are 2"
    assert row["machine"]["cores"] >= 1


def test_a_saved_outcome_is_a_file(
    arithmetic: Callable[[int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arithmetic(3)
    monkeypatch.chdir(tmp_path)
    assert main(["claim", "titans", "--save"]) == 0
    (file,) = (tmp_path / "results").glob("claim-titans-*.json")
    assert json.loads(file.read_text())["verdict"] == "does not hold"


def test_without_a_name_the_written_claims_are_listed(
    arithmetic: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    arithmetic(2)
    assert main(["claim"]) == 0
    assert "one and one are 2" in capsys.readouterr().out
    assert main(["claim", "--json"]) == 0
    assert [row["system"] for row in json.loads(capsys.readouterr().out)] == ["titans"]


def test_a_claim_that_is_not_written_yet_is_no_mystery(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["claim", "lssl"]) == 2
    assert "lssl has no claim yet: it is planned" in capsys.readouterr().err
