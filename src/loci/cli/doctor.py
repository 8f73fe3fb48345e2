"""`loci doctor`: what is installed, how fast it is, and what is missing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from loci.cli import output

if TYPE_CHECKING:
    from loci.lm.doctor import FolderReport, Report


def doctor(
    quick: Annotated[bool, typer.Option("--quick", help="Look, and measure nothing.")] = False,
    as_json: output.Json = False,
) -> None:
    """Tell what is installed, how fast it is, and what is missing.

    \b
    Examples:
      loci doctor
      loci doctor --quick
      loci doctor --json
    """
    from loci.lm.doctor import examine

    if not quick:
        output.say("measuring memory, model and embedder: some seconds")
    report = examine(measure=not quick)
    if as_json:
        output.print_json(report)
        return
    for fact, words in _facts(report):
        if words:
            output.data(f"{fact:10} {words}")
    _show_parts(report)
    lacking = [part for part in report.missing if report.model.problem or report.embedder.problem]
    if lacking:
        output.next_command(str(lacking[0].mend), f"brings {lacking[0].purpose}")
    else:
        output.next_command("loci chat", "remembers what it is told")


def _facts(report: Report) -> list[tuple[str, str]]:
    machine, model, embedder = report.machine, report.model, report.embedder
    return [
        ("loci", f"{report.loci}, Python {report.python}"),
        ("machine", _joined(machine.system, machine.processor, f"{machine.cores} cores", machine.accelerator)),
        (
            "memory",
            _joined(
                _bytes(machine.memory_bytes, "in all"),
                _bytes(machine.memory_free_bytes, "free"),
                _bytes(machine.bandwidth_bytes_per_second, "a second read by one core"),
            ),
        ),
        ("units", " ".join(machine.units) or "none that matter here"),
        ("model", _joined(model.name, _count(model.parameters, "parameters"), model.dtype, model.device)),
        ("", model.where),
        ("", _joined(_seconds(model.load_seconds, "to load"), _count(model.tokens_per_second, "tokens a second"))),
        ("", f"engine {model.engine}" if model.engine else ""),
        *(("", f"not {engine}: {why}") for engine, why in model.slower_because.items()),
        ("", f"missing: {model.problem}" if model.problem else model.descriptions),
        (
            "embedder",
            _joined(
                embedder.name,
                _count(embedder.dimension, "numbers a text"),
                _count(embedder.texts_per_second, "texts a second"),
            ),
        ),
        ("", f"missing: {embedder.problem}" if embedder.problem else ""),
        ("memories", _folder(report.database)),
        ("cache", _folder(report.cache)),
        ("data sets", _folder(report.data)),
    ]


def _show_parts(report: Report) -> None:
    output.table(
        ["package", "version", "for", "install with"],
        [(part.name, part.version or "missing", part.purpose, part.mend or "") for part in report.parts],
    )


def _joined(*facts: str | None) -> str:
    return ", ".join(fact for fact in facts if fact)


def _bytes(count: int | float | None, what: str) -> str | None:
    return None if count is None else f"{output.human_bytes(count)} {what}"


def _count(count: int | float | None, what: str) -> str | None:
    return None if count is None else f"{count:,.0f} {what}"


def _seconds(seconds: float | None, what: str) -> str | None:
    return None if seconds is None else f"{output.human_seconds(seconds)} {what}"


def _folder(folder: FolderReport) -> str:
    if not folder.exists:
        return f"{folder.path} (nothing there yet)"
    return _joined(folder.path, output.human_bytes(folder.bytes_held) if folder.bytes_held else None)
