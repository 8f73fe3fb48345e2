"""The seam of the bench: a task gives examples and scores predictions.

A task is versioned: whatever moves a score (a prompt, the scorer, the choice of examples) raises `version` and adds a
line to `changes`, so that two figures are only ever compared when they mean the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Generic, TypeVar

Example = TypeVar("Example")
Prediction = TypeVar("Prediction")


@dataclass(frozen=True, kw_only=True)
class Change:
    """One line of a task's change log: from `version` on, `what` is different."""

    version: int
    made_on: date
    what: str


class Task(ABC, Generic[Example, Prediction]):
    """One yardstick. A concrete task is one module with one final subclass.

    `changes` is ordered by version and its last entry is `version` itself.
    """

    name: str
    version: int
    changes: tuple[Change, ...]

    @abstractmethod
    def examples(self) -> Sequence[Example]:
        """Every example, in an order that never changes within a version."""

    @abstractmethod
    def score(self, prediction: Prediction, example: Example) -> Mapping[str, float]:
        """Measures of one prediction by name, each between 0 and 1; only those that apply to the example."""
