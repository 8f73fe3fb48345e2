from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the extra loci-lm[local]")

from loci.bench import rsd_recipe
from loci.bench.rsd_recipe import BUDGETS, Row
from loci.decoding.distill import DistilledText
from loci.decoding.draft_model import DraftLM
from loci.decoding.rsd import RSDC, RSDS, Chain


@pytest.fixture(scope="module")
def draft(tiny_model) -> DraftLM:
    return DraftLM.from_layers(tiny_model, layers=1, engine="hf")


def test_every_shape_of_a_budget_has_that_many_nodes():
    for budget, shapes in BUDGETS.items():
        assert {shape.size for shape in shapes.values()} == {budget}


def test_tables_hold_every_shape_and_can_be_written_down(tiny_model, draft):
    texts = [tiny_model.encode("abc"), tiny_model.encode("hello")]
    table = rsd_recipe.fixed_length(tiny_model, draft, texts, lengths=(2,), tokens=6, engine="hf")
    assert set(table[2]) == {"RSD-C 2", "RSD-S 4", "iid 2", "iid 4", "SD"}
    assert all(len(row.per_prompt) == 2 and row.mean >= 1.0 for row in table[2].values())
    assert table[2]["SD"].memory_bound < table[2]["SD"].mean
    json.dumps(rsd_recipe.table_of(table))
    assert len(rsd_recipe.fixed_length_holds(table)) == 4
    budgets = rsd_recipe.fixed_budget(tiny_model, draft, texts, temperature=0.3, budgets=(6,), tokens=6, engine="hf")
    assert set(budgets[6]) == {"RSD-C", "RSD-S 2x3", "RSD-S 3x2", "iid 2x3", "iid 3x2", "SD"}
    assert set(rsd_recipe.fixed_budget_holds(budgets)) == {6}


def test_wall_clock_compares_with_plain_sampling_and_with_what_the_parts_foretell(tiny_model, draft):
    texts = [tiny_model.encode("abc")]
    found = rsd_recipe.wall_clock(
        tiny_model,
        draft,
        texts,
        shapes={"tree": RSDC(branching=(2, 1)), "chain": Chain(length=2)},
        tokens=8,
        engine="hf",
    )
    assert found["plain"]["ratio_to_plain"] == 1.0
    assert found["plain"]["tokens_per_step"] == 1.0
    assert found["tree"]["foretold"] > 0
    costs = found["tree"]["milliseconds"]
    assert costs["propose"] == pytest.approx(costs["levels"] + costs["draw"])
    assert set(rsd_recipe.ablations(tiny_model, draft, texts, tokens=4, engine="hf")) == {
        "without replacement",
        "independent",
    }


def test_acceptance_is_compared_with_untrained_layers(tiny_model, draft):
    tokens = np.array(tiny_model.encode("some text"), dtype=np.int32)
    text = DistilledText(tokens=tokens, written=np.arange(len(tokens)) >= 3, temperature=1.0)
    found = rsd_recipe.distillation(tiny_model, draft, [text])
    assert found["trained"] == pytest.approx(found["untrained"])
    assert not rsd_recipe.distillation_holds(found)
    assert rsd_recipe.distillation_holds({"trained": 0.6, "untrained": 0.3, "ratio": 2.0})


def test_bars_need_gaps_beyond_the_error():
    def row(name: str, *per_prompt: float) -> Row:
        return Row(name=name, nodes=4, per_prompt=per_prompt, memory_bound=1.0, tokens_per_second=1.0)

    low, high = row("SD", 1.0, 1.1, 1.2), row("iid 2", 1.5, 1.61, 1.69)
    assert high.above(low) > 2
    assert row("x", 1.0, 2.0, 1.0).above(low) < 2
    table = {2: {"SD": low, "RSD-S 4x2": high}}
    assert rsd_recipe.fixed_budget_holds(table) == {2: True}
    assert RSDS().size == 15


def test_prompts_are_the_even_questions_of_three_tasks(tiny_model, data):
    if not (data / "spec_bench").is_dir():
        pytest.skip(f"needs spec_bench in {data}")
    assert len(rsd_recipe.prompts(tiny_model, limit=6)) == 6
