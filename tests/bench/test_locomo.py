"""On a conversation of two sessions, with vectors that count words and a reader that quotes."""

import gzip
import json
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from jaxtyping import Float32

from loci.bench import locomo
from loci.bench.locomo import Arm, Conversation, LoCoMo, Question, conversations, run
from loci.errors import BadInput, DataNotFound, UnknownName
from loci.lm.reader import Passage, ReaderAnswer
from loci.text.plain import PlainStore

RAW = {
    "sample_id": "garden",
    "conversation": {
        "speaker_a": "Ivo",
        "speaker_b": "Lea",
        "session_2_date_time": "6:10 pm on 22 May, 2023",
        "session_2": [
            {"speaker": "Lea", "dia_id": "D2:1", "text": "The pear tree flowers."},
            {"speaker": "Ivo", "dia_id": "D2:2", "text": "I sold the tractor yesterday."},
        ],
        "session_1_date_time": "1:56 pm on 8 May, 2023",
        "session_1": [
            {"speaker": "Ivo", "dia_id": "D1:1", "text": "Look at this!", "blip_caption": "a photo of a red tractor"},
            {"speaker": "Lea", "dia_id": "D1:2", "text": "Lovely. I planted a pear tree."},
            {"speaker": "Ivo", "dia_id": "D1:3", "text": ""},
        ],
        "session_3_date_time": "9:00 am on 1 June, 2023",
    },
    "qa": [
        {"question": "Which tree did Lea plant?", "answer": "pear", "evidence": ["D1:2"], "category": 4},
        {"question": "What became of the tractor?", "answer": "red, sold", "evidence": ["D1:1; D2:2"], "category": 1},
        {"question": "When was the tractor sold?", "answer": 2023, "evidence": ["D2:2", "D:11:26"], "category": 2},
        {"question": "Would Ivo drive again?", "answer": "No; he sold it", "evidence": [], "category": 3},
        {"question": "What did Lea sell?", "adversarial_answer": "a tractor", "evidence": ["D2:2"], "category": 5},
    ],
}


class CountedWords:
    """Hashed words, scaled to unit norm."""

    name = "words"
    dimension = 64

    def embed(self, texts: Sequence[str]) -> Float32[np.ndarray, "text dimension"]:
        vectors = np.full((len(texts), self.dimension), 1e-6, dtype=np.float32)
        for row, text in zip(vectors, texts, strict=True):
            for word in text.lower().replace("?", " ").replace(".", " ").split():
                row[sum(word.encode()) % self.dimension] += 1
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class Quoting:
    """Answers with the newest passage's words, and refuses without passages. Remembers what it was shown."""

    def __init__(self, stop_after: int = 1_000) -> None:
        self.shown: list[list[Passage]] = []
        self.stop_after = stop_after

    def answer(self, question: str, passages: Sequence[Passage]) -> ReaderAnswer:
        if len(self.shown) == self.stop_after:
            raise KeyboardInterrupt
        self.shown.append(list(passages))
        text = passages[-1].text if passages else ""
        return ReaderAnswer(
            text=text, found=bool(text), confidence=0.5, sources=(), tokens_in=10, tokens_out=2, seconds=0.0
        )

    def answer_many(self, questions: Sequence[str], passages: Sequence[Passage]) -> list[ReaderAnswer]:
        return [self.answer(question, passages) for question in questions]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "b.json").write_text(json.dumps([RAW]))
    return tmp_path


@pytest.fixture(autouse=True)
def words_as_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locomo, "_default_tokenizer", lambda: lambda text: len(text.split()))


def test_files_are_read_as_they_are_packed_or_not(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps(RAW))
    (tmp_path / "two.json.gz").write_bytes(gzip.compress(json.dumps([RAW, RAW]).encode()))
    (tmp_path / "README.md").write_text("not data")
    assert [len(conversations(tmp_path)), len(conversations(tmp_path / "two.json.gz"))] == [3, 2]
    (found, *_) = conversations(tmp_path)
    assert [turn.id for turn in found.turns] == ["D1:1", "D1:2", "D2:1", "D2:2"]
    assert [turn.reply_to for turn in found.turns] == [None, "D1:1", None, "D2:1"]
    first = found.turns[0]
    assert first.content == "Look at this! [shares a photo of a red tractor]"
    assert (first.speaker, first.said_at) == ("Ivo", datetime(2023, 5, 8, 13, 56, tzinfo=UTC))


def test_evidence_and_answers_are_cleaned_of_the_known_traps(folder: Path) -> None:
    (found,) = conversations(folder)
    assert [question.evidence for question in found.questions] == [
        ("D1:2",), ("D1:1", "D2:2"), ("D2:2",), (), ("D2:2",),
    ]  # fmt: skip
    assert [question.answer for question in found.questions] == ["pear", "red, sold", "2023", "No; he sold it", ""]


@pytest.mark.parametrize(
    "content", ["{", "[1]", '[{"sample_id": 1}]', '[{"sample_id": 1, "conversation": {}, "qa": 3}]']
)
def test_a_file_of_another_form_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "odd.json").write_text(content)
    with pytest.raises(BadInput, match=r"odd\.json is not of LoCoMo's form"):
        conversations(tmp_path)


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(json.dumps([RAW]).encode())
    for damaged in (whole[:-20], whole[:40] + bytes(20) + whole[60:], b"no archive"):
        (tmp_path / "odd.json.gz").write_bytes(damaged)
        with pytest.raises(BadInput, match="odd"):
            conversations(tmp_path)


def test_a_folder_without_data_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataNotFound, match=r"holds no \*\.json"):
        conversations(tmp_path)
    with pytest.raises(DataNotFound, match="does not exist"):
        conversations(tmp_path / "nowhere")


def test_scores_follow_the_category(folder: Path) -> None:
    task = LoCoMo(folder)
    scores = [task.score("sold", question) for question in task.examples()]
    assert scores == [{"f1": 0}, {"f1": 0.5}, {"f1": 0}, {"f1": 0}, {"refusal": 0}]
    assert task.score("", task.examples()[4]) == {"refusal": 1}


def test_every_arm_gives_the_promised_row(folder: Path) -> None:
    told: list[tuple[str, int, int]] = []
    result = run(
        folder,
        ["none", "latest", "plain"],
        embedder=CountedWords(),
        reader=Quoting(),
        progress=lambda label, done, total: told.append((label, done, total)),
    ).as_json()
    keys = "arm recall@10 recall@20 all@20 f1 f1_by_category refusal tokens_per_answer seconds".split()
    assert all(set(keys) <= set(row) for row in result["arms"])
    none, latest, plain = result["arms"]
    assert (none["f1"], none["refusal"], none["recall@20"]) == (0, 1, 0)
    assert (plain["recall@10"], plain["all@20"]) == (1, 1)  # four turns: ten notes hold all
    assert latest["recall@shown"] == 1
    assert plain["refusal"] == 0
    # of the newest passage, "I sold the tractor yesterday.", four words count: F1 2/5 on one part of two
    assert plain["f1_by_category"]["multi-hop"] == pytest.approx((2 / 5) / 2)
    assert plain["f1"] == pytest.approx((2 / 5) / 2 / 4)
    assert plain["tokens_per_answer"] == 12
    assert plain["questions"]["recall@10"] == 3
    assert plain["questions"]["all@20"] == 1
    assert result["complete"] is True
    assert [done for _, done, _ in told][-1] == told[-1][2]
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_the_recipe_says_what_a_figure_needs(folder: Path) -> None:
    recipe = run(folder, ["plain"], answers=False, embedder=CountedWords(), seed=7).recipe
    assert recipe["data"][0]["file"] == "b.json"
    assert len(recipe["data"][0]["sha256"]) == 64
    assert (recipe["seed"], recipe["examples"], recipe["embedder"]["name"]) == (7, 5, "words")
    assert recipe["config"]["arms"] == ["plain"]
    assert recipe["machine"]["cores"] >= 1
    assert recipe["packages"]["numpy"] == np.__version__


def test_without_answers_no_reader_is_asked(folder: Path) -> None:
    (row,) = run(folder, ["plain"], answers=False, embedder=CountedWords()).as_json()["arms"]
    assert row["f1"] is row["refusal"] is row["tokens_per_answer"] is None
    assert row["f1_by_category"] == {}
    assert row["recall@10"] == 1


def test_passages_come_in_the_order_in_which_they_were_said(folder: Path) -> None:
    reader = Quoting()
    run(folder, ["plain"], embedder=CountedWords(), reader=reader)
    for shown in reader.shown:
        moments = [passage.said_at for passage in shown if passage.said_at]
        assert moments == sorted(moments)
        assert [passage.text for passage in shown][-1] == "I sold the tractor yesterday."


def test_a_dated_arm_shows_its_reader_resolved_dates(folder: Path) -> None:
    reader = Quoting()
    run(folder, ["plain-dated"], embedder=CountedWords(), reader=reader)
    assert reader.shown[0][-1].text == "I sold the tractor yesterday (21 May 2023)."


def test_the_newest_turns_fill_the_window_and_no_more(folder: Path) -> None:
    reader = Quoting()
    config = locomo.LoCoMoConfig(latest_tokens=18)  # lines of 9, 8 and 9 words from the end
    (arm,) = run(folder, ["latest"], embedder=CountedWords(), reader=reader, config=config).as_json()["arms"]
    assert [passage.id for passage in reader.shown[0]] == ["D2:1", "D2:2"]
    assert arm["recall@shown"] == pytest.approx((0 + 0.5 + 1) / 3)


def test_a_limit_asks_fewer_questions_the_same_ones_for_a_seed(folder: Path) -> None:
    def asked(seed: int) -> list[str]:
        result = run(folder, ["plain"], answers=False, embedder=CountedWords(), limit=2, seed=seed)
        return [outcome.question.text for outcome in result.arms[0].outcomes]

    assert asked(0) == asked(0)
    assert all(len(asked(seed)) == 2 for seed in range(3))
    assert len({tuple(asked(seed)) for seed in range(8)}) > 1
    with pytest.raises(BadInput, match="at least 1"):
        run(folder, ["plain"], answers=False, embedder=CountedWords(), limit=0)


def test_an_interrupted_run_gives_what_was_measured_so_far(folder: Path) -> None:
    reader = Quoting(stop_after=7)  # all five questions of the first arm, two of the second
    result = run(folder, ["plain", "plain-dated"], embedder=CountedWords(), reader=reader)
    assert not result.complete
    assert [len(arm.outcomes) for arm in result.arms] == [5, 2]
    assert result.as_json()["arms"][1]["f1"] is not None


def test_an_unknown_arm_is_refused_with_its_neighbour(folder: Path) -> None:
    with pytest.raises(UnknownName, match="'plain'"):
        run(folder, ["plane"], answers=False, embedder=CountedWords())


def test_another_arm_is_one_entry_and_amem_is_compared_with_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opens(folder: Path, embedder: CountedWords) -> nullcontext[PlainStore]:
        return nullcontext(PlainStore(embedder))

    monkeypatch.setitem(locomo.ARMS, "amem", Arm(name="amem", says="a stand-in", opens=opens))
    result = run(folder, ["none", "amem"], embedder=CountedWords(), reader=Quoting())
    rows = {row["measure"]: row for row in result.comparisons}
    assert set(rows) == {"f1", "recall@10", "recall@20", "all@20"}
    assert (rows["recall@10"]["against"], rows["recall@10"]["difference"]) == ("none", 1.0)
    assert rows["recall@10"]["examples"] == 3


def test_turns_that_share_a_note_are_all_found_with_it() -> None:
    question = Question(conversation="x", text="?", answer="a", category=4, evidence=("D1:1", "D3:2"))
    assert locomo._recall(question, [("D1:1", "D2:2"), ("D3:2",)]) == 1
    assert locomo._recall(question, [("D1:1", "D2:2")]) == 0.5


def test_the_development_part_has_the_questions_that_its_readme_counts(data: Path) -> None:
    if not (data / "locomo").is_dir():
        pytest.skip("needs the LoCoMo data in LOCI_DATA")
    found = conversations(data / "locomo")
    assert [(one.id, len(one.turns), len(one.questions)) for one in found] == [
        ("conv-26", 419, 199), ("conv-30", 369, 105), ("conv-41", 663, 193),
    ]  # fmt: skip
    asked = [question for one in found for question in one.questions]
    assert sum(bool(question.evidence) for question in asked if question.category != 5) == 383
    assert sum(len(question.evidence) > 1 for question in asked if question.category != 5) == 92
    assert isinstance(found[0], Conversation)


@pytest.mark.slow
def test_the_plain_store_finds_about_what_the_prototype_found(data: Path) -> None:
    if not (data / "locomo").is_dir():
        pytest.skip("needs the LoCoMo data in LOCI_DATA")
    (row,) = run(data / "locomo", ["plain"], answers=False).as_json()["arms"]
    assert row["recall@10"] == pytest.approx(0.532, abs=0.01)
    assert row["recall@20"] == pytest.approx(0.647, abs=0.01)
