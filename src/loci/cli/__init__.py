"""The command line: `loci COMMAND`. The frame is in `app`, what commands share is in `output`."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's own) and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given == ["--version"]:  # answered before anything is imported, so that scripts can ask often
        from loci import __version__

        print(f"loci {__version__}")
        return 0
    from loci.cli.app import run

    return run(given)
