# SPDX-License-Identifier: GPL-2.0-only
"""The balloon device behind a vhost-user socket, and the socket on which it is steered."""
