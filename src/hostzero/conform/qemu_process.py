# SPDX-License-Identifier: GPL-2.0-only
"""A QEMU without a guest: started for one case, driven over qtest and QMP, killed afterwards.

::

    starting ──connects, monitor answers──> running ──stop, or QEMU ends by itself──> ended

QEMU connects to two sockets that listen here already. As soon as its monitor answers, their folder
is gone, so that nothing of a run is left on disk whatever happens to this process later. QEMU has
nothing to save, so it is killed: it and whatever else a wrapper script started in its process group.

The qtest accelerator has no processor at all, but not every build has it. Elsewhere there is a
processor, and its firmware is nothing but HLT with interrupts off.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Final, Self

from qemu.qmp.error import QMPError
from qemu.qmp.qmp_client import ExecuteError

from hostzero.conform.qtest import ANSWER_SECONDS, Qtest
from hostzero.errors import TargetError, UsageError
from hostzero.qmp import Monitor
from hostzero.termination import ending_signals

CONNECT_SECONDS: Final = 30.0
"""How long QEMU may take to start."""

END_SECONDS: Final = 2.0
"""How long QEMU may take to end after it has closed its sockets: it may write a core dump."""

ACCELERATORS: Final = ("qtest", "tcg", "kvm")
"""The first that QEMU has is taken."""

FIRMWARE: Final = b"\xf4" * (64 << 10)
"""HLT, as far as the smallest firmware goes; a processor starts with interrupts off."""

_LOOK_EVERY: Final = 0.002
_LAST_LINES: Final = 2
_ASK_SECONDS: Final = 30.0


def ask(program: str, *arguments: str) -> str:
    """Return what a QEMU prints for `arguments`.

    Raises:
        UsageError: it does not start, or refuses them.
    """
    try:
        done = subprocess.run(
            [program, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_ASK_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        said = str(getattr(error, "stderr", None) or error).strip().splitlines()
        raise UsageError(f"--qemu {program}: does not run: {said[-1] if said else error}") from error
    return done.stdout


class QemuProcess:
    """One QEMU, which runs from when this is made until `stop`.

    Attributes:
        qtest: its bus and its clock.
    """

    qtest: Qtest

    def __init__(self, program: str, arguments: Sequence[str]) -> None:
        """Start QEMU and wait until it has connected.

        Raises:
            UsageError: it does not start; the text has its last words.
        """
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None
        with ExitStack() as stack:
            self._log = stack.enter_context(tempfile.TemporaryFile())
            stack.callback(self._kill)
            folder = Path(tempfile.mkdtemp(prefix="hostzero-qemu-"))
            try:
                self.qtest = Qtest(self._start(folder, arguments, stack), self.why)
                stack.callback(self.qtest.close)
                self._hello()
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            self._exit = stack.pop_all()

    def _start(self, folder: Path, arguments: Sequence[str], stack: ExitStack) -> socket.socket:
        firmware = folder / "firmware"
        firmware.write_bytes(FIRMWARE)
        accelerators = [word for name in ACCELERATORS for word in ("-accel", name)]
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listener.bind(str(folder / "qtest"))
        listener.listen(1)
        listener.settimeout(0.0)
        self._qmp = Monitor(folder / "qmp")
        stack.callback(self._qmp.close)
        command = [self._program, "-qtest", f"unix:{folder / 'qtest'}", "-qtest-log", os.devnull]
        command += ["-qmp", f"unix:{folder / 'qmp'}", "-bios", str(firmware), *accelerators, *arguments]
        try:
            with _signals_wait():
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=self._log,
                    stderr=subprocess.STDOUT,
                    # Ctrl-C on the terminal is for hostzero, which then kills all of the group.
                    start_new_session=True,
                )
        except OSError as error:
            raise UsageError(f"--qemu {self._program}: does not run: {error.strerror}") from error
        with listener:
            return self._accept(listener, time.monotonic() + CONNECT_SECONDS)

    def _accept(self, listener: socket.socket, deadline: float) -> socket.socket:
        while True:
            with contextlib.suppress(BlockingIOError):
                return listener.accept()[0]
            if self.ended:
                raise UsageError(f"--qemu {self._program}: does not start: {self.why()}")
            if time.monotonic() >= deadline:
                raise UsageError(
                    f"--qemu {self._program}: did not connect within {CONNECT_SECONDS:g} s; is it a QEMU?"
                )
            time.sleep(_LOOK_EVERY)

    # The machine is there when its monitor answers: before that it may still read the firmware.
    def _hello(self) -> None:
        self._qmp.settimeout(ANSWER_SECONDS)
        try:
            self._qmp.accept(ANSWER_SECONDS)
            self._qmp.cmd("query-status")
        except (OSError, EOFError, QMPError) as error:
            why = self.why() if self.ended else f"its monitor does not answer: {error}"
            raise UsageError(f"--qemu {self._program}: does not start: {why}") from error

    @property
    def ended(self) -> bool:
        """Whether QEMU has ended by itself."""
        return self._process is not None and self._process.poll() is not None

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Run a command of QEMU's monitor and return what it returns.

        Raises:
            TargetError: QEMU refuses, does not answer, or has ended.
        """
        try:
            return self._qmp.cmd(command, **arguments)
        except TimeoutError:
            raise TargetError(f"QEMU does not answer {command} within {ANSWER_SECONDS:g} s") from None
        except ExecuteError as error:
            raise TargetError(f"QEMU's monitor, {command}: {error}") from error
        except (OSError, EOFError, QMPError) as error:
            raise TargetError(self.why()) from error

    def why(self) -> str:
        """Return how QEMU ended and its last words, waiting for the end a little."""
        process = self._process
        if process is None:
            return "QEMU did not start"
        try:
            code = process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            return "QEMU closed its socket and goes on"
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        words = self._last_words()
        return f"QEMU ended ({how}){': ' if words else ''}{words}"

    def stop(self) -> None:
        """Kill QEMU; a second call does nothing."""
        self._exit.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _kill(self) -> None:
        if self._process is not None:
            # Also when the leader is gone: it may have been a script.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return " / ".join(line.strip() for line in lines[-_LAST_LINES:])


# A handler that raises between the start of a process and the moment it is known here would leave
# that process behind; a handler that waits is no handler of the child's, since exec forgets it.
@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[tuple[int, FrameType | None]] = []

    def note(number: int, frame: FrameType | None) -> None:
        arrived.append((number, frame))

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, *ending_signals())}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for sent, frame in arrived:
        handler = before[signal.Signals(sent)]
        if callable(handler):
            handler(sent, frame)
        elif handler is signal.SIG_DFL:
            signal.raise_signal(sent)
