# SPDX-License-Identifier: GPL-2.0-only
"""Arrays of records as plain Python reads them while the compiler is off.

A record of numpy's `recarray` looks its fields up by name each time, which takes microseconds and
is most of what uncompiled code does. Here a record is a `ctypes` structure over the same memory,
made once and kept: a field is one call in C and a whole number is a plain `int`, which Python
counts with three times as fast as with a number of numpy's. Compiled code never sees this.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from hostzero.jit import COMPILER_ON

_NUMBERS: Final = {
    np.dtype(kind): number
    for kind, number in (
        (np.int8, ctypes.c_int8),
        (np.uint8, ctypes.c_uint8),
        (np.int16, ctypes.c_int16),
        (np.uint16, ctypes.c_uint16),
        (np.int32, ctypes.c_int32),
        (np.uint32, ctypes.c_uint32),
        (np.int64, ctypes.c_int64),
        (np.uint64, ctypes.c_uint64),
    )
}


class _Record(ctypes.Structure):
    """One record, live: what is written to it is written to the array."""

    __slots__ = ()

    _at: int
    _array: Any

    @property
    def dtype(self) -> np.dtype[Any]:
        """What the record is made of."""
        dtype: np.dtype[Any] = self._array.dtype
        return dtype

    def __getitem__(self, name: str) -> Any:
        """Return a field by its name, as a record of numpy's does."""
        return getattr(self, name)

    def copy(self) -> Any:
        """Return a record of the same numbers that is not in the array."""
        return self._array[self._at : self._at + 1].copy().view(Records)[0]

    def __setitem__(self, name: str, value: Any) -> None:
        """Write a field by its name."""
        setattr(self, name, value)


def _number(field: Any) -> property:
    """Return a property of a structure's field that takes numbers of numpy's as well."""
    store: Callable[[Any, Any], None] = field.__set__

    def put(record: _Record, value: Any) -> None:
        try:
            store(record, value)
        except TypeError:
            store(record, int(value))

    return property(field.__get__, put)


def _column(name: str) -> property:
    """Return a property of a field that is itself an array."""

    def get(record: _Record) -> Any:
        return record._array[name][record._at]

    def put(record: _Record, value: Any) -> None:
        record._array[name][record._at] = value

    return property(get, put)


@functools.cache
def _kind_of(dtype: np.dtype[Any]) -> type[_Record]:
    """Return the class of an array's records: fields at the same offsets, holes where none is."""
    layout: list[tuple[str, Any]] = []
    end = 0
    columns: dict[str, property] = {}
    fields: dict[str, Any] = dict(dtype.fields or {})
    for name, (kind, at, *_) in sorted(fields.items(), key=lambda item: item[1][1]):
        if kind not in _NUMBERS:
            columns[name] = _column(name)
            continue
        if at > end:
            layout.append((f"_hole_{at}", ctypes.c_char * (at - end)))
        layout.append((f"_raw_{name}", _NUMBERS[kind]))
        end = at + kind.itemsize
    if dtype.itemsize > end:
        layout.append(("_rest", ctypes.c_char * (dtype.itemsize - end)))
    # The structure's own names are others: a field is reached by way of its property.
    raw: Any = type("Raw", (_Record,), {"_pack_": 1, "_fields_": layout, "__slots__": ()})
    numbers = {name: _number(getattr(raw, f"_raw_{name}")) for name in fields if name not in columns}
    # Slots: a misspelt field is an error, as it is with numpy's.
    return type("Record", (raw,), {"__slots__": ("_array", "_at"), **numbers, **columns})


class Records(np.recarray[Any, Any]):
    """A `recarray` of one dimension whose single records are quick to read and write."""

    # numpy's is written in Python and asked for every attribute; fields are few of them.
    __getattribute__ = object.__getattribute__

    def __getattr__(self, name: str) -> Any:
        """Return a column by its name."""
        return np.recarray.__getattribute__(self, name)

    def __array_finalize__(self, obj: Any) -> None:
        self.__dict__["_made"] = {}

    def __getitem__(self, index: Any) -> Any:
        """Return a live record for an integer, else what a `recarray` returns."""
        try:
            return self._made[index]
        except (KeyError, TypeError):  # not made yet; or a slice, or an array, which has no hash
            pass
        if not isinstance(index, int | np.integer):
            return super().__getitem__(index)
        if not -len(self) <= index < len(self):
            # What ends a loop over the array, too.
            raise IndexError(f"record {index} of {len(self)}")
        at = int(index) % len(self)
        record = _kind_of(self.dtype).from_address(self.ctypes.data + at * self.strides[0])
        record._at = at
        # Its memory is the array's, which must not go before it does.
        record._array = self.view(np.ndarray)
        self._made[int(index)] = record
        return record

    def __setitem__(self, index: Any, value: Any) -> None:
        """Copy a record, or whatever a `recarray` takes."""
        super().__setitem__(index, value._array[value._at] if isinstance(value, _Record) else value)


def as_records(array: Any) -> Any:
    """Return an array of records whose fields are attributes, in the form that suits the compiler."""
    return array.view(np.recarray if COMPILER_ON else Records)
