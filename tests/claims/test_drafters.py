"""The claims of the drafters: what they judge, and that they can be measured. A tiny model stands in for the real one,
with trained parts of its own; the figures that count are made by `loci claim`."""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the extra loci-lm[local]")

from loci.claims import base, drafting
from loci.claims import hidden_transfer as hidden_claim
from loci.claims import medusa as medusa_claim
from loci.claims import parallel_prompt_decoding as ppd_claim
from loci.claims import recursive_speculative_decoding as rsd_claim
from loci.claims import token_recycling as recycling_claim
from loci.errors import ModelNotFound
from loci.lm.model import LanguageModel

CLAIMS = (recycling_claim, rsd_claim, medusa_claim, hidden_claim, ppd_claim)
TRAINED = (rsd_claim, medusa_claim, hidden_claim, ppd_claim)


# What is judged


def recycling(small: float, speed: float, large: float) -> dict[str, Any]:
    def run(name: str, tokens: float) -> dict[str, Any]:
        return {"engines": {"native": {name: {"tokens_per_step": tokens, "ratio_to_plain": speed}}}}

    return {
        "16 nodes": run(recycling_claim.DRAFTER, small),
        "81 nodes": run(recycling_claim.LARGE, large),
    }


def medusa(tokens: float, fast: float, slow: float, identical: float, gain: float) -> dict[str, Any]:
    def run(engine: str, **figures: float) -> dict[str, Any]:
        return {"engines": {engine: {"plain": {}, "medusa": figures}}}

    return {
        "fastest": run("native", tokens_per_step=tokens, ratio_to_plain=fast),
        "transformers": run("hf", tokens_per_step=tokens, ratio_to_plain=slow),
        "float32": run("hf", identical=identical),
        "blend": {"blend_gain": gain},
    }


def hidden(middle: float, last: float, shipped: float, heads: float) -> dict[str, Any]:
    def row(far: float) -> dict[str, Any]:
        return {"top1": (0.3 + far, 0.2 + far, 0.1 + far)}

    return {
        "accuracies": {"middle": row(middle), "last": row(last), "shipped": row(shipped), "medusa": row(heads)},
    }


def rsd(error: float, gap: float, warm: int, cool: int) -> dict[str, Any]:
    return {
        "largest_error": error,
        "length": {"ahead_in_errors": {"a > b": 3.0, "b > c": gap}},
        "budget at 1.0": {"wins": {str(number): number < warm for number in range(5)}},
        "budget at 0.3": {"wins": {str(number): number < cool for number in range(5)}},
    }


@pytest.mark.parametrize(
    ("figures", "verdict"),
    [
        ((1.8, 1.35, 2.0), True),
        ((1.79, 1.35, 2.0), False),
        ((1.8, 1.34, 2.0), False),
        ((1.8, 1.35, 1.99), False),
    ],
)
def test_recycling_is_judged_by_tokens_per_step_of_both_trees_and_by_speed(figures, verdict) -> None:
    assert recycling_claim.holds(recycling(*figures)) is verdict


@pytest.mark.parametrize(
    ("figures", "verdict"),
    [
        ((1.7, 1.15, 1.3, 1.0, 0.1), True),
        ((1.69, 1.15, 1.3, 1.0, 0.1), False),
        ((1.7, 1.14, 1.3, 1.0, 0.1), False),
        ((1.7, 1.15, 1.29, 1.0, 0.1), False),
        ((1.7, 1.15, 1.3, 0.95, 0.1), False),
        ((1.7, 1.15, 1.3, 1.0, 0.09), False),
    ],
)
def test_medusa_is_judged_by_tokens_speed_the_same_words_and_what_it_adds(figures, verdict) -> None:
    assert medusa_claim.holds(medusa(*figures)) is verdict


@pytest.mark.parametrize(
    ("gaps", "verdict"),
    [
        ((-0.02, 0.0, 0.05), True),  # two tokens ahead nothing is asked but that the gap grows
        ((0.01, 0.02, 0.03), True),
        ((-0.03, -0.01, 0.05), False),
        ((-0.03, 0.01, -0.01), False),
        ((0.03, 0.02, 0.04), False),
        ((0.01, 0.03, 0.03), False),
    ],
)
def test_prompt_tokens_are_judged_by_distant_guesses_beside_medusas(gaps, verdict) -> None:
    assert ppd_claim.holds({"ahead_of_medusa": list(gaps)}) is verdict


@pytest.mark.parametrize(
    ("figures", "verdict"),
    [
        ((0.05, 0.0, 0.03, 0.0), True),
        ((0.05, 0.03, 0.03, 0.0), False),
        ((0.05, 0.0, 0.015, 0.0), False),
    ],
)
def test_hidden_transfer_is_judged_by_the_layer_and_beside_medusas_heads(figures, verdict) -> None:
    assert hidden_claim.holds(hidden(*figures)) is verdict


def test_hidden_transfer_must_be_ahead_at_every_distance() -> None:
    figures = hidden(0.05, 0.0, 0.03, 0.0)
    figures["accuracies"]["middle"]["top1"] = (0.4, 0.3, 0.11)
    assert not hidden_claim.holds(figures)


@pytest.mark.parametrize(
    ("figures", "verdict"),
    [
        ((1e-15, 2.5, 4, 3), True),
        ((1e-9, 2.5, 4, 3), False),
        ((1e-15, 1.9, 4, 3), False),
        ((1e-15, 2.5, 3, 3), False),
        ((1e-15, 2.5, 4, 2), False),
    ],
)
def test_drawing_without_replacement_is_judged_by_exactness_length_and_budget(figures, verdict) -> None:
    assert rsd_claim.holds(rsd(*figures)) is verdict


def test_the_enumeration_is_exact_and_finds_a_rule_that_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from loci.lm import verify

    assert rsd_claim.largest_error(6) < 1e-12
    monkeypatch.setattr(verify, "residual", lambda p, q: p)
    assert rsd_claim.largest_error(6) > 0.1


def test_lengths_are_joined_prompt_by_prompt() -> None:
    from loci.bench.rsd_recipe import Row

    def rows(*tokens: float) -> dict[str, Row]:
        return {"SD": Row(name="SD", nodes=2, per_prompt=tokens, memory_bound=1.0, tokens_per_second=1.0)}

    joined = rsd_claim.over_lengths({2: rows(1.0, 2.0), 3: rows(2.0, 4.0)})
    assert joined["SD"].per_prompt == (1.5, 3.0)


# That it can be measured

TURNS = {"multi_turn": ["say it", "again"], "translation": ["wort"], "summarization": ["long text"], "qa": ["who?"]}


@pytest.fixture(scope="module")
def place(tiny_model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache and a folder of data of its own."""
    from loci.lm.engine.choose import choose

    choose(tiny_model)  # a compiled engine comes from the usual cache
    folder = tmp_path_factory.mktemp("claims")
    (folder / "data" / "spec_bench").mkdir(parents=True)
    questions = [
        {"question_id": 2 * number, "category": task, "task": task, "turns": turns}
        for number, (task, turns) in enumerate(TURNS.items())
    ]
    (folder / "data" / "spec_bench" / "question.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (folder / "data" / "instructions").mkdir()
    rows = [json.dumps({"instruction": f"do {number}", "input": ""}) for number in range(40)]
    (folder / "data" / "instructions" / "instructions.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCI_CACHE", str(folder / "cache"))
        patch.setenv("LOCI_DATA", str(folder / "data"))
        yield folder


@pytest.fixture(scope="module")
def drafters(place: Path, tiny_model: LanguageModel) -> Path:
    """Texts and one trained part of each kind, where a user's own lie."""
    from loci.bench import draft_recipes
    from loci.decoding import distill, hidden_transfer
    from loci.decoding import rsd as draft_model
    from loci.decoding.distill import DistilledText

    draw = np.random.default_rng(0)
    texts = [
        DistilledText(tokens=draw.integers(0, 256, 40).astype(np.int32), written=np.arange(40) > 4, temperature=0.0)
        for _ in range(4)
    ]
    distill.save_texts(distill.folder(), texts)
    distill.save_texts(distill.folder() / draft_recipes.KEPT_OUT, texts[:2])
    known = draft_recipes.read_texts(distill.folder())
    folder = place / "cache" / "drafters"
    for name in ("medusa", "ppd"):
        draft_recipes.train(name, tiny_model, known, folder=folder / name, minutes=0.002)
    hidden_transfer.train(
        tiny_model, texts, texts, folder=folder / "hidden", layers=(1, 1, 1), minutes=0.002, progress=False
    )
    recipe = draft_model.DraftRecipe(layers=1, top=8, epochs=1)
    draft_model.train_draft(tiny_model, texts, folder=folder / "rsd", data="noise", recipe=recipe, progress=False)
    return folder


def test_recycling_is_measured_with_both_trees_beside_plain_decoding_and_lookup(
    place: Path, tiny_model: LanguageModel
) -> None:
    found = recycling_claim.measure(model=str(tiny_model.folder), questions=2, max_new_tokens=12)
    small, large = drafting.first_engine(found["16 nodes"]), drafting.first_engine(found["81 nodes"])
    assert set(small) == {"plain", recycling_claim.DRAFTER, "lookup"}
    assert set(large) == {"plain", recycling_claim.LARGE}
    assert large[recycling_claim.LARGE]["nodes_per_step"] > small[recycling_claim.DRAFTER]["nodes_per_step"]
    assert small["plain"]["ratio_to_plain"] == 1.0
    json.dumps(found)
    recycling_claim.holds(found)


def test_medusa_is_measured_on_two_engines_in_float32_in_a_blend_and_by_tree(
    drafters: Path, tiny_model: LanguageModel
) -> None:
    told: list[str] = []
    found = medusa_claim.measure(
        model=str(tiny_model.folder),
        questions=2,
        max_new_tokens=10,
        progress=lambda what, done, steps: told.append(what),
    )
    assert list(found["transformers"]["engines"]) == ["hf"]
    assert drafting.first_engine(found["float32"])["medusa"]["identical"] == 1.0
    assert list(found["trees"]) == ["chain", "dense", "calibrated", "random 1", "random 2"]
    assert found["blend"]["blend_with"] >= 1.0
    assert told[-1] == "trees"
    json.dumps(found)
    medusa_claim.holds(found)


def test_prompt_tokens_are_measured_beside_medusa_and_by_rows(drafters: Path, tiny_model: LanguageModel) -> None:
    found = ppd_claim.measure(
        model=str(tiny_model.folder), questions=2, max_new_tokens=8, kept_out_tokens=60, rows=(8, 12)
    )
    assert set(found["accuracies"]) == {"ppd", "medusa"}
    assert found["accuracies"]["ppd"]["numbers"] == 3 * 32
    assert len(found["ahead_of_medusa"]) == 3
    assert set(found["sizes"]) == {"8", "12"}
    assert found["float32"] == {"same": 1, "texts": 1}
    json.dumps(found)
    ppd_claim.holds(found)


def test_hidden_transfer_is_measured_by_layer_beside_medusa_and_by_rows(
    drafters: Path, tiny_model: LanguageModel
) -> None:
    found = hidden_claim.measure(
        model=str(tiny_model.folder), minutes=0.002, kept_out=2, questions=2, max_new_tokens=8, rows=(12,)
    )
    assert set(found["accuracies"]) == {"middle", "last", "shipped", "medusa"}
    assert found["sizes"]["12"]["medusa"] >= 1.0
    assert found["float32"] == {"same": 1, "texts": 1}
    json.dumps(found)
    hidden_claim.holds(found)


def test_drawing_without_replacement_is_measured_by_length_budget_and_speed(
    drafters: Path, tiny_model: LanguageModel
) -> None:
    found = rsd_claim.measure(
        model=str(tiny_model.folder), prompts=2, budget_prompts=1, tokens=4, lengths=(2,), budgets=(6,), pairs=1
    )
    assert set(found["length"]["table"]) == {"2"}
    assert len(found["length"]["ahead_in_errors"]) == len(rsd_claim.PAIRS)
    assert len(found["length"]["by_length"]) == 4
    assert set(found["budget at 0.3"]["wins"]) == {"6"}
    assert found["speed"]["plain"]["ratio_to_plain"] == 1.0
    json.dumps(found)
    assert not rsd_claim.holds(found)  # one budget is not four


@pytest.mark.parametrize("claim", TRAINED, ids=lambda claim: claim.CLAIM.system)
def test_without_a_trained_part_the_claim_says_how_to_make_it(
    claim: Any, place: Path, tiny_model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCI_CACHE", str(tmp_path))
    with pytest.raises(ModelNotFound, match="loci draft train"):
        claim.measure(model=str(tiny_model.folder))


def test_an_interrupted_run_is_not_judged(
    place: Path, tiny_model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loci.bench import decode

    whole = decode.run

    def cut(*given: Any, **named: Any) -> decode.Result:
        result = copy.copy(whole(*given, **named))
        result.complete = False
        return result

    monkeypatch.setattr(decode, "run", cut)
    with pytest.raises(KeyboardInterrupt):
        recycling_claim.measure(model=str(tiny_model.folder), questions=1, max_new_tokens=2)


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.CLAIM.system)
def test_a_claim_says_what_a_reader_needs_to_doubt_it(claim: Any) -> None:
    about = claim.CLAIM
    assert isinstance(claim, base.ClaimModule)
    assert base.load_claim(about.system) is claim
    assert about.paper.startswith("arXiv:")
    assert 1 <= about.minutes <= 16


@pytest.mark.slow
def test_recycling_drafts_for_the_real_model_from_the_first_questions_on(data: Path) -> None:
    from loci.lm.bundled import INSTALL, find

    if find() is None:
        pytest.skip(f"needs the bundled model: {INSTALL}")
    if not (data / "spec_bench").is_dir():
        pytest.skip(f"needs spec_bench in {data}")
    found = recycling_claim.measure(questions=2, max_new_tokens=32)
    for run, name in (("16 nodes", recycling_claim.DRAFTER), ("81 nodes", recycling_claim.LARGE)):
        assert drafting.first_engine(found[run])[name]["tokens_per_step"] > 1.2
        assert drafting.first_engine(found[run])[name]["bytes"] < 2_000_000
