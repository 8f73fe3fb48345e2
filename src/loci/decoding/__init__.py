"""Drafters: what predicts the next tokens from memory, so that the model checks several at once.

The names below are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loci.decoding.blend import BlendedDrafter
    from loci.decoding.hidden_transfer import HiddenTransferDrafter
    from loci.decoding.medusa import Medusa
    from loci.decoding.names import drafter
    from loci.decoding.ppd import PPD
    from loci.decoding.prompt_lookup import PromptLookup
    from loci.decoding.rsd import RSD
    from loci.decoding.token_recycling import TokenRecycling

_HOMES = {
    "PPD": "ppd",
    "RSD": "rsd",
    "BlendedDrafter": "blend",
    "HiddenTransferDrafter": "hidden_transfer",
    "Medusa": "medusa",
    "PromptLookup": "prompt_lookup",
    "TokenRecycling": "token_recycling",
    "drafter": "names",
}

__all__ = [
    "PPD",
    "RSD",
    "BlendedDrafter",
    "HiddenTransferDrafter",
    "Medusa",
    "PromptLookup",
    "TokenRecycling",
    "drafter",
]


def __getattr__(name: str) -> object:
    try:
        home = _HOMES[name]
    except KeyError:
        raise AttributeError(f"module 'loci.decoding' has no attribute {name!r}") from None
    value = getattr(importlib.import_module(f"loci.decoding.{home}"), name)
    globals()[name] = value
    return value
