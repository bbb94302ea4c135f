# SPDX-License-Identifier: GPL-2.0-only
"""The counters of the vhost-user side."""

from __future__ import annotations

import json

from hostzero.vhost_user import metrics as module
from hostzero.vhost_user.metrics import ServiceMetrics
from hostzero.vhost_user.protocol import ErrorKind


def test_every_counter_is_in_the_table_and_is_plain() -> None:
    counters = ServiceMetrics()
    counters.errors[ErrorKind.ORDER] += 2
    plain = counters.as_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert module.__doc__ is not None
    for name in plain:
        assert f"``{name}``" in module.__doc__
    errors = plain["errors"]
    assert isinstance(errors, dict)
    assert errors == {str(kind): 2 * (kind is ErrorKind.ORDER) for kind in ErrorKind}


def test_two_services_count_apart() -> None:
    first, second = ServiceMetrics(), ServiceMetrics()
    first.errors[ErrorKind.RING] += 1
    assert second.errors[ErrorKind.RING] == 0
