"""To be removed: the place of these is now tests/toys."""

from toys.processes import *  # noqa: F403
