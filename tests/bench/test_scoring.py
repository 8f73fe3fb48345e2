import pytest
from hypothesis import given
from hypothesis import strategies as st

from loci.bench.scoring import auroc, locomo_score, refuses, squad_exact, squad_f1, stemmed_f1
from loci.errors import BadInput


@pytest.mark.parametrize(
    ("prediction", "gold", "f1"),
    [
        ("7 May 2023", "7 May 2023", 1.0),
        ("May 2023", "7 May 2023", 0.8),  # 2 shared: precision 1, recall 2/3
        ("on 7 May, 2023", "7 May 2023", 6 / 7),  # "on" is one word too many: 3/4 and 3/3
        ("The cat and a dog", "cat, dog!", 1.0),  # articles, "and" and punctuation do not count
        ("She was running", "runs", 0.5),  # stems: she wa run | run
        ("adoption agencies", "Adoption agency", 1.0),
        ("dance dance dance", "dance", 0.5),  # a word counts as often as both sides hold it
        ("nothing alike", "7 May 2023", 0.0),
        ("", "7 May 2023", 0.0),
    ],
)
def test_stemmed_f1_equals_what_one_counts_by_hand(prediction: str, gold: str, f1: float) -> None:
    assert stemmed_f1(prediction, gold) == pytest.approx(f1)


def test_several_answers_count_part_by_part() -> None:
    gold = "Kickboxing, Taekwondo"
    assert locomo_score("taekwondo, kickboxing", gold, category=1) == 1.0
    assert locomo_score("kickboxing", gold, category=1) == 0.5
    # best F1 of "kickboxing" is 2/3 (one word too many), of "taekwondo" 0
    assert locomo_score("some kickboxing, judo", gold, category=1) == pytest.approx(1 / 3)
    assert locomo_score("kickboxing", gold, category=4) == pytest.approx(2 / 3)


def test_open_answers_are_held_against_what_stands_before_the_semicolon() -> None:
    gold = "National park; she likes the outdoors"
    assert locomo_score("a national park", gold, category=3) == 1.0
    assert locomo_score("a national park", gold, category=4) < 1.0


def test_what_was_never_said_is_right_only_when_refused() -> None:
    assert locomo_score("", "", category=5) == 1.0
    assert locomo_score("This was not mentioned.", "", category=5) == 1.0
    assert locomo_score("self-care is important", "", category=5) == 0.0


def test_another_category_is_an_error() -> None:
    with pytest.raises(BadInput, match="1 to 5, not 6"):
        locomo_score("x", "x", category=6)


@pytest.mark.parametrize(
    "text", ["", "  ", "Not mentioned", "It doesn’t say.", "No information available", "unknown", "They never said so"]
)
def test_refusals_are_told(text: str) -> None:
    assert refuses(text)


@pytest.mark.parametrize("text", ["7 May 2023", "No", "nowhere", "She knows Tom", "Likely no"])
def test_answers_are_no_refusals(text: str) -> None:
    assert not refuses(text)


def test_squad_takes_the_best_gold_answer_and_no_stems() -> None:
    assert squad_exact("The Norman dynasty.", ["normans", "norman dynasty"]) == 1.0
    assert squad_exact("norman", ["normans"]) == 0.0
    assert squad_f1("norman dynasty in France", ["normans", "Norman dynasty"]) == pytest.approx(2 / 3)
    assert squad_f1("and", ["and"]) == 1.0  # SQuAD keeps "and"


def test_squad_questions_without_an_answer_want_an_empty_one() -> None:
    assert squad_f1("", []) == squad_exact("", []) == 1.0
    assert squad_f1("France", []) == squad_exact("France", []) == 0.0
    assert squad_f1("", ["France"]) == 0.0


def test_auroc_equals_what_one_counts_by_hand() -> None:
    assert auroc([0.1, 0.4, 0.35, 0.8], [False, False, True, True]) == 0.75  # 3 of 4 pairs in order
    assert auroc([1.0, 1.0, 1.0, 1.0], [True, False, True, False]) == 0.5
    assert auroc([2.0, 1.0, 1.0], [True, True, False]) == 0.75  # one pair in order, one tied


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=30))
def test_auroc_is_the_share_of_pairs_in_order(rows: list[tuple[int, bool]]) -> None:
    true = [score for score, label in rows if label]
    false = [score for score, label in rows if not label]
    scores, labels = [float(score) for score, _ in rows], [label for _, label in rows]
    if not true or not false:
        with pytest.raises(BadInput, match="both classes"):
            auroc(scores, labels)
        return
    pairs = [(a > b) + (a == b) / 2 for a in true for b in false]
    assert auroc(scores, labels) == pytest.approx(sum(pairs) / len(pairs))


@given(st.text(), st.text())
def test_f1_is_symmetric_and_between_nothing_and_everything(one: str, other: str) -> None:
    assert 0 <= stemmed_f1(one, other) == stemmed_f1(other, one) <= 1
    assert stemmed_f1(one, one) == 1
