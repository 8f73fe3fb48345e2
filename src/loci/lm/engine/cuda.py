"""Llama-family models on a CUDA device: steps of fixed shapes, each recorded once and replayed.

Letters  bucket: the number of nodes that a step is filled up to; places: slots of the cache.
Source   CUDA graphs: one launch instead of some four hundred. A step of a small model is bound by its launches.
Ours     a recording is kept for each bucket, number of rows and size of the cache. The mask is made on the device from
         the trees' ancestors, one 64-bit word a node; attention always runs over all slots, masked. A step sends one
         array of whole numbers to the device and, decoding greedily, fetches one token a node.

Everything but the recording also runs on the processor, where it is tested.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from loci.lm.draft import TokenTree
from loci.lm.engine import packed
from loci.lm.engine.base import Injection, kept
from loci.lm.engine.output import best
from loci.lm.engine.packed import Packed, Places, Ran, SlotEngine, attention, low, mask_rows
from loci.lm.engine.slots import SlotCache
from loci.lm.model import LanguageModel

# Nodes that a step is filled up to; the last is the largest tree, the bits of a word.
BUCKETS = (1, 8, 16, 32, 64)
# Runs before a recording, so that kernels are chosen and their workspaces are made.
WARM = 3

# scores, best tokens, wanted layers
Results = tuple[Tensor, Tensor, tuple[Tensor, ...]]


class Step:
    """The work of one step over fixed shapes, eager or recorded. All its inputs lie in buffers of its own.

    Args:
        wanted: layers whose inputs are handed out.
    """

    def __init__(self, weights: Packed, rows: int, nodes: int, wanted: Sequence[int]) -> None:
        self.weights, self.rows, self.nodes, self.wanted = weights, rows, nodes, tuple(wanted)
        tokens, device = rows * nodes, weights.device
        self.hidden = torch.zeros(tokens, weights.width, dtype=weights.dtype, device=device)
        self.cosines = torch.zeros(tokens, 1, weights.size, dtype=weights.dtype, device=device)
        self.sines = torch.zeros_like(self.cosines)
        self.places = torch.zeros(rows, nodes, dtype=torch.long, device=device)
        self.ancestors = torch.zeros(rows, nodes, dtype=torch.long, device=device)
        self._replay: Callable[[], Results] | None = None

    def run(self, cache: SlotCache, pool: Any, injections: Sequence[tuple[Injection, Places]]) -> Results:
        """The results; a recording's are overwritten by its next run. What injections overwrite differs from step to
        step, so such steps are not recorded."""
        if injections or self.hidden.device.type != "cuda":
            return self._work(cache, injections)
        if self._replay is None:
            self._replay = self._record(cache, pool)
        return self._replay()

    def _work(self, cache: SlotCache, injections: Sequence[tuple[Injection, Places]] = ()) -> Results:
        weights = self.weights
        shape = (self.rows, self.nodes, -1, weights.size)
        mask = mask_rows(self._mask(cache.slots), weights.heads // weights.groups)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            cache.write_at(layer, key.view(shape), value.view(shape), self.places)
            return attention(query.view(shape), cache.keys[layer], cache.values[layer], mask, scaling=weights.scaling)

        states, found = weights.run(
            self.hidden, (self.cosines, self.sines), attend, wanted=self.wanted, injections=injections
        )
        scores = weights.head(states).view(self.rows, self.nodes, -1)
        layers = tuple(found[layer].view(self.rows, self.nodes, -1) for layer in self.wanted)
        return scores, best(scores), layers

    def _mask(self, count: int) -> Float[Tensor, "row 1 node slot"]:
        """Each node sees what lies before its row's root, and its ancestors by their bits."""
        slots = torch.arange(count, device=self.places.device)
        behind = (slots - self.places[:, :1])[:, None]  # (row, 1, slot): the node whose slot this is, if not negative
        bit = (self.ancestors[:, :, None] >> behind.clamp(0, 63)) & 1
        return low((behind < 0) | ((behind < self.nodes) & (bit == 1)), self.weights.dtype)[:, None]

    def _record(self, cache: SlotCache, pool: Any) -> Callable[[], Results]:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM):
                self._work(cache)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            results = self._work(cache)

        def replay() -> Results:
            graph.replay()
            return results

        return replay


class Workspace:
    """A cache and the recordings over it. An engine has one to itself and hands it to the next engine over the same
    weights when it is gone: nothing is recorded twice."""

    def __init__(self, weights: Packed) -> None:
        self.weights = weights
        self.cache = weights.cache()
        self.pool = torch.cuda.graph_pool_handle() if weights.device.type == "cuda" else None
        self._steps: dict[tuple[int, int, tuple[int, ...]], Step] = {}
        self._over: tuple[object, ...] = ()  # the buffers that the recordings read and write

    def step(self, rows: int, nodes: int, wanted: tuple[int, ...]) -> Step:
        """The step of these shapes over the cache as it lies now."""
        keys = self.cache.keys
        over = (keys.data_ptr(), keys.stride(), keys.shape)
        if over != self._over:
            self._steps, self._over = {}, over
        key = (rows, nodes, wanted)
        if key not in self._steps:
            self._steps[key] = Step(self.weights, rows, nodes, wanted)
        return self._steps[key]


class CudaEngine(SlotEngine):
    """A `StepEngine` for CUDA devices; see `supports`. Trees have at most 64 nodes.

    Raises:
        Unsupported: the model is made of parts that `packed` does not know.
    """

    name = "cuda"

    def __init__(self, language_model: LanguageModel, weights: Packed | None = None) -> None:
        weights = weights or packed.weights_of(language_model)
        idle: list[Workspace] = kept(language_model, "cuda", list)
        fitting = [space for space in idle if space.weights is weights]
        idle[:] = fitting[1:]
        self._space = fitting[0] if fitting else Workspace(weights)
        self._space.cache.begin(1)
        super().__init__(language_model, weights, max_nodes=BUCKETS[-1], cache=self._space.cache)
        weakref.finalize(self, _return, idle, self._space)

    def _exchange(self, weights: Packed) -> None:
        self._space = Workspace(weights)
        self.weights, self.cache, self._tokens = weights, self._space.cache, []

    def _run(self, trees: Sequence[TokenTree], size: int, wanted: Sequence[int]) -> Ran:
        rows, nodes = len(trees), next(bucket for bucket in BUCKETS if bucket >= size)
        self.cache.stage(nodes)
        step = self._space.step(rows, nodes, tuple(wanted))
        self._fill(step, trees)
        scores, winners, layers = step.run(self.cache, self._space.pool, self._places(trees, nodes))
        # Copies: a recording writes its results to the same place every time.
        return Ran(
            scores[:, :size].clone(),
            {layer: part[:, :size].clone() for layer, part in zip(wanted, layers, strict=True)},
            winners[:, :size].clone(),
        )

    def _fill(self, step: Step, trees: Sequence[TokenTree]) -> None:
        """Bring the trees into the step's buffers; padding sees the past and itself."""
        nodes = step.nodes
        sent = np.zeros((3, step.rows, nodes), dtype=np.int64)  # tokens, positions, ancestors
        for row, (tree, length) in enumerate(zip(trees, self.cache.lengths, strict=True)):
            sent[0, row, : tree.size] = tree.tokens
            sent[1, row, : tree.size] = length + tree.depth
            sent[2, row] = np.left_shift(np.int64(1), np.arange(nodes, dtype=np.int64))
            sent[2, row, : tree.size] = ancestor_bits(tree)
        np.maximum(sent[0], 0, out=sent[0])  # probes carry -1
        ids, positions, ancestors = torch.from_numpy(sent).to(step.hidden.device)
        step.hidden.copy_(self.weights.embed(ids.flatten()))
        for row, tree in enumerate(trees):
            if tree.embeds is not None:
                places = torch.from_numpy(row * nodes + np.flatnonzero(tree.is_probe)).to(step.hidden.device)
                step.hidden[places] = torch.from_numpy(tree.embeds).to(step.hidden)
        cosines, sines = self.weights.rotary.at(positions.flatten())
        step.cosines.copy_(cosines)
        step.sines.copy_(sines)
        step.ancestors.copy_(ancestors)
        # The root stands at its position; its row's nodes lie behind it in their order.
        step.places.copy_(positions[:, :1] + torch.arange(nodes, device=positions.device))


def _return(idle: list[Workspace], space: Workspace) -> None:
    if not idle:  # one is enough for calls that follow one another; more would only hold memory
        idle.append(space)


def ancestor_bits(tree: TokenTree) -> Int64[np.ndarray, " node"]:
    """Bit j of word i is set where node i attends to node j; at most 64 nodes."""
    weights = np.left_shift(np.uint64(1), np.arange(tree.size, dtype=np.uint64))
    words: Int64[np.ndarray, " node"] = (tree.ancestors * weights).sum(axis=1, dtype=np.uint64).view(np.int64)
    return words


def supports(language_model: LanguageModel) -> str:
    """Why this engine cannot run a model; empty if it can."""
    return packed.supports(language_model)
