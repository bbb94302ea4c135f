# SPDX-License-Identifier: GPL-2.0-only
"""Numbers as they are written to a module parameter (kernel: `lib/kstrtox.c`)."""

from __future__ import annotations

import errno
import os
import re
from typing import Final

UINT_MAX: Final = (1 << 32) - 1

_FORMS: Final = ((re.compile(r"\+?0[xX]([0-9a-fA-F]+)"), 16), (re.compile(r"\+?0([0-7]+)"), 8))
_DECIMAL: Final = re.compile(r"\+?(0|[1-9][0-9]*)")


def kstrtouint(text: str) -> int:
    """Return the unsigned int that `text` spells, in base 10, 8 (`010`) or 16 (`0x10`).

    A plus sign and one newline at the end are allowed, blanks and a minus sign are not.

    Raises:
        OSError: EINVAL if this is no such number, ERANGE if it is larger than `UINT_MAX`.
    """
    digits = text.removesuffix("\n")
    for form, base in (*_FORMS, (_DECIMAL, 10)):
        if match := form.fullmatch(digits):
            value = int(match[1], base)
            if value > UINT_MAX:
                raise OSError(errno.ERANGE, f"{os.strerror(errno.ERANGE)}: {digits!r} is no 32-bit number")
            return value
    raise OSError(errno.EINVAL, f"{os.strerror(errno.EINVAL)}: {text!r} is no unsigned number")
