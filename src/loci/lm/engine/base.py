"""The seam between generation and whatever runs the model: prefill, step over token trees, commit.

Letters  row: one sequence of the batch; node: an entry of its tree; past: tokens in the cache.
Ours     one committed token is always pending: prefill feeds `prompt[:-1]`, and every step starts with that token as
         the root of its tree. A step *stages*; only `commit` makes the accepted path part of the past.

Engines that pack a model's weights in their own way keep the packed form with the model (`kept`), so that the next
engine over the same model begins at once with an empty cache of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast, runtime_checkable
from weakref import WeakKeyDictionary

import numpy as np
from jaxtyping import Float, Float32, Int32, Int64

from loci.errors import BadInput
from loci.lm.draft import Needs, PrefillResult, TokenTree
from loci.lm.model import LanguageModel

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = Any  # checked for shape and dtype all the same, without importing torch


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What an engine can do with its model. `why` says what stands against trees and batches.

    hidden: whether it gives hidden states; `hidden_layers` are the layers it gives (-1: the last, after the final
        norm), None for every one.
    hooks: whether hidden states of probes can be overwritten between layers; the engine is then an `InjectingEngine`.
    """

    max_nodes: int
    batch: bool
    hidden: bool
    hooks: bool
    why: str = ""
    hidden_layers: tuple[int, ...] | None = None

    def lacks(self, needs: Needs) -> str:
        """What a drafter needs and the engine cannot give; empty if it gives all."""
        if needs.hooks and not self.hooks:
            return "it cannot overwrite hidden states between layers"
        if needs.hidden and not self.hidden:
            return "it gives no hidden states"
        if self.hidden_layers is not None and not set(needs.hidden) <= set(self.hidden_layers):
            missing = sorted(set(needs.hidden) - set(self.hidden_layers))
            return f"it gives the hidden states of the layers {list(self.hidden_layers)}, not of {missing}"
        return ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Injection:
    """What a probe becomes before a layer: `weight @ hidden(source) + bias`, plus `hidden(source)` if residual.

    The source is the token under which the probe's chain hangs. Probe number i of a chain (1 hangs under the token)
    obeys injection i - 1 of those that were given to `inject`; below its layer the probe's states mean nothing.

    layer: 0 to the number of layers; the overwriting happens before that layer, at the number of layers before the
        final norm.
    """

    layer: int
    weight: Float[Tensor, "width width"]
    bias: Float[Tensor, " width"] | None = None
    residual: bool = False

    def to(self, dtype: Any, device: Any) -> Injection:
        bias = None if self.bias is None else self.bias.detach().to(device, dtype)
        return Injection(
            layer=self.layer, weight=self.weight.detach().to(device, dtype), bias=bias, residual=self.residual
        )


def injected(injection: Injection, states: Float[Tensor, "probe width"]) -> Float[Tensor, "probe width"]:
    """What probes become whose sources have these states."""
    found = states @ injection.weight.T
    if injection.bias is not None:
        found = found + injection.bias
    return found + states if injection.residual else found


def injection_places(
    injections: Sequence[Injection], trees: Sequence[TokenTree], size: int
) -> list[tuple[Injection, Int64[np.ndarray, " _"], Int64[np.ndarray, " _"]]]:
    """Each injection that a step has probes for, with its probes and their sources: places among the nodes of all
    rows, of which each takes `size`."""
    if not injections or all(tree.embeds is None for tree in trees):
        return []
    chains = [probe_chains(tree) for tree in trees]
    found = []
    for number, injection in enumerate(injections, start=1):
        probes, sources = (
            np.concatenate([row * size + chain[part][chain[1] == number] for row, chain in enumerate(chains)])
            for part in (0, 2)
        )
        if len(probes):
            found.append((injection, probes, sources))
    return found


def check_injections(injections: Sequence[Injection], *, layers: int, width: int) -> None:
    """Raise BadInput unless the layers lie within the model and do not fall along a chain: a probe looks at the earlier
    ones of its chain, which mean something only from their own layer on."""
    found = [injection.layer for injection in injections]
    if any(not 0 <= layer <= layers for layer in found):
        raise BadInput(f"injections at the layers {found}; this model has the layers 0 to {layers - 1}, and {layers}"
                       " stands for the final norm.")  # fmt: skip
    if found != sorted(found):
        raise BadInput(f"injections at the layers {found}; along a chain of probes the layers must not fall.")
    for injection in injections:
        if tuple(injection.weight.shape) != (width, width):
            raise BadInput(
                f"an injection has a matrix of {tuple(injection.weight.shape)}; this model's states have {width}"
                f" numbers, so it must be {(width, width)}."
            )


@runtime_checkable
class Injecting(Protocol):
    """A drafter with `needs.hooks`: what its probes become. Read once, when a run begins."""

    @property
    def injections(self) -> Sequence[Injection]: ...


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


@runtime_checkable
class InjectingEngine(StepEngine, Protocol):
    """An engine whose capabilities say `hooks`."""

    def inject(self, injections: Sequence[Injection]) -> None:
        """From the next step on, probe number i of every chain obeys `injections[i - 1]`; probes beyond the last of
        them keep their embeddings. An empty sequence ends it. The model itself carries no hook between two steps.

        Raises:
            BadInput: a layer outside the model, layers that fall along a chain, or a matrix of the wrong size.
        """


def probe_chains(
    tree: TokenTree,
) -> tuple[Int64[np.ndarray, " probe"], Int64[np.ndarray, " probe"], Int64[np.ndarray, " probe"]]:
    """The probes of a tree: their nodes, their numbers along their chains (1 hangs under a token), and the tokens
    (nodes) under which the chains hang."""
    nodes = np.flatnonzero(tree.is_probe)
    number, source = np.zeros(tree.size, dtype=np.int64), np.arange(tree.size)
    for node in nodes.tolist():
        parent = int(tree.parents[node])
        number[node], source[node] = number[parent] + 1, source[parent]
    return nodes, number[nodes], source[nodes]


Made = TypeVar("Made")

_kept: WeakKeyDictionary[LanguageModel, dict[Hashable, tuple[Hashable, Any]]] = WeakKeyDictionary()
_lock = threading.RLock()


def kept(language_model: LanguageModel, key: Hashable, make: Callable[[], Made]) -> Made:
    """What an engine makes of a model's weights, made once and kept as long as the model lives.

    It is made again when a weight was exchanged or written to since. What `make` returns must not refer to
    `language_model`, or the model would live for ever.
    """
    state = tuple(map(_state, language_model.model.parameters()))
    with _lock:
        made = _kept.setdefault(language_model, {})
        if key not in made or made[key][0] != state:
            made.pop(key, None)  # the old one goes before the new one takes its memory
            made[key] = (state, make())
        return cast(Made, made[key][1])


def _state(weight: Tensor) -> tuple[int, int, float]:
    """Changes when a weight does: its place, torch's count of writes, and one of its numbers, because a write through
    `.data`, by which adapters are merged, is not counted."""
    middle = weight.detach()[tuple(size // 2 for size in weight.shape)] if weight.numel() else 0.0
    return weight.data_ptr(), 0 if weight.is_inference() else int(weight._version), float(middle)


def release(language_model: LanguageModel) -> None:
    """Drop what engines keep of this model. Engines in use keep their own reference."""
    with _lock:
        _kept.pop(language_model, None)
