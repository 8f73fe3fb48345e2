"""Where sampled drafts come from: a small language model, or whatever else gives a distribution for each place.

Letters  node: an entry of the tree that is being drafted, node 0 the root, the text's last token.
Ours     a tree grows level by level. Each level is one step of the drafter's engine over the whole tree so far, dropped
         again before the next one: on engines whose cost hardly grows with the nodes of a step that costs as much as
         keeping the levels would, and needs nothing of an engine that checking drafts does not need. The last step
         stays staged; when the text is known, its accepted path is kept, so nothing accepted is ever read twice. Tokens
         that the drafter's cache lacks (the last accepted leaf, and the token after it) stand before the root of
         the next tree as its beginning, so catching up takes no step of its own.

`DraftSource` is what a drafter of sampled trees asks for; `DraftLM` is the source that is a language model. Others need
no model: heads on the target's hidden states give the same distribution to every node of a depth.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32

from loci.errors import BadInput, BadModel, Unsupported
from loci.lm.draft import DraftState, Needs, PrefillResult, StepResult, TokenTree
from loci.lm.engine.base import StepEngine
from loci.lm.model import LanguageModel
from loci.lm.sampling import Sampling, warp

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = Any  # checked for shape and dtype all the same, without importing torch

# Tokens that may wait to be read along with the next tree; more are read as a prompt is.
_WAITING = 8


@dataclass
class Draft:
    """A tree while it grows. Unlike in a `TokenTree`, siblings may carry the same token."""

    tokens: list[int]
    parents: list[int] = field(default_factory=lambda: [-1])

    def add(self, parent: int, token: int) -> int:
        """The new node."""
        self.tokens.append(token)
        self.parents.append(parent)
        return len(self.tokens) - 1

    def depth(self, node: int) -> int:
        steps = 0
        while (node := self.parents[node]) >= 0:
            steps += 1
        return steps


@runtime_checkable
class DraftSource(Protocol):
    """What a drafter of sampled trees draws from.

    needs: what it wants back from each step of the target.
    vocabulary: numbers in a row; the target's.
    horizon: the deepest node that it can draft, None without a limit.
    """

    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> Needs: ...

    @property
    def vocabulary(self) -> int: ...

    @property
    def horizon(self) -> int | None: ...

    def start(self, state: DraftState, prefill: PrefillResult) -> None:
        """A new sequence begins."""

    def distribution(
        self, draft: Draft, nodes: Sequence[int], *, sampling: Sampling
    ) -> Float32[np.ndarray, "node vocabulary"]:
        """Of the token after each of these nodes; rows sum to 1. Parents are asked for before their children, and a
        tree that is begun anew is another `Draft`."""

    def observe(self, result: StepResult) -> None:
        """What the target made of the draft."""

    @property
    def nbytes(self) -> int:
        """Bytes of what it holds besides the target's own weights."""


def warped(rows: Float32[np.ndarray, "node vocabulary"], sampling: Sampling) -> Float32[np.ndarray, "node vocabulary"]:
    """Logits as distributions under sampling options; what the options drop has probability 0.

    Raises:
        BadInput: temperature 0, under which nothing is drawn.
    """
    if sampling.greedy:
        raise BadInput("temperature is 0: nothing is drawn, so there is no distribution. Draft the best guesses.")
    if (sampling.top_p, sampling.top_k, sampling.min_p) == (1.0, 0, 0.0):
        scores = (rows - rows.max(axis=1, keepdims=True)) / np.float32(sampling.temperature)
        mass = np.exp(scores, dtype=np.float32)
        return np.asarray(mass / mass.sum(axis=1, keepdims=True))
    q = np.zeros_like(rows)
    for row, logits in zip(q, rows, strict=True):
        support = warp(logits, sampling)
        row[support.tokens] = support.probabilities
    return q


class DraftLM:
    """A causal language model that drafts for another one with the same tokens.

    Its text is its own: `begin` gives it a prompt, `extend` what came after. A drafter that reads the same text as the
    target uses `start` and `observe`, which do the same from the target's states.

    Args:
        engine: a name, or an engine over `model`.
        shared: a model whose weights are not counted again in `nbytes`, because it is in memory anyway: the target.

    Raises:
        Unsupported: no engine can run trees of this model.
    """

    needs = Needs()
    horizon = None

    def __init__(
        self, model: LanguageModel, *, engine: str | StepEngine = "auto", shared: LanguageModel | None = None
    ) -> None:
        if isinstance(engine, str):
            from loci.lm.engine.choose import choose

            engine = choose(model, name=engine)
        if engine.capabilities.max_nodes == 1:
            raise Unsupported(f"{model.name} cannot draft trees: {engine.capabilities.why}.")
        self.model, self.engine, self.name = model, engine, model.name
        self.vocabulary = model.vocabulary
        self._shared = set() if shared is None else {weight.data_ptr() for weight in shared.model.parameters()}
        self.text: list[int] = []  # all tokens that it has been given
        self._waiting: list[int] = []  # the last of them, which its cache lacks; never empty once begun
        self._draft: Draft | None = None  # what the staged step belongs to
        self._staged = False
        self._clear(Draft([0]))

    @classmethod
    def from_layers(
        cls, model: LanguageModel, *, layers: int = 4, adapter: str | Path | None = None, engine: str = "auto"
    ) -> DraftLM:
        """The first layers of a model with its embedding, final norm and head, which are shared and not copied.

        Args:
            adapter: layers that `loci.decoding.rsd.train_draft` trained; they and the norm are then the draft model's
                own, and `layers` is what it says.

        Raises:
            BadInput: not 1 to as many layers as the model has.
            ModelNotFound, BadModel: nothing at the path, or trained for other weights.
        """
        if adapter is None:
            return cls(shallow(model, layers=layers), engine=engine, shared=model)
        from loci.lm.train import fingerprint, load_artifact

        artifact = load_artifact(adapter)
        if (found := fingerprint(model.model)) != artifact.base:
            raise BadModel(
                f"{artifact.name} was trained for {artifact.base_name} (weights {artifact.base[:12]}), and {model.name}"
                f" has weights {found[:12]}. Load {artifact.base_name}, or train it again for {model.name}."
            )
        try:
            draft = shallow(model, layers=int(artifact.settings["layers"]), own=True)
            own_part(draft).load_state_dict(artifact.tensors())
        except (KeyError, RuntimeError) as error:
            raise BadModel(f"{artifact.path} holds no draft model: {error}.") from error
        draft = replace(draft, name=artifact.name)
        return cls(draft, engine=engine, shared=model)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, target: LanguageModel | None = None, dtype: str = "auto", engine: str = "auto"
    ) -> DraftLM:
        """Any model with the target's tokens: a name or folder as for `loci.lm.load`.

        Raises:
            BadInput: another vocabulary or tokenizer than the target's.
        """
        from loci.lm.load import load

        draft = cls(load(name, dtype=dtype), engine=engine)
        if target is not None:
            draft.check(target)
        return draft

    def check(self, target: LanguageModel) -> None:
        """Raise BadInput unless the target has the same tokens."""
        if self.vocabulary != target.vocabulary:
            raise BadInput(
                f"{self.name} speaks {self.vocabulary:,} tokens and {target.name} {target.vocabulary:,}; a drafter"
                " needs the target's tokenizer."
            )
        mine, theirs = self.model.tokenizer, target.tokenizer
        if mine is not theirs and mine.get_vocab() != theirs.get_vocab():
            raise BadInput(
                f"{self.name} and {target.name} both have {self.vocabulary:,} tokens, but not the same ones; a drafter"
                " needs the target's tokenizer."
            )

    @property
    def room(self) -> int:
        """Tokens that still fit behind the text in this model's window."""
        return self.model.window - len(self.text)

    @property
    def read_bytes(self) -> int:
        """Bytes of the weights that one pass reads."""
        return sum(weight.nbytes for weight in self.model.model.parameters())

    @property
    def nbytes(self) -> int:
        own = {weight.data_ptr(): weight.nbytes for weight in self.model.model.parameters()}
        return sum(size for place, size in own.items() if place not in self._shared) + self.engine.nbytes

    def start(self, state: DraftState, prefill: PrefillResult) -> None:
        self.begin(state.tokens)

    def observe(self, result: StepResult) -> None:
        self.extend(result.committed)

    def begin(self, tokens: Sequence[int]) -> None:
        """Read a text from its start; what the cache holds of it already is not read again. The last token waits."""
        if not len(tokens):
            raise BadInput("a drafter needs at least one token to go on from.")
        self._drop()
        self.text = list(tokens)
        self._read()

    def extend(self, tokens: Sequence[int]) -> None:
        """The text goes on with these tokens. What of them the last draft foresaw is kept and not read again."""
        if not self._waiting:
            raise BadInput("a drafter was given tokens before it was begun.")
        known = 0
        if self._staged:
            node = len(self._waiting) - 1
            path = list(range(len(self._waiting)))
            for token in tokens[:-1] if len(tokens) else ():  # the last one waits in any case
                found = self._places.get((node, int(token)))
                if found is None:
                    break
                path.append(found)
                node, known = found, known + 1
            self.engine.commit([path])
            self._staged, self._waiting = False, []
        self._draft = None
        self.text.extend(int(token) for token in tokens)
        self._waiting.extend(int(token) for token in tokens[known:])

    def _read(self) -> None:
        self.engine.prefill([self.text], want=Needs())
        self._waiting, self._draft = [self.text[-1]], None

    def _drop(self) -> None:
        if self._staged:
            self._staged = False
            self.engine.commit([[]])

    def _clear(self, draft: Draft) -> None:
        self._draft = draft
        size = len(self._waiting)
        self._tokens, self._parents = list(self._waiting), list(range(-1, size - 1))
        self._places: dict[tuple[int, int], int] = {}  # parent and token: the node of the engine's tree
        self._node = {0: size - 1}  # of the draft: node of the engine's tree

    def logits(self, draft: Draft, nodes: Sequence[int]) -> Float32[np.ndarray, "node vocabulary"]:
        """Of the token after each of these nodes of a draft whose root is the last token of the text.

        Nodes with the same path are one to the model. Raises `BadInput` for a draft under another root, or for a node
        whose parent was not asked for before.
        """
        if not self._waiting or draft.tokens[0] != self.text[-1]:
            raise BadInput(f"a draft under the root {draft.tokens[0]} does not go on from the drafter's text.")
        if draft is not self._draft:
            if len(self._waiting) > _WAITING:
                self._drop()
                self._read()
            self._clear(draft)
        for node in nodes:
            if node in self._node:
                continue
            parent = self._node.get(draft.parents[node])
            if parent is None:
                raise BadInput(f"node {node} of a draft was asked for before its parent.")
            edge = (parent, draft.tokens[node])
            if edge not in self._places:
                self._places[edge] = len(self._tokens)
                self._tokens.append(edge[1])
                self._parents.append(parent)
            self._node[node] = self._places[edge]
        self._drop()
        tree = TokenTree(tokens=np.array(self._tokens, dtype=np.int32), parents=np.array(self._parents, dtype=np.int32))
        output = self.engine.step([tree], want=Needs())
        self._staged = True
        return np.stack([output.logits(0, self._node[node]) for node in nodes])

    def distribution(
        self, draft: Draft, nodes: Sequence[int], *, sampling: Sampling
    ) -> Float32[np.ndarray, "node vocabulary"]:
        return warped(self.logits(draft, nodes), sampling)


@runtime_checkable
class Heads(Protocol):
    """Heads that give a distribution for each depth from the target's last hidden state: row d is depth d + 1."""

    heads: int
    vocabulary: int

    def distributions(
        self, hidden: Float[Tensor, " width"], *, temperature: float = 1.0
    ) -> Float32[np.ndarray, "head vocabulary"]: ...

    @property
    def nbytes(self) -> int: ...


class HeadSource:
    """Heads as a source: every node of a depth has the same distribution, and a whole tree costs one pass over them.
    Before the first step of a text there is no hidden state, and nothing can be drafted (`horizon` is 0)."""

    needs = Needs(hidden=(-1,))

    def __init__(self, heads: Heads, *, name: str = "heads") -> None:
        self.heads, self.name, self.vocabulary = heads, name, int(heads.vocabulary)
        self._hidden: Tensor | None = None
        self._rows: tuple[Draft, Float32[np.ndarray, "head vocabulary"]] | None = None

    @property
    def horizon(self) -> int | None:
        return 0 if self._hidden is None else int(self.heads.heads)

    @property
    def nbytes(self) -> int:
        return int(self.heads.nbytes)

    def start(self, state: DraftState, prefill: PrefillResult) -> None:
        self._hidden = self._rows = None

    def observe(self, result: StepResult) -> None:
        if result.hidden is None:
            raise BadInput(f"{self.name} needs the hidden state of every node, and the engine gave none.")
        self._hidden, self._rows = result.hidden[-1, result.accepted[-1]].clone(), None

    def distribution(
        self, draft: Draft, nodes: Sequence[int], *, sampling: Sampling
    ) -> Float32[np.ndarray, "node vocabulary"]:
        if self._hidden is None:
            raise BadInput(f"{self.name} was asked for a draft before the target's first step.")
        if self._rows is None or self._rows[0] is not draft:
            rows = self.heads.distributions(self._hidden, temperature=sampling.temperature)
            if (sampling.top_p, sampling.top_k, sampling.min_p) != (1.0, 0, 0.0):
                with np.errstate(divide="ignore"):
                    rows = warped(np.log(rows), replace(sampling, temperature=1.0))
            self._rows = draft, rows
        return self._rows[1][[draft.depth(node) for node in nodes]]


def shallow(model: LanguageModel, *, layers: int, own: bool = False) -> LanguageModel:
    """A model of the first layers of another one. Nothing is copied unless `own`, which copies layers and final norm.

    Raises:
        BadInput: not 1 to as many layers as the model has.
        Unsupported: the layers are not where models of this kind have them.
    """
    from torch import nn

    whole: Any = model.model
    stack = getattr(whole.base_model, "layers", None)
    if not isinstance(stack, nn.ModuleList) or not hasattr(whole.base_model, "norm"):
        raise Unsupported(f"{model.name} ({type(whole).__name__}) keeps its layers in a way that is not known here.")
    if not 1 <= layers <= len(stack):
        raise BadInput(f"a draft model of {layers} layers was asked for; {model.name} has {len(stack)}.")
    config = copy.deepcopy(whole.config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    decoder, head = _same(whole.base_model), _same(whole)
    kept = [copy.deepcopy(layer) if own else layer for layer in stack[:layers]]
    decoder.config = head.config = config
    decoder.layers = nn.ModuleList(kept)
    if own:
        decoder.norm = copy.deepcopy(decoder.norm)
    setattr(head, whole.base_model_prefix, decoder)
    return replace(model, name=f"{model.name}, first {layers} layers", model=head)


def own_part(draft: LanguageModel) -> Any:
    """The parts of a shallow model that are trained, as one module: `layers` and `norm`."""
    from torch import nn

    decoder: Any = draft.model.base_model
    return nn.ModuleDict({"layers": decoder.layers, "norm": decoder.norm})


def _same(module: Any) -> Any:
    """Another module object over the same parts, whose parts can be exchanged."""
    twin = copy.copy(module)
    for table in ("_modules", "_parameters", "_buffers"):
        twin.__dict__[table] = dict(getattr(module, table))
    return twin
