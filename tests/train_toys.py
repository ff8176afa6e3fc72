"""To be removed: the place of these is now tests/toys."""

from toys.workplace import *  # noqa: F403
