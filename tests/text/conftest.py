"""What the tests of the text room share: the real embedder, and a fresh store."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from loci.lm.embed import Embedder, load_embedder
from loci.text.amem import AMem
from loci.text.store import Store


@pytest.fixture(scope="session")
def embedder() -> Embedder:
    found = load_embedder("default")
    assert found is not None
    return found


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "memory.db") as opened:
        yield opened


@pytest.fixture
def memory(store: Store, embedder: Embedder) -> AMem:
    return AMem(store, embedder)
