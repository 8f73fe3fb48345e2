"""Scores of short answers: what counts as right, written so that it can be checked by hand.

Source   LoCoMo's scorer (Maharana et al. 2024, arXiv:2402.17753); SQuAD's (Rajpurkar et al. 2018, arXiv:1806.03822).
Same     what is dropped before comparing, Porter stems, the rule of each LoCoMo category, F1 on bags of words.
Differs  a refusal is told by `refuses`, or by the reader itself, instead of two fixed phrases; stems come from
         Snowball's "porter", which follows the article of 1980, where LoCoMo takes a toolkit's variant of it.
"""

from __future__ import annotations

import functools
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from loci.errors import BadInput

if TYPE_CHECKING:
    import Stemmer

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SQUAD_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_LOCOMO_ARTICLES = re.compile(r"\b(?:a|an|the|and)\b")  # LoCoMo drops "and" with them
_REFUSAL = re.compile(
    r"\b(?:not (?:mentioned|said|stated|known|specified|answerable|available)|no (?:information|answer|mention)"
    r"|unknown|unanswerable|(?:do(?:es)? not|don't|doesn't) (?:say|know|hold|mention)|never (?:said|mentioned))\b"
)


def locomo_score(prediction: str, gold: str, *, category: int) -> float:
    """LoCoMo's score of one answer: token F1 for categories 1 to 4, refusal as 0 or 1 for category 5.

    Category 1 (answers with several parts) cuts both sides at commas and gives the mean over the gold parts of the best
    F1 that any predicted part reaches. Category 3 is held against what stands before the first ";" of the gold answer.

    Raises:
        BadInput: a category outside 1 to 5.
    """
    if category == 1:
        parts = prediction.split(",")
        return float(np.mean([max(stemmed_f1(part, wanted) for part in parts) for wanted in gold.split(",")]))
    if category == 3:
        return stemmed_f1(prediction, gold.split(";")[0])
    if category in (2, 4):
        return stemmed_f1(prediction, gold)
    if category == 5:
        return float(refuses(prediction))
    raise BadInput(f"LoCoMo has categories 1 to 5, not {category}.")


def stemmed_f1(prediction: str, gold: str) -> float:
    """F1 between two bags of Porter stems; articles, "and", case and punctuation do not count."""
    return _f1(_stems(prediction), _stems(gold))


def squad_f1(prediction: str, golds: Sequence[str]) -> float:
    """Best F1 over the gold answers. Without one, only an empty prediction is right."""
    return max(_f1(_squad_words(prediction), _squad_words(gold)) for gold in golds or ("",))


def squad_exact(prediction: str, golds: Sequence[str]) -> float:
    """1 when the prediction equals a gold answer up to articles, case, punctuation and spaces, else 0."""
    return float(any(_squad_words(prediction) == _squad_words(gold) for gold in golds or ("",)))


def refuses(prediction: str) -> bool:
    """Whether an answer says that there is none: it is empty, or says "not mentioned" in one of its usual wordings."""
    return not prediction.strip() or _REFUSAL.search(prediction.lower().replace("’", "'")) is not None


def auroc(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """The chance that a true example scores above a false one, ties counted half.

    Raises:
        BadInput: the two lengths differ, or one of the classes is empty.
    """
    values, truth = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=bool)
    if values.shape != truth.shape:
        raise BadInput(f"AUROC needs one label per score, got {values.size} scores and {truth.size} labels.")
    positives, negatives = int(truth.sum()), int((~truth).sum())
    if not positives or not negatives:
        raise BadInput(f"AUROC needs examples of both classes, got {positives} true and {negatives} false.")
    _, where, count = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(count) - (count - 1) / 2)[where]  # ties share the middle of their ranks
    return float((ranks[truth].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def _f1(prediction: Sequence[str], gold: Sequence[str]) -> float:
    if not prediction or not gold:
        return float(prediction == gold)
    shared = (Counter(prediction) & Counter(gold)).total()
    return 2 * shared / (len(prediction) + len(gold))


def _squad_words(text: str) -> list[str]:
    return _SQUAD_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _stems(text: str) -> list[str]:
    words = _LOCOMO_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()
    return list(_stemmer().stemWords(words))


@functools.cache
def _stemmer() -> Stemmer.Stemmer:
    import Stemmer

    return Stemmer.Stemmer("porter")
