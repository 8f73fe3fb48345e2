"""The shared recipe: packing changes nothing, training learns, resuming is exact, a stranger's adapter is refused."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

pytest.importorskip("peft", reason="needs the extra loci-lm[train]")
import torch

from loci.errors import BadInput, BadModel, ModelNotFound
from loci.lm.train import Branch, Example, LoraRecipe, attach, example_loss, fingerprint, load_artifact, train_lora

if TYPE_CHECKING:
    from loci.lm.model import LanguageModel

RECIPE = LoraRecipe(rank=4, alpha=8.0, learning_rate=2e-2, epochs=6, examples_per_step=2)


@pytest.fixture(autouse=True)
def _deprecations_of_peft_are_not_ours() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        yield


@pytest.fixture
def model(tiny_model: LanguageModel) -> LanguageModel:
    return replace(tiny_model, model=copy.deepcopy(tiny_model.model))


def examples(count: int = 8) -> list[Example]:
    """A prefix that names a letter, and two questions that ask for it and for the next one."""
    made = []
    for number in range(count):
        letter = 40 + number
        branches = [Branch(prompt=[7, 8], answer=[letter, 2]), Branch(prompt=[9], answer=[letter + 1, 2])]
        made.append(Example.packed([5, letter, 6], branches))
    return made


def train(model: LanguageModel, folder: Path, **options: object) -> object:
    settings = {"recipe": RECIPE, "name": "part", "data": "letters", "progress": False} | options
    return train_lora(model, settings.pop("examples", examples()), folder=folder, **settings)  # type: ignore[arg-type]


def test_a_packed_sequence_has_the_loss_of_its_branches_one_by_one(model: LanguageModel) -> None:
    draw = np.random.default_rng(0)
    prefix = draw.integers(0, 200, 11).tolist()
    branches = [
        Branch(
            prompt=draw.integers(0, 200, 1 + n).tolist(), answer=draw.integers(0, 200, 4 - n).tolist(), weight=1.0 + n
        )
        for n in range(4)
    ]
    for both_ways in (True, False):
        together = example_loss(model.model, Example.packed(prefix, branches, both_ways=both_ways))
        alone = [example_loss(model.model, Example.packed(prefix, [one], both_ways=both_ways)) for one in branches]
        torch.testing.assert_close(together, torch.stack(alone).sum(), rtol=1e-4, atol=1e-4)


def test_a_plain_example_is_what_the_model_computes_on_its_own(model: LanguageModel) -> None:
    prompt, answer = [3, 14, 15, 92], [65, 35, 89]
    logits = model.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum")
    torch.testing.assert_close(example_loss(model.model, Example.plain(prompt, answer)), expected, rtol=1e-4, atol=1e-4)


def test_an_answer_sees_prefix_and_own_prompt_but_no_other_branch_and_not_its_own_future() -> None:
    example = Example.packed([1, 2], [Branch(prompt=[3, 4], answer=[5, 6]), Branch(prompt=[7], answer=[8])])
    assert example.visible().astype(int).tolist() == [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]
    assert example.targets.tolist() == [-1, -1, -1, 5, 6, 8]
    assert example.positions.tolist() == [0, 1, 2, 3, 4, 2]


def test_a_branch_without_an_answer_is_refused() -> None:
    with pytest.raises(BadInput, match="branch 1 has 1 prompt and 0 answer"):
        Example.packed([1], [Branch(prompt=[2], answer=[])])


def test_the_loss_falls_and_the_base_model_stays_as_it_was(model: LanguageModel, tmp_path: Path) -> None:
    before = {name: weight.clone() for name, weight in model.model.state_dict().items()}
    artifact = train(model, tmp_path)
    after = model.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    taught = attach(model, artifact)  # type: ignore[arg-type]
    untaught = sum(float(example_loss(model.model, one)) for one in examples())
    assert sum(float(example_loss(taught.model, one)) for one in examples()) < 0.3 * untaught
    assert torch.equal(before["model.embed_tokens.weight"], model.model.state_dict()["model.embed_tokens.weight"])


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(model: LanguageModel, tmp_path: Path) -> None:
    whole = train(model, tmp_path / "whole").tensors()  # type: ignore[attr-defined]
    assert train(model, tmp_path / "pieces", stop_after=5) is None
    assert train(model, tmp_path / "pieces", stop_after=13) is None
    pieces = train(model, tmp_path / "pieces").tensors()  # type: ignore[attr-defined]
    assert whole.keys() == pieces.keys()
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)
    assert not (tmp_path / "pieces" / "checkpoint").exists()


def test_a_checkpoint_of_another_recipe_is_refused(model: LanguageModel, tmp_path: Path) -> None:
    train(model, tmp_path, stop_after=2)
    with pytest.raises(BadInput, match="another recipe"):
        train(model, tmp_path, recipe=replace(RECIPE, learning_rate=1e-3))


def test_ctrl_c_saves_says_how_to_go_on_and_is_raised(
    model: LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Impatient(list[Example]):
        asked = 0

        def __getitem__(self, number: object) -> Example:  # type: ignore[override]
            Impatient.asked += 1
            if Impatient.asked > 9:
                raise KeyboardInterrupt
            return super().__getitem__(number)  # type: ignore[index, return-value]

    with pytest.raises(KeyboardInterrupt):
        train(model, tmp_path, examples=Impatient(examples()))
    assert 0 < json.loads((tmp_path / "checkpoint" / "state.json").read_text())["step"] < 24
    assert "goes on from" in capsys.readouterr().err
    whole = train(model, tmp_path / "whole").tensors()  # type: ignore[attr-defined]
    resumed = train(model, tmp_path).tensors()  # type: ignore[attr-defined]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_json_says_how_the_artifact_was_made(model: LanguageModel, tmp_path: Path) -> None:
    artifact = train(model, tmp_path)
    written = json.loads((tmp_path / "part.json").read_text())
    assert written["base"] == fingerprint(model.model)
    assert written["recipe"]["rank"] == 4
    assert written["data"] == "letters"
    assert set(written["versions"]) == {"torch", "transformers", "peft"}
    assert load_artifact(tmp_path / "part.safetensors") == artifact


def test_an_artifact_of_another_model_is_refused(model: LanguageModel, tmp_path: Path) -> None:
    artifact = train(model, tmp_path)
    other = replace(model, model=copy.deepcopy(model.model))
    with torch.no_grad():
        other.model.get_input_embeddings().weight.mul_(1.5)
    with pytest.raises(BadModel, match="was trained for"):
        attach(other, artifact)  # type: ignore[arg-type]


def test_a_missing_artifact_names_both_files(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"\.safetensors and a \.json"):
        load_artifact(tmp_path / "nothing.safetensors")


def test_a_copy_in_bfloat16_has_the_fingerprint_of_its_original(model: LanguageModel) -> None:
    rounded = copy.deepcopy(model.model).to(torch.bfloat16)
    assert fingerprint(rounded) == fingerprint(copy.deepcopy(rounded).float()) == fingerprint(model.model)


def test_a_recipe_of_rank_zero_is_refused() -> None:
    with pytest.raises(BadInput, match="rank"):
        LoraRecipe(rank=0)
