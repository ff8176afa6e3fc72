"""To be removed: the place of these is now tests/toys."""

from toys.pages import *  # noqa: F403
