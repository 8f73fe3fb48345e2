"""Any causal model of `transformers`, unmodified, one tree of tokens per step.

Source  a 4-D attention mask is taken by transformers as it is; a tree checked that way equals feeding each path in
        sequence (2e-5 in float32 logits of SmolLM2-135M).
Ours    rows of a batch are padded on the right and keep their own length: slots that a row does not use are masked,
        which is exact for models that rotate keys before caching them. One row without a draft needs no mask at all.
        After a step the accepted path is moved to the front (through a temporary: source and target overlap) and the
        rest is cropped. A single row keeps its cache between runs: `prefill` feeds only what is new.

Trees and batches need a mask, so they are refused for flash-attention, for models whose positions live in the mask
(ALiBi), and for layers that forget (sliding windows, recurrent states); those run one token and one row at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from loci.errors import BadInput, Unsupported
from loci.lm.draft import Needs, PrefillResult, TokenTree
from loci.lm.engine.base import Capabilities, Injection, check_injections, injected, injection_places
from loci.lm.engine.output import CHUNK, Fed, Output
from loci.lm.model import LanguageModel

# The largest tree: rows of the mask, and more than any measured step repays.
MAX_NODES = 256


NO_LAYERS = "the decoder's layers are not at model.model.layers"


def _overwrite(
    given: Sequence[tuple[Injection, Int64[Tensor, " _"], Int64[Tensor, " _"]]],
) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]:
    """A hook before a layer that overwrites probes' states. Places count through all rows of the step."""

    def hook(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        before: Tensor = arguments[0] if arguments else named["hidden_states"]
        states = before.flatten(0, 1).clone()
        for injection, probes, sources in given:
            states[probes] = injected(injection, states[sources])
        after = states.view_as(before)
        return ((after, *arguments[1:]), named) if arguments else ((), {**named, "hidden_states": after})

    return hook


class HFEngine:
    """A `StepEngine` over a loaded model.

    Args:
        memory: a `transformers.Cache` to write into instead of a fresh one. What it holds already stands before the
            prompt. It serves one row, and trees only if all its layers are plain growing ones.
    """

    name = "hf"

    def __init__(self, language_model: LanguageModel, *, memory: Cache | None = None) -> None:
        self.model = language_model.model
        self.memory = memory
        self._accepts = frozenset(inspect.signature(self.model.forward).parameters)
        self._cache: Cache = memory if memory is not None else DynamicCache(config=self.model.config)
        self._before = int(self._cache.get_seq_length()) if memory is not None else 0
        self._tokens: list[list[int]] = []
        self._slots = self._before
        self._used: Bool[Tensor, "row slot"] | None = None  # None: every row uses every slot
        self._staged: tuple[TokenTree, ...] = ()
        self._injections: tuple[Injection, ...] = ()
        self.capabilities = self._examine()

    def _examine(self) -> Capabilities:
        attention = self.model.config._attn_implementation
        why = ""
        if attention not in ("sdpa", "eager"):
            why = f'its attention is {attention!r}, which takes no mask; load it with attention "sdpa" or "eager"'
        elif "position_ids" not in self._accepts or getattr(self.model.config, "alibi", False):
            why = "its positions live in the attention mask (ALiBi)"
        elif not self._plain:
            kinds = sorted({type(layer).__name__ for layer in self._cache.layers})
            why = f"its cache has layers that cannot keep a part of a step ({', '.join(kinds)})"
        return Capabilities(
            max_nodes=1 if why else MAX_NODES,
            batch=not why and self.memory is None,
            hidden=True,
            hooks=not why and self._layers is not None,
            why=why,
        )

    @property
    def _width(self) -> int:
        return int(cast(Any, self.model.get_input_embeddings()).weight.shape[1])

    @property
    def _decoder(self) -> Any:
        return cast(Any, self.model).get_decoder()

    @property
    def _layers(self) -> torch.nn.ModuleList | None:
        """The decoder's layers, where they are found under the usual name."""
        layers = getattr(self._decoder, "layers", None)
        count = getattr(self.model.config.get_text_config(), "num_hidden_layers", None)
        return layers if isinstance(layers, torch.nn.ModuleList) and len(layers) == count else None

    def inject(self, injections: Sequence[Injection]) -> None:
        """See `InjectingEngine`. Each step puts its hooks on the layers and takes them away again."""
        layers = self._layers
        if injections and (layers is None or not self.capabilities.hooks):
            raise Unsupported(
                f"hidden states cannot be changed between layers here: {self.capabilities.why or NO_LAYERS}."
            )
        if injections and layers is not None:
            check_injections(injections, layers=len(layers), width=self._width)
            final = max(injection.layer for injection in injections) == len(layers)
            if final and not isinstance(getattr(self._decoder, "norm", None), torch.nn.Module):
                raise Unsupported("the model has no norm at model.model.norm, before which a state could be changed.")
        self._injections = tuple(one.to(self.model.dtype, self.model.device) for one in injections)

    @contextmanager
    def _injected(self, trees: Sequence[TokenTree], size: int) -> Iterator[None]:
        """The hooks of one step, on the layers only while it runs."""
        places = injection_places(self._injections, trees, size)
        layers = self._layers
        if not places or layers is None:
            yield
            return
        modules = [*layers, self._decoder.norm]
        by_layer: dict[int, list[tuple[Injection, Tensor, Tensor]]] = {}
        for injection, probes, sources in places:
            where = (torch.from_numpy(part).to(self.model.device) for part in (probes, sources))
            by_layer.setdefault(injection.layer, []).append((injection, *where))  # type: ignore[arg-type]
        handles = [
            modules[layer].register_forward_pre_hook(_overwrite(given), with_kwargs=True)
            for layer, given in by_layer.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def _plain(self) -> bool:
        """Whether all layers of the cache just grow, so that any part of a step can be kept."""
        if not self._cache.layers:  # a cache that makes its layers when they are first written
            return self._cache.layer_class_to_replicate is DynamicLayer
        return all(type(layer) is DynamicLayer for layer in self._cache.layers)

    @property
    def _growing(self) -> list[DynamicLayer]:
        return cast(list[DynamicLayer], self._cache.layers)

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(self._before + len(tokens) for tokens in self._tokens)

    @property
    def nbytes(self) -> int:
        return sum(
            part.untyped_storage().nbytes()
            for layer in self._cache.layers
            for part in (getattr(layer, "keys", None), getattr(layer, "values", None))
            if part is not None
        )

    def reset(self) -> None:
        self._tokens, self._staged, self._used = [], (), None
        if self.memory is None:
            self._cache = DynamicCache(config=self.model.config)
        elif int(self._cache.get_seq_length()) > self._before:
            if not self._cache.is_croppable:
                raise Unsupported(
                    f"{type(self._cache).__name__} cannot go back to what it held before the prompt. Give a fresh one"
                    " for each text."
                )
            self._cache.crop(self._before - int(self._cache.get_seq_length()))
        self._slots = self._before

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]], *, want: Needs) -> list[PrefillResult]:
        if not prompts or any(not len(prompt) for prompt in prompts):
            raise BadInput("a prompt has at least one token.")
        if want.hooks and not self.capabilities.hooks:
            raise Unsupported(
                f"hidden states cannot be changed between layers here: {self.capabilities.why or NO_LAYERS}."
            )
        if len(prompts) == 1:
            return [self._prefill_one(list(prompts[0]), want)]
        if not self.capabilities.batch:
            raise Unsupported(f"this model runs one text at a time: {self.capabilities.why or 'it has a memory'}.")
        self.reset()
        fed = [list(prompt[:-1]) for prompt in prompts]
        longest = max(map(len, fed))
        results = [PrefillResult(tokens=tuple(prompt)) for prompt in prompts]
        if longest:
            ids = torch.zeros(len(fed), longest, dtype=torch.long)
            for row, tokens in enumerate(fed):
                ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
            # Padding stands behind each row's text, where causal attention never looks.
            fed_now = self._feed(ids, torch.arange(longest).expand(len(fed), -1), want if want.prefill else Needs())
            results = [
                PrefillResult(tokens=tuple(prompt), **fed_now.of_row(row, len(prompt) - 1))
                for row, prompt in enumerate(prompts)
            ]
        self._tokens, self._slots = fed, longest
        if any(len(tokens) < longest for tokens in fed):
            lengths = torch.tensor([len(tokens) for tokens in fed])
            self._used = (torch.arange(longest) < lengths[:, None]).to(self.model.device)
        return results

    def _prefill_one(self, prompt: list[int], want: Needs) -> PrefillResult:
        known = self._tokens[0] if len(self._tokens) == 1 and self._used is None else None
        common = 0
        if known is not None and not self._staged:
            while common < min(len(known), len(prompt) - 1) and known[common] == prompt[common]:
                common += 1
            if common < len(known) and not self._cache.is_croppable:
                common = 0
        if known is None or common == 0:
            self.reset()
        elif common < len(known):
            self._cache.crop(common - len(known))
        self._tokens, self._slots = [prompt[:common]], self._before + common
        new = prompt[common:-1]
        if not new:
            return PrefillResult(tokens=tuple(prompt), start=common)
        ids = torch.tensor([new], dtype=torch.long)
        fed = self._feed(ids, torch.arange(len(new))[None] + self._slots, want if want.prefill else Needs())
        self._tokens, self._slots = [prompt[:-1]], self._before + len(prompt) - 1
        return PrefillResult(tokens=tuple(prompt), start=common, **fed.of_row(0, len(new)))

    def _feed(self, ids: Int64[Tensor, "row token"], positions: Int64[Tensor, "row token"], want: Needs) -> Fed:
        """Feed prompts behind what the cache holds. Without wants, in one piece and for no output at all."""
        asked = bool(want.topk or want.hidden)
        size = CHUNK if asked else ids.shape[1]
        fed = Fed(want)
        try:
            for start in range(0, ids.shape[1], size):
                piece = slice(start, start + size)
                output = self._forward(ids[:, piece], positions[:, piece], None, want, every=bool(want.topk))
                if asked:
                    fed.add(output.scores if want.topk else None, output.layers)
        except BaseException:
            self.reset()
            raise
        return fed

    @torch.inference_mode()
    def step(self, trees: Sequence[TokenTree], *, want: Needs) -> Output:
        if len(trees) != len(self._tokens):
            raise BadInput(f"{len(trees)} trees were given for {len(self._tokens)} rows.")
        if self._staged:
            raise BadInput("the last step's nodes are neither kept nor dropped; call commit first.")
        size = max(tree.size for tree in trees)
        if size > self.capabilities.max_nodes:
            limit = self.capabilities.why or f"trees have at most {MAX_NODES} nodes here"
            raise Unsupported(f"a tree of {size} nodes cannot be checked with this model: {limit}.")
        lengths = torch.tensor(self.lengths)
        if size == 1:
            ids = torch.tensor([[int(tree.tokens[0])] for tree in trees])
            positions = lengths[:, None]
        else:
            ids = torch.zeros(len(trees), size, dtype=torch.long)
            positions = lengths[:, None].repeat(1, size)
            for row, tree in enumerate(trees):
                ids[row, : tree.size] = torch.from_numpy(tree.tokens).long()
                positions[row, : tree.size] += torch.from_numpy(tree.depth)
        mask = None if size == 1 and self._used is None else self._mask(trees, size)
        embeds = self._embeds(trees, ids) if any(tree.embeds is not None for tree in trees) else None
        try:
            with self._injected(trees, size):
                output = self._forward(ids, positions, mask, want, every=True, embeds=embeds)
        except BaseException:
            self._roll_back()
            raise
        self._staged = tuple(trees)
        return Output(output.scores, output.layers, tuple(tree.size for tree in trees), want.topk)

    def _mask(self, trees: Sequence[TokenTree], size: int) -> Shaped[Tensor, "row 1 node slot"]:
        """Who attends to whom: every node to its row's past and to its ancestors; padding to itself, because a row of
        nothing but False would turn into NaN."""
        inside = torch.eye(size, dtype=torch.bool).repeat(len(trees), 1, 1)
        for row, tree in enumerate(trees):
            inside[row, : tree.size, : tree.size] = torch.from_numpy(tree.ancestors)
        inside = inside.to(self.model.device)
        if self._used is None:
            past = inside.new_ones(len(trees), size, self._slots)
        else:
            past = self._used[:, None, :].expand(-1, size, -1)
        mask = torch.cat([past, inside], dim=2)[:, None]
        if self.model.config._attn_implementation == "eager":  # which adds its mask to the scores
            low = torch.finfo(self.model.dtype).min
            return torch.zeros_like(mask, dtype=self.model.dtype).masked_fill(~mask, low)
        return mask

    def _embeds(self, trees: Sequence[TokenTree], ids: Int64[Tensor, "row node"]) -> Float[Tensor, "row node width"]:
        embed = self.model.get_input_embeddings()
        inputs: Tensor = embed(ids.clamp(min=0).to(self.model.device))
        for row, tree in enumerate(trees):
            if tree.embeds is not None:
                places = torch.from_numpy(np.flatnonzero(tree.is_probe)).to(inputs.device)
                inputs[row, places] = torch.from_numpy(tree.embeds).to(inputs)
        return inputs

    def _forward(
        self,
        ids: Int64[Tensor, "row node"],
        positions: Int64[Tensor, "row node"],
        mask: Tensor | None,
        want: Needs,
        *,
        every: bool,
        embeds: Tensor | None = None,
    ) -> Output:
        device = self.model.device
        arguments: dict[str, object] = {"attention_mask": mask, "use_cache": True}
        arguments["cache" if "cache" in self._accepts else "past_key_values"] = self._cache
        if embeds is None:
            arguments["input_ids"] = ids.to(device)
        else:
            arguments["inputs_embeds"] = embeds
        if "position_ids" in self._accepts:
            arguments["position_ids"] = positions.to(device)
        if "logits_to_keep" in self._accepts and not every:
            arguments["logits_to_keep"] = 1
        if want.hidden:
            arguments["output_hidden_states"] = True
        found = self.model(**arguments)
        layers = tuple(found.hidden_states[layer] for layer in want.hidden) if want.hidden else ()
        return Output(found.logits, layers, (ids.shape[1],) * len(ids), want.topk)

    def _roll_back(self) -> None:
        """Undo a step that was interrupted, when some layers have its nodes and others have not."""
        self._staged = ()
        if not self._plain:
            self.reset()
            return
        for layer in self._growing:
            layer.crop(min(0, self._slots - layer.get_seq_length()))

    @torch.inference_mode()
    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        trees, self._staged = self._staged, ()
        if len(paths) != len(trees):
            raise BadInput(f"{len(paths)} paths were given for a step of {len(trees)} rows.")
        size, longest = max(tree.size for tree in trees), max(map(len, paths))
        if any(list(path) != list(range(longest)) for path in paths):
            if not self._plain:
                raise Unsupported(f"a part of a step cannot be kept: {self.capabilities.why}.")
            self._move(paths, longest)
        if longest < size:
            self._cache.crop(longest - size)
        for tokens, path, tree in zip(self._tokens, paths, trees, strict=True):
            tokens.extend(tree.tokens[list(path)].tolist())
        uneven = any(len(path) < longest for path in paths)
        if self._used is not None or uneven:
            device = self.model.device
            new = torch.arange(longest) < torch.tensor([len(path) for path in paths])[:, None]
            past = self._used
            if past is None:
                past = torch.ones(len(paths), self._slots, dtype=torch.bool, device=device)
            self._used = torch.cat([past, new.to(device)], dim=1)
        self._slots += longest

    def _move(self, paths: Sequence[Sequence[int]], longest: int) -> None:
        """Bring each row's path to the front of the staged slots. A shorter row's last slots hold leftovers, masked."""
        index = torch.zeros(len(paths), longest, dtype=torch.long)
        for row, path in enumerate(paths):
            index[row, : len(path)] = torch.tensor(list(path), dtype=torch.long)
        index = (index + self._slots).to(self.model.device)[:, None, :, None]
        for layer in self._growing:
            for part in (layer.keys, layer.values):
                if part is None:  # a layer that shares another one's keys
                    continue
                moved = part.gather(2, index.expand(-1, part.shape[1], -1, part.shape[3]))  # a copy: places overlap
                part[:, :, self._slots : self._slots + longest] = moved

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        if list(rows) == list(range(len(self._tokens))):
            return
        if self._staged:
            raise BadInput("the last step's nodes are neither kept nor dropped; call commit first.")
        self._tokens = [self._tokens[row] for row in rows]
        if not rows:
            self.reset()
            return
        index = torch.tensor(list(rows), device=self.model.device)
        self._cache.batch_select_indices(index)
        if self._used is not None:
            self._used = self._used[index]
            if bool(self._used.all()):
                self._used = None
