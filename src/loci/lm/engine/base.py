"""The seam between generation and whatever runs the model: prefill, step over token trees, commit.

Letters  row: one sequence of the batch; node: an entry of its tree; past: tokens in the cache.
Ours     one committed token is always pending: prefill feeds `prompt[:-1]`, and every step starts with that token as
         the root of its tree. A step *stages*; only `commit` makes the accepted path part of the past.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32, Int32, Int64

from loci.lm.draft import Needs, PrefillResult, TokenTree

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = Any  # checked for shape and dtype all the same, without importing torch


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What an engine can do with its model. `why` says what stands against trees and batches."""

    max_nodes: int
    batch: bool
    hidden: bool
    hooks: bool
    why: str = ""


@runtime_checkable
class StepOutput(Protocol):
    """The outputs of one step, for every row and node. Rows with smaller trees are padded; padding means nothing."""

    def logits(self, row: int, node: int) -> Float32[np.ndarray, " vocabulary"]: ...

    def best(self) -> Int64[np.ndarray, "row node"]:
        """The most probable token of every node; of equals the lowest id."""

    def topk(self, row: int) -> tuple[Int32[np.ndarray, "node rank"], Float32[np.ndarray, "node rank"]] | None:
        """Ids and logits of the most probable tokens of a row's nodes; None if not asked for."""

    def hidden(self, row: int) -> Float[Tensor, "layer node width"] | None:
        """The asked layers' outputs; None if none was asked for."""


@runtime_checkable
class StepEngine(Protocol):
    name: str
    capabilities: Capabilities

    def prefill(self, prompts: Sequence[Sequence[int]], *, want: Needs) -> list[PrefillResult]:
        """Begin new sequences, one a row; all but each one's last token are fed. What the cache holds already of a
        single prompt's beginning is kept and not fed again."""

    def step(self, trees: Sequence[TokenTree], *, want: Needs) -> StepOutput:
        """Run one tree per row on top of the past. What it adds is staged until `commit`."""

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Keep these nodes of the last step, row by row, and drop the others. An empty path keeps nothing."""

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, which become rows 0, 1, ... in this order."""

    def reset(self) -> None:
        """Forget all sequences."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens in the cache, row by row."""

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values held now."""
