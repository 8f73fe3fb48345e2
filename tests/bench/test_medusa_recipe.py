from __future__ import annotations

import gzip
import json
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra loci-lm[local]")

from loci.bench import medusa_recipe as recipe  # noqa: E402
from loci.bench.draft_recipes import read_texts  # noqa: E402
from loci.bench.medusa_recipe import TreeRow, ladder_holds  # noqa: E402
from loci.decoding import distill, medusa  # noqa: E402
from loci.decoding.medusa import Medusa, MedusaHeads, MedusaRecipe, TypicalAcceptance  # noqa: E402
from loci.errors import DataNotFound  # noqa: E402
from loci.lm.sampling import Sampling  # noqa: E402
from loci.lm.verify import MATCH  # noqa: E402

ASKED = [[65, 66, 67], [80, 81]]


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    """The whole recipe on the tiny model: texts, states, heads, calibration, artifact."""
    folder = tmp_path_factory.mktemp("medusa")
    rows = [json.dumps({"instruction": f"do {number}", "input": ""}) for number in range(40)]
    (folder / "instructions.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    options = {
        "model": tiny_model,
        "texts": folder / "texts",
        "tokens": 300,
        "kept_out_tokens": 100,
        "instructions": folder,
        "engine": "hf",
        "progress": False,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "_USER_TOKENS", 4)  # a random model rarely ends a turn: do not wait for it
        return recipe.train(folder / "heads", **options), folder, options


def test_the_recipe_leaves_heads_that_draft(made, tiny_model):
    artifact, folder, _ = made
    assert artifact.path == folder / "heads" / "medusa.safetensors"
    told = json.loads(artifact.path.with_suffix(".json").read_text("utf-8"))
    assert len(told["settings"]["accuracies"]) == 4
    assert told["settings"]["template"]
    assert {"seed", "base", "minutes"} <= set(told)
    drafter = medusa.load(folder / "heads", tiny_model)
    stats, said = recipe.counted(tiny_model, lambda: drafter, ASKED, new_tokens=10, engine="hf")
    assert stats.new_tokens == sum(map(len, said)) == 20
    assert said == recipe.counted(tiny_model, lambda: None, ASKED, new_tokens=10, engine="hf")[1]


def test_running_it_again_writes_no_text_again(made, monkeypatch):
    artifact, folder, options = made
    monkeypatch.setattr(distill._Writer, "round", None)  # would fail if it ran
    again = recipe.train(folder / "again", **options)
    assert again.tensors().keys() == artifact.tensors().keys()
    for name, weight in again.tensors().items():
        assert torch.equal(weight, artifact.tensors()[name])


def test_every_tree_of_the_ladder_is_counted(made, tiny_model):
    values = np.array([[0.4, 0.2, 0.1], [0.3, 0.1, 0.05]])
    heads = MedusaHeads.of(tiny_model, heads=2)
    rows = recipe.ladder(tiny_model, heads, values, ASKED, nodes=(4,), draws=2, new_tokens=6, engine="hf")
    assert [row.name for row in rows] == ["chain", "dense", "calibrated", "random 1", "random 2"]
    assert all(row.measured >= 1.0 for row in rows)


def test_the_ladder_is_judged_step_by_step():
    def rows(chain, dense, calibrated, drawn):
        given = [("chain", 5, chain), ("dense", 16, dense), ("calibrated", 16, calibrated), ("random 1", 16, drawn)]
        return [TreeRow(name=name, nodes=nodes, expected=1.0, measured=value) for name, nodes, value in given]

    assert ladder_holds(rows(1.4, 1.5, 1.7, 1.5)) == {"ladder at 16": True, "random at 16": True}
    assert ladder_holds(rows(1.4, 1.7, 1.6, 1.5)) == {"ladder at 16": False, "random at 16": False}


def test_accuracies_stand_beside_guessing_without_a_model(made, tiny_model):
    _, folder, _ = made
    texts = read_texts(folder / "texts")
    kept_out = distill.teacher_pass(tiny_model, texts.kept_out, folder / "kept-out-teacher", progress=False)
    rows = recipe.accuracy_table(MedusaHeads.of(tiny_model), texts, kept_out)
    assert [row.name for row in rows] == ["medusa", "unigram", "bigram"]
    assert all(one <= five <= ten for row in rows for one, five, ten in zip(row.top1, row.top5, row.top10, strict=True))


def test_exact_sampling_passes_the_test_that_typical_acceptance_fails(tiny_model):
    # Temperature 2 on a model with wide logits: several tokens are likely, and typical acceptance takes the first.
    heads = MedusaHeads.of(tiny_model, heads=2, draft_tokens=np.arange(20))
    drafter = Medusa(heads, accuracies=np.full((2, 10), 0.05))
    found = {
        rule.name: recipe.first_two_tokens(
            tiny_model, drafter, ASKED[0], rule, sampling=Sampling(temperature=6.0), runs=1500, engine="hf"
        )
        for rule in (MATCH, TypicalAcceptance(epsilon=0.001, delta=0.03))
    }
    assert abs(found["match"]["deviations"]) < 4.0
    assert found["typical"]["deviations"] > 10.0


def test_typical_acceptance_is_counted_beside_exact_sampling(tiny_model):
    drafter = Medusa(MedusaHeads.of(tiny_model, heads=2), accuracies=np.full((2, 10), 0.05))
    rows = recipe.typical_table(tiny_model, drafter, ASKED, epsilons=(0.09,), new_tokens=6, engine="hf")
    assert [(row["rule"], row["exact"]) for row in rows] == [("match", True), ("typical 0.09", False)]


def test_the_main_bar_compares_with_plain_decoding_and_with_the_blend(tiny_model):
    drafter = Medusa(MedusaHeads.of(tiny_model, heads=2), accuracies=np.full((2, 10), 0.05))
    found = recipe.main_bar(tiny_model, drafter, ASKED, new_tokens=8, engine="hf")
    assert found["identical"] == 1.0
    assert found["tokens_per_step"] >= 1.0
    assert math.isclose(found["blend_gain"], found["blend_with"] / found["blend_without"] - 1.0)


def test_ablations_train_every_variant(made, tiny_model, tmp_path):
    _, folder, _ = made
    texts = read_texts(folder / "texts")
    training = distill.teacher_pass(tiny_model, texts.training, folder / "training-teacher", progress=False)
    kept_out = distill.teacher_pass(tiny_model, texts.kept_out, folder / "kept-out-teacher", progress=False)
    small = MedusaRecipe(heads=2, epochs=1, positions=64, draft_vocab=None)
    rows = recipe.ablations(tiny_model, training, kept_out, folder=tmp_path, recipe=small, progress=False)
    assert [row.name for row in rows] == ["recipe", "own output", "random start", "decay 1"]


def test_a_model_has_not_drifted_from_itself(made, tiny_model):
    _, folder, _ = made
    texts = read_texts(folder / "texts")
    kept_out = distill.teacher_pass(tiny_model, texts.kept_out, folder / "kept-out-teacher", progress=False)
    assert recipe.drift(tiny_model, tiny_model, kept_out) < 1e-3  # states are kept in bfloat16


def test_untrained_heads_differ_from_the_models_own_by_nothing(default_model):
    assert recipe.initial_gap(default_model, heads=2) < 1e-5


def test_perplexity_needs_its_text(tiny_model, tmp_path):
    with pytest.raises(DataNotFound, match="LOCI_DATA"):
        recipe.perplexity(tiny_model, data=tmp_path)


@pytest.mark.slow
def test_the_default_model_reads_wikitext_as_well_as_it_should(default_model, data):
    assert 10 < recipe.perplexity(default_model, data=data / "wikitext2", tokens=2048) < 40


def test_prompts_are_spread_over_the_tasks(default_model, data):
    asked = recipe.prompts(default_model, limit=6, data=data / "spec_bench")
    assert len(asked) == 6
    assert all(default_model.tokenizer.decode(prompt).endswith("<|im_start|>assistant\n") for prompt in asked)
