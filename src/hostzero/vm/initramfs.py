# SPDX-License-Identifier: GPL-2.0-only
"""The guest's root file system: busybox, the balloon module of its kernel, and a shell that obeys.

The guest has two serial ports. On the first (``ttyS0``) the kernel logs. On the second
(``ttyS1``) the init script reads one command a line, runs it, and answers; the protocol is
in `hostzero.vm.agent`. Serial ports and not virtio, so that what carries the commands has
nothing in common with what is being tested.
"""

from __future__ import annotations

import gzip
from typing import Final

from hostzero.vm.cpio import archive, character_device, directory, file

MODULE: Final = "virtio_balloon.ko"
"""Where the module lies in the guest, relative to the root."""

INIT: Final = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mkdir -p /run
mount -t tmpfs -o mode=755 run /run
mount -t tmpfs -o size=95% memory /mnt
echo 1 > /proc/sys/vm/overcommit_memory
stty -F /dev/ttyS1 raw -echo
exec < /dev/ttyS1 > /dev/ttyS1
echo "@ready 0 0"
while read -r number command; do
    ( eval "$command" ) < /dev/null > /run/answer 2>&1
    status=$?
    echo "@$number $status $(wc -c < /run/answer)"
    cat /run/answer
done
"""


def build(busybox: bytes, module: bytes) -> bytes:
    """Return the initramfs, compressed with gzip; the same input gives the same bytes.

    Args:
        busybox: a statically linked busybox.
        module: virtio_balloon.ko of the guest's kernel, not compressed.
    """
    folders = ("bin", "dev", "mnt", "proc", "sys")
    entries = [directory(name) for name in folders]
    entries += [
        # What init writes before /dev is mounted goes somewhere.
        character_device("dev/console", 5, 1),
        character_device("dev/null", 1, 3),
        file("bin/busybox", busybox, executable=True),
        file("init", INIT.encode(), executable=True),
        file(MODULE, module),
    ]
    return gzip.compress(archive(entries), compresslevel=1, mtime=0)
