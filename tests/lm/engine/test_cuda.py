"""The device's engine on the processor: all of it but the recording. The last test needs a device."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra loci-lm[local]")

from loci.errors import Unsupported  # noqa: E402
from loci.lm.draft import Needs, TokenTree  # noqa: E402
from loci.lm.engine.cuda import BUCKETS, CudaEngine, ancestor_bits  # noqa: E402
from loci.lm.engine.hf import HFEngine  # noqa: E402
from loci.lm.generate import Stop, generate  # noqa: E402
from loci.lm.sampling import Sampling  # noqa: E402

NOTHING = Needs()
PROMPTS = ["Once", "The house has many rooms, and", "Where is", "x"]


def test_a_word_a_node_tells_its_ancestors_up_to_the_largest_tree():
    generator = np.random.default_rng(0)
    size = BUCKETS[-1]
    parents = np.array([-1, *(int(generator.integers(0, node)) for node in range(1, size))], dtype=np.int32)
    tree = TokenTree(tokens=np.arange(size, dtype=np.int32), parents=parents)
    bits = ancestor_bits(tree)
    for node in range(size):
        word = int(bits[node]) & (2**64 - 1)
        assert [word >> other & 1 for other in range(size)] == tree.ancestors[node].astype(int).tolist()


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, top_p=0.9)])
def test_texts_are_those_of_transformers(sampling, tiny_model):
    options = {"max_new_tokens": 12, "sampling": sampling, "stop": Stop(eos=False), "seed": [3, 4, 5, 6]}
    ours = generate(tiny_model, PROMPTS, engine=CudaEngine(tiny_model), **options)
    theirs = generate(tiny_model, PROMPTS, engine=HFEngine(tiny_model), **options)
    assert [row.tokens for row in ours] == [row.tokens for row in theirs]


def test_a_later_engine_takes_over_cache_and_steps_and_none_of_the_text(tiny_model):
    first = CudaEngine(tiny_model)
    first.prefill([[1, 2, 3]], want=NOTHING)
    alone = first.step([TokenTree.root(3)], want=NOTHING).logits(0, 0)
    beside = CudaEngine(tiny_model)
    assert beside._space is not first._space
    space = first._space
    del first
    second = CudaEngine(tiny_model)
    assert second._space is space
    assert second.lengths == ()
    assert second.cache.lengths == [0]
    second.prefill([[9, 8, 7, 6]], want=NOTHING)
    second.prefill([[1, 2, 3]], want=NOTHING)
    np.testing.assert_array_equal(second.step([TokenTree.root(3)], want=NOTHING).logits(0, 0), alone)


def test_a_tree_beyond_the_largest_bucket_is_refused(tiny_model):
    engine = CudaEngine(tiny_model)
    engine.prefill([[1, 2]], want=NOTHING)
    with pytest.raises(Unsupported, match="at most 64 nodes"):
        engine.step([TokenTree.chain([2] * 65)], want=NOTHING)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_recorded_steps_give_the_processors_tokens(tiny_model):
    import copy

    model = dataclasses.replace(tiny_model, model=copy.deepcopy(tiny_model.model).to("cuda"))
    options = {"max_new_tokens": 24, "stop": Stop(eos=False)}
    for _ in range(2):
        ours = generate(model, PROMPTS, engine=CudaEngine(model), **options)
        theirs = generate(tiny_model, PROMPTS, engine=HFEngine(tiny_model), **options)
        assert [row.tokens for row in ours] == [row.tokens for row in theirs]
