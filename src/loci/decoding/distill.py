"""Text that the model itself wrote, and what the model computed over it: what trained drafters learn from.

Source  self-distillation as in Medusa (Cai et al. 2024, arXiv:2401.10774, section 2.3.2): seed prompts, answered by the
        model, which may also play the user and go on with the conversation. A model that is given only the opening of
        its own chat template invents a user's first words (Magpie, Xu et al. 2024, arXiv:2406.08464).
Ours    every prompt is answered at every temperature before openings are invented; user turns are always drawn, also
        in greedy conversations; answers that go round in circles end their conversation and are dropped and counted.
        Half-done work lies in the folder and is taken up again, with the same outcome as in one run.

`self_distill` makes texts, `save_texts` and `load_texts` keep them, `teacher_pass` adds the hidden states after the
final norm, computed once and memory-mapped, and on request the most probable tokens of the model's distribution.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from jaxtyping import Bool, Float, Int32, Int64

from loci import settings
from loci.errors import BadInput, BadModel, DataNotFound, Unsupported
from loci.lm.chat import Message
from loci.lm.model import LanguageModel
from loci.lm.sampling import GREEDY, Sampling

if TYPE_CHECKING:
    from torch import Tensor

    from loci.lm.engine.base import StepEngine
else:
    Tensor = Any  # checked for shape and dtype all the same, without importing torch

EVERY = 10  # every tenth record of the instructions is for calibration
TEXTS = "texts"  # name of the files of texts
_USER = Sampling(temperature=1.0, top_p=0.9)  # how user turns are drawn; ours: without the tail they end in noise
_USER_TOKENS = 96  # longest user turn
_WINDOW, _DISTINCT = 64, 0.4  # an answer circles when of so many 4-grams in a row fewer than this share differ
_LONGEST = 1024  # tokens of one conversation
_IDLE = 20  # rounds in a row without a single new text after which the model is not asked any more
_SAVE_SECONDS = 60.0  # between two savings of half-done work


def folder() -> Path:
    """Where distilled texts lie unless another folder is named."""
    return settings.cache() / "training" / "distilled"


@dataclass(frozen=True, kw_only=True, eq=False)
class DistilledText:
    """One conversation as token ids.

    written: the answers' tokens, end tokens included, all drawn by the model at `temperature`. False for the template,
        for given prompts and for invented user turns, which a drafter never has to guess.
    """

    tokens: Int32[np.ndarray, " token"]
    written: Bool[np.ndarray, " token"]
    temperature: float

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.written):
            raise BadInput(f"{len(self.tokens)} tokens have {len(self.written)} marks of who wrote them.")


def read_instructions(place: Path | None = None) -> tuple[list[str], list[str]]:
    """The prompts to train on, and those to calibrate on: every tenth record.

    Args:
        place: folder of `instructions.jsonl.gz`; "instructions" in the data folder unless given.

    Raises:
        DataNotFound: the file is absent.
    """
    file = (place or settings.data() / "instructions") / "instructions.jsonl.gz"
    if not file.is_file():
        raise DataNotFound(f"no {file.name} in {file.parent}. Name its folder, or set LOCI_DATA to the data sets.")
    rows = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
    prompts = [f"{row['instruction']}\n\n{row['input']}".strip() for row in rows]
    calibration = prompts[EVERY - 1 :: EVERY]
    return [prompt for number, prompt in enumerate(prompts) if number % EVERY != EVERY - 1], calibration


def self_distill(
    model: LanguageModel,
    prompts: Sequence[str],
    *,
    tokens: int,
    temperatures: Sequence[float] = (0.0, 0.7, 1.0),
    user_turns: int = 2,
    answer_tokens: int = 256,
    openings: bool = True,
    seed: int = 0,
    engine: str | StepEngine = "auto",
    batch: int = 24,
    folder: Path | None = None,
    minutes: float | None = None,
    progress: bool = True,
) -> list[DistilledText]:
    """Conversations in which the model wrote at least `tokens` tokens of answers.

    Rounds of `batch` conversations take the temperatures in turn; twenty in a row that add nothing end it. The same
    arguments give the same texts (in one precision and on one engine).

    Args:
        user_turns: how often the model plays the user and goes on, at most, in each conversation.
        answer_tokens: the longest answer; longer ones are cut, and end their conversation. At most half of what a
            conversation may have, which is 1,024 tokens or the model's window.
        engine: "auto" takes the fastest that runs many rows at once.
        openings: whether first user turns are invented when every prompt has been answered at every temperature. If
            not, the texts may be fewer than asked.
        folder: where half-done work is kept, once a minute, and taken up again. None keeps nothing.
        minutes: stop after about so long, with what there is.

    Raises:
        BadInput: no prompts and no openings, or numbers below 1; or the folder's work was done with other arguments.
        Unsupported: the model has no chat template.
    """
    for name, number in (("tokens", tokens), ("answer_tokens", answer_tokens), ("batch", batch)):
        if number < 1:
            raise BadInput(f"{name} is {number}; it must be at least 1.")
    if not temperatures or not (prompts or openings):
        raise BadInput("self-distillation needs at least one temperature, and prompts or openings.")
    about = {
        "model": model.hash,
        "prompts": hashlib.sha256("\0".join(prompts).encode()).hexdigest(),
        "temperatures": list(temperatures),
        "user_turns": int(user_turns),
        "answer_tokens": answer_tokens,
        "openings": openings,
        "seed": seed,
        "batch": batch,
    }
    work = _restored(folder, about) if folder is not None else _Work(about=about)
    writer = _Writer(
        model,
        answer_tokens=answer_tokens,
        user_turns=int(user_turns),
        engine=_batching(model, engine),
        texts=work,
        seed=seed,
    )
    chunks = -(-len(prompts) // batch)
    began = saved = time.monotonic()
    before, idle = work.seconds, 0
    with _Bar("texts", total=tokens, done=work.answered, shown=progress) as bar:
        while work.answered < tokens and idle < _IDLE:
            turn, which = divmod(work.rounds, len(temperatures))
            if turn >= chunks and not openings:
                break
            mine = np.random.default_rng([seed, which, 1]).permutation(len(prompts))[turn * batch : (turn + 1) * batch]
            chosen: list[str | None] = [prompts[number] for number in mine]
            chosen += [None] * (batch - len(chosen) if openings else 0)
            kept = len(work.texts)
            writer.round(chosen, temperature=float(temperatures[which]))
            idle = idle + 1 if len(work.texts) == kept else 0
            work.rounds += 1
            work.seconds = before + time.monotonic() - began
            bar(
                work.answered,
                f"texts  {len(work.texts)} kept, {work.circling} circling and {work.twice} double dropped",
            )
            over = minutes is not None and time.monotonic() - began > 60 * minutes
            if folder is not None and (over or time.monotonic() - saved > _SAVE_SECONDS or work.answered >= tokens):
                save_texts(folder, work.texts, about=work.described)
                saved = time.monotonic()
            if over:
                break
    if folder is not None:
        save_texts(folder, work.texts, about=work.described)
    return work.texts


def save_texts(folder: Path, texts: Sequence[DistilledText], *, about: Mapping[str, Any] | None = None) -> Path:
    """Write `texts.safetensors` and, beside it, `texts.json` with `about`; returns the first. Old ones are replaced.

    The JSON counts texts, tokens and written tokens by temperature, whatever `about` says besides.
    """
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{TEXTS}.safetensors"
    lengths = np.array([len(text.tokens) for text in texts], dtype=np.int32)
    empty = np.zeros(0, dtype=np.int32)
    tensors = {
        "tokens": np.concatenate([text.tokens for text in texts]) if texts else empty,
        "written": np.concatenate([text.written for text in texts]).astype(np.uint8) if texts else empty.astype("u1"),
        "lengths": lengths,
        "temperatures": np.array([text.temperature for text in texts], dtype=np.float32),
    }
    new = path.with_name(path.name + ".new")
    save_file(tensors, new)
    written: dict[str, int] = {}
    for text in texts:
        written[str(text.temperature)] = written.get(str(text.temperature), 0) + int(text.written.sum())
    description = {**(about or {}), "texts": len(texts), "tokens": int(lengths.sum()), "written": written}
    described = path.with_suffix(".json.new")
    described.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    os.replace(new, path)
    os.replace(described, path.with_suffix(".json"))
    return path


def load_texts(folder: Path) -> list[DistilledText]:
    """What `save_texts` wrote.

    Raises:
        DataNotFound: nothing lies there.
        BadModel: the file is not one of texts.
    """
    from safetensors.numpy import load_file

    path = folder / f"{TEXTS}.safetensors"
    if not path.is_file():
        raise DataNotFound(f"no {path.name} in {folder}. Make it with:  loci draft distill --out {folder}")
    tensors = load_file(path)
    if set(tensors) != {"tokens", "written", "lengths", "temperatures"}:
        raise BadModel(f"{path} holds {', '.join(sorted(tensors))}; texts hold tokens, written, lengths, temperatures.")
    ends = np.cumsum(tensors["lengths"])
    return [
        DistilledText(
            tokens=tensors["tokens"][end - length : end].astype(np.int32),
            written=tensors["written"][end - length : end].astype(bool),
            temperature=round(float(temperature), 6),
        )
        for end, length, temperature in zip(ends, tensors["lengths"], tensors["temperatures"], strict=True)
    ]


def described(folder: Path) -> dict[str, Any]:
    """The JSON beside the texts: how they were made, how many answers were dropped, how long it took."""
    path = folder / f"{TEXTS}.json"
    if not path.is_file():
        raise DataNotFound(f"no {path.name} in {folder}.")
    return dict(json.loads(path.read_text(encoding="utf-8")))


def circles(tokens: Sequence[int] | Int32[np.ndarray, " token"]) -> bool:
    """Whether a text goes round in circles: somewhere, of 64 4-grams in a row, fewer than two fifths differ."""
    grams = list(zip(*(list(tokens[start:]) for start in range(4)), strict=False))
    return any(
        len(set(grams[start : start + _WINDOW])) < _DISTINCT * _WINDOW
        for start in range(0, max(0, len(grams) - _WINDOW) + 1, _WINDOW // 4)
        if len(grams) >= _WINDOW
    )


def _batching(model: LanguageModel, engine: str | StepEngine) -> StepEngine:
    """The engine of this name; under "auto" the fastest one that runs many rows at once."""
    if not isinstance(engine, str):
        return engine
    from loci.lm.engine.choose import choose

    found = choose(model, name=engine)
    for name in ("packed", "hf"):
        if engine != "auto" or found.capabilities.batch:
            break
        try:
            found = choose(model, name=name)
        except Unsupported:
            continue
    return found


@dataclass
class _Work:
    """What was done so far."""

    about: dict[str, Any]
    rounds: int = 0
    seconds: float = 0.0
    circling: int = 0  # answers dropped because they went round in circles
    twice: int = 0  # answers dropped because the same one had been given to the same prompt
    empty: int = 0  # answers and user turns without a word
    answered: int = 0  # tokens of answers
    texts: list[DistilledText] = field(default_factory=list)

    @property
    def described(self) -> dict[str, Any]:
        counts = ("rounds", "seconds", "circling", "twice", "empty", "answered")
        return {"about": self.about, "work": {name: getattr(self, name) for name in counts}}


def _restored(folder: Path, about: dict[str, Any]) -> _Work:
    if not (folder / f"{TEXTS}.json").is_file():
        return _Work(about=about)
    before = described(folder)
    if before.get("about") != about:
        told = before.get("about") or {}
        differs = sorted(key for key in about if told.get(key) != about[key])
        raise BadInput(
            f"the texts in {folder} were made with another {', '.join(differs)}. Give another folder, or delete them."
        )
    return _Work(about=about, texts=load_texts(folder), **before["work"])


class _Writer:
    """Plays both sides of conversations, a round of them at a time."""

    def __init__(
        self,
        model: LanguageModel,
        *,
        answer_tokens: int,
        user_turns: int,
        engine: StepEngine,
        texts: _Work,
        seed: int,
    ) -> None:
        self.model, self.engine, self.work, self.seed = model, engine, texts, seed
        self.frames = Frames.of(model)
        self.longest = min(_LONGEST, model.window)
        self.answer_tokens, self.user_turns = min(answer_tokens, self.longest // 2), user_turns
        self.known = {_key(text.tokens[:end], start) for text in texts.texts for start, end in _runs(text.written)}

    def round(self, prompts: Sequence[str | None], *, temperature: float) -> None:
        """One conversation for each prompt; None stands for an invented one."""
        sampling = Sampling(temperature=temperature) if temperature > 0 else GREEDY
        frames = self.frames
        open_ones = [_Conversation(list(frames.opening)) for prompt in prompts if prompt is None]
        self._let_users_speak(open_ones, turn=0)
        asked = [_Conversation(self.model.encode([Message(role="user", content=p)])) for p in prompts if p is not None]
        talks = asked + open_ones
        for turn in range(self.user_turns + 1):
            if turn:
                for talk in talks:
                    if talk.alive:
                        talk.add(frames.after_answer if talk.ended else frames.cut_answer)
                self._let_users_speak(talks, turn=turn)
            self._let_model_answer(talks, sampling, turn=turn)
        for talk in talks:
            if talk.answers:
                self.work.texts.append(talk.text(temperature))
                self.work.answered += sum(end - start for start, end in talk.answers)

    def _let_users_speak(self, talks: Sequence[_Conversation], *, turn: int) -> None:
        for talk, new in self._continued(talks, _USER, _USER_TOKENS, salt=2 * turn):
            words = [token for token in new if token not in self.model.end_tokens]
            if len(words) == len(new) or not self.model.decode(words).strip() or circles(words):
                self.work.empty += 1
                talk.close()
            else:
                talk.add(words)
                talk.add(self.frames.to_answer)

    def _let_model_answer(self, talks: Sequence[_Conversation], sampling: Sampling, *, turn: int) -> None:
        for talk, new in self._continued(talks, sampling, self.answer_tokens, salt=2 * turn + 1):
            key = _key(np.array([*talk.tokens, *new], dtype=np.int32), len(talk.tokens))
            if not self.model.decode(new).strip():
                self.work.empty += 1
                talk.close()
            elif circles(new):
                self.work.circling += 1
                talk.close()
            elif key in self.known:
                self.work.twice += 1
                talk.close()
            else:
                self.known.add(key)
                talk.answer(new, ended=new[-1] in self.model.end_tokens)

    def _continued(
        self, talks: Sequence[_Conversation], sampling: Sampling, tokens: int, *, salt: int
    ) -> list[tuple[_Conversation, list[int]]]:
        """What the model adds to each conversation that is still going on and has room."""
        from loci.lm.generate import generate

        for talk in talks:
            if len(talk.tokens) + tokens > self.longest:
                talk.close()
        going = [talk for talk in talks if talk.alive]
        if not going:
            return []
        noise = np.random.default_rng([self.seed, self.work.rounds, salt])
        found = generate(
            self.model,
            cast(list[list[int]], [talk.tokens for talk in going]),
            max_new_tokens=tokens,
            sampling=sampling,
            seed=int(noise.integers(2**62)),
            engine=self.engine,
        )
        return [(talk, list(result.tokens)) for talk, result in zip(going, found, strict=True)]


def _key(tokens: Int32[np.ndarray, " token"], start: int) -> bytes:
    """Names the answer that begins at `start` and the end of what it answers."""
    return hashlib.sha256(tokens[max(0, start - _WINDOW) :].tobytes()).digest()


def _runs(written: Bool[np.ndarray, " token"]) -> list[tuple[int, int]]:
    """Where each run of True begins and ends."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], written, [False]]).astype(np.int8)))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


@dataclass
class _Conversation:
    tokens: list[int]
    answers: list[tuple[int, int]] = field(default_factory=list)  # where they begin and end
    alive: bool = True
    ended: bool = True  # whether the last answer ended by itself

    def add(self, tokens: Sequence[int]) -> None:
        self.tokens = [*self.tokens, *tokens]

    def answer(self, tokens: Sequence[int], *, ended: bool) -> None:
        self.answers.append((len(self.tokens), len(self.tokens) + len(tokens)))
        self.add(tokens)
        self.ended = ended
        if not ended:
            self.close()

    def close(self) -> None:
        self.alive = False

    def text(self, temperature: float) -> DistilledText:
        """Up to the end of the last answer that was kept."""
        tokens = np.array(self.tokens[: self.answers[-1][1]], dtype=np.int32)
        written = np.zeros(len(tokens), dtype=bool)
        for start, end in self.answers:
            written[start:end] = True
        return DistilledText(tokens=tokens, written=written, temperature=temperature)


@dataclass(frozen=True, kw_only=True)
class Frames:
    """The tokens that a chat template puts around words.

    opening: all that stands before the first user's words.
    to_answer: from the end of a user's words to the beginning of an answer.
    after_answer: from an answer, its end token included, to the next user's words.
    cut_answer: the same after an answer that lacks its end token.
    """

    opening: tuple[int, ...]
    to_answer: tuple[int, ...]
    after_answer: tuple[int, ...]
    cut_answer: tuple[int, ...]

    @classmethod
    def of(cls, model: LanguageModel) -> Frames:
        """Read off the model's own template. Raises `Unsupported` where there is none, or it hides the words."""
        user, answer, again = "zqUSERzq", "zqANSWERzq", "zqAGAINzq"
        first = _laid_out(model, [Message(role="user", content=user)])
        whole = _laid_out(
            model,
            [
                Message(role="user", content=user),
                Message(role="assistant", content=answer),
                Message(role="user", content=again),
            ],
        )
        if first.count(user) != 1 or whole.count(answer) != 1 or whole.count(again) != 1:
            raise Unsupported(f"the chat template of {model.name} does not show each message once, as it was given.")
        opening, to_answer = first.split(user)
        between = whole.split(answer)[1].split(again)[0]
        tokenizer = model.tokenizer

        def ids(text: str) -> tuple[int, ...]:
            return tuple(int(token) for token in tokenizer.encode(text, add_special_tokens=False))

        cut = ids(between)
        after = cut[1:] if cut and cut[0] in model.end_tokens else cut
        return cls(opening=ids(opening), to_answer=ids(to_answer), after_answer=after, cut_answer=cut)


def _laid_out(model: LanguageModel, messages: Sequence[Message]) -> str:
    if not model.tokenizer.chat_template:
        raise Unsupported(f"{model.name} has no chat template, so it cannot play both sides of a conversation.")
    rows = [{"role": message.role, "content": message.content} for message in messages]
    return str(model.tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=True))


@dataclass(frozen=True, kw_only=True, eq=False)
class TeacherPass:
    """What the model computed over texts laid end to end: text i is `starts[i] : starts[i + 1]`. All tensors are
    memory-mapped; writing to them changes nothing on disk.

    hidden: after the final norm, in bfloat16: what the head reads to predict the next token.
    top_ids, top_logprobs: the most probable next tokens, best first. rest: log of what all others hold together.
    """

    texts: tuple[DistilledText, ...]
    starts: Int64[np.ndarray, " text_end"]
    tokens: Int32[np.ndarray, " token"]
    written: Bool[np.ndarray, " token"]
    hidden: Float[Tensor, "token width"]
    top_ids: Int32[np.ndarray, "token rank"] | None = None
    top_logprobs: Float[np.ndarray, "token rank"] | None = None
    rest: Float[np.ndarray, " token"] | None = None

    @property
    def nbytes(self) -> int:
        parts = (self.top_ids, self.top_logprobs, self.rest)
        return self.hidden.nbytes + sum(part.nbytes for part in parts if part is not None)


def teacher_pass(
    model: LanguageModel,
    texts: Sequence[DistilledText],
    folder: Path,
    *,
    top: int = 0,
    batch_tokens: int = 4096,
    progress: bool = True,
) -> TeacherPass:
    """Run the model once over all texts and keep what drafters learn from; what lies in `folder` is not done again.

    Args:
        top: how many of the most probable next tokens to keep at each position; 0 keeps none.
        batch_tokens: of one forward pass, padding included.

    A pass that was interrupted goes on where it stopped. Raises `BadInput` without texts.
    """
    if not texts:
        raise BadInput("there are no texts to run the model over.")
    from loci.lm.train import fingerprint

    lengths = [len(text.tokens) for text in texts]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.concatenate([text.tokens for text in texts])
    width = int(model.model.config.get_text_config().hidden_size)
    about = {
        "base": fingerprint(model.model),
        "tokens": hashlib.sha256(tokens.tobytes() + starts.tobytes()).hexdigest(),
        "top": top,
    }
    shapes: dict[str, tuple[tuple[int, ...], str]] = {"hidden": ((len(tokens), width), "uint16")}
    if top:
        shapes |= {
            "top_ids": ((len(tokens), top), "int32"),
            "top_logprobs": ((len(tokens), top), "float16"),
            "rest": ((len(tokens),), "float16"),
        }
    groups = _groups(lengths, batch_tokens)
    done = _opened(folder, about, shapes)
    if done < len(groups):
        _run_teacher(model, texts, starts, groups[done:], folder, about, shapes, done, top, progress)
    return _mapped(folder, texts, starts, tokens, shapes)


def _groups(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Texts of about one length together, so that little is padding."""
    order = sorted(range(len(lengths)), key=lambda number: (lengths[number], number))
    groups: list[list[int]] = []
    for number in order:
        if not groups or (len(groups[-1]) + 1) * lengths[number] > batch_tokens:
            groups.append([])
        groups[-1].append(number)
    return groups


def _opened(folder: Path, about: Mapping[str, Any], shapes: Mapping[str, tuple[tuple[int, ...], str]]) -> int:
    """How many groups are done already; makes the files where they do not fit."""
    state = folder / "teacher.json"
    if state.is_file():
        found = json.loads(state.read_text(encoding="utf-8"))
        if found["about"] == dict(about) and all((folder / f"{name}.npy").is_file() for name in shapes):
            return int(found["groups"])
    folder.mkdir(parents=True, exist_ok=True)
    state.unlink(missing_ok=True)
    for name, (shape, kind) in shapes.items():
        np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=np.dtype(kind), shape=shape).flush()
    return 0


def _run_teacher(
    model: LanguageModel,
    texts: Sequence[DistilledText],
    starts: Int64[np.ndarray, " text_end"],
    groups: Sequence[Sequence[int]],
    folder: Path,
    about: Mapping[str, Any],
    shapes: Mapping[str, Any],
    done: int,
    top: int,
    progress: bool,
) -> None:
    import torch

    files = {name: np.lib.format.open_memmap(folder / f"{name}.npy", mode="r+") for name in shapes}
    body: Any = model.model.base_model
    head: Any = model.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    total = int(starts[-1])
    passed = total - sum(len(texts[number].tokens) for group in groups for number in group)

    def save(count: int) -> None:
        for file in files.values():
            file.flush()
        new = folder / "teacher.json.new"
        new.write_text(json.dumps({"about": dict(about), "groups": count}), encoding="utf-8")
        os.replace(new, folder / "teacher.json")

    saved = time.monotonic()
    with torch.inference_mode(), _Bar("hidden states", total=total, done=passed, shown=progress) as bar:
        for count, group in enumerate(groups, start=done + 1):
            longest = max(len(texts[number].tokens) for number in group)
            ids = torch.zeros(len(group), longest, dtype=torch.long)
            for row, number in enumerate(group):
                ids[row, : len(texts[number].tokens)] = torch.from_numpy(texts[number].tokens).long()
            # Padding stands behind each row's text, where causal attention never looks.
            hidden = body(input_ids=ids.to(model.device), use_cache=False).last_hidden_state
            for row, number in enumerate(group):
                piece = hidden[row, : len(texts[number].tokens)].to(torch.bfloat16)
                place = slice(int(starts[number]), int(starts[number + 1]))
                files["hidden"][place] = piece.cpu().contiguous().view(torch.int16).numpy().view(np.uint16)
                if top:
                    logprobs = head(piece.to(model.dtype)).float().log_softmax(dim=-1)
                    best, best_ids = logprobs.topk(top, dim=-1)
                    rest = torch.log1p(-best.exp().sum(dim=-1).clamp(max=1 - 1e-6))
                    files["top_ids"][place] = best_ids.int().cpu().numpy()
                    files["top_logprobs"][place] = best.half().cpu().numpy()
                    files["rest"][place] = rest.half().cpu().numpy()
                passed += len(piece)
            bar(passed, "hidden states")
            if time.monotonic() - saved > _SAVE_SECONDS:
                save(count)
                saved = time.monotonic()
    save(done + len(groups))


def _mapped(
    folder: Path,
    texts: Sequence[DistilledText],
    starts: Int64[np.ndarray, " text_end"],
    tokens: Int32[np.ndarray, " token"],
    shapes: Mapping[str, Any],
) -> TeacherPass:
    import torch

    # Copy on write: torch warns about memory that it may not write to.
    files = {name: np.load(folder / f"{name}.npy", mmap_mode="c") for name in shapes}
    return TeacherPass(
        texts=tuple(texts),
        starts=starts,
        tokens=tokens,
        written=np.concatenate([text.written for text in texts]),
        hidden=torch.from_numpy(files["hidden"].view(np.int16)).view(torch.bfloat16),
        top_ids=files.get("top_ids"),
        top_logprobs=files.get("top_logprobs"),
        rest=files.get("rest"),
    )


class _Bar:
    """A progress bar on standard error; called with what is done and a description."""

    def __init__(self, name: str, *, total: int, done: int, shown: bool) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), console=Console(stderr=True), disable=not shown,
        )  # fmt: skip
        self.task = self.bar.add_task(name, total=total, completed=done)

    def __enter__(self) -> Callable[[int, str], None]:
        self.bar.start()
        return lambda done, text: self.bar.update(self.task, completed=done, description=text)

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
