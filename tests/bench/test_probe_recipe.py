"""The measurements behind the claims of prompt tokens and hidden transfer, on a tiny model."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the extra loci-lm[local]")

from loci.bench.probe_recipe import (
    AccuracyRow,
    HardwareRow,
    SizeRow,
    accuracy_table,
    as_json,
    counted,
    dynamic_wins,
    gaps,
    hardware,
    hidden_ablations,
    identical,
    interior,
    layer_table,
    makes_hidden,
    makes_ppd,
    ppd_ablations,
    rises_with_depth,
    seconds_per_text,
    sizes,
    together,
)
from loci.decoding.distill import DistilledText
from loci.decoding.hidden_transfer import HiddenTransfer
from loci.decoding.ppd import PPD, PromptTokens
from loci.decoding.probe_trees import DynamicTrees
from loci.decoding.probes import ProbeRecipe, Ranks
from loci.decoding.prompt_lookup import PromptLookup
from loci.errors import BadInput

ACCURACIES = np.array([[0.3, 0.2, 0.1], [0.2, 0.1, 0.1], [0.1, 0.1, 0.1]])
PROMPTS = [[1, 2, 3], [70, 80, 90, 100]]
RECIPE = ProbeRecipe(steps=2, inserts=4)


@pytest.fixture(scope="module")
def texts() -> list[DistilledText]:
    draw = np.random.default_rng(0)
    return [
        DistilledText(tokens=draw.integers(0, 256, 30).astype(np.int32), written=np.arange(30) > 4, temperature=0.0)
        for _ in range(2)
    ]


def test_the_table_shows_all_by_distance(tiny_model, texts) -> None:
    medusa = np.array([[0.3, 0.1], [0.2, 0.1], [0.1, 0.0]])
    rows = accuracy_table(
        tiny_model,
        texts,
        prompt=PromptTokens(32),
        transfer=HiddenTransfer(32, (1, 1, 1)),
        others={"medusa": (9, medusa)},
    )
    assert [(row.name, row.numbers) for row in rows] == [("ppd", 96), ("hidden", 3 * 32 * 33), ("medusa", 9)]
    assert rows[2].top1 == (0.3, 0.2, 0.1)
    assert rows[2].top10 == pytest.approx((0.4, 0.3, 0.1))
    assert all(first <= ten for row in rows for first, ten in zip(row.top1, row.top10, strict=True))
    assert gaps(rows[2], rows[2]) == (0.0, 0.0, 0.0)
    assert as_json(rows)[2]["name"] == "medusa"


def test_ranks_become_shares_of_places() -> None:
    row = AccuracyRow.of("some", Ranks(ranks=np.array([[0, 4], [1, 40], [9, 0], [0, 5]])))
    assert (row.top1, row.top5, row.top10) == ((0.5, 0.25), (0.75, 0.5), (1.0, 0.75))


def test_predictions_stand_beside_what_was_counted_for_every_allocation(tiny_model) -> None:
    allocations = ("dynamic", "naive", "random", "root")
    rows = sizes(
        tiny_model, makes_ppd(PromptTokens(32)), ACCURACIES, PROMPTS, limits=(12,), allocations=allocations, draws=2,
        max_new_tokens=8,
    )  # fmt: skip
    assert [row.allocation for row in rows] == list(allocations)
    for row in rows:
        assert row.measured >= 1.0
        assert row.off == pytest.approx(row.predicted / row.measured - 1)
        assert row.tree_kv_bytes > 0
        assert row.drafter_bytes > 0
    assert dynamic_wins(rows)["lengths"] == 1


def test_hidden_transfer_is_measured_in_the_same_way(tiny_model) -> None:
    make = makes_hidden(HiddenTransfer(32, (1, 1, 1)))
    (row,) = sizes(tiny_model, make, ACCURACIES, PROMPTS, limits=(12,), max_new_tokens=8)
    assert row.measured >= 1.0
    trees = DynamicTrees.build(ACCURACIES, 12)
    same = identical(tiny_model, lambda: make(trees), PROMPTS, rows=12, max_new_tokens=12)
    assert (same.same, same.texts) == (2, 2)


def test_the_chosen_size_is_held_against_the_best_one(tiny_model) -> None:
    costs = {"hf": lambda rows: 1.0 + rows}
    (row,) = hardware(
        tiny_model, makes_ppd(PromptTokens(32)), ACCURACIES, PROMPTS, costs, limits=(8, 12), max_new_tokens=8
    )
    assert row.chosen == 8
    assert set(row.tokens_per_second) == {8, 12}
    assert 0.0 <= row.lost < 1.0
    lost = HardwareRow(engine="hf", chosen=8, best=16, tokens_per_second={8: 90.0, 16: 100.0}).lost
    assert lost == pytest.approx(0.1)


def test_every_ablation_is_trained_and_measured(tiny_model, texts) -> None:
    names = [row.name for row in ppd_ablations(tiny_model, texts, texts, recipe=RECIPE, progress=False)]
    assert names == [
        "untrained words", "whole", "not attending to each other", "hard labels", "inserted at the end only"
    ]  # fmt: skip
    names = [
        row.name for row in hidden_ablations(tiny_model, texts, texts, layers=(1, 1, 1), recipe=RECIPE, progress=False)
    ]
    assert names == ["whole", "not attending to each other", "not seeing the text", "at the last layer"]


def test_layers_are_compared(tiny_model, texts) -> None:
    table = layer_table(tiny_model, texts, texts, candidates=(0, 1), recipe=RECIPE, progress=False)
    assert list(table) == [0, 1]
    middle = {
        layer: AccuracyRow(name="", numbers=0, top1=(top,), top5=(top,), top10=(top,))
        for layer, top in ((0, 0.1), (12, 0.3), (30, 0.2))
    }
    assert interior(middle)
    assert not interior({0: middle[30], 12: middle[0], 30: middle[12]})
    assert rises_with_depth({0: (0.1, 0.2), 1: (0.3, 0.3), 2: (0.5, 0.4)}) == pytest.approx(1.0)
    assert rises_with_depth({0: (0.9,), 1: (0.3,), 2: (0.1,)}) == pytest.approx(-1.0)


def test_small_things(tiny_model, texts) -> None:
    assert seconds_per_text(tiny_model, texts, "ppd", steps=1) > 0
    with pytest.raises(BadInput, match="no prompts"):
        counted(tiny_model, lambda: PPD(PromptTokens(32), DynamicTrees.build(ACCURACIES, 12)), [], rows=12)


def test_a_blend_is_counted_beside_its_parts(tiny_model) -> None:
    trees = DynamicTrees.build(ACCURACIES, 12)
    found = together(tiny_model, lambda: PPD(PromptTokens(32), trees), PromptLookup, PROMPTS, rows=12, max_new_tokens=8)
    assert set(found) == {"first", "second", "blend"}
    assert all(value >= 1.0 for value in found.values())


def test_wins_are_counted_over_lengths() -> None:
    def row(limit, allocation, measured) -> SizeRow:
        return SizeRow(
            limit=limit, allocation=allocation, predicted=1.0, measured=measured, tokens_per_second=1.0,
            tree_kv_bytes=0, drafter_bytes=0,
        )  # fmt: skip

    rows = [row(16, "dynamic", 1.5), row(16, "naive", 1.4), row(16, "random", 1.3)]
    rows += [row(32, "dynamic", 1.5), row(32, "naive", 1.6), row(32, "random", 1.7)]
    assert dynamic_wins(rows) == {"dynamic >= naive": 1, "naive >= random": 1, "lengths": 2}
