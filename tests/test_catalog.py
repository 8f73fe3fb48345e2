from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from loci import catalog
from loci.errors import UnknownName

PROJECT = Path(__file__).resolve().parent.parent
BUILT = [system for system in catalog.systems() if system.built]


def source(module: str) -> Path:
    """The file of a dotted module name, a package's own `__init__` included."""
    path = PROJECT / "src" / Path(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def test_there_are_61_systems_with_61_names() -> None:
    names = [system.name for system in catalog.systems()]
    assert len(names) == 61
    assert len(set(names)) == 61


@pytest.mark.parametrize("system", catalog.systems(), ids=lambda system: system.name)
def test_a_row_is_whole(system: catalog.System) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9_]*", system.name)
    assert system.room in catalog.ROOMS
    assert system.place in catalog.ROOMS
    assert system.state in catalog.STATES
    assert system.title.strip() == system.title != ""
    assert system.idea[-1] not in ".,;"
    assert system.arxiv is None or re.fullmatch(r"\d{4}\.\d{4,5}", system.arxiv)
    assert system.year is None or 1980 < system.year < 2030
    assert system.module is None or system.module.startswith("loci.")
    assert "others" not in system.authors[:-1]


def test_no_two_systems_share_a_module() -> None:
    modules = [system.module for system in catalog.systems() if system.module]
    assert len(set(modules)) == len(modules)


@pytest.mark.parametrize("system", BUILT, ids=lambda system: system.name)
def test_a_built_system_has_its_module_its_test_and_its_claim(system: catalog.System) -> None:
    assert system.module is not None
    assert source(system.module).is_file()
    assert (PROJECT / system.test).is_file()
    assert source(system.claim).is_file()


@pytest.mark.parametrize("system", BUILT, ids=lambda system: system.name)
def test_a_built_systems_claim_speaks_of_it(system: catalog.System) -> None:
    from loci.claims.base import Claim, load_claim

    module = load_claim(system.name)
    assert isinstance(module.CLAIM, Claim)
    assert module.CLAIM.system == system.name
    assert callable(module.measure)
    assert callable(module.holds)
    assert importlib.import_module(system.claim).__doc__


@pytest.mark.parametrize("system", catalog.systems(), ids=lambda system: system.name)
def test_a_planned_system_has_nothing_yet_that_looks_finished(system: catalog.System) -> None:
    if not system.built:
        assert not source(system.claim).is_file(), "a claim is written: set the state in catalog.toml"


def test_room_and_state_narrow_the_list_and_together_they_narrow_it_further() -> None:
    everything = set(catalog.systems())
    assert {each for room in catalog.ROOMS for each in catalog.systems(room=room)} == everything
    assert {each for state in catalog.STATES for each in catalog.systems(state=state)} == everything
    both = catalog.systems(room="text", state="planned")
    assert set(both) == set(catalog.systems(room="text")) & set(catalog.systems(state="planned"))


def test_a_hyphen_is_as_good_as_an_underscore() -> None:
    assert catalog.find("Token-Recycling").name == "token_recycling"


@pytest.mark.parametrize(
    ("ask", "near"),
    [
        (lambda: catalog.find("titan"), "titans"),
        (lambda: catalog.systems(room="txt"), "text"),
        (lambda: catalog.systems(state="plan"), "planned"),
        (lambda: catalog.cite("medus"), "medusa"),
    ],
)
def test_an_unknown_name_is_answered_with_its_nearest_neighbour(ask, near: str) -> None:
    with pytest.raises(UnknownName, match=f"Did you mean '{near}'"):
        ask()


def test_the_main_systems_facts_are_those_of_its_paper() -> None:
    amem = catalog.find("amem")
    assert (amem.year, amem.arxiv, amem.venue) == (2025, "2502.12110", "NeurIPS 2025")
    assert catalog.author_line(amem) == "Xu, Liang, Mei, Gao, Tan and Zhang"
    assert catalog.reference(amem) == "NeurIPS 2025, arXiv:2502.12110"


@pytest.mark.parametrize("system", catalog.systems(), ids=lambda system: system.name)
def test_every_reference_is_one_balanced_bibtex_entry(system: catalog.System) -> None:
    entry = catalog.cite(system.name)
    assert re.match(r"@(inproceedings|article|mastersthesis|misc)\{[a-z0-9_]+,\n", entry)
    assert entry.count("{") == entry.count("}")
    assert "None" not in entry
    assert (f"eprint = {{{system.arxiv}}}" in entry) == (system.arxiv is not None)


def test_the_keys_of_all_references_differ() -> None:
    keys = [catalog.cite(system.name).partition(",")[0] for system in catalog.systems()]
    assert len(set(keys)) == len(keys)


def test_unknown_authors_and_years_are_left_out_rather_than_invented() -> None:
    entry = catalog.cite("kv_heads")
    assert "author" not in entry
    assert "year" not in entry


def test_a_row_as_json_names_its_claim_and_its_test() -> None:
    row = catalog.find("amem").as_row()
    assert row["claim"] == "loci.claims.amem"
    assert row["test"] == "tests/text/test_amem.py"
