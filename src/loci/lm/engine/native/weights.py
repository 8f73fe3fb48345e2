"""A Llama-family model's weights, packed for the native engine, and the proof that they are the model's own.

Where the model came out of a GGUF file that is on this machine, the file's blocks are kept as they are: a third of the
bytes of bf16, and bytes are what a step waits for. Otherwise its weights are packed as bf16. Either way every packed
weight is compared with the model's own: equal in float32, or after rounding to bfloat16 for a bfloat16 model. A model
that differs from its file, because adapters were merged into it, is packed from its own weights; one whose weights bf16
cannot hold is refused, because the engine would run another model.

Letters  place: the output of a packed matrix that a row goes to (queries, keys and values stand in one matrix; gates
         and ups alternate by 16).
Trap     GGUF files of this family hold the rows of queries and keys in another order, in which the two numbers that
         turn together are neighbours; here they stand half a head apart, as in `transformers`.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int32
from torch import Tensor

from loci.errors import BadModel, Unsupported
from loci.lm import bundled
from loci.lm.engine.base import kept
from loci.lm.engine.native import gguf_file, library
from loci.lm.model import LanguageModel

# Classes of `transformers` whose arithmetic this engine repeats.
FAMILY = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
# Rotary kinds whose angles depend on the position alone.
ROTARY = ("default", "linear", "llama3", "yarn", "proportional")

_BLOCK_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The numbers of a model that its config names."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    inner: int
    vocabulary: int
    epsilon: float
    tied: bool

    @classmethod
    def of(cls, model: Any) -> Sizes:
        config = model.config
        attention = model.model.layers[0].self_attn
        return cls(
            layers=len(model.model.layers),
            width=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_size=attention.head_dim,
            inner=config.intermediate_size,
            vocabulary=model.lm_head.weight.shape[0],
            epsilon=float(model.model.norm.variance_epsilon),
            tied=model.lm_head.weight is model.model.embed_tokens.weight,
        )


def why_not(language_model: LanguageModel) -> str:
    """What in a model's build this engine does not know; empty if it knows all. The weights are not looked at."""
    model: Any = language_model.model
    kind = type(model).__name__
    if kind not in FAMILY:
        return f"{kind} is not of the Llama family ({', '.join(FAMILY)})"
    config = model.config
    if language_model.device.type != "cpu":
        return f"the model is on {language_model.device.type!r}, not on the processor"
    if language_model.dtype not in (torch.float32, torch.bfloat16):
        return f"its weights are {language_model.dtype}; this engine takes float32 and bfloat16"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act!r}, not silu"
    if any(kind == "sliding_attention" for kind in getattr(config, "layer_types", None) or ()) or (
        type(model).__name__ == "MistralForCausalLM" and getattr(config, "sliding_window", None)
    ):
        return "it has layers with a sliding window"
    rotary = model.model.rotary_emb
    if rotary.rope_type not in ROTARY:
        return f"its rotary positions are of the kind {rotary.rope_type!r}, whose angles change with the length"
    sizes = Sizes.of(model)
    if 2 * len(rotary.inv_freq) != sizes.head_size:
        return "it turns only a part of each head"
    for what, number in (("width", sizes.width), ("inner width", sizes.inner), ("head size", sizes.head_size)):
        if number % 32:
            return f"its {what} is {number}, no multiple of 32"
    for layer in model.model.layers:
        if any(
            module.bias is not None for module in (layer.self_attn.o_proj, layer.mlp.gate_proj, layer.mlp.down_proj)
        ):
            return "its output or inner products have biases"
    for name, module in model.named_modules():
        if name.endswith("_proj") and type(module) is not torch.nn.Linear:
            return f"{name} is a {type(module).__name__}, not a plain matrix; merge adapters first"
    return ""


class Weights:
    """A packed model: the handle of the library, and the tables of angles, which grow when they are asked for.

    `form` says how the weights are held: "Q4_1 Q8_0" names the formats of blocks, "BF16" the model's own weights.
    """

    def __init__(self, sizes: Sizes, rotary: Any, attention_scale: float) -> None:
        self.sizes = sizes
        self.form = ""
        self._library = library.load()
        self._rotary = rotary
        self._lock = Lock()
        self._angles: tuple[Float32[np.ndarray, "position half"], Float32[np.ndarray, "position half"]] | None = None
        shape = library.Shape(
            layers=sizes.layers,
            width=sizes.width,
            heads=sizes.heads,
            kv_heads=sizes.kv_heads,
            head_size=sizes.head_size,
            inner=sizes.inner,
            vocabulary=sizes.vocabulary,
            epsilon=sizes.epsilon,
            scale=attention_scale,
            tied=sizes.tied,
        )
        handle = ctypes.c_void_p()
        library.check(self._library.loci_model_new(ctypes.byref(shape), ctypes.byref(handle)))
        self.handle = handle
        weakref.finalize(self, self._library.loci_model_free, handle)

    @property
    def nbytes(self) -> int:
        return int(self._library.loci_model_bytes(self.handle))

    def angles(
        self, positions: int
    ) -> tuple[Float32[np.ndarray, "position half"], Float32[np.ndarray, "position half"]]:
        """Cosines and sines of at least so many positions, as the model's own rotary module gives them."""
        with self._lock:
            if self._angles is None or len(self._angles[0]) < positions:
                count = 1024
                while count < positions:
                    count *= 2
                half = self.sizes.head_size // 2
                with torch.inference_mode():
                    found = self._rotary(torch.zeros(1), torch.arange(count)[None])
                cosines, sines = (np.ascontiguousarray(part[0, :, :half].float().numpy()) for part in found)
                self._angles = cosines, sines
            return self._angles

    def matrix(self, which: int, layer: int, form: str) -> None:
        library.check(self._library.loci_model_matrix(self.handle, which, layer, library.FORMATS[form]))

    def rows(self, which: int, layer: int, data: np.ndarray, places: Int32[np.ndarray, " row"]) -> None:
        data = np.ascontiguousarray(data)
        library.check(
            self._library.loci_model_rows(
                self.handle, which, layer, data.ctypes.data, data[0].nbytes, len(data), places.ctypes.data
            )
        )

    def differing(self, which: int, layer: int, weight: Tensor, places: Int32[np.ndarray, " row"]) -> int:
        """How many of the packed weights are not the model's."""
        weight, count = weight.detach().contiguous(), ctypes.c_int32()
        library.check(
            self._library.loci_model_matches(
                self.handle,
                which,
                layer,
                weight.data_ptr(),
                weight.dtype == torch.float32,
                len(weight),
                places.ctypes.data,
                ctypes.byref(count),
            )
        )
        return count.value

    def vector(self, which: int, layer: int, values: Float32[np.ndarray, " width"]) -> None:
        values = np.ascontiguousarray(values, dtype=np.float32)
        library.check(self._library.loci_model_vector(self.handle, which, layer, values.ctypes.data, len(values)))


def weights_of(language_model: LanguageModel, *, gguf: Path | None = None) -> Weights:
    """The packed form of this model, made once and kept with it.

    Args:
        gguf: the file that the model came from; unless given, the bundled one is tried where it fits.

    Raises:
        Unsupported: the engine would not run this model but another; or the library is not available.
    """
    found = kept(language_model, ("native", gguf), lambda: _packed(language_model, gguf))
    if isinstance(found, str):
        raise Unsupported(f"the native engine cannot run {language_model.name}: {found}.")
    return found


def _packed(language_model: LanguageModel, gguf: Path | None) -> Weights | str:
    model: Any = language_model.model
    sizes = Sizes.of(model)
    rotary, scale = model.model.rotary_emb, float(model.model.layers[0].self_attn.scaling)
    file = gguf or _bundled_file(language_model)
    why = ""
    if file is not None:
        made = Weights(sizes, rotary, scale)
        why = _fill_from_blocks(made, model, file)
        if not why:
            return made
        if gguf is not None:
            return why
    made = Weights(sizes, rotary, scale)
    wrong = _fill_from_model(made, model)
    if not wrong:
        return made
    return f"{wrong}{'; ' + why if why else ''}. Load it in bfloat16 for this engine"


def _bundled_file(language_model: LanguageModel) -> Path | None:
    manifest, file = bundled.Manifest.read(language_model.folder), bundled.find()
    if manifest is None or file is None or file.name != manifest.source:
        return None
    return file if bundled.fingerprint(file)[:12] in language_model.folder.name else None


def _matrices(
    model: Any, sizes: Sizes
) -> Iterator[tuple[int, int, list[tuple[str, Tensor, Int32[np.ndarray, " row"]]]]]:
    """Every packed matrix with the model's matrices that it holds, and their rows' places."""

    def straight(count: int, first: int = 0) -> Int32[np.ndarray, " row"]:
        return np.arange(first, first + count, dtype=np.int32)

    rows = straight(sizes.inner)
    alternating = rows // 16 * 32 + rows % 16
    for number, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        parts, first = [], 0
        for name in ("q_proj", "k_proj", "v_proj"):
            weight = getattr(attention, name).weight
            parts.append((f"self_attn.{name}", weight, straight(len(weight), first)))
            first += len(weight)
        yield library.QKV, number, parts
        yield library.OUT, number, [("self_attn.o_proj", attention.o_proj.weight, straight(sizes.width))]
        gates = [("mlp.gate_proj", mlp.gate_proj.weight, alternating)]
        yield (
            library.GATE_UP,
            number,
            [*gates, ("mlp.up_proj", mlp.up_proj.weight, (alternating + 16).astype(np.int32))],
        )
        yield library.DOWN, number, [("mlp.down_proj", mlp.down_proj.weight, straight(sizes.width))]
    yield library.HEAD, 0, [("lm_head", model.lm_head.weight, straight(sizes.vocabulary))]
    if not sizes.tied:
        yield library.EMBEDDING, 0, [("embed_tokens", model.model.embed_tokens.weight, straight(sizes.vocabulary))]


def _fill_from_model(made: Weights, model: Any) -> str:
    """Pack the model's own weights as bf16. Why that is another model; empty if it is the same."""
    for which, layer, parts in _matrices(model, made.sizes):
        made.matrix(which, layer, "BF16")
        for name, weight, places in parts:
            data = weight.detach().to(torch.bfloat16).contiguous().view(torch.int16).numpy()
            made.rows(which, layer, data, places)
            if made.differing(which, layer, weight, places):
                return f"its weights are float32 and bfloat16 cannot hold them (layer {layer}, {name})"
    _fill_vectors(made, model, {})
    made.form = "BF16"
    return ""


def _fill_from_blocks(made: Weights, model: Any, file: Path) -> str:
    """Pack the blocks of a GGUF file. Why they are not this model's; empty if they are."""
    try:
        tensors = gguf_file.read(file)
    except BadModel as error:
        return str(error).rstrip(".")
    forms: list[str] = []
    for which, layer, parts in _matrices(model, made.sizes):
        names = [_block_name(name, layer, tensors) for name, _, _ in parts]
        found = {tensors[name].format if name in tensors else "missing" for name in names}
        form = found.pop()
        if found or form not in library.FORMATS:
            return f"{file.name} holds {names[0]} as {', '.join({form, *found})}, which this engine does not know"
        forms.append(form)
        made.matrix(which, layer, form)
        for (name, weight, places), stored in zip(parts, names, strict=True):
            data = tensors[stored].rows
            if len(data) != len(weight):
                return f"{file.name} holds {len(data)} rows of {stored}, the model {len(weight)}"
            heads = {"self_attn.q_proj": made.sizes.heads, "self_attn.k_proj": made.sizes.kv_heads}.get(name)
            if heads and type(model).__name__ != "Qwen2ForCausalLM":  # whose files keep the order of transformers
                order = np.arange(len(data)).reshape(heads, made.sizes.head_size // 2, 2).swapaxes(1, 2).reshape(-1)
                data = data[order]
            made.rows(which, layer, data, places)
            if made.differing(which, layer, weight, places):
                return f"its weights are not those of {file.name} (layer {layer}, {name})"
    vectors = {name: tensor.rows.view(np.float32)[0] for name, tensor in tensors.items() if tensor.format == "F32"}
    why = _fill_vectors(made, model, vectors)
    made.form = " ".join(dict.fromkeys(forms))
    return why


def _block_name(name: str, layer: int, tensors: Container[str]) -> str:
    if name in _BLOCK_NAMES:
        return f"blk.{layer}.{_BLOCK_NAMES[name]}.weight"
    return "output.weight" if name == "lm_head" and "output.weight" in tensors else "token_embd.weight"


def _fill_vectors(made: Weights, model: Any, stored: dict[str, np.ndarray]) -> str:
    """Norms and biases: the file's where it has them, in full precision, else the model's."""

    def fill(which: int, layer: int, weight: Tensor, name: str) -> str:
        values = weight.detach().float().numpy()
        if name in stored:
            same = torch.from_numpy(stored[name].copy()).to(weight.dtype).equal(weight.detach())
            if not same:
                return f"its weights are not those of its file ({name})"
            values = stored[name]
        made.vector(which, layer, values)
        return ""

    for number, layer in enumerate(model.model.layers):
        why = fill(library.FIRST_NORM, number, layer.input_layernorm.weight, f"blk.{number}.attn_norm.weight")
        why = why or fill(
            library.SECOND_NORM, number, layer.post_attention_layernorm.weight, f"blk.{number}.ffn_norm.weight"
        )
        biases = [getattr(layer.self_attn, name).bias for name in ("q_proj", "k_proj", "v_proj")]
        if any(bias is not None for bias in biases):
            made.vector(library.QKV_BIAS, number, torch.cat(biases).detach().float().numpy())
        if why:
            return why
    return fill(library.LAST_NORM, 0, model.model.norm.weight, "output_norm.weight")
