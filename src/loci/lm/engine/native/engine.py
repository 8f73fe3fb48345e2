"""The native engine: one step over token trees in compiled code, weights kept in the blocks of the model's file.

Source  the layout and figures are this project's; the softmax that runs page by page is Milakov and Gimelshein 2018,
        arXiv:1805.02867.
Ours    a step is one call: all rows' nodes go through each product together, attention is row by row over pages of 128
        slots, the best tokens of each node are found while the head passes by. States, norms, softmax and logits are
        float32, inputs of products bfloat16. What a node gets does not depend on the nodes beside it, to the bit: the
        order of slots alone matters.
        The cache knows no lengths: every call says where its past ends. So an interrupted step leaves nothing behind.

Letters  row, node, past: as in `loci.lm.engine.base`. level: the instruction set of the kernels.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor

from loci.errors import BadInput, UnknownName, Unsupported
from loci.lm.draft import Needs, PrefillResult, TokenTree
from loci.lm.engine.base import Capabilities, Injection, check_injections, probe_chains
from loci.lm.engine.native import library, weights
from loci.lm.engine.native.library import InjectionRecord, StepRecord
from loci.lm.model import LanguageModel

# Tokens of a prompt that go through the model together: each block of weights is expanded once for all of them, and
# their activations stay in the second-level cache. Ours, by measurement (128 to 512).
CHUNK = 256
# Nodes of a row's tree and of a step: bounds of the masks and the logits held.
MAX_NODES = 256
MAX_STEP = 4096


class Output:
    """One step's outputs. The logits stay in the engine's buffer as long as this lives, then the next step takes it."""

    def __init__(
        self,
        logits: Float32[np.ndarray, "stored vocabulary"],
        ids: Int32[np.ndarray, "all rank"],
        best: Float32[np.ndarray, "all rank"],
        hidden: Float32[np.ndarray, "layer all width"] | None,
        sizes: Sequence[int],
        ranks: int,
    ) -> None:
        self._logits, self._ids, self._best, self._hidden, self._ranks = logits, ids, best, hidden, ranks
        self._sizes = tuple(sizes)
        self._first = np.concatenate([[0], np.cumsum(self._sizes)]).tolist()

    def logits(self, row: int, node: int) -> Float32[np.ndarray, " vocabulary"]:
        return np.array(self._logits[self._place(row, node)])

    def best(self) -> Int64[np.ndarray, "row node"]:
        table = np.zeros((len(self._sizes), max(self._sizes)), dtype=np.int64)
        for row, size in enumerate(self._sizes):
            table[row, :size] = self._ids[self._first[row] : self._first[row + 1], 0]
        return table

    def topk(self, row: int) -> tuple[Int32[np.ndarray, "node rank"], Float32[np.ndarray, "node rank"]] | None:
        if not self._ranks:
            return None
        nodes = slice(self._first[row], self._first[row + 1])
        return self._ids[nodes], self._best[nodes]

    def hidden(self, row: int) -> Float[Tensor, "layer node width"] | None:
        if self._hidden is None:
            return None
        return torch.from_numpy(self._hidden[:, self._first[row] : self._first[row + 1]])

    def _place(self, row: int, node: int) -> int:
        if not (0 <= row < len(self._sizes) and 0 <= node < self._sizes[row]):
            raise BadInput(f"the step has no node {node} in row {row}.")
        return int(self._first[row]) + node


class NativeEngine:
    """A `StepEngine` over a loaded model of the Llama family.

    Args:
        threads: of the step; torch's own number unless given. They sleep when a session rests and are never pinned.
        kernel: the instruction set: "scalar", "avx2", "avx512", "amx", or "auto", the fastest that works here.
        gguf: the file that the model came from, for models other than the bundled one.

    An engine serves one caller at a time; several engines may share a model and run side by side.

    Raises:
        Unsupported: the library is not available, or the model is not one that it can run.
        UnknownName: no such kernel.
    """

    name = "native"

    def __init__(
        self,
        language_model: LanguageModel,
        *,
        threads: int | None = None,
        kernel: str = "auto",
        gguf: Path | None = None,
    ) -> None:
        why = weights.why_not(language_model)
        if why:
            raise Unsupported(f"the native engine cannot run {language_model.name}: {why}.")
        if kernel not in ("auto", *library.LEVELS):
            raise UnknownName.among("kernel", kernel, ("auto", *library.LEVELS))
        available = library.levels()
        if kernel not in ("auto", *available):
            raise Unsupported(f"this machine has no {kernel} kernels, only {', '.join(available)}.")
        self.kernel = available[-1] if kernel == "auto" else kernel
        self.threads = torch.get_num_threads() if threads is None else threads
        self.weights = weights.weights_of(language_model, gguf=gguf)
        self.sizes = self.weights.sizes
        self.capabilities = Capabilities(max_nodes=MAX_NODES, batch=True, hidden=True, hooks=True)
        self._library = library.load()
        handle = ctypes.c_void_p()
        level = library.LEVELS.index(self.kernel)
        library.check(self._library.loci_session_new(self.weights.handle, level, self.threads, ctypes.byref(handle)))
        self._handle = handle
        weakref.finalize(self, _free, self._library, handle, self.weights)  # the weights outlive the session
        self._tokens: list[list[int]] = []
        self._staged: tuple[TokenTree, ...] = ()
        self._injections: tuple[Injection, ...] = ()
        self._buffers: list[tuple[Float32[np.ndarray, "node vocabulary"], weakref.ref[Output] | None]] = []

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(map(len, self._tokens))

    @property
    def nbytes(self) -> int:
        return int(self._library.loci_session_bytes(self._handle))

    def reset(self) -> None:
        self._tokens, self._staged = [], ()
        library.check(self._library.loci_session_rows(self._handle, 0))

    def prefill(self, prompts: Sequence[Sequence[int]], *, want: Needs) -> list[PrefillResult]:
        if not prompts or any(not len(prompt) for prompt in prompts):
            raise BadInput("a prompt has at least one token.")
        common = 0
        if len(prompts) == 1 and len(self._tokens) == 1 and not self._staged:
            known, prompt = self._tokens[0], prompts[0]
            while common < min(len(known), len(prompt) - 1) and known[common] == prompt[common]:
                common += 1
        if common:
            self._tokens = [self._tokens[0][:common]]
            library.check(self._library.loci_session_trim(self._handle, 0, common))
        else:
            self.reset()
            library.check(self._library.loci_session_rows(self._handle, len(prompts)))
            self._tokens = [[] for _ in prompts]
        asked = want if want.prefill else Needs()
        return [self._feed(row, list(prompt), common, asked) for row, prompt in enumerate(prompts)]

    def _feed(self, row: int, prompt: list[int], start: int, want: Needs) -> PrefillResult:
        """Feed a row's prompt from `start` on, piece by piece; what was fed is past at once."""
        pieces = []
        for first in range(start, len(prompt) - 1, CHUNK):
            piece = prompt[first : min(first + CHUNK, len(prompt) - 1)]
            trees: list[TokenTree | None] = [None] * len(self._tokens)
            trees[row] = TokenTree.chain(piece)
            pieces.append(self._run(trees, ranks=want.topk, layers=want.hidden, scores=False))
            self._tokens[row].extend(piece)
        if not pieces or not (want.topk or want.hidden):
            return PrefillResult(tokens=tuple(prompt), start=start)
        tops = [top for piece in pieces if (top := piece.topk(row)) is not None]
        hidden = [layers for piece in pieces if (layers := piece.hidden(row)) is not None]
        return PrefillResult(
            tokens=tuple(prompt),
            start=start,
            topk_ids=np.concatenate([ids for ids, _ in tops]) if tops else None,
            topk_logits=np.concatenate([logits for _, logits in tops]) if tops else None,
            hidden=torch.cat(hidden, dim=1) if hidden else None,
        )

    def step(self, trees: Sequence[TokenTree], *, want: Needs) -> Output:
        if len(trees) != len(self._tokens):
            raise BadInput(f"{len(trees)} trees were given for {len(self._tokens)} rows.")
        if self._staged:
            raise BadInput("the last step's nodes are neither kept nor dropped; call commit first.")
        size = max(tree.size for tree in trees)
        if size > MAX_NODES:
            raise Unsupported(f"a tree of {size} nodes cannot be checked: trees have at most {MAX_NODES} nodes here.")
        output = self._run(trees, ranks=max(1, want.topk), layers=want.hidden, scores=True, topk=want.topk)
        self._staged = tuple(trees)
        return output

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        trees = self._staged
        if len(paths) != len(trees):
            raise BadInput(f"{len(paths)} paths were given for a step of {len(trees)} rows.")
        for path, tree in zip(paths, trees, strict=True):
            steps = list(path)
            if any(not 0 <= node < tree.size for node in steps) or steps != sorted(set(steps)):
                raise BadInput(f"the path {steps} does not lead down a tree of {tree.size} nodes.")
        self._staged = ()
        for row, (path, tree) in enumerate(zip(paths, trees, strict=True)):
            nodes = np.asarray(path, dtype=np.int32)
            if not np.array_equal(nodes, np.arange(len(nodes))):
                past = len(self._tokens[row])
                library.check(self._library.loci_session_move(self._handle, row, past, nodes.ctypes.data, len(nodes)))
            self._tokens[row].extend(tree.tokens[nodes].tolist())

    def keep(self, rows: Sequence[int]) -> None:
        if list(rows) == list(range(len(self._tokens))):
            return
        if self._staged:
            raise BadInput("the last step's nodes are neither kept nor dropped; call commit first.")
        order = np.array(rows, dtype=np.int32)
        library.check(self._library.loci_session_keep(self._handle, order.ctypes.data, len(order)))
        self._tokens = [self._tokens[row] for row in rows]

    def inject(self, injections: Sequence[Injection]) -> None:
        check_injections(injections, layers=self.sizes.layers, width=self.sizes.width)
        self._injections = tuple(injections)

    def _run(
        self, trees: Sequence[TokenTree | None], *, ranks: int, layers: tuple[int, ...], scores: bool, topk: int = 0
    ) -> Output:
        """One call of the library. A row without a tree takes no part."""
        sizes = [0 if tree is None else tree.size for tree in trees]
        total, given = sum(sizes), [tree for tree in trees if tree is not None]
        if total > MAX_STEP:
            raise Unsupported(f"a step of {total} nodes is too large: it has at most {MAX_STEP}, all rows together.")
        nodes, past = np.array(sizes, dtype=np.int32), np.array(self.lengths, dtype=np.int32)
        tokens = np.concatenate([tree.tokens for tree in given]).astype(np.int32, copy=False)
        parents = np.concatenate([tree.parents for tree in given]).astype(np.int32, copy=False)
        probes = [tree.embeds for tree in given if tree.embeds is not None]
        embeds = (
            np.concatenate(probes).astype(np.float32, copy=False)
            if probes
            else np.zeros((0, self.sizes.width), np.float32)
        )
        if embeds.shape[1] != self.sizes.width:
            raise BadInput(f"probes have {embeds.shape[1]} numbers; this model's states have {self.sizes.width}.")
        wanted = [layer if layer >= 0 else layer + self.sizes.layers + 1 for layer in layers]
        unique = np.array(sorted(set(wanted)), dtype=np.int32)
        hidden = np.empty((len(unique), total, self.sizes.width), dtype=np.float32)
        ids, best = np.empty((total, ranks), dtype=np.int32), np.empty((total, ranks), dtype=np.float32)
        logits = self._buffer(total) if scores else np.empty((0, self.sizes.vocabulary), dtype=np.float32)
        cosines, sines = self.weights.angles(int((past + nodes).max()))
        injections, alive = self._records(trees)
        record = StepRecord(
            rows=len(trees),
            nodes=nodes.ctypes.data,
            past=past.ctypes.data,
            tokens=tokens.ctypes.data,
            parents=parents.ctypes.data,
            embeds=embeds.ctypes.data,
            embed_count=len(embeds),
            cosines=cosines.ctypes.data,
            sines=sines.ctypes.data,
            positions=len(cosines),
            hidden_count=len(unique),
            hidden_layers=unique.ctypes.data,
            hidden=hidden.ctypes.data,
            ranks=ranks,
            top_ids=ids.ctypes.data,
            top_logits=best.ctypes.data,
            logits=logits.ctypes.data if scores else None,
            injection_count=len(injections),
            injections=injections,
        )
        library.check(self._library.loci_session_step(self._handle, ctypes.byref(record)))
        del alive  # matrices that only the record pointed to
        if layers and wanted != unique.tolist():
            hidden = hidden[np.searchsorted(unique, wanted)]
        output = Output(logits, ids, best, hidden if layers else None, sizes, topk or (0 if scores else ranks))
        if scores:
            self._buffers[-1] = (self._buffers[-1][0], weakref.ref(output))
        return output

    def _buffer(self, nodes: int) -> Float32[np.ndarray, "node vocabulary"]:
        """Room for a step's logits: that of an output that nobody holds any more, else fresh. It becomes the last."""
        free = [place for place, (_, user) in enumerate(self._buffers) if user is None or user() is None]
        for place in free:
            if len(self._buffers[place][0]) >= nodes:
                self._buffers.append(self._buffers.pop(place))
                return self._buffers[-1][0][:nodes]
        # Those in use belong to their outputs, and those that are free are too small.
        self._buffers = [self._buffers[place] for place in range(len(self._buffers)) if place not in free][-2:]
        self._buffers.append((np.empty((max(16, nodes), self.sizes.vocabulary), dtype=np.float32), None))
        return self._buffers[-1][0][:nodes]

    def _records(self, trees: Sequence[TokenTree | None]) -> tuple[Any, list[Any]]:
        """The injections of a step's probes for the library, and what must live as long as they do."""
        records, alive, first = [], [], 0
        for tree in trees:
            if tree is not None and self._injections and tree.is_probe.any():
                for node, number, source in zip(*probe_chains(tree), strict=True):
                    if number > len(self._injections):
                        continue
                    injection = self._injections[number - 1]
                    weight = injection.weight.detach().float().contiguous()
                    bias = None if injection.bias is None else injection.bias.detach().float().contiguous()
                    alive += [weight, bias]
                    records.append(
                        InjectionRecord(
                            layer=injection.layer,
                            node=first + int(node),
                            source=first + int(source),
                            residual=injection.residual,
                            weight=weight.data_ptr(),
                            bias=None if bias is None else bias.data_ptr(),
                        )
                    )
            first += 0 if tree is None else tree.size
        return (InjectionRecord * len(records))(*records), alive


def _free(loaded: ctypes.CDLL, handle: ctypes.c_void_p, held: weights.Weights) -> None:
    loaded.loci_session_free(handle)


def supports(language_model: LanguageModel) -> str:
    """Why the native engine cannot run a model; empty if it can. The first call may compile the library and pack the
    model's weights, some seconds each; both are kept."""
    why = available() or weights.why_not(language_model)
    if why:
        return why
    try:
        weights.weights_of(language_model)
    except Unsupported as error:
        return str(error).rstrip(".")
    return ""


def available() -> str:
    """Why there is no native engine on this machine; empty if there is."""
    try:
        library.load()
    except Unsupported as error:
        return str(error).rstrip(".")
    return ""
