"""Token Recycling: what the model ranked behind its choices, kept and tried again.

Source  Luo et al. 2025, "Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token
        Recycling", arXiv:2408.08696: the matrix of sections 3.1 and 3.2, k = 8, and the static tree of its appendix
        ("2.2.2", 80 nodes under the root).
Letters rank: place in a row of the matrix, 0 the best; path: the ranks from the root to a node.
Idea    row t of a matrix holds the k tokens that the model last found most probable after token t. The next draft is
        looked up in it, level by level, along a fixed template; the outputs of *all* nodes that were checked, accepted
        or not, overwrite its rows. Nothing is trained, and what one text taught serves the next.
Ours    the prompt's outputs fill rows too (`recycle_prompt`). Of several nodes with one token the last in the tree
        counts, except that accepted nodes are written last, so that a verified context wins; the official code leaves
        it to chance. A row that nothing was written to holds 0, 1, 2, ... where the official code has zeros: siblings
        differ, so the tree keeps its shape and its mask. Templates of 15 and 31 nodes are derived by `best_template`
        from counts on instructions, for processors on which 80 nodes are not free. `warm` fills the matrix once from
        contexts of one token.
Near    `prompt_lookup` knows longer contexts but only what the text itself holds. `blend` joins both and grows its tree
        by worth instead of along a template.
Cost    4 * k bytes per token of the vocabulary: 1.57 MB for 49,152.
"""

from __future__ import annotations

import json
import os
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int32

from loci.errors import BadInput, BadModel, ModelNotFound, UnknownName
from loci.lm.draft import DraftState, Law, Needs, PrefillResult, StepResult, TokenTree, TreeTemplate

if TYPE_CHECKING:
    from loci.lm.engine.base import StepEngine
    from loci.lm.model import LanguageModel

RANKS = 8  # k of the paper
_FORMAT = 1  # of saved matrices
_ROWS = 256  # contexts of one token that are run side by side in `warm`

UPDATES = ("all", "accepted", "none")
Path_ = tuple[int, ...]


def _paths(*words: str) -> tuple[Path_, ...]:
    """Paths from a compact notation: "12" is rank 1, then rank 2; "00-3" is 00, 01, 02, 03."""
    paths: list[Path_] = []
    for word in " ".join(words).split():
        first, _, last = word.partition("-")
        *stem, low = map(int, first)
        paths += [(*stem, rank) for rank in range(low, int(last or low) + 1)]
    return tuple(paths)


# Nodes under the root. "2.2.2" is the paper's; the others are `best_template` of the counts over 1,129 steps
# on instructions.
TEMPLATES: Mapping[str, TreeTemplate] = {
    "2.2.2": TreeTemplate(
        _paths(
            "0-7",
            "00-7 10-3 20-2 30-1 40 50 60 70",
            "000-7 010-2 020-1 030 040 050 060 070 100-1 110 200 300 400 500",
            "0000-4 0010-1 0020 0030 0040 0100 0200 1000 2000 3000",
            "00000-2 00010 00020 00100 01000 10000",
            "000000-1 000100",
        )
    ),
    "31": TreeTemplate(
        _paths("0-7", "00-4 10 20 30 40 50", "000-2 010 100 200", "0000-1 1000 2000", "00000 10000", "000000")
    ),
    "15": TreeTemplate(_paths("0-5", "00-1 10 20", "000 100", "0000 1000", "00000")),
}


class Table:
    """The matrix: for each token the tokens last ranked highest after it. Texts and threads may share one.

    Args:
        model: hash of the model's weights, which names whose matrix it is; "" where that is not known.
        ranked: rows to begin with instead of empty ones.
    """

    def __init__(
        self, vocabulary: int, *, k: int = RANKS, model: str = "", ranked: Int32[np.ndarray, "token rank"] | None = None
    ) -> None:
        if not 1 <= k <= vocabulary:
            raise BadInput(f"k is {k}; a row holds at least 1 and at most {vocabulary:,} tokens, the vocabulary.")
        if ranked is None:
            ranked = np.tile(np.arange(k, dtype=np.int32), (vocabulary, 1))
        elif ranked.shape != (vocabulary, k):
            raise BadInput(f"a matrix of the shape {ranked.shape} was given for {vocabulary:,} tokens and k = {k}.")
        elif ranked.min() < 0 or ranked.max() >= vocabulary:
            raise BadInput(f"the matrix names tokens outside the vocabulary of {vocabulary:,}.")
        self.ranked = ranked
        self.model = model
        self.lock = threading.Lock()
        self._flat = ranked.reshape(-1)  # the same memory

    @property
    def vocabulary(self) -> int:
        return len(self.ranked)

    @property
    def k(self) -> int:
        return int(self.ranked.shape[1])

    @property
    def nbytes(self) -> int:
        return self.ranked.nbytes

    def after(self, token: int) -> list[int]:
        """The ranked followers of a token; none where nothing was seen yet."""
        row: list[int] = self.ranked[token].tolist()
        return [] if row[0] == 0 and row[-1] == len(row) - 1 else row

    def write(
        self, tokens: Int32[np.ndarray, " node"], ranked: Int32[np.ndarray, "node rank"], last: Sequence[int] = ()
    ) -> None:
        """Overwrite the rows of these tokens. Of equal tokens the last one counts, the nodes in `last` after all."""
        with self.lock:
            self.ranked[tokens] = ranked
            if len(last):
                order = list(last)
                self.ranked[tokens[order]] = ranked[order]


class Shape:
    """A template laid out for looking up: one gather per layer."""

    def __init__(self, template: TreeTemplate, k: int) -> None:
        self.template = template
        widest = max((rank for path in template.ranks for rank in path), default=0)
        if widest >= k:
            raise BadInput(f"the template uses rank {widest}; a row of the matrix holds the ranks 0 to {k - 1}.")
        order, parents = template.order, template.shape.parents
        depths = np.array([len(path) for path in order])
        self.layers: list[tuple[slice, Int32[np.ndarray, " node"], Int32[np.ndarray, " node"]]] = []
        for depth in range(1, int(depths.max()) + 1):
            nodes = np.flatnonzero(depths == depth)
            ranks = np.array([order[node][-1] for node in nodes], dtype=np.int32)
            self.layers.append((slice(int(nodes[0]), int(nodes[-1]) + 1), parents[nodes], ranks))

    def fill(self, table: Table, root: int) -> Int32[np.ndarray, " node"]:
        """The template's tokens under this root."""
        tokens = np.empty(self.template.size, dtype=np.int32)
        tokens[0] = root
        with table.lock:
            for nodes, parents, ranks in self.layers:
                tokens[nodes] = table._flat[tokens[parents] * table.k + ranks]
        return tokens

    @cached_property
    def nbytes(self) -> int:
        return self.template.shape.parents.nbytes + sum(
            parents.nbytes + ranks.nbytes for _, parents, ranks in self.layers
        )


class TokenRecycling:
    """Drafts from a `Table` along a template.

    Args:
        vocabulary: rows of the model's output layer.
        k: tokens kept per row.
        template: "auto" takes the largest of `TEMPLATES` that the budget holds, and cuts the smallest where none fits;
            or a name in `TEMPLATES`, or a template of your own. Whatever exceeds the budget of a step is cut.
        recycle_prompt: also keep what the model ranked behind the prompt's tokens. The whole prompt's outputs are then
            computed, which makes reading it slower by the output layer's share.
        table: the matrix to read and write; a new one unless given.
        update: which nodes are written back; "accepted" and "none" exist to show what the others are worth.
        name: how statistics call it.
    """

    law: Law = "point"

    def __init__(
        self,
        vocabulary: int,
        *,
        k: int = RANKS,
        template: str | TreeTemplate = "auto",
        recycle_prompt: bool = True,
        table: Table | None = None,
        update: str = "all",
        name: str = "recycle",
    ) -> None:
        if table is not None and (table.vocabulary, table.k) != (vocabulary, k):
            raise BadInput(
                f"the matrix has {table.vocabulary:,} rows of {table.k}; the model has {vocabulary:,} tokens and k is"
                f" {k}. Use the matrix of this model, or start a new one."
            )
        if isinstance(template, str) and template != "auto" and template not in TEMPLATES:
            raise UnknownName.among("template", template, ["auto", *TEMPLATES])
        if update not in UPDATES:
            raise UnknownName.among("way to update", update, UPDATES)
        self.name = name
        self.table = table if table is not None else Table(vocabulary, k=k)
        self.template = template
        self.recycle_prompt = recycle_prompt
        self.update = update
        self.needs = Needs(topk=k, prefill=recycle_prompt)
        self.hit_counts: Counter[Path_] = Counter()  # how often the node at each path was accepted
        self.offer_counts: Counter[Path_] = Counter()  # how often it was offered
        self._shapes: dict[int | str, Shape] = {}
        self._drafted: tuple[TokenTree, Shape] | None = None
        if not isinstance(template, str) or template != "auto":
            self._shape(2**31)  # refuses a template that does not fit, now

    @classmethod
    def warm(
        cls,
        model: LanguageModel,
        *,
        engine: StepEngine | None = None,
        k: int = RANKS,
        template: str | TreeTemplate = "auto",
        recycle_prompt: bool = True,
        keep: bool = True,
    ) -> TokenRecycling:
        """A drafter whose matrix holds what the model ranks after every single token, at position 0.

        Args:
            engine: runs the contexts; one that runs many rows at once, else an engine of `transformers`.
            keep: take the matrix from the user's cache if it is there, and leave it there. It is made in about half a
                minute on two cores.
        """
        file = warm_file(model, k=k)
        if keep and file.is_file():
            table = load_table(file, model=model)
        else:
            table = single_token_table(model, engine=engine, k=k)
            if keep:
                save_table(table, file)
        return cls(model.vocabulary, k=k, template=template, recycle_prompt=recycle_prompt, table=table)

    def save(self, path: str | Path) -> None:
        """Keep the matrix as a file of numpy's, whole or not at all."""
        save_table(self.table, Path(path))

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        model: LanguageModel,
        template: str | TreeTemplate = "auto",
        recycle_prompt: bool = True,
    ) -> TokenRecycling:
        """A drafter that goes on from a saved matrix.

        Raises:
            ModelNotFound: no such file.
            BadModel: the file is no matrix, or it belongs to another vocabulary or other weights.
        """
        table = load_table(Path(path), model=model)
        return cls(table.vocabulary, k=table.k, template=template, recycle_prompt=recycle_prompt, table=table)

    @property
    def nbytes(self) -> int:
        return self.table.nbytes + sum(shape.nbytes for shape in self._shapes.values())

    def start(self, state: DraftState, prefill: PrefillResult) -> None:
        self._drafted = None
        ids = prefill.topk_ids
        if self.recycle_prompt and self.update != "none" and ids is not None and len(ids):
            fed = prefill.tokens[prefill.start : prefill.start + len(ids)]
            self.table.write(np.array(fed, dtype=np.int32), ids[:, : self.table.k])

    def propose(self, state: DraftState) -> TokenTree:
        root = int(state.tokens[-1])
        if state.budget < 2:
            return TokenTree.root(root)
        shape = self._shape(state.budget)
        tree = TokenTree.from_template(shape.template, shape.fill(self.table, root).tolist())
        self._drafted = (tree, shape)
        return tree

    def observe(self, result: StepResult) -> None:
        if self._drafted is not None and self._drafted[0] is result.tree:
            order = self._drafted[1].template.order
            self.offer_counts.update(order[1:])
            self.hit_counts.update(order[node] for node in result.accepted[1:])
        self._drafted = None
        if self.update == "none":
            return
        if result.topk_ids is None or result.topk_ids.shape[1] < self.table.k:
            raise BadInput(f"{self.name} needs the {self.table.k} most probable tokens of every node; it got fewer.")
        tokens, ranked = result.tree.tokens, result.topk_ids[:, : self.table.k]
        if self.update == "accepted":
            nodes = list(result.accepted)
            self.table.write(tokens[nodes], ranked[nodes])
        elif result.tree.kind is None:
            self.table.write(tokens, ranked, last=result.accepted)
        else:  # the last nodes are written last: put the accepted ones behind the others, probes left out
            nodes = [*np.flatnonzero(~result.tree.is_probe).tolist(), *result.accepted]
            self.table.write(tokens[nodes], ranked[nodes])

    def after(self, token: int) -> Sequence[int]:
        """The ranked followers of any token: what `blend` grows its tree with."""
        return self.table.after(token)

    def _shape(self, budget: int) -> Shape:
        """The template for a budget of nodes, laid out; made once per size."""
        if isinstance(self.template, TreeTemplate):
            key: int | str = min(budget, self.template.size)
            whole = self.template
        elif self.template == "auto":
            name = next((name for name, known in TEMPLATES.items() if known.size <= budget), "15")
            whole = TEMPLATES[name]
            key = f"{name}/{min(budget, whole.size)}"
        else:
            whole = TEMPLATES[self.template]
            key = min(budget, whole.size)
        found = self._shapes.get(key)
        if found is None:
            cut = whole if whole.size <= budget else TreeTemplate(_cut(whole, budget - 1))
            found = self._shapes[key] = Shape(cut, self.table.k)
        return found


def _cut(template: TreeTemplate, nodes: int) -> tuple[Path_, ...]:
    """So many of the template's paths, those with the lowest ranks and depths: what a step has room for."""
    cheapest = sorted(template.ranks, key=lambda path: (len(path) + sum(path), len(path), path))
    return tuple(cheapest[:nodes])


def best_template(
    hit_counts: Mapping[Path_, int], nodes: int, *, offered: Mapping[Path_, int] | None = None
) -> TreeTemplate:
    """The tree whose paths came true most often. It may be smaller than asked for where nothing else ever did.

    Args:
        hit_counts: how often the node at each path was accepted.
        nodes: under the root.
        offered: how often it was there to be accepted; the same for all paths unless given.

    A path was hit no more often than the path that leads to it, so the best `nodes` paths are a tree.

    Raises:
        BadInput: fewer than one node, or counts in which a path was hit more often than its parent.
    """
    if nodes < 1:
        raise BadInput(f"a template has at least 1 node under its root; {nodes} were asked for.")
    shares = {
        path: hits / (max(1, offered[path]) if offered is not None else 1) for path, hits in hit_counts.items() if hits
    }
    if any(len(path) > 1 and shares.get(path[:-1], 0.0) < share for path, share in shares.items()):
        raise BadInput("a path was hit more often than its parent; counts must come from whole trees.")
    ranking = sorted(shares, key=lambda path: (-shares[path], len(path), path))
    return TreeTemplate(tuple(sorted(ranking[:nodes], key=lambda path: (len(path), path))))


def count_hits(
    model: LanguageModel,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    engine: str | StepEngine = "auto",
    progress: Callable[[str, int, int], None] | None = None,
) -> TokenRecycling:
    """Answer prompts with the paper's template; its `hit_counts` and `offer_counts` then tell what each path is worth.

    The shipped templates are `best_template` of the counts on the prompts of `distill.read_instructions`, which are not
    those that anything is measured on: `loci draft tune recycle`.
    """
    from loci.lm.chat import Message
    from loci.lm.generate import generate

    drafter = TokenRecycling(model.vocabulary, template="2.2.2")
    for place, prompt in enumerate(prompts):
        if progress is not None:
            progress("answering", place, len(prompts))
        generate(
            model,
            [Message(role="user", content=prompt)],
            max_new_tokens=max_new_tokens,
            drafter=drafter,
            engine=engine,
            max_nodes=TEMPLATES["2.2.2"].size,
        )
    return drafter


def written(template: TreeTemplate) -> str:
    """A template in the compact notation of this module: `0-4 00-1 10` is 0, 1, 2, 3, 4, 00, 01, 10."""
    words: list[str] = []
    order = list(template.order[1:])
    while order:
        first = last = order.pop(0)
        while order and order[0] == (*last[:-1], last[-1] + 1):
            last = order.pop(0)
        stem = "".join(map(str, first))
        words.append(stem if first == last else f"{stem}-{last[-1]}")
    return " ".join(words)


def single_token_table(model: LanguageModel, *, engine: StepEngine | None = None, k: int = RANKS) -> Table:
    """A matrix of what the model ranks after every single token, each read alone at position 0."""
    if engine is None or not engine.capabilities.batch:
        from loci.lm.engine.hf import HFEngine

        engine = HFEngine(model)
    rows = _ROWS if engine.capabilities.batch else 1
    table = Table(model.vocabulary, k=k, model=model.hash)
    want = Needs(topk=k)
    for first in range(0, model.vocabulary, rows):
        tokens = list(range(first, min(first + rows, model.vocabulary)))
        engine.prefill([[token] for token in tokens], want=want)
        output = engine.step([TokenTree.root(token) for token in tokens], want=want)
        for row, token in enumerate(tokens):
            top = output.topk(row)
            if top is None:
                raise BadInput(f"the engine {engine.name} does not give the most probable tokens.")
            table.ranked[token] = top[0][0]
        engine.commit([[]] * len(tokens))
    engine.reset()
    return table


def warm_file(model: LanguageModel, *, k: int = RANKS) -> Path:
    """Where the user's cache keeps the matrix of single-token contexts for these weights."""
    from loci import settings

    return settings.cache() / "recycling" / f"{model.hash[:16]}-{k}.npz"


def save_table(table: Table, path: Path) -> None:
    """Write a matrix, whole or not at all."""
    about = {"format": _FORMAT, "model": table.model, "vocabulary": table.vocabulary, "k": table.k}
    part = path.with_name(f"{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with table.lock, part.open("wb") as stream:
            np.savez_compressed(stream, ranked=table.ranked, about=np.array(json.dumps(about)))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load_table(path: Path, *, model: LanguageModel) -> Table:
    """Read a matrix that belongs to this model. Raises as `TokenRecycling.load` does."""
    if not path.is_file():
        raise ModelNotFound(f"there is no recycling matrix at {path}. `TokenRecycling.save` writes one.")
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as held:
            about = json.loads(str(held["about"]))
            ranked = np.ascontiguousarray(held["ranked"])
        found, vocabulary, k = str(about["model"]), int(about["vocabulary"]), int(about["k"])
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise BadModel(f"{path} is no recycling matrix: {error}. Delete it; a new one is learned.") from error
    if vocabulary != model.vocabulary:
        raise BadModel(f"{path} is for {vocabulary:,} tokens; {model.name} has {model.vocabulary:,}.")
    if found != model.hash:
        raise BadModel(
            f"{path} belongs to the weights {found[:12] or 'of no name'}; {model.name} has {model.hash[:12]}. Delete"
            " it, or load the model that it was learned from."
        )
    if ranked.dtype != np.int32 or ranked.shape != (vocabulary, k):
        raise BadModel(f"{path} holds {ranked.dtype} {ranked.shape}; expected int32 ({vocabulary}, {k}). Delete it.")
    try:
        return Table(vocabulary, k=k, model=found, ranked=ranked)
    except BadInput as error:
        raise BadModel(f"{path} is damaged: {error} Delete it.") from error
