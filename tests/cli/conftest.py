"""What the tests of the memory commands share: a home of their own, and a reader that needs no trained part."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from loci.cli import main
from loci.lm.reader import Passage, Reader, ReaderAnswer


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        return json.loads(self.out)


Command = Callable[..., Ended]


@pytest.fixture
def loci(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run one command line with its own LOCI_HOME and no configured endpoint."""
    monkeypatch.setenv("LOCI_HOME", str(tmp_path / "home"))
    for name in ("LOCI_MODEL", "LOCI_BASE_URL", "OPENAI_BASE_URL", "LOCI_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)

    def run(*words: str) -> Ended:
        capsys.readouterr()
        code = main(list(words))
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return Ended(code, out, err)

    return run


class WordReader(Reader):
    """Answers with the whole passage that shares most words with the question; with fewer than two, refuses."""

    def __init__(self) -> None:
        pass

    def answer(
        self, question: str, passages: Sequence[Passage], *, now: datetime | None = None, max_tokens: int = 48
    ) -> ReaderAnswer:
        asked = words(question)
        shared, best = max(((len(asked & words(each.text)), each) for each in passages), key=lambda pair: pair[0])
        found = shared >= 2
        return ReaderAnswer(
            text=best.text if found else "",
            found=found,
            confidence=shared / len(asked),
            sources=(best.id or "",) if found else (),
            tokens_in=1,
            tokens_out=1,
            seconds=0.0,
        )


def words(text: str) -> set[str]:
    return {word for word in re.findall(r"\w+", text.lower()) if len(word) > 3}


@pytest.fixture
def word_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the flow of a command, not for the quality of an answer."""
    monkeypatch.setattr(Reader, "load", classmethod(lambda cls: WordReader()))
