from __future__ import annotations

import dataclasses
import logging

import pytest

torch = pytest.importorskip("torch", reason="needs the extra loci-lm[local]")

from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM  # noqa: E402

from loci.errors import UnknownName, Unsupported  # noqa: E402
from loci.lm.draft import Needs  # noqa: E402
from loci.lm.engine import native  # noqa: E402
from loci.lm.engine.base import Capabilities  # noqa: E402
from loci.lm.engine.choose import choose, explain  # noqa: E402


@pytest.fixture
def without_native(monkeypatch):
    monkeypatch.setattr(native, "supports", lambda _: "there is no compiler")


def test_auto_takes_the_first_that_can_and_tells_why_not_the_others(tiny_model, without_native, caplog):
    with caplog.at_level(logging.DEBUG, logger="loci.lm.engine.choose"):
        engine = choose(tiny_model)
    assert engine.name == "packed"
    assert explain(engine) == {"native": "there is no compiler"}
    assert "native: there is no compiler" in caplog.text


def test_auto_falls_back_to_hf_for_models_of_other_parts(tiny_model, without_native):
    config = LlamaConfig(**{**tiny_model.model.config.to_dict(), "hidden_act": "gelu"})
    model = dataclasses.replace(tiny_model, model=LlamaForCausalLM(config).eval())
    engine = choose(model)
    assert engine.name == "hf"
    assert "GELU" in explain(engine)["packed"]


def test_a_memory_of_the_callers_is_written_by_hf(tiny_model):
    engine = choose(tiny_model, memory=DynamicCache(config=tiny_model.model.config))
    assert engine.name == "hf"
    assert "DynamicCache" in explain(engine)["packed"]


def test_an_engine_asked_for_by_name_serves_or_says_why_not(tiny_model, without_native):
    assert choose(tiny_model, name="hf").name == "hf"
    assert choose(tiny_model, name="packed").name == "packed"
    with pytest.raises(Unsupported, match="there is no compiler"):
        choose(tiny_model, name="native")
    with pytest.raises(Unsupported, match="not on a CUDA device"):
        choose(tiny_model, name="cuda")
    with pytest.raises(Unsupported, match="cache of its own"):
        choose(tiny_model, name="packed", memory=DynamicCache(config=tiny_model.model.config))
    with pytest.raises(UnknownName, match="packed"):
        choose(tiny_model, name="paked")


def test_what_a_drafter_needs_decides_too(tiny_model, without_native):
    assert choose(tiny_model, needs=Needs(hooks=True, hidden=(1,))).name == "packed"
    final = Capabilities(max_nodes=8, batch=True, hidden=True, hooks=False, hidden_layers=(-1,))
    assert final.lacks(Needs(hidden=(-1,), topk=4)) == ""
    assert "not of [1]" in final.lacks(Needs(hidden=(-1, 1)))
    assert "between layers" in final.lacks(Needs(hooks=True))


def test_the_default_model_runs_on_the_fastest_engine_that_is_here(default_model):
    engine = choose(default_model)
    assert engine.name == ("packed" if native.supports(default_model) else "native")
