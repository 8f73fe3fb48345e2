"""Probes in a frozen model: two passes equal one, tokens see nothing of them, and nothing of the model is changed."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra loci-lm[local]")

from loci.decoding.distill import DistilledText  # noqa: E402
from loci.decoding.hidden_transfer import HiddenTransfer  # noqa: E402
from loci.decoding.ppd import PromptTokens  # noqa: E402
from loci.decoding.probes import (  # noqa: E402
    Chains,
    FrozenModel,
    ProbeRecipe,
    fit,
    measure,
    places,
    sites,
    text_loss,
)
from loci.errors import BadInput, BadModel, Unsupported  # noqa: E402
from loci.lm.train import fingerprint  # noqa: E402


def text(length: int = 40, *, written_from: int = 5, seed: int = 0) -> DistilledText:
    tokens = np.random.default_rng(seed).integers(0, 256, length).astype(np.int32)
    return DistilledText(tokens=tokens, written=np.arange(length) >= written_from, temperature=0.0)


def prompt(width: int = 32, k: int = 3, ensemble: int = 1) -> PromptTokens:
    made = PromptTokens(width, k, ensemble)
    with torch.no_grad():
        made.embeds.mul_(20.0)
    return made


def transfer(width: int, layers: tuple[int, ...]) -> HiddenTransfer:
    made = HiddenTransfer(width, layers)
    with torch.no_grad():
        made.weight.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(1))
        made.bias.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(2))
    return made


def in_one_pass(model, tokens, chains, probes) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain form: text and probes as one sequence under one mask, states overwritten by hooks that see everything.
    Returns the logits of the tokens and of the probes, chain by chain."""
    length, rows = len(tokens), chains.rows
    visible = np.zeros((length + rows, length + rows), dtype=bool)
    visible[:length, :length] = np.tril(np.ones((length, length), dtype=bool))
    visible[length:] = chains.visible(length)
    embed = model.model.get_input_embeddings()(torch.from_numpy(tokens)[None])
    own = probes.inputs().transpose(0, 1).reshape(-1, probes.width).repeat(len(chains.parents), 1)[None]
    positions = torch.from_numpy(np.concatenate([np.arange(length), chains.positions]))[None]

    def overwrite(layer, module, args, kwargs):
        states = args[0].clone()
        for row in range(rows):
            chain, step = row // (probes.k * probes.ensemble), row % probes.k
            if probes.layers and probes.layers[step] == layer:
                states[0, length + row] = probes.transferred(step, args[0][0, chains.parents[chain]])
        return (states, *args[1:]), kwargs

    hooks = [
        site.register_forward_pre_hook(lambda module, args, kwargs, layer=layer: overwrite(layer, module, args, kwargs),
                                       with_kwargs=True)
        for layer, site in enumerate(sites(model.model))
    ]  # fmt: skip
    try:
        logits = model.model(
            inputs_embeds=torch.cat([embed, own], dim=1),
            position_ids=positions,
            attention_mask=torch.from_numpy(visible)[None, None],
        ).logits[0]
    finally:
        for hook in hooks:
            hook.remove()
    grouped = logits[length:].view(len(chains.parents), probes.ensemble, probes.k, -1)
    return logits[:length], grouped.mean(dim=1)


@pytest.mark.parametrize("chained", [True, False])
@pytest.mark.parametrize("context", [True, False])
@pytest.mark.parametrize("kind", ["prompt", "ensemble", "transfer", "rising", "last"])
def test_reading_first_and_probing_after_equals_one_pass_under_one_mask(tiny_model, kind, chained, context) -> None:
    probes = {
        "prompt": lambda: prompt(),
        "ensemble": lambda: prompt(k=2, ensemble=3),
        "transfer": lambda: transfer(32, (1, 1, 1)),
        "rising": lambda: transfer(32, (0, 1, 2)),
        "last": lambda: transfer(32, (2, 2, 2)),
    }[kind]()
    tokens = text().tokens.astype(np.int64)
    chains = Chains(
        parents=np.array([0, 7, 8, 30]), k=probes.k, ensemble=probes.ensemble, chained=chained, context=context
    )
    own, expected = in_one_pass(tiny_model, tokens, chains, probes)
    weights = tuple(probes.parameters())
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    wanted = torch.autograd.grad((expected * direction).sum(), weights)
    with FrozenModel(tiny_model, probes.layers) as frozen:
        reading = frozen.read(tokens, np.arange(len(tokens)))
        found = frozen.guess(reading, chains, probes)
        gradients = torch.autograd.grad((found * direction).sum(), weights)
    torch.testing.assert_close(reading.logits, own, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    for gradient, one in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, one, atol=1e-3, rtol=1e-3)


def test_tokens_do_not_see_probes_of_the_default_model(default_model) -> None:
    tokens = np.array(default_model.encode("The method of loci is a way to remember things by placing them."))
    with torch.no_grad():
        plain = default_model.model(torch.from_numpy(tokens)[None]).logits[0]
    chains = Chains(parents=np.array([2, 9]), k=3)
    words = PromptTokens.from_words(default_model)
    with torch.no_grad():
        own, _ = in_one_pass(default_model, tokens, chains, words)
        other, _ = in_one_pass(default_model, tokens, chains, PromptTokens.from_words(default_model, words=" a b c"))
    torch.testing.assert_close(own, other, atol=1e-5, rtol=0.0)
    torch.testing.assert_close(own, plain, atol=1e-4, rtol=1e-5)  # products of another shape sum in another order


def test_a_reading_serves_several_guesses(tiny_model) -> None:
    tokens, probes = text().tokens.astype(np.int64), prompt()
    with FrozenModel(tiny_model) as frozen, torch.no_grad():
        reading = frozen.read(tokens, np.zeros(1, dtype=np.int64))
        both = frozen.guess(reading, Chains(parents=np.array([3, 20]), k=3), probes)
        again = frozen.guess(reading, Chains(parents=np.array([20]), k=3), probes)
    torch.testing.assert_close(both[1:], again, atol=1e-5, rtol=1e-5)


def test_afterwards_the_model_is_as_it_was(tiny_model) -> None:
    model = tiny_model.model
    before, hooks = fingerprint(model), [len(module._forward_pre_hooks) for module in model.modules()]
    learning = [weight.requires_grad for weight in model.parameters()]
    fit(
        tiny_model, [text()], transfer(32, (1, 1)), recipe=ProbeRecipe(steps=2, inserts=4, learning_rate=1e-2),
        progress=False,
    )  # fmt: skip
    assert fingerprint(model) == before
    assert [weight.requires_grad for weight in model.parameters()] == learning
    assert all(weight.grad is None for weight in model.parameters())
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    with pytest.raises(RuntimeError, match="stop"), FrozenModel(tiny_model, (0, 2)):
        raise RuntimeError("stop")
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_chains_hang_only_where_the_model_wrote_all_that_follows() -> None:
    one = text(12, written_from=5)
    assert places(one, k=3).tolist() == [4, 5, 6, 7]
    assert places(text(4, written_from=0), k=3).tolist() == []
    broken = DistilledText(tokens=one.tokens, written=np.arange(12) != 8, temperature=0.0)
    assert places(broken, k=2).tolist() == [0, 1, 2, 3, 4, 8]


def test_the_loss_is_the_mean_weighted_divergence_from_the_models_own_outputs(tiny_model) -> None:
    one, probes, recipe = text(), prompt(), ProbeRecipe(decay=0.5)
    parents = np.array([6, 21])
    with FrozenModel(tiny_model) as frozen, torch.no_grad():
        loss = text_loss(frozen, one, parents, probes, recipe)
        hard = text_loss(frozen, one, parents, probes, ProbeRecipe(decay=0.5, labels="hard"))
    tokens = one.tokens.astype(np.int64)
    with torch.no_grad():
        own, guessed = in_one_pass(tiny_model, tokens, Chains(parents=parents, k=3), probes)
    expected, expected_hard = 0.0, 0.0
    for chain, parent in enumerate(parents):
        for step in range(3):
            true, guess = own[parent + step + 1].log_softmax(-1), guessed[chain, step].log_softmax(-1)
            expected += 0.5**step * float((true.exp() * (true - guess)).sum()) / 6
            expected_hard -= 0.5**step * float(guess[tokens[parent + step + 2]]) / 6
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    assert float(hard) == pytest.approx(expected_hard, rel=1e-4)


def test_a_ranks_table_counts_where_the_true_token_stood(tiny_model) -> None:
    one, probes = text(), prompt()
    found = measure(tiny_model, [one], probes, per_text=1000)
    tokens, parents = one.tokens.astype(np.int64), places(one, k=3)
    _, guessed = in_one_pass(tiny_model, tokens, Chains(parents=parents, k=3), probes)
    order = guessed.argsort(dim=-1, descending=True)
    expected = [
        [int((order[chain, step] == tokens[parent + step + 2]).nonzero()) for step in range(3)]
        for chain, parent in enumerate(parents)
    ]
    assert found.ranks.tolist() == expected
    accuracies = found.accuracies(10)
    assert accuracies.shape == (3, 10)
    assert accuracies.sum(axis=1).tolist() == pytest.approx(list(found.top(10)))


def test_training_is_the_same_in_one_go_and_in_pieces(tiny_model, tmp_path) -> None:
    recipe = ProbeRecipe(steps=9, inserts=6, learning_rate=0.05)
    texts = [text(seed=seed) for seed in range(3)]
    whole, pieces = prompt(), prompt()
    fitted = fit(tiny_model, texts, whole, recipe=recipe, progress=False)
    for stop in (2, 7):
        again = prompt()
        assert fit(tiny_model, texts, again, recipe=recipe, folder=tmp_path, stop_after=stop, progress=False) is None
    ended = fit(tiny_model, texts, pieces, recipe=recipe, folder=tmp_path, progress=False)
    assert torch.equal(whole.embeds, pieces.embeds)
    assert ended.losses == fitted.losses
    with pytest.raises(BadInput, match="another recipe"):
        fit(tiny_model, texts, prompt(), recipe=ProbeRecipe(steps=8), folder=tmp_path, progress=False)


def test_greedy_texts_are_preferred_and_drawn_ones_serve_where_there_are_none(tiny_model) -> None:
    drawn = DistilledText(tokens=text(seed=1).tokens, written=text().written, temperature=1.0)
    learned = []
    for texts, greedy in (([text()], True), ([text(), drawn], True), ([text(), drawn], False), ([drawn], True)):
        probes = prompt()
        fit(tiny_model, texts, probes, recipe=ProbeRecipe(steps=2, inserts=6, greedy=greedy), progress=False)
        learned.append(probes.embeds.detach())
    assert torch.equal(learned[0], learned[1])
    assert not torch.equal(learned[0], learned[2])
    assert not torch.equal(learned[0], learned[3])


def test_a_limit_of_minutes_ends_the_training_early(tiny_model) -> None:
    recipe = ProbeRecipe(steps=100_000, inserts=2)
    fitted = fit(tiny_model, [text()], prompt(), recipe=recipe, minutes=0.02, progress=False)
    assert 1 <= len(fitted.losses) < 100_000
    assert fitted.seconds < 30


def test_what_cannot_be_trained_is_refused(tiny_model) -> None:
    with pytest.raises(BadInput, match="none of the 1 texts"):
        fit(tiny_model, [text(6, written_from=5)], prompt(), recipe=ProbeRecipe(), progress=False)
    with pytest.raises(BadInput, match="none of the 1 texts"):
        measure(tiny_model, [text(6, written_from=5)], prompt())
    with pytest.raises(BadModel, match="16 numbers each"):
        fit(tiny_model, [text()], prompt(16), recipe=ProbeRecipe(), progress=False)
    with pytest.raises(BadInput, match="sites 0 to 2"):
        FrozenModel(tiny_model, (3,))
    with pytest.raises(Unsupported, match=r"model\.model\.layers"):
        sites(torch.nn.Linear(2, 2))
    with pytest.raises(BadInput, match="steps is 0"):
        ProbeRecipe(steps=0)
    with pytest.raises(BadInput, match="decay"):
        ProbeRecipe(decay=0.0)
