"""The guide tells the truth: its generated parts are current, its commands run, and it builds without a warning."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

PROJECT = Path(__file__).resolve().parent.parent
PAGES = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *sorted((PROJECT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(?P<info>console[^\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)


def name(page: Path) -> str:
    return page.relative_to(PROJECT).as_posix()


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_docs", PROJECT / "scripts" / "generate_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_generated_parts_of_a_page_are_current(page: Path, generator: ModuleType) -> None:
    text = page.read_text(encoding="utf-8")
    assert generator.renewed(text) == text, "run `make docs`"


def test_the_guide_holds_a_table_for_every_room_and_a_help_page_for_every_command() -> None:
    from loci.catalog import ROOMS
    from loci.cli.app import COMMANDS

    for room in ROOMS:
        assert f"<!-- generated: systems {room} -->" in (PROJECT / "docs" / "rooms" / f"{room}.md").read_text()
    help_page = (PROJECT / "docs" / "help.md").read_text()
    assert all(f"### loci {command}\n" in help_page for command in COMMANDS)


def commands(page: Path) -> list[str]:
    """The lines of a page's console blocks that call `loci`, continued lines joined; blocks marked no-run left out."""
    found = []
    for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
        if "no-run" not in block["info"]:
            joined = block["body"].replace("\\\n", " ")
            found += [line[2:] for line in joined.splitlines() if line.startswith("$ loci ")]
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name)
def test_the_commands_of_a_page_run_one_after_the_other(page: Path, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "LOCI_HOME": str(tmp_path),
        "NO_COLOR": "1",
    }
    for command in commands(page):
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=PROJECT,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
        assert done.returncode == 0, f"$ {command}\n{done.stdout}{done.stderr}"


def test_every_console_block_says_whether_it_runs() -> None:
    marks = {block["info"].strip() for page in PAGES for block in BLOCK.finditer(page.read_text(encoding="utf-8"))}
    assert marks <= {"console", "console no-run"}


def test_the_guide_builds_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=PROJECT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stderr.strip()) == (0, "")
    assert "Mara" in (tmp_path / "site" / "quickstart.html").read_text()


def test_contributing_fits_on_one_screen() -> None:
    assert len((PROJECT / "CONTRIBUTING.md").read_text().splitlines()) <= 45


def test_the_change_log_keeps_its_form() -> None:
    text = (PROJECT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in text
    heads = re.findall(r"^### (\w+)$", text, re.MULTILINE)
    assert set(heads) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_make_lists_every_target() -> None:
    done = subprocess.run(["make"], cwd=PROJECT, capture_output=True, text=True, check=True, timeout=30)
    listed = set(re.findall(r"make (\w+)", done.stdout))
    assert listed >= {"setup", "check", "test", "slow", "claims", "bench", "docs", "demo", "clean"}
