# SPDX-License-Identifier: GPL-2.0-only
"""``hostzero vm``: options in, what happened out; the work is in `hostzero.vm`."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import click

from hostzero.cli.output import PATH, check_outputs, console_beside, write_output
from hostzero.document import to_json
from hostzero.errors import UsageError
from hostzero.termination import terminable
from hostzero.units import format_size

_cache = click.option(
    "--cache",
    type=PATH,
    metavar="DIR",
    help="What is prepared lies here.  [default: below the user's cache]",
)
_json = click.option("--json", "json_path", type=PATH, help="Write all that is known; - is stdout.")


@click.group(name="vm")
def command() -> None:
    """Run a stock Linux guest in a stock QEMU, with hostzero's balloon device or QEMU's own."""


@command.command(name="setup")
@_cache
@click.option(
    "--mirror", metavar="URL", help="A Debian mirror.  [default: the one in the machine's apt sources]"
)
@click.option(
    "--qemu", type=PATH, metavar="PATH", help="A QEMU to use.  [default: this machine's, or Debian's]"
)
@click.option("--fresh", is_flag=True, help="Prepare again, with the newest of everything.")
@_json
def setup_command(
    *, cache: Path | None, mirror: str | None, qemu: Path | None, fresh: bool, json_path: Path | None
) -> None:
    """Prepare QEMU, a kernel and a root file system in a folder; nothing else changes.

    QEMU is this machine's if it is 10.2 or newer and has the generic vhost-user device, else
    Debian's newest; the kernel is Debian's for clouds. Both come from the Debian mirror that
    this machine's apt uses, checked against its keys. About 80 MB are fetched. Run again, it
    goes on where it stopped, and does nothing if all is there.
    """
    from hostzero.vm.prepared import default_cache
    from hostzero.vm.progress import open_progress
    from hostzero.vm.setup import disk_use, setup

    check_outputs({"--json": json_path})
    with open_progress() as progress:
        ready = setup(cache or default_cache(), progress, mirror=mirror, qemu=qemu, fresh=fresh)

    write_output(json_path, to_json(ready.to_document()))
    console = console_beside(json_path)
    console.print(f"QEMU    {ready.qemu.version}", highlight=False)
    console.print(f"kernel  {ready.kernel_release}", highlight=False)
    console.print(
        f"folder  {ready.cache}, {disk_use(ready.cache) / 1e6:.0f} MB", highlight=False, soft_wrap=True
    )


@command.command(name="run")
@_cache
@click.option("--accel", type=click.Choice(["auto", "kvm", "tcg"]), default="auto", show_default=True)
@click.option("--memory", metavar="SIZE", default="3G", show_default=True, help="The guest's memory.")
@click.option(
    "--features", metavar="LIST", help="What the device offers, as in 'hostzero device --features'."
)
@_json
def run_command(
    *, cache: Path | None, accel: str, memory: str, features: str | None, json_path: Path | None
) -> None:
    """Boot a guest with hostzero's device and show what happens.

    The guest writes and frees 512 MiB, its balloon is inflated to 1 GiB and deflated, and after
    each phase the table says how much of its memory the host has backed. 'auto' takes KVM where
    a guest boots with it, else software emulation. Ctrl-C ends all of it.
    """
    from hostzero.device import DEFAULT_FEATURES
    from hostzero.units import parse_size
    from hostzero.vhost_user.server import device_config
    from hostzero.virtio.features import adjust_features
    from hostzero.vm.accel import choose
    from hostzero.vm.demo import MEMORY_MIN, run_demo
    from hostzero.vm.demo_view import open_view, print_run
    from hostzero.vm.prepared import default_cache, load
    from hostzero.vm.progress import open_progress

    check_outputs({"--json": json_path})
    size = parse_size(memory)
    if size < MEMORY_MIN or size % (2 << 20):
        raise UsageError(f"--memory {memory}: at least {format_size(MEMORY_MIN)}, and a multiple of 2M")
    _expect_memory(f"--memory {memory}: the guest", size)
    if features is not None:
        # The device would refuse them, too, but only when a guest is there.
        try:
            device_config(adjust_features(features, DEFAULT_FEATURES))
        except UsageError as error:
            raise UsageError(f"--features {features}: {error}") from error
    ready = load(cache or default_cache())
    with open_progress() as progress:
        chosen = choose(ready, accel, progress)
    from hostzero.render import open_console

    with terminable(), open_view(open_console(to_stderr=True)) as view:
        run = run_demo(ready, chosen, view, memory=size, features=features)
    write_output(json_path, to_json(run.to_document()))
    print_run(run, console_beside(json_path))
    if chosen.why and accel == "auto":
        click.echo(f"without KVM: {chosen.why}", err=True)


@command.command(name="compare")
@_cache
@click.option("--accel", type=click.Choice(["auto", "kvm", "tcg"]), default="auto", show_default=True)
@click.option(
    "--repeat", type=click.IntRange(min=1), default=5, show_default=True, help="Repetitions that count."
)
@click.option(
    "--append",
    multiple=True,
    metavar="TEXT",
    help="Add to the guest's kernel command line; may be given again, for another comparison.  "
    "[default: nothing, and then init_on_alloc=0]",
)
@click.option(
    "--hugetlb",
    is_flag=True,
    help="Guest memory of 2 MiB huge pages, from the host's pool; halves all sizes.",
)
@_json
@click.option("--markdown", type=PATH, help="Write the tables as Markdown; - is stdout.")
def compare_command(
    *,
    cache: Path | None,
    accel: str,
    repeat: int,
    append: tuple[str, ...],
    hugetlb: bool,
    json_path: Path | None,
    markdown: Path | None,
) -> None:
    """Compare hostzero's device with QEMU's own balloon: CPU time, wall time, memory given back.

    Two guests run, alike but for the device; what one is made to do the other does right after
    it. They inflate to 1 GiB, deflate, and report 512 MiB. With software emulation a repetition
    takes about a minute. With --hugetlb the host's pool has to have 1024 free pages; nothing
    here changes the pool. Ctrl-C ends all of it.
    """
    from hostzero.vm.accel import choose
    from hostzero.vm.compare import SETTINGS, Plan, run_compare
    from hostzero.vm.compare_table import print_comparison, to_markdown
    from hostzero.vm.huge_pages import require_pages
    from hostzero.vm.prepared import default_cache, load
    from hostzero.vm.progress import open_progress

    check_outputs({"--json": json_path, "--markdown": markdown})
    ready = load(cache or default_cache())
    plan = Plan(append or SETTINGS, repeat, hugetlb)
    if hugetlb:
        require_pages(plan.guests_memory)
    else:
        _expect_memory("the two guests", plan.guests_memory)
    with terminable(), open_progress() as progress:
        comparison = run_compare(ready, choose(ready, accel, progress), plan, progress)
    write_output(json_path, to_json(comparison.to_document()))
    if markdown is not None:
        write_output(markdown, to_markdown(comparison, dt.date.today().isoformat()))
    print_comparison(comparison, console_beside(json_path, markdown))


# A guest takes only what it touches, so that what is available now would be too strict a bound.
def _expect_memory(who: str, size: int) -> None:
    from hostzero.host import memory_limit

    if size > (limit := memory_limit()):
        raise UsageError(f"{who} would have {format_size(size)}, and this host has {limit >> 20}M of memory")
