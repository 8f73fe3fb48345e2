"""Llama-family models in lean torch: fewer and faster kernels for the same arithmetic.

Letters  token: a row of the flat products, all rows' nodes one after another; group: query heads that share a key head.
Ours     weights are laid out once for oneDNN, which otherwise happens inside every product; query, key and value are
         one product; activation, gate and the residual sums are done where a product ends. Query heads that share keys
         become rows of one attention, under one mask made of the trees' ancestors. Keys and values lie in a
         `SlotCache`.
Cost     a second copy of the weights, in the packed layout. SmolLM2-135M in bfloat16 on 2 cores with AMX: a step of 16
         nodes takes about two thirds of what it takes through transformers.

A model is accepted for the modules it is made of, whatever it is called, and only after a trial: a few tokens through
both must agree. Anything a module has beyond the plain form (adapters, norms of queries, hooks) is refused.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from loci.errors import BadInput, Unsupported
from loci.lm.draft import Needs, PrefillResult, TokenTree
from loci.lm.engine.base import Capabilities, Injection, check_injections, injected, injection_places, kept
from loci.lm.engine.hf import MAX_NODES
from loci.lm.engine.output import CHUNK, Fed, Output
from loci.lm.engine.slots import SlotCache
from loci.lm.model import LanguageModel

# Nodes up to which query heads that share keys become rows of one attention; with more the mask's copies cost more.
GROUPED = 64
# Kinds of rotary positions whose frequencies do not depend on the length of the text.
STEADY = ("default", "linear", "llama3", "yarn")
# How far the trial's logits may be from the model's own, in standard deviations.
TRIAL = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}

# Takes a layer's number, its queries, keys and values, and gives what attention makes of them.
Attend = Callable[
    [int, Float[Tensor, "token head size"], Float[Tensor, "token group size"], Float[Tensor, "token group size"]],
    Float[Tensor, "token inner"],
]
# The probes that an injection overwrites, and the tokens they are made of, as places among all tokens of the step.
Places = tuple[Int64[Tensor, " _"], Int64[Tensor, " _"]]


class Product:
    """One matrix, laid out for oneDNN where that helps."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, pack: bool) -> None:
        self.bias = bias
        self.packed = pack
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight) if pack else weight

    def __call__(self, x: Float[Tensor, "token inputs"]) -> Float[Tensor, "token outputs"]:
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")  # type: ignore[no-any-return]
        return functional.linear(x, self.weight, self.bias)

    def silu(self, x: Float[Tensor, "token inputs"]) -> Float[Tensor, "token outputs"]:
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "swish", [], "")  # type: ignore[no-any-return]
        return functional.silu(self(x))

    def times(
        self, x: Float[Tensor, "token inputs"], other: Float[Tensor, "token outputs"]
    ) -> Float[Tensor, "token outputs"]:
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, other, self.weight, self.bias, "mul")  # type: ignore[no-any-return]
        return self(x).mul_(other)

    def plus(
        self, x: Float[Tensor, "token inputs"], other: Float[Tensor, "token outputs"]
    ) -> Float[Tensor, "token outputs"]:
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, other, self.weight, self.bias, "add")  # type: ignore[no-any-return]
        return self(x).add_(other)


class Norm:
    def __init__(self, module: Any) -> None:
        self.weight: Tensor = module.weight.detach()
        self.epsilon = float(module.variance_epsilon)

    def __call__(self, x: Float[Tensor, "token width"]) -> Float[Tensor, "token width"]:
        return functional.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


class Rotary:
    """Cosines and sines by position, in tables that grow by doubling. The sines of the first half are negative: the
    rotation is then one product with the numbers, and one with the numbers moved by half their width."""

    def __init__(self, module: Any, dtype: torch.dtype) -> None:
        self.frequencies: Tensor = module.inv_freq.float()
        self.scaling = float(module.attention_scaling)
        self.dtype = dtype
        self.cosines = self.sines = torch.empty(0)
        self._grow(512)

    def _grow(self, positions: int) -> None:
        places = torch.arange(positions, device=self.frequencies.device).float()
        angles = torch.outer(places, self.frequencies)
        cosines, sines = angles.cos() * self.scaling, angles.sin() * self.scaling
        self.cosines = torch.cat([cosines, cosines], dim=1).to(self.dtype)
        self.sines = torch.cat([-sines, sines], dim=1).to(self.dtype)

    def reserve(self, positions: int) -> None:
        if positions > len(self.cosines):
            self._grow(max(positions, 2 * len(self.cosines)))

    def at(
        self, positions: Int64[Tensor, " token"]
    ) -> tuple[Float[Tensor, "token 1 size"], Float[Tensor, "token 1 size"]]:
        """Cosines and sines; `reserve` made sure that the positions are in the tables."""
        return self.cosines[positions][:, None], self.sines[positions][:, None]


def rotate(
    x: Float[Tensor, "token head size"], cosines: Float[Tensor, "token 1 size"], sines: Float[Tensor, "token 1 size"]
) -> Float[Tensor, "token head size"]:
    """The rotary embedding: each head turned by the angles of its position."""
    return torch.addcmul(x * cosines, x.roll(x.shape[-1] // 2, dims=-1), sines)


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """`query_key_value` is one product, or three where nothing is gained by joining them."""

    before_attention: Norm
    query_key_value: tuple[Product, ...]
    output: Product
    before_mlp: Norm
    gate: Product
    up: Product
    down: Product


class Packed:
    """A model's weights as they are multiplied here, without any cache: what engines over one model share."""

    def __init__(self, model: Any) -> None:
        decoder, attention = model.model, model.model.layers[0].self_attn
        embedding: Tensor = decoder.embed_tokens.weight.detach()
        self.embedding = embedding
        self.dtype, self.device = embedding.dtype, embedding.device
        self.vocabulary, self.width = embedding.shape
        self.size = int(attention.head_dim)
        self.heads = attention.q_proj.out_features // self.size
        self.groups = attention.k_proj.out_features // self.size
        self.scaling = float(attention.scaling)
        self.pack = self.device.type == "cpu" and _packs(self.dtype)
        self.rotary = Rotary(decoder.rotary_emb, self.dtype)
        self.layers = tuple(self._layer(layer) for layer in decoder.layers)
        self.norm = Norm(decoder.norm)
        self.head = self._product(model.lm_head)

    def _product(self, *modules: nn.Linear) -> Product:
        weights = [module.weight.detach() for module in modules]
        biases = [module.bias.detach() for module in modules if module.bias is not None]
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        bias = torch.cat(biases) if len(biases) > 1 else biases[0] if biases else None
        return Product(weight, bias, pack=self.pack)

    def _layer(self, module: Any) -> Layer:
        attention, mlp = module.self_attn, module.mlp
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        joins = self.pack and len({part.bias is None for part in parts}) == 1
        return Layer(
            before_attention=Norm(module.input_layernorm),
            query_key_value=(self._product(*parts),) if joins else tuple(map(self._product, parts)),
            output=self._product(attention.o_proj),
            before_mlp=Norm(module.post_attention_layernorm),
            gate=self._product(mlp.gate_proj),
            up=self._product(mlp.up_proj),
            down=self._product(mlp.down_proj),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the packed copies; weights that are used as the model holds them are not counted."""
        if not self.pack:
            return 0
        products = [self.head]
        for layer in self.layers:
            products += [*layer.query_key_value, layer.output, layer.gate, layer.up, layer.down]
        return sum(product.weight.numel() * product.weight.itemsize for product in products)

    def cache(self) -> SlotCache:
        return SlotCache(
            layers=len(self.layers), heads=self.groups, size=self.size, dtype=self.dtype, device=self.device
        )

    def embed(self, ids: Int64[Tensor, " token"]) -> Float[Tensor, "token width"]:
        return functional.embedding(ids, self.embedding)

    def run(
        self,
        hidden: Float[Tensor, "token width"],
        rotation: tuple[Float[Tensor, "token 1 size"], Float[Tensor, "token 1 size"]],
        attend: Attend,
        *,
        wanted: Sequence[int] = (),
        injections: Sequence[tuple[Injection, Places]] = (),
        fill_only: bool = False,
    ) -> tuple[Float[Tensor, "token width"], dict[int, Float[Tensor, "token width"]]]:
        """All layers and the final norm.

        Args:
            rotation: cosines and sines at the tokens' positions.
            wanted: layers whose inputs are asked for; the number of layers stands for the final norm's output.
            fill_only: only keys and values matter; the last layer's other products are left out.

        Returns:
            The normed states, and the wanted ones by layer.
        """
        found = {}
        last = len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            if number in wanted:
                found[number] = hidden
            hidden = _inject(hidden, number, injections)
            mixed = attend(number, *self._project(layer, hidden, *rotation))
            if not (fill_only and number == last):
                hidden = _rest(layer, hidden, mixed)
        normed = self.norm(_inject(hidden, len(self.layers), injections))
        if len(self.layers) in wanted:
            found[len(self.layers)] = normed
        return normed, found

    def _project(
        self, layer: Layer, hidden: Float[Tensor, "token width"], cosines: Tensor, sines: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys, both rotated, and values, each (token, head, size)."""
        x = layer.before_attention(hidden)
        if len(layer.query_key_value) == 1:
            mixed = layer.query_key_value[0](x).view(len(x), -1, self.size)
            turned = rotate(mixed[:, : self.heads + self.groups], cosines, sines)
            return turned[:, : self.heads], turned[:, self.heads :], mixed[:, self.heads + self.groups :]
        query, key, value = (product(x).view(len(x), -1, self.size) for product in layer.query_key_value)
        return rotate(query, cosines, sines), rotate(key, cosines, sines), value


def _packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN has its own layout for products of this kind here."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    try:
        Product(torch.zeros(16, 16, dtype=dtype), None, pack=True)(torch.zeros(1, 16, dtype=dtype))
    except (RuntimeError, AttributeError, NotImplementedError):  # another build of torch, or a processor without bf16
        return False
    return True


def _rest(
    layer: Layer, hidden: Float[Tensor, "token width"], mixed: Float[Tensor, "token inner"]
) -> Float[Tensor, "token width"]:
    """A layer after its attention."""
    hidden = layer.output.plus(mixed, hidden)
    x = layer.before_mlp(hidden)
    return layer.down.plus(layer.up.times(x, layer.gate.silu(x)), hidden)


def _inject(
    hidden: Float[Tensor, "token width"], layer: int, injections: Sequence[tuple[Injection, Places]]
) -> Float[Tensor, "token width"]:
    here = [(injection, places) for injection, places in injections if injection.layer == layer]
    if not here:
        return hidden
    hidden = hidden.clone()  # what was handed out as a layer's input stays as it was
    for injection, (probes, sources) in here:
        hidden[probes] = injected(injection, hidden[sources])
    return hidden


def attention(
    query: Float[Tensor, "row node head size"],
    keys: Float[Tensor, "row group slot size"],
    values: Float[Tensor, "row group slot size"],
    mask: Float[Tensor, "row 1 _ slot"] | None,
    *,
    scaling: float,
    causal: bool = False,
) -> Float[Tensor, "token inner"]:
    """Attention of grouped heads. Heads that share keys become rows, in the order group by group, where there are few
    nodes; the mask then comes repeated for each of them (`mask_rows`)."""
    rows, nodes, heads, size = query.shape
    groups = keys.shape[1]
    if causal or nodes > GROUPED:
        mixed = functional.scaled_dot_product_attention(
            query.transpose(1, 2), keys, values, mask, is_causal=causal, scale=scaling, enable_gqa=heads != groups
        )
        return mixed.transpose(1, 2).reshape(rows * nodes, heads * size)
    each = heads // groups
    query = query.view(rows, nodes, groups, each, size).permute(0, 2, 3, 1, 4).reshape(rows, groups, each * nodes, size)
    mixed = functional.scaled_dot_product_attention(query, keys, values, mask, scale=scaling)
    return mixed.view(rows, groups, each, nodes, size).permute(0, 3, 1, 2, 4).reshape(rows * nodes, heads * size)


def mask_rows(mask: Float[Tensor, "row 1 node slot"], each: int) -> Float[Tensor, "row 1 _ slot"]:
    """A mask for `attention`: repeated for heads that share keys, if these become rows."""
    return mask if mask.shape[2] > GROUPED else mask.repeat(1, 1, each, 1)


@dataclass(frozen=True, eq=False)
class Ran:
    """What running a step gave. `best` is None where it was not found on the way."""

    scores: Float[Tensor, "row node vocabulary"]
    layers: Mapping[int, Float[Tensor, "row node width"]]
    best: Int64[Tensor, "row node"] | None = None


class SlotEngine(ABC):
    """What engines over packed weights and a `SlotCache` share: all but how one step is run."""

    name: str

    def __init__(
        self, language_model: LanguageModel, weights: Packed, *, max_nodes: int, cache: SlotCache | None = None
    ) -> None:
        self.language_model = language_model
        self.weights = weights
        self._checked = True  # that the weights are the model's; looked at again before each later prompt
        self.capabilities = Capabilities(max_nodes=max_nodes, batch=True, hidden=True, hooks=True)
        self.cache = self.weights.cache() if cache is None else cache
        self._tokens: list[list[int]] = []
        self._staged: tuple[TokenTree, ...] = ()
        self._injections: tuple[Injection, ...] = ()

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(map(len, self._tokens))

    @property
    def nbytes(self) -> int:
        return self.cache.nbytes if self._tokens else 0

    @property
    def weight_bytes(self) -> int:
        """What the packed copy of the weights takes besides the model's own."""
        return self.weights.nbytes

    def reset(self) -> None:
        self._tokens, self._staged = [], ()
        self.cache.begin(1)

    def inject(self, injections: Sequence[Injection]) -> None:
        check_injections(injections, layers=len(self.weights.layers), width=self.weights.width)
        self._injections = tuple(one.to(self.weights.dtype, self.weights.device) for one in injections)

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]], *, want: Needs) -> list[PrefillResult]:
        if not prompts or any(not len(prompt) for prompt in prompts):
            raise BadInput("a prompt has at least one token.")
        weights = self.weights if self._checked else weights_of(self.language_model)
        self._checked = False
        if weights is not self.weights:  # the model was trained or exchanged since
            self._exchange(weights)
        fed = [list(prompt[:-1]) for prompt in prompts]
        common = self._known(fed[0]) if len(fed) == 1 else 0
        if common:
            self.cache.truncate(0, common)
        else:
            self.reset()
            self.cache.begin(len(fed))
        self._tokens, self._staged = [tokens[:common] for tokens in fed], ()
        new = [tokens[common:] for tokens in fed]
        if not any(new):
            return [PrefillResult(tokens=tuple(prompt), start=common) for prompt in prompts]
        found = self._feed(new, want if want.prefill else Needs())
        self._tokens = fed
        return [
            PrefillResult(tokens=tuple(prompt), start=common, **found.of_row(row, len(new[row])))
            for row, prompt in enumerate(prompts)
        ]

    def _exchange(self, weights: Packed) -> None:
        """Run on other weights from now on, with an empty cache."""
        self.weights, self.cache, self._tokens = weights, weights.cache(), []

    def _known(self, fed: list[int]) -> int:
        """How many of the prompt's tokens the cache holds already."""
        if len(self._tokens) != 1:
            return 0
        (held,) = self._tokens
        return next(
            (place for place, (new, old) in enumerate(zip(fed, held, strict=False)) if new != old),
            min(len(fed), len(held)),
        )

    def _feed(self, new: Sequence[list[int]], want: Needs) -> Fed:
        """Feed prompts behind what the cache holds. Padding stands behind each row's text, where nobody looks."""
        rows, longest, past = len(new), max(map(len, new)), self.cache.lengths[0]
        ids = torch.zeros(rows, longest, dtype=torch.long)
        for row, tokens in enumerate(new):
            ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
        weights, device = self.weights, self.weights.device
        positions = torch.arange(past, past + longest, device=device)
        mask = None
        if past:
            seen = torch.arange(past + longest, device=device) <= positions[:, None]
            mask = mask_rows(low(seen, weights.dtype)[None, None], weights.heads // weights.groups)
        self.cache.stage(longest)
        weights.rotary.reserve(past + longest)
        asked = bool(want.topk or want.hidden)
        wanted = self._layers(want)
        normed, found = weights.run(
            weights.embed(ids.flatten().to(device)),
            weights.rotary.at(positions.repeat(rows)),
            self._attend(rows, longest, mask, causal=not past),
            wanted=wanted,
            fill_only=not asked,
        )
        self.cache.fill([len(tokens) for tokens in new])
        fed = Fed(want)
        if asked:
            states = normed.view(rows, longest, -1)
            layers = [found[layer].view(rows, longest, -1) for layer in wanted]
            for start in range(0, longest, CHUNK):
                piece = slice(start, start + CHUNK)
                scores = weights.head(states[:, piece].flatten(0, 1)) if want.topk else None
                fed.add(
                    None if scores is None else scores.view(rows, -1, scores.shape[-1]),
                    [layer[:, piece] for layer in layers],
                )
        return fed

    def _layers(self, want: Needs) -> tuple[int, ...]:
        """The wanted layers, counted from the front."""
        count = len(self.weights.layers) + 1
        wrong = [layer for layer in want.hidden if not -count <= layer < count]
        if wrong:
            raise BadInput(f"hidden states of the layers {wrong} were asked for; there are {-count} to {count - 1}.")
        return tuple(layer % count for layer in want.hidden)

    def _attend(self, rows: int, nodes: int, mask: Tensor | None, *, causal: bool = False) -> Attend:
        """Attention over the cache, to which it adds the layer's new keys and values."""
        cache, scaling, size = self.cache, self.weights.scaling, self.weights.size

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            cache.write(layer, key.view(rows, nodes, -1, size), value.view(rows, nodes, -1, size))
            keys, values = cache.read(layer)
            return attention(query.view(rows, nodes, -1, size), keys, values, mask, scaling=scaling, causal=causal)

        return attend

    @torch.inference_mode()
    def step(self, trees: Sequence[TokenTree], *, want: Needs) -> Output:
        if len(trees) != len(self._tokens):
            raise BadInput(f"{len(trees)} trees were given for {len(self._tokens)} rows.")
        if self._staged:
            raise BadInput("the last step's nodes are neither kept nor dropped; call commit first.")
        size = max(tree.size for tree in trees)
        if size > self.capabilities.max_nodes:
            limit = self.capabilities.max_nodes
            raise Unsupported(f"a tree of {size} nodes cannot be checked here: trees have at most {limit} nodes.")
        wanted = self._layers(want)
        self.weights.rotary.reserve(max(self.lengths) + size)
        ran = self._run(trees, size, wanted)
        self._staged = tuple(trees)
        layers = tuple(ran.layers[layer] for layer in wanted)
        return Output(ran.scores, layers, tuple(tree.size for tree in trees), want.topk, ran.best)

    @abstractmethod
    def _run(self, trees: Sequence[TokenTree], size: int, wanted: Sequence[int]) -> Ran:
        """Stage the trees and run all layers over them: `size` nodes per row."""

    def _inputs(self, trees: Sequence[TokenTree], size: int) -> tuple[Tensor, Tensor]:
        """Embeddings and positions of all nodes, row after row; those of padding mean nothing."""
        ids = np.zeros((len(trees), size), dtype=np.int64)
        positions = np.zeros((len(trees), size), dtype=np.int64)
        for row, (tree, length) in enumerate(zip(trees, self.cache.lengths, strict=True)):
            ids[row, : tree.size] = tree.tokens
            positions[row, : tree.size] = length + tree.depth
        np.maximum(ids, 0, out=ids)  # probes carry -1
        device = self.weights.device
        hidden = self.weights.embed(torch.from_numpy(ids).flatten().to(device))
        for row, tree in enumerate(trees):
            if tree.embeds is not None:
                places = torch.from_numpy(row * size + np.flatnonzero(tree.is_probe)).to(device)
                hidden[places] = torch.from_numpy(tree.embeds).to(hidden)
        return hidden, torch.from_numpy(positions).flatten().to(device)

    def _places(self, trees: Sequence[TokenTree], size: int) -> list[tuple[Injection, Places]]:
        """The injections that the trees' probes obey, and where."""
        device = self.weights.device
        return [
            (injection, (torch.from_numpy(probes).to(device), torch.from_numpy(sources).to(device)))
            for injection, probes, sources in injection_places(self._injections, trees, size)
        ]

    @torch.inference_mode()
    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        trees, self._staged = self._staged, ()
        if len(paths) != len(trees):
            raise BadInput(f"{len(paths)} paths were given for a step of {len(trees)} rows.")
        self.cache.commit(paths)
        for tokens, path, tree in zip(self._tokens, paths, trees, strict=True):
            tokens.extend(tree.tokens[list(path)].tolist())

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        if list(rows) == list(range(len(self._tokens))):
            return
        if self._staged:
            raise BadInput("the last step's nodes are neither kept nor dropped; call commit first.")
        if not rows:
            self.reset()
            return
        self.cache.keep(rows)
        self._tokens = [self._tokens[row] for row in rows]


class PackedEngine(SlotEngine):
    """A `StepEngine` over a model whose weights are packed; see `supports`.

    Args:
        weights: what `find` gave for this model, where that is known already.

    Raises:
        Unsupported: the model is made of other parts.
    """

    name = "packed"

    def __init__(self, language_model: LanguageModel, weights: Packed | None = None) -> None:
        super().__init__(language_model, weights or weights_of(language_model), max_nodes=MAX_NODES)

    def _run(self, trees: Sequence[TokenTree], size: int, wanted: Sequence[int]) -> Ran:
        self.cache.stage(size)
        hidden, positions = self._inputs(trees, size)
        states, found = self.weights.run(
            hidden,
            self.weights.rotary.at(positions),
            self._attend(len(trees), size, self._mask(trees, size)),
            wanted=wanted,
            injections=self._places(trees, size),
        )
        rows = len(trees)
        layers = {layer: part.view(rows, size, -1) for layer, part in found.items()}
        return Ran(self.weights.head(states).view(rows, size, -1), layers)

    def _mask(self, trees: Sequence[TokenTree], size: int) -> Float[Tensor, "row 1 _ slot"] | None:
        """Who attends to whom: every node to its row's past and to its ancestors; padding to itself. None: all."""
        lengths = self.cache.lengths
        if size == 1 and min(lengths) == max(lengths):
            return None
        seen = np.zeros((len(trees), 1, size, self.cache.used), dtype=bool)
        for row, (tree, length) in enumerate(zip(trees, lengths, strict=True)):
            seen[row, :, :, :length] = True
            inside = seen[row, 0, :, length : length + size]
            np.fill_diagonal(inside, True)
            inside[: tree.size, : tree.size] = tree.ancestors
        mask = low(torch.from_numpy(seen).to(self.weights.device), self.weights.dtype)
        return mask_rows(mask, self.weights.heads // self.weights.groups)


def low(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores: 0 where a slot is seen, else the lowest number. Minus infinity would make NaN of a
    block of slots without any that is seen."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)


def weights_of(language_model: LanguageModel) -> Packed:
    """The packed weights of a model, made at the first call and whenever the model's own were changed.

    Raises:
        Unsupported: the model is made of parts that are not known here.
    """
    found = find(language_model)
    if isinstance(found, str):
        raise Unsupported(f"{language_model.name} cannot run on packed weights: {found}.")
    return found


def supports(language_model: LanguageModel) -> str:
    """Why this engine cannot run a model; empty if it can. The first call packs the weights and tries them."""
    found = find(language_model)
    return found if isinstance(found, str) else ""


def find(language_model: LanguageModel) -> Packed | str:
    """The packed weights of a model, or why there are none."""
    model = language_model.model
    return _unfit(model) or kept(language_model, "packed", lambda: _made(model))


def _made(model: Any) -> Packed | str:
    """The packed weights, or why they do not do what the model does."""
    packed = Packed(model)
    gap = _trial(model, packed)
    limit = TRIAL[packed.dtype]
    if not gap <= limit:
        return f"in a trial its logits differ by {gap:.2g} standard deviations from those of its parts in plain form"
    return packed


@torch.inference_mode()
def _trial(model: Any, packed: Packed, *, tokens: int = 16) -> float:
    """The root mean square difference of logits over a few tokens, in standard deviations of the model's own."""
    window = int(getattr(model.config, "max_position_embeddings", None) or tokens)
    start = max(0, min(1000, window - tokens))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, packed.vocabulary, (tokens,), generator=generator).to(packed.device)
    positions = torch.arange(start, start + tokens, device=packed.device)
    wanted = model(input_ids=ids[None], position_ids=positions[None], use_cache=False).logits[0].float()

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = key.transpose(0, 1)[None], value.transpose(0, 1)[None]
        return attention(query[None], keys, values, None, scaling=packed.scaling, causal=True)

    packed.rotary.reserve(start + tokens)
    normed, _ = packed.run(packed.embed(ids), packed.rotary.at(positions), attend)
    found = packed.head(normed).float()
    return float((found - wanted).square().mean().sqrt() / wanted.std())


# The modules of a plain Llama-family model: what each kind of part is made of, exactly.
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


def _unfit(model: Any) -> str:
    """What a model is made of that this engine does not know; empty if nothing."""
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention"}:
        return f"it has layers of the kinds {sorted(kinds)}; only full attention is known here"
    if not kinds and getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return f"its attention sees only the last {config.sliding_window} tokens"
    if set(dict(model.named_children())) != {"model", "lm_head"}:
        return f"it is made of {_names(model)}, not of model and lm_head"
    decoder = model.model
    if set(dict(decoder.named_children())) != {"embed_tokens", "layers", "norm", "rotary_emb"}:
        return f"its decoder is made of {_names(decoder)}, not of embed_tokens, layers, norm and rotary_emb"
    if type(decoder.embed_tokens) is not nn.Embedding or type(model.lm_head) is not nn.Linear:
        return "its embedding or output layer is of a special kind"
    rotary = decoder.rotary_emb
    if getattr(rotary, "rope_type", "default") not in STEADY or not hasattr(rotary, "attention_scaling"):
        return f"its rotary positions are of the kind {getattr(rotary, 'rope_type', 'unknown')!r}"
    for layer in decoder.layers:
        why = _unfit_layer(layer)
        if why:
            return why
    if 2 * rotary.inv_freq.numel() != decoder.layers[0].self_attn.head_dim:
        return "only a part of each head is rotated"
    if not hasattr(decoder.norm, "variance_epsilon"):
        return f"its norm is a {type(decoder.norm).__name__}"
    return _unfit_whole(model)


def _unfit_layer(layer: Any) -> str:
    parts = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
    if set(dict(layer.named_children())) != parts:
        return f"a layer is made of {_names(layer)}, not of {', '.join(sorted(parts))}"
    attention, mlp = layer.self_attn, layer.mlp
    if set(dict(attention.named_children())) != set(_ATTENTION):
        return f"an attention is made of {_names(attention)}, not of {', '.join(_ATTENTION)}"
    if set(dict(mlp.named_children())) != {*_MLP, "act_fn"}:
        return f"an MLP is made of {_names(mlp)}, not of {', '.join(_MLP)} and act_fn"
    for module, names in ((attention, _ATTENTION), (mlp, _MLP)):
        for name in names:
            if type(getattr(module, name)) is not nn.Linear:
                return f"{name} is a {type(getattr(module, name)).__name__}, not a plain matrix"
    if "silu" not in type(mlp.act_fn).__name__.lower():
        return f"its activation is {type(mlp.act_fn).__name__}, not SiLU"
    if not all(hasattr(norm, "variance_epsilon") for norm in (layer.input_layernorm, layer.post_attention_layernorm)):
        return f"its norm is a {type(layer.input_layernorm).__name__}"
    if not all(hasattr(attention, name) for name in ("head_dim", "scaling")):
        return f"a {type(attention).__name__} tells neither its heads' size nor its scaling"
    return ""


def _unfit_whole(model: Any) -> str:
    weights = list(model.parameters())
    if len({(weight.dtype, weight.device) for weight in weights}) > 1:
        return "its weights are of several precisions or on several devices"
    if weights[0].dtype not in TRIAL:
        return f"its weights are {weights[0].dtype}"
    for name, module in model.named_modules():
        # Those of transformers that collect outputs when these are asked for; they stay and change nothing.
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if any(hook.__module__ != "transformers.utils.output_capturing" for hook in hooks):
            return f"a hook on {name or 'the model'} may change what it does"
    return ""


def _names(module: nn.Module) -> str:
    return ", ".join(sorted(dict(module.named_children())))
