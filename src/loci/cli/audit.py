"""`loci audit`: what a store holds, what it takes, what was done with it, and whether it is sound."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loci.cli import memories, output

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from loci.text.store import SpaceInfo, Store

_TAIL = 5  # journal entries that are shown


def audit(db: memories.Database = None, as_json: output.Json = False) -> None:
    """Tell what a store holds, what was done with it, and whether it is sound.

    \b
    Examples:
      loci audit
      loci audit --db trip.db --json
    """
    with memories.opened_store(db) as store:
        report = _examined(store)
    if as_json:
        output.print_json(report)
        return
    output.data(f"store  {report['where']}, {output.human_bytes(report['bytes'])} in use")
    if report["parts"]:
        parts = ", ".join(f"{name} {output.human_bytes(size)}" for name, size in report["parts"].items())
        output.data(f"parts  {parts}")
    for space in report["spaces"]:
        _show(space)
    faults = report["faults"]
    for fault in faults:
        output.data(fault)
    output.data(f"check  {f'{len(faults)} faults' if faults else 'sound'}")
    output.next_command("loci notes journal", "lists everything that was done")


def _examined(store: Store) -> dict[str, Any]:
    with store.reading() as connection:
        return {
            "where": store.where,
            "bytes": store.file_bytes,
            "parts": _parts(connection),
            "spaces": [_space(connection, store, info) for info in store.spaces()],
            "faults": store.check(),
        }


def _space(connection: Connection, store: Store, info: SpaceInfo) -> dict[str, Any]:
    from sqlalchemy import func, select

    from loci.text import schema
    from loci.text.moments import to_moment

    def counted(table: Any, *columns: Any) -> dict[str, int]:
        query = select(*columns, func.count()).where(table.c.space == info.space).group_by(*columns)
        return {" ".join(map(str, row[:-1])): row[-1] for row in connection.execute(query).all()}

    note, call = schema.notes, schema.calls
    first, last = connection.execute(
        select(func.min(note.c.said_at), func.max(note.c.said_at)).where(note.c.space == info.space)
    ).one()
    sums = (func.count(), func.sum(call.c.tokens_in), func.sum(call.c.tokens_out), func.sum(call.c.ms))
    calls = connection.execute(
        select(call.c.purpose, call.c.model, call.c.outcome, *sums)
        .where(call.c.space == info.space)
        .group_by(call.c.purpose, call.c.model, call.c.outcome)
    ).all()
    return {
        "name": info.name,
        "embedder": info.embedder,
        "dimension": info.dimension,
        "created_at": info.created_at,
        "notes": counted(note, note.c.status),
        "kinds": counted(note, note.c.kind),
        "pinned": counted(note, note.c.pinned).get("1", 0),
        "said": None if first is None else [to_moment(first), to_moment(last)],
        "versions": sum(counted(schema.versions, schema.versions.c.made_by).values()),
        "versions_by": counted(schema.versions, schema.versions.c.made_by),
        # Every link is held both ways and counted once.
        "links": {kind: count // 2 for kind, count in counted(schema.links, schema.links.c.kind).items()},
        "waiting": sum(counted(schema.pending, schema.pending.c.stage).values()),
        "calls": [
            {
                "purpose": row[0],
                "model": row[1],
                "outcome": row[2],
                "calls": row[3],
                "tokens_in": row[4],
                "tokens_out": row[5],
                "seconds": row[6] / 1000,
            }
            for row in calls
        ],
        "journal": store.journal(info.space, limit=_TAIL),
    }


def _parts(connection: Connection) -> dict[str, int]:
    """Bytes by table, its indexes included, largest first; empty where the database does not tell."""
    from sqlalchemy.exc import OperationalError

    if connection.dialect.name == "sqlite":
        query = (
            "SELECT coalesce(m.tbl_name, s.name), sum(s.pgsize) FROM dbstat s"
            " LEFT JOIN sqlite_schema m ON m.name = s.name GROUP BY 1 ORDER BY 2 DESC"
        )
    else:
        query = (
            "SELECT relname, pg_total_relation_size(relid) FROM pg_catalog.pg_statio_user_tables"
            " WHERE schemaname = current_schema() ORDER BY 2 DESC"
        )
    try:
        return {str(name): int(size) for name, size in connection.exec_driver_sql(query)}
    except OperationalError:  # an SQLite that was built without `dbstat`
        return {}


def _show(space: Mapping[str, Any]) -> None:
    held = sum(space["notes"].values())
    states = _listed(space["notes"]) or "no notes"
    output.data(output.coloured(f"space {space['name']!r}", "bold", to="stdout"))
    said = f", said {memories.day(space['said'][0])} to {memories.day(space['said'][1])}" if space["said"] else ""
    index = f"{space['embedder']} ({space['dimension']} numbers a note)" if space["embedder"] else "words alone"
    facts = {
        "notes": f"{held}: {states}; {_listed(space['kinds'])}{said}" if held else "none",
        "pinned": space["pinned"],
        "versions": f"{space['versions']}, made by {_listed(space['versions_by'])}" if held else "",
        "links": f"{sum(space['links'].values())}: {_listed(space['links'])}" if space["links"] else "",
        "index": index,
        "waiting": f"{space['waiting']} notes for a model to describe them" if space["waiting"] else "",
    }
    for fact, value in facts.items():
        if value:
            output.data(f"  {fact:9} {value}")
    for call in space["calls"]:
        output.data(
            f"  calls     {call['calls']} to {call['model']} for {call['purpose']!r}: {call['outcome']}, "
            f"{call['tokens_in']:,} tokens in, {call['tokens_out']:,} out, {output.human_seconds(call['seconds'])}"
        )
    if not space["calls"]:
        output.data("  calls     none: no language model has seen these notes")
    for entry in space["journal"]:
        note = f" {memories.short(entry['note'])}" if entry["note"] else ""
        output.data(f"  journal   {entry['seq']}  {str(entry['at'])[:19]}  {entry['op']}{note} by {entry['actor']}")


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))
