# SPDX-License-Identifier: GPL-2.0-only
"""The guest's memory manager, one module per kernel file or concept.

`MemoryManager` is what the rest of the house uses; everything below it is compiled.
"""

from hostzero.mm.manager import MemoryManager, MmConfig, VmStats
from hostzero.mm.mmap import Process
from hostzero.mm.mmzone import ZoneSpec
from hostzero.mm.page_reporting import PageReporting, PageReportingDevInfo

__all__ = [
    "MemoryManager",
    "MmConfig",
    "PageReporting",
    "PageReportingDevInfo",
    "Process",
    "VmStats",
    "ZoneSpec",
]
