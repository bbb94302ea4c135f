# SPDX-License-Identifier: GPL-2.0-only
"""Where the front end comes from: a path, a descriptor, or a socket that systemd has made.

Whoever made a socket file removes it: at the end the file is unlinked if it is still the one
that was made here.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from hostzero.errors import UsageError

SD_LISTEN_FDS_START: Final = 3
"""The first descriptor that systemd passes (sd_listen_fds(3))."""

_PATH_MAX: Final = 107  # sun_path, without the closing zero


class Endpoint:
    """A socket to serve.

    Attributes:
        sock: the socket.
        listening: whether front ends connect to it; else one is connected already.
    """

    def __init__(self, sock: socket.socket) -> None:
        """Look at a socket, which stays the caller's unless it is detached."""
        self.sock = sock
        self.listening = bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))

    def detach(self) -> socket.socket:
        """Return the socket as a new object that owns it."""
        return socket.socket(fileno=self.sock.detach())


@contextmanager
def open_endpoint(path: Path | None, fd: int | None) -> Iterator[Endpoint]:
    """Open what was asked for, or what systemd has passed, and close it in the end.

    Raises:
        UsageError: both or nothing was given, or it cannot be served; the text says why.
    """
    passed = inherited_fd(os.environ)
    given = [name for name, value in (("--socket-path", path), ("--fd", fd)) if value is not None]
    if len(given) == 2:
        raise UsageError("--socket-path and --fd: give one of them")
    if path is not None:
        with listen(path) as sock:
            yield Endpoint(sock)
        return
    number = passed if fd is None else fd
    if number is None:
        raise UsageError("no socket: give --socket-path PATH or --fd N, or start it by a systemd socket")
    with adopt(number) as sock:
        yield Endpoint(sock)


def inherited_fd(environment: MutableMapping[str, str]) -> int | None:
    """Return the descriptor that systemd has passed to this process; None if it has not.

    The variables are taken out of the environment, so that no child believes them.

    Raises:
        UsageError: more than one was passed.
    """
    pid, count = environment.pop("LISTEN_PID", ""), environment.pop("LISTEN_FDS", "")
    environment.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdecimal() or int(count) == 0:
        return None
    if int(count) > 1:
        raise UsageError(f"systemd has passed {count} sockets: the device serves one")
    return SD_LISTEN_FDS_START


def adopt(fd: int) -> socket.socket:
    """Return a descriptor as a socket object that owns it.

    Raises:
        UsageError: it is no Unix stream socket.
    """
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise UsageError(f"--fd {fd}: that descriptor is no socket")
    except (OSError, OverflowError) as error:
        raise UsageError(f"--fd {fd}: there is no such descriptor") from error
    sock = socket.socket(fileno=fd)
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
        sock.detach()
        raise UsageError(f"--fd {fd}: that is no Unix stream socket")
    os.set_inheritable(fd, False)
    return sock


@contextmanager
def listen(path: Path) -> Iterator[socket.socket]:
    """Listen on a path, and remove the socket file in the end.

    A socket file that nobody listens on any more, left by a process that was killed, is
    replaced.

    Raises:
        UsageError: the path is too long, something else is there, somebody listens there, or
            the file cannot be made.
    """
    if len(os.fsencode(path)) > _PATH_MAX:
        raise UsageError(f"--socket-path {path}: a socket's path has at most {_PATH_MAX} bytes")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        _remove_stale(path)
        try:
            sock.bind(str(path))
        except OSError as error:
            raise UsageError(f"--socket-path {path}: {error.strerror}") from error
        made = path.stat()
        try:
            sock.listen(1)
            yield sock
        finally:
            _unlink(path, made)


def _remove_stale(path: Path) -> None:
    try:
        there = path.lstat()
    except OSError:
        return
    if not stat.S_ISSOCK(there.st_mode):
        raise UsageError(f"--socket-path {path}: something is there that is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        error = probe.connect_ex(str(path))
    if error != errno.ECONNREFUSED:
        raise UsageError(f"--socket-path {path}: another process listens there")
    _unlink(path, there)


def _unlink(path: Path, made: os.stat_result) -> None:
    try:
        now = path.lstat()
        if (now.st_dev, now.st_ino) == (made.st_dev, made.st_ino):
            path.unlink()
    except FileNotFoundError:
        pass
