"""The yardstick of speed: it fills to the sizes asked, and refuses sizes that make no sense."""

import pytest

from loci.bench import speed
from loci.errors import BadInput


def test_it_times_each_size_and_counts_what_is_held():
    result = speed.run((100, 160), samples=20)
    small, large = result["sizes"]
    assert (small["notes"], large["notes"]) == (100, 160)
    assert 0 < small["write_ms_p50"] <= small["write_ms_p99"]
    assert 0 < small["read_ms_p50"] <= small["read_ms_p99"]
    assert large["file_bytes"] > small["file_bytes"] > 100_000
    assert large["index_bytes"] >= 100 * 4 * 384  # turns that repeat are kept once
    assert result["read_ms_per_1000_notes"] is not None
    assert result["recipe"]["embedder"]["name"] == "all-MiniLM-L6-v2"


@pytest.mark.parametrize("sizes", [(), (10,), (200, 100), (100, 100)])
def test_sizes_must_rise(sizes):
    with pytest.raises(BadInput, match="rise"):
        speed.run(sizes)
