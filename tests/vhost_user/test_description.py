# SPDX-License-Identifier: GPL-2.0-only
"""Mirror of ``hostzero.vhost_user.description``."""

from __future__ import annotations

from pathlib import Path

from hostzero.vhost_user.description import description


def test_it_has_what_the_schema_asks_for_and_the_program_that_is_there() -> None:
    # VhostUserBackend: description, type and binary are not optional; tags is.
    document = description(Path("/opt/x/hostzero-device"))
    assert document.keys() == {"description", "type", "binary", "tags"}
    assert document["type"] == "balloon"
    assert document["binary"] == "/opt/x/hostzero-device"
