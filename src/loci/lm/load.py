"""Loading a causal language model: the bundled one, a name on the hub, a folder, or a GGUF file.

Ours    nothing is guessed from a name: what a folder holds decides. Weights are safetensors only, never pickle. The
        hub is asked only when a hub name is given and its files are not on this machine yet.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loci import settings
from loci.errors import BadInput, BadModel, ModelError, ModelNotFound, Unsupported
from loci.lm import bundled, machine
from loci.lm.imports import first_line, paused_collection, require, silent_bars
from loci.lm.model import LanguageModel

if TYPE_CHECKING:
    import torch

# What a tokenizer can be read from; one of them must be there.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
# What a download from the hub fetches: no pickle, no other frameworks' weights.
WANTED = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.txt", "*.jinja")

_DTYPES = ("float32", "bfloat16", "float16")


def load(
    source: str | Path = "default", *, dtype: str | torch.dtype = "auto", device: str | torch.device = "auto"
) -> LanguageModel:
    """Load a model, ready to generate.

    Args:
        source: "default" (the bundled SmolLM2-135M-Instruct), a folder with config.json, a tokenizer and safetensors,
            a GGUF file, or a name on the Hugging Face hub such as "HuggingFaceTB/SmolLM2-360M-Instruct", which is
            downloaded unless it is on this machine already. A path that exists wins over a hub name.
        dtype: "float32", "bfloat16", "float16", a torch dtype, or "auto": bfloat16 on accelerators and on processors
            that multiply it in hardware (AMX, AVX-512 BF16), float32 elsewhere.
        device: "cpu", "cuda", "cuda:1", "mps", a torch device, or "auto": the first accelerator, else the processor.

    Raises:
        ModelNotFound: nothing is there, here or on the hub.
        BadModel: a part is missing (tokenizer, weights, config) or damaged.
        MissingExtra: a package is not installed; the message names the command.
    """
    require("torch", purpose="a local model")
    require("transformers", purpose="a local model")
    place = _device(device)
    precision = _dtype(dtype, place)
    name, folder = locate(source, dtype=precision)
    check_folder(folder)
    manifest = bundled.Manifest.read(folder)
    return LanguageModel(
        name=name,
        folder=folder,
        hash=manifest.source_sha256 if manifest else weights_hash(folder),
        tokenizer=_tokenizer(folder),
        model=_model(folder, dtype=precision, device=place),
    )


def locate(source: str | Path, *, dtype: torch.dtype) -> tuple[str, Path]:
    """The model's name and the folder that holds it, after download or conversion where one is due."""
    if source == "default":
        return bundled.NAME, bundled.converted(bundled.bundled(), dtype=dtype)
    path = Path(source).expanduser()
    if path.is_file():
        return path.stem, bundled.converted(path, dtype=dtype)
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        if (path / "config.json").is_file() or not files:
            return path.resolve().name, path
        if len(files) > 1:
            raise BadModel(f"{path} holds {len(files)} GGUF files; name the one to load, for example {files[0]}.")
        return files[0].stem, bundled.converted(files[0], dtype=dtype)
    text = os.fspath(source)
    if isinstance(source, Path) or not _hub_name(text):
        raise ModelNotFound(
            f'there is no file or folder {text!r}. A model is "default", a folder, a GGUF file, or a hub name like'
            " owner/model."
        )
    return text, _download(text)


def check_folder(folder: Path) -> None:
    """Raise `BadModel` for a folder that lacks its config, tokenizer or weights, or whose weights are damaged."""
    if not (folder / "config.json").is_file():
        raise BadModel(f"{folder} has no config.json, so it is no model folder. A model folder holds config.json,"
                       " tokenizer.json and *.safetensors.")  # fmt: skip
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise BadModel(
            f"{folder} has no tokenizer (none of {', '.join(TOKENIZERS)}). Copy the tokenizer's files from where the"
            " model came from, or save them with tokenizer.save_pretrained."
        )
    files = weight_files(folder)
    if not files:
        pickled = sorted(file.name for file in folder.glob("*.bin"))
        if pickled:
            raise BadModel(
                f"{folder} holds its weights as {pickled[0]}, a pickle, which can run any code when opened. Save them"
                " as safetensors: model.save_pretrained(folder)."
            )
        raise BadModel(f"{folder} has no weights: no *.safetensors file. Copy them there, or load the hub name.")
    for file in files:
        _check_safetensors(file)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those its index names, else all."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise BadModel(f"{index} is damaged: it is no JSON with a weight_map. Copy it again.") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise BadModel(
            f"{folder} lacks {len(missing)} of {len(names)} weight files, {missing[0]} first. Copy it again."
        )
    return [folder / name for name in names]


def weights_hash(folder: Path) -> str:
    """sha256 of the weights, remembered in the user's cache by path, size and time of change.

    One file's own sha256; of several, the sha256 over theirs in the order of their names.
    """
    known_file = settings.cache() / "hashes.json"
    try:
        known = json.loads(known_file.read_text("utf-8"))
    except (OSError, ValueError):
        known = {}
    hashes = []
    fresh = False
    for file in weight_files(folder):
        status = file.stat()
        key = f"{file.resolve()}|{status.st_size}|{status.st_mtime_ns}"
        if key not in known:
            known[key] = bundled.sha256(file)
            fresh = True
        hashes.append(known[key])
    if fresh:
        _remember(known_file, known)
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _remember(file: Path, value: dict[str, str]) -> None:
    """Write JSON whole or not at all. A cache that cannot be written costs time at the next load, nothing else."""
    part = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(value, indent=1), encoding="utf-8")
        part.replace(file)
    except OSError:
        part.unlink(missing_ok=True)


def _check_safetensors(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            tensors.keys()
    except (SafetensorError, OSError) as error:
        raise BadModel(f"{file} is damaged ({error}). Copy or download it again.") from error


def _hub_name(text: str) -> bool:
    """Whether the hub could know this name: one or two parts of letters, digits and "-_."."""
    parts = text.split("/")
    allowed = all(part and part.replace("-", "").replace("_", "").replace(".", "").isalnum() for part in parts)
    return len(parts) <= 2 and allowed and text.isascii() and not text.endswith((".gguf", ".safetensors"))


def _download(name: str) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(WANTED), local_files_only=True))
    except errors.LocalEntryNotFoundError:
        pass
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(WANTED)))
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{name} may be read only by accounts that accepted its terms. Accept them at https://huggingface.co/{name}"
            " and log in with:  hf auth login"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFound(
            f"the hub knows no model {name!r}, and no file or folder is called that. If it is private, log in with:"
            "  hf auth login"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, errors.OfflineModeIsEnabled, OSError) as error:
        raise ModelNotFound(
            f"{name} is not on this machine, and the hub cannot be reached ({first_line(error)}). Check the network,"
            ' or give a folder or a GGUF file that is here; "default" needs no network.'
        ) from error


def _device(device: str | torch.device) -> torch.device:
    import torch

    if device == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        wanted = torch.device(device)
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:
        raise Unsupported(
            f'the device {str(device)!r} cannot be used here ({first_line(error)}). Use device="auto" or "cpu".'
        ) from error
    return wanted


def _dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    import torch

    name = str(dtype).removeprefix("torch.")
    if name == "auto":
        name = "bfloat16" if device.type != "cpu" or machine.fast_bfloat16() else "float32"
    if name not in _DTYPES:
        raise BadInput(f'dtype is {name!r}; it can be "auto", {", ".join(repr(known) for known in _DTYPES)}.')
    found: torch.dtype = getattr(torch, name)
    return found


def _tokenizer(folder: Path) -> Any:
    with paused_collection():
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # its parser raises nothing more special
            raise BadModel(f"the tokenizer in {folder} cannot be read: {first_line(error)}.") from error


def _model(folder: Path, *, dtype: torch.dtype, device: torch.device) -> Any:
    with paused_collection(), silent_bars():
        from transformers import AutoModelForCausalLM

        reader: Any = AutoModelForCausalLM
        try:
            model, found = reader.from_pretrained(folder, dtype=dtype, local_files_only=True, output_loading_info=True)
        except (ValueError, OSError, KeyError, TypeError, ImportError, RuntimeError) as error:
            raise BadModel(f"the model in {folder} cannot be loaded: {first_line(error)}.") from error
    for what in ("missing_keys", "mismatched_keys"):
        if found[what]:
            wrong = sorted(str(key) for key in found[what])
            raise BadModel(
                f"the weights in {folder} do not fit its config.json: {len(wrong)} {what.replace('_', ' ')},"
                f" {wrong[0]} first. Copy the folder again."
            )
    return model.to(device).eval()
