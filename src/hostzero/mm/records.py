# SPDX-License-Identifier: GPL-2.0-only
"""Arrays of records as plain Python reads them while the compiler is off.

A record of numpy's `recarray` looks its fields up by name each time, which takes microseconds and
is most of what uncompiled code does. Here a record is an index and its fields are properties that
go straight to the column: a third of the time. Compiled code never sees this.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from hostzero.jit import COMPILER_ON


class _Record:
    """One record, live: what is written to it is written to the array."""

    __slots__ = ("_at", "_columns")

    def __init__(self, columns: list[Any], at: int) -> None:
        self._columns = columns
        self._at = at

    def __getitem__(self, name: str) -> Any:
        """Return a field by its name, as a record of numpy's does."""
        return getattr(self, name)


@functools.cache
def _kind_of(names: tuple[str, ...]) -> type[_Record]:
    def field(number: int) -> property:
        def get(record: _Record) -> Any:
            return record._columns[number][record._at]

        def put(record: _Record, value: Any) -> None:
            record._columns[number][record._at] = value

        return property(get, put)

    fields = {name: field(number) for number, name in enumerate(names)}
    return type("Record", (_Record,), {"__slots__": (), **fields})


class Records(np.recarray[Any, Any]):
    """A `recarray` of one dimension whose single records are quick to read and write."""

    def __array_finalize__(self, obj: Any) -> None:
        self.__dict__["_columns"] = None

    def __getitem__(self, index: Any) -> Any:
        """Return a live record for an integer, else what a `recarray` returns."""
        if not isinstance(index, int | np.integer):
            return super().__getitem__(index)
        columns = self.__dict__["_columns"]
        if columns is None:
            plain = self.view(np.ndarray)
            names = self.dtype.names or ()
            columns = [plain[name] for name in names], _kind_of(names), len(self)
            self.__dict__["_columns"] = columns
        fields, kind, length = columns
        if not -length <= index < length:
            raise IndexError(f"record {index} of {length}")  # what ends a loop over the array, too
        return kind(fields, index)


def as_records(array: Any) -> Any:
    """Return an array of records whose fields are attributes, in the form that suits the compiler."""
    return array.view(np.recarray if COMPILER_ON else Records)
