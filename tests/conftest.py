# SPDX-License-Identifier: GPL-2.0-only
"""What every test shares: the Hypothesis profiles, and Ctrl-C for the programs that tests start.

``tests`` is derandomized, so that one commit gives one result; ``uncompiled`` is the
same with few examples, for runs with NUMBA_DISABLE_JIT=1, where the allocator is 40
to 500 times slower; ``explore`` draws new examples each time, for looking for trouble:
``HYPOTHESIS_PROFILE=explore pytest tests``.
"""

from __future__ import annotations

import os
import signal

from hypothesis import HealthCheck, settings

_SLOW = [HealthCheck.too_slow]  # the first example pays for compiling

settings.register_profile(
    "tests", derandomize=True, deadline=None, database=None, print_blob=True, suppress_health_check=_SLOW
)
settings.register_profile("uncompiled", settings.get_profile("tests"), max_examples=10)
settings.register_profile(
    "explore", deadline=None, max_examples=2000, print_blob=True, suppress_health_check=_SLOW
)

_compiler_off = os.environ.get("NUMBA_DISABLE_JIT", "0") not in {"", "0"}
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("uncompiled" if _compiler_off else "tests"))

# A shell without job control starts background jobs with SIGINT ignored, and their children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
