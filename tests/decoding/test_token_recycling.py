"""The matrix, its templates, and drafts that change nothing but the speed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from loci.decoding.token_recycling import (
    TEMPLATES,
    Table,
    TokenRecycling,
    best_template,
    load_table,
    warm_file,
)
from loci.errors import BadInput, BadModel, ModelNotFound, UnknownName
from loci.lm.draft import Drafter, DraftState, PrefillResult, StepResult, TokenTree, TreeTemplate
from loci.lm.generate import generate
from loci.lm.model import LanguageModel
from loci.lm.sampling import GREEDY, Sampling

VOCABULARY = 50


def state(*tokens: int, budget: int = 16) -> DraftState:
    return DraftState(tokens=tokens, sampling=GREEDY, rng=np.random.default_rng(0), budget=budget)


def filled(seed: int = 0, k: int = 8) -> Table:
    """A matrix with distinct tokens in each row."""
    random = np.random.default_rng(seed)
    rows = np.stack([random.permutation(VOCABULARY)[:k] for _ in range(VOCABULARY)]).astype(np.int32)
    return Table(VOCABULARY, k=k, ranked=rows)


def result(tree: TokenTree, ranked: np.ndarray, accepted: tuple[int, ...] = (0,)) -> StepResult:
    return StepResult(
        tree=tree,
        logits=lambda node: np.zeros(VOCABULARY, dtype=np.float32),
        accepted=accepted,
        bonus=1,
        committed=(*tree.tokens[list(accepted[1:])].tolist(), 1),
        topk_ids=ranked.astype(np.int32),
        topk_logits=np.zeros(ranked.shape, dtype=np.float32),
    )


def looked_up(table: Table, template: TreeTemplate, root: int) -> dict[tuple[int, ...], int]:
    """The reference: path by path, rank by rank."""
    tokens = {(): root}
    for path in template.order[1:]:
        tokens[path] = int(table.ranked[tokens[path[:-1]], path[-1]])
    return tokens


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_a_layer_at_once_gives_what_looking_up_path_by_path_gives(name: str) -> None:
    table = filled()
    drafter = TokenRecycling(VOCABULARY, template=name, table=table)
    tree = drafter.propose(state(3, 17, budget=100))
    wanted = looked_up(table, TEMPLATES[name], 17)
    assert tree.tokens.tolist() == [wanted[path] for path in TEMPLATES[name].order]


def test_the_papers_template_has_its_widths() -> None:
    paths = TEMPLATES["2.2.2"].ranks
    assert [Counter(map(len, paths))[depth] for depth in range(1, 7)] == [8, 21, 25, 15, 8, 3]


@pytest.mark.parametrize(("name", "nodes"), [("15", 15), ("31", 31), ("2.2.2", 80)])
def test_a_template_is_called_by_its_nodes_under_the_root(name: str, nodes: int) -> None:
    assert len(TEMPLATES[name].ranks) == nodes


@pytest.mark.parametrize("budget", [1, 2, 7, 16, 20, 32, 50, 81, 200])
def test_a_draft_never_exceeds_its_budget(budget: int) -> None:
    tree = TokenRecycling(VOCABULARY, table=filled()).propose(state(1, budget=budget))
    sizes = {1: 1, 2: 2, 7: 7, 16: 16, 20: 16, 32: 32, 50: 32, 81: 81, 200: 81}
    assert tree.size == sizes[budget]


def test_an_empty_matrix_drafts_a_valid_tree() -> None:
    tree = TokenRecycling(VOCABULARY).propose(state(5))
    assert tree.size == 16
    assert Table(VOCABULARY).after(5) == []


def test_every_checked_node_is_written_and_not_only_the_accepted() -> None:
    drafter = TokenRecycling(VOCABULARY, k=2, template=TreeTemplate(((0,), (1,))))
    tree = TokenTree(tokens=np.array([4, 5, 6], np.int32), parents=np.array([-1, 0, 0], np.int32))
    drafter.observe(result(tree, np.array([[7, 8], [9, 10], [11, 12]])))
    assert [drafter.after(token) for token in (4, 5, 6)] == [[7, 8], [9, 10], [11, 12]]


def test_of_equal_tokens_an_accepted_node_is_written_last_and_else_the_last_one() -> None:
    tree = TokenTree(tokens=np.array([4, 5, 6, 5, 6], np.int32), parents=np.array([-1, 0, 0, 1, 1], np.int32))
    ranked = np.array([[1, 2], [7, 8], [9, 10], [11, 12], [13, 14]])
    drafter = TokenRecycling(VOCABULARY, k=2, template=TreeTemplate(((0,),)))
    drafter.observe(result(tree, ranked, accepted=(0, 1)))
    assert drafter.after(5) == [7, 8]
    assert drafter.after(6) == [13, 14]


def test_probes_write_nothing() -> None:
    tree = TokenTree(
        tokens=np.array([4, -1], np.int32),
        parents=np.array([-1, 0], np.int32),
        kind=np.array([0, 1], np.int32),
        embeds=np.zeros((1, 4), np.float32),
    )
    drafter = TokenRecycling(VOCABULARY, k=2, template=TreeTemplate(((0,),)))
    before = drafter.table.ranked.copy()
    drafter.observe(result(tree, np.array([[1, 2], [3, 4]])))
    assert drafter.after(4) == [1, 2]
    before[4] = [1, 2]
    assert (drafter.table.ranked == before).all()


@pytest.mark.parametrize(("update", "row"), [("all", [13, 14]), ("accepted", []), ("none", [])])
def test_what_is_written_can_be_narrowed_to_show_what_it_is_worth(update: str, row: list[int]) -> None:
    tree = TokenTree(tokens=np.array([4, 6], np.int32), parents=np.array([-1, 0], np.int32))
    drafter = TokenRecycling(VOCABULARY, k=2, template=TreeTemplate(((0,),)), update=update)
    drafter.observe(result(tree, np.array([[1, 2], [13, 14]])))
    assert drafter.after(6) == row
    assert drafter.after(4) == ([] if update == "none" else [1, 2])


@pytest.mark.parametrize("recycle_prompt", [True, False])
def test_the_prompts_outputs_fill_rows_the_last_occurrence_of_a_token_winning(recycle_prompt: bool) -> None:
    drafter = TokenRecycling(VOCABULARY, k=2, template=TreeTemplate(((0,),)), recycle_prompt=recycle_prompt)
    assert drafter.needs.prefill is recycle_prompt
    ids = np.array([[1, 2], [3, 4], [5, 6]], np.int32)
    drafter.start(state(9, 8, 9, 7), PrefillResult(tokens=(9, 8, 9, 7), topk_ids=ids if recycle_prompt else None))
    assert drafter.after(9) == ([5, 6] if recycle_prompt else [])


def test_a_prompt_that_was_partly_known_fills_rows_of_what_was_fed() -> None:
    drafter = TokenRecycling(VOCABULARY, k=2, template=TreeTemplate(((0,),)))
    prefill = PrefillResult(tokens=(9, 8, 7, 6), start=2, topk_ids=np.array([[1, 2]], np.int32))
    drafter.start(state(9, 8, 7, 6), prefill)
    assert (drafter.after(7), drafter.after(9)) == ([1, 2], [])


def test_accepted_paths_are_counted_where_they_were_offered() -> None:
    drafter = TokenRecycling(VOCABULARY, k=2, template=TreeTemplate(((0,), (1,), (0, 1))), table=filled(k=2))
    tree = drafter.propose(state(3))
    drafter.observe(result(tree, np.tile([1, 2], (4, 1)), accepted=(0, 1, 3)))
    assert drafter.offer_counts == {(0,): 1, (1,): 1, (0, 1): 1}
    assert drafter.hit_counts == {(0,): 1, (0, 1): 1}


def test_the_best_template_takes_what_came_true_most_often_and_stays_a_tree() -> None:
    counts = {(0,): 50, (1,): 20, (2,): 5, (0, 0): 30, (0, 1): 6, (0, 0, 0): 18, (1, 0): 9, (7,): 0}
    assert best_template(counts, 4).ranks == ((0,), (1,), (0, 0), (0, 0, 0))
    assert best_template(counts, 100).size == 8  # what never came true is left out
    offered = dict.fromkeys(counts, 100) | {(2,): 10}
    assert (2,) in best_template(counts, 3, offered=offered).ranks


@pytest.mark.parametrize(("counts", "nodes"), [({(0,): 1}, 0), ({(0,): 1, (0, 0): 2}, 1), ({(0, 0): 2}, 1)])
def test_counts_that_cannot_be_are_refused(counts: dict[tuple[int, ...], int], nodes: int) -> None:
    with pytest.raises(BadInput):
        best_template(counts, nodes)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": VOCABULARY + 1}, f"k is {VOCABULARY + 1}"),
        ({"k": 2, "template": TreeTemplate(((0,), (1,), (2,)))}, "rank 2"),
        ({"k": 2, "template": "15"}, "rank 5"),
        ({"table": Table(VOCABULARY + 1)}, "51 rows of 8"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_value(options: dict[str, object], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        TokenRecycling(VOCABULARY, **options)  # type: ignore[arg-type]


def test_unknown_words_are_answered_with_their_neighbours() -> None:
    with pytest.raises(UnknownName, match=r"'2\.2\.2'"):
        TokenRecycling(VOCABULARY, template="2.2")
    with pytest.raises(UnknownName, match="'accepted'"):
        TokenRecycling(VOCABULARY, update="acepted")


def test_outputs_without_enough_ranks_are_an_error_and_not_a_shrug() -> None:
    drafter = TokenRecycling(VOCABULARY)
    with pytest.raises(BadInput, match="8 most probable"):
        drafter.observe(result(TokenTree.root(1), np.array([[1, 2]])))


def test_it_is_a_drafter_and_its_bytes_are_those_of_its_arrays() -> None:
    drafter = TokenRecycling(49_152)
    assert isinstance(drafter, Drafter)
    drafter.propose(state(1))
    assert drafter.table.ranked.nbytes == 49_152 * 8 * 4
    assert drafter.table.ranked.nbytes < drafter.nbytes <= 2_000_000


def test_a_saved_matrix_comes_back_whole(tmp_path: Path, tiny_model: LanguageModel) -> None:
    random = np.random.default_rng(0)
    rows = random.integers(tiny_model.vocabulary, size=(tiny_model.vocabulary, 8)).astype(np.int32)
    table = Table(tiny_model.vocabulary, model=tiny_model.hash, ranked=rows)
    TokenRecycling(tiny_model.vocabulary, table=table).save(tmp_path / "m.npz")
    assert (TokenRecycling.load(tmp_path / "m.npz", model=tiny_model).table.ranked == rows).all()
    assert [file.name for file in tmp_path.iterdir()] == ["m.npz"]


def test_a_matrix_of_other_weights_or_another_vocabulary_is_refused(tmp_path: Path, tiny_model: LanguageModel) -> None:
    path = tmp_path / "m.npz"
    TokenRecycling(tiny_model.vocabulary, table=Table(tiny_model.vocabulary, model="feedbeef")).save(path)
    with pytest.raises(BadModel, match="feedbeef"):
        TokenRecycling.load(path, model=tiny_model)
    TokenRecycling(9, table=Table(9, model=tiny_model.hash)).save(path)
    with pytest.raises(BadModel, match="for 9 tokens"):
        TokenRecycling.load(path, model=tiny_model)


def test_a_file_that_is_no_matrix_is_named(tmp_path: Path, tiny_model: LanguageModel) -> None:
    with pytest.raises(ModelNotFound, match=r"gone\.npz"):
        TokenRecycling.load(tmp_path / "gone.npz", model=tiny_model)
    (tmp_path / "text.npz").write_text("not a matrix")
    with pytest.raises(BadModel, match=r"text\.npz"):
        TokenRecycling.load(tmp_path / "text.npz", model=tiny_model)
    whole = tmp_path / "whole.npz"
    TokenRecycling(tiny_model.vocabulary, table=Table(tiny_model.vocabulary, model=tiny_model.hash)).save(whole)
    (tmp_path / "cut.npz").write_bytes(whole.read_bytes()[:200])
    with pytest.raises(BadModel, match=r"cut\.npz"):
        load_table(tmp_path / "cut.npz", model=tiny_model)


def test_a_warm_matrix_holds_what_follows_each_token_alone_and_is_kept(
    tiny_model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCI_CACHE", str(tmp_path))
    drafter = TokenRecycling.warm(tiny_model)
    for token in (0, 65, 257):
        first = generate(tiny_model, [token], max_new_tokens=1, engine="hf").tokens[0]
        assert drafter.after(token)[0] == first
    assert warm_file(tiny_model).is_file()
    assert (TokenRecycling.warm(tiny_model).table.ranked == drafter.table.ranked).all()


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.8, top_p=0.9)], ids=["greedy", "sampled"])
def test_drafts_change_no_token_of_a_tiny_model(tiny_model: LanguageModel, sampling: Sampling) -> None:
    plain = generate(tiny_model, "abcabcab", max_new_tokens=60, engine="hf", sampling=sampling, seed=3)
    drafter = TokenRecycling(tiny_model.vocabulary)
    for _ in range(2):  # from an empty matrix, then from a full one
        drafted = generate(
            tiny_model, "abcabcab", max_new_tokens=60, engine="hf", sampling=sampling, seed=3, drafter=drafter
        )
        assert drafted.tokens == plain.tokens
    assert drafted.stats.tokens_per_step > 1.0


def test_the_model_writes_the_same_with_and_without(default_model: LanguageModel) -> None:
    prompt = default_model.encode("One two three four. One two three four. One two")
    plain = generate(default_model, prompt, max_new_tokens=24, engine="hf")
    drafted = generate(
        default_model, prompt, max_new_tokens=24, engine="hf", drafter=TokenRecycling(default_model.vocabulary)
    )
    assert drafted.tokens == plain.tokens
    assert drafted.stats.tokens_per_step > 1.3
