"""Drafters by name: `auto`, `lookup`, `recycle`, `medusa:PATH`, `ppd:PATH`, `hidden:PATH`, `rsd:PATH`.

A trained drafter without a path is the one that ships with the package (or lies in the user's cache) for exactly these
weights. `auto` blends prompt lookup and recycling, which need no training, with the trained drafters that are there.
The functions that are called like drafters are the targets of the entry points "loci.drafters", which is where
`loci.lm.generate(drafter="auto")` finds them: each takes the model and what stood behind the colon.

What recycling learned is kept for the process, one matrix for each model, and so is what guesses earned: a new drafter
goes on where the last one ended. Where texts of different people must not teach each other, make drafters of your own.
"""

from __future__ import annotations

import importlib
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np

from loci import settings
from loci.decoding.blend import BlendedDrafter, Experience
from loci.decoding.prompt_lookup import PromptLookup
from loci.decoding.token_recycling import RANKS, TEMPLATES, Table, TokenRecycling, load_table, warm_file
from loci.errors import BadInput, BadModel, ModelNotFound, UnknownName
from loci.lm.draft import Drafter, TreeTemplate

if TYPE_CHECKING:
    from loci.lm.model import LanguageModel

# Where a trained drafter is read: `load(path, model)`, the path a file or the folder that its training wrote.
TRAINED: Mapping[str, str] = {
    "medusa": "loci.decoding.medusa:load",
    "ppd": "loci.decoding.ppd:load",
    "hidden": "loci.decoding.hidden_transfer:load",
    "rsd": "loci.decoding.rsd:load",
}
# Trained drafters that `auto` takes in where they are there, the first of them alone: more share the nodes of a step
# with no gain.
IN_AUTO = ("medusa", "ppd")
ARTIFACTS = Path(__file__).resolve().parent / "artifacts"


@dataclass(eq=False)
class _Learned:
    """What this process knows about one model."""

    table: Table
    experience: Experience = field(default_factory=Experience)
    fingerprint: str = ""  # of its weights, computed when it is first asked for
    lock: threading.Lock = field(default_factory=threading.Lock)


_learned: WeakKeyDictionary[LanguageModel, _Learned] = WeakKeyDictionary()
_lock = threading.Lock()


def drafter(spec: str, model: LanguageModel, *, alone: bool = False) -> Drafter | None:
    """The drafter of this name for this model; None for "none".

    Args:
        alone: it starts with nothing that other texts of this process taught, and teaches none. For measuring.

    Raises:
        UnknownName: no drafter, or no variant of recycling, is called that.
        BadInput: a path for a drafter that takes none.
        ModelNotFound: no trained part at the path, or none that ships for this model.
        BadModel: the trained part belongs to another model.
    """
    name, _, argument = spec.partition(":")
    if name == "none" and not argument:
        return None
    if name == "rapid":
        raise BadInput(
            "the drafter 'rapid' drafts from passages of a long context. Give it one:  loci generate --context FILE"
            " --drafter rapid, or call `loci.decoding.rapid.rapid(model, context, query)`."
        )
    if name not in FACTORIES:
        raise UnknownName.among("drafter", spec, known())
    if alone and name == "auto":
        return _auto(model, argument, _new(model))
    if alone and name == "recycle":
        return _recycle(model, argument, _new(model))
    return FACTORIES[name](model, argument)


def known() -> list[str]:
    """How drafters are spelled."""
    return ["none", *(f"{name}[:PATH]" if name in TRAINED else name for name in FACTORIES)]


def auto(model: LanguageModel, argument: str = "") -> Drafter:
    """Prompt lookup and recycling, and a trained drafter that is there for this model, in one tree.

    The argument names other parts for the blend: "auto:lookup+recycle", "auto:lookup+recycle+ppd:PATH".
    """
    return _auto(model, argument, _of(model))


def lookup(model: LanguageModel, argument: str = "") -> Drafter:
    """Prompt lookup alone."""
    _takes_no_path("lookup", argument)
    return PromptLookup()


def recycle(model: LanguageModel, argument: str = "") -> Drafter:
    """Token Recycling alone, on the matrix that this process keeps for the model.

    The argument names a template, and variants that show what its parts are worth, in any order: "recycle:2.2.2",
    "recycle:31,warm". See `VARIANTS`.
    """
    return _recycle(model, argument, _of(model))


def medusa(model: LanguageModel, argument: str = "") -> Drafter:
    """Medusa heads from a path, or those that ship for this model."""
    return _trained("medusa", model, argument)


def ppd(model: LanguageModel, argument: str = "") -> Drafter:
    """Prompt tokens from a path, or those that ship for this model."""
    return _trained("ppd", model, argument)


def hidden(model: LanguageModel, argument: str = "") -> Drafter:
    """Hidden transfer from a path, or what ships for this model."""
    return _trained("hidden", model, argument)


def rsd(model: LanguageModel, argument: str = "") -> Drafter:
    """Recursive speculative decoding with a draft model from a path, or the one that ships for this model."""
    return _trained("rsd", model, argument)


FACTORIES: Mapping[str, Callable[[LanguageModel, str], Drafter]] = {
    "auto": auto,
    "lookup": lookup,
    "recycle": recycle,
    "medusa": medusa,
    "ppd": ppd,
    "hidden": hidden,
    "rsd": rsd,
}

# What can stand behind "recycle:" besides a template.
VARIANTS: Mapping[str, str] = {
    "warm": "starts from contexts of one token",
    "cold": "starts empty, whatever lies in the cache",
    "accepted": "only accepted nodes are written",
    "frozen": "nothing is written",
    "no-prompt": "the prompt's outputs are not written",
    "chain": "one follower per token, a chain of as many nodes",
    "random": "starts from random rows, and nothing is written",
}


def forget(model: LanguageModel) -> None:
    """Drop what this process learned from the texts of this model."""
    with _lock:
        _learned.pop(model, None)


def _takes_no_path(name: str, argument: str) -> None:
    if argument:
        raise BadInput(f"the drafter {name!r} takes nothing behind a colon; found {argument!r}. Write {name!r} alone.")


def _of(model: LanguageModel) -> _Learned:
    with _lock:
        if model not in _learned:
            _learned[model] = _new(model)
        return _learned[model]


def _new(model: LanguageModel) -> _Learned:
    file = warm_file(model)
    table = load_table(file, model=model) if file.is_file() else Table(model.vocabulary, model=model.hash)
    return _Learned(table)


def _auto(model: LanguageModel, argument: str, learned: _Learned) -> Drafter:
    if argument:
        names = argument.split("+")
    else:
        found = next((name for name in IN_AUTO if _artifact(name, model) is not None), None)
        names = ["lookup", "recycle", *([found] if found is not None else [])]
    parts: list[Drafter] = []
    for name in names:
        first, _, rest = name.partition(":")
        if first not in FACTORIES or first == "auto":
            raise UnknownName.among("part of a blend", name, [other for other in FACTORIES if other != "auto"])
        parts.append(_recycle(model, rest, learned) if first == "recycle" else FACTORIES[first](model, rest))
    return BlendedDrafter(parts, experience=learned.experience)


def _recycle(model: LanguageModel, argument: str, learned: _Learned) -> TokenRecycling:
    words = [word for word in argument.split(",") if word]
    template: str | TreeTemplate = "auto"
    for word in words:
        if word in TEMPLATES:
            template = word
        elif word not in VARIANTS:
            raise UnknownName.among("variant of recycling", word, [*TEMPLATES, *VARIANTS])
    k, table = RANKS, learned.table
    if "chain" in words:
        nodes = 15 if template == "auto" else TEMPLATES[str(template)].size - 1
        k, template = 1, TreeTemplate(tuple((0,) * depth for depth in range(1, nodes + 1)))
        table = Table(model.vocabulary, k=1, model=model.hash)
    if "warm" in words:
        table = TokenRecycling.warm(model, k=k).table
    elif "cold" in words:
        table = Table(model.vocabulary, k=k, model=model.hash)
    elif "random" in words:
        random = np.random.default_rng(0)
        steps = np.cumsum(random.integers(1, model.vocabulary // k, (model.vocabulary, k)), axis=1)  # no token twice
        table = Table(model.vocabulary, k=k, ranked=(steps % model.vocabulary).astype(np.int32))
    still = "frozen" in words or "random" in words
    return TokenRecycling(
        model.vocabulary,
        k=k,
        template=template,
        recycle_prompt="no-prompt" not in words and not still,
        table=table,
        update="none" if still else "accepted" if "accepted" in words else "all",
    )


def trained_part(name: str, model: LanguageModel, argument: str = "") -> Path:
    """Where the trained part of this drafter lies: at the path that is named, else in the package or in the cache.

    Raises:
        ModelNotFound: none is named, and none is there for these weights.
    """
    path = Path(argument).expanduser() if argument else _artifact(name, model)
    if path is None:
        raise ModelNotFound(
            f"no trained part for the drafter {name!r} ships for {model.name}, and none lies in {_folders()[-1]}. Name"
            f" one as {name}:PATH, or train it:  loci draft train {name} --out DIR"
        )
    return path


def _trained(name: str, model: LanguageModel, argument: str) -> Drafter:
    module, attribute = TRAINED[name].split(":")
    path = trained_part(name, model, argument)
    found: Drafter = getattr(importlib.import_module(module), attribute)(path, model)
    return found


def _folders() -> tuple[Path, Path]:
    return ARTIFACTS, settings.cache() / "drafters"


def _artifact(name: str, model: LanguageModel) -> Path | None:
    """The trained part of this name that belongs to these weights."""
    for folder in _folders():
        for about in sorted([*folder.glob(f"{name}.json"), *folder.glob(f"*/{name}.json")]):
            try:
                base = json.loads(about.read_text("utf-8")).get("base")
            except (OSError, ValueError, AttributeError) as error:
                raise BadModel(f"{about} does not describe a trained part: {error}. Delete it.") from error
            if base == _fingerprint(model) and about.with_suffix(".safetensors").is_file():
                return about.with_suffix(".safetensors")
    return None


def _fingerprint(model: LanguageModel) -> str:
    learned = _of(model)
    with learned.lock:
        if not learned.fingerprint:
            from loci.lm.train import fingerprint

            learned.fingerprint = fingerprint(model.model)
        return learned.fingerprint
