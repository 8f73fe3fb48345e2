from __future__ import annotations

import json
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest

from loci.decoding import names
from loci.decoding.blend import BlendedDrafter
from loci.decoding.prompt_lookup import PromptLookup
from loci.decoding.token_recycling import Table, TokenRecycling, save_table, warm_file
from loci.errors import BadInput, BadModel, ModelNotFound, UnknownName
from loci.lm.draft import Drafter
from loci.lm.generate import generate
from loci.lm.model import LanguageModel


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: LanguageModel) -> None:
    monkeypatch.setenv("LOCI_CACHE", str(tmp_path / "cache"))
    names.forget(tiny_model)


def test_what_needs_no_training_is_found_by_name(tiny_model: LanguageModel) -> None:
    assert names.drafter("none", tiny_model) is None
    assert isinstance(names.drafter("lookup", tiny_model), PromptLookup)
    assert isinstance(names.drafter("recycle", tiny_model), TokenRecycling)
    auto = names.drafter("auto", tiny_model)
    assert isinstance(auto, BlendedDrafter)
    assert auto.name == "lookup+recycle"


def test_an_unknown_name_is_answered_with_the_list(tiny_model: LanguageModel) -> None:
    with pytest.raises(UnknownName, match=r"'lookup'.*auto.*medusa\[:PATH\]"):
        names.drafter("lokup", tiny_model)
    with pytest.raises(UnknownName, match=r"'2\.2\.2'"):
        names.drafter("recycle:2.2", tiny_model)
    with pytest.raises(UnknownName, match="part of a blend"):
        names.drafter("auto:lookup+nothing", tiny_model)


def test_a_path_where_none_belongs_is_refused(tiny_model: LanguageModel) -> None:
    with pytest.raises(BadInput, match=r"'lookup'.*'file'"):
        names.drafter("lookup:file", tiny_model)


@pytest.mark.parametrize("name", list(names.TRAINED))
def test_a_trained_drafter_that_does_not_ship_for_a_model_says_how_to_get_it(
    name: str, tiny_model: LanguageModel
) -> None:
    with pytest.raises(ModelNotFound, match=f"loci draft train {name}"):
        names.drafter(name, tiny_model)


@pytest.mark.parametrize("name", ["medusa", "ppd", "hidden"])
def test_a_path_that_holds_nothing_is_named(name: str, tiny_model: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="nowhere"):
        names.drafter(f"{name}:{tmp_path / 'nowhere'}", tiny_model)


def test_parts_of_other_weights_are_passed_over_and_damaged_ones_are_named(
    tiny_model: LanguageModel, tmp_path: Path
) -> None:
    folder = tmp_path / "cache" / "drafters"
    folder.mkdir(parents=True)
    (folder / "ppd.json").write_text(json.dumps({"base": "of another model"}))
    (folder / "ppd.safetensors").write_bytes(b"")
    assert isinstance(names.drafter("auto", tiny_model), BlendedDrafter)
    (folder / "ppd.json").write_text("{")
    with pytest.raises(BadModel, match=r"ppd\.json"):
        names.drafter("auto", tiny_model)


def test_drafters_of_one_model_share_what_texts_taught_unless_alone(tiny_model: LanguageModel) -> None:
    first, second = names.recycle(tiny_model), names.recycle(tiny_model)
    assert isinstance(first, TokenRecycling)
    assert isinstance(second, TokenRecycling)
    assert first.table is second.table
    alone = names.drafter("recycle", tiny_model, alone=True)
    assert isinstance(alone, TokenRecycling)
    assert alone.table is not first.table
    blends = [names.drafter("auto", tiny_model), names.drafter("auto", tiny_model, alone=True)]
    assert isinstance(blends[0], BlendedDrafter)
    assert isinstance(blends[1], BlendedDrafter)
    assert blends[0].experience is names._of(tiny_model).experience
    assert blends[1].experience is not blends[0].experience


def test_a_warm_matrix_in_the_cache_is_where_recycling_begins(tiny_model: LanguageModel) -> None:
    rows = np.tile(np.arange(8, 0, -1, dtype=np.int32), (tiny_model.vocabulary, 1))
    save_table(Table(tiny_model.vocabulary, model=tiny_model.hash, ranked=rows), warm_file(tiny_model))
    found, cold = names.drafter("recycle", tiny_model), names.drafter("recycle:cold", tiny_model)
    assert isinstance(found, TokenRecycling)
    assert isinstance(cold, TokenRecycling)
    assert found.after(3) == [8, 7, 6, 5, 4, 3, 2, 1]
    assert cold.after(3) == []


@pytest.mark.parametrize(
    "spec", ["2.2.2", "31", "accepted", "frozen", "no-prompt", "chain", "random", "15,warm", "cold,no-prompt"]
)
def test_every_variant_of_recycling_drafts_and_changes_no_token(spec: str, tiny_model: LanguageModel) -> None:
    plain = generate(tiny_model, "abcabc", max_new_tokens=30, engine="hf")
    drafter = names.drafter(f"recycle:{spec}", tiny_model)
    assert drafter is not None
    drafted = generate(tiny_model, "abcabc", max_new_tokens=30, engine="hf", drafter=drafter, max_nodes=81)
    assert drafted.tokens == plain.tokens
    assert drafted.stats.proposed_nodes > 0


def test_the_entry_points_lead_here(tiny_model: LanguageModel) -> None:
    offered = {point.name: point.value for point in entry_points(group="loci.drafters")}
    if not offered:
        pytest.skip("the package was installed before it offered drafters")
    assert offered == {name: f"loci.decoding.names:{name}" for name in names.FACTORIES}
    made = next(iter(entry_points(group="loci.drafters", name="auto"))).load()(tiny_model, "")
    assert isinstance(made, Drafter)
