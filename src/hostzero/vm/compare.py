# SPDX-License-Identifier: GPL-2.0-only
"""`hostzero vm compare`: hostzero's device and QEMU's own, side by side, on the same guest.

For each setting (a kernel command line) two guests run at the same time, alike but for the
device. One is measured while the other rests; then the other does the same. Which goes first
alternates from one repetition to the next. So both see the same machine within seconds, have the
same past, and neither pays for the other's start. A guest without a device of the other kind, and
not one guest with both: a second process that maps guest memory would make QEMU's discards dearer.

::

    for each setting:  boot both ── a repetition that is not counted ── repetitions ── end both
                       (once without reporting: inflate, deflate; once with it: report)

n counts repetitions on one boot of each guest. What differs from boot to boot is not in the spread.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from hostzero.host import describe_host
from hostzero.stats import PairedRatio, paired_ratio
from hostzero.vm.accel import Accel
from hostzero.vm.command_line import GuestOptions
from hostzero.vm.compare_phases import (
    RULE,
    Arm,
    ArmName,
    Phase,
    Sample,
    balloon_phases,
    open_arm,
    report_phase,
    rest,
)
from hostzero.vm.huge_pages import require_pages
from hostzero.vm.prepared import Prepared
from hostzero.vm.progress import Progress
from hostzero.vm.steps import MIB

FORMAT: Final = 1
SETTINGS: Final = ("", "init_on_alloc=0")
"""A Debian kernel as it is, which zeroes what it allocates, also for the balloon; and one that does not."""
NO_REPORTING: Final = "-reporting,-device-init-reported"


@dataclass(frozen=True, slots=True)
class Plan:
    """What to compare.

    Attributes:
        settings: additions to the guest's kernel command line, one after the other.
        repeat: repetitions of each phase and arm that count.
        huge_pages: guest memory of 2 MiB huge pages, and half of all sizes.
    """

    settings: tuple[str, ...] = SETTINGS
    repeat: int = 5
    huge_pages: bool = False

    @property
    def memory(self) -> int:
        """The guests' memory, in bytes."""
        return 1024 * MIB if self.huge_pages else 2048 * MIB

    @property
    def guests_memory(self) -> int:
        """The memory of all guests that run at one time, in bytes."""
        return len(ArmName) * self.memory

    @property
    def inflate(self) -> int:
        """The balloon's target, in bytes."""
        return self.memory // 2

    @property
    def report(self) -> int:
        """What is written and freed, in bytes."""
        return self.memory // 4

    def features(self, *, reporting: bool) -> str | None:
        """Return what hostzero's device is told to offer; None is its default.

        On huge pages it needs MUST_TELL_HOST to put a page of 2 MiB together from two requests.
        """
        changes = [] if reporting else [NO_REPORTING]
        if self.huge_pages:
            changes.append("+must-tell-host")
        return ",".join(changes) or None


@dataclass(slots=True)
class Setting:
    """What was measured with one kernel command line.

    Attributes:
        append: the addition to it.
        acked: the feature bits that the driver took, by arm, of the guests of the last stage.
        samples: in the order in which they were measured.
    """

    append: str
    acked: dict[ArmName, list[int]] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)

    def of(self, arm: ArmName, phase: Phase) -> list[Sample]:
        """Return one arm's samples of a phase, by repetition."""
        found = [sample for sample in self.samples if (sample.arm, sample.phase) == (arm, phase)]
        return sorted(found, key=lambda sample: sample.repetition)

    def ratio(self, phase: Phase, figure: Callable[[Sample], float]) -> PairedRatio:
        """Return hostzero's figure over QEMU's, repetition by repetition."""
        ours, theirs = (self.of(arm, phase) for arm in ArmName)
        return paired_ratio([figure(sample) for sample in ours], [figure(sample) for sample in theirs])

    def phases(self) -> list[Phase]:
        """Return the phases that were measured, in their order."""
        return [phase for phase in Phase if self.of(ArmName.HOSTZERO, phase)]


@dataclass(slots=True)
class Comparison:
    """What was measured."""

    plan: Plan
    accel: str
    qemu: str
    kernel: str
    host: dict[str, object]
    settings: list[Setting] = field(default_factory=list)

    def to_document(self) -> dict[str, Any]:
        """Return what ``--json`` writes: sizes in bytes, times in seconds, every repetition."""
        plan = self.plan
        return {
            "format": FORMAT,
            "host": self.host,
            "qemu": self.qemu,
            "kernel": self.kernel,
            "accel": self.accel,
            "guest": {
                "memory": plan.memory,
                "inflate": plan.inflate,
                "report": plan.report,
                "huge_pages": plan.huge_pages,
            },
            "disturbed_rule": RULE,
            "settings": [_setting_document(setting) for setting in self.settings],
        }


def _setting_document(setting: Setting) -> dict[str, Any]:
    return {
        "append": setting.append,
        "acked": {str(arm): bits for arm, bits in setting.acked.items()},
        "ratios": {
            str(phase): {
                "device": setting.ratio(phase, lambda sample: sample.device)._asdict(),
                "everything": setting.ratio(phase, lambda sample: sample.everything)._asdict(),
                "wall": setting.ratio(phase, lambda sample: sample.wall)._asdict(),
            }
            for phase in setting.phases()
        },
        "samples": [
            asdict(sample) | {"device": sample.device, "disturbed": sample.disturbed}
            for sample in setting.samples
        ],
    }


def in_turn(repetition: int) -> list[ArmName]:
    """Return the arms in the order in which they are measured."""
    arms = list(ArmName)
    return arms if repetition % 2 == 0 else arms[::-1]


def run_compare(prepared: Prepared, accel: Accel, plan: Plan, progress: Progress) -> Comparison:
    """Measure what `plan` says.

    Raises:
        UsageError: huge pages are wanted and there are too few.
        VmError: a guest does not start, or does not do what it is asked.
    """
    if plan.huge_pages:
        require_pages(plan.guests_memory)
    comparison = Comparison(plan, accel.name, prepared.qemu.version, prepared.kernel_release, describe_host())
    for append in plan.settings:
        setting = Setting(append)
        comparison.settings.append(setting)
        for reporting in (False, True):
            _stage(prepared, accel, setting, plan, progress, reporting=reporting)
    return comparison


def _stage(
    prepared: Prepared, accel: Accel, setting: Setting, plan: Plan, progress: Progress, *, reporting: bool
) -> None:
    options = GuestOptions(
        accel=accel.name,
        memory=plan.memory,
        append=f"quiet {setting.append}".strip(),
        huge_pages=plan.huge_pages,
        reporting=reporting,
    )
    phases = "report" if reporting else "inflate and deflate"
    kernel = setting.append or "kernel as it is"
    progress.stage(f"{kernel}: booting two guests for {phases}")
    with ExitStack() as stack:
        arms: dict[ArmName, Arm] = {}
        for number, name in enumerate(ArmName):
            features = plan.features(reporting=reporting)
            arms[name] = stack.enter_context(open_arm(name, prepared, options, features))
            setting.acked[name] = sorted(arms[name].guest.acked_features(str(name)))
            progress.at(50 * (number + 1))
        for arm in arms.values():
            rest(arm)
        progress.stage(f"{kernel}: {phases}, {plan.repeat} times and once to warm up")
        for turn in range(-1, plan.repeat):
            for step, name in enumerate(in_turn(turn)):
                if reporting:
                    samples = report_phase(arms[name], turn, plan.report)
                else:
                    samples = balloon_phases(arms[name], turn, plan.inflate)
                if turn >= 0:
                    setting.samples += samples
                progress.at(100 * (2 * (turn + 1) + step + 1) / (2 * (plan.repeat + 1)))
