"""The native engine against transformers in float32, and against itself: trees, batches, commits, growth."""

from __future__ import annotations

import dataclasses
import gc
import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra loci-lm[local]")
pytest.importorskip("transformers", reason="needs the extra loci-lm[local]")

from loci.errors import BadInput, ContextTooLong, Unsupported  # noqa: E402
from loci.lm.draft import Needs, TokenTree  # noqa: E402
from loci.lm.engine import native  # noqa: E402
from loci.lm.engine.base import InjectingEngine, Injection, StepEngine  # noqa: E402
from loci.lm.engine.hf import HFEngine  # noqa: E402
from loci.lm.engine.native import NativeEngine, library, weights  # noqa: E402
from loci.lm.model import LanguageModel  # noqa: E402

pytestmark = pytest.mark.skipif(bool(native.available()), reason=native.available())

NOTHING = Needs()
EVERYTHING = Needs(topk=5, hidden=(-1, 1, 0), prefill=True)


def llama(tiny_model, *, kind: str = "llama", **more) -> LanguageModel:
    """A random model whose weights are whole bf16 numbers, so that float32 and bfloat16 are the same model."""
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    torch.manual_seed(1)
    sizes = {
        "vocab_size": 259,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "initializer_range": 0.08,
        **more,
    }
    config = LlamaConfig(**sizes) if kind == "llama" else Qwen2Config(**{**sizes, "hidden_size": 128})
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    if kind == "qwen2":
        for layer in model.model.layers:
            for part in ("q_proj", "k_proj", "v_proj"):
                torch.nn.init.normal_(getattr(layer.self_attn, part).bias)
    return dataclasses.replace(tiny_model, name=kind, model=model.float().eval())


@pytest.fixture(scope="module")
def small(tiny_model) -> LanguageModel:
    return llama(tiny_model)


def tree(tokens, parents, **more) -> TokenTree:
    return TokenTree(tokens=np.array(tokens, dtype=np.int32), parents=np.array(parents, dtype=np.int32), **more)


def random_tree(generator: np.random.Generator, root: int, size: int, vocabulary: int = 256) -> TokenTree:
    edges: dict[tuple[int, int], None] = {}
    while len(edges) < size - 1:
        edges[(int(generator.integers(0, len(edges) + 1)), int(generator.integers(0, vocabulary)))] = None
    return tree([root, *(token for _, token in edges)], [-1, *(parent for parent, _ in edges)])


def in_sequence(engine: NativeEngine, tokens) -> np.ndarray:
    """Logits after each token of a text, fed one by one."""
    engine.reset()
    engine.prefill([tokens[:1]], want=NOTHING)
    rows = []
    for token in tokens:
        output = engine.step([TokenTree.root(token)], want=NOTHING)
        rows.append(output.logits(0, 0))
        engine.commit([[0]])
    return np.stack(rows)


def reference(model: LanguageModel, tokens) -> np.ndarray:
    with torch.inference_mode():
        return model.model(torch.tensor([tokens])).logits[0].float().numpy()


def divergence(wanted: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Nats by which the found distributions differ from the wanted ones, position by position."""
    first, second = (torch.from_numpy(logits).double().log_softmax(-1) for logits in (wanted, found))
    return (first.exp() * (first - second)).sum(-1).numpy()


def close(found: np.ndarray, wanted: np.ndarray, share: float = 0.02) -> None:
    """Within what inputs rounded to bf16 allow, relative to the spread of the logits."""
    assert np.linalg.norm(found - wanted) < share * np.linalg.norm(wanted)


def test_it_is_an_engine_and_says_what_it_runs_on(small):
    engine = NativeEngine(small, threads=1)
    assert isinstance(engine, StepEngine)
    assert isinstance(engine, InjectingEngine)
    assert engine.name == "native"
    assert engine.kernel == library.levels()[-1]
    assert engine.weights.form == "BF16"
    assert native.supports(small) == ""


@pytest.mark.parametrize("kernel", library.LEVELS)
def test_every_instruction_set_gives_the_models_logits(small, kernel):
    if kernel not in library.levels():
        pytest.skip(f"this machine has no {kernel}")
    engine = NativeEngine(small, threads=2, kernel=kernel)
    text = np.random.default_rng(0).integers(0, 259, 150).tolist()
    engine.prefill([text[:100]], want=NOTHING)
    output = engine.step([TokenTree.chain(text[99:])], want=NOTHING)
    assert engine.kernel == kernel
    close(np.stack([output.logits(0, node) for node in range(51)]), reference(small, text)[99:])


@pytest.mark.parametrize(
    "more",
    [
        {"tie_word_embeddings": True},
        {"head_dim": 64, "num_attention_heads": 6},
        {"num_key_value_heads": 4},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        {"kind": "qwen2"},
    ],
    ids=["tied head", "wider heads", "no groups", "linear positions", "llama3 positions", "biases"],
)
def test_other_builds_of_the_family_give_their_own_logits(tiny_model, more):
    model = llama(tiny_model, **more)
    assert native.supports(model) == ""
    text = np.random.default_rng(0).integers(0, 259, 90).tolist()
    engine = NativeEngine(model, threads=1)
    engine.prefill([text[:60]], want=NOTHING)
    output = engine.step([TokenTree.chain(text[59:])], want=NOTHING)
    close(np.stack([output.logits(0, node) for node in range(31)]), reference(model, text)[59:])


@pytest.mark.parametrize("kernel", library.LEVELS)
def test_a_token_gets_the_same_bits_whatever_runs_beside_it(small, kernel):
    if kernel not in library.levels():
        pytest.skip(f"this machine has no {kernel}")
    engine = NativeEngine(small, threads=1, kernel=kernel)
    text = np.random.default_rng(0).integers(0, 259, 35 if kernel == "scalar" else 140).tolist()
    alone = in_sequence(engine, text)
    for size in (2, 5, 16, 17, 32, 33, 65, 140)[: 4 if kernel == "scalar" else 8]:
        engine.reset()
        engine.prefill([text[:1]], want=NOTHING)
        for first in range(0, len(text), size):
            piece = text[first : first + size]
            output = engine.step([TokenTree.chain(piece)], want=NOTHING)
            together = np.stack([output.logits(0, node) for node in range(len(piece))])
            np.testing.assert_array_equal(together, alone[first : first + size])
            engine.commit([list(range(len(piece)))])


def test_threads_change_nothing(small):
    text = np.random.default_rng(1).integers(0, 259, 80).tolist()
    outputs = []
    for threads in (1, 2, 5):
        engine = NativeEngine(small, threads=threads)
        engine.prefill([text[:41]], want=NOTHING)
        output = engine.step([TokenTree.chain(text[40:])], want=Needs(topk=3))
        outputs.append((np.stack([output.logits(0, node) for node in range(40)]), output.topk(0)))
    for logits, top in outputs[1:]:
        np.testing.assert_array_equal(logits, outputs[0][0])
        np.testing.assert_array_equal(top[0], outputs[0][1][0])


@pytest.mark.parametrize("past", [0, 5, 127, 130])
def test_a_tree_gives_the_logits_of_its_paths_in_sequence(small, past):
    generator = np.random.default_rng(past)
    engine = NativeEngine(small, threads=2)
    prompt = generator.integers(0, 259, past + 1).tolist()
    some = random_tree(generator, prompt[-1], 70)
    engine.prefill([prompt], want=NOTHING)
    output = engine.step([some], want=NOTHING)
    wanted = NativeEngine(small, threads=1)
    for path in some.paths[:5]:
        alone = in_sequence(wanted, [*prompt[:-1], *some.tokens[list(path)].tolist()])[-len(path) :]
        close(np.stack([output.logits(0, node) for node in path]), alone, share=2e-3)


def test_a_committed_path_is_the_text_that_was_fed(small):
    generator = np.random.default_rng(3)
    engine, other = NativeEngine(small, threads=2), NativeEngine(small, threads=1)
    text = generator.integers(0, 259, 120).tolist()
    engine.prefill([text], want=NOTHING)
    for _ in range(6):
        some = random_tree(generator, text[-1], 30)
        engine.step([some], want=NOTHING)
        path = some.paths[int(generator.integers(0, len(some.paths)))]
        engine.commit([path])
        text = [*text[:-1], *some.tokens[list(path)].tolist(), int(generator.integers(0, 259))]
        assert engine.lengths == (len(text) - 1,)
    other.prefill([text], want=NOTHING)
    found = engine.step([TokenTree.root(text[-1])], want=NOTHING).logits(0, 0)
    wanted = other.step([TokenTree.root(text[-1])], want=NOTHING).logits(0, 0)
    close(found, wanted, share=2e-3)  # keys were computed with other slots between them


def test_rows_of_a_batch_get_the_bits_of_single_runs(small):
    generator = np.random.default_rng(4)
    texts = [generator.integers(0, 259, length).tolist() for length in (1, 7, 130, 40, 300)]
    batch, single = NativeEngine(small, threads=2), NativeEngine(small, threads=1)
    batch.prefill(texts, want=NOTHING)
    wanted = []
    trees = [
        [random_tree(generator, text[-1], size) for text, size in zip(texts, sizes, strict=True)]
        for sizes in ((3, 1, 20, 9, 33), (1, 6, 2, 5, 4))
    ]
    for row, text in enumerate(texts):
        single.prefill([text], want=NOTHING)
        steps = []
        for some in (step[row] for step in trees):
            output = single.step([some], want=NOTHING)
            steps.append(np.stack([output.logits(0, node) for node in range(some.size)]))
            single.commit([some.paths[-1]])
        wanted.append(steps)
        single.reset()
    for number, step in enumerate(trees):
        output = batch.step(step, want=Needs(topk=2))
        for row, some in enumerate(step):
            found = np.stack([output.logits(row, node) for node in range(some.size)])
            np.testing.assert_array_equal(found, wanted[row][number])
            np.testing.assert_array_equal(output.best()[row, : some.size], found.argmax(1))
        batch.commit([some.paths[-1] for some in step])


def test_rows_that_are_kept_go_on_as_before(small):
    generator = np.random.default_rng(5)
    texts = [generator.integers(0, 259, length).tolist() for length in (9, 150, 33)]
    engine = NativeEngine(small, threads=1)
    engine.prefill(texts, want=NOTHING)
    before = engine.step([TokenTree.root(text[-1]) for text in texts], want=NOTHING)
    engine.commit([[], [], []])
    held = engine.nbytes
    engine.keep([2, 1])
    assert engine.lengths == (32, 149)
    assert engine.nbytes < held
    after = engine.step([TokenTree.root(texts[2][-1]), TokenTree.root(texts[1][-1])], want=NOTHING)
    np.testing.assert_array_equal(after.logits(0, 0), before.logits(2, 0))
    np.testing.assert_array_equal(after.logits(1, 0), before.logits(1, 0))
    engine.commit([[], []])
    engine.keep([])
    assert engine.lengths == ()
    assert engine.nbytes == 0


def test_outputs_hold_what_was_asked_for(small):
    generator = np.random.default_rng(6)
    text = generator.integers(0, 259, 600).tolist()  # several pieces
    engine, wanted = NativeEngine(small, threads=2), HFEngine(small)
    (found,), (right,) = (each.prefill([text], want=EVERYTHING) for each in (engine, wanted))
    assert found.topk_ids.shape == right.topk_ids.shape == (599, 5)
    assert found.hidden.shape == right.hidden.shape == (3, 599, 96)
    close(found.topk_logits, right.topk_logits)
    close(found.hidden.numpy(), right.hidden.numpy())
    np.testing.assert_allclose(found.hidden[2], right.hidden[2])  # the embedding is exact
    some = random_tree(generator, text[-1], 12)
    output, other = (each.step([some], want=EVERYTHING) for each in (engine, wanted))
    logits = np.stack([output.logits(0, node) for node in range(12)])
    ids, best = output.topk(0)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_array_equal(best, np.take_along_axis(logits, order, axis=1))
    np.testing.assert_array_equal(output.best()[0], order[:, 0])
    close(output.hidden(0).numpy(), other.hidden(0).numpy())
    engine.commit([[0]])
    plain = engine.step([TokenTree.root(3)], want=NOTHING)
    assert plain.topk(0) is None
    assert plain.hidden(0) is None
    with pytest.raises(BadInput, match="node 1 in row 0"):
        plain.logits(0, 1)


def test_an_output_keeps_its_logits_while_steps_go_on(small):
    engine = NativeEngine(small, threads=1)
    engine.prefill([[1]], want=NOTHING)
    outputs, copies = [], []
    for token in range(1, 7):
        outputs.append(engine.step([TokenTree.root(token)], want=NOTHING))
        copies.append(outputs[-1].logits(0, 0))
        engine.commit([[0]])
    for output, copy in zip(outputs, copies, strict=True):
        np.testing.assert_array_equal(output.logits(0, 0), copy)
    del outputs, output
    gc.collect()
    engine.step([TokenTree.root(9)], want=NOTHING)
    assert len(engine._buffers) <= 3


def test_probes_see_their_chain_and_no_token_sees_them(small):
    generator = np.random.default_rng(7)
    text = generator.integers(0, 259, 30).tolist()
    embeds = generator.normal(size=(3, 96)).astype(np.float32)
    kind = np.array([0, 0, 1, 1, 1], dtype=np.int32)
    some = tree([text[-1], 60, -1, -1, -1], [-1, 0, 1, 2, 0], kind=kind, embeds=embeds)
    engine, wanted = NativeEngine(small, threads=1), HFEngine(small)
    outputs = []
    for each in (engine, wanted):
        each.prefill([text], want=NOTHING)
        outputs.append(each.step([some], want=NOTHING))
    close(*(np.stack([output.logits(0, node) for node in range(5)]) for output in outputs))
    plain = NativeEngine(small, threads=1)
    plain.prefill([text], want=NOTHING)
    alone = plain.step([TokenTree.chain([text[-1], 60])], want=NOTHING)
    for node in (0, 1):
        np.testing.assert_array_equal(outputs[0].logits(0, node), alone.logits(0, node))


def test_an_injection_replaces_a_probe_before_its_layer(small):
    generator = np.random.default_rng(8)
    torch.manual_seed(0)
    text = generator.integers(0, 259, 12).tolist()
    weight, bias = torch.randn(96, 96) * 0.1, torch.randn(96)
    embeds = np.zeros((1, 96), dtype=np.float32)
    some = tree([text[-1], -1], [-1, 0], kind=np.array([0, 1], dtype=np.int32), embeds=embeds)
    for residual in (False, True):
        engine = NativeEngine(small, threads=2)
        engine.prefill([text], want=NOTHING)
        engine.inject([Injection(layer=3, weight=weight, bias=bias, residual=residual)])
        output = engine.step([some], want=Needs(hidden=(2, -1)))
        engine.commit([[]])
        # Before the last norm the source's state is the last layer's output: no want gives it, its hook does.
        states: list[object] = []
        hook = small.model.model.norm.register_forward_pre_hook(lambda module, given, keep=states: keep.extend(given))
        with torch.inference_mode():
            small.model(torch.tensor([text]))
            hook.remove()
            source = states[0][0, -1]
            made = weight @ source + bias + (source if residual else 0)
            wanted = small.model.lm_head(small.model.model.norm(made))
        close(output.logits(0, 1), wanted.float().numpy())
        engine.inject([])
        assert not np.allclose(engine.step([some], want=NOTHING).logits(0, 1), output.logits(0, 1))


def test_a_prompt_that_begins_alike_is_not_fed_again(small):
    generator = np.random.default_rng(9)
    text = generator.integers(0, 259, 300).tolist()
    engine = NativeEngine(small, threads=1)
    assert engine.prefill([text], want=NOTHING)[0].start == 0
    engine.step([TokenTree.root(text[-1])], want=NOTHING)
    engine.commit([[0]])
    longer = [*text, 7, 8]
    assert engine.prefill([longer], want=NOTHING)[0].start == 300
    held = engine.nbytes
    other = [*text[:30], 5, 6]
    assert engine.prefill([other], want=NOTHING)[0].start == 30
    assert engine.nbytes < held
    found = engine.step([TokenTree.root(6)], want=NOTHING).logits(0, 0)
    fresh = NativeEngine(small, threads=1)
    fresh.prefill([other], want=NOTHING)
    np.testing.assert_array_equal(found, fresh.step([TokenTree.root(6)], want=NOTHING).logits(0, 0))
    engine.commit([[0]])
    assert engine.prefill([[3, 4]], want=NOTHING)[0].start == 0


def test_an_interrupted_step_leaves_the_engine_as_it_was(small, monkeypatch):
    engine = NativeEngine(small, threads=1)
    engine.prefill([[1, 2, 3]], want=NOTHING)
    expected = engine.step([TokenTree.root(3)], want=NOTHING).logits(0, 0)
    engine.commit([[]])
    with monkeypatch.context() as patch:
        # Ctrl-C reaches Python when the library's call is over and before its result is taken.
        patch.setattr(library, "check", lambda code: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            engine.step([TokenTree.chain([9, 8, 7])], want=NOTHING)
    assert engine.lengths == (2,)
    np.testing.assert_array_equal(engine.step([TokenTree.root(3)], want=NOTHING).logits(0, 0), expected)


def test_the_cache_grows_with_the_text_and_counts_what_it_holds(small):
    engine = NativeEngine(small, threads=1)
    page = 3 * 2 * 2 * 128 * 32 * 2  # layers, heads, keys and values, slots, dimensions, bytes
    assert engine.nbytes == 0
    text = np.random.default_rng(10).integers(0, 259, 4300).tolist()
    engine.prefill([text[:100]], want=NOTHING)
    assert engine.nbytes == page
    engine.prefill([text], want=NOTHING)
    assert engine.nbytes == 34 * page
    for _ in range(70):
        engine.step([TokenTree.root(1)], want=NOTHING)
        engine.commit([[0]])
    assert engine.lengths == (4369,)
    assert engine.nbytes == 35 * page
    engine.reset()
    assert engine.nbytes == 0


def test_a_long_context_gives_the_models_logits(small):
    text = np.random.default_rng(11).integers(0, 259, 1500).tolist()
    engine = NativeEngine(small, threads=2)
    engine.prefill([text[:-4]], want=NOTHING)
    output = engine.step([TokenTree.chain(text[-5:])], want=NOTHING)
    close(np.stack([output.logits(0, node) for node in range(5)]), reference(small, text)[-5:])


def test_engines_of_several_threads_do_not_disturb_each_other(small):
    generator = np.random.default_rng(12)
    texts = [generator.integers(0, 259, 60).tolist() for _ in range(4)]
    wanted = [in_sequence(NativeEngine(small, threads=1), text) for text in texts]
    found: dict[int, np.ndarray] = {}

    def run(number: int) -> None:
        found[number] = in_sequence(NativeEngine(small, threads=2), texts[number])

    workers = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for number, logits in enumerate(wanted):
        np.testing.assert_array_equal(found[number], logits)


def test_what_cannot_be_run_is_refused_with_its_reason(small, tiny_model):
    assert "head size is 8" in native.supports(tiny_model)
    with pytest.raises(Unsupported, match="head size is 8"):
        NativeEngine(tiny_model)
    rounded = llama(tiny_model)
    with torch.no_grad():
        rounded.model.model.layers[1].mlp.up_proj.weight.mul_(1.001)
    assert "bfloat16 cannot hold them (layer 1, mlp.up_proj)" in native.supports(rounded)
    biased = llama(tiny_model, attention_bias=True)
    assert "biases" in native.supports(biased)
    turning = llama(tiny_model, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    assert "angles change" in native.supports(turning)
    with pytest.raises(Unsupported, match="threads"):
        NativeEngine(small, threads=0)


def test_bad_steps_are_refused_and_harm_nothing(small):
    engine = NativeEngine(small, threads=1)
    engine.prefill([[1, 2, 3]], want=NOTHING)
    expected = engine.step([TokenTree.root(3)], want=NOTHING).logits(0, 0)
    with pytest.raises(BadInput, match="call commit first"):
        engine.step([TokenTree.root(3)], want=NOTHING)
    with pytest.raises(BadInput, match="does not lead down"):
        engine.commit([[0, 5]])
    engine.commit([[]])
    for bad, wrong in (([TokenTree.root(259)], "vocabulary"), ([TokenTree.root(1)] * 2, "2 trees were given")):
        with pytest.raises(BadInput, match=wrong):
            engine.step(bad, want=NOTHING)
    with pytest.raises(BadInput, match="layer outside"):
        engine.step([TokenTree.root(1)], want=Needs(hidden=(9,)))
    with pytest.raises(BadInput, match="ranks"):
        engine.step([TokenTree.root(1)], want=Needs(topk=260))
    with pytest.raises(Unsupported, match="at most 256 nodes"):
        engine.step([TokenTree.chain(list(range(257)))], want=NOTHING)
    with pytest.raises(BadInput, match="at least one token"):
        engine.prefill([[]], want=NOTHING)
    np.testing.assert_array_equal(engine.step([TokenTree.root(3)], want=NOTHING).logits(0, 0), expected)


def test_the_codes_of_the_library_are_errors():
    for code, kind in ((2, Unsupported), (7, BadInput), (9, ContextTooLong)):
        with pytest.raises(kind):
            library.check(code)
    library.check(0)


# The real model, from the blocks of its file.


def test_the_default_model_keeps_the_blocks_of_its_file(default_model):
    engine = NativeEngine(default_model)
    assert engine.weights.form == "Q4_1 Q8_0"
    assert engine.weights.nbytes < 110e6
    changed = dataclasses.replace(default_model, model=_with_a_changed_weight(default_model.model))
    assert "not those of SmolLM2-135M-Instruct.Q4_1.gguf (layer 2, self_attn.v_proj)" in native.supports(changed)


def _with_a_changed_weight(model):
    import copy

    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.model.layers[2].self_attn.v_proj.weight[5, 7] += 1e-3
    return changed


def test_a_bfloat16_model_with_changed_weights_is_packed_from_its_own():
    from loci.lm.bundled import find
    from loci.lm.load import load

    if find() is None:
        pytest.skip("needs the bundled model")
    model = load("default", dtype="bfloat16", device="cpu")
    assert weights.weights_of(model).form == "Q4_1 Q8_0"
    with torch.no_grad():
        model.model.model.layers[2].self_attn.v_proj.weight[5, 7] += 1
    assert weights.weights_of(model).form == "BF16"


def test_the_default_model_is_as_near_to_float32_as_the_bar_demands(default_model):
    text = default_model.encode(PASSAGE)
    engine = NativeEngine(default_model, threads=1)
    engine.prefill([text[:1]], want=NOTHING)
    output = engine.step([TokenTree.chain(text[:200])], want=NOTHING)
    found = np.stack([output.logits(0, node) for node in range(len(text[:200]))])
    wanted = reference(default_model, text[:200])
    assert divergence(wanted, found).mean() < 1e-3
    assert (found.argmax(1) == wanted.argmax(1)).mean() >= 0.98


def test_greedy_text_is_that_of_float32_up_to_near_ties(default_model):
    from loci.lm.generate import generate

    for prompt in ("The capital of France is", "Three fruits:"):
        wanted = generate(default_model, prompt, max_new_tokens=10, engine=HFEngine(default_model))
        found = generate(default_model, prompt, max_new_tokens=10, engine=NativeEngine(default_model, threads=1))
        assert found.stats.engine == "native"
        if found.tokens == wanted.tokens:
            continue
        place = next(i for i, pair in enumerate(zip(found.tokens, wanted.tokens, strict=False)) if pair[0] != pair[1])
        before = [*default_model.encode(prompt), *wanted.tokens[:place]]
        first, second = np.sort(reference(default_model, before)[-1])[::-1][:2]
        assert first - second < 0.25


@pytest.mark.slow
def test_two_thousand_held_out_positions_meet_the_bar(default_model, data):
    import copy
    import gzip

    with gzip.open(data / "wikitext2" / "valid.txt.gz", "rt", encoding="utf-8") as stream:
        tokens = default_model.encode(stream.read(40_000))
    rounded = dataclasses.replace(default_model, model=copy.deepcopy(default_model.model).bfloat16())
    engine = NativeEngine(default_model, threads=2)
    far: dict[str, list[np.ndarray]] = {"native": [], "bfloat16": []}
    same: dict[str, list[np.ndarray]] = {"native": [], "bfloat16": []}
    for first in range(0, 2000, 250):
        text = tokens[first : first + 250]
        engine.reset()
        engine.prefill([text[:1]], want=NOTHING)
        output = engine.step([TokenTree.chain(text)], want=NOTHING)
        wanted = reference(default_model, text)
        found = {
            "native": np.stack([output.logits(0, node) for node in range(250)]),
            "bfloat16": reference(rounded, text),
        }
        for name, logits in found.items():
            far[name].append(divergence(wanted, logits))
            same[name].append(logits.argmax(1) == wanted.argmax(1))
    mean = {name: float(np.concatenate(values).mean()) for name, values in far.items()}
    share = {name: float(np.concatenate(values).mean()) for name, values in same.items()}
    print(f"KL to float32 {mean}, same most probable token {share}")
    assert mean["native"] <= 1e-3
    assert share["native"] >= 0.98
    assert mean["native"] <= mean["bfloat16"]
    assert share["native"] >= share["bfloat16"] - 0.002


PASSAGE = """The history of the city of Rome begins, according to tradition, in 753 BC, when it was founded by Romulus.
Archaeologists have found evidence of earlier settlements on the hills, and the stories that were told about its first
kings are older than any that were written down. The method of loci, which orators of that city used to remember long
speeches, puts each thing to be remembered into a room of a house that is known well; to recall them one walks through
the house again, from room to room, and finds in each what was left there. Cicero and Quintilian describe it, and the
author of a book on rhetoric that was long thought to be by Cicero gives rules for the houses: well lit, not too much
alike, neither too large nor too small, and at moderate distances from each other."""
