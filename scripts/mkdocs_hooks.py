"""What mkdocs does to a page before it is rendered."""

from __future__ import annotations

from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Take the mark off blocks that the tests do not run; the renderer knows no words after a block's language."""
    return markdown.replace("```console no-run\n", "```console\n")
