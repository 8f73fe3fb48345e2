from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the extra loci-lm[local]")

from loci.bench import rapid_recipe as recipe
from loci.bench.rapid_recipe import Arm, Bench, Needle, RandomPassages, Speed, fact
from loci.decoding.rapid import ContextRetriever
from loci.errors import BadInput, DataNotFound
from loci.lm.embed import check_texts
from loci.lm.generate import GenerationStats


class Digits:
    """Embeds a text by how much of it is digits, and by its length."""

    name, dimension = "digits", 2

    def embed(self, texts):
        check_texts(texts)
        rows = np.array([[sum(map(str.isdigit, text)) + 1e-3, 0.02 * len(text)] for text in texts], dtype=np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("books")
    for number, word in enumerate(("sea", "hill")):
        text = " ".join(f"It saw the {word} on day {'x' * (day % 5)}." for day in range(400))
        (folder / f"{number}.txt.gz").write_bytes(gzip.compress(text.encode()))
    return folder


@pytest.fixture(scope="module")
def wide(tiny_model):
    """The tiny model with room for a context."""
    return recipe.stretched(tiny_model, window=1024)


@pytest.fixture(scope="module")
def questions(wide, books) -> list[Needle]:
    return recipe.needles(wide, tokens=420, count=5, distractors=2, books=books)


def test_a_question_holds_its_fact_at_its_depth_and_the_others(wide, questions, books):
    for needle, depth in zip(questions, recipe.DEPTHS, strict=True):
        text = wide.decode(needle.context)
        assert text.count(fact(needle.name, needle.code)) == 1
        assert all(text.count(fact(*other)) == 1 for other in needle.others)
        assert 300 < len(needle.context) <= 420
        assert needle.depth == depth
        assert abs(text.index(needle.code) / len(text) - depth) < 0.2
        assert len({needle.code, *(code for _, code in needle.others)}) == 3
        assert needle.name in needle.question
    again = recipe.needles(wide, tokens=420, count=5, distractors=2, books=books)
    assert again == questions
    other = recipe.needles(wide, tokens=420, count=1, distractors=2, books=books, seed=1)
    assert other[0].code != questions[0].code


def test_an_answer_is_right_when_its_first_number_is_the_code():
    needle = Needle(name="A B", code="2444", depth=0.5, context=(), others=())
    assert needle.right("The code is 2444.")
    assert needle.right("2,444")
    assert not needle.right("24445")
    assert not needle.right("1234, no: 2444")
    assert not needle.right("none")


def test_pieces_without_room_and_folders_without_books_are_refused(wide, books, tmp_path):
    with pytest.raises(BadInput, match="do not hold 4 facts"):
        recipe.needles(wide, tokens=100, count=1, books=books)
    with pytest.raises(DataNotFound, match="no books"):
        recipe.needles(wide, tokens=900, count=1, books=tmp_path)


@pytest.fixture(scope="module")
def bench(wide) -> Bench:
    kept = ContextRetriever(Digits(), wide.decode, chunk_tokens=40, budget=(120, 0.0))
    return Bench(wide, retriever=kept, embedder=Digits(), gamma=3, engine="hf")


def test_random_passages_hold_no_code(bench, questions):
    for needle in questions:
        bench.retriever.build(needle.context)
        found = RandomPassages(bench.retriever).select(needle.question)
        assert 0 < len(found.ids) <= 120
        text = bench.model.decode(found.ids)
        assert not any(code in text for code in (needle.code, *(code for _, code in needle.others)))


def test_every_arm_answers_every_question_and_a_table_can_be_written_down(bench, questions):
    names = recipe.arms((0.0, 10.0), (10.0, 50.0))
    assert names == ("long", "rag", "rapid 0", "rapid 10", "random 10", "random 50")
    seen: list[int] = []
    found = recipe.answers(bench, questions[:2], names, progress=lambda what, done, of: seen.append(done))
    assert seen == [0, 1]
    rows = json.loads(json.dumps(recipe.table(found)))
    assert set(rows) == set(names)
    assert rows["rapid 10"]["questions"] == 2
    assert rows["rapid 0"]["tokens_per_step"] >= 1.0
    assert rows["long"]["accepted"] is None
    assert found["rapid 0"].stats.exact
    assert not found["rapid 10"].stats.exact
    assert len(recipe.integration_holds(found)) == 3
    assert isinstance(recipe.main_bar(found), bool)
    with pytest.raises(BadInput, match="no arm"):
        bench.run("short", questions[0].context, "?")


def test_acceptance_is_measured_by_eta(bench, questions):
    found = recipe.acceptance(bench, questions[:1], tokens=12)
    assert set(found) == {"0", "10"}
    assert 0.0 <= found["0"]["accepted"] <= 1.0
    assert found["10"]["expected"] > found["0"]["expected"]
    assert found["0"]["error"] == 0.0 < found["10"]["error"]


def test_the_shift_raises_acceptance_of_random_pairs():
    found = recipe.random_pairs()
    assert found["shifted"] > found["lossless"] + 0.05
    assert found["paper_from_p"] > 0.05


def test_shares_have_intervals():
    def arm(name: str, *right: bool) -> Arm:
        return Arm(name=name, right=right, stats=GenerationStats(engine="hf"))

    low, high = arm("a", *[True] * 10).interval()
    assert 0.7 < low < high <= 1.0
    found = {"long": arm("long", *[False] * 9, True), "rapid 10": arm("rapid 10", *[True] * 10)}
    assert recipe.main_bar(found)
    assert recipe.table(found)["rapid 10"]["above_long"][0] == 90.0
    assert recipe.upward_holds(found)


def test_accepted_drafts_are_counted_over_those_that_were_looked_at():
    stats = GenerationStats(engine="hf", steps=4, accepted_nodes=6, accepted_by_depth=[3, 2, 1])
    assert recipe.accepted_share(stats, 3) == pytest.approx(6 / 9)  # one step of four was accepted whole


def test_the_parts_of_a_step_foretell_its_speed(bench, questions):
    found = recipe.speed(bench, questions[0], tokens=12, repeats=1, seconds=0.2)
    row = json.loads(json.dumps(found.row()))
    assert row["plain"] > 0
    assert row["rapid"] > 0
    assert row["foretold"] > 0
    assert row["passages"] <= 120
    assert row["context"] == len(questions[0].context)


def speed_of(context: int, rapid: float, foretold: float) -> Speed:
    zeros = dict.fromkeys(("target_plain", "target_chain", "draft_chain", "draw", "check", "accepted"), 0.0)
    return Speed(context=context, passages=10, tokens_per_step=5.0, plain=10.0, rapid=rapid, foretold_plain=10.0,
                 foretold=foretold, **zeros)  # fmt: skip


def test_the_crossing_lies_where_the_gain_passes_one():
    rows = [speed_of(4000, 5.0, 6.0), speed_of(8000, 9.0, 10.0), speed_of(16000, 11.0, 13.0)]
    assert recipe.crossing(rows) == (pytest.approx(12000.0), pytest.approx(8000.0))
    assert recipe.crossing(rows[:1]) == (None, None)
    assert recipe.speed_holds(rows) == {
        "4000: foretold within 15%": False,
        "8000: foretold within 15%": True,
        "16000: foretold within 15%": False,
        "slower at the shortest": True,
        "faster at the longest": True,
    }


def test_a_weaker_target_is_helped_by_the_whole_model(wide, questions):
    import torch

    weak = recipe.thinned(wide, dropped=[0])
    assert len(weak.model.base_model.layers) == 1
    assert weak.model.base_model.layers[0].self_attn.layer_idx == 0
    theirs, ours = (one.model.base_model.layers for one in (wide, weak))
    torch.testing.assert_close(theirs[1].mlp.up_proj.weight, ours[0].mlp.up_proj.weight)
    assert theirs[1].self_attn.layer_idx == 1
    bench = Bench(weak, draft=wide, embedder=Digits(), retriever=None, engine="hf")
    bench.retriever = ContextRetriever(Digits(), wide.decode, chunk_tokens=40, budget=(120, 0.0))
    found = recipe.answers(bench, questions[:1], ("long", "rag", "rapid 10"))
    assert set(found) == {"long", "rag", "rapid 10"}
    with pytest.raises(BadInput, match=r"has the layers 0 to 1"):
        recipe.thinned(wide, dropped=[2])
    with pytest.raises(BadInput, match="cannot be left out"):
        recipe.thinned(wide, dropped=[0, 1])


def test_stretched_positions_keep_the_weights(tiny_model, wide):
    assert wide.window == 1024
    assert recipe.stretched(tiny_model, window=100) is tiny_model
    assert wide.model.model.rotary_emb.rope_type == "linear"
    assert wide.model.model.embed_tokens.weight.equal(tiny_model.model.model.embed_tokens.weight)


def test_a_claim_is_judged_by_its_bars():
    from loci.claims import rapid as claim

    right = {"long": 0.2, "rag": 0.8, "rapid 0": 0.2, "rapid 10": 0.7, "random 10": 0.1}
    measured = {
        "answers": {name: {"right": share} for name, share in right.items()},
        "acceptance": {
            "0": {"expected": 0.6, "tokens_per_step": 4.0},
            "10": {"expected": 0.7, "tokens_per_step": 5.0},
        },
        "speed": [{"error": 0.1, "speedup": 0.8}],
    }
    assert claim.holds(measured)
    measured["answers"]["rapid 10"]["right"] = 0.4
    assert [name for name, good in claim.bars(measured).items() if not good] == ["30 points above the long context"]
