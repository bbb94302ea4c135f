# SPDX-License-Identifier: GPL-2.0-only
"""The protocol's constants, which other people's clients hold on to."""

from __future__ import annotations

from pathlib import Path

from hostzero.vhost_user.control_protocol import LINE_BYTES_MAX, PROTOCOL_VERSION, Refusal

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "control.md"


def test_the_page_names_the_version_the_limit_and_every_kind_of_error() -> None:
    text = PAGE.read_text()
    assert f'"version": {PROTOCOL_VERSION}' in text
    assert f"{LINE_BYTES_MAX:,} bytes" in text
    for kind in Refusal:
        assert f"`{kind}`" in text
