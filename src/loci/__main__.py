"""`python -m loci` is `loci`."""

from __future__ import annotations

import sys

from loci.cli import main

if __name__ == "__main__":
    sys.exit(main())
