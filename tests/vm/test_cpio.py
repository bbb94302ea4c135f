# SPDX-License-Identifier: GPL-2.0-only
"""The archive is what the kernel's documentation says, read back by a reader of our own."""

from __future__ import annotations

import stat

import pytest

from hostzero.vm.cpio import Entry, archive, character_device, directory, file


def read_back(data: bytes) -> dict[str, tuple[int, bytes, tuple[int, int]]]:
    """A second reading of the format: name to mode, contents, device."""
    found: dict[str, tuple[int, bytes, tuple[int, int]]] = {}
    at = 0
    while True:
        assert at % 4 == 0
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        mode, size, major, minor, name_size = fields[1], fields[6], fields[9], fields[10], fields[11]
        name = data[at + 110 : at + 110 + name_size]
        assert name.endswith(b"\0")
        body = (at + 110 + name_size + 3) // 4 * 4
        at = (body + size + 3) // 4 * 4
        if name == b"TRAILER!!!\0":
            assert at == len(data)
            return found
        found[name[:-1].decode()] = (mode, data[body : body + size], (major, minor))


def test_what_goes_in_comes_out() -> None:
    entries = [
        directory("bin"),
        file("bin/tool", b"12345", executable=True),
        file("readme", b""),
        character_device("dev", 5, 1),
    ]
    assert read_back(archive(entries)) == {
        "bin": (stat.S_IFDIR | 0o755, b"", (0, 0)),
        "bin/tool": (stat.S_IFREG | 0o755, b"12345", (0, 0)),
        "readme": (stat.S_IFREG | 0o644, b"", (0, 0)),
        "dev": (stat.S_IFCHR | 0o600, b"", (5, 1)),
    }


def test_every_length_of_name_and_data_is_padded() -> None:
    entries = [file("n" * n, b"d" * d) for n in range(1, 6) for d in range(5)]
    for entry in entries:
        assert read_back(archive([entry])) == {entry.path: (entry.mode, entry.data, (0, 0))}


def test_inodes_differ_so_that_no_file_is_a_link_of_another() -> None:
    data = archive([file("a", b"1"), file("b", b"2")])
    inodes = [data[at + 6 : at + 14] for at in range(0, len(data), 4) if data[at : at + 6] == b"070701"]
    assert len(set(inodes)) == 3


def test_the_same_entries_give_the_same_bytes() -> None:
    assert archive([file("a", b"1")]) == archive([file("a", b"1")])


@pytest.mark.parametrize("path", ["", "/etc", "../up", "a/../b", "a//b", "./a", "a/"])
def test_a_path_that_leads_out_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="no path inside"):
        archive([Entry(path, stat.S_IFREG)])
