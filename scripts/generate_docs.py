"""Write the parts of the guide that are made from code: tables of systems, help pages, the tree of errors.

    python scripts/generate_docs.py            write them
    python scripts/generate_docs.py --check    only say whether they are current; exit code 1 if not

A generated part of a page stands between `<!-- generated: NAME -->` and `<!-- end -->`; the rest is written by hand.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from pathlib import Path

from loci import catalog, errors
from loci.catalog import System

DOCS = Path(__file__).resolve().parent.parent / "docs"
PART = re.compile(r"(<!-- generated: (?P<name>[^>]+?) -->\n).*?(<!-- end -->)", re.DOTALL)
WIDTH = 96  # columns of a help page, whatever terminal writes it


def part(name: str) -> str:
    """The text of the part called `name`: `systems ROOM`, `rooms`, `counts`, `help` or `errors`."""
    kind, _, argument = name.partition(" ")
    makers = {
        "systems": lambda: systems_table(catalog.systems(room=argument)),
        "rooms": rooms_table,
        "counts": counts,
        "help": help_pages,
        "errors": error_tree,
    }
    return makers[kind]().rstrip("\n") + "\n"


def systems_table(rows: tuple[System, ...]) -> str:
    """One row per system of a room."""
    lines = ["| system | idea | paper | state |", "| --- | --- | --- | --- |"]
    for system in rows:
        where = catalog.reference(system)
        if system.arxiv is not None:
            where = where.replace(
                f"arXiv:{system.arxiv}", f"[arXiv:{system.arxiv}](https://arxiv.org/abs/{system.arxiv})"
            )
        lines.append(
            f"| `{system.name}`<br>{system.label} | {system.idea} | {system.title}, {where} | {system.state} |"
        )
    return "\n".join(lines)


def rooms_table() -> str:
    """One row per room, with how many systems it holds and how many of them run."""
    lines = ["| room | systems | built |", "| --- | ---: | ---: |"]
    for room in catalog.ROOMS:
        rows = catalog.systems(room=room)
        lines.append(f"| [{room}]({room}.md) | {len(rows)} | {sum(system.built for system in rows)} |")
    return "\n".join(lines)


def counts() -> str:
    """How far the project is, in a sentence."""
    rows = catalog.systems()
    parts = [f"{sum(row.state == state for row in rows)} {state}" for state in catalog.STATES]
    return f"Of {len(rows)} systems: {', '.join(parts)}."


def help_pages() -> str:
    """Every help page of the command line, groups and their commands included."""
    from loci.cli.app import COMMANDS, LazyGroup, load

    def walk(path: list[str], level: int) -> list[str]:
        lines = [f"{'#' * level} {' '.join(['loci', *path])}", "", "```text", _help(path), "```", ""]
        if path:
            target = COMMANDS[path[0]].target
            found = load(target, name=path[0])
            rows = found.rows if isinstance(found, LazyGroup) and len(path) == 1 else {}
        else:
            rows = COMMANDS
        for name in rows:
            lines += walk([*path, name], min(level + 1, 3))
        return lines

    return "\n".join(walk([], 2))


def _help(path: list[str]) -> str:
    from loci.cli.app import root

    written = io.StringIO()
    with contextlib.redirect_stdout(written), contextlib.suppress(SystemExit):
        root().main([*path, "--help"], prog_name="loci", terminal_width=WIDTH, max_content_width=WIDTH)
    return written.getvalue().rstrip()


def error_tree() -> str:
    """The tree that `loci.errors` opens with."""
    lines = (errors.__doc__ or "").splitlines()
    tree = [line for line in lines if line == "LociError" or (line[:1] in "├└│" and line)]
    return "\n".join(["```text", *tree, "```"])


def renewed(text: str) -> str:
    """A page with its generated parts written anew."""
    return PART.sub(lambda found: found.group(1) + part(found.group("name")) + found.group(3), text)


def main(arguments: list[str]) -> int:
    """Write or check every page; returns the exit code."""
    stale = []
    for page in sorted(DOCS.rglob("*.md")):
        before = page.read_text(encoding="utf-8")
        after = renewed(before)
        if before == after:
            continue
        stale.append(page.relative_to(DOCS.parent))
        if "--check" not in arguments:
            page.write_text(after, encoding="utf-8")
    for page in stale:
        print(f"{page} {'is out of date: run `make docs`' if '--check' in arguments else 'written'}")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
