from __future__ import annotations

import dataclasses
import gc
import weakref

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra loci-lm[local]")

from loci.errors import Unsupported  # noqa: E402
from loci.lm.draft import Needs, TokenTree  # noqa: E402
from loci.lm.engine import base, packed  # noqa: E402
from loci.lm.engine.hf import HFEngine  # noqa: E402
from loci.lm.engine.output import CHUNK, best, top  # noqa: E402
from loci.lm.engine.packed import PackedEngine, weights_of  # noqa: E402
from loci.lm.generate import Stop, generate  # noqa: E402
from loci.lm.sampling import Sampling  # noqa: E402

NOTHING = Needs()
SIZES = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def other(tiny_model, family: str, **more):
    """The tiny model's tokenizer with a random model of another family."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **more})
    return dataclasses.replace(
        tiny_model, name=family, model=getattr(transformers, f"{family}ForCausalLM")(config).eval()
    )


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("Llama", {"num_key_value_heads": 4}),
        ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
        ("Llama", {"head_dim": 16, "attention_bias": True, "mlp_bias": True}),
        ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
        (
            "Llama",
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
        ),
        ("Mistral", {"sliding_window": None}),
        ("Qwen2", {}),
    ],
)
def test_relatives_of_llama_give_what_transformers_gives(family, more, tiny_model):
    model = other(tiny_model, family, **more)
    text = np.random.default_rng(0).integers(0, 256, 100).tolist()
    engine = PackedEngine(model)
    engine.prefill([text[:90]], want=NOTHING)
    output = engine.step([TokenTree.chain(text[89:])], want=NOTHING)
    with torch.inference_mode():
        wanted = model.model(torch.tensor([text])).logits[0, 89:]
    torch.testing.assert_close(output.scores[0], wanted, atol=1e-4, rtol=0.0)


@pytest.mark.parametrize(
    ("family", "more", "why"),
    [
        ("Mistral", {"sliding_window": 8}, "sees only the last 8 tokens|sliding"),
        ("Qwen3", {}, "k_norm"),
        ("Gemma", {"head_dim": 8}, "norm|embedding|activation|Gemma"),
        ("Llama", {"hidden_act": "gelu"}, "GELU"),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}, "dynamic"),
        ("Granite", {"residual_multiplier": 0.5}, "trial"),
        ("Granite", {"logits_scaling": 3.0}, "trial"),
    ],
)
def test_what_is_made_of_other_parts_is_refused_with_the_reason(family, more, why, tiny_model):
    model = other(tiny_model, family, **more)
    with pytest.raises(Unsupported, match=why):
        PackedEngine(model)
    assert packed.supports(model)


def test_a_model_with_a_hook_or_an_adapter_is_refused(tiny_model):
    model = other(tiny_model, "Llama")
    assert packed.supports(model) == ""
    handle = model.model.model.layers[1].register_forward_hook(lambda *_: None)
    assert "hook on model.layers.1" in packed.supports(model)
    handle.remove()
    assert packed.supports(model) == ""
    layer = model.model.model.layers[0].self_attn

    class Adapter(torch.nn.Linear):
        pass

    layer.q_proj = Adapter(32, 32, bias=False)
    assert "q_proj is a Adapter" in packed.supports(model)


def test_hooks_by_which_transformers_collects_states_do_not_matter(tiny_model):
    model = other(tiny_model, "Llama")
    engine = HFEngine(model)
    engine.prefill([[1, 2, 3]], want=NOTHING)
    engine.step([TokenTree.root(3)], want=Needs(hidden=(1,)))
    assert packed.supports(model) == ""


PROMPTS = [
    "Once",
    "The house has many rooms, and",
    "a b c d e f g h",
    "Where is",
    "It was the best of times, it was the worst of times, it was",
    "1 2 3",
    "What do you remember?",
    "x",
]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, top_p=0.9)])
def test_a_batch_of_mixed_lengths_equals_the_single_runs_and_transformers(sampling, tiny_model):
    options = {"max_new_tokens": 12, "sampling": sampling, "stop": Stop(eos=False)}
    seeds = list(range(40, 48))
    batch = generate(tiny_model, PROMPTS, seed=seeds, engine="packed", **options)
    plain = generate(tiny_model, PROMPTS, seed=seeds, engine="hf", **options)
    singles = [
        generate(tiny_model, prompt, seed=seed, engine="packed", **options)
        for prompt, seed in zip(PROMPTS, seeds, strict=True)
    ]
    assert [row.tokens for row in batch] == [row.tokens for row in singles]
    assert [row.tokens for row in batch] == [row.tokens for row in plain]
    assert batch[0].stats.engine == "packed"


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, top_p=0.9)])
def test_the_default_models_batch_equals_the_single_runs_and_transformers(sampling, default_model):
    options = {"max_new_tokens": 24, "sampling": sampling, "stop": Stop(eos=False)}
    seeds = list(range(40, 48))
    batch = generate(default_model, PROMPTS, seed=seeds, engine="packed", **options)
    plain = generate(default_model, PROMPTS, seed=seeds, engine="hf", **options)
    singles = [
        generate(default_model, prompt, seed=seed, engine="packed", **options)
        for prompt, seed in zip(PROMPTS, seeds, strict=True)
    ]
    assert [row.tokens for row in batch] == [row.tokens for row in singles]
    assert [row.tokens for row in batch] == [row.tokens for row in plain]


def test_in_bfloat16_it_is_no_farther_from_float32_than_transformers(tiny_model):
    exact = other(tiny_model, "Llama", num_hidden_layers=4, initializer_range=0.2)
    rounded = other(tiny_model, "Llama", num_hidden_layers=4, initializer_range=0.2)
    rounded.model.to(torch.bfloat16)
    text = np.random.default_rng(1).integers(0, 256, 200).tolist()
    with torch.inference_mode():
        wanted = exact.model(torch.tensor([text])).logits[0, 150:]
        theirs = rounded.model(torch.tensor([text])).logits[0, 150:].float()
    engine = PackedEngine(rounded)
    engine.prefill([text[:151]], want=NOTHING)
    ours = engine.step([TokenTree.chain(text[150:])], want=NOTHING).scores[0].float()
    assert (ours - wanted).square().mean() < 1.2 * (theirs - wanted).square().mean()


@pytest.mark.parametrize("length", [CHUNK - 1, CHUNK + 2, CHUNK + 130])
def test_long_prompts_give_what_transformers_gives(length, tiny_model):
    model = other(tiny_model, "Llama", max_position_embeddings=1024)
    text = np.random.default_rng(2).integers(0, 256, length).tolist()
    engine = PackedEngine(model)
    (result,) = engine.prefill([text], want=Needs(prefill=True, topk=2, hidden=(-1, 1)))
    with torch.inference_mode():
        found = model.model(torch.tensor([text]), output_hidden_states=True)
    np.testing.assert_allclose(result.topk_logits, found.logits[0, :-1].topk(2).values.numpy(), atol=1e-4)
    torch.testing.assert_close(result.hidden[0], found.hidden_states[-1][0, :-1], atol=1e-4, rtol=0.0)
    torch.testing.assert_close(result.hidden[1], found.hidden_states[1][0, :-1], atol=1e-4, rtol=0.0)
    output = engine.step([TokenTree.root(text[-1])], want=NOTHING)
    torch.testing.assert_close(output.scores[0, 0], found.logits[0, -1], atol=1e-4, rtol=0.0)


def test_engines_over_one_model_share_the_weights_and_not_the_cache(tiny_model):
    first, second = PackedEngine(tiny_model), PackedEngine(tiny_model)
    assert first.weights is second.weights
    first.prefill([[1, 2, 3]], want=NOTHING)
    second.prefill([[9, 8]], want=NOTHING)
    alone = PackedEngine(tiny_model)
    alone.prefill([[1, 2, 3]], want=NOTHING)
    ours, wanted = (engine.step([TokenTree.root(3)], want=NOTHING).logits(0, 0) for engine in (first, alone))
    np.testing.assert_array_equal(ours, wanted)


@pytest.mark.parametrize("through", ["no_grad", "data"])
def test_weights_that_were_written_to_are_packed_again(through, tiny_model):
    model = other(tiny_model, "Llama")
    engine = PackedEngine(model)
    engine.prefill([[1, 2, 3]], want=NOTHING)
    weight = model.model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        if through == "data":
            weight.data += 0.1
        else:
            weight.mul_(2.0)
    engine.prefill([[1, 2, 3, 4]], want=NOTHING)  # nothing of the old cache is used
    with torch.inference_mode():
        wanted = model.model(torch.tensor([[1, 2, 3, 4]])).logits[0, -1]
    output = engine.step([TokenTree.root(4)], want=NOTHING)
    torch.testing.assert_close(output.scores[0, 0], wanted, atol=1e-4, rtol=0.0)


def test_what_is_kept_goes_with_the_model(tiny_model):
    model = other(tiny_model, "Llama")
    kept = weakref.ref(weights_of(model))
    assert kept() is not None
    del model
    gc.collect()
    assert kept() is None


def test_release_makes_the_next_engine_pack_anew(tiny_model):
    model = other(tiny_model, "Llama")
    before = weights_of(model)
    base.release(model)
    assert weights_of(model) is not before


def test_the_cache_is_counted_and_so_is_the_copy_of_the_weights(tiny_model):
    engine = PackedEngine(tiny_model)
    assert engine.nbytes == 0
    engine.prefill([list(range(11))], want=NOTHING)
    assert engine.nbytes == 2 * 2 * 2 * 8 * 256 * 4  # parts, layers, heads, size, slots, bytes
    matrices = 32 * (32 + 16 + 16) + 32 * 32 + 3 * 32 * 64
    assert engine.weight_bytes in (0, (2 * matrices + 258 * 32) * 4)


@pytest.mark.parametrize("vocabulary", [258, 1280])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_best_tokens_are_found_as_by_a_full_sort(vocabulary, dtype):
    generator = torch.Generator().manual_seed(4)
    scores = torch.randint(-40, 40, (6, vocabulary), generator=generator).to(dtype)  # many equals
    assert torch.equal(best(scores), scores.argmax(-1))
    values, ids = top(scores, 7)
    wanted = scores.float().sort(dim=-1, descending=True, stable=True).values[:, :7]
    assert torch.equal(values.float(), wanted)
    assert torch.equal(scores.gather(1, ids), values)
    for row in range(6):
        pairs = list(zip((-values[row]).tolist(), ids[row].tolist(), strict=True))
        assert pairs == sorted(set(pairs))
