"""How the reader is trained and measured: SQuAD's passages and invented conversations, LoCoMo only as a yardstick.

Data     `squad`: half of SQuAD 2.0's development set (Rajpurkar et al. 2018, arXiv:1806.03822), 16 articles. They are
         ordered by the hash of their title and the first ones are held back until a tenth of the questions is
         together; no paragraph of them is trained on. `bench.invented`: conversations that were never held.
Packing  all questions about a text are one sequence (`lm.train.Example`): SQuAD's nine a paragraph, and a dozen about
         a window of a conversation.
Views    of a conversation the reader sees what a memory would show it: now the evidence alone, now six to sixteen
         turns with strangers among them, in order of time or not, most with their dates resolved. Questions whose
         evidence is not shown have no answer, nor do those about the wrong person.
Refusal  a fortieth of the paragraphs and as many views are kept out to fit `Confidence` on.
LoCoMo   is never trained on. Its questions are asked with their evidence turns as passages.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from loci import settings
from loci.bench import invented, locomo
from loci.bench.scoring import auroc, locomo_score, squad_f1
from loci.errors import DataNotFound
from loci.lm.model import LanguageModel
from loci.lm.reader import Confidence, Passage, Prompts, Reader
from loci.lm.train import Artifact, Example, LoraRecipe, attach, load_artifact, train_lora
from loci.text.times import annotate, resolve

DATA = "SQuAD 2.0 (half of the development set, held-back articles excluded) and conversations of loci.bench.invented"
BARS = {"squad_f1": 0.60, "locomo_f1": 0.45, "refusal_auroc": 0.75}
_MINUTES = 60.0  # what the shipped training took on two cores; other durations are scaled from it


@dataclass(frozen=True, kw_only=True)
class ReaderRecipe:
    """What the reader is trained on, and how. All defaults are ours, measured on paragraphs that were kept out."""

    squad_passes: int = 3  # how often each paragraph of SQuAD is seen
    views: int = 1050  # windows of invented conversations, each seen once
    views_per_conversation: int = 3
    held_back: float = 0.10  # part of SQuAD's questions, by article
    kept_out: int = 24  # paragraphs, and as many views, for fitting the confidence
    dated: float = 0.92  # part of the turns whose times are resolved in the text
    lora: LoraRecipe = field(default_factory=LoraRecipe)
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Paragraph:
    """A passage of SQuAD and its questions, each with all its gold answers; none means unanswerable."""

    title: str
    text: str
    asked: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True, kw_only=True)
class View:
    """Passages as a memory would show them, and questions with gold answers; None is the refusal."""

    passages: tuple[Passage, ...]
    asked: tuple[tuple[str, str | None], ...]


def read_squad(folder: Path) -> list[Paragraph]:
    """All paragraphs that have questions. Raises `DataNotFound` where the two files are absent."""
    files = [folder / "passages.jsonl.gz", folder / "questions.jsonl.gz"]
    if missing := [file for file in files if not file.is_file()]:
        raise DataNotFound(f"no {missing[0].name} in {folder}. Name the folder of SQuAD's files, or set LOCI_DATA.")
    passages, questions = (
        [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()] for file in files
    )
    asked: defaultdict[str, list[tuple[str, tuple[str, ...]]]] = defaultdict(list)
    for row in questions:
        asked[row["passage"]].append((row["question"].strip(), tuple(row["answers"])))
    return [
        Paragraph(title=row["title"], text=row["text"], asked=tuple(asked[row["id"]]))
        for row in passages
        if row["id"] in asked
    ]


def split(paragraphs: Sequence[Paragraph], *, held_back: float) -> tuple[list[Paragraph], list[Paragraph]]:
    """(to train on, held back): whole articles, in the order of their titles' hashes, until the part is reached."""
    titles = sorted({one.title for one in paragraphs}, key=lambda title: hashlib.sha256(title.encode()).hexdigest())
    wanted = held_back * sum(len(one.asked) for one in paragraphs)
    held: set[str] = set()
    while titles and sum(len(one.asked) for one in paragraphs if one.title in held) < wanted:
        held.add(titles.pop(0))
    return [one for one in paragraphs if one.title not in held], [one for one in paragraphs if one.title in held]


def squad_view(paragraph: Paragraph, others: Sequence[Paragraph], draw: random.Random) -> View:
    """A paragraph with its questions, now and then cut into sentences, and a question of another paragraph."""
    asked = [(question, min(answers, key=len) if answers else None) for question, answers in paragraph.asked]
    same = [one for one in others if one.title == paragraph.title and one is not paragraph]
    if same and draw.random() < 0.5:
        stranger = draw.choice(same)
        asked.append((draw.choice(stranger.asked)[0], None))
    draw.shuffle(asked)
    pieces = [paragraph.text]
    if draw.random() < 0.2:
        pieces = [piece.strip() for piece in paragraph.text.replace(". ", ".\n").split("\n") if piece.strip()]
    return View(passages=tuple(Passage(text=piece) for piece in pieces), asked=tuple(asked))


def conversation_view(conversation: invented.Conversation, draw: random.Random, *, dated: float) -> View:
    """A few turns of a conversation as a memory would show them, and what can and cannot be answered from them."""
    turns = {turn.id: turn for turn in conversation.turns}
    order = list(turns)
    narrow = draw.random() < 0.45
    answerable = [question for question in conversation.questions if question.answer is not None]
    shown: set[str] = set()
    for question in draw.sample(answerable, min(len(answerable), draw.randint(1, 2) if narrow else draw.randint(3, 7))):
        shown |= set(question.evidence)
    size = len(shown) if narrow else max(len(shown), draw.randint(6, 16))
    if narrow and draw.random() < 0.3:
        size += draw.randint(1, 2)
    rest = [turn for turn in order if turn not in shown]
    shown |= set(draw.sample(rest, min(len(rest), size - len(shown))))
    listed = sorted(shown, key=order.index)
    if draw.random() < 0.3:
        draw.shuffle(listed)
    near = {
        order[place + step]
        for turn in shown
        for step in range(-3, 4)
        if 0 <= (place := order.index(turn)) + step < len(order)
    }
    known, unknown = [], []
    for question in draw.sample(conversation.questions, len(conversation.questions)):
        held = set(question.evidence) & shown
        if question.answer is not None and held == set(question.evidence):
            known.append((question.text, question.answer))
            continue
        tempting = held or not question.evidence if question.answer is None else not set(question.evidence) & near
        if tempting:
            unknown.append((question.text, None))
    known = known[: 4 if narrow else 12]
    asked = known + unknown[: max(1, round(len(known) * draw.uniform(0.3, 0.8)))]
    draw.shuffle(asked)
    passages = []
    for turn in (turns[id] for id in listed):
        text = annotate(turn.text, resolve(turn.text, turn.at)) if draw.random() < dated else turn.text
        passages.append(Passage(text=text, said_by=turn.speaker, said_at=turn.at, id=turn.id))
    return View(passages=tuple(passages), asked=tuple(asked))


class Mixture(Sequence[Example]):
    """All sequences of one training, made when they are asked for; the same number gives the same sequence."""

    def __init__(self, prompts: Prompts, paragraphs: Sequence[Paragraph], recipe: ReaderRecipe) -> None:
        self.prompts, self.paragraphs, self.recipe = prompts, paragraphs, recipe
        self.from_squad = len(paragraphs) * recipe.squad_passes

    def __len__(self) -> int:
        return self.from_squad + self.recipe.views

    def view(self, number: int) -> View:
        draw = random.Random(f"{self.recipe.seed} {number}")
        if number < self.from_squad:
            return squad_view(self.paragraphs[number % len(self.paragraphs)], self.paragraphs, draw)
        conversation = _conversation((number - self.from_squad) // self.recipe.views_per_conversation)
        return conversation_view(conversation, draw, dated=self.recipe.dated)

    def __getitem__(self, number: Any) -> Any:
        view = self.view(number)
        return self.prompts.example(view.passages, view.asked)


@lru_cache(maxsize=16)
def _conversation(seed: int) -> invented.Conversation:
    return invented.invent(seed)


def train(
    folder: Path | None = None,
    *,
    squad: Path | None = None,
    minutes: float | None = None,
    resume: bool = False,
    model: LanguageModel | None = None,
    recipe: ReaderRecipe | None = None,
    progress: bool = True,
) -> Artifact:
    """Train the reader and fit its confidence; the artifact lies in `folder`, its figures are `evaluate`'s to add.

    Args:
        folder: for checkpoints and the artifact; "reader" in the cache folder unless given.
        squad: the folder of SQuAD's two files; in the data folder unless given.
        minutes: about how long it may take on two cores; passes and views are scaled from the hour of the recipe.
        resume: go on from the checkpoint in `folder`. Without it a checkpoint is thrown away.
    """
    recipe = recipe or ReaderRecipe()
    if minutes is not None:
        recipe = _scaled(recipe, minutes / _MINUTES)
    if model is None:
        from loci.lm import load

        model = load("default")
    folder = folder or settings.cache() / "training" / "reader"
    ours, kept_out, _ = _parts(squad, recipe)
    mixture = Mixture(Prompts(model), ours, recipe)
    artifact = train_lora(
        model, mixture, recipe=recipe.lora, folder=folder, name="reader", data=DATA, resume=resume, progress=progress
    )
    if artifact is None:
        raise AssertionError("training that is not told to stop returns an artifact")
    reader = Reader(attach(model, artifact))
    confidence = fit_confidence(reader, calibration_views(kept_out, recipe))
    about = {"confidence": asdict(confidence), "mixture": {**asdict(recipe), "lora": None}}
    return artifact.saved_with(score=artifact.score, settings=about)


def calibration_views(kept_out: Sequence[Paragraph], recipe: ReaderRecipe) -> list[View]:
    """Views of the kept-out paragraphs, and as many of conversations that training never reaches."""
    draw = random.Random(f"{recipe.seed} kept out")
    views = [View(passages=(Passage(text=one.text),), asked=_golds(one)) for one in kept_out]
    for number in range(len(kept_out)):
        conversation = invented.invent(10_000_000 + number)
        views.append(conversation_view(conversation, draw, dated=recipe.dated))
    return views


def fit_confidence(reader: Reader, views: Sequence[View]) -> Confidence:
    """The logistic function from what the model did to whether the question had an answer, and its threshold.

    The weights are those of the largest likelihood with a small penalty (a hundredth of a squared weight). The
    threshold is the one under which the mean score is best when a right refusal counts 1 and an answer three times
    its F1: of the questions that a memory is asked, three in four have an answer, but only half of these do.
    """
    features: list[list[float]] = []
    labels: list[bool] = []
    worth: list[float] = []
    for view in views:
        readings, _ = reader.read([question for question, _ in view.asked], view.passages)
        for reading, (_, gold) in zip(readings, view.asked, strict=True):
            features.append([1.0, reading.refusal, reading.mean, reading.least])
            labels.append(gold is not None)
            worth.append(squad_f1(reading.text, [gold]) if gold is not None else 0.0)
    x, y = np.array(features), np.array(labels, dtype=np.float64)
    weights = np.zeros(4)
    penalty = np.diag([0.0, 0.02, 0.02, 0.02]) * len(y) / 100
    for _ in range(50):  # Newton's method; the problem is convex
        chance = 1 / (1 + np.exp(-np.clip(x @ weights, -60, 60)))
        slope = x.T @ (chance - y) + penalty @ weights
        curve = (x * (chance * (1 - chance))[:, None]).T @ x + penalty + 1e-9 * np.eye(4)
        weights -= np.linalg.solve(curve, slope)
    fitted = Confidence(bias=weights[0], refusal=weights[1], mean=weights[2], least=weights[3])
    chance = np.array([fitted.of(*row[1:]) for row in features])
    steps = np.linspace(0.02, 0.9, 89)
    gains = [float(np.where(chance >= step, 3 * np.array(worth), 1 - y).mean()) for step in steps]
    rounded = {name: round(float(getattr(fitted, name)), 4) for name in ("bias", "refusal", "mean", "least")}
    return Confidence(**rounded, threshold=round(float(steps[int(np.argmax(gains))]), 3))


def evaluate(
    artifact: Artifact | Path | str | None = None,
    *,
    squad: Path | None = None,
    locomo_data: Path | None = None,
    model: LanguageModel | None = None,
    recipe: ReaderRecipe | None = None,
    limit: int | None = None,
    bare: bool = True,
    echo: bool = True,
) -> dict[str, Any]:
    """The three bars in one run, with the bare model beside the reader, given the same prompts.

    `limit` bounds the number of SQuAD paragraphs and of LoCoMo questions, for a quick look. A refusal scores 0 on a
    question that has an answer; "guess" figures count the text that would have been given in any case.
    """
    recipe = recipe or ReaderRecipe()
    if model is None:
        from loci.lm import load

        model = load("default")
    part = artifact if isinstance(artifact, Artifact) or artifact is None else load_artifact(artifact)
    arms = {"reader": Reader.load(model, artifact=part)}
    if bare:
        arms["bare model"] = Reader(model)
    _, _, held_back = _parts(squad, recipe)
    conversations = locomo.conversations(locomo_data or settings.data() / "locomo")
    figures: dict[str, Any] = {"bars": BARS}
    for name, reader in arms.items():
        figures[name] = _measure_squad(reader, held_back[:limit]) | _measure_locomo(reader, conversations, limit)
        if echo:
            _print(name, figures[name])
    return figures


def _measure_squad(reader: Reader, paragraphs: Sequence[Paragraph]) -> dict[str, float]:
    texts, guesses, chances, labels, seconds = [], [], [], [], []
    refused = 0
    for paragraph in paragraphs:
        answers = reader.answer_many([question for question, _ in paragraph.asked], [Passage(text=paragraph.text)])
        for answer, (_, golds) in zip(answers, paragraph.asked, strict=True):
            chances.append(answer.confidence)
            labels.append(bool(golds))
            seconds.append(answer.seconds)
            if golds:
                texts.append(squad_f1(answer.text, golds) if answer.found else 0.0)
                guesses.append(squad_f1(answer.guess, golds))
            refused += not golds and not answer.found
    return {
        "squad_f1": float(np.mean(texts)),
        "squad_f1_guess": float(np.mean(guesses)),
        "refusal_auroc": auroc(chances, labels),
        "squad_refused_rightly": refused / max(1, labels.count(False)),
        "squad_questions": len(labels),
        "squad_seconds_per_question": float(np.mean(seconds)),
    }


def _measure_locomo(reader: Reader, conversations: Sequence[locomo.Conversation], limit: int | None) -> dict[str, Any]:
    scores: defaultdict[int, list[float]] = defaultdict(list)
    guesses: list[float] = []
    seconds: list[float] = []
    asked = 0
    for conversation in conversations:
        turns = {turn.id: turn for turn in conversation.turns}
        for question in conversation.questions:
            if not question.evidence or (limit is not None and asked >= limit):
                continue
            asked += 1
            passages = [_passage_of(turns[id]) for id in question.evidence]
            answer = reader.answer(question.text, passages)
            scores[question.category].append(locomo_score(answer.text, question.answer, category=question.category))
            seconds.append(answer.seconds)
            if question.category != 5:
                guesses.append(locomo_score(answer.guess, question.answer, category=question.category))
    answerable = [score for category, values in scores.items() if category != 5 for score in values]
    return {
        "locomo_f1": float(np.mean(answerable)),
        "locomo_f1_guess": float(np.mean(guesses)),
        "locomo_f1_by_category": {
            locomo.CATEGORIES[category]: float(np.mean(values)) for category, values in sorted(scores.items())
        },
        "locomo_questions": len(answerable),
        "locomo_seconds_per_question": float(np.mean(seconds)),
    }


def _passage_of(turn: locomo.Turn) -> Passage:
    text = annotate(turn.content, resolve(turn.content, turn.said_at))
    return Passage(text=text, said_by=turn.speaker, said_at=turn.said_at, id=turn.id)


def _parts(squad: Path | None, recipe: ReaderRecipe) -> tuple[list[Paragraph], list[Paragraph], list[Paragraph]]:
    """SQuAD in three parts: to train on, kept out for the confidence, held back."""
    ours, held_back = split(read_squad(squad or settings.data() / "squad"), held_back=recipe.held_back)
    out = set(random.Random(recipe.seed).sample(range(len(ours)), min(recipe.kept_out, len(ours) // 2)))
    kept_out = [one for number, one in enumerate(ours) if number in out]
    return [one for number, one in enumerate(ours) if number not in out], kept_out, held_back


def _golds(paragraph: Paragraph) -> tuple[tuple[str, str | None], ...]:
    return tuple((question, min(answers, key=len) if answers else None) for question, answers in paragraph.asked)


def _scaled(recipe: ReaderRecipe, scale: float) -> ReaderRecipe:
    """The same mixture, longer or shorter; below one pass over SQuAD only the views get fewer."""
    passes = max(1, round(recipe.squad_passes * scale))
    return replace(recipe, squad_passes=passes, views=max(1, round(recipe.views * scale)))


def _print(name: str, figures: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=name)
    for column in ("figure", "value", "bar"):
        table.add_column(column)
    for key, value in figures.items():
        for label, number in value.items() if isinstance(value, Mapping) else ((key, value),):
            table.add_row(label, f"{number:.3f}" if isinstance(number, float) else str(number), str(BARS.get(key, "")))
    Console(stderr=True).print(table)
