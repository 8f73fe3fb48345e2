"""Compiling the native engine, finding its library, and reading GGUF files."""

from __future__ import annotations

import multiprocessing
import struct
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the extra loci-lm[local]")

from loci.errors import BadModel, Unsupported
from loci.lm.engine import native
from loci.lm.engine.native import build, gguf_file, library

needs_compiler = pytest.mark.skipif(bool(native.available()), reason=native.available())


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A user's cache without a library in it."""
    monkeypatch.setenv("LOCI_CACHE", str(tmp_path))
    library.load.cache_clear()
    yield tmp_path
    library.load.cache_clear()


def test_the_librarys_name_follows_its_sources(monkeypatch, tmp_path):
    name = build.file_name()
    for source in build.SOURCES.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    assert build.file_name() == name
    with (tmp_path / "team.h").open("a") as stream:
        stream.write("// changed\n")
    assert build.file_name() != name


def test_without_a_compiler_the_engine_says_so(monkeypatch, fresh):
    monkeypatch.setattr(build, "COMPILERS", ("no-such-compiler",))
    assert "no C++ compiler (looked for no-such-compiler)" in native.available()
    with pytest.raises(Unsupported, match="no C\\+\\+ compiler"):
        library.load()
    assert not list((fresh / "native").glob("*.so"))


def test_another_machine_is_named(monkeypatch, fresh):
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    assert "this is linux on aarch64" in native.available()


@needs_compiler
@pytest.mark.slow
def test_a_compilers_error_is_passed_on(monkeypatch, fresh, tmp_path):
    sources = tmp_path / "sources"
    sources.mkdir()
    for source in build.SOURCES.iterdir():
        (sources / source.name).write_bytes(source.read_bytes() if source.name != "team.cpp" else b"int broken(\n")
    monkeypatch.setattr(build, "SOURCES", sources)
    assert "cannot compile team" in native.available()
    assert not list((fresh / "native").glob("*.so"))


def _library(cache: str, results) -> None:
    import os

    os.environ["LOCI_CACHE"] = cache
    file = build.library()
    results.put((str(file), file.stat().st_ino, file.stat().st_mtime_ns))


@needs_compiler
@pytest.mark.slow
def test_two_processes_that_come_at_once_compile_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=_library, args=(str(tmp_path), results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    first, second = results.get(timeout=120), results.get(timeout=120)
    for worker in workers:
        worker.join()
    assert first == second
    assert [file.suffix for file in (tmp_path / "native").iterdir() if file.suffix != ".lock"] == [".so"]


@needs_compiler
@pytest.mark.slow
def test_a_level_that_the_compiler_does_not_know_is_left_out(monkeypatch, fresh):
    monkeypatch.setitem(build.LEVEL_FLAGS, "amx", ("-mno-such-flag",))
    assert native.available() == ""
    assert "amx" not in library.levels()
    assert library.levels()[0] == "scalar"


@needs_compiler
@pytest.mark.slow
def test_the_sources_compile_without_a_warning(tmp_path):
    import subprocess

    compiler = build.COMPILERS[0]
    for name in ("model", "session", "team", "try"):
        command = [compiler, *build.FLAGS, "-O0", "-Werror", "-fsyntax-only", str(build.SOURCES / f"{name}.cpp")]
        found = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert found.returncode == 0, found.stderr


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf(tmp_path: Path, *, version: int = 3, cut: int = 0) -> Path:
    """A small file with every kind of value and three tensors."""
    values = [
        text("general.alignment") + struct.pack("<II", 4, 64),
        text("name") + struct.pack("<I", 8) + text("tiny"),
        text("ratio") + struct.pack("<If", 6, 0.5),
        text("tokens") + struct.pack("<IIQ", 9, 8, 3) + text("a") + text("bc") + text(""),
        text("scores") + struct.pack("<IIQ3f", 9, 6, 3, 1, 2, 3),
        text("flag") + struct.pack("<I?", 7, True),
    ]
    norm = np.arange(4, dtype=np.float32)
    blocks = np.arange(2 * 40, dtype=np.uint8).reshape(2, 40)  # two rows of two Q4_1 blocks
    tensors = [
        text("norm") + struct.pack("<IQIQ", 1, 4, 0, 0),
        text("matrix") + struct.pack("<IQQIQ", 2, 64, 2, 3, 64),
        text("other") + struct.pack("<IQQIQ", 2, 256, 1, 14, 192),
    ]
    head = struct.pack("<4sIQQ", b"GGUF", version, len(tensors), len(values)) + b"".join(values) + b"".join(tensors)
    head += bytes(-len(head) % 64)
    body = norm.tobytes().ljust(64, b"\0") + blocks.tobytes().ljust(128, b"\0") + bytes(210)
    file = tmp_path / "tiny.gguf"
    file.write_bytes((head + body)[: len(head + body) - cut])
    return file


def test_a_gguf_file_gives_its_tensors_as_they_lie_in_it(tmp_path):
    tensors = gguf_file.read(gguf(tmp_path))
    assert list(tensors) == ["norm", "matrix", "other"]
    np.testing.assert_array_equal(tensors["norm"].rows.view(np.float32)[0], np.arange(4))
    assert tensors["matrix"].format == "Q4_1"
    np.testing.assert_array_equal(tensors["matrix"].rows, np.arange(80).reshape(2, 40))
    assert tensors["other"].format == "format 14"


def test_the_bundled_file_holds_the_formats_that_the_engine_knows():
    from loci.lm.bundled import find

    file = find()
    if file is None:
        pytest.skip("needs the bundled model")
    tensors = gguf_file.read(file)
    assert {tensor.format for tensor in tensors.values()} == {"F32", "Q4_1", "Q8_0"}
    assert tensors["token_embd.weight"].rows.shape == (49152, 612)
    assert len(tensors) == 272


@pytest.mark.parametrize(("version", "cut"), [(9, 0), (3, 300)])
def test_damaged_gguf_files_are_refused(tmp_path, version, cut):
    with pytest.raises(BadModel, match="cannot be read as a GGUF file"):
        gguf_file.read(gguf(tmp_path, version=version, cut=cut))
