from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="needs the extra loci-lm[local]")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as some  # noqa: E402

from loci.errors import BadInput  # noqa: E402
from loci.lm.engine.slots import SlotCache  # noqa: E402

LAYERS, HEADS, SIZE = 2, 3, 4


def cache(rows: int = 1, slots: int = 4) -> SlotCache:
    return SlotCache(
        layers=LAYERS,
        heads=HEADS,
        size=SIZE,
        dtype=torch.float32,
        device=torch.device("cpu"),
        rows=rows,
        slots=slots,
    )


def stage(slots: SlotCache, marks: list[list[int]]) -> None:
    """Stage nodes that carry numbers: a node's keys are its mark plus its layer and head, its values the negative."""
    marked = torch.tensor(marks, dtype=torch.float32)[:, :, None, None]  # (row, node, head, size)
    heads = torch.arange(HEADS)[None, None, :, None] / 10
    slots.stage(marked.shape[1])
    for layer in range(LAYERS):
        full = (marked + heads + layer / 100).expand(-1, -1, -1, SIZE)
        slots.write(layer, full, -full)


def held(slots: SlotCache, row: int) -> list[int]:
    """The marks of a row's tokens; every layer, head and number must agree."""
    length = slots.lengths[row]
    found: list[int] | None = None
    for layer in range(LAYERS):
        keys, values = slots.read(layer)
        for head in range(HEADS):
            for number in range(SIZE):
                marks = (keys[row, head, :length, number] - head / 10 - layer / 100).round().int().tolist()
                assert torch.equal(keys[row, head, :length, number], -values[row, head, :length, number])
                assert found is None or marks == found
                found = marks
    return found or []


@given(some.data())
def test_it_holds_what_lists_would_hold(data):
    rows = data.draw(some.integers(1, 3))
    slots, wanted, mark = cache(rows, data.draw(some.integers(1, 5))), [[] for _ in range(rows)], 0
    for _ in range(data.draw(some.integers(1, 6))):
        action = data.draw(some.sampled_from(["step", "step", "step", "keep", "truncate"]))
        if action == "step":
            nodes = data.draw(some.integers(1, 7))
            marks = [[mark + row * nodes + node for node in range(nodes)] for row in range(len(wanted))]
            mark += nodes * len(wanted)
            stage(slots, marks)
            orders = [data.draw(some.permutations(range(nodes))) for _ in wanted]
            paths = [order[: data.draw(some.integers(0, nodes))] for order in orders]
            slots.commit(paths)
            for row, path in enumerate(paths):
                wanted[row] += [marks[row][node] for node in path]
        elif action == "keep":
            order = data.draw(some.permutations(range(len(wanted))))
            rows_kept = order[: data.draw(some.integers(1, len(wanted)))]
            slots.keep(rows_kept)
            wanted = [list(wanted[row]) for row in rows_kept]
        else:
            row = data.draw(some.integers(0, len(wanted) - 1))
            length = data.draw(some.integers(0, len(wanted[row])))
            slots.truncate(row, length)
            del wanted[row][length:]
        assert slots.lengths == [len(marks) for marks in wanted]
        assert [held(slots, row) for row in range(len(wanted))] == wanted


def test_the_bytes_are_those_of_the_storage_and_slots_double():
    slots = cache(rows=2, slots=4)
    assert slots.nbytes == 2 * LAYERS * 2 * HEADS * 4 * SIZE * 4
    stage(slots, [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
    assert slots.slots == 8
    assert slots.nbytes == 2 * LAYERS * 2 * HEADS * 8 * SIZE * 4
    slots.commit([[0, 2], [4]])
    slots.keep([1])
    assert slots.nbytes == 2 * LAYERS * 2 * HEADS * 8 * SIZE * 4, "a row that left still takes its memory"
    slots.begin(1)
    assert slots.nbytes == 2 * LAYERS * 1 * HEADS * 8 * SIZE * 4


def test_what_is_staged_can_be_staged_anew():
    slots = cache()
    stage(slots, [[1, 2]])
    slots.commit([[0, 1]])
    stage(slots, [[7, 8, 9]])
    stage(slots, [[3]])
    slots.commit([[0]])
    assert held(slots, 0) == [1, 2, 3]


def test_spare_slots_hold_no_nan():
    slots = cache(rows=2, slots=3)
    stage(slots, [[1, 2, 3, 4], [5, 6, 7, 8]])
    slots.commit([[3], [0, 1, 2, 3]])
    for layer in range(LAYERS):
        keys, values = slots.read(layer)
        assert torch.isfinite(keys).all()
        assert torch.isfinite(values).all()


def test_wrong_use_is_refused():
    slots = cache()
    stage(slots, [[1, 2]])
    with pytest.raises(BadInput, match="leaves the 2 nodes"):
        slots.commit([[2]])
    with pytest.raises(BadInput, match="2 paths were given for 1 rows"):
        slots.commit([[0], [0]])
    slots.commit([[0]])
    with pytest.raises(BadInput, match="cannot be cut"):
        slots.truncate(0, 2)
    with pytest.raises(BadInput, match="cannot be kept"):
        slots.keep([1])
