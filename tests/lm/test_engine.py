from __future__ import annotations

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra loci-lm[local]")

from loci.errors import BadInput, Unsupported  # noqa: E402
from loci.lm.draft import Needs, TokenTree  # noqa: E402
from loci.lm.engine.hf import CHUNK, HFEngine  # noqa: E402

NOTHING = Needs()


def in_sequence(model, tokens) -> np.ndarray:
    """Logits after each token of a text, by one plain forward pass."""
    with torch.inference_mode():
        return model.model(torch.tensor([tokens])).logits[0].float().numpy()


def tree(tokens, parents, **more) -> TokenTree:
    return TokenTree(tokens=np.array(tokens, dtype=np.int32), parents=np.array(parents, dtype=np.int32), **more)


def random_tree(generator: np.random.Generator, root: int, size: int) -> TokenTree:
    edges: dict[tuple[int, int], None] = {}
    while len(edges) < size - 1:
        edges[(int(generator.integers(0, len(edges) + 1)), int(generator.integers(0, 256)))] = None
    return tree([root, *(token for _, token in edges)], [-1, *(parent for parent, _ in edges)])


def check_tree(model, prompt, some: TokenTree, output, row: int, tolerance: float) -> None:
    for path in some.paths:
        wanted = in_sequence(model, [*prompt[:-1], *some.tokens[list(path)].tolist()])[-len(path) :]
        found = np.stack([output.logits(row, node) for node in path])
        np.testing.assert_allclose(found, wanted, atol=tolerance)


def test_a_tree_gives_the_logits_of_its_paths_in_sequence(tiny_model):
    generator = np.random.default_rng(0)
    engine = HFEngine(tiny_model)
    prompt = generator.integers(0, 256, 20).tolist()
    engine.prefill([prompt], want=NOTHING)
    some = random_tree(generator, prompt[-1], 17)
    check_tree(tiny_model, prompt, some, engine.step([some], want=NOTHING), 0, 1e-4)


def test_a_tree_gives_the_logits_of_its_paths_on_the_default_model(default_model):
    prompt = default_model.encode("The method of loci is a way to remember things by")
    branches = [default_model.encode(text) for text in (" placing them in a house.", " giving each a place", " rote.")]
    some = TokenTree.chain([prompt[-1], *branches[0]])
    for branch in branches[1:]:
        some = TokenTree.merge(some, TokenTree.chain([prompt[-1], *branch]), budget=64)
    engine = HFEngine(default_model)
    engine.prefill([prompt], want=NOTHING)
    check_tree(default_model, prompt, some, engine.step([some], want=NOTHING), 0, 1e-4)


@pytest.mark.parametrize("lengths", [(12,), (12, 1, 30, 7)])
def test_after_any_kept_path_the_next_step_equals_the_text_in_sequence(tiny_model, lengths):
    generator = np.random.default_rng(1)
    texts = [generator.integers(0, 256, length).tolist() for length in lengths]
    engine = HFEngine(tiny_model)
    engine.prefill(texts, want=NOTHING)
    for size in (1, 9, 6, 1, 14):
        trees = [random_tree(generator, text[-1], int(generator.integers(1, size + 1))) for text in texts]
        output = engine.step(trees, want=NOTHING)
        paths = []
        for row, (text, some) in enumerate(zip(texts, trees, strict=True)):
            check_tree(tiny_model, text, some, output, row, 1e-4)
            path = some.paths[int(generator.integers(0, len(some.paths)))]
            paths.append(path)
            text.extend([*some.tokens[list(path[1:])].tolist(), int(generator.integers(0, 256))])
        engine.commit(paths)
        assert engine.lengths == tuple(len(text) - 1 for text in texts)


def test_a_row_that_leaves_takes_nothing_from_the_others(tiny_model):
    texts = [[1, 2, 3, 4], [5, 6], [7, 8, 9, 10, 11, 12]]
    engine = HFEngine(tiny_model)
    engine.prefill(texts, want=NOTHING)
    engine.keep([2, 1])
    output = engine.step([TokenTree.root(12), TokenTree.root(6)], want=NOTHING)
    np.testing.assert_allclose(output.logits(0, 0), in_sequence(tiny_model, texts[2])[-1], atol=1e-4)
    np.testing.assert_allclose(output.logits(1, 0), in_sequence(tiny_model, texts[1])[-1], atol=1e-4)


def test_a_prompt_that_continues_the_last_one_is_fed_only_where_it_is_new(tiny_model, monkeypatch):
    engine = HFEngine(tiny_model)
    fed: list[int] = []
    forward = engine._forward
    monkeypatch.setattr(
        engine, "_forward", lambda ids, *rest, **more: (fed.append(ids.shape[1]), forward(ids, *rest, **more))[1]
    )
    text = list(range(40))
    assert engine.prefill([text], want=NOTHING)[0].start == 0
    engine.step([TokenTree.root(39)], want=NOTHING)
    engine.commit([[0]])
    longer = [*text, 50, 51, 52]
    assert engine.prefill([longer], want=NOTHING)[0].start == 40
    other = [*text[:30], 99, 98, 97]
    assert engine.prefill([other], want=NOTHING)[0].start == 30
    assert fed == [39, 1, 2, 2]
    output = engine.step([TokenTree.root(97)], want=NOTHING)
    np.testing.assert_allclose(output.logits(0, 0), in_sequence(tiny_model, other)[-1], atol=1e-4)
    engine.commit([[0]])
    assert engine.prefill([[7, 8]], want=NOTHING)[0].start == 0


def test_an_interrupted_step_leaves_the_engine_as_it_was(tiny_model, monkeypatch):
    engine = HFEngine(tiny_model)
    text = list(range(10))
    engine.prefill([text], want=NOTHING)
    layer = tiny_model.model.model.layers[1].self_attn

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.step([TokenTree.chain([9, 1, 2])], want=NOTHING)
    output = engine.step([TokenTree.root(9)], want=NOTHING)
    np.testing.assert_allclose(output.logits(0, 0), in_sequence(tiny_model, text)[-1], atol=1e-5)


def test_topk_and_hidden_states_come_back_for_every_node_and_for_the_prompt(tiny_model):
    want = Needs(topk=3, hidden=(-1, 1), prefill=True)
    engine = HFEngine(tiny_model)
    text = list(range(30))
    (result,) = engine.prefill([text], want=want)
    plain = in_sequence(tiny_model, text)
    assert result.topk_ids.shape == (29, 3)
    np.testing.assert_array_equal(result.topk_ids, np.argsort(-plain[:29], axis=1)[:, :3])
    assert result.hidden.shape == (2, 29, 32)
    output = engine.step([TokenTree.chain([29, 4])], want=want)
    ids, logits = output.topk(0)
    assert ids.shape == logits.shape == (2, 3)
    np.testing.assert_array_equal(ids[0], np.argsort(-plain[29])[:3])
    assert output.hidden(0).shape == (2, 2, 32)
    head = tiny_model.model.lm_head(output.hidden(0)[0].clone())[1].detach().numpy()
    np.testing.assert_allclose(head, output.logits(0, 1), atol=1e-5)


def test_a_prompt_longer_than_a_chunk_gives_the_same_outputs(tiny_model, monkeypatch):
    monkeypatch.setattr("loci.lm.engine.hf.CHUNK", 7)
    assert CHUNK > 7
    text = np.random.default_rng(2).integers(0, 256, 40).tolist()
    (result,) = HFEngine(tiny_model).prefill([text], want=Needs(topk=1, prefill=True))
    np.testing.assert_array_equal(result.topk_ids[:, 0], in_sequence(tiny_model, text)[:39].argmax(axis=1))


def test_probes_see_their_path_and_no_token_sees_them(tiny_model):
    kind = np.array([0, 0, 1, 1], dtype=np.int32)
    embed = tiny_model.model.get_input_embeddings().weight
    embeds = embed[[70, 71]].detach().numpy()
    text = [1, 2, 3]
    engine = HFEngine(tiny_model)
    engine.prefill([text], want=NOTHING)
    output = engine.step([tree([3, 60, -1, -1], [-1, 0, 1, 2], kind=kind, embeds=embeds)], want=NOTHING)
    wanted = in_sequence(tiny_model, [1, 2, 3, 60, 70, 71])
    for node in range(4):
        np.testing.assert_allclose(output.logits(0, node), wanted[2 + node], atol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_trees_work_with_each_attention_that_takes_masks(tiny_model, attention):
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tiny_model.folder, attn_implementation=attention).eval()
    model = dataclasses.replace(tiny_model, model=loaded)
    engine = HFEngine(model)
    text = [1, 2, 3, 4]
    engine.prefill([text, [9]], want=NOTHING)
    trees = [tree([4, 8, 9], [-1, 0, 0]), TokenTree.root(9)]
    output = engine.step(trees, want=NOTHING)
    check_tree(tiny_model, text, trees[0], output, 0, 1e-4)
    check_tree(tiny_model, [9], trees[1], output, 1, 1e-4)


def small(family: str, **more):
    import transformers

    config = getattr(transformers, f"{family}Config")(**more)
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


SIZES = {"vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def test_models_whose_layers_forget_decode_plainly_and_refuse_trees(tiny_model):
    loaded = small("Mistral", **SIZES, num_key_value_heads=2, intermediate_size=64, sliding_window=8)
    model = dataclasses.replace(tiny_model, model=loaded)
    engine = HFEngine(model)
    assert engine.capabilities.max_nodes == 1
    assert not engine.capabilities.batch
    text = list(range(20))
    engine.prefill([text], want=NOTHING)
    output = engine.step([TokenTree.root(19)], want=NOTHING)
    np.testing.assert_allclose(output.logits(0, 0), in_sequence(model, text)[-1], atol=1e-4)
    engine.commit([[0]])
    with pytest.raises(Unsupported, match="SlidingWindow"):
        engine.step([TokenTree.chain([1, 2])], want=NOTHING)
    with pytest.raises(Unsupported, match="one text at a time"):
        engine.prefill([[1], [2]], want=NOTHING)


def test_models_with_positions_in_the_mask_refuse_trees(tiny_model):
    loaded = small("Bloom", vocab_size=258, hidden_size=32, n_layer=2, n_head=4)
    engine = HFEngine(dataclasses.replace(tiny_model, model=loaded))
    assert engine.capabilities.max_nodes == 1
    assert "ALiBi" in engine.capabilities.why


def test_a_memory_of_the_callers_is_written_and_stands_before_the_prompt(tiny_model):
    from transformers import DynamicCache

    memory = DynamicCache(config=tiny_model.model.config)
    before = [3, 1, 4, 1, 5]
    with torch.inference_mode():
        tiny_model.model(torch.tensor([before]), cache=memory)
    engine = HFEngine(tiny_model, memory=memory)
    engine.prefill([[9, 2, 6]], want=NOTHING)
    output = engine.step([TokenTree.root(6)], want=NOTHING)
    np.testing.assert_allclose(output.logits(0, 0), in_sequence(tiny_model, [*before, 9, 2, 6])[-1], atol=1e-4)
    engine.commit([[0]])
    assert memory.get_seq_length() == 8
    engine.reset()
    assert memory.get_seq_length() == 5


def test_the_bytes_held_are_those_of_keys_and_values(tiny_model):
    engine = HFEngine(tiny_model)
    assert engine.nbytes == 0
    engine.prefill([list(range(11))], want=NOTHING)
    assert engine.nbytes == 2 * 2 * 2 * 8 * 10 * 4  # parts, layers, heads, size, tokens, bytes


def test_wrong_use_is_refused(tiny_model):
    engine = HFEngine(tiny_model)
    with pytest.raises(BadInput, match="at least one token"):
        engine.prefill([[]], want=NOTHING)
    engine.prefill([[1, 2]], want=NOTHING)
    with pytest.raises(BadInput, match="2 trees were given for 1 rows"):
        engine.step([TokenTree.root(2), TokenTree.root(2)], want=NOTHING)
    engine.step([TokenTree.root(2)], want=NOTHING)
    with pytest.raises(BadInput, match="commit"):
        engine.step([TokenTree.root(2)], want=NOTHING)
    with pytest.raises(Unsupported, match="hidden states between layers"):
        engine.prefill([[1, 2]], want=Needs(hooks=True))
