"""To be removed: the place of these is now tests/toys."""

from toys.parity import *  # noqa: F403
