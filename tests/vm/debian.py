# SPDX-License-Identifier: GPL-2.0-only
"""Stand-ins for apt and dpkg: scripts in front of the PATH, over archives in a folder, without a network.

An archive is a tar file that calls itself a package. `Debian.calls` has what was run.
"""

from __future__ import annotations

import hashlib
import io
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

_SCRIPT = """#!{python}
import os, shutil, sys, tarfile
here = {here!r}
name, arguments = os.path.basename(sys.argv[0]), sys.argv[1:]
open(os.path.join(here, "calls"), "a").write(" ".join([name, *arguments]) + "\\n")
if os.path.exists(os.path.join(here, "broken")) and "update" in arguments and "--print-uris" not in arguments:
    print("E: Failed to fetch the list", file=sys.stderr)
    sys.exit(100)
packages = sorted(path[:-4] for path in os.listdir(here) if path.endswith(".deb"))
if name == "apt-config":
    print('Acquire::http::Proxy "http://proxy:1";\\nAPT::Update::Post-Invoke "rm";')
elif "--print-uris" in arguments:
    print("'http://security.example/debian-security/dists/sid/InRelease' x")
    print("'http://mirror.example/debian/dists/sid/InRelease' y")
elif "--simulate" in arguments:
    for wanted in arguments[arguments.index("--simulate") + 1:]:
        for package in packages:
            if package.startswith(wanted.split("-amd64")[0].rsplit("-cloud")[0][:8]):
                n, v, a = package.replace("%3a", ":").split("_")
                print(f"Inst {{n}} ({{v}} Debian:unstable [{{a}}])")
elif name == "apt-cache":
    for wanted in arguments[1:]:
        print(open(os.path.join(here, wanted.replace("=", "_") + ".record")).read())
elif "download" in arguments:
    for option in arguments:
        if option.startswith("APT::Status-Fd="):
            os.write(int(option.split("=")[1]), b"dlstatus:1:50.0:Retrieving\\n")
    for wanted in arguments[arguments.index("download") + 1:]:
        (found,) = [p for p in packages if p.startswith(wanted.replace("=", "_").replace(":", "%3a") + "_")]
        shutil.copy(os.path.join(here, found + ".deb"), ".")
elif name == "dpkg-deb" and arguments[0] == "-x":
    tarfile.open(arguments[1]).extractall(arguments[2])
elif name == "dpkg-deb":
    sys.stdout.buffer.write(open(arguments[1], "rb").read())
"""


class Debian:
    """A machine with Debian's tools.

    Attributes:
        folder: the archives, and what the scripts write down.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder / "debian"
        tools = folder / "tools"
        for made in (self.folder, tools):
            made.mkdir()
        for name in ("apt-get", "apt-cache", "apt-config", "dpkg-deb"):
            script = tools / name
            script.write_text(_SCRIPT.format(python=sys.executable, here=str(self.folder)))
            script.chmod(0o755)
        keys = folder / "keys.gpg"
        keys.touch()
        monkeypatch.setenv("PATH", str(tools))
        monkeypatch.setattr("hostzero.vm.apt.find_keyring", lambda: keys)

    def package(self, name: str, version: str, files: Mapping[str, bytes]) -> None:
        """Put a package into the archive."""
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w") as tar:
            for path, content in files.items():
                member = tarfile.TarInfo(path)
                member.size = len(content)
                member.mode = 0o755
                tar.addfile(member, io.BytesIO(content))
        archive = data.getvalue()
        # As apt names its files: a colon is written %3a.
        escaped = version.replace(":", "%3a")
        (self.folder / f"{name}_{escaped}_amd64.deb").write_bytes(archive)
        digest = hashlib.sha256(archive).hexdigest()
        record = f"Package: {name}\nVersion: {version}\nSize: {len(archive)}\nSHA256: {digest}\n"
        (self.folder / f"{name}_{version}.record").write_text(record)

    def break_network(self) -> None:
        """Have every fetching of lists fail from now on."""
        (self.folder / "broken").touch()

    @property
    def calls(self) -> list[str]:
        """The commands that were run."""
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []
