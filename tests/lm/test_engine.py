from __future__ import annotations

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra loci-lm[local]")

from loci.errors import BadInput, Unsupported  # noqa: E402
from loci.lm.draft import Needs, TokenTree  # noqa: E402
from loci.lm.engine.base import Injection, StepEngine  # noqa: E402
from loci.lm.engine.choose import choose  # noqa: E402
from loci.lm.engine.hf import HFEngine  # noqa: E402

NOTHING = Needs()

# How far logits may be from those of one plain forward pass of transformers in float32. The native engine rounds the
# inputs of its products to bfloat16.
TOLERANCE = {"hf": 1e-4, "packed": 1e-4, "cuda": 1e-4, "native": 0.5}


@pytest.fixture(params=["hf", "packed", "cuda", "native"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def wide_model(tiny_model):
    """A small model that every engine can run: heads of 32 numbers, weights that bfloat16 holds."""
    loaded = small(
        "Llama",
        vocab_size=258,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,
    )
    return dataclasses.replace(tiny_model, name="wide", model=loaded.bfloat16().float())


def made(kind: str, model) -> StepEngine:
    """The engine of this name; skips where it cannot run the model here."""
    if kind == "cuda":
        from loci.lm.engine.cuda import CudaEngine

        return CudaEngine(model)  # all but the graphs run on the processor too
    try:
        return choose(model, name=kind)
    except Unsupported as error:
        pytest.skip(str(error))


def plain(model, tokens) -> np.ndarray:
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


def check_tree(model, prompt, some: TokenTree, output, row: int, tolerance: float = 1e-4) -> None:
    for path in some.paths:
        wanted = plain(model, [*prompt[:-1], *some.tokens[list(path)].tolist()])[-len(path) :]
        found = np.stack([output.logits(row, node) for node in path])
        np.testing.assert_allclose(found, wanted, atol=tolerance)
    if tolerance < 1e-3:
        best = output.best()[row, : some.size]
        np.testing.assert_array_equal(best, [output.logits(row, node).argmax() for node in range(some.size)])


def test_a_tree_gives_the_logits_of_its_paths_in_sequence(kind, wide_model):
    generator = np.random.default_rng(0)
    engine = made(kind, wide_model)
    prompt = generator.integers(0, 256, 20).tolist()
    engine.prefill([prompt], want=NOTHING)
    some = random_tree(generator, prompt[-1], 17)
    check_tree(wide_model, prompt, some, engine.step([some], want=NOTHING), 0, TOLERANCE[kind])


def test_a_tree_gives_the_logits_of_its_paths_on_the_default_model(kind, default_model):
    prompt = default_model.encode("The method of loci is a way to remember things by")
    branches = [default_model.encode(text) for text in (" placing them in a house.", " giving each a place", " rote.")]
    some = TokenTree.chain([prompt[-1], *branches[0]])
    for branch in branches[1:]:
        some = TokenTree.merge(some, TokenTree.chain([prompt[-1], *branch]), budget=64)
    engine = made(kind, default_model)
    engine.prefill([prompt], want=NOTHING)
    check_tree(default_model, prompt, some, engine.step([some], want=NOTHING), 0, TOLERANCE[kind])


@pytest.mark.parametrize("lengths", [(12,), (12, 1, 30, 7)])
def test_after_any_kept_path_the_next_step_equals_the_text_in_sequence(kind, wide_model, lengths):
    generator = np.random.default_rng(1)
    texts = [generator.integers(0, 256, length).tolist() for length in lengths]
    engine = made(kind, wide_model)
    engine.prefill(texts, want=NOTHING)
    for size in (1, 9, 6, 1, 14):
        trees = [random_tree(generator, text[-1], int(generator.integers(1, size + 1))) for text in texts]
        output = engine.step(trees, want=NOTHING)
        paths = []
        for row, (text, some) in enumerate(zip(texts, trees, strict=True)):
            check_tree(wide_model, text, some, output, row, TOLERANCE[kind])
            path = some.paths[int(generator.integers(0, len(some.paths)))]
            paths.append(path)
            text.extend([*some.tokens[list(path[1:])].tolist(), int(generator.integers(0, 256))])
        engine.commit(paths)
        assert engine.lengths == tuple(len(text) - 1 for text in texts)


def test_a_text_grows_past_the_slots_that_were_there_first(kind, wide_model):
    engine = made(kind, wide_model)
    text = np.random.default_rng(5).integers(0, 256, 250).tolist()
    engine.prefill([text[:240]], want=NOTHING)
    for place in range(239, 245):
        engine.step([TokenTree.chain([text[place], 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13])], want=NOTHING)
        engine.commit([[0]])
    output = engine.step([TokenTree.chain(text[245:])], want=NOTHING)
    wanted = plain(wide_model, text)[245:]
    found = np.stack([output.logits(0, node) for node in range(5)])
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE[kind])


def test_a_row_that_leaves_takes_nothing_from_the_others(kind, wide_model):
    texts = [[1, 2, 3, 4], [5, 6], [7, 8, 9, 10, 11, 12]]
    engine = made(kind, wide_model)
    engine.prefill(texts, want=NOTHING)
    engine.keep([2, 1])
    output = engine.step([TokenTree.root(12), TokenTree.root(6)], want=NOTHING)
    np.testing.assert_allclose(output.logits(0, 0), plain(wide_model, texts[2])[-1], atol=TOLERANCE[kind])
    np.testing.assert_allclose(output.logits(1, 0), plain(wide_model, texts[1])[-1], atol=TOLERANCE[kind])


def test_a_prompt_that_continues_the_last_one_is_fed_only_where_it_is_new(kind, wide_model):
    engine = made(kind, wide_model)
    text = list(range(40))
    assert engine.prefill([text], want=NOTHING)[0].start == 0
    engine.step([TokenTree.root(39)], want=NOTHING)
    engine.commit([[0]])
    longer = [*text, 50, 51, 52]
    assert engine.prefill([longer], want=NOTHING)[0].start == 40
    other = [*text[:30], 99, 98, 97]
    assert engine.prefill([other], want=NOTHING)[0].start == 30
    output = engine.step([TokenTree.root(97)], want=NOTHING)
    np.testing.assert_allclose(output.logits(0, 0), plain(wide_model, other)[-1], atol=TOLERANCE[kind])
    engine.commit([[0]])
    assert engine.prefill([[7, 8]], want=NOTHING)[0].start == 0


def test_hf_feeds_only_what_is_new(tiny_model, monkeypatch):
    engine = HFEngine(tiny_model)
    fed: list[int] = []
    forward = engine._forward
    monkeypatch.setattr(
        engine, "_forward", lambda ids, *rest, **more: (fed.append(ids.shape[1]), forward(ids, *rest, **more))[1]
    )
    engine.prefill([list(range(40))], want=NOTHING)
    engine.prefill([[*range(40), 50, 51]], want=NOTHING)
    assert fed == [39, 2]


def interrupted(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("inside", ["hf", "packed"])
def test_an_interrupted_step_leaves_the_engine_as_it_was(inside, tiny_model, monkeypatch):
    engine = made(inside, tiny_model)
    text = list(range(10))
    engine.prefill([text], want=NOTHING)
    if inside == "hf":
        place, name = tiny_model.model.model.layers[1].self_attn, "forward"
    else:
        place, name = engine.weights.layers[1].down, "plus"
    with monkeypatch.context() as patch:
        patch.setattr(place, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.step([TokenTree.chain([9, 1, 2])], want=NOTHING)
    output = engine.step([TokenTree.root(9)], want=NOTHING)
    np.testing.assert_allclose(output.logits(0, 0), plain(tiny_model, text)[-1], atol=1e-4)


def test_topk_and_hidden_states_come_back_for_every_node_and_for_the_prompt(kind, wide_model):
    want = Needs(topk=3, hidden=(-1, 1), prefill=True)
    engine = made(kind, wide_model)
    text = list(range(30))
    (result,) = engine.prefill([text], want=want)
    wanted = plain(wide_model, text)
    assert result.topk_ids.shape == (29, 3)
    assert result.hidden.shape == (2, 29, 128)
    output = engine.step([TokenTree.chain([29, 4])], want=want)
    ids, logits = output.topk(0)
    assert ids.shape == logits.shape == (2, 3)
    assert output.hidden(0).shape == (2, 2, 128)
    if kind != "native":
        np.testing.assert_array_equal(result.topk_ids, np.argsort(-wanted[:29], axis=1)[:, :3])
        np.testing.assert_array_equal(ids[0], np.argsort(-wanted[29])[:3])
    head = wide_model.model.lm_head(output.hidden(0)[0].clone())[1].detach().numpy()
    np.testing.assert_allclose(head, output.logits(0, 1), atol=max(1e-5, TOLERANCE[kind] / 10))


def test_a_layers_states_are_those_of_transformers(kind, wide_model):
    text = list(range(30))
    with torch.inference_mode():
        states = wide_model.model(torch.tensor([text]), output_hidden_states=True).hidden_states
    engine = made(kind, wide_model)
    engine.prefill([text[:20]], want=NOTHING)
    output = engine.step([TokenTree.chain(text[19:])], want=Needs(hidden=(0, 1, 2, -1)))
    for place, layer in enumerate((0, 1, 2, -1)):
        wanted = states[layer][0, 19:]
        torch.testing.assert_close(output.hidden(0)[place].float(), wanted, atol=TOLERANCE[kind], rtol=0.0)


@pytest.mark.parametrize("inside", ["hf", "packed"])
def test_a_prompt_longer_than_a_chunk_gives_the_same_outputs(inside, tiny_model, monkeypatch):
    monkeypatch.setattr(f"loci.lm.engine.{inside}.CHUNK", 7)
    text = np.random.default_rng(2).integers(0, 256, 40).tolist()
    (result,) = made(inside, tiny_model).prefill([text], want=Needs(topk=1, prefill=True))
    np.testing.assert_array_equal(result.topk_ids[:, 0], plain(tiny_model, text)[:39].argmax(axis=1))


def probes(model, tokens, parents) -> TokenTree:
    """A tree whose nodes of -1 are probes with the embeddings of the tokens 70, 71, ..."""
    embed = model.model.get_input_embeddings().weight
    count = tokens.count(-1)
    kind = np.array([int(token < 0) for token in tokens], dtype=np.int32)
    return tree(tokens, parents, kind=kind, embeds=embed[70 : 70 + count].detach().float().numpy())


def test_probes_see_their_path_and_no_token_sees_them(kind, wide_model):
    text = [1, 2, 3]
    engine = made(kind, wide_model)
    engine.prefill([text], want=NOTHING)
    output = engine.step([probes(wide_model, [3, 60, -1, -1], [-1, 0, 1, 2])], want=NOTHING)
    wanted = plain(wide_model, [1, 2, 3, 60, 70, 71])
    for node in range(4):
        np.testing.assert_allclose(output.logits(0, node), wanted[2 + node], atol=TOLERANCE[kind])


def overwritten(model, text, places: dict[int, tuple[int, Injection]]) -> np.ndarray:
    """Logits of a text some of whose states are overwritten: {place: (source, injection)}. The layers are called one
    by one, in full."""
    decoder = model.model.model
    with torch.inference_mode():
        states = decoder.embed_tokens(torch.tensor([text]))
        rotary = decoder.rotary_emb(states, position_ids=torch.arange(len(text))[None])
        seen = torch.ones(len(text), len(text), dtype=torch.bool).tril()[None, None]
        for number in range(len(decoder.layers) + 1):
            states = states.clone()
            for place, (source, injection) in places.items():
                if injection.layer == number:
                    new = injection.weight @ states[0, source]
                    new = new + (0 if injection.bias is None else injection.bias)
                    states[0, place] = new + (states[0, source] if injection.residual else 0)
            if number < len(decoder.layers):
                states = decoder.layers[number](states, attention_mask=seen, position_embeddings=rotary)
        return model.model.lm_head(decoder.norm(states))[0].numpy()


def test_injections_overwrite_probes_before_their_layer(kind, wide_model):
    torch.manual_seed(3)
    injections = [
        Injection(layer=1, weight=torch.randn(128, 128) / 12, bias=torch.randn(128), residual=True),
        Injection(layer=1, weight=torch.randn(128, 128) / 12),
        Injection(layer=2, weight=torch.randn(128, 128) / 12, residual=True),
    ]
    engine = made(kind, wide_model)
    if not engine.capabilities.hooks:
        pytest.skip("this engine has no hooks")
    texts = [[1, 2, 3], [9, 8, 7, 6, 5]]
    engine.prefill(texts, want=NOTHING)
    plainly = engine.step([TokenTree.chain([3, 60]), TokenTree.chain([5, 61])], want=NOTHING)
    tokens = [plainly.logits(row, node) for row in range(2) for node in range(2)]
    engine.commit([[], []])
    engine.inject(injections)
    # Under the root a chain of two, under the token a chain of three; the second row has one probe only.
    big = probes(wide_model, [3, 60, -1, -1, -1, -1, -1], [-1, 0, 0, 2, 1, 4, 5])
    output = engine.step([big, probes(wide_model, [5, 61, -1], [-1, 0, 1])], want=NOTHING)
    for row in range(2):
        for node in range(2):  # tokens do not see probes
            np.testing.assert_allclose(
                output.logits(row, node), tokens[2 * row + node], atol=max(1e-5, TOLERANCE[kind])
            )
    one, two, three = injections
    wanted = overwritten(wide_model, [1, 2, 3, 99, 99], {3: (2, one), 4: (2, two)})
    np.testing.assert_allclose(output.logits(0, 2), wanted[3], atol=TOLERANCE[kind])
    np.testing.assert_allclose(output.logits(0, 3), wanted[4], atol=TOLERANCE[kind])
    wanted = overwritten(wide_model, [1, 2, 3, 60, 99, 99, 99], {4: (3, one), 5: (3, two), 6: (3, three)})
    for probe in range(3):
        np.testing.assert_allclose(output.logits(0, 4 + probe), wanted[4 + probe], atol=TOLERANCE[kind])
    wanted = overwritten(wide_model, [9, 8, 7, 6, 5, 61, 99], {6: (5, one)})
    np.testing.assert_allclose(output.logits(1, 2), wanted[6], atol=TOLERANCE[kind])
    engine.commit([[0, 1], [0]])
    engine.inject([])
    assert not any(module._forward_pre_hooks for module in wide_model.model.modules())
    output = engine.step([probes(wide_model, [4, -1], [-1, 0]), TokenTree.root(61)], want=NOTHING)
    np.testing.assert_allclose(output.logits(0, 1), plain(wide_model, [1, 2, 3, 60, 4, 70])[-1], atol=TOLERANCE[kind])


def test_hooks_are_gone_after_a_step_that_failed(tiny_model, monkeypatch):
    engine = HFEngine(tiny_model)
    engine.prefill([[1, 2]], want=Needs(hooks=True))
    engine.inject([Injection(layer=1, weight=torch.eye(32))])
    with monkeypatch.context() as patch:
        patch.setattr(tiny_model.model.model.layers[1].self_attn, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.step([probes(tiny_model, [2, -1], [-1, 0])], want=NOTHING)
    assert not any(module._forward_pre_hooks for module in tiny_model.model.modules())


def test_injections_that_do_not_fit_are_refused(kind, wide_model):
    engine = made(kind, wide_model)
    if not engine.capabilities.hooks:
        pytest.skip("this engine has no hooks")
    square = torch.eye(128)
    with pytest.raises(BadInput, match="layers 0 to 1"):
        engine.inject([Injection(layer=3, weight=square)])
    with pytest.raises(BadInput, match="must not fall"):
        engine.inject([Injection(layer=2, weight=square), Injection(layer=1, weight=square)])
    with pytest.raises(BadInput, match=r"must be \(128, 128\)"):
        engine.inject([Injection(layer=0, weight=torch.eye(8))])


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
    check_tree(tiny_model, text, trees[0], output, 0)
    check_tree(tiny_model, [9], trees[1], output, 1)


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
    np.testing.assert_allclose(output.logits(0, 0), plain(model, text)[-1], atol=1e-4)
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
    np.testing.assert_allclose(output.logits(0, 0), plain(tiny_model, [*before, 9, 2, 6])[-1], atol=1e-4)
    engine.commit([[0]])
    assert memory.get_seq_length() == 8
    engine.reset()
    assert memory.get_seq_length() == 5


def test_the_bytes_held_are_those_of_keys_and_values(tiny_model):
    engine = HFEngine(tiny_model)
    assert engine.nbytes == 0
    engine.prefill([list(range(11))], want=NOTHING)
    assert engine.nbytes == 2 * 2 * 2 * 8 * 10 * 4  # parts, layers, heads, size, tokens, bytes


def test_wrong_use_is_refused(kind, wide_model):
    engine = made(kind, wide_model)
    with pytest.raises(BadInput, match="at least one token"):
        engine.prefill([[]], want=NOTHING)
    engine.prefill([[1, 2]], want=NOTHING)
    with pytest.raises(BadInput, match="2 trees were given for 1 rows"):
        engine.step([TokenTree.root(2), TokenTree.root(2)], want=NOTHING)
    engine.step([TokenTree.root(2)], want=NOTHING)
    with pytest.raises(BadInput, match="commit"):
        engine.step([TokenTree.root(2)], want=NOTHING)
    with pytest.raises(BadInput, match="2 paths were given"):
        engine.commit([[0], [0]])
