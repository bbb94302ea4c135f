# SPDX-License-Identifier: GPL-2.0-only
"""The search for one page that is believed zero and is not.

`run` shares the time out among the searches, `oracle` says what is wrong, `lifecycle` is the
table of what may happen to a claim, `recording` keeps a failure so that it can be run again,
and `mutants` shows that the searches find what is there to be found.
"""
