# SPDX-License-Identifier: GPL-2.0-only
"""The guest's balloon driver: probe, remove, freeze, restore, and what the device calls.

Kernel: `drivers/virtio/virtio_balloon.c` of Linux 7.2 with patches 4, 27, 28, 31, 32, 36 and 37
of the series. It differs on purpose in these places:

- A device that breaks the ring's rules or does not answer is reset at once and not used again.
  The kernel waits for ever. Its pages come back with `remove`.
- `restore` writes `poison_val` again. The kernel does not, and after hibernation the device's
  value is 0: it would promise zeros to a guest that expects its poison.
- `restore(hibernated=True)` drops every known-zero mark first. The image of a hibernated guest
  holds the marks but not the contents of free pages, so each mark would be a false claim.
- Work that the kernel queues runs at once if the driver is idle, and on the guest's clock if
  the device calls back in the middle of a request.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from hostzero.driver import negotiate
from hostzero.driver.config_space import ConfigSpace
from hostzero.driver.guest_mm import GuestMm
from hostzero.driver.inflate import Inflation
from hostzero.driver.oom import virtio_balloon_oom_notify, wants_oom_notifier
from hostzero.driver.queues import Wait, no_answer
from hostzero.driver.reporting import FreePageReporting
from hostzero.driver.session import Session, init_vqs
from hostzero.driver.validate import GuestFacts, refused, virtballoon_validate
from hostzero.errors import DriverError, HostzeroError, NegotiationError
from hostzero.ram import GuestMemory
from hostzero.units import Pfn
from hostzero.virtio.balloon import ARRAY_PFNS_MAX
from hostzero.virtio.features import Feature, QueueRole, names
from hostzero.virtio.transport import Status, Transport

_log = logging.getLogger(__name__)

RETRY_SECONDS: Final = 0.2
"""How long the balloon waits for memory before it tries again (kernel: `msleep(200)`)."""

REQUEUE_SECONDS: Final = 0.004
"""One tick at HZ=250: when a callback runs that came in the middle of a request.

Above zero, so that a device which calls back each time cannot stop guest time.
"""


class State(enum.Enum):
    """Where the driver stands; each call says which states it needs."""

    UNBOUND = "not probed"
    ACTIVE = "active"
    FROZEN = "frozen"
    FAILED = "failed"


class VirtioBalloon:
    """A balloon driver, bound to a device by `probe`.

    Attributes:
        state: where the driver stands.
        features: what was negotiated; none before `probe`.
        failure: what made the state FAILED.
    """

    def __init__(
        self, mm: GuestMm, memory: GuestMemory, transport: Transport, *, wait: Wait = no_answer
    ) -> None:
        """Know the device without touching it.

        Args:
            mm: the guest's memory manager.
            memory: guest physical memory, which holds the rings.
            transport: the device.
            wait: called when a kick brought no answer; the default gives up at once, which is
                right where `notify` runs the device. Another process needs a hook that sleeps
                until the queue's interrupt and raises `DriverError` when its patience ends.
        """
        self.state = State.UNBOUND
        self.features = Feature(0)
        self.failure: Exception | None = None
        self._mm = mm
        self._memory = memory
        self._transport = transport
        self._wait = wait
        self._config = ConfigSpace(transport)
        self._session: Session | None = None
        self._reporting: FreePageReporting | None = None
        self._registered: list[Callable[[], None]] = []  # what takes each callback off again
        self._busy = 0
        self._size_work = mm.clock.delayed_work(self.virtballoon_changed)
        self._stats_work = mm.clock.delayed_work(self.stats_request)

    @property
    def num_pages(self) -> int:
        """Pages of 4 KiB in the balloon."""
        return self._session.inflation.num_pages if self._session else 0

    @property
    def num_free_page_blocks(self) -> int:
        """Blocks of the largest order that are held for the host's free page hinting."""
        return self._session.hint.num_free_page_blocks if self._session and self._session.hint else 0

    @property
    def reporting(self) -> FreePageReporting | None:
        """The reporting queue, if REPORTING was negotiated."""
        return self._reporting

    @property
    def guest(self) -> GuestFacts:
        """What validation needs to know of this guest."""
        config = self._mm.config
        return GuestFacts(config.init_on_free, config.page_poisoning, config.confidential)

    def virtballoon_migratepage(self, newpage: Pfn, page: Pfn) -> bool:
        """Tell the host that `newpage` replaces `page`; see `Inflation.virtballoon_migratepage`.

        Raises:
            BlockingIOError: the balloon is busy (kernel: -EAGAIN).
            DriverError: the driver is not active.
        """
        self._need("migratepage", State.ACTIVE)
        assert self._session is not None
        with self._working():
            return self._session.inflation.virtballoon_migratepage(newpage, page)

    def probe(self) -> None:
        """Bind to the device, prime its queues, and move to the size that it wants.

        Raises:
            NegotiationError: the two ends cannot agree on features.
            DriverError: the device lacks a queue, has one that is too small, or fails at its
                first request; or the driver is bound already.
            OutOfMemory: no pages for the rings.
            HostzeroError, OSError: anything else that the device breaks. In every case nothing
                is left allocated or registered.
        """
        self._need("probe", State.UNBOUND)
        try:
            offered = negotiate.begin(self._transport)
            self.features = virtballoon_validate(offered, self.guest)
            for feature, why in refused(offered, self.guest):
                _log.info("feature %s is not used: %s", *names(feature), why)
            self._session = self._init_vqs()
            self._transport.on_config_change(self.virtballoon_changed)
            if wants_oom_notifier(self.features):
                self._registered.append(self._mm.register_oom_notifier(self._oom_notify))
            self._registered.append(self._mm.balloon.register_migratepage(self.virtballoon_migratepage))
            if QueueRole.REPORTING in self._session.queues:
                reporting = FreePageReporting(
                    self._mm, self._session.queues[QueueRole.REPORTING], self.features, self._device_in_use
                )
                self._mm.page_reporting.register(reporting.pr_dev_info)
                self._reporting = reporting
            self._start(self._session)
        except (HostzeroError, OSError):
            self._undo_probe()
            raise

    def remove(self) -> None:
        """Empty the balloon, reset the device and give every page back.

        A device that fails on the way is reset and loses its say; its pages are freed without
        telling it.

        Raises:
            DriverError: the driver is not bound; or the device does not reset, in which case
                what it may still write to stays allocated.
        """
        self._need("remove", State.ACTIVE, State.FROZEN, State.FAILED)
        self._unregister()
        self._remove_common()
        self._forget()

    def freeze(self) -> None:
        """Leak the whole balloon and let the queues go, before suspend or hibernation.

        Reporting stays registered and refuses batches until `restore`.

        Raises:
            DriverError: as `remove`.
        """
        self._need("freeze", State.ACTIVE, State.FAILED)
        self._remove_common()
        self.state = State.FROZEN

    def restore(self, *, hibernated: bool = False) -> None:
        """Bring the device back with the features it had, and refill the balloon.

        Args:
            hibernated: the guest's memory comes from an image, which does not hold the contents
                of free pages. Every known-zero mark is dropped before anything is allocated.

        Raises:
            NegotiationError: the device no longer offers a feature in use.
            HostzeroError, OSError: as `probe`; the driver stays frozen.
        """
        self._need("restore", State.FROZEN)
        if hibernated:
            # Before the rings are allocated: they are asked for as zeroed pages.
            self._mm.forget_zero_claims()
        try:
            offered = negotiate.begin(self._transport)
            if missing := self.features & ~Feature(offered):
                lost = ", ".join(names(missing))
                raise NegotiationError(f"the restored device no longer offers {lost}")
            self._session = self._init_vqs()
            if self._reporting is not None:
                self._reporting.resume(self._session.queues[QueueRole.REPORTING])
            self._start(self._session)
            self.update_balloon_size()
        except (HostzeroError, OSError):
            if self._session is not None:
                self._remove_common()
            self.state = State.FROZEN
            raise

    def update_balloon_size(self) -> None:
        """Tell the host the balloon's size (kernel: `update_balloon_size`)."""
        self._config.write_actual(self.num_pages)

    def towards_target(self) -> int:
        """Return the pages to inflate, negative to deflate.

        A target above the guest's RAM means all of it: the host's wish is no measure of what
        there is.
        """
        return min(self._config.num_pages(), self._mm.nr_pages) - self.num_pages

    def virtballoon_changed(self) -> None:
        """Follow the configuration space (kernel: `virtballoon_changed` and the work it queues).

        Raises:
            HostzeroError: the device breaks a rule of the ring or does not answer; it was reset.
        """
        if self.state is not State.ACTIVE or self._session is None:
            return
        if self._busy:
            self._size_work.schedule(REQUEUE_SECONDS)
            return
        with self._working():
            if self._transport.status() & Status.NEEDS_RESET:
                self._device_failed(DriverError("the device asks to be reset (DEVICE_NEEDS_RESET)"))
                return
            self._update_balloon_size_func(self._session.inflation)
            if self._session.hint is not None:
                self._session.hint.report_free_page_func()

    def stats_request(self) -> None:
        """Refill the statistics buffer if the device returned it (kernel: `stats_request`).

        Raises:
            HostzeroError: the device breaks a rule of the ring; it was reset.
        """
        if self.state is not State.ACTIVE or self._session is None or self._session.stats is None:
            return
        if self._busy:
            self._stats_work.schedule(REQUEUE_SECONDS)
            return
        with self._working():
            self._session.stats.stats_handle_request()

    def _update_balloon_size_func(self, inflation: Inflation) -> None:
        # Enough requests to cross all of RAM twice; a host that changes its mind at every request
        # gets the rest later, so that it cannot keep the guest here.
        for _ in range(2 * (self._mm.nr_pages // ARRAY_PFNS_MAX + 1)):
            diff = self.towards_target()
            if diff == 0:
                return
            done = inflation.fill_balloon(diff) if diff > 0 else inflation.leak_balloon(-diff)
            self.update_balloon_size()
            if done < min(abs(diff), ARRAY_PFNS_MAX):
                break
        self._size_work.schedule(RETRY_SECONDS)

    def _init_vqs(self) -> Session:
        negotiate.accept(self._transport, self.features)
        return init_vqs(
            self._mm,
            self._memory,
            self._transport,
            self.features,
            stats_interrupt=self.stats_request,
            wait=self._wait,
            broken=self._device_failed,
        )

    def _start(self, session: Session) -> None:
        if Feature.PAGE_POISON in self.features:
            self._config.write_poison_val(self.guest.poison_val)
        self.failure = None
        self.state = State.ACTIVE
        with self._working():
            negotiate.driver_ok(self._transport)
            if session.stats is not None:
                # After DRIVER_OK: a driver must not notify before it (virtio 1.3, 3.1.1).
                session.stats.prime()
        # A callback on the way here may have queued the same; then this does the work early.
        if not self._size_work.flush():
            self.virtballoon_changed()
        self._raise_failure()

    def _raise_failure(self) -> None:
        # A device may fail in a callback, which has nobody to raise to.
        if self.failure is not None:
            raise self.failure

    def _oom_notify(self) -> int:
        if self.state is not State.ACTIVE or self._session is None:
            return 0
        with self._working():
            return virtio_balloon_oom_notify(
                self._session.inflation, self._session.hint, self.features, self.update_balloon_size
            )

    def _device_failed(self, error: Exception) -> None:
        # The broken hook of every queue. After the reset the device owns no page of a request
        # that it did not answer, and so the caller may go on to free or keep them.
        if self.state is State.FAILED:
            return
        _log.error("the balloon device is reset and not used any more: %s", error)
        self.state = State.FAILED
        self.failure = error
        self._cancel_work()
        try:
            negotiate.reset(self._transport)
        except (HostzeroError, OSError) as reset_error:
            _log.error("%s", reset_error)

    def _remove_common(self) -> None:
        # Kernel remove_common(), with the pages freed after the reset, when nobody can write to them.
        session = self._session
        if session is None:
            return
        inflation = session.inflation
        if self.state is State.ACTIVE:
            try:
                with self._working():
                    while inflation.num_pages and inflation.leak_balloon(inflation.num_pages):
                        self.update_balloon_size()
                    self.update_balloon_size()
            except (HostzeroError, OSError) as error:
                self._device_failed(error)
        # Not ACTIVE from here on: the device may call back once more, and no work is to be queued.
        self.state = State.FAILED
        self._cancel_work()
        negotiate.reset(self._transport)
        session.free(self._mm)
        self._session = None

    def _undo_probe(self) -> None:
        self._unregister()
        if self._session is not None:
            self._remove_common()
        self._forget()
        try:
            # Added to what is set: only a reset clears a bit, and without a session there was none.
            self._transport.set_status(self._transport.status() | Status.FAILED)
        except OSError as error:
            _log.warning("the device cannot be told that probe failed: %s", error)

    def _unregister(self) -> None:
        if self._reporting is not None:
            self._mm.page_reporting.unregister(self._reporting.pr_dev_info)
            self._reporting = None
        for unregister in self._registered:
            unregister()
        self._registered.clear()

    def _forget(self) -> None:
        self.state = State.UNBOUND
        self.features = Feature(0)

    def _cancel_work(self) -> None:
        self._size_work.cancel()
        self._stats_work.cancel()

    def _need(self, call: str, *states: State) -> None:
        if self.state not in states:
            wanted = " or ".join(state.value for state in states)
            raise DriverError(f"{call}: the driver is {self.state.value}, and must be {wanted}")

    @contextmanager
    def _device_in_use(self) -> Iterator[None]:
        if self.state is not State.ACTIVE:
            raise DriverError(f"no report: the balloon driver is {self.state.value}")
        with self._working():
            yield

    @contextmanager
    def _working(self) -> Iterator[None]:
        self._busy += 1
        try:
            yield
        finally:
            self._busy -= 1
