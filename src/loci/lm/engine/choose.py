"""Which engine runs a model: the fastest one that can do what is asked.

Order  on the processor `native` (compiled, weights in their blocks), `packed` (lean torch), `hf` (any model of
       transformers, unmodified); on CUDA `cuda` before `hf`.
Ours   no engine is chosen by a model's name: each one looks at the modules it finds. What spoke against the faster
       ones is logged at debug level and remembered: `explain`.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from loci.errors import UnknownName, Unsupported
from loci.lm.draft import Needs
from loci.lm.engine.base import StepEngine
from loci.lm.model import LanguageModel

if TYPE_CHECKING:
    from transformers import Cache

log = logging.getLogger(__name__)

NOTHING = Needs()
NAMES = ("auto", "native", "packed", "cuda", "hf")

_passed_over: WeakKeyDictionary[StepEngine, dict[str, str]] = WeakKeyDictionary()


def choose(
    language_model: LanguageModel, *, memory: Cache | None = None, needs: Needs = NOTHING, name: str = "auto"
) -> StepEngine:
    """A new engine with an empty cache. What an engine makes of the weights is kept with the model, so that only the
    first one takes the time to make it.

    Args:
        memory: a cache to write into; only `hf` has one that is not its own.
        needs: what the drafter wants back.
        name: "auto", or the engine that it must be.

    Raises:
        UnknownName: there is no engine of this name.
        Unsupported: the named engine cannot serve; the message says why.
    """
    if name not in NAMES:
        raise UnknownName.among("engine", name, NAMES)
    if name != "auto":
        found = _make(name, language_model, memory, needs)
        if isinstance(found, str):
            raise Unsupported(f'the engine {name!r} cannot run {language_model.name} here: {found}. Use engine="auto".')
        return found
    order = ("native", "packed", "hf") if language_model.device.type == "cpu" else ("cuda", "hf")
    passed: dict[str, str] = {}
    for candidate in order:
        found = _make(candidate, language_model, memory, needs)
        if not isinstance(found, str):
            _passed_over[found] = passed
            log.debug("%s runs on the engine %s", language_model.name, candidate)
            return found
        passed[candidate] = found
        log.debug("%s does not run on the engine %s: %s", language_model.name, candidate, found)
    raise Unsupported(f"no engine can run {language_model.name} with this drafter: {passed['hf']}.")


def explain(engine: StepEngine) -> dict[str, str]:
    """The engines that "auto" passed over for this one, and why."""
    return dict(_passed_over.get(engine, {}))


def _make(name: str, language_model: LanguageModel, memory: Cache | None, needs: Needs) -> StepEngine | str:
    """The engine, or why it cannot serve."""
    if memory is not None and name != "hf":
        return f"it writes into a cache of its own, not into a {type(memory).__name__}"
    found = _MAKERS[name](language_model, memory)
    if isinstance(found, str):
        return found
    return found.capabilities.lacks(needs) or found


def _native(language_model: LanguageModel, memory: Cache | None) -> StepEngine | str:
    if importlib.util.find_spec("loci.lm.engine.native") is None:
        return "it is not installed"
    native = importlib.import_module("loci.lm.engine.native")
    why: str = native.supports(language_model)
    if why:
        return why
    engine: StepEngine = native.NativeEngine(language_model)
    return engine


def _packed(language_model: LanguageModel, memory: Cache | None) -> StepEngine | str:
    from loci.lm.engine import packed

    found = packed.find(language_model)
    return found if isinstance(found, str) else packed.PackedEngine(language_model, found)


def _cuda(language_model: LanguageModel, memory: Cache | None) -> StepEngine | str:
    if language_model.device.type != "cuda":
        return f"the model is on {language_model.device.type!r}, not on a CUDA device"
    from loci.lm.engine import cuda, packed

    found = packed.find(language_model)
    return found if isinstance(found, str) else cuda.CudaEngine(language_model, found)


def _hf(language_model: LanguageModel, memory: Cache | None) -> StepEngine | str:
    from loci.lm.engine.hf import HFEngine

    return HFEngine(language_model, memory=memory)


_MAKERS: dict[str, Callable[[LanguageModel, Cache | None], StepEngine | str]] = {
    "native": _native,
    "packed": _packed,
    "cuda": _cuda,
    "hf": _hf,
}
