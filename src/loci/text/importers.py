"""Readers of what others have kept: notes, chats and the exports of assistants, one note at a time.

    loci          what `exporters.to_jsonl` wrote                     JSON lines
    chatgpt       ChatGPT's data export                               conversations.json, or the zip around it
    claude        Claude's data export                                conversations.json, or the zip around it
    mem0          a dump of mem0's memories                           JSON: {"results": [...]} or a list
    letta         Letta agent files, lists of passages or messages    JSON
    locomo        conversations of the LoCoMo benchmark               JSON
    chat          messages with role and content                      JSON lines, or a JSON list
    transcript    "Name: text" lines; WhatsApp's export               plain text, or WhatsApp's zip
    markdown      one note for each section                           .md

`read_notes` is lazy. JSON lists are read element by element, JSON lines and transcripts line by line, so memory is
bounded by the largest conversation, not by the file; a file whose top is one JSON object is read whole. Files may be
gzipped, begin with a byte-order mark, be UTF-8 or (with its mark) UTF-16, and end their lines in any way.

Every note carries a `key` that depends on what it is, never on where the file lies: format, conversation and message.
An import that was interrupted, or repeated after the chat went on, skips the keys that are already there. `reply_to`
is such a key too.

The formats were taken from the files themselves and from their makers' public documentation; none of their code is
used. What people never said is left out: system prompts, tool calls and their results, hidden reasoning, pictures.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, cast

import regex

from loci.errors import BadDate, BadImport, UnknownName
from loci.text.organizer import Note, NoteKind, TimeSpan
from loci.text.times import parse_at, parse_span


@dataclass(frozen=True, kw_only=True)
class ImportedNote:
    """One thing that was said or written elsewhere. `origin` names file and place for people."""

    text: str
    source: str | None = None  # who said it, or the section it stands in
    at: datetime | None = None  # aware; None where the file does not tell
    reply_to: str | None = None  # the key of the note that this one answers
    kind: NoteKind = "turn"
    origin: str = ""
    key: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)
    note: Note | None = None  # the whole note, descriptions and all, where the file is Loci's own


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A readable text: a file, or a member of a zip."""

    name: str
    open: Callable[[], io.BufferedIOBase]


def _key(*parts: object) -> str:
    return hashlib.sha256("\x1f".join(map(str, parts)).encode("utf-8", "surrogatepass")).hexdigest()


# --- files ------------------------------------------------------------------------------------------------------------

_IN_ZIP = re.compile(r"(?:.*/)?(?:conversations(?:-\d+)?\.json|_chat\.txt|WhatsApp Chat[^/]*\.txt|[^/]+\.(?:jsonl|md))")


def _parts(path: Path) -> list[_Part]:
    if not path.exists():
        raise BadImport(f"{path} does not exist.")
    if path.is_dir():
        raise BadImport(f"{path} is a folder. Name the files in it:  loci import {path}/*")
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise BadImport(f"{path.name} cannot be read: {error.strerror}.") from error
    if head.startswith(b"PK\x03\x04"):
        return _zipped(path)
    if head.startswith(b"\x1f\x8b"):
        return [_Part(name=path.name, open=lambda: gzip.GzipFile(path, "rb"))]
    return [_Part(name=path.name, open=lambda: path.open("rb"))]


def _zipped(path: Path) -> list[_Part]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(
                name for name in archive.namelist() if _IN_ZIP.fullmatch(name) and not name.startswith("__MACOSX/")
            )
    except zipfile.BadZipFile as error:
        raise BadImport(f"{path.name} is a damaged zip file ({error}). Download the export again.") from error
    # an export's conversations stand beside other lists that are no conversations
    if chats := [name for name in names if name.endswith(".json")]:
        names = chats
    if not names:
        raise BadImport(
            f"{path.name} holds no conversations.json, no WhatsApp chat and no .jsonl or .md file. "
            "Unpack it and import the file that holds the messages."
        )

    def opener(name: str) -> Callable[[], io.BufferedIOBase]:
        def unpack() -> io.BufferedIOBase:
            archive = zipfile.ZipFile(path)
            try:
                return cast(
                    io.BufferedIOBase, archive.open(name)
                )  # keeps the archive's file open until it is closed itself
            finally:
                archive.close()

        return unpack

    return [_Part(name=f"{path.name}/{name}", open=opener(name)) for name in names]


@contextmanager
def _text(part: _Part) -> Iterator[io.TextIOWrapper]:
    """The decoded text of a part; what goes wrong while it is read becomes `BadImport`."""
    try:
        with part.open() as raw, _decoded(raw, part) as text:
            yield text
    except UnicodeDecodeError as error:
        raise BadImport(
            f"{part.name} is not {error.encoding.upper()} (byte {error.start} of a block cannot be read). Convert it:  "
            "iconv -f ISO-8859-1 -t UTF-8 OLD > NEW"
        ) from error
    except (zipfile.BadZipFile, zlib.error, gzip.BadGzipFile, EOFError) as error:
        raise BadImport(f"{part.name} is damaged or cut short ({error}).") from error
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, RecursionError):
            raise BadImport(f"{part.name} is nested too deeply to be a list of notes.") from error
        raise BadImport(f"{part.name} cannot be unpacked: {error}.") from error
    except OSError as error:
        raise BadImport(f"{part.name} cannot be read: {error}.") from error


def _decoded(raw: io.BufferedIOBase, part: _Part) -> io.TextIOWrapper:
    return io.TextIOWrapper(cast(IO[bytes], raw), encoding=_encoding(part), newline=None)


def _encoding(part: _Part) -> str:
    with part.open() as raw:
        head = raw.read(4)
    return "utf-16" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"


# --- JSON -------------------------------------------------------------------------------------------------------------

_BLANK = " \t\r\n"


def _json_values(part: _Part) -> Iterator[tuple[int, Any]]:
    """The elements of a JSON list, the lines of JSON lines, or a single object, numbered from 1."""
    with _text(part) as text:
        decoder = json.JSONDecoder()
        buffer, at, count, size = text.read(1 << 16).lstrip(_BLANK), 0, 0, 1 << 16
        if not buffer:
            raise BadImport(f"{part.name} is empty.")
        in_list = buffer[0] == "["
        at = 1 if in_list else 0
        ended = False
        while True:
            while at < len(buffer) and buffer[at] in _BLANK + ("," if in_list else ""):
                at += 1
            if at == len(buffer):
                buffer, at = text.read(size), 0
                if not buffer:
                    if in_list and not ended:
                        raise BadImport(f"{part.name} ends inside its list, after {count} entries: it was cut short.")
                    return
                continue
            if in_list and buffer[at] == "]":
                ended, in_list = True, False
                at += 1
                continue
            if ended:
                raise BadImport(f"{part.name} goes on after the end of its list, at {buffer[at : at + 20]!r}.")
            try:
                value, after = decoder.raw_decode(buffer, at)
                if after == len(buffer) and (more := text.read(size)):  # a number may go on
                    buffer, at = buffer[at:] + more, 0
                    continue
            except json.JSONDecodeError as error:
                more = text.read(size)
                size = min(2 * size, 1 << 26)  # doubling keeps the work on a huge element linear
                if not more:
                    raise BadImport(
                        f"{part.name}: entry {count + 1} is no valid JSON ({error.msg} near "
                        f"{buffer[error.pos : error.pos + 30]!r})."
                    ) from error
                buffer, at = buffer[at:] + more, 0
                continue
            count += 1
            yield count, value
            buffer, at, size = buffer[after:], 0, 1 << 16


def _object(value: Any, part: _Part, number: int) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadImport(f"{part.name}: entry {number} is {type(value).__name__}, expected an object with named fields.")
    return value


def _list(value: Any, what: str, part: _Part, number: int) -> list[Any]:
    if not isinstance(value, list):
        raise BadImport(f"{part.name}: entry {number}: {what} is {type(value).__name__}, expected a list.")
    return value


def _moment(value: Any, part: _Part, number: int) -> datetime | None:
    """A time as exports write it: seconds or milliseconds since 1970, or words; None stays None."""
    if value is None or value == "":
        return None
    try:
        if isinstance(value, bool):
            raise BadDate("a truth value is no time")
        if isinstance(value, int | float):
            seconds = value / 1000 if abs(value) > 1e11 else value
            return datetime.fromtimestamp(seconds, UTC)
        if isinstance(value, str):
            if re.fullmatch(r"\d{10,13}(?:\.\d+)?", value):
                return _moment(float(value), part, number)
            return parse_at(value)
        raise BadDate(f"{type(value).__name__} is no time")
    except (BadDate, OverflowError, ValueError, OSError) as error:
        raise BadImport(f"{part.name}: entry {number}: {value!r} cannot be read as a time ({error})") from error


def _content(value: Any) -> str:
    """The words of a message: a string, or a list of blocks of which the ones with text count."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, dict):
        if value.get("type") in ("thinking", "tool_use", "tool_result", "redacted_thinking", "reasoning"):
            return ""
        return _content(value.get("text") if "text" in value else value.get("content"))
    if isinstance(value, list):
        return "\n".join(words for words in map(_content, value) if words)
    return ""


def _name(value: Any) -> str | None:
    return " ".join(value.split()) or None if isinstance(value, str) else None


# --- chats of assistants ----------------------------------------------------------------------------------------------


def _read_chatgpt(part: _Part) -> Iterator[ImportedNote]:
    """The branch of each conversation that its owner saw last: from `current_node` up to the root."""
    for number, value in _json_values(part):
        chat = _object(value, part, number)
        mapping = chat.get("mapping")
        if not isinstance(mapping, dict):
            raise BadImport(f"{part.name}: conversation {number} has no 'mapping' of messages.")
        name = _name(chat.get("title")) or "untitled"
        identity = chat.get("conversation_id") or chat.get("id") or _key(name, chat.get("create_time"))
        started = _moment(chat.get("create_time"), part, number)
        reply_to: str | None = None
        for place, (node_id, message) in enumerate(_branch(mapping, chat.get("current_node")), start=1):
            author = next(iter(_dicts([message.get("author")])), {})
            words = _chatgpt_words(message)
            if author.get("role") not in ("user", "assistant") or not words:
                continue
            key = _key("chatgpt", identity, message.get("id") or node_id)
            yield ImportedNote(
                text=words,
                source=_name(author.get("name")) or author["role"],
                at=_moment(message.get("create_time"), part, number) or started,
                reply_to=reply_to,
                origin=f"{part.name}: {name!r}, message {place}",
                key=key,
                meta={"conversation": name},
            )
            reply_to = key


def _branch(mapping: Mapping[str, Any], leaf: Any) -> list[tuple[str, dict[str, Any]]]:
    if leaf not in mapping:
        ends = [key for key, node in mapping.items() if isinstance(node, dict) and not node.get("children")]
        leaf = max(ends, key=lambda key: (mapping[key].get("message") or {}).get("create_time") or 0, default=None)
    found: list[tuple[str, dict[str, Any]]] = []
    seen: set[Any] = set()
    while isinstance(node := mapping.get(leaf), dict) and leaf not in seen:
        seen.add(leaf)
        if isinstance(message := node.get("message"), dict):
            found.append((str(leaf), message))
        leaf = node.get("parent")
    return found[::-1]


def _chatgpt_words(message: Mapping[str, Any]) -> str:
    content, about = message.get("content"), message.get("metadata")
    if isinstance(about, dict) and about.get("is_visually_hidden_from_conversation"):
        return ""
    if message.get("recipient") not in (None, "all"):
        return ""  # spoken to a tool
    if not isinstance(content, dict) or content.get("content_type") not in ("text", "multimodal_text"):
        return ""
    parts = content.get("parts")
    return "\n".join(
        words for words in (_content(part) for part in (parts if isinstance(parts, list) else [])) if words
    )


def _read_claude(part: _Part) -> Iterator[ImportedNote]:
    for number, value in _json_values(part):
        chat = _object(value, part, number)
        messages = _list(chat.get("chat_messages"), "'chat_messages'", part, number)
        name = _name(chat.get("name")) or "untitled"
        started = _moment(chat.get("created_at"), part, number)
        identity = chat.get("uuid") or _key(name, chat.get("created_at"))
        keys: dict[Any, str] = {}
        last: str | None = None
        for place, message in enumerate(messages, start=1):
            message = _object(message, part, number)
            sender = message.get("sender")
            at = _moment(message.get("created_at"), part, number) or started
            origin = f"{part.name}: {name!r}, message {place}"
            key = _key("claude", identity, message.get("uuid") or place)
            reply_to = keys.get(message.get("parent_message_uuid"), last)
            words = _content(message.get("content")) or _content(message.get("text"))
            if sender not in ("human", "assistant"):
                continue
            if words:
                yield ImportedNote(
                    text=words,
                    source="user" if sender == "human" else "assistant",
                    at=at,
                    reply_to=reply_to,
                    origin=origin,
                    key=key,
                    meta={"conversation": name},
                )
                last = key
                if message.get("uuid"):
                    keys[message["uuid"]] = key
            attachments = message.get("attachments")
            for i, file in enumerate(attachments if isinstance(attachments, list) else []):
                if isinstance(file, dict) and (content := _content(file.get("extracted_content"))):
                    yield ImportedNote(
                        text=content,
                        source=_name(file.get("file_name")) or "attachment",
                        at=at,
                        reply_to=key if words else None,
                        kind="document",
                        origin=f"{origin}, attachment {i + 1}",
                        key=_key("claude", identity, message.get("uuid") or place, "attachment", i),
                        meta={"conversation": name},
                    )


_TIME_FIELDS = ("timestamp", "created_at", "createdAt", "create_time", "time", "date", "datetime", "ts")


def _first(value: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((value[name] for name in names if value.get(name) not in (None, "")), None)


def _read_chat(part: _Part) -> Iterator[ImportedNote]:
    """Messages in the manner of the chat APIs, one an entry, or a list of them under `messages`."""
    first: str | None = None
    count = 0
    last: dict[Any, str] = {}
    for number, value in _json_values(part):
        entry = _object(value, part, number)
        nested = isinstance(entry.get("messages"), list)
        for message in entry["messages"] if nested else [entry]:
            message = _object(message, part, number)
            if not {"role", "speaker", "name"}.intersection(message):
                raise BadImport(
                    f'{part.name}: entry {number} has no \'role\'. Expected {{"role": ..., "content": ...}}.'
                )
            role = message.get("role")
            words = _content(message.get("content") if "content" in message else message.get("text"))
            if role in ("system", "developer", "tool", "function") or not words:
                continue
            source = _name(message.get("name")) or _name(message.get("speaker")) or _name(role)
            at = _moment(_first(message, _TIME_FIELDS), part, number)
            first = first or _key(source, at, words)
            chat = number if nested else _first(message, ("conversation_id", "thread_id", "session_id"))
            place, count = count, count + 1
            identity = message.get("id") or (place, words)
            key = _key("chat", chat if chat is not None and not nested else first, identity)
            yield ImportedNote(
                text=words,
                source=source,
                at=at,
                reply_to=last.get(chat),
                origin=f"{part.name}: entry {number}",
                key=key,
            )
            last[chat] = key


# --- other memories ---------------------------------------------------------------------------------------------------


def _read_mem0(part: _Part) -> Iterator[ImportedNote]:
    for number, value in _json_values(part):
        entry = _object(value, part, number)
        inner = entry.get("results") if "results" in entry else entry.get("memories")
        for item in [entry] if inner is None else _list(inner, "'results'", part, number):
            memory = _object(item, part, number)
            words = memory.get("memory") or memory.get("text") or memory.get("data")
            if not isinstance(words, str):
                raise BadImport(f"{part.name}: entry {number} has no 'memory'.")
            if not words.strip():
                continue
            meta = memory.get("metadata") if isinstance(memory.get("metadata"), dict) else {}
            owner = _first(memory, ("user_id", "agent_id", "run_id"))
            yield ImportedNote(
                text=words.strip(),
                source=_name(owner),
                at=_moment(_first(memory, ("created_at", "updated_at")), part, number),
                kind="fact",
                origin=f"{part.name}: memory {memory.get('id', number)}",
                key=_key("mem0", memory.get("id") or _key(owner, words)),
                meta=dict(meta or {}),
            )


def _read_letta(part: _Part) -> Iterator[ImportedNote]:
    """Agent files of both generations, and bare lists of passages or messages."""
    for number, value in _json_values(part):
        entry = _object(value, part, number)
        if not any(name in entry for name in _LETTA_FIELDS):
            raise BadImport(f"{part.name}: entry {number} holds neither messages nor passages nor blocks.")
        agents = entry["agents"] if isinstance(entry.get("agents"), list) else [entry]
        for block in [*_dicts(entry.get("blocks")), *_dicts(entry.get("core_memory"))]:
            yield from _letta_block(block, part, number)
        for agent in _dicts(agents):
            if agent is not entry:
                for block in [*_dicts(agent.get("core_memory")), *_dicts(agent.get("blocks"))]:
                    yield from _letta_block(block, part, number)
            last: str | None = None
            is_message = "message_type" in agent or "role" in agent
            for message in _dicts(agent.get("messages")) if "messages" in agent else [agent] if is_message else []:
                for note in _letta_message(message, last, part, number):
                    last = note.key
                    yield note
            passages = [passage for name in _PASSAGES for passage in _dicts(agent.get(name))]
            for passage in [agent] if "text" in agent and not is_message else passages:
                words = _content(passage.get("text"))
                if words:
                    yield ImportedNote(
                        text=words,
                        source=None,
                        at=_moment(_first(passage, _TIME_FIELDS), part, number),
                        kind="fact",
                        origin=f"{part.name}: passage {passage.get('id', number)}",
                        key=_key("letta", passage.get("id") or words),
                    )


_PASSAGES = ("passages", "archival_memory", "archival_passages", "archival")
_LETTA_FIELDS = ("agents", "messages", "message_type", "role", "text", "blocks", "core_memory", *_PASSAGES)


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _letta_block(block: Mapping[str, Any], part: _Part, number: int) -> Iterator[ImportedNote]:
    label, words = _name(block.get("label")) or "block", _content(block.get("value"))
    if words:
        yield ImportedNote(
            text=words,
            source=label,
            at=_moment(_first(block, _TIME_FIELDS), part, number),
            kind="fact",
            origin=f"{part.name}: block {label}",
            key=_key("letta", block.get("id") or (label, words)),
        )


def _letta_message(message: Mapping[str, Any], last: str | None, part: _Part, number: int) -> Iterator[ImportedNote]:
    role = message.get("role") or str(message.get("message_type", "")).removesuffix("_message")
    if role not in ("user", "assistant"):
        return
    words = _content(message.get("content") if message.get("content") is not None else message.get("text"))
    if role == "user" and words.startswith("{"):  # wrapped by the server, with a type and a clock
        try:
            wrapped = json.loads(words)
        except json.JSONDecodeError:
            wrapped = None
        if isinstance(wrapped, dict) and "type" in wrapped:
            words = _content(wrapped.get("message")) if wrapped["type"] == "user_message" else ""
    spoken = []
    for call in _dicts(message.get("tool_calls")):  # an agent speaks through a tool
        function = call.get("function")
        if isinstance(function, dict) and function.get("name") == "send_message":
            try:
                arguments = json.loads(str(function.get("arguments")))
            except json.JSONDecodeError:
                continue
            spoken.append(_content(arguments.get("message")) if isinstance(arguments, dict) else "")
    if message.get("tool_calls"):
        words = "\n".join(filter(None, spoken))  # beside a call, the content is the agent's thinking
    if words:
        yield ImportedNote(
            text=words,
            source=_name(message.get("name")) or role,
            at=_moment(_first(message, _TIME_FIELDS), part, number),
            reply_to=last,
            origin=f"{part.name}: message {message.get('id', number)}",
            key=_key("letta", message.get("id") or (message.get("created_at"), words)),
        )


# --- LoCoMo -----------------------------------------------------------------------------------------------------------


def _read_locomo(part: _Part) -> Iterator[ImportedNote]:
    """One note a turn; the session's date is its time, and the caption of a picture stands in brackets."""
    for number, value in _json_values(part):
        sample = _object(value, part, number)
        talk = sample["conversation"] if isinstance(sample.get("conversation"), dict) else sample
        name = str(sample.get("sample_id") or _key(talk.get("speaker_a"), talk.get("speaker_b"))[:8])
        sessions = sorted(
            (int(match[1]), field_name) for field_name in talk if (match := re.fullmatch(r"session_(\d+)", field_name))
        )
        if not sessions:
            raise BadImport(f"{part.name}: conversation {number} has no session.")
        for session, field_name in sessions:
            at = _moment(talk.get(f"{field_name}_date_time"), part, number)
            last: str | None = None
            for place, turn in enumerate(_list(talk[field_name], f"{field_name!r}", part, number), start=1):
                turn = _object(turn, part, number)
                place_name = str(turn.get("dia_id") or f"D{session}:{place}")
                caption = _content(turn.get("blip_caption"))
                words = " ".join(filter(None, (_content(turn.get("text")), f"[picture: {caption}]" if caption else "")))
                if not words:
                    continue
                key = _key("locomo", name, place_name)
                yield ImportedNote(
                    text=words,
                    source=_name(turn.get("speaker")),
                    at=at,
                    reply_to=last,
                    origin=f"{part.name}: {name} {place_name}",
                    key=key,
                    meta={"conversation": name, "turn": place_name},
                )
                last = key


# --- Loci's own -------------------------------------------------------------------------------------------------------

HEADER = {"format": "loci notes", "version": 1}  # the first line of `exporters.to_jsonl`


def _read_loci(part: _Part) -> Iterator[ImportedNote]:
    for number, value in _json_values(part):
        entry = _object(value, part, number)
        if number == 1:
            if entry.get("format") != HEADER["format"]:
                raise BadImport(f"{part.name} does not begin with {json.dumps(HEADER)}.")
            if entry.get("version") != HEADER["version"]:
                raise BadImport(
                    f"{part.name} was written by another version of Loci (notes {entry.get('version')}, "
                    f"this one reads {HEADER['version']}). Update Loci:  pip install -U loci-lm"
                )
            continue
        try:
            note = note_from_json(entry)
        except (KeyError, TypeError, ValueError) as error:
            raise BadImport(
                f"{part.name}: entry {number} is no whole note ({type(error).__name__}: {error})."
            ) from error
        yield ImportedNote(
            text=note.content,
            source=note.source,
            at=note.said_at,
            reply_to=_key("loci", note.reply_to) if note.reply_to else None,
            kind=note.kind,
            origin=f"{part.name}: entry {number}",
            key=_key("loci", note.id),
            meta=note.meta,
            note=note,
        )


def note_from_json(entry: Mapping[str, Any]) -> Note:
    """The note that `exporters.note_to_json` wrote. Raises KeyError, TypeError or ValueError where a field is wrong."""
    fields = dict(entry)
    for name in ("keywords", "tags", "entities"):
        fields[name] = tuple(str(word) for word in fields[name])
    for name in ("said_at", "written_at"):
        fields[name] = _aware(fields[name])
    fields["times"] = tuple(
        TimeSpan(**{**span, "start": _aware(span["start"]), "end": _aware(span["end"])}) for span in fields["times"]
    )
    if not isinstance(fields["content"], str) or not isinstance(fields["id"], str):
        raise TypeError("'id' and 'content' must be text")
    return Note(**fields)


def _aware(value: Any) -> datetime:
    moment = datetime.fromisoformat(value)
    if moment.tzinfo is None:
        raise ValueError(f"{value!r} names no time zone")
    return moment


# --- plain transcripts ------------------------------------------------------------------------------------------------

_SIGNS = str.maketrans({"\u200e": None, "\u200f": None, "\u202a": None, "\u202c": None, "\u202f": " ", "\u00a0": " "})
_SPEAKER = r"(?P<speaker>[\p{L}+~@][\p{L}\p{M}\p{N} .'’_+&@-]{0,48}?)"
_CLOCK = r"\d{1,2}:\d\d(?::\d\d)?(?:\s?[APap]\.?\s?[Mm]\.?)?"
_DAY = (
    r"(?:\d{4}-\d\d-\d\d|\d{1,2}[/.-]\d{1,2}[/.-]\d{2,4}|\d{1,2} \p{L}{3,9}\.?,? \d{4}|\p{L}{3,9}\.? \d{1,2},? \d{4})"
)
_STAMP = (
    rf"(?P<stamp>{_DAY}(?:,? |T|, at |,? at ){_CLOCK}(?:Z|[+-]\d\d:?\d\d)?|{_CLOCK}(?: on |,? ){_DAY}|{_CLOCK}|{_DAY})"
)
_LINE = regex.compile(
    rf"\s*(?:[-*•>]\s+)?(?:\[{_STAMP}\]\s*|\({_STAMP}\)\s*|{_STAMP}(?:\s+[-–]\s+|\s+|:\s+))?"
    rf"(?:\*\*)?{_SPEAKER}(?:\*\*)?\s*(?:[\[(]{_STAMP}[\])])?(?:\*\*)?:(?:\*\*)?(?:\s+(?P<words>.*)|$)",
    regex.DOTALL,
)
_STAMPED = regex.compile(rf"\s*(?:\[{_STAMP}\]|{_STAMP}\s+[-–]\s)")
_NUMERIC_DAY = regex.compile(r"(?<![\d-])(\d{1,2})([/.-])(\d{1,2})\2(\d{4}|\d\d)(?!\d)")
_HEADER_TRIM = " \t=#*-_–—[]()<>|:"
_OMITTED = regex.compile(
    r"<[^<>]*(?:omitted|weggelassen|omis|omitid[oa]|omesso)[^<>]*>|(?:image|video|audio|GIF|sticker|document) omitted",
    regex.IGNORECASE,
)
_NO_SPEAKERS = frozenset(
    {"http", "https", "ftp", "note", "ps", "p.s.", "date", "subject", "todo", "warning", "example"}
)


def _speaks(line: str) -> regex.Match[str] | None:
    """The line as the beginning of a message, or None: "Name: text", with a stamp before or behind the name."""
    match = _LINE.match(line)
    if match is None:
        return None
    speaker = match["speaker"].strip()
    words = speaker.split()
    if len(words) > 4 or speaker.lower() in _NO_SPEAKERS or not (words[0][:1].isupper() or not words[0][:1].islower()):
        return match if match["stamp"] and len(words) <= 6 and speaker.lower() not in _NO_SPEAKERS else None
    return match


def _read_transcript(part: _Part) -> Iterator[ImportedNote]:
    stamped, day_first = _survey(part)
    today: datetime | None = None  # of the last date line or stamp, as midnight
    first: str | None = None
    last: str | None = None
    count = 0

    def finish(speaker: str, at: datetime | None, lines: list[str], line_number: int) -> ImportedNote | None:
        nonlocal first, last, count
        text = _OMITTED.sub("", "\n".join(lines)).strip()
        if not text:
            return None
        first = first or _key(speaker, at, text)
        key = _key("transcript", first, count, speaker, text)
        note = ImportedNote(
            text=text, source=speaker, at=at, reply_to=last, origin=f"{part.name}: line {line_number}", key=key
        )
        last, count = key, count + 1
        return note

    current: tuple[str, datetime | None, list[str], int] | None = None
    with _text(part) as text:
        for number, raw in enumerate(text, start=1):
            line = raw.translate(_SIGNS).rstrip("\n")
            begins = bool(_STAMPED.match(line))
            match = _speaks(line) if begins or not stamped else None
            header = None if begins or match else _date_line(line)
            if match is None and not header and not (begins and stamped):
                if current is not None and (line.strip() or current[2]):
                    current[2].append(line)
                continue
            if current is not None:
                if note := finish(*current):
                    yield note
                current = None
            if header:
                today, last = header, None
            elif match is not None:
                at = _stamp_time(match["stamp"], today, day_first, part, number)
                if at is not None and regex.search(r"\d[/.-]\d|\d{4}", match["stamp"] or ""):
                    today = at.replace(hour=0, minute=0, second=0, microsecond=0)
                current = (match["speaker"].strip(), at or today, [match["words"] or ""], number)
    if current is not None and (note := finish(*current)):
        yield note
    if count == 0:
        raise BadImport(f'{part.name}: no line reads like "Name: text".')


def _survey(part: _Part) -> tuple[bool, bool | None]:
    """Whether messages begin with a stamp, and whether its day stands before its month (None: it says itself)."""
    stamped = plain = 0
    day_first: bool | None = None
    hint: bool | None = None
    with _text(part) as text:
        for line in text:
            line = line.translate(_SIGNS)
            if _STAMPED.match(line):
                stamped += 1
                if match := _NUMERIC_DAY.search(line, 0, 40):
                    first, second = int(match[1]), int(match[3])
                    if first > 12 or second > 12:
                        day_first = first > 12
                    elif hint is None:
                        # undecided: dots are European, a 12-hour clock American
                        hint = match[2] != "/" or not regex.search(r"\d\s?[AaPp]\.?[Mm]", line[:40])
                if day_first is not None and stamped > 50:
                    break
            elif _speaks(line):
                plain += 1
    return stamped > plain, hint if day_first is None else day_first


def _date_line(line: str) -> datetime | None:
    """A line that is nothing but a date: "8 May 2023", "=== 2023-05-08 ===", "Session 2: 1:56 pm on 8 May, 2023"."""
    words = line.strip(_HEADER_TRIM)
    if not 6 <= len(words) <= 60 or not any(map(str.isdigit, words)):
        return None
    words = regex.sub(r"^(?:session|day|date|chat|conversation)\s*\d*\s*[:(,–-]*\s*", "", words, flags=regex.IGNORECASE)
    if not regex.search(r"\d{4}|\d[/.-]\d{1,2}[/.-]\d\d", words):
        return None
    try:
        return parse_span(words, other_languages=False)[0]
    except BadDate:
        return None


def _stamp_time(
    stamp: str | None, today: datetime | None, day_first: bool | None, part: _Part, number: int
) -> datetime | None:
    if not stamp:
        return None
    if regex.fullmatch(_CLOCK, stamp):
        if today is None:
            return None  # a clock without a day
        stamp = f"{today.date().isoformat()} {stamp}"
    if day_first is not None and (match := _NUMERIC_DAY.search(stamp)):
        day, month = (match[1], match[3]) if day_first else (match[3], match[1])
        year = match[4] if len(match[4]) == 4 else f"20{match[4]}"
        stamp = f"{stamp[: match.start()]}{year}-{int(month):02}-{int(day):02}{stamp[match.end() :]}"
    try:
        return parse_at(stamp)
    except BadDate as error:
        raise BadImport(f"{part.name}: line {number}: {stamp!r} cannot be read as a time.") from error


# --- Markdown ---------------------------------------------------------------------------------------------------------

_HEADING = re.compile(r" {0,3}(#{1,6})(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*$")
_UNDERLINE = re.compile(r" {0,3}(=+|-+)[ \t]*$")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")


def _read_markdown(part: _Part) -> Iterator[ImportedNote]:
    """One note a section; a date in a heading, in the front matter or in the file's name is its time."""
    file = Path(part.name).name
    base = _date_line(Path(file).stem)
    path: list[tuple[int, str]] = []
    dates: list[tuple[int, datetime]] = []
    seen: dict[str, int] = {}
    body: list[str] = []
    begins = 1
    fence = ""
    found = 0

    def section() -> ImportedNote | None:
        text = "\n".join(body).strip("\n")
        if not text.strip():
            return None
        titles = [title for _, title in path]
        where = " > ".join(titles)
        seen[where] = seen.get(where, 0) + 1
        return ImportedNote(
            text=f"{titles[-1]}\n\n{text}" if titles else text,
            source=f"{file} # {where}" if where else file,
            at=dates[-1][1] if dates else base,
            kind="document",
            origin=f"{part.name}: line {begins}",
            key=_key("markdown", where, seen[where], text),
            meta={"headings": titles},
        )

    with _text(part) as lines:
        for number, raw in enumerate(lines, start=1):
            line = raw.rstrip("\n")
            if number == 1 and line.rstrip() == "---":
                matter = _front_matter(lines)
                body = [] if matter is not None else [line]
                base = matter[1] or base if matter else base
                if matter and matter[0]:
                    body = matter[0]
                continue
            mark = _FENCE.match(line)
            if fence:
                fence = "" if mark and mark[1].startswith(fence) and not line.strip(" `~\t") else fence
            elif mark:
                fence = mark[1]
            heading = None if fence or mark else _HEADING.match(line)
            level, title = (len(heading[1]), heading[2] or "") if heading else (0, "")
            if not heading and not fence and body and body[-1].strip() and (under := _UNDERLINE.match(line)):
                is_alone = len(body) == 1 or not body[-2].strip()
                if is_alone and not _HEADING.match(body[-1]) and body[-1].lstrip()[:1] not in ("-", "*", ">", "|"):
                    level, title = (1 if under[1][0] == "=" else 2), body.pop().strip()
            if not level:
                body.append(line)
                continue
            if note := section():
                found += 1
                yield note
            body, begins = [], number
            path = [(depth, name) for depth, name in path if depth < level]
            dates = [(depth, day) for depth, day in dates if depth < level]
            if title.strip():
                path.append((level, title.strip()))
            if day := _date_line(title):
                dates.append((level, day))
    if note := section():
        found += 1
        yield note
    if not found:
        raise BadImport(f"{part.name} is empty: no text under any heading.")


def _front_matter(lines: Iterator[str]) -> tuple[list[str], datetime | None] | None:
    """Skip the fields between two lines of dashes; return what must be kept where they never end, and the date."""
    held: list[str] = []
    at = None
    for raw in lines:
        line = raw.rstrip("\n")
        if line.rstrip() in ("---", "..."):
            return [], at
        held.append(line)
        name, _, value = line.partition(":")
        if name.strip().lower() in ("date", "created", "created_at") and at is None:
            at = _date_line(value.strip(" \"'"))
        if len(held) > 200:
            break
    return ["---", *held], None


# --- which is which ---------------------------------------------------------------------------------------------------

_READERS: dict[str, Callable[[_Part], Iterator[ImportedNote]]] = {
    "loci": _read_loci,
    "chatgpt": _read_chatgpt,
    "claude": _read_claude,
    "mem0": _read_mem0,
    "letta": _read_letta,
    "locomo": _read_locomo,
    "chat": _read_chat,
    "transcript": _read_transcript,
    "markdown": _read_markdown,
}
FORMATS = tuple(_READERS)


def detect(path: Path | str) -> str:
    """Which of `FORMATS` a file is in, by its first entry and its name.

    Raises:
        BadImport: the file is missing, empty, damaged, or like none of them.
    """
    return _detect(_parts(Path(path))[0])


def _detect(part: _Part) -> str:
    with _text(part) as text:
        head = text.read(4096)
        while head and not head.strip():
            head = text.read(4096)
    if not head:
        raise BadImport(f"{part.name} is empty.")
    suffix = Path(part.name.removesuffix(".gz")).suffix.lower()
    looks_like_json = head.lstrip()[0] == "{" or regex.match(r"\s*\[\s*[\[\]{]", head) is not None
    if suffix in (".json", ".jsonl", ".ndjson", ".af") or (looks_like_json and suffix not in (".md", ".markdown")):
        for number, value in _json_values(part):
            if name := _json_format(_object(value, part, number)):
                return name
            break
        raise BadImport(f"{part.name} is JSON of a kind that no importer knows. Known: {', '.join(FORMATS)}.")
    if suffix in (".md", ".markdown", ".mdown"):
        return "markdown"
    with _text(part) as text:
        messages = sum(1 for _, line in zip(range(400), text, strict=False) if _speaks(line.translate(_SIGNS)))
    if messages:
        return "transcript"
    if suffix in (".txt", ".text", "") and regex.search(r"^#{1,6} ", head, regex.MULTILINE):
        return "markdown"
    raise BadImport(
        f'{part.name} is in no format that an importer knows: no JSON, no Markdown, and no line like "Name: text". '
        f"Known: {', '.join(FORMATS)}; name one with --format."
    )


def _json_format(value: Mapping[str, Any]) -> str | None:
    def inner(name: str) -> Mapping[str, Any]:
        return next(iter(_dicts(value.get(name))), {})

    if value.get("format") == HEADER["format"]:
        return "loci"
    if "mapping" in value:
        return "chatgpt"
    if "chat_messages" in value:
        return "claude"
    talk = value["conversation"] if isinstance(value.get("conversation"), dict) else value
    if any(re.fullmatch(r"session_\d+", name) for name in talk):
        return "locomo"
    if "memory" in value or "memory" in inner("results") or "memory" in inner("memories") or value.get("results") == []:
        return "mem0"
    letta = {"agents", "agent_type", "core_memory", "message_type", "archive_id", "embedding_config", *_PASSAGES}
    if letta.intersection(value):
        return "letta"
    named = "name" in value and "content" in value
    if "role" in value or "role" in inner("messages") or ("speaker" in value and "text" in value) or named:
        return "chat"
    if "text" in value and ("id" in value or "created_at" in value):
        return "letta"
    return None


def read_notes(path: Path | str, *, format: str | None = None) -> Iterator[ImportedNote]:
    """The notes of a file, in its order, one at a time.

    Args:
        path: a file of one of the formats above; see `detect`.
        format: one of `FORMATS`, where the file does not show it.

    Raises:
        UnknownName: no format of that name.
        BadImport: the file, or one entry of it, cannot be read. Notes before it have been yielded by then, and their
            keys let the next import go on.
    """
    if format is not None and format not in _READERS:
        raise UnknownName.among("import format", format, FORMATS)
    for part in _parts(Path(path)):
        for note in _READERS[format or _detect(part)](part):
            yield replace(note, text=_clean(note.text)) if _UNFIT.search(note.text) else note


_UNFIT = re.compile("[\x00\ud800-\udfff]")


def _clean(text: str) -> str:
    """Without NUL characters, and with half surrogate pairs replaced: no store takes either."""
    return text.replace("\x00", "").encode("utf-8", "replace").decode()
