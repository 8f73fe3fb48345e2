"""The reader: answers a question from given passages, in a few words, or says that they do not hold the answer.

A model of 135M parameters that is asked to answer from passages mostly repeats the question. The reader is the same
model with a trained adapter (`loci.lm.train`) and three changes to how it reads and writes, all ours to choose:

- the passages are read *both ways*: each of their tokens sees all others, before and after it; so does the question.
  Only the answer is written left to right (a prefix language model, arXiv:1910.10683);
- an answer from documents is a quotation: where no passage was said by anyone, only runs of its words may be written.
  Notes of a conversation are answered in the reader's own words ("7 May 2023", "two");
- the passages do not see the question. One reading of them serves any number of questions: `answer_many` computes their
  keys and values once, and training packs all questions about a text into one sequence.

Whether the passages hold the answer is read from the first step of the answer: the adapter was taught to write
`unknown` where they do not. The probability of that word and that of the answer's own words are turned into
`confidence` by a logistic function fitted on questions of the training data that were kept out for it.

`loci.bench.reader_recipe` trains it; the figures of the shipped adapter stand in the JSON beside it.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from loci.errors import BadInput, BadModel, ContextTooLong
from loci.lm.constrain import Constraint, Substring
from loci.lm.model import LanguageModel
from loci.lm.train import Artifact, Branch, Example, attach, load_artifact

if TYPE_CHECKING:
    import torch
    from transformers import DynamicCache

SHIPPED = Path(__file__).parent / "artifacts" / "reader.safetensors"
REFUSAL = "unknown"
_TASK = f"Answer the question from these notes, in a few words. If they do not tell, answer: {REFUSAL}\n"
_QUESTIONS_AT_ONCE = 16  # of `answer_many`, with short passages; ours
_TOKENS_AT_ONCE = 16_384  # of passages, over all questions at once: bounds memory and what a step copies; ours
_WORD = re.compile(r"[^\W_]+")
_WEAK = frozenset(
    "a an and are as at be been by did do does for from had has have he her his i in is it its of on or she that the "
    "their them they this to was were what when where which who whom whose why will with how".split()
)


@dataclass(frozen=True, kw_only=True)
class Passage:
    """One thing that was said or written. `text` carries its resolved dates already: "yesterday (7 May 2023)"."""

    text: str
    said_by: str | None = None
    said_at: datetime | None = None
    id: str | None = None


@dataclass(frozen=True, kw_only=True)
class ReaderAnswer:
    """`text` is empty when `found` is false. `confidence` is the reader's probability that the passages hold the
    answer; `sources` are the ids of the passages that the answer's words come from, best first; `dropped` passages
    from the end of the list did not fit into the window. `guess` is the text it would have given in any case.
    `tokens_in` counts the passages of `answer_many` for each of its questions, `seconds` is their share of the call."""

    text: str
    found: bool
    confidence: float
    sources: tuple[str, ...]
    tokens_in: int
    tokens_out: int
    seconds: float
    dropped: int = 0
    guess: str = ""


def render(passage: Passage) -> str:
    """The line that stands for a passage: "[8 May 2023] Caroline: I went ..."."""
    date = f"[{passage.said_at.day} {passage.said_at:%B %Y}] " if passage.said_at else ""
    speaker = f"{passage.said_by}: " if passage.said_by else ""
    return f"{date}{speaker}{' '.join(passage.text.split())}"


class Prompts:
    """The reader's way of laying out tokens, the same for training and for answering."""

    def __init__(self, model: LanguageModel) -> None:
        self._tokenizer = model.tokenizer
        marks = {text: self._encode(text) for text in ("<|im_start|>", "<|im_end|>", REFUSAL)}
        if any(len(tokens) != 1 for tokens in marks.values()):
            raise BadModel(f"{model.name} has no single tokens for {', '.join(marks)}; the reader needs them.")
        self.end, self.refusal = marks["<|im_end|>"][0], marks[REFUSAL][0]
        self._head = self._encode(f"<|im_start|>user\n{_TASK}\n")

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def passages(self, passages: Sequence[Passage], *, room: int) -> tuple[list[int], int]:
        """Tokens of the passages, and how many of them were left out from the end because `room` tokens were full."""
        tokens = list(self._head)
        for number, passage in enumerate(passages):
            line = self._encode(render(passage) + "\n")
            if len(tokens) + len(line) > room:
                if not number:
                    raise ContextTooLong(
                        f"the first passage has {len(line)} tokens, and {room - len(tokens)} fit beside the question. "
                        "Give it in pieces."
                    )
                return tokens, len(passages) - number
            tokens += line
        return tokens, 0

    def question(self, question: str, *, now: datetime | None = None) -> list[int]:
        asked = f"Today is {now.day} {now:%B %Y}. " if now else ""
        text = " ".join(question.split())
        return self._encode(f"\n{asked}Question: {text}<|im_end|>\n<|im_start|>assistant\n")

    def answer(self, text: str | None) -> list[int]:
        """Tokens of an answer; None is the refusal."""
        return [*(self._encode(text) if text else [self.refusal]), self.end]

    def example(
        self, passages: Sequence[Passage], asked: Sequence[tuple[str, str | None]], *, now: datetime | None = None
    ) -> Example:
        """Passages and all that is asked about them, as one sequence to learn from."""
        prefix, _ = self.passages(passages, room=1 << 20)
        branches = [Branch(prompt=self.question(ask, now=now), answer=self.answer(text)) for ask, text in asked]
        return Example.packed(prefix, branches)


@dataclass(frozen=True, kw_only=True)
class Confidence:
    """P(the passages hold the answer) from three log-probabilities: a logistic function, and the least P to answer."""

    bias: float = 0.0
    refusal: float = 1.0  # weight of log P(not refusing) - log P(refusing), at the first step
    mean: float = 0.0  # weight of the mean log-probability of the answer's tokens
    least: float = 0.0  # weight of the smallest one
    threshold: float = 0.5

    def of(self, refusal: float, mean: float, least: float) -> float:
        score = self.bias + self.refusal * refusal + self.mean * mean + self.least * least
        return 1 / (1 + math.exp(-max(-60.0, min(60.0, score))))


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What the model did with one question, before anything is decided: the text, and log-probabilities."""

    text: str
    refusal: float
    mean: float
    least: float
    tokens_in: int
    tokens_out: int


class Reader:
    """Answers from passages. `load` it once; it holds its own copy of the model's weights (270 MB in bfloat16).

    The model it was loaded with is not changed and can be used by others at the same time.
    """

    def __init__(self, model: LanguageModel, *, confidence: Confidence | None = None) -> None:
        """`model` is used as it is, adapter or none; `load` is the usual way."""
        self.model = model
        self.confidence = confidence or Confidence()
        self.prompts = Prompts(model)

    @classmethod
    def load(cls, model: LanguageModel | None = None, *, artifact: Artifact | str | Path | None = None) -> Reader:
        """The default model with the shipped adapter, or others.

        Raises `BadModel` where the adapter belongs to other weights, `ModelNotFound` where there is none.
        """
        part = artifact if isinstance(artifact, Artifact) else load_artifact(artifact or SHIPPED)
        if model is None:
            from loci.lm import load

            model = load("default")
        return cls(attach(model, part), confidence=Confidence(**part.settings.get("confidence", {})))

    def answer(
        self, question: str, passages: Sequence[Passage], *, now: datetime | None = None, max_tokens: int = 48
    ) -> ReaderAnswer:
        """Answer one question from passages, the most promising first: what does not fit is left out from the end.

        Args:
            now: the day the question is asked, for "how long ago".
            max_tokens: of the answer.

        Raises `BadInput` for an empty question, `ContextTooLong` where not even one passage fits.
        """
        return self.answer_many([question], passages, now=now, max_tokens=max_tokens)[0]

    def answer_many(
        self,
        questions: Sequence[str],
        passages: Sequence[Passage],
        *,
        now: datetime | None = None,
        max_tokens: int = 48,
    ) -> list[ReaderAnswer]:
        """`answer` for many questions about the same passages, which are read once."""
        if not questions:
            return []
        began = time.perf_counter()
        readings, dropped = self.read(questions, passages, now=now, max_tokens=max_tokens)
        kept = passages[: len(passages) - dropped]
        seconds = (time.perf_counter() - began) / len(questions)
        answers = []
        for question, reading in zip(questions, readings, strict=True):
            confidence = self.confidence.of(reading.refusal, reading.mean, reading.least) if kept else 0.0
            found = bool(reading.text) and confidence >= self.confidence.threshold
            answers.append(
                ReaderAnswer(
                    text=reading.text if found else "",
                    found=found,
                    confidence=confidence,
                    sources=attribute(reading.text, question, kept) if found else (),
                    tokens_in=reading.tokens_in,
                    tokens_out=reading.tokens_out,
                    seconds=seconds,
                    dropped=dropped,
                    guess=reading.text,
                )
            )
        return answers

    def read(
        self,
        questions: Sequence[str],
        passages: Sequence[Passage],
        *,
        now: datetime | None = None,
        max_tokens: int = 48,
    ) -> tuple[list[Reading], int]:
        """What the model writes for each question, with its log-probabilities, and how many passages did not fit."""
        import torch

        if any(not question.strip() for question in questions):
            raise BadInput("the question is empty.")
        if max_tokens < 1:
            raise BadInput(f"max_tokens is {max_tokens}; at least 1 is needed for an answer.")
        prompts = [self.prompts.question(question, now=now) for question in questions]
        quoted = None
        if passages and all(passage.said_by is None for passage in passages):
            quoted = Substring(self.model, [render(passage) for passage in passages])
        room = self.model.window - max_tokens - max(map(len, prompts))
        prefix, dropped = self.prompts.passages(passages, room=room)
        readings: list[Reading] = []
        with torch.inference_mode():
            held = self._prefill(prefix)
            # Each question carries its own copy of the passages' keys and values through every step.
            at_once = max(1, min(_QUESTIONS_AT_ONCE, _TOKENS_AT_ONCE // len(prefix)))
            for start in range(0, len(prompts), at_once):
                chosen = prompts[start : start + at_once]
                readings += self._decode(prefix, copy.deepcopy(held), chosen, max_tokens, quoted)
        return readings, dropped

    def _decode(
        self,
        prefix: list[int],
        cache: DynamicCache,
        prompts: list[list[int]],
        max_tokens: int,
        constraint: Constraint | None,
    ) -> list[Reading]:
        import torch

        count = len(prompts)
        cache.batch_repeat_interleave(count)
        longest = max(map(len, prompts))
        ids = torch.full((count, longest), self.prompts.end)
        real = torch.zeros((count, len(prefix) + longest), dtype=torch.bool)
        real[:, : len(prefix)] = True
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            real[row, len(prefix) + longest - len(prompt) :] = True
        places = len(prefix) + torch.arange(longest)[None] - (longest - torch.tensor([[len(p)] for p in prompts]))
        logits = self._forward(ids, real[:, None, None].expand(-1, 1, longest, -1), places.clamp(min=0), cache)
        scores = logits.log_softmax(-1)
        none = scores[:, self.prompts.refusal].clone()
        scores[:, self.prompts.refusal] = -torch.inf
        refusal = (torch.log1p(-none.exp().clamp(max=1 - 1e-7)) - none).tolist()
        written: list[list[int]] = [[] for _ in prompts]
        chances: list[list[float]] = [[] for _ in prompts]
        open_rows = [True] * count
        states = [constraint.start() for _ in prompts] if constraint is not None else []
        place = torch.tensor([[len(prefix) + len(prompt)] for prompt in prompts])
        for step in range(max_tokens):
            for row, state in enumerate(states):
                if open_rows[row]:
                    scores[row, ~torch.from_numpy(state.allowed()).to(scores.device)] = -torch.inf
            best, token = scores.max(-1)
            for row in range(count):
                if open_rows[row]:
                    chances[row].append(float(best[row]))
                    open_rows[row] = int(token[row]) != self.prompts.end
                    if open_rows[row]:
                        written[row].append(int(token[row]))
                        if states:
                            states[row].accept(int(token[row]))
            if not any(open_rows) or step == max_tokens - 1:
                break
            real = torch.cat([real, torch.ones((count, 1), dtype=torch.bool)], dim=1)
            logits = self._forward(token[:, None].cpu(), real[:, None, None], place, cache)
            scores, place = logits.log_softmax(-1), place + 1
        return [
            Reading(
                text=self.model.decode(written[row]).strip(),
                refusal=refusal[row],
                mean=sum(chances[row]) / len(chances[row]),
                least=min(chances[row]),
                tokens_in=len(prefix) + len(prompts[row]),
                tokens_out=len(written[row]),
            )
            for row in range(count)
        ]

    def _prefill(self, prefix: list[int]) -> DynamicCache:
        """Keys and values of the passages, each token of which saw all of them."""
        import torch
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.model.config)
        mask = torch.ones((1, 1, len(prefix), len(prefix)), dtype=torch.bool)
        self._forward(torch.tensor([prefix]), mask, torch.arange(len(prefix))[None], cache)
        return cache

    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor, places: torch.Tensor, cache: DynamicCache
    ) -> torch.Tensor:
        device = self.model.device
        # transformers 5.24 renamed the argument; older ones know only the old name
        known = inspect.signature(self.model.model.forward).parameters
        held: dict[str, DynamicCache] = {"cache" if "cache" in known else "past_key_values": cache}
        outcome = self.model.model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            position_ids=places.to(device),
            use_cache=True,
            logits_to_keep=1,
            **held,
        )
        logits: torch.Tensor = outcome.logits[:, -1].float()
        return logits


def attribute(answer: str, question: str, passages: Sequence[Passage]) -> tuple[str, ...]:
    """Ids of the passages that the answer's words come from, best first.

    Rare words count more; each part of a list chooses for itself; words of the question decide between equals. An
    answer that repeats no word of any passage ("yes", "2") is attributed by the words of the question alone.
    """
    known = [passage for passage in passages if passage.id is not None]
    words = [_stems(render(passage)) for passage in known]
    share = {word: sum(word in each for each in words) for each in words for word in each}

    def weight(asked: set[str], held: set[str]) -> float:
        return sum((1 / share[word] for word in asked & held), start=0.0)

    asked = _stems(question)
    parts = [_stems(part) for part in re.split(r",| and ", answer)]
    chosen: dict[int, float] = {}
    for part in [part for part in parts if any(part & held for held in words)] or [asked]:
        scores = [weight(part, held) + 0.05 * weight(asked, held) * (part is not asked) for held in words]
        best = max(scores, default=0.0)
        if best > 0:
            place = scores.index(best)
            chosen[place] = max(chosen.get(place, 0.0), best)
    return tuple(str(known[place].id) for place in sorted(chosen, key=lambda place: (-chosen[place], place)))


def _stems(text: str) -> set[str]:
    import Stemmer

    words = [word.lower() for word in _WORD.findall(text)]
    return set(Stemmer.Stemmer("english").stemWords([word for word in words if word not in _WEAK]))
