"""Hidden transfer: learns on the real model, changes no output, leaves no hook, and bad layers are refused."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra loci-lm[local]")

from loci.decoding.distill import DistilledText  # noqa: E402
from loci.decoding.hidden_transfer import (  # noqa: E402
    HiddenTransfer,
    HiddenTransferDrafter,
    calibrate,
    cosines,
    load,
    sweep_layers,
    train,
    train_hidden_transfer,
)
from loci.decoding.probe_trees import DynamicTrees  # noqa: E402
from loci.decoding.probes import Chains, FrozenModel, ProbeRecipe, places  # noqa: E402
from loci.errors import BadInput, BadModel  # noqa: E402
from loci.lm.engine.base import Injecting  # noqa: E402
from loci.lm.generate import generate  # noqa: E402
from loci.lm.sampling import Sampling  # noqa: E402
from loci.lm.train import fingerprint  # noqa: E402

HOPES = [[0.3, 0.2, 0.1, 0.05, 0.05, 0.02, 0.02, 0.01, 0.01, 0.01]] * 3


def written(model, prompt: str, tokens: int) -> DistilledText:
    start = model.encode(prompt)
    made = generate(model, start, max_new_tokens=tokens)
    ids = np.array([*start, *made.tokens], dtype=np.int32)
    return DistilledText(tokens=ids, written=np.arange(len(ids)) >= len(start), temperature=0.0)


@pytest.fixture(scope="module")
def texts(default_model) -> list[DistilledText]:
    """A text that repeats itself: what comes can be learned in a few steps."""
    ids = np.array(
        default_model.encode("One, two, three, four, five, six, seven, eight, nine, ten. " * 3), dtype=np.int32
    )
    return [DistilledText(tokens=ids, written=np.arange(len(ids)) >= 5, temperature=0.0)]


def noise(width: int, layers: tuple[int, ...], *, residual: bool = True) -> HiddenTransfer:
    made = HiddenTransfer(width, layers, residual)
    with torch.no_grad():
        made.weight.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(1))
        made.bias.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(2))
    return made


class Watched(HiddenTransferDrafter):
    """Remembers what each step's guesses were and how long the text was."""

    def observe(self, result) -> None:
        super().observe(result)
        self.seen = [*getattr(self, "seen", []), (len(result.committed), self._chain.found)]


@pytest.mark.parametrize("layers", [(0, 1, 2), (1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("residual", [True, False])
def test_generation_guesses_what_training_saw_and_changes_no_token(tiny_model, layers, residual) -> None:
    transfer = noise(32, layers, residual=residual)
    drafter = Watched(transfer, DynamicTrees.build(HOPES, 30))
    assert isinstance(drafter, Injecting)
    start = tiny_model.encode("some bytes to begin with")
    plain = generate(tiny_model, start, max_new_tokens=40)
    made = generate(tiny_model, start, max_new_tokens=40, drafter=drafter, max_nodes=30, engine="hf")
    assert made.tokens == plain.tokens
    tokens = np.array([*start, *made.tokens], dtype=np.int64)
    length, checked = len(start), 0
    with FrozenModel(tiny_model, layers) as frozen, torch.no_grad():
        for committed, found in drafter.seen:
            length += committed
            if not len(found):
                continue
            text = tokens[: length - 1]  # the newest token is pending
            reading = frozen.read(text, np.zeros(1, dtype=np.int64))
            logits = frozen.guess(reading, Chains(parents=np.array([len(text) - 1]), k=3), transfer)
            np.testing.assert_array_equal(found, logits[0, : len(found)].topk(10).indices.numpy())
            checked += 1
    assert checked > 10


def test_an_untrained_drafter_changes_no_token_of_the_default_model_and_leaves_no_hook(default_model) -> None:
    model = default_model.model
    before = fingerprint(model)
    start = default_model.encode("A list of European capitals: Paris, London,")
    plain = generate(default_model, start, max_new_tokens=16, engine="hf")
    drafter = HiddenTransferDrafter(HiddenTransfer(576), DynamicTrees.build(HOPES, 16))
    drafted = generate(default_model, start, max_new_tokens=16, drafter=drafter, max_nodes=16, engine="hf")
    assert drafted.tokens == plain.tokens
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert fingerprint(model) == before


def test_a_drawn_text_is_the_same_with_and_without_the_drafter(tiny_model) -> None:
    sampling = Sampling(temperature=1.0, top_p=0.9)
    for seed in range(2):
        plain = generate(tiny_model, "hello", max_new_tokens=40, sampling=sampling, seed=seed)
        drafter = HiddenTransferDrafter(noise(32, (1, 1, 1)), DynamicTrees.build(HOPES, 20))
        drafted = generate(
            tiny_model, "hello", max_new_tokens=40, sampling=sampling, seed=seed, drafter=drafter, max_nodes=20
        )
        assert drafted.tokens == plain.tokens


def test_a_tiny_training_lowers_the_loss_of_the_real_model(default_model, texts) -> None:
    recipe = ProbeRecipe(steps=6, inserts=12, texts_per_step=1, learning_rate=1e-3)
    transfer, fitted = train_hidden_transfer(default_model, texts, recipe=recipe, progress=False)
    assert sum(fitted.losses[-2:]) < 0.9 * sum(fitted.losses[:2])
    assert sum(weight.numel() for weight in transfer.parameters()) == 3 * 576 * 577
    near = cosines(default_model, texts, transfer, per_text=4)
    assert list(near) == list(range(12, 31))
    assert all(len(steps) == 3 and -1.0 <= value <= 1.0 for steps in near.values() for value in steps)


def test_a_state_that_is_carried_over_unchanged_has_the_cosine_of_its_neighbours(tiny_model) -> None:
    text = written(tiny_model, "one", 30)
    with FrozenModel(tiny_model, (1,)) as frozen:
        states = frozen.read(text.tokens.astype(np.int64), np.zeros(1, dtype=np.int64)).hidden[1]
    where = torch.from_numpy(places(text, k=3))
    expected = [float(torch.cosine_similarity(states[where], states[where + i], dim=-1).mean()) for i in (1, 2, 3)]
    found = cosines(tiny_model, [text], HiddenTransfer(32, (1, 1, 1)), per_text=1000)[1]
    assert found == pytest.approx(expected, abs=1e-5)


def test_a_trained_part_is_saved_and_loaded(tiny_model, tmp_path) -> None:
    noisy = [written(tiny_model, start, 80) for start in ("one", "two", "three")]
    artifact = train(
        tiny_model, noisy, noisy, folder=tmp_path, layers=(1, 1, 2),
        recipe=ProbeRecipe(steps=30, inserts=16, learning_rate=1e-2), progress=False,
    )  # fmt: skip
    drafter = load(tmp_path, tiny_model, limit=24)
    assert drafter.transfer.layers == (1, 1, 2)
    assert drafter.transfer.residual
    assert artifact.settings["layers"] == [1, 1, 2]
    assert drafter.nbytes >= 3 * 32 * 33 * 4
    better = calibrate(tiny_model, drafter.transfer, noisy).sum()
    assert better > calibrate(tiny_model, HiddenTransfer(32, (1, 1, 2)), noisy).sum()
    plain = generate(tiny_model, "one", max_new_tokens=60)
    drafted = generate(tiny_model, "one", max_new_tokens=60, drafter=drafter, max_nodes=24)
    assert drafted.tokens == plain.tokens


def test_a_sweep_trains_every_layer_and_measures_it(tiny_model) -> None:
    noisy = [written(tiny_model, start, 40) for start in ("one", "two")]
    table = sweep_layers(
        tiny_model, noisy, noisy, candidates=(0, 2), recipe=ProbeRecipe(steps=2, inserts=4), progress=False
    )
    assert list(table) == [0, 2]
    assert all(ranks.accuracies().shape == (3, 10) for ranks in table.values())


def test_layers_that_fall_or_that_the_model_lacks_are_refused(tiny_model, default_model) -> None:
    for wrong in ((2, 1), (-1, 0), ()):
        with pytest.raises(BadInput, match="do not fall"):
            HiddenTransfer(32, wrong)
    text = written(tiny_model, "one", 30)
    with pytest.raises(BadInput, match="sites 0 to 2"):
        train_hidden_transfer(tiny_model, [text], layers=(3, 3), progress=False)
    with pytest.raises(BadInput, match="trees for 3 probes"):
        HiddenTransferDrafter(HiddenTransfer(32, (1, 1)), DynamicTrees.build(HOPES, 16))
    with pytest.raises(BadModel, match="32 numbers each"):
        calibrate(default_model, HiddenTransfer(32), [text])
