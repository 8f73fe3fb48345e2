"""Drafts: what might come next, as a tree of tokens that one forward pass checks.

Letters  node: an entry of the tree in topological order, node 0 the root; width: the model's hidden size.
Ours     one tree for every kind of drafter. The root is the last committed token, which is not in the cache yet, so a
         tree of one node is plain decoding in the same code path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Float32, Int32

from loci.errors import BadInput, UnknownName
from loci.lm.model import LanguageModel
from loci.lm.sampling import Sampling

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = Any  # checked for shape and dtype all the same, without importing torch

Law = Literal["point", "iid", "without_replacement"]

TOKEN, PROBE = 0, 1


@dataclass(frozen=True, kw_only=True)
class TokenTree:
    """Drafted tokens and who follows whom.

    tokens: node 0 is the last committed token; -1 for probes.
    parents: `parents[0]` is -1; every other parent stands before its child.
    kind: 0 a token, 1 a probe, whose input is an embedding, which is never accepted, and whose output goes to the
        drafter. None: tokens only.
    embeds: the inputs of the probes, in the order of the nodes.
    law: how siblings were chosen, which fixes how they are verified. Siblings stand in the order in which they were
        drawn, "iid" independently of each other, "without_replacement" each without the tokens before it.
    q: the drafter's distributions, at least at each node that has children; None under the law "point".
    q_row: the row of `q` at each node, -1 where there is none; None where `q` is None.

    Raises:
        BadInput: the order is not topological, a parent has two children with one token (laws "point" and
            "without_replacement"), a token follows a probe, or sizes do not fit.
    """

    tokens: Int32[np.ndarray, " node"]
    parents: Int32[np.ndarray, " node"]
    kind: Int32[np.ndarray, " node"] | None = None
    embeds: Float32[np.ndarray, "probe width"] | None = None
    law: Law = "point"
    q: Float32[np.ndarray, "inner vocabulary"] | None = None
    q_row: Int32[np.ndarray, " node"] | None = None

    def __post_init__(self) -> None:
        if not len(self.tokens) or self.parents[0] != -1:
            raise BadInput("a token tree begins with a root whose parent is -1.")
        if np.any(self.parents[1:] < 0) or np.any(self.parents[1:] >= np.arange(1, self.size)):
            raise BadInput("a token tree lists every parent before its children.")
        probes = self.is_probe
        if probes[0]:
            raise BadInput("the root of a token tree is a token, not a probe.")
        if np.any(self.tokens[~probes] < 0) or np.any(self.tokens[probes] != -1):
            raise BadInput("a token tree holds token ids of 0 and more, and -1 for each probe.")
        if np.any(probes[self.parents[1:]] & ~probes[1:]):
            raise BadInput("in a token tree no token follows a probe.")
        given = 0 if self.embeds is None else len(self.embeds)
        if given != int(probes.sum()):
            raise BadInput(f"a token tree with {int(probes.sum())} probes has {given} embeddings.")
        if self.law != "iid":
            drafted = [edge for edge in zip(self.parents.tolist(), self.tokens.tolist(), strict=True) if edge[1] >= 0]
            if len(set(drafted)) != len(drafted):
                raise BadInput(f'under the law "{self.law}" a node has one child per token.')
        if (self.q is None) != (self.law == "point") or (self.q is None) != (self.q_row is None):
            raise BadInput('a token tree carries q and q_row under the laws "iid" and "without_replacement" only.')

    @property
    def size(self) -> int:
        return len(self.tokens)

    @cached_property
    def is_probe(self) -> Bool[np.ndarray, " node"]:
        return np.zeros(self.size, dtype=bool) if self.kind is None else self.kind == PROBE

    @cached_property
    def depth(self) -> Int32[np.ndarray, " node"]:
        """Steps from the root."""
        depth = np.zeros(self.size, dtype=np.int32)
        for node in range(1, self.size):
            depth[node] = depth[self.parents[node]] + 1
        return depth

    @cached_property
    def ancestors(self) -> Bool[np.ndarray, "node node"]:
        """Row i is True at the nodes on the path from the root to i, i included: what i attends to."""
        seen = np.eye(self.size, dtype=bool)
        for node in range(1, self.size):
            seen[node] |= seen[self.parents[node]]
        return seen

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """For each node its children, in the order in which they were drawn."""
        below: list[list[int]] = [[] for _ in range(self.size)]
        for node, parent in enumerate(self.parents.tolist()[1:], start=1):
            below[parent].append(node)
        return tuple(map(tuple, below))

    @cached_property
    def paths(self) -> tuple[tuple[int, ...], ...]:
        """Every way from the root to a leaf."""
        return tuple(
            tuple(np.flatnonzero(self.ancestors[node]).tolist()) for node in range(self.size) if not self.children[node]
        )

    def child(self, node: int, token: int) -> int | None:
        """The first child of `node` that carries `token`."""
        return next((child for child in self.children[node] if self.tokens[child] == token), None)

    def pruned(self, keep: Bool[np.ndarray, " node"]) -> TokenTree:
        """The tree of these nodes. What hangs under a node that goes, goes with it."""
        keep = keep.copy()
        keep[0] = True
        for node in range(1, self.size):
            keep[node] &= keep[self.parents[node]]
        if keep.all():
            return self
        place = np.cumsum(keep) - 1
        parents = np.where(self.parents >= 0, place[self.parents], -1)
        return replace(
            self,
            tokens=self.tokens[keep],
            parents=parents[keep].astype(np.int32),
            kind=None if self.kind is None else self.kind[keep],
            embeds=None if self.embeds is None else self.embeds[keep[self.is_probe]],
            q_row=None if self.q_row is None else self.q_row[keep],
        )

    @classmethod
    def root(cls, token: int) -> TokenTree:
        """Nothing drafted: plain decoding."""
        return cls(tokens=np.array([token], dtype=np.int32), parents=np.array([-1], dtype=np.int32))

    @classmethod
    def chain(cls, tokens: Sequence[int]) -> TokenTree:
        """One guess after another; the first is the root."""
        size = len(tokens)
        return cls(tokens=np.array(tokens, dtype=np.int32), parents=np.arange(-1, size - 1, dtype=np.int32))

    @classmethod
    def from_template(cls, template: TreeTemplate, tokens: Sequence[int]) -> TokenTree:
        """The template's shape with these tokens, root first, in the template's order of nodes."""
        if len(tokens) != template.size:
            raise BadInput(f"a template of {template.size} nodes was given {len(tokens)} tokens.")
        tree = cls(tokens=np.array(tokens, dtype=np.int32), parents=template.shape.parents)
        for name in ("depth", "ancestors", "children", "paths"):  # of the shape, not of the tokens: computed once
            tree.__dict__[name] = getattr(template.shape, name)
        return tree

    @classmethod
    def merge(cls, first: TokenTree, second: TokenTree, *, budget: int) -> TokenTree:
        """Both trees as one of at most `budget` nodes; the first one's nodes have the first claim.

        Raises:
            BadInput: the roots differ, a tree has probes, or its law is not "point".
        """
        if first.tokens[0] != second.tokens[0]:
            raise BadInput(f"trees with the roots {first.tokens[0]} and {second.tokens[0]} cannot be merged.")
        if budget < 1:
            raise BadInput(f"a tree has at least 1 node; the budget is {budget}.")
        places: dict[tuple[int, int], int] = {}
        tokens, parents = [int(first.tokens[0])], [-1]
        for tree in (first, second):
            if tree.law != "point" or tree.is_probe.any():
                raise BadInput('only trees of tokens under the law "point" can be merged.')
            moved = {0: 0}
            for node in range(1, tree.size):
                parent = moved.get(int(tree.parents[node]))
                if parent is None:
                    continue
                edge = (parent, int(tree.tokens[node]))
                if edge not in places:
                    if len(tokens) >= budget:
                        continue
                    places[edge] = len(tokens)
                    tokens.append(edge[1])
                    parents.append(parent)
                moved[node] = places[edge]
        return cls(tokens=np.array(tokens, dtype=np.int32), parents=np.array(parents, dtype=np.int32))


@dataclass(frozen=True)
class TreeTemplate:
    """A shape for trees whose siblings are ranked: `((0,), (1,), (0, 0))` is the best and the second guess for the
    next token, and the best guess after the best. Mask, depths and parents are computed once, not per step."""

    ranks: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        known = {(), *self.ranks}
        if len(known) != len(self.ranks) + 1 or any(path[:-1] not in known for path in self.ranks):
            raise BadInput("a template lists each path of ranks once, and with it every path that leads there.")

    @property
    def size(self) -> int:
        """Nodes, the root included."""
        return len(self.ranks) + 1

    @cached_property
    def order(self) -> tuple[tuple[int, ...], ...]:
        """The paths of ranks, node by node: the root `()`, then by depth, then by rank."""
        return ((), *sorted(self.ranks, key=lambda path: (len(path), path)))

    @cached_property
    def shape(self) -> TokenTree:
        """A tree of this shape whose tokens are the nodes' own numbers."""
        place = {path: node for node, path in enumerate(self.order)}
        parents = [-1, *(place[path[:-1]] for path in self.order[1:])]
        return TokenTree(tokens=np.arange(self.size, dtype=np.int32), parents=np.array(parents, dtype=np.int32))


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a drafter wants back from each step.

    hidden: layers whose output it reads; -1 is the last, after the final norm.
    topk: how many of the most probable tokens per node.
    prefill: the same for the prompt's tokens.
    hooks: to overwrite hidden states between layers.
    """

    hidden: tuple[int, ...] = ()
    topk: int = 0
    prefill: bool = False
    hooks: bool = False


@dataclass(frozen=True, kw_only=True)
class PrefillResult:
    """What a prompt gave. The outputs cover the tokens that were fed now, from position `start` on; an engine that
    kept the beginning of the prompt from an earlier run does not feed it again. None where not asked for."""

    tokens: tuple[int, ...]  # the whole prompt, the pending last token included
    start: int = 0
    topk_ids: Int32[np.ndarray, "fed rank"] | None = None
    topk_logits: Float32[np.ndarray, "fed rank"] | None = None
    hidden: Float[Tensor, "layer fed width"] | None = None


def _nobody_listens(line: str) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class DraftState:
    """Where a row stands when a draft is asked for.

    tokens: all committed ids of the row; the last one is pending, the root of the next tree.
    sampling: as the user asked. Under temperature 0 a drafter of a sampled law proposes its best guesses (law "point").
    rng: the drafter's own stream; never the verifier's noise.
    budget: nodes that a tree may have now, the root included.
    note: what the drafter has to tell the user; each line stands once in the statistics.
    """

    tokens: Sequence[int]
    sampling: Sampling
    rng: np.random.Generator
    budget: int
    note: Callable[[str], None] = _nobody_listens

    @property
    def position(self) -> int:
        """Place of the next token."""
        return len(self.tokens)


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step gave for one row: the outputs of every node, accepted or not.

    tree: as it was checked: the proposal without what a constraint forbids; the root alone where no proposal was asked
        for.
    logits: gives one node's row when it is called.
    accepted: nodes on the accepted path, from the root.
    bonus: the token drawn at the last of them; None when generation ended on the way.
    committed: the new ids.
    """

    tree: TokenTree
    logits: Callable[[int], Float32[np.ndarray, " vocabulary"]]
    accepted: tuple[int, ...]
    bonus: int | None
    committed: tuple[int, ...]
    topk_ids: Int32[np.ndarray, "node rank"] | None = None
    topk_logits: Float32[np.ndarray, "node rank"] | None = None
    hidden: Float[Tensor, "layer node width"] | None = None


@runtime_checkable
class Drafter(Protocol):
    """Guesses what comes next. It never sees future text, never changes the model's weights, and may propose nothing
    but the root; the step is then plain decoding. `law` is that of its trees when the user samples; each tree names its
    own."""

    name: str
    needs: Needs
    law: Law

    def start(self, state: DraftState, prefill: PrefillResult) -> None:
        """A new sequence begins, perhaps while another was left unfinished. What was learnt before may be kept."""

    def propose(self, state: DraftState) -> TokenTree:
        """At least the root, `state.tokens[-1]`; at most `state.budget` nodes."""

    def observe(self, result: StepResult) -> None:
        """Every node's output of the step that checked the last proposal."""

    @property
    def nbytes(self) -> int:
        """Bytes of parameters, tables and own caches, counted."""


@runtime_checkable
class Forecasting(Protocol):
    """A drafter that can tell what a tree of its own is worth."""

    def expected_tokens(self, nodes: int) -> float:
        """New tokens per step with a tree of so many nodes, root included; 1 for the root alone."""


def named_drafter(spec: str, model: LanguageModel) -> Drafter | None:
    """The drafter of a name: "auto", "lookup", or with what it needs to know, "medusa:PATH". None for "none".

    Installed packages offer drafters in the entry-point group "loci.drafters"; each is a function of the model and of
    what stands behind the colon ("" for nothing).

    Raises:
        UnknownName: nothing installed offers a drafter of this name; those that are known are listed.
    """
    name, _, argument = spec.partition(":")
    if name == "none":
        return None
    offered = {point.name: point for point in entry_points(group="loci.drafters")}
    if name not in offered:
        raise UnknownName.among("drafter", name, ("none", *offered))
    drafter: Drafter = offered[name].load()(model, argument)
    return drafter
