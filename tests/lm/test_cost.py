from __future__ import annotations

import dataclasses
import json

import pytest

torch = pytest.importorskip("torch", reason="needs the extra loci-lm[local]")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as some  # noqa: E402

from loci.errors import BadInput  # noqa: E402
from loci.lm import cost as costs  # noqa: E402
from loci.lm.cost import StepCost, Where, best_size  # noqa: E402
from loci.lm.engine.base import Capabilities  # noqa: E402
from loci.lm.engine.choose import choose  # noqa: E402


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCI_CACHE", str(tmp_path))
    return tmp_path / "costs"


# The native step of the default model on two cores with matrix units, in milliseconds.
TABLE = StepCost(
    nodes=(1, 8, 16, 32),
    contexts=(256, 1024),
    seconds=((0.0070, 0.0080, 0.0092, 0.0143), (0.0089, 0.0100, 0.0118, 0.0174)),
    spread=0.05,
)


def test_between_and_beyond_what_was_measured_costs_follow_lines():
    assert TABLE(16, 256) == pytest.approx(0.0092)
    assert TABLE(12, 256) == pytest.approx(0.0086)
    assert TABLE(16, 640) == pytest.approx((0.0092 + 0.0118) / 2)
    assert TABLE(48, 256) == pytest.approx(0.0143 + 0.0051)
    assert TABLE(1, 4096) == pytest.approx(0.0089 + 4 * 0.0019)
    assert TABLE(1, 0) < TABLE(1, 256)
    with pytest.raises(BadInput, match="at least 1 node"):
        TABLE(0)


@given(some.integers(1, 80), some.integers(1, 80), some.integers(0, 9000), some.integers(0, 9000))
def test_more_nodes_and_longer_contexts_never_cost_less(nodes, more, context, longer):
    assert TABLE(nodes, context) <= TABLE(nodes + more, context) + 1e-12
    assert TABLE(nodes, context) <= TABLE(nodes, context + longer) + 1e-12


@given(some.lists(some.floats(0.1, 10.0), min_size=1, max_size=12))
def test_a_rising_sequence_keeps_the_mean_and_what_was_rising(values):
    rising = costs._rising(values)
    assert rising == sorted(rising)
    assert sum(rising) == pytest.approx(sum(values))
    assert costs._rising(rising) == rising


def growing(size: int) -> float:
    """Tokens per step of the blend: 1 with the root alone, 2.25 at 16, 2.35 at 24 nodes."""
    return 1.0 + 1.4 * (1.0 - 0.86 ** (size - 1))


def test_the_best_size_fills_a_row_block_and_not_the_next():
    size = best_size(growing, TABLE, context=256, limit=32)
    assert 8 <= size <= 16
    assert growing(size) / TABLE(size, 256) == max(growing(n) / TABLE(n, 256) for n in range(1, 33))


def test_drafting_switches_itself_off_where_it_does_not_pay():
    assert best_size(lambda _: 1.0, TABLE) == 1
    assert best_size(growing, TABLE, lambda _: 0.1) == 1
    assert best_size(growing, lambda nodes, _: 0.01 * nodes) == 1
    assert best_size(growing, TABLE, rows=32, limit=64) == 1
    with pytest.raises(BadInput, match="do not fit"):
        best_size(growing, TABLE, rows=65, limit=64)


def test_a_measured_table_has_what_the_engine_can_run(tiny_model):
    engine = choose(tiny_model, name="packed")
    found = StepCost.measure(engine, contexts=(8, 64), rounds=3)
    assert found.nodes == costs.NODES
    assert all(row == tuple(sorted(row)) and row[0] > 0 for row in found.seconds)
    assert engine.lengths == ()
    engine.capabilities = Capabilities(max_nodes=1, batch=True, hidden=True, hooks=True)
    assert StepCost.measure(engine, contexts=(8,), rounds=3).nodes == (1,)


def test_measuring_ends_when_its_time_is_up(tiny_model):
    engine = choose(tiny_model, name="packed")
    ticks = iter(range(10_000))
    StepCost.measure(engine, nodes=(1, 2), contexts=(8,), rounds=50, seconds=1.0, clock=lambda: float(next(ticks)))
    used = next(ticks)
    # Two runs of two sizes to begin with, then three rounds; each run looks at the clock twice.
    assert used <= 2 * 2 + 1 + 3 * 2 * 2 + 2


def steady(monkeypatch) -> None:
    monkeypatch.setattr(costs, "STEADY", 1e9)


def test_a_table_is_measured_once_and_read_after_that(tiny_model, own_cache, monkeypatch):
    steady(monkeypatch)
    engine = choose(tiny_model, name="packed")
    first = StepCost.of(tiny_model, engine, seconds=0.1)
    assert len(list(own_cache.iterdir())) == 1
    monkeypatch.setattr(StepCost, "measure", None)
    again = StepCost.of(tiny_model, engine)
    assert again == first
    assert max(first.contexts) + max(costs.NODES) < tiny_model.window
    assert costs.known() == [first]
    assert "tiny0 on packed, float32, " in first.summary()
    assert "ms a token" in first.summary()


def test_another_model_engine_or_number_of_threads_has_another_table(tiny_model):
    packed, hf = choose(tiny_model, name="packed"), choose(tiny_model, name="hf")
    other = dataclasses.replace(tiny_model, hash="another")
    places = [Where.of(tiny_model, packed), Where.of(tiny_model, hf), Where.of(other, packed)]
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    places.append(Where.of(tiny_model, packed))
    torch.set_num_threads(threads)
    assert len({place.file for place in places}) == 4


def test_a_busy_machines_table_is_not_stored(tiny_model, own_cache, monkeypatch):
    monkeypatch.setattr(costs, "STEADY", -1.0)
    found = StepCost.of(tiny_model, choose(tiny_model, name="packed"), seconds=0.1)
    assert not own_cache.exists()
    assert "busy machine" in found.summary()


@pytest.mark.parametrize("damage", ["{", "[]", '{"format": 0}', '{"format": 1, "nodes": [1]}'])
def test_a_damaged_table_is_measured_again(damage, tiny_model, own_cache, monkeypatch):
    steady(monkeypatch)
    engine = choose(tiny_model, name="packed")
    file = Where.of(tiny_model, engine).file
    file.parent.mkdir()
    file.write_text(damage)
    assert costs.known() == []
    found = StepCost.of(tiny_model, engine, seconds=0.1)
    assert json.loads(file.read_text())["nodes"] == list(found.nodes)


def test_forgetting_removes_all_tables(tiny_model, own_cache, monkeypatch):
    steady(monkeypatch)
    StepCost.of(tiny_model, choose(tiny_model, name="packed"), seconds=0.1)
    assert costs.forget() == 1
    assert costs.known() == []
    assert costs.forget() == 0
