# SPDX-License-Identifier: GPL-2.0-only
"""Debian packages into a folder, with apt but without touching the machine's own apt.

Every file that apt writes (lists, archives, locks, logs) lies below a folder of ours: a
configuration file of our own says so, and apt reads it instead of the machine's. From the
machine come only the address of its Debian mirror and its settings for reaching it (proxies,
certificates). Signatures are checked against the installed Debian keyring, and apt checks
every download against what is signed.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hostzero.errors import UsageError, VmError
from hostzero.vm.progress import Progress

KEYRINGS: Final = (
    Path("/usr/share/keyrings/debian-archive-keyring.pgp"),
    Path("/usr/share/keyrings/debian-archive-keyring.gpg"),
)
SUITE: Final = "sid"
ARCHITECTURE: Final = "amd64"

_TOOLS: Final = {"apt-get": "apt", "apt-cache": "apt", "apt-config": "apt", "dpkg-deb": "dpkg"}
# Settings for reaching the mirror, and whether its lists may be old (a mirror of snapshots needs that);
# everything else of the machine's configuration is left behind.
_NETWORK: Final = re.compile(
    r"Acquire::(?:https?(?:::|\s)|Retries\s|ForceIPv[46]\s|Check-Valid-Until\s|Check-Date\s)"
)
# `Inst libc6 (2.43-7 Debian:unstable [amd64])`
_INSTALL: Final = re.compile(r"Inst (?P<name>\S+) \((?P<version>\S+) ")
_RELEASE: Final = re.compile(r"'(?P<base>[^']+?)/dists/(?P<suite>[^/']+)/InRelease'")
_VERBS: Final = {"update", "install", "download", "show", "dump"}
_STATUS: Final = re.compile(r"dlstatus:[^:]*:(?P<per_cent>[0-9.]+):")


@dataclass(frozen=True, slots=True)
class Package:
    """A package as the signed lists describe it; `size` is the archive's, in bytes."""

    name: str
    version: str
    size: int
    sha256: str


def require_tools() -> None:
    """Check that apt and dpkg are here.

    Raises:
        UsageError: a tool is missing; the text says which.
    """
    for tool, package in _TOOLS.items():
        if shutil.which(tool) is None:
            raise UsageError(
                f"there is no {tool} on this machine, and QEMU and the guest's kernel come from Debian: "
                f"install the package {package}, or run this on Debian or Ubuntu"
            )


def find_keyring(candidates: Iterable[Path] = KEYRINGS) -> Path:
    """Return the installed keys of the Debian archive.

    Raises:
        UsageError: they are not installed.
    """
    for path in candidates:
        if path.is_file():
            return path
    raise UsageError(
        "the keys of the Debian archive are not installed, and nothing is used that is not signed: "
        "install the package debian-archive-keyring"
    )


def parse_mirror(uris: str) -> str | None:
    """Return the Debian mirror among what ``apt-get update --print-uris`` prints, or None.

    That is an archive whose path ends in ``/debian``; archives of security updates and of
    others do not.
    """
    for match in _RELEASE.finditer(uris):
        base = match["base"].rstrip("/")
        if base.endswith("/debian"):
            return base
    return None


def parse_installs(simulation: str) -> list[tuple[str, str]]:
    """Return the names and versions that ``apt-get install --simulate`` would install."""
    return [(match["name"], match["version"]) for match in _INSTALL.finditer(simulation)]


def parse_records(records: str) -> list[Package]:
    """Return the packages that ``apt-cache show`` describes.

    Raises:
        VmError: a record lacks a field, so that a download could not be checked.
    """
    packages = []
    for record in records.strip().split("\n\n"):
        fields = dict(re.findall(r"^([A-Za-z0-9-]+): (.*)$", record, re.MULTILINE))
        try:
            package = Package(fields["Package"], fields["Version"], int(fields["Size"]), fields["SHA256"])
        except (KeyError, ValueError) as error:
            raise VmError(f"apt's record of {fields.get('Package', 'a package')} lacks {error}") from error
        packages.append(package)
    return packages


def network_settings(dump: str) -> str:
    """Return the lines of ``apt-config dump`` that say how to reach the network."""
    return "".join(f"{line}\n" for line in dump.splitlines() if _NETWORK.match(line))


class PrivateApt:
    """An apt that lives in one folder.

    Attributes:
        folder: everything that it writes is below.
        archives: where the packages are downloaded to.
    """

    def __init__(self, folder: Path, mirror: str | None = None) -> None:
        """Set up the folder; the network is not used.

        Args:
            folder: made if missing.
            mirror: the address of a Debian mirror; default: the one in the machine's apt sources.

        Raises:
            UsageError: apt or the keyring is missing, or the machine has no Debian mirror.
        """
        require_tools()
        keyring = find_keyring()
        self.folder = folder.resolve()
        self.archives = self.folder / "archives"
        self._environment = {**os.environ, "LC_ALL": "C", "APT_CONFIG": str(self.folder / "apt.conf")}
        settings = network_settings(_machine("apt-config", "dump"))
        if mirror is None:
            mirror = parse_mirror(_machine("apt-get", "update", "--print-uris"))
        if mirror is None:
            raise UsageError(
                "no Debian mirror in this machine's apt sources: name one with --mirror, its address "
                "up to and including /debian"
            )
        for name in ("lists/partial", "archives/partial", "state", "cache", "log", "etc"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        # An empty status file: nothing is installed here, so that every library is fetched.
        (self.folder / "state" / "status").touch()
        (self.folder / "debian.sources").write_text(
            f"Types: deb\nURIs: {mirror}\nSuites: {SUITE}\nComponents: main\n"
            f"Architectures: {ARCHITECTURE}\nSigned-By: {keyring}\n"
        )
        (self.folder / "apt.conf").write_text(self._configuration(settings))

    def _configuration(self, settings: str) -> str:
        here = self.folder
        # Main and Parts first: they keep the machine's own configuration, with its hooks, from being read.
        values = {
            "Dir::Etc::Main": "/dev/null",
            "Dir::Etc::Parts": "/dev/null",
            "Dir::Etc::SourceList": here / "debian.sources",
            "Dir::Etc::SourceParts": "/dev/null",
            "Dir::Etc::Preferences": "/dev/null",
            "Dir::Etc::PreferencesParts": "/dev/null",
            "Dir::Etc::Trusted": "/dev/null",
            "Dir::Etc::TrustedParts": "/dev/null",
            "Dir::State": here / "state",
            "Dir::State::Lists": here / "lists",
            "Dir::State::Status": here / "state" / "status",
            "Dir::Cache": here / "cache",
            "Dir::Cache::Archives": here / "archives",
            "Dir::Log": here / "log",
            "APT::Architecture": ARCHITECTURE,
            "APT::Architectures": ARCHITECTURE,
            "APT::Install-Recommends": "false",
            # The folder may be private to this user, where apt's own user cannot write.
            "APT::Sandbox::User": "root",
            "Acquire::Languages": "none",
        }
        return "".join(f'{name} "{value}";\n' for name, value in values.items()) + settings

    def update(self, progress: Progress) -> None:
        """Fetch and check the list of packages.

        Raises:
            VmError: the mirror cannot be reached, or its signature is not good.
        """
        progress.stage("fetching the list of Debian's packages")
        self._apt("apt-get", "-o", "APT::Update::Error-Mode=any", "update", progress=progress)

    def resolve(self, names: Sequence[str]) -> list[tuple[str, str]]:
        """Return names and versions of packages and of all that they depend on."""
        return parse_installs(self._apt("apt-get", "install", "--simulate", *names))

    def describe(self, chosen: Sequence[tuple[str, str]]) -> list[Package]:
        """Return what the signed lists say about packages."""
        return parse_records(
            self._apt("apt-cache", "show", *(f"{name}={version}" for name, version in chosen))
        )

    def download(self, packages: Sequence[Package], progress: Progress) -> list[Path]:
        """Return the archives of `packages`, fetched unless they are here and whole.

        Raises:
            VmError: the network failed, or a file is not what was signed. Run again, it goes on.
        """
        missing = [package for package in packages if not self._is_whole(package)]
        if missing:
            size = sum(package.size for package in missing)
            progress.stage(f"downloading {len(missing)} packages, {size / 1e6:.1f} MB")
            names = [f"{package.name}={package.version}" for package in missing]
            self._apt("apt-get", "download", *names, progress=progress)
        paths = []
        for package in packages:
            if not self._is_whole(package):
                raise VmError(f"the archive of {package.name} is not what Debian signed: run it again")
            paths.append(self._path(package))
        return paths

    def _path(self, package: Package) -> Path:
        escaped = package.version.replace(":", "%3a")
        for architecture in (ARCHITECTURE, "all"):
            path = self.archives / f"{package.name}_{escaped}_{architecture}.deb"
            if path.exists():
                return path
        return self.archives / f"{package.name}_{escaped}_{ARCHITECTURE}.deb"

    def _is_whole(self, package: Package) -> bool:
        path = self._path(package)
        if not path.exists() or path.stat().st_size != package.size:
            return False
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() == package.sha256

    def _apt(self, *command: str, progress: Progress | None = None) -> str:
        """Run a command of apt; its progress comes through a pipe of its own."""
        if progress is None:
            done = subprocess.run(
                command, env=self._environment, cwd=self.archives, capture_output=True, text=True, check=False
            )
            return _output(command, done.returncode, done.stdout, done.stderr)
        reader, writer = os.pipe()
        log = self.folder / "log" / "apt.txt"
        with log.open("w") as output:
            process = subprocess.Popen(
                [command[0], "-o", f"APT::Status-Fd={writer}", *command[1:]],
                env=self._environment,
                cwd=self.archives,
                pass_fds=(writer,),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        os.close(writer)
        try:
            with os.fdopen(reader) as lines:
                for line in lines:
                    if match := _STATUS.match(line):
                        progress.at(float(match["per_cent"]))
            status = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        return _output(command, status, "", log.read_text(errors="replace"))


def _machine(*command: str) -> str:
    """Return what the machine's own apt says; used for reading only."""
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return _output(command, done.returncode, done.stdout, done.stderr)


def _output(command: Sequence[str], status: int, stdout: str, stderr: str) -> str:
    if status == 0:
        return stdout
    complaints = [line for line in stderr.splitlines() if line.startswith(("E:", "W:", "Err:"))]
    said = "; ".join(complaints[-3:]) or f"exit status {status}"
    words = " ".join([command[0], *(word for word in command[1:] if word in _VERBS)])
    raise VmError(
        f"{words} failed: {said} (is the network there? what has been fetched is kept: run it again)"
    )
