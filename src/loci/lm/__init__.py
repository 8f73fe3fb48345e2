"""Language models: load, generate, chat, embed, constrain, read.

The names below are imported when they are first used, so that `import loci.lm` stays light.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loci.lm.chat import ChatModel, Completion, Message, Usage
    from loci.lm.constrain import Constraint
    from loci.lm.draft import Drafter, Needs, TokenTree, TreeTemplate
    from loci.lm.embed import Embedder
    from loci.lm.generate import Generation, GenerationStats, Stop, StreamChunk, generate, stream
    from loci.lm.load import load
    from loci.lm.model import LanguageModel
    from loci.lm.reader import Passage, Reader, ReaderAnswer
    from loci.lm.sampling import Sampling

_HOMES = {
    "ChatModel": "chat",
    "Completion": "chat",
    "Constraint": "constrain",
    "Drafter": "draft",
    "Embedder": "embed",
    "Generation": "generate",
    "GenerationStats": "generate",
    "LanguageModel": "model",
    "Message": "chat",
    "Needs": "draft",
    "Passage": "reader",
    "Reader": "reader",
    "ReaderAnswer": "reader",
    "Sampling": "sampling",
    "Stop": "generate",
    "StreamChunk": "generate",
    "TokenTree": "draft",
    "TreeTemplate": "draft",
    "Usage": "chat",
    "generate": "generate",
    "load": "load",
    "stream": "generate",
}

__all__ = [
    "ChatModel",
    "Completion",
    "Constraint",
    "Drafter",
    "Embedder",
    "Generation",
    "GenerationStats",
    "LanguageModel",
    "Message",
    "Needs",
    "Passage",
    "Reader",
    "ReaderAnswer",
    "Sampling",
    "Stop",
    "StreamChunk",
    "TokenTree",
    "TreeTemplate",
    "Usage",
    "generate",
    "load",
    "stream",
]


def __getattr__(name: str) -> object:
    try:
        home = _HOMES[name]
    except KeyError:
        raise AttributeError(f"module 'loci.lm' has no attribute {name!r}") from None
    value = getattr(importlib.import_module(f"loci.lm.{home}"), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """Keeps `loci.lm.load` and `loci.lm.generate` functions: importing a submodule binds the module to its name."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
