from collections.abc import Mapping
from datetime import date

import pytest

from loci.bench.locomo import LoCoMo
from loci.bench.task import Change, Task


def test_a_task_without_examples_or_score_cannot_be_made() -> None:
    class Half(Task[str, str]):
        name = "half"
        version = 1
        changes = (Change(version=1, made_on=date(2026, 1, 1), what="First version."),)

        def examples(self) -> list[str]:
            return ["one"]

    with pytest.raises(TypeError, match="score"):
        Half()  # type: ignore[abstract]


def test_a_whole_task_scores_its_examples() -> None:
    class Echo(Task[str, str]):
        name = "echo"
        version = 1
        changes = (Change(version=1, made_on=date(2026, 1, 1), what="First version."),)

        def examples(self) -> list[str]:
            return ["one", "two"]

        def score(self, prediction: str, example: str) -> Mapping[str, float]:
            return {"exact": float(prediction == example)}

    task = Echo()
    assert [task.score("two", example)["exact"] for example in task.examples()] == [0.0, 1.0]


@pytest.mark.parametrize("task", [LoCoMo], ids=lambda task: task.name)
def test_the_change_log_ends_with_the_version(task: type[Task[object, object]]) -> None:
    versions = [change.version for change in task.changes]
    assert versions == sorted(set(versions))
    assert versions[-1] == task.version
