"""Every error that Loci raises on purpose, in one tree.

LociError
├── BadInput                 what was given cannot be used (also a ValueError)
│   ├── EmptyNote            text without a word in it
│   ├── BadDate              a date or time that cannot be read
│   ├── UnknownSpace         a space that the store does not hold
│   ├── UnknownNote          a note id that the space does not hold
│   ├── UnknownName          a name outside a fixed list; its nearest neighbour is named
│   ├── RecalledText         memory's own words given back to it as news
│   └── BadImport            a file that no importer can read
├── StoreError               the database
│   ├── NotAStore            a file that is no Loci database
│   ├── NewerStore           written by a newer Loci
│   ├── StoreReadOnly        the file or its folder cannot be written
│   ├── StoreFull            the disk is full
│   ├── StoreBusy            another process holds the lock for too long
│   └── EmbedderChanged      the index was made by another embedder
├── ModelError               a model, local or remote
│   ├── MissingExtra         a package is not installed; the command that installs it is named
│   ├── ModelNotFound        no such model, folder or file
│   ├── BadModel             a model that lacks a part (tokenizer, weights) or is damaged
│   ├── ContextTooLong       more tokens than the model's window
│   ├── Unsupported          the model cannot do what was asked
│   ├── EndpointError        a remote model answered with an error
│   │   ├── EndpointDown     no answer at all
│   │   ├── EndpointRefused  key or rights
│   │   └── EndpointBusy     rate limit or overload, after all retries
│   └── BadOutput            the model's output is not what its schema demands, after all repairs
└── DataNotFound             a data set that a bench or a recipe needs is absent

A message says what was found, what was expected, and the command or line that mends it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LociError(Exception):
    """The base of every error below. `exit_code` is what the command line returns for it."""

    exit_code = 1


class BadInput(LociError, ValueError):
    exit_code = 2


class EmptyNote(BadInput):
    pass


class BadDate(BadInput):
    pass


class UnknownSpace(BadInput):
    pass


class UnknownNote(BadInput):
    pass


class UnknownName(BadInput):
    @classmethod
    def among(cls, what: str, name: str, known: Iterable[str]) -> UnknownName:
        """Build the message: the unknown name, its nearest neighbour, and the whole list."""
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return cls(f"no {what} is called {name!r}.{hint} Known: {', '.join(names)}.")


class RecalledText(BadInput):
    pass


class BadImport(BadInput):
    pass


class StoreError(LociError):
    pass


class NotAStore(StoreError):
    pass


class NewerStore(StoreError):
    pass


class StoreReadOnly(StoreError):
    pass


class StoreFull(StoreError):
    pass


class StoreBusy(StoreError):
    pass


class EmbedderChanged(StoreError):
    pass


class ModelError(LociError):
    pass


class MissingExtra(ModelError, ImportError):
    @classmethod
    def needs(cls, purpose: str, packages: str, command: str) -> MissingExtra:
        return cls(f"{purpose} needs {packages}, which is not installed. Install it with:  {command}")


class ModelNotFound(ModelError):
    pass


class BadModel(ModelError):
    pass


class ContextTooLong(ModelError, ValueError):
    pass


class Unsupported(ModelError, ValueError):
    pass


class EndpointError(ModelError):
    pass


class EndpointDown(EndpointError):
    pass


class EndpointRefused(EndpointError):
    pass


class EndpointBusy(EndpointError):
    pass


class BadOutput(ModelError):
    pass


class DataNotFound(LociError):
    exit_code = 2
